// Arguments and results of the operations as torch hands them over.
#pragma once

#include <stdexcept>
#include <string>

#include <torch/csrc/stable/c/shim.h>

#include "ffn.h"

namespace sparse_ffn {

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline void check(int32_t error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("sparse_runtime: ") + what + " failed");
}

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

  // A vector of neighboring elements.
  void expect_contiguous() const {
    if (size_[0] > 1 && stride_[0] != 1) fail(std::string(name_) + " is not contiguous");
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

inline AtenTensorHandle new_tensor(int32_t dim, const int64_t* sizes, int32_t dtype) {
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

}  // namespace sparse_ffn
