#include "pass.h"

#include <math.h>
#include <string.h>

#include "parallel.h"

namespace sparse_ffn {

namespace {

// What one part of a pass works with.
struct Part {
  float* gate;
  float* up;
  float* sums;
  uint64_t* masks;
  int32_t* kept;
};

Part part_of_pass(const Pass& pass, int64_t part) {
  const int64_t tokens = pass.x.count;
  return {pass.gate + part * tokens * pass.row_stride, pass.up + part * tokens * pass.row_stride,
          pass.sums + part * tokens * pass.sum_stride, pass.masks + part * pass.held_rows,
          pass.kept + part * pass.held_rows};
}

// Up to held_rows rows: gate and up, activation, down, into the part's own sums.
void compute_rows(const Pass& pass, const Part& own, const Rows& rows) {
  const Ffn& ffn = *pass.ffn;
  pass.kernels->gate_up(ffn.w_gate, ffn.w_up, ffn.hidden_size, rows, pass.x, own.gate, own.up,
                        pass.row_stride);
  for (int64_t t = 0; t < pass.x.count; ++t) {
    float* const gate = own.gate + t * pass.row_stride;
    float* const up = own.up + t * pass.row_stride;
    add_biases(ffn.inputs, rows.index, rows.first, rows.count, gate, up);
    activate(pass.isa->common, ffn.inputs, gate, up, rows.count);
    // Zeros of gate and up stay zeros only where there is nothing to add.
    if (rows.tokens && (ffn.inputs.gate_bias || ffn.inputs.matrices == 1))
      for (int64_t r = 0; r < rows.count; ++r)
        if (!(rows.tokens[r] >> t & 1)) gate[r] = 0.0f;
  }
  pass.kernels->down(ffn.w_down_t, ffn.hidden_size, rows, pass.x.count, own.gate, pass.row_stride,
                     own.sums, pass.sum_stride);
}

// A part's share of the linear correction, which is to its rows what the FFN is to neurons, without
// gate and activation. The sums begin with it.
void correct(const Pass& pass, const Part& own, int64_t part) {
  const Compensation& correction = *pass.compensation;
  memset(own.sums, 0, size_t(pass.x.count * pass.sum_stride) * sizeof(float));
  const Range range = part_of(correction.rank, pass.num_parts, part, 1);
  for (int64_t first = range.begin; first < range.end; first += pass.held_rows) {
    const Rows rows = {nullptr, first, at_most(range.end - first, pass.held_rows), nullptr};
    pass.kernels->linear(correction.down, pass.ffn->hidden_size, first, rows.count, pass.x,
                         own.gate, pass.row_stride);
    pass.kernels->down(correction.up, pass.ffn->hidden_size, rows, pass.x.count, own.gate,
                       pass.row_stride, own.sums, pass.sum_stride);
  }
}

}  // namespace

void compute_slice(const Pass& pass, int64_t part) {
  const Part own = part_of_pass(pass, part);
  correct(pass, own, part);
  const Range range = part_of(pass.num_rows, pass.num_parts, part, 8);
  for (int64_t first = range.begin; first < range.end; first += pass.held_rows) {
    Rows rows;
    rows.first = first;
    rows.count = at_most(range.end - first, pass.held_rows);
    rows.index = pass.rows ? pass.rows + first : nullptr;
    rows.tokens = nullptr;
    if (pass.groups.count > 1) {
      for (int64_t r = 0; r < rows.count; ++r)
        own.masks[r] =
            wanting(pass.groups, pass.clusters.sets, pass.clusters.stride, rows.index[r]);
      rows.tokens = own.masks;
    }
    compute_rows(pass, own, rows);
  }
}

namespace {

// The neurons that a part will compute, and the tokens that want them.
struct Kept {
  int32_t* index;
  uint64_t* tokens;
  int64_t count;
  int64_t pairs;  // of neurons and tokens, so far

  void add(int64_t neuron, uint64_t wanted) {
    index[count] = int32_t(neuron);
    tokens[count++] = wanted;
    pairs += __builtin_popcountll(wanted);
  }
};

// Sorts the rows of a step from `first` on: what some token leaves to a look goes into the step, and is
// fetched, with the tokens that compute it anyway as `counted`; the others are kept.
void choose(const Pass& pass, int64_t first, PlanePart& looker, PlaneStep& step, Kept& kept) {
  const Verification& band = pass.clusters.verification;
  const int64_t end = at_most(first + pass.look.step_rows, pass.num_rows);
  step.count = 0;
  for (int64_t r = first; r < end; ++r) {
    const int64_t i = pass.rows[r];
    const uint64_t sure = wanting(pass.groups, pass.clusters.sets, pass.clusters.stride, i);
    const uint64_t maybe = wanting(pass.groups, band.maybe_sets, band.stride, i) & ~sure;
    if (!maybe) {
      kept.add(i, sure);
      continue;
    }
    step.index[step.count] = int32_t(i);
    step.wanted[step.count] = maybe;
    step.counted[step.count] = sure;
    ++step.count;
    looker.prefetch->add(band.look.data + i * band.look.stride,
                         look_bytes(pass.ffn->inputs, pass.ffn->hidden_size));
  }
}

// Looks at a step's neurons and keeps those that a token wants.
void verify(const Pass& pass, PlanePart& looker, PlaneStep& step, Kept& kept) {
  look(pass.look, looker, step);
  for (int64_t r = 0; r < step.count; ++r) {
    const float factor = pass.look.stages.factors[step.index[r]];
    for (uint64_t left = step.wanted[r]; left; left &= left - 1) {
      const int64_t t = __builtin_ctzll(left);
      // Not below the bound, so that NaN is computed.
      if (!(fabsf(step.looks[t * kStepRows + r]) * (factor * weight_of(pass.look, t)) <= 1.0f))
        step.counted[r] |= uint64_t(1) << t;
    }
    looker.counts[1] += __builtin_popcountll(step.wanted[r]);
    if (step.counted[r]) kept.add(step.index[r], step.counted[r]);
  }
}

}  // namespace

void verify_and_compute(const Pass& pass, int64_t part) {
  const Part own = part_of_pass(pass, part);
  PlanePart& looker = pass.lookers[part];
  correct(pass, own, part);
  Kept kept = {own.kept, own.masks, 0, 0};
  const auto compute_kept = [&] {
    const Rows rows = {kept.index, 0, kept.count, pass.x.count > 1 ? kept.tokens : nullptr};
    if (kept.count > 0) compute_rows(pass, own, rows);
    kept.count = 0;
  };
  // Parts take steps in turns, so that a part's share of confirmed neurons is that of the others,
  // whatever their order. The records of a step are fetched during the one before.
  const int64_t stride = pass.num_parts * pass.look.step_rows;
  PlaneStep* now = &looker.steps[0];
  PlaneStep* next = &looker.steps[1];
  choose(pass, part * pass.look.step_rows, looker, *now, kept);
  for (int64_t first = part * pass.look.step_rows; first < pass.num_rows; first += stride) {
    if (kept.count + kLeastHeldRows > pass.held_rows) compute_kept();
    choose(pass, first + stride, looker, *next, kept);
    if (now->count > 0) verify(pass, looker, *now, kept);
    PlaneStep* const free = now;
    now = next;
    next = free;
  }
  compute_kept();
  looker.counts[0] = kept.pairs;
}

}  // namespace sparse_ffn
