// Threads that run one function side by side, with barriers between its phases. Idle threads sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

namespace flexjudge {

// What the threads of one call share. Every thread must reach every barrier.
class Team {
 public:
  explicit Team(int size) : size_(size) {}
  int size() const { return size_; }
  void barrier();

 private:
  const int size_;
  std::atomic<std::uint32_t> arrived_{0};
  std::atomic<std::uint32_t> round_{0};
};

// Runs `work(team, rank)` on ranks 0 .. threads-1; rank 0 is the caller. Calls from several threads take turns.
// Safe after fork: the child starts threads of its own.
void run_team(int threads, const std::function<void(Team&, int)>& work);

// The share [begin, end) of `count` items that rank `rank` of `size` takes.
struct Share {
  std::int64_t begin, end;
  Share(std::int64_t count, int rank, int size) : begin(count * rank / size), end(count * (rank + 1) / size) {}
};

}  // namespace flexjudge
