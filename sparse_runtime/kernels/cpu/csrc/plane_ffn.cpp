// The FFN over planes: tokens, threads, and the stages of a part's neurons.
#include "plane_ffn.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include <atomic>

#include "groups.h"
#include "parallel.h"
#include "scratch.h"
#include "tokens.h"

namespace sparse_ffn {

namespace {

// Neurons of a step: what is decided about is read during the next one. 32 neurons of Mistral's shape
// take 140 KB to look at, and as much again at most: a step and the next one fit into an L2 cache.
constexpr int64_t kStepRows = 32;

int64_t plane_bytes(int64_t length, int bits) { return 8 * bits * plane_groups(length); }

// Neurons that are read and decided about together.
struct Step {
  int64_t count;
  int32_t index[kStepRows];
  uint64_t wanted[kStepRows];   // tokens that have them as candidates
  uint64_t counted[kStepRows];
  uint64_t refined[kStepRows];
  float* gate;      // [tokens, kStepRows]: dot products with base planes
  float* up;
  float* looks;     // their activation
  float* evidence;  // |look| * factor
};

struct Pass {
  const PlaneFfn* ffn;
  const Isa* isa;
  Clusters clusters;
  Stages stages;
  Groups groups;
  PlaneTokens x;
  const int32_t* rows;  // null: all neurons
  int64_t num_rows;
  int64_t num_parts;
  int64_t sum_stride;  // floats: 256 for each unit
};

// What one part works with.
struct Part {
  Prefetch* prefetch;
  Step steps[2];
  float* dots;  // [tokens, 2 * kStepRows]
  float* full;  // [2, tokens, kStepRows]
  float* sums;  // [tokens, sum_stride]
  DownScratch down;
  int64_t counts[3];
};

float ramp(float evidence, float width) {
  if (width == 0.0f) return 1.0f;
  const float share = (evidence - 1.0f) / width;
  return !(share < 1.0f) ? 1.0f : share;
}

// ---------------------------------------------------------------------------------------------
// Stages of a step

void choose(const Pass& pass, int64_t first, Step& step) {
  step.count = at_most(pass.num_rows - first, kStepRows);
  if (step.count < 0) step.count = 0;
  const uint64_t all = pass.x.count >= 64 ? ~uint64_t(0) : (uint64_t(1) << pass.x.count) - 1;
  for (int64_t r = 0; r < step.count; ++r) {
    step.index[r] = pass.rows ? pass.rows[first + r] : int32_t(first + r);
    step.wanted[r] = pass.groups.count > 1 ? wanting(pass.groups, pass.clusters.sets,
                                                     pass.clusters.stride, step.index[r])
                                           : all;
  }
}

// A neuron's gate and up, in some stream, and its scales.
struct Pairs {
  const uint8_t* planes[2 * kStepRows];
  const uint8_t* scales[2 * kStepRows];
  uint64_t tokens[2 * kStepRows];
  int64_t count = 0;

