// Stands alone: frames resized and cut on exactly sized heap buffers, so that a sanitizer sees any step outside them.
#include "flexjudge/image.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

using Pixels = std::vector<std::uint8_t>;

void check(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

Pixels random_pixels(std::int64_t bytes, unsigned seed) {
  std::mt19937 random(seed);
  Pixels out(static_cast<std::size_t>(bytes));
  for (auto& byte : out) byte = static_cast<std::uint8_t>(random());
  return out;
}

Pixels resize(const flexjudge::Frames& from, std::int64_t height, std::int64_t width, int threads) {
  Pixels out(static_cast<std::size_t>(from.count * height * width * 3));
  flexjudge::resize_bicubic(from, height, width, threads, out.data());
  return out;
}

// Sides of one pixel, both orders of the passes, many frames; a frame's bits depend on no other and on no thread.
void test_bounds() {
  const std::int64_t sides[] = {1, 2, 3, 7, 11, 40, 97};
  for (const std::int64_t height : sides) {
    for (const std::int64_t width : sides) {
      const Pixels pixels = random_pixels(3 * height * width * 3, 1);
      for (const std::int64_t to : sides) {
        const std::int64_t to_width = sides[static_cast<std::size_t>(height + width + to) % 7];
        const Pixels all = resize({pixels.data(), 3, height, width}, to, to_width, 1);
        check(all == resize({pixels.data(), 3, height, width}, to, to_width, 3), "threads change bits");
        const Pixels last(pixels.end() - height * width * 3, pixels.end());
        const Pixels one = resize({last.data(), 1, height, width}, to, to_width, 1);
        check(one == Pixels(all.end() - to * to_width * 3, all.end()), "frames change each other");
      }
    }
  }
}

// A frame of one colour keeps it, and the same size keeps every byte.
void test_values() {
  const Pixels grey(9 * 5 * 3, 200);
  for (const std::uint8_t byte : resize({grey.data(), 1, 9, 5}, 4, 33, 1)) check(byte == 200, "one colour");
  const Pixels pixels = random_pixels(2 * 6 * 7 * 3, 2);
  check(resize({pixels.data(), 2, 6, 7}, 6, 7, 2) == pixels, "the same size");
  // Half as wide, worked out by hand: weights 111, 111, 29 and -9 of 242, the others lie beyond the edge.
  const Pixels edge = {0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255};
  const Pixels half = resize({edge.data(), 1, 1, 4}, 1, 2, 1);
  check(half[0] == 21 && half[3] == 234, "half as wide: " + std::to_string(half[0]) + ", " + std::to_string(half[3]));
}

void test_patchify() {
  std::vector<float> table(3 * 256);
  for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<float>(i);
  for (const flexjudge::PatchShape shape : {flexjudge::PatchShape{1, 1, 1}, {2, 2, 2}, {3, 1, 3}, {14, 2, 2}}) {
    const std::int64_t height = 2 * shape.patch * shape.merge, width = 3 * shape.patch * shape.merge, count = 3;
    const Pixels pixels = random_pixels(count * height * width * 3, 3);
    const std::int64_t times = (count + shape.temporal - 1) / shape.temporal;
    std::vector<float> one(static_cast<std::size_t>(times * shape.temporal * height * width * 3)), two(one.size());
    flexjudge::patchify({pixels.data(), count, height, width}, table.data(), shape, 1, one.data());
    flexjudge::patchify({pixels.data(), count, height, width}, table.data(), shape, 3, two.data());
    check(one == two, "threads change patches");
    check(one[0] == pixels[0] && one.back() == 512 + pixels.back(), "the first and the last value");
  }
}

}  // namespace

int main() {
  test_bounds();
  test_values();
  test_patchify();
  std::puts("ok");
}
