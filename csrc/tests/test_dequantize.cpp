// Stands alone: blocks expanded and written, every format on exactly sized heap buffers, so that a sanitizer sees any step outside them.
#include "flexjudge/dequantize.h"
#include "flexjudge/quantize.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>

namespace {

void check(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

const flexjudge::BlockFormat& format(const char* name) {
  const flexjudge::BlockFormat* found = flexjudge::find_block_format(name);
  check(found != nullptr, name);
  return *found;
}

// `n` blocks expanded out of one allocation into another, neither a byte too long.
std::unique_ptr<float[]> expand(const flexjudge::BlockFormat& f, const std::uint8_t* bytes, std::int64_t n) {
  std::unique_ptr<std::uint8_t[]> in(new std::uint8_t[n * f.block_bytes]);
  if (n > 0) std::memcpy(in.get(), bytes, n * f.block_bytes);
  std::unique_ptr<float[]> out(new float[n * f.block_size]);
  f.dequantize(in.get(), n, out.get());
  return out;
}

void test_bounds() {
  std::mt19937 random(1);
  for (const char* name : {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "I4_64", "I4_128", "I8_32", "Z4_32",
                           "Z4_64", "Z4_128", "Z8_32"}) {
    const flexjudge::BlockFormat& f = format(name);
    for (std::int64_t n : {0, 1, 2, 3, 17}) {
      std::unique_ptr<std::uint8_t[]> bytes(new std::uint8_t[n * f.block_bytes]);
      for (std::int64_t i = 0; i < n * f.block_bytes; ++i) bytes[i] = static_cast<std::uint8_t>(random());
      const auto all = expand(f, bytes.get(), n);
      for (std::int64_t i = 0; i < n; ++i) {  // a block does not depend on its neighbours
        const auto one = expand(f, bytes.get() + i * f.block_bytes, 1);
        check(std::memcmp(one.get(), all.get() + i * f.block_size, f.block_size * sizeof(float)) == 0, name);
      }
    }
  }
}

// Every half float, read through the scale of a Q8_0 block whose weights are all 1.
void test_half_floats() {
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    std::uint8_t block[34] = {static_cast<std::uint8_t>(h), static_cast<std::uint8_t>(h >> 8)};
    std::memset(block + 2, 1, 32);
    const float got = expand(format("Q8_0"), block, 1)[31];
    const int exponent = h >> 10 & 31;
    const double fraction = h & 1023;
    double want = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) want = fraction == 0 ? INFINITY : NAN;
    if (h & 0x8000) want = -want;
    const bool same = std::isnan(want) ? std::isnan(got) : got == want && std::signbit(got) == std::signbit(want);
    check(same, "half float " + std::to_string(h));
  }
}

// Weights worked out by hand from ggml's layout, with scales of 1 (0x3c00) and 2 (0x4000).
void test_values() {
  std::uint8_t q4[20] = {0x00, 0x3c, 0x00, 0x40};
  q4[4] = 0xf3;  // weight 0 is 3, weight 16 is 15
  const auto q4_1 = expand(format("Q4_1"), q4, 1);
  check(q4_1[0] == 5 && q4_1[16] == 17 && q4_1[1] == 2, "Q4_1 values");

  std::uint8_t q5[22] = {0x00, 0x3c, 0x01, 0x00, 0x01};  // fifth bits of weights 0 and 16
  q5[6] = 0x21;
  const auto q5_0 = expand(format("Q5_0"), q5, 1);
  check(q5_0[0] == 1 && q5_0[16] == 2 && q5_0[1] == -16, "Q5_0 values");

  std::uint8_t q4k[144] = {0x00, 0x3c, 0x00, 0x40};
  q4k[4] = 3, q4k[8] = 1;      // sub-block 0: scale 3, minimum 1
  q4k[4 + 8] = 0x25;           // sub-block 4: scale 5, minimum 2
  q4k[16] = 0x04;              // weight 0 is 4
  q4k[16 + 64] = 0x07;         // weight 128 is 7
  const auto q4_k = expand(format("Q4_K"), q4k, 1);
  check(q4_k[0] == 3 * 4 - 2 * 1 && q4_k[128] == 5 * 7 - 2 * 2, "Q4_K values");

  std::uint8_t z4[21] = {0x00, 0x00, 0x80, 0x3f, 9};  // scale 1 in float32, zero point 9
  z4[5] = 0xf3;
  const auto z4_32 = expand(format("Z4_32"), z4, 1);
  check(z4_32[0] == -6 && z4_32[16] == 6 && z4_32[1] == -9, "Z4_32 values");

  std::uint8_t q6[210] = {};
  q6[208] = 0x00, q6[209] = 0x3c;
  q6[192] = 0xff;              // scale of weights 0 to 15: -1
  q6[0] = 0x05, q6[128] = 0x02;  // weight 0 is 5 + 2 * 16 - 32
  check(expand(format("Q6_K"), q6, 1)[0] == -5, "Q6_K values");
}

// Exactly sized buffers again; a block's error is at most a step.
void test_quantize() {
  std::mt19937 random(2);
  for (const char* name : {"I8_32", "Q4_1", "I4_64", "I4_128"}) {
    const flexjudge::BlockFormat& f = format(name);
    const flexjudge::QuantizeBlocks write = flexjudge::find_quantizer(name);
    check(write != nullptr, name);
    for (std::int64_t n : {0, 1, 7}) {
      std::unique_ptr<float[]> values(new float[n * f.block_size]);
      for (std::int64_t i = 0; i < n * f.block_size; ++i) values[i] = static_cast<float>(random() % 1000) / 1000.0f;
      std::unique_ptr<std::uint8_t[]> blocks(new std::uint8_t[n * f.block_bytes]);
      write(values.get(), n, blocks.get());
      const auto back = expand(f, blocks.get(), n);
      const float step = f.name == "I8_32" ? 1.0f / 255 : 1.0f / 15;
      for (std::int64_t i = 0; i < n * f.block_size; ++i) check(std::abs(back[i] - values[i]) <= 2 * step, name);
    }
  }
  check(flexjudge::find_quantizer("Q4_0") == nullptr, "nothing writes Q4_0");
}

}  // namespace

int main() {
  check(flexjudge::find_block_format("") == nullptr, "an empty name is no format");
  check(flexjudge::find_block_format("Q4_") == nullptr, "a part of a name is no format");
  test_bounds();
  test_half_floats();
  test_values();
  test_quantize();
  std::puts("ok");
}
