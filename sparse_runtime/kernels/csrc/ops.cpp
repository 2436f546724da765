// The operations as torch sees them: LibTorch's stable ABI, so that one library serves every
// torch from 2.10 on and every Python.
//
// Only its C functions are used. The C++ layer over them (torch/csrc/stable/library.h) never frees
// string arguments (torch 2.13), which here are one per layer and token, and needs a libstdc++
// newer than manylinux_2_28 promises.

#include <stdexcept>
#include <string>

#include <torch/csrc/stable/c/shim.h>

#include "ffn.h"

namespace {

using namespace sparse_ffn;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void check(int32_t error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("sparse_runtime: ") + what + " failed");
}

// ---------------------------------------------------------------------------------------------
// Arguments

// Handles travel in the low bytes of a StableIValue; an optional argument is a pointer to one, ours
// to delete, or null.
template <class Handle>
Handle from_value(StableIValue value) {
  return reinterpret_cast<Handle>(static_cast<uintptr_t>(value));
}
template <class Handle>
StableIValue to_value(Handle handle) {
  return static_cast<StableIValue>(reinterpret_cast<uintptr_t>(handle));
}

struct DTypeInfo {
  DType dtype;
  int64_t size;
};

// An argument that is a tensor; owns its handle.
class Argument {
 public:
  Argument(const char* name, StableIValue value)
      : name_(name), handle_(from_value<AtenTensorHandle>(value)) {}
  Argument(const char* name, AtenTensorHandle handle) : name_(name), handle_(handle) {}
  Argument(const Argument&) = delete;
  Argument& operator=(const Argument&) = delete;
  ~Argument() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  // An optional one: null handle for None.
  static AtenTensorHandle optional_handle(StableIValue value) {
    auto* const inner = from_value<StableIValue*>(value);
    if (!inner) return nullptr;
    const auto handle = from_value<AtenTensorHandle>(*inner);
    delete inner;
    return handle;
  }

  bool given() const { return handle_ != nullptr; }

  // Read what the checks need. Every other member function wants this called first.
  void inspect(int64_t dim) {
    int32_t device = 0;
    int64_t* sizes = nullptr;
    int64_t* strides = nullptr;
    check(aoti_torch_get_dim(handle_, &dim_), "get_dim");
    check(aoti_torch_get_device_type(handle_, &device), "get_device_type");
    check(aoti_torch_get_dtype(handle_, &dtype_), "get_dtype");
    if (device != aoti_torch_device_type_cpu()) fail(std::string(name_) + " is not on the CPU");
    if (dim_ != dim)
      fail(std::string(name_) + " has " + std::to_string(dim_) + " dimensions; expected " +
           std::to_string(dim));
    check(aoti_torch_get_sizes(handle_, &sizes), "get_sizes");
    check(aoti_torch_get_strides(handle_, &strides), "get_strides");
    for (int64_t i = 0; i < dim && i < 2; ++i) {
      size_[i] = sizes[i];
      stride_[i] = strides[i];
    }
    check(torch_get_const_data_ptr(handle_, &data_), "get_const_data_ptr");
    int64_t numel = 0;
    check(aoti_torch_get_numel(handle_, &numel), "get_numel");
    if (numel > 0 && !data_) fail(std::string(name_) + " has no data");
    if (reinterpret_cast<uintptr_t>(data_) % aoti_torch_dtype_element_size(dtype_) != 0)
      fail(std::string(name_) + " begins at an address that does not suit its dtype; clone() it");
  }

  int64_t size(int64_t i) const { return size_[i]; }
  int64_t stride(int64_t i) const { return stride_[i]; }
  int32_t dtype() const { return dtype_; }
  const void* data() const { return data_; }

  void* mutable_data() const {
    void* data = nullptr;
    check(torch_get_mutable_data_ptr(handle_, &data), "get_mutable_data_ptr");
    return data;
  }

  void expect_dtype(int32_t dtype, const char* description) const {
    if (dtype_ != dtype) fail(std::string(name_) + " does not have dtype " + description);
  }

  void expect_size(int64_t i, int64_t size, const char* letter) const {
    if (size_[i] != size)
      fail(std::string(name_) + " has size " + std::to_string(size_[i]) + " in dimension " +
           std::to_string(i) + "; expected " + letter + " = " + std::to_string(size));
  }

  // Rows of `size(1)` neighboring elements that do not overlap.
  void expect_rows() const {
    if (size_[1] > 1 && stride_[1] != 1)
      fail(std::string(name_) + " has stride " + std::to_string(stride_[1]) +
           " in its last dimension; its rows must be contiguous");
    if (size_[0] > 1 && stride_[0] < size_[1])
      fail(std::string(name_) + " has stride " + std::to_string(stride_[0]) +
           " between rows of " + std::to_string(size_[1]) + " elements; rows must not overlap");
  }

