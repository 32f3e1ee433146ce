// Causal softmax attention over the paged KV cache, prefill and decode alike. The context is cut at multiples of
// 256 positions; every chunk is reduced by itself and the chunks are merged first to last (online softmax, Milakov
// & Gimelshein 2018). What a query gives does not depend on the queries beside it nor on who computes which chunk.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "elementwise.h"
#include "linear.h"

namespace flexjudge::FJ_ISA {

// Codes of an int8 cache. Their scales come in later: the keys' at the scores, the values' at the probabilities.
struct Int8 {
  using Stored = std::uint8_t;
  static FJ_INLINE F get(const Stored* p) { return to_float(load_s8(p)); }
};

constexpr std::int64_t kChunk = 256;  // positions reduced together
constexpr std::int64_t kMaxRows = 12;  // query rows (tokens times heads of one KV head) of a task

// How a step's attention is cut into tasks.
struct AttentionPlan {
  std::int64_t group;        // query heads of one KV head
  std::int64_t heads;        // of them in one task
  std::int64_t head_pieces;  // tasks that share a KV head
  std::int64_t tokens;       // tokens in one task
  std::int64_t dim;          // head_dim, rounded up to 16

  explicit AttentionPlan(const AttentionShape& s)
      : group(s.num_heads / s.num_kv_heads),
        heads(std::min(group, kMaxRows)),
        head_pieces((group + heads - 1) / heads),
        tokens(std::max<std::int64_t>(1, kMaxRows / heads)),
        dim((s.head_dim + 15) / 16 * 16) {}
};

// A task: some heads of one KV head for some tokens of one sequence.
struct AttentionTask {
  std::int64_t sequence, kv_head, first_head, num_heads;
  std::int64_t token, num_tokens;  // token: row of `query`
  std::int64_t position;           // of the first token
  std::int64_t context() const { return position + num_tokens; }
  std::int64_t rows() const { return num_heads * num_tokens; }
  std::int64_t chunks() const { return (context() + kChunk - 1) / kChunk; }
};

template <class Visit>
void for_tasks(const AttentionShape& shape, const AttentionPlan& plan, const Sequences& sequences, Visit visit) {
  std::int64_t index = 0;
  for (std::int64_t s = 0; s < sequences.count; ++s) {
    const std::int64_t start = sequences.query_start[s], count = sequences.query_start[s + 1] - start;
    const std::int64_t position = sequences.context_lens[s] - count;
    for (std::int64_t t = 0; t < count; t += plan.tokens) {
      for (std::int64_t kv = 0; kv < shape.num_kv_heads; ++kv) {
        for (std::int64_t piece = 0; piece < plan.head_pieces; ++piece) {
          const std::int64_t head = piece * plan.heads;
          visit(index++, AttentionTask{s, kv, head, std::min(plan.heads, plan.group - head), start + t,
                                       std::min(plan.tokens, count - t), position + t});
        }
      }
    }
  }
}

// Running softmax of some rows: largest score, sum of exponentials, weighted sum of values [row][dim].
struct Partial {
  float *largest, *total, *values;
  explicit Partial(float* memory) : largest(memory), total(memory + kMaxRows), values(memory + 2 * kMaxRows) {}
  static std::int64_t floats(std::int64_t dim) { return 2 * kMaxRows + kMaxRows * dim; }
};

// One thread's memory.
struct AttentionScratch {
  float *query, *scores, *keys, *values, *key_scales, *value_scales, *partial, *merged;
  const std::uint8_t **key_tiles, **value_rows;

