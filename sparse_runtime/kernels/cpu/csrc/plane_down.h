// Sums over rows in planes, weighed by h.
#pragma once

#include "plane_dots.h"
#include "planes.h"

namespace {

using namespace sparse_ffn;

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

inline Chunks interleaved(int w, const Chunks* rows) {
  return {interleave(w, rows[0].first, rows[1].first, rows[2].first, rows[3].first),
          interleave(w, rows[0].second, rows[1].second, rows[2].second, rows[3].second)};
}

// Adds to y, 256 sums of a unit, in the order [w][c][lane]: for a full unit that of the columns.
// `rows` are the unit's bytes in each row.
template <int kBase, int kResidual, bool kTail>
inline void down_unit(const uint8_t* const* base, const uint8_t* const* residual, int64_t quads,
                      int64_t unit, int64_t u, int64_t stride, const Weighed& weighed, float* y,
                      Prefetch& prefetch) {
  constexpr int kGroups = kSums / 8;
  // As many as are read in all passes over the unit, and some for the scales.
  constexpr int64_t kLines = (2 * (kBase + kResidual) * kGroups / 4 + kParts - 1) / kParts + 1;
  const int64_t at_base = unit * 32 * kBase, at_residual = unit * 32 * kResidual;
  const int64_t g = 4 * unit;
  for (int part = 0; part < kParts; ++part)
    for (int first = 0; first < 4; first += kGroups) {
      Ints high[4][kGroups], low[4][kGroups];
#pragma GCC unroll 4
      for (int w = 0; w < kGroups; ++w)
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          high[c][w] = no_ints();
          low[c][w] = ints_of<kTail>(weighed.starts, g, first + w, part);
        }
      for (int64_t q = 0; q < quads; ++q) {
        Chunks whole[4], finer[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const auto own = Planes<kBase, kResidual>::template load<kTail>(
              base[4 * q + i] + at_base, residual[4 * q + i] + at_residual, u, part);
          whole[i] = own.base, finer[i] = own.residual;
        }
        prefetch.step(kLines);
#pragma GCC unroll 4
        for (int w = 0; w < kGroups; ++w) {
          Planes<kBase, kResidual> mixed;
          if constexpr (kBase > 0) mixed.base = interleaved(first + w, whole);
          if constexpr (kResidual > 0) mixed.residual = interleaved(first + w, finer);
          Bytes codes[4];
          mixed.codes(codes);
          const Ints weight = ints_of<kTail>(weighed.high + q * stride, g, first + w, part);
          const Ints rest = ints_of<kTail>(weighed.low + q * stride, g, first + w, part);
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) {
            high[c][w] = add_products(high[c][w], codes[c], weight);
            low[c][w] = add_products(low[c][w], codes[c], rest);
          }
        }
      }
#pragma GCC unroll 4
      for (int w = 0; w < kGroups; ++w) {
        const Lanes step = lanes_of<kTail>(weighed.steps, g, first + w, part);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          float* const sums = y + 64 * (first + w) + 16 * c + part * kLanes;
          const Ints sum = plus(shift_left<7>(high[c][w]), low[c][w]);
          store(sums, madd(to_lanes(sum), step, load_lanes(sums)));
        }
      }
    }
}

// h * S of `count` rows, a multiple of four, as Weighed has it.
template <int kBase, int kResidual>
void weigh(const uint8_t* const* scales, const float* h, int64_t count, int64_t groups,
           DownScratch& scratch) {
  constexpr float factor = 1.0f / float(1 << kResidual);  // of the last bit, in scales
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
    store_ints(scratch.starts + g, minus(no_ints(), offset_of<kBase, kResidual>(sum)));
  }
}

// By lane, for a tail of u groups that begins at group g.
template <class T>
inline void spread_lanes(const T* values, int64_t u, T* out) {
  for (int64_t w = 0; w < 4; ++w)
    for (int64_t l = 0; l < 16; ++l)
      out[16 * w + l] = l / 4 < u ? values[kTailGroups[u][l / 4 * 4 + w]] : T(0);
}

template <int kBase, int kResidual>
void down_with(const DownRows& rows, int64_t groups, DownScratch& scratch, float* y,
               Prefetch& prefetch) {
  if constexpr (kBase > 0 && kResidual > 0 && !kJoined<kBase, kResidual>) {
    down_with<kBase, 0>(rows, groups, scratch, y, prefetch);
    down_with<0, kResidual>(rows, groups, scratch, y, prefetch);
    return;
  } else {
    weigh<kBase, kResidual>(rows.scales, rows.h, rows.count, groups, scratch);
    const int64_t units = groups / 4, rest = groups % 4, quads = rows.count / 4;
    const int64_t padded = (groups + 15) / 16 * 16;
    const Weighed weighed = {scratch.high, scratch.low, scratch.starts, scratch.steps};
    for (int64_t unit = 0; unit < units; ++unit)
      down_unit<kBase, kResidual, false>(rows.base, rows.residual, quads, unit, 4, padded, weighed,
                                         y + unit * kUnitCodes, prefetch);
    if (!rest) return;
    const uint8_t *base[kDownBlock], *residual[kDownBlock];
    for (int64_t i = 0; i < rows.count; ++i) {
      uint8_t* const tails = scratch.tails + 256 * i;
      base[i] = tail_of<kBase>(rows.base[i] + units * 32 * kBase, rest, tails);
      residual[i] = tail_of<kResidual>(rows.residual[i] + units * 32 * kResidual, rest, tails + 128);
    }
    const int64_t g = 4 * units;
    for (int64_t q = 0; q < quads; ++q) {
      spread_lanes(scratch.high + q * padded + g, rest, scratch.tail_high + q * 64);
      spread_lanes(scratch.low + q * padded + g, rest, scratch.tail_low + q * 64);
    }
    int32_t starts[64];
    float steps[64];
    spread_lanes(scratch.starts + g, rest, starts);
    spread_lanes(scratch.steps + g, rest, steps);
    down_unit<kBase, kResidual, true>(base, residual, quads, 0, rest, 64,
                                      {scratch.tail_high, scratch.tail_low, starts, steps},
                                      y + units * kUnitCodes, prefetch);
  }
}

template <int kBase>
void down_with_base(int residual, const DownRows& rows, int64_t groups, DownScratch& scratch,
                    float* y, Prefetch& prefetch) {
  if (residual == 2) return down_with<kBase, 2>(rows, groups, scratch, y, prefetch);
  if (residual == 3) return down_with<kBase, 3>(rows, groups, scratch, y, prefetch);
  if (residual == 4) return down_with<kBase, 4>(rows, groups, scratch, y, prefetch);
  if constexpr (kBase > 0) down_with<kBase, 0>(rows, groups, scratch, y, prefetch);
}

void plane_down(const PlaneFormat& planes, const DownRows& rows, int64_t groups,
                DownScratch& scratch, float* y, Prefetch& prefetch) {
  if (planes.base == 0) down_with_base<0>(planes.residual, rows, groups, scratch, y, prefetch);
  if (planes.base == 3) down_with_base<3>(planes.residual, rows, groups, scratch, y, prefetch);
  if (planes.base == 4) down_with_base<4>(planes.residual, rows, groups, scratch, y, prefetch);
}

}  // namespace
