// What the bindings share: checks, tensors, the kernels to call, and models laid out as numbers by Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <string>

#include "flexjudge/vision.h"

namespace flexjudge::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Read at every call, so that a test can go through all instruction sets in one process.
inline const Kernels& kernels() {
  const char* wanted = std::getenv("FLEXJUDGE_ISA");
  const Kernels* found = find_kernels(wanted);
  STD_TORCH_CHECK(found != nullptr, "FLEXJUDGE_ISA=", wanted == nullptr ? "" : wanted,
                  ": not one of scalar, avx2, avx512_vnni, avx512_bf16, or this processor lacks it");
  return *found;
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline void check(bool good, const char* what) { STD_TORCH_CHECK(good, what); }

template <std::size_t N>
Tensor new_tensor(const Tensor& like, const std::array<int64_t, N>& shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

// A buffer for `bytes` bytes and the first 64-byte boundary in it.
struct Scratch {
  Tensor memory;
  uint8_t* begin;
  Scratch(const Tensor& like, int64_t bytes)
      : memory(new_tensor<1>(like, {bytes + 64}, ScalarType::Byte)),
        begin(reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + 63) / 64 * 64)) {}
};

inline const FormatInfo& format_of(const std::string& name) {
  const FormatInfo* found = find_format(name);
  STD_TORCH_CHECK(found != nullptr, "unknown weight format ", name);
  return *found;
}

inline Matrix matrix(const uint8_t* packed, const FormatInfo& format, int64_t rows, int64_t columns) {
  return {packed, &format, rows, columns, packed_layout(format, rows, columns)};
}

inline const int64_t* int64s(const Tensor& t) {
  check(t.scalar_type() == ScalarType::Long && t.is_contiguous(), "indices must be contiguous int64");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// Reads a model from the numbers that `ops/plan.py` lays out in the same order.
class PlanReader {
 public:
  explicit PlanReader(const Tensor& plan) : at_(int64s(plan)), end_(at_ + plan.numel()) {}

  int64_t next() {
    check(at_ < end_, "a model's plan is too short");
    return *at_++;
  }
  int integer() { return static_cast<int>(next()); }
  float real() {  // the bits of a double
    const int64_t bits = next();
    double value;
    std::memcpy(&value, &bits, 8);
    return static_cast<float>(value);
  }
  const float* floats() { return reinterpret_cast<const float*>(next()); }
  Linear linear() {
    Linear w;
    w.parts.resize(static_cast<std::size_t>(next()));
    w.bias = floats();
    for (Matrix& part : w.parts) part = matrix();
    return w;
  }
  Layer layer() {
    Layer layer;
    layer.input_norm = floats();
    layer.qkv = linear();
    layer.out = linear();
    layer.post_norm = floats();
    layer.gate = linear();
    layer.up = linear();
    layer.down = linear();
    return layer;
  }
  Matrix matrix() {
    const auto* packed = reinterpret_cast<const uint8_t*>(next());
    const auto& format = format_info(static_cast<Format>(next()));
    const int64_t rows = next(), columns = next();
    return bindings::matrix(packed, format, rows, columns);
  }
  void finish() const { check(at_ == end_, "a model's plan is too long"); }

 private:
  const int64_t* at_;
  const int64_t* end_;
};

// Offsets that cut `count` tokens into runs.
inline Segments segments(const Tensor& start, int64_t count) {
  const Segments s{start.numel() - 1, int64s(start)};
  check(s.count >= 1 && s.start[0] == 0 && s.start[s.count] == count, "the segments do not hold all tokens");
  for (int64_t i = 0; i < s.count; ++i) check(s.start[i] < s.start[i + 1], "a segment is empty");
  return s;
}

}  // namespace flexjudge::bindings
