// A decoder's layers over one step, on all threads at once: a phase, a barrier, the next phase.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#include "attention.h"
#include "elementwise.h"
#include "kv_store.h"

namespace flexjudge::FJ_ISA {

inline std::int64_t widest_panel(const Decoder& m) {
  std::int64_t bytes = panel_bytes(m.head);
  for (const Layer& layer : m.layers) {
    for (const Linear* w : {&layer.qkv, &layer.out, &layer.gate, &layer.up, &layer.down}) bytes = std::max(bytes, panel_bytes(*w));
  }
  return bytes;
}

// Up to so many tokens every thread prepares a layer's input for itself, which takes less than a barrier.
constexpr std::int64_t kOwnInputs = 4;

// Where a step keeps what passes from phase to phase, and what each thread works in.
struct StepMemory {
  std::uint8_t *acts, *mlp_acts, *attention, *threads;
  float *hidden, *cos, *sin, *qkv, *attended, *rows;  // `hidden`: the residual stream
  std::int64_t own_acts, panel, row;  // bytes of a thread's own inputs and panel, floats of the longest row

  StepMemory(const Decoder& m, std::int64_t num_tokens, std::int64_t max_context, int num_threads, Arena& arena) {
    const std::int64_t heads = m.num_heads * m.head_dim, width = std::max(m.hidden, heads);
    panel = widest_panel(m);
    row = align64(width);
    own_acts = activation_bytes(std::min(num_tokens, kOwnInputs), width, m.terms);
    acts = arena.take<std::uint8_t>(std::max(activation_bytes(num_tokens, width, m.terms), num_threads * own_acts));
    mlp_acts = arena.take<std::uint8_t>(activation_bytes(num_tokens, m.intermediate, m.terms));
    hidden = arena.take<float>(num_tokens * m.hidden);
    cos = arena.take<float>(num_tokens * m.head_dim / 2);
    sin = arena.take<float>(num_tokens * m.head_dim / 2);
    qkv = arena.take<float>(num_tokens * m.qkv_rows());
    attended = arena.take<float>(num_tokens * heads);
    attention = arena.take<std::uint8_t>(attention_scratch_bytes(m.attention(), max_context, num_threads));
    threads = arena.take<std::uint8_t>(num_threads * thread_bytes(panel));
    rows = arena.take<float>(num_threads * row);
  }
};

// One thread's view of a step.
class StepRunner {
 public:
  StepRunner(const Decoder& model, const Step& step, const StepMemory& memory, Team& team, int rank)
      : m_(model), step_(step), memory_(memory), team_(team), rank_(rank), size_(team.size()),
        scratch_(memory.threads, memory.panel, rank), row_(memory.rows + rank * memory.row) {}

  void run() {
    embed();
    for (std::size_t i = 0; i < m_.layers.size(); ++i) {
      attention_block(m_.layers[i], static_cast<std::int64_t>(i));
      mlp_block(m_.layers[i], i + 1 < m_.layers.size() ? m_.layers[i + 1].qkv : m_.head);
    }
    write_logits();
  }

 private:
  // The tokens' rows of the embedding table, and the angles of their positions.
  void embed() {
    const std::int64_t half = m_.head_dim / 2;
    const Share share(step_.num_tokens, rank_, size_);
    for (std::int64_t t = share.begin; t < share.end; ++t) {
      const Matrix& table = m_.embed;
      unpack_row(*table.format, table.data, table.rows, table.columns, step_.token_ids[t], memory_.hidden + t * m_.hidden);
      std::int64_t pair = 0;
      for (std::size_t section = 0; section < m_.rope_sections.size(); ++section) {
        const std::int64_t position = step_.positions[static_cast<std::int64_t>(section) * step_.num_tokens + t];
        const std::int64_t from = position * half + pair, count = m_.rope_sections[section];
        std::copy_n(m_.cos + from, count, memory_.cos + t * half + pair);
        std::copy_n(m_.sin + from, count, memory_.sin + t * half + pair);
        pair += count;
      }
    }
    team_.barrier();
  }

  // A layer's input: `row_of(t)` for each of `rows` tokens, quantised as the layers `readers` want it.
  template <class RowOf>
  Activations prepare(Forms readers, std::int64_t rows, std::int64_t columns, RowOf row_of) {
    const bool own = rows <= kOwnInputs;
    std::uint8_t* memory = memory_.acts + (own ? rank_ * memory_.own_acts : 0);
    const Activations x = place_activations(memory, readers, rows, columns, m_.terms);
    const Share share = own ? Share(rows, 0, 1) : Share(rows, rank_, size_);
    for (std::int64_t t = share.begin; t < share.end; ++t) put_activations(x, t, 0, columns, row_of(t));
    if (!own) team_.barrier();
    return x;
  }

  Activations norm(const float* weight, Forms readers, std::int64_t rows, const std::int64_t* ids) {
    return prepare(readers, rows, m_.hidden, [&](std::int64_t t) {
      rms_norm(memory_.hidden + (ids != nullptr ? ids[t] : t) * m_.hidden, weight, m_.eps, m_.hidden, row_);
      return row_;
    });
  }

