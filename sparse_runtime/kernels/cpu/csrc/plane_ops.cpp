#include "plane_ops.h"

#include <string.h>

#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "plane_pass.h"

namespace sparse_ffn {

namespace {

double number(StableIValue value) {
  double number;
  memcpy(&number, &value, sizeof(number));
  return number;
}

PlaneFormat format_of(StableIValue base, StableIValue residual) {
  const int64_t bits = static_cast<int64_t>(base), rest = static_cast<int64_t>(residual);
  if (bits < 3 || bits > 4 || rest < 0 || rest == 1 || rest > 4)
    fail("planes of " + std::to_string(bits) + " + " + std::to_string(rest) +
         " bits; expected 3 or 4, and 0, 2, 3 or 4");
  return {int(bits), int(rest)};
}

int64_t scale_bytes(int64_t length) { return 2 * plane_groups(length); }

}  // namespace

const char* const kPlaneFfn =
    "cpu_plane_ffn(Tensor x, Tensor look, Tensor count, Tensor refine, int base, int residual, "
    "str activation, Tensor? sets, Tensor? cluster_ids, Tensor? router_down, Tensor? router_up, "
    "Tensor? router_bias, Tensor? factors, float tau, float width, Tensor? cluster_bias, "
    "Tensor(a!)? cluster_counts, Tensor(b!)? row_counts, Tensor? correction_down, "
    "Tensor? correction_up, Tensor? cluster_weights=None, Tensor? gate_bias=None, "
    "Tensor? up_bias=None, Tensor? top_k_index=None, Tensor? top_k_weights=None, "
    "int experts=1) -> Tensor";

void plane_ffn_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x("x", stack[0]), look("look", stack[1]), count("count", stack[2]);
  Argument refine("refine", stack[3]);
  StringArgument activation(stack[6]);
  Argument sets("sets", Argument::optional_handle(stack[7]));
  Argument cluster_ids("cluster_ids", Argument::optional_handle(stack[8]));
  Argument down("router_down", Argument::optional_handle(stack[9]));
  Argument up("router_up", Argument::optional_handle(stack[10]));
  Argument bias("router_bias", Argument::optional_handle(stack[11]));
  Argument factors("factors", Argument::optional_handle(stack[12]));
  Argument cluster_bias("cluster_bias", Argument::optional_handle(stack[15]));
  Argument cluster_counts("cluster_counts", Argument::optional_handle(stack[16]));
  Argument row_counts("row_counts", Argument::optional_handle(stack[17]));
  Argument correction_down("correction_down", Argument::optional_handle(stack[18]));
  Argument correction_up("correction_up", Argument::optional_handle(stack[19]));
  Argument cluster_weights("cluster_weights", Argument::optional_handle(stack[20]));
  BiasArguments biases(stack[21], stack[22]);
  ChoiceArguments chosen(stack[23], stack[24], stack[25]);

  const Tokens tokens = tokens_of(x);
  const DTypeInfo info = x.float_dtype();
  const int64_t hidden = x.size(1);
  const PlaneFormat format = format_of(stack[4], stack[5]);
  const int64_t row = plane_bytes(hidden, format.base) + scale_bytes(hidden);
  PlaneFfn ffn = {info.dtype, info.size, hidden, 0, format, {}, {}, {}, {}};
  look.inspect(2);
  // Records of one matrix are those of an FFN without up.
  const int64_t matrices = hidden > 0 && look.size(1) == row ? 1 : 2;
  ffn.look = stream_of(look, "look", -1, matrices * row);
  ffn.num_neurons = look.size(0);
  ffn.inputs = biases.inputs(activation, matrices, ffn.num_neurons);
  check_sizes("look", ffn.num_neurons, hidden);
  ffn.count = stream_of(count, "count", ffn.num_neurons, row);
  ffn.refine =
      stream_of(refine, "refine", ffn.num_neurons,
                (matrices + 1) * plane_bytes(hidden, format.residual));

