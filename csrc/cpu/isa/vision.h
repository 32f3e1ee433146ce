// A vision tower over the patches of some images, on all threads at once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block.h"
#include "segment_attention.h"

namespace flexjudge::FJ_ISA {

inline BlockShape block_shape(const VisionTower& m) { return {m.hidden, m.intermediate, m.eps, kPlainTerms}; }

// What a tower keeps beside its blocks' memory.
struct VisionMemory : BlockMemory {
  float *qkv, *attended, *merged;
  std::uint8_t* segments;
  std::int64_t segment_bytes;

  static std::int64_t width(const VisionTower& m) { return std::max({m.hidden * m.merge, m.patch_embed.columns(), m.merge_out.columns()}); }
  static std::int64_t panel(const VisionTower& m) {
    return widest_panel(m.layers, std::max({panel_bytes(m.patch_embed), panel_bytes(m.merge_in), panel_bytes(m.merge_out)}));
  }

  VisionMemory(const VisionTower& m, std::int64_t num_patches, std::int64_t longest_segment, int num_threads, Arena& arena)
      : BlockMemory(block_shape(m), width(m), panel(m), num_patches, num_threads, arena),
        qkv(arena.take<float>(num_patches * 3 * m.hidden)),
        attended(arena.take<float>(num_patches * m.hidden)),
        merged(arena.take<float>(num_patches / m.merge * m.merge_in.rows())),
        segment_bytes(segment_scratch_bytes(longest_segment, m.head_dim())) {
    segments = arena.take<std::uint8_t>(num_threads * segment_bytes);
  }
};

// One thread's view of a pass.
class VisionRunner : BlockRunner {
 public:
  VisionRunner(const VisionTower& model, const VisionStep& step, const VisionMemory& memory, std::int64_t longest_segment, Team& team, int rank)
      : BlockRunner(block_shape(model), memory, step.num_patches, team, rank), m_(model), step_(step), memory_(memory),
        arena_{memory.segments + rank * memory.segment_bytes}, segment_(arena_, longest_segment, padded(model.head_dim())) {}

  void run() {
    embed();
    for (std::size_t i = 0; i < m_.layers.size(); ++i) {
      attention_block(m_.layers[i], m_.is_full[i] ? step_.frames : step_.windows);
      mlp_block(m_.layers[i], i + 1 < m_.layers.size() ? m_.layers[i + 1].qkv : m_.merge_in);
    }
    merge();
  }

 private:
  void embed() {
    const std::int64_t columns = m_.patch_embed.columns();
    const Activations x = prepare(Forms({&m_.patch_embed}), step_.num_patches, columns, [&](std::int64_t t) { return step_.patches + t * columns; });
    apply_linear<false>(m_.patch_embed, x, memory_.hidden, m_.hidden, scratch_, rank_, size_);
    team_.barrier();
  }

  void attention_block(const Layer& layer, const Segments& segments) {
    const Activations x = norm(layer.input_norm, Forms({&layer.qkv}), step_.num_patches, nullptr);
    apply_linear<false>(layer.qkv, x, memory_.qkv, 3 * m_.hidden, scratch_, rank_, size_);
    team_.barrier();
    rotate_all();
    team_.barrier();
    segment_attention({m_.num_heads, m_.head_dim(), memory_.qkv, memory_.attended}, segments, segment_, rank_, size_);
    team_.barrier();
    const Activations y = prepare(Forms({&layer.out}), step_.num_patches, m_.hidden, [&](std::int64_t t) { return memory_.attended + t * m_.hidden; });
    apply_linear<true>(layer.out, y, memory_.hidden, m_.hidden, scratch_, rank_, size_);
    team_.barrier();
  }

  // Queries and keys by the height and width of their patch.
  void rotate_all() {
    const std::int64_t half = m_.head_dim() / 2;
    const Share share(step_.num_patches, rank_, size_);
    for (std::int64_t t = share.begin; t < share.end; ++t) {
      float* heads = memory_.qkv + t * 3 * m_.hidden;
      for (std::int64_t h = 0; h < 2 * m_.num_heads; ++h) rotate(heads + h * m_.head_dim(), step_.cos + t * half, step_.sin + t * half, half);
    }
  }

  // Norm, then two layers with GELU over `merge` patches at once.
  void merge() {
    const std::int64_t rows = step_.num_patches / m_.merge, columns = m_.merge_in.columns(), inner = m_.merge_in.rows();
    const Activations x = prepare(Forms({&m_.merge_in}), rows, columns, [&](std::int64_t t) {
      for (std::int64_t i = 0; i < m_.merge; ++i) {
        rms_norm(memory_.hidden + (t * m_.merge + i) * m_.hidden, m_.merge_norm, m_.eps, m_.hidden, row_ + i * m_.hidden);
      }
      return row_;
    });
    apply_linear<false>(m_.merge_in, x, memory_.merged, inner, scratch_, rank_, size_);
    team_.barrier();
    const Share share(rows, rank_, size_);
    for (std::int64_t t = share.begin; t < share.end; ++t) gelu(memory_.merged + t * inner, inner);
    team_.barrier();
    const Activations y = prepare(Forms({&m_.merge_out}), rows, inner, [&](std::int64_t t) { return memory_.merged + t * inner; });
    apply_linear<false>(m_.merge_out, y, step_.out, m_.merge_out.rows(), scratch_, rank_, size_);
  }

  const VisionTower& m_;
  const VisionStep& step_;
  const VisionMemory& memory_;
  Arena arena_;
  SegmentScratch segment_;
};

inline std::int64_t longest_segment(const VisionStep& step) { return std::max(longest(step.windows), longest(step.frames)); }

inline std::int64_t vision_scratch_bytes(const VisionTower& m, const VisionStep& step, int threads) {
  Arena counter;
  VisionMemory(m, step.num_patches, longest_segment(step), threads, counter);
  return counter.used;
}

inline void vision(const VisionTower& m, const VisionStep& step, std::uint8_t* scratch, Team& team, int rank) {
  Arena arena{scratch};
  const std::int64_t longest = longest_segment(step);
  const VisionMemory memory(m, step.num_patches, longest, team.size(), arena);
  VisionRunner(m, step, memory, longest, team, rank).run();
}

}  // namespace flexjudge::FJ_ISA
