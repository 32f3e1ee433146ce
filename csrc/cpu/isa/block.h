// What transformer blocks share over one step: norms, prepared inputs and the gated MLP on a residual stream. All
// threads run a block at once: a phase, a barrier, the next phase.
#pragma once

#include <algorithm>
#include <cstdint>

#include "elementwise.h"
#include "linear.h"

namespace flexjudge::FJ_ISA {

// Up to so many tokens every thread prepares a layer's input for itself, which takes less than a barrier.
constexpr std::int64_t kOwnInputs = 4;

inline std::int64_t widest_panel(const std::vector<Layer>& layers, std::int64_t bytes) {
  for (const Layer& layer : layers) {
    for (const Linear* w : {&layer.qkv, &layer.out, &layer.gate, &layer.up, &layer.down}) bytes = std::max(bytes, panel_bytes(*w));
  }
  return bytes;
}

// Sizes that every layer has.
struct BlockShape {
  std::int64_t hidden, intermediate;
  float eps;
  int terms;
};

// Where blocks keep what passes from phase to phase, and what each thread works in.
struct BlockMemory {
  std::uint8_t *acts, *mlp_acts, *threads;
  float *hidden, *rows;               // `hidden`: the residual stream
  std::int64_t own_acts, panel, row;  // bytes of a thread's own inputs and panel, floats of the longest row

  // width: of the widest input but the MLP's inside; panel: bytes of the widest panel.
  BlockMemory(const BlockShape& shape, std::int64_t width, std::int64_t panel, std::int64_t num_tokens, int num_threads, Arena& arena)
      : panel(panel), row(align64(width)) {
    own_acts = activation_bytes(std::min(num_tokens, kOwnInputs), width, shape.terms);
    acts = arena.take<std::uint8_t>(std::max(activation_bytes(num_tokens, width, shape.terms), num_threads * own_acts));
    mlp_acts = arena.take<std::uint8_t>(activation_bytes(num_tokens, shape.intermediate, shape.terms));
    hidden = arena.take<float>(num_tokens * shape.hidden);
    threads = arena.take<std::uint8_t>(num_threads * thread_bytes(panel));
    rows = arena.take<float>(num_threads * row);
  }
};

// One thread's view of a step's blocks.
class BlockRunner {
 protected:
  BlockRunner(const BlockShape& shape, const BlockMemory& memory, std::int64_t num_tokens, Team& team, int rank)
      : shape_(shape), block_(memory), num_tokens_(num_tokens), team_(team), rank_(rank), size_(team.size()),
        scratch_(memory.threads, memory.panel, rank), row_(memory.rows + rank * memory.row) {}

  // A layer's input: `row_of(t)` for each of `rows` tokens, quantised as the layers `readers` want it.
  template <class RowOf>
  Activations prepare(Forms readers, std::int64_t rows, std::int64_t columns, RowOf row_of) {
    const bool own = rows <= kOwnInputs;
    std::uint8_t* memory = block_.acts + (own ? rank_ * block_.own_acts : 0);
    const Activations x = place_activations(memory, readers, rows, columns, shape_.terms);
    const Share share = own ? Share(rows, 0, 1) : Share(rows, rank_, size_);
    for (std::int64_t t = share.begin; t < share.end; ++t) put_activations(x, t, 0, columns, row_of(t));
    if (!own) team_.barrier();
    return x;
  }

  // ids: which tokens, or null for the first `rows`.
  Activations norm(const float* weight, Forms readers, std::int64_t rows, const std::int64_t* ids) {
    return prepare(readers, rows, shape_.hidden, [&](std::int64_t t) {
      rms_norm(block_.hidden + (ids != nullptr ? ids[t] : t) * shape_.hidden, weight, shape_.eps, shape_.hidden, row_);
      return row_;
    });
  }

  // `next` is read after this block: its beginning is fetched ahead.
  void mlp_block(const Layer& layer, const Linear& next) {
    const Activations x = norm(layer.post_norm, Forms({&layer.gate, &layer.up}), num_tokens_, nullptr);
    const Activations y = place_activations(block_.mlp_acts, Forms({&layer.down}), num_tokens_, shape_.intermediate, shape_.terms);
    const std::int64_t at_once = tiles_at_once(x);
    const Share share((shape_.intermediate + kGroup - 1) / kGroup, rank_, size_);
    for (std::int64_t tile = 0; tile < x.num_tiles(); tile += at_once) {
      const TileRange tokens{tile, std::min(tile + at_once, x.num_tiles())};
      for (std::int64_t g = share.begin; g < share.end; ++g) gated_group(layer, x, y, tokens, g);
    }
    warm(layer.down, rank_, size_);
    team_.barrier();
    apply_linear<true>(layer.down, y, block_.hidden, shape_.hidden, scratch_, rank_, size_);
    warm(next, rank_, size_);
    team_.barrier();
  }

  const BlockShape shape_;
  const BlockMemory& block_;
  const std::int64_t num_tokens_;
  Team& team_;
  const int rank_, size_;
  const ThreadScratch scratch_;
  float* const row_;

 private:
  // silu(gate) * up for 32 columns of the MLP's inside: both products, the activation, and the next quantisation.
  void gated_group(const Layer& layer, const Activations& x, const Activations& y, TileRange tokens, std::int64_t g) {
    const std::int64_t first = tokens.begin * x.tile, count = std::min(tokens.end * x.tile, x.num_tokens) - first;
    const std::int64_t begin = g * kGroup, end = std::min(begin + kGroup, shape_.intermediate);
    float* c[4];
    for (int i = 0; i < 4; ++i) {
      c[i] = scratch_.c + i * kMaxTokensAtOnce * 16;
      const Linear& w = i < 2 ? layer.gate : layer.up;
      const std::int64_t block = 2 * g + i % 2;
      if (block < w.parts[0].layout.row_blocks) {
        block_product(w.parts[0], block, x, tokens, scratch_.panel, c[i]);
      } else {
        std::fill_n(c[i], count * 16, 0.0f);
      }
    }
    for (std::int64_t t = 0; t < count; ++t) {
      float out[32];
      for (int i = 0; i < 2; ++i) {
        F gate = load(c[i] + 16 * t), up = load(c[2 + i] + 16 * t);
        const int width = static_cast<int>(std::clamp<std::int64_t>(end - begin - 16 * i, 0, 16));
        if (layer.gate.bias != nullptr) gate = add(gate, load_n(layer.gate.bias + begin + 16 * i, width));
        if (layer.up.bias != nullptr) up = add(up, load_n(layer.up.bias + begin + 16 * i, width));
        store(out + 16 * i, swiglu(gate, up));
      }
      put_activations(y, first + t, begin, end, out);
    }
  }
};

}  // namespace flexjudge::FJ_ISA
