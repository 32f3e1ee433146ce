// Pillow's bicubic resize in 22-bit fixed point, a few rows at a time, and patches read through a table.
#include "flexjudge/image.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#include "flexjudge/clones.h"
#include "flexjudge/thread_pool.h"

namespace flexjudge {
namespace {

#define FLEXJUDGE_INLINE inline __attribute__((always_inline))

constexpr int kFraction = 22;  // fractional bits of a weight: 255 times the sum of magnitudes still fits 32 bits
constexpr std::int32_t kHalf = 1 << (kFraction - 1);
constexpr int kRows = 4;  // rows resized along the width at once: they share the reads of the weights

using Bytes = std::uint8_t __attribute__((vector_size(8)));
using Shorts = std::int16_t __attribute__((vector_size(16)));
using Pixel = std::int32_t __attribute__((vector_size(16)));  // red, green, blue, 0
using Ints = std::int32_t __attribute__((vector_size(32)));

template <class V, class T>
FLEXJUDGE_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// A weighted sum to a byte's value.
FLEXJUDGE_INLINE Ints clipped(Ints sum) {
  const Ints low = {}, high = low + 255;
  Ints value = sum >> kFraction;
  value = value < low ? low : value;
  return value > high ? high : value;
}

FLEXJUDGE_INLINE std::uint8_t clipped(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> kFraction, 0, 255));
}

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// Which input pixels make up an output pixel along one direction, and by what weight.
struct Taps {
  std::int64_t most;                  // row length of `weights`, even
  std::vector<std::int64_t> first;    // [out] first input pixel
  std::vector<std::int64_t> count;    // [out]
  std::vector<std::int32_t> weights;  // [out, most], zero beyond `count`

  // The order of these operations is Pillow's: any other rounds some weights differently.
  Taps(std::int64_t in, std::int64_t out) : first(size(out)), count(size(out)) {
    const double scale = static_cast<double>(in) / static_cast<double>(out), stretch = std::max(scale, 1.0);
    const double support = 2 * stretch, inverse = 1.0 / stretch;
    most = static_cast<std::int64_t>(std::ceil(support)) * 2 + 2;
    weights.resize(size(out * most));
    std::vector<double> exact(size(most));
    for (std::int64_t i = 0; i < out; ++i) {
      const double center = (static_cast<double>(i) + 0.5) * scale;
      const auto begin = std::max<std::int64_t>(static_cast<std::int64_t>(center - support + 0.5), 0);
      const auto end = std::min(static_cast<std::int64_t>(center + support + 0.5), in);
      double sum = 0;
      for (std::int64_t j = begin; j < end; ++j) {
        exact[size(j - begin)] = bicubic((static_cast<double>(j) - center + 0.5) * inverse);
        sum += exact[size(j - begin)];
      }
      first[size(i)] = begin;
      count[size(i)] = end - begin;
      for (std::int64_t j = 0; j < end - begin; ++j) weights[size(i * most + j)] = fixed(exact[size(j)] / sum);
    }
  }

  const std::int32_t* row(std::int64_t i) const { return weights.data() + i * most; }

 private:
  static std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }
  static std::int32_t fixed(double weight) {
    return static_cast<std::int32_t>(weight * (1 << kFraction) + (weight < 0 ? -0.5 : 0.5));
  }
};

// Each weight four times, one for each number of a pixel.
std::vector<std::int32_t> spread(const Taps& taps) {
  std::vector<std::int32_t> out(taps.weights.size() * 4);
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = taps.weights[i / 4];
  return out;
}

// Pixels of 3 bytes to pixels of 4 numbers, once for all the sums that they enter.
FLEXJUDGE_CLONES void widen(const std::uint8_t* from, std::int64_t width, std::int32_t* to) {
  static_assert(std::endian::native == std::endian::little);
  const Pixel shifts = {0, 8, 16, 24}, mask = {255, 255, 255, 0};
  for (std::int64_t x = 0; x < width - 1; ++x) {  // the last would be read with a byte of what follows
    std::int32_t bytes;
    std::memcpy(&bytes, from + 3 * x, sizeof bytes);
    const Pixel pixel = ((Pixel{} + bytes) >> shifts) & mask;
    std::memcpy(to + 4 * x, &pixel, sizeof pixel);
  }
  for (int c = 0; c < 3; ++c) to[4 * (width - 1) + c] = from[3 * (width - 1) + c];
}

