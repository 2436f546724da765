// Memory that will be read soon, fetched a few cache lines at a time between other work.
#pragma once

#include <stdint.h>

// Every function is inlined, as kernels.h asks for.
#define SPARSE_FFN_INLINE inline __attribute__((always_inline))

namespace sparse_ffn {

// A queue of ranges. What does not fit is left out, and read when it is wanted.
class Prefetch {
 public:
  SPARSE_FFN_INLINE void add(const void* data, int64_t bytes) {
    if (tail_ - head_ == kRanges || bytes <= 0) return;
    const char* const first = static_cast<const char*>(data);
    begin_[tail_ % kRanges] = first;
    end_[tail_ % kRanges] = first + bytes;
    ++tail_;
  }

  SPARSE_FFN_INLINE void step(int64_t lines) {
    if (last_ - next_ < 64 * lines) {
      step_over(lines);
      return;
    }
    const char* const first = next_;
#pragma GCC unroll 16
    for (int64_t i = 0; i < lines; ++i) fetch(first + 64 * i);
    next_ = first + 64 * lines;
  }

 private:
  // Into the L2 cache: the L1 holds less than is under way.
  static SPARSE_FFN_INLINE void fetch(const char* line) { __builtin_prefetch(line, 0, 2); }

  // From one range to the next.
  SPARSE_FFN_INLINE void step_over(int64_t lines) {
#pragma GCC unroll 1
    for (; lines > 0; --lines) {
      if (next_ >= last_) {
        if (head_ == tail_) return;
        next_ = begin_[head_ % kRanges];
        last_ = end_[head_ % kRanges];
        ++head_;
      }
      fetch(next_);
      next_ += 64;
    }
  }

  static constexpr uint32_t kRanges = 1024;
  const char* begin_[kRanges];
  const char* end_[kRanges];
  const char* next_ = nullptr;
  const char* last_ = nullptr;
  uint32_t head_ = 0, tail_ = 0;
};

}  // namespace sparse_ffn
