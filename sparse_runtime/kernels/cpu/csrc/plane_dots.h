// Tokens rounded to two bytes, and their dot products with rows in planes.
#pragma once

#include "planes.h"

namespace {

using namespace sparse_ffn;

constexpr float kFinest = 16256.0f;  // 127 * 128: what two signed bytes hold, one of them 7 bits wide

// One token in the order of the codes: see PlaneTokens.
void round_plane_token(const float* x, int64_t length, int8_t* high, int8_t* low, float* scales,
                       int32_t* starts, int64_t start_stride) {
  const int64_t groups = plane_groups(length);
  for (int64_t g = 0; g < groups; ++g) {
    const TokenGroup group = load_group(x, length, g);
    const float inverse = group.zero ? 0.0f : kFinest / group.largest;
    // What is not finite makes every dot product NaN.
    scales[g] = group.finite ? (group.zero ? 0.0f : group.largest / kFinest) : __builtin_nanf("");
    const int64_t unit = g / 4, u = groups - 4 * unit < 4 ? groups - 4 * unit : 4, in_unit = g % 4;
    int32_t sum = 0;
    int8_t* const high_unit = high + unit * kUnitCodes;
    int8_t* const low_unit = low + unit * kUnitCodes;
    for (int64_t k = 0; k < kPlaneGroup; ++k) {
      const int32_t code =
          group.zero ? 0 : int32_t(__builtin_rintf(group.values[k] * inverse));
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

}  // namespace
