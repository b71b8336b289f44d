// The arithmetic of cp.reduce.async.bulk.tensor.
#pragma once
#include "bulk_copy.h"

namespace ptx {

// target[i] = reduction(target[i], values[i]) for `bytes` bytes of elements.
void reduce_row(TensorElement, BulkReduction, unsigned char* target, const unsigned char* values,
                uint32_t bytes, uint32_t site);

}  // namespace ptx
