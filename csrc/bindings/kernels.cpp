// The CPU kernels as torch ops: shapes and types are checked here, the work is done in csrc/cpu.
#include <tuple>

#include "common.h"

namespace {

using namespace flexjudge::bindings;
using flexjudge::Format;
using flexjudge::Kernels;

// Calls `work(i)` for i below `count`, spread over the threads.
template <class Work>
void for_each(int64_t count, int64_t threads, Work work) {
  flexjudge::run_team(static_cast<int>(std::min(count, threads)), [&](flexjudge::Team& team, int rank) {
    const flexjudge::Share share(count, rank, team.size());
    for (int64_t i = share.begin; i < share.end; ++i) work(i);
  });
}

int64_t packed_bytes(const std::string& format_name, int64_t rows, int64_t columns) {
  return flexjudge::packed_layout(format_of(format_name), rows, columns).bytes();
}

// source: contiguous rows of whole units; packed: uint8 [packed_bytes].
void pack(const Tensor& source, const std::string& format_name, int64_t rows, int64_t columns, Tensor packed, int64_t threads) {
  const auto& format = format_of(format_name);
  check(source.is_contiguous() && columns % format.unit == 0, "pack: whole units in contiguous rows are needed");
  const int64_t bytes = source.numel() * static_cast<int64_t>(source.element_size());
  check(bytes == rows * (columns / format.unit) * format.unit_bytes, "pack: the source's size does not match the shape");
  const auto layout = flexjudge::packed_layout(format, rows, columns);
  check(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == layout.bytes(), "pack: wrong output size");
  const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
  for_each(layout.row_blocks, threads, [&](int64_t i) { flexjudge::pack_rows(format, from, rows, columns, i, i + 1, data<uint8_t>(packed)); });
}

// ids: int64 [n]. Returns float32 [n, columns].
Tensor unpack(const Tensor& packed, const std::string& format_name, int64_t rows, int64_t columns, const Tensor& ids) {
  const auto& format = format_of(format_name);
  check(packed.numel() == flexjudge::packed_layout(format, rows, columns).bytes(), "unpack: wrong size");
  check(ids.scalar_type() == ScalarType::Long && ids.is_contiguous(), "unpack: ids must be contiguous int64");
  Tensor out = new_tensor<2>(packed, {ids.numel(), columns}, ScalarType::Float);
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < ids.numel(); ++i) {
    check(id[i] >= 0 && id[i] < rows, "unpack: an id is out of range");
    flexjudge::unpack_row(format, static_cast<const uint8_t*>(packed.const_data_ptr()), rows, columns, id[i], data<float>(out) + i * columns);
  }
  return out;
}

// x: float32 [num_tokens, columns]. Returns float32 [num_tokens, rows].
Tensor packed_linear(const Tensor& x, const Tensor& packed, const std::string& format_name, int64_t rows, int64_t terms, int64_t threads) {
  check(x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.is_contiguous(), "packed_linear: x must be contiguous float32 [num_tokens, columns]");
  check(terms == 1 || terms == 2, "packed_linear: terms must be 1 or 2");
  flexjudge::Linear w;
  w.parts.push_back(matrix(static_cast<const uint8_t*>(packed.const_data_ptr()), format_of(format_name), rows, x.size(1)));
  check(packed.numel() == w.parts[0].layout.bytes(), "packed_linear: the weight's size does not match");
  Tensor out = new_tensor<2>(x, {x.size(0), rows}, ScalarType::Float);
  if (x.size(0) == 0) return out;
  const Kernels& k = kernels();
  const Scratch scratch(x, k.linear_scratch_bytes(w, static_cast<int>(terms), x.size(0), static_cast<int>(threads)));
  flexjudge::run_team(static_cast<int>(threads), [&](flexjudge::Team& team, int rank) {
    k.linear(w, static_cast<int>(terms), static_cast<const float*>(x.const_data_ptr()), x.size(0), data<float>(out), scratch.begin, team, rank);
  });
  return out;
}

flexjudge::KvFormat cache_format(const Tensor& cache) {
  switch (cache.scalar_type()) {
    case ScalarType::Float: return flexjudge::KvFormat::kF32;
    case ScalarType::Half: return flexjudge::KvFormat::kF16;
    case ScalarType::BFloat16: return flexjudge::KvFormat::kBF16;
    case ScalarType::Char: return flexjudge::KvFormat::kInt8;
    default: STD_TORCH_CHECK(false, "the KV cache must be float32, float16, bfloat16 or int8");
  }
}

// cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, row]; inside a block the order is the kernels'. A row
// has head_dim elements, and in int8 four more for the scale.
flexjudge::KvCache kv_cache(const Tensor& cache, int64_t num_kv_heads, int64_t head_dim) {
  check(cache.dim() == 6 && cache.is_contiguous(), "the KV cache must be contiguous with six dimensions");
  const flexjudge::KvCache kv{data<uint8_t>(cache), cache_format(cache), cache.size(2), cache.size(3), num_kv_heads, head_dim};
  check(cache.size(1) == 2 && cache.size(4) == num_kv_heads && cache.size(5) == head_dim + kv.scale_bytes(), "the KV cache does not have the model's heads");
  return kv;
}

flexjudge::Sequences sequences(const Tensor& query_start, const Tensor& context_lens, const Tensor& block_tables) {
  check(query_start.numel() == context_lens.numel() + 1 && block_tables.dim() == 2 && block_tables.size(0) >= context_lens.numel(),
        "query_start, context_lens and block_tables do not agree");
  return {context_lens.numel(), int64s(query_start), int64s(context_lens), int64s(block_tables), block_tables.size(1)};
}

int64_t longest(const flexjudge::Sequences& s) {
  int64_t most = 0;
  for (int64_t i = 0; i < s.count; ++i) most = std::max(most, s.context_lens[i]);
  return most;
}

