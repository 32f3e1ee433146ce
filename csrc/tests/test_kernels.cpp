// The thread pool, packed products, attention, a decoder's steps, towers and draws by themselves, for the sanitizers and for
// emulated instruction sets: every buffer is exactly as large as the interface asks for. FJ_TESTED: the table of
// kernels; FJ_TWIN: one of the same bits.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "flexjudge/audio.h"
#include "flexjudge/decoder.h"
#include "flexjudge/half.h"
#include "flexjudge/vision.h"

#ifndef FJ_TESTED
#define FJ_TESTED kernels_scalar
#endif

namespace flexjudge {
extern const Kernels FJ_TESTED;
#ifdef FJ_TWIN
extern const Kernels FJ_TWIN;
#endif
}  // namespace flexjudge

namespace {

using namespace flexjudge;

std::mt19937 random_bits(1);

void expect(bool good, const char* what) {
  if (good) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

float random_float() { return static_cast<float>(random_bits() % 2001) / 1000.0f - 1.0f; }

std::vector<float> random_floats(std::int64_t count) {
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& v : out) v = random_float();
  return out;
}

struct Aligned {
  explicit Aligned(std::int64_t size) : data(static_cast<std::uint8_t*>(std::aligned_alloc(64, static_cast<std::size_t>((size + 63) / 64 * 64)))) {}
  ~Aligned() { std::free(data); }
  Aligned(const Aligned&) = delete;
  std::uint8_t* data;
};

// Each phase reads what another rank wrote in the phase before.
void test_pool() {
  for (int threads = 1; threads <= 5; ++threads) {
    for (int call = 0; call < 20; ++call) {
      std::vector<int> value(static_cast<std::size_t>(threads), 0);
      run_team(threads, [&](Team& team, int rank) {
        const auto own = static_cast<std::size_t>(rank), next = static_cast<std::size_t>((rank + 1) % team.size());
        for (int phase = 0; phase < 50; ++phase) {
          const int seen = value[next];
          team.barrier();
          value[own] = seen + 1;
          team.barrier();
        }
      });
      for (const int v : value) expect(v == 50, "phases in order");
    }
  }
}

std::vector<std::uint8_t> random_source(const FormatInfo& format, std::int64_t rows, std::int64_t columns) {
  std::vector<std::uint8_t> source(static_cast<std::size_t>(rows * columns / format.unit * format.unit_bytes));
  for (std::uint8_t& byte : source) byte = static_cast<std::uint8_t>(random_bits());
  const std::size_t unit = static_cast<std::size_t>(format.unit_bytes);
  for (std::size_t at = 0; at < source.size(); at += unit) {  // small scales: no infinity, no NaN
    if (format.format == Format::kF32) source[at + 3] = 0x3c;
    if (format.format == Format::kF16 || format.format == Format::kBF16) source[at + 1] = 0x2c;
    if (format.scales == Scales::kQ6K) source[at + 209] = 0x1c;
    if (format.scales == Scales::kFloatZero) source[at + 3] = 0x3c;
    if (format.scales != Scales::kNone && format.scales != Scales::kQ6K) source[at + 1] = 0x1c;
    if (format.scales == Scales::kHalfMin || format.scales == Scales::kK) source[at + 3] = 0x1c;
  }
  return source;
}

// What the products of `format` see of activations: one build rounds them for bfloat16 weights.
std::vector<float> seen_activations(const FormatInfo& format, std::vector<float> x) {
  if (format.format != Format::kBF16 || std::strcmp(FJ_TESTED.isa, "avx512_bf16") != 0) return x;
  for (float& v : x) v = bf16_to_float(float_to_bf16(v));
  return x;
}

std::vector<float> product(const Kernels& kernels, const Linear& w, const std::vector<float>& x, std::int64_t tokens, int terms, int threads) {
  std::vector<float> out(static_cast<std::size_t>(tokens * w.rows()));
  const Aligned scratch(kernels.linear_scratch_bytes(w, terms, tokens, threads));
  run_team(threads, [&](Team& team, int rank) { kernels.linear(w, terms, x.data(), tokens, out.data(), scratch.data, team, rank); });
  return out;
}

// Against float64; a token alone against the batch; and, where there is a twin, against its bits.
void test_linear(Format which, std::int64_t rows, std::int64_t units, std::int64_t tokens, int threads) {
  const FormatInfo& format = format_info(which);
  const std::int64_t columns = units * format.unit;
  const PackedLayout layout = packed_layout(format, rows, columns);
  const std::vector<std::uint8_t> source = random_source(format, rows, columns);
  const Aligned packed(layout.bytes());
  pack_rows(format, source.data(), rows, columns, 0, layout.row_blocks, packed.data);
  const std::vector<float> x = random_floats(tokens * columns);
  std::vector<float> row(static_cast<std::size_t>(columns));
  Linear w;
  w.parts.push_back({packed.data, &format, rows, columns, layout});
  const std::vector<float> out = product(FJ_TESTED, w, x, tokens, 2, threads), seen = seen_activations(format, x);
  for (std::int64_t r = 0; r < rows; ++r) {
    unpack_row(format, packed.data, rows, columns, r, row.data());
    for (std::int64_t t = 0; t < tokens; ++t) {
      double exact = 0, size = 0;
      for (std::int64_t k = 0; k < columns; ++k) {
        const double term = static_cast<double>(row[static_cast<std::size_t>(k)]) * static_cast<double>(seen[static_cast<std::size_t>(t * columns + k)]);
        exact += term;
        size += std::abs(term);
      }
      const double limit = (w.parts[0].is_quantized() ? 1e-4 : 1e-6) * size + 1e-12;
      expect(std::abs(exact - static_cast<double>(out[static_cast<std::size_t>(t * rows + r)])) <= limit, format.name.data());
    }
  }
  const std::vector<float> last(x.end() - columns, x.end());
  for (const int terms : {1, 2}) {
    const std::vector<float> alone = product(FJ_TESTED, w, last, 1, terms, 1), among = product(FJ_TESTED, w, x, tokens, terms, threads);
    expect(std::memcmp(alone.data(), among.data() + (tokens - 1) * rows, static_cast<std::size_t>(rows) * 4) == 0, "the same bits alone");
  }
  std::vector<float> bad = x;
  bad[static_cast<std::size_t>(columns / 2)] = NAN;
  const std::vector<float> spoilt = product(FJ_TESTED, w, bad, tokens, 2, threads);
  for (std::int64_t r = 0; r < rows; ++r) expect(std::isnan(spoilt[static_cast<std::size_t>(r)]), "NaN is kept");
  expect(tokens == 1 || std::equal(out.begin() + rows, out.end(), spoilt.begin() + rows), "and stays in its token");
#ifdef FJ_TWIN
  if (seen != x) return;  // other arithmetic
  for (const int terms : {1, 2}) {
    expect(product(FJ_TESTED, w, x, tokens, terms, threads) == product(FJ_TWIN, w, x, tokens, terms, threads), "the twin's bits");
  }
#endif
}

// Sequences of a step, block tables in no order, and the slots of the step's tokens.
struct Batch {
  std::vector<std::int64_t> query_start{0}, context_lens, tables, slots;
  std::int64_t max_blocks, num_blocks, block_size;

