// The stages of a part's neurons: look, decide, refine, down.
#include "plane_pass.h"

#include <math.h>
#include <string.h>

#include "sizes.h"

namespace sparse_ffn {

namespace {

float ramp(float evidence, float width) {
  if (width == 0.0f) return 1.0f;
  const float share = (evidence - 1.0f) / width;
  return !(share < 1.0f) ? 1.0f : share;
}

void choose(const PlanePass& pass, int64_t first, PlaneStep& step) {
  step.count = at_most(pass.num_rows - first, pass.step_rows);
  if (step.count < 0) step.count = 0;
  const uint64_t all = pass.x.count >= 64 ? ~uint64_t(0) : (uint64_t(1) << pass.x.count) - 1;
  for (int64_t r = 0; r < step.count; ++r) {
    step.index[r] = pass.rows ? pass.rows[first + r] : int32_t(first + r);
    step.wanted[r] = pass.groups.count > 1 ? wanting(pass.groups, pass.clusters.sets,
                                                     pass.clusters.stride, step.index[r])
                                           : all;
  }
}

// Neurons' rows of gate and up, in turns, or those of gate alone.
struct Pairs {
  const uint8_t* base[2 * kStepRows];
  const uint8_t* residual[2 * kStepRows];
  const uint8_t* scales[2 * kStepRows];
  uint64_t tokens[2 * kStepRows];
  int64_t count = 0;

