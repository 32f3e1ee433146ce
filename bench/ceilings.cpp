// What the machine can do, measured on request: `ceilings BYTES`, then a line "NAME THREADS USED" on stdin per
// measurement, answered with a number (GB/s or giga-operations a second) or "missing REASON". Reads go over USED of BYTES.
// NAME: read, int8 (vpdpbusd, or vpmaddubsw without the sums it needs), bf16 (vdpbf16ps), fp32 (fused multiply-add).
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
typedef long long Line __attribute__((vector_size(64)));  // one cache line, whatever the vectors' width

// Every thread takes its own time from the moment all are ready; the slowest counts.
template <class Work>
double seconds(int threads, Work work) {
  std::vector<std::thread> team;
  const auto start = Clock::now();
  for (int rank = 1; rank < threads; ++rank) team.emplace_back(work, rank);
  work(0);
  for (std::thread& thread : team) thread.join();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

volatile long long sink;

// One pass over the rank's share. `ahead` bytes are fetched ahead into the L2 cache; 0: the processor decides.
template <int ahead>
void read_share(const std::uint8_t* memory, std::size_t bytes, int rank, int threads, int passes) {
  const std::uint8_t *begin = memory + bytes / 256 / threads * rank * 256, *end = begin + bytes / 256 / threads * 256;
  Line a{}, b{}, c{}, d{};
  for (int pass = 0; pass < passes; ++pass) {
    for (const std::uint8_t* p = begin; p < end; p += 256) {
      if constexpr (ahead > 0) {
        for (int line = 0; line < 256; line += 64) __builtin_prefetch(p + ahead + line, 0, 2);
      }
      const auto* lines = reinterpret_cast<const Line*>(p);
      a ^= lines[0];
      b ^= lines[1];
      c ^= lines[2];
      d ^= lines[3];
    }
  }
  a ^= b ^ c ^ d;
  sink = a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}

// GB/s: the better of the two readers.
double read_speed(const std::uint8_t* memory, std::size_t bytes, int threads) {
  const int passes = static_cast<int>(std::max<std::size_t>(1, (std::size_t{1} << 30) / bytes));
  const double total = 1e-9 * static_cast<double>(bytes) * passes;
  const double plain = seconds(threads, [&](int rank) { read_share<0>(memory, bytes, rank, threads, passes); });
  const double ahead = seconds(threads, [&](int rank) { read_share<16384>(memory, bytes, rank, threads, passes); });
  return total / std::min(plain, ahead);
}

// A loop of twelve independent chains, each in a register named here: an array of accumulators gets spilled.
#define FLEXJUDGE_CHAINS(NAME, REGISTER, OP)                                                                  \
  void NAME(long rounds) {                                                                                    \
    REGISTER a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{}, k{}, l{}, x{}, y{};                            \
    for (long round = 0; round < rounds; ++round) {                                                           \
      asm volatile(OP " %13, %12, %0\n" OP " %13, %12, %1\n" OP " %13, %12, %2\n" OP " %13, %12, %3\n"        \
                   OP " %13, %12, %4\n" OP " %13, %12, %5\n" OP " %13, %12, %6\n" OP " %13, %12, %7\n"        \
                   OP " %13, %12, %8\n" OP " %13, %12, %9\n" OP " %13, %12, %10\n" OP " %13, %12, %11\n"      \
                   : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(i),         \
                     "+v"(j), "+v"(k), "+v"(l)                                                                \
                   : "v"(x), "v"(y));                                                                         \
    }                                                                                                         \
  }

#ifdef __AVX512VNNI__
FLEXJUDGE_CHAINS(int8_chains, __m512i, "vpdpbusd")
constexpr int kByteOperations = 128;
#elif defined(__AVX2__)
FLEXJUDGE_CHAINS(int8_chains, __m256i, "vpmaddubsw")
constexpr int kByteOperations = 64;
#endif
#ifdef __AVX512BF16__
FLEXJUDGE_CHAINS(bf16_chains, __m512, "vdpbf16ps")
#endif
#if defined(__AVX512F__)
FLEXJUDGE_CHAINS(fp32_chains, __m512, "vfmadd231ps")
constexpr int kFloats = 16;
#elif defined(__FMA__)
FLEXJUDGE_CHAINS(fp32_chains, __m256, "vfmadd231ps")
constexpr int kFloats = 8;
#endif

// Giga-operations a second, where one instruction does `operations`.
[[maybe_unused]] double speed(void (*chains)(long), int operations, int threads) {
  constexpr long kRounds = 4'000'000;
  return 1e-9 * 12 * kRounds * operations * threads / seconds(threads, [&](int) { chains(kRounds); });
}

// The number for one request, or -1 with why there is none.
double answer(const std::string& name, int threads, const std::uint8_t* memory, std::size_t bytes, std::string& why) {
  if (name == "read") return read_speed(memory, bytes, threads);
#if defined(__AVX512VNNI__) || defined(__AVX2__)
  if (name == "int8") return speed(int8_chains, kByteOperations, threads);
#endif
#ifdef __AVX512BF16__
  if (name == "bf16") return speed(bf16_chains, 64, threads);
#endif
#if defined(__AVX512F__) || defined(__FMA__)
  if (name == "fp32") return speed(fp32_chains, 2 * kFloats, threads);
#endif
  why = "the processor or the compiler has no instruction for " + name;
  return -1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  constexpr std::size_t kPage = 2 << 20;
  const std::size_t bytes = std::max<std::size_t>(1, std::strtoull(argv[1], nullptr, 10) / kPage) * kPage;
  auto* memory = static_cast<std::uint8_t*>(std::aligned_alloc(kPage, bytes));
  if (memory == nullptr) return 3;
  madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 1, bytes);
  std::string name;
  std::size_t used;
  for (int threads; std::cin >> name >> threads >> used;) {
    std::string why;
    const double found = answer(name, threads, memory, std::min(used, bytes), why);
    if (found < 0) {
      std::cout << "missing " << why << std::endl;
    } else {
      std::cout << found << std::endl;
    }
  }
}
