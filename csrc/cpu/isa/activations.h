// Activations in the order the products read them: tiles of 1 to 12 tokens, column group by column group.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "flexjudge/decoder.h"

namespace flexjudge::FJ_ISA {

constexpr std::int64_t kTokenTile = 12;  // tokens of the largest tile

// Tokens of a tile: a size the kernels exist for, with little padding. Kernels compute whole tiles; what they make
// of the padding, whose activations are never written, is never read.
inline std::int64_t pick_token_tile(std::int64_t num_tokens) {
  if (num_tokens <= 4) return num_tokens;
  std::int64_t best = kTokenTile;
  auto cost = [&](std::int64_t tile) { return (num_tokens + tile - 1) / tile * (tile + 1); };
  for (const std::int64_t tile : {8, 6}) {
    if (cost(tile) < cost(best)) best = tile;
  }
  return best;
}

// Of one token and group: factor of the codes, and the factor times their sum over all 32 columns and each 16.
struct GroupMeta {
  float scale, sum, sum_low, sum_high;
};

// Of one group of columns and one tile of tokens.
constexpr std::int64_t group_bytes(std::int64_t tile, int terms) {
  return tile * (static_cast<std::int64_t>(sizeof(GroupMeta)) + terms * kGroup);
}

// Both forms of one step's activations; a form that no weight asks for is null.
//   codes:  [tile][group]{GroupMeta [tile tokens], int8 [tile tokens][terms][32]}
//   values: [tile][column][tile tokens] float
struct Activations {
  std::uint8_t* codes = nullptr;
  float* values = nullptr;
  std::int64_t num_tokens, columns, tile;  // tokens of a tile
  int terms;

  std::int64_t num_tiles() const { return (num_tokens + tile - 1) / tile; }
  std::int64_t groups() const { return columns / kGroup; }
  std::uint8_t* group(std::int64_t token_tile, std::int64_t g) const {
    return codes + (token_tile * groups() + g) * group_bytes(tile, terms);
  }
  float* column(std::int64_t token_tile, std::int64_t k) const { return values + (token_tile * columns + k) * tile; }
};

inline std::int64_t align64(std::int64_t n) { return (n + 63) / 64 * 64; }

// Hands out pieces of a buffer, each on a cache line of its own. With no buffer it only counts: `used`.
struct Arena {
  std::uint8_t* memory = nullptr;
  std::int64_t used = 0;

  template <class T>
  T* take(std::int64_t count) {
    const std::int64_t at = std::exchange(used, used + align64(count * static_cast<std::int64_t>(sizeof(T))));
    return memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + at);
  }
};

// Which forms the parts of these layers read.
struct Forms {
  bool codes = false, values = false;
  explicit Forms(std::initializer_list<const Linear*> layers) {
    for (const Linear* layer : layers) {
      for (const Matrix& part : layer->parts) (part.is_quantized() ? codes : values) = true;
    }
  }
};

// Room for either form; the last tile may be a partial one.
inline std::int64_t codes_bytes(std::int64_t num_tokens, std::int64_t columns, int terms) {
  return align64(columns / kGroup * group_bytes(num_tokens + kTokenTile, terms));
}
inline std::int64_t activation_bytes(std::int64_t num_tokens, std::int64_t columns, int terms) {
  return codes_bytes(num_tokens, columns, terms) + align64((num_tokens + kTokenTile) * columns * 4);
}

inline Activations place_activations(std::uint8_t* memory, Forms forms, std::int64_t num_tokens, std::int64_t columns,
                                     int terms) {
  Activations x{nullptr, nullptr, num_tokens, columns, pick_token_tile(num_tokens), terms};
  if (forms.codes) x.codes = memory;
  if (forms.values) x.values = reinterpret_cast<float*>(memory + codes_bytes(num_tokens, columns, terms));
  return x;
}

// Quantises 32 columns: symmetric, the group's largest magnitude at the end of the range. NaN and infinity give a scale of NaN, which the products carry on.
template <int kTerms>
FJ_INLINE void quantize_group(F a, F b, GroupMeta* meta, std::int8_t* out) {
  constexpr float kLimit = kTerms == 2 ? 127.0f * 256.0f : 127.0f;
  const float poison = sum(mul(add(a, b), zero())) + sum(mul(sub(a, b), zero()));  // 0, or NaN
  float largest = max_lane(max(abs(a), abs(b)));
  if (largest < 1e-30f) largest = 0;  // its inverse would overflow
  const float scale = largest / kLimit + poison;
  const F inverse = set1(largest > 0 ? kLimit / largest : 0.0f);
  const I qa = to_int(mul(a, inverse)), qb = to_int(mul(b, inverse));
  if constexpr (kTerms == 2) {
    store_two_bytes(out, qa, qb);
  } else {
    store_s8(out, qa);
    store_s8(out + 16, qb);
  }
  const int low = sum_i(qa), high = sum_i(qb);
  *meta = {scale, scale * static_cast<float>(low + high), scale * static_cast<float>(low), scale * static_cast<float>(high)};
}

// Columns [begin, end) of one token; multiples of 32 where codes are asked for.
inline void put_activations(const Activations& x, std::int64_t token, std::int64_t begin, std::int64_t end, const float* row) {
  const std::int64_t token_tile = token / x.tile, t = token % x.tile;
  if (x.codes != nullptr) {
    for (std::int64_t k = begin; k < end; k += kGroup) {
      std::uint8_t* group = x.group(token_tile, k / kGroup);
      auto* meta = reinterpret_cast<GroupMeta*>(group) + t;
      auto* out = reinterpret_cast<std::int8_t*>(group + x.tile * 16 + t * x.terms * kGroup);
      const F a = load(row + k - begin), b = load(row + k - begin + 16);
      x.terms == 2 ? quantize_group<2>(a, b, meta, out) : quantize_group<1>(a, b, meta, out);
    }
  }
  if (x.values != nullptr) {
    for (std::int64_t k = begin; k < end; ++k) x.column(token_tile, k)[t] = row[k - begin];
  }
}

}  // namespace flexjudge::FJ_ISA
