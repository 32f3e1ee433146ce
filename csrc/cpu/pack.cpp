// Checkpoint rows (ggml blocks, plain values) to the kernels' reading order, and single rows back. Lossless.
#include <algorithm>
#include <array>
#include <cstring>

#include "flexjudge/ggml_bits.h"
#include "flexjudge/packed.h"

namespace flexjudge {
namespace {

constexpr FormatInfo kFormats[] = {
    {"F32", Format::kF32, 32, 0, Scales::kNone, 1, 4},        {"F16", Format::kF16, 16, 0, Scales::kNone, 1, 2},
    {"BF16", Format::kBF16, 16, 0, Scales::kNone, 1, 2},      {"Q4_0", Format::kQ4_0, 4, 8, Scales::kHalf, 32, 18},
    {"Q4_1", Format::kQ4_1, 4, 0, Scales::kHalfMin, 32, 20},  {"Q5_0", Format::kQ5_0, 5, 16, Scales::kHalf, 32, 22},
    {"Q5_1", Format::kQ5_1, 5, 0, Scales::kHalfMin, 32, 24},  {"Q8_0", Format::kQ8_0, 8, 128, Scales::kHalf, 32, 34},
    {"Q4_K", Format::kQ4_K, 4, 0, Scales::kK, 256, 144},      {"Q5_K", Format::kQ5_K, 5, 0, Scales::kK, 256, 176},
    {"Q6_K", Format::kQ6_K, 6, 32, Scales::kQ6K, 256, 210},   {"I4_64", Format::kI4_64, 4, 0, Scales::kHalfMin, 64, 36},
    {"I4_128", Format::kI4_128, 4, 0, Scales::kHalfMin, 128, 68},  {"I8_32", Format::kI8_32, 8, 0, Scales::kHalfMin, 32, 36},
    {"Z4_32", Format::kZ4_32, 4, 0, Scales::kFloatZero, 32, 21},  {"Z4_64", Format::kZ4_64, 4, 0, Scales::kFloatZero, 64, 37},
    {"Z4_128", Format::kZ4_128, 4, 0, Scales::kFloatZero, 128, 69},  {"Z8_32", Format::kZ8_32, 8, 0, Scales::kFloatZero, 32, 37},
};

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

void nibbles(const std::uint8_t* p, std::uint8_t* codes) {  // 16 bytes: low nibbles, then high nibbles
  for (int i = 0; i < 16; ++i) {
    codes[i] = p[i] & 15;
    codes[16 + i] = p[i] >> 4;
  }
}

void add_fifth_bits(std::uint32_t bits, std::uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] |= static_cast<std::uint8_t>((bits >> i & 1) << 4);
}

// The 32 unsigned codes of tile `sub` of the unit at `b`. Bit layouts: ggml-common.h.
void read_codes(Format format, const std::uint8_t* b, int sub, std::uint8_t* codes) {
  switch (format) {
    case Format::kQ4_0: return nibbles(b + 2, codes);
    case Format::kQ4_1: return nibbles(b + 4, codes);
    case Format::kI4_64:
    case Format::kI4_128: return nibbles(b + 4 + 16 * sub, codes);
    case Format::kQ5_0: nibbles(b + 6, codes); return add_fifth_bits(word_at(b + 2), codes);
    case Format::kQ5_1: nibbles(b + 8, codes); return add_fifth_bits(word_at(b + 4), codes);
    case Format::kQ8_0:
      for (int i = 0; i < 32; ++i) codes[i] = static_cast<std::uint8_t>(b[2 + i] + 128);
      return;
    case Format::kI8_32: std::memcpy(codes, b + 4, 32); return;
    case Format::kZ4_32:
    case Format::kZ4_64:
    case Format::kZ4_128: return nibbles(b + 5 + 16 * sub, codes);
    case Format::kZ8_32: std::memcpy(codes, b + 5, 32); return;
    case Format::kQ4_K:
    case Format::kQ5_K: {
      const std::uint8_t* q = b + (format == Format::kQ4_K ? 16 : 48) + 32 * (sub / 2);
      const int shift = 4 * (sub & 1);
      for (int i = 0; i < 32; ++i) codes[i] = q[i] >> shift & 15;
      if (format == Format::kQ5_K) {
        for (int i = 0; i < 32; ++i) codes[i] |= static_cast<std::uint8_t>((b[16 + i] >> sub & 1) << 4);
      }
      return;
    }
    case Format::kQ6_K: {
      const int side = sub / 4, quarter = sub % 4;
      const std::uint8_t* low = b + 64 * side + 32 * (quarter & 1);
      const std::uint8_t* high = b + 128 + 32 * side;
      for (int i = 0; i < 32; ++i) {
        codes[i] = static_cast<std::uint8_t>((low[i] >> (4 * (quarter / 2)) & 15) | ((high[i] >> (2 * quarter) & 3) << 4));
      }
      return;
    }
    default: return;
  }
}

// Where a plain value lies in its row block: column after column, 16 rows each; of bfloat16 two columns side by side,
// an odd count padded with a zero.
std::int64_t value_offset(const FormatInfo& f, std::int64_t column, std::int64_t lane) {
  if (f.format != Format::kBF16) return (column * kLanes + lane) * f.unit_bytes;
  return (column / 2 * kLanes + lane) * 4 + column % 2 * 2;
}

// Codes of one row to its lane of a tile: quad q (columns 4q..4q+3) is one 32-bit word of vector q.
void write_codes(int bits, const std::uint8_t* codes, std::int64_t lane, std::uint8_t* tile) {
  auto put = [&](int vector, std::uint32_t w) { std::memcpy(tile + 64 * vector + 4 * lane, &w, 4); };
  if (bits == 8) {
    for (int q = 0; q < 8; ++q) put(q, word_at(codes + 4 * q));
    return;
  }
  for (int v = 0; v < 4; ++v) {
    put(v, (word_at(codes + 4 * v) & 0x0f0f0f0fu) | ((word_at(codes + 16 + 4 * v) & 0x0f0f0f0fu) << 4));
  }
  if (bits == 5) {
    std::uint32_t high = 0;
    for (int q = 0; q < 8; ++q) high |= (word_at(codes + 4 * q) >> 4 & 0x01010101u) << q;
    put(4, high);
  }
  if (bits == 6) {
    for (int h = 0; h < 2; ++h) {
      std::uint32_t high = 0;
      for (int q = 0; q < 4; ++q) high |= (word_at(codes + 16 * h + 4 * q) >> 4 & 0x03030303u) << (2 * q);
      put(4 + h, high);
    }
  }
}

std::uint32_t read_quad(int bits, const std::uint8_t* tile, std::int64_t lane, int q) {
  auto get = [&](int vector) { return word_at(tile + 64 * vector + 4 * lane); };
  if (bits == 8) return get(q);
  std::uint32_t codes = get(q & 3) >> (4 * (q / 4)) & 0x0f0f0f0fu;
  if (bits == 5) codes |= (get(4) >> q & 0x01010101u) << 4;
  if (bits == 6) codes |= (get(4 + q / 4) >> (2 * (q & 3)) & 0x03030303u) << 4;
  return codes;
}

// Scales of unit `u` of one row, at its lane of the row block's scale region (see `scale_unit_bytes`).
void write_scales(const FormatInfo& f, const std::uint8_t* b, std::int64_t lane, std::uint8_t* out) {
  switch (f.scales) {
    case Scales::kNone: return;
    case Scales::kHalf: std::memcpy(out + 2 * lane, b, 2); return;
    case Scales::kHalfMin:
      std::memcpy(out + 2 * lane, b, 2);
      std::memcpy(out + 32 + 2 * lane, b + 2, 2);
      return;
    case Scales::kFloatZero:
      std::memcpy(out + 4 * lane, b, 4);
      out[64 + lane] = b[4];
      return;
    case Scales::kK:
      std::memcpy(out + 2 * lane, b, 2);
      std::memcpy(out + 32 + 2 * lane, b + 2, 2);
      for (int i = 0; i < 8; ++i) {  // 8 bytes of low nibbles, then 4 that hold the upper two bits of tiles i and i + 4
        int scale, minimum;
        k_scale(b + 4, i, &scale, &minimum);
        out[64 + 16 * i + lane] = static_cast<std::uint8_t>((scale & 15) | (minimum & 15) << 4);
        std::uint8_t& high = out[192 + 16 * (i % 4) + lane];
        const int shift = 4 * (i / 4);
        high = static_cast<std::uint8_t>((high & ~(15 << shift)) | ((scale >> 4) | (minimum >> 4) << 2) << shift);
      }
      return;
    case Scales::kQ6K:
      std::memcpy(out + 2 * lane, b + 208, 2);
      for (int i = 0; i < 16; ++i) out[32 + 16 * i + lane] = b[192 + i];
      return;
  }
}

// Of the 16 columns `half` of tile `i` of a unit: value = factor * (code - zero) + offset.
void read_scale(const FormatInfo& f, const std::uint8_t* in, std::int64_t lane, int i, int half, float* factor,
                float* zero, float* offset) {
  *zero = *offset = 0;
  if (f.scales == Scales::kFloatZero) {
    *factor = float_at(in + 4 * lane);
    *zero = static_cast<float>(in[64 + lane]);
    return;
  }
  auto fp16 = [&](int at) { return half_at(in + at + 2 * lane); };
  const float d = fp16(0);
  if (f.scales == Scales::kK) {
    const int low = in[64 + 16 * i + lane], high = in[192 + 16 * (i % 4) + lane] >> (4 * (i / 4));
    *factor = d * static_cast<float>((low & 15) | (high & 3) << 4);
    *offset = -(fp16(32) * static_cast<float>((low >> 4) | (high >> 2 & 3) << 4));
  } else if (f.scales == Scales::kQ6K) {
    *factor = d * static_cast<float>(static_cast<std::int8_t>(in[32 + 16 * (2 * i + half) + lane]));
    *offset = *factor * static_cast<float>(-f.zero_point);
  } else {
    *factor = d;
    *offset = f.scales == Scales::kHalfMin ? fp16(32) : d * static_cast<float>(-f.zero_point);
  }
}

}  // namespace

