// The inner loops, written once over a small vector interface that each isa_*.cpp defines before
// including this file:
//
//   V, kWidth                   a vector of fp32 and its length
//   kTokens                     tokens per pass of a dot product (bounded by registers)
//   kDownRows                   neurons per pass of down when there are several tokens
//   zero set1 load store madd add sub mul divide vmin vmax round_nearest exp2_int
//   sum4(a, b, c, d, out)       the four horizontal sums
//   load2(p, a, b)              2·kWidth weights of type T at p as fp32
//   store2(p, a, b)             the inverse, rounded to nearest even
//   decode, read                see CommonKernels
//
// load2 may spread the elements over a and b in any order that is its own; store2 undoes it. For
// bf16 the even and the odd elements of a 64-byte line go to a and b: one shift and one mask widen
// a whole line, where widening loads in natural order would need two shuffles more.
//
// Access pattern, and what it is worth on a machine whose two cores read 50 GB/s: a loop per neuron
// reaches 0.65 of the read bandwidth, gate and up of two neurons at once (four streams) and down
// for eight rows at once above 0.9.

#ifndef SPARSE_FFN_LOOPS_H
#define SPARSE_FFN_LOOPS_H

#include <math.h>
#include <string.h>

namespace {

using namespace sparse_ffn;

constexpr int64_t kBlock = 2 * kWidth;

// down reads 16 rows' worth of scattered streams, too many for the hardware's prefetchers.
#ifndef SPARSE_FFN_PREFETCH_BYTES
#define SPARSE_FFN_PREFETCH_BYTES 1024
#endif
constexpr int64_t kPrefetchBytes = SPARSE_FFN_PREFETCH_BYTES;

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

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// ---------------------------------------------------------------------------------------------
// Packed tokens

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
// Dot products of four rows with N tokens

template <int N, class T>
inline __attribute__((always_inline)) void dot4(const T* const (&w)[4], int64_t length,
                                                const typename Dot<T>::X* const (&x)[N],
                                                float (&out)[N][4]) {
  // One token: two chains of additions a row, or the loop waits for the latency of fma.
  constexpr int kChains = N == 1 ? 2 : 1;
  V sums[N][4][kChains];
  for (int t = 0; t < N; ++t)
    for (int s = 0; s < 4; ++s)
      for (int c = 0; c < kChains; ++c) sums[t][s][c] = zero();
  int64_t k = 0;
  for (; k + kBlock <= length; k += kBlock) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const typename Dot<T>::W v = Dot<T>::weights(w[s] + k);
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t)
        Dot<T>::step(v, x[t] + k, sums[t][s][0], sums[t][s][kChains - 1]);
    }
  }
  if (k < length) {
    for (int s = 0; s < 4; ++s) {
      const typename Dot<T>::W v = Dot<T>::weights_tail(w[s] + k, length - k);
      for (int t = 0; t < N; ++t)
        Dot<T>::step(v, x[t] + k, sums[t][s][0], sums[t][s][kChains - 1]);
    }
  }
  for (int t = 0; t < N; ++t) {
    V total[4];
    for (int s = 0; s < 4; ++s) {
      total[s] = sums[t][s][0];
      if (kChains == 2) total[s] = add(total[s], sums[t][s][kChains - 1]);
    }
    sum4(total[0], total[1], total[2], total[3], out[t]);
  }
}

// out[i][s] for `count` tokens given by number, in passes of kTokens, then fewer.
template <int N, class T>
struct DotTokens {
  static inline int64_t run(const T* const (&w)[4], int64_t length, const PackedTokens& x,
                            const uint8_t* token, int64_t count, float (*out)[4]) {
    int64_t done = 0;
    for (; done + N <= count; done += N) {
      const typename Dot<T>::X* pointers[N];
      for (int t = 0; t < N; ++t)
        pointers[t] = reinterpret_cast<const typename Dot<T>::X*>(
            static_cast<const char*>(x.data) + token[done + t] * x.stride);
      dot4<N, T>(w, length, pointers, *reinterpret_cast<float(*)[N][4]>(out + done));
    }
    return done + DotTokens<N - 1, T>::run(w, length, x, token + done, count - done, out + done);
  }
};

