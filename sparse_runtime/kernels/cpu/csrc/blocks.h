// What all loops of loops.h share: blocks of elements, prefetching, rows, sets of tokens.
#pragma once

#include <math.h>
#include <string.h>

namespace {

using namespace sparse_ffn;

constexpr int64_t kBlock = 2 * kWidth;

// 512, 1024 and 2048 differ by 3 % at most; 1024 is best at low density.
constexpr int64_t kPrefetchBytes = 1024;

template <class T>
inline int64_t prefetch_distance() {
  return kPrefetchBytes / int64_t(sizeof(T));
}

// Where prefetching turns to the rows that come next, in a row of `whole` elements.
template <class T>
inline int64_t turning_point(int64_t whole) {
  const int64_t distance = prefetch_distance<T>();
  return whole > distance ? (whole - distance) / kBlock * kBlock : 0;
}

// The cache lines of the kBlock elements at p, into the L2 cache: what the L1 cache waits for at a time
// is too little for rows that are short (docs/LOG.md, 2026-11-26).
template <class T>
inline void prefetch_block(const T* p) {
  __builtin_prefetch(p, 0, 2);
  if (kBlock * sizeof(T) > 64) __builtin_prefetch(p + 64 / sizeof(T), 0, 2);
}

template <class T>
inline const T* row_of(const Matrix& m, const Rows& rows, int64_t r) {
  const int64_t i = rows.index ? int64_t(rows.index[r]) : rows.first + r;
  return static_cast<const T*>(m.data) + i * m.stride;
}

template <class T>
inline void load2_tail(const T* p, int64_t count, V& a, V& b) {
  T buffer[kBlock] = {};
  memcpy(buffer, p, size_t(count) * sizeof(T));
  load2(buffer, a, b);
}

// Below this magnitude a group counts as zero; its reciprocal would overflow.
constexpr float kLeastMagnitude = 1e-30f;

// A group of a token's elements, zeros past its end, that is to be rounded.
struct TokenGroup {
  float values[kPlaneGroup];
  float largest;
  bool finite;
  bool zero;  // or not finite: no code but zero
};

inline TokenGroup load_group(const float* x, int64_t length, int64_t g) {
  TokenGroup group = {};
  const int64_t left = length - g * kPlaneGroup;
  memcpy(group.values, x + g * kPlaneGroup,
         size_t(left < kPlaneGroup ? left : kPlaneGroup) * sizeof(float));
  // By sixteens: in the order of a sum compilers make no vectors.
  float largest[16] = {}, total[16] = {};
  for (int64_t k = 0; k < kPlaneGroup; k += 16)
    for (int64_t i = 0; i < 16; ++i) {
      const float magnitude = fabsf(group.values[k + i]);
      largest[i] = magnitude > largest[i] ? magnitude : largest[i];
      total[i] += magnitude;
    }
  for (int64_t half = 8; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) {
      largest[i] = largest[i + half] > largest[i] ? largest[i + half] : largest[i];
      total[i] += total[i + half];
    }
  group.largest = largest[0];
  group.finite = total[0] == total[0] && group.largest <= 3.4028234e38f;
  group.zero = !group.finite || group.largest <= kLeastMagnitude;
  return group;
}

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// The numbers of the bits of `mask`.
inline int64_t list_tokens(uint64_t mask, uint8_t* token) {
  int64_t count = 0;
  for (; mask; mask &= mask - 1) token[count++] = uint8_t(__builtin_ctzll(mask));
  return count;
}

inline uint64_t all_tokens(int64_t count) {
  return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

}  // namespace
