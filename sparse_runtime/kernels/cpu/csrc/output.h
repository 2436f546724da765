// From fp32 sums to outputs and back.
#pragma once

#include <string.h>

#include "blocks.h"

namespace {

using namespace sparse_ffn;

template <class T>
void finish(const float* y, int64_t part_stride, int64_t parts, int64_t length, int64_t begin,
            int64_t end, const void* bias, void* out) {
  T* const target = static_cast<T*>(out);
  const T* const extra = static_cast<const T*>(bias);
  for (int64_t k = begin; k < end; k += kBlock) {
    V a = load(y + k), b = load(y + k + kWidth);
    for (int64_t p = 1; p < parts; ++p) {
      a = add(a, load(y + p * part_stride + k));
      b = add(b, load(y + p * part_stride + k + kWidth));
    }
    const int64_t count = length - k < kBlock ? length - k : kBlock;
    if (extra) {
      V c, d;
      load2_tail(extra + k, count, c, d);
      a = add(a, c);
      b = add(b, d);
    }
    if (count == kBlock) {
      store2(target + k, a, b);
    } else {
      T buffer[kBlock];
      store2(buffer, a, b);
      memcpy(target + k, buffer, size_t(count) * sizeof(T));
    }
  }
}

// Outputs of `linear` are few and in natural order: one by one.
template <class T>
void store_natural(const float* y, int64_t length, const void* bias, void* out) {
  T* const target = static_cast<T*>(out);
  const T* const extra = static_cast<const T*>(bias);
  for (int64_t k = 0; k < length; ++k) {
    const float value = extra ? y[k] + to_float(extra[k]) : y[k];
    target[k] = from_float<T>(value);
  }
}

template <class T>
void widen(const void* source, int64_t length, float* out) {
  const T* const p = static_cast<const T*>(source);
  for (int64_t k = 0; k < length; ++k) out[k] = to_float(p[k]);
}

}  // namespace