  void add(const PlaneFfn& ffn, int64_t neuron, uint64_t wanted) {
    const int64_t plane = plane_bytes(ffn.hidden_size, ffn.format.base);
    const int64_t finer = plane_bytes(ffn.hidden_size, ffn.format.residual);
    const int64_t scale = 2 * plane_groups(ffn.hidden_size);
    const uint8_t* const look = ffn.look.data + neuron * ffn.look.stride;
    const uint8_t* const refine = ffn.refine.data + neuron * ffn.refine.stride;
    const int64_t matrices = ffn.inputs.matrices;
    for (int64_t i = 0; i < matrices; ++i, ++count) {
      base[count] = look + i * plane;
      residual[count] = refine + i * finer;
      scales[count] = look + matrices * plane + i * scale;
      tokens[count] = wanted;
    }
  }
  PlaneRows rows(int64_t num_tokens) {
    for (; count % kPlaneRows; ++count) {
      base[count] = base[count - 1], residual[count] = residual[count - 1];
      scales[count] = scales[count - 1];
      tokens[count] = 0;
    }
    return {base, residual, scales, count, num_tokens > 1 ? tokens : nullptr};
  }
};

}  // namespace

// Where nothing is decided the look is by all bits, and nothing is left to refine.
void look(const PlanePass& pass, PlanePart& own, PlaneStep& step) {
  const PlaneFfn& ffn = *pass.ffn;
  const PlaneFormat planes = {ffn.format.base, pass.stages.factors ? 0 : ffn.format.residual};
  const int64_t tokens = pass.x.count, ld = 2 * kStepRows, matrices = ffn.inputs.matrices;
  Pairs pairs;
  for (int64_t r = 0; r < step.count; ++r) pairs.add(ffn, step.index[r], step.wanted[r]);
  pass.isa->common.plane_dots(planes, pairs.rows(tokens), pass.x, own.dots, ld, *own.prefetch);
  for (int64_t t = 0; t < tokens; ++t) {
    float* const looks = step.looks + t * kStepRows;
    float* const gate = step.gate + t * kStepRows;
    float* const up = step.up + t * kStepRows;
    for (int64_t r = 0; r < step.count; ++r) {
      gate[r] = own.dots[t * ld + matrices * r];
      up[r] = own.dots[t * ld + matrices * r + matrices - 1];
    }
    add_biases(ffn.inputs, step.index, 0, step.count, gate, up);
    memcpy(looks, gate, size_t(step.count) * sizeof(float));
    activate(pass.isa->common, ffn.inputs, looks, up, step.count);
  }
}

namespace {

void fetch_refine(const PlanePass& pass, PlanePart& own, int64_t neuron, int64_t first,
                  int64_t end) {
  const PlaneFfn& ffn = *pass.ffn;
  const int64_t plane = plane_bytes(ffn.hidden_size, ffn.format.residual);
  own.prefetch->add(ffn.refine.data + neuron * ffn.refine.stride + first * plane,
                    (end - first) * plane);
}

// Decides about a step's neurons, and has what they need fetched.
void decide(const PlanePass& pass, PlanePart& own, PlaneStep& step) {
  const PlaneFfn& ffn = *pass.ffn;
  const Stages& stages = pass.stages;
  const int64_t matrices = ffn.inputs.matrices;
  for (int64_t r = 0; r < step.count; ++r) {
    uint64_t counted = 0, refined = 0;
    if (!stages.factors) {
      counted = refined = step.wanted[r];
    } else {
      const float factor = stages.factors[step.index[r]];
      for (uint64_t left = step.wanted[r]; left; left &= left - 1) {
        const int64_t t = __builtin_ctzll(left);
        const float evidence = fabsf(step.looks[t * kStepRows + r]) * (factor * weight_of(pass, t));
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
    if (refined) fetch_refine(pass, own, step.index[r], stages.factors ? 0 : matrices, matrices + 1);
  }
  for (int64_t r = 0; r < step.count; ++r)
    if (step.counted[r])
      own.prefetch->add(ffn.count.data + step.index[r] * ffn.count.stride,
                        plane_bytes(ffn.hidden_size, ffn.format.base) +
                            2 * plane_groups(ffn.hidden_size));
}

// Activations of a step's refined neurons by all their bits: own.full, in the first of its two parts.
void refine(const PlanePass& pass, PlanePart& own, const PlaneStep& step) {
  const PlaneFfn& ffn = *pass.ffn;
  const int64_t tokens = pass.x.count, ld = 2 * kStepRows, matrices = ffn.inputs.matrices;
  Pairs pairs;
  int64_t place[kStepRows];
  for (int64_t r = 0; r < step.count; ++r) {
    if (!step.refined[r]) continue;
    place[pairs.count / matrices] = r;
    pairs.add(ffn, step.index[r], step.refined[r]);
  }
  const int64_t count = pairs.count / matrices;
  if (count == 0) return;
  pass.isa->common.plane_dots({0, ffn.format.residual}, pairs.rows(tokens), pass.x, own.dots, ld,
                              *own.prefetch);
  for (int64_t t = 0; t < tokens; ++t) {
    float* const gate = own.full + t * kStepRows;
    float* const up = own.full + (tokens + t) * kStepRows;
    memcpy(gate, step.gate + t * kStepRows, size_t(step.count) * sizeof(float));
    memcpy(up, step.up + t * kStepRows, size_t(step.count) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      if (!(step.refined[place[i]] >> t & 1)) continue;
      gate[place[i]] += own.dots[t * ld + matrices * i];
      if (matrices > 1) up[place[i]] += own.dots[t * ld + matrices * i + 1];
    }
    activate(pass.isa->common, ffn.inputs, gate, up, step.count);
  }
}

// Neurons' rows of down, with their weights.
struct Weights {
  const uint8_t* base[kStepRows];
  const uint8_t* residual[kStepRows];
  const uint8_t* scales[kStepRows];
  float h[kStepRows];
  int64_t count = 0;

  void add(const PlaneFfn& ffn, int64_t neuron, float weight) {
    const uint8_t* const record = ffn.count.data + neuron * ffn.count.stride;
    base[count] = record;
    residual[count] = ffn.refine.data + neuron * ffn.refine.stride +
                      ffn.inputs.matrices * plane_bytes(ffn.hidden_size, ffn.format.residual);
    scales[count] = record + plane_bytes(ffn.hidden_size, ffn.format.base);
    h[count++] = weight;
  }
  void run(const PlanePass& pass, PlanePart& own, const PlaneFormat& planes, float* sums) {
    if (count == 0) return;
    for (; count % 4; ++count) {
      base[count] = base[count - 1], residual[count] = residual[count - 1];
      scales[count] = scales[count - 1];
      h[count] = 0.0f;
    }
    pass.isa->common.plane_down(planes, {base, residual, scales, h, count},
                                plane_groups(pass.ffn->hidden_size), own.down, sums, *own.prefetch);
  }
};

void add_down(const PlanePass& pass, PlanePart& own, const PlaneStep& step) {
  const PlaneFfn& ffn = *pass.ffn;
  const Stages& stages = pass.stages;
  for (int64_t t = 0; t < pass.x.count; ++t) {
    Weights coarse, fine, whole;  // by base planes, by residual planes, by both
    for (int64_t r = 0; r < step.count; ++r) {
      if (!(step.counted[r] >> t & 1)) continue;
      const int64_t at = t * kStepRows + r;
      const bool is_refined = ffn.format.residual && (step.refined[r] >> t & 1);
      float h = step.looks[at], finer = is_refined ? 1.0f : 0.0f;
      if (stages.factors) {
        const float evidence = step.evidence[at];
        if (is_refined) finer = ramp(evidence / stages.tau, stages.width);
        if (is_refined) h = finer == 1.0f ? own.full[at] : h + finer * (own.full[at] - h);
        h *= ramp(evidence, stages.width);
      }
      (finer == 1.0f ? whole : coarse).add(ffn, step.index[r], h);
      if (finer > 0.0f && finer < 1.0f) fine.add(ffn, step.index[r], h * finer);
    }
    float* const sums = own.sums + t * pass.sum_stride;
    coarse.run(pass, own, {ffn.format.base, 0}, sums);
    fine.run(pass, own, {0, ffn.format.residual}, sums);
    whole.run(pass, own, ffn.format, sums);
  }
}

}  // namespace

void compute_plane_part(const PlanePass& pass, PlanePart& own, int64_t part) {
  const PlaneFfn& ffn = *pass.ffn;
  memset(own.sums, 0, size_t(pass.x.count * pass.sum_stride) * sizeof(float));
  const int64_t matrices = ffn.inputs.matrices;
  const int64_t record = matrices * (plane_bytes(ffn.hidden_size, ffn.format.base) +
                                     2 * plane_groups(ffn.hidden_size));
  const auto fetch = [&](const PlaneStep& step) {
    for (int64_t r = 0; r < step.count; ++r) {
      own.prefetch->add(ffn.look.data + step.index[r] * ffn.look.stride, record);
      if (!pass.stages.factors) fetch_refine(pass, own, step.index[r], 0, matrices);
    }
  };
  // Parts take steps in turns, so that all have alike shares of what is counted.
  const int64_t stride = pass.num_parts * pass.step_rows;
  PlaneStep* now = &own.steps[0];
  PlaneStep* before = &own.steps[1];
  before->count = 0;
  choose(pass, part * pass.step_rows, *now);
  fetch(*now);
  PlaneStep next;
  for (int64_t first = part * pass.step_rows; now->count > 0 || before->count > 0; first += stride) {
    choose(pass, first + stride, next);
    fetch(next);
    if (now->count > 0) look(pass, own, *now);
    if (before->count > 0) {
      if (ffn.format.residual && pass.stages.factors) refine(pass, own, *before);
      add_down(pass, own, *before);
    }
    if (now->count > 0) decide(pass, own, *now);
    PlaneStep* const free = before;
    before = now;
    now = free;
    now->count = next.count;
    memcpy(now->index, next.index, sizeof(next.index));
    memcpy(now->wanted, next.wanted, sizeof(next.wanted));
  }
}

}  // namespace sparse_ffn