// query: float32 [num_tokens, num_heads, head_dim]. Returns the same shape.
Tensor packed_attention(const Tensor& query, const Tensor& cache, int64_t layer, const Tensor& block_tables, const Tensor& query_start,
                        const Tensor& context_lens, double scale, int64_t threads) {
  check(query.scalar_type() == ScalarType::Float && query.dim() == 3 && query.is_contiguous(), "query must be contiguous float32 [num_tokens, num_heads, head_dim]");
  const flexjudge::KvCache kv = kv_cache(cache, cache.size(4), query.size(2));
  check(query.size(1) % kv.num_kv_heads == 0 && layer >= 0 && layer < cache.size(0), "query, layer and cache do not agree");
  const flexjudge::AttentionShape shape{query.size(1), kv.num_kv_heads, kv.head_dim, static_cast<float>(scale)};
  const flexjudge::Sequences seqs = sequences(query_start, context_lens, block_tables);
  Tensor out = new_tensor<3>(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
  const Kernels& k = kernels();
  const Scratch scratch(query, k.attention_scratch_bytes(shape, longest(seqs), static_cast<int>(threads)));
  flexjudge::run_team(static_cast<int>(threads), [&](flexjudge::Team& team, int rank) {
    k.attention(shape, static_cast<const float*>(query.const_data_ptr()), query.size(1) * query.size(2), kv, layer, seqs, data<float>(out), scratch.begin, team, rank);
  });
  return out;
}

flexjudge::Decoder read_decoder(const Tensor& plan) {
  PlanReader read(plan);
  flexjudge::Decoder m{};
  m.hidden = read.next();
  m.intermediate = read.next();
  m.num_heads = read.next();
  m.num_kv_heads = read.next();
  m.head_dim = read.next();
  m.eps = read.real();
  m.terms = read.integer();
  m.layers.resize(static_cast<std::size_t>(read.next()));
  for (flexjudge::Layer& layer : m.layers) layer = read.layer();
  m.norm = read.floats();
  m.head = read.linear();
  m.embed = read.matrix();
  m.cos = read.floats();
  m.sin = read.floats();
  m.max_positions = read.next();
  m.rope_sections.resize(static_cast<std::size_t>(read.next()));
  int64_t pairs = 0;
  for (int64_t& section : m.rope_sections) pairs += section = read.next();
  check(2 * pairs == m.head_dim, "decoder: RoPE's sections do not make up a head");
  read.finish();
  return m;
}

// Decoders are held by address: parsed once, freed by `close_decoder`.
int64_t open_decoder(const Tensor& plan) { return reinterpret_cast<int64_t>(new flexjudge::Decoder(read_decoder(plan))); }
void close_decoder(int64_t handle) { delete reinterpret_cast<flexjudge::Decoder*>(handle); }

// Everything that is an index in the kernels.
void check_inputs(const flexjudge::Decoder& model, const flexjudge::Step& step, int64_t num_media) {
  const int64_t n = step.num_tokens, *ids = step.token_ids, *positions = step.positions;
  for (int64_t i = 0; i < n; ++i) check(ids[i] >= 0 && ids[i] < model.embed.rows + num_media, "decoder: a token id is out of range");
  for (int64_t i = 0; i < n * static_cast<int64_t>(model.rope_sections.size()); ++i) {
    check(positions[i] >= 0 && positions[i] < model.max_positions, "decoder: a position is out of range");
  }
  const int64_t num_slots = step.cache.num_blocks * step.cache.block_size;
  for (int64_t i = 0; i < n; ++i) check(step.slots[i] >= 0 && step.slots[i] < num_slots, "decoder: a slot is out of range");
  for (int64_t i = 0; i < step.num_rows; ++i) check(step.logit_rows[i] >= 0 && step.logit_rows[i] < n, "decoder: a logit row is out of range");
  const flexjudge::Sequences& seqs = step.sequences;
  check(seqs.query_start[0] == 0 && seqs.query_start[seqs.count] == n, "decoder: the sequences do not hold all tokens");
  for (int64_t i = 0; i < seqs.count; ++i) {
    const int64_t count = seqs.query_start[i + 1] - seqs.query_start[i], context = seqs.context_lens[i];
    check(count >= 0 && count <= context && context <= seqs.max_blocks * step.cache.block_size, "decoder: a sequence's length is out of range");
    for (int64_t b = 0; b * step.cache.block_size < context; ++b) {
      const int64_t block = seqs.block_tables[i * seqs.max_blocks + b];
      check(block >= 0 && block < step.cache.num_blocks, "decoder: a block is out of range");
    }
  }
}

// One step of a whole decoder; see `ops/decoder.py`. Returns float32 [num_rows, vocab] and bool [num_rows].
std::tuple<Tensor, Tensor> decoder(int64_t handle, const Tensor& token_ids, const Tensor& positions, const Tensor& slots, const Tensor& media,
                                   const Tensor& block_tables, const Tensor& query_start, const Tensor& context_lens, const Tensor& cache, const Tensor& logit_rows,
                                   const Tensor& scratch, int64_t threads) {
  const auto& model = *reinterpret_cast<const flexjudge::Decoder*>(handle);
  const int64_t n = token_ids.numel(), num_rows = logit_rows.numel();
  check(slots.numel() == n && num_rows <= n && positions.numel() == n * static_cast<int64_t>(model.rope_sections.size()),
        "decoder: ids, positions, slots and logit rows do not agree");
  Tensor logits = new_tensor<2>(cache, {num_rows, model.head.rows()}, ScalarType::Float);
  Tensor finite = new_tensor<1>(cache, {num_rows}, ScalarType::Bool);
  std::fill_n(data<bool>(finite), num_rows, true);
  if (n == 0) return {logits, finite};
  const flexjudge::Step step{n,
                             int64s(token_ids),
                             int64s(positions),
                             int64s(slots),
                             static_cast<const float*>(media.const_data_ptr()),
                             sequences(query_start, context_lens, block_tables),
                             kv_cache(cache, model.num_kv_heads, model.head_dim),
                             num_rows,
                             int64s(logit_rows),
                             data<float>(logits),
                             data<bool>(finite)};
  check(cache.size(0) == static_cast<int64_t>(model.layers.size()), "decoder: the KV cache does not have the model's layers");
  check(media.scalar_type() == ScalarType::Float && media.dim() == 2 && media.is_contiguous() && media.size(1) == model.hidden,
        "decoder: media must be contiguous float32 [num_media, hidden]");
  check_inputs(model, step, media.size(0));
  const Kernels& k = kernels();
  check(scratch.numel() >= k.decoder_scratch_bytes(model, n, longest(step.sequences), static_cast<int>(threads)) &&
            reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr()) % 64 == 0,
        "decoder: scratch is too small or not aligned to 64 bytes");
  flexjudge::run_team(static_cast<int>(threads), [&](flexjudge::Team& team, int rank) { k.decoder(model, step, data<uint8_t>(scratch), team, rank); });
  return {logits, finite};
}

