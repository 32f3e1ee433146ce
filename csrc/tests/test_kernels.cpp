// The thread pool, packed products and draws by themselves, for the sanitizers: every buffer is exactly as large as
// the interface asks for.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "flexjudge/decoder.h"

namespace flexjudge {
extern const Kernels kernels_scalar;
}

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

void test_linear(Format which, std::int64_t rows, std::int64_t units, std::int64_t tokens, int threads) {
  const FormatInfo& format = format_info(which);
  const std::int64_t columns = units * format.unit;
  const PackedLayout layout = packed_layout(format, rows, columns);
  const std::vector<std::uint8_t> source = random_source(format, rows, columns);
  const Aligned packed(layout.bytes());
  pack_rows(format, source.data(), rows, columns, 0, layout.row_blocks, packed.data);
  std::vector<float> x(static_cast<std::size_t>(tokens * columns)), out(static_cast<std::size_t>(tokens * rows)), row(static_cast<std::size_t>(columns));
  for (float& v : x) v = static_cast<float>(random_bits() % 2001) / 1000.0f - 1.0f;
  Linear w;
  w.parts.push_back({packed.data, &format, rows, columns, layout});
  const Aligned scratch(kernels_scalar.linear_scratch_bytes(w, 2, tokens, threads));
  run_team(threads, [&](Team& team, int rank) { kernels_scalar.linear(w, 2, x.data(), tokens, out.data(), scratch.data, team, rank); });
  for (std::int64_t r = 0; r < rows; ++r) {
    unpack_row(format, packed.data, rows, columns, r, row.data());
    for (std::int64_t t = 0; t < tokens; ++t) {
      double exact = 0, size = 0;
      for (std::int64_t k = 0; k < columns; ++k) {
        const double product = static_cast<double>(row[static_cast<std::size_t>(k)]) * static_cast<double>(x[static_cast<std::size_t>(t * columns + k)]);
        exact += product;
        size += std::abs(product);
      }
      expect(std::abs(exact - static_cast<double>(out[static_cast<std::size_t>(t * rows + r)])) <= 1e-4 * size + 1e-12, format.name.data());
    }
  }
}

void test_draws() {
  for (const std::int64_t size : {1, 15, 16, 257, 1000}) {
    std::vector<float> row(static_cast<std::size_t>(size));
    for (float& v : row) v = static_cast<float>(random_bits() % 1000) / 100.0f;
    expect(kernels_scalar.all_finite(row.data(), size), "finite");
    const std::int64_t banned = 0;
    for (const Draw& draw : {Draw{0, 0, 1, 0, 0}, Draw{0, 1, 1, 0, 0.99}, Draw{3, 1, 0.5, 0.1, 0.5}, Draw{0, 0.1, 0.9, 0, 0.999}}) {
      const std::int64_t id = kernels_scalar.draw_token(row.data(), size, {&banned, size > 1 ? 1 : 0}, draw);
      expect(id >= (size > 1 ? 1 : 0) && id < size, "a drawn id");
    }
    row.back() = NAN;
    expect(!kernels_scalar.all_finite(row.data(), size), "not finite");
  }
}

}  // namespace

int main() {
  test_pool();
  for (int f = static_cast<int>(Format::kF32); f <= static_cast<int>(Format::kI8_32); ++f) {
    for (const std::int64_t tokens : {1, 5, 9, 13, 25, 61}) test_linear(static_cast<Format>(f), 37, 1 + tokens % 3, tokens, 1 + static_cast<int>(tokens % 3));
  }
  test_draws();
  std::puts("ok");
}