  void add(const uint8_t* gate, const uint8_t* up, const uint8_t* gate_scales,
           const uint8_t* up_scales, uint64_t wanted) {
    planes[count] = gate, planes[count + 1] = up;
    scales[count] = gate_scales, scales[count + 1] = up_scales;
    tokens[count] = tokens[count + 1] = wanted;
    count += 2;
  }
  PlaneRows rows(int64_t num_tokens) {
    while (count % kPlaneRows) {
      planes[count] = planes[count - 1], scales[count] = scales[count - 1];
      tokens[count++] = 0;
    }
    return {planes, scales, count, num_tokens > 1 ? tokens : nullptr};
  }
};

void look(const Pass& pass, Part& own, Step& step) {
  const PlaneFfn& ffn = *pass.ffn;
  const int64_t plane = plane_bytes(ffn.hidden_size, ffn.format.base);
  const int64_t scales = 2 * plane_groups(ffn.hidden_size), tokens = pass.x.count;
  Pairs pairs;
  for (int64_t r = 0; r < step.count; ++r) {
    const uint8_t* const record = ffn.look.data + step.index[r] * ffn.look.stride;
    pairs.add(record, record + plane, record + 2 * plane, record + 2 * plane + scales,
              step.wanted[r]);
  }
  const int64_t ld = 2 * kStepRows;
  pass.isa->common.plane_dots(ffn.format.base, pairs.rows(tokens), pass.x, own.dots, ld,
                              *own.prefetch);
  for (int64_t t = 0; t < tokens; ++t) {
    float* const looks = step.looks + t * kStepRows;
    float* const gate = step.gate + t * kStepRows;
    float* const up = step.up + t * kStepRows;
    for (int64_t r = 0; r < step.count; ++r) {
      looks[r] = gate[r] = own.dots[t * ld + 2 * r];
      up[r] = own.dots[t * ld + 2 * r + 1];
    }
    pass.isa->common.activate(ffn.activation, looks, up, step.count);
  }
}

// Decides about a step's neurons, and has what they need fetched.
void decide(const Pass& pass, Part& own, Step& step) {
  const PlaneFfn& ffn = *pass.ffn;
  const Stages& stages = pass.stages;
  for (int64_t r = 0; r < step.count; ++r) {
    uint64_t counted = 0, refined = 0;
    if (!stages.factors) {
      counted = refined = step.wanted[r];
    } else {
      const float factor = stages.factors[step.index[r]];
      for (uint64_t left = step.wanted[r]; left; left &= left - 1) {
        const int64_t t = __builtin_ctzll(left);
        const float evidence = fabsf(step.looks[t * kStepRows + r]) * factor;
        step.evidence[t * kStepRows + r] = evidence;
        // Not below a bound, so that NaN is refined.
        if (!(evidence <= 1.0f)) counted |= uint64_t(1) << t;
        if (!(evidence <= 1.0f) && !(evidence <= stages.tau)) refined |= uint64_t(1) << t;
      }
    }
    step.counted[r] = counted;
    step.refined[r] = refined;
    own.counts[0] += __builtin_popcountll(counted);
    own.counts[1] += __builtin_popcountll(step.wanted[r]);
    own.counts[2] += __builtin_popcountll(refined);
    if (refined && ffn.format.residual)
      own.prefetch->add(ffn.refine.data + step.index[r] * ffn.refine.stride,
                        3 * plane_bytes(ffn.hidden_size, ffn.format.residual));
  }
  for (int64_t r = 0; r < step.count; ++r)
    if (step.counted[r])
      own.prefetch->add(ffn.count.data + step.index[r] * ffn.count.stride,
                        plane_bytes(ffn.hidden_size, ffn.format.base) +
                            2 * plane_groups(ffn.hidden_size));
}

// Activations of a step's refined neurons by all their bits: own.full, in the first of its two parts.
void refine(const Pass& pass, Part& own, const Step& step) {
  const PlaneFfn& ffn = *pass.ffn;
  const int64_t base = plane_bytes(ffn.hidden_size, ffn.format.base);
  const int64_t plane = plane_bytes(ffn.hidden_size, ffn.format.residual);
  const int64_t scales = 2 * plane_groups(ffn.hidden_size), tokens = pass.x.count;
  Pairs pairs;
  int64_t place[kStepRows];
  for (int64_t r = 0; r < step.count; ++r) {
    if (!step.refined[r]) continue;
    place[pairs.count / 2] = r;
    const uint8_t* const record = ffn.refine.data + step.index[r] * ffn.refine.stride;
    const uint8_t* const own_scales =
        ffn.look.data + step.index[r] * ffn.look.stride + 2 * base;
    pairs.add(record, record + plane, own_scales, own_scales + scales, step.refined[r]);
  }
  const int64_t count = pairs.count / 2, ld = 2 * kStepRows;
  if (count == 0) return;
  pass.isa->common.plane_dots(ffn.format.residual, pairs.rows(tokens), pass.x, own.dots, ld,
                              *own.prefetch);
  const float finer = 1.0f / float(1 << ffn.format.residual);
  for (int64_t t = 0; t < tokens; ++t) {
    float* const gate = own.full + t * kStepRows;
    float* const up = own.full + (tokens + t) * kStepRows;
    memcpy(gate, step.gate + t * kStepRows, size_t(step.count) * sizeof(float));
    memcpy(up, step.up + t * kStepRows, size_t(step.count) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      if (!(step.refined[place[i]] >> t & 1)) continue;
      gate[place[i]] += finer * own.dots[t * ld + 2 * i];
      up[place[i]] += finer * own.dots[t * ld + 2 * i + 1];
    }
    pass.isa->common.activate(ffn.activation, gate, up, step.count);
  }
}

// Rows of down, with their weights.
struct DownRows {
  const uint8_t* planes[kStepRows];
  const uint8_t* scales[kStepRows];
  float h[kStepRows];
  int64_t count = 0;

