// A vision tower and one pass over some images' patches, as plain pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "flexjudge/decoder.h"

namespace flexjudge {

// Patches to embeddings: blocks with attention inside windows or whole frames, then a merger that makes one embedding
// of `merge` neighbouring patches (Bai et al. 2025, section 2.1).
struct VisionTower {
  std::int64_t hidden, intermediate, num_heads, merge;
  float eps;
  Linear patch_embed;
  std::vector<Layer> layers;
  std::vector<bool> is_full;  // whether a layer's attention spans whole frames
  const float* merge_norm;    // [hidden]
  Linear merge_in, merge_out;

  std::int64_t head_dim() const { return hidden / num_heads; }
};

// Runs of patches that attend to each other: offsets [count + 1].
struct Segments {
  std::int64_t count;
  const std::int64_t* start;
};

struct VisionStep {
  std::int64_t num_patches;
  const float* patches;     // [num_patches, columns of patch_embed], those of a window side by side
  const float *cos, *sin;   // [num_patches, head_dim / 2]
  Segments windows, frames;
  float* out;               // [num_patches / merge, rows of merge_out]
};

}  // namespace flexjudge
