// Random numbers, and random rows in planes.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "kernels.h"
#include "scalar.h"

namespace {

using namespace sparse_ffn;

uint64_t g_state = 1;
uint32_t next_bits() {
  g_state = g_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(g_state >> 33);
}
double next_value() { return double(next_bits()) / double(1u << 30) - 1.0; }

// Rows in planes, and what they stand for.
struct PlaneRowsHere {
  PlaneRowsHere(const PlaneFormat& format, int64_t rows, int64_t length)
      : length(length), groups(plane_groups(length)), values(size_t(rows * length)) {
    const float finer = 1.0f / float(1 << format.residual);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<int> high(size_t(groups * 64), 0), low(size_t(groups * 64), 0);
      for (int64_t k = 0; k < length; ++k) {
        high[size_t(k)] = int(next_bits() % (1u << format.base)) - (1 << (format.base - 1));
        if (format.residual)
          low[size_t(k)] =
              int(next_bits() % (1u << format.residual)) - (1 << (format.residual - 1));
      }
      base.push_back(pack(high, format.base));
      residual.push_back(format.residual ? pack(low, format.residual) : std::vector<uint8_t>());
      scales.emplace_back(size_t(2 * groups));
      for (int64_t g = 0; g < groups; ++g) {
        const bf16 scale = from_float<bf16>(float(next_value() * 0.1));
        memcpy(&scales.back()[size_t(2 * g)], &scale, 2);
        for (int64_t k = 64 * g; k < 64 * (g + 1) && k < length; ++k)
          values[size_t(r * length + k)] =
              to_float(scale) * (float(high[size_t(k)]) + finer * float(low[size_t(k)]));
      }
    }
  }

  // As planes.py draws it.
  std::vector<uint8_t> pack(const std::vector<int>& codes, int bits) const {
    std::vector<uint8_t> out;
    for (int64_t first = 0; first < groups; first += 4) {
      const int64_t u = std::min<int64_t>(4, groups - first), size = 16 * u;
      std::vector<int> v[4];
      for (int c = 0; c < 4; ++c) {
        v[c].resize(size_t(size));
        for (int q = 0; q < 4; ++q)
          for (int64_t g = 0; g < u; ++g)
            for (int b = 0; b < 4; ++b)
              v[c][size_t((q * u + g) * 4 + b)] =
                  codes[size_t(64 * (first + g) + 16 * c + 4 * q + b)] + (1 << (bits - 1));
      }
      const auto n = [&](int64_t k) { return v[2][size_t(k)] | (v[3][size_t(k)] >> 2) << 3; };
      for (int64_t k = 0; k < size; ++k) {
        const int a = v[0][size_t(k)], b = v[1][size_t(k)], c = v[2][size_t(k)];
        const int d = v[3][size_t(k)];
        if (bits == 2) out.push_back(uint8_t(a | b << 2 | c << 4 | d << 6));
        if (bits == 3) out.push_back(uint8_t(a | b << 3 | (d & 3) << 6));
        if (bits == 4) out.push_back(uint8_t(a | b << 4));
      }
      if (bits == 3)
        for (int64_t k = 0; k < size / 2; ++k) out.push_back(uint8_t(n(k) | n(k + size / 2) << 4));
      if (bits == 4)
        for (int64_t k = 0; k < size; ++k)
          out.push_back(uint8_t(v[2][size_t(k)] | v[3][size_t(k)] << 4));
    }
    return out;
  }

  double dot(int64_t r, const float* x) const {
    double sum = 0;
    for (int64_t k = 0; k < length; ++k) sum += double(values[size_t(r * length + k)]) * x[k];
    return sum;
  }

  int64_t length, groups;
  std::vector<float> values;
  std::vector<std::vector<uint8_t>> base, residual, scales;
};

std::vector<uint8_t> joined(std::initializer_list<const std::vector<uint8_t>*> parts) {
  std::vector<uint8_t> out;
  for (const auto* part : parts) out.insert(out.end(), part->begin(), part->end());
  return out;
}

// Records of a stream, one after the other.
void append(std::vector<uint8_t>& stream, const std::vector<uint8_t>& record) {
  stream.insert(stream.end(), record.begin(), record.end());
}

}  // namespace
