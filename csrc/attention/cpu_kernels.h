// The entry points of the attention kernels of one instruction set.
#pragma once
#include "attention/cpu.h"
#include "common/cpu/simd.h"

namespace kernels::ISA::attention {

void forward(const kernels::attention::Call& c);
void decode(const kernels::attention::DecodeCall& c);
void backward(const kernels::attention::Call& c, const kernels::attention::Gradients& g);

}  // namespace kernels::ISA::attention
