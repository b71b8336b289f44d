// The element types of the CPU kernels, and their dispatch.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace kernels {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls f with a value of the C++ type that `dtype` names.
template <class F>
inline void dispatch_float(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

}  // namespace kernels
