// Linear layers over planes, and rows' values.
#include "parallel.h"
#include "plane_ffn.h"
#include "plane_pass.h"
#include "plane_tokens.h"
#include "tokens.h"

namespace sparse_ffn {

namespace {

// Rows whose records are fetched, and then multiplied, together.
constexpr int64_t kLinearBlock = 16;

}  // namespace

void run_plane_linear(DType dtype, int64_t element_size, Tokens x, const PlaneFormat& format,
                      Stream records, int64_t rows, int64_t length, const void* bias, void* y) {
  const Isa& isa = current_isa();
  const Kernels& kernels = isa.by_dtype[dtype];
  const int64_t base = plane_bytes(length, format.base);
  const int64_t residual = plane_bytes(length, format.residual);
  const int64_t parts = num_threads_for(rows * records.stride);
  in_passes(x, element_size, [&](Tokens some, int64_t first_token) {
    const int64_t tokens = some.count, values = tokens * kLinearBlock;
    Scratch& memory = scratch();
    memory.reserve(TokenMemory::size(tokens, length) +
                   parts * (Scratch::size<Prefetch>(1) + Scratch::size<float>(values)));
    TokenMemory token_memory;
    token_memory.take(memory, tokens, length);
    Prefetch* queues[kMaxThreads];
    float* dots[kMaxThreads];
    for (int64_t p = 0; p < parts; ++p) {
      queues[p] = new (memory.take<Prefetch>(1)) Prefetch;
      dots[p] = memory.take<float>(values);
    }
    const PlaneTokens rounded = round_tokens(isa, dtype, element_size, some, length, token_memory);
    parallel(parts, [&](int64_t part) {
      const Range range = part_of(rows, parts, part, kPlaneRows);
      const auto fetch = [&](int64_t r) {
        const int64_t count = at_most(range.end - r, kLinearBlock);
        queues[part]->add(records.data + r * records.stride, count * records.stride);
      };
      fetch(range.begin);
      for (int64_t r = range.begin; r < range.end; r += kLinearBlock) {
        const int64_t count = at_most(range.end - r, kLinearBlock);
        const uint8_t* planes[kLinearBlock];
        const uint8_t* residuals[kLinearBlock];
        const uint8_t* scales[kLinearBlock];
        for (int64_t i = 0; i < round_up(count, kPlaneRows); ++i) {
          planes[i] = records.data + (r + at_most(i, count - 1)) * records.stride;
          residuals[i] = planes[i] + base;
          scales[i] = residuals[i] + residual;
        }
        fetch(r + kLinearBlock);
        isa.common.plane_dots(format,
                              {planes, residuals, scales, round_up(count, kPlaneRows), nullptr},
                              rounded, dots[part], kLinearBlock, *queues[part]);
        for (int64_t t = 0; t < tokens; ++t)
          kernels.store(dots[part] + t * kLinearBlock, count,
                        bias ? static_cast<const char*>(bias) + r * element_size : nullptr,
                        static_cast<char*>(y) + ((first_token + t) * rows + r) * element_size);
      }
    });
  });
}

void run_plane_values(DType dtype, int64_t element_size, const PlaneFormat& format,
                      const PlaneRowsOf& rows, int64_t count, int64_t length, void* out) {
  const Kernels& kernels = current_isa().by_dtype[dtype];
  const int64_t parts = num_threads_for(count * length * element_size);
  parallel(parts, [&](int64_t part) {
    const Range range = part_of(count, parts, part, 1);
    for (int64_t r = range.begin; r < range.end; ++r)
      kernels.plane_values(format, rows.base.data + r * rows.base.stride,
                           rows.residual.data + r * rows.residual.stride,
                           rows.scales.data + r * rows.scales.stride, length,
                           static_cast<char*>(out) + r * length * element_size);
  });
}

void run_round_rows(DType dtype, int64_t element_size, Matrix weight, int64_t rows, int64_t length,
                    const Rounding& how, int8_t* hi, int8_t* lo, uint16_t* scales) {
  const Kernels& kernels = current_isa().by_dtype[dtype];
  const int64_t groups = plane_groups(length);
  const int64_t parts = num_threads_for(rows * length * element_size);
  parallel(parts, [&](int64_t part) {
    const Range range = part_of(rows, parts, part, 1);
    for (int64_t r = range.begin; r < range.end; ++r)
      kernels.round_row(static_cast<const char*>(weight.data) + r * weight.stride * element_size,
                        length, how, hi + r * length, lo + r * length, scales + r * groups);
  });
}

namespace {

// A unit of u groups, of stored codes [u, 64]: planes.py draws it.
void pack_unit(const uint8_t* codes, int64_t u, int bits, uint8_t* out) {
  uint8_t v[4][64], n[64];
  for (int64_t c = 0; c < 4; ++c)
    for (int64_t q = 0; q < 4; ++q)
      for (int64_t g = 0; g < u; ++g)
        memcpy(v[c] + 4 * (q * u + g), codes + 64 * g + 16 * c + 4 * q, 4);
  const int64_t size = 16 * u;
  for (int64_t k = 0; k < size; ++k) {
    if (bits == 2) out[k] = uint8_t(v[0][k] | v[1][k] << 2 | v[2][k] << 4 | v[3][k] << 6);
    if (bits == 3) out[k] = uint8_t(v[0][k] | v[1][k] << 3 | (v[3][k] & 3) << 6);
    if (bits == 4) out[k] = uint8_t(v[0][k] | v[1][k] << 4);
  }
  if (bits == 3) {
    for (int64_t k = 0; k < size; ++k) n[k] = uint8_t(v[2][k] | (v[3][k] >> 2) << 3);
    for (int64_t k = 0; k < size / 2; ++k)
      out[size + k] = uint8_t(n[k] | n[k + size / 2] << 4);
  }
  if (bits == 4)
    for (int64_t k = 0; k < size; ++k) out[size + k] = uint8_t(v[2][k] | v[3][k] << 4);
}

}  // namespace

void run_pack_plane(const int8_t* codes, int64_t rows, int64_t length, int bits, uint8_t* out) {
  const int64_t groups = plane_groups(length), parts = num_threads_for(rows * length);
  const uint8_t zero = uint8_t(1 << (bits - 1));
  parallel(parts, [&](int64_t part) {
    const Range range = part_of(rows, parts, part, 1);
    for (int64_t r = range.begin; r < range.end; ++r)
      for (int64_t first = 0; first < groups; first += 4) {
        const int64_t u = at_most(groups - first, 4);
        const int8_t* const own = codes + r * length + first * kPlaneGroup;
        const int64_t count = at_most(length - first * kPlaneGroup, u * kPlaneGroup);
        uint8_t stored[4 * kPlaneGroup];
        for (int64_t k = 0; k < count; ++k) stored[k] = uint8_t(uint8_t(own[k]) + zero);
        for (int64_t k = count; k < u * kPlaneGroup; ++k) stored[k] = zero;
        pack_unit(stored, u, bits, out + (r * groups + first) * 8 * bits);
      }
  });
}

}  // namespace sparse_ffn
