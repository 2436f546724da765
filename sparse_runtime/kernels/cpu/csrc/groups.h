// Tokens by cluster.
#pragma once

#include "kernels.h"

namespace sparse_ffn {

// The clusters of a few tokens, each once.
struct Groups {
  int64_t count = 0;
  int64_t cluster[kMaxTokens];
  uint64_t tokens[kMaxTokens];
};

inline void group_tokens(const int64_t* ids, int64_t num_tokens, Groups& groups) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    int64_t g = 0;
    while (g < groups.count && groups.cluster[g] != ids[t]) ++g;
    if (g == groups.count) {
      groups.cluster[g] = ids[t];
      groups.tokens[g] = 0;
      ++groups.count;
    }
    groups.tokens[g] |= uint64_t(1) << t;
  }
}

// Joins the bitmaps of the clusters into one.
inline void join(const Groups& groups, const uint8_t* sets, int64_t stride, int64_t bytes,
                 uint8_t* joined) {
  for (int64_t g = 0; g < groups.count; ++g) {
    const uint8_t* const set = sets + groups.cluster[g] * stride;
    for (int64_t i = 0; i < bytes; ++i) joined[i] |= set[i];
  }
}

// The tokens whose cluster has neuron i in `sets`.
inline uint64_t wanting(const Groups& groups, const uint8_t* sets, int64_t stride, int64_t i) {
  uint64_t tokens = 0;
  for (int64_t g = 0; g < groups.count; ++g)
    if (sets[groups.cluster[g] * stride + (i >> 3)] >> (i & 7) & 1) tokens |= groups.tokens[g];
  return tokens;
}

}  // namespace sparse_ffn
