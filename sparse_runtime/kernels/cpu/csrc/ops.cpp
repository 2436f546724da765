// The operations as torch sees them: LibTorch's stable ABI, so that one library serves every
// torch from 2.10 on and every Python.
//
// Only its C functions are used. The C++ layer over them (torch/csrc/stable/library.h) never frees
// string arguments (torch 2.13), which here are one per layer and token, and needs a libstdc++
// newer than manylinux_2_28 promises.

#include "arguments.h"
#include "checks.h"
#include "dispatch.h"
#include "plane_ops.h"

namespace {

using namespace sparse_ffn;

const char* const kSparseFfn =
    "cpu_sparse_ffn(Tensor x, Tensor w_gate, Tensor? w_up, Tensor w_down_t, Tensor sets, "
    "Tensor cluster_ids, str activation, Tensor? maybe_sets=None, Tensor? look=None, "
    "Tensor? factors=None, Tensor(a!)? row_counts=None, Tensor? cluster_weights=None, "
    "Tensor? gate_bias=None, Tensor? up_bias=None) -> Tensor";

void sparse_ffn_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x("x", stack[0]), w_gate("w_gate", stack[1]);
  Argument w_up("w_up", Argument::optional_handle(stack[2]));
  Argument w_down_t("w_down_t", stack[3]), sets("sets", stack[4]);
  Argument cluster_ids("cluster_ids", stack[5]);
  StringArgument activation(stack[6]);
  VerificationArguments verification(stack + 7, stack[11]);
  BiasArguments biases(stack[12], stack[13]);

  const Tokens tokens = tokens_of(x);
  const Ffn ffn = ffn_of(x, w_gate, w_up, w_down_t, activation, biases);
  Clusters clusters = clusters_of(sets, ffn.num_neurons);
  verification.check_into(clusters, ffn);
  const int64_t* const ids = ids_of(cluster_ids, tokens.count, clusters.count);
  const int64_t shape[2] = {tokens.count, ffn.hidden_size};
  Result y(new_tensor(2, shape, x.dtype()));
  run_ffn(ffn, tokens, clusters, ids, {}, y.data());
  stack[0] = y.release();
}

const char* const kDenseFfn =
    "cpu_dense_ffn(Tensor x, Tensor w_gate, Tensor? w_up, Tensor w_down_t, str activation, "
    "Tensor? gate_bias=None, Tensor? up_bias=None) -> Tensor";

void dense_ffn_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x("x", stack[0]), w_gate("w_gate", stack[1]);
  Argument w_up("w_up", Argument::optional_handle(stack[2]));
  Argument w_down_t("w_down_t", stack[3]);
  StringArgument activation(stack[4]);
  BiasArguments biases(stack[5], stack[6]);

  const Tokens tokens = tokens_of(x);
  const Ffn ffn = ffn_of(x, w_gate, w_up, w_down_t, activation, biases);
  const int64_t shape[2] = {tokens.count, ffn.hidden_size};
  Result y(new_tensor(2, shape, x.dtype()));
  run_ffn(ffn, tokens, {}, nullptr, {}, y.data());
  stack[0] = y.release();
}

const char* const kRoute =
    "cpu_route(Tensor x, Tensor? router_down, Tensor router_up, Tensor? router_bias) -> Tensor";

void route_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x("x", stack[0]), down("router_down", Argument::optional_handle(stack[1]));
  Argument up("router_up", stack[2]), bias("router_bias", Argument::optional_handle(stack[3]));

  const Tokens tokens = tokens_of(x);
  const Router router = router_of(x, down, up, bias);
  const DTypeInfo info = x.float_dtype();
  Result ids(new_tensor(1, &tokens.count, aoti_torch_dtype_int64()));
  run_router(info.dtype, info.size, tokens, x.size(1), router, up.size(0),
             static_cast<int64_t*>(ids.data()));
  stack[0] = ids.release();
}

const char* const kRoutedFfn =
    "cpu_routed_ffn(Tensor x, Tensor w_gate, Tensor? w_up, Tensor w_down_t, Tensor sets, "
    "Tensor? router_down, Tensor router_up, Tensor? router_bias, Tensor? cluster_bias, "
    "Tensor(a!)? cluster_counts, str activation, Tensor? maybe_sets=None, "
    "Tensor? look=None, Tensor? factors=None, Tensor(b!)? row_counts=None, "
    "Tensor? correction_down=None, Tensor? correction_up=None, Tensor? cluster_weights=None, "
    "Tensor? gate_bias=None, Tensor? up_bias=None, Tensor? top_k_index=None, "
    "Tensor? top_k_weights=None, int experts=1) -> Tensor";

