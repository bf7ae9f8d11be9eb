// Which object's loops run here: the newest instruction set that the machine has.
#pragma once
#include <cstdlib>
#include <string>

namespace thresholdnet {

#if defined(__x86_64__)
template <class T>
const T& chosen(const T& baseline, const T& avx2, const T& avx512, const T& avx512_bf16) {
  const char* wish = std::getenv("THRESHOLDNET_CPU");  // baseline, avx2, avx512: less than the machine has
  const std::string limit = wish ? wish : "";
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4 && limit != "baseline" && limit != "avx2")
    return limit != "avx512" && __builtin_cpu_supports("avx512bf16") ? avx512_bf16 : avx512;
  if (v3 && limit != "baseline") return avx2;
  return baseline;
}

template <class T>
const T& chosen(const T& baseline, const T& avx2, const T& avx512) {  // of loops that know no bfloat16
  return chosen(baseline, avx2, avx512, avx512);
}
#endif

}  // namespace thresholdnet
