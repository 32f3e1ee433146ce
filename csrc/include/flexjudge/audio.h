// An audio tower's transformer layers and one pass over some recordings, as plain pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "flexjudge/vision.h"

namespace flexjudge {

// Weight and bias of a layer norm, [hidden] each.
struct LayerNorm {
  const float *weight, *bias;
};

// Whisper's layer (Radford et al. 2022): attention, then two layers with GELU, behind norms.
struct AudioLayer {
  LayerNorm input_norm;
  Linear qkv, out;
  LayerNorm post_norm;
  Linear up, down;
};

struct AudioTower {
  std::int64_t hidden, num_heads;
  float eps;
  std::vector<AudioLayer> layers;

  std::int64_t head_dim() const { return hidden / num_heads; }
  std::int64_t inner() const { return layers.front().up.rows(); }
};

struct AudioStep {
  std::int64_t num_tokens;
  Segments windows;  // tokens that attend to each other
  float* hidden;     // [num_tokens, hidden], changed in place
};

}  // namespace flexjudge
