// What the Python module and the per-instruction-set int8 matmul kernels agree on.
// Math and shapes: kernels/int8_matmul/README.md.
#pragma once
#include <cstdint>

#include "common/cpu/dtype.h"

namespace kernels::int8_matmul {

enum class Mode : int {
  kRaw = 0,         // x is int8, y the int32 sums
  kInt8 = 1,        // x is int8 with scales
  kDynamic = 2,     // x is quantised by a scale for each row
  kStatic = 3,      // x is quantised by the one scale given
  kWeightOnly = 4,  // x is used as it is
};
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3 };

struct Scales {
  const float* data;  // null: 1
  int64_t step;       // 1: one for each row, 0: one for all
};

struct MatmulCall {
  Mode mode;
  Activation activation;
  int64_t rows, cols, depth;  // M, N, K; each at least 1
  const void* x;              // [rows, depth], rows x_row elements apart
  DType x_dtype;              // where x is not int8
  int64_t x_row;
  const int8_t* weight;  // [cols, depth] with any strides, one of which is 1
  int64_t weight_row, weight_column;
  Scales x_scale, weight_scale;
  const void* bias;  // [cols] or null
  DType bias_dtype;
  void* y;  // [rows, cols], dense; int32 where raw
  DType y_dtype;
};

struct Parameter {
  const void* data;  // [cols] or null
  DType dtype;
};

struct RowsCall {
  int64_t rows, cols;
  const void* x;  // [rows, cols], rows x_row elements apart
  DType dtype;
  int64_t x_row;
  bool normalized;         // layer norm comes first
  Parameter weight, bias;  // of the layer norm
  float eps;
  int8_t* values;  // [rows, cols]
  float* scale;    // [rows]
};

struct CpuKernels {
  void (*matmul)(const MatmulCall&);
  void (*rows)(const RowsCall&);
};

}  // namespace kernels::int8_matmul

// One table per compiled instruction set; common/cpu/isa.h lists them.
namespace kernels::baseline {
extern const int8_matmul::CpuKernels int8_matmul_kernels;
}
namespace kernels::avx2 {
extern const int8_matmul::CpuKernels int8_matmul_kernels;
}
namespace kernels::avx512 {
extern const int8_matmul::CpuKernels int8_matmul_kernels;
}
namespace kernels::avx512_bf16 {
extern const int8_matmul::CpuKernels int8_matmul_kernels;
}
namespace kernels::neon_dotprod {
extern const int8_matmul::CpuKernels int8_matmul_kernels;
}
