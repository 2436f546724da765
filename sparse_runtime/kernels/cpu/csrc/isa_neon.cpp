// Advanced SIMD.
#include "neon.h"
//
#include "loops.h"

namespace sparse_ffn {
const Isa kNeonIsa = {"neon",
                      {kernels_for<bf16>(), kernels_for<fp16>(), kernels_for<float>()},
                      {activate, decode_bits, round_plane_token, plane_dots, plane_down, read_words}};
}
