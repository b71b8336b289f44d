// The instruction sets that were compiled, which of them this machine runs, and the one in use.
#pragma once
#include <span>
#include <stdexcept>
#include <string>
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "attention/cpu.h"
#include "cross_entropy/cpu.h"
#include "int8_matmul/cpu.h"
#include "layer_norm/cpu.h"

namespace kernels {

struct InstructionSet {
  const char* name;
  bool (*supported)();  // by the machine this runs on
  const layer_norm::CpuKernels* layer_norm;
  const attention::CpuKernels* attention;
  const cross_entropy::CpuKernels* cross_entropy;
  const int8_matmul::CpuKernels* int8_matmul;
};

#if defined(__x86_64__)
inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
inline bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#elif defined(__aarch64__)
inline bool has_neon_dotprod() {
#if defined(__APPLE__)
  return true;  // every Mac with an ARM CPU
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return false;
#endif
}
#endif

#define KERNELS_OF(isa)                                                           \
  &isa::layer_norm_kernels, &isa::attention_kernels, &isa::cross_entropy_kernels, \
      &isa::int8_matmul_kernels

// Best first.
inline constexpr InstructionSet kInstructionSets[] = {
#ifdef KERNELS_HAVE_AVX512_BF16
    {"avx512_bf16", has_avx512_bf16, KERNELS_OF(avx512_bf16)},
#endif
#ifdef KERNELS_HAVE_AVX512
    {"avx512", has_avx512, KERNELS_OF(avx512)},
#endif
#ifdef KERNELS_HAVE_AVX2
    {"avx2", has_avx2, KERNELS_OF(avx2)},
#endif
#ifdef KERNELS_HAVE_NEON_DOTPROD
    {"neon_dotprod", has_neon_dotprod, KERNELS_OF(neon_dotprod)},
#endif
    {"baseline", [] { return true; }, KERNELS_OF(baseline)},
};
#undef KERNELS_OF

// The one in use: the best supported, until `use_instruction_set` picks another.
inline const InstructionSet*& current_instruction_set() {
  static const InstructionSet* current = [] {
    const InstructionSet* best = kInstructionSets;
    while (!best->supported()) best++;
    return best;
  }();
  return current;
}

inline void use_instruction_set(const std::string& name) {
  std::string available;
  for (const InstructionSet& set : kInstructionSets) {
    if (!set.supported()) continue;
    if (name == set.name) {
      current_instruction_set() = &set;
      return;
    }
    available += std::string(available.empty() ? "" : ", ") + set.name;
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is not available here (available: " + available + ")");
}

}  // namespace kernels
