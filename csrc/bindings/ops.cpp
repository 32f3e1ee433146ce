// torch.ops.flexjudge.*: the ops as torch sees them, through PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <string>

#include "flexjudge/dequantize.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// blocks: uint8 [rows, bytes_per_row], contiguous. Returns float32 [rows, columns].
Tensor dequantize(const Tensor& blocks, const std::string& format_name) {
  const flexjudge::BlockFormat* format = flexjudge::find_block_format(format_name);
  STD_TORCH_CHECK(format != nullptr, "dequantize: unknown format ", format_name);
  STD_TORCH_CHECK(blocks.scalar_type() == ScalarType::Byte && blocks.dim() == 2 && blocks.is_contiguous(),
                  "dequantize: blocks must be contiguous uint8 [rows, bytes_per_row]");
  const int64_t rows = blocks.size(0), row_bytes = blocks.size(1);
  STD_TORCH_CHECK(row_bytes % format->block_bytes == 0, "dequantize: rows must hold whole ", format_name,
                  " blocks of ", format->block_bytes, " bytes, not ", row_bytes, " bytes");
  const int64_t row_blocks = row_bytes / format->block_bytes, columns = row_blocks * format->block_size;
  const std::array<int64_t, 2> shape{rows, columns};
  Tensor out = torch::stable::new_empty(blocks, {shape.data(), shape.size()}, ScalarType::Float);
  const auto* in = static_cast<const uint8_t*>(blocks.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t grain = columns > 0 ? (1 << 15) / columns + 1 : 1;  // rows: enough work to pay for a thread
  torch::stable::parallel_for(0, rows, grain, [=](int64_t begin, int64_t end) {
    format->dequantize(in + begin * row_bytes, (end - begin) * row_blocks, to + begin * columns);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(flexjudge, m) { m.def("dequantize(Tensor blocks, str format_name) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(flexjudge, CPU, m) { m.impl("dequantize", TORCH_BOX(&dequantize)); }
