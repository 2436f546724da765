// Scratch memory of the operations.
#pragma once

#include <stdlib.h>

#include <new>

#include "sizes.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace sparse_ffn {

// Under the address sanitizer, what was not taken from scratch memory may not be touched.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kRedZone = 128;
inline void forbid(void* p, int64_t bytes) { __asan_poison_memory_region(p, size_t(bytes)); }
inline void allow(void* p, int64_t bytes) { __asan_unpoison_memory_region(p, size_t(bytes)); }
#else
constexpr int64_t kRedZone = 0;
inline void forbid(void*, int64_t) {}
inline void allow(void*, int64_t) {}
#endif

// Scratch memory of a calling thread, kept between calls; it grows and never shrinks.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(base_); }

  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes > capacity_) {
      free(base_);
      capacity_ = 0;
      base_ = static_cast<char*>(aligned_alloc(4096, size_t(round_up(bytes, 4096))));
      if (!base_) throw std::bad_alloc();
      capacity_ = round_up(bytes, 4096);
    }
    forbid(base_, capacity_);
  }

  template <class T>
  T* take(int64_t count) {
    T* const result = reinterpret_cast<T*>(base_ + used_);
    allow(result, count * int64_t(sizeof(T)));
    used_ += size<T>(count);
    return result;
  }

  // What take uses: whole pairs of cache lines, so that threads do not share any.
  template <class T>
  static int64_t size(int64_t count) {
    return round_up(count * int64_t(sizeof(T)), 128) + kRedZone;
  }

 private:
  char* base_ = nullptr;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
};

// For one pass, so its size is bounded by kMaxTokens tokens.
inline Scratch& scratch() {
  static thread_local Scratch instance;
  return instance;
}

}  // namespace sparse_ffn
