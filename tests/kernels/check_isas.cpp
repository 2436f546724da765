// Every instruction set of the processor it runs on against sums in double precision, without torch:
// for processors that are only at hand as an emulator. Prints a line for each, exits 1 on an error.
#include <cmath>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/c/shim.h>

#include "check_rows.h"
#include "check_sums.h"
#include "plane_pass.h"
#include "scalar.h"

// The two functions of torch that parallel.h calls.
extern "C" AOTITorchError torch_get_num_threads(uint32_t* threads) {
  *threads = 3;
  return 0;
}
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t,
                                             void (*run)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = begin; i < end; ++i) run(i, i + 1, context);
  return 0;
}

namespace {

using namespace sparse_ffn;

// A matrix whose rows have NaN between them.
template <class T>
struct Values {
  Values(int64_t rows, int64_t length, double scale)
      : length(length), stride(length + 3), data(size_t(rows * stride) + 1) {
    for (T& value : data) value = from_float<T>(NAN);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < length; ++k)
        data[size_t(r * stride + k)] = from_float<T>(float(next_value() * scale));
  }
  double at(int64_t r, int64_t k) const { return to_float(data[size_t(r * stride + k)]); }
  double dot(int64_t r, const Values& other, int64_t s) const {
    double sum = 0;
    for (int64_t k = 0; k < length; ++k) sum += at(r, k) * other.at(s, k);
    return sum;
  }
  Matrix matrix() const { return {data.data(), stride}; }
  Tokens tokens(int64_t count) const { return {data.data(), stride, count}; }

  int64_t length, stride;
  std::vector<T> data;
};

// Largest error over the largest magnitude.
template <class T>
double error_of(const std::vector<T>& actual, const std::vector<Sum>& expected) {
  double error = 0, largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = fabs(to_float(actual[i]) - expected[i].value);
    if (difference != difference) return INFINITY;
    error = larger(error, difference);
    largest = larger(largest, expected[i].magnitude);
  }
  return largest > 0 ? error / largest : INFINITY;
}

// An FFN with up or without, with biases or without.
struct Form {
  int64_t matrices;
  bool biased;
};

