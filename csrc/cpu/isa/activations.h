// Activations in the order the products read them: tiles of 1 to 12 tokens, column group by column group.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>

#include "flexjudge/decoder.h"

namespace flexjudge::FJ_ISA {

#ifdef FJ_BF16_DOTS
constexpr bool kBF16Dots = true;  // this build multiplies pairs of bfloat16
#else
constexpr bool kBF16Dots = false;
#endif

constexpr std::int64_t kTokenTile = std::end(kTokenTiles)[-1];  // tokens of the largest tile

// Tokens of a tile: a size the kernels exist for, with little padding. Kernels compute whole tiles; what they make
// of the padding, whose activations are never written, is never read.
inline std::int64_t pick_token_tile(std::int64_t num_tokens) {
  for (const int tile : kTokenTiles) {
    if (num_tokens <= tile && tile <= 4) return tile;
  }
  std::int64_t best = kTokenTile;
  auto cost = [&](std::int64_t tile) { return (num_tokens + tile - 1) / tile * (tile + 1); };
  for (const int tile : kTokenTiles) {
    if (tile >= kLeastOfSeveral && cost(tile) < cost(best)) best = tile;
  }
  return best;
}

// Calls `call` with the size of a token tile; only the sizes `pick_token_tile` gives for several tiles where kSeveral.
template <bool kSeveral, class Call>
FJ_INLINE void with_token_tile(std::int64_t tile, Call call) {
  auto took = [&]<int kT>() {
    if constexpr (!kSeveral || kT >= kLeastOfSeveral) {
      if (kT == tile) call.template operator()<kT>();
    }
    return kT == tile;
  };
  [&]<std::size_t... i>(std::index_sequence<i...>) { (took.template operator()<kTokenTiles[i]>() || ...); }
  (std::make_index_sequence<std::size(kTokenTiles)>());
}

// Some token tiles of a step.
struct TileRange {
  std::int64_t begin, end;
  std::int64_t count() const { return end - begin; }
};

// Of one token and group: factor of the codes, and the factor times their sum over all 32 columns and each 16.
struct GroupMeta {
  float scale, sum, sum_low, sum_high;
};

// Of one group of columns and one tile of tokens.
constexpr std::int64_t group_bytes(std::int64_t tile, int terms) {
  return tile * (static_cast<std::int64_t>(sizeof(GroupMeta)) + terms * kGroup);
}

// The forms of one step's activations; a form that no weight asks for is null. Plain columns are padded with a zero to
// an even count.
//   codes:  [tile][group]{GroupMeta [tile tokens], int8 [tile tokens][terms][32]}; two terms as dots_*.h lay them
//   values: [tile][column][tile tokens] float
//   pairs:  [tile][column / 2][tile tokens] two bfloat16, where the build multiplies those
struct Activations {
  std::uint8_t* codes = nullptr;
  float* values = nullptr;
  std::uint32_t* pairs = nullptr;
  std::int64_t num_tokens, columns, tile;  // tokens of a tile
  int terms;

  std::int64_t num_tiles() const { return (num_tokens + tile - 1) / tile; }
  std::int64_t groups() const { return columns / kGroup; }
  std::uint8_t* group(std::int64_t token_tile, std::int64_t g) const {
    return codes + (token_tile * groups() + g) * group_bytes(tile, terms);
  }
  std::int64_t even_columns() const { return (columns + 1) / 2 * 2; }
  float* column(std::int64_t token_tile, std::int64_t k) const { return values + (token_tile * even_columns() + k) * tile; }
  std::uint32_t* pair(std::int64_t token_tile, std::int64_t k) const { return pairs + (token_tile * even_columns() + k) / 2 * tile; }
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
  bool codes = false, values = false, pairs = false;
  explicit Forms(std::initializer_list<const Linear*> layers) {
    for (const Linear* layer : layers) {
      for (const Matrix& part : layer->parts) add(part);
    }
  }

 private:
  void add(const Matrix& part) {
    const bool pairwise = kBF16Dots && part.format->format == Format::kBF16;
    (part.is_quantized() ? codes : pairwise ? pairs : values) = true;
  }
};

// Room for every form; the last tile may be a partial one.
inline std::int64_t codes_bytes(std::int64_t num_tokens, std::int64_t columns, int terms) {
  return align64(columns / kGroup * group_bytes(num_tokens + kTokenTile, terms));
}
inline std::int64_t values_bytes(std::int64_t num_tokens, std::int64_t columns) {
  return align64((num_tokens + kTokenTile) * (columns + 1) * 4);
}
inline std::int64_t activation_bytes(std::int64_t num_tokens, std::int64_t columns, int terms) {
  return codes_bytes(num_tokens, columns, terms) + values_bytes(num_tokens, columns) + (kBF16Dots ? align64(values_bytes(num_tokens, columns) / 2) : 0);
}

inline Activations place_activations(std::uint8_t* memory, Forms forms, std::int64_t num_tokens, std::int64_t columns,
                                     int terms) {
  Activations x{nullptr, nullptr, nullptr, num_tokens, columns, pick_token_tile(num_tokens), terms};
  if (forms.codes) x.codes = memory;
  memory += codes_bytes(num_tokens, columns, terms);
  if (forms.values) x.values = reinterpret_cast<float*>(memory);
  if (forms.pairs) x.pairs = reinterpret_cast<std::uint32_t*>(memory + values_bytes(num_tokens, columns));
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
  const float low = static_cast<float>(sum_i(qa)), high = static_cast<float>(sum_i(qb));  // exact, as is their sum
  *meta = {scale, scale * (low + high), scale * low, scale * high};
}

#ifdef FJ_BF16_DOTS
// `count` columns of one token, each pair `stride` words after the one before it.
inline void put_pairs(std::uint32_t* to, std::int64_t stride, const float* row, std::int64_t count) {
  for (std::int64_t k = 0; k < count; k += 16) {
    const int width = static_cast<int>(std::min<std::int64_t>(16, count - k));
    alignas(32) std::uint32_t pairs[8];
    store_bf16(reinterpret_cast<std::uint16_t*>(pairs), load_n(row + k, width));
    for (int i = 0; i < (width + 1) / 2; ++i, to += stride) *to = pairs[i];
  }
}
#endif

// Columns [begin, end) of one token: multiples of 32, but for the end of a row without codes.
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
    float* to = x.column(token_tile, begin) + t;
    for (std::int64_t k = begin; k < end; ++k, to += x.tile) *to = row[k - begin];
    if (end % 2 != 0) *to = 0;
  }
#ifdef FJ_BF16_DOTS
  if (x.pairs != nullptr) put_pairs(x.pair(token_tile, begin) + t, x.tile, row, end - begin);
#endif
}

}  // namespace flexjudge::FJ_ISA