  Batch(const std::vector<std::int64_t>& contexts, const std::vector<std::int64_t>& counts, std::int64_t size, std::int64_t longest)
      : context_lens(contexts), max_blocks((longest + size - 1) / size), block_size(size) {
    num_blocks = max_blocks * static_cast<std::int64_t>(contexts.size());
    for (std::int64_t i = 0; i < num_blocks; ++i) tables.push_back(num_blocks - 1 - i);
    for (std::size_t s = 0; s < contexts.size(); ++s) {
      query_start.push_back(query_start.back() + counts[s]);
      for (std::int64_t p = contexts[s] - counts[s]; p < contexts[s]; ++p) slots.push_back(slot(s, p));
    }
  }
  std::int64_t block(std::size_t s, std::int64_t position) const {
    return tables[s * static_cast<std::size_t>(max_blocks) + static_cast<std::size_t>(position / block_size)];
  }
  std::int64_t slot(std::size_t s, std::int64_t position) const { return block(s, position) * block_size + position % block_size; }
  std::int64_t num_tokens() const { return query_start.back(); }
  Sequences sequences() const {
    return {static_cast<std::int64_t>(context_lens.size()), query_start.data(), context_lens.data(), tables.data(), max_blocks};
  }
};

// A cache of NaN: all bits set, in each format and in the int8 codes' scales.
struct CacheMemory {
  std::vector<std::uint8_t> bytes;
  KvCache cache;

