// What ggml's block formats (ggml-common.h) have in common, for every file that reads them.
#pragma once

#include <cstdint>
#include <cstring>

#include "flexjudge/half.h"

namespace flexjudge {

inline std::uint32_t word_at(const std::uint8_t* p) {
  std::uint32_t bits;
  std::memcpy(&bits, p, 4);
  return bits;
}

inline float float_at(const std::uint8_t* p) { return bits_to_float(word_at(p)); }

inline float half_at(const std::uint8_t* p) {
  std::uint16_t bits;
  std::memcpy(&bits, p, 2);
  return half_to_float(bits);
}

// Six-bit scale and minimum of sub-block `i` (of 8) of a Q4_K or Q5_K block, packed in the 12 bytes at `p`.
inline void k_scale(const std::uint8_t* p, int i, int* scale, int* minimum) {
  if (i < 4) {
    *scale = p[i] & 63;
    *minimum = p[4 + i] & 63;
  } else {
    *scale = (p[4 + i] & 15) | ((p[i - 4] >> 6) << 4);
    *minimum = (p[4 + i] >> 4) | ((p[i] >> 6) << 4);
  }
}

}  // namespace flexjudge
