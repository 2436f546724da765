// Activation functions.
#pragma once

#include <math.h>
#include <string.h>

#include "blocks.h"

namespace {

using namespace sparse_ffn;

// exp by 2^n times the Taylor series of e^r, |r| <= ln(2)/2: the term left out is below 6e-9.
inline V exponential(V x) {
  x = vmax(vmin(x, set1(88.0f)), set1(-87.0f));
  const V n = round_nearest(mul(x, set1(1.44269504f)));
  V r = madd(n, set1(-0.693359375f), x);
  r = madd(n, set1(2.12194440e-4f), r);
  V p = set1(1.0f / 5040);
  p = madd(p, r, set1(1.0f / 720));
  p = madd(p, r, set1(1.0f / 120));
  p = madd(p, r, set1(1.0f / 24));
  p = madd(p, r, set1(1.0f / 6));
  p = madd(p, r, set1(0.5f));
  p = madd(p, r, set1(1.0f));
  p = madd(p, r, set1(1.0f));
  return mul(p, exp2_int(n));
}

// x * sigmoid(z)
inline V gated(V x, V z) {
  return divide(x, add(set1(1.0f), exponential(sub(zero(), z))));
}

struct Silu {
  static inline V apply(V g) { return gated(g, g); }
};

struct GeluTanh {
  // 0.5 g (1 + tanh(u)) = g sigmoid(2u), u = sqrt(2/pi) (g + 0.044715 g^3)
  static inline V apply(V g) {
    const V cube = mul(mul(g, g), g);
    return gated(g, mul(set1(1.5957691216f), madd(set1(0.044715f), cube, g)));
  }
};

struct Relu {
  // The operand order keeps a NaN of g.
  static inline V apply(V g) { return vmax(zero(), g); }
};

struct Relu2 {
  static inline V apply(V g) { return mul(Relu::apply(g), Relu::apply(g)); }
};

template <class A>
void activate_with(float* gate, const float* up, int64_t count) {
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth)
    store(gate + k, mul(A::apply(load(gate + k)), load(up + k)));
  if (k < count) {
    const size_t bytes = size_t(count - k) * sizeof(float);
    float g[kWidth] = {}, u[kWidth] = {};
    memcpy(g, gate + k, bytes);
    memcpy(u, up + k, bytes);
    store(g, mul(A::apply(load(g)), load(u)));
    memcpy(gate + k, g, bytes);
  }
}

void activate(Activation activation, float* gate, const float* up, int64_t count) {
  switch (activation) {
    case kSilu:
      activate_with<Silu>(gate, up, count);
      break;
    case kGeluTanh:
      activate_with<GeluTanh>(gate, up, count);
      break;
    case kRelu:
      activate_with<Relu>(gate, up, count);
      break;
    case kRelu2:
      activate_with<Relu2>(gate, up, count);
      break;
    case kGelu:
      for (int64_t k = 0; k < count; ++k)
        gate[k] = 0.5f * gate[k] * (1.0f + erff(gate[k] * 0.70710678f)) * up[k];
      break;
  }
}

}  // namespace
