// One pass of the FFN over planes: up to kMaxTokens tokens, divided into parts that threads compute.
#pragma once

#include "groups.h"
#include "plane_ffn.h"

namespace sparse_ffn {

inline int64_t plane_bytes(int64_t length, int bits) { return 8 * bits * plane_groups(length); }

// Most neurons of a step.
constexpr int64_t kStepRows = kDownBlock;
// What is decided about is read during the next step. Bytes of a step, so that two fit into an L2 cache.
constexpr int64_t kStepBytes = 512 * 1024;

// Neurons that are read and decided about together.
struct PlaneStep {
  int64_t count;
  int32_t index[kStepRows];
  uint64_t wanted[kStepRows];   // tokens that have them as candidates
  uint64_t counted[kStepRows];
  uint64_t refined[kStepRows];
  float* gate;      // [tokens, kStepRows]: dot products with base planes
  float* up;
  float* looks;     // their activation
  float* evidence;  // |look| * factor * weight
};

struct PlanePass {
  const PlaneFfn* ffn;
  const Isa* isa;
  Clusters clusters;
  Stages stages;
  const int64_t* ids;  // of the tokens' clusters
  Groups groups;
  PlaneTokens x;
  const int32_t* rows;  // null: all neurons
  int64_t num_rows;
  int64_t step_rows;
  int64_t num_parts;
  int64_t sum_stride;  // floats: 256 for each unit
};

// What a token's factors are multiplied by.
inline float weight_of(const PlanePass& pass, int64_t token) {
  const float* const weights = pass.stages.cluster_weights;
  return weights ? weights[pass.ids[token]] : 1.0f;
}

// What one part works with.
struct PlanePart {
  Prefetch* prefetch;
  PlaneStep steps[2];
  float* dots;  // [tokens, 2 * kStepRows]
  float* full;  // [2, tokens, kStepRows]
  float* sums;  // [tokens, sum_stride]
  DownScratch down;
  int64_t counts[3];
};

// Gate, up and their activation of a step's neurons, by base planes, or by all bits where nothing is
// decided.
void look(const PlanePass& pass, PlanePart& own, PlaneStep& step);

// A part's steps, added up in the part's own sums.
void compute_plane_part(const PlanePass& pass, PlanePart& own, int64_t part);

}  // namespace sparse_ffn