// With experts w_gate has the rows of gate and up of one after the other, and w_up is None.
void routed_ffn_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x("x", stack[0]), w_gate("w_gate", stack[1]);
  Argument w_up("w_up", Argument::optional_handle(stack[2]));
  Argument w_down_t("w_down_t", stack[3]), sets("sets", stack[4]);
  Argument down("router_down", Argument::optional_handle(stack[5])), up("router_up", stack[6]);
  Argument bias("router_bias", Argument::optional_handle(stack[7]));
  Argument cluster_bias("cluster_bias", Argument::optional_handle(stack[8]));
  Argument counts("cluster_counts", Argument::optional_handle(stack[9]));
  StringArgument activation(stack[10]);
  VerificationArguments verification(stack + 11, stack[17]);
  BiasArguments biases(stack[18], stack[19]);
  ChoiceArguments chosen(stack[20], stack[21], stack[22]);
  Argument correction_down("correction_down", Argument::optional_handle(stack[15]));
  Argument correction_up("correction_up", Argument::optional_handle(stack[16]));

  const Tokens tokens = tokens_of(x);
  if (chosen.given() && w_up.given()) fail("w_up is given, but experts have it in w_gate");
  const Ffn ffn =
      chosen.given() ? experts_of(x, w_gate, w_down_t, chosen.experts, activation, biases)
                     : ffn_of(x, w_gate, w_up, w_down_t, activation, biases);
  Choice choice = {};
  if (chosen.given()) choice = chosen.choice(tokens.count, ffn.num_neurons);
  Clusters clusters = clusters_of(sets, ffn.num_neurons);
  verification.check_into(clusters, ffn);
  const Router router = router_of(x, down, up, bias);
  up.expect_size(0, clusters.count, "K");
  Compensation compensation = correction_of(x, correction_down, correction_up);
  bias_into(compensation, x, cluster_bias, clusters.count);
  int64_t* const count = counts_of(counts, clusters.count, "K");
  const int64_t shape[2] = {tokens.count, ffn.hidden_size};
  Result y(new_tensor(2, shape, x.dtype()));
  int64_t* const ids = id_scratch(tokens.count);
  run_router(ffn.dtype, ffn.element_size, tokens, ffn.hidden_size, router, clusters.count, ids);
  if (chosen.given()) {
    const int64_t block = ffn.inputs.matrices * (ffn.num_neurons / choice.experts);
    run_experts(ffn, block, choice, tokens, clusters, ids, compensation, y.data());
  } else {
    run_ffn(ffn, tokens, clusters, ids, compensation, y.data());
  }
  if (count)
    for (int64_t t = 0; t < tokens.count; ++t) add_count(count + ids[t], 1);
  stack[0] = y.release();
}

const char* const kLinear = "cpu_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor";

void linear_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x("x", stack[0]), weight("weight", stack[1]);
  Argument bias("bias", Argument::optional_handle(stack[2]));

  const Tokens tokens = tokens_of(x);
  const DTypeInfo info = x.float_dtype();
  weight.inspect(2);
  weight.expect_dtype(x.dtype(), "of x");
  weight.expect_size(1, x.size(1), "K");
  weight.expect_rows();
  check_sizes("weight", weight.size(0), weight.size(1));
  const void* const added = bias_of(x, bias, weight.size(0), "N");
  const int64_t shape[2] = {tokens.count, weight.size(0)};
  Result y(new_tensor(2, shape, x.dtype()));
  run_linear(info.dtype, info.size, tokens, weight.matrix(), weight.size(0), x.size(1),
             added, y.data());
  stack[0] = y.release();
}

// Reads a buffer with all threads, for the bandwidth that a benchmark compares with; the result,
// the sum of its 64-bit words, keeps the reading from being optimized away.
const char* const kRead = "cpu_read(Tensor data) -> Tensor";

void read_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument data("data", stack[0]);
  data.inspect(1);
  data.expect_contiguous();
  data.expect_dtype(aoti_torch_dtype_int64(), "int64");
  Result sum(new_tensor(0, nullptr, aoti_torch_dtype_int64()));
  *static_cast<int64_t*>(sum.data()) = int64_t(run_read(data.data(), data.size(0)));
  stack[0] = sum.release();
}

