// 64-bit Arm (Advanced SIMD, which every such processor has).
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

constexpr int kLookRecords = 4;
inline V look_group(const uint8_t* codes, const int8_t* x, float scale, V sums) {
  int16x8_t total = vdupq_n_s16(0);  // at most 8 * 15 * 127
  for (int k = 0; k < 32; k += 16) {
    const uint8x16_t packed = vld1q_u8(codes + k);
    const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15)));
    const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(packed, 4));
    const int8x16_t a = vld1q_s8(x + k), b = vld1q_s8(x + k + 32);
    total = vmlal_s8(total, vget_low_s8(low), vget_low_s8(a));
    total = vmlal_high_s8(total, low, a);
    total = vmlal_s8(total, vget_low_s8(high), vget_low_s8(b));
    total = vmlal_high_s8(total, high, b);
  }
  return vfmaq_n_f32(sums, vcvtq_f32_s32(vpaddlq_s16(total)), scale);
}

}  // namespace

#include "loops.h"

namespace sparse_ffn {
const Isa kNeonIsa = {"neon",
                      {kernels_for<bf16>(), kernels_for<fp16>(), kernels_for<float>()},
                      {activate, decode_bits, round_token, look, read_words}};
}
