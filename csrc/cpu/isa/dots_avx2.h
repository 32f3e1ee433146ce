// Dot products of a tile's codes with quantised activations, without VNNI: pairs of 16-bit or byte products.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace flexjudge::FJ_ISA {

FJ_INLINE __m256i repeat_word(const std::int8_t* p) {
  int word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

// acc += x. GCC 12 rearranges a chain of intrinsics into a tree, which spills most of its products.
FJ_INLINE void add_in_place_16(__m256i& acc, __m256i x) { asm("vpaddw %1, %0, %0" : "+x"(acc) : "x"(x)); }
FJ_INLINE void add_in_place_32(__m256i& acc, __m256i x) { asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(x)); }

// 32 two-byte activations as 16-bit words, each quad in the order 0, 2, 1, 3: even and odd bytes of codes meet theirs.
FJ_INLINE void store_two_bytes(std::int8_t* out, I a, I b) {
  int half = 0;
  for (const I& x : {a, b}) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm256_storeu_si256(at(out, half++), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
  }
}

template <int kTokens, int kQuads>
FJ_INLINE void dot_words(const Codes* codes, const std::int8_t* x, I* dots) {
  const __m256i even = _mm256_set1_epi16(255);
#pragma GCC unroll 1  // more at once would not fit the registers
  for (int q = 0; q < kQuads; ++q) {
    const I c02 = {_mm256_and_si256(codes[q].a, even), _mm256_and_si256(codes[q].b, even)};
    const I c13 = {_mm256_srli_epi16(codes[q].a, 8), _mm256_srli_epi16(codes[q].b, 8)};
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const __m256i x02 = repeat_word(x + t * 64 + 8 * q), x13 = repeat_word(x + t * 64 + 8 * q + 4);
      add_in_place_32(dots[t].a, _mm256_madd_epi16(c02.a, x02));
      add_in_place_32(dots[t].b, _mm256_madd_epi16(c02.b, x02));
      add_in_place_32(dots[t].a, _mm256_madd_epi16(c13.a, x13));
      add_in_place_32(dots[t].b, _mm256_madd_epi16(c13.b, x13));
    }
  }
}

// Pairs of byte products are summed in 16 bits for as many quads as cannot overflow, then in 32. The codes are
// (codes[q] >> kShift) & 15 where kBits is 8: each nibble goes by itself.
template <int kTokens, int kQuads, int kBits, int kShift = 0>
FJ_INLINE void add_dot_bytes(const Codes* codes, const std::int8_t* x, I* dots) {
  constexpr int kLargest = kBits == 8 ? 15 : (1 << kBits) - 1;
  constexpr int kRun = 32768 / (2 * 128 * kLargest) < kQuads ? 32768 / (2 * 128 * kLargest) : kQuads;
  static_assert(kQuads % kRun == 0);
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int from = 0; from < kQuads; from += kRun) {
    I words[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) words[t] = zero_i();
#pragma GCC unroll 1
    for (int q = from; q < from + kRun; ++q) {
      const Codes c = kBits == 8 ? bits_of<kShift, 15>(codes[q]) : codes[q];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m256i xs = repeat_word(x + t * 32 + 4 * q);
        add_in_place_16(words[t].a, _mm256_maddubs_epi16(c.a, xs));
        add_in_place_16(words[t].b, _mm256_maddubs_epi16(c.b, xs));
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      add_in_place_32(dots[t].a, _mm256_madd_epi16(words[t].a, ones));
      add_in_place_32(dots[t].b, _mm256_madd_epi16(words[t].b, ones));
    }
  }
}

// dots[t] = sum over quads [first, first + kQuads) of a tile's codes times token t's activations; exact.
template <int kTokens, int kQuads, int kBits, int kTerms>
FJ_INLINE void dot_quads(const Codes* codes, const std::int8_t* x, int first, I* dots) {
  codes += first;
  x += 4 * kTerms * first;
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) dots[t] = zero_i();
  if constexpr (kTerms == 2) {
    dot_words<kTokens, kQuads>(codes, x, dots);
  } else if constexpr (kBits < 8) {
    add_dot_bytes<kTokens, kQuads, kBits>(codes, x, dots);
  } else {
    add_dot_bytes<kTokens, kQuads, 8, 4>(codes, x, dots);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) dots[t] = shift_left<4>(dots[t]);
    add_dot_bytes<kTokens, kQuads, 8, 0>(codes, x, dots);
  }
}

}  // namespace flexjudge::FJ_ISA
