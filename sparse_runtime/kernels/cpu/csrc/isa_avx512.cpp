// AVX-512 F, BW, DQ and VL.
#include "avx512.h"
//
#include "loops.h"

namespace sparse_ffn {
const Isa kAvx512Isa = {"avx512",
                        {kernels_for<bf16>(), kernels_for<fp16>(), kernels_for<float>()},
                        {activate, decode, round_plane_token, plane_dots, plane_down, read}};
}
