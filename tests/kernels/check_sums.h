// What the check of every instruction set expects: activations and sums in double precision.
#pragma once

#include <cmath>

#include "kernels.h"

namespace sparse_ffn {

// Of two errors; NaN is the largest, which fmax would drop.
inline double larger(double a, double b) { return std::isnan(a) || a >= b ? a : b; }

inline double act(Activation activation, double v) {
  switch (activation) {
    case kSilu:
      return v / (1 + exp(-v));
    case kGelu:
      return 0.5 * v * (1 + erf(v * sqrt(0.5)));
    case kGeluTanh:
      return 0.5 * v * (1 + tanh(sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case kRelu:
      return v > 0 ? v : 0;
    case kRelu2:
      return v > 0 ? v * v : 0;
  }
  return NAN;
}

// A sum and the sum of the absolute values, which its error is proportional to.
struct Sum {
  double value = 0, magnitude = 0;
  void add(double term) {
    value += term;
    magnitude += fabs(term);
  }
};

}  // namespace sparse_ffn
