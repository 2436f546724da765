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

// Planes: see planes.h. Vectors of the compiler's own, which any machine has instructions for, or loops.
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef float Lanes __attribute__((vector_size(16)));
constexpr int kSums = 8;
constexpr int kPlaneTokens = 1;
inline Bytes load_bytes(const void* p) {
  Bytes v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline Bytes load_nibbles(const uint8_t* p, int part) {
  const Bytes pairs = load_bytes(p + part % 2 * 16);
  return part < 2 ? pairs : pairs >> 4;
}
inline Bytes bits_of(Bytes v, int mask) { return v & uint8_t(mask); }
template <int n>
inline Bytes shift(Bytes v) {
  return v >> n;
}
template <int n>
inline Bytes shift_up(Bytes v) {
  return v << n;
}
inline Bytes either(Bytes a, Bytes b) { return a | b; }
inline Bytes interleave(int w, Bytes a, Bytes b, Bytes c, Bytes d) {
  Bytes v;
  for (int k = 0; k < 4; ++k) {
    v[4 * k] = a[4 * w + k];
    v[4 * k + 1] = b[4 * w + k];
    v[4 * k + 2] = c[4 * w + k];
    v[4 * k + 3] = d[4 * w + k];
  }
  return v;
}
inline Ints add_products(Ints sums, Bytes codes, Ints x) {
  int8_t factors[16];
  memcpy(factors, &x, 16);
  for (int k = 0; k < 16; ++k) sums[k / 4] += int32_t(codes[k]) * factors[k];
  return sums;
}
inline Ints no_ints() { return Ints{}; }
inline Ints all_ints(int32_t v) { return Ints{v, v, v, v}; }
inline Ints load_ints(const void* p) {
  Ints v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline Ints load_four_ints(const int32_t* p) { return load_ints(p); }
inline void store_ints(int32_t* p, Ints v) { memcpy(p, &v, sizeof(v)); }
inline Ints plus(Ints a, Ints b) { return a + b; }
inline Ints minus(Ints a, Ints b) { return a - b; }
inline Ints masked(Ints a, int32_t b) { return a & b; }
template <int n>
inline Ints shift_left(Ints v) {
  return v << n;
}
template <int n>
inline Ints shift_right(Ints v) {
  return v >> n;
}
inline Lanes to_lanes(Ints v) { return Lanes{float(v[0]), float(v[1]), float(v[2]), float(v[3])}; }
inline Ints to_ints(Lanes v) {
  Ints out;
  // NaN, for which C++ has no integer, ends as NaN in the sums by its scale, whatever stands here.
  for (int k = 0; k < 4; ++k) out[k] = v[k] == v[k] ? int32_t(__builtin_rintf(v[k])) : 0;
  return out;
}
inline Lanes load_four_times(const float* p) { return Lanes{p[0], p[1], p[2], p[3]}; }
inline Lanes load_lanes(const float* p) { return load_four_times(p); }
inline Lanes all_lanes(float v) { return Lanes{v, v, v, v}; }
inline Lanes load_scales(const bf16* p, int64_t count) {
  Lanes v = all_lanes(0.0f);
  for (int64_t k = 0; k < 4 && k < count; ++k) v[k] = to_float(p[k]);
  return v;
}
// The others take the functions of V.
inline Lanes madd(Lanes a, Lanes b, Lanes c) { return a * b + c; }
inline Lanes add(Lanes a, Lanes b) { return a + b; }
inline Lanes mul(Lanes a, Lanes b) { return a * b; }
inline Lanes divide(Lanes a, Lanes b) { return a / b; }
inline Lanes vmax(Lanes a, Lanes b) {
  for (int k = 0; k < 4; ++k) a[k] = a[k] > b[k] ? a[k] : b[k];
  return a;
}
inline void store(float* p, Lanes v) { memcpy(p, &v, sizeof(v)); }
inline void sum4(Lanes a, Lanes b, Lanes c, Lanes d, float* out) {
  out[0] = (a[0] + a[1]) + (a[2] + a[3]);
  out[1] = (b[0] + b[1]) + (b[2] + b[3]);
  out[2] = (c[0] + c[1]) + (c[2] + c[3]);
  out[3] = (d[0] + d[1]) + (d[2] + d[3]);
}

}  // namespace

#include "loops.h"

namespace sparse_ffn {
const Isa kScalarIsa = {"scalar",
                        {kernels_for<bf16>(), kernels_for<fp16>(), kernels_for<float>()},
                        {activate, decode_bits, round_plane_token, plane_dots, plane_down, read_words}};
}
