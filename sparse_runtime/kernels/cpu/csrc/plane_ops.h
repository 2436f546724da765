// The operations over planes as torch sees them; ops.cpp registers them.
#pragma once

#include "arguments.h"

namespace sparse_ffn {

// Without sets all neurons; with them clusters by ids or, without those, by the router.
extern const char* const kPlaneFfn;
void plane_ffn_op(StableIValue* stack, uint64_t, uint64_t);

extern const char* const kPlaneLinear;
void plane_linear_op(StableIValue* stack, uint64_t, uint64_t);

extern const char* const kPlaneValues;
void plane_values_op(StableIValue* stack, uint64_t, uint64_t);

extern const char* const kRoundRows;
void round_rows_op(StableIValue* stack, uint64_t, uint64_t);

extern const char* const kPackPlane;
void pack_plane_op(StableIValue* stack, uint64_t, uint64_t);

}  // namespace sparse_ffn
