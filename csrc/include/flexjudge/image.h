// Resizes frames as Pillow does, and cuts them into the patches of a vision encoder. Plain C++: no torch.
#pragma once

#include <cstdint>

namespace flexjudge {

constexpr std::int64_t kLongestSide = 1 << 17;  // pixels; keeps every offset and table of weights small

// uint8 [count, height, width, 3].
struct Frames {
  const std::uint8_t* pixels;
  std::int64_t count, height, width;
};

// Writes uint8 [count, height, width, 3] to `to`: the bytes of Pillow's bicubic resize of RGB images. Bits do not
// depend on `threads`.
void resize_bicubic(const Frames& from, std::int64_t height, std::int64_t width, int threads, std::uint8_t* to);

// A patch is `patch` pixels high and wide and `temporal` frames long; `merge` x `merge` patches follow one another.
struct PatchShape {
  std::int64_t patch, merge, temporal;
};

// Writes float32 [patches, 3 * temporal * patch * patch] to `to`: rows (time, block row, block column, row, column),
// columns (channel, time, row, column). A byte b of channel c becomes table[256 * c + b]; the last frame is repeated
// up to a multiple of `temporal`. Height and width are multiples of patch * merge, and there is a frame.
void patchify(const Frames& from, const float* table, const PatchShape& shape, int threads, float* to);

}  // namespace flexjudge
