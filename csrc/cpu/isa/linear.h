// Products of packed matrices with a step's activations. One kernel for one token, a few, and a whole prompt: an
// output is summed group by group over its columns, in the same order and with the same operations whatever
// tokens stand beside it. Only the tiles over tokens vary.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "activations.h"

namespace flexjudge::FJ_ISA {

// ---- A row block's tiles, expanded: 8 vectors of unsigned codes, then factors and offsets per lane. ----

// kHalves: the 16 left and the 16 right columns of a tile have factors of their own. kWide: codes above 127.
enum class Kind { kPlain, kHalves, kWide };

constexpr std::int64_t panel_tile_bytes(Kind kind) { return 512 + (kind == Kind::kHalves ? 4 : 2) * 64; }

inline Kind kind_of(const FormatInfo& f) {
  return f.scales == Scales::kQ6K ? Kind::kHalves : (f.bits == 8 ? Kind::kWide : Kind::kPlain);
}

template <int kBits>
FJ_INLINE void expand_codes(const std::uint8_t* in, std::uint8_t* out) {
  if constexpr (kBits == 8) {
    for (int q = 0; q < 8; ++q) store_codes(out + 64 * q, load_codes(in + 64 * q));
    return;
  }
  Codes quads[8];
  for (int v = 0; v < 4; ++v) {
    const Codes c = load_codes(in + 64 * v);
    quads[v] = bits_of<0, 15>(c);
    quads[v + 4] = bits_of<4, 15>(c);
  }
  if constexpr (kBits == 5) {
    const Codes h = load_codes(in + 256);
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
      const Codes h = load_codes(in + 256 + 64 * side);
      quads[4 * side + 0] = or_shifted<4>(quads[4 * side + 0], bits_of<0, 3>(h));
      quads[4 * side + 1] = or_shifted<4>(quads[4 * side + 1], bits_of<2, 3>(h));
      quads[4 * side + 2] = or_shifted<4>(quads[4 * side + 2], bits_of<4, 3>(h));
      quads[4 * side + 3] = or_shifted<4>(quads[4 * side + 3], bits_of<6, 3>(h));
    }
  }
  for (int q = 0; q < 8; ++q) store_codes(out + 64 * q, quads[q]);
}

// Factors and offsets of tile `i` (of a K format: of the unit's eight) from the scales of its unit.
template <Scales kScales>
FJ_INLINE void expand_scales(const std::uint8_t* in, int i, float zero_point, float* out) {
  const F d = load_half(reinterpret_cast<const std::uint16_t*>(in));
  if constexpr (kScales == Scales::kHalf) {
    store(out, d);
    store(out + 16, mul(d, set1(-zero_point)));
  } else if constexpr (kScales == Scales::kHalfMin) {
    store(out, d);
    store(out + 16, load_half(reinterpret_cast<const std::uint16_t*>(in + 32)));
  } else if constexpr (kScales == Scales::kK) {
    const I low = load_u8(in + 64 + 16 * i);
    I high = load_u8(in + 192 + 16 * (i / 2));
    if (i & 1) high = shift_right<4>(high);
    const I scale = or_i(and_i(low, 15), shift_left<4>(and_i(high, 3)));
    const I minimum = or_i(shift_right<4>(low), shift_left<2>(and_i(high, 12)));
    const F dmin = load_half(reinterpret_cast<const std::uint16_t*>(in + 32));
    store(out, mul(d, to_float(scale)));
    store(out + 16, sub(zero(), mul(dmin, to_float(minimum))));
  } else {
    for (int half = 0; half < 2; ++half) {
      const F factor = mul(d, to_float(load_s8(in + 32 + 16 * (2 * i + half))));
      store(out + 16 * half, factor);
      store(out + 32 + 16 * half, mul(factor, set1(-zero_point)));
    }
  }
}

constexpr std::int64_t kPrefetchAhead = 4096;  // bytes; the processor's own prefetch stops at each 4 KiB page

template <int kBits, Scales kScales>
void expand(const std::uint8_t* codes, const std::uint8_t* scales, float zero_point, std::int64_t begin, std::int64_t end,
            std::uint8_t* panel) {
  constexpr bool kUnits = kScales == Scales::kK || kScales == Scales::kQ6K;  // eight tiles share a unit
  constexpr std::int64_t kTileBytes = panel_tile_bytes(kScales == Scales::kQ6K ? Kind::kHalves : Kind::kPlain);
  for (std::int64_t i = begin; i < end; ++i, panel += kTileBytes) {
    const std::uint8_t* tile = codes + i * (64 * kBits);
    for (int line = 0; line < kBits; ++line) __builtin_prefetch(tile + kPrefetchAhead + 64 * line);
    expand_codes<kBits>(tile, panel);
    expand_scales<kScales>(scales + (kUnits ? i / 8 : i) * scale_unit_bytes(kScales), static_cast<int>(i % 8), zero_point,
                           reinterpret_cast<float*>(panel + 512));
  }
}

