// The sparse FFN: memory and rows of a pass, its parts on threads, and the sum of what they computed.
#include "ffn.h"

#include <string.h>

#include <atomic>

#include "parallel.h"
#include "pass.h"
#include "plane_tokens.h"
#include "tokens.h"

namespace sparse_ffn {

namespace {

// Gate and up values of a slice that are held before down is read: small enough for the L2 cache.
constexpr int64_t kHeldValues = 32 * 1024;
// Partial sums up to this many floats are added up by the thread that finishes last; it is cheaper
// than another parallel region.
constexpr int64_t kLastThreadSums = 64 * 1024;

int64_t set_bytes(const Ffn& ffn) { return (ffn.num_neurons + 7) / 8; }

int64_t threads_for_rows(const Ffn& ffn, int64_t rows) {
  return num_threads_for(3 * rows * ffn.hidden_size * ffn.element_size);
}

// Scratch memory that a pass fills before its parts run.
struct Inputs {
  char* packed;     // [tokens, packed_stride]
  uint8_t* joined;  // [ceil(I / 8)]
  int32_t* rows;    // [I + 16]
  TokenMemory tokens;  // with verification
};

// What a part looks with.
int64_t looker_size(int64_t tokens) {
  return Scratch::size<Prefetch>(1) + 6 * Scratch::size<float>(tokens * kStepRows) +
         Scratch::size<float>(2 * tokens * kStepRows);
}

void take_looker(Scratch& memory, int64_t tokens, PlanePart& looker) {
  looker.prefetch = new (memory.take<Prefetch>(1)) Prefetch;
  for (PlaneStep& step : looker.steps)
    for (float** array : {&step.gate, &step.up, &step.looks})
      *array = memory.take<float>(tokens * kStepRows);
  looker.dots = memory.take<float>(2 * tokens * kStepRows);
  looker.counts[0] = looker.counts[1] = 0;
}

// Takes the memory of a pass, for whatever rows it will have: all of them at most.
Inputs take_memory(Pass& pass, int64_t tokens, int64_t most_parts) {
  const Ffn& ffn = *pass.ffn;
  const int64_t neurons = ffn.num_neurons;
  pass.sum_stride =
      round_up(ffn.hidden_size, pass.kernels->block) + kSkewBytes / int64_t(sizeof(float));
  pass.held_rows =
      round_up(at_most(at_least(kHeldValues / tokens, kLeastHeldRows), neurons + kLeastHeldRows), 8);
  pass.row_stride = pass.held_rows + kSkewBytes / int64_t(sizeof(float));

  const int64_t packed = tokens * packed_stride(*pass.kernels, ffn.hidden_size);
  const int64_t values = most_parts * tokens * pass.row_stride;
  const int64_t sums = most_parts * tokens * pass.sum_stride;
  const int64_t masks = most_parts * pass.held_rows;
  const int64_t lookers = pass.clusters.verification.maybe_sets ? most_parts : 0;
  const int64_t kept = lookers * pass.held_rows;
  Scratch& memory = scratch();
  memory.reserve(Scratch::size<char>(packed) + Scratch::size<uint8_t>(set_bytes(ffn)) +
                 Scratch::size<int32_t>(neurons + 16) + 2 * Scratch::size<float>(values) +
                 Scratch::size<float>(sums) + Scratch::size<uint64_t>(masks) +
                 Scratch::size<int32_t>(kept) + Scratch::size<PlanePart>(lookers) +
                 lookers * looker_size(tokens) +
                 (lookers ? TokenMemory::size(tokens, ffn.hidden_size) : 0));
  Inputs inputs;
  inputs.packed = memory.take<char>(packed);
  inputs.joined = memory.take<uint8_t>(set_bytes(ffn));
  inputs.rows = memory.take<int32_t>(neurons + 16);
  pass.gate = memory.take<float>(values);
  pass.up = memory.take<float>(values);
  pass.sums = memory.take<float>(sums);
  pass.masks = memory.take<uint64_t>(masks);
  pass.kept = memory.take<int32_t>(kept);
  pass.lookers = memory.take<PlanePart>(lookers);
  for (int64_t p = 0; p < lookers; ++p) take_looker(memory, tokens, pass.lookers[p]);
  if (lookers) inputs.tokens.take(memory, tokens, ffn.hidden_size);
  return inputs;
}

// The neurons that any token wants, both bands together.
void list_rows(Pass& pass, const Inputs& inputs) {
  const Clusters& clusters = pass.clusters;
  const Verification& band = clusters.verification;
  pass.rows = nullptr;
  pass.num_rows = pass.ffn->num_neurons;
  if (!clusters.sets) return;
  const uint8_t* set = clusters.sets + pass.groups.cluster[0] * clusters.stride;
  if (pass.groups.count > 1 || band.maybe_sets) {
    const int64_t bytes = set_bytes(*pass.ffn);
    memset(inputs.joined, 0, size_t(bytes));
    join(pass.groups, clusters.sets, clusters.stride, bytes, inputs.joined);
    if (band.maybe_sets) join(pass.groups, band.maybe_sets, band.stride, bytes, inputs.joined);
    set = inputs.joined;
  }
  pass.num_rows = pass.isa->common.decode(set, pass.ffn->num_neurons, inputs.rows);
  pass.rows = inputs.rows;
}

// What the parts look with, and at.
void prepare_looks(Pass& pass, Tokens x, const int64_t* ids, const TokenMemory& memory) {
  const Ffn& ffn = *pass.ffn;
  const Verification& band = pass.clusters.verification;
  const Stream none = {nullptr, 0};
  pass.planes = {ffn.dtype,   ffn.element_size, ffn.hidden_size, ffn.num_neurons, kLookFormat,
                 band.look,   none,             none,            ffn.inputs};
  pass.look = {};
  pass.look.ffn = &pass.planes;
  pass.look.isa = pass.isa;
  pass.look.stages.factors = band.factors;
  pass.look.stages.cluster_weights = band.cluster_weights;
  pass.look.ids = ids;
  pass.look.x = round_tokens(*pass.isa, ffn.dtype, ffn.element_size, x, ffn.hidden_size, memory);
  pass.look.step_rows =
      at_least(at_most(kStepBytes / at_least(look_bytes(ffn.inputs, ffn.hidden_size), 1), kStepRows), kPlaneRows);
}

// Runs the parts. Their sums, together with the compensation, become rows of y.
void run_parts(const Pass& pass, const int64_t* ids, char* y) {
  const int64_t hidden = pass.ffn->hidden_size, size = pass.ffn->element_size;
  const int64_t tokens = pass.x.count, parts = pass.num_parts;
  const auto finish = [&](int64_t token, int64_t begin, int64_t end) {
    const char* bias = nullptr;
    const Matrix& cluster_bias = pass.compensation->cluster_bias;
    if (cluster_bias.data)
      bias = static_cast<const char*>(cluster_bias.data) + ids[token] * cluster_bias.stride * size;
    pass.kernels->finish(pass.sums + token * pass.sum_stride, tokens * pass.sum_stride, parts,
                         hidden, begin, end, bias, y + token * hidden * size);
  };
  const bool last_thread_sums = parts == 1 || parts * tokens * pass.sum_stride <= kLastThreadSums;
  std::atomic<int64_t> running{parts};
  parallel(parts, [&](int64_t part) {
    if (pass.clusters.verification.maybe_sets)
      verify_and_compute(pass, part);
    else
      compute_slice(pass, part);
    if (running.fetch_sub(1, std::memory_order_acq_rel) == 1 && last_thread_sums)
      for (int64_t t = 0; t < tokens; ++t) finish(t, 0, hidden);
  });
  if (last_thread_sums) return;
  // Several tokens: by token. Few: by columns as well.
  const int64_t columns = at_least((parts + tokens - 1) / tokens, 1);
  parallel(parts, [&](int64_t part) {
    const Range range = part_of(tokens * columns, parts, part, 1);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Range span = part_of(hidden, columns, i % columns, pass.kernels->block);
      finish(i / columns, span.begin, span.end);
    }
  });
}

int64_t count_bits(const uint8_t* bitmap, int64_t num_bits) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_bits / 8; ++i) count += __builtin_popcount(bitmap[i]);
  if (num_bits % 8) count += __builtin_popcount(bitmap[num_bits / 8] & ((1 << num_bits % 8) - 1));
  return count;
}

