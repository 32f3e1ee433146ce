// A decoder's layers over one step, on all threads at once.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#include "attention.h"
#include "block.h"
#include "kv_store.h"

namespace flexjudge::FJ_ISA {

inline BlockShape block_shape(const Decoder& m) { return {m.hidden, m.intermediate, m.eps, m.terms}; }

// What a decoder keeps beside its blocks' memory.
struct StepMemory : BlockMemory {
  std::uint8_t* attention;
  float *cos, *sin, *qkv, *attended;

  StepMemory(const Decoder& m, std::int64_t num_tokens, std::int64_t max_context, int num_threads, Arena& arena)
      : BlockMemory(block_shape(m), std::max(m.hidden, m.num_heads * m.head_dim), widest_panel(m.layers, panel_bytes(m.head)), num_tokens,
                    num_threads, arena),
        attention(arena.take<std::uint8_t>(attention_scratch_bytes(m.attention(), max_context, num_threads))),
        cos(arena.take<float>(num_tokens * m.head_dim / 2)),
        sin(arena.take<float>(num_tokens * m.head_dim / 2)),
        qkv(arena.take<float>(num_tokens * m.qkv_rows())),
        attended(arena.take<float>(num_tokens * m.num_heads * m.head_dim)) {}
};

// One thread's view of a step.
class StepRunner : BlockRunner {
 public:
  StepRunner(const Decoder& model, const Step& step, const StepMemory& memory, Team& team, int rank)
      : BlockRunner(block_shape(model), memory, step.num_tokens, team, rank), m_(model), step_(step), memory_(memory) {}

  void run() {
    embed();
    for (std::size_t i = 0; i < m_.layers.size(); ++i) {
      attention_block(m_.layers[i], static_cast<std::int64_t>(i));
      mlp_block(m_.layers[i], i + 1 < m_.layers.size() ? m_.layers[i + 1].qkv : m_.head);
    }
    write_logits();
  }

 private:
  // The tokens' rows of the embedding table or of the media's embeddings, and the angles of their positions.
  void embed() {
    const std::int64_t half = m_.head_dim / 2;
    const Share share(step_.num_tokens, rank_, size_);
    for (std::int64_t t = share.begin; t < share.end; ++t) {
      const Matrix& table = m_.embed;
      const std::int64_t id = step_.token_ids[t];
      float* to = memory_.hidden + t * m_.hidden;
      if (id < table.rows) {
        unpack_row(*table.format, table.data, table.rows, table.columns, id, to);
      } else {
        std::copy_n(step_.media + (id - table.rows) * m_.hidden, m_.hidden, to);
      }
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
