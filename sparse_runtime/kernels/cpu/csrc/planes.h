// Loops over weights in planes, whose layout planes.py draws. Each isa_*.cpp defines for them:
//
//   Bytes, Ints, Lanes          vectors of one length: bytes, 32-bit integers, fp32
//   kSums                       vectors of sums that the registers hold beside all else
//   kPlaneTokens                tokens of a pass of dot products: a power of two
//   load_bytes load_nibbles bits_of shift shift_up either interleave
//                               codes out of bytes; load_nibbles(p, part) leaves the part's bytes of
//                               n (planes.py) in the low four bits; shift and shift_up may leave bits
//                               of a neighbor where bits_of then takes none; interleave(w, a, b, c, d)
//                               is for bytes 4w…4w+3 of each 16 the bytes of a, b, c and d in turns
//   add_products(sums, a, b)    in each 32-bit lane plus four products of a, unsigned, below 128, and b,
//                               signed, above -128
//   no_ints all_ints load_ints load_four_ints store_ints plus minus masked shift_left shift_right
//   to_lanes to_ints load_lanes all_lanes load_scales load_four_times, and add mul madd divide vmax
//   store sum4 of Lanes
#pragma once

#include <math.h>
#include <string.h>

#include "blocks.h"
#include "prefetch.h"

namespace {

using namespace sparse_ffn;

constexpr int kParts = 64 / int(sizeof(Bytes));       // vectors in a full unit's vector of codes
constexpr int kLanes = int(sizeof(Bytes)) / 4;
constexpr int64_t kUnitCodes = 4 * kPlaneGroup;

// ---------------------------------------------------------------------------------------------
// Codes of a unit

// Bits of each byte, n places lower, or higher.
template <int n>
inline Bytes bits_at(Bytes v, int mask) {
  if constexpr (n > 0) return bits_of(shift<n>(v), mask);
  if constexpr (n < 0) return bits_of(shift_up<-n>(v), mask);
  return bits_of(v, mask);
}

// Part `part` of a unit's bytes: chunks of a row, of one length.
struct Chunks {
  Bytes first;
  Bytes second;  // of 3 bits n (planes.py), of 2 none
};

template <int kBits>
inline __attribute__((always_inline)) Chunks load_chunks(const uint8_t* unit, int part) {
  const Bytes first = load_bytes(unit + part * sizeof(Bytes));
  if constexpr (kBits == 3) return {first, load_nibbles(unit + 64, part)};
  if constexpr (kBits == 4) return {first, load_bytes(unit + 64 + part * sizeof(Bytes))};
  return {first, first};
}

// The four vectors of codes in chunks. They stand kUp bits up.
template <int kBits, int kUp>
inline __attribute__((always_inline)) void split(const Chunks& chunks, Bytes* codes) {
  const Bytes a = chunks.first, b = chunks.second;
  if constexpr (kBits == 2) {
    codes[0] = bits_at<-kUp>(a, 3 << kUp);
    codes[1] = bits_at<2 - kUp>(a, 3 << kUp);
    codes[2] = bits_at<4 - kUp>(a, 3 << kUp);
    codes[3] = bits_at<6 - kUp>(a, 3 << kUp);
  } else if constexpr (kBits == 3) {
    codes[0] = bits_at<-kUp>(a, 7 << kUp);
    codes[1] = bits_at<3 - kUp>(a, 7 << kUp);
    codes[2] = bits_at<-kUp>(b, 7 << kUp);
    codes[3] = either(bits_at<6 - kUp>(a, 3 << kUp), bits_at<1 - kUp>(b, 4 << kUp));
  } else {
    codes[0] = bits_at<-kUp>(a, 15 << kUp);
    codes[1] = bits_at<4 - kUp>(a, 15 << kUp);
    codes[2] = bits_at<-kUp>(b, 15 << kUp);
    codes[3] = bits_at<4 - kUp>(b, 15 << kUp);
  }
}

// A row's last unit, of u < 4 groups, in the places of a full one.
template <int kBits>
inline void spread_tail(const uint8_t* tail, int64_t u, uint8_t* unit) {
  memset(unit, 0, 32 * kBits);
  for (int64_t i = 0; i < u; ++i) memcpy(unit + 16 * i, tail + 16 * i, 16);
  if constexpr (kBits == 3) {
    uint64_t halves[8] = {};
    for (int64_t i = 0; i < u; ++i) memcpy(halves + i, tail + 16 * u + 8 * i, 8);
    for (int64_t i = u; i-- > 0;) {
      halves[u + i] = halves[i] >> 4 & 0x0f0f0f0f0f0f0f0f;
      halves[i] &= 0x0f0f0f0f0f0f0f0f;
    }
    for (int i = 0; i < 4; ++i) halves[i] |= halves[4 + i] << 4;
    memcpy(unit + 64, halves, 32);
  } else if constexpr (kBits == 4) {
    for (int64_t i = 0; i < u; ++i) memcpy(unit + 64 + 16 * i, tail + 16 * (u + i), 16);
  }
}

// A last unit's bytes. Where loads take no mask, `tail` is as spread_tail made it.
template <int kBits>
inline __attribute__((always_inline)) Chunks load_tail_chunks(const uint8_t* tail,
                                                              [[maybe_unused]] int64_t u, int part) {
#ifdef SPARSE_FFN_MASKED_TAILS
  const Bytes first = load_tail_bytes(tail, u);
  if constexpr (kBits == 3) return {first, load_tail_nibbles(tail + 16 * u, u)};
  if constexpr (kBits == 4) return {first, load_tail_bytes(tail + 16 * u, u)};
  return {first, first};
#else
  return load_chunks<kBits>(tail, part);
#endif
}

// A last unit's bytes as load_tail_chunks wants them, in `memory` [128] where they have to be moved.
template <int kBits>
inline const uint8_t* tail_of(const uint8_t* tail, [[maybe_unused]] int64_t u,
                              [[maybe_unused]] uint8_t* memory) {
#ifndef SPARSE_FFN_MASKED_TAILS
  if constexpr (kBits > 0) {
    spread_tail<kBits>(tail, u, memory);
    return memory;
  }
#endif
  return tail;
}

#ifndef SPARSE_FFN_MASKED_TAILS
inline Lanes spread_tail_scales(const bf16* p, int64_t, const uint8_t* groups) {
  float values[kLanes];
  for (int j = 0; j < kLanes; ++j) values[j] = to_float(p[groups[j]]);
  return load_lanes(values);
}
#endif

// Whether base and residual, where both are read, fit into one unsigned code below 128.
template <int kBase, int kResidual>
constexpr bool kJoined = kBase > 0 && kResidual > 0 && kBase + kResidual <= 7;

// Chunks of base and residual, as far as they are read, and the codes in them: joined, or of one plane.
template <int kBase, int kResidual>
struct Planes {
  static_assert(kBase == 0 || kResidual == 0 || kJoined<kBase, kResidual>);
  Chunks base, residual;

