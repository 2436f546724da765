// The inner loops, written once over a small vector interface that each isa_*.cpp defines before
// including this file:
//
//   V, kWidth                   a vector of fp32 and its length
//   kFewTokens, kTokens         tokens per pass of a dot product of 8 and of 4 rows, kDownRowsOne,
//   kDownRows                   and rows per pass of down for one token and for several: what the
//                               registers hold
//   zero set1 load store madd add sub mul divide vmin vmax round_nearest exp2_int
//   sum4(a, b, c, d, out)       the four horizontal sums
//   load2(p, a, b)              2·kWidth weights of type T at p as fp32
//   store2(p, a, b)             the inverse, rounded to nearest even
//   decode, read                see CommonKernels
//   kLookRecords, look_group    low-bit copies per pass, and sums + scale * (dot product of 64 4-bit
//                               codes with 64 8-bit ones), spread over the lanes in any way
//
// load2 may spread the elements over a and b in any order that is its own; store2 undoes it. For
// bf16 the even and the odd elements of a 64-byte line go to a and b: one shift and one mask widen
// a whole line, where widening loads in natural order would need two shuffles more.
//
// Access pattern: what counts is how many streams a core reads at once. One core of an Ice Lake
// server, 50 % of Mistral's neurons, one token: gate and up of two neurons (four streams) without
// prefetch and down for eight rows 12.1 GB/s; four neurons (eight streams) with prefetch 13.9; down
// for sixteen rows on top 15.0, where the best reading loop (read_streams in scalar.h) reaches 15.1.

#ifndef SPARSE_FFN_LOOPS_H
#define SPARSE_FFN_LOOPS_H

#include <math.h>
#include <string.h>

namespace {

using namespace sparse_ffn;

constexpr int64_t kBlock = 2 * kWidth;

// 512, 1024 and 2048 differ by 3 % at most; 1024 is best at low density.
constexpr int64_t kPrefetchBytes = 1024;

template <class T>
inline int64_t prefetch_distance() {
  return kPrefetchBytes / int64_t(sizeof(T));
}

// Where prefetching turns to the rows that come next, in a row of `whole` elements.
template <class T>
inline int64_t turning_point(int64_t whole) {
  const int64_t distance = prefetch_distance<T>();
  return whole > distance ? (whole - distance) / kBlock * kBlock : 0;
}

// The cache lines of the kBlock elements at p.
template <class T>
inline void prefetch_block(const T* p) {
  __builtin_prefetch(p, 0, 3);
  if (kBlock * sizeof(T) > 64) __builtin_prefetch(p + 64 / sizeof(T), 0, 3);
}

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

// The numbers of the bits of `mask`.
inline int64_t list_tokens(uint64_t mask, uint8_t* token) {
  int64_t count = 0;
  for (; mask; mask &= mask - 1) token[count++] = uint8_t(__builtin_ctzll(mask));
  return count;
}

inline uint64_t all_tokens(int64_t count) {
  return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

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

// ---------------------------------------------------------------------------------------------
// Down: R rows at once, added to the sums of one token or of several

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

// ---------------------------------------------------------------------------------------------
// Looking: dot products with the low-bit copies

// Groups whose scales are prepared at a time.
constexpr int64_t kLookSpan = 64;

// Below this magnitude a group counts as zero; its reciprocal would overflow.
constexpr float kLeastMagnitude = 1e-30f;

void round_token(const float* x, int64_t length, int8_t* codes, float* scales, float* offsets) {
  const int64_t groups = (length + kLookGroup - 1) / kLookGroup;
  for (int64_t g = 0; g < groups; ++g) {
    float values[kLookGroup] = {};
    const int64_t left = length - g * kLookGroup;
    memcpy(values, x + g * kLookGroup, size_t(left < kLookGroup ? left : kLookGroup) * sizeof(float));
    float largest = 0.0f, total = 0.0f;
    for (int64_t k = 0; k < kLookGroup; ++k) {
      const float magnitude = fabsf(values[k]);
      largest = magnitude > largest ? magnitude : largest;
      total += magnitude;
    }
    int8_t* const target = codes + g * kLookGroup;
    const bool finite = total == total && largest <= 3.4028234e38f;
    if (!finite || largest <= kLeastMagnitude) {
      // What cannot be judged makes every dot product NaN, which confirms the neuron.
      memset(target, 0, kLookGroup);
      scales[g] = offsets[g] = finite ? 0.0f : __builtin_nanf("");
      continue;
    }
    const float inverse = 127.0f / largest;
    int32_t sum = 0;
    for (int64_t k = 0; k < kLookGroup; ++k) {
      const int32_t code = int32_t(__builtin_rintf(values[k] * inverse));
      target[k] = int8_t(code);
      sum += code;
    }
    scales[g] = largest / 127.0f;
    offsets[g] = 8.0f * scales[g] * float(sum);
  }
}

// values[s] for the gates (s < R) and ups of R records and one token; `next` are the records that
// come after these, prefetched while these are read.
template <int R>
inline void look_records(const uint8_t* const* record, const uint8_t* const* next, int64_t groups,
                         const int8_t* x, const float* scales, const float* offsets,
                         float* values) {
  V sums[2 * R];
  for (int s = 0; s < 2 * R; ++s) sums[s] = zero();
  for (int64_t first = 0; first < groups; first += kLookSpan) {
    const int64_t span = groups - first < kLookSpan ? groups - first : kLookSpan;
    float products[2 * R][kLookSpan];
    for (int s = 0; s < 2 * R; ++s) {
      const bf16* const own = reinterpret_cast<const bf16*>(record[s % R] + 64 * groups) +
                              (s < R ? 0 : groups) + first;
      float* const weights = products[s];
      for (int64_t g = 0; g < span; ++g) weights[g] = to_float(own[g]);
      for (int64_t g = span; g % kWidth; ++g) weights[g] = 0.0f;
      for (int64_t g = 0; g < span; g += kWidth) {
        const V weight = load(weights + g);
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
        if (g % 2 == 0) __builtin_prefetch(next[s % R] + part, 0, 3);
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
      const int64_t after = here + R < last ? here + R : last;
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
