// Quantises float32 weights to block formats. Plain C++: no torch, no allocation.
#pragma once

#include <cstdint>
#include <string_view>

namespace flexjudge {

using QuantizeBlocks = void (*)(const float* values, std::int64_t num_blocks, std::uint8_t* blocks);

// What writes blocks of the format called `name` ("I8_32", "Q4_1", "I4_64" or "I4_128"), or nullptr.
QuantizeBlocks find_quantizer(std::string_view name);

}  // namespace flexjudge