const FormatInfo& format_info(Format format) { return kFormats[static_cast<int>(format)]; }

const FormatInfo* find_format(std::string_view name) {
  const auto* found = std::find_if(std::begin(kFormats), std::end(kFormats), [&](auto& f) { return f.name == name; });
  return found == std::end(kFormats) ? nullptr : found;
}

PackedLayout packed_layout(const FormatInfo& f, std::int64_t rows, std::int64_t columns) {
  const std::int64_t stored = f.format == Format::kBF16 ? round_up(columns, 2) : columns;
  const std::int64_t code_bits = stored * kLanes * f.bits;
  return {(rows + kLanes - 1) / kLanes, round_up(code_bits / 8, 64),
          round_up(columns / f.unit * scale_unit_bytes(f.scales), 64)};
}

void pack_rows(const FormatInfo& f, const std::uint8_t* source, std::int64_t rows, std::int64_t columns,
               std::int64_t begin, std::int64_t end, std::uint8_t* packed) {
  const PackedLayout layout = packed_layout(f, rows, columns);
  const std::int64_t units = columns / f.unit, row_bytes = units * f.unit_bytes;
  const std::int64_t tile_bytes = kGroup * kLanes * f.bits / 8, unit_tiles = f.unit / kGroup;
  std::memset(packed + begin * layout.block_bytes(), 0, static_cast<std::size_t>((end - begin) * layout.block_bytes()));
  for (std::int64_t block = begin; block < end; ++block) {
    std::uint8_t* codes_out = packed + block * layout.block_bytes();
    std::uint8_t* scales_out = codes_out + layout.code_bytes;
    for (std::int64_t lane = 0; lane < std::min(kLanes, rows - block * kLanes); ++lane) {
      const std::uint8_t* row = source + (block * kLanes + lane) * row_bytes;
      if (f.scales == Scales::kNone) {
        for (std::int64_t k = 0; k < columns; ++k) {
          std::memcpy(codes_out + value_offset(f, k, lane), row + k * f.unit_bytes, static_cast<std::size_t>(f.unit_bytes));
        }
        continue;
      }
      for (std::int64_t u = 0; u < units; ++u, row += f.unit_bytes) {
        for (std::int64_t i = 0; i < unit_tiles; ++i) {
          std::array<std::uint8_t, 32> codes;
          read_codes(f.format, row, static_cast<int>(i), codes.data());
          write_codes(f.bits, codes.data(), lane, codes_out + (u * unit_tiles + i) * tile_bytes);
        }
        write_scales(f, row, lane, scales_out + u * scale_unit_bytes(f.scales));
      }
    }
  }
}

