// The arithmetic of one row of a matrix instruction, 8 columns at a time, as option mma_rounding
// says. What tensor cores really do between the products is not documented; these three bracket it.
#pragma once
#include <cstdint>

#include "device.h"

namespace ptx {

constexpr int kColumns = 8;

// sums[j] += Σ a[i] b[i][j] over i < k, where b has `stride` columns. The products of 16-bit, tf32
// and fp8 elements are exact in double.
//   rounding 0  in double: the caller's conversion to the result type is the only rounding
//   rounding 1  each product added in turn in fp32
//   rounding 2  chunks of 8 products are aligned to the largest term, truncated to 24 bits and
//               added: worse than any tensor core, to prove that tolerances have room
void accumulate(const double* a, const double* b, int stride, int k, double* sums, int rounding);

// The same for integers, exactly; the caller wraps or saturates.
void accumulate(const int16_t* a, const int16_t* b, int stride, int k, int64_t* sums);

// One result register from (or to) its accumulators: two for f16, one for f32 and s32.
double accumulator(Element d, uint32_t word, int half);
uint32_t result_word(Element d, const double* sums);

}  // namespace ptx
