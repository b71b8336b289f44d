// Rows as int8 with a scale each, layer norm before it if asked for, on CPUs; compiled once per
// instruction set.
//
// One thread has a row: it is read from memory once, and swept again in the core's cache.
#include "int8_matmul/cpu_rows.h"

#include "common/cpu/parallel.h"
#include "int8_matmul/cpu_quantize.h"
#include "layer_norm/cpu_kernel.h"

namespace kernels::ISA::int8_matmul {
namespace {

using kernels::int8_matmul::Parameter;
using kernels::int8_matmul::RowsCall;

constexpr int64_t kChunk = 16384;  // columns that are summed up in float

const float* as_float(Parameter p, float* buffer, int64_t n, float absent) {
  if (p.data && p.dtype == DType::kFloat32) return static_cast<const float*>(p.data);
  for (int64_t i = 0; !p.data && i < n; i++) buffer[i] = absent;
  if (p.data) {
    dispatch_float(p.dtype, [&](auto type) {
      layer_norm::to_float(static_cast<const decltype(type)*>(p.data), buffer, n);
    });
  }
  return buffer;
}

// y = layer_norm(x).  The deviations from a first estimate correct both the mean and the variance
// for its rounding (Chan, Golub and LeVeque, 1983).
void normalize(const float* x, int64_t n, const float* weight, const float* bias, float eps,
               float* y) {
  double total = 0, shift = 0, squares = 0;
  for (int64_t i = 0; i < n; i += kChunk) {
    float sum;
    layer_norm::row_sums<1, false>(x + i, n - i < kChunk ? n - i : kChunk, nullptr, &sum);
    total += double(sum);
  }
  const float estimate = float(total / double(n));
  for (int64_t i = 0; i < n; i += kChunk) {
    layer_norm::Deviations d;
    layer_norm::row_deviations<1>(x + i, n - i < kChunk ? n - i : kChunk, &estimate, &d);
    shift += double(d.sum) / double(n);
    squares += double(d.squares) / double(n);
  }
  const double variance = squares - shift * shift;
  const float mean = float(double(estimate) + shift);
  const float rstd = 1.f / sqrtf(float(variance < 0 ? 0 : variance) + eps);
  layer_norm::row_output<false>(x, n, mean, rstd, weight, bias, y, x);
}

template <class T>
void quantize_row(const T* x, int64_t n, int8_t* values, float* scale) {
  const Scaling s = scaling_of(largest_bits(x, n));
  *scale = s.scale;
  if (s.inverse == 0.f) {
    memset(values, 0, size_t(n));
  } else {
    quantize(x, n, s.inverse, 0, values);
  }
}

template <class T>
void rows_as(const RowsCall& c) {
  const int64_t n = c.cols;
  on_threads(threads_for(c.rows * n), [&] {
    ThreadMemory memory(c.normalized ? 4 * ThreadMemory::rounded(n) : 0);
    const float *weight = nullptr, *bias = nullptr;
    float *wide = nullptr, *y = nullptr;
    if (c.normalized) {
      weight = as_float(c.weight, memory.take(n), n, 1.f);
      bias = as_float(c.bias, memory.take(n), n, 0.f);
      wide = memory.take(n);
      y = memory.take(n);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < c.rows; row++) {
      const T* x = static_cast<const T*>(c.x) + row * c.x_row;
      int8_t* values = c.values + row * n;
      if (!c.normalized) {
        quantize_row(x, n, values, c.scale + row);
        continue;
      }
      if constexpr (sizeof(T) == sizeof(float)) {
        normalize(x, n, weight, bias, c.eps, y);
      } else {
        layer_norm::to_float(x, wide, n);
        normalize(wide, n, weight, bias, c.eps, y);
      }
      quantize_row(y, n, values, c.scale + row);
    }
  });
}

}  // namespace

void rows(const RowsCall& c) {
  dispatch_float(c.dtype, [&](auto type) { rows_as<decltype(type)>(c); });
}

}  // namespace kernels::ISA::int8_matmul
