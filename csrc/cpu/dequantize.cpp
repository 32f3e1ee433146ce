// Block formats of ggml (ggml-common.h) and our own, expanded with the same operations in the same order as the torch
// reference, so that the results are equal bit for bit (compiled with -ffp-contract=off).
#include "flexjudge/dequantize.h"

#include "flexjudge/clones.h"
#include "flexjudge/ggml_bits.h"

namespace flexjudge {
namespace {

FLEXJUDGE_CLONES void q4_0(const std::uint8_t* b, std::int64_t n, float* out) {
  for (; n-- > 0; b += 18, out += 32) {
    const float d = half_at(b);
    for (int i = 0; i < 16; ++i) {
      out[i] = d * static_cast<float>((b[2 + i] & 15) - 8);
      out[16 + i] = d * static_cast<float>((b[2 + i] >> 4) - 8);
    }
  }
}

// Q4_1, and our blocks whose scale and minimum serve several runs of 32 weights.
FLEXJUDGE_CLONES void affine_4(const std::uint8_t* b, std::int64_t n, int tiles, float* out) {
  for (; n-- > 0; b += 4 + 16 * tiles) {
    const float d = half_at(b), m = half_at(b + 2);
    for (int tile = 0; tile < tiles; ++tile, out += 32) {
      const std::uint8_t* codes = b + 4 + 16 * tile;
      for (int i = 0; i < 16; ++i) {
        out[i] = d * static_cast<float>(codes[i] & 15) + m;
        out[16 + i] = d * static_cast<float>(codes[i] >> 4) + m;
      }
    }
  }
}

FLEXJUDGE_CLONES void i8_32(const std::uint8_t* b, std::int64_t n, float* out) {
  for (; n-- > 0; b += 36, out += 32) {
    const float d = half_at(b), m = half_at(b + 2);
    for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(b[4 + i]) + m;
  }
}

// Blocks with a float32 scale and a zero point of a byte.
FLEXJUDGE_CLONES void zero_4(const std::uint8_t* b, std::int64_t n, int tiles, float* out) {
  for (; n-- > 0; b += 5 + 16 * tiles) {
    const float d = float_at(b);
    const int zero = b[4];
    for (int tile = 0; tile < tiles; ++tile, out += 32) {
      const std::uint8_t* codes = b + 5 + 16 * tile;
      for (int i = 0; i < 16; ++i) {
        out[i] = d * static_cast<float>((codes[i] & 15) - zero);
        out[16 + i] = d * static_cast<float>((codes[i] >> 4) - zero);
      }
    }
  }
}

FLEXJUDGE_CLONES void z8_32(const std::uint8_t* b, std::int64_t n, float* out) {
  for (; n-- > 0; b += 37, out += 32) {
    const float d = float_at(b);
    const int zero = b[4];
    for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(b[5 + i] - zero);
  }
}

void q4_1(const std::uint8_t* b, std::int64_t n, float* out) { affine_4(b, n, 1, out); }
void i4_64(const std::uint8_t* b, std::int64_t n, float* out) { affine_4(b, n, 2, out); }
void i4_128(const std::uint8_t* b, std::int64_t n, float* out) { affine_4(b, n, 4, out); }
void z4_32(const std::uint8_t* b, std::int64_t n, float* out) { zero_4(b, n, 1, out); }
void z4_64(const std::uint8_t* b, std::int64_t n, float* out) { zero_4(b, n, 2, out); }
void z4_128(const std::uint8_t* b, std::int64_t n, float* out) { zero_4(b, n, 4, out); }

FLEXJUDGE_CLONES void q5_0(const std::uint8_t* b, std::int64_t n, float* out) {
  for (; n-- > 0; b += 22, out += 32) {
    const float d = half_at(b);
    const std::uint32_t high = word_at(b + 2);
    for (int i = 0; i < 16; ++i) {
      out[i] = d * static_cast<float>(static_cast<int>((b[6 + i] & 15) | ((high >> i & 1) << 4)) - 16);
      out[16 + i] = d * static_cast<float>(static_cast<int>((b[6 + i] >> 4) | ((high >> (16 + i) & 1) << 4)) - 16);
    }
  }
}

FLEXJUDGE_CLONES void q5_1(const std::uint8_t* b, std::int64_t n, float* out) {
  for (; n-- > 0; b += 24, out += 32) {
    const float d = half_at(b), m = half_at(b + 2);
    const std::uint32_t high = word_at(b + 4);
    for (int i = 0; i < 16; ++i) {
      out[i] = d * static_cast<float>(static_cast<int>((b[8 + i] & 15) | ((high >> i & 1) << 4))) + m;
      out[16 + i] = d * static_cast<float>(static_cast<int>((b[8 + i] >> 4) | ((high >> (16 + i) & 1) << 4))) + m;
    }
  }
}

FLEXJUDGE_CLONES void q8_0(const std::uint8_t* b, std::int64_t n, float* out) {
  for (; n-- > 0; b += 34, out += 32) {
    const float d = half_at(b);
    for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(static_cast<std::int8_t>(b[2 + i]));
  }
}

FLEXJUDGE_CLONES void q4_k(const std::uint8_t* b, std::int64_t n, float* out) {
  for (; n-- > 0; b += 144, out += 256) {
    const float d = half_at(b), dmin = half_at(b + 2);
    for (int sub = 0; sub < 8; ++sub) {
      int scale, minimum;
      k_scale(b + 4, sub, &scale, &minimum);
      const float ds = d * static_cast<float>(scale), dm = dmin * static_cast<float>(minimum);
      const std::uint8_t* q = b + 16 + 32 * (sub / 2);
      const int shift = 4 * (sub & 1);
      float* o = out + 32 * sub;
      for (int i = 0; i < 32; ++i) o[i] = ds * static_cast<float>(q[i] >> shift & 15) - dm;
    }
  }
}

FLEXJUDGE_CLONES void q5_k(const std::uint8_t* b, std::int64_t n, float* out) {
  for (; n-- > 0; b += 176, out += 256) {
    const float d = half_at(b), dmin = half_at(b + 2);
    const std::uint8_t* high = b + 16;
    for (int sub = 0; sub < 8; ++sub) {
      int scale, minimum;
      k_scale(b + 4, sub, &scale, &minimum);
      const float ds = d * static_cast<float>(scale), dm = dmin * static_cast<float>(minimum);
      const std::uint8_t* q = b + 48 + 32 * (sub / 2);
      const int shift = 4 * (sub & 1);
      float* o = out + 32 * sub;
      for (int i = 0; i < 32; ++i) {
        o[i] = ds * static_cast<float>((q[i] >> shift & 15) | ((high[i] >> sub & 1) << 4)) - dm;
      }
    }
  }
}

FLEXJUDGE_CLONES void q6_k(const std::uint8_t* b, std::int64_t n, float* out) {
  for (; n-- > 0; b += 210, out += 256) {
    const float d = half_at(b + 208);
    for (int part = 0; part < 8; ++part) {  // runs of 32 weights: two halves of four
      const int side = part / 4, quarter = part % 4;
      const std::uint8_t* low = b + 64 * side + 32 * (quarter & 1);
      const std::uint8_t* high = b + 128 + 32 * side;
      const int low_shift = 4 * (quarter / 2), high_shift = 2 * quarter;
      float* o = out + 32 * part;
      for (int half_run = 0; half_run < 2; ++half_run) {
        const float ds = d * static_cast<float>(static_cast<std::int8_t>(b[192 + 2 * part + half_run]));
        for (int i = 16 * half_run; i < 16 * half_run + 16; ++i) {
          const int q = (low[i] >> low_shift & 15) | ((high[i] >> high_shift & 3) << 4);
          o[i] = ds * static_cast<float>(q - 32);
        }
      }
    }
  }
}

const BlockFormat kFormats[] = {
    {"Q4_0", 32, 18, q4_0},    {"Q4_1", 32, 20, q4_1},    {"Q5_0", 32, 22, q5_0},    {"Q5_1", 32, 24, q5_1},
    {"Q8_0", 32, 34, q8_0},    {"Q4_K", 256, 144, q4_k}, {"Q5_K", 256, 176, q5_k}, {"Q6_K", 256, 210, q6_k},
    {"I4_64", 64, 36, i4_64},  {"I4_128", 128, 68, i4_128},  {"I8_32", 32, 36, i8_32},
    {"Z4_32", 32, 21, z4_32},  {"Z4_64", 64, 37, z4_64},   {"Z4_128", 128, 69, z4_128}, {"Z8_32", 32, 37, z8_32},
};

}  // namespace

const BlockFormat* find_block_format(std::string_view name) {
  for (const BlockFormat& format : kFormats) {
    if (format.name == name) return &format;
  }
  return nullptr;
}

}  // namespace flexjudge