  // 16- and 32-bit floats only.
  DTypeInfo float_dtype() const {
    if (dtype_ == aoti_torch_dtype_bfloat16()) return {kBFloat16, 2};
    if (dtype_ == aoti_torch_dtype_float16()) return {kFloat16, 2};
    if (dtype_ == aoti_torch_dtype_float32()) return {kFloat32, 4};
    fail(std::string(name_) + " has a dtype other than bfloat16, float16 and float32");
  }

  Matrix matrix() const { return {data_, stride_[0]}; }

 private:
  const char* name_;
  AtenTensorHandle handle_;
  int64_t dim_ = 0;
  int64_t size_[2] = {0, 0};
  int64_t stride_[2] = {0, 0};
  int32_t dtype_ = 0;
  const void* data_ = nullptr;
};

// An argument that is a string; owns its handle.
class StringArgument {
 public:
  explicit StringArgument(StableIValue value)
      : handle_(from_value<StringHandle>(value)) {}
  StringArgument(const StringArgument&) = delete;
  StringArgument& operator=(const StringArgument&) = delete;
  ~StringArgument() { torch_delete_string(handle_); }

  std::string get() const {
    const char* data = nullptr;
    size_t length = 0;
    check(torch_string_c_str(handle_, &data), "string_c_str");
    check(torch_string_length(handle_, &length), "string_length");
    return std::string(data, length);
  }

 private:
  StringHandle handle_;
};

Activation activation_named(const std::string& name) {
  if (name == "silu") return kSilu;
  if (name == "gelu") return kGelu;
  if (name == "gelu_tanh") return kGeluTanh;
  if (name == "relu") return kRelu;
  fail("activation is '" + name + "'; expected one of silu, gelu, gelu_tanh, relu");
}

AtenTensorHandle new_tensor(int32_t dim, const int64_t* sizes, int32_t dtype) {
  int64_t strides[2] = {1, 1};
  if (dim == 2) strides[0] = sizes[1] > 1 ? sizes[1] : 1;
  AtenTensorHandle result = nullptr;
  check(aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0,
                                 &result),
        "empty_strided");
  return result;
}

// The handle of a tensor under construction, freed unless it is returned.
class Result {
 public:
  explicit Result(AtenTensorHandle handle) : handle_(handle) {
    check(torch_get_mutable_data_ptr(handle_, &data_), "get_mutable_data_ptr");
  }
  Result(const Result&) = delete;
  Result& operator=(const Result&) = delete;
  ~Result() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  void* data() const { return data_; }
  StableIValue release() {
    const StableIValue value = to_value(handle_);
    handle_ = nullptr;
    return value;
  }

 private:
  AtenTensorHandle handle_;
  void* data_ = nullptr;
};

// Rows are numbered with 32 bits, and no size may make a product of two overflow.
constexpr int64_t kLargest = int64_t(1) << 30;

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
           const StringArgument& activation) {
  const DTypeInfo info = x.float_dtype();
  w_gate.inspect(2);
  const int64_t neurons = w_gate.size(0);
  check_sizes("w_gate", neurons, x.size(1));
  for (Argument* weight : {&w_gate, &w_up, &w_down_t}) {
    weight->inspect(2);
    weight->expect_dtype(x.dtype(), "of x");
    weight->expect_size(0, neurons, "I");
    weight->expect_size(1, x.size(1), "H");
    weight->expect_rows();
  }
  return {info.dtype,        info.size,       x.size(1),
          neurons,           w_gate.matrix(), w_up.matrix(),
          w_down_t.matrix(), activation_named(activation.get())};
}

Clusters clusters_of(Argument& sets, int64_t neurons) {
  sets.inspect(2);
  sets.expect_dtype(aoti_torch_dtype_uint8(), "uint8");
  sets.expect_size(1, (neurons + 7) / 8, "ceil(I / 8)");
  sets.expect_rows();
  return {static_cast<const uint8_t*>(sets.data()), sets.stride(0), sets.size(0), {}, nullptr};
}

// The optional last arguments of both sparse operations.
struct VerificationArguments {
  Argument maybe_sets, low_bit, factors, row_counts;

  explicit VerificationArguments(const StableIValue* stack)
      : maybe_sets("maybe_sets", Argument::optional_handle(stack[0])),
        low_bit("low_bit", Argument::optional_handle(stack[1])),
        factors("factors", Argument::optional_handle(stack[2])),
        row_counts("row_counts", Argument::optional_handle(stack[3])) {}

