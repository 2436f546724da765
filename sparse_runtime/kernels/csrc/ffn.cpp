#include "ffn.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <new>

#include <torch/csrc/stable/c/shim.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace sparse_ffn {

namespace {

constexpr int64_t kMaxThreads = 256;
// Weights worth a thread of their own. Waking one costs 1–3 µs, the time to read about 40 KB.
constexpr int64_t kBytesPerThread = 32 * 1024;
// Gate and up values of a slice that are held before down is read: small enough for the L2 cache.
constexpr int64_t kHeldValues = 32 * 1024;
// Partial sums up to this many floats are added up by the thread that finishes last; it is cheaper
// than another parallel region.
constexpr int64_t kLastThreadSums = 64 * 1024;
// Added to the distance between tokens: hidden sizes are multiples of 4 KB, and without it the same
// columns of all tokens and rows would fall into one set of the L1 cache.
constexpr int64_t kSkewBytes = 128;
// Neurons per step of verification. Parts take steps in turns, so that a part's share of confirmed
// neurons is that of the others, whatever their order.
constexpr int64_t kLookRows = 128;
// Rows of a linear layer per pass.
constexpr int64_t kLinearRows = 1024;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

int64_t at_least(int64_t value, int64_t bound) { return value < bound ? bound : value; }
int64_t at_most(int64_t value, int64_t bound) { return value > bound ? bound : value; }

// Under the address sanitizer, what was not taken from scratch memory may not be touched.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kRedZone = 128;
void forbid(void* p, int64_t bytes) { __asan_poison_memory_region(p, size_t(bytes)); }
void allow(void* p, int64_t bytes) { __asan_unpoison_memory_region(p, size_t(bytes)); }
#else
constexpr int64_t kRedZone = 0;
void forbid(void*, int64_t) {}
void allow(void*, int64_t) {}
#endif

// Scratch memory of a calling thread, kept between calls; it grows and never shrinks.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(base_); }

  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes > capacity_) {
      free(base_);
      capacity_ = 0;
      base_ = static_cast<char*>(aligned_alloc(4096, size_t(round_up(bytes, 4096))));
      if (!base_) throw std::bad_alloc();
      capacity_ = round_up(bytes, 4096);
    }
    forbid(base_, capacity_);
  }

  template <class T>
  T* take(int64_t count) {
    T* const result = reinterpret_cast<T*>(base_ + used_);
    allow(result, count * int64_t(sizeof(T)));
    used_ += size<T>(count);
    return result;
  }

  // What take uses: whole pairs of cache lines, so that threads do not share any.
  template <class T>
  static int64_t size(int64_t count) {
    return round_up(count * int64_t(sizeof(T)), 128) + kRedZone;
  }

 private:
  char* base_ = nullptr;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
};

// For one pass, so its size is bounded by kMaxTokens tokens.
Scratch& scratch() {
  static thread_local Scratch instance;
  return instance;
}

int64_t num_threads_for(int64_t bytes) {
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != 0) threads = 1;
  const int64_t useful = at_least(bytes / kBytesPerThread, 1);
  return at_most(at_most(useful, int64_t(threads)), kMaxThreads);
}

// work(i) for i < parts on torch's threads. Nothing here assumes that they run at the same time:
// inside someone else's parallel region one thread does them all.
template <class Work>
void parallel(int64_t parts, const Work& work) {
  if (parts == 1) {
    work(0);
    return;
  }
  const auto run = [](int64_t begin, int64_t end, void* context) {
    const Work& work = *static_cast<const Work*>(context);
    for (int64_t i = begin; i < end; ++i) work(i);
  };
  if (torch_parallel_for(0, parts, 1, run, const_cast<Work*>(&work)) != 0) {
    // It fails only before it runs anything.
    for (int64_t i = 0; i < parts; ++i) work(i);
  }
}

