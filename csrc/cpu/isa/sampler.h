// One token from a row of logits: greedy, or by inverse transform sampling from what top-k, top-p and min-p keep.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "elementwise.h"

namespace flexjudge::FJ_ISA {

constexpr std::int64_t kDrawBlock = 256;  // weights whose sum is kept, so that a draw looks into one block only

// A row's weights e^((logit - largest) / temperature), 0 for what is banned, and their sums by block.
class Weights {
 public:
  Weights(const float* row, std::int64_t size, const Banned& banned)
      : values_(static_cast<std::size_t>((size + 15) / 16 * 16), -INFINITY) {
    std::copy_n(row, size, values_.data());
    for (std::int64_t i = 0; i < banned.count; ++i) values_[static_cast<std::size_t>(banned.ids[i])] = -INFINITY;
    F largest = set1(-INFINITY);
    for (std::int64_t i = 0; i < padded(); i += 16) largest = max(load(at(i)), largest);
    largest_ = max_lane(largest);
  }

  std::int64_t likeliest() const { return std::find(values_.begin(), values_.end(), largest_) - values_.begin(); }

  void exponentiate(double temperature) {
    const F largest = set1(largest_), inverse = set1(static_cast<float>(1.0 / temperature));
    for (std::int64_t begin = 0; begin < padded(); begin += kDrawBlock) {
      F block = zero();
      for (std::int64_t i = begin; i < std::min(begin + kDrawBlock, padded()); i += 16) {
        const F weight = exp(mul(sub(load(at(i)), largest), inverse));
        store(at(i), weight);
        block = add(block, weight);
      }
      sums_.push_back(static_cast<double>(sum(block)));
      total_ += sums_.back();
    }
  }

  double total() const { return total_; }
  const std::vector<float>& values() const { return values_; }

  // The first token at which the running sum, in order of ids, exceeds `uniform` times the total.
  std::int64_t pick(double uniform) const {
    double before = 0;
    std::int64_t block = 0, last = 0;
    const double target = uniform * total_;
    while (block + 1 < static_cast<std::int64_t>(sums_.size()) && before + sums_[static_cast<std::size_t>(block)] <= target) {
      before += sums_[static_cast<std::size_t>(block++)];
    }
    for (std::int64_t i = block * kDrawBlock; i < std::min((block + 1) * kDrawBlock, padded()); ++i) {
      const float weight = values_[static_cast<std::size_t>(i)];
      if (weight == 0.0f) continue;
      last = i;
      before += static_cast<double>(weight);
      if (before > target) break;
    }
    return last;
  }

 private:
  std::int64_t padded() const { return static_cast<std::int64_t>(values_.size()); }
  float* at(std::int64_t i) { return values_.data() + i; }

  std::vector<float> values_;
  std::vector<double> sums_;
  float largest_;
  double total_ = 0;
};

struct Candidate {
  float weight;
  std::int64_t id;
};

// The likeliest tokens, likeliest first, that hold everything `draw` can keep. Weights are counted by their upper
// bits, so that only those near the top are ever sorted.
inline std::vector<Candidate> likeliest_first(const Weights& weights, const Draw& draw) {
  constexpr int kShift = 19;  // sign, exponent, four bits of the fraction
  struct Bucket {
    double mass = 0;
    std::int64_t count = 0;
  };
  std::vector<Bucket> buckets((std::bit_cast<std::uint32_t>(1.0f) >> kShift) + 1);
  for (const float w : weights.values()) {
    Bucket& bucket = buckets[std::bit_cast<std::uint32_t>(w) >> kShift];
    bucket.mass += static_cast<double>(w);
    ++bucket.count;
  }
  std::size_t lowest = buckets.size();
  Bucket above;
  const bool by_count = draw.top_k > 0;
  do {
    --lowest;
    above.mass += buckets[lowest].mass;
    above.count += buckets[lowest].count;
  } while (lowest > 0 && (by_count ? above.count < draw.top_k : above.mass <= draw.top_p * weights.total()));
  const float limit = std::bit_cast<float>(static_cast<std::uint32_t>(lowest) << kShift);
  std::vector<Candidate> found;
  found.reserve(static_cast<std::size_t>(above.count));
  for (std::size_t i = 0; i < weights.values().size(); ++i) {
    const float w = weights.values()[i];
    if (w >= limit && w > 0.0f) found.push_back({w, static_cast<std::int64_t>(i)});
  }
  std::stable_sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) { return a.weight > b.weight; });
  return found;
}

inline double mass(const std::vector<Candidate>& candidates) {
  double total = 0;
  for (const Candidate& c : candidates) total += static_cast<double>(c.weight);
  return total;
}

// top-k, then top-p over what is left, then min-p; `found` is sorted.
inline void truncate(std::vector<Candidate>& found, double total, const Draw& draw) {
  if (draw.top_k > 0) {
    found.resize(std::min(found.size(), static_cast<std::size_t>(draw.top_k)));
    total = mass(found);
  }
  std::size_t kept = 0;
  for (double before = 0; kept < found.size() && (draw.top_p >= 1 || before < draw.top_p * total); ++kept) {
    if (static_cast<double>(found[kept].weight) < draw.min_p) break;  // the largest weight is 1
    before += static_cast<double>(found[kept].weight);
  }
  found.resize(std::max<std::size_t>(kept, 1));
}

// `row`: `size` finite logits.
inline std::int64_t draw_token(const float* row, std::int64_t size, const Banned& banned, const Draw& draw) {
  Weights weights(row, size, banned);
  if (draw.temperature == 0) return weights.likeliest();
  weights.exponentiate(draw.temperature);
  if (draw.top_k == 0 && draw.top_p >= 1 && draw.min_p == 0) return weights.pick(draw.uniform);
  std::vector<Candidate> found = likeliest_first(weights, draw);
  truncate(found, weights.total(), draw);
  const double target = draw.uniform * mass(found);
  double before = 0;
  for (const Candidate& c : found) {
    before += static_cast<double>(c.weight);
    if (before > target) return c.id;
  }
  return found.back().id;
}

}  // namespace flexjudge::FJ_ISA
