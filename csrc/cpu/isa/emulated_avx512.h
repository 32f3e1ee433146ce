// AVX-512 on a processor without it, for tests: SIMDe's functions, and those that Debian's SIMDe (0.7.4) lacks.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_INLINE
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstring>

#include "flexjudge/half.h"

namespace flexjudge::emulated {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T, int kCount>
struct Array {
  T at[kCount];
};
using Floats = Array<float, 16>;
using Ints = Array<std::int32_t, 16>;

// The vector To whose elements are `op(i)`.
template <class To, class T, int kCount, class Op>
inline To each(Op op) {
  Array<T, kCount> out;
  for (int i = 0; i < kCount; ++i) out.at[i] = static_cast<T>(op(i));
  return bits_as<To>(out);
}

template <class T, class From>
inline __m512i widen(From x) {
  const auto from = bits_as<Array<T, 16>>(x);
  return each<__m512i, std::int32_t, 16>([&](int i) { return from.at[i]; });
}

inline __m512 to_float(__m512i x) {
  const Ints from = bits_as<Ints>(x);
  return each<__m512, float, 16>([&](int i) { return from.at[i]; });
}
inline __m512i to_int(__m512 x) {  // NaN and what does not fit become the smallest int
  const Floats from = bits_as<Floats>(x);
  return each<__m512i, std::int32_t, 16>([&](int i) {
    return std::fabs(from.at[i]) < 0x1p31f ? static_cast<std::int32_t>(std::nearbyint(from.at[i])) : INT32_MIN;
  });
}
inline __m128i low_bytes(__m512i x) {
  const Ints from = bits_as<Ints>(x);
  return each<__m128i, std::int8_t, 16>([&](int i) { return static_cast<std::int8_t>(from.at[i]); });
}
inline __m512 halves_to_float(__m256i x) {
  const auto from = bits_as<Array<std::uint16_t, 16>>(x);
  return each<__m512, float, 16>([&](int i) { return half_to_float(from.at[i]); });
}
inline __m256 upper_or_lower(__m512 x, int upper) {
  const Floats from = bits_as<Floats>(x);
  return each<__m256, float, 8>([&](int i) { return from.at[8 * upper + i]; });
}
inline __m512 load_some(unsigned mask, const float* p) {
  return each<__m512, float, 16>([&](int i) { return mask >> i & 1 ? p[i] : 0.0f; });
}
inline void store_some(float* p, unsigned mask, __m512 x) {
  const Floats from = bits_as<Floats>(x);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) p[i] = from.at[i];
  }
}
inline int sum_of(__m512i x) {
  int total = 0;
  for (const std::int32_t v : bits_as<Ints>(x).at) total += v;
  return total;
}
inline float largest_of(__m512 x) {  // halves against halves, as compilers do it: where NaN goes depends on it
  Floats v = bits_as<Floats>(x);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v.at[i] = v.at[i] > v.at[i + width] ? v.at[i] : v.at[i + width];
  }
  return v.at[0];
}

// As Intel's manual has it: subnormal inputs and results are zero, one rounding per product, the odd one first.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline __m512 dot_pairs(__m512 sums, __m512i a, __m512i b) {
  const auto c = bits_as<Floats>(sums);
  const auto x = bits_as<Array<std::uint16_t, 32>>(a), y = bits_as<Array<std::uint16_t, 32>>(b);
  auto value = [](std::uint16_t bits) { return flushed(bf16_to_float(bits)); };
  return each<__m512, float, 16>([&](int i) {
    const float odd = flushed(std::fma(value(x.at[2 * i + 1]), value(y.at[2 * i + 1]), flushed(c.at[i])));
    return flushed(std::fma(value(x.at[2 * i]), value(y.at[2 * i]), odd));
  });
}
inline __m256i to_bf16(__m512 x) {
  const Floats from = bits_as<Floats>(x);
  return each<__m256i, std::uint16_t, 16>([&](int i) { return float_to_bf16(flushed(from.at[i])); });
}

}  // namespace flexjudge::emulated

// GCC's own header may have come first, whose functions of these names need AVX-512.
#undef _mm512_reduce_add_epi32
#undef _mm512_reduce_max_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_dpbf16_ps
#define _mm512_cvtepu8_epi32(x) flexjudge::emulated::widen<std::uint8_t>(x)
#define _mm512_cvtepi8_epi32(x) flexjudge::emulated::widen<std::int8_t>(x)
#define _mm512_cvtepu16_epi32(x) flexjudge::emulated::widen<std::uint16_t>(x)
#define _mm512_cvtepi32_ps(x) flexjudge::emulated::to_float(x)
#define _mm512_cvtps_epi32(x) flexjudge::emulated::to_int(x)
#define _mm512_cvtepi32_epi8(x) flexjudge::emulated::low_bytes(x)
#define _mm512_cvtph_ps(x) flexjudge::emulated::halves_to_float(x)
#define _mm512_extractf32x8_ps(x, half) flexjudge::emulated::upper_or_lower(x, half)
#define _mm512_maskz_loadu_ps(mask, p) flexjudge::emulated::load_some(mask, p)
#define _mm512_mask_storeu_ps(p, mask, x) flexjudge::emulated::store_some(p, mask, x)
#define _mm512_reduce_add_epi32(x) flexjudge::emulated::sum_of(x)
#define _mm512_reduce_max_ps(x) flexjudge::emulated::largest_of(x)
#define _mm512_dpbf16_ps(sums, a, b) flexjudge::emulated::dot_pairs(sums, (__m512i)(a), (__m512i)(b))
#define _mm512_cvtneps_pbh(x) flexjudge::emulated::to_bf16(x)
