// What the Python module and the per-instruction-set layer norm kernels agree on.
// Math and shapes: kernels/layer_norm/README.md.
#pragma once
#include <cstdint>

#include "common/cpu/dtype.h"

namespace kernels::layer_norm {

struct Parameter {  // weight or bias: [cols] in a dtype of its own; absent where data is null
  const void* data;
  DType dtype;
};

struct ParameterGradient {  // [cols] in the parameter's dtype; not wanted where data is null
  void* data;
  DType dtype;
};

struct ForwardArgs {
  const void* x;  // [rows, cols] in dtype
  DType dtype;
  int64_t rows, cols;  // at least 1 each
  Parameter weight, bias;
  float eps;
  void* y;             // [rows, cols] in dtype
  float *mean, *rstd;  // [rows], or both null where not wanted
};

struct BackwardArgs {
  const void *dy, *x;  // [rows, cols] in dtype
  DType dtype;
  int64_t rows, cols;  // at least 1 each
  Parameter weight;
  const float *mean, *rstd;  // [rows]
  void* dx;                  // [rows, cols] in dtype, or null where not wanted
  ParameterGradient dweight, dbias;
};

struct CpuKernels {
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
};

}  // namespace kernels::layer_norm

// One table per compiled instruction set; common/cpu/isa.h lists them.
namespace kernels::baseline {
extern const layer_norm::CpuKernels layer_norm_kernels;
}
namespace kernels::avx2 {
extern const layer_norm::CpuKernels layer_norm_kernels;
}
namespace kernels::avx512 {
extern const layer_norm::CpuKernels layer_norm_kernels;
}
namespace kernels::avx512_bf16 {
extern const layer_norm::CpuKernels layer_norm_kernels;
}
namespace kernels::neon_dotprod {
extern const layer_norm::CpuKernels layer_norm_kernels;
}
