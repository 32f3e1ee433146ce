// Matrices in the kernels' reading order: 16 output rows side by side, their codes first, then their scales.
#pragma once

#include <cstdint>
#include <string_view>

namespace flexjudge {

constexpr std::int64_t kLanes = 16;      // output rows of a row block: one vector lane each
constexpr std::int64_t kGroup = 32;      // columns of a tile; every quantised format has a scale per tile (or finer)

enum class Format : std::int64_t {
  kF32, kF16, kBF16, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K, kI4_64, kI4_128, kI8_32,
  kZ4_32, kZ4_64, kZ4_128, kZ8_32
};

// How a format's scales are stored.
enum class Scales { kNone, kHalf, kHalfMin, kFloatZero, kK, kQ6K };

// Bytes of the scales of 16 rows and one unit of columns: 16-bit factors (and minimums), then what a K format adds; or
// float32 factors, then zero points of a byte.
constexpr std::int64_t scale_unit_bytes(Scales scales) {
  switch (scales) {
    case Scales::kHalf: return 32;
    case Scales::kHalfMin: return 64;
    case Scales::kFloatZero: return 80;
    case Scales::kK: return 256;
    case Scales::kQ6K: return 288;
    default: return 0;
  }
}

struct FormatInfo {
  std::string_view name;
  Format format;
  int bits;        // of a code; of a value where there are no scales
  int zero_point;  // subtracted from a code where the format stores neither a minimum nor a zero point
  Scales scales;
  int unit;        // columns must be a multiple of this
  int unit_bytes;  // of `unit` columns as stored in a checkpoint
};

const FormatInfo& format_info(Format format);
const FormatInfo* find_format(std::string_view name);

// A row block holds `code_bytes` of codes or plain values, then `scale_bytes` of scales, both multiples of 64.
struct PackedLayout {
  std::int64_t row_blocks, code_bytes, scale_bytes;
  std::int64_t block_bytes() const { return code_bytes + scale_bytes; }
  std::int64_t bytes() const { return row_blocks * block_bytes(); }
};

PackedLayout packed_layout(const FormatInfo& format, std::int64_t rows, std::int64_t columns);

// source: `rows` rows of whole units as a checkpoint stores them (ggml blocks, or plain values). Packs the row
// blocks [begin, end); rows past the last one are zero.
void pack_rows(const FormatInfo& format, const std::uint8_t* source, std::int64_t rows, std::int64_t columns,
               std::int64_t begin, std::int64_t end, std::uint8_t* packed);

// One row of the matrix as float32 [columns], exactly what the stored blocks say.
void unpack_row(const FormatInfo& format, const std::uint8_t* packed, std::int64_t rows, std::int64_t columns,
                std::int64_t row, float* out);

}  // namespace flexjudge
