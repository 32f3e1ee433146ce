// What the machine can do: reads of memory and byte products, on every thread at once. Prints GB/s and GOP/s.
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

template <class Work>
double seconds(int threads, Work work) {
  const auto start = Clock::now();
  std::vector<std::thread> team;
  for (int rank = 0; rank < threads; ++rank) team.emplace_back(work, rank);
  for (std::thread& thread : team) thread.join();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

volatile long sink;

// Four passes over the rank's share, fetched ahead into the L2 cache.
void read_share(const std::uint8_t* memory, std::size_t bytes, int rank, int threads) {
  const std::uint8_t *begin = memory + bytes / threads * rank, *end = begin + bytes / threads;
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (int pass = 0; pass < 4; ++pass) {
    for (const std::uint8_t* p = begin; p + 256 <= end; p += 256) {
      for (int line = 0; line < 256; line += 64) _mm_prefetch(reinterpret_cast<const char*>(p + 16384 + line), _MM_HINT_T1);
      a = _mm512_xor_si512(a, _mm512_load_si512(p));
      b = _mm512_xor_si512(b, _mm512_load_si512(p + 64));
      c = _mm512_xor_si512(c, _mm512_load_si512(p + 128));
      d = _mm512_xor_si512(d, _mm512_load_si512(p + 192));
    }
  }
  sink = _mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d)));
}

constexpr long kRounds = 8'000'000;

// Eight chains of products, each in a register of its own.
void multiply_bytes() {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a, e = a, f = a, g = a, h = a;
  const __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
  for (long i = 0; i < kRounds; ++i) {
    asm volatile(
        "vpdpbusd %9, %8, %0\n vpdpbusd %9, %8, %1\n vpdpbusd %9, %8, %2\n vpdpbusd %9, %8, %3\n"
        "vpdpbusd %9, %8, %4\n vpdpbusd %9, %8, %5\n vpdpbusd %9, %8, %6\n vpdpbusd %9, %8, %7\n"
        : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h)
        : "v"(x), "v"(y));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int threads = std::atoi(argv[1]);
  const std::size_t bytes = std::strtoull(argv[2], nullptr, 10) / (2 << 20) * (2 << 20);
  auto* memory = static_cast<std::uint8_t*>(std::aligned_alloc(2 << 20, bytes));
  madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 1, bytes);
  std::vector<double> reads, products;
  for (int i = 0; i < 5; ++i) {
    reads.push_back(4e-9 * static_cast<double>(bytes) / seconds(threads, [&](int rank) { read_share(memory, bytes, rank, threads); }));
    products.push_back(8e-9 * 128 * kRounds * threads / seconds(threads, [](int) { multiply_bytes(); }));
  }
  std::sort(reads.begin(), reads.end());
  std::sort(products.begin(), products.end());
  std::printf("%.1f %.1f\n", reads[2], products[2]);
}
