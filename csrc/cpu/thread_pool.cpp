// One pool per process: workers sleep on a futex between calls and spin only inside one.
#include "flexjudge/thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <mutex>
#include <thread>
#include <vector>

namespace flexjudge {
namespace {

constexpr int kSpins = 4096;  // some 30 us of pauses; then the core is offered to whoever holds the others up

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  explicit Pool(pid_t owner) : owner_(owner) {}
  pid_t owner() const { return owner_; }

  void run(int threads, const std::function<void(Team&, int)>& work) {
    const std::lock_guard<std::mutex> turn(mutex_);
    while (static_cast<int>(workers_.size()) < threads - 1) add_worker();
    Team team(threads);
    team_ = &team;
    work_ = &work;
    running_.store(threads - 1, std::memory_order_relaxed);
    for (int i = 0; i < threads - 1; ++i) {
      workers_[static_cast<std::size_t>(i)]->calls.fetch_add(1, std::memory_order_release);
      workers_[static_cast<std::size_t>(i)]->calls.notify_one();
    }
    work(team, 0);
    for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) {
      spins < kSpins ? pause() : static_cast<void>(sched_yield());
    }
  }

 private:
  struct alignas(64) Worker {
    std::atomic<std::uint32_t> calls{0};
  };

  void add_worker() {
    workers_.push_back(std::make_unique<Worker>());
    Worker* worker = workers_.back().get();
    const int rank = static_cast<int>(workers_.size());
    std::thread([this, worker, rank] {
      for (std::uint32_t seen = 0;; ++seen) {
        worker->calls.wait(seen, std::memory_order_acquire);
        (*work_)(*team_, rank);
        running_.fetch_sub(1, std::memory_order_release);
      }
    }).detach();
  }

  const pid_t owner_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
  Team* team_ = nullptr;
  const std::function<void(Team&, int)>* work_ = nullptr;
  std::atomic<int> running_{0};
};

// The process's pool. Never destroyed: its threads sleep until the process ends. A forked child has none of
// them, so it leaves the inherited pool alone and makes its own.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load(std::memory_order_acquire);
  const pid_t self = getpid();
  while (found == nullptr || found->owner() != self) {
    auto* fresh = new Pool(self);
    if (current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
  }
  return *found;
}

}  // namespace

void Team::barrier() {
  if (size_ == 1) return;
  const std::uint32_t round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<std::uint32_t>(size_)) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
    spins < kSpins ? pause() : static_cast<void>(sched_yield());
  }
}

void run_team(int threads, const std::function<void(Team&, int)>& work) {
  if (threads > 1) return pool().run(threads, work);
  Team alone(1);
  work(alone, 0);
}

}  // namespace flexjudge