// Sums of even and odd taps of a pixel of two rows to bytes.
FLEXJUDGE_INLINE void put_pixels(Ints one, Ints two, std::uint8_t* to_one, std::uint8_t* to_two) {
  const Ints even = {one[0], one[1], one[2], one[3], two[0], two[1], two[2], two[3]};
  const Ints odd = {one[4], one[5], one[6], one[7], two[4], two[5], two[6], two[7]};
  const Shorts values = __builtin_convertvector(clipped(even + odd + kHalf), Shorts);
  const Bytes bytes = __builtin_convertvector(values, Bytes);
  std::uint8_t pixels[sizeof bytes];
  std::memcpy(pixels, &bytes, sizeof bytes);
  std::memcpy(to_one, pixels, 3);
  std::memcpy(to_two, pixels + 4, 3);
}

// Along the width: kRows rows of widened pixels, `stride` numbers apart, to rows of 3 bytes a pixel.
FLEXJUDGE_CLONES void across(const Taps& taps, const std::int32_t* weights, std::int64_t width, const std::int32_t* rows,
                             std::int64_t stride, std::uint8_t* const* to) {
  for (std::int64_t x = 0; x < width; ++x, weights += 4 * taps.most) {
    const std::int32_t* at = rows + 4 * taps.first[static_cast<std::size_t>(x)];
    const std::int64_t count = taps.count[static_cast<std::size_t>(x)];
    Ints a = {}, b = {}, c = {}, d = {};
    for (std::int64_t j = 0; j < count; j += 2) {  // the second of an odd last pair has weight 0
      const Ints weight = load<Ints>(weights + 4 * j);
      a += load<Ints>(at + 4 * j) * weight;
      b += load<Ints>(at + 4 * j + stride) * weight;
      c += load<Ints>(at + 4 * j + 2 * stride) * weight;
      d += load<Ints>(at + 4 * j + 3 * stride) * weight;
    }
    put_pixels(a, b, to[0] + 3 * x, to[1] + 3 * x);
    put_pixels(c, d, to[2] + 3 * x, to[3] + 3 * x);
  }
}

// Along the height: 32 bytes of an output row. Each 32-bit lane of the rows is taken apart into its four bytes.
FLEXJUDGE_INLINE void weigh_rows(const std::int32_t* weights, std::int64_t count, const std::uint8_t* const* rows,
                                 std::int64_t at, std::uint8_t* to) {
  Ints a = Ints{} + kHalf, b = a, c = a, d = a;
  for (std::int64_t j = 0; j < count; ++j) {
    const Ints bytes = load<Ints>(rows[j] + at), weight = Ints{} + weights[j];
    a += (bytes & 255) * weight;
    b += (bytes >> 8 & 255) * weight;
    c += (bytes >> 16 & 255) * weight;
    d += (bytes >> 24 & 255) * weight;
  }
  const Ints done = clipped(a) | clipped(b) << 8 | clipped(c) << 16 | clipped(d) << 24;
  std::memcpy(to + at, &done, sizeof done);
}

// One row of `bytes` bytes out of `count` rows.
FLEXJUDGE_CLONES void down(const std::int32_t* weights, std::int64_t count, const std::uint8_t* const* rows,
                           std::int64_t bytes, std::uint8_t* to) {
  constexpr std::int64_t kBlock = sizeof(Ints);
  std::int64_t at = 0;
  for (; at + kBlock <= bytes; at += kBlock) weigh_rows(weights, count, rows, at, to);
  if (at > 0 && at < bytes) return weigh_rows(weights, count, rows, bytes - kBlock, to);
  for (; at < bytes; ++at) {
    std::int32_t sum = kHalf;
    for (std::int64_t j = 0; j < count; ++j) sum += rows[j][at] * weights[j];
    to[at] = clipped(sum);
  }
}