  void check_into(Clusters& clusters, const Ffn& ffn) {
    if (maybe_sets.given() != low_bit.given() || maybe_sets.given() != factors.given())
      fail("maybe_sets, low_bit and factors go together: all of them or none");
    if (row_counts.given()) {
      row_counts.inspect(1);
      row_counts.expect_dtype(aoti_torch_dtype_int64(), "int64");
      row_counts.expect_size(0, 2, "the number of counts");
      if (row_counts.stride(0) != 1) fail("row_counts is not contiguous");
      clusters.row_counts = static_cast<int64_t*>(row_counts.mutable_data());
    }
    if (!maybe_sets.given()) return;
    const int64_t groups = (ffn.hidden_size + kLookGroup - 1) / kLookGroup;
    for (Argument* bytes : {&maybe_sets, &low_bit}) {
      bytes->inspect(2);
      bytes->expect_dtype(aoti_torch_dtype_uint8(), "uint8");
    }
    maybe_sets.expect_size(0, clusters.count, "K");
    maybe_sets.expect_size(1, (ffn.num_neurons + 7) / 8, "ceil(I / 8)");
    maybe_sets.expect_rows();
    low_bit.expect_size(0, ffn.num_neurons, "I");
    low_bit.expect_size(1, 68 * groups, "68 * ceil(H / 64)");
    low_bit.expect_rows();
    const int64_t stride = low_bit.size(0) > 1 && groups > 0 ? low_bit.stride(0) : 0;
    if ((reinterpret_cast<uintptr_t>(low_bit.data()) | uintptr_t(stride)) % 2 != 0)
      fail("low_bit has records at odd addresses, where their scales cannot be read; clone() it");
    factors.inspect(1);
    factors.expect_dtype(aoti_torch_dtype_float32(), "float32");
    factors.expect_size(0, ffn.num_neurons, "I");
    if (factors.size(0) > 1 && factors.stride(0) != 1) fail("factors is not contiguous");
    clusters.verification = {static_cast<const uint8_t*>(maybe_sets.data()), maybe_sets.stride(0),
                             static_cast<const uint8_t*>(low_bit.data()), low_bit.stride(0),
                             static_cast<const float*>(factors.data())};
  }
};

// ---------------------------------------------------------------------------------------------
// Operations

const char* const kSparseFfn =
    "cpu_sparse_ffn(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, Tensor sets, "
    "Tensor cluster_ids, str activation, Tensor? maybe_sets=None, Tensor? low_bit=None, "
    "Tensor? factors=None, Tensor(a!)? row_counts=None) -> Tensor";

void sparse_ffn_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x("x", stack[0]), w_gate("w_gate", stack[1]), w_up("w_up", stack[2]);
  Argument w_down_t("w_down_t", stack[3]), sets("sets", stack[4]);
  Argument cluster_ids("cluster_ids", stack[5]);
  StringArgument activation(stack[6]);
  VerificationArguments verification(stack + 7);

  const Tokens tokens = tokens_of(x);
  const Ffn ffn = ffn_of(x, w_gate, w_up, w_down_t, activation);
  Clusters clusters = clusters_of(sets, ffn.num_neurons);
  verification.check_into(clusters, ffn);
  cluster_ids.inspect(1);
  cluster_ids.expect_dtype(aoti_torch_dtype_int64(), "int64");
  cluster_ids.expect_size(0, tokens.count, "n");
  int64_t* const ids = id_scratch(tokens.count);
  const int64_t* const given = static_cast<const int64_t*>(cluster_ids.data());
  for (int64_t t = 0; t < tokens.count; ++t) {
    ids[t] = given[t * cluster_ids.stride(0)];
    if (ids[t] < 0 || ids[t] >= clusters.count)
      throw std::out_of_range("cluster_ids[" + std::to_string(t) + "] is " +
                              std::to_string(ids[t]) + "; expected 0 <= id < K = " +
                              std::to_string(clusters.count));
  }
  const int64_t shape[2] = {tokens.count, ffn.hidden_size};
  Result y(new_tensor(2, shape, x.dtype()));
  run_ffn(ffn, tokens, clusters, ids, {}, y.data());
  stack[0] = y.release();
}

const char* const kDenseFfn =
    "cpu_dense_ffn(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, str activation) -> "
    "Tensor";

void dense_ffn_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x("x", stack[0]), w_gate("w_gate", stack[1]), w_up("w_up", stack[2]);
  Argument w_down_t("w_down_t", stack[3]);
  StringArgument activation(stack[4]);

  const Tokens tokens = tokens_of(x);
  const Ffn ffn = ffn_of(x, w_gate, w_up, w_down_t, activation);
  const int64_t shape[2] = {tokens.count, ffn.hidden_size};
  Result y(new_tensor(2, shape, x.dtype()));
  run_ffn(ffn, tokens, {}, nullptr, {}, y.data());
  stack[0] = y.release();
}

