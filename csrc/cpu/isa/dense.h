// Products of plain weights (float32, half, bfloat16): sixteen rows times a few tokens held in registers, over columns
// cut so that what is used again stays in the caches.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activations.h"
#include "elements.h"

namespace flexjudge::FJ_ISA {

// Bytes that are fetched ahead to the L2 cache, which has more reads in flight than L1. The processor's own prefetch
// stops at each 4 KiB page.
constexpr std::int64_t kFarAhead = 16384;

// Columns that are summed apart, first to last, before they join an output: the rounding error of long rows stays
// small. Every path below keeps to these runs and to the order in them, so all give the same bits.
constexpr std::int64_t kRun = 64;

// ---- What a kernel multiplies. A step is the weights of `kColumns` columns of 16 rows, in `kBytes` bytes; `x` are
// the activations of its first column, those of the next column `stride` words on.

struct F32Steps {
  using Word = float;
  static constexpr std::int64_t kColumns = 1, kBytes = 64, kWords = 1;

  template <int kT>
  static FJ_INLINE void multiply(const std::uint8_t* w, const float* x, std::int64_t, F* acc) {
    multiply_column<kT>(load(reinterpret_cast<const float*>(w)), x, acc);
  }
  static FJ_INLINE void expand(const std::uint8_t* w, F* columns) { columns[0] = load(reinterpret_cast<const float*>(w)); }

  template <int kT>
  static FJ_INLINE void multiply_column(F row, const float* x, F* acc) {
#pragma GCC unroll 12
    for (int t = 0; t < kT; ++t) acc[t] = fma(row, set1(x[t]), acc[t]);
  }
};

struct F16Steps {
  using Word = float;
  static constexpr std::int64_t kColumns = 1, kBytes = 32, kWords = 1;

  template <int kT>
  static FJ_INLINE void multiply(const std::uint8_t* w, const float* x, std::int64_t, F* acc) {
    F row;
    expand(w, &row);
    F32Steps::multiply_column<kT>(row, x, acc);
  }
  static FJ_INLINE void expand(const std::uint8_t* w, F* columns) {
    columns[0] = load_half(reinterpret_cast<const std::uint16_t*>(w));
  }
};

// Pairs of columns, each in the half of a lane: a bfloat16 is the upper half of a float.
struct BF16Steps {
  using Word = float;
  static constexpr std::int64_t kColumns = 2, kBytes = 64, kWords = 2;

  template <int kT>
  static FJ_INLINE void multiply(const std::uint8_t* w, const float* x, std::int64_t stride, F* acc) {
    F row[2];
    expand(w, row);
    F32Steps::multiply_column<kT>(row[0], x, acc);
    F32Steps::multiply_column<kT>(row[1], x + stride, acc);
  }
  static FJ_INLINE void expand(const std::uint8_t* w, F* columns) {
    columns[0] = low_bf16(w);
    columns[1] = high_bf16(w);
  }
};

#ifdef FJ_BF16_DOTS
// The same pairs, multiplied as they lie by pairs of rounded activations, two columns to an instruction.
struct BF16Dots {
  using Word = std::uint32_t;
  static constexpr std::int64_t kColumns = 2, kBytes = 64, kWords = 1;

  template <int kT>
  static FJ_INLINE void multiply(const std::uint8_t* w, const std::uint32_t* x, std::int64_t, F* acc) {
    const Codes pairs = load_codes(w);
#pragma GCC unroll 12
    for (int t = 0; t < kT; ++t) acc[t] = dot2(acc[t], pairs, x[t]);
  }
};
#endif

// ---- Kernels: 16 rows times kT tokens of a tile; c [kT][16] is added to. ----

// Tokens that a kernel takes of a tile of `tile`: a divisor of it, and no more than stay in registers.
constexpr int tokens_at_once(int tile) {
  int most = std::min(tile, kDenseTokens);
  while (tile % most != 0) --most;
  return most;
}

// What a kernel fetches while it multiplies: `bytes` from `at` on with every run.
struct Ahead {
  const std::uint8_t* at;
  std::int64_t bytes;

