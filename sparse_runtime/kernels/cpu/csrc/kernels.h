// The interface between the threading code (ffn.cpp, pass.cpp, linear.cpp) and the inner loops, which
// are compiled once per instruction set (isa_*.cpp).
//
// The isa_*.cpp files are built with flags such as -mavx512f. Nothing in them may be an inline
// function with external linkage (no C++ standard library, no torch headers): the linker keeps one
// copy of such a function for the whole library, and it could be the AVX-512 one.
#pragma once

#include <stdint.h>

#include "prefetch.h"

namespace sparse_ffn {

enum DType { kBFloat16, kFloat16, kFloat32, kNumDTypes };
enum Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

// A matrix of contiguous rows. Strides count elements.
struct Matrix {
  const void* data;
  int64_t stride;
};

// Neurons to compute: index[0..count), or first..first+count where index is null.
struct Rows {
  const int32_t* index;
  int64_t first;
  int64_t count;
  // Bit t of tokens[r] says whether token t wants neuron r; null when all tokens want all of them.
  const uint64_t* tokens;
};

// Bits of Rows::tokens.
constexpr int64_t kMaxTokens = 64;

// Tokens in the layout that the loops of one instruction set and dtype want (pack_tokens), each
// `stride` bytes from the next.
struct PackedTokens {
  const void* data;
  int64_t stride;
  int64_t count;
};

// Weights in planes: see planes.py for the layout.
constexpr int64_t kPlaneGroup = 64;
constexpr int kPlaneRows = 4;          // rows of a pass of dot products
constexpr int64_t kDownBlock = 64;     // most rows of a pass of down
SPARSE_FFN_INLINE int64_t plane_groups(int64_t length) {
  return (length + kPlaneGroup - 1) / kPlaneGroup;
}

struct PlaneFormat {
  int base;      // bits: 3 or 4
  int residual;  // 0, 2, 3 or 4
};

// How rows are rounded to planes: see rounding.py.
struct Rounding {
  PlaneFormat format;
  const float* steps;  // scales to try, in parts of a group's largest element
  int64_t num_steps;
  float limit;   // of a scale
  float offset;  // added before a base code is rounded down, where there is a residual
  float share;   // of the base's error
  const float* counts;  // what errors count by column, or 64 ones for all groups
  bool by_column;
};

// A token for dot products with planes: in groups of 64 rounded to 15 bits, high * 128 + low, in the order
// of the codes. Scales and sums are zero from the last group on to `group_stride`, a multiple of 16.
struct PlaneToken {
  const int8_t* high;  // [units, 256]
  const int8_t* low;
  const float* scales;       // [groups]
  const float* tail_scales;  // [16]: of a last unit of fewer than four groups, by lane
  const int32_t* sums;       // [groups]
};
struct PlaneTokens {
  const int8_t* high;
  const int8_t* low;
  const float* scales;
  const int32_t* sums;
  int64_t code_stride;   // bytes between tokens
  int64_t group_stride;  // elements between tokens' sums; 16 less than between their scales
  int64_t groups;
  int64_t count;
  SPARSE_FFN_INLINE PlaneToken token(int64_t t) const {
    const float* const first = scales + t * (group_stride + 16);
    return {high + t * code_stride, low + t * code_stride, first, first + group_stride,
            sums + t * group_stride};
  }
};

// Rows in planes, a multiple of kPlaneRows, by the addresses of their codes and scales.
struct PlaneRows {
  const uint8_t* const* base;
  const uint8_t* const* residual;
  const uint8_t* const* scales;
  int64_t count;
  const uint64_t* tokens;  // as Rows::tokens
};

// Rows of down and their weights h, a multiple of four, kDownBlock at most.
struct DownRows {
  const uint8_t* const* base;
  const uint8_t* const* residual;
  const uint8_t* const* scales;
  const float* h;
  int64_t count;
};

// Memory that plane_down works in, for `groups` in multiples of 16 and kDownBlock rows.
struct DownScratch {
  float* values;       // [kDownBlock, 16]
  float* steps;        // [groups]
  int32_t* high;       // [kDownBlock / 4, groups]
  int32_t* low;
  int32_t* starts;     // [groups]
  uint8_t* tails;      // [kDownBlock, 2, 128]
  int32_t* tail_high;  // [kDownBlock / 4, 64]
  int32_t* tail_low;
};

// fp32 sums are kept per token in blocks of `block` elements, in an order inside a block that is
// the loops' own; `accumulator_size` floats for a row of that many elements.
struct Kernels {
  int64_t block;