// Part i of `parts` of [0, count), in multiples of `unit`.
struct Range {
  int64_t begin, end;
};
Range part_of(int64_t count, int64_t parts, int64_t i, int64_t unit) {
  const int64_t units = (count + unit - 1) / unit;
  return {at_most(units * i / parts * unit, count), at_most(units * (i + 1) / parts * unit, count)};
}

int64_t packed_stride(const Kernels& kernels, int64_t length) {
  return kernels.packed_size(length) + kSkewBytes;
}

PackedTokens pack(const Kernels& kernels, Tokens x, int64_t element_size, int64_t length,
                  char* buffer) {
  const int64_t stride = packed_stride(kernels, length);
  for (int64_t t = 0; t < x.count; ++t)
    kernels.pack_token(static_cast<const char*>(x.data) + t * x.stride * element_size, length,
                       buffer + t * stride);
  return {buffer, stride, x.count};
}

// The clusters of a few tokens, each once.
struct Groups {
  int64_t count = 0;
  int64_t cluster[kMaxTokens];
  uint64_t tokens[kMaxTokens];
};

void group_tokens(const int64_t* ids, int64_t num_tokens, Groups& groups) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    int64_t g = 0;
    while (g < groups.count && groups.cluster[g] != ids[t]) ++g;
    if (g == groups.count) {
      groups.cluster[g] = ids[t];
      groups.tokens[g] = 0;
      ++groups.count;
    }
    groups.tokens[g] |= uint64_t(1) << t;
  }
}

// One pass: up to kMaxTokens tokens over the union of their sets, so that a row is read once
// however many tokens want it.
struct Pass {
  const Ffn* ffn;
  const Isa* isa;
  const Kernels* kernels;
  Clusters clusters;
  const Compensation* compensation;
  Groups groups;
  PackedTokens x;
  LookTokens low_bit;   // with verification
  const int32_t* rows;  // null: all neurons; with verification, of both bands
  int64_t num_rows;
  int64_t num_parts;
  int64_t held_rows;    // rows whose gate and up values are held
  int64_t row_stride;   // floats between tokens in one part's gate and up values
  int64_t sum_stride;   // floats between tokens in the sums
  float* gate;          // [parts, tokens, row_stride]
  float* up;
  float* sums;          // [parts, tokens, sum_stride]
  uint64_t* masks;      // [parts, held_rows], used where tokens have different neurons
  int32_t* kept;        // [parts, held_rows], with verification: what is computed
  int64_t* counts;      // [parts, 2], with verification: as Clusters::row_counts
};

// The tokens whose cluster has neuron i in `sets`.
uint64_t wanting(const Groups& groups, const uint8_t* sets, int64_t stride, int64_t i) {
  uint64_t tokens = 0;
  for (int64_t g = 0; g < groups.count; ++g)
    if (sets[groups.cluster[g] * stride + (i >> 3)] >> (i & 7) & 1) tokens |= groups.tokens[g];
  return tokens;
}

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

// A part's slice of the rows.
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

// A part's share of both bands: first a look, then what is sure or was confirmed. No thread waits
// for another.
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

int64_t look_stride(int64_t groups) { return round_up(groups, 16); }

// The tokens' low-bit form, for the whole call to look with.
LookTokens round_tokens(const Pass& pass, Tokens x, float* wide, int8_t* codes, float* scales,
                        float* offsets) {
  const int64_t groups = (pass.ffn->hidden_size + kLookGroup - 1) / kLookGroup;
  const int64_t stride = look_stride(groups), size = pass.ffn->element_size;
  for (int64_t t = 0; t < x.count; ++t) {
    pass.kernels->widen(static_cast<const char*>(x.data) + t * x.stride * size,
                        pass.ffn->hidden_size, wide);
    pass.isa->common.round_token(wide, pass.ffn->hidden_size, codes + t * groups * kLookGroup,
                                 scales + t * stride, offsets + t * stride);
    for (int64_t g = groups; g < stride; ++g) scales[t * stride + g] = offsets[t * stride + g] = 0;
  }
  return {codes, scales, offsets, groups * kLookGroup, stride, x.count};
}

