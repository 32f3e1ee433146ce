// Sixteen neighbouring values of an element type, as floats.
#pragma once

#include <cstdint>

namespace flexjudge::FJ_ISA {

struct F32 {
  using Stored = float;
  static FJ_INLINE F get(const Stored* p) { return load(p); }
};
struct F16 {
  using Stored = std::uint16_t;
  static FJ_INLINE F get(const Stored* p) { return load_half(p); }
};
struct BF16 {
  using Stored = std::uint16_t;
  static FJ_INLINE F get(const Stored* p) { return load_bf16(p); }
};

}  // namespace flexjudge::FJ_ISA
