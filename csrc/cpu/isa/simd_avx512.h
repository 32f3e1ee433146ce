// Sixteen lanes in one 512-bit register. Included by one translation unit per AVX-512 build.
#pragma once

#ifdef FJ_EMULATED
#include "emulated_avx512.h"
#else
#include <immintrin.h>
#endif

#include <cstdint>

#ifndef FJ_INLINE  // tests leave it to the compiler: emulated functions, inlined, take minutes to compile
#define FJ_INLINE inline __attribute__((always_inline))
#endif

namespace flexjudge::FJ_ISA {

using F = __m512;      // 16 floats
using I = __m512i;     // 16 int32
using Codes = __m512i;  // 64 unsigned bytes: 4 per lane
using Mask = __mmask16;

constexpr int kTokenTiles[] = {1, 2, 3, 4, 6, 8, 12};  // tokens that the kernels take together
constexpr int kLeastOfSeveral = 6;                     // of them where a step has several tiles
constexpr int kDenseTokens = 12;  // sums of 12 tokens take 12 of the 32 registers

FJ_INLINE Mask first_lanes(int n) { return static_cast<Mask>(n >= 16 ? 0xffff : (n <= 0 ? 0 : (1u << n) - 1)); }
FJ_INLINE F zero() { return _mm512_setzero_ps(); }
FJ_INLINE F set1(float x) { return _mm512_set1_ps(x); }
FJ_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
FJ_INLINE F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
FJ_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
FJ_INLINE void store_n(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
FJ_INLINE F load_half(const std::uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
FJ_INLINE F load_bf16(const std::uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
// The first and the second of each lane's two bfloat16.
FJ_INLINE F low_bf16(const std::uint8_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
FJ_INLINE F high_bf16(const std::uint8_t* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)));
}
FJ_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
FJ_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
FJ_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
FJ_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
FJ_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FJ_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
FJ_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }  // b where either is NaN
FJ_INLINE F abs(F a) { return _mm512_abs_ps(a); }
FJ_INLINE F zero_below(F x, F limit, F value) {  // value, but 0 in lanes with x < limit
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), value);
}
FJ_INLINE F keep_first(F x, int n, float rest) { return _mm512_mask_mov_ps(_mm512_set1_ps(rest), first_lanes(n), x); }

FJ_INLINE I set1_i(int x) { return _mm512_set1_epi32(x); }
FJ_INLINE I zero_i() { return _mm512_setzero_si512(); }
FJ_INLINE I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
FJ_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
FJ_INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }  // to nearest, ties to even
FJ_INLINE F power_of_two(I n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23)); }
FJ_INLINE I load_u8(const std::uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
FJ_INLINE I load_s8(const std::uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
template <int kShift>
FJ_INLINE I shift_right(I a) { return _mm512_srli_epi32(a, kShift); }
FJ_INLINE I and_i(I a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi32(mask)); }
FJ_INLINE I or_i(I a, I b) { return _mm512_or_si512(a, b); }
template <int kShift>
FJ_INLINE I shift_left(I a) { return _mm512_slli_epi32(a, kShift); }
FJ_INLINE void store_s8(std::int8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }
FJ_INLINE int sum_i(I a) { return _mm512_reduce_add_epi32(a); }

FJ_INLINE Codes load_codes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
FJ_INLINE void store_codes(std::uint8_t* p, Codes c) { _mm512_storeu_si512(p, c); }
// (c >> kShift) & kMask in every byte; kMask must not reach bits that come from the next byte.
template <int kShift, int kMask>
FJ_INLINE Codes bits_of(Codes c) { return _mm512_and_si512(_mm512_srli_epi16(c, kShift), _mm512_set1_epi8(kMask)); }
template <int kShift>
FJ_INLINE Codes or_shifted(Codes a, Codes b) { return _mm512_or_si512(a, _mm512_slli_epi16(b, kShift)); }
// acc[lane] += sum of codes[lane][i] * x[i] over 4 bytes; exact.
FJ_INLINE I dot4(I acc, Codes c, const std::int8_t* x) {
  int word;
  __builtin_memcpy(&word, x, 4);
  return _mm512_dpbusd_epi32(acc, c, _mm512_set1_epi32(word));
}

#ifdef FJ_BF16_DOTS
// acc[lane] += the two bfloat16 of pairs[lane] times the two of x, one after the other.
FJ_INLINE F dot2(F acc, Codes pairs, std::uint32_t x) {
  return _mm512_dpbf16_ps(acc, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
}
// Rounded to nearest, ties to even; NaN stays NaN, and what is too small for a normal number becomes zero.
FJ_INLINE void store_bf16(std::uint16_t* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x)); }
#endif

// Fixed order: halves are added until one lane is left.
FJ_INLINE float sum(F x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
FJ_INLINE float max_lane(F x) { return _mm512_reduce_max_ps(x); }

}  // namespace flexjudge::FJ_ISA
