// The operations over plain pointers: planning, threads and scratch memory. Arguments are valid;
// checks.cpp has checked them. Calls may run at the same time, on different threads.
#pragma once

#include "dispatch.h"

namespace sparse_ffn {

// What an activation is made of: h = act(gate·x + bias) · (up·x + bias), or act(gate·x + bias), times
// the weight of the expert that it belongs to.
struct Inputs {
  int64_t matrices;        // 2, or 1: there is no up
  const float* gate_bias;  // [I] or null
  const float* up_bias;    // [I] or null
  Activation activation;
  float weight;            // 1: no expert, or one that counts once
};

// Finishes the dot products of some rows, index[0..count) or from `first` on where index is null: adds
// biases, and sets up to one where there is none.
inline void add_biases(const Inputs& inputs, const int32_t* index, int64_t first, int64_t count,
                       float* gate, float* up) {
  if (inputs.gate_bias)
    for (int64_t r = 0; r < count; ++r) gate[r] += inputs.gate_bias[index ? index[r] : first + r];
  if (inputs.matrices == 1)
    for (int64_t r = 0; r < count; ++r) up[r] = 1.0f;
  else if (inputs.up_bias)
    for (int64_t r = 0; r < count; ++r) up[r] += inputs.up_bias[index ? index[r] : first + r];
}

// gate[r] = h of some rows, out of what add_biases has finished.
inline void activate(const CommonKernels& common, const Inputs& inputs, float* gate,
                     const float* up, int64_t count) {
  common.activate(inputs.activation, gate, up, count);
  if (inputs.weight != 1.0f)
    for (int64_t r = 0; r < count; ++r) gate[r] *= inputs.weight;
}

struct Ffn {
  DType dtype;
  int64_t element_size;
  int64_t hidden_size;
  int64_t num_neurons;
  Matrix w_gate, w_up, w_down_t;  // without up, w_up is w_gate
  Inputs inputs;
};

struct Tokens {
  const void* data;  // dtype of the weights
  int64_t stride;    // elements
  int64_t count;
};

// Records of bytes, one for each row.
struct Stream {
  const uint8_t* data;
  int64_t stride;  // bytes
};

// Of the records that float weights are looked at by.
constexpr PlaneFormat kLookFormat = {4, 0};

// A band of neurons that a look confirms before they are computed.
struct Verification {
  const uint8_t* maybe_sets;  // as Clusters::sets; null: there is no such band
  int64_t stride;             // bytes
  Stream look;                // [I] in kLookFormat
  const float* factors;       // [I]
  const float* cluster_weights;  // [K] or null
};

// Bitmaps of the neurons each cluster computes, [K, ceil(I / 8)].
struct Clusters {
  const uint8_t* sets;  // null: every neuron for every token
  int64_t stride;       // bytes
  int64_t count;
  Verification verification;
  // Incremented, atomically, by neurons computed and neurons looked at, summed over tokens; or null.
  int64_t* row_counts;
};

struct Router {
  int64_t rank;  // 0: no first matrix
  Matrix down;   // [rank, H]
  Matrix up;     // [K, H] or [K, rank]
  const void* bias;  // [K] or null, dtype of the weights
};

// Added to the output for what the neurons leave out: a vector per cluster, and up^T (down x).
struct Compensation {
  Matrix cluster_bias;  // [K, H] or null
  int64_t rank;         // 0: no linear correction
  Matrix down;          // [rank, H]
  Matrix up;            // [rank, H]
};

// y[t] = FFN of x[t] over the neurons of ids[t]'s set and the confirmed ones of its band, plus the
// compensation. `ids` may be null where clusters.sets is, and then there is no compensation.
void run_ffn(const Ffn& ffn, Tokens x, Clusters clusters, const int64_t* ids,
             const Compensation& compensation, void* y);

// ids[t] = argmax of the router's logits; the lowest index wins a tie, NaN counts as largest.
void run_router(DType dtype, int64_t element_size, Tokens x, int64_t hidden_size,
                const Router& router, int64_t num_clusters, int64_t* ids);

// y [n, rows] = x · weightᵀ + bias
void run_linear(DType dtype, int64_t element_size, Tokens x, Matrix weight, int64_t rows,
                int64_t length, const void* bias, void* y);

// Adds to a counter that calls on other threads may add to at the same time.
inline void add_count(int64_t* counter, int64_t amount) {
  __atomic_fetch_add(counter, amount, __ATOMIC_RELAXED);
}

// Room for the cluster ids of one call; the calling thread's own, kept between calls.
int64_t* id_scratch(int64_t count);

// Sum of 64-bit words, read by all threads.
uint64_t run_read(const void* data, int64_t num_words);

}  // namespace sparse_ffn
