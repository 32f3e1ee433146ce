// Products of packed matrices with a step's activations. One kernel for one token, a few, and a whole prompt: an
// output is summed group by group over its columns, in the same order and with the same operations whatever
// tokens stand beside it. Only the tiles over tokens vary.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "dense.h"

namespace flexjudge::FJ_ISA {

// ---- Where a kernel's tiles come from. Either source gives 8 vectors of unsigned codes, and per lane the factors
// and offsets of a tile's columns: one pair, or with 6-bit codes one for the 16 left and one for the 16 right columns.

constexpr int pairs_of(int bits) { return bits == 6 ? 2 : 1; }

struct Tile {
  Codes codes[8];
  F factors[2], offsets[2];
};

// Tiles expanded before, to be used by many tokens.
template <int kCodeBits>
class PanelTiles {
 public:
  static constexpr int kBits = kCodeBits, kPairs = pairs_of(kBits);
  static constexpr std::int64_t kBytes = 512 + 2 * kPairs * 64;

  explicit PanelTiles(std::uint8_t* panel) : at_(panel) {}

  FJ_INLINE void next(Tile& tile) {
    for (int q = 0; q < 8; ++q) tile.codes[q] = load_codes(at_ + 64 * q);
    const auto* floats = reinterpret_cast<const float*>(at_ + 512);
    for (int i = 0; i < kPairs; ++i) {
      tile.factors[i] = load(floats + 16 * i);
      tile.offsets[i] = load(floats + 16 * (kPairs + i));
    }
    at_ += kBytes;
  }

  FJ_INLINE void put(const Tile& tile) {
    for (int q = 0; q < 8; ++q) store_codes(at_ + 64 * q, tile.codes[q]);
    auto* floats = reinterpret_cast<float*>(at_ + 512);
    for (int i = 0; i < kPairs; ++i) {
      store(floats + 16 * i, tile.factors[i]);
      store(floats + 16 * (kPairs + i), tile.offsets[i]);
    }
    at_ += kBytes;
  }

 private:
  std::uint8_t* at_;
};

// Bytes that are fetched ahead to the L1 cache, after `kFarAhead` to L2.
constexpr std::int64_t kNearAhead = 2048;

// Tiles of a row block as packed, expanded as they are read. kHalf here stands for kHalfMin and kFloatZero too: fewer
// kernels.
template <int kCodeBits, Scales kScales>
class PackedTiles {
 public:
  static constexpr int kBits = kCodeBits;

  PackedTiles(const Matrix& w, const std::uint8_t* block)
      : codes_(block), scales_(block + w.layout.code_bytes), ahead_(block + kFarAhead),
        unit_bytes_(scale_unit_bytes(w.format->scales)), unit_tiles_(w.format->unit / kGroup),
        has_min_(w.format->scales == Scales::kHalfMin), is_wide_(w.format->scales == Scales::kFloatZero),
        zero_point_(static_cast<float>(w.format->zero_point)) {}

  FJ_INLINE void next(Tile& tile) {
    for (std::int64_t line = 0; line <= kCodeBytes; line += 64) __builtin_prefetch(ahead_ + line, 0, 2);
    for (std::int64_t line = 0; line < kCodeBytes; line += 64) __builtin_prefetch(codes_ + kNearAhead + line, 0, 3);
    ahead_ += kCodeBytes + unit_bytes() / unit_tiles();  // a tile's share of the row block
    read_codes(tile.codes);
    codes_ += kCodeBytes;
    read_scales(tile);
  }

 private:
  static constexpr std::int64_t kCodeBytes = 64 * kBits;

  // Of the scales that some tiles share.
  FJ_INLINE std::int64_t unit_bytes() const { return kScales == Scales::kHalf ? unit_bytes_ : scale_unit_bytes(kScales); }
  FJ_INLINE std::int64_t unit_tiles() const { return kScales == Scales::kHalf ? unit_tiles_ : 8; }