  CacheMemory(KvFormat format, std::int64_t layers, std::int64_t num_blocks, std::int64_t block_size, std::int64_t num_kv_heads, std::int64_t head_dim)
      : cache{nullptr, format, num_blocks, block_size, num_kv_heads, head_dim} {
    bytes.assign(static_cast<std::size_t>(2 * layers * num_blocks * num_kv_heads * cache.head_bytes()), 0xff);
    cache.data = bytes.data();
  }

  // Writes a random number, element `d` of a token's key or value, and returns what was stored of it.
  double put(int side, std::int64_t block, std::int64_t head, std::int64_t offset, std::int64_t d) const {
    std::uint8_t* base = cache.head(0, side, block, head);
    std::uint8_t* at = base + cache.element_bytes() * (side == 0 ? d * cache.block_size + offset : offset * cache.head_dim + d);
    const float value = random_float(), scale = 0.001f * static_cast<float>(offset % 8 + 1);
    const std::uint16_t half = cache.format == KvFormat::kF16 ? float_to_half(value) : float_to_bf16(value);
    switch (cache.format) {
      case KvFormat::kF32: std::memcpy(at, &value, 4); return static_cast<double>(value);
      case KvFormat::kF16: std::memcpy(at, &half, 2); return static_cast<double>(half_to_float(half));
      case KvFormat::kBF16: std::memcpy(at, &half, 2); return static_cast<double>(bf16_to_float(half));
      default:
        *at = static_cast<std::uint8_t>(random_bits());
        std::memcpy(cache.scale(base, offset), &scale, 4);
        return static_cast<double>(scale) * static_cast<std::int8_t>(*at);
    }
  }
};

// Fills the caches of a batch's sequences. Returns what they hold, [side][sequence][position, KV head, dim].
std::vector<std::vector<std::vector<double>>> fill(const CacheMemory& memory, const Batch& batch) {
  const KvCache& cache = memory.cache;
  std::vector<std::vector<std::vector<double>>> stored(2, std::vector<std::vector<double>>(batch.context_lens.size()));
  for (int side = 0; side < 2; ++side) {
    for (std::size_t s = 0; s < batch.context_lens.size(); ++s) {
      for (std::int64_t p = 0; p < batch.context_lens[s]; ++p) {
        for (std::int64_t i = 0; i < cache.num_kv_heads * cache.head_dim; ++i) {
          stored[static_cast<std::size_t>(side)][s].push_back(memory.put(side, batch.block(s, p), i / cache.head_dim, p % cache.block_size, i % cache.head_dim));
        }
      }
    }
  }
  return stored;
}

// Softmax attention of one query; the first key and value, and numbers from one position to the next.
std::vector<double> attend_exactly(const float* query, float scale, const double* keys, const double* values, std::int64_t seen, std::int64_t stride, std::int64_t dim) {
  std::vector<double> out(static_cast<std::size_t>(dim), 0.0);
  double total = 0;
  for (std::int64_t p = 0; p < seen; ++p) {
    double score = 0;
    for (std::int64_t d = 0; d < dim; ++d) score += static_cast<double>(query[d]) * keys[p * stride + d];
    const double weight = std::exp(score * static_cast<double>(scale));
    total += weight;
    for (std::int64_t d = 0; d < dim; ++d) out[static_cast<std::size_t>(d)] += weight * values[p * stride + d];
  }
  for (double& v : out) v /= total;
  return out;
}

void test_attention(KvFormat format, AttentionShape shape, std::int64_t block_size, int threads) {
  const Batch batch({1, 18, 531}, {1, 7, 3}, block_size, 531);
  const std::int64_t dim = shape.head_dim, width = shape.num_heads * dim;
  const CacheMemory memory(format, 1, batch.num_blocks, block_size, shape.num_kv_heads, dim);
  const auto stored = fill(memory, batch);
  const std::vector<float> query = random_floats(batch.num_tokens() * width);
  std::vector<float> out(query.size());
  const Aligned scratch(FJ_TESTED.attention_scratch_bytes(shape, 531, threads));
  run_team(threads, [&](Team& team, int rank) {
    FJ_TESTED.attention(shape, query.data(), width, memory.cache, 0, batch.sequences(), out.data(), scratch.data, team, rank);
  });
  for (std::size_t s = 0; s < 3; ++s) {
    for (std::int64_t t = batch.query_start[s]; t < batch.query_start[s + 1]; ++t) {
      const std::int64_t seen = batch.context_lens[s] - (batch.query_start[s + 1] - 1 - t);
      for (std::int64_t h = 0; h < shape.num_heads; ++h) {
        const std::int64_t at = t * width + h * dim, head = h / (shape.num_heads / shape.num_kv_heads) * dim;
        const std::vector<double> exact =
            attend_exactly(query.data() + at, shape.scale, stored[0][s].data() + head, stored[1][s].data() + head, seen, shape.num_kv_heads * dim, dim);
        for (std::int64_t d = 0; d < dim; ++d) {
          expect(std::abs(exact[static_cast<std::size_t>(d)] - static_cast<double>(out[static_cast<std::size_t>(at + d)])) <= 2e-5, "attention");
        }
      }
    }
  }
}

// Random weights that live as long as it does.
struct RandomWeights {
  std::deque<Aligned> packed;
  std::deque<std::vector<float>> floats;

