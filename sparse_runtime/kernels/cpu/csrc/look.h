// Looking: dot products with the low-bit copies.
#pragma once

#include <math.h>
#include <string.h>

#include "blocks.h"

namespace {

using namespace sparse_ffn;

// Groups whose scales are prepared at a time.
constexpr int64_t kLookSpan = 64;

// Records are prefetched so many before they are read. At 4, looks at short records (H = 576) take one
// core a fifth longer: 37 ns of arithmetic each do not cover what the memory takes to answer.
constexpr int64_t kLookAhead = 12;

void round_token(const float* x, int64_t length, int8_t* codes, float* scales, float* offsets) {
  const int64_t groups = (length + kLookGroup - 1) / kLookGroup;
  for (int64_t g = 0; g < groups; ++g) {
    const TokenGroup group = load_group(x, length, g);
    int8_t* const target = codes + g * kLookGroup;
    if (group.zero) {
      // What cannot be judged makes every dot product NaN, which confirms the neuron.
      memset(target, 0, kLookGroup);
      scales[g] = offsets[g] = group.finite ? 0.0f : __builtin_nanf("");
      continue;
    }
    const float inverse = 127.0f / group.largest;
    int32_t sum = 0;
    for (int64_t k = 0; k < kLookGroup; ++k) {
      const int32_t code = int32_t(__builtin_rintf(group.values[k] * inverse));
      target[k] = int8_t(code);
      sum += code;
    }
    scales[g] = group.largest / 127.0f;
    offsets[g] = 8.0f * scales[g] * float(sum);
  }
}

// values[s] for the gates (s < R) and ups of R records and one token; `next` are records that come
// some time after these, prefetched while these are read.
template <int R>
inline void look_records(const uint8_t* const* record, const uint8_t* const* next, int64_t groups,
                         const int8_t* x, const float* scales, const float* offsets,
                         float* values) {
  V sums[2 * R];
  for (int s = 0; s < 2 * R; ++s) sums[s] = zero();
  // The scales are wanted first.
  for (int s = 0; s < R; ++s) {
    const uint8_t* const end = next[s] + 68 * groups;
    for (const uint8_t* line = next[s] + 64 * groups; line < end; line += 64)
      __builtin_prefetch(line, 0, 2);
    __builtin_prefetch(end - 1, 0, 2);
  }
  for (int64_t first = 0; first < groups; first += kLookSpan) {
    const int64_t span = groups - first < kLookSpan ? groups - first : kLookSpan;
    float products[2 * R][kLookSpan];
    for (int s = 0; s < 2 * R; ++s) {
      const bf16* const own = reinterpret_cast<const bf16*>(record[s % R] + 64 * groups) +
                              (s < R ? 0 : groups) + first;
      float* const weights = products[s];
      for (int64_t g = 0; g < span; g += kWidth) {
        const V weight = load_natural(own + g, span - g);
        // All lanes are added up in the end.
        sums[s] = sub(sums[s], mul(weight, load(offsets + first + g)));
        store(weights + g, mul(weight, load(scales + first + g)));
      }
    }
    for (int64_t g = 0; g < span; ++g) {
      const int64_t at = 32 * (first + g);
#pragma GCC unroll 8
      for (int s = 0; s < 2 * R; ++s) {
        const int64_t part = s < R ? at : at + 32 * groups;
        sums[s] = look_group(record[s % R] + part, x + 2 * at, products[s][g], sums[s]);
        if (s < R) __builtin_prefetch(next[s] + 2 * at, 0, 2);
      }
    }
  }
  for (int s = 0; s < 2 * R; s += 4)
    sum4(sums[s], sums[s + 1], sums[s + 2], sums[s + 3], values + s);
}

void look(Records records, Rows rows, LookTokens x, float* gate, float* up, int64_t ld) {
  constexpr int R = kLookRecords;
  const int64_t last = rows.count - 1;
  for (int64_t r = 0; r < rows.count; r += R) {
    const uint8_t* record[R];
    const uint8_t* next[R];
    uint64_t wanted = rows.tokens ? 0 : all_tokens(x.count);
    for (int64_t s = 0; s < R; ++s) {
      const int64_t here = r + s < last ? r + s : last;
      const int64_t after = here + kLookAhead < last ? here + kLookAhead : last;
      record[s] = records.data + rows.index[here] * records.stride;
      next[s] = records.data + rows.index[after] * records.stride;
      if (rows.tokens) wanted |= rows.tokens[here];
    }
    const int64_t real = rows.count - r < R ? rows.count - r : R;
    for (; wanted; wanted &= wanted - 1) {
      const int64_t t = __builtin_ctzll(wanted);
      float values[2 * R];
      look_records<R>(record, next, records.groups, x.codes + t * x.code_stride,
                      x.scales + t * x.group_stride, x.offsets + t * x.group_stride, values);
      for (int64_t s = 0; s < real; ++s) {
        gate[t * ld + r + s] = values[s];
        up[t * ld + r + s] = values[R + s];
      }
    }
  }
}

}  // namespace
