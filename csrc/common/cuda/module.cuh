// Calls from Python into the CUDA kernels: tensors come as addresses (0: absent), dtypes as codes
// (dtype.cuh), the stream as its handle.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace kernels {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace kernels
