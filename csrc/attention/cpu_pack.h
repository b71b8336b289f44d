// How attention's operands are laid out for cpu_matmul.h, whatever their dtype and strides.
//
// A step is one float, or with vdpbf16ps a pair of bfloat16.  Other 16-bit types are widened here,
// once per block, and the float kernels do the rest.  `kPack` is the number of values in a step.
#pragma once
#include "attention/cpu.h"
#include "common/cpu/simd.h"
#include "common/cpu/transpose.h"

namespace kernels::ISA::attention {

constexpr int kQueries = 64;  // of a tile: the vectors of one row of scores
constexpr int kKeys = 64;     // of a block

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Floats from one packed row to the next.  Whole multiples of 512 bytes would put the same column
// of 64 rows into a few sets of the cache.
constexpr int packed_row(int columns) {
  const int padded = round_up(columns, 16);
  return padded % 128 == 0 ? padded + 16 : padded;
}

// Up to kLanes values from x on, as floats; the lanes past `count` are 0.
template <class T>
SIMD_INLINE vf load_some(const T* x, int count) {
  return count >= kLanes ? load(x) : load_tail(x, count);
}
template <class T>
SIMD_INLINE void store_some(T* x, vf value, int count) {
  count >= kLanes ? store(x, value) : store_tail(x, value, count);
}

// Up to kLanes steps of a row of `columns` values, from step `step` on.
template <int kPack, class T>
SIMD_INLINE vf load_steps(const T* row, int step, int columns) {
  if constexpr (kPack == 1) {
    return load_some(row + step, columns - step);
  } else {
    const int bytes = int(sizeof(T)) * (columns - kPack * step);
    vf x{};
    memcpy(&x, row + kPack * step, bytes < int(sizeof x) ? bytes : int(sizeof x));
    return x;
  }
}

// out[step][query] for the products that sum over columns; queries from `rows` on are 0.
template <int kPack, class T>
void pack_transposed(const T* x, int64_t row, int rows, int columns, float* out) {
  const int steps = (columns + kPack - 1) / kPack;
  for (int i = 0; i < round_up(rows, kLanes); i += kLanes) {
    for (int step = 0; step < steps; step += kLanes) {
      vf t[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++) {
        t[r] = i + r < rows ? load_steps<kPack>(x + (i + r) * row, step, columns) : vf{};
      }
      transpose(t);
      const int some = steps - step < kLanes ? steps - step : kLanes;
      for (int r = 0; r < some; r++) store(out + (step + r) * kQueries + i, t[r]);
    }
  }
}

// out[row][step] for the products that sum over columns.
template <int kPack, class T>
void pack_columns(const T* x, int64_t row, int rows, int columns, float* out, int out_row) {
  const int steps = (columns + kPack - 1) / kPack;
  for (int r = 0; r < rows; r++) {
    for (int step = 0; step < steps; step += kLanes) {
      store(out + r * out_row + step, load_steps<kPack>(x + r * row, step, columns));
    }
  }
}

// out[row / kPack][column] for the products that sum over rows; columns are padded with zeros to
// whole vectors.
template <int kPack, class T>
void pack_rows(const T* x, int64_t row, int rows, int columns, float* out, int out_row) {
  if constexpr (kPack == 1) {
    pack_columns<1>(x, row, rows, columns, out, out_row);
  } else {
    for (int r = 0; r < rows; r += 2) {
      for (int c = 0; c < columns; c += kLanes) {
        const vu even = (vu)load_some(x + r * row + c, columns - c);
        const vu odd = r + 1 < rows ? (vu)load_some(x + (r + 1) * row + c, columns - c) : vu{};
        store(out + r / 2 * out_row + c, (vf)(even >> 16 | odd));
      }
    }
  }
}

// The two rounded to bfloat16, lane by lane: `even` in the low half, `odd` in the high one.
SIMD_INLINE vf pair(vf even, vf odd) {
#if defined(__AVX512BF16__)
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (vf)_mm512_permutexvar_epi16(interleave, both);
#else
  auto rounded = [](vf x) {
    const vu u = (vu)x;
    return x == x ? u + 0x7fff + ((u >> 16) & 1) : u | 0x400000;
  };
  return (vf)(rounded(even) >> 16 | (rounded(odd) & 0xffff0000));
#endif
}

// Pairs of rows of a block of floats, vectors [first, end); a missing last row is 0.
inline void pair_rows(const float* x, int rows, int first, int end, float* out) {
  for (int j = 0; j < rows; j += 2) {
    for (int v = first; v < end; v++) {
      const float* row = x + j * kQueries + v * kLanes;
      store(out + j / 2 * kQueries + v * kLanes,
            pair(load(row), j + 1 < rows ? load(row + kQueries) : vf{}));
    }
  }
}

// Rows of a block of floats, vectors [first, end), in bfloat16: pairs of neighbouring queries.
inline void narrow_rows(const float* x, int rows, int first, int end, float* out) {
  for (int j = 0; j < rows; j++) {
    for (int v = first; v < end; v++) {
      const int at = j * kQueries + v * kLanes;
      store(reinterpret_cast<BFloat16*>(out) + at, load(x + at));
    }
  }
}

// rows x columns of a tile that holds them transposed, each row times its own `factor`.
template <class T>
void store_transposed(const float* x, const float* factor, T* out, int64_t row, int rows,
                      int columns) {
  for (int i = 0; i < rows; i += kLanes) {
    const vf scale = load(factor + i);
    for (int c = 0; c < columns; c += kLanes) {
      vf t[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++) t[r] = load(x + (c + r) * kQueries + i) * scale;
      transpose(t);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++) {
        if (i + r < rows) store_some(out + (i + r) * row + c, t[r], columns - c);
      }
    }
  }
}

}  // namespace kernels::ISA::attention
