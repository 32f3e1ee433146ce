// Dot products of a tile's codes with quantised activations, four bytes a lane at a time (scalar, VNNI).
#pragma once

#include <cstdint>

namespace flexjudge::FJ_ISA {

// 32 two-byte activations: 256 * high + low, the 32 high bytes first, both int8.
FJ_INLINE void store_two_bytes(std::int8_t* out, I a, I b) {
  const I bias = set1_i(32768 + 128), minus = set1_i(-128);  // the shift is a logical one
  const I high_a = add_i(shift_right<8>(add_i(a, bias)), minus), high_b = add_i(shift_right<8>(add_i(b, bias)), minus);
  store_s8(out, high_a);
  store_s8(out + 16, high_b);
  const F wide = set1(-256.0f);
  store_s8(out + 32, to_int(fma(to_float(high_a), wide, to_float(a))));
  store_s8(out + 48, to_int(fma(to_float(high_b), wide, to_float(b))));
}

// dots[t] = sum over quads [first, first + kQuads) of a tile's codes times token t's activations; exact.
// A product waits four cycles for the one before it in its chain, so four chains are kept going where tokens allow:
// one a token, or with fewer than four tokens one for each of its bytes.
template <int kTokens, int kQuads, int kBits, int kTerms>
FJ_INLINE void dot_quads(const Codes* codes, const std::int8_t* x, int first, I* dots) {
  constexpr int kStride = kTerms * 32;
  constexpr bool kApart = kTerms == 2 && kTokens < 4;
  x += 4 * first;
  codes += first;
  I low[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) dots[t] = low[t] = zero_i();
#pragma GCC unroll 8
  for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) dots[t] = dot4(dots[t], codes[q], x + t * kStride + 4 * q);
  }
  if constexpr (kTerms == 1) return;
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) dots[t] = shift_left<8>(dots[t]);
  I* sums = kApart ? low : dots;
#pragma GCC unroll 8
  for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sums[t] = dot4(sums[t], codes[q], x + t * kStride + 32 + 4 * q);
  }
  if constexpr (kApart) {
    for (int t = 0; t < kTokens; ++t) dots[t] = add_i(dots[t], low[t]);
  }
}

}  // namespace flexjudge::FJ_ISA
