// Tokens as the loops over planes want them, and memory for them.
#pragma once

#include <string.h>

#include "ffn.h"
#include "scratch.h"

namespace sparse_ffn {

inline int64_t padded_groups(int64_t length) { return round_up(plane_groups(length), 16); }

// Floats of a row in units of 256.
inline int64_t unit_floats(int64_t length) { return round_up(plane_groups(length), 4) * kPlaneGroup; }

struct TokenMemory {
  float* wide;
  int8_t* high;
  int8_t* low;
  float* scales;
  int32_t* sums;

  static int64_t size(int64_t tokens, int64_t length) {
    const int64_t groups = padded_groups(length);
    return Scratch::size<float>(length) + 2 * Scratch::size<int8_t>(tokens * unit_floats(length)) +
           Scratch::size<float>(tokens * (groups + 16)) +
           Scratch::size<int32_t>(tokens * groups);
  }
  void take(Scratch& memory, int64_t tokens, int64_t length) {
    const int64_t groups = padded_groups(length);
    wide = memory.take<float>(length);
    high = memory.take<int8_t>(tokens * unit_floats(length));
    low = memory.take<int8_t>(tokens * unit_floats(length));
    scales = memory.take<float>(tokens * (groups + 16));
    sums = memory.take<int32_t>(tokens * groups);
  }
};

inline PlaneTokens round_tokens(const Isa& isa, DType dtype, int64_t element_size, Tokens x,
                         int64_t length, const TokenMemory& memory) {
  const int64_t groups = padded_groups(length), codes = unit_floats(length);
  memset(memory.high, 0, size_t(x.count * codes));
  memset(memory.low, 0, size_t(x.count * codes));
  memset(memory.scales, 0, size_t(x.count * (groups + 16)) * sizeof(float));
  memset(memory.sums, 0, size_t(x.count * groups) * sizeof(int32_t));
  for (int64_t t = 0; t < x.count; ++t) {
    isa.by_dtype[dtype].widen(static_cast<const char*>(x.data) + t * x.stride * element_size,
                              length, memory.wide);
    isa.common.round_plane_token(memory.wide, length, memory.high + t * codes,
                                 memory.low + t * codes, memory.scales + t * (groups + 16),
                                 memory.sums + t * groups, groups);
  }
  return {memory.high, memory.low, memory.scales, memory.sums,
          codes,       groups,     plane_groups(length), x.count};
}

}  // namespace sparse_ffn
