// The table of attention kernels of one instruction set.
#include "attention/cpu_kernels.h"

namespace kernels::ISA {

const kernels::attention::CpuKernels attention_kernels = {attention::forward, attention::decode,
                                                          attention::backward};

}  // namespace kernels::ISA
