// Down: R rows at once, added to the sums of one token or of several.
#pragma once

#include "blocks.h"

namespace {

using namespace sparse_ffn;

template <int R, class T>
inline __attribute__((always_inline)) void down_span(const T* const* w, const T* const* ahead,
                                                     int64_t begin, int64_t end, const V* h,
                                                     float* y) {
  for (int64_t k = begin; k < end; k += kBlock) {
    V a0 = load(y + k), b0 = load(y + k + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V a, b;
      load2(w[r] + k, a, b);
      a0 = madd(h[r], a, a0);
      b0 = madd(h[r], b, b0);
      prefetch_block(ahead[r] + k);
    }
    store(y + k, a0);
    store(y + k + kWidth, b0);
  }
}

// One token; `next` as for dot.
template <int R, class T>
void down_one(const T* const* w, const T* const* next, int64_t length, const float* h, float* y) {
  V weight[R];
  for (int r = 0; r < R; ++r) weight[r] = set1(h[r]);
  const int64_t whole = length / kBlock * kBlock, turn = turning_point<T>(whole);
  const T* ahead[R];
  for (int r = 0; r < R; ++r) ahead[r] = w[r] + prefetch_distance<T>();
  down_span<R, T>(w, ahead, 0, turn, weight, y);
  for (int r = 0; r < R; ++r) ahead[r] = next[r] - turn;
  down_span<R, T>(w, ahead, turn, whole, weight, y);
  if (whole < length) {
    V a0 = load(y + whole), b0 = load(y + whole + kWidth);
    for (int r = 0; r < R; ++r) {
      V a, b;
      load2_tail(w[r] + whole, length - whole, a, b);
      a0 = madd(weight[r], a, a0);
      b0 = madd(weight[r], b, b0);
    }
    store(y + whole, a0);
    store(y + whole + kWidth, b0);
  }
}

// Several tokens: the rows are widened once for all of them. h[t * ld + r], r < R. (Taking columns
// piecewise, so that the sums of all tokens stay in the L1 cache, gained nothing up to 64 tokens.)
template <int R, class T>
void down_many(const T* const* w, const T* const* next, int64_t length,
               const uint8_t* token, int64_t num_tokens, const float* h, int64_t ld, float* y,
               int64_t ldy) {
  const int64_t turn = turning_point<T>(length / kBlock * kBlock);
  for (int64_t k = 0; k < length; k += kBlock) {
    V a[R], b[R];
    if (k + kBlock <= length) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        load2(w[r] + k, a[r], b[r]);
        prefetch_block(k < turn ? w[r] + k + prefetch_distance<T>() : next[r] + (k - turn));
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) load2_tail(w[r] + k, length - k, a[r], b[r]);
    }
    for (int64_t i = 0; i < num_tokens; ++i) {
      float* const sums = y + token[i] * ldy + k;
      const float* const weight = h + token[i] * ld;
      V a0 = load(sums), b0 = load(sums + kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V v = set1(weight[r]);
        a0 = madd(v, a[r], a0);
        b0 = madd(v, b[r], b0);
      }
      store(sums, a0);
      store(sums + kWidth, b0);
    }
  }
}

// As many neurons from r on as passes of R take; returns where the next r is.
template <int R, class T>
int64_t down_rows(const Matrix& m, int64_t length, const Rows& rows, int64_t r, int64_t num_tokens,
                  const float* h, int64_t ld, float* y, int64_t ldy) {
  uint8_t token[kMaxTokens];
  int64_t count = rows.tokens ? 0 : list_tokens(all_tokens(num_tokens), token);
  for (; r + R <= rows.count; r += R) {
    const T* w[R];
    const T* next[R];
    for (int s = 0; s < R; ++s) {
      const int64_t after = r + R + s;
      w[s] = row_of<T>(m, rows, r + s);
      next[s] = row_of<T>(m, rows, after < rows.count ? after : rows.count - 1);
    }
    if (num_tokens == 1) {
      down_one<R, T>(w, next, length, h + r, y);
      continue;
    }
    if (rows.tokens) {
      uint64_t wanted = 0;
      for (int s = 0; s < R; ++s) wanted |= rows.tokens[r + s];
      count = list_tokens(wanted, token);
    }
    down_many<R, T>(w, next, length, token, count, h + r, ld, y, ldy);
  }
  return r;
}

template <class T>
void down(Matrix m, int64_t length, Rows rows, int64_t num_tokens, const float* h, int64_t ld,
          float* y, int64_t ldy) {
  int64_t r = 0;
  if (num_tokens == 1) {
    r = down_rows<kDownRowsOne, T>(m, length, rows, r, num_tokens, h, ld, y, ldy);
  } else {
    r = down_rows<kDownRows, T>(m, length, rows, r, num_tokens, h, ld, y, ldy);
  }
  r = down_rows<2, T>(m, length, rows, r, num_tokens, h, ld, y, ldy);
  down_rows<1, T>(m, length, rows, r, num_tokens, h, ld, y, ldy);
}

}  // namespace