  const float* random(std::int64_t count) { return floats.emplace_back(random_floats(count)).data(); }
  Linear biased(Format format, std::int64_t rows, std::int64_t columns) {
    Linear w = linear({{format, rows}}, columns);
    w.bias = random(rows);
    return w;
  }
  Linear linear(std::vector<std::pair<Format, std::int64_t>> parts, std::int64_t columns) {
    Linear w;
    for (const auto& [which, rows] : parts) {
      const FormatInfo& format = format_info(which);
      const PackedLayout layout = packed_layout(format, rows, columns);
      const Aligned& memory = packed.emplace_back(layout.bytes());
      pack_rows(format, random_source(format, rows, columns).data(), rows, columns, 0, layout.row_blocks, memory.data);
      w.parts.push_back({memory.data, &format, rows, columns, layout});
    }
    return w;
  }
};

// Two layers of random weights in several formats.
struct SmallDecoder : RandomWeights {
  Decoder model{};

  explicit SmallDecoder(std::int64_t head_dim) {
    const std::int64_t half = head_dim / 2, turned = half / 3;
    const Matrix embed = linear({{Format::kQ4_1, 37}}, 64).parts[0];
    const float *cos = random(310 * half), *sin = random(310 * half);
    model = {64, 96, 6, 2, head_dim, 1e-6f, 2, {}, random(64), linear({{Format::kF32, 37}}, 64), embed, cos, sin, 310, {turned, turned, half - 2 * turned}};
    const std::int64_t heads = 6 * head_dim, kv = 2 * head_dim;
    for (int i = 0; i < 2; ++i) {
      Linear qkv = linear({{Format::kQ8_0, heads}, {Format::kQ8_0, kv}, {Format::kQ4_0, kv}}, 64);
      qkv.bias = random(qkv.rows());
      model.layers.push_back({random(64), qkv, linear({{Format::kBF16, 64}}, heads), random(64), linear({{Format::kQ5_1, 96}}, 64),
                              linear({{Format::kQ8_0, 96}}, 64), linear({{Format::kQ4_1, 64}}, 96)});
    }
  }
};

// Three layers of plain weights, attention in windows and over frames.
struct SmallTower : RandomWeights {
  VisionTower model{};

  explicit SmallTower(Format format) {
    const std::int64_t hidden = 40, inner = 52;
    model = {hidden, inner, 2, 4, 1e-6f, linear({{format, hidden}}, 27), {}, {false, true, false}, random(hidden), biased(format, 160, 160), biased(format, 24, 160)};
    for (int i = 0; i < 3; ++i) {
      model.layers.push_back({random(hidden), biased(format, 3 * hidden, hidden), biased(format, hidden, hidden), random(hidden),
                              biased(format, inner, hidden), biased(format, inner, hidden), biased(format, hidden, inner)});
    }
  }
};

// Two layers of an audio tower.
struct SmallEar : RandomWeights {
  AudioTower model{};

