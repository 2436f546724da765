// Tokens rounded to two bytes, and their dot products with rows in planes.
#pragma once

#include "planes.h"

namespace {

using namespace sparse_ffn;

constexpr float kFinest = 16256.0f;  // 127 * 128: what two signed bytes hold, one of them 7 bits wide

// A group's values times `inverse`, rounded, as two bytes each; returns their sum.
inline int32_t round_group(const float* values, float inverse, int8_t* high, int8_t* low) {
  int32_t codes[kPlaneGroup], total = 0;
  for (int64_t k = 0; k < kPlaneGroup; k += kLanes)
    store_ints(codes + k, to_ints(mul(load_lanes(values + k), all_lanes(inverse))));
  for (int64_t k = 0; k < kPlaneGroup; ++k) {
    const int32_t upper = (codes[k] + 64) >> 7;
    high[k] = int8_t(upper);
    low[k] = int8_t(codes[k] - 128 * upper);
    total += codes[k];
  }
  return total;
}

// One token in the order of the codes: see PlaneTokens.
void round_plane_token(const float* x, int64_t length, int8_t* high, int8_t* low, float* scales,
                       int32_t* sums, int64_t padded_groups) {
  const int64_t groups = plane_groups(length);
  for (int64_t g = 0; g < groups; ++g) {
    const TokenGroup group = load_group(x, length, g);
    // What is not finite makes every dot product NaN.
    scales[g] = group.finite ? (group.zero ? 0.0f : group.largest / kFinest) : __builtin_nanf("");
    const int64_t unit = g / 4, u = groups - 4 * unit < 4 ? groups - 4 * unit : 4, in_unit = g % 4;
    if (group.zero) {
      sums[g] = 0;
      continue;
    }
    int8_t upper[kPlaneGroup], lower[kPlaneGroup];
    sums[g] = round_group(group.values, kFinest / group.largest, upper, lower);
    for (int64_t word = 0; word < kPlaneGroup / 4; ++word) {
      const int64_t at = unit * kUnitCodes + 64 * (word / 4) + (word % 4 * u + in_unit) * 4;
      memcpy(high + at, upper + 4 * word, 4);
      memcpy(low + at, lower + 4 * word, 4);
    }
  }
  // The last unit's by lane.
  const int64_t u = groups % 4;
  for (int64_t j = 0; j < 16; ++j)
    scales[padded_groups + j] = j < 4 * u ? scales[groups - u + kTailGroups[u][j]] : 0.0f;
}

// ---------------------------------------------------------------------------------------------
// Dot products of R rows with N tokens
//
// With codes of base planes (kResidual 0), of residual planes (kBase 0) or of both.

// What the offset of a unit's codes takes off: for its first four lanes.
template <int kBase, int kResidual>
inline Ints start_of(const PlaneToken& x, int64_t unit) {
  return minus(no_ints(), offset_of<kBase, kResidual>(load_four_ints(x.sums + 4 * unit)));
}

// The products of a row's codes with a token's, for their lanes.
inline __attribute__((always_inline)) Ints products(const Bytes* codes, const PlaneToken& x,
                                                    int64_t at, Ints start) {
  Ints high = no_ints(), low = start;
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    high = add_products(high, codes[c], load_ints(x.high + at + 64 * c));
    low = add_products(low, codes[c], load_ints(x.low + at + 64 * c));
  }
  return plus(shift_left<7>(high), low);
}

// A row's unit times N tokens, by lane.
template <int kBase, int kResidual, int N, bool kTail>
inline __attribute__((always_inline)) void multiply(const uint8_t* base, const uint8_t* residual,
                                                    int64_t unit, const PlaneToken* x, int64_t u,
                                                    int part, Ints* sums) {
  if constexpr (kBase > 0 && kResidual > 0 && !kJoined<kBase, kResidual>) {
    Ints finer[N];
    multiply<kBase, 0, N, kTail>(base, nullptr, unit, x, u, part, sums);
    multiply<0, kResidual, N, kTail>(nullptr, residual, unit, x, u, part, finer);
    for (int t = 0; t < N; ++t) sums[t] = plus(shift_left<kResidual>(sums[t]), finer[t]);
  } else {
    Bytes codes[4];
    Planes<kBase, kResidual>::template load<kTail>(base, residual, u, part).codes(codes);
    const int64_t at = unit * kUnitCodes + part * int64_t(sizeof(Bytes));
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t)
      sums[t] = products(codes, x[t], at,
                         part == 0 ? start_of<kBase, kResidual>(x[t], unit) : no_ints());
  }
}

// Adds a unit to the sums of its lanes.
template <int kBase, int kResidual, int R, int N, bool kTail>
inline __attribute__((always_inline)) void dot_unit(const uint8_t* const* base,
                                                    const uint8_t* const* residual, int64_t unit,
                                                    const PlaneToken* x, const float* scales,
                                                    int64_t u, Lanes (*sums)[N]) {
#pragma GCC unroll 4
  for (int s = 0; s < R; ++s)
    for (int part = 0; part < kParts; ++part) {
      Ints own[N];
      multiply<kBase, kResidual, N, kTail>(base[s], residual[s], unit, x, u, part, own);
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) {
        const float* const scale = scales + 16 * (s * N + t);
        sums[s][t] = madd(to_lanes(own[t]),
                          kTail ? load_lanes(scale + part * kLanes) : load_four_times(scale),
                          sums[s][t]);
      }
    }
}

