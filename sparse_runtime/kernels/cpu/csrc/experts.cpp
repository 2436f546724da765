#include "experts.h"

#include <string.h>

#include <vector>

namespace sparse_ffn {

namespace {

// Runs `one(expert, weight, token, compensation, out)` for every expert of every token, and adds up. The
// compensation goes to the first; its weight is of the neurons alone.
template <class One>
void add_experts(DType dtype, int64_t size, int64_t hidden, const Choice& choice, Tokens x,
                 const Compensation& compensation, void* y, const One& one) {
  thread_local std::vector<float> memory;
  memory.resize(size_t(3 * hidden));
  float *const sums = memory.data(), *const wide = sums + hidden, *const out = wide + hidden;
  const Kernels& kernels = current_isa().by_dtype[dtype];
  for (int64_t t = 0; t < x.count; ++t) {
    const Tokens token = {static_cast<const char*>(x.data) + t * x.stride * size, x.stride, 1};
    memset(sums, 0, size_t(hidden) * sizeof(float));
    for (int64_t j = 0; j < choice.per_token; ++j) {
      const int64_t at = t * choice.per_token + j;
      one(choice.index[at], choice.weights[at], token, t, j == 0 ? compensation : Compensation{},
          out);
      kernels.widen(out, hidden, wide);
      for (int64_t k = 0; k < hidden; ++k) sums[k] += wide[k];
    }
    kernels.store(sums, hidden, nullptr, static_cast<char*>(y) + t * hidden * size);
  }
}

Matrix from_row(Matrix matrix, int64_t row, int64_t size) {
  return {static_cast<const char*>(matrix.data) + row * matrix.stride * size, matrix.stride};
}

Stream from_record(Stream stream, int64_t record) {
  return {stream.data ? stream.data + record * stream.stride : nullptr, stream.stride};
}

Inputs of_expert(Inputs inputs, int64_t first, float weight) {
  if (inputs.gate_bias) inputs.gate_bias += first;
  if (inputs.up_bias) inputs.up_bias += first;
  inputs.weight = weight;
  return inputs;
}

Clusters of_expert(Clusters clusters, int64_t first) {
  if (clusters.sets) clusters.sets += first / 8;
  Verification& band = clusters.verification;
  if (band.maybe_sets) {
    band.maybe_sets += first / 8;
    band.look = from_record(band.look, first);
    band.factors += first;
  }
  return clusters;
}

}  // namespace

void run_experts(const Ffn& all, int64_t block, const Choice& choice, Tokens x,
                 const Clusters& clusters, const int64_t* ids, const Compensation& compensation,
                 void* y) {
  const int64_t neurons = all.num_neurons / choice.experts, size = all.element_size;
  add_experts(all.dtype, size, all.hidden_size, choice, x, compensation, y,
              [&](int64_t expert, float weight, Tokens token, int64_t t, const Compensation& extra,
                  void* out) {
                Ffn one = all;
                one.num_neurons = neurons;
                one.w_gate = from_row(all.w_gate, expert * block, size);
                one.w_up = from_row(all.w_up, expert * block, size);
                one.w_down_t = from_row(all.w_down_t, expert * neurons, size);
                one.inputs = of_expert(all.inputs, expert * neurons, weight);
                run_ffn(one, token, of_expert(clusters, expert * neurons), ids ? ids + t : nullptr, extra, out);
              });
}

void run_plane_experts(const PlaneFfn& all, const Choice& choice, Tokens x,
                       const Clusters& clusters, const int64_t* ids, const Stages& stages,
                       const Compensation& compensation, void* y) {
  const int64_t neurons = all.num_neurons / choice.experts;
  add_experts(all.dtype, all.element_size, all.hidden_size, choice, x, compensation, y,
              [&](int64_t expert, float weight, Tokens token, int64_t t, const Compensation& extra,
                  void* out) {
                const int64_t first = expert * neurons;
                PlaneFfn one = all;
                one.num_neurons = neurons;
                one.look = from_record(all.look, first);
                one.count = from_record(all.count, first);
                one.refine = from_record(all.refine, first);
                one.inputs = of_expert(all.inputs, first, weight);
                Stages own = stages;
                if (own.factors) own.factors += first;
                run_plane_ffn(one, token, of_expert(clusters, first), ids ? ids + t : nullptr, own, extra, out);
              });
}

}  // namespace sparse_ffn