// Checks the router's tensors against x and K.
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
  if (bias.given()) {
    bias.inspect(1);
    bias.expect_dtype(x.dtype(), "of x");
    bias.expect_size(0, up.size(0), "K");
    if (bias.size(0) > 1 && bias.stride(0) != 1) fail("router_bias is not contiguous");
    router.bias = bias.data();
  }
  return router;
}

// The linear part of the compensation.
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
    "cpu_routed_ffn(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, Tensor sets, "
    "Tensor? router_down, Tensor router_up, Tensor? router_bias, Tensor? cluster_bias, "
    "Tensor(a!)? cluster_counts, str activation, Tensor? maybe_sets=None, "
    "Tensor? low_bit=None, Tensor? factors=None, Tensor(b!)? row_counts=None, "
    "Tensor? correction_down=None, Tensor? correction_up=None) -> Tensor";

void routed_ffn_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x("x", stack[0]), w_gate("w_gate", stack[1]), w_up("w_up", stack[2]);
  Argument w_down_t("w_down_t", stack[3]), sets("sets", stack[4]);
  Argument down("router_down", Argument::optional_handle(stack[5])), up("router_up", stack[6]);
  Argument bias("router_bias", Argument::optional_handle(stack[7]));
  Argument cluster_bias("cluster_bias", Argument::optional_handle(stack[8]));
  Argument counts("cluster_counts", Argument::optional_handle(stack[9]));
  StringArgument activation(stack[10]);
  VerificationArguments verification(stack + 11);
  Argument correction_down("correction_down", Argument::optional_handle(stack[15]));
  Argument correction_up("correction_up", Argument::optional_handle(stack[16]));

  const Tokens tokens = tokens_of(x);
  const Ffn ffn = ffn_of(x, w_gate, w_up, w_down_t, activation);
  Clusters clusters = clusters_of(sets, ffn.num_neurons);
  verification.check_into(clusters, ffn);
  const Router router = router_of(x, down, up, bias);
  up.expect_size(0, clusters.count, "K");
  Compensation compensation = correction_of(x, correction_down, correction_up);
  if (cluster_bias.given()) {
    cluster_bias.inspect(2);
    cluster_bias.expect_dtype(x.dtype(), "of x");
    cluster_bias.expect_size(0, clusters.count, "K");
    cluster_bias.expect_size(1, ffn.hidden_size, "H");
    cluster_bias.expect_rows();
    compensation.cluster_bias = cluster_bias.matrix();
  }
  int64_t* count = nullptr;
  if (counts.given()) {
    counts.inspect(1);
    counts.expect_dtype(aoti_torch_dtype_int64(), "int64");
    counts.expect_size(0, clusters.count, "K");
    if (counts.size(0) > 1 && counts.stride(0) != 1) fail("cluster_counts is not contiguous");
    count = static_cast<int64_t*>(counts.mutable_data());
  }
  const int64_t shape[2] = {tokens.count, ffn.hidden_size};
  Result y(new_tensor(2, shape, x.dtype()));
  int64_t* const ids = id_scratch(tokens.count);
  run_router(ffn.dtype, ffn.element_size, tokens, ffn.hidden_size, router, clusters.count, ids);
  run_ffn(ffn, tokens, clusters, ids, compensation, y.data());
  if (count)
    for (int64_t t = 0; t < tokens.count; ++t) ++count[ids[t]];
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
  if (bias.given()) {
    bias.inspect(1);
    bias.expect_dtype(x.dtype(), "of x");
    bias.expect_size(0, weight.size(0), "N");
    if (bias.size(0) > 1 && bias.stride(0) != 1) fail("bias is not contiguous");
  }
  const int64_t shape[2] = {tokens.count, weight.size(0)};
  Result y(new_tensor(2, shape, x.dtype()));
  run_linear(info.dtype, info.size, tokens, weight.matrix(), weight.size(0), x.size(1),
             bias.given() ? bias.data() : nullptr, y.data());
  stack[0] = y.release();
}

// Reads a buffer with all threads, for the bandwidth that a benchmark compares with; the result,
// the sum of its 64-bit words, keeps the reading from being optimized away.
const char* const kRead = "cpu_read(Tensor data) -> Tensor";

void read_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument data("data", stack[0]);
  data.inspect(1);
  if (data.size(0) > 1 && data.stride(0) != 1) fail("data is not contiguous");
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
