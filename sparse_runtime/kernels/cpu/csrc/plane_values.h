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

#ifndef SPARSE_FFN_WORDS
// The 32-bit words of part `part` of a vector of codes to where their groups have them, 64 bytes apart.
inline void store_words(Bytes codes, int part, uint8_t* out) {
  uint32_t words[kLanes];
  memcpy(words, &codes, sizeof(codes));
  for (int j = 0; j < kLanes; ++j) {
    const int at = part * kLanes + j;
    memcpy(out + 64 * (at % 4) + 4 * (at / 4), &words[j], 4);
  }
}
#endif

// A unit's codes, base and residual joined, in the order of its columns [4, 64].
template <int kBase, int kResidual>
inline void ordered_codes(const uint8_t* base, const uint8_t* residual, uint8_t* out) {
  for (int part = 0; part < kParts; ++part) {
    Bytes codes[4], finer[4];
    split<kBase, kResidual>(load_chunks<kBase>(base, part), codes);
    if constexpr (kResidual > 0)
      split<kResidual, 0>(load_chunks<kResidual>(residual, part), finer);
    for (int c = 0; c < 4; ++c)
      store_words(kResidual > 0 ? either(codes[c], finer[c]) : codes[c], part, out + 16 * c);
  }
}

// The same for a row's tail of u groups [u, 64].
template <int kBase, int kResidual>
inline void ordered_tail(const uint8_t* base, const uint8_t* residual, int64_t u, uint8_t* out) {
  uint8_t unit[128], finer[128], full[256];
  spread_tail<kBase>(base, u, unit);
  if constexpr (kResidual > 0) spread_tail<kResidual>(residual, u, finer);
  ordered_codes<kBase, kResidual>(unit, finer, full);
  for (int64_t c = 0; c < 4; ++c)
    for (int64_t j = 0; j < 4 * u; ++j)
      memcpy(out + 64 * (j % u) + 16 * c + 4 * (j / u), full + 64 * (j % 4) + 16 * c + 4 * (j / 4),
             4);
}

// A group's values of a scale.
template <class T, int kBits>
inline void group_values(const uint8_t* codes, const float* grid, float scale, T* out) {
  float values[64];
#ifdef SPARSE_FFN_TABLES
  if constexpr (kBits <= 6 && sizeof(T) == 2) {  // no more values than there are weights
    look_up<kBits>(grid, scale, codes, out);
    return;
  }
#endif
  for (int k = 0; k < 64; ++k) values[k] = scale * grid[codes[k]];
  narrow(values, 64, out);
}

template <class T, int kBase, int kResidual>
void values_with(const uint8_t* base, const uint8_t* residual, const uint8_t* scales, int64_t length,
                 T* out) {
  constexpr int kBits = kBase + kResidual;
  float grid[1 << kBits];
  for (int k = 0; k < 1 << kBits; ++k) {
    const int offset = (1 << (kBits - 1)) + (kResidual > 0 ? 1 << (kResidual - 1) : 0);
    grid[k] = float(k - offset) / float(1 << kResidual);
  }
  const int64_t groups = plane_groups(length);
  for (int64_t first = 0; first < groups; first += 4) {
    const int64_t u = groups - first < 4 ? groups - first : 4, left = length - 64 * first;
    const uint8_t* const unit = base + first * 8 * kBase;
    const uint8_t* const finer = residual + first * 8 * kResidual;
    uint8_t codes[256];
    if (u == 4)
      ordered_codes<kBase, kResidual>(unit, finer, codes);
    else
      ordered_tail<kBase, kResidual>(unit, finer, u, codes);
    T rest[256];
    T* const target = left < 64 * u ? rest : out + 64 * first;
    for (int64_t g = 0; g < u; ++g)
      group_values<T, kBits>(codes + 64 * g, grid,
                             to_float(reinterpret_cast<const bf16*>(scales)[first + g]),
                             target + 64 * g);
    if (left < 64 * u) memcpy(out + 64 * first, rest, size_t(left) * sizeof(T));
  }
}

template <class T, int kBase>
void values_with_base(int bits, const uint8_t* base, const uint8_t* residual, const uint8_t* scales,
                      int64_t length, T* out) {
  if (bits == 0) values_with<T, kBase, 0>(base, residual, scales, length, out);
  if (bits == 2) values_with<T, kBase, 2>(base, residual, scales, length, out);
  if (bits == 3) values_with<T, kBase, 3>(base, residual, scales, length, out);
  if (bits == 4) values_with<T, kBase, 4>(base, residual, scales, length, out);
}

template <class T>
void plane_values(const PlaneFormat& format, const uint8_t* base, const uint8_t* residual,
                  const uint8_t* scales, int64_t length, void* out) {
  const auto values = format.base == 3 ? values_with_base<T, 3> : values_with_base<T, 4>;
  values(format.residual, base, residual, scales, length, static_cast<T*>(out));
}

}  // namespace
