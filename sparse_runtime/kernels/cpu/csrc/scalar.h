// Conversions of single elements, the portable bitmap decoder and read loop. Everything has
// internal linkage, as kernels.h asks for.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

// Distinct types, so that overloads tell the 16-bit formats apart.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline float to_float(fp16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t exponent = value.bits >> 10 & 0x1f, mantissa = value.bits & 0x3ff;
  if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

template <class T>
inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bf16 from_float<bf16>(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline fp16 from_float<fp16>(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 2^16 or more
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves the mantissa in the low bits, rounded to nearest even.
    return {uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {uint16_t(sign | (rounded - 0x38000000) >> 13)};
}

inline uint64_t load_word(const uint8_t* p, int64_t num_bytes) {
  uint64_t word = 0;
  for (int64_t i = 0; i < num_bytes; ++i) word |= uint64_t(p[i]) << (8 * i);
  return word;
}

inline int64_t decode_bits(const uint8_t* bitmap, int64_t num_bits, int32_t* rows) {
  int64_t count = 0;
  for (int64_t first = 0; first < num_bits; first += 64) {
    const int64_t left = num_bits - first;
    uint64_t word = load_word(bitmap + first / 8, left >= 64 ? 8 : (left + 7) / 8);
    if (left < 64) word &= (uint64_t(1) << left) - 1;  // padding bits may hold anything
    for (; word; word &= word - 1) rows[count++] = int32_t(first + __builtin_ctzll(word));
  }
  return count;
}

inline uint64_t read_words(const void* data, int64_t num_words) {
  const uint64_t* const p = static_cast<const uint64_t*>(data);
  uint64_t sum = 0;
  for (int64_t i = 0; i < num_words; ++i) sum += p[i];
  return sum;
}

// The fastest way to read found: sixteen streams of 8 KB, each prefetched 512 bytes ahead. One core
// of an Ice Lake server reads 10.8 GB/s in one stream, 12.6 in four, 13.6 in eight, 15.6 like this.
template <class Line, Line (*read_line)(const char*, Line), uint64_t (*sum_of)(Line)>
inline uint64_t read_streams(const void* data, int64_t num_words) {
  constexpr int64_t kStreams = 16, kLength = 8192, kAhead = 512;
  const char* p = static_cast<const char*>(data);
  const char* const end = p + num_words * 8;
  Line sums[kStreams] = {};
  for (; end - p >= kStreams * kLength; p += kStreams * kLength) {
    for (int64_t k = 0; k < kLength; k += 64) {
      const int64_t ahead = k + kAhead < kLength ? k + kAhead : k + kAhead + (kStreams - 1) * kLength;
#pragma GCC unroll 16
      for (int64_t s = 0; s < kStreams; ++s) {
        sums[s] = read_line(p + s * kLength + k, sums[s]);
        __builtin_prefetch(p + s * kLength + ahead, 0, 3);
      }
    }
  }
  uint64_t total = read_words(p, (end - p) / 8);
  for (int64_t s = 0; s < kStreams; ++s) total += sum_of(sums[s]);
  return total;
}

}  // namespace
