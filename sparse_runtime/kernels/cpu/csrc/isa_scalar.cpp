// Plain C++, correct everywhere; the definition the other instruction sets are compared with.
#include "kernels.h"
#include "scalar.h"

namespace {

using V = float;
constexpr int64_t kWidth = 1;
constexpr int kFewTokens = 1;
constexpr int kTokens = 1;
constexpr int kDownRowsOne = 8;
constexpr int kDownRows = 4;

inline V zero() { return 0.0f; }
inline V set1(float v) { return v; }
inline V load(const float* p) { return *p; }
inline void store(float* p, V v) { *p = v; }
inline V madd(V a, V b, V c) { return a * b + c; }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V divide(V a, V b) { return a / b; }
inline V vmin(V a, V b) { return a < b ? a : b; }
inline V vmax(V a, V b) { return a > b ? a : b; }
inline V round_nearest(V v) { return __builtin_rintf(v); }
inline V exp2_int(V n) { return bits_to_float(uint32_t(int32_t(n) + 127) << 23); }
inline void sum4(V a, V b, V c, V d, float* out) {
  out[0] = a;
  out[1] = b;
  out[2] = c;
  out[3] = d;
}

inline V load_natural(const bf16* p, int64_t) { return to_float(*p); }

template <class T>
inline void load2(const T* p, V& a, V& b) {
  a = to_float(p[0]);
  b = to_float(p[1]);
}
template <class T>
inline void store2(T* p, V a, V b) {
  p[0] = from_float<T>(a);
  p[1] = from_float<T>(b);
}

constexpr int kLookRecords = 2;
inline V look_group(const uint8_t* codes, const int8_t* x, float scale, V sums) {
  int32_t total = 0;
  for (int k = 0; k < 32; ++k) total += (codes[k] & 15) * x[k] + (codes[k] >> 4) * x[k + 32];
  return sums + scale * float(total);
}

}  // namespace

#include "loops.h"

namespace sparse_ffn {
const Isa kScalarIsa = {"scalar",
                        {kernels_for<bf16>(), kernels_for<fp16>(), kernels_for<float>()},
                        {activate, decode_bits, round_token, look, read_words}};
}
