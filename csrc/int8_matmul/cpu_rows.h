// The entry point of the rows op, for the table in cpu.cpp.
#pragma once
#include "int8_matmul/cpu.h"

namespace kernels::ISA::int8_matmul {

void rows(const kernels::int8_matmul::RowsCall& c);

}  // namespace kernels::ISA::int8_matmul
