// Linear layers, the router, and reading.
#include <string.h>

#include <atomic>

#include "ffn.h"
#include "parallel.h"
#include "scratch.h"
#include "tokens.h"

namespace sparse_ffn {

namespace {

// Rows of a linear layer per pass.
constexpr int64_t kLinearRows = 1024;

// y[t * ld + r] for one pass of tokens and all rows, in fp32.
void linear_values(const Kernels& kernels, Matrix weight, int64_t rows, int64_t length,
                   int64_t element_size, PackedTokens x, float* y, int64_t ld) {
  const int64_t parts = num_threads_for(rows * length * element_size);
  parallel(parts, [&](int64_t part) {
    const Range range = part_of(rows, parts, part, 16);
    kernels.linear(weight, length, range.begin, range.end - range.begin, x, y + range.begin, ld);
  });
}

bool beats(float value, float best) {
  return value > best || (value != value && best == best);
}

}  // namespace

void run_router(DType dtype, int64_t element_size, Tokens x, int64_t hidden_size,
                const Router& router, int64_t num_clusters, int64_t* ids) {
  const Kernels& kernels = current_isa().by_dtype[dtype];
  const int64_t hidden = hidden_size, rank = router.rank, size = element_size;
  in_passes(x, size, [&](Tokens some, int64_t first) {
    const int64_t tokens = some.count;
    const int64_t packed_size = packed_stride(kernels, hidden);
    const int64_t packed_rank = packed_stride(kernels, rank);
    const int64_t ld = round_up(num_clusters, 32), rank_ld = round_up(rank, 32);
    Scratch& memory = scratch();
    memory.reserve(Scratch::size<char>(tokens * packed_size) +
                   Scratch::size<char>(tokens * packed_rank) +
                   Scratch::size<char>(tokens * rank * size) +
                   Scratch::size<float>(tokens * rank_ld) + Scratch::size<float>(tokens * ld) +
                   Scratch::size<float>(ld));
    char* const packed = memory.take<char>(tokens * packed_size);
    char* const packed_low = memory.take<char>(tokens * packed_rank);
    char* const low = memory.take<char>(tokens * rank * size);
    float* const low_values = memory.take<float>(tokens * rank_ld);
    float* const logits = memory.take<float>(tokens * ld);
    float* const bias = memory.take<float>(ld);

    PackedTokens in = pack(kernels, some, size, hidden, packed);
    int64_t length = hidden;
    if (rank > 0) {
      // Rounded between the two matrices, as two linear layers would.
      linear_values(kernels, router.down, rank, hidden, size, in, low_values, rank_ld);
      for (int64_t t = 0; t < tokens; ++t)
        kernels.store(low_values + t * rank_ld, rank, nullptr, low + t * rank * size);
      in = pack(kernels, {low, rank, tokens}, size, rank, packed_low);
      length = rank;
    }
    linear_values(kernels, router.up, num_clusters, length, size, in, logits, ld);
    if (router.bias)
      kernels.widen(router.bias, num_clusters, bias);
    else
      memset(bias, 0, size_t(num_clusters) * sizeof(float));
    for (int64_t t = 0; t < tokens; ++t) {
      const float* const row = logits + t * ld;
      int64_t winner = 0;
      float best = row[0] + bias[0];
      for (int64_t k = 1; k < num_clusters; ++k) {
        const float value = row[k] + bias[k];
        if (beats(value, best)) {
          best = value;
          winner = k;
        }
      }
      ids[first + t] = winner;
    }
  });
}

void run_linear(DType dtype, int64_t element_size, Tokens x, Matrix weight, int64_t rows,
                int64_t length, const void* bias, void* y) {
  const Kernels& kernels = current_isa().by_dtype[dtype];
  in_passes(x, element_size, [&](Tokens some, int64_t first) {
    const int64_t packed_size = packed_stride(kernels, length);
    const int64_t parts = num_threads_for(rows * length * element_size);
    const int64_t values = some.count * kLinearRows;
    Scratch& memory = scratch();
    memory.reserve(Scratch::size<char>(some.count * packed_size) +
                   Scratch::size<float>(parts * values));
    char* const packed = memory.take<char>(some.count * packed_size);
    float* const buffer = memory.take<float>(parts * values);
    const PackedTokens in = pack(kernels, some, element_size, length, packed);
    char* const out = static_cast<char*>(y) + first * rows * element_size;
    const char* const extra = static_cast<const char*>(bias);
    parallel(parts, [&](int64_t part) {
      const Range range = part_of(rows, parts, part, 16);
      float* const own = buffer + part * values;
      for (int64_t r = range.begin; r < range.end; r += kLinearRows) {
        const int64_t count = at_most(range.end - r, kLinearRows);
        kernels.linear(weight, length, r, count, in, own, kLinearRows);
        for (int64_t t = 0; t < some.count; ++t)
          kernels.store(own + t * kLinearRows, count, extra ? extra + r * element_size : nullptr,
                        out + (t * rows + r) * element_size);
      }
    });
  });
}

int64_t* id_scratch(int64_t count) {
  static thread_local Scratch memory;
  memory.reserve(Scratch::size<int64_t>(count));
  return memory.take<int64_t>(count);
}

uint64_t run_read(const void* data, int64_t num_words) {
  const Isa& isa = current_isa();
  const int64_t parts = num_threads_for(num_words * 8);
  std::atomic<uint64_t> sum{0};
  parallel(parts, [&](int64_t part) {
    const Range range = part_of(num_words, parts, part, 512);
    sum.fetch_add(isa.common.read(static_cast<const uint64_t*>(data) + range.begin,
                                  range.end - range.begin),
                  std::memory_order_relaxed);
  });
  return sum.load();
}

}  // namespace sparse_ffn
