// The vector interface of loops.h in Advanced SIMD, which every 64-bit Arm processor has, shared by
// isa_neon.cpp and isa_neondot.cpp.
#pragma once

#include <arm_neon.h>

#include "kernels.h"
#include "scalar.h"

namespace {

using V = float32x4_t;
constexpr int64_t kWidth = 4;
constexpr int kFewTokens = 2;
constexpr int kTokens = 4;
constexpr int kDownRowsOne = 16;
constexpr int kDownRows = 8;

inline V zero() { return vdupq_n_f32(0.0f); }
inline V set1(float v) { return vdupq_n_f32(v); }
inline V load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, V v) { vst1q_f32(p, v); }
inline V madd(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V add(V a, V b) { return vaddq_f32(a, b); }
inline V sub(V a, V b) { return vsubq_f32(a, b); }
inline V mul(V a, V b) { return vmulq_f32(a, b); }
inline V divide(V a, V b) { return vdivq_f32(a, b); }
inline V vmin(V a, V b) { return vminq_f32(a, b); }
inline V vmax(V a, V b) { return vmaxq_f32(a, b); }
inline V round_nearest(V v) { return vrndnq_f32(v); }
inline V exp2_int(V n) {
  const int32x4_t biased = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
  return vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
}
inline void sum4(V a, V b, V c, V d, float* out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

inline void load2(const float* p, V& a, V& b) {
  a = vld1q_f32(p);
  b = vld1q_f32(p + 4);
}
inline void store2(float* p, V a, V b) {
  vst1q_f32(p, a);
  vst1q_f32(p + 4, b);
}

inline void load2(const fp16* p, V& a, V& b) {
  const uint16x8_t line = vld1q_u16(&p->bits);
  a = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(line)));
  b = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(line)));
}
inline void store2(fp16* p, V a, V b) {
  vst1q_u16(&p->bits, vcombine_u16(vreinterpret_u16_f16(vcvt_f16_f32(a)),
                                   vreinterpret_u16_f16(vcvt_f16_f32(b))));
}

inline void load2(const bf16* p, V& a, V& b) {
  const uint32x4_t line = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
  a = vreinterpretq_f32_u32(vshlq_n_u32(line, 16));
  b = vreinterpretq_f32_u32(vandq_u32(line, vdupq_n_u32(0xffff0000)));
}
inline uint32x4_t round_bf16(V v) {  // the result in the upper halves
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc00000));
}
inline void store2(bf16* p, V a, V b) {
  const uint32x4_t line = vorrq_u32(vshrq_n_u32(round_bf16(a), 16),
                                    vandq_u32(round_bf16(b), vdupq_n_u32(0xffff0000)));
  vst1q_u16(&p->bits, vreinterpretq_u16_u32(line));
}

inline V load_natural(const bf16* p, int64_t count) {
  bf16 buffer[4] = {};
  if (count < 4) {
    memcpy(buffer, p, size_t(count) * sizeof(bf16));
    p = buffer;
  }
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
}

// Planes: see planes.h.
using Bytes = uint8x16_t;
using Ints = int32x4_t;
using Lanes = float32x4_t;
constexpr int kSums = 16;
constexpr int kPlaneTokens = 2;
inline Bytes load_bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
inline Bytes load_nibbles(const uint8_t* p, int part) {
  const Bytes pairs = vld1q_u8(p + part % 2 * 16);
  return part < 2 ? pairs : vshrq_n_u8(pairs, 4);
}
inline Bytes bits_of(Bytes v, int mask) { return vandq_u8(v, vdupq_n_u8(uint8_t(mask))); }
template <int n>
inline Bytes shift(Bytes v) {
  return vshrq_n_u8(v, n);
}
template <int n>
inline Bytes shift_up(Bytes v) {
  return vshlq_n_u8(v, n);
}
inline Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }
inline Bytes interleave(int w, Bytes a, Bytes b, Bytes c, Bytes d) {
  const uint16x8_t ab = vreinterpretq_u16_u8(w < 2 ? vzip1q_u8(a, b) : vzip2q_u8(a, b));
  const uint16x8_t cd = vreinterpretq_u16_u8(w < 2 ? vzip1q_u8(c, d) : vzip2q_u8(c, d));
  return vreinterpretq_u8_u16(w % 2 == 0 ? vzip1q_u16(ab, cd) : vzip2q_u16(ab, cd));
}
inline Ints add_products(Ints sums, Bytes codes, Ints x) {
  const int8x16_t a = vreinterpretq_s8_u8(codes), b = vreinterpretq_s8_s32(x);
#ifdef __ARM_FEATURE_DOTPROD
  return vdotq_s32(sums, a, b);
#else
  // At most 2 * 127 * 127 in 16 bits.
  return vpadalq_s16(sums, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)),
                                      vmull_high_s8(a, b)));
#endif
}
inline Ints no_ints() { return vdupq_n_s32(0); }
inline Ints all_ints(int32_t v) { return vdupq_n_s32(v); }
inline Ints load_ints(const void* p) { return vld1q_s32(static_cast<const int32_t*>(p)); }
inline Ints load_four_ints(const int32_t* p) { return vld1q_s32(p); }
inline void store_ints(int32_t* p, Ints v) { vst1q_s32(p, v); }
inline Ints plus(Ints a, Ints b) { return vaddq_s32(a, b); }
inline Ints minus(Ints a, Ints b) { return vsubq_s32(a, b); }
inline Ints masked(Ints a, int32_t b) { return vandq_s32(a, vdupq_n_s32(b)); }
template <int n>
inline Ints shift_left(Ints v) {
  return vshlq_n_s32(v, n);
}
template <int n>
inline Ints shift_right(Ints v) {
  return vshrq_n_s32(v, n);
}
inline Lanes to_lanes(Ints v) { return vcvtq_f32_s32(v); }
inline Ints to_ints(Lanes v) { return vcvtnq_s32_f32(v); }
inline Lanes load_four_times(const float* p) { return vld1q_f32(p); }
inline Lanes load_lanes(const float* p) { return load(p); }
inline Lanes all_lanes(float v) { return set1(v); }
inline Lanes load_scales(const bf16* p, int64_t count) { return load_natural(p, count); }

}  // namespace
