// Loops over weights in planes, whose layout planes.py draws. Each isa_*.cpp defines for them:
//
//   Bytes, Ints, Lanes          vectors of one length: bytes, 32-bit integers, fp32
//   kSums                       vectors of sums that the registers hold beside all else
//   kPlaneTokens                tokens of a pass of dot products: a power of two
//   load_bytes load_nibbles low_bits shift either interleave
//                               codes out of bytes; load_nibbles(p, part) leaves the part's bytes of
//                               n (planes.py) in the low four bits; shift may leave bits of a
//                               neighbor above what low_bits then takes; interleave(w, a, b, c, d) is
//                               for bytes 4w…4w+3 of each 16 the bytes of a, b, c and d in turns
//   add_products(sums, a, b)    in each 32-bit lane plus four products of a, unsigned, below 16, and b,
//                               signed
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

// The codes in a chunk's bytes, and n's: four, or two of 4 bits.
template <int kBits>
inline __attribute__((always_inline)) void split_codes(Bytes a, Bytes n, Bytes* codes) {
  if constexpr (kBits == 2) {
    codes[0] = low_bits(a, 3);
    codes[1] = low_bits(shift<2>(a), 3);
    codes[2] = low_bits(shift<4>(a), 3);
    codes[3] = low_bits(shift<6>(a), 3);
  } else if constexpr (kBits == 3) {
    codes[0] = low_bits(a, 7);
    codes[1] = low_bits(shift<3>(a), 7);
    codes[2] = low_bits(n, 7);
    codes[3] = either(low_bits(shift<6>(a), 3), low_bits(shift<1>(n), 4));
  } else {
    codes[0] = low_bits(a, 15);
    codes[1] = low_bits(shift<4>(a), 15);
  }
}

