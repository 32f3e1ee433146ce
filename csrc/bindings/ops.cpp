// torch.ops.flexjudge.*: the ops as torch sees them, through PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <string>

#include "flexjudge/dequantize.h"
#include "flexjudge/quantize.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of `columns` weights that are enough work to pay for a thread.
int64_t grain(int64_t columns, int64_t weights) { return columns > 0 ? weights / columns + 1 : 1; }

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
  torch::stable::parallel_for(0, rows, grain(columns, 1 << 15), [=](int64_t begin, int64_t end) {
    format->dequantize(in + begin * row_bytes, (end - begin) * row_blocks, to + begin * columns);
  });
  return out;
}

// weight: float32 [rows, columns], contiguous. Returns uint8 [rows, bytes_per_row].
Tensor quantize(const Tensor& weight, const std::string& format_name) {
  const flexjudge::QuantizeBlocks write = flexjudge::find_quantizer(format_name);
  STD_TORCH_CHECK(write != nullptr, "quantize: nothing writes ", format_name);
  const flexjudge::BlockFormat& format = *flexjudge::find_block_format(format_name);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.dim() == 2 && weight.is_contiguous(),
                  "quantize: weight must be contiguous float32 [rows, columns]");
  const int64_t rows = weight.size(0), columns = weight.size(1), row_blocks = columns / format.block_size;
  STD_TORCH_CHECK(columns % format.block_size == 0, "quantize: ", format_name, " needs a multiple of ",
                  format.block_size, " columns, not ", columns);
  const std::array<int64_t, 2> shape{rows, row_blocks * format.block_bytes};
  Tensor out = torch::stable::new_empty(weight, {shape.data(), shape.size()}, ScalarType::Byte);
  const auto* in = static_cast<const float*>(weight.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, grain(columns, 1 << 12), [=](int64_t begin, int64_t end) {
    write(in + begin * columns, (end - begin) * row_blocks, to + begin * row_blocks * format.block_bytes);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(flexjudge, m) {
  m.def("dequantize(Tensor blocks, str format_name) -> Tensor");
  m.def("quantize(Tensor weight, str format_name) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(flexjudge, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("quantize", TORCH_BOX(&quantize));
}
