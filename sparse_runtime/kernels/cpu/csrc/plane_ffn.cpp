// The FFN over planes: tokens, memory and threads of a pass, and the sum of what its parts computed.
#include "plane_ffn.h"

#include <string.h>

#include "parallel.h"
#include "plane_pass.h"
#include "plane_tokens.h"
#include "tokens.h"

namespace sparse_ffn {

namespace {

int64_t part_size(int64_t tokens, int64_t length) {
  const int64_t groups = padded_groups(length), values = tokens * kStepRows;
  return Scratch::size<Prefetch>(1) + 8 * Scratch::size<float>(values) +
         2 * Scratch::size<float>(2 * values) +
         Scratch::size<float>(tokens * unit_floats(length)) +
         Scratch::size<float>(kDownBlock * 16) + Scratch::size<float>(groups) +
         2 * Scratch::size<int32_t>(kDownBlock / 4 * groups) + Scratch::size<int32_t>(groups) +
         Scratch::size<uint8_t>(kDownBlock * 256) + 2 * Scratch::size<int32_t>(kDownBlock / 4 * 64);
}

void take_part(Scratch& memory, int64_t tokens, int64_t length, PlanePart& own) {
  const int64_t groups = padded_groups(length), values = tokens * kStepRows;
  own.prefetch = new (memory.take<Prefetch>(1)) Prefetch;
  for (PlaneStep& step : own.steps)
    for (float** array : {&step.gate, &step.up, &step.looks, &step.evidence})
      *array = memory.take<float>(values);
  own.dots = memory.take<float>(2 * values);
  own.full = memory.take<float>(2 * values);
  own.sums = memory.take<float>(tokens * unit_floats(length));
  own.down.values = memory.take<float>(kDownBlock * 16);
  own.down.steps = memory.take<float>(groups);
  own.down.high = memory.take<int32_t>(kDownBlock / 4 * groups);
  own.down.low = memory.take<int32_t>(kDownBlock / 4 * groups);
  own.down.starts = memory.take<int32_t>(groups);
  own.down.tails = memory.take<uint8_t>(kDownBlock * 256);
  own.down.tail_high = memory.take<int32_t>(kDownBlock / 4 * 64);
  own.down.tail_low = memory.take<int32_t>(kDownBlock / 4 * 64);
  own.counts[0] = own.counts[1] = own.counts[2] = 0;
}

// A row of sums in the order of its columns: that of the units, but for a last one of u < 4 groups.
void order_sums(float* sums, int64_t length) {
  const int64_t groups = plane_groups(length), u = groups % 4;
  if (u == 0) return;
  float* const tail = sums + groups / 4 * 4 * kPlaneGroup;
  float ordered[4 * kPlaneGroup];
  for (int64_t w = 0; w < 4; ++w)
    for (int64_t c = 0; c < 4; ++c)
      for (int64_t lane = 0; lane < u; ++lane) {
        const int64_t j = 4 * lane + w;
        memcpy(ordered + 64 * (j % u) + 16 * c + 4 * (j / u), tail + 64 * w + 16 * c + 4 * lane,
               4 * sizeof(float));
      }
  memcpy(tail, ordered, size_t(u * kPlaneGroup) * sizeof(float));
}

void run_pass(const PlaneFfn& ffn, Tokens x, const Clusters& clusters, const int64_t* ids,
              const Stages& stages, const Compensation& compensation, char* y) {
  const Isa& isa = current_isa();
  const Kernels& kernels = isa.by_dtype[ffn.dtype];
  const int64_t tokens = x.count, hidden = ffn.hidden_size, size = ffn.element_size;
  const int64_t set_bytes = (ffn.num_neurons + 7) / 8;
  const int64_t neuron = ffn.look.stride + ffn.count.stride + ffn.refine.stride;
  const int64_t most_parts = num_threads_for(ffn.num_neurons * neuron);

  Scratch& memory = scratch();
  memory.reserve(TokenMemory::size(tokens, hidden) + Scratch::size<uint8_t>(set_bytes) +
                 Scratch::size<int32_t>(ffn.num_neurons + 16) + Scratch::size<PlanePart>(most_parts) +
                 most_parts * part_size(tokens, hidden) + Scratch::size<float>(hidden));
  TokenMemory token_memory;
  token_memory.take(memory, tokens, hidden);
  uint8_t* const joined = memory.take<uint8_t>(set_bytes);
  int32_t* const rows = memory.take<int32_t>(ffn.num_neurons + 16);
  PlanePart* const parts = memory.take<PlanePart>(most_parts);
  for (int64_t p = 0; p < most_parts; ++p) take_part(memory, tokens, hidden, parts[p]);
  float* const wide = memory.take<float>(hidden);

  PlanePass pass;
  pass.ffn = &ffn;
  pass.isa = &isa;
  pass.clusters = clusters;
  pass.stages = stages;
  pass.ids = ids;
  pass.x = round_tokens(isa, ffn.dtype, size, x, hidden, token_memory);
  pass.rows = nullptr;
  pass.num_rows = ffn.num_neurons;
  pass.sum_stride = unit_floats(hidden);
  if (clusters.sets) {
    group_tokens(ids, tokens, pass.groups);
    const uint8_t* set = clusters.sets + pass.groups.cluster[0] * clusters.stride;
    if (pass.groups.count > 1) {
      memset(joined, 0, size_t(set_bytes));
      join(pass.groups, clusters.sets, clusters.stride, set_bytes, joined);
      set = joined;
    }
    pass.num_rows = isa.common.decode(set, ffn.num_neurons, rows);
    pass.rows = rows;
  }
  pass.step_rows = at_most(at_least(kStepBytes / neuron / 4 * 4, 16), kStepRows);
  pass.num_parts = at_most(num_threads_for(pass.num_rows * neuron), most_parts);
  parallel(pass.num_parts, [&](int64_t part) { compute_plane_part(pass, parts[part], part); });

  for (int64_t t = 0; t < tokens; ++t) {
    float* const total = parts[0].sums + t * pass.sum_stride;
    for (int64_t p = 1; p < pass.num_parts; ++p) {
      const float* const more = parts[p].sums + t * pass.sum_stride;
      for (int64_t k = 0; k < pass.sum_stride; ++k) total[k] += more[k];
    }
    order_sums(total, hidden);
    const char* const token = static_cast<const char*>(x.data) + t * x.stride * size;
    if (compensation.rank > 0) kernels.widen(token, hidden, token_memory.wide);
    for (int64_t c = 0; c < compensation.rank; ++c) {
      float weight = 0.0f;
      kernels.widen(static_cast<const char*>(compensation.down.data) +
                        c * compensation.down.stride * size, hidden, wide);
      for (int64_t k = 0; k < hidden; ++k) weight += wide[k] * token_memory.wide[k];
      kernels.widen(static_cast<const char*>(compensation.up.data) +
                        c * compensation.up.stride * size, hidden, wide);
      for (int64_t k = 0; k < hidden; ++k) total[k] += weight * wide[k];
    }
    const Matrix& bias = compensation.cluster_bias;
    kernels.store(total, hidden,
                  bias.data ? static_cast<const char*>(bias.data) + ids[t] * bias.stride * size
                            : nullptr,
                  y + t * hidden * size);
  }
  if (clusters.row_counts)
    for (int i = 0; i < 3; ++i) {
      int64_t total = 0;
      for (int64_t p = 0; p < pass.num_parts; ++p) total += parts[p].counts[i];
      add_count(clusters.row_counts + i, total);
    }
}

}  // namespace

void run_plane_ffn(const PlaneFfn& ffn, Tokens x, const Clusters& clusters, const int64_t* ids,
                   const Stages& stages, const Compensation& compensation, void* y) {
  in_passes(x, ffn.element_size, [&](Tokens some, int64_t first) {
    run_pass(ffn, some, clusters, ids ? ids + first : nullptr, stages, compensation,
             static_cast<char*>(y) + first * ffn.hidden_size * ffn.element_size);
  });
}

}  // namespace sparse_ffn
