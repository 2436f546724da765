#include "pass.h"

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
  for (int64_t t = 0; t < pass.x.count; ++t)
    pass.isa->common.activate(ffn.activation, own.gate + t * pass.row_stride,
                              own.up + t * pass.row_stride, rows.count);
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

// The neurons a step of verification looks at.
struct Step {
  int64_t count = 0;
  int32_t index[kLookRows];
  uint64_t maybe[kLookRows];  // tokens whose cluster leaves the neuron to a look
  uint64_t sure[kLookRows];   // tokens that compute it anyway
};

// Looks at a step's neurons and appends those that a token wants; returns the new number of kept.
int64_t verify(const Pass& pass, const Part& own, const Step& step, int64_t num_kept,
               int64_t* counts) {
  const Verification& band = pass.clusters.verification;
  const int64_t tokens = pass.x.count, ld = pass.row_stride;
  const Rows rows = {step.index, 0, step.count, tokens > 1 ? step.maybe : nullptr};
  // The values that gate and up will hold are not there yet.
  pass.isa->common.look({band.records, band.record_stride, (pass.ffn->hidden_size + 63) / 64}, rows,
                        pass.low_bit, own.gate, own.up, ld);
  for (int64_t t = 0; t < tokens; ++t)
    pass.isa->common.activate(pass.ffn->activation, own.gate + t * ld, own.up + t * ld, step.count);
  for (int64_t r = 0; r < step.count; ++r) {
    const float factor = band.factors[step.index[r]];
    uint64_t wanted = step.sure[r];
    for (uint64_t left = step.maybe[r]; left; left &= left - 1) {
      const int64_t t = __builtin_ctzll(left);
      const float h = own.gate[t * ld + r];
      // Not below the bound, so that NaN is computed.
      if (!((h < 0 ? -h : h) * factor <= 1.0f)) wanted |= uint64_t(1) << t;
    }
    counts[1] += __builtin_popcountll(step.maybe[r]);
    if (!wanted) continue;
    counts[0] += __builtin_popcountll(wanted);
    own.kept[num_kept] = step.index[r];
    own.masks[num_kept] = wanted;
    ++num_kept;
  }
  return num_kept;
}

}  // namespace

void verify_and_compute(const Pass& pass, int64_t part) {
  const Part own = part_of_pass(pass, part);
  const Verification& band = pass.clusters.verification;
  correct(pass, own, part);
  int64_t* const counts = pass.counts + 2 * part;
  counts[0] = counts[1] = 0;
  int64_t num_kept = 0;
  const auto compute_kept = [&] {
    const Rows rows = {own.kept, 0, num_kept, pass.x.count > 1 ? own.masks : nullptr};
    if (num_kept > 0) compute_rows(pass, own, rows);
    num_kept = 0;
  };
  Step step;
  for (int64_t first = part * kLookRows; first < pass.num_rows;
       first += pass.num_parts * kLookRows) {
    if (num_kept + kLookRows > pass.held_rows) compute_kept();
    const int64_t end = at_most(first + kLookRows, pass.num_rows);
    step.count = 0;
    for (int64_t r = first; r < end; ++r) {
      const int64_t i = pass.rows[r];
      const uint64_t sure = wanting(pass.groups, pass.clusters.sets, pass.clusters.stride, i);
      const uint64_t maybe = wanting(pass.groups, band.maybe_sets, band.stride, i) & ~sure;
      if (maybe) {
        step.index[step.count] = int32_t(i);
        step.maybe[step.count] = maybe;
        step.sure[step.count] = sure;
        ++step.count;
      } else {
        own.kept[num_kept] = int32_t(i);
        own.masks[num_kept] = sure;
        counts[0] += __builtin_popcountll(sure);
        ++num_kept;
      }
    }
    if (step.count > 0) num_kept = verify(pass, own, step, num_kept, counts);
  }
  compute_kept();
}

}  // namespace sparse_ffn