  FJ_INLINE void next_run() {
    for (std::int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
    at += bytes;
  }
};

// One chain of sums a token and run. Not inlined: among its callers' variables GCC keeps some of the sums in memory,
// which halves its speed.
template <class Steps, int kT>
__attribute__((noinline)) void dense_kernel(const std::uint8_t* w, const typename Steps::Word* x, std::int64_t stride, std::int64_t columns, Ahead ahead, float* c) {
  std::int64_t steps = (columns + Steps::kColumns - 1) / Steps::kColumns;
  while (steps > 0) {
    const std::int64_t run = std::min(steps, kRun / Steps::kColumns);
    ahead.next_run();
    F acc[kT];
    for (int t = 0; t < kT; ++t) acc[t] = zero();
    for (std::int64_t i = 0; i < run; ++i, w += Steps::kBytes, x += Steps::kWords * stride) {
      Steps::template multiply<kT>(w, x, stride, acc);
    }
    for (int t = 0; t < kT; ++t) store(c + 16 * t, add(load(c + 16 * t), acc[t]));
    steps -= run;
  }
}

// ---- One row block times some token tiles. ----

// Weights that are used again and again: their share of the L1 cache, in float32 or as packed.
constexpr std::int64_t kPanelBytes = 16384;

// Columns of 16 rows as float32 [columns, 16], to a whole step.
template <class Steps>
FJ_INLINE void expand(const std::uint8_t* w, std::int64_t columns, float* panel) {
  for (std::int64_t k = 0; k < columns; k += Steps::kColumns, w += Steps::kBytes, panel += 16 * Steps::kColumns) {
    F row[Steps::kColumns];
    Steps::expand(w, row);
    for (int i = 0; i < Steps::kColumns; ++i) store(panel + 16 * i, row[i]);
  }
}

// Some columns times every token of the tiles. x_of(tile): the activations of those columns. Fetches the `next_bytes`
// that follow in memory meanwhile, evenly.
template <class Steps, int kT, class XOf>
FJ_INLINE void multiply_panel(const std::uint8_t* w, std::int64_t columns, TileRange tokens, XOf x_of, const std::uint8_t* next, std::int64_t next_bytes, float* c) {
  constexpr int kAtOnce = tokens_at_once(kT);
  const std::int64_t calls = tokens.count() * (kT / kAtOnce), runs = calls * ((columns + kRun - 1) / kRun);
  Ahead ahead{next, (next_bytes / runs + 63) / 64 * 64};
  for (std::int64_t i = tokens.begin; i < tokens.end; ++i) {
    for (int t = 0; t < kT; t += kAtOnce, c += 16 * kAtOnce) {
      dense_kernel<Steps, kAtOnce>(w, x_of(i) + t, kT, columns, ahead, c);
      ahead.at += (columns + kRun - 1) / kRun * ahead.bytes;
    }
  }
}

// kExpand: weights become float32 once, for all tokens. x_of(tile, column): where a tile's activations lie.
template <class Steps, bool kExpand, class XOf>
void dense_block(const std::uint8_t* block, std::int64_t columns, std::int64_t tile, TileRange tokens, XOf x_of, std::uint8_t* panel, float* c) {
  constexpr std::int64_t kPanelSteps = kPanelBytes / (kExpand ? 64 * Steps::kColumns : Steps::kBytes);
  constexpr std::int64_t kPanelColumns = kPanelSteps * Steps::kColumns, kBytes = kPanelSteps * Steps::kBytes;
  with_token_tile<false>(tile, [&]<int kT>() {
    if constexpr (tokens_at_once(kT) == kT) {
      const Ahead ahead{block + kFarAhead, kRun / Steps::kColumns * Steps::kBytes};
      if (tokens.count() == 1) return dense_kernel<Steps, kT>(block, x_of(tokens.begin, 0), kT, columns, ahead, c);
    }
    for (std::int64_t k = 0; k < columns; k += kPanelColumns, block += kBytes) {
      const std::int64_t width = std::min(kPanelColumns, columns - k);
      auto x_from = [&](std::int64_t i) { return x_of(i, k); };
      if constexpr (kExpand) {
        expand<Steps>(block, width, reinterpret_cast<float*>(panel));
        multiply_panel<F32Steps, kT>(panel, width, tokens, x_from, block + kBytes, kBytes, c);
      } else {
        multiply_panel<Steps, kT>(block, width, tokens, x_from, block + kBytes, kBytes, c);
      }
    }
  });
}

// c [tokens of the tiles][16] += x times the row block `block` of a matrix of plain values, transposed.
inline void dense_product(Format format, const std::uint8_t* block, const Activations& x, TileRange tokens, std::uint8_t* panel, float* c) {
  auto values = [&](std::int64_t tile, std::int64_t k) { return x.column(tile, k); };
  switch (format) {
    case Format::kF32: return dense_block<F32Steps, false>(block, x.columns, x.tile, tokens, values, panel, c);
    case Format::kF16: return dense_block<F16Steps, true>(block, x.columns, x.tile, tokens, values, panel, c);
    default: break;
  }
#ifdef FJ_BF16_DOTS
  auto pairs = [&](std::int64_t tile, std::int64_t k) { return x.pair(tile, k); };
  dense_block<BF16Dots, false>(block, x.columns, x.tile, tokens, pairs, panel, c);
#else
  dense_block<BF16Steps, true>(block, x.columns, x.tile, tokens, values, panel, c);
#endif
}

}  // namespace flexjudge::FJ_ISA
