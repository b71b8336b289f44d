// Tensor maps where kernels keep them: parameters, global and shared memory.
#pragma once
#include <cstdint>

#include "tensor_map.h"

namespace ptx {

// The map at p, checked: readable memory, a valid map of that many dimensions, and published by
// fence.proxy.tensormap if this launch made it. Does not return otherwise.
TensorMap read_tensor_map(const void* p, int dims, uint32_t site);

}  // namespace ptx