  FJ_INLINE void read_codes(Codes* quads) const {
    if constexpr (kBits == 8) {
      for (int q = 0; q < 8; ++q) quads[q] = load_codes(codes_ + 64 * q);
      return;
    }
    for (int v = 0; v < 4; ++v) {
      const Codes c = load_codes(codes_ + 64 * v);
      quads[v] = bits_of<0, 15>(c);
      quads[v + 4] = bits_of<4, 15>(c);
    }
    if constexpr (kBits == 5) {
      const Codes h = load_codes(codes_ + 256);
      quads[0] = or_shifted<4>(quads[0], bits_of<0, 1>(h));
      quads[1] = or_shifted<4>(quads[1], bits_of<1, 1>(h));
      quads[2] = or_shifted<4>(quads[2], bits_of<2, 1>(h));
      quads[3] = or_shifted<4>(quads[3], bits_of<3, 1>(h));
      quads[4] = or_shifted<4>(quads[4], bits_of<4, 1>(h));
      quads[5] = or_shifted<4>(quads[5], bits_of<5, 1>(h));
      quads[6] = or_shifted<4>(quads[6], bits_of<6, 1>(h));
      quads[7] = or_shifted<4>(quads[7], bits_of<7, 1>(h));
    }
    if constexpr (kBits == 6) {
      for (int side = 0; side < 2; ++side) {
        const Codes h = load_codes(codes_ + 256 + 64 * side);
        quads[4 * side + 0] = or_shifted<4>(quads[4 * side + 0], bits_of<0, 3>(h));
        quads[4 * side + 1] = or_shifted<4>(quads[4 * side + 1], bits_of<2, 3>(h));
        quads[4 * side + 2] = or_shifted<4>(quads[4 * side + 2], bits_of<4, 3>(h));
        quads[4 * side + 3] = or_shifted<4>(quads[4 * side + 3], bits_of<6, 3>(h));
      }
    }
  }

  FJ_INLINE void read_scales(Tile& tile) {
    if constexpr (kScales == Scales::kHalf) {
      if (is_wide_) {
        tile.factors[0] = load(reinterpret_cast<const float*>(scales_));
        tile.offsets[0] = sub(zero(), mul(tile.factors[0], to_float(load_u8(scales_ + 64))));
      } else {
        tile.factors[0] = half(0);
        tile.offsets[0] = has_min_ ? half(32) : mul(tile.factors[0], set1(-zero_point_));
      }
    } else if constexpr (kScales == Scales::kK) {
      if (in_unit_ == 0) begin_unit();
      tile.factors[0] = mul(d_, to_float(load_u8(bytes_ + 16 * in_unit_)));
      tile.offsets[0] = mul(minus_dmin_, to_float(load_u8(bytes_ + 128 + 16 * in_unit_)));
    } else {
      if (in_unit_ == 0) begin_unit();
      for (int side = 0; side < 2; ++side) {
        tile.factors[side] = mul(d_, to_float(load_s8(scales_ + 32 + 16 * (2 * in_unit_ + side))));
        tile.offsets[side] = mul(tile.factors[side], set1(-zero_point_));
      }
    }
    if (++in_unit_ == unit_tiles()) {
      in_unit_ = 0;
      scales_ += unit_bytes();
    }
  }

  FJ_INLINE F half(int at) const { return load_half(reinterpret_cast<const std::uint16_t*>(scales_ + at)); }

  // What eight tiles share; the six-bit scales and minimums of all of them, one byte each.
  FJ_INLINE void begin_unit() {
    d_ = half(0);
    if constexpr (kScales == Scales::kK) {
      minus_dmin_ = sub(zero(), half(32));
      const Codes left = load_codes(scales_ + 64), right = load_codes(scales_ + 128), high = load_codes(scales_ + 192);
      store_codes(bytes_, or_shifted<4>(bits_of<0, 15>(left), bits_of<0, 3>(high)));
      store_codes(bytes_ + 64, or_shifted<4>(bits_of<0, 15>(right), bits_of<4, 3>(high)));
      store_codes(bytes_ + 128, or_shifted<4>(bits_of<4, 15>(left), bits_of<2, 3>(high)));
      store_codes(bytes_ + 192, or_shifted<4>(bits_of<4, 15>(right), bits_of<6, 3>(high)));
    }
  }