  template <bool kTail>
  static SPARSE_FFN_INLINE Planes load(const uint8_t* base, const uint8_t* residual, int64_t u,
                                       int part) {
    Planes planes;
    if constexpr (kBase > 0)
      planes.base = kTail ? load_tail_chunks<kBase>(base, u, part) : load_chunks<kBase>(base, part);
    if constexpr (kResidual > 0)
      planes.residual =
          kTail ? load_tail_chunks<kResidual>(residual, u, part) : load_chunks<kResidual>(residual, part);
    return planes;
  }
  SPARSE_FFN_INLINE void codes(Bytes* codes) const {
    if constexpr (kBase > 0) split<kBase, kResidual>(base, codes);
    if constexpr (kResidual > 0) {
      Bytes finer[4];
      split<kResidual, 0>(residual, finer);
      for (int c = 0; c < 4; ++c) codes[c] = kBase > 0 ? either(codes[c], finer[c]) : finer[c];
    }
  }
};

// What the codes' offset adds to a sum of weights.
template <int kBase, int kResidual>
inline Ints offset_of(Ints sum) {
  Ints offset = no_ints();
  if constexpr (kBase > 0) offset = shift_left<kBase - 1 + kResidual>(sum);
  if constexpr (kResidual > 0) offset = plus(offset, shift_left<kResidual - 1>(sum));
  return offset;
}

// The group of lane j in a last unit of u groups: j % u.
constexpr uint8_t kTailGroups[4][16] = {{},
                                        {},
                                        {0, 1, 0, 1, 0, 1, 0, 1},
                                        {0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2}};

}  // namespace
