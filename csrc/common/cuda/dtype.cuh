// The element types kernels accept and their conversion to and from fp32, in which all maths is
// done.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/dtype.h"

namespace kernels {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return __float2half_rn(value);
  }
}

// to[index] = value in a dtype known at run time.
__device__ __forceinline__ void store_as(void* to, DType dtype, int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(to)[index] = value;
  } else {
    static_cast<unsigned short*>(to)[index] = dtype == DType::kBFloat16
                                                  ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                                  : __half_as_ushort(__float2half_rn(value));
  }
}

// Calls f(pointer of the type that `dtype` names). The branch is uniform over the grid; it stands
// outside f so that the loads inside f are issued back to back.
template <typename F>
__device__ __forceinline__ void with_type(DType dtype, const void* pointer, F&& f) {
  if (dtype == DType::kFloat32) {
    f(static_cast<const float*>(pointer));
  } else if (dtype == DType::kBFloat16) {
    f(static_cast<const __nv_bfloat16*>(pointer));
  } else {
    f(static_cast<const __half*>(pointer));
  }
}

// Refuses a code that no kernel was compiled for, before anything is launched.
inline DType checked_dtype(int code) {
  if (code < 0 || code > static_cast<int>(DType::kFloat16)) {
    throw std::invalid_argument("dtype code " + std::to_string(code) + " is not 0, 1 or 2");
  }
  return static_cast<DType>(code);
}

}  // namespace kernels