template <class T>
struct DotTokens<0, T> {
  static inline int64_t run(const T* const (&)[4], int64_t, const PackedTokens&, const uint8_t*,
                            int64_t, float (*)[4]) {
    return 0;
  }
};

// The numbers of the bits of `mask`.
inline int64_t list_tokens(uint64_t mask, uint8_t* token) {
  int64_t count = 0;
  for (; mask; mask &= mask - 1) token[count++] = uint8_t(__builtin_ctzll(mask));
  return count;
}

inline uint64_t all_tokens(int64_t count) {
  return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

template <class T>
void gate_up(Matrix w_gate, Matrix w_up, int64_t length, Rows rows, PackedTokens x, float* gate,
             float* up, int64_t ld) {
  uint8_t token[kMaxTokens];
  float dots[kMaxTokens][4];
  int64_t count = list_tokens(all_tokens(x.count), token);
  for (int64_t r = 0; r < rows.count; r += 2) {
    // The last of an odd number is paired with itself.
    const int64_t q = r + 1 < rows.count ? r + 1 : r;
    uint64_t wanted[2] = {0, 0};
    if (rows.tokens) {
      wanted[0] = rows.tokens[r];
      wanted[1] = rows.tokens[q];
      count = list_tokens(wanted[0] | wanted[1], token);
      for (int64_t t = 0; t < x.count; ++t) {
        gate[t * ld + r] = gate[t * ld + q] = 0.0f;
        up[t * ld + r] = up[t * ld + q] = 0.0f;
      }
    }
    const T* const w[4] = {row_of<T>(w_gate, rows, r), row_of<T>(w_gate, rows, q),
                           row_of<T>(w_up, rows, r), row_of<T>(w_up, rows, q)};
    DotTokens<kTokens, T>::run(w, length, x, token, count, dots);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = token[i];
      if (!rows.tokens || (wanted[0] >> t & 1)) {
        gate[t * ld + r] = dots[i][0];
        up[t * ld + r] = dots[i][2];
      }
      if (!rows.tokens || (wanted[1] >> t & 1)) {
        gate[t * ld + q] = dots[i][1];
        up[t * ld + q] = dots[i][3];
      }
    }
  }
}

template <class T>
void linear(Matrix weight, int64_t length, int64_t first, int64_t count, PackedTokens x, float* y,
            int64_t ld) {
  uint8_t token[kMaxTokens];
  float dots[kMaxTokens][4];
  list_tokens(all_tokens(x.count), token);
  const T* const base = static_cast<const T*>(weight.data) + first * weight.stride;
  for (int64_t r = 0; r < count; r += 4) {
    const int64_t last = count - 1;
    const T* w[4];
    for (int64_t s = 0; s < 4; ++s) w[s] = base + (r + s < last ? r + s : last) * weight.stride;
    const T* const pointers[4] = {w[0], w[1], w[2], w[3]};
    DotTokens<kTokens, T>::run(pointers, length, x, token, x.count, dots);
    const int64_t real = count - r < 4 ? count - r : 4;
    for (int64_t t = 0; t < x.count; ++t)
      for (int64_t s = 0; s < real; ++s) y[t * ld + r + s] = dots[t][s];
  }
}

// ---------------------------------------------------------------------------------------------
// Down: R rows at once, added to the sums of one token or of several

template <int R, class T, bool kPrefetch>
inline __attribute__((always_inline)) void down_one_span(const T* const* w,
                                                         const T* const* ahead, int64_t begin,
                                                         int64_t end, const V* h, float* y) {
  for (int64_t k = begin; k < end; k += kBlock) {
    V a0 = load(y + k), b0 = load(y + k + kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      V a, b;
      load2(w[r] + k, a, b);
      a0 = madd(h[r], a, a0);
      b0 = madd(h[r], b, b0);
      if (kPrefetch) {
        __builtin_prefetch(ahead[r] + k, 0, 3);
        if (kBlock * sizeof(T) > 64) __builtin_prefetch(ahead[r] + k + 64 / sizeof(T), 0, 3);
      }
    }
    store(y + k, a0);
    store(y + k + kWidth, b0);
  }
}

