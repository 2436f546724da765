// Dot products of rows with packed tokens: gate and up, and linear layers.
#pragma once

#include "blocks.h"

namespace {

using namespace sparse_ffn;

// What a dot product of T multiplies with: fp32 in the order of load2.
template <class T>
struct Dot {
  using X = float;

  static void pack(const T* source, int64_t length, X* packed) {
    V a, b;
    int64_t k = 0;
    for (; k + kBlock <= length; k += kBlock) {
      load2(source + k, a, b);
      store(packed + k, a);
      store(packed + k + kWidth, b);
    }
    if (k < length) {
      load2_tail(source + k, length - k, a, b);
      store(packed + k, a);
      store(packed + k + kWidth, b);
    }
  }

  struct W {
    V a, b;
  };
  static inline W weights(const T* p) {
    W w;
    load2(p, w.a, w.b);
    return w;
  }
  static inline W weights_tail(const T* p, int64_t count) {
    W w;
    load2_tail(p, count, w.a, w.b);
    return w;
  }
  static inline void step(const W& w, const X* x, V& even, V& odd) {
    even = madd(w.a, load(x), even);
    odd = madd(w.b, load(x + kWidth), odd);
  }
};

#ifdef SPARSE_FFN_DOT_BF16
SPARSE_FFN_DOT_BF16
#endif

template <class T>
int64_t packed_size(int64_t length) {
  return round_up(length, kBlock) * int64_t(sizeof(typename Dot<T>::X));
}

template <class T>
void pack_token(const void* source, int64_t length, void* packed) {
  Dot<T>::pack(static_cast<const T*>(source), length, static_cast<typename Dot<T>::X*>(packed));
}

// ---------------------------------------------------------------------------------------------
// Dot products of R rows with N tokens

// Adds the products of the elements [begin, end), whole blocks, to `sums`, and prefetches `ahead`.
template <int R, int N, int C, class T>
inline __attribute__((always_inline)) void dot_span(const T* const* w, const T* const* ahead,
                                                    int64_t begin, int64_t end,
                                                    const typename Dot<T>::X* const* x,
                                                    V (&sums)[N][R][C]) {
  for (int64_t k = begin; k < end; k += kBlock) {
#pragma GCC unroll 16
    for (int s = 0; s < R; ++s) {
      const typename Dot<T>::W v = Dot<T>::weights(w[s] + k);
      prefetch_block(ahead[s] + k);
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) Dot<T>::step(v, x[t] + k, sums[t][s][0], sums[t][s][C - 1]);
    }
  }
}

// `next` are the rows that come after these, whose beginnings are prefetched while the ends of
// these are read; prefetching past a row's end would fetch rows that nobody wants.
template <int R, int N, class T>
inline void dot(const T* const* w, const T* const* next, int64_t length,
                const typename Dot<T>::X* const* x, float (*out)[R]) {
  // Enough chains of additions to hide the latency of madd.
  constexpr int C = R * N < 8 ? 2 : 1;
  V sums[N][R][C];
  for (int t = 0; t < N; ++t)
    for (int s = 0; s < R; ++s)
      for (int c = 0; c < C; ++c) sums[t][s][c] = zero();
  const int64_t whole = length / kBlock * kBlock, turn = turning_point<T>(whole);
  const T* ahead[R];
  for (int s = 0; s < R; ++s) ahead[s] = w[s] + prefetch_distance<T>();
  dot_span<R, N, C, T>(w, ahead, 0, turn, x, sums);
  for (int s = 0; s < R; ++s) ahead[s] = next[s] - turn;
  dot_span<R, N, C, T>(w, ahead, turn, whole, x, sums);
  if (whole < length) {
    for (int s = 0; s < R; ++s) {
      const typename Dot<T>::W v = Dot<T>::weights_tail(w[s] + whole, length - whole);
      for (int t = 0; t < N; ++t)
        Dot<T>::step(v, x[t] + whole, sums[t][s][0], sums[t][s][C - 1]);
    }
  }
  for (int t = 0; t < N; ++t) {
    V total[R];
    for (int s = 0; s < R; ++s)
      total[s] = C == 2 ? add(sums[t][s][0], sums[t][s][C - 1]) : sums[t][s][0];
    for (int s = 0; s < R; s += 4)
      sum4(total[s], total[s + 1], total[s + 2], total[s + 3], out[t] + s);
  }
}

