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
//   load_natural(p, n)          the first n bf16 at p, kWidth at most, in their order; zeros after them
//   decode, read                see CommonKernels
//
// load2 may spread the elements over a and b in any order that is its own; store2 undoes it. For
// bf16 the even and the odd elements of a 64-byte line go to a and b: one shift and one mask widen
// a whole line, where widening loads in natural order would need two shuffles more.
//
// Access pattern: what counts is how many streams a core reads at once. One core of an Ice Lake
// server, 50 % of Mistral's neurons, one token: gate and up of two neurons (four streams) without
// prefetch and down for eight rows 12.1 GB/s; four neurons (eight streams) with prefetch 13.9; down
// for sixteen rows on top 15.0, where the best reading loop (read_streams in scalar.h) reaches 15.1.
#pragma once

#include "activations.h"
#include "blocks.h"
#include "dot.h"
#include "down.h"
#include "output.h"
#include "plane_down.h"
#include "plane_dots.h"
#include "plane_values.h"
#include "round_row.h"

namespace {

template <class T>
constexpr Kernels kernels_for() {
  return {kBlock,  packed_size<T>, pack_token<T>, gate_up<T>,       down<T>,
          linear<T>, finish<T>,      store_natural<T>, widen<T>,
          plane_values<T>, round_row<T>};
}

}  // namespace
