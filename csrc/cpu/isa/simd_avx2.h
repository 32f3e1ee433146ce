// Sixteen lanes in two 256-bit registers (AVX2, FMA, F16C).
#pragma once

#include <immintrin.h>

#include <cstdint>

#ifndef FJ_INLINE  // tests leave it to the compiler: emulated functions, inlined, take minutes to compile
#define FJ_INLINE inline __attribute__((always_inline))
#endif

namespace flexjudge::FJ_ISA {

struct F { __m256 a, b; };
struct I { __m256i a, b; };
using Codes = I;  // 64 unsigned bytes: 4 per lane

constexpr int kTokenTiles[] = {1, 2, 3, 4, 6, 8, 12};  // tokens that the kernels take together
constexpr int kLeastOfSeveral = 6;                     // of them where a step has several tiles
constexpr int kDenseTokens = 6;  // sums of 6 tokens take 12 of the 16 registers

FJ_INLINE __m256i lane_mask(int n) {  // the first n of 8 lanes; n may be below 0 or above 8
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FJ_INLINE const __m256i* at(const void* p, int half) { return static_cast<const __m256i*>(p) + half; }
FJ_INLINE __m256i* at(void* p, int half) { return static_cast<__m256i*>(p) + half; }

FJ_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FJ_INLINE F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FJ_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FJ_INLINE F load_n(const float* p, int n) { return {_mm256_maskload_ps(p, lane_mask(n)), _mm256_maskload_ps(p + 8, lane_mask(n - 8))}; }
FJ_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
FJ_INLINE void store_n(float* p, F x, int n) { _mm256_maskstore_ps(p, lane_mask(n), x.a); _mm256_maskstore_ps(p + 8, lane_mask(n - 8), x.b); }
FJ_INLINE F load_half(const std::uint16_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
FJ_INLINE F load_bf16(const std::uint16_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16))};
}
// The first and the second of each lane's two bfloat16.
FJ_INLINE F low_bf16(const std::uint8_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(at(p, 0)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(at(p, 1)), 16))};
}
FJ_INLINE F high_bf16(const std::uint8_t* p) {
  const __m256i upper = _mm256_set1_epi32(-65536);
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(at(p, 0)), upper)),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(at(p, 1)), upper))};
}
FJ_INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
FJ_INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
FJ_INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
FJ_INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
FJ_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
FJ_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }  // y where either is NaN
FJ_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }  // y where either is NaN
FJ_INLINE F abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
FJ_INLINE F zero_below(F x, F limit, F value) {  // value, but 0 in lanes with x < limit
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, limit.a, _CMP_NLT_UQ), value.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, limit.b, _CMP_NLT_UQ), value.b)};
}
FJ_INLINE F keep_first(F x, int n, float rest) {
  const __m256 r = _mm256_set1_ps(rest);
  return {_mm256_blendv_ps(r, x.a, _mm256_castsi256_ps(lane_mask(n))), _mm256_blendv_ps(r, x.b, _mm256_castsi256_ps(lane_mask(n - 8)))};
}

FJ_INLINE I set1_i(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
FJ_INLINE I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
FJ_INLINE I add_i(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
FJ_INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
FJ_INLINE I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }  // to nearest, ties to even
FJ_INLINE F power_of_two(I n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.a, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.b, bias), 23))};
}
FJ_INLINE I load_u8(const std::uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
FJ_INLINE I load_s8(const std::uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
template <int kShift>
FJ_INLINE I shift_right(I x) { return {_mm256_srli_epi32(x.a, kShift), _mm256_srli_epi32(x.b, kShift)}; }
template <int kShift>
FJ_INLINE I shift_left(I x) { return {_mm256_slli_epi32(x.a, kShift), _mm256_slli_epi32(x.b, kShift)}; }
FJ_INLINE I and_i(I x, int mask) {
  const __m256i m = _mm256_set1_epi32(mask);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
FJ_INLINE I or_i(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
FJ_INLINE void store_s8(std::int8_t* p, I x) {  // values are already in range
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
FJ_INLINE int sum_i(I x) {
  const __m256i y = _mm256_add_epi32(x.a, x.b);
  __m128i z = _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  z = _mm_add_epi32(z, _mm_shuffle_epi32(z, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(z, _mm_shuffle_epi32(z, 0xb1)));
}

FJ_INLINE Codes load_codes(const std::uint8_t* p) { return {_mm256_loadu_si256(at(p, 0)), _mm256_loadu_si256(at(p, 1))}; }
FJ_INLINE void store_codes(std::uint8_t* p, Codes c) { _mm256_storeu_si256(at(p, 0), c.a); _mm256_storeu_si256(at(p, 1), c.b); }
// (c >> kShift) & kMask in every byte; kMask must not reach bits that come from the next byte.
template <int kShift, int kMask>
FJ_INLINE Codes bits_of(Codes c) {
  const __m256i m = _mm256_set1_epi8(kMask);
  return {_mm256_and_si256(_mm256_srli_epi16(c.a, kShift), m), _mm256_and_si256(_mm256_srli_epi16(c.b, kShift), m)};
}
template <int kShift>
FJ_INLINE Codes or_shifted(Codes x, Codes y) {
  return {_mm256_or_si256(x.a, _mm256_slli_epi16(y.a, kShift)), _mm256_or_si256(x.b, _mm256_slli_epi16(y.b, kShift))};
}
// Fixed order: halves are added until one lane is left.
FJ_INLINE float sum(F x) {
  const __m256 a = _mm256_add_ps(x.a, x.b);
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
FJ_INLINE float max_lane(F x) {
  const __m256 a = _mm256_max_ps(x.a, x.b);
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

}  // namespace flexjudge::FJ_ISA