// One resize: what all its threads read.
struct Resize {
  Frames from;
  std::int64_t height, width;
  Taps x, y;
  std::vector<std::int32_t> weights_x;

  Resize(const Frames& frames, std::int64_t out_height, std::int64_t out_width)
      : from(frames), height(out_height), width(out_width), x(frames.width, width), y(frames.height, height),
        weights_x(spread(x)) {}

  const std::uint8_t* row(std::int64_t frame, std::int64_t y_in) const {
    return from.pixels + (frame * from.height + y_in) * from.width * 3;
  }

  // Since Pillow 13 an image that loses far more rows than columns is resized along its height first; between the
  // passes values are rounded to bytes, so that the order shows in the bits.
  bool down_first() const { return height < from.height && from.height - height > 2 * (from.width - width); }
};

// kRows rows at a time along the width.
class Across {
 public:
  explicit Across(const Resize& job)
      : job_(job), stride_(4 * job.from.width + 4), wide_(static_cast<std::size_t>(kRows * stride_)) {}

  void run(const std::uint8_t* const* rows, std::uint8_t* const* to) {
    for (int r = 0; r < kRows; ++r) widen(rows[r], job_.from.width, wide_.data() + r * stride_);
    across(job_.x, job_.weights_x.data(), job_.width, wide_.data(), stride_, to);
  }

 private:
  const Resize& job_;
  const std::int64_t stride_;  // numbers; a pixel longer than a row, for a weight of 0
  std::vector<std::int32_t> wide_;
};

// The rows of one frame that the next output row needs, resized along the width; each is made once and the
// oldest overwritten, so that memory is bound by the filter and not by the frame.
class Window {
 public:
  explicit Window(const Resize& job)
      : job_(job),
        across_(job),
        capacity_(job.y.most + kRows),
        done_(static_cast<std::size_t>(capacity_ * 3 * job.width)),
        rows_(static_cast<std::size_t>(job.y.most)) {}

  // Rows [first, first + count) of a frame; `first` never falls within a frame.
  const std::uint8_t* const* rows(std::int64_t frame, std::int64_t first, std::int64_t count) {
    if (frame != frame_) frame_ = frame, next_ = first;
    next_ = std::max(next_, first);
    while (next_ < first + count) make_rows();
    for (std::int64_t j = 0; j < count; ++j) rows_[static_cast<std::size_t>(j)] = slot(first + j);
    return rows_.data();
  }

 private:
  std::uint8_t* slot(std::int64_t row) { return done_.data() + row % capacity_ * 3 * job_.width; }

  void make_rows() {
    const std::uint8_t* from[kRows];
    std::uint8_t* to[kRows];
    for (int r = 0; r < kRows; ++r) {
      from[r] = job_.row(frame_, std::min(next_ + r, job_.from.height - 1));  // what lies past the last is never read
      to[r] = slot(next_ + r);
    }
    across_.run(from, to);
    next_ += kRows;
  }

  const Resize& job_;
  Across across_;
  const std::int64_t capacity_;
  std::vector<std::uint8_t> done_;
  std::vector<const std::uint8_t*> rows_;
  std::int64_t frame_ = -1, next_ = 0;
};

// Output rows [begin, end), counted over all frames.
void across_then_down(const Resize& job, std::int64_t begin, std::int64_t end, std::uint8_t* to) {
  Window window(job);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t y = i % job.height, count = job.y.count[static_cast<std::size_t>(y)];
    const std::uint8_t* const* rows = window.rows(i / job.height, job.y.first[static_cast<std::size_t>(y)], count);
    down(job.y.row(y), count, rows, 3 * job.width, to + i * 3 * job.width);
  }
}