  // Bytes of one packed token.
  int64_t (*packed_size)(int64_t length);
  void (*pack_token)(const void* source, int64_t length, void* packed);

  // gate[t * ld + r] = gate_row(r) . x_t, and up likewise; 0 where token t does not want neuron r.
  void (*gate_up)(Matrix w_gate, Matrix w_up, int64_t length, Rows rows, PackedTokens x,
                  float* gate, float* up, int64_t ld);

  // y[t * ldy + .] += sum over r of h[t * ld + r] * down_row(r)
  void (*down)(Matrix w_down_t, int64_t length, Rows rows, int64_t num_tokens, const float* h,
               int64_t ld, float* y, int64_t ldy);

  // y[t * ld + r] = row(first + r) . x_t for r < count
  void (*linear)(Matrix weight, int64_t length, int64_t first, int64_t count, PackedTokens x,
                 float* y, int64_t ld);

  // out = sum over parts of y[part * part_stride + .] (+ bias), for elements [begin, end) of a row
  // of `length`; begin is a multiple of block. bias (dtype of out) may be null.
  void (*finish)(const float* y, int64_t part_stride, int64_t parts, int64_t length, int64_t begin,
                 int64_t end, const void* bias, void* out);

  // out = y (+ bias), natural order. bias (dtype of out) may be null.
  void (*store)(const float* y, int64_t length, const void* bias, void* out);
  void (*widen)(const void* source, int64_t length, float* out);
  // A row's values of base and residual, if there is one.
  void (*plane_values)(const PlaneFormat& format, const uint8_t* base, const uint8_t* residual,
                       const uint8_t* scales, int64_t length, void* out);
  // Codes [length] of a row, and its scales, the bits of bf16; NaN of a group that is not finite.
  void (*round_row)(const void* row, int64_t length, const Rounding& how, int8_t* hi, int8_t* lo,
                    uint16_t* scales);
};

// Loops that do not depend on the dtype.
struct CommonKernels {
  // gate[r] = act(gate[r]) * up[r]
  void (*activate)(Activation activation, float* gate, const float* up, int64_t count);
  // Positions of the ones among the first num_bits bits. `rows` has room for num_bits + 16.
  int64_t (*decode)(const uint8_t* bitmap, int64_t num_bits, int32_t* rows);
  // Rounds one token for planes; its codes are zero before, its groups a multiple of 16.
  void (*round_plane_token)(const float* x, int64_t length, int8_t* high, int8_t* low,
                            float* scales, int32_t* sums, int64_t padded_groups);
  // out[t * ld + r] = row r . x_t, where any of kPlaneRows rows is wanted by token t: by base planes, by
  // residual planes (a format without base), or by both.
  void (*plane_dots)(const PlaneFormat& planes, const PlaneRows& rows, const PlaneTokens& x,
                     float* out, int64_t ld, Prefetch& prefetch);
  // y += sum over rows of h * row, by the planes that plane_dots has, too. y has 256 sums for each unit,
  // those of a last unit of fewer groups in an order of its own.
  void (*plane_down)(const PlaneFormat& planes, const DownRows& rows, int64_t groups,
                     DownScratch& scratch, float* y, Prefetch& prefetch);
  // Sum of 64-bit words, wrapping.
  uint64_t (*read)(const void* data, int64_t num_words);
};

struct Isa {
  const char* name;
  Kernels by_dtype[kNumDTypes];
  CommonKernels common;
};

extern const Isa kScalarIsa;
#if defined(__x86_64__)
extern const Isa kAvx2Isa;
extern const Isa kAvx512Isa;
extern const Isa kAvx512Bf16Isa;
#elif defined(__aarch64__)
extern const Isa kNeonIsa;
extern const Isa kNeonDotIsa;
#endif

}  // namespace sparse_ffn