template <class T>
double check(DType dtype, int64_t n, int64_t hidden, int64_t neurons, Activation activation,
             Form form) {
  const int64_t size = sizeof(T), clusters = 5, bytes = (neurons + 7) / 8;
  const Values<T> x(n, hidden, 1), bias(clusters, hidden, 1), up_bias(1, neurons, 1);
  const double scale = 2 / sqrt(double(hidden));
  const Values<T> gate(neurons, hidden, scale), up(neurons, hidden, scale);
  const Values<T> down(neurons, hidden, scale), router(clusters, hidden, scale);
  const int64_t rank = 3;
  const Values<T> correction_down(rank, hidden, scale), correction_up(rank, hidden, scale);
  std::vector<float> biases(size_t(2 * neurons), 0.0f);
  if (form.biased)
    for (float& value : biases) value = float(next_value());
  std::vector<uint8_t> sets(size_t(clusters * bytes));
  for (uint8_t& byte : sets) byte = uint8_t(next_bits() >> 8);
  for (int64_t c = 0; c < clusters; ++c) sets[size_t(c * bytes)] |= 1;

  std::vector<int64_t> ids(size_t(n), -1);
  run_router(dtype, size, x.tokens(n), hidden, {0, {nullptr, 0}, router.matrix(), nullptr},
             clusters, ids.data());
  double worst = 0;
  for (int64_t t = 0; t < n; ++t) {
    double best = -INFINITY;
    for (int64_t c = 0; c < clusters; ++c) best = larger(best, x.dot(t, router, c));
    const int64_t id = ids[size_t(t)];
    if (id < 0 || id >= clusters) return INFINITY;
    worst = larger(worst, best - x.dot(t, router, id));
  }

  std::vector<T> y(size_t(n * hidden));
  std::vector<Sum> expected(size_t(n * hidden));
  const bool gated = form.matrices == 2;
  const float* const gate_bias = form.biased ? biases.data() : nullptr;
  const Inputs inputs = {form.matrices, gate_bias, gate_bias && gated ? gate_bias + neurons : nullptr,
                         activation, 1.0f};
  run_ffn({dtype, size, hidden, neurons, gate.matrix(), gated ? up.matrix() : gate.matrix(),
           down.matrix(), inputs},
          x.tokens(n), {sets.data(), bytes, clusters}, ids.data(),
          {bias.matrix(), rank, correction_down.matrix(), correction_up.matrix()}, y.data());
  for (int64_t t = 0; t < n; ++t) {
    const int64_t id = ids[size_t(t)];
    for (int64_t k = 0; k < hidden; ++k) expected[size_t(t * hidden + k)].add(bias.at(id, k));
    for (int64_t r = 0; r < rank; ++r) {
      const double h = x.dot(t, correction_down, r);
      for (int64_t k = 0; k < hidden; ++k)
        expected[size_t(t * hidden + k)].add(h * correction_up.at(r, k));
    }
    for (int64_t i = 0; i < neurons; ++i) {
      if (!(sets[size_t(id * bytes + i / 8)] >> (i % 8) & 1)) continue;
      double h = act(activation, x.dot(t, gate, i) + biases[size_t(i)]);
      if (gated) h *= x.dot(t, up, i) + biases[size_t(neurons + i)];
      for (int64_t k = 0; k < hidden; ++k) expected[size_t(t * hidden + k)].add(h * down.at(i, k));
    }
  }
  worst = larger(worst, error_of(y, expected));

  std::vector<T> z(size_t(n * neurons));
  std::vector<Sum> expected_z(size_t(n * neurons));
  run_linear(dtype, size, x.tokens(n), gate.matrix(), neurons, hidden, up_bias.data.data(),
             z.data());
  for (int64_t t = 0; t < n; ++t)
    for (int64_t i = 0; i < neurons; ++i) {
      expected_z[size_t(t * neurons + i)].add(x.dot(t, gate, i));
      expected_z[size_t(t * neurons + i)].add(up_bias.at(0, i));
    }
  return larger(worst, error_of(z, expected_z));
}

template <class T>
bool check_all(const char* isa, const char* name, DType dtype, double tolerance) {
  const int64_t shapes[][2] = {{16, 40}, {33, 67}, {8, 1}, {1, 9}, {200, 301}, {700, 70}};
  double worst = 0;
  for (const auto& shape : shapes)
    for (const int64_t n : {1, 2, 3, 7, 64, 70})
      for (const Activation activation : {kSilu, kGelu, kGeluTanh, kRelu, kRelu2})
        for (const Form form : {Form{2, false}, Form{2, true}, Form{1, true}})
          worst = larger(worst, check<T>(dtype, n, shape[0], shape[1], activation, form));
  const bool good = worst <= tolerance;
  printf("%s %s: error %.2g, allowed %.2g: %s\n", isa, name, worst, tolerance,
         good ? "good" : "BAD");
  return good;
}

// 16-bit outputs are rounded as the portable code does it, special values included.
template <class T>
bool check_rounding(const char* isa, const char* name, DType dtype) {
  const Kernels& kernels = current_isa().by_dtype[dtype];
  const int64_t count = kernels.block * 4096;
  // `finish` takes sums in the kernels' own order: pack_token gives it, from 32-bit floats.
  std::vector<T> in(count), out(count);
  std::vector<float> sums(count);
  for (T& value : in) value = from_float<T>(bits_to_float(next_bits() << 16 ^ next_bits()));
  if (kernels.packed_size(count) != count * int64_t(sizeof(float))) return true;  // other layout
  kernels.pack_token(in.data(), count, sums.data());
  kernels.finish(sums.data(), 0, 1, count, 0, count, nullptr, out.data());
  for (int64_t i = 0; i < count; ++i) {
    const float before = to_float(in[size_t(i)]), after = to_float(out[size_t(i)]);
    const bool same = before == after || (before != before && after != after);
    if (!same) return printf("%s %s: %g became %g\n", isa, name, before, after), false;
  }
  // And values that have to be rounded: the order inside a block is found out from the above.
  std::vector<float> order(kernels.block);
  std::vector<T> ramp(kernels.block);
  for (int64_t k = 0; k < kernels.block; ++k) ramp[size_t(k)] = from_float<T>(float(k));
  kernels.pack_token(ramp.data(), kernels.block, order.data());
  for (float& sum : sums) {
    sum = bits_to_float(next_bits() << 16 ^ next_bits());
    if (next_bits() % 2) sum = float(next_value() * 1e-5);  // around the subnormals of fp16
  }
  kernels.finish(sums.data(), 0, 1, count, 0, count, nullptr, out.data());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = i / kernels.block * kernels.block;
    const T actual = out[size_t(start + int64_t(order[size_t(i - start)]))];
    const float expected = to_float(from_float<T>(sums[size_t(i)])), found = to_float(actual);
    const bool same = expected == found || (expected != expected && found != found);
    if (!same)
      return printf("%s %s: %g rounded to %g, expected %g\n", isa, name, sums[size_t(i)], found,
                    expected),
             false;
  }
  return true;
}