void count_rows(const Pass& pass) {
  const Clusters& clusters = pass.clusters;
  int64_t computed = 0, looked = 0;
  if (clusters.verification.maybe_sets) {
    for (int64_t p = 0; p < pass.num_parts; ++p) {
      computed += pass.lookers[p].counts[0];
      looked += pass.lookers[p].counts[1];
    }
  } else {
    for (int64_t g = 0; g < pass.groups.count; ++g)
      computed += count_bits(clusters.sets + pass.groups.cluster[g] * clusters.stride,
                             pass.ffn->num_neurons) *
                  __builtin_popcountll(pass.groups.tokens[g]);
  }
  add_count(clusters.row_counts, computed);
  add_count(clusters.row_counts + 1, looked);
}

void run_pass(const Ffn& ffn, Tokens x, const Clusters& clusters, const int64_t* ids,
              const Compensation& compensation, char* y) {
  const Isa& isa = current_isa();
  Pass pass;
  pass.ffn = &ffn;
  pass.isa = &isa;
  pass.kernels = &isa.by_dtype[ffn.dtype];
  pass.clusters = clusters;
  pass.compensation = &compensation;
  if (clusters.sets) group_tokens(ids, x.count, pass.groups);

  const int64_t most_parts = threads_for_rows(ffn, ffn.num_neurons);
  const Inputs inputs = take_memory(pass, x.count, most_parts);
  pass.x = pack(*pass.kernels, x, ffn.element_size, ffn.hidden_size, inputs.packed);
  list_rows(pass, inputs);
  if (clusters.verification.maybe_sets) prepare_looks(pass, x, ids, inputs.tokens);
  pass.num_parts = at_most(threads_for_rows(ffn, pass.num_rows), most_parts);
  run_parts(pass, ids, y);
  if (clusters.row_counts) count_rows(pass);
}

}  // namespace

void run_ffn(const Ffn& ffn, Tokens x, Clusters clusters, const int64_t* ids,
             const Compensation& compensation, void* y) {
  in_passes(x, ffn.element_size, [&](Tokens some, int64_t first) {
    run_pass(ffn, some, clusters, ids ? ids + first : nullptr, compensation,
             static_cast<char*>(y) + first * ffn.hidden_size * ffn.element_size);
  });
}

}  // namespace sparse_ffn
