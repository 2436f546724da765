// Arithmetic with sizes.
#pragma once

#include <stdint.h>

namespace sparse_ffn {

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline int64_t at_least(int64_t value, int64_t bound) { return value < bound ? bound : value; }
inline int64_t at_most(int64_t value, int64_t bound) { return value > bound ? bound : value; }

}  // namespace sparse_ffn