  Stages stages = {nullptr, nullptr, float(number(stack[13])), float(number(stack[14]))};
  if (!(stages.tau >= 1.0f)) fail("tau is below 1, or not a number");
  if (!(stages.width >= 0.0f)) fail("width is negative, or not a number");
  if (factors.given()) stages.factors = floats_of(factors, ffn.num_neurons, "I");
  Compensation compensation = correction_of(x, correction_down, correction_up);
  Clusters clusters = {};
  const int64_t* ids = nullptr;
  if (sets.given()) {
    clusters = clusters_of(sets, ffn.num_neurons);
    if (cluster_weights.given())
      stages.cluster_weights = floats_of(cluster_weights, clusters.count, "K");
    bias_into(compensation, x, cluster_bias, clusters.count);
    if (cluster_ids.given()) {
      ids = ids_of(cluster_ids, tokens.count, clusters.count);
    } else {
      if (!up.given()) fail("there are sets, but neither cluster_ids nor a router");
      const Router router = router_of(x, down, up, bias);
      up.expect_size(0, clusters.count, "K");
      int64_t* const routed = id_scratch(tokens.count);
      run_router(info.dtype, info.size, tokens, hidden, router, clusters.count, routed);
      ids = routed;
    }
  } else if (cluster_bias.given() || cluster_ids.given() || up.given() || cluster_weights.given()) {
    fail("there are clusters, but no sets");
  }
  clusters.row_counts = counts_of(row_counts, 3, "the number of counts");
  int64_t* const counted = counts_of(cluster_counts, clusters.count, "K");
  const int64_t shape[2] = {tokens.count, hidden};
  Result y(new_tensor(2, shape, x.dtype()));
  if (chosen.given()) {
    const Choice choice = chosen.choice(tokens.count, ffn.num_neurons);
    run_plane_experts(ffn, choice, tokens, clusters, ids, stages, compensation, y.data());
  } else {
    run_plane_ffn(ffn, tokens, clusters, ids, stages, compensation, y.data());
  }
  if (counted && ids)
    for (int64_t t = 0; t < tokens.count; ++t) add_count(counted + ids[t], 1);
  stack[0] = y.release();
}

const char* const kPlaneLinear =
    "cpu_plane_linear(Tensor x, Tensor records, int base, int residual, Tensor? bias) -> Tensor";

void plane_linear_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument x("x", stack[0]), records("records", stack[1]);
  Argument bias("bias", Argument::optional_handle(stack[4]));

  const Tokens tokens = tokens_of(x);
  const DTypeInfo info = x.float_dtype();
  const int64_t length = x.size(1);
  const PlaneFormat format = format_of(stack[2], stack[3]);
  const int64_t bytes = plane_bytes(length, format.base + format.residual) + scale_bytes(length);
  const Stream stream = stream_of(records, "records", -1, bytes);
  const int64_t rows = records.size(0);
  check_sizes("records", rows, length);
  const void* const added = bias_of(x, bias, rows, "N");
  const int64_t shape[2] = {tokens.count, rows};
  Result y(new_tensor(2, shape, x.dtype()));
  run_plane_linear(info.dtype, info.size, tokens, format, stream, rows, length,
                   added, y.data());
  stack[0] = y.release();
}

// Rows' values [count, length], of the dtype of `like`; a plane of a row begins so many bytes into its
// record, and its scales likewise.
const char* const kPlaneValues =
    "cpu_plane_values(Tensor records, Tensor residuals, Tensor scales, int base, int residual, "
    "int length, Tensor like) -> Tensor";