// A bound that no rounding crosses, for evidence of some tokens: above all, in one of the gaps, or below
// all. The rounding of tokens to 15 bits changes evidence, some tens for most, by thousandths.
double bound_of(std::vector<double> evidence) {
  constexpr double floor = 0.1;
  const bool all = std::all_of(evidence.begin(), evidence.end(), [](double v) { return v > floor; });
  if (all) evidence.push_back(0.01);
  for (double& value : evidence) value = larger(value, all ? 0.01 : floor);
  std::sort(evidence.begin(), evidence.end());
  std::vector<double> bounds = {evidence.back() * 2};
  for (size_t i = 1; i < evidence.size(); ++i)
    if (evidence[i] > 1.2 * evidence[i - 1]) bounds.push_back(sqrt(evidence[i] * evidence[i - 1]));
  return bounds[next_bits() % bounds.size()];
}

// An FFN that looks at records in planes before it computes; error in parts of the largest output.
double check_look(int64_t n, int64_t hidden, int64_t neurons) {
  const int64_t clusters = 3, bytes = (neurons + 7) / 8;
  const double scale = 2 / sqrt(double(hidden));
  Values<float> x(n, hidden, 1);
  const Values<float> gate(neurons, hidden, scale), up(neurons, hidden, scale);
  const Values<float> down(neurons, hidden, scale);
  const PlaneRowsHere gates(kLookFormat, neurons, hidden), ups(kLookFormat, neurons, hidden);
  std::vector<uint8_t> look, sets(size_t(clusters * bytes)), maybe(sets.size());
  for (size_t i = 0; i < size_t(neurons); ++i)
    append(look, joined({&gates.base[i], &ups.base[i], &gates.scales[i], &ups.scales[i]}));
  for (uint8_t& byte : sets) byte = uint8_t(next_bits() & next_bits());
  for (uint8_t& byte : maybe) byte = uint8_t(next_bits());
  std::vector<int64_t> ids(size_t(n), 0);
  for (int64_t& id : ids) id = int64_t(next_bits() % clusters);
  const int64_t lost = n > 2 ? 1 : -1;  // this token has NaN: it computes all that it looks at
  if (lost >= 0) x.data[size_t(lost * x.stride)] = NAN;

  std::vector<float> factors(size_t(neurons), 0.0f), y(size_t(n * hidden));
  std::vector<Sum> expected(size_t(n * hidden));
  int64_t counts[2] = {0, 0}, computed = 0, looked = 0;
  for (int64_t i = 0; i < neurons; ++i) {
    std::vector<double> evidence;
    for (int64_t t = 0; t < n; ++t) {
      const float* const token = &x.data[size_t(t * x.stride)];
      if (t != lost) evidence.push_back(fabs(act(kSilu, gates.dot(i, token)) * ups.dot(i, token)));
    }
    const double bound = bound_of(evidence);
    factors[size_t(i)] = float(1 / bound);
    for (int64_t t = 0; t < n; ++t) {
      const size_t byte = size_t(ids[size_t(t)] * bytes + i / 8);
      const bool sure = sets[byte] >> (i % 8) & 1, left = (maybe[byte] >> (i % 8) & 1) && !sure;
      looked += left;
      const bool confirmed = t == lost || evidence[size_t(t - (lost >= 0 && t > lost))] > bound;
      if (!sure && !(left && confirmed)) continue;
      ++computed;
      const double h = act(kSilu, x.dot(t, gate, i)) * x.dot(t, up, i);
      for (int64_t k = 0; t != lost && k < hidden; ++k)
        expected[size_t(t * hidden + k)].add(h * down.at(i, k));
    }
  }
  const Verification band = {
      maybe.data(), bytes, {look.data(), int64_t(look.size()) / neurons}, factors.data()};
  run_ffn({kFloat32, 4, hidden, neurons, gate.matrix(), up.matrix(), down.matrix(),
           {2, nullptr, nullptr, kSilu, 1.0f}},
          x.tokens(n), {sets.data(), bytes, clusters, band, counts}, ids.data(), {}, y.data());
  if (counts[0] != computed || counts[1] != looked) return INFINITY;
  for (int64_t k = 0; lost >= 0 && k < hidden; ++k) y[size_t(lost * hidden + k)] = 0;
  return error_of(y, expected);
}

