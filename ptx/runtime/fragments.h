// Where the lanes of a warp hold the elements of a matrix fragment.
//
// One description for every shape of mma.sync m16n8kK and wgmma m64nNkK (PTX ISA, "Matrix
// multiply-accumulate operation using mma instruction" and "Register fragments and shared memory
// matrix layouts" of wgmma: the figures differ only in the number of elements in a register).
// With group = lane / 4, t = lane % 4 and `packed` elements in a 32-bit register:
//   A  register r, element e:  row group + 8 (r & 1),  k = (r / 2) 4 packed + t packed + e
//   B  register r, element e:  column group,           k = r 4 packed + t packed + e
//   D  32-bit: register r:     row group + 8 (r / 2 & 1),  column 8 (r / 4) + 2 t + (r & 1)
//      16-bit: register r, e:  row group + 8 (r & 1),      column 8 (r / 2) + 2 t + e
// wgmma gives rows 16 w … 16 w + 15 to the w-th warp of the warpgroup.
#pragma once
#include "elements.h"

namespace ptx {

constexpr int kLanes = 32;

// The A fragment of one warp: 16 rows of `k` elements, row_stride elements apart.
template <typename Value>
void unpack_a(Element element, const uint32_t* registers, int lane, int k, Value* a,
              int row_stride) {
  const int packed = 32 / bits_of(element), group = lane / 4, t = lane % 4;
  for (int r = 0; r < 2 * (k / (4 * packed)); r++) {
    const int row = group + 8 * (r & 1), column = r / 2 * 4 * packed + t * packed;
    unpack(element, registers[r], a + row * row_stride + column);
  }
}

// The B fragment of one warp, 8 columns, stored as b[k][column].
template <typename Value>
void unpack_b(Element element, const uint32_t* registers, int lane, int k, Value* b) {
  const int packed = 32 / bits_of(element), group = lane / 4, t = lane % 4;
  Value values[4];
  for (int r = 0; r < k / (4 * packed); r++) {
    unpack(element, registers[r], values);
    for (int e = 0; e < packed; e++) b[(r * 4 * packed + t * packed + e) * 8 + group] = values[e];
  }
}

}  // namespace ptx
