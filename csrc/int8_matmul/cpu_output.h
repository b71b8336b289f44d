// From sums to outputs: scales, bias, activation, and the output's dtype.
#pragma once
#include "int8_matmul/cpu.h"
#include "int8_matmul/cpu_tiles.h"

namespace kernels::ISA::int8_matmul {

using kernels::int8_matmul::Activation;
using kernels::int8_matmul::MatmulCall;
using kernels::int8_matmul::Mode;

// The share of a standard normal distribution below -|x|, erfc(u) / 2 with u = |x| / sqrt(2), as
// exp(R(u) - u^2) / 2.  R(u) = log(erfcx(u)) is a polynomial of degree 10 up to u = 4 (least
// squares weighted towards the largest error; erfc is within 1.2e-8).  Beyond, where erfc is below
// 2e-8, R stays what it is at 4.
SIMD_INLINE vf normal_tail(vf x) {
  const vf size = (vf)((vu)x & 0x7fffffff) * 0.707106781f;
  const vf u = min(set1(4.f), size);
  vf r = set1(-5.97421509e-7f);
  r = r * u + 1.26703061e-5f;
  r = r * u - 1.15340275e-4f;
  r = r * u + 5.72940960e-4f;
  r = r * u - 1.48478336e-3f;
  r = r * u - 9.73516399e-5f;
  r = r * u + 1.93442351e-2f;
  r = r * u - 1.02850657e-1f;
  r = r * u + 3.63393203e-1f;
  r = r * u - 1.12837987f;
  return exp(r * u - size * size) * 0.5f;
}

SIMD_INLINE vf activated(vf x, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return max(vf{}, x);
    case Activation::kGelu: {
      const vf tail = normal_tail(x);
      return x * (x > 0.f ? 1.f - tail : tail);
    }
    case Activation::kGeluTanh:
      return 0.5f * x * (1.f + tanh(0.797884561f * (x + 0.044715f * (x * x * x))));
  }
  return x;
}

inline int64_t output_size(const MatmulCall& c) {  // in bytes
  return c.mode == Mode::kRaw || c.y_dtype == DType::kFloat32 ? 4 : 2;
}

// Outputs larger than the cores' own caches are written past them, without being read first.
inline bool streams_output(const MatmulCall& c) {
  constexpr int64_t kFromBytes = int64_t{4} << 20;
  const int64_t row_bytes = c.cols * output_size(c);
  return c.mode != Mode::kRaw && c.rows * row_bytes >= kFromBytes && uintptr_t(c.y) % 64 == 0 &&
         row_bytes % 64 == 0;
}

// What outputs of one block of columns are made with; zeros past its columns.
struct Columns {
  int64_t first;
  int count;
  bool streams;
  alignas(64) float scale[kBlock], bias[kBlock];

  Columns(const MatmulCall& c, int64_t first_column, int columns)
      : first(first_column), count(columns), streams(streams_output(c)), scale{}, bias{} {
    const float* scales = c.weight_scale.data;
    for (int i = 0; i < count; i++) {
      scale[i] = scales ? scales[(first + i) * c.weight_scale.step] : 1.f;
    }
    if (!c.bias) return;
    dispatch_float(c.bias_dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(c.bias) + first;
      for_each_vector(count, [&](int64_t i, auto lanes, int) {
        store(bias + i, load(from + i, lanes), lanes);
      });
    });
  }
};

// Fetches the lines of a row of outputs that will be overwritten.
SIMD_INLINE void fetch_row(const MatmulCall& c, const Columns& columns, int64_t row) {
  if (columns.streams) return;
  const int64_t size = output_size(c);
  char* y = static_cast<char*>(c.y) + (row * c.cols + columns.first) * size;
  for (int64_t i = 0; i < columns.count * size; i += 64) __builtin_prefetch(y + i, 1);
}

// One row of outputs from its values before the activation, which are overwritten.
inline void write_row(const MatmulCall& c, const Columns& columns, int64_t row, float* values) {
  const int64_t at = row * c.cols + columns.first;
  if (c.mode == Mode::kRaw) {
    memcpy(static_cast<int32_t*>(c.y) + at, values, size_t(columns.count) * sizeof(int32_t));
    return;
  }
  auto activate = [&](auto which) {
    for (int i = 0; i < columns.count; i += kLanes) {
      store(values + i, activated(load(values + i), decltype(which)::value));
    }
  };
  switch (c.activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      activate(std::integral_constant<Activation, Activation::kRelu>());
      break;
    case Activation::kGelu:
      activate(std::integral_constant<Activation, Activation::kGelu>());
      break;
    case Activation::kGeluTanh:
      activate(std::integral_constant<Activation, Activation::kGeluTanh>());
      break;
  }
  dispatch_float(c.y_dtype, [&](auto type) {
    auto* y = static_cast<decltype(type)*>(c.y) + at;
    auto write_all = [&](auto streams) {
      for_each_vector(columns.count, [&](int64_t i, auto lanes, int) {
        write<decltype(streams)::value>(y + i, load(values + i), lanes);
      });
    };
    columns.streams ? write_all(std::true_type()) : write_all(std::false_type());
  });
}

SIMD_INLINE vf as_float(vi sum) { return __builtin_convertvector(sum, vf); }
SIMD_INLINE vf as_float(vf sum) { return sum; }

// Up to kLanes rows of a panel from row `first` on: sums [column][kPanelRows], one row a lane, and
// what is added to each column's sums.
template <class Sums, class Sum>
[[gnu::noinline]] void write_group(const MatmulCall& c, const Columns& columns, int64_t first,
                                   int rows, const float* row_scale, const Sum* sums,
                                   const Sum* offset) {
  alignas(64) float values[kLanes][kBlock];
  const vf scale = load(row_scale);
  for (int r = 0; r < rows; r++) fetch_row(c, columns, first + r);  // from L2 into L1
  const bool raw = c.mode == Mode::kRaw;
  for (int column = 0; column < columns.count; column += kLanes) {
    vf x[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      const Sums sum = load_vector<Sums>(sums + (column + i) * kPanelRows) + offset[column + i];
      x[i] = as_float(sum) * (columns.scale[column + i] * scale) + columns.bias[column + i];
      if (raw) x[i] = (vf)sum;
    }
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) store(values[i] + column, x[i]);
  }
  for (int r = 0; r < rows; r++) write_row(c, columns, first + r, values[r]);
}

// One row whose sums lie side by side.
template <class Sums, class Sum>
void write_single(const MatmulCall& c, const Columns& columns, int64_t row, float row_scale,
                  const Sum* sums) {
  alignas(64) float values[kBlock];
  for (int i = 0; i < columns.count; i += kLanes) {
    const Sums sum = load_vector<Sums>(sums + i);
    const vf y = as_float(sum) * (load(columns.scale + i) * row_scale) + load(columns.bias + i);
    store(values + i, c.mode == Mode::kRaw ? (vf)sum : y);
  }
  write_row(c, columns, row, values);
}

}  // namespace kernels::ISA::int8_matmul
