// Expands block formats (ggml's, and our 4-bit ones of longer groups) to float32. Plain C++: no torch, no allocation.
#pragma once

#include <cstdint>
#include <string_view>

namespace flexjudge {

using DequantizeBlocks = void (*)(const std::uint8_t* blocks, std::int64_t num_blocks, float* out);

// One block format: `block_size` weights in `block_bytes` bytes, and the function that expands them.
struct BlockFormat {
  std::string_view name;
  std::int64_t block_size;
  std::int64_t block_bytes;
  DequantizeBlocks dequantize;
};

// The format called `name` ("Q4_0", "Q4_K", ...), or nullptr.
const BlockFormat* find_block_format(std::string_view name);

}  // namespace flexjudge