template <int kBase, int kResidual, int R, int N>
inline void dot_rows(const uint8_t* const* base, const uint8_t* const* residual,
                     const uint8_t* const* scales, int64_t groups, const PlaneToken* x,
                     Prefetch& prefetch, float (*out)[R]) {
  // As many as are read: codes, and now and then scales.
  constexpr int64_t lines = R * (kBase + kResidual) / 2 + 1;
  constexpr float step = 1.0f / float(1 << kResidual);  // of the last bit, in scales
  Lanes sums[R][N];
  for (int s = 0; s < R; ++s)
    for (int t = 0; t < N; ++t) sums[s][t] = all_lanes(0.0f);
  const int64_t units = groups / 4, rest = groups % 4;
  const auto codes_of = [&](int64_t unit, const uint8_t** codes, const uint8_t** finer) {
    for (int s = 0; s < R; ++s) {
      codes[s] = kBase ? base[s] + unit * 32 * kBase : nullptr;
      finer[s] = kResidual ? residual[s] + unit * 32 * kResidual : nullptr;
    }
  };
  const uint8_t *codes[R], *finer[R];
  for (int64_t first = 0; first < units; first += 4) {
    float products[R][N][16];
    for (int s = 0; s < R; ++s)
      for (int64_t g = 0; g < 16; g += kLanes) {
        const int64_t left = groups - 4 * first - g;
        const Lanes own =
            load_scales(reinterpret_cast<const bf16*>(scales[s]) + 4 * first + g, left < 0 ? 0 : left);
        for (int t = 0; t < N; ++t)
          store(products[s][t] + g, mul(mul(own, all_lanes(step)),
                                        load_lanes(x[t].scales + 4 * first + g)));
      }
    const int64_t last = units - first < 4 ? units - first : 4;
    for (int64_t i = 0; i < last; ++i) {
      codes_of(first + i, codes, finer);
      prefetch.step(lines);
      dot_unit<kBase, kResidual, R, N, false>(codes, finer, first + i, x, products[0][0] + 4 * i, 4,
                                              sums);
    }
  }
  if (rest) {
    float products[R][N][16];
    for (int s = 0; s < R; ++s) {
      const bf16* const own = reinterpret_cast<const bf16*>(scales[s]) + 4 * units;
      for (int64_t j = 0; j < 16; j += kLanes) {
        const Lanes spread = spread_tail_scales(own, rest, kTailGroups[rest] + j);
        for (int t = 0; t < N; ++t)
          store(products[s][t] + j,
                mul(mul(spread, all_lanes(step)), load_lanes(x[t].tail_scales + j)));
      }
    }
    codes_of(units, codes, finer);
    uint8_t tails[2 * R][128];
    for (int s = 0; s < R; ++s) {
      codes[s] = tail_of<kBase>(codes[s], rest, tails[s]);
      finer[s] = tail_of<kResidual>(finer[s], rest, tails[R + s]);
    }
    prefetch.step(lines);
    dot_unit<kBase, kResidual, R, N, true>(codes, finer, units, x, products[0][0], rest, sums);
  }
  for (int t = 0; t < N; ++t)
    for (int s = 0; s < R; s += 4)
      sum4(sums[s][t], sums[s + 1][t], sums[s + 2][t], sums[s + 3][t], out[t] + s);
}

template <int kBase, int kResidual, int N>
void dots_of(const PlaneRows& rows, const PlaneTokens& x, int64_t r, const uint8_t* token,
             int64_t count, float* out, int64_t ld, Prefetch& prefetch) {
  constexpr int R = kPlaneRows;
  for (; count >= N; count -= N, token += N) {
    PlaneToken some[N];
    for (int t = 0; t < N; ++t) some[t] = x.token(token[t]);
    float values[N][R];
    dot_rows<kBase, kResidual, R, N>(rows.base + r, rows.residual + r, rows.scales + r, x.groups,
                                     some, prefetch, values);
    for (int t = 0; t < N; ++t)
      for (int s = 0; s < R; ++s) out[token[t] * ld + r + s] = values[t][s];
  }
  if constexpr (N > 1)
    dots_of<kBase, kResidual, N / 2>(rows, x, r, token, count, out, ld, prefetch);
}

template <int kBase, int kResidual>
void dots_with(const PlaneRows& rows, const PlaneTokens& x, float* out, int64_t ld,
               Prefetch& prefetch) {
  uint8_t token[kMaxTokens];
  for (int64_t r = 0; r < rows.count; r += kPlaneRows) {
    uint64_t wanted = rows.tokens ? 0 : all_tokens(x.count);
    if (rows.tokens)
      for (int s = 0; s < kPlaneRows; ++s) wanted |= rows.tokens[r + s];
    const int64_t count = list_tokens(wanted, token);
    dots_of<kBase, kResidual, kPlaneTokens>(rows, x, r, token, count, out, ld, prefetch);
  }
}

template <int kBase>
void dots_with_base(int residual, const PlaneRows& rows, const PlaneTokens& x, float* out,
                    int64_t ld, Prefetch& prefetch) {
  if (residual == 2) return dots_with<kBase, 2>(rows, x, out, ld, prefetch);
  if (residual == 3) return dots_with<kBase, 3>(rows, x, out, ld, prefetch);
  if (residual == 4) return dots_with<kBase, 4>(rows, x, out, ld, prefetch);
  if constexpr (kBase > 0) dots_with<kBase, 0>(rows, x, out, ld, prefetch);
}

void plane_dots(const PlaneFormat& planes, const PlaneRows& rows, const PlaneTokens& x, float* out,
                int64_t ld, Prefetch& prefetch) {
  if (planes.base == 0) dots_with_base<0>(planes.residual, rows, x, out, ld, prefetch);
  if (planes.base == 3) dots_with_base<3>(planes.residual, rows, x, out, ld, prefetch);
  if (planes.base == 4) dots_with_base<4>(planes.residual, rows, x, out, ld, prefetch);
}

}  // namespace
