// AVX-512 with the BF16 and VNNI extensions, which come together. Looks add products of bytes in one
// instruction, gate and up multiply bf16 pairs directly. The latter treats subnormal bf16 inputs as
// zero. Down is as in isa_avx512.cpp: its h stays in fp32.
#include "avx512.h"

// Pairs are (element, next element) in memory order for both operands, so tokens are packed by
// copying; tokens without elements may have no address. Two chains, as in the generic version.
#define SPARSE_FFN_DOT_BF16                                                               \
  template <>                                                                             \
  struct Dot<bf16> {                                                                      \
    using X = bf16;                                                                       \
    using W = __m512i;                                                                    \
    static void pack(const bf16* source, int64_t length, X* packed) {                     \
      if (length > 0) memcpy(packed, source, size_t(length) * sizeof(bf16));              \
      memset(packed + length, 0, size_t(round_up(length, kBlock) - length) * sizeof(bf16)); \
    }                                                                                     \
    static inline W weights(const bf16* p) { return _mm512_loadu_si512(p); }              \
    static inline W weights_tail(const bf16* p, int64_t count) {                          \
      bf16 buffer[kBlock] = {};                                                           \
      memcpy(buffer, p, size_t(count) * sizeof(bf16));                                    \
      return _mm512_loadu_si512(buffer);                                                  \
    }                                                                                     \
    static inline void step(const W& w, const X* x, V& sums, V&) {                        \
      sums = _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));        \
    }                                                                                     \
  };

#include "loops.h"

namespace sparse_ffn {
const Isa kAvx512Bf16Isa = {"avx512bf16",
                            {kernels_for<bf16>(), kernels_for<fp16>(), kernels_for<float>()},
                            {activate, decode, round_plane_token, plane_dots, plane_down, read}};
}