// out[i][s] for `count` tokens given by number, in passes of N, then fewer.
template <int R, int N, class T>
struct DotTokens {
  static inline void run(const T* const* w, const T* const* next, int64_t length,
                         const PackedTokens& x, const uint8_t* token, int64_t count,
                         float (*out)[R]) {
    for (; count >= N; count -= N, token += N, out += N) {
      const typename Dot<T>::X* pointers[N];
      for (int t = 0; t < N; ++t)
        pointers[t] = reinterpret_cast<const typename Dot<T>::X*>(
            static_cast<const char*>(x.data) + token[t] * x.stride);
      dot<R, N, T>(w, next, length, pointers, out);
    }
    DotTokens<R, N - 1, T>::run(w, next, length, x, token, count, out);
  }
};

template <int R, class T>
struct DotTokens<R, 0, T> {
  static inline void run(const T* const*, const T* const*, int64_t, const PackedTokens&,
                         const uint8_t*, int64_t, float (*)[R]) {}
};

// R / 2 neurons at once: R streams.
template <int R, int N, class T>
void gate_up_rows(Matrix w_gate, Matrix w_up, int64_t length, Rows rows, PackedTokens x,
                  float* gate, float* up, int64_t ld) {
  constexpr int kNeurons = R / 2;
  uint8_t token[kMaxTokens];
  float dots[kMaxTokens][R];
  int64_t count = list_tokens(all_tokens(x.count), token);
  const int64_t last = rows.count - 1;
  for (int64_t r = 0; r < rows.count; r += kNeurons) {
    // Past the end, the last neuron again.
    const int64_t real = rows.count - r < kNeurons ? rows.count - r : kNeurons;
    const T* w[R];
    const T* next[R];
    uint64_t wanted = 0;
    for (int s = 0; s < kNeurons; ++s) {
      const int64_t here = r + s < last ? r + s : last;
      const int64_t after = here + kNeurons < last ? here + kNeurons : last;
      w[s] = row_of<T>(w_gate, rows, here);
      w[kNeurons + s] = row_of<T>(w_up, rows, here);
      next[s] = row_of<T>(w_gate, rows, after);
      next[kNeurons + s] = row_of<T>(w_up, rows, after);
      if (rows.tokens) wanted |= rows.tokens[here];
    }
    if (rows.tokens) {
      count = list_tokens(wanted, token);
      for (int64_t t = 0; t < x.count; ++t)
        for (int64_t s = 0; s < real; ++s) gate[t * ld + r + s] = up[t * ld + r + s] = 0.0f;
    }
    DotTokens<R, N, T>::run(w, next, length, x, token, count, dots);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = token[i];
      for (int64_t s = 0; s < real; ++s) {
        if (rows.tokens && !(rows.tokens[r + s] >> t & 1)) continue;
        gate[t * ld + r + s] = dots[i][s];
        up[t * ld + r + s] = dots[i][kNeurons + s];
      }
    }
  }
}

template <class T>
void gate_up(Matrix w_gate, Matrix w_up, int64_t length, Rows rows, PackedTokens x, float* gate,
             float* up, int64_t ld) {
  if (x.count <= kFewTokens)
    gate_up_rows<8, kFewTokens, T>(w_gate, w_up, length, rows, x, gate, up, ld);
  else
    gate_up_rows<4, kTokens, T>(w_gate, w_up, length, rows, x, gate, up, ld);
}

template <int R, int N, class T>
void linear_rows(Matrix weight, int64_t length, int64_t first, int64_t count, PackedTokens x,
                 float* y, int64_t ld) {
  uint8_t token[kMaxTokens];
  float dots[kMaxTokens][R];
  list_tokens(all_tokens(x.count), token);
  const T* const base = static_cast<const T*>(weight.data) + first * weight.stride;
  const int64_t last = count - 1;
  for (int64_t r = 0; r < count; r += R) {
    const T* w[R];
    const T* next[R];
    for (int64_t s = 0; s < R; ++s) {
      w[s] = base + (r + s < last ? r + s : last) * weight.stride;
      next[s] = base + (r + s + R < last ? r + s + R : last) * weight.stride;
    }
    DotTokens<R, N, T>::run(w, next, length, x, token, x.count, dots);
    const int64_t real = count - r < R ? count - r : R;
    for (int64_t t = 0; t < x.count; ++t)
      for (int64_t s = 0; s < real; ++s) y[t * ld + r + s] = dots[t][s];
  }
}

template <class T>
void linear(Matrix weight, int64_t length, int64_t first, int64_t count, PackedTokens x, float* y,
            int64_t ld) {
  if (x.count <= kFewTokens)
    linear_rows<8, kFewTokens, T>(weight, length, first, count, x, y, ld);
  else
    linear_rows<4, kTokens, T>(weight, length, first, count, x, y, ld);
}

}  // namespace