  explicit SmallEar(Format format) {
    const std::int64_t hidden = 40, inner = 52;
    model = {hidden, 2, 1e-5f, {}};
    for (int i = 0; i < 2; ++i) {
      model.layers.push_back({norm(hidden), biased(format, 3 * hidden, hidden), biased(format, hidden, hidden), norm(hidden),
                              biased(format, inner, hidden), biased(format, hidden, inner)});
    }
  }
  LayerNorm norm(std::int64_t size) {
    const float* weight = random(size);
    return {weight, random(size)};
  }
};

// Logits of every token of a ragged prefill, then of a token more for each sequence.
std::vector<float> run_decoder(const Decoder& model, KvFormat format, std::int64_t block_size, int threads, std::uint32_t seed) {
  const std::vector<std::int64_t> lens{5, 1, 20, 300};
  const Batch first(lens, lens, block_size, 301), last({6, 2, 21, 301}, {1, 1, 1, 1}, block_size, 301);
  const CacheMemory memory(format, 2, last.num_blocks, block_size, model.num_kv_heads, model.head_dim);
  random_bits.seed(seed);
  std::vector<float> all;
  for (const Batch* batch : {&first, &last}) {
    const std::int64_t n = batch->num_tokens();
    std::vector<std::int64_t> ids, positions, rows;
    const std::vector<float> media = random_floats(3 * model.hidden);
    for (std::int64_t i = 0; i < n; ++i) ids.push_back(static_cast<std::int64_t>(random_bits() % (37 + 3)));
    for (std::int64_t i = 0; i < 3 * n; ++i) positions.push_back(static_cast<std::int64_t>(random_bits() % 310));
    for (std::int64_t i = 0; i < n; ++i) rows.push_back(i);
    const std::unique_ptr<bool[]> finite(new bool[static_cast<std::size_t>(n)]);
    std::fill_n(finite.get(), n, true);
    std::vector<float> logits(static_cast<std::size_t>(n * model.head.rows()));
    const Step step{n,    ids.data(), positions.data(), batch->slots.data(), media.data(), batch->sequences(), memory.cache,
                    n, rows.data(), logits.data(), finite.get()};
    const Aligned scratch(FJ_TESTED.decoder_scratch_bytes(model, n, *std::max_element(batch->context_lens.begin(), batch->context_lens.end()), threads));
    run_team(threads, [&](Team& team, int rank) { FJ_TESTED.decoder(model, step, scratch.data, team, rank); });
    for (std::int64_t i = 0; i < n; ++i) expect(finite[static_cast<std::size_t>(i)], "rows told finite");
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return all;
}

void test_decoder(KvFormat format, std::int64_t head_dim, std::int64_t block_size) {
  const SmallDecoder decoder(head_dim);
  const auto seed = static_cast<std::uint32_t>(random_bits());
  const std::vector<float> one = run_decoder(decoder.model, format, block_size, 1, seed);
  for (const float v : one) expect(std::isfinite(v), "finite logits");
  for (const int threads : {2, 3}) {
    expect(run_decoder(decoder.model, format, block_size, threads, seed) == one, "the same logits on any number of threads");
  }
}

// A pass over media of the given windows and frames.
std::vector<float> run_tower(const VisionTower& model, const std::vector<float>& patches, const std::vector<float>& angles,
                             const std::vector<std::int64_t>& windows, const std::vector<std::int64_t>& frames, int threads) {
  const std::int64_t n = frames.back();
  auto segments = [](const std::vector<std::int64_t>& start) { return Segments{static_cast<std::int64_t>(start.size()) - 1, start.data()}; };
  std::vector<float> out(static_cast<std::size_t>(n / model.merge * model.merge_out.rows()));
  const VisionStep step{n, patches.data(), angles.data(), angles.data(), segments(windows), segments(frames), out.data()};
  const Aligned scratch(FJ_TESTED.vision_scratch_bytes(model, step, threads));
  run_team(threads, [&](Team& team, int rank) { FJ_TESTED.vision(model, step, scratch.data, team, rank); });
  return out;
}

// The same bits on any number of threads, and for a medium alone and before another.
void test_vision(Format format) {
  const SmallTower tower(format);
  const std::vector<std::int64_t> windows{0, 16, 20, 36, 300, 304}, frames{0, 36, 304};
  const std::vector<float> patches = random_floats(304 * 27), angles = random_floats(304 * 10);
  const std::vector<float> both = run_tower(tower.model, patches, angles, windows, frames, 1);
  for (const float v : both) expect(std::isfinite(v), "finite embeddings");
  for (const int threads : {2, 3}) expect(run_tower(tower.model, patches, angles, windows, frames, threads) == both, "the same embeddings on any number of threads");
  const std::vector<float> first(patches.begin(), patches.begin() + 36 * 27);
  const std::vector<float> alone = run_tower(tower.model, first, angles, {0, 16, 20, 36}, {0, 36}, 2);
  expect(std::equal(alone.begin(), alone.end(), both.begin()), "the same embeddings alone");
}

std::vector<float> run_ear(const AudioTower& model, std::vector<float> hidden, const std::vector<std::int64_t>& windows, int threads) {
  const AudioStep step{windows.back(), {static_cast<std::int64_t>(windows.size()) - 1, windows.data()}, hidden.data()};
  const Aligned scratch(FJ_TESTED.audio_scratch_bytes(model, step, threads));
  run_team(threads, [&](Team& team, int rank) { FJ_TESTED.audio(model, step, scratch.data, team, rank); });
  return hidden;
}

// The same bits on any number of threads, and for a recording alone and before another.
void test_audio(Format format) {
  const SmallEar ear(format);
  const std::vector<std::int64_t> windows{0, 100, 133, 134, 234};
  const std::vector<float> hidden = random_floats(234 * 40);
  const std::vector<float> both = run_ear(ear.model, hidden, windows, 1);
  for (const float v : both) expect(std::isfinite(v), "finite hidden states");
  for (const int threads : {2, 3}) expect(run_ear(ear.model, hidden, windows, threads) == both, "the same hidden states on any number of threads");
  const std::vector<float> alone = run_ear(ear.model, {hidden.begin(), hidden.begin() + 133 * 40}, {0, 100, 133}, 2);
  expect(std::equal(alone.begin(), alone.end(), both.begin()), "the same hidden states alone");
}

void test_draws() {
  for (const std::int64_t size : {1, 15, 16, 257, 1000}) {
    std::vector<float> row(static_cast<std::size_t>(size));
    for (float& v : row) v = static_cast<float>(random_bits() % 1000) / 100.0f;
    const std::int64_t banned = 0;
    for (const Draw& draw : {Draw{0, 0, 1, 0, 0}, Draw{0, 1, 1, 0, 0.99}, Draw{3, 1, 0.5, 0.1, 0.5}, Draw{0, 0.1, 0.9, 0, 0.999}}) {
      const std::int64_t id = FJ_TESTED.draw_token(row.data(), size, {&banned, size > 1 ? 1 : 0}, draw);
      expect(id >= (size > 1 ? 1 : 0) && id < size, "a drawn id");
    }
  }
}

}  // namespace

int main() {
  test_pool();
  for (int f = static_cast<int>(Format::kF32); f <= static_cast<int>(Format::kZ8_32); ++f) {
    const auto format = static_cast<Format>(f);
    const bool is_dense = format_info(format).scales == Scales::kNone;
    for (const std::int64_t tokens : {1, 5, 9, 13, 25, 61}) {
      const std::int64_t units = is_dense ? 11 * tokens + (tokens == 9) : 1 + tokens % 3;  // up to 671 columns
      test_linear(format, 37, units, tokens, 1 + static_cast<int>(tokens % 3));
    }
  }
  for (const KvFormat format : {KvFormat::kF32, KvFormat::kF16, KvFormat::kBF16, KvFormat::kInt8}) {
    test_attention(format, {6, 2, 32, 0.2f}, 16, 1);
    test_attention(format, {14, 1, 16, 0.25f}, 48, 3);
    test_attention(format, {3, 3, 19, 0.25f}, 7, 2);
    test_decoder(format, 16, 16);
    test_decoder(format, 20, 5);
  }
  for (const Format format : {Format::kF32, Format::kF16, Format::kBF16}) {
    test_vision(format);
    test_audio(format);
  }
  test_draws();
  std::puts("ok");
}