// Tiles [begin, end) of a row block to `panel`.
inline void expand_tiles(const Matrix& w, const std::uint8_t* block, std::int64_t begin, std::int64_t end, std::uint8_t* panel) {
  const std::uint8_t* scales = block + w.layout.code_bytes;
  const auto zero_point = static_cast<float>(w.format->zero_point);
  switch (w.format->format) {
    case Format::kQ4_0: return expand<4, Scales::kHalf>(block, scales, zero_point, begin, end, panel);
    case Format::kQ4_1: return expand<4, Scales::kHalfMin>(block, scales, zero_point, begin, end, panel);
    case Format::kQ5_0: return expand<5, Scales::kHalf>(block, scales, zero_point, begin, end, panel);
    case Format::kQ5_1: return expand<5, Scales::kHalfMin>(block, scales, zero_point, begin, end, panel);
    case Format::kQ8_0: return expand<8, Scales::kHalf>(block, scales, zero_point, begin, end, panel);
    case Format::kQ4_K: return expand<4, Scales::kK>(block, scales, zero_point, begin, end, panel);
    case Format::kQ5_K: return expand<5, Scales::kK>(block, scales, zero_point, begin, end, panel);
    case Format::kQ6_K: return expand<6, Scales::kQ6K>(block, scales, zero_point, begin, end, panel);
    default: return;
  }
}

// ---- Kernels: 16 rows times kT tokens; c [kT][16] is added to. ----

// Per tile and token: 8 (or 16) byte dot products of 16 rows, exact; then one rounding per operation below.
template <int kT, Kind kKind, int kTerms>
void quantized_kernel(const std::uint8_t* panel, std::int64_t num_tiles, const std::uint8_t* x, std::int64_t x_tile,
                      std::int64_t first, float* c) {
  constexpr int kHalves = kKind == Kind::kHalves ? 2 : 1;
  constexpr bool kWide = kKind == Kind::kWide;
  const std::int64_t x_stride = group_bytes(x_tile, kTerms);
  F acc[kT];
  for (int t = 0; t < kT; ++t) acc[t] = load(c + 16 * t);
  for (std::int64_t i = 0; i < num_tiles; ++i, panel += panel_tile_bytes(kKind), x += x_stride) {
    const auto* meta = reinterpret_cast<const float*>(x) + 4 * first;
    const auto* bytes = reinterpret_cast<const std::int8_t*>(x + x_tile * 16) + first * kTerms * 32;
    const auto* factors = reinterpret_cast<const float*>(panel + 512);
    Codes codes[8];
    for (int q = 0; q < 8; ++q) codes[q] = load_codes(panel + 64 * q);
#pragma GCC unroll 12
    for (int t = 0; t < kT; ++t) {
      const std::int8_t* token = bytes + t * kTerms * 32;
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        constexpr int kQuads = 8 / kHalves;
        I dot = zero_i();
#pragma GCC unroll 8
        for (int q = 0; q < kQuads; ++q) dot = dot4<kWide>(dot, codes[h * kQuads + q], token + 4 * (h * kQuads + q));
        if constexpr (kTerms == 2) {
          dot = shift_left<8>(dot);
#pragma GCC unroll 8
          for (int q = 0; q < kQuads; ++q) dot = dot4<kWide>(dot, codes[h * kQuads + q], token + 32 + 4 * (h * kQuads + q));
        }
        acc[t] = fma(mul(to_float(dot), set1(meta[4 * t])), load(factors + 16 * h), acc[t]);
        acc[t] = fma(set1(meta[4 * t + (kHalves == 1 ? 1 : 2 + h)]), load(factors + 16 * (kHalves + h)), acc[t]);
      }
    }
  }
  for (int t = 0; t < kT; ++t) store(c + 16 * t, acc[t]);
}

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

// Plain values. Runs of 64 columns are summed apart, which keeps the rounding error of long rows small.
template <int kT, class Weight>
void dense_kernel(const std::uint8_t* block, std::int64_t columns, const float* x, std::int64_t x_tile, std::int64_t first, float* c) {
  const auto* w = reinterpret_cast<const typename Weight::Stored*>(block);
  x += first;
  F total[kT];
  for (int t = 0; t < kT; ++t) total[t] = load(c + 16 * t);
  for (std::int64_t begin = 0; begin < columns; begin += 64) {
    F acc[kT];
    for (int t = 0; t < kT; ++t) acc[t] = zero();
    for (std::int64_t k = begin; k < std::min(columns, begin + 64); ++k, w += 16, x += x_tile) {
      const F row = Weight::get(w);
#pragma GCC unroll 12
      for (int t = 0; t < kT; ++t) acc[t] = fma(row, set1(x[t]), acc[t]);
    }
    for (int t = 0; t < kT; ++t) total[t] = add(total[t], acc[t]);
  }
  for (int t = 0; t < kT; ++t) store(c + 16 * t, total[t]);
}

