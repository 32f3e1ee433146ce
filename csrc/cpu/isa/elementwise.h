// Norm, rotation, activation: the arithmetic between the products. Every sum has one fixed order.
#pragma once

#include <cstdint>

namespace flexjudge::FJ_ISA {

// e^x to about 1e-7 relative; 0 below -87, at most e^88. Cody-Waite reduction, Taylor polynomial of degree 7.
FJ_INLINE F exp(F x) {
  const F clamped = min(set1(88.0f), max(set1(-87.0f), x));  // NaN stays: it is the second operand of both
  const I n = to_int(mul(clamped, set1(1.44269504f)));
  const F whole = to_float(n);
  F r = fma(whole, set1(-0.693145752f), clamped);
  r = fma(whole, set1(-1.42860677e-6f), r);
  F p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return zero_below(x, set1(-87.0f), mul(p, power_of_two(n)));
}

FJ_INLINE float exp1(float x) {
  float out[16];
  store(out, exp(set1(x)));
  return out[0];
}

// silu(gate) * up
FJ_INLINE F swiglu(F gate, F up) {
  return mul(div(gate, add(set1(1.0f), exp(sub(zero(), gate)))), up);
}

// x * Phi(x) (Hendrycks & Gimpel 2016, the exact form); the error function by Abramowitz & Stegun 7.1.26, to 1.5e-7.
FJ_INLINE F gelu(F x) {
  const F z = abs(mul(x, set1(0.707106781f)));
  const F t = div(set1(1.0f), fma(set1(0.3275911f), z, set1(1.0f)));
  F p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = mul(fma(p, t, set1(0.254829592f)), t);
  const F tail = mul(mul(p, exp(sub(zero(), mul(z, z)))), mul(set1(0.5f), abs(x)));  // |x| Phi(-|x|)
  return sub(max(x, zero()), tail);
}

inline void gelu(float* x, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 16) {
    const int width = static_cast<int>(n - i < 16 ? n - i : 16);
    store_n(x + i, gelu(load_n(x + i, width)), width);
  }
}

// out = (x - mean(x)) / std(x) * weight + bias (Ba et al. 2016).
inline void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::int64_t n, float* out) {
  F total = zero(), squares = zero();
  for (std::int64_t i = 0; i < n; i += 16) total = add(total, load_n(x + i, static_cast<int>(n - i < 16 ? n - i : 16)));
  const F mean = set1(sum(total) / static_cast<float>(n));
  for (std::int64_t i = 0; i < n; i += 16) {
    const int width = static_cast<int>(n - i < 16 ? n - i : 16);
    const F v = keep_first(sub(load_n(x + i, width), mean), width, 0.0f);
    squares = fma(v, v, squares);
  }
  const F factor = set1(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps));
  for (std::int64_t i = 0; i < n; i += 16) {
    const int width = static_cast<int>(n - i < 16 ? n - i : 16);
    store_n(out + i, fma(mul(sub(load_n(x + i, width), mean), factor), load_n(weight + i, width), load_n(bias + i, width)), width);
  }
}

// out = x / rms(x) * weight (Zhang & Sennrich 2019, eq. 4).
inline void rms_norm(const float* x, const float* weight, float eps, std::int64_t n, float* out) {
  F squares = zero();
  for (std::int64_t i = 0; i < n; i += 16) {
    const F v = load_n(x + i, static_cast<int>(n - i < 16 ? n - i : 16));
    squares = fma(v, v, squares);
  }
  const float mean = sum(squares) / static_cast<float>(n);
  const F factor = set1(1.0f / __builtin_sqrtf(mean + eps));
  for (std::int64_t i = 0; i < n; i += 16) {
    const int width = static_cast<int>(n - i < 16 ? n - i : 16);
    store_n(out + i, mul(mul(load_n(x + i, width), factor), load_n(weight + i, width)), width);
  }
}

inline bool all_finite(const float* row, std::int64_t size) {
  F poison = zero();  // x - x is 0, or NaN where x is not finite
  for (std::int64_t i = 0; i < size; i += 16) {
    const F x = load_n(row + i, static_cast<int>(size - i < 16 ? size - i : 16));
    poison = add(poison, sub(x, x));
  }
  return sum(poison) == 0.0f;
}

// Rotates the pairs (i, i + head_dim / 2) of one head in place (Su et al. 2021, half-split layout).
inline void rotate(float* head, const float* cos, const float* sin, std::int64_t half) {
  for (std::int64_t i = 0; i < half; i += 16) {
    const int width = static_cast<int>(half - i < 16 ? half - i : 16);
    const F a = load_n(head + i, width), b = load_n(head + half + i, width);
    const F c = load_n(cos + i, width), s = load_n(sin + i, width);
    store_n(head + i, sub(mul(a, c), mul(b, s)), width);
    store_n(head + half + i, fma(a, s, mul(b, c)), width);
  }
}

}  // namespace flexjudge::FJ_ISA
