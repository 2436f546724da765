// Which instruction set the operations use.
#pragma once

#include "kernels.h"

namespace sparse_ffn {

// The best usable instruction set, or the one set by force_isa.
const Isa& current_isa();

// Usable instruction sets, best first; returns how many.
int available_isas(const Isa* out[8]);

// For tests: use the named set ("" = the best again). False if it is unknown or not usable here.
bool force_isa(const char* name, int64_t length);

}  // namespace sparse_ffn
