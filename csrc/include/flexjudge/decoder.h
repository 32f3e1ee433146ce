// What a decoder step reads and writes, as plain pointers; and the table of one instruction set's kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "flexjudge/packed.h"
#include "flexjudge/thread_pool.h"

namespace flexjudge {

// A packed matrix [rows, columns].
struct Matrix {
  const std::uint8_t* data = nullptr;
  const FormatInfo* format = nullptr;
  std::int64_t rows = 0, columns = 0;
  PackedLayout layout{};

  bool is_quantized() const { return format->scales != Scales::kNone; }
};

// Matrices over the same input, their outputs side by side, and a bias [rows of all] or null.
struct Linear {
  std::vector<Matrix> parts;
  const float* bias = nullptr;

  std::int64_t rows() const {
    std::int64_t total = 0;
    for (const Matrix& part : parts) total += part.rows;
    return total;
  }
  std::int64_t columns() const { return parts.front().columns; }
};

struct AttentionShape {
  std::int64_t num_heads, num_kv_heads, head_dim;
  float scale;
};

struct Layer {
  const float* input_norm;  // [hidden]
  Linear qkv, out;
  const float* post_norm;  // [hidden]
  Linear gate, up, down;
};

struct Decoder {
  std::int64_t hidden, intermediate, num_heads, num_kv_heads, head_dim;
  float eps;
  int terms;  // bytes of a quantised activation: 2 (16 bits) or 1
  std::vector<Layer> layers;
  const float* norm;  // [hidden]
  Linear head;
  Matrix embed;           // [vocab, hidden]
  const float *cos, *sin;  // [max_positions, head_dim / 2]
  std::int64_t max_positions;
  // Of head_dim / 2: the first so many pairs turn by a token's first position, the next by its second (M-RoPE,
  // Wang et al. 2024); plain RoPE has one section.
  std::vector<std::int64_t> rope_sections;

  AttentionShape attention() const {
    return {num_heads, num_kv_heads, head_dim, 1.0f / __builtin_sqrtf(static_cast<float>(head_dim))};
  }
  std::int64_t qkv_rows() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
};

enum class KvFormat { kF32, kF16, kBF16, kInt8 };

// The paged keys and values of all layers. A side (keys or values) of a block holds, per KV head, keys as
// [head_dim][block_size] or values as [block_size][head_dim]; int8 codes are followed by float scales [block_size].
struct KvCache {
  std::uint8_t* data;  // [num_layers, 2, num_blocks, num_kv_heads, head_bytes()]
  KvFormat format;
  std::int64_t num_blocks, block_size, num_kv_heads, head_dim;

  std::int64_t element_bytes() const { return format == KvFormat::kF32 ? 4 : format == KvFormat::kInt8 ? 1 : 2; }
  std::int64_t scale_bytes() const { return format == KvFormat::kInt8 ? 4 : 0; }  // of a token and KV head
  std::int64_t head_bytes() const { return block_size * (head_dim * element_bytes() + scale_bytes()); }
  std::uint8_t* head(std::int64_t layer, int values, std::int64_t block, std::int64_t kv_head) const {
    return data + (((2 * layer + values) * num_blocks + block) * num_kv_heads + kv_head) * head_bytes();
  }
  // Of the token at `offset` in the block of `head`; four bytes that need not be aligned.
  std::uint8_t* scale(std::uint8_t* head, std::int64_t offset) const { return head + block_size * head_dim + 4 * offset; }
};

// Which sequences the tokens of a step belong to; see `ops/paged_attention.py`.
struct Sequences {
  std::int64_t count;
  const std::int64_t* query_start;   // [count + 1]
  const std::int64_t* context_lens;  // [count]
  const std::int64_t* block_tables;  // [count, max_blocks]
  std::int64_t max_blocks;
};

struct Step {
  std::int64_t num_tokens;
  const std::int64_t* token_ids;  // [num_tokens]: rows of the embedding table, then rows of `media`
  const std::int64_t* positions;  // [rope_sections, num_tokens]
  const std::int64_t* slots;      // [num_tokens]
  const float* media;             // [num_media, hidden]: embeddings that stand for placeholders
  Sequences sequences;
  KvCache cache;
  std::int64_t num_rows;
  const std::int64_t* logit_rows;  // [num_rows]
  float* logits;                   // [num_rows, vocab]
  bool* finite;                    // [num_rows], true before: whether a row's logits are all finite
};

// How one token is drawn from a row of logits; see `ops/sample.py`. Temperature 0 is greedy.
struct Draw {
  std::int64_t top_k;
  double temperature, top_p, min_p, uniform;
};

// Tokens that no draw may give.
struct Banned {
  const std::int64_t* ids;
  std::int64_t count;
};

struct VisionTower;  // vision.h
struct VisionStep;
struct AudioTower;  // audio.h
struct AudioStep;

// The kernels of one instruction set. Those with a team are called by each of its ranks, with the same arguments,
// and use `scratch`: `*_scratch_bytes` bytes, 64-byte aligned, shared by the team.
struct Kernels {
  const char* isa;
  // out [num_tokens, rows of all parts] = x [num_tokens, columns] times the parts, plus the bias.
  void (*linear)(const Linear& w, int terms, const float* x, std::int64_t num_tokens, float* out,
                 std::uint8_t* scratch, Team& team, int rank);
  std::int64_t (*linear_scratch_bytes)(const Linear& w, int terms, std::int64_t num_tokens, int threads);
  // query, out [num_tokens, num_heads, head_dim]; rows of `query` are `query_stride` floats apart.
  void (*attention)(const AttentionShape& shape, const float* query, std::int64_t query_stride, const KvCache& cache,
                    std::int64_t layer, const Sequences& sequences, float* out, std::uint8_t* scratch, Team& team, int rank);
  std::int64_t (*attention_scratch_bytes)(const AttentionShape& shape, std::int64_t max_context, int threads);
  void (*decoder)(const Decoder& model, const Step& step, std::uint8_t* scratch, Team& team, int rank);
  std::int64_t (*decoder_scratch_bytes)(const Decoder& model, std::int64_t num_tokens, std::int64_t max_context,
                                        int threads);
  std::int64_t (*draw_token)(const float* row, std::int64_t size, const Banned& banned, const Draw& draw);
  void (*vision)(const VisionTower& model, const VisionStep& step, std::uint8_t* scratch, Team& team, int rank);
  std::int64_t (*vision_scratch_bytes)(const VisionTower& model, const VisionStep& step, int threads);
  void (*audio)(const AudioTower& model, const AudioStep& step, std::uint8_t* scratch, Team& team, int rank);
  std::int64_t (*audio_scratch_bytes)(const AudioTower& model, const AudioStep& step, int threads);
};

// The best kernels that this processor runs where `name` is null or empty, else those called "scalar", "avx2",
// "avx512_vnni" or "avx512_bf16". Null where the name is unknown or the processor lacks them.
const Kernels* find_kernels(const char* name);

}  // namespace flexjudge
