// Layer norm on CPUs: which thread does which rows; compiled once per instruction set.
//
// A row up to kChunk columns stays in the core's cache: one thread reads it from memory once and
// sweeps it there.  A longer row is cut into chunks whose partial sums are added in order.
// Results never depend on the number of threads: dweight and dbias are summed over fixed groups of
// rows, the groups are added in order, and chunks are cut by the row length alone.
#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "layer_norm/cpu_kernel.h"

namespace kernels::ISA {
namespace layer_norm {
namespace {

using kernels::layer_norm::BackwardArgs;
using kernels::layer_norm::ForwardArgs;
using kernels::layer_norm::Parameter;
using kernels::layer_norm::ParameterGradient;

constexpr int64_t kChunk = 16384;      // columns: 64 KiB of floats
constexpr int64_t kRowsPerGroup = 32;  // at least, so that partial sums stay a small cost
constexpr int64_t kMaxGroups = 64;
constexpr int64_t kTile = 2048;  // columns of one work item of a long row's dweight

// Output larger than the cores' own caches is written past them: without reading what is
// overwritten, forward and backward of 4096 x 1024 bfloat16 took 20 % less time.
template <class T>
bool use_stream(const void* out, int64_t rows, int64_t cols) {
  constexpr int64_t kFromBytes = int64_t{4} << 20;
  return rows * cols * int64_t(sizeof(T)) >= kFromBytes && uintptr_t(out) % 64 == 0 &&
         cols * int64_t(sizeof(T)) % 64 == 0;
}

// A parameter as float, or `absent` everywhere; converted into `buffer` unless it is float already.
const float* as_float(Parameter p, float* buffer, int64_t begin, int64_t n, float absent) {
  if (!p.data) {
    for (int64_t i = 0; i < n; i++) buffer[i] = absent;
    return buffer;
  }
  if (p.dtype == DType::kFloat32) return static_cast<const float*>(p.data) + begin;
  dispatch_float(p.dtype, [&](auto t) {
    to_float(static_cast<const decltype(t)*>(p.data) + begin, buffer, n);
  });
  return buffer;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Statistics {
  float mean, rstd;
};

// The corrected two-pass algorithm (Chan, Golub and LeVeque, 1983): the deviations from the first
// estimate correct both the mean and the variance for its rounding.
Statistics corrected(float estimate, double sum, double squares, int64_t cols, float eps) {
  const double shift = sum / double(cols);
  const double variance = squares / double(cols) - shift * shift;
  return {float(double(estimate) + shift),
          1.f / sqrtf(float(variance < 0 ? 0 : variance) + eps)};  // a NaN stays NaN
}

void keep(const ForwardArgs& a, int64_t row, Statistics s) {
  if (!a.mean) return;
  a.mean[row] = s.mean;
  a.rstd[row] = s.rstd;
}

template <bool Stream, int kRows, class T>
void forward_some_rows(const ForwardArgs& a, int64_t row, const float* weight, const float* bias,
                       float* wide) {
  const int64_t n = a.cols;
  const T* x = static_cast<const T*>(a.x) + row * n;
  constexpr bool kWiden = sizeof(T) != sizeof(float);
  float total[kRows], estimate[kRows];
  Deviations d[kRows];
  Statistics s[kRows];
  row_sums<kRows, kWiden>(x, n, wide, total);
  for (int r = 0; r < kRows; r++) estimate[r] = total[r] / float(n);
  auto finish = [&](const auto* values) {
    row_deviations<kRows>(values, n, estimate, d);
    for (int r = 0; r < kRows; r++) {
      s[r] = corrected(estimate[r], d[r].sum, d[r].squares, n, a.eps);
      keep(a, row + r, s[r]);
    }
    for (int r = 0; r < kRows; r++) {
      row_output<Stream>(values + r * n, n, s[r].mean, s[r].rstd, weight, bias,
                         static_cast<T*>(a.y) + (row + r) * n, x + (kRows + r) * n);
    }
  };
  if constexpr (kWiden) {
    finish(wide);
  } else {
    finish(x);
  }
}

template <bool Stream, class T>
void forward_rows(const ForwardArgs& a) {
  const int64_t n = a.cols, pairs = ceil_div(a.rows, 2);
  on_threads(threads_for(a.rows * n), [&] {
    const Scratch scratch(2, n), wide(1, 2 * n);
    const float* weight = as_float(a.weight, scratch[0], 0, n, 1.f);
    const float* bias = as_float(a.bias, scratch[1], 0, n, 0.f);
#pragma omp for schedule(static) nowait
    for (int64_t pair = 0; pair < pairs; pair++) {
      const int64_t row = 2 * pair;
      if (row + 1 < a.rows) {
        forward_some_rows<Stream, 2, T>(a, row, weight, bias, wide[0]);
      } else {
        forward_some_rows<Stream, 1, T>(a, row, weight, bias, wide[0]);
      }
    }
    if constexpr (Stream) stream_fence();
  });
}

// f(chunk, begin, length) for the chunks of a row.
template <class F>
void for_each_chunk(int64_t cols, int threads, F f) {
  parallel_for(ceil_div(cols, kChunk), threads, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, rest = cols - begin;
    f(chunk, begin, rest < kChunk ? rest : kChunk);
  });
}

// The chunks' partial sums in order: the same total for any number of threads.
double ordered_sum(const float* partial, int64_t chunks) {
  double total = 0;
  for (int64_t c = 0; c < chunks; c++) total += double(partial[c]);
  return total;
}

template <class T>
void forward_long_row(const ForwardArgs& a, int64_t row, int threads) {
  const int64_t n = a.cols, chunks = ceil_div(n, kChunk);
  const T* x = static_cast<const T*>(a.x) + row * n;
  T* y = static_cast<T*>(a.y) + row * n;
  const Scratch partial(2, chunks);
  for_each_chunk(n, threads, [&](int64_t chunk, int64_t i, int64_t length) {
    row_sums<1, false>(x + i, length, nullptr, partial[0] + chunk);
  });
  const float estimate = float(ordered_sum(partial[0], chunks) / double(n));
  for_each_chunk(n, threads, [&](int64_t chunk, int64_t i, int64_t length) {
    Deviations d;
    row_deviations<1>(x + i, length, &estimate, &d);
    partial[0][chunk] = d.sum;
    partial[1][chunk] = d.squares;
  });
  const Statistics s = corrected(estimate, ordered_sum(partial[0], chunks),
                                 ordered_sum(partial[1], chunks), n, a.eps);
  for_each_chunk(n, threads, [&](int64_t, int64_t i, int64_t length) {
    const Scratch scratch(2, length);
    const float* weight = as_float(a.weight, scratch[0], i, length, 1.f);
    const float* bias = as_float(a.bias, scratch[1], i, length, 0.f);
    row_output<false>(x + i, length, s.mean, s.rstd, weight, bias, y + i, x + i);
  });
  keep(a, row, s);
}

// Threads over rows where there are enough of them, else within each row.
template <class F>
void for_each_long_row(int64_t rows, int64_t cols, F f) {
  const int threads = threads_for(rows * cols);
  if (rows >= threads) {
    parallel_for(rows, threads, [&](int64_t row) { f(row, 1); });
  } else {
    for (int64_t row = 0; row < rows; row++) f(row, threads);
  }
}

template <class T>
void forward_as(const ForwardArgs& a) {
  if (a.cols > kChunk) {
    for_each_long_row(a.rows, a.cols,
                      [&](int64_t row, int threads) { forward_long_row<T>(a, row, threads); });
  } else if (use_stream<T>(a.y, a.rows, a.cols)) {
    forward_rows<true, T>(a);
  } else {
    forward_rows<false, T>(a);
  }
}

// The groups of rows whose sums of dweight and dbias are kept apart.
struct Groups {
  int64_t count, rows_per_group;
  explicit Groups(int64_t rows) {
    int64_t wanted = rows / kRowsPerGroup;
    wanted = wanted < 1 ? 1 : wanted < kMaxGroups ? wanted : kMaxGroups;
    rows_per_group = ceil_div(rows, wanted);
    count = ceil_div(rows, rows_per_group);
  }
};

// dweight, dbias [cols] = the groups' partial sums added in order.
void add_groups(const Scratch& partial, int64_t groups, const BackwardArgs& a) {
  const int64_t n = a.cols;
  parallel_for(ceil_div(n, kTile), threads_for(groups * n), [&](int64_t tile) {
    const int64_t begin = tile * kTile, length = n - begin < kTile ? n - begin : kTile;
    auto add = [&](int64_t which, const ParameterGradient& gradient) {
      if (!gradient.data) return;
      dispatch_float(gradient.dtype, [&](auto t) {
        auto* out = static_cast<decltype(t)*>(gradient.data) + begin;
        for_each_vector(length, [&](int64_t i, auto lanes, int) {
          vf total{};
          for (int64_t g = 0; g < groups; g++) {
            total += load(partial[2 * g + which] + begin + i, lanes);
          }
          store(out + i, total, lanes);
        });
      });
    };
    add(0, a.dweight);
    add(1, a.dbias);
  });
}

template <bool Stream, bool WithDx, bool WithParameters, class T>
void backward_rows(const BackwardArgs& a) {
  const int64_t n = a.cols;
  const Groups groups(a.rows);
  const Scratch partial(WithParameters ? 2 * groups.count : 0, n);
  on_threads(threads_for(a.rows * n), [&] {
    const Scratch scratch(2, n);
    const float* weight = as_float(a.weight, scratch[0], 0, n, 1.f);
    float* dxhat = scratch[1];
#pragma omp for schedule(static) nowait
    for (int64_t g = 0; g < groups.count; g++) {
      float *dweight = partial[2 * g], *dbias = partial[2 * g + 1];
      if constexpr (WithParameters) {
        memset(dweight, 0, n * sizeof(float));
        memset(dbias, 0, n * sizeof(float));
      }
      const int64_t begin = g * groups.rows_per_group, end = begin + groups.rows_per_group;
      for (int64_t row = begin; row < end && row < a.rows; row++) {
        const T* dy = static_cast<const T*>(a.dy) + row * n;
        const T* x = static_cast<const T*>(a.x) + row * n;
        const float mean = a.mean[row], rstd = a.rstd[row];
        const RowSums s = row_gradient_sums<WithDx, WithParameters>(dy, x, n, mean, rstd, weight,
                                                                    dxhat, dweight, dbias);
        if constexpr (WithDx) {
          row_dx<Stream>(dxhat, x, n, mean, rstd, s.dxhat / float(n), s.dxhat_xhat / float(n),
                         static_cast<T*>(a.dx) + row * n, dy + n, x + n);
        }
      }
    }
    if constexpr (Stream) stream_fence();
  });
  if constexpr (WithParameters) add_groups(partial, groups.count, a);
}

template <class T>
void backward_long_row_dx(const BackwardArgs& a, int64_t row, int threads) {
  const int64_t n = a.cols, chunks = ceil_div(n, kChunk);
  const T* dy = static_cast<const T*>(a.dy) + row * n;
  const T* x = static_cast<const T*>(a.x) + row * n;
  T* dx = static_cast<T*>(a.dx) + row * n;
  const float mean = a.mean[row], rstd = a.rstd[row];
  const Scratch partial(2, chunks), kept(1, n);
  float* dxhat = kept[0];
  for_each_chunk(n, threads, [&](int64_t chunk, int64_t i, int64_t length) {
    const Scratch scratch(1, length);
    const float* weight = as_float(a.weight, scratch[0], i, length, 1.f);
    const RowSums s = row_gradient_sums<true, false>(dy + i, x + i, length, mean, rstd, weight,
                                                     dxhat + i, nullptr, nullptr);
    partial[0][chunk] = s.dxhat;
    partial[1][chunk] = s.dxhat_xhat;
  });
  const float mean_dxhat = float(ordered_sum(partial[0], chunks) / double(n));
  const float mean_dxhat_xhat = float(ordered_sum(partial[1], chunks) / double(n));
  for_each_chunk(n, threads, [&](int64_t, int64_t i, int64_t length) {
    row_dx<false>(dxhat + i, x + i, length, mean, rstd, mean_dxhat, mean_dxhat_xhat, dx + i, dy + i,
                  x + i);
  });
}

// Long rows: work items are (group of rows, tile of columns), so few rows still fill the threads.
template <class T>
void backward_long_parameters(const BackwardArgs& a) {
  const int64_t n = a.cols, tiles = ceil_div(n, kTile);
  const Groups groups(a.rows);
  const Scratch partial(2 * groups.count, n);
  parallel_for(groups.count * tiles, threads_for(a.rows * n), [&](int64_t item) {
    const int64_t g = item / tiles, i = item % tiles * kTile;
    const int64_t length = n - i < kTile ? n - i : kTile;
    float *dweight = partial[2 * g] + i, *dbias = partial[2 * g + 1] + i;
    memset(dweight, 0, length * sizeof(float));
    memset(dbias, 0, length * sizeof(float));
    const int64_t begin = g * groups.rows_per_group, end = begin + groups.rows_per_group;
    for (int64_t row = begin; row < end && row < a.rows; row++) {
      const int64_t at = row * n + i;
      row_gradient_sums<false, true>(static_cast<const T*>(a.dy) + at,
                                     static_cast<const T*>(a.x) + at, length, a.mean[row],
                                     a.rstd[row], nullptr, nullptr, dweight, dbias);
    }
  });
  add_groups(partial, groups.count, a);
}

template <class T>
void backward_as(const BackwardArgs& a) {
  const bool parameters = a.dweight.data || a.dbias.data;
  if (a.cols > kChunk) {
    if (a.dx) {
      for_each_long_row(a.rows, a.cols, [&](int64_t row, int threads) {
        backward_long_row_dx<T>(a, row, threads);
      });
    }
    if (parameters) backward_long_parameters<T>(a);
  } else if (!a.dx) {
    if (parameters) backward_rows<false, false, true, T>(a);
  } else if (use_stream<T>(a.dx, a.rows, a.cols)) {
    parameters ? backward_rows<true, true, true, T>(a) : backward_rows<true, true, false, T>(a);
  } else {
    parameters ? backward_rows<false, true, true, T>(a) : backward_rows<false, true, false, T>(a);
  }
}

void forward(const ForwardArgs& a) {
  dispatch_float(a.dtype, [&](auto t) {
    prefer_huge_pages(a.y, a.rows * a.cols * int64_t(sizeof t));
    forward_as<decltype(t)>(a);
  });
}

void backward(const BackwardArgs& a) {
  dispatch_float(a.dtype, [&](auto t) {
    if (a.dx) prefer_huge_pages(a.dx, a.rows * a.cols * int64_t(sizeof t));
    backward_as<decltype(t)>(a);
  });
}

}  // namespace
}  // namespace layer_norm

const kernels::layer_norm::CpuKernels layer_norm_kernels = {layer_norm::forward,
                                                            layer_norm::backward};

}  // namespace kernels::ISA
