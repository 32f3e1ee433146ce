// The image kernels as torch ops: every size is checked here, the work is done in csrc/cpu/image.cpp.
#include "flexjudge/image.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostPixels = int64_t{1} << 36;  // of all frames: no product of sizes below overflows
constexpr int64_t kMostThreads = 1024;

bool is_side(int64_t pixels) { return pixels >= 1 && pixels <= flexjudge::kLongestSide; }

void check_frames(const char* op, int64_t count, int64_t height, int64_t width) {
  STD_TORCH_CHECK(is_side(height) && is_side(width), op, ": height and width must be 1 to ", flexjudge::kLongestSide,
                  ", not ", height, " and ", width);
  STD_TORCH_CHECK(count <= kMostPixels / (height * width), op, ": too many frames: ", count, " of ", height,
                  " x ", width);
}

flexjudge::Frames frames_of(const char* op, const Tensor& frames, int64_t threads) {
  const bool bytes = frames.scalar_type() == ScalarType::Byte && frames.is_contiguous();
  STD_TORCH_CHECK(bytes && frames.dim() == 4 && frames.size(3) == 3, op,
                  ": frames must be contiguous uint8 [num_frames, height, width, 3]");
  check_frames(op, frames.size(0), frames.size(1), frames.size(2));
  STD_TORCH_CHECK(threads >= 1 && threads <= kMostThreads, op, ": threads must be 1 to ", kMostThreads, ", not ", threads);
  return {static_cast<const uint8_t*>(frames.const_data_ptr()), frames.size(0), frames.size(1), frames.size(2)};
}

// frames: uint8 [num_frames, *, *, 3]. Returns uint8 [num_frames, height, width, 3].
Tensor resize_bicubic(const Tensor& frames, int64_t height, int64_t width, int64_t threads) {
  const flexjudge::Frames from = frames_of("resize_bicubic", frames, threads);
  check_frames("resize_bicubic", from.count, height, width);
  const std::array<int64_t, 4> shape{from.count, height, width, 3};
  Tensor out = torch::stable::new_empty(frames, {shape.data(), shape.size()}, ScalarType::Byte);
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  flexjudge::resize_bicubic(from, height, width, static_cast<int>(threads), to);
  return out;
}

// table: float32 [3, 256]. Returns float32 [num_patches, 3 * temporal * patch * patch].
Tensor patchify(const Tensor& frames, const Tensor& table, int64_t patch, int64_t merge, int64_t temporal, int64_t threads) {
  const flexjudge::Frames from = frames_of("patchify", frames, threads);
  const bool is_table = table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.is_contiguous();
  STD_TORCH_CHECK(is_table && table.size(0) == 3 && table.size(1) == 256,
                  "patchify: table must be contiguous float32 [3, 256]");
  for (const int64_t size : {patch, merge, temporal}) {
    STD_TORCH_CHECK(size >= 1 && size <= 256, "patchify: patch, merge and temporal sizes must be 1 to 256, not ", size);
  }
  STD_TORCH_CHECK(from.height % (patch * merge) == 0 && from.width % (patch * merge) == 0,
                  "patchify: height and width must be multiples of ", patch * merge, ", not ", from.height, " and ", from.width);
  STD_TORCH_CHECK(from.count >= 1, "patchify: there must be a frame");
  const int64_t times = (from.count + temporal - 1) / temporal;
  const std::array<int64_t, 2> shape{times * (from.height / patch) * (from.width / patch), 3 * temporal * patch * patch};
  Tensor out = torch::stable::new_empty(frames, {shape.data(), shape.size()}, ScalarType::Float);
  const auto* values = static_cast<const float*>(table.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  flexjudge::patchify(from, values, {patch, merge, temporal}, static_cast<int>(threads), to);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flexjudge, m) {
  m.def("resize_bicubic(Tensor frames, int height, int width, int threads) -> Tensor");
  m.def("patchify(Tensor frames, Tensor table, int patch, int merge, int temporal, int threads) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(flexjudge, CPU, m) {
  m.impl("resize_bicubic", TORCH_BOX(&resize_bicubic));
  m.impl("patchify", TORCH_BOX(&patchify));
}
