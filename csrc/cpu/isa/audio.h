// An audio tower's layers over the tokens of some recordings, on all threads at once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block.h"
#include "flexjudge/audio.h"
#include "segment_attention.h"

namespace flexjudge::FJ_ISA {

inline BlockShape block_shape(const AudioTower& m) { return {m.hidden, 0, m.eps, kPlainTerms}; }

inline std::int64_t audio_panel(const AudioTower& m) {
  std::int64_t bytes = 0;
  for (const AudioLayer& layer : m.layers) {
    for (const Linear* w : {&layer.qkv, &layer.out, &layer.up, &layer.down}) bytes = std::max(bytes, panel_bytes(*w));
  }
  return bytes;
}

// What a tower keeps beside its blocks' memory.
struct AudioMemory : BlockMemory {
  float *qkv, *attended, *inner;
  std::uint8_t* segments;
  std::int64_t segment_bytes;

  AudioMemory(const AudioTower& m, const AudioStep& step, int num_threads, Arena& arena)
      : BlockMemory(block_shape(m), std::max(m.hidden, m.inner()), audio_panel(m), step.num_tokens, num_threads, arena),
        qkv(arena.take<float>(step.num_tokens * 3 * m.hidden)),
        attended(arena.take<float>(step.num_tokens * m.hidden)),
        inner(arena.take<float>(step.num_tokens * m.inner())),
        segment_bytes(segment_scratch_bytes(longest(step.windows), m.head_dim())) {
    segments = arena.take<std::uint8_t>(num_threads * segment_bytes);
  }
};

// One thread's view of a pass.
class AudioRunner : BlockRunner {
 public:
  AudioRunner(const AudioTower& model, const AudioStep& step, const AudioMemory& memory, Team& team, int rank)
      : BlockRunner(block_shape(model), memory, step.num_tokens, team, rank), m_(model), step_(step), memory_(memory),
        arena_{memory.segments + rank * memory.segment_bytes}, segment_(arena_, longest(step.windows), padded(model.head_dim())) {}

  void run() {
    for (const AudioLayer& layer : m_.layers) {
      attention_block(layer);
      mlp_block(layer);
    }
  }

 private:
  Activations norm(const LayerNorm& weights, const Linear& reader) {
    return prepare(Forms({&reader}), step_.num_tokens, m_.hidden, [&](std::int64_t t) {
      layer_norm(step_.hidden + t * m_.hidden, weights.weight, weights.bias, m_.eps, m_.hidden, row_);
      return row_;
    });
  }

  void attention_block(const AudioLayer& layer) {
    const Activations x = norm(layer.input_norm, layer.qkv);
    apply_linear<false>(layer.qkv, x, memory_.qkv, 3 * m_.hidden, scratch_, rank_, size_);
    team_.barrier();
    segment_attention({m_.num_heads, m_.head_dim(), memory_.qkv, memory_.attended}, step_.windows, segment_, rank_, size_);
    team_.barrier();
    const Activations y = prepare(Forms({&layer.out}), step_.num_tokens, m_.hidden, [&](std::int64_t t) { return memory_.attended + t * m_.hidden; });
    apply_linear<true>(layer.out, y, step_.hidden, m_.hidden, scratch_, rank_, size_);
    team_.barrier();
  }

  void mlp_block(const AudioLayer& layer) {
    const std::int64_t inner = m_.inner();
    const Activations x = norm(layer.post_norm, layer.up);
    apply_linear<false>(layer.up, x, memory_.inner, inner, scratch_, rank_, size_);
    team_.barrier();
    const Activations y = prepare(Forms({&layer.down}), step_.num_tokens, inner, [&](std::int64_t t) {
      std::copy_n(memory_.inner + t * inner, inner, row_);
      gelu(row_, inner);
      return row_;
    });
    apply_linear<true>(layer.down, y, step_.hidden, m_.hidden, scratch_, rank_, size_);
    team_.barrier();
  }

  const AudioTower& m_;
  const AudioStep& step_;
  const AudioMemory& memory_;
  Arena arena_;
  SegmentScratch segment_;
};

inline std::int64_t audio_scratch_bytes(const AudioTower& m, const AudioStep& step, int threads) {
  Arena counter;
  AudioMemory(m, step, threads, counter);
  return counter.used;
}

inline void audio(const AudioTower& m, const AudioStep& step, std::uint8_t* scratch, Team& team, int rank) {
  Arena arena{scratch};
  const AudioMemory memory(m, step, team.size(), arena);
  AudioRunner(m, step, memory, team, rank).run();
}

}  // namespace flexjudge::FJ_ISA