  const std::uint8_t *codes_, *scales_, *ahead_;
  const std::int64_t unit_bytes_, unit_tiles_;
  const bool has_min_, is_wide_;
  const float zero_point_;
  int in_unit_ = 0;
  F d_ = zero(), minus_dmin_ = zero();
  alignas(64) std::uint8_t bytes_[kScales == Scales::kK ? 256 : 1];
};

// Calls `call` with the source type of a quantised format.
template <class Call>
FJ_INLINE void with_tiles(Format format, Call call) {
  switch (format) {
    case Format::kQ4_0:
    case Format::kQ4_1:
    case Format::kI4_64:
    case Format::kZ4_32:
    case Format::kZ4_64:
    case Format::kZ4_128:
    case Format::kI4_128: return call.template operator()<PackedTiles<4, Scales::kHalf>>();
    case Format::kQ5_0:
    case Format::kQ5_1: return call.template operator()<PackedTiles<5, Scales::kHalf>>();
    case Format::kQ8_0:
    case Format::kZ8_32:
    case Format::kI8_32: return call.template operator()<PackedTiles<8, Scales::kHalf>>();
    case Format::kQ4_K: return call.template operator()<PackedTiles<4, Scales::kK>>();
    case Format::kQ5_K: return call.template operator()<PackedTiles<5, Scales::kK>>();
    case Format::kQ6_K: return call.template operator()<PackedTiles<6, Scales::kQ6K>>();
    default: return;
  }
}

// ---- Kernels: 16 rows times kT tokens; c [kT][16] is added to. ----

// Adds one tile times kT tokens. Per token: the dot products of 16 rows, exact; then one rounding per
// operation below.
template <int kT, int kBits, int kTerms>
FJ_INLINE void multiply_tile(const Tile& tile, const std::uint8_t* x, F* acc) {
  constexpr int kPairs = pairs_of(kBits), kQuads = 8 / kPairs;
  constexpr int kTogether = kT % 4 == 0 ? 4 : (kT % 3 == 0 ? 3 : kT);
  const auto* meta = reinterpret_cast<const float*>(x);
  const auto* bytes = reinterpret_cast<const std::int8_t*>(x + kT * sizeof(GroupMeta));
#pragma GCC unroll 4
  for (int from = 0; from < kT; from += kTogether) {
#pragma GCC unroll 2
    for (int h = 0; h < kPairs; ++h) {
      I dots[kTogether];
      dot_quads<kTogether, kQuads, kBits, kTerms>(tile.codes, bytes + from * kTerms * 32, h * kQuads, dots);
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        const int t = from + i;
        acc[t] = fma(mul(to_float(dots[i]), set1(meta[4 * t])), tile.factors[h], acc[t]);
        acc[t] = fma(set1(meta[4 * t + (kPairs == 1 ? 1 : 2 + h)]), tile.offsets[h], acc[t]);
      }
    }
  }
}

// One token tile: its sums stay in registers.
template <int kT, class Tiles, int kTerms>
FJ_INLINE void quantized_kernel(Tiles tiles, std::int64_t num_tiles, const std::uint8_t* x, float* c) {
  F acc[kT];
  for (int t = 0; t < kT; ++t) acc[t] = load(c + 16 * t);
  for (std::int64_t i = 0; i < num_tiles; ++i, x += group_bytes(kT, kTerms)) {
    Tile tile;
    tiles.next(tile);
    multiply_tile<kT, Tiles::kBits, kTerms>(tile, x, acc);
  }
  for (int t = 0; t < kT; ++t) store(c + 16 * t, acc[t]);
}

