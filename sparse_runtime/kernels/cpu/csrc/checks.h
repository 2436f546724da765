// What the operations compute with, out of arguments that are checked.
#pragma once

#include "arguments.h"
#include "experts.h"

namespace sparse_ffn {

Tokens tokens_of(Argument& x);

// The optional biases [I] of both kinds of FFN, float32.
struct BiasArguments {
  Argument gate, up;

  BiasArguments(StableIValue gate, StableIValue up)
      : gate("gate_bias", Argument::optional_handle(gate)),
        up("up_bias", Argument::optional_handle(up)) {}

  // Of an FFN with so many matrices before its activation.
  Inputs inputs(const StringArgument& activation, int64_t matrices, int64_t neurons);
};

// Without w_up it is an FFN with one matrix before its activation.
Ffn ffn_of(const Argument& x, Argument& w_gate, Argument& w_up, Argument& w_down_t,
           const StringArgument& activation, BiasArguments& biases);

// The optional last arguments of operations over mixtures of experts: index and weights [n, k] of each
// token's experts.
struct ChoiceArguments {
  Argument index, weights;
  int64_t experts;

  ChoiceArguments(StableIValue index, StableIValue weights, StableIValue experts)
      : index("top_k_index", Argument::optional_handle(index)),
        weights("top_k_weights", Argument::optional_handle(weights)),
        experts(static_cast<int64_t>(experts)) {}

  bool given() const { return index.given(); }
  // Checked against the tokens, and the neurons of all experts.
  Choice choice(int64_t tokens, int64_t neurons);
};

// The FFN of all experts: w_gate [experts * 2 I, H] has gate and up of each, or [experts * I, H] gate
// alone; w_down_t is [experts * I, H].
Ffn experts_of(const Argument& x, Argument& w_gate, Argument& w_down_t, int64_t experts,
               const StringArgument& activation, BiasArguments& biases);

Clusters clusters_of(Argument& sets, int64_t neurons);

// The optional last arguments of both sparse operations.
struct VerificationArguments {
  Argument maybe_sets, look, factors, row_counts, cluster_weights;

  VerificationArguments(const StableIValue* stack, StableIValue weights)
      : maybe_sets("maybe_sets", Argument::optional_handle(stack[0])),
        look("look", Argument::optional_handle(stack[1])),
        factors("factors", Argument::optional_handle(stack[2])),
        row_counts("row_counts", Argument::optional_handle(stack[3])),
        cluster_weights("cluster_weights", Argument::optional_handle(weights)) {}

  void check_into(Clusters& clusters, const Ffn& ffn);
};

// Checks the router's tensors against x.
Router router_of(const Argument& x, Argument& down, Argument& up, Argument& bias);

// The linear part of the compensation.
Compensation correction_of(const Argument& x, Argument& down, Argument& up);

// Adds the clusters' bias [K, H].
void bias_into(Compensation& compensation, const Argument& x, Argument& cluster_bias,
               int64_t clusters);

// A bias of x's dtype and so many elements, or null where it is not given.
const void* bias_of(const Argument& x, Argument& bias, int64_t size, const char* letter);

// A vector in float32: factors of looks [I], or weights of clusters [K].
const float* floats_of(Argument& values, int64_t size, const char* letter);

// Records of bytes, whose scales stand at even addresses; any number of them where `rows` is below
// zero.
Stream stream_of(Argument& records, const char* name, int64_t rows, int64_t bytes);

// Counters of `size`, or null where they are not given.
int64_t* counts_of(Argument& counts, int64_t size, const char* letter);

// Ids [n] below `clusters`, copied to memory of the calling thread.
int64_t* ids_of(Argument& cluster_ids, int64_t tokens, int64_t clusters);

// No size may be so large that a product of two overflows.
void check_sizes(const char* name, int64_t rows, int64_t length);

}  // namespace sparse_ffn