  void add(const uint8_t* plane, const uint8_t* own_scales, float weight) {
    planes[count] = plane;
    scales[count] = own_scales;
    h[count++] = weight;
  }
  void run(const Pass& pass, Part& own, int bits, float factor, float* sums) {
    if (count == 0) return;
    while (count % 4) add(planes[count - 1], scales[count - 1], 0.0f);
    pass.isa->common.plane_down(bits, planes, scales, h, count,
                                plane_groups(pass.ffn->hidden_size), factor, own.down, sums,
                                *own.prefetch);
  }
};

void add_down(const Pass& pass, Part& own, const Step& step) {
  const PlaneFfn& ffn = *pass.ffn;
  const Stages& stages = pass.stages;
  const int64_t base = plane_bytes(ffn.hidden_size, ffn.format.base);
  const int64_t plane = plane_bytes(ffn.hidden_size, ffn.format.residual);
  for (int64_t t = 0; t < pass.x.count; ++t) {
    DownRows counted, refined;
    for (int64_t r = 0; r < step.count; ++r) {
      if (!(step.counted[r] >> t & 1)) continue;
      const int64_t at = t * kStepRows + r;
      const bool is_refined = ffn.format.residual && (step.refined[r] >> t & 1);
      const float evidence = stages.factors ? step.evidence[at] : 0.0f;
      const float finer =
          !is_refined ? 0.0f : stages.factors ? ramp(evidence / stages.tau, stages.width) : 1.0f;
      float h = step.looks[at];
      if (is_refined) h = finer == 1.0f ? own.full[at] : h + finer * (own.full[at] - h);
      if (stages.factors) h *= ramp(evidence, stages.width);
      const uint8_t* const record = ffn.count.data + step.index[r] * ffn.count.stride;
      counted.add(record, record + base, h);
      if (is_refined)
        refined.add(ffn.refine.data + step.index[r] * ffn.refine.stride + 2 * plane, record + base,
                    h * finer);
    }
    float* const sums = own.sums + t * pass.sum_stride;
    counted.run(pass, own, ffn.format.base, 1.0f, sums);
    if (ffn.format.residual)
      refined.run(pass, own, ffn.format.residual, 1.0f / float(1 << ffn.format.residual), sums);
  }
}

void compute_part(const Pass& pass, Part& own, int64_t part) {
  const PlaneFfn& ffn = *pass.ffn;
  memset(own.sums, 0, size_t(pass.x.count * pass.sum_stride) * sizeof(float));
  const int64_t record = 2 * (plane_bytes(ffn.hidden_size, ffn.format.base) +
                              2 * plane_groups(ffn.hidden_size));
  const auto fetch = [&](const Step& step) {
    for (int64_t r = 0; r < step.count; ++r)
      own.prefetch->add(ffn.look.data + step.index[r] * ffn.look.stride, record);
  };
  // Parts take steps in turns, so that all have alike shares of what is counted.
  const int64_t stride = pass.num_parts * kStepRows;
  Step* now = &own.steps[0];
  Step* before = &own.steps[1];
  before->count = 0;
  choose(pass, part * kStepRows, *now);
  fetch(*now);
  Step next;
  for (int64_t first = part * kStepRows; now->count > 0 || before->count > 0; first += stride) {
    choose(pass, first + stride, next);
    fetch(next);
    if (now->count > 0) look(pass, own, *now);
    if (before->count > 0) {
      if (ffn.format.residual) refine(pass, own, *before);
      add_down(pass, own, *before);
    }
    if (now->count > 0) decide(pass, own, *now);
    Step* const free = before;
    before = now;
    now = free;
    now->count = next.count;
    memcpy(now->index, next.index, sizeof(next.index));
    memcpy(now->wanted, next.wanted, sizeof(next.wanted));
  }
}

// ---------------------------------------------------------------------------------------------
// A pass

int64_t padded_groups(int64_t length) { return round_up(plane_groups(length), 16); }

// Floats of a row in units of 256.
int64_t unit_floats(int64_t length) { return round_up(plane_groups(length), 4) * kPlaneGroup; }

struct TokenMemory {
  float* wide;
  int8_t* high;
  int8_t* low;
  float* scales;
  int32_t* starts;