// Cuts `count` tokens of a tile into runs the kernels exist for.
template <class Call>
FJ_INLINE void for_token_runs(std::int64_t count, Call call) {
  for (std::int64_t first = 0; first < count;) {
    switch (std::min<std::int64_t>(count - first, kTokenTile)) {
      case 12: call.template operator()<12>(first); first += 12; break;
      case 11: case 10: case 9: case 8: call.template operator()<8>(first); first += 8; break;
      case 7: case 6: call.template operator()<6>(first); first += 6; break;
      case 5: case 4: call.template operator()<4>(first); first += 4; break;
      case 3: call.template operator()<3>(first); first += 3; break;
      case 2: call.template operator()<2>(first); first += 2; break;
      default: call.template operator()<1>(first); first += 1; break;
    }
  }
}

template <Kind kKind, int kTerms>
void quantized_tile(const std::uint8_t* panel, std::int64_t num_tiles, const std::uint8_t* x, std::int64_t x_tile,
                    std::int64_t count, float* c) {
  for_token_runs(count, [&]<int kT>(std::int64_t first) {
    quantized_kernel<kT, kKind, kTerms>(panel, num_tiles, x, x_tile, first, c + 16 * first);
  });
}

template <class Weight>
void dense_tile(const std::uint8_t* block, const Activations& x, std::int64_t token_tile, std::int64_t count, float* c) {
  for_token_runs(count, [&]<int kT>(std::int64_t first) {
    dense_kernel<kT, Weight>(block, x.columns, x.column(token_tile, 0), x.tile, first, c + 16 * first);
  });
}

// ---- One row block times some token tiles. ----

constexpr std::int64_t kPieceTiles = 16;  // with one token tile, expand this much and use it while it is in L1

struct TileRange {
  std::int64_t begin, end;
};

inline std::int64_t tokens_of_tile(const Activations& x, std::int64_t token_tile) {
  return std::min(x.tile, x.num_tokens - token_tile * x.tile);
}

template <int kTerms>
void quantized_block(const Matrix& w, const std::uint8_t* block, const Activations& x, TileRange tokens, std::uint8_t* panel, float* c) {
  const Kind kind = kind_of(*w.format);
  const std::int64_t groups = x.groups(), piece = tokens.end - tokens.begin == 1 ? kPieceTiles : groups;
  for (std::int64_t begin = 0; begin < groups; begin += piece) {
    const std::int64_t end = std::min(groups, begin + piece);
    expand_tiles(w, block, begin, end, panel);
    for (std::int64_t i = tokens.begin; i < tokens.end; ++i) {
      float* out = c + (i - tokens.begin) * x.tile * 16;
      const std::uint8_t* group = x.group(i, begin);
      const std::int64_t count = tokens_of_tile(x, i);
      switch (kind) {
        case Kind::kPlain: quantized_tile<Kind::kPlain, kTerms>(panel, end - begin, group, x.tile, count, out); break;
        case Kind::kHalves: quantized_tile<Kind::kHalves, kTerms>(panel, end - begin, group, x.tile, count, out); break;
        case Kind::kWide: quantized_tile<Kind::kWide, kTerms>(panel, end - begin, group, x.tile, count, out); break;
      }
    }
  }
}

// c [tokens of the tiles][16] = x times row block `index` of w, transposed.
inline void block_product(const Matrix& w, std::int64_t index, const Activations& x, TileRange tokens, std::uint8_t* panel, float* c) {
  const std::uint8_t* block = w.data + index * w.layout.block_bytes();
  std::fill_n(c, (tokens.end - tokens.begin) * x.tile * 16, 0.0f);
  if (w.is_quantized()) {
    x.terms == 2 ? quantized_block<2>(w, block, x, tokens, panel, c) : quantized_block<1>(w, block, x, tokens, panel, c);
    return;
  }
  for (std::int64_t i = tokens.begin; i < tokens.end; ++i) {
    float* out = c + (i - tokens.begin) * x.tile * 16;
    const std::int64_t count = tokens_of_tile(x, i);
    switch (w.format->format) {
      case Format::kF32: dense_tile<F32>(block, x, i, count, out); break;
      case Format::kF16: dense_tile<F16>(block, x, i, count, out); break;
      default: dense_tile<BF16>(block, x, i, count, out); break;
    }
  }
}

// ---- A whole layer. ----

// Token tiles taken together: their activations stay in the L2 cache while a row block goes over them.
inline std::int64_t tiles_at_once(const Activations& x) {
  constexpr std::int64_t kL2Share = 512 << 10;
  const std::int64_t bytes = (x.codes ? x.groups() * group_bytes(x.tile, x.terms) : 0) + (x.values ? x.columns * x.tile * 4 : 0);
  return std::clamp<std::int64_t>(kL2Share / std::max<std::int64_t>(bytes, 1), 4, 32);
}

// Per thread: a panel, and c for four row blocks of `tiles_at_once` tiles.
constexpr std::int64_t kMaxTokensAtOnce = 32 * kTokenTile;

inline std::int64_t panel_bytes(const Linear& w) { return (w.columns() / kGroup + kPieceTiles) * panel_tile_bytes(Kind::kHalves); }
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