void unpack_row(const FormatInfo& f, const std::uint8_t* packed, std::int64_t rows, std::int64_t columns,
                std::int64_t row, float* out) {
  const PackedLayout layout = packed_layout(f, rows, columns);
  const std::int64_t lane = row % kLanes, unit_tiles = f.unit / kGroup;
  const std::uint8_t* codes = packed + row / kLanes * layout.block_bytes();
  const std::uint8_t* scales = codes + layout.code_bytes;
  if (f.scales == Scales::kNone) {
    for (std::int64_t k = 0; k < columns; ++k) {
      const std::uint8_t* p = codes + value_offset(f, k, lane);
      if (f.format == Format::kF32) {
        out[k] = bits_to_float(word_at(p));
      } else if (f.format == Format::kF16) {
        out[k] = half_at(p);
      } else {
        out[k] = bf16_to_float(static_cast<std::uint16_t>(p[0] | p[1] << 8));
      }
    }
    return;
  }
  for (std::int64_t tile = 0; tile < columns / kGroup; ++tile, codes += kGroup * kLanes * f.bits / 8, out += kGroup) {
    for (int q = 0; q < 8; ++q) {
      float factor, zero, offset;
      read_scale(f, scales + tile / unit_tiles * scale_unit_bytes(f.scales), lane, static_cast<int>(tile % unit_tiles),
                 q / 4, &factor, &zero, &offset);
      const std::uint32_t quad = read_quad(f.bits, codes, lane, q);
      for (int i = 0; i < 4; ++i) {
        out[4 * q + i] = factor * (static_cast<float>(quad >> (8 * i) & 255) - zero) + offset;
      }
    }
  }
}

}  // namespace flexjudge