// One token. `next` are the rows that come after these, whose beginnings are prefetched while the
// ends of these are read; prefetching past a row's end would fetch rows that nobody wants.
template <int R, class T>
void down_one(const T* const* w, const T* const* next, int64_t length, const float* h,
              float* y) {
  V weight[R];
  for (int r = 0; r < R; ++r) weight[r] = set1(h[r]);
  const int64_t whole = length / kBlock * kBlock;
  const int64_t distance = kPrefetchBytes / int64_t(sizeof(T));
  const int64_t turn = whole > distance ? (whole - distance) / kBlock * kBlock : 0;
  const T* ahead[R];
  for (int r = 0; r < R; ++r) ahead[r] = w[r] + distance;
  down_one_span<R, T, true>(w, ahead, 0, turn, weight, y);
  for (int r = 0; r < R; ++r) ahead[r] = next[r] - turn;
  down_one_span<R, T, true>(w, ahead, turn, whole, weight, y);
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

// Several tokens: the rows are widened once for all of them. h[t * ld + r], r < R.
template <int R, class T>
void down_many(const T* const* w, const T* const* next, int64_t length,
               const uint8_t* token, int64_t num_tokens, const float* h, int64_t ld, float* y,
               int64_t ldy) {
  const int64_t distance = kPrefetchBytes / int64_t(sizeof(T));
  const int64_t turn = length > distance ? length - distance : 0;
  for (int64_t k = 0; k < length; k += kBlock) {
    V a[R], b[R];
    if (k + kBlock <= length) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        load2(w[r] + k, a[r], b[r]);
        const T* ahead = k < turn ? w[r] + k + distance : next[r] + (k - turn);
        __builtin_prefetch(ahead, 0, 3);
        if (kBlock * sizeof(T) > 64) __builtin_prefetch(ahead + 64 / sizeof(T), 0, 3);
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

template <int R, class T>
int64_t down_rows(const Matrix& m, int64_t length, const Rows& rows, int64_t r,
                  int64_t num_tokens, const float* h, int64_t ld, float* y, int64_t ldy) {
  uint8_t token[kMaxTokens];
  int64_t count = rows.tokens ? 0 : list_tokens(all_tokens(num_tokens), token);
  for (; r + R <= rows.count; r += R) {
    const T* w[R];
    const T* next[R];
    for (int s = 0; s < R; ++s) {
      w[s] = row_of<T>(m, rows, r + s);
      const int64_t after = r + R + s;
      next[s] = row_of<T>(m, rows, after < rows.count ? after : rows.count - 1);
    }
    if (num_tokens == 1) {
      down_one<R, T>(w,
                     next, length, h + r, y);
      continue;
    }
    if (rows.tokens) {
      uint64_t wanted = 0;
      for (int s = 0; s < R; ++s) wanted |= rows.tokens[r + s];
      count = list_tokens(wanted, token);
    }
    down_many<R, T>(w,
                    next, length, token, count, h + r,
                    ld, y, ldy);
  }
  return r;
}

template <class T>
void down(Matrix m, int64_t length, Rows rows, int64_t num_tokens, const float* h, int64_t ld,
          float* y, int64_t ldy) {
  int64_t r = 0;
  if (num_tokens == 1)
    r = down_rows<8, T>(m, length, rows, r, num_tokens, h, ld, y, ldy);
  else
    r = down_rows<kDownRows, T>(m, length, rows, r, num_tokens, h, ld, y, ldy);
  r = down_rows<2, T>(m, length, rows, r, num_tokens, h, ld, y, ldy);
  down_rows<1, T>(m, length, rows, r, num_tokens, h, ld, y, ldy);
}

// ---------------------------------------------------------------------------------------------
// Output

template <class T>
void finish(const float* y, int64_t part_stride, int64_t parts, int64_t length, int64_t begin,
            int64_t end, const void* bias, void* out) {
  T* const target = static_cast<T*>(out);
  const T* const extra = static_cast<const T*>(bias);
  for (int64_t k = begin; k < end; k += kBlock) {
    V a = load(y + k), b = load(y + k + kWidth);
    for (int64_t p = 1; p < parts; ++p) {
      a = add(a, load(y + p * part_stride + k));
      b = add(b, load(y + p * part_stride + k + kWidth));
    }
    const int64_t count = length - k < kBlock ? length - k : kBlock;
    if (extra) {
      V c, d;
      load2_tail(extra + k, count, c, d);
      a = add(a, c);
      b = add(b, d);
    }
    if (count == kBlock) {
      store2(target + k, a, b);
    } else {
      T buffer[kBlock];
      store2(buffer, a, b);
      memcpy(target + k, buffer, size_t(count) * sizeof(T));
    }
  }
}

// Outputs of `linear` are few and in natural order: one by one.
template <class T>
void store_natural(const float* y, int64_t length, const void* bias, void* out) {
  T* const target = static_cast<T*>(out);
  const T* const extra = static_cast<const T*>(bias);
  for (int64_t k = 0; k < length; ++k) {
    const float value = extra ? y[k] + to_float(extra[k]) : y[k];
    target[k] = from_float<T>(value);
  }
}

template <class T>
void widen(const void* source, int64_t length, float* out) {
  const T* const p = static_cast<const T*>(source);
  for (int64_t k = 0; k < length; ++k) out[k] = to_float(p[k]);
}

// ---------------------------------------------------------------------------------------------
// Activations

// exp by 2^n times the Taylor series of e^r, |r| <= ln(2)/2: the term left out is below 6e-9.
inline V exponential(V x) {
  x = vmax(vmin(x, set1(88.0f)), set1(-87.0f));
  const V n = round_nearest(mul(x, set1(1.44269504f)));
  V r = madd(n, set1(-0.693359375f), x);
  r = madd(n, set1(2.12194440e-4f), r);
  V p = set1(1.0f / 5040);
  p = madd(p, r, set1(1.0f / 720));
  p = madd(p, r, set1(1.0f / 120));
  p = madd(p, r, set1(1.0f / 24));
  p = madd(p, r, set1(1.0f / 6));
  p = madd(p, r, set1(0.5f));
  p = madd(p, r, set1(1.0f));
  p = madd(p, r, set1(1.0f));
  return mul(p, exp2_int(n));
}

// x * sigmoid(z)
inline V gated(V x, V z) {
  return divide(x, add(set1(1.0f), exponential(sub(zero(), z))));
}

struct Silu {
  static inline V apply(V g) { return gated(g, g); }
};

struct GeluTanh {
  // 0.5 g (1 + tanh(u)) = g sigmoid(2u), u = sqrt(2/pi) (g + 0.044715 g^3)
  static inline V apply(V g) {
    const V cube = mul(mul(g, g), g);
    return gated(g, mul(set1(1.5957691216f), madd(set1(0.044715f), cube, g)));
  }
};

struct Relu {
  // The operand order keeps a NaN of g.
  static inline V apply(V g) { return vmax(zero(), g); }
};

template <class A>
void activate_with(float* gate, const float* up, int64_t count) {
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth)
    store(gate + k, mul(A::apply(load(gate + k)), load(up + k)));
  if (k < count) {
    const size_t bytes = size_t(count - k) * sizeof(float);
    float g[kWidth] = {}, u[kWidth] = {};
    memcpy(g, gate + k, bytes);
    memcpy(u, up + k, bytes);
    store(g, mul(A::apply(load(g)), load(u)));
    memcpy(gate + k, g, bytes);
  }
}

void activate(Activation activation, float* gate, const float* up, int64_t count) {
  switch (activation) {
    case kSilu:
      activate_with<Silu>(gate, up, count);
      break;
    case kGeluTanh:
      activate_with<GeluTanh>(gate, up, count);
      break;
    case kRelu:
      activate_with<Relu>(gate, up, count);
      break;
    case kGelu:
      for (int64_t k = 0; k < count; ++k)
        gate[k] = 0.5f * gate[k] * (1.0f + erff(gate[k] * 0.70710678f)) * up[k];
      break;
  }
}

template <class T>
constexpr Kernels kernels_for() {
  return {kBlock,  packed_size<T>, pack_token<T>, gate_up<T>,       down<T>,
          linear<T>, finish<T>,      store_natural<T>, widen<T>};
}

}  // namespace

#endif