void down_then_across(const Resize& job, std::int64_t begin, std::int64_t end, std::uint8_t* to) {
  Across across(job);
  const std::int64_t row_bytes = 3 * job.from.width;
  std::vector<std::uint8_t> lowered(static_cast<std::size_t>(kRows * row_bytes)), spare(static_cast<std::size_t>(3 * job.width));
  std::vector<const std::uint8_t*> rows(static_cast<std::size_t>(job.y.most));
  for (std::int64_t i = begin; i < end; i += kRows) {
    const std::uint8_t* from[kRows];
    std::uint8_t* out[kRows];
    for (int r = 0; r < kRows; ++r) {
      from[r] = lowered.data() + r * row_bytes;
      out[r] = i + r < end ? to + (i + r) * 3 * job.width : spare.data();
      if (i + r >= end) continue;
      const std::int64_t y = (i + r) % job.height, count = job.y.count[static_cast<std::size_t>(y)];
      const std::uint8_t* first = job.row((i + r) / job.height, job.y.first[static_cast<std::size_t>(y)]);
      for (std::int64_t j = 0; j < count; ++j) rows[static_cast<std::size_t>(j)] = first + j * row_bytes;
      down(job.y.row(y), count, rows.data(), row_bytes, lowered.data() + r * row_bytes);
    }
    across.run(from, out);
  }
}

// `work(begin, end)` over shares of `count` items. One thread leaves the pool alone: its calls take turns, and a
// medium that is prepared beside a running model must not wait for the model's steps.
template <class Work>
void in_shares(std::int64_t count, int threads, const Work& work) {
  threads = static_cast<int>(std::min<std::int64_t>(threads, count));
  if (threads <= 1) return work(std::int64_t{0}, count);
  run_team(threads, [&](Team& team, int rank) {
    const Share share(count, rank, team.size());
    work(share.begin, share.end);
  });
}

// One channel of one frame of a patch.
FLEXJUDGE_INLINE void put_plane(const std::uint8_t* from, std::int64_t row_bytes, const float* table, std::int64_t patch,
                                float* to) {
  for (std::int64_t y = 0; y < patch; ++y, from += row_bytes, to += patch) {
    for (std::int64_t x = 0; x < patch; ++x) to[x] = table[from[3 * x]];
  }
}

// `offset`: bytes from a frame's begin to the patch.
void put_patch(const Frames& from, const float* table, const PatchShape& shape, std::int64_t time, std::int64_t offset,
               float* to) {
  const std::int64_t plane = shape.patch * shape.patch, frame_bytes = from.height * from.width * 3;
  for (int c = 0; c < 3; ++c) {
    for (std::int64_t t = 0; t < shape.temporal; ++t, to += plane) {
      const std::int64_t frame = time * shape.temporal + t;
      if (t > 0 && frame >= from.count) {  // the last frame again
        std::memcpy(to, to - plane, static_cast<std::size_t>(plane) * sizeof(float));
      } else {
        put_plane(from.pixels + frame * frame_bytes + offset + c, from.width * 3, table + 256 * c, shape.patch, to);
      }
    }
  }
}

}  // namespace

void resize_bicubic(const Frames& from, std::int64_t height, std::int64_t width, int threads, std::uint8_t* to) {
  if (height == from.height && width == from.width) {
    std::memcpy(to, from.pixels, static_cast<std::size_t>(from.count * height * width * 3));
    return;
  }
  const Resize job(from, height, width);
  const auto resize_rows = job.down_first() ? down_then_across : across_then_down;
  in_shares(from.count * height, threads, [&](std::int64_t begin, std::int64_t end) { resize_rows(job, begin, end, to); });
}

void patchify(const Frames& from, const float* table, const PatchShape& shape, int threads, float* to) {
  const std::int64_t times = (from.count + shape.temporal - 1) / shape.temporal;
  const std::int64_t across = from.width / shape.patch, bands = from.height / (shape.patch * shape.merge);
  const std::int64_t columns = 3 * shape.temporal * shape.patch * shape.patch, per_band = across * shape.merge;
  in_shares(times * bands, threads, [&](std::int64_t begin, std::int64_t end) {
    float* out = to + begin * per_band * columns;
    for (std::int64_t i = begin * per_band; i < end * per_band; ++i, out += columns) {
      const std::int64_t band = i / per_band, within = i % per_band, block = within / (shape.merge * shape.merge);
      const std::int64_t y = band % bands * shape.merge + within / shape.merge % shape.merge;
      const std::int64_t x = block * shape.merge + within % shape.merge;
      put_patch(from, table, shape, band / bands, (y * from.width + x) * shape.patch * 3, out);
    }
  });
}

}  // namespace flexjudge