int64_t decoder_scratch_bytes(int64_t handle, int64_t num_tokens, int64_t max_context, int64_t threads) {
  const auto& model = *reinterpret_cast<const flexjudge::Decoder*>(handle);
  return kernels().decoder_scratch_bytes(model, num_tokens, max_context, static_cast<int>(threads));
}

void check_logits(const Tensor& logits) {
  check(logits.scalar_type() == ScalarType::Float && logits.dim() == 2 && logits.is_contiguous(), "logits must be contiguous float32 [num_rows, vocab]");
}

// draws: float64 [num_draws, 6], see `ops/sample.py`; banned: int64. Returns int64 [num_draws].
Tensor sample_tokens(const Tensor& logits, const Tensor& draws, const Tensor& banned, int64_t threads) {
  check_logits(logits);
  const int64_t size = logits.size(1), count = draws.size(0);
  check(draws.scalar_type() == ScalarType::Double && draws.is_contiguous() && draws.size(1) == 6, "sample_tokens: draws must be contiguous float64 [num_draws, 6]");
  const flexjudge::Banned no{int64s(banned), banned.numel()};
  for (int64_t i = 0; i < no.count; ++i) check(no.ids[i] >= 0 && no.ids[i] < size, "sample_tokens: a banned id is out of range");
  const auto* numbers = static_cast<const double*>(draws.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) check(numbers[6 * i] >= 0 && numbers[6 * i] < static_cast<double>(logits.size(0)), "sample_tokens: a row is out of range");
  Tensor out = new_tensor<1>(logits, {count}, ScalarType::Long);
  const Kernels& k = kernels();
  const auto* rows = static_cast<const float*>(logits.const_data_ptr());
  for_each(count, threads, [&](int64_t i) {
    const double* d = numbers + 6 * i;
    const auto row = static_cast<int64_t>(d[0]);
    const flexjudge::Draw draw{static_cast<int64_t>(d[1]), d[2], d[3], d[4], d[5]};
    data<int64_t>(out)[i] = k.draw_token(rows + row * size, size, no, draw);
  });
  return out;
}

int64_t format_id(const std::string& name) { return static_cast<int64_t>(format_of(name).format); }

std::string isa() { return kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flexjudge, m) {
  m.def("packed_bytes(str format, int rows, int columns) -> int");
  m.def("pack(Tensor source, str format, int rows, int columns, Tensor(a!) packed, int threads) -> ()");
  m.def("unpack(Tensor packed, str format, int rows, int columns, Tensor ids) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor packed, str format, int rows, int terms, int threads) -> Tensor");
  m.def(
      "packed_attention(Tensor query, Tensor cache, int layer, Tensor block_tables, Tensor query_start, Tensor context_lens, "
      "float scale, int threads) -> Tensor");
  m.def("open_decoder(Tensor plan) -> int");
  m.def("close_decoder(int handle) -> ()");
  m.def(
      "decoder(int handle, Tensor token_ids, Tensor positions, Tensor slots, Tensor media, Tensor block_tables, "
      "Tensor query_start, Tensor context_lens, Tensor(a!) cache, Tensor logit_rows, Tensor(b!) scratch, int threads) -> (Tensor, Tensor)");
  m.def("decoder_scratch_bytes(int handle, int num_tokens, int max_context, int threads) -> int");
  m.def("sample_tokens(Tensor logits, Tensor draws, Tensor banned, int threads) -> Tensor");
  m.def("format_id(str format) -> int");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flexjudge, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("packed_attention", TORCH_BOX(&packed_attention));
  m.impl("decoder", TORCH_BOX(&decoder));
  m.impl("open_decoder", TORCH_BOX(&open_decoder));
  m.impl("sample_tokens", TORCH_BOX(&sample_tokens));
}

STABLE_TORCH_LIBRARY_IMPL(flexjudge, CompositeExplicitAutograd, m) {
  m.impl("close_decoder", TORCH_BOX(&close_decoder));
  m.impl("decoder_scratch_bytes", TORCH_BOX(&decoder_scratch_bytes));
  m.impl("format_id", TORCH_BOX(&format_id));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("packed_bytes", TORCH_BOX(&packed_bytes));
}
