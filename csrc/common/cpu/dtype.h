// The element types of the CPU kernels, their codes at the Python boundary, and their dispatch.
#pragma once
#include <cstdint>

namespace kernels {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

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