  void attention_block(const Layer& layer, std::int64_t index) {
    const Activations x = norm(layer.input_norm, Forms({&layer.qkv}), step_.num_tokens, nullptr);
    apply_linear<false>(layer.qkv, x, memory_.qkv, m_.qkv_rows(), scratch_, rank_, size_);
    warm(layer.out, rank_, size_);
    team_.barrier();
    rotate_and_store(index);
    team_.barrier();
    const AttentionShape shape = m_.attention();
    attend_any({shape, memory_.qkv, m_.qkv_rows(), step_.cache, index, step_.sequences, memory_.attended}, memory_.attention, team_, rank_);
    team_.barrier();
    const std::int64_t width = m_.num_heads * m_.head_dim;
    const Activations y = prepare(Forms({&layer.out}), step_.num_tokens, width, [&](std::int64_t t) { return memory_.attended + t * width; });
    apply_linear<true>(layer.out, y, memory_.hidden, m_.hidden, scratch_, rank_, size_);
    warm(layer.gate, rank_, size_);
    warm(layer.up, rank_, size_);
    team_.barrier();
  }

  void rotate_and_store(std::int64_t layer) {
    const std::int64_t half = m_.head_dim / 2;
    const Share share(step_.num_tokens, rank_, size_);
    for (std::int64_t t = share.begin; t < share.end; ++t) {
      float* heads = memory_.qkv + t * m_.qkv_rows();
      for (std::int64_t h = 0; h < m_.num_heads + m_.num_kv_heads; ++h) {
        rotate(heads + h * m_.head_dim, memory_.cos + t * half, memory_.sin + t * half, half);
      }
      const float* keys = heads + m_.num_heads * m_.head_dim;
      store_token(step_.cache, layer, step_.slots[t], keys, keys + m_.num_kv_heads * m_.head_dim);
    }
  }

  void mlp_block(const Layer& layer, const Linear& next) {
    const Activations x = norm(layer.post_norm, Forms({&layer.gate, &layer.up}), step_.num_tokens, nullptr);
    const Activations y = place_activations(memory_.mlp_acts, Forms({&layer.down}), step_.num_tokens, m_.intermediate, m_.terms);
    const std::int64_t at_once = tiles_at_once(x);
    const Share share((m_.intermediate + kGroup - 1) / kGroup, rank_, size_);
    for (std::int64_t tile = 0; tile < x.num_tiles(); tile += at_once) {
      const TileRange tokens{tile, std::min(tile + at_once, x.num_tiles())};
      for (std::int64_t g = share.begin; g < share.end; ++g) gated_group(layer, x, y, tokens, g);
    }
    warm(layer.down, rank_, size_);
    team_.barrier();
    apply_linear<true>(layer.down, y, memory_.hidden, m_.hidden, scratch_, rank_, size_);
    warm(next, rank_, size_);
    team_.barrier();
  }

  // silu(gate) * up for 32 columns of the MLP's inside: both products, the activation, and the next quantisation.
  void gated_group(const Layer& layer, const Activations& x, const Activations& y, TileRange tokens, std::int64_t g) {
    const std::int64_t first = tokens.begin * x.tile, count = std::min(tokens.end * x.tile, x.num_tokens) - first;
    const std::int64_t begin = g * kGroup, end = std::min(begin + kGroup, m_.intermediate);
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

  void write_logits() {
    if (step_.num_rows == 0) return;
    const Activations x = norm(m_.norm, Forms({&m_.head}), step_.num_rows, step_.logit_rows);
    apply_linear<false>(m_.head, x, step_.logits, m_.head.rows(), scratch_, rank_, size_);
    std::int64_t begin = m_.head.rows(), end = 0;  // of the rank's own logits
    for_row_blocks(m_.head, rank_, size_, [&](const Matrix&, std::int64_t, std::int64_t row) {
      begin = std::min(begin, row);
      end = std::min(row + kLanes, m_.head.rows());
    });
    for (std::int64_t r = 0; r < step_.num_rows && begin < end; ++r) {
      const bool good = all_finite(step_.logits + r * m_.head.rows() + begin, end - begin);
      if (!good) std::atomic_ref(step_.finite[r]).store(false, std::memory_order_relaxed);
    }
  }

  const Decoder& m_;
  const Step& step_;
  const StepMemory& memory_;
  Team& team_;
  const int rank_, size_;
  const ThreadScratch scratch_;
  float* const row_;
};

inline std::int64_t decoder_scratch_bytes(const Decoder& m, std::int64_t num_tokens, std::int64_t max_context, int threads) {
  Arena counter;
  StepMemory(m, num_tokens, max_context, threads, counter);
  return counter.used;
}

inline void decoder(const Decoder& m, const Step& step, std::uint8_t* scratch, Team& team, int rank) {
  std::int64_t max_context = 0;
  for (std::int64_t i = 0; i < step.sequences.count; ++i) max_context = std::max(max_context, step.sequences.context_lens[i]);
  Arena arena{scratch};
  const StepMemory memory(m, step.num_tokens, max_context, team.size(), arena);
  StepRunner(m, step, memory, team, rank).run();
}

}  // namespace flexjudge::FJ_ISA
