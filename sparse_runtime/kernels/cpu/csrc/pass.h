// One pass of the sparse FFN: up to kMaxTokens tokens, divided into parts that threads compute.
#pragma once

#include "ffn.h"
#include "groups.h"

namespace sparse_ffn {

// Neurons per step of verification. Parts take steps in turns, so that a part's share of confirmed
// neurons is that of the others, whatever their order.
constexpr int64_t kLookRows = 128;

// One pass: up to kMaxTokens tokens over the union of their sets, so that a row is read once
// however many tokens want it.
struct Pass {
  const Ffn* ffn;
  const Isa* isa;
  const Kernels* kernels;
  Clusters clusters;
  const Compensation* compensation;
  Groups groups;
  PackedTokens x;
  LookTokens low_bit;   // with verification
  const int32_t* rows;  // null: all neurons; with verification, of both bands
  int64_t num_rows;
  int64_t num_parts;
  int64_t held_rows;    // rows whose gate and up values are held
  int64_t row_stride;   // floats between tokens in one part's gate and up values
  int64_t sum_stride;   // floats between tokens in the sums
  float* gate;          // [parts, tokens, row_stride]
  float* up;
  float* sums;          // [parts, tokens, sum_stride]
  uint64_t* masks;      // [parts, held_rows], used where tokens have different neurons
  int32_t* kept;        // [parts, held_rows], with verification: what is computed
  int64_t* counts;      // [parts, 2], with verification: as Clusters::row_counts
};

// A part's slice of the rows, added up in the part's own sums.
void compute_slice(const Pass& pass, int64_t part);

// A part's share of both bands: first a look, then what is sure or was confirmed. No thread waits
// for another.
void verify_and_compute(const Pass& pass, int64_t part);

}  // namespace sparse_ffn
