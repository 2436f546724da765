// Values of rows in planes.
#pragma once

#include "planes.h"

namespace {

using namespace sparse_ffn;

template <class T>
inline void narrow(const float* values, int64_t count, T* out) {
  for (int64_t k = 0; k < count; ++k) out[k] = from_float<T>(values[k]);
}
template <>
inline void narrow<bf16>(const float* values, int64_t count, bf16* out) {
  for (int64_t k = 0; k < count; ++k) {  // without from_float's care for NaN: values are finite
    const uint32_t bits = float_to_bits(values[k]);
    out[k].bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

// A unit's codes in the order of its columns [4, 64].
template <int kBits>
inline void ordered_codes(const uint8_t* unit, uint8_t* out) {
  for (int part = 0; part < kParts; ++part) {
    Bytes codes[4];
    load_codes<kBits>(unit, part, codes);
    uint32_t fours[4][kLanes];
    memcpy(fours, codes, sizeof(codes));
    for (int c = 0; c < 4; ++c)
      for (int j = 0; j < kLanes; ++j) {
        const int at = part * kLanes + j;
        memcpy(out + 64 * (at % 4) + 16 * c + 4 * (at / 4), &fours[c][j], 4);
      }
  }
}

// The same for a row's tail of u groups [u, 64].
template <int kBits>
inline void ordered_tail(const uint8_t* tail, int64_t u, uint8_t* out) {
  uint8_t unit[128], full[256];
  spread_tail<kBits>(tail, u, unit);
  ordered_codes<kBits>(unit, full);
  for (int64_t c = 0; c < 4; ++c)
    for (int64_t j = 0; j < 4 * u; ++j)
      memcpy(out + 64 * (j % u) + 16 * c + 4 * (j / u), full + 64 * (j % 4) + 16 * c + 4 * (j / 4),
             4);
}

inline void ordered(int bits, const uint8_t* unit, int64_t u, uint8_t* out) {
  if (u == 4) {
    if (bits == 2) ordered_codes<2>(unit, out);
    if (bits == 3) ordered_codes<3>(unit, out);
    if (bits == 4) ordered_codes<4>(unit, out);
  } else {
    if (bits == 2) ordered_tail<2>(unit, u, out);
    if (bits == 3) ordered_tail<3>(unit, u, out);
    if (bits == 4) ordered_tail<4>(unit, u, out);
  }
}

template <class T>
void plane_values(const PlaneFormat& format, const uint8_t* base, const uint8_t* residual,
                  const uint8_t* scales, int64_t length, void* out) {
  T* const target = static_cast<T*>(out);
  const int64_t groups = plane_groups(length);
  const float finer = 1.0f / float(1 << format.residual);
  const float start = float(1 << (format.base - 1)) +
                      (format.residual ? float(1 << (format.residual - 1)) * finer : 0.0f);
  for (int64_t first = 0; first < groups; first += 4) {
    const int64_t u = groups - first < 4 ? groups - first : 4;
    uint8_t high[256], low[256];
    float values[256];
    ordered(format.base, base + first * 8 * format.base, u, high);
    if (format.residual)
      ordered(format.residual, residual + first * 8 * format.residual, u, low);
    for (int64_t g = 0; g < u; ++g) {
      const float scale = to_float(reinterpret_cast<const bf16*>(scales)[first + g]);
      float* const own = values + 64 * g;
      if (format.residual)
        for (int k = 0; k < 64; ++k)
          own[k] = scale * (float(high[64 * g + k]) + finer * float(low[64 * g + k]) - start);
      else
        for (int k = 0; k < 64; ++k) own[k] = scale * (float(high[64 * g + k]) - start);
    }
    const int64_t left = length - first * kPlaneGroup;
    narrow(values, left < 64 * u ? left : 64 * u, target + first * kPlaneGroup);
  }
}

}  // namespace
