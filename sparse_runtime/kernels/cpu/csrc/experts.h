// Mixtures of experts: one FFN after the other, of those that a token has chosen.
#pragma once

#include "plane_ffn.h"

namespace sparse_ffn {

// The experts of each token and what they count, [n, per_token].
struct Choice {
  const int64_t* index;  // below `experts`
  const float* weights;
  int64_t per_token;
  int64_t experts;
};

// y[t] = sum over t's experts of weight * FFN, over the neurons of ids[t]'s set and the confirmed ones of
// its band, plus the compensation. `all` are the neurons of all experts, one expert's after the other's;
// of w_gate and w_up each expert's have `block` rows from the next one's. An expert's neurons are a
// multiple of eight, so that sets are cut between bytes.
void run_experts(const Ffn& all, int64_t block, const Choice& choice, Tokens x,
                 const Clusters& clusters, const int64_t* ids, const Compensation& compensation,
                 void* y);

// The same over planes.
void run_plane_experts(const PlaneFfn& all, const Choice& choice, Tokens x,
                       const Clusters& clusters, const int64_t* ids, const Stages& stages,
                       const Compensation& compensation, void* y);

}  // namespace sparse_ffn
