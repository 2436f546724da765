// AVX2 + FMA + F16C.
#include <immintrin.h>

#include "kernels.h"
#include "scalar.h"

namespace {

using V = __m256;
constexpr int64_t kWidth = 8;
constexpr int kFewTokens = 1;
constexpr int kTokens = 2;
constexpr int kDownRowsOne = 8;
constexpr int kDownRows = 4;

inline V zero() { return _mm256_setzero_ps(); }
inline V set1(float v) { return _mm256_set1_ps(v); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V madd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V divide(V a, V b) { return _mm256_div_ps(a, b); }
inline V vmin(V a, V b) { return _mm256_min_ps(a, b); }
inline V vmax(V a, V b) { return _mm256_max_ps(a, b); }
inline V round_nearest(V v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline V exp2_int(V n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline void sum4(V a, V b, V c, V d, float* out) {
  const V pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

inline void load2(const float* p, V& a, V& b) {
  a = load(p);
  b = load(p + 8);
}
inline void store2(float* p, V a, V b) {
  store(p, a);
  store(p + 8, b);
}

inline void load2(const fp16* p, V& a, V& b) {
  a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1));
}
inline void store2(fp16* p, V a, V b) {
  __m128i* const q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
}

inline void load2(const bf16* p, V& a, V& b) {
  const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a = _mm256_castsi256_ps(_mm256_slli_epi32(line, 16));
  b = _mm256_castsi256_ps(_mm256_and_si256(line, _mm256_set1_epi32(int(0xffff0000))));
}
inline __m256i round_bf16(V v) {  // the result in the upper halves
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const V nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
}
inline void store2(bf16* p, V a, V b) {
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_or_si256(_mm256_srli_epi32(round_bf16(a), 16),
                                      _mm256_and_si256(round_bf16(b), upper)));
}

inline V load_natural(const bf16* p, int64_t count) {
  bf16 buffer[8] = {};
  if (count < 8) {
    memcpy(buffer, p, size_t(count) * sizeof(bf16));
    p = buffer;
  }
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// Planes: see planes.h.
using Bytes = __m256i;
using Ints = __m256i;
using Lanes = __m256;
constexpr int kSums = 8;
constexpr int kPlaneTokens = 2;
inline Bytes load_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline Bytes load_nibbles(const uint8_t* p, int part) {
  return part == 0 ? load_bytes(p) : _mm256_srli_epi16(load_bytes(p), 4);
}
inline Bytes bits_of(Bytes v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8(char(mask))); }
template <int n>
inline Bytes shift(Bytes v) {
  return _mm256_srli_epi16(v, n);
}
template <int n>
inline Bytes shift_up(Bytes v) {
  return _mm256_slli_epi16(v, n);
}
inline Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes interleave(int w, Bytes a, Bytes b, Bytes c, Bytes d) {
  const __m256i ab = w < 2 ? _mm256_unpacklo_epi8(a, b) : _mm256_unpackhi_epi8(a, b);
  const __m256i cd = w < 2 ? _mm256_unpacklo_epi8(c, d) : _mm256_unpackhi_epi8(c, d);
  return w % 2 == 0 ? _mm256_unpacklo_epi16(ab, cd) : _mm256_unpackhi_epi16(ab, cd);
}
inline Ints add_products(Ints sums, Bytes codes, Ints x) {
  // At most 2 * 127 * 127 in 16 bits.
  const __m256i pairs = _mm256_maddubs_epi16(codes, x);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Ints no_ints() { return _mm256_setzero_si256(); }
inline Ints all_ints(int32_t v) { return _mm256_set1_epi32(v); }
inline Ints load_ints(const void* p) { return load_bytes(p); }
inline Ints load_four_ints(const int32_t* p) {
  return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_ints(int32_t* p, Ints v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}
inline Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints minus(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints masked(Ints a, int32_t b) { return _mm256_and_si256(a, _mm256_set1_epi32(b)); }
template <int n>
inline Ints shift_left(Ints v) {
  return _mm256_slli_epi32(v, n);
}
template <int n>
inline Ints shift_right(Ints v) {
  return _mm256_srai_epi32(v, n);
}
inline Lanes to_lanes(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Ints to_ints(Lanes v) { return _mm256_cvtps_epi32(v); }
inline Lanes load_four_times(const float* p) {
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
}
inline Lanes load_lanes(const float* p) { return load(p); }
inline Lanes all_lanes(float v) { return set1(v); }
inline Lanes load_scales(const bf16* p, int64_t count) { return load_natural(p, count); }

inline __m256i read_line(const char* p, __m256i sum) {
  const __m256i* const q = reinterpret_cast<const __m256i*>(p);
  return _mm256_add_epi64(sum, _mm256_add_epi64(_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)));
}
inline uint64_t sum_of(__m256i sum) {
  uint64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}
uint64_t read(const void* data, int64_t num_words) {
  return read_streams<__m256i, read_line, sum_of>(data, num_words);
}

}  // namespace

#include "loops.h"

namespace sparse_ffn {
const Isa kAvx2Isa = {"avx2",
                      {kernels_for<bf16>(), kernels_for<fp16>(), kernels_for<float>()},
                      {activate, decode_bits, round_plane_token, plane_dots, plane_down, read}};
}
