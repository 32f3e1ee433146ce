// Softmax attention inside segments, every patch to every patch: windows and whole frames of a vision tower. A head of
// a segment is laid out once for many queries; what a query gives depends on its segment alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention.h"
#include "flexjudge/vision.h"

namespace flexjudge::FJ_ISA {

constexpr int kPlainTerms = 2;  // bytes of a quantised activation; a tower's weights are plain, so it has none
constexpr std::int64_t kQueryBlock = 256;  // queries of a task, so that long segments go to several threads

// One thread's memory for segments of up to `longest` patches.
struct SegmentScratch {
  float *query, *scores, *keys, *values, *out;
  const std::uint8_t **key_tiles, **value_rows;
  std::int64_t room;  // scores of a row

  SegmentScratch(Arena& arena, std::int64_t longest, std::int64_t dim)
      : query(arena.take<float>(kDenseTokens * dim)),
        scores(arena.take<float>(kDenseTokens * (longest + 16))),
        keys(arena.take<float>((longest + 16) * dim)),
        values(arena.take<float>(longest * dim)),
        out(arena.take<float>(kDenseTokens * dim)),
        key_tiles(arena.take<const std::uint8_t*>(longest / 16 + 1)),
        value_rows(arena.take<const std::uint8_t*>(longest)),
        room(longest + 16) {}
};

// A head's elements in whole vectors.
inline std::int64_t padded(std::int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

inline std::int64_t segment_scratch_bytes(std::int64_t longest, std::int64_t head_dim) {
  Arena counter;
  SegmentScratch(counter, longest, padded(head_dim));
  return counter.used;
}

// qkv: [num_patches, 3, num_heads, head_dim]; out: [num_patches, num_heads, head_dim].
struct SegmentCall {
  std::int64_t num_heads, head_dim;
  const float* qkv;
  float* out;

  const float* part(std::int64_t patch, int which, std::int64_t head) const {
    return qkv + ((3 * patch + which) * num_heads + head) * head_dim;
  }
  std::int64_t dim() const { return padded(head_dim); }
};

// Keys as tiles [dim][16] and values as rows [dim], padded with zeros.
inline void gather_segment(const SegmentCall& call, std::int64_t begin, std::int64_t count, std::int64_t head, SegmentScratch& s) {
  const std::int64_t dim = call.dim();
  std::fill_n(s.keys, (count + 15) / 16 * 16 * dim, 0.0f);
  std::fill_n(s.values, count * dim, 0.0f);
  for (std::int64_t j = 0; j < count; ++j) {
    const float *key = call.part(begin + j, 1, head), *value = call.part(begin + j, 2, head);
    float *tile = s.keys + j / 16 * 16 * dim, *row = s.values + j * dim;
    for (std::int64_t d = 0; d < call.head_dim; ++d) tile[d * 16 + j % 16] = key[d];
    std::copy_n(value, call.head_dim, row);
    if (j % 16 == 0) s.key_tiles[j / 16] = reinterpret_cast<const std::uint8_t*>(tile);
    s.value_rows[j] = reinterpret_cast<const std::uint8_t*>(row);
  }
}

// Scores to probabilities times `total`, in place. Returns the total.
inline float exponentials(float* row, std::int64_t count) {
  F largest = set1(-INFINITY), total = zero();
  for (std::int64_t j = 0; j < count; j += 16) {
    const int width = static_cast<int>(std::min<std::int64_t>(16, count - j));
    largest = max(keep_first(load(row + j), width, -INFINITY), largest);
  }
  const F top = set1(max_lane(largest));
  for (std::int64_t j = 0; j < count; j += 16) {
    const int width = static_cast<int>(std::min<std::int64_t>(16, count - j));
    const F e = keep_first(exp(sub(load(row + j), top)), width, 0.0f);
    store(row + j, e);
    total = add(total, e);
  }
  return sum(total);
}

// kR queries from `first` on over a gathered segment of `count` patches.
template <int kR>
void attend_rows(const SegmentCall& call, std::int64_t first, std::int64_t count, std::int64_t head, SegmentScratch& s) {
  const std::int64_t dim = call.dim();
  const float scale = 1.0f / std::sqrt(static_cast<float>(call.head_dim));
  for (int r = 0; r < kR; ++r) {
    const float* from = call.part(first + r, 0, head);
    for (std::int64_t d = 0; d < call.head_dim; ++d) s.query[r * dim + d] = from[d] * scale;
  }
  for (std::int64_t i = 0; i < (count + 15) / 16; ++i) {
    float* to[1] = {s.scores + 16 * i};
    score_tiles<kR, 1, F32>(s.query, dim, call.head_dim, s.key_tiles + i, 16, to, s.room);
  }
  float totals[kR];
  for (int r = 0; r < kR; ++r) totals[r] = exponentials(s.scores + r * s.room, count);
  weigh_values<kR, F32>(s.scores, s.room, s.value_rows, count, dim, s.out);
  for (int r = 0; r < kR; ++r) {
    const F factor = set1(1.0f / totals[r]);
    float* to = call.out + ((first + r) * call.num_heads + head) * call.head_dim;
    for (std::int64_t d = 0; d < call.head_dim; d += 16) {
      store_n(to + d, mul(load(s.out + r * dim + d), factor), static_cast<int>(std::min<std::int64_t>(16, call.head_dim - d)));
    }
  }
}

// The rank's tasks: a head, a segment and some of its queries. Ends without a barrier.
inline void segment_attention(const SegmentCall& call, const Segments& segments, SegmentScratch& s, int rank, int size) {
  std::int64_t turn = 0;
  for (std::int64_t i = 0; i < segments.count; ++i) {
    const std::int64_t begin = segments.start[i], count = segments.start[i + 1] - begin;
    for (std::int64_t head = 0; head < call.num_heads; ++head) {
      for (std::int64_t from = 0; from < count; from += kQueryBlock) {
        if (turn++ % size != rank) continue;
        gather_segment(call, begin, count, head, s);
        const std::int64_t end = std::min(from + kQueryBlock, count);
        std::int64_t q = from;
        for (; q + kDenseTokens <= end; q += kDenseTokens) attend_rows<kDenseTokens>(call, begin + q, count, head, s);
        for (; q < end; ++q) attend_rows<1>(call, begin + q, count, head, s);
      }
    }
  }
}

inline std::int64_t longest(const Segments& segments) {
  std::int64_t most = 0;
  for (std::int64_t i = 0; i < segments.count; ++i) most = std::max(most, segments.start[i + 1] - segments.start[i]);
  return most;
}

}  // namespace flexjudge::FJ_ISA
