// One pass of the sparse FFN: up to kMaxTokens tokens, divided into parts that threads compute.
#pragma once

#include "ffn.h"
#include "groups.h"
#include "plane_pass.h"

namespace sparse_ffn {

// Of a neuron's look record.
inline int64_t look_bytes(const Inputs& inputs, int64_t hidden_size) {
  return inputs.matrices *
         (plane_bytes(hidden_size, kLookFormat.base) + 2 * plane_groups(hidden_size));
}

// Room for neurons that a part computes together: those of two steps of looks at least.
constexpr int64_t kLeastHeldRows = 2 * kStepRows;

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
  // With verification:
  PlaneFfn planes;      // what is looked at
  PlanePass look;       // of these: tokens and rows of a step
  PlanePart* lookers;   // [parts]; counts are those of Clusters::row_counts
  int32_t* kept;        // [parts, held_rows]: what is computed
};

// A part's slice of the rows, added up in the part's own sums.
void compute_slice(const Pass& pass, int64_t part);

// A part's share of both bands: first a look, then what is sure or was confirmed. No thread waits
// for another.
void verify_and_compute(const Pass& pass, int64_t part);

}  // namespace sparse_ffn
