// The element types of all kernels by their codes at the Python boundary (kernels/_native.py).
#pragma once

namespace kernels {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace kernels