// torch 2.13 copies a string result and does not free it: 48 bytes for each call of an operation
// that returns one. They are called when a model is patched, not for every token.
StableIValue new_string(const std::string& text) {
  StringHandle handle = nullptr;
  check(torch_new_string_handle(text.data(), text.size(), &handle), "new_string_handle");
  return to_value(handle);
}

void isa_op(StableIValue* stack, uint64_t, uint64_t) { stack[0] = new_string(current_isa().name); }

void isas_op(StableIValue* stack, uint64_t, uint64_t) {
  const Isa* usable[8];
  const int count = available_isas(usable);
  std::string names;
  for (int i = 0; i < count; ++i) names += std::string(i ? "," : "") + usable[i]->name;
  stack[0] = new_string(names);
}

void force_isa_op(StableIValue* stack, uint64_t, uint64_t) {
  StringArgument name(stack[0]);
  const std::string wanted = name.get();
  if (!force_isa(wanted.data(), int64_t(wanted.size())))
    fail("instruction set '" + wanted + "' is unknown or not usable on this machine");
}

// ---------------------------------------------------------------------------------------------
// Registration

struct Operation {
  const char* schema;
  const char* name;
  bool takes_tensors;  // dispatched by them: on the CPU only
  void (*run)(StableIValue*, uint64_t, uint64_t);
};

const Operation kOperations[] = {
    {kSparseFfn, "cpu_sparse_ffn", true, sparse_ffn_op},
    {kDenseFfn, "cpu_dense_ffn", true, dense_ffn_op},
    {kRoute, "cpu_route", true, route_op},
    {kRoutedFfn, "cpu_routed_ffn", true, routed_ffn_op},
    {kLinear, "cpu_linear", true, linear_op},
    {kPlaneFfn, "cpu_plane_ffn", true, plane_ffn_op},
    {kPlaneLinear, "cpu_plane_linear", true, plane_linear_op},
    {kPlaneValues, "cpu_plane_values", true, plane_values_op},
    {kRoundRows, "cpu_round_rows", true, round_rows_op},
    {kPackPlane, "cpu_pack_plane", true, pack_plane_op},
    {kRead, "cpu_read", true, read_op},
    // The instruction set in use; the usable ones, best first, separated by commas; and, for
    // tests, a switch to one of them ("" = the best again).
    {"cpu_isa() -> str", "cpu_isa", false, isa_op},
    {"cpu_isas() -> str", "cpu_isas", false, isas_op},
    {"cpu_force_isa(str name) -> ()", "cpu_force_isa", false, force_isa_op},
};

// Registers when the library is loaded and deregisters when it is unloaded. A failure (an operation
// of that name exists: a second copy of the library) leaves the rest unregistered; throwing from
// here would end the process.
class Registration {
 public:
  Registration() {
    TorchLibraryHandle definitions = open(nullptr);
    if (!definitions) return;
    for (const Operation& operation : kOperations)
      if (aoti_torch_library_def(definitions, operation.schema) != 0) return;
    TorchLibraryHandle cpu = open("CPU"), any = open("CompositeExplicitAutograd");
    if (!cpu || !any) return;
    for (const Operation& operation : kOperations) {
      const TorchLibraryHandle library = operation.takes_tensors ? cpu : any;
      if (torch_library_impl(library, operation.name, operation.run, TORCH_TARGET_VERSION) != 0)
        return;
    }
  }
  ~Registration() {
    while (count_ > 0) aoti_torch_delete_library_object(handles_[--count_]);
  }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

 private:
  TorchLibraryHandle open(const char* dispatch_key) {
    TorchLibraryHandle handle = nullptr;
    const AOTITorchError error =
        dispatch_key ? aoti_torch_library_init_impl("sparse_runtime", dispatch_key, __FILE__,
                                                    __LINE__, &handle)
                     : aoti_torch_library_init_fragment("sparse_runtime", __FILE__, __LINE__,
                                                        &handle);
    if (error != 0) return nullptr;
    handles_[count_++] = handle;
    return handle;
  }

  TorchLibraryHandle handles_[3];
  int count_ = 0;
};

const Registration registration;

}  // namespace
