// Operands of a head's products: taken where they lie, or packed into the thread's memory.
#pragma once
#include "attention/cpu_matmul.h"
#include "attention/cpu_pack.h"
#include "attention/cpu_tiles.h"
#include "common/cpu/parallel.h"

namespace kernels::ISA::attention {

// Calls f with a value of the C++ type that the kernel of `Dot` reads from memory.
template <class Dot, class F>
SIMD_INLINE void dispatch_element(DType dtype, F f) {
  if constexpr (Dot::kPack == 1) {
    dispatch_float(dtype, f);
  } else {
    f(BFloat16{});
  }
}

struct Operand {
  const float* data;  // steps
  int64_t row;        // steps from one row to the next
};

// Float rows are broadcast from where they lie if these are close together: far apart they would
// share a few sets of the cache, and are copied.
constexpr bool close_together(int64_t row, int columns) {
  return row >= columns && row <= 2 * columns && row % 256 != 0;
}

// Steps along the columns, or along the rows, of rows [begin, end).
template <class Dot>
Operand columns_operand(const Head& h, const Heads& x, int64_t head, int64_t begin, int64_t end,
                        int columns, float* buffer) {
  Operand operand{buffer, packed_row(columns)};
  dispatch_element<Dot>(h.call.dtype, [&](auto type) {
    const auto* data = h.rows<const decltype(type)>(x, head, begin);
    if constexpr (sizeof type == sizeof(float)) {
      if (close_together(x.row, columns)) {
        operand = {data, x.row};
        return;
      }
    }
    pack_columns<Dot::kPack>(data, x.row, int(end - begin), columns, buffer, packed_row(columns));
  });
  return operand;
}
template <class Dot>
Operand rows_operand(const Head& h, const Heads& x, int64_t head, int64_t begin, int64_t end,
                     int columns, float* buffer) {
  if constexpr (Dot::kPack == 1)
    return columns_operand<Dot>(h, x, head, begin, end, columns, buffer);
  dispatch_element<Dot>(h.call.dtype, [&](auto type) {
    pack_rows<Dot::kPack>(h.rows<const decltype(type)>(x, head, begin), x.row, int(end - begin),
                          columns, buffer, packed_row(columns));
  });
  return {buffer, packed_row(columns)};
}

// The part of S^T = A B (or dP^T) in rectangle `r`: A has steps along its columns and starts at
// `begin`, B is a transposed tile.
template <class Dot>
SIMD_INLINE void multiply_columns(const Rectangle& r, int begin, Operand a, const float* b,
                                  int columns, float* out, Fetcher* fetcher = nullptr) {
  const int first = r.first_vector * kLanes;
  matmul<Dot, Write::kSet>({.a = a.data + (r.key - begin) * a.row,
                            .a_row = a.row,
                            .a_step = 1,
                            .b = b + first,
                            .b_step = kQueries,
                            .c = out + first,
                            .c_row = kQueries,
                            .scale = nullptr,
                            .fetcher = fetcher},
                           r.keys, r.end_vector - r.first_vector,
                           (columns + Dot::kPack - 1) / Dot::kPack);
}

// Has rows [begin, end) of a head fetched, as far as there are any.
inline void fetch(Fetcher& fetcher, const Head& h, const Heads& x, int64_t head, int64_t begin,
                  int64_t end, int columns) {
  const int64_t size = h.call.dtype == DType::kFloat32 ? 4 : 2;
  const char* rows = static_cast<const char*>(x.data) +
                     (h.sequence.batch * x.batch + head * x.head + begin * x.row) * size;
  fetcher.add(rows, x.row * size, int(end - begin), columns * size);
}

// Threads worth using.
inline int threads_for_scores(const Call& c) {
  constexpr int64_t kScoresPerElement = 8;  // what takes as long as an element of layer norm
  const int64_t window = c.left < 0 || c.right < 0 ? c.keys : c.left + c.right + 1;
  const int64_t seen = window < c.keys ? window : c.keys;
  const int64_t scores = c.batch * c.heads * c.queries * seen;
  return threads_for(scores * (c.head_dim + c.value_dim) / 128 * kScoresPerElement);
}

}  // namespace kernels::ISA::attention
