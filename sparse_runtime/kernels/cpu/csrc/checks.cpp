#include "checks.h"

#include "pass.h"
#include "sizes.h"

namespace sparse_ffn {

namespace {

Activation activation_named(const std::string& name) {
  if (name == "silu") return kSilu;
  if (name == "gelu") return kGelu;
  if (name == "gelu_tanh") return kGeluTanh;
  if (name == "relu") return kRelu;
  if (name == "relu2") return kRelu2;
  fail("activation is '" + name + "'; expected one of silu, gelu, gelu_tanh, relu, relu2");
}

// Rows are numbered with 32 bits, and no size may make a product of two overflow.
constexpr int64_t kLargest = int64_t(1) << 30;

}  // namespace

Inputs BiasArguments::inputs(const StringArgument& activation, int64_t matrices, int64_t neurons) {
  Inputs inputs = {matrices, nullptr, nullptr, activation_named(activation.get()), 1.0f};
  if (gate.given()) inputs.gate_bias = floats_of(gate, neurons, "I");
  if (up.given() && matrices == 1) fail("up_bias without up, which alone it is for");
  if (up.given()) inputs.up_bias = floats_of(up, neurons, "I");
  return inputs;
}

void bias_into(Compensation& compensation, const Argument& x, Argument& cluster_bias,
               int64_t clusters) {
  if (!cluster_bias.given()) return;
  cluster_bias.inspect(2);
  cluster_bias.expect_dtype(x.dtype(), "of x");
  cluster_bias.expect_size(0, clusters, "K");
  cluster_bias.expect_size(1, x.size(1), "H");
  cluster_bias.expect_rows();
  compensation.cluster_bias = cluster_bias.matrix();
}

const void* bias_of(const Argument& x, Argument& bias, int64_t size, const char* letter) {
  if (!bias.given()) return nullptr;
  bias.inspect(1);
  bias.expect_dtype(x.dtype(), "of x");
  bias.expect_size(0, size, letter);
  bias.expect_contiguous();
  return bias.data();
}

const float* floats_of(Argument& values, int64_t size, const char* letter) {
  values.inspect(1);
  values.expect_dtype(aoti_torch_dtype_float32(), "float32");
  values.expect_size(0, size, letter);
  values.expect_contiguous();
  return static_cast<const float*>(values.data());
}

Stream stream_of(Argument& records, const char* name, int64_t rows, int64_t bytes) {
  records.inspect(2);
  records.expect_dtype(aoti_torch_dtype_uint8(), "uint8");
  if (rows >= 0) records.expect_size(0, rows, "I");
  records.expect_size(1, bytes, "the bytes of a record");
  records.expect_rows();
  const int64_t stride = records.size(0) > 1 ? records.stride(0) : bytes;
  if (bytes > 0 && (reinterpret_cast<uintptr_t>(records.data()) | uintptr_t(stride)) % 2 != 0)
    fail(std::string(name) + " has records at odd addresses, where scales cannot be read; clone() it");
  return {static_cast<const uint8_t*>(records.data()), stride};
}

int64_t* counts_of(Argument& counts, int64_t size, const char* letter) {
  if (!counts.given()) return nullptr;
  counts.inspect(1);
  counts.expect_dtype(aoti_torch_dtype_int64(), "int64");
  counts.expect_size(0, size, letter);
  counts.expect_contiguous();
  return static_cast<int64_t*>(counts.mutable_data());
}

int64_t* ids_of(Argument& cluster_ids, int64_t tokens, int64_t clusters) {
  cluster_ids.inspect(1);
  cluster_ids.expect_dtype(aoti_torch_dtype_int64(), "int64");
  cluster_ids.expect_size(0, tokens, "n");
  int64_t* const ids = id_scratch(tokens);
  const int64_t* const given = static_cast<const int64_t*>(cluster_ids.data());
  for (int64_t t = 0; t < tokens; ++t) {
    ids[t] = given[t * cluster_ids.stride(0)];
    if (ids[t] < 0 || ids[t] >= clusters)
      throw std::out_of_range("cluster_ids[" + std::to_string(t) + "] is " +
                              std::to_string(ids[t]) + "; expected 0 <= id < K = " +
                              std::to_string(clusters));
  }
  return ids;
}

void check_sizes(const char* name, int64_t rows, int64_t length) {
  if (rows > kLargest || length > kLargest)
    fail(std::string(name) + " is larger than 2^30 in a dimension");
}

Tokens tokens_of(Argument& x) {
  x.inspect(2);
  x.float_dtype();
  if (x.size(1) > 1 && x.stride(1) != 1)
    fail("x has stride " + std::to_string(x.stride(1)) +
         " in its last dimension; its rows must be contiguous");
  check_sizes("x", 0, x.size(1));
  return {x.data(), x.stride(0), x.size(0)};
}

Ffn ffn_of(const Argument& x, Argument& w_gate, Argument& w_up, Argument& w_down_t,
           const StringArgument& activation, BiasArguments& biases) {
  const DTypeInfo info = x.float_dtype();
  w_gate.inspect(2);
  const int64_t neurons = w_gate.size(0);
  check_sizes("w_gate", neurons, x.size(1));
  for (Argument* weight : {&w_gate, &w_up, &w_down_t}) {
    if (!weight->given()) continue;  // up
    weight->inspect(2);
    weight->expect_dtype(x.dtype(), "of x");
    weight->expect_size(0, neurons, "I");
    weight->expect_size(1, x.size(1), "H");
    weight->expect_rows();
  }
  const Inputs inputs = biases.inputs(activation, w_up.given() ? 2 : 1, neurons);
  return {info.dtype,
          info.size,
          x.size(1),
          neurons,
          w_gate.matrix(),
          w_up.given() ? w_up.matrix() : w_gate.matrix(),
          w_down_t.matrix(),
          inputs};
}

Choice ChoiceArguments::choice(int64_t tokens, int64_t neurons) {
  if (!weights.given()) fail("top_k_index is given without top_k_weights; they go together");
  if (experts < 1 || neurons % experts != 0 || neurons / experts % 8 != 0)
    fail("there are " + std::to_string(neurons) + " neurons and " + std::to_string(experts) +
         " experts; expected a multiple of 8 neurons for each");
  index.inspect(2);
  index.expect_dtype(aoti_torch_dtype_int64(), "int64");
  weights.inspect(2);
  weights.expect_dtype(aoti_torch_dtype_float32(), "float32");
  for (Argument* one : {&index, &weights}) {
    one->expect_size(0, tokens, "n");
    one->expect_size(1, index.size(1), "k");
    one->expect_rows();
    if (tokens > 1 && one->stride(0) != index.size(1)) fail("top_k_index or top_k_weights is not contiguous");
  }
  const int64_t* const chosen = static_cast<const int64_t*>(index.data());
  for (int64_t i = 0; i < tokens * index.size(1); ++i)
    if (chosen[i] < 0 || chosen[i] >= experts)
      throw std::out_of_range("top_k_index holds " + std::to_string(chosen[i]) +
                              "; expected 0 <= index < experts = " + std::to_string(experts));
  return {chosen, static_cast<const float*>(weights.data()), index.size(1), experts};
}

Ffn experts_of(const Argument& x, Argument& w_gate, Argument& w_down_t, int64_t experts,
               const StringArgument& activation, BiasArguments& biases) {
  const DTypeInfo info = x.float_dtype();
  w_down_t.inspect(2);
  const int64_t neurons = w_down_t.size(0);
  for (Argument* weight : {&w_gate, &w_down_t}) {
    weight->inspect(2);
    weight->expect_dtype(x.dtype(), "of x");
    weight->expect_size(1, x.size(1), "H");
    weight->expect_rows();
    check_sizes("experts", weight->size(0), x.size(1));
  }
  const int64_t matrices = w_gate.size(0) == 2 * neurons ? 2 : 1;
  w_gate.expect_size(0, matrices * neurons, "the rows of all experts");
  const Inputs inputs = biases.inputs(activation, matrices, neurons);
  const Matrix gate = w_gate.matrix();
  const int64_t rows = matrices == 2 ? neurons / at_least(experts, 1) : 0;
  const Matrix up = {static_cast<const char*>(gate.data) + rows * gate.stride * info.size,
                     gate.stride};
  return {info.dtype, info.size, x.size(1), neurons, gate, up, w_down_t.matrix(), inputs};
}

Clusters clusters_of(Argument& sets, int64_t neurons) {
  sets.inspect(2);
  sets.expect_dtype(aoti_torch_dtype_uint8(), "uint8");
  sets.expect_size(1, (neurons + 7) / 8, "ceil(I / 8)");
  sets.expect_rows();
  return {static_cast<const uint8_t*>(sets.data()), sets.stride(0), sets.size(0), {}, nullptr};
}

void VerificationArguments::check_into(Clusters& clusters, const Ffn& ffn) {
  if (maybe_sets.given() != look.given() || maybe_sets.given() != factors.given())
    fail("maybe_sets, look and factors go together: all of them or none");
  if (cluster_weights.given() && !factors.given())
    fail("cluster_weights without factors, which alone they are for");
  clusters.row_counts = counts_of(row_counts, 2, "the number of counts");
  if (!maybe_sets.given()) return;
  maybe_sets.inspect(2);
  maybe_sets.expect_dtype(aoti_torch_dtype_uint8(), "uint8");
  maybe_sets.expect_size(0, clusters.count, "K");
  maybe_sets.expect_size(1, (ffn.num_neurons + 7) / 8, "ceil(I / 8)");
  maybe_sets.expect_rows();
  clusters.verification = {static_cast<const uint8_t*>(maybe_sets.data()), maybe_sets.stride(0),
                           stream_of(look, "look", ffn.num_neurons, look_bytes(ffn.inputs, ffn.hidden_size)),
                           floats_of(factors, ffn.num_neurons, "I"), nullptr};
  if (cluster_weights.given())
    clusters.verification.cluster_weights = floats_of(cluster_weights, clusters.count, "K");
}

Router router_of(const Argument& x, Argument& down, Argument& up, Argument& bias) {
  Router router = {0, {nullptr, 0}, {nullptr, 0}, nullptr};
  int64_t length = x.size(1);
  if (down.given()) {
    down.inspect(2);
    down.expect_dtype(x.dtype(), "of x");
    down.expect_size(1, x.size(1), "H");
    down.expect_rows();
    if (down.size(0) == 0) fail("router_down has no rows");
    router.rank = length = down.size(0);
    check_sizes("router_down", router.rank, x.size(1));
    router.down = down.matrix();
  }
  up.inspect(2);
  up.expect_dtype(x.dtype(), "of x");
  up.expect_size(1, length, down.given() ? "r" : "H");
  up.expect_rows();
  check_sizes("router_up", up.size(0), length);
  if (up.size(0) == 0 && x.size(0) > 0) fail("router_up has no rows: there is no cluster");
  router.up = up.matrix();
  router.bias = bias_of(x, bias, up.size(0), "K");
  return router;
}

Compensation correction_of(const Argument& x, Argument& down, Argument& up) {
  if (down.given() != up.given())
    fail("correction_down and correction_up go together: both or neither");
  if (!down.given()) return {};
  for (Argument* matrix : {&down, &up}) {
    matrix->inspect(2);
    matrix->expect_dtype(x.dtype(), "of x");
    matrix->expect_size(1, x.size(1), "H");
    matrix->expect_rows();
  }
  up.expect_size(0, down.size(0), "the rank of correction_down");
  check_sizes("correction_down", down.size(0), x.size(1));
  return {{nullptr, 0}, down.size(0), down.matrix(), up.matrix()};
}

}  // namespace sparse_ffn
