// What the Python module and the per-instruction-set cross-entropy kernels agree on.
// Math and shapes: kernels/cross_entropy/README.md.
#pragma once
#include <cstdint>

#include "common/cpu/dtype.h"

namespace kernels::cross_entropy {

struct Call {
  const void* input;  // [rows, cols] in dtype, rows row_stride elements apart
  DType dtype;
  int64_t rows, cols, row_stride;  // cols at least 1
  const int64_t* target;           // [rows] classes, or null where there are probabilities
  const void* probabilities;       // [rows, cols], dense, in dtype or float32
  DType probabilities_dtype;
  const float* weight;  // [cols], or null
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap, logit_scale;  // softcap 0: none
};

struct ForwardArgs {
  Call call;
  float* losses;    // [rows]
  float* lse;       // [2, rows]: log-sum-exp, and what its rounding left over
  float* log_prob;  // [rows], of the target; null where not wanted
  int64_t* best;    // [rows], the first class of the largest logit; null where not wanted
};

struct BackwardArgs {
  Call call;
  const float* dlosses;  // [rows], dlosses_stride elements apart
  int64_t dlosses_stride;
  const float* dlse;  // [rows], or null
  const float* lse;   // [2, rows]
  void* dinput;       // [rows, cols] in dtype, rows dinput_stride apart; may be the input itself
  int64_t dinput_stride;
};

struct CpuKernels {
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
};

}  // namespace kernels::cross_entropy

// One table per compiled instruction set; common/cpu/isa.h lists them.
namespace kernels::baseline {
extern const cross_entropy::CpuKernels cross_entropy_kernels;
}
namespace kernels::avx2 {
extern const cross_entropy::CpuKernels cross_entropy_kernels;
}
namespace kernels::avx512 {
extern const cross_entropy::CpuKernels cross_entropy_kernels;
}
namespace kernels::avx512_bf16 {
extern const cross_entropy::CpuKernels cross_entropy_kernels;
}
namespace kernels::neon_dotprod {
extern const cross_entropy::CpuKernels cross_entropy_kernels;
}
