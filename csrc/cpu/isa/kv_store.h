// Writes a token's keys and values into the paged cache, rounded or quantised to what it holds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "flexjudge/decoder.h"
#include "flexjudge/half.h"

namespace flexjudge::FJ_ISA {

// Symmetric, the largest magnitude becomes 127; codes are `stride` apart. Returns the scale, which is NaN where a
// value is NaN or infinite: attention carries it on.
inline float quantize_row(const float* x, std::int64_t n, std::uint8_t* codes, std::int64_t stride) {
  F magnitudes = zero(), poison = zero();
  for (std::int64_t i = 0; i < n; i += 16) {
    const F v = load_n(x + i, static_cast<int>(std::min<std::int64_t>(16, n - i)));
    magnitudes = max(magnitudes, abs(v));
    poison = fma(v, zero(), poison);  // 0, or NaN
  }
  float largest = max_lane(magnitudes);
  if (largest < 1e-30f) largest = 0;  // its inverse would overflow
  const F inverse = set1(largest > 0 ? 127.0f / largest : 0.0f);
  std::int8_t lanes[16];
  for (std::int64_t i = 0; i < n; i += 16) {
    const std::int64_t width = std::min<std::int64_t>(16, n - i);
    store_s8(lanes, to_int(mul(load_n(x + i, static_cast<int>(width)), inverse)));
    for (std::int64_t j = 0; j < width; ++j) codes[(i + j) * stride] = static_cast<std::uint8_t>(lanes[j]);
  }
  return largest / 127.0f + sum(poison);
}

// One head's key or value [head_dim]: element d becomes number `first + d * stride` of the block's `head`.
inline void store_row(const KvCache& cache, const float* x, std::uint8_t* head, std::int64_t offset, std::int64_t first, std::int64_t stride) {
  if (cache.format == KvFormat::kInt8) {
    const float scale = quantize_row(x, cache.head_dim, head + first, stride);
    std::memcpy(cache.scale(head, offset), &scale, 4);
    return;
  }
  for (std::int64_t d = 0; d < cache.head_dim; ++d) {
    const std::int64_t i = first + d * stride;
    switch (cache.format) {
      case KvFormat::kF32: reinterpret_cast<float*>(head)[i] = x[d]; break;
      case KvFormat::kF16: reinterpret_cast<std::uint16_t*>(head)[i] = float_to_half(x[d]); break;
      default: reinterpret_cast<std::uint16_t*>(head)[i] = float_to_bf16(x[d]);
    }
  }
}

// keys, values: [num_kv_heads, head_dim].
inline void store_token(const KvCache& cache, std::int64_t layer, std::int64_t slot, const float* keys, const float* values) {
  const std::int64_t block = slot / cache.block_size, offset = slot % cache.block_size, dim = cache.head_dim;
  for (std::int64_t h = 0; h < cache.num_kv_heads; ++h) {
    store_row(cache, keys + h * dim, cache.head(layer, 0, block, h), offset, offset, cache.block_size);
    store_row(cache, values + h * dim, cache.head(layer, 1, block, h), offset, offset * dim, 1);
  }
}

}  // namespace flexjudge::FJ_ISA