  static int64_t size(int64_t tokens, int64_t length) {
    const int64_t groups = padded_groups(length);
    return Scratch::size<float>(length) + 2 * Scratch::size<int8_t>(tokens * unit_floats(length)) +
           Scratch::size<float>(tokens * (groups + 16)) +
           Scratch::size<int32_t>(3 * tokens * groups);
  }
  void take(Scratch& memory, int64_t tokens, int64_t length) {
    const int64_t groups = padded_groups(length);
    wide = memory.take<float>(length);
    high = memory.take<int8_t>(tokens * unit_floats(length));
    low = memory.take<int8_t>(tokens * unit_floats(length));
    scales = memory.take<float>(tokens * (groups + 16));
    starts = memory.take<int32_t>(3 * tokens * groups);
  }
};

PlaneTokens round_tokens(const Isa& isa, DType dtype, int64_t element_size, Tokens x,
                         int64_t length, const TokenMemory& memory) {
  const int64_t groups = padded_groups(length), codes = unit_floats(length);
  memset(memory.high, 0, size_t(x.count * codes));
  memset(memory.low, 0, size_t(x.count * codes));
  memset(memory.scales, 0, size_t(x.count * (groups + 16)) * sizeof(float));
  memset(memory.starts, 0, size_t(3 * x.count * groups) * sizeof(int32_t));
  for (int64_t t = 0; t < x.count; ++t) {
    isa.by_dtype[dtype].widen(static_cast<const char*>(x.data) + t * x.stride * element_size,
                              length, memory.wide);
    isa.common.round_plane_token(memory.wide, length, memory.high + t * codes,
                                 memory.low + t * codes, memory.scales + t * (groups + 16),
                                 memory.starts + 3 * t * groups, groups);
  }
  return {memory.high, memory.low, memory.scales, memory.starts,
          codes,       groups,     plane_groups(length), x.count};
}

int64_t part_size(int64_t tokens, int64_t length) {
  const int64_t groups = padded_groups(length), values = tokens * kStepRows;
  return Scratch::size<Prefetch>(1) + 8 * Scratch::size<float>(values) +
         2 * Scratch::size<float>(2 * values) +
         Scratch::size<float>(tokens * unit_floats(length)) +
         Scratch::size<float>(kStepRows * 16) + Scratch::size<float>(groups) +
         2 * Scratch::size<int32_t>(kStepRows / 4 * groups) + Scratch::size<int32_t>(groups) +
         Scratch::size<uint8_t>(kStepRows * 128) + 2 * Scratch::size<int32_t>(kStepRows / 4 * 64);
}

void take_part(Scratch& memory, int64_t tokens, int64_t length, Part& own) {
  const int64_t groups = padded_groups(length), values = tokens * kStepRows;
  own.prefetch = new (memory.take<Prefetch>(1)) Prefetch;
  for (Step& step : own.steps)
    for (float** array : {&step.gate, &step.up, &step.looks, &step.evidence})
      *array = memory.take<float>(values);
  own.dots = memory.take<float>(2 * values);
  own.full = memory.take<float>(2 * values);
  own.sums = memory.take<float>(tokens * unit_floats(length));
  own.down.values = memory.take<float>(kStepRows * 16);
  own.down.steps = memory.take<float>(groups);
  own.down.high = memory.take<int32_t>(kStepRows / 4 * groups);
  own.down.low = memory.take<int32_t>(kStepRows / 4 * groups);
  own.down.starts = memory.take<int32_t>(groups);
  own.down.tails = memory.take<uint8_t>(kStepRows * 128);
  own.down.tail_high = memory.take<int32_t>(kStepRows / 4 * 64);
  own.down.tail_low = memory.take<int32_t>(kStepRows / 4 * 64);
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
                 Scratch::size<int32_t>(ffn.num_neurons + 16) + Scratch::size<Part>(most_parts) +
                 most_parts * part_size(tokens, hidden) + 2 * Scratch::size<float>(hidden));
  TokenMemory token_memory;
  token_memory.take(memory, tokens, hidden);
  uint8_t* const joined = memory.take<uint8_t>(set_bytes);
  int32_t* const rows = memory.take<int32_t>(ffn.num_neurons + 16);
  Part* const parts = memory.take<Part>(most_parts);
  for (int64_t p = 0; p < most_parts; ++p) take_part(memory, tokens, hidden, parts[p]);
  float* const wide = memory.take<float>(hidden);

