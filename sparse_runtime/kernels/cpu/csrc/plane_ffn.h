// The operations over weights in planes (planes.py, plane_reference.py), over plain pointers.
#pragma once

#include "ffn.h"

namespace sparse_ffn {

struct PlaneFfn {
  DType dtype;  // of tokens and outputs
  int64_t element_size;
  int64_t hidden_size;
  int64_t num_neurons;
  PlaneFormat format;
  Stream look, count, refine;
  Inputs inputs;
};

// How far neurons are read; without factors every candidate is refined.
struct Stages {
  const float* factors;          // [I] or null
  const float* cluster_weights;  // [K]: what factors are multiplied by; or null
  float tau;
  float width;
};

// y[t] = FFN of x[t] over the candidates of ids[t]'s set, or over all neurons where `sets` is null, plus
// the compensation. clusters.row_counts is incremented by neurons counted, looked at and refined.
void run_plane_ffn(const PlaneFfn& ffn, Tokens x, const Clusters& clusters, const int64_t* ids,
                   const Stages& stages, const Compensation& compensation, void* y);

// y [n, rows] = x · weightᵀ + bias
void run_plane_linear(DType dtype, int64_t element_size, Tokens x, const PlaneFormat& format,
                      Stream records, int64_t rows, int64_t length, const void* bias, void* y);

// Rows' planes and scales, each a part of some records.
struct PlaneRowsOf {
  Stream base, residual, scales;
};

// out [count, length]: the values of rows.
void run_plane_values(DType dtype, int64_t element_size, const PlaneFormat& format,
                      const PlaneRowsOf& rows, int64_t count, int64_t length, void* out);

// Codes [rows, length] and scales [rows, groups] of a float matrix.
void run_round_rows(DType dtype, int64_t element_size, Matrix weight, int64_t rows, int64_t length,
                    const Rounding& how, int8_t* hi, int8_t* lo, uint16_t* scales);

// out [rows, 8 * bits * groups]: a plane of codes [rows, length].
void run_pack_plane(const int8_t* codes, int64_t rows, int64_t length, int bits, uint8_t* out);

}  // namespace sparse_ffn