// Some token tiles: a weight tile stays in registers and goes over all of them.
template <int kT, class Tiles, int kTerms>
FJ_INLINE void quantized_kernel_over(Tiles tiles, std::int64_t num_tiles, const std::uint8_t* x, std::int64_t token_tiles, float* c) {
  const std::int64_t stride = num_tiles * group_bytes(kT, kTerms);
  for (std::int64_t i = 0; i < num_tiles; ++i, x += group_bytes(kT, kTerms)) {
    Tile tile;
    tiles.next(tile);
    for (std::int64_t j = 0; j < token_tiles; ++j) {
      F acc[kT];
      for (int t = 0; t < kT; ++t) acc[t] = load(c + 16 * (j * kT + t));
      multiply_tile<kT, Tiles::kBits, kTerms>(tile, x + j * stride, acc);
      for (int t = 0; t < kT; ++t) store(c + 16 * (j * kT + t), acc[t]);
    }
  }
}

// ---- One row block times some token tiles. ----

// A few token tiles take the block's tiles as they are expanded; many take them from a panel, one after the other,
// which reads the activations in the order they lie in.
constexpr std::int64_t kFewTokenTiles = 4;

template <class Tiles, int kTerms>
void quantized_block(const Matrix& w, const std::uint8_t* block, const Activations& x, TileRange tokens, std::uint8_t* panel, float* c) {
  Tiles tiles(w, block);
  const std::uint8_t* first = x.group(tokens.begin, 0);
  if (tokens.count() == 1) {
    return with_token_tile<false>(x.tile, [&]<int kT>() { quantized_kernel<kT, Tiles, kTerms>(tiles, x.groups(), first, c); });
  }
  if (tokens.count() <= kFewTokenTiles) {
    return with_token_tile<true>(x.tile, [&]<int kT>() {
      quantized_kernel_over<kT, Tiles, kTerms>(tiles, x.groups(), first, tokens.count(), c);
    });
  }
  using Panel = PanelTiles<Tiles::kBits>;
  Panel to(panel);
  Tile tile;
  for (std::int64_t i = 0; i < x.groups(); ++i) {
    tiles.next(tile);
    to.put(tile);
  }
  with_token_tile<true>(x.tile, [&]<int kT>() {
    for (std::int64_t i = tokens.begin; i < tokens.end; ++i, c += kT * 16) {
      quantized_kernel<kT, Panel, kTerms>(Panel(panel), x.groups(), x.group(i, 0), c);
    }
  });
}

// c [tokens of the tiles][16] = x times row block `index` of w, transposed.
inline void block_product(const Matrix& w, std::int64_t index, const Activations& x, TileRange tokens, std::uint8_t* panel, float* c) {
  const std::uint8_t* block = w.data + index * w.layout.block_bytes();
  std::fill_n(c, tokens.count() * x.tile * 16, 0.0f);
  if (!w.is_quantized()) return dense_product(w.format->format, block, x, tokens, panel, c);
  with_tiles(w.format->format, [&]<class Tiles>() {
    x.terms == 2 ? quantized_block<Tiles, 2>(w, block, x, tokens, panel, c) : quantized_block<Tiles, 1>(w, block, x, tokens, panel, c);
  });
}

// ---- A whole layer. ----

// Token tiles taken together: their codes stay in the L2 cache while a row block goes over them. Plain activations are
// cut by columns (dense.h), so of those as many as there is room for.
inline std::int64_t tiles_at_once(const Activations& x) {
  constexpr std::int64_t kL2Share = 512 << 10;
  const std::int64_t bytes = x.codes ? x.groups() * group_bytes(x.tile, x.terms) : 0;
  return std::clamp<std::int64_t>(kL2Share / std::max<std::int64_t>(bytes, 1), 4, 32);
}

// Per thread: a panel, and c for four row blocks of `tiles_at_once` tiles.
constexpr std::int64_t kMaxTokensAtOnce = 32 * kTokenTile;

inline std::int64_t panel_bytes(const Linear& w) {
  return std::max(kPanelBytes, w.columns() / kGroup * PanelTiles<6>::kBytes);
}
inline std::int64_t thread_bytes(std::int64_t panel) { return align64(panel) + 4 * kMaxTokensAtOnce * 64; }