// Part `part` of a unit's four vectors of codes.
template <int kBits>
inline __attribute__((always_inline)) void load_codes(const uint8_t* unit, int part, Bytes* codes) {
  const Bytes a = load_bytes(unit + part * sizeof(Bytes));
  if constexpr (kBits == 4) {
    const Bytes b = load_bytes(unit + 64 + part * sizeof(Bytes));
    split_codes<4>(a, a, codes);
    split_codes<4>(b, b, codes + 2);
  } else {
    split_codes<kBits>(a, kBits == 3 ? load_nibbles(unit + 64, part) : a, codes);
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
template <int kBits>
inline __attribute__((always_inline)) void load_tail_codes(const uint8_t* tail, int64_t u, int,
                                                           Bytes* codes) {
  const Bytes a = load_tail_bytes(tail, u);
  if constexpr (kBits == 4) {
    const Bytes b = load_tail_bytes(tail + 16 * u, u);
    split_codes<4>(a, a, codes);
    split_codes<4>(b, b, codes + 2);
  } else {
    split_codes<kBits>(a, kBits == 3 ? load_tail_nibbles(tail + 16 * u, u) : a, codes);
  }
}
#else
template <int kBits>
inline void load_tail_codes(const uint8_t* tail, int64_t u, int part, Bytes* codes) {
  uint8_t unit[128];
  spread_tail<kBits>(tail, u, unit);
  load_codes<kBits>(unit, part, codes);
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

// ---------------------------------------------------------------------------------------------
// Tokens

constexpr float kFinest = 16256.0f;  // 127 * 128: what two signed bytes hold, one of them 7 bits wide

// One token in the order of the codes: see PlaneTokens.
void round_plane_token(const float* x, int64_t length, int8_t* high, int8_t* low, float* scales,
                       int32_t* starts, int64_t start_stride) {
  const int64_t groups = plane_groups(length);
  for (int64_t g = 0; g < groups; ++g) {
    float values[kPlaneGroup] = {};
    const int64_t left = length - g * kPlaneGroup;
    memcpy(values, x + g * kPlaneGroup,
           size_t(left < kPlaneGroup ? left : kPlaneGroup) * sizeof(float));
    float largest = 0.0f, total = 0.0f;
    for (int64_t k = 0; k < kPlaneGroup; ++k) {
      const float magnitude = fabsf(values[k]);
      largest = magnitude > largest ? magnitude : largest;
      total += magnitude;
    }
    const bool finite = total == total && largest <= 3.4028234e38f;
    const bool zero = !finite || largest <= kLeastMagnitude;
    const float inverse = zero ? 0.0f : kFinest / largest;
    // What is not finite makes every dot product NaN.
    scales[g] = finite ? (zero ? 0.0f : largest / kFinest) : __builtin_nanf("");
    const int64_t unit = g / 4, u = groups - 4 * unit < 4 ? groups - 4 * unit : 4, in_unit = g % 4;
    int32_t sum = 0;
    int8_t* const high_unit = high + unit * kUnitCodes;
    int8_t* const low_unit = low + unit * kUnitCodes;
    for (int64_t k = 0; k < kPlaneGroup; ++k) {
      const int32_t code = zero ? 0 : int32_t(__builtin_rintf(values[k] * inverse));
      const int32_t upper = (code + 64) >> 7;
      const int64_t at = 64 * (k / 16) + ((k / 4 % 4) * u + in_unit) * 4 + k % 4;
      high_unit[at] = int8_t(upper);
      low_unit[at] = int8_t(code - 128 * upper);
      sum += code;
    }
    // What the codes' offset of 2^(bits-1) adds, taken off at the start.
    for (int bits = 2; bits <= 4; ++bits)
      starts[(bits - 2) * start_stride + g] = -(sum * (1 << (bits - 1)));
  }
  // The last unit's by lane.
  const int64_t u = groups % 4;
  for (int64_t j = 0; j < 16; ++j)
    scales[start_stride + j] = j < 4 * u ? scales[groups - u + kTailGroups[u][j]] : 0.0f;
}

// ---------------------------------------------------------------------------------------------
// Dot products of R rows with N tokens

// Sums of a unit's lanes: codes . x, over 128 times the high bytes and the low ones.
template <int kBits, int R, int N, bool kTail>
inline __attribute__((always_inline)) void dot_unit(const uint8_t* const* unit, int64_t unit_number,
                                                    const PlaneToken* x,
                                                    const float (*products)[N][16],
                                                    int64_t u, Lanes (*sums)[N]) {
  for (int s = 0; s < R; ++s) {
    for (int part = 0; part < kParts; ++part) {
      Bytes codes[4];
      if (kTail)
        load_tail_codes<kBits>(unit[s], u, part, codes);
      else
        load_codes<kBits>(unit[s], part, codes);
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) {
        const int64_t at = unit_number * kUnitCodes + part * int64_t(sizeof(Bytes));
        Ints high = no_ints();
        Ints low = part == 0 ? load_four_ints(x[t].starts[kBits - 2] + 4 * unit_number) : no_ints();
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          high = add_products(high, codes[c], load_ints(x[t].high + at + 64 * c));
          low = add_products(low, codes[c], load_ints(x[t].low + at + 64 * c));
        }
        const float* const scales = products[s][t];
        sums[s][t] = madd(to_lanes(plus(shift_left<7>(high), low)),
                          kTail ? load_lanes(scales + part * kLanes) : load_four_times(scales),
                          sums[s][t]);
      }
    }
  }
}

template <int kBits, int R, int N>
inline void dot_rows(const uint8_t* const* planes, const uint8_t* const* scales, int64_t groups,
                     const PlaneToken* x, Prefetch& prefetch, float (*out)[R]) {
  // As many as are read: codes, and now and then scales.
  constexpr int64_t lines = R * kBits / 2 + 1;
  Lanes sums[R][N];
  for (int s = 0; s < R; ++s)
    for (int t = 0; t < N; ++t) sums[s][t] = all_lanes(0.0f);
  const int64_t units = groups / 4, rest = groups % 4;
  for (int64_t first = 0; first < units; first += 4) {
    float products[R][N][16];
    for (int s = 0; s < R; ++s)
      for (int64_t g = 0; g < 16; g += kLanes) {
        const int64_t left = groups - 4 * first - g;
        const Lanes own =
            load_scales(reinterpret_cast<const bf16*>(scales[s]) + 4 * first + g, left < 0 ? 0 : left);
        for (int t = 0; t < N; ++t)
          store(products[s][t] + g, mul(own, load_lanes(x[t].scales + 4 * first + g)));
      }
    const int64_t last = units - first < 4 ? units - first : 4;
    for (int64_t i = 0; i < last; ++i) {
      const uint8_t* unit[R];
      float four[R][N][16];
      for (int s = 0; s < R; ++s) {
        unit[s] = planes[s] + (first + i) * 32 * kBits;
        for (int t = 0; t < N; ++t) memcpy(four[s][t], products[s][t] + 4 * i, 16);
      }
      prefetch.step(lines);
      dot_unit<kBits, R, N, false>(unit, first + i, x, four, 4, sums);
    }
  }
  if (rest) {
    const uint8_t* unit[R];
    float products[R][N][16];
    for (int s = 0; s < R; ++s) {
      unit[s] = planes[s] + units * 32 * kBits;
      const bf16* const own = reinterpret_cast<const bf16*>(scales[s]) + 4 * units;
      for (int64_t j = 0; j < 16; j += kLanes) {
        const Lanes spread = spread_tail_scales(own, rest, kTailGroups[rest] + j);
        for (int t = 0; t < N; ++t)
          store(products[s][t] + j, mul(spread, load_lanes(x[t].tail_scales + j)));
      }
    }
    prefetch.step(lines);
    dot_unit<kBits, R, N, true>(unit, units, x, products, rest, sums);
  }
  for (int t = 0; t < N; ++t)
    for (int s = 0; s < R; s += 4)
      sum4(sums[s][t], sums[s + 1][t], sums[s + 2][t], sums[s + 3][t], out[t] + s);
}

template <int kBits, int N>
void dots_of(const PlaneRows& rows, const PlaneTokens& x, int64_t r, const uint8_t* token,
             int64_t count, float* out, int64_t ld, Prefetch& prefetch) {
  constexpr int R = kPlaneRows;
  for (; count >= N; count -= N, token += N) {
    PlaneToken some[N];
    for (int t = 0; t < N; ++t) some[t] = x.token(token[t]);
    float values[N][R];
    dot_rows<kBits, R, N>(rows.planes + r, rows.scales + r, x.groups, some, prefetch, values);
    for (int t = 0; t < N; ++t)
      for (int s = 0; s < R; ++s) out[token[t] * ld + r + s] = values[t][s];
  }
  if constexpr (N > 1)
    dots_of<kBits, N / 2>(rows, x, r, token, count, out, ld, prefetch);
}

template <int kBits>
void dots_with(const PlaneRows& rows, const PlaneTokens& x, float* out, int64_t ld,
               Prefetch& prefetch) {
  uint8_t token[kMaxTokens];
  for (int64_t r = 0; r < rows.count; r += kPlaneRows) {
    uint64_t wanted = rows.tokens ? 0 : all_tokens(x.count);
    if (rows.tokens)
      for (int s = 0; s < kPlaneRows; ++s) wanted |= rows.tokens[r + s];
    const int64_t count = list_tokens(wanted, token);
    dots_of<kBits, kPlaneTokens>(rows, x, r, token, count, out, ld, prefetch);
  }
}

void plane_dots(int bits, const PlaneRows& rows, const PlaneTokens& x, float* out, int64_t ld,
                Prefetch& prefetch) {
  if (bits == 2) dots_with<2>(rows, x, out, ld, prefetch);
  if (bits == 3) dots_with<3>(rows, x, out, ld, prefetch);
  if (bits == 4) dots_with<4>(rows, x, out, ld, prefetch);
}

// ---------------------------------------------------------------------------------------------
// Down: sums over rows, weighed by h

// Sums of h[i] * S[i, g] * code over four rows at a time, as integers: h * S is rounded to two bytes for
// all rows, in each group on its own. The rounding error is 2^-15 of the largest.
struct Weighed {
  const int32_t* high;   // [count / 4, units * 4]: a byte for each of four rows
  const int32_t* low;
  const int32_t* starts;  // [units * 4]: the offset of the codes
  const float* steps;     // [units * 4]
};

// As vectors: the same in all lanes of a full unit's vector w, or by lane in a tail (spread_weights).
template <bool kTail>
inline Ints ints_of(const int32_t* p, int64_t g, int w, int part) {
  if constexpr (kTail) return load_ints(p + 16 * w + part * kLanes);
  return all_ints(p[g + w]);
}
template <bool kTail>
inline Lanes lanes_of(const float* p, int64_t g, int w, int part) {
  if constexpr (kTail) return load_lanes(p + 16 * w + part * kLanes);
  return all_lanes(p[g + w]);
}

// Adds to y, 256 sums of a unit, in the order [w][c][lane]: for a full unit that of the columns.
// `rows` are the unit's bytes in each row.
template <int kBits, bool kTail>
inline void down_unit(const uint8_t* const* rows, int64_t quads, int64_t offset,
                      [[maybe_unused]] int64_t u, int64_t unit,
                      int64_t stride, const Weighed& weighed, float* y,
                      Prefetch& prefetch) {
  constexpr int kCodes = kBits == 4 ? 2 : 4;           // of one byte of a chunk
  constexpr int kGroups = kSums / (2 * kCodes) > 4 ? 4 : kSums / (2 * kCodes);
  // As many as are read in all passes over the unit, and some for the scales.
  constexpr int64_t kLines = (2 * kBits * kGroups / 4 + kParts - 1) / kParts / (kBits == 4 ? 2 : 1) + 1;
  const int64_t g = kTail ? 0 : 4 * unit;
  for (int part = 0; part < kParts; ++part)
    for (int chunk = 0; chunk < (kBits == 4 ? 2 : 1); ++chunk)
      for (int first = 0; first < 4; first += kGroups) {
        Ints high[kCodes][kGroups], low[kCodes][kGroups];
#pragma GCC unroll 4
        for (int w = 0; w < kGroups; ++w)
#pragma GCC unroll 4
          for (int c = 0; c < kCodes; ++c) {
            high[c][w] = no_ints();
            low[c][w] = ints_of<kTail>(weighed.starts, g, first + w, part);
          }
        for (int64_t q = 0; q < quads; ++q) {
          Bytes a[4], n[4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const uint8_t* const own = rows[4 * q + i] + offset;
#ifdef SPARSE_FFN_MASKED_TAILS
            if (kTail) {
              a[i] = load_tail_bytes(own + 16 * u * chunk, u);
              n[i] = kBits == 3 ? load_tail_nibbles(own + 16 * u, u) : a[i];
              continue;
            }
#endif
            a[i] = load_bytes(own + 64 * chunk + part * sizeof(Bytes));
            n[i] = kBits == 3 ? load_nibbles(own + 64, part) : a[i];
          }
          prefetch.step(kLines);
#pragma GCC unroll 4
          for (int w = 0; w < kGroups; ++w) {
            Bytes codes[4];
            const Bytes mixed = interleave(first + w, a[0], a[1], a[2], a[3]);
            split_codes<kBits>(
                mixed, kBits == 3 ? interleave(first + w, n[0], n[1], n[2], n[3]) : mixed, codes);
            const Ints weight = ints_of<kTail>(weighed.high + q * stride, g, first + w, part);
            const Ints rest = ints_of<kTail>(weighed.low + q * stride, g, first + w, part);
#pragma GCC unroll 4
            for (int c = 0; c < kCodes; ++c) {
              high[c][w] = add_products(high[c][w], codes[c], weight);
              low[c][w] = add_products(low[c][w], codes[c], rest);
            }
          }
        }
#pragma GCC unroll 4
        for (int w = 0; w < kGroups; ++w) {
          const Lanes step = lanes_of<kTail>(weighed.steps, g, first + w, part);
#pragma GCC unroll 4
          for (int c = 0; c < kCodes; ++c) {
            float* const sums = y + 64 * (first + w) + 16 * (kCodes * chunk + c) + part * kLanes;
            const Ints sum = plus(shift_left<7>(high[c][w]), low[c][w]);
            store(sums, madd(to_lanes(sum), step, load_lanes(sums)));
          }
        }
      }
}

// h * S of `count` rows, a multiple of four, as Weighed has it.
void weigh(int bits, const uint8_t* const* scales, const float* h, int64_t count, int64_t groups,
           float factor, DownScratch& scratch) {
  const int64_t padded = (groups + 15) / 16 * 16;
  float poison = 0.0f;
  for (int64_t i = 0; i < count; ++i) poison += h[i] - h[i];
  for (int64_t g = 0; g < padded; g += kLanes) {
    Lanes largest = all_lanes(kLeastMagnitude);
    for (int64_t i = 0; i < count; ++i) {
      const Lanes own = mul(load_scales(reinterpret_cast<const bf16*>(scales[i]) + g,
                                        groups - g < 0 ? 0 : groups - g),
                            all_lanes(h[i] * factor));
      store(scratch.values + i * kLanes, own);
      largest = vmax(largest, vmax(own, mul(own, all_lanes(-1.0f))));
    }
    const Lanes inverse = divide(all_lanes(kFinest), largest);
    store(scratch.steps + g, madd(largest, all_lanes(1.0f / kFinest), all_lanes(poison)));
    Ints sum = no_ints();
    for (int64_t q = 0; q < count / 4; ++q) {
      Ints high = no_ints(), low = no_ints();
      const auto add_row = [&](int64_t i, Ints& upper, Ints& lower) {
        const Ints code = to_ints(mul(load_lanes(scratch.values + i * kLanes), inverse));
        const Ints top = shift_right<7>(plus(code, all_ints(64)));
        sum = plus(sum, code);
        upper = masked(top, 255);
        lower = masked(minus(code, shift_left<7>(top)), 255);
      };
      Ints upper, lower;
      add_row(4 * q, upper, lower);
      high = upper, low = lower;
      add_row(4 * q + 1, upper, lower);
      high = plus(high, shift_left<8>(upper)), low = plus(low, shift_left<8>(lower));
      add_row(4 * q + 2, upper, lower);
      high = plus(high, shift_left<16>(upper)), low = plus(low, shift_left<16>(lower));
      add_row(4 * q + 3, upper, lower);
      high = plus(high, shift_left<24>(upper)), low = plus(low, shift_left<24>(lower));
      store_ints(scratch.high + q * padded + g, high);
      store_ints(scratch.low + q * padded + g, low);
    }
    sum = bits == 2 ? shift_left<1>(sum) : bits == 3 ? shift_left<2>(sum) : shift_left<3>(sum);
    store_ints(scratch.starts + g, minus(no_ints(), sum));
  }
}

// By lane, for a tail of u groups that begins at group g.
template <class T>
inline void spread_lanes(const T* values, int64_t u, T* out) {
  for (int64_t w = 0; w < 4; ++w)
    for (int64_t l = 0; l < 16; ++l)
      out[16 * w + l] = l / 4 < u ? values[kTailGroups[u][l / 4 * 4 + w]] : T(0);
}

template <int kBits>
void down_with(const uint8_t* const* planes, int64_t count, int64_t groups, DownScratch& scratch,
               float* y, Prefetch& prefetch) {
  const int64_t units = groups / 4, rest = groups % 4, quads = count / 4;
  const int64_t padded = (groups + 15) / 16 * 16;
  const Weighed weighed = {scratch.high, scratch.low, scratch.starts, scratch.steps};
  for (int64_t unit = 0; unit < units; ++unit)
    down_unit<kBits, false>(planes, quads, unit * 32 * kBits, 4, unit, padded, weighed,
                            y + unit * kUnitCodes, prefetch);
  if (!rest) return;
#ifdef SPARSE_FFN_MASKED_TAILS
  const uint8_t* const* const tails = planes;
  const int64_t offset = units * 32 * kBits;
#else
  const uint8_t* tails[kPlaneBlock];
  for (int64_t i = 0; i < count; ++i) {
    spread_tail<kBits>(planes[i] + units * 32 * kBits, rest, scratch.tails + i * 128);
    tails[i] = scratch.tails + i * 128;
  }
  const int64_t offset = 0;
#endif
  const int64_t g = 4 * units;
  for (int64_t q = 0; q < quads; ++q) {
    spread_lanes(scratch.high + q * padded + g, rest, scratch.tail_high + q * 64);
    spread_lanes(scratch.low + q * padded + g, rest, scratch.tail_low + q * 64);
  }
  int32_t starts[64];
  float steps[64];
  spread_lanes(scratch.starts + g, rest, starts);
  spread_lanes(scratch.steps + g, rest, steps);
  down_unit<kBits, true>(tails, quads, offset, rest, 0, 64,
                         {scratch.tail_high, scratch.tail_low, starts, steps},
                         y + units * kUnitCodes, prefetch);
}

void plane_down(int bits, const uint8_t* const* planes, const uint8_t* const* scales,
                const float* h, int64_t count, int64_t groups, float factor, DownScratch& scratch,
                float* y, Prefetch& prefetch) {
  weigh(bits, scales, h, count, groups, factor, scratch);
  if (bits == 2) down_with<2>(planes, count, groups, scratch, y, prefetch);
  if (bits == 3) down_with<3>(planes, count, groups, scratch, y, prefetch);
  if (bits == 4) down_with<4>(planes, count, groups, scratch, y, prefetch);
}

// ---------------------------------------------------------------------------------------------
// Values

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