  AttentionScratch(Arena& arena, std::int64_t dim)
      : query(arena.take<float>(kMaxRows * dim)),
        scores(arena.take<float>(kMaxRows * (kChunk + 16))),
        keys(arena.take<float>(kChunk * dim)),
        values(arena.take<float>(kChunk * dim)),
        key_scales(arena.take<float>(kChunk)),
        value_scales(arena.take<float>(kChunk)),
        partial(arena.take<float>(Partial::floats(dim))),
        merged(arena.take<float>(Partial::floats(dim))),
        key_tiles(arena.take<const std::uint8_t*>(kChunk)),
        value_rows(arena.take<const std::uint8_t*>(kChunk)) {}
  static std::int64_t bytes(std::int64_t dim) {
    Arena counter;
    AttentionScratch(counter, dim);
    return counter.used;
  }
};

// scores[r][0..15] of kTiles key tiles [dim][stride]: dot products summed over the dimensions in order.
template <int kR, int kTiles, class Element>
void score_tiles(const float* query, std::int64_t dim, std::int64_t head_dim, const std::uint8_t* const* tiles, std::int64_t stride,
                 float* const* out, std::int64_t out_stride) {
  using Stored = typename Element::Stored;
  F acc[kTiles][kR];
  for (int i = 0; i < kTiles; ++i) {
    for (int r = 0; r < kR; ++r) acc[i][r] = zero();
  }
  for (std::int64_t d = 0; d < head_dim; ++d) {
    F keys[kTiles];
    for (int i = 0; i < kTiles; ++i) keys[i] = Element::get(reinterpret_cast<const Stored*>(tiles[i]) + d * stride);
#pragma GCC unroll 12
    for (int r = 0; r < kR; ++r) {
      const F q = set1(query[r * dim + d]);
      for (int i = 0; i < kTiles; ++i) acc[i][r] = fma(keys[i], q, acc[i][r]);
    }
  }
  for (int i = 0; i < kTiles; ++i) {
    for (int r = 0; r < kR; ++r) store(out[i] + r * out_stride, acc[i][r]);
  }
}

// values[r][dim] = sum of scores[r][j] * row j, in order of j.
template <int kR, class Element>
void weigh_values(const float* scores, std::int64_t score_stride, const std::uint8_t* const* rows, std::int64_t count,
                  std::int64_t dim, float* values) {
  using Stored = typename Element::Stored;
  for (std::int64_t d = 0; d < dim; d += 16) {
    F acc[kR];
    for (int r = 0; r < kR; ++r) acc[r] = zero();
    for (std::int64_t j = 0; j < count; ++j) {
      const F v = Element::get(reinterpret_cast<const Stored*>(rows[j]) + d);
#pragma GCC unroll 12
      for (int r = 0; r < kR; ++r) acc[r] = fma(v, set1(scores[r * score_stride + j]), acc[r]);
    }
    for (int r = 0; r < kR; ++r) store(values + r * dim + d, acc[r]);
  }
}

// What the two loops above read of one chunk: tiles of 16 keys and rows of values, and what they are multiplied by.
struct ChunkView {
  std::int64_t num_tiles, tile_stride;
  bool is_float;   // gathered into scratch as float32
  bool is_scaled;  // `key_scales` and `value_scales` hold a factor for each position
};

// One position of an odd block or head size: copied, padded with zeros. `index`: in the chunk; `offset`: in the block.
template <class Element>
void gather_position(const std::uint8_t* keys, const std::uint8_t* values, std::int64_t offset, const KvCache& cache, std::int64_t index,
                     std::int64_t dim, AttentionScratch& s) {
  using Stored = typename Element::Stored;
  const auto* key = reinterpret_cast<const Stored*>(keys) + offset;
  const auto* value = reinterpret_cast<const Stored*>(values) + offset * cache.head_dim;
  float* tile = s.keys + index / 16 * 16 * dim;
  float* row = s.values + index * dim;
  if (index % 16 == 0) std::fill_n(tile, 16 * dim, 0.0f);
  std::fill_n(row, dim, 0.0f);
  float lane[16];
  for (std::int64_t d = 0; d < cache.head_dim; ++d) {
    const Stored one[16] = {key[d * cache.block_size], value[d]};
    store(lane, Element::get(one));
    tile[d * 16 + index % 16] = lane[0];
    row[d] = lane[1];
  }
  s.key_tiles[index / 16] = reinterpret_cast<const std::uint8_t*>(tile);
  s.value_rows[index] = reinterpret_cast<const std::uint8_t*>(row);
}

// is_cold: the blocks are fetched side by side first, as nothing read them in this step.
template <class Element>
ChunkView view_chunk(const KvCache& cache, std::int64_t layer, const std::int64_t* table, std::int64_t kv_head, std::int64_t begin,
                     std::int64_t end, std::int64_t dim, bool is_cold, AttentionScratch& s) {
  constexpr std::int64_t kBytes = sizeof(typename Element::Stored);
  const std::int64_t size = cache.block_size, head_dim = cache.head_dim;
  const bool is_odd = size % 16 != 0 || head_dim % 16 != 0;
  for (std::int64_t p = begin, run; p < end; p += run) {  // block by block
    const std::int64_t block = table[p / size], offset = p % size, index = p - begin;
    run = std::min(size - offset, end - p);
    std::uint8_t* keys = cache.head(layer, 0, block, kv_head);
    std::uint8_t* values = cache.head(layer, 1, block, kv_head);
    if (is_cold) {
      for (std::int64_t at = 0; at < size * head_dim * kBytes; at += 64) __builtin_prefetch(keys + at, 0, 2);
      for (std::int64_t at = 0; at < run * head_dim * kBytes; at += 64) __builtin_prefetch(values + offset * head_dim * kBytes + at, 0, 2);
    }
    if (cache.scale_bytes() != 0) {
      std::memcpy(s.key_scales + index, cache.scale(keys, offset), static_cast<std::size_t>(4 * run));
      std::memcpy(s.value_scales + index, cache.scale(values, offset), static_cast<std::size_t>(4 * run));
    }
    for (std::int64_t i = 0; i < run; ++i) {
      if (is_odd) {
        gather_position<Element>(keys, values, offset + i, cache, index + i, dim, s);
        continue;
      }
      if (i % 16 == 0) s.key_tiles[(index + i) / 16] = keys + (offset + i) * kBytes;
      s.value_rows[index + i] = values + (offset + i) * head_dim * kBytes;
    }
  }
  return {(end - begin + 15) / 16, is_odd ? 16 : size, is_odd, cache.scale_bytes() != 0};
}

template <int kR, class Element>
void chunk_rows(const AttentionTask& task, const ChunkView& view, std::int64_t begin, std::int64_t end, std::int64_t dim,
                std::int64_t head_dim, AttentionScratch& s, Partial out) {
  constexpr int kTiles = kR <= 3 ? 4 : (kR <= 6 ? 2 : 1);
  constexpr std::int64_t kStride = kChunk + 16;
  std::int64_t i = 0;
  for (; i + kTiles <= view.num_tiles; i += kTiles) {
    float* to[kTiles];
    for (int j = 0; j < kTiles; ++j) to[j] = s.scores + (i + j) * 16;
    score_tiles<kR, kTiles, Element>(s.query, dim, head_dim, s.key_tiles + i, view.tile_stride, to, kStride);
  }
  for (; i < view.num_tiles; ++i) {
    float* to[1] = {s.scores + i * 16};
    score_tiles<kR, 1, Element>(s.query, dim, head_dim, s.key_tiles + i, view.tile_stride, to, kStride);
  }
  for (int r = 0; r < kR; ++r) {
    const std::int64_t position = task.position + r / task.num_heads;
    const std::int64_t seen = std::clamp<std::int64_t>(position + 1 - begin, 0, end - begin);
    float* row = s.scores + r * kStride;
    F largest = set1(-INFINITY), total = zero();
    for (std::int64_t j = 0; j < seen; j += 16) {
      if (view.is_scaled) store(row + j, mul(load(row + j), load(s.key_scales + j)));
      largest = max(largest, keep_first(load(row + j), static_cast<int>(seen - j), -INFINITY));
    }
    out.largest[r] = max_lane(largest);
    const F top = set1(out.largest[r]);
    for (std::int64_t j = 0; j < view.num_tiles * 16; j += 16) {
      const F p = exp(sub(keep_first(load(row + j), static_cast<int>(seen - j), -INFINITY), top));
      const F kept = keep_first(p, static_cast<int>(seen - j), 0.0f);  // also where the row sees nothing
      total = add(total, kept);
      store(row + j, view.is_scaled ? keep_first(mul(kept, load(s.value_scales + j)), static_cast<int>(seen - j), 0.0f) : kept);
    }
    out.total[r] = sum(total);
  }
  weigh_values<kR, Element>(s.scores, kStride, s.value_rows, end - begin, dim, out.values);
}

template <class Element>
void chunk_task(const AttentionTask& task, const ChunkView& view, std::int64_t begin, std::int64_t end, std::int64_t dim,
                std::int64_t head_dim, AttentionScratch& s, Partial out) {
  switch (task.rows()) {
#define FJ_ROWS(n) case n: return chunk_rows<n, Element>(task, view, begin, end, dim, head_dim, s, out);
    FJ_ROWS(1) FJ_ROWS(2) FJ_ROWS(3) FJ_ROWS(4) FJ_ROWS(5) FJ_ROWS(6)
    FJ_ROWS(7) FJ_ROWS(8) FJ_ROWS(9) FJ_ROWS(10) FJ_ROWS(11) FJ_ROWS(12)
#undef FJ_ROWS
  }
}

template <class Element>
void attend_chunk(const AttentionTask& task, const KvCache& cache, std::int64_t layer, const std::int64_t* table, std::int64_t chunk,
                  std::int64_t dim, AttentionScratch& s, Partial out) {
  const std::int64_t begin = chunk * kChunk, end = std::min(task.context(), begin + kChunk);
  const ChunkView view = view_chunk<Element>(cache, layer, table, task.kv_head, begin, end, dim, task.num_tokens == 1, s);
  view.is_float ? chunk_task<F32>(task, view, begin, end, dim, cache.head_dim, s, out)
                : chunk_task<Element>(task, view, begin, end, dim, cache.head_dim, s, out);
}

// Adds the next chunk to the running softmax.
inline void merge_chunk(const Partial& next, std::int64_t rows, std::int64_t dim, Partial into, bool first) {
  for (std::int64_t r = 0; r < rows; ++r) {
    float* values = into.values + r * dim;
    if (first) {
      into.largest[r] = next.largest[r];
      into.total[r] = next.total[r];
      std::copy_n(next.values + r * dim, dim, values);
      continue;
    }
    if (next.total[r] == 0.0f) continue;  // the row ends before this chunk
    const float top = std::max(into.largest[r], next.largest[r]);
    const float a = exp1(into.largest[r] - top), b = exp1(next.largest[r] - top);
    into.largest[r] = top;
    into.total[r] = into.total[r] * a + next.total[r] * b;
    for (std::int64_t d = 0; d < dim; d += 16) {
      store(values + d, fma(load(next.values + r * dim + d), set1(b), mul(load(values + d), set1(a))));
    }
  }
}

struct AttentionCall {
  const AttentionShape& shape;
  const float* query;
  std::int64_t query_stride;
  const KvCache& cache;
  std::int64_t layer;
  const Sequences& sequences;
  float* out;  // [num_tokens, num_heads, head_dim]
};

inline void gather_query(const AttentionCall& call, const AttentionPlan& plan, const AttentionTask& task, float* to) {
  const std::int64_t head_dim = call.shape.head_dim;
  for (std::int64_t r = 0; r < task.rows(); ++r) {
    const std::int64_t token = task.token + r / task.num_heads, head = task.kv_head * plan.group + task.first_head + r % task.num_heads;
    const float* from = call.query + token * call.query_stride + head * head_dim;
    for (std::int64_t d = 0; d < head_dim; ++d) to[r * plan.dim + d] = from[d] * call.shape.scale;
  }
}

inline void write_out(const AttentionCall& call, const AttentionPlan& plan, const AttentionTask& task, const Partial& result) {
  const std::int64_t head_dim = call.shape.head_dim;
  for (std::int64_t r = 0; r < task.rows(); ++r) {
    const std::int64_t token = task.token + r / task.num_heads, head = task.kv_head * plan.group + task.first_head + r % task.num_heads;
    float* to = call.out + (token * call.shape.num_heads + head) * head_dim;
    const F factor = set1(1.0f / result.total[r]);
    for (std::int64_t d = 0; d < head_dim; d += 16) {
      store_n(to + d, mul(load(result.values + r * plan.dim + d), factor), static_cast<int>(std::min<std::int64_t>(16, head_dim - d)));
    }
  }
}

// Whether a step has too few tasks for its threads, so that chunks go to different threads.
struct ChunkSplit {
  std::int64_t tasks = 0, max_chunks = 1;
  bool wanted(int threads) const { return tasks < 2 * threads && max_chunks > 1; }
};

inline std::int64_t split_floats(std::int64_t dim, std::int64_t max_context, int threads) {
  return 2 * threads * ((max_context + kChunk - 1) / kChunk) * Partial::floats(dim);
}

template <class Element>
void attend(const AttentionCall& call, std::uint8_t* scratch, Team& team, int rank) {
  const AttentionPlan plan(call.shape);
  const std::int64_t own_bytes = AttentionScratch::bytes(plan.dim);
  Arena own{scratch + rank * own_bytes};
  AttentionScratch s(own, plan.dim);
  auto* partials = reinterpret_cast<float*>(scratch + team.size() * own_bytes);
  auto table = [&](const AttentionTask& task) { return call.sequences.block_tables + task.sequence * call.sequences.max_blocks; };
  ChunkSplit split;
  for_tasks(call.shape, plan, call.sequences, [&](std::int64_t, const AttentionTask& task) {
    ++split.tasks;
    split.max_chunks = std::max(split.max_chunks, task.chunks());
  });
  const bool is_split = split.wanted(team.size());
  auto partial = [&](std::int64_t index, std::int64_t chunk) {
    return Partial(partials + (index * split.max_chunks + chunk) * Partial::floats(plan.dim));
  };
  std::int64_t turn = 0;
  for_tasks(call.shape, plan, call.sequences, [&](std::int64_t index, const AttentionTask& task) {
    if (!is_split && index % team.size() != rank) return;
    bool gathered = false;
    Partial merged(s.merged), next(s.partial);
    for (std::int64_t chunk = 0; chunk < task.chunks(); ++chunk) {
      if (is_split && turn++ % team.size() != rank) continue;
      if (!std::exchange(gathered, true)) gather_query(call, plan, task, s.query);
      attend_chunk<Element>(task, call.cache, call.layer, table(task), chunk, plan.dim, s, is_split ? partial(index, chunk) : next);
      if (!is_split) merge_chunk(next, task.rows(), plan.dim, merged, chunk == 0);
    }
    if (!is_split) write_out(call, plan, task, merged);
  });
  if (!is_split) return;
  team.barrier();
  for_tasks(call.shape, plan, call.sequences, [&](std::int64_t index, const AttentionTask& task) {
    if (index % team.size() != rank) return;
    Partial merged(s.merged);
    for (std::int64_t chunk = 0; chunk < task.chunks(); ++chunk) merge_chunk(partial(index, chunk), task.rows(), plan.dim, merged, chunk == 0);
    write_out(call, plan, task, merged);
  });
}

// Ends without a barrier.
inline void attend_any(const AttentionCall& call, std::uint8_t* scratch, Team& team, int rank) {
  switch (call.cache.format) {
    case KvFormat::kF32: return attend<F32>(call, scratch, team, rank);
    case KvFormat::kF16: return attend<F16>(call, scratch, team, rank);
    case KvFormat::kBF16: return attend<BF16>(call, scratch, team, rank);
    case KvFormat::kInt8: return attend<Int8>(call, scratch, team, rank);
  }
}

inline void attention(const AttentionShape& shape, const float* query, std::int64_t query_stride, const KvCache& cache,
                      std::int64_t layer, const Sequences& sequences, float* out, std::uint8_t* scratch, Team& team, int rank) {
  attend_any({shape, query, query_stride, cache, layer, sequences, out}, scratch, team, rank);
}

inline std::int64_t attention_scratch_bytes(const AttentionShape& shape, std::int64_t max_context, int threads) {
  const std::int64_t dim = AttentionPlan(shape).dim;
  return threads * AttentionScratch::bytes(dim) + align64(4 * split_floats(dim, max_context, threads));
}

}  // namespace flexjudge::FJ_ISA