  Pass pass;
  pass.ffn = &ffn;
  pass.isa = &isa;
  pass.clusters = clusters;
  pass.stages = stages;
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
  pass.num_parts = at_most(num_threads_for(pass.num_rows * neuron), most_parts);
  parallel(pass.num_parts, [&](int64_t part) { compute_part(pass, parts[part], part); });

  for (int64_t t = 0; t < tokens; ++t) {
    float* const total = parts[0].sums + t * pass.sum_stride;
    for (int64_t p = 1; p < pass.num_parts; ++p) {
      const float* const more = parts[p].sums + t * pass.sum_stride;
      for (int64_t k = 0; k < pass.sum_stride; ++k) total[k] += more[k];
    }
    order_sums(total, hidden);
    const char* const token = static_cast<const char*>(x.data) + t * x.stride * size;
    for (int64_t c = 0; c < compensation.rank; ++c) {
      float weight = 0.0f;
      kernels.widen(token, hidden, token_memory.wide);
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

void run_plane_linear(DType dtype, int64_t element_size, Tokens x, const PlaneFormat& format,
                      Stream records, int64_t rows, int64_t length, const void* bias, void* y) {
  const Isa& isa = current_isa();
  const Kernels& kernels = isa.by_dtype[dtype];
  const int64_t base = plane_bytes(length, format.base);
  const int64_t residual = plane_bytes(length, format.residual);
  const int64_t parts = num_threads_for(rows * records.stride);
  in_passes(x, element_size, [&](Tokens some, int64_t first_token) {
    const int64_t tokens = some.count, values = tokens * kPlaneBlock;
    Scratch& memory = scratch();
    memory.reserve(TokenMemory::size(tokens, length) +
                   parts * (Scratch::size<Prefetch>(1) + 2 * Scratch::size<float>(values)));
    TokenMemory token_memory;
    token_memory.take(memory, tokens, length);
    Prefetch* queues[kMaxThreads];
    float* dots[kMaxThreads];
    float* finer[kMaxThreads];
    for (int64_t p = 0; p < parts; ++p) {
      queues[p] = new (memory.take<Prefetch>(1)) Prefetch;
      dots[p] = memory.take<float>(values);
      finer[p] = memory.take<float>(values);
    }
    const PlaneTokens rounded = round_tokens(isa, dtype, element_size, some, length, token_memory);
    parallel(parts, [&](int64_t part) {
      const Range range = part_of(rows, parts, part, kPlaneRows);
      const auto fetch = [&](int64_t r) {
        const int64_t count = at_most(range.end - r, kPlaneBlock);
        queues[part]->add(records.data + r * records.stride, count * records.stride);
      };
      fetch(range.begin);
      for (int64_t r = range.begin; r < range.end; r += kPlaneBlock) {
        const int64_t count = at_most(range.end - r, kPlaneBlock);
        const uint8_t* planes[kPlaneBlock];
        const uint8_t* residuals[kPlaneBlock];
        const uint8_t* scales[kPlaneBlock];
        for (int64_t i = 0; i < round_up(count, kPlaneRows); ++i) {
          planes[i] = records.data + (r + at_most(i, count - 1)) * records.stride;
          residuals[i] = planes[i] + base;
          scales[i] = residuals[i] + residual;
        }
        fetch(r + kPlaneBlock);
        const int64_t padded = round_up(count, kPlaneRows);
        isa.common.plane_dots(format.base, {planes, scales, padded, nullptr}, rounded, dots[part],
                              kPlaneBlock, *queues[part]);
        if (format.residual) {
          isa.common.plane_dots(format.residual, {residuals, scales, padded, nullptr}, rounded,
                                finer[part], kPlaneBlock, *queues[part]);
          const float factor = 1.0f / float(1 << format.residual);
          for (int64_t k = 0; k < values; ++k) dots[part][k] += factor * finer[part][k];
        }
        for (int64_t t = 0; t < tokens; ++t)
          kernels.store(dots[part] + t * kPlaneBlock, count,
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

}  // namespace sparse_ffn