struct ThreadScratch {
  std::uint8_t* panel;
  float* c;
  ThreadScratch(std::uint8_t* memory, std::int64_t panel, int rank)
      : panel(memory + rank * thread_bytes(panel)), c(reinterpret_cast<float*>(this->panel + align64(panel))) {}
};

// The rank's share of a layer's row blocks, weighed by their bytes: `visit(part, block, first output row)`.
template <class Visit>
void for_row_blocks(const Linear& w, int rank, int size, Visit visit) {
  std::int64_t total = 0, before = 0, row = 0;
  for (const Matrix& part : w.parts) total += part.layout.bytes();
  for (const Matrix& part : w.parts) {
    const PackedLayout& layout = part.layout;
    auto first_from = [&](std::int64_t rank_begin) {  // the first block that begins at or after the rank's first byte
      const std::int64_t offset = total * rank_begin / size - before;
      return std::clamp<std::int64_t>((offset + layout.block_bytes() - 1) / layout.block_bytes(), 0, layout.row_blocks);
    };
    for (std::int64_t block = first_from(rank); block < first_from(rank + 1); ++block) visit(part, block, row + block * kLanes);
    before += layout.bytes();
    row += part.rows;
  }
}

// Fetches the beginning of the rank's share into the L2 cache, where the processor waits for others anyway: a row
// block's own fetching ahead starts only when its first tile is read.
inline void warm(const Linear& w, int rank, int size) {
  bool is_first = true;
  for_row_blocks(w, rank, size, [&](const Matrix& part, std::int64_t block, std::int64_t) {
    if (!std::exchange(is_first, false)) return;
    const std::uint8_t* from = part.data + block * part.layout.block_bytes();
    for (std::int64_t line = 0; line < kFarAhead; line += 64) __builtin_prefetch(from + line, 0, 2);
  });
}

// out [num_tokens, stride] (=, or += where kAdd) layer(x) + bias. Ends without a barrier.
template <bool kAdd>
void apply_linear(const Linear& w, const Activations& x, float* out, std::int64_t stride, ThreadScratch scratch, int rank, int size) {
  const std::int64_t at_once = tiles_at_once(x);
  for (std::int64_t tile = 0; tile < x.num_tiles(); tile += at_once) {
    const TileRange tokens{tile, std::min(tile + at_once, x.num_tiles())};
    const std::int64_t first = tile * x.tile, count = std::min(tokens.end * x.tile, x.num_tokens) - first;
    for_row_blocks(w, rank, size, [&](const Matrix& part, std::int64_t block, std::int64_t row) {
      block_product(part, block, x, tokens, scratch.panel, scratch.c);
      const int width = static_cast<int>(std::min(kLanes, part.rows - block * kLanes));
      const F bias = w.bias != nullptr ? load_n(w.bias + row, width) : zero();
      for (std::int64_t t = 0; t < count; ++t) {
        float* to = out + (first + t) * stride + row;
        F value = add(load(scratch.c + 16 * t), bias);
        if constexpr (kAdd) value = add(load_n(to, width), value);
        store_n(to, value, width);
      }
    });
  }
}

inline void linear(const Linear& w, int terms, const float* x, std::int64_t num_tokens, float* out, std::uint8_t* scratch,
                   Team& team, int rank) {
  const Activations acts = place_activations(scratch, Forms({&w}), num_tokens, w.columns(), terms);
  const Share share(num_tokens, rank, team.size());
  for (std::int64_t t = share.begin; t < share.end; ++t) put_activations(acts, t, 0, w.columns(), x + t * w.columns());
  team.barrier();
  std::uint8_t* rest = scratch + activation_bytes(num_tokens, w.columns(), terms);
  apply_linear<false>(w, acts, out, w.rows(), ThreadScratch(rest, panel_bytes(w), rank), rank, team.size());
}

inline std::int64_t linear_scratch_bytes(const Linear& w, int terms, std::int64_t num_tokens, int threads) {
  return activation_bytes(num_tokens, w.columns(), terms) + threads * thread_bytes(panel_bytes(w));
}

}  // namespace flexjudge::FJ_ISA
