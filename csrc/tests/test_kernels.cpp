// The thread pool, packed products and draws by themselves, for the sanitizers and for emulated instruction sets: every
// buffer is exactly as large as the interface asks for. FJ_TESTED: the table of kernels; FJ_TWIN: one of the same bits.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "flexjudge/decoder.h"
#include "flexjudge/half.h"

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
  std::vector<float> x(static_cast<std::size_t>(tokens * columns)), row(static_cast<std::size_t>(columns));
  for (float& v : x) v = static_cast<float>(random_bits() % 2001) / 1000.0f - 1.0f;
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
  const std::vector<float> last(x.end() - columns, x.end()), alone = product(FJ_TESTED, w, last, 1, 2, 1);
  expect(std::memcmp(alone.data(), out.data() + (tokens - 1) * rows, static_cast<std::size_t>(rows) * 4) == 0, "the same bits alone");
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

void test_draws() {
  for (const std::int64_t size : {1, 15, 16, 257, 1000}) {
    std::vector<float> row(static_cast<std::size_t>(size));
    for (float& v : row) v = static_cast<float>(random_bits() % 1000) / 100.0f;
    expect(FJ_TESTED.all_finite(row.data(), size), "finite");
    const std::int64_t banned = 0;
    for (const Draw& draw : {Draw{0, 0, 1, 0, 0}, Draw{0, 1, 1, 0, 0.99}, Draw{3, 1, 0.5, 0.1, 0.5}, Draw{0, 0.1, 0.9, 0, 0.999}}) {
      const std::int64_t id = FJ_TESTED.draw_token(row.data(), size, {&banned, size > 1 ? 1 : 0}, draw);
      expect(id >= (size > 1 ? 1 : 0) && id < size, "a drawn id");
    }
    row.back() = NAN;
    expect(!FJ_TESTED.all_finite(row.data(), size), "not finite");
  }
}

}  // namespace

int main() {
  test_pool();
  for (int f = static_cast<int>(Format::kF32); f <= static_cast<int>(Format::kI4_128); ++f) {
    const auto format = static_cast<Format>(f);
    const bool is_dense = format_info(format).scales == Scales::kNone;
    for (const std::int64_t tokens : {1, 5, 9, 13, 25, 61}) {
      const std::int64_t units = is_dense ? 11 * tokens + (tokens == 9) : 1 + tokens % 3;  // up to 671 columns
      test_linear(format, 37, units, tokens, 1 + static_cast<int>(tokens % 3));
    }
  }
  test_draws();
  std::puts("ok");
}
