// Weights to blocks of 8 or 4 bits with the scale and offset of least squared error.
#include "flexjudge/quantize.h"

#include <cstring>

#include "flexjudge/clones.h"
#include "flexjudge/half.h"

namespace flexjudge {
namespace {

constexpr int kLongest = 128;   // weights of the longest block
constexpr int kLanes = 16;      // sums run side by side, so that vectors can take them: a fixed order, any processor
constexpr int kRanges = 8;      // ranges tried for a block: all of it, and shorter ones by kStep each
constexpr float kStep = 0.04f;

#define FLEXJUDGE_INLINE inline __attribute__((always_inline))

// To the nearest integer, ties to even, of a magnitude below 2^22.
FLEXJUDGE_INLINE float rounded(float value) { return (value + 12582912.0f) - 12582912.0f; }

FLEXJUDGE_INLINE float clamped(float value, float low, float high) {  // a NaN becomes `low`
  value = value > low ? value : low;
  return value < high ? value : high;
}

FLEXJUDGE_INLINE float as_half(float value) { return half_to_float(float_to_half(value)); }

FLEXJUDGE_INLINE void put_half(float value, std::uint8_t* to) {
  const std::uint16_t bits = float_to_half(value);
  std::memcpy(to, &bits, 2);
}

FLEXJUDGE_INLINE float total(float* lanes) {
  for (int j = 0; j < 8; ++j) lanes[j] += lanes[j + 8];
  for (int j = 0; j < 4; ++j) lanes[j] += lanes[j + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

struct Range {
  float low, high;
};

FLEXJUDGE_INLINE Range range_of(const float* x, int n) {
  float low[kLanes], high[kLanes];
  for (int j = 0; j < kLanes; ++j) low[j] = high[j] = x[j];
  for (int i = kLanes; i < n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      low[j] = x[i + j] < low[j] ? x[i + j] : low[j];
      high[j] = x[i + j] > high[j] ? x[i + j] : high[j];
    }
  }
  Range range{low[0], high[0]};
  for (int j = 1; j < kLanes; ++j) {
    range.low = low[j] < range.low ? low[j] : range.low;
    range.high = high[j] > range.high ? high[j] : range.high;
  }
  return range;
}

// A block's value is scale * code + offset, code 0 to `largest`.
struct Affine {
  float scale, offset;
};

FLEXJUDGE_INLINE void pick_codes(const float* x, int n, float largest, Affine a, float* codes) {
  const float inverse = a.scale > 0 ? 1.0f / a.scale : 0.0f;
  for (int i = 0; i < n; ++i) codes[i] = rounded(clamped((x[i] - a.offset) * inverse, 0.0f, largest));
}

// Scale and offset of least squared error for given codes; sums are of x - low, which loses fewer digits.
FLEXJUDGE_INLINE Affine fit(const float* x, const float* codes, int n, float low) {
  float c[kLanes] = {}, cc[kLanes] = {}, y[kLanes] = {}, cy[kLanes] = {};
  for (int i = 0; i < n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float code = codes[i + j], value = x[i + j] - low;
      c[j] += code;
      cc[j] += code * code;
      y[j] += value;
      cy[j] += code * value;
    }
  }
  const float count = static_cast<float>(n), sum_c = total(c), sum_y = total(y);
  const float spread = count * total(cc) - sum_c * sum_c;
  if (!(spread > 0)) return {0.0f, low + sum_y / count};
  const float scale = (count * total(cy) - sum_c * sum_y) / spread;
  return {scale, low + (sum_y - scale * sum_c) / count};
}

FLEXJUDGE_INLINE float squared_error(const float* x, const float* codes, int n, Affine a) {
  float sums[kLanes] = {};
  for (int i = 0; i < n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float error = x[i + j] - (a.scale * codes[i + j] + a.offset);
      sums[j] += error * error;
    }
  }
  return total(sums);
}

// Codes of 8 bits one after the other; of 4 bits the first and second 16 of each 32 share bytes.
FLEXJUDGE_INLINE void put_codes(const float* codes, int n, int bits, std::uint8_t* out) {
  if (bits == 8) {
    for (int i = 0; i < n; ++i) out[i] = static_cast<std::uint8_t>(codes[i]);
    return;
  }
  for (int tile = 0; tile < n; tile += 32) {
    for (int j = 0; j < 16; ++j) {
      const int low = static_cast<int>(codes[tile + j]), high = static_cast<int>(codes[tile + 16 + j]);
      out[tile / 2 + j] = static_cast<std::uint8_t>(low | high << 4);
    }
  }
}

FLEXJUDGE_CLONES void affine(const float* x, std::int64_t num_blocks, int n, int bits, std::uint8_t* out) {
  const float largest = bits == 8 ? 255.0f : 15.0f;
  const int ranges = bits == 8 ? 1 : kRanges;
  float codes[kLongest], best_codes[kLongest];
  for (; num_blocks-- > 0; x += n, out += 4 + n * bits / 8) {
    const Range range = range_of(x, n);
    const float middle = 0.5f * (range.low + range.high), half_width = 0.5f * (range.high - range.low);
    float least = -1;
    Affine best{};
    for (int i = 0; i < ranges; ++i) {
      const float width = half_width * (1.0f - kStep * static_cast<float>(i));
      pick_codes(x, n, largest, {2.0f * width / largest, middle - width}, codes);
      const Affine fitted = fit(x, codes, n, range.low);
      const Affine stored{as_half(fitted.scale), as_half(fitted.offset)};
      pick_codes(x, n, largest, stored, codes);
      const float error = squared_error(x, codes, n, stored);
      if (least < 0 || error < least) {
        least = error;
        best = stored;
        std::memcpy(best_codes, codes, sizeof codes);
      }
    }
    put_half(best.scale, out);
    put_half(best.offset, out + 2);
    put_codes(best_codes, n, bits, out + 4);
  }
}

template <int kSize, int kBits>
void blocks_of(const float* x, std::int64_t n, std::uint8_t* out) { affine(x, n, kSize, kBits, out); }

}  // namespace

QuantizeBlocks find_quantizer(std::string_view name) {
  if (name == "I8_32") return blocks_of<32, 8>;
  if (name == "Q4_1") return blocks_of<32, 4>;
  if (name == "I4_64") return blocks_of<64, 4>;
  return name == "I4_128" ? blocks_of<128, 4> : nullptr;
}

}  // namespace flexjudge
