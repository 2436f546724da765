// Tokens in the layout of the loops, a pass at a time.
#pragma once

#include "ffn.h"
#include "sizes.h"

namespace sparse_ffn {

// Added to the distance between tokens: hidden sizes are multiples of 4 KB, and without it the same
// columns of all tokens and rows would fall into one set of the L1 cache.
constexpr int64_t kSkewBytes = 128;

inline int64_t packed_stride(const Kernels& kernels, int64_t length) {
  return kernels.packed_size(length) + kSkewBytes;
}

inline PackedTokens pack(const Kernels& kernels, Tokens x, int64_t element_size, int64_t length,
                         char* buffer) {
  const int64_t stride = packed_stride(kernels, length);
  for (int64_t t = 0; t < x.count; ++t)
    kernels.pack_token(static_cast<const char*>(x.data) + t * x.stride * element_size, length,
                       buffer + t * stride);
  return {buffer, stride, x.count};
}

// body(tokens, number of the first) for up to kMaxTokens tokens at a time.
template <class Body>
void in_passes(Tokens x, int64_t element_size, const Body& body) {
  for (int64_t first = 0; first < x.count; first += kMaxTokens) {
    const Tokens some = {static_cast<const char*>(x.data) + first * x.stride * element_size,
                         x.stride, at_most(x.count - first, kMaxTokens)};
    body(some, first);
  }
}

}  // namespace sparse_ffn
