#include "dispatch.h"

#include <string.h>

#include <atomic>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace sparse_ffn {

namespace {

std::atomic<const Isa*> g_isa{nullptr};

#ifdef __aarch64__
bool has_dot_products() {
#ifdef __linux__
  constexpr unsigned long kAsimdDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kAsimdDotProducts;
#else
  return true;  // every 64-bit Mac
#endif
}
#endif

}  // namespace

int available_isas(const Isa* out[8]) {
  int count = 0;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    out[count++] = &kAvx512Bf16Isa;
  if (avx512) out[count++] = &kAvx512Isa;
  if (avx2) out[count++] = &kAvx2Isa;
#elif defined(__aarch64__)
  if (has_dot_products()) out[count++] = &kNeonDotIsa;
  out[count++] = &kNeonIsa;
#endif
  out[count++] = &kScalarIsa;
  return count;
}

const Isa& current_isa() {
  const Isa* isa = g_isa.load(std::memory_order_relaxed);
  if (!isa) {
    const Isa* usable[8];
    available_isas(usable);
    isa = usable[0];
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return *isa;
}

bool force_isa(const char* name, int64_t length) {
  const Isa* usable[8];
  const int count = available_isas(usable);
  for (int i = 0; i < count; ++i) {
    const bool same = int64_t(strlen(usable[i]->name)) == length &&
                      memcmp(usable[i]->name, name, size_t(length)) == 0;
    if (same || length == 0) {
      g_isa.store(usable[i], std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace sparse_ffn