bool check_looks(const char* isa, double tolerance) {
  double worst = 0;
  for (const int64_t hidden : {64, 130, 448, 576, 1100})
    for (const int64_t n : {1, 3, 7, 64, 70})
      for (const int64_t neurons : {37, 301}) worst = larger(worst, check_look(n, hidden, neurons));
  printf("%s looks: error %.2g, allowed %.2g: %s\n", isa, worst, tolerance,
         worst <= tolerance ? "good" : "BAD");
  return worst <= tolerance;
}

// The largest error of linear layers and FFNs over planes, in parts of the largest output.
double check_plane(const PlaneFormat& format, int64_t length, int64_t rows, int64_t n) {
  PlaneRowsHere gate(format, rows, length), up(format, rows, length), down(format, rows, length);
  std::vector<uint8_t> records, look, count, refine;
  for (size_t r = 0; r < size_t(rows); ++r) {
    append(records, joined({&gate.base[r], &gate.residual[r], &gate.scales[r]}));
    append(look, joined({&gate.base[r], &up.base[r], &gate.scales[r], &up.scales[r]}));
    append(count, joined({&down.base[r], &down.scales[r]}));
    append(refine, joined({&gate.residual[r], &up.residual[r], &down.residual[r]}));
  }
  std::vector<float> x(size_t(n * length)), y(size_t(n * rows)), z(size_t(n * length));
  for (float& value : x) value = float(next_value());
  const auto stream = [&](const std::vector<uint8_t>& bytes) {
    return Stream{bytes.data(), int64_t(bytes.size()) / rows};
  };
  const Tokens tokens = {x.data(), length, n};
  run_plane_linear(kFloat32, 4, tokens, format, stream(records), rows, length, nullptr, y.data());
  const PlaneFfn ffn = {kFloat32,     4,
                        length,       rows,
                        format,       stream(look),
                        stream(count), stream(refine),
                        {2, nullptr, nullptr, kRelu, 1.0f}};
  run_plane_ffn(ffn, tokens, {}, nullptr, {nullptr, nullptr, 1.0f, 0.0f}, {}, z.data());
  double worst = 0, largest = 0, worst_ffn = 0, largest_ffn = 0;
  for (int64_t t = 0; t < n; ++t) {
    std::vector<double> sums(size_t(length), 0.0);
    for (int64_t r = 0; r < rows; ++r) {
      const float* const token = x.data() + t * length;
      const double g = gate.dot(r, token), h = std::max(g, 0.0) * up.dot(r, token);
      worst = larger(worst, fabs(double(y[size_t(t * rows + r)]) - g));
      largest = larger(largest, fabs(g));
      for (int64_t k = 0; k < length; ++k)
        sums[size_t(k)] += h * double(down.values[size_t(r * length + k)]);
    }
    for (int64_t k = 0; k < length; ++k) {
      worst_ffn = larger(worst_ffn, fabs(double(z[size_t(t * length + k)]) - sums[size_t(k)]));
      largest_ffn = larger(largest_ffn, fabs(sums[size_t(k)]));
    }
  }
  return larger(worst / largest, worst_ffn / largest_ffn);
}

