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

// The codes in a chunk's bytes, and n's: four, or two of 4 bits. They stand kUp bits up.
template <int kBits, int kUp = 0>
inline __attribute__((always_inline)) void split_codes(Bytes a, Bytes n, Bytes* codes) {
  if constexpr (kBits == 2) {
    codes[0] = bits_at<-kUp>(a, 3 << kUp);
    codes[1] = bits_at<2 - kUp>(a, 3 << kUp);
    codes[2] = bits_at<4 - kUp>(a, 3 << kUp);
    codes[3] = bits_at<6 - kUp>(a, 3 << kUp);
  } else if constexpr (kBits == 3) {
    codes[0] = bits_at<-kUp>(a, 7 << kUp);
    codes[1] = bits_at<3 - kUp>(a, 7 << kUp);
    codes[2] = bits_at<-kUp>(n, 7 << kUp);
    codes[3] = either(bits_at<6 - kUp>(a, 3 << kUp), bits_at<1 - kUp>(n, 4 << kUp));
  } else {
    codes[0] = bits_at<-kUp>(a, 15 << kUp);
    codes[1] = bits_at<4 - kUp>(a, 15 << kUp);
  }
}

// Part `part` of a unit's four vectors of codes.
template <int kBits, int kUp = 0>
inline __attribute__((always_inline)) void load_codes(const uint8_t* unit, int part, Bytes* codes) {
  const Bytes a = load_bytes(unit + part * sizeof(Bytes));
  if constexpr (kBits == 4) {
    const Bytes b = load_bytes(unit + 64 + part * sizeof(Bytes));
    split_codes<4, kUp>(a, a, codes);
    split_codes<4, kUp>(b, b, codes + 2);
  } else {
    split_codes<kBits, kUp>(a, kBits == 3 ? load_nibbles(unit + 64, part) : a, codes);
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

#ifdef SPARSE_FFN_MASKED_TAILS
template <int kBits, int kUp = 0>
inline __attribute__((always_inline)) void load_tail_codes(const uint8_t* tail, int64_t u, int,
                                                           Bytes* codes) {
  const Bytes a = load_tail_bytes(tail, u);
  if constexpr (kBits == 4) {
    const Bytes b = load_tail_bytes(tail + 16 * u, u);
    split_codes<4, kUp>(a, a, codes);
    split_codes<4, kUp>(b, b, codes + 2);
  } else {
    split_codes<kBits, kUp>(a, kBits == 3 ? load_tail_nibbles(tail + 16 * u, u) : a, codes);
  }
}
#else
template <int kBits, int kUp = 0>
inline void load_tail_codes(const uint8_t* tail, int64_t u, int part, Bytes* codes) {
  uint8_t unit[128];
  spread_tail<kBits>(tail, u, unit);
  load_codes<kBits, kUp>(unit, part, codes);
}
inline Lanes spread_tail_scales(const bf16* p, int64_t, const uint8_t* groups) {
  float values[kLanes];
  for (int j = 0; j < kLanes; ++j) values[j] = to_float(p[groups[j]]);
  return load_lanes(values);
}
#endif

// The group of lane j in a last unit of u groups: j % u.
constexpr uint8_t kTailGroups[4][16] = {{},
                                        {},
                                        {0, 1, 0, 1, 0, 1, 0, 1},
                                        {0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2}};

}  // namespace