int64_t count_bits(const uint8_t* bitmap, int64_t num_bits) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_bits / 8; ++i) count += __builtin_popcount(bitmap[i]);
  if (num_bits % 8) count += __builtin_popcount(bitmap[num_bits / 8] & ((1 << num_bits % 8) - 1));
  return count;
}

// Joins the bitmaps of a pass's clusters into one.
void join(const Groups& groups, const uint8_t* sets, int64_t stride, int64_t bytes,
          uint8_t* joined) {
  for (int64_t g = 0; g < groups.count; ++g) {
    const uint8_t* const set = sets + groups.cluster[g] * stride;
    for (int64_t i = 0; i < bytes; ++i) joined[i] |= set[i];
  }
}

void run_pass(const Ffn& ffn, Tokens x, Clusters clusters, const int64_t* ids,
              const Compensation& compensation, char* y) {
  const Isa& isa = current_isa();
  const Kernels& kernels = isa.by_dtype[ffn.dtype];
  const Verification& band = clusters.verification;
  Pass pass;
  pass.ffn = &ffn;
  pass.isa = &isa;
  pass.kernels = &kernels;
  pass.clusters = clusters;
  pass.compensation = &compensation;
  if (clusters.sets) group_tokens(ids, x.count, pass.groups);

  const int64_t neurons = ffn.num_neurons, tokens = x.count;
  const int64_t set_bytes = (neurons + 7) / 8;
  const int64_t packed_size = packed_stride(kernels, ffn.hidden_size);
  const int64_t most_parts = num_threads_for(3 * neurons * ffn.hidden_size * ffn.element_size);
  pass.sum_stride =
      round_up(ffn.hidden_size, kernels.block) + kSkewBytes / int64_t(sizeof(float));
  pass.held_rows =
      round_up(at_most(at_least(kHeldValues / tokens, kLookRows), neurons + kLookRows), 8);
  pass.row_stride = pass.held_rows + kSkewBytes / int64_t(sizeof(float));

  const int64_t values = most_parts * tokens * pass.row_stride;
  const int64_t sums = most_parts * tokens * pass.sum_stride;
  const int64_t groups = (ffn.hidden_size + kLookGroup - 1) / kLookGroup;
  const int64_t verified = band.maybe_sets ? 1 : 0;
  const int64_t looks = verified * tokens * groups;
  const int64_t look_scales = verified * tokens * look_stride(groups);
  const int64_t wide = verified * ffn.hidden_size;
  const int64_t kept = verified * most_parts * pass.held_rows;
  Scratch& memory = scratch();
  memory.reserve(Scratch::size<char>(tokens * packed_size) + Scratch::size<uint8_t>(set_bytes) +
                 Scratch::size<int32_t>(neurons + 16) + 2 * Scratch::size<float>(values) +
                 Scratch::size<float>(sums) +
                 Scratch::size<uint64_t>(most_parts * pass.held_rows) +
                 Scratch::size<int32_t>(kept) + Scratch::size<int64_t>(2 * most_parts) +
                 Scratch::size<float>(wide) + Scratch::size<int8_t>(looks * kLookGroup) +
                 2 * Scratch::size<float>(look_scales));
  char* const packed = memory.take<char>(tokens * packed_size);
  uint8_t* const joined = memory.take<uint8_t>(set_bytes);
  int32_t* const rows = memory.take<int32_t>(neurons + 16);
  pass.gate = memory.take<float>(values);
  pass.up = memory.take<float>(values);
  pass.sums = memory.take<float>(sums);
  pass.masks = memory.take<uint64_t>(most_parts * pass.held_rows);
  pass.kept = memory.take<int32_t>(kept);
  pass.counts = memory.take<int64_t>(2 * most_parts);
  float* const widened = memory.take<float>(wide);
  int8_t* const codes = memory.take<int8_t>(looks * kLookGroup);
  float* const scales = memory.take<float>(look_scales);
  float* const offsets = memory.take<float>(look_scales);

  pass.x = pack(kernels, x, ffn.element_size, ffn.hidden_size, packed);
  pass.rows = nullptr;
  pass.num_rows = neurons;
  if (clusters.sets) {
    const uint8_t* set = clusters.sets + pass.groups.cluster[0] * clusters.stride;
    if (pass.groups.count > 1 || band.maybe_sets) {
      memset(joined, 0, size_t(set_bytes));
      join(pass.groups, clusters.sets, clusters.stride, set_bytes, joined);
      if (band.maybe_sets) join(pass.groups, band.maybe_sets, band.stride, set_bytes, joined);
      set = joined;
    }
    pass.num_rows = isa.common.decode(set, neurons, rows);
    pass.rows = rows;
  }
  if (band.maybe_sets) pass.low_bit = round_tokens(pass, x, widened, codes, scales, offsets);
  pass.num_parts = at_most(
      num_threads_for(3 * pass.num_rows * ffn.hidden_size * ffn.element_size), most_parts);

  const int64_t hidden = ffn.hidden_size, size = ffn.element_size;
  const auto finish = [&](int64_t token, int64_t begin, int64_t end) {
    const char* bias = nullptr;
    const Matrix& cluster_bias = compensation.cluster_bias;
    if (cluster_bias.data)
      bias = static_cast<const char*>(cluster_bias.data) + ids[token] * cluster_bias.stride * size;
    kernels.finish(pass.sums + token * pass.sum_stride, tokens * pass.sum_stride, pass.num_parts,
                   hidden, begin, end, bias, y + token * hidden * size);
  };
  const bool last_thread_sums =
      pass.num_parts == 1 || pass.num_parts * tokens * pass.sum_stride <= kLastThreadSums;
  std::atomic<int64_t> running{pass.num_parts};
  parallel(pass.num_parts, [&](int64_t part) {
    if (band.maybe_sets)
      verify_and_compute(pass, part);
    else
      compute_slice(pass, part);
    if (running.fetch_sub(1, std::memory_order_acq_rel) == 1 && last_thread_sums)
      for (int64_t t = 0; t < tokens; ++t) finish(t, 0, hidden);
  });
  if (clusters.row_counts) {
    for (int64_t p = 0; p < pass.num_parts && band.maybe_sets; ++p)
      for (int64_t i = 0; i < 2; ++i) clusters.row_counts[i] += pass.counts[2 * p + i];
    for (int64_t g = 0; g < pass.groups.count && !band.maybe_sets; ++g)
      clusters.row_counts[0] +=
          count_bits(clusters.sets + pass.groups.cluster[g] * clusters.stride, neurons) *
          __builtin_popcountll(pass.groups.tokens[g]);
  }
  if (last_thread_sums) return;
  // Several tokens: by token. Few: by columns as well.
  const int64_t columns = at_least((pass.num_parts + tokens - 1) / tokens, 1);
  parallel(pass.num_parts, [&](int64_t part) {
    const Range range = part_of(tokens * columns, pass.num_parts, part, 1);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Range span = part_of(hidden, columns, i % columns, kernels.block);
      finish(i / columns, span.begin, span.end);
    }
  });
}

template <class Body>
void in_passes(Tokens x, int64_t element_size, const Body& body) {
  for (int64_t first = 0; first < x.count; first += kMaxTokens) {
    const Tokens some = {static_cast<const char*>(x.data) + first * x.stride * element_size,
                         x.stride, at_most(x.count - first, kMaxTokens)};
    body(some, first);
  }
}

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

void run_ffn(const Ffn& ffn, Tokens x, Clusters clusters, const int64_t* ids,
             const Compensation& compensation, void* y) {
  in_passes(x, ffn.element_size, [&](Tokens some, int64_t first) {
    run_pass(ffn, some, clusters, ids ? ids + first : nullptr, compensation,
             static_cast<char*>(y) + first * ffn.hidden_size * ffn.element_size);
  });
}

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
