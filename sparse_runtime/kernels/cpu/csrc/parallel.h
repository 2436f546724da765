// Work on torch's threads, and its division among them.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include "sizes.h"

namespace sparse_ffn {

constexpr int64_t kMaxThreads = 256;
// Weights worth a thread of their own. Waking one costs 1–3 µs, the time to read about 40 KB.
constexpr int64_t kBytesPerThread = 32 * 1024;

// Threads that so many bytes of weights are worth.
inline int64_t num_threads_for(int64_t bytes) {
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != 0) threads = 1;
  const int64_t useful = at_least(bytes / kBytesPerThread, 1);
  return at_most(at_most(useful, int64_t(threads)), kMaxThreads);
}

// work(i) for i < parts on torch's threads. Nothing here assumes that they run at the same time:
// inside someone else's parallel region one thread does them all.
template <class Work>
void parallel(int64_t parts, const Work& work) {
  if (parts == 1) {
    work(0);
    return;
  }
  const auto run = [](int64_t begin, int64_t end, void* context) {
    const Work& work = *static_cast<const Work*>(context);
    for (int64_t i = begin; i < end; ++i) work(i);
  };
  if (torch_parallel_for(0, parts, 1, run, const_cast<Work*>(&work)) != 0) {
    // It fails only before it runs anything.
    for (int64_t i = 0; i < parts; ++i) work(i);
  }
}

// Part i of `parts` of [0, count), in multiples of `unit`.
struct Range {
  int64_t begin, end;
};
inline Range part_of(int64_t count, int64_t parts, int64_t i, int64_t unit) {
  const int64_t units = (count + unit - 1) / unit;
  return {at_most(units * i / parts * unit, count), at_most(units * (i + 1) / parts * unit, count)};
}

}  // namespace sparse_ffn
