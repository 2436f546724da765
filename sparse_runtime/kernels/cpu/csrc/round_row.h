// Rounding of float rows to planes; kernels/rounding.py defines it.
#pragma once

#include "kernels.h"
#include "scalar.h"

namespace {

using namespace sparse_ffn;

// Sums side by side, which compilers make vectors of.
constexpr int kSideBySide = 16;

// Codes of base and residual as floats, by values in parts of their scale.
template <bool kResidual>
struct Codes {
  float most, offset, finer, half;

  explicit Codes(const Rounding& how)
      : most(float(1 << (how.format.base - 1))), offset(how.offset),
        finer(float(1 << how.format.residual)), half(0.5f * finer) {}

  static inline float within(float value, float bound) {
    value = value < -bound ? -bound : value;
    return value > bound - 1 ? bound - 1 : value;
  }
  // Of values below 2^31; compilers make no vectors of floorf.
  static inline float rounded_down(float value) {
    const float whole = float(int32_t(value));
    return whole > value ? whole - 1 : whole;
  }
  inline float base(float scaled) const {
    return within(kResidual ? rounded_down(scaled + offset) : __builtin_rintf(scaled), most);
  }
  inline float residual(float rest) const {
    return kResidual ? within(__builtin_rintf(rest * finer), half) : 0.0f;
  }
};

// The values of a group in parts of its scale. They go through memory: multiplied and subtracted in one
// instruction they would round otherwise than the definition's.
inline void scaled_by(const float* values, float scale, float* scaled) {
  const float inverse = scale != 0 ? 1 / scale : 0;
  for (int64_t k = 0; k < kPlaneGroup; ++k) scaled[k] = values[k] * inverse;
  __asm__ volatile("" : : "r"(scaled) : "memory");
}

// Sum of squared errors, in parts of the scale's square.
template <bool kResidual>
inline float error_of(const float* scaled, const Rounding& how, const float* counts) {
  const Codes<kResidual> codes(how);
  const float part = -1 / codes.finer, share = how.share;
  float errors[kPlaneGroup], sums[kSideBySide] = {};
  for (int64_t k = 0; k < kPlaneGroup; ++k) {
    const float x = scaled[k], rest = x - codes.base(x);
    const float left = rest + part * codes.residual(rest);
    errors[k] = (left * left + (kResidual ? share * rest * rest : 0.0f)) * counts[k];
  }
  for (int64_t k = 0; k < kPlaneGroup; k += kSideBySide)
    for (int j = 0; j < kSideBySide; ++j) sums[j] += errors[k + j];
  double sum = 0;
  for (int j = 0; j < kSideBySide; ++j) sum += sums[j];
  return float(sum);
}

// The element of a group that is furthest from zero; NaN where one is not finite.
inline float extreme_of(const float* values) {
  float low[kSideBySide] = {}, high[kSideBySide] = {};
  uint32_t bits[kSideBySide] = {};
  for (int64_t k = 0; k < kPlaneGroup; k += kSideBySide)
    for (int j = 0; j < kSideBySide; ++j) {
      const float value = values[k + j];
      const uint32_t own = float_to_bits(value) & 0x7fffffff;
      low[j] = value < low[j] ? value : low[j];
      high[j] = value > high[j] ? value : high[j];
      bits[j] = own > bits[j] ? own : bits[j];
    }
  for (int j = 1; j < kSideBySide; ++j) {
    low[0] = low[j] < low[0] ? low[j] : low[0];
    high[0] = high[j] > high[0] ? high[j] : high[0];
    bits[0] = bits[j] > bits[0] ? bits[j] : bits[0];
  }
  if (bits[0] >= 0x7f800000) return bits_to_float(0x7fc00000);
  return high[0] > -low[0] ? high[0] : low[0];
}

// The scale of a group, of those tried the one of the least error: zero where none is large enough.
template <bool kResidual>
inline bf16 scale_of(const float* values, const Rounding& how, const float* counts) {
  const float extreme = extreme_of(values);
  if (extreme != extreme) return from_float<bf16>(extreme);
  bf16 best = {0};
  float least = __builtin_inff(), scaled[kPlaneGroup];
  for (int64_t i = 0; i < how.num_steps; ++i) {
    float wanted = extreme * how.steps[i];
    wanted = wanted < -how.limit ? -how.limit : wanted > how.limit ? how.limit : wanted;
    const bf16 tried = from_float<bf16>(wanted);
    const float scale = to_float(tried), ratio = scale / extreme;
    if (!(__builtin_fabsf(scale) >= 1.17549435e-38f)) continue;
    scaled_by(values, scale, scaled);
    // In parts of the largest element: squares of very large or small weights would not be finite.
    const float error = error_of<kResidual>(scaled, how, counts) * (ratio * ratio);
    if (error < least) {
      best = tried;
      least = error;
    }
  }
  return best;
}

template <class T, bool kResidual>
void round_groups(const T* row, int64_t length, const Rounding& how, int8_t* hi, int8_t* lo,
                  uint16_t* scales) {
  const Codes<kResidual> codes(how);
  float values[kPlaneGroup], scaled[kPlaneGroup];
  for (int64_t first = 0; first < length; first += kPlaneGroup) {
    const int64_t left = length - first, count = left < kPlaneGroup ? left : kPlaneGroup;
    if (count == kPlaneGroup) {
      for (int64_t k = 0; k < kPlaneGroup; ++k) values[k] = to_float(row[first + k]);
    } else {
      for (int64_t k = 0; k < kPlaneGroup; ++k)
        values[k] = k < count ? to_float(row[first + k]) : 0.0f;
    }
    const bf16 scale =
        scale_of<kResidual>(values, how, how.counts + (how.by_column ? first : 0));
    scales[first / kPlaneGroup] = scale.bits;
    // Of a group that is not finite there is nothing to say.
    const float usable = to_float(scale);
    scaled_by(values, usable == usable ? usable : 0.0f, scaled);
    int8_t own_hi[kPlaneGroup], own_lo[kPlaneGroup];
    for (int64_t k = 0; k < kPlaneGroup; ++k) {
      const float x = usable == usable ? scaled[k] : 0.0f, base = codes.base(x);
      own_hi[k] = int8_t(int32_t(base));
      own_lo[k] = int8_t(int32_t(codes.residual(x - base)));
    }
    memcpy(hi + first, own_hi, size_t(count));
    memcpy(lo + first, own_lo, size_t(count));
  }
}

template <class T>
void round_row(const void* row, int64_t length, const Rounding& how, int8_t* hi, int8_t* lo,
               uint16_t* scales) {
  const T* const source = static_cast<const T*>(row);
  if (how.format.residual > 0)
    round_groups<T, true>(source, length, how, hi, lo, scales);
  else
    round_groups<T, false>(source, length, how, hi, lo, scales);
}

}  // namespace