void plane_values_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument records("records", stack[0]), residuals("residuals", stack[1]);
  Argument scales("scales", stack[2]), like("like", stack[6]);

  const PlaneFormat format = format_of(stack[3], stack[4]);
  const int64_t length = static_cast<int64_t>(stack[5]);
  if (length < 0) fail("length is negative");
  like.inspect(1);
  const DTypeInfo info = like.float_dtype();
  check_sizes("records", 0, length);
  const PlaneRowsOf rows = {
      stream_of(records, "records", -1, plane_bytes(length, format.base)),
      stream_of(residuals, "residuals", records.size(0), plane_bytes(length, format.residual)),
      stream_of(scales, "scales", records.size(0), scale_bytes(length))};
  const int64_t shape[2] = {records.size(0), length};
  check_sizes("records", shape[0], length);
  Result values(new_tensor(2, shape, like.dtype()));
  run_plane_values(info.dtype, info.size, format, rows, shape[0], length, values.data());
  stack[0] = values.release();
}

// Codes of base and residual [rows, H] and scales [rows, G] of weights [rows, H]. `steps` are the scales to
// try in parts of a group's largest element, `counts` [64 G] what errors count by column.
const char* const kRoundRows =
    "cpu_round_rows(Tensor weight, int base, int residual, Tensor steps, float limit, float offset, "
    "float share, Tensor? counts) -> (Tensor, Tensor, Tensor)";

void round_rows_op(StableIValue* stack, uint64_t, uint64_t) {
  static const std::vector<float> ones(kPlaneGroup, 1.0f);
  Argument weight("weight", stack[0]), steps("steps", stack[3]);
  Argument counts("counts", Argument::optional_handle(stack[7]));

  weight.inspect(2);
  weight.expect_rows();
  const DTypeInfo info = weight.float_dtype();
  const int64_t rows = weight.size(0), length = weight.size(1), groups = plane_groups(length);
  check_sizes("weight", rows, length);
  steps.inspect(1);
  Rounding how = {format_of(stack[1], stack[2]), floats_of(steps, steps.size(0), "the steps"),
                  steps.size(0), float(number(stack[4])), float(number(stack[5])),
                  float(number(stack[6])), ones.data(), counts.given()};
  if (counts.given()) how.counts = floats_of(counts, groups * kPlaneGroup, "64 G");
  const int64_t shape[2] = {rows, length}, of_groups[2] = {rows, groups};
  Result hi(new_tensor(2, shape, aoti_torch_dtype_int8()));
  Result lo(new_tensor(2, shape, aoti_torch_dtype_int8()));
  Result scales(new_tensor(2, of_groups, aoti_torch_dtype_bfloat16()));
  run_round_rows(info.dtype, info.size, weight.matrix(), rows, length, how,
                 static_cast<int8_t*>(hi.data()), static_cast<int8_t*>(lo.data()),
                 static_cast<uint16_t*>(scales.data()));
  stack[0] = hi.release();
  stack[1] = lo.release();
  stack[2] = scales.release();
}

// A plane [rows, 8 * bits * G] uint8 of codes [rows, H] int8.
const char* const kPackPlane = "cpu_pack_plane(Tensor codes, int bits) -> Tensor";

void pack_plane_op(StableIValue* stack, uint64_t, uint64_t) {
  Argument codes("codes", stack[0]);
  const int64_t bits = static_cast<int64_t>(stack[1]);
  if (bits < 2 || bits > 4) fail("a plane of " + std::to_string(bits) + " bits; expected 2, 3 or 4");
  codes.inspect(2);
  codes.expect_dtype(aoti_torch_dtype_int8(), "int8");
  codes.expect_rows();
  const int64_t rows = codes.size(0), length = codes.size(1);
  check_sizes("codes", rows, length);
  if (rows > 1 && codes.stride(0) != length) fail("codes are not contiguous");
  const int64_t shape[2] = {rows, plane_bytes(length, int(bits))};
  Result plane(new_tensor(2, shape, aoti_torch_dtype_uint8()));
  run_pack_plane(static_cast<const int8_t*>(codes.data()), rows, length, int(bits),
                 static_cast<uint8_t*>(plane.data()));
  stack[0] = plane.release();
}

}  // namespace sparse_ffn
