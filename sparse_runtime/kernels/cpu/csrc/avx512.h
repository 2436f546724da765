// The vector interface of loops.h in AVX-512 (F, BW, DQ, VL), shared by isa_avx512.cpp and
// isa_avx512bf16.cpp.
#pragma once

#include <immintrin.h>

#include "kernels.h"
#include "scalar.h"

namespace {

using V = __m512;
constexpr int64_t kWidth = 16;
constexpr int kFewTokens = 2;
constexpr int kTokens = 4;
constexpr int kDownRowsOne = 16;
constexpr int kDownRows = 8;

inline V zero() { return _mm512_setzero_ps(); }
inline V set1(float v) { return _mm512_set1_ps(v); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V madd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V divide(V a, V b) { return _mm512_div_ps(a, b); }
inline V vmin(V a, V b) { return _mm512_min_ps(a, b); }
inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
inline V round_nearest(V v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline V exp2_int(V n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline __m256 halves(V v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
inline void sum4(V a, V b, V c, V d, float* out) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(halves(a), halves(b)),
                                      _mm256_hadd_ps(halves(c), halves(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

inline void load2(const float* p, V& a, V& b) {
  a = load(p);
  b = load(p + 16);
}
inline void store2(float* p, V a, V b) {
  store(p, a);
  store(p + 16, b);
}

inline void load2(const fp16* p, V& a, V& b) {
  a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1));
}
inline void store2(fp16* p, V a, V b) {
  __m256i* const q = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(q, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(q + 1, _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
}

inline void load2(const bf16* p, V& a, V& b) {
  const __m512i line = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(line, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(line, _mm512_set1_epi32(int(0xffff0000))));
}
inline __m512i round_bf16(V v) {  // the result in the upper halves
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
inline void store2(bf16* p, V a, V b) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(round_bf16(a), 16),
                                         _mm512_and_si512(round_bf16(b), upper)));
}

// 16 bits at a time: 1.2 µs for the 14336 neurons of a Mistral layer, where bit by bit takes 7.
int64_t decode(const uint8_t* bitmap, int64_t num_bits, int32_t* rows) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0;
  for (int64_t first = 0; first < num_bits; first += 16) {
    const int64_t left = num_bits - first;
    uint32_t bits = uint32_t(load_word(bitmap + first / 8, left > 8 ? 2 : 1));
    if (left < 16) bits &= (1u << left) - 1;  // padding bits may hold anything
    const __m512i numbers = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(first)));
    _mm512_storeu_si512(rows + count, _mm512_maskz_compress_epi32(__mmask16(bits), numbers));
    count += __builtin_popcount(bits);
  }
  return count;
}

inline V load_natural(const bf16* p, int64_t count) {
  const __mmask16 mask = count < 16 ? __mmask16((1u << count) - 1) : __mmask16(0xffff);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Planes: see planes.h.
using Bytes = __m512i;
using Ints = __m512i;
using Lanes = __m512;
constexpr int kSums = 16;
constexpr int kPlaneTokens = 4;
inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes load_nibbles(const uint8_t* p, int) {
  const __m512i twice =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_srlv_epi64(twice, _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0));
}
// Parts of a row's last unit of u groups, zeros beyond (planes.h).
#define SPARSE_FFN_MASKED_TAILS
inline Bytes load_tail_bytes(const uint8_t* p, int64_t u) {
  return _mm512_maskz_loadu_epi8((__mmask64(1) << (16 * u)) - 1, p);
}
inline Bytes load_tail_nibbles(const uint8_t* p, int64_t u) {
  const __m512i pairs = _mm512_maskz_loadu_epi8((__mmask64(1) << (8 * u)) - 1, p);
  const __m512i words = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  const __mmask8 second = __mmask8(0xff << u);
  const __m512i from = _mm512_mask_sub_epi64(words, second, words, _mm512_set1_epi64(u));
  const __m512i spread =
      _mm512_maskz_permutexvar_epi64(__mmask8((1 << (2 * u)) - 1), from, pairs);
  return _mm512_mask_srli_epi64(spread, second, spread, 4);
}
inline Lanes spread_tail_scales(const bf16* p, int64_t u, const uint8_t* groups) {
  const __m256i halves = _mm256_maskz_loadu_epi16(__mmask16((1 << u) - 1), p);
  const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  const __m512i from =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(groups)));
  return _mm512_permutexvar_ps(from, wide);
}
inline Bytes bits_of(Bytes v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8(char(mask))); }
template <int n>
inline Bytes shift(Bytes v) {
  return _mm512_srli_epi16(v, n);
}
template <int n>
inline Bytes shift_up(Bytes v) {
  return _mm512_slli_epi16(v, n);
}
inline Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes interleave(int w, Bytes a, Bytes b, Bytes c, Bytes d) {
  const __m512i ab = w < 2 ? _mm512_unpacklo_epi8(a, b) : _mm512_unpackhi_epi8(a, b);
  const __m512i cd = w < 2 ? _mm512_unpacklo_epi8(c, d) : _mm512_unpackhi_epi8(c, d);
  return w % 2 == 0 ? _mm512_unpacklo_epi16(ab, cd) : _mm512_unpackhi_epi16(ab, cd);
}
inline Ints add_products(Ints sums, Bytes codes, Ints x) {
#ifdef __AVX512VNNI__
  return _mm512_dpbusd_epi32(sums, codes, x);
#else
  const __m512i pairs = _mm512_maddubs_epi16(codes, x);
  return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
inline Ints no_ints() { return _mm512_setzero_si512(); }
inline Ints all_ints(int32_t v) { return _mm512_set1_epi32(v); }
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline Ints load_four_ints(const int32_t* p) {
  return _mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_ints(int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }
inline Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints minus(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints masked(Ints a, int32_t b) { return _mm512_and_si512(a, _mm512_set1_epi32(b)); }
template <int n>
inline Ints shift_left(Ints v) {
  return _mm512_slli_epi32(v, n);
}
template <int n>
inline Ints shift_right(Ints v) {
  return _mm512_srai_epi32(v, n);
}
inline Lanes to_lanes(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Ints to_ints(Lanes v) { return _mm512_cvtps_epi32(v); }
inline Lanes load_four_times(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
inline Lanes load_lanes(const float* p) { return load(p); }
inline Lanes all_lanes(float v) { return set1(v); }
inline Lanes load_scales(const bf16* p, int64_t count) { return load_natural(p, count); }

// Values: see plane_values.h.
#define SPARSE_FFN_WORDS
inline void store_words(Bytes codes, int, uint8_t* out) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i words = _mm512_permutexvar_epi32(order, codes);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(words));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 64), _mm512_extracti32x4_epi32(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 128), _mm512_extracti32x4_epi32(words, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 192), _mm512_extracti32x4_epi32(words, 3));
}
#define SPARSE_FFN_TABLES
inline __m256i narrow(V v, const fp16*) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
inline __m256i narrow(V v, const bf16*) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(v), 16));
}
// Up to 32 elements of a table that are grid * scale.
template <int kCount, class T>
inline __m512i table_of(const float* grid, float scale, const T* type) {
  if constexpr (kCount <= 0) return _mm512_setzero_si512();
  const auto some = [&](int first) {
    const int left = kCount - first;
    const __mmask16 mask = left < 16 ? __mmask16((1 << (left < 0 ? 0 : left)) - 1) : __mmask16(0xffff);
    return narrow(mul(_mm512_maskz_loadu_ps(mask, grid + first), set1(scale)), type);
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(some(0)), some(16), 1);
}
// out[k] = grid[codes[k]] * scale for 64 codes of up to 6 bits, in a type of two bytes.
template <int kBits, class T>
inline void look_up(const float* grid, float scale, const uint8_t* codes, T* out) {
  const __m512i low = table_of<(1 << kBits)>(grid, scale, out);
  const __m512i high = table_of<(1 << kBits) - 32>(grid + 32, scale, out);
  for (int half = 0; half < 2; ++half) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + half);
    const __m512i values = _mm512_permutex2var_epi16(low, _mm512_cvtepu8_epi16(some), high);
    _mm512_storeu_si512(out + 32 * half, values);
  }
}

inline __m512i read_line(const char* p, __m512i sum) {
  return _mm512_add_epi64(sum, _mm512_loadu_si512(p));
}
inline uint64_t sum_of(__m512i sum) {
  uint64_t lanes[8], total = 0;
  _mm512_storeu_si512(lanes, sum);
  for (int i = 0; i < 8; ++i) total += lanes[i];
  return total;
}
uint64_t read(const void* data, int64_t num_words) {
  return read_streams<__m512i, read_line, sum_of>(data, num_words);
}

}  // namespace
