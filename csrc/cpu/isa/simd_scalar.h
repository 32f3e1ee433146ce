// Sixteen lanes for any processor: GCC's vector type where the compiler lowers it well, loops elsewhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "flexjudge/half.h"

#define FJ_INLINE inline __attribute__((always_inline))

namespace flexjudge::FJ_ISA {

typedef float F __attribute__((vector_size(64), aligned(64)));
typedef std::int32_t I __attribute__((vector_size(64), aligned(64)));
typedef std::uint8_t Codes __attribute__((vector_size(64), aligned(64)));  // 4 per lane

constexpr int kTokenTiles[] = {1, 4};  // tokens that the kernels take together: few sizes, this build is for tests
constexpr int kLeastOfSeveral = 4;     // of them where a step has several tiles
constexpr int kDenseTokens = 2;  // a vector is four of the 16 registers that any x86-64 has

// Loops stay out of line: sixteen-fold code in every kernel would take minutes to compile.
template <class T, class Op>
__attribute__((noinline)) T lanes(Op op) {
  T out;
  for (int i = 0; i < 16; ++i) out[i] = op(i);
  return out;
}

FJ_INLINE F set1(float x) { return F{} + x; }
FJ_INLINE F zero() { return F{}; }
FJ_INLINE F load(const float* p) {
  F x;
  std::memcpy(&x, p, 64);
  return x;
}
FJ_INLINE F load_n(const float* p, int n) { return lanes<F>([=](int i) { return i < n ? p[i] : 0.0f; }); }
FJ_INLINE void store(float* p, F x) { std::memcpy(p, &x, 64); }
FJ_INLINE void store_n(float* p, F x, int n) { if (n > 0) std::memcpy(p, &x, static_cast<std::size_t>(n < 16 ? 4 * n : 64)); }
FJ_INLINE F load_half(const std::uint16_t* p) { return lanes<F>([=](int i) { return half_to_float(p[i]); }); }
FJ_INLINE F load_bf16(const std::uint16_t* p) { return lanes<F>([=](int i) { return bf16_to_float(p[i]); }); }
// The first and the second of each lane's two bfloat16.
FJ_INLINE F low_bf16(const std::uint8_t* p) {
  I x;
  std::memcpy(&x, p, 64);
  return (F)(x << 16);
}
FJ_INLINE F high_bf16(const std::uint8_t* p) {
  I x;
  std::memcpy(&x, p, 64);
  return (F)(x & -65536);
}
FJ_INLINE F add(F x, F y) { return x + y; }
FJ_INLINE F sub(F x, F y) { return x - y; }
FJ_INLINE F mul(F x, F y) { return x * y; }
FJ_INLINE F div(F x, F y) { return x / y; }
FJ_INLINE F fma(F x, F y, F z) { return x * y + z; }         // rounds twice
FJ_INLINE F max(F x, F y) { return x > y ? x : y; }          // y where either is NaN
FJ_INLINE F min(F x, F y) { return x < y ? x : y; }          // y where either is NaN
FJ_INLINE F abs(F x) { return (F)((I)x & 0x7fffffff); }
FJ_INLINE F zero_below(F x, F limit, F value) { return x < limit ? F{} : value; }  // value, but 0 where x < limit
FJ_INLINE F keep_first(F x, int n, float rest) {
  const I index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return index < n ? x : set1(rest);
}

FJ_INLINE I set1_i(int x) { return I{} + x; }
FJ_INLINE I zero_i() { return I{}; }
template <int kShift>
FJ_INLINE I shift_left(I x) { return x << kShift; }
template <int kShift>
FJ_INLINE I shift_right(I x) {
  typedef std::uint32_t U __attribute__((vector_size(64), aligned(64)));
  return (I)((U)x >> kShift);
}
FJ_INLINE I add_i(I x, I y) { return x + y; }
FJ_INLINE I and_i(I x, int mask) { return x & mask; }
FJ_INLINE I or_i(I x, I y) { return x | y; }
FJ_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
FJ_INLINE I to_int(F x) {  // to nearest, ties to even; NaN and what does not fit become the smallest int, as on x86
  return lanes<I>([=](int i) {
    return std::fabs(x[i]) < 0x1p31f ? static_cast<std::int32_t>(std::nearbyint(x[i])) : INT32_MIN;
  });
}
FJ_INLINE F power_of_two(I n) { return (F)((n + 127) << 23); }
FJ_INLINE I load_u8(const std::uint8_t* p) { return lanes<I>([=](int i) { return p[i]; }); }
FJ_INLINE I load_s8(const std::uint8_t* p) { return lanes<I>([=](int i) { return static_cast<std::int8_t>(p[i]); }); }
FJ_INLINE void store_s8(std::int8_t* p, I x) { for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(x[i]); }
FJ_INLINE int sum_i(I x) {
  std::uint32_t total = 0;  // wraps, as the other builds' does: NaN became the smallest int
  for (int i = 0; i < 16; ++i) total += static_cast<std::uint32_t>(x[i]);
  return static_cast<int>(total);
}

FJ_INLINE Codes load_codes(const std::uint8_t* p) {
  Codes c;
  std::memcpy(&c, p, 64);
  return c;
}
FJ_INLINE void store_codes(std::uint8_t* p, Codes c) { std::memcpy(p, &c, 64); }
// (c >> kShift) & kMask in every byte.
template <int kShift, int kMask>
FJ_INLINE Codes bits_of(Codes c) { return (c >> kShift) & static_cast<std::uint8_t>(kMask); }
template <int kShift>
FJ_INLINE Codes or_shifted(Codes x, Codes y) { return x | (y << kShift); }
// acc[lane] += sum of codes[lane][i] * x[i] over 4 bytes; exact.
__attribute__((noinline)) I dot4(I acc, Codes c, const std::int8_t* x) {
  const I words = (I)c;
  return acc + (words & 255) * x[0] + (shift_right<8>(words) & 255) * x[1] + (shift_right<16>(words) & 255) * x[2] +
         shift_right<24>(words) * x[3];
}

// Fixed order: halves are added until one lane is left.
FJ_INLINE float sum(F x) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}
FJ_INLINE float max_lane(F x) {
  float largest = x[0];
  for (int i = 1; i < 16; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

}  // namespace flexjudge::FJ_ISA