bool check_planes(const char* isa, double tolerance) {
  double worst = 0;
  for (const int base : {3, 4})
    for (const int residual : {0, 2, 3, 4})
      for (const int64_t length : {64, 130, 448, 576, 1100})
        for (const int64_t n : {1, 3})
          worst = larger(worst, check_plane({base, residual}, length, 37, n));
  printf("%s planes: error %.2g, allowed %.2g: %s\n", isa, worst, tolerance,
         worst <= tolerance ? "good" : "BAD");
  return worst <= tolerance;
}

// Codes and scales of rows, by the instruction set in use.
std::vector<int> rounded(const PlaneFormat& format, const std::vector<float>& rows, int64_t count,
                         int64_t length, const std::vector<float>& counts) {
  const int64_t groups = plane_groups(length);
  const float most = float(1 << (format.base - 1));
  const float steps[3] = {-0.82f / most, -1.0f / most, -1.1f / most};
  const Rounding how = {format, steps, 3, 1e38f, 0.6f, 0.25f, counts.data(), counts.size() > 64};
  std::vector<int8_t> hi(size_t(count * length)), lo(hi.size());
  std::vector<uint16_t> scales(size_t(count * groups));
  run_round_rows(kFloat32, 4, {rows.data(), length}, count, length, how, hi.data(), lo.data(),
                 scales.data());
  std::vector<int> found(hi.begin(), hi.end());
  found.insert(found.end(), lo.begin(), lo.end());
  found.insert(found.end(), scales.begin(), scales.end());
  return found;
}

// Which instruction set rounds does not matter, but where two scales are as good.
bool check_row_rounding(const Isa& isa) {
  int64_t different = 0, all = 0;
  for (const int base : {3, 4})
    for (const int residual : {0, 2, 3, 4})
      for (const int64_t length : {64, 130, 576}) {
        std::vector<float> rows(size_t(37 * length)), counts(size_t(64 * plane_groups(length)));
        for (float& value : rows) value = float(next_value());
        for (float& value : counts) value = length == 64 ? 1.0f : float(fabs(next_value()));
        std::vector<int> found[2];
        const Isa* const both[2] = {&kScalarIsa, &isa};
        for (int i = 0; i < 2; ++i) {
          force_isa(both[i]->name, int64_t(strlen(both[i]->name)));
          found[i] = rounded({base, residual}, rows, 37, length, counts);
        }
        for (size_t k = 0; k < found[0].size(); ++k) different += found[0][k] != found[1][k];
        all += int64_t(found[0].size());
      }
  printf("%s rounding: %lld of %lld numbers differ: %s\n", isa.name, (long long)different,
         (long long)all, 100 * different <= all ? "good" : "BAD");
  return 100 * different <= all;
}

}  // namespace

int main() {
  const Isa* usable[8];
  const int count = available_isas(usable);
  bool good = true;
  for (int i = 0; i < count; ++i) {
    const char* const name = usable[i]->name;
    if (!force_isa(name, int64_t(strlen(name)))) return 1;
    const double sums = 32 * pow(2, -24);
    good &= check_all<bf16>(name, "bf16", kBFloat16, pow(2, -8) + sums);
    good &= check_all<fp16>(name, "fp16", kFloat16, pow(2, -11) + sums);
    good &= check_all<float>(name, "fp32", kFloat32, sums);
    good &= check_looks(name, sums);
    good &= check_planes(name, pow(2, -11));
    good &= check_row_rounding(*usable[i]);
    good &= check_rounding<bf16>(name, "bf16", kBFloat16);
    good &= check_rounding<fp16>(name, "fp16", kFloat16);
    std::vector<uint64_t> words(100003);
    uint64_t sum = 0;
    for (uint64_t& word : words) sum += word = uint64_t(next_bits()) << 32 | next_bits();
    if (run_read(words.data(), int64_t(words.size())) != sum) good = false;
  }
  return good ? 0 : 1;
}
