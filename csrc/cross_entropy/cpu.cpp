// Cross-entropy on CPUs: which thread does which rows; compiled once per instruction set.
//
// A row is done in chunks of kChunk classes whose sums are combined in order.  Where there are
// enough rows a thread does whole rows; few long rows are shared out by the chunk.  Either way the
// same sums are added in the same order, so results never depend on the number of threads.
#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "cross_entropy/cpu_kernel.h"
#include "cross_entropy/cpu_options.h"

namespace kernels::ISA {
namespace cross_entropy {
namespace {

constexpr int64_t kChunk = 32768;      // classes: 128 KiB of floats, which stay in L2
constexpr int64_t kRowsPerThread = 4;  // with fewer, long rows are shared out by the chunk

int64_t chunks_of(int64_t cols) { return (cols + kChunk - 1) / kChunk; }

// f(row, chunk, first class, classes) for every chunk, shared out among threads by the chunk.
template <class F>
void for_each_chunk(const Call& a, int threads, F f) {
  const int64_t chunks = chunks_of(a.cols);
  parallel_for(a.rows * chunks, threads, [&](int64_t item) {
    const int64_t chunk = item % chunks, begin = chunk * kChunk, rest = a.cols - begin;
    f(item / chunks, chunk, begin, rest < kChunk ? rest : kChunk);
  });
}

bool shared_out_by_chunk(const Call& a, int threads) {
  return threads > 1 && a.rows < kRowsPerThread * threads && a.cols > kChunk;
}

// f(first row, rows) for groups of rows, at most kLanes each; few rows keep every thread busy in
// small groups.
template <class F>
void for_each_group(const Call& a, int threads, F f) {
  const int64_t size = a.rows >= 4 * kLanes * threads ? kLanes : kRowsInFlight;
  parallel_for((a.rows + size - 1) / size, threads, [&](int64_t group) {
    const int64_t row = group * size, rest = a.rows - row;
    f(row, int(rest < size ? rest : size));
  });
}

float weight_of(const Call& a, int64_t target) { return a.weight ? a.weight[target] : 1.f; }

// ---- forward ----

// -1 where ignored.
int64_t target_of(const Call& a, int64_t row) {
  return a.target[row] == a.ignore_index ? -1 : a.target[row];
}

// The arg-max, if it is asked for, of a row that has just been read.
void find_largest(const ForwardArgs& f, const RowKernels& kernels, int64_t row) {
  const Call& a = f.call;
  if (!f.best) return;
  const float sign = a.logit_scale < 0.f ? -1.f : 1.f;
  f.best[row] = row_largest(kernels, row_of(a, kernels, row), 0, a.cols, sign).at;
}

// Writes all that a row's sums give.
void finish_row(const ForwardArgs& f, const RowKernels& kernels, int64_t row, const Partial& p) {
  const Call& a = f.call;
  const float log_sum = p.top == -INFINITY ? NAN : logf(float(p.sum));
  const float lse = p.top + log_sum;
  const float part = lse - p.top;  // the error of the addition, exactly (Knuth's TwoSum)
  f.lse[row] = lse;
  f.lse[a.rows + row] = (p.top - (lse - part)) + (log_sum - part);
  // Over all classes: sum of k_c (lse - x_c); in double, for both terms may be large.
  double loss = p.weights * (double(p.top) + double(log_sum)) - p.weighted;
  float log_prob = 0.f;
  bool counted = true;
  if (a.target) {
    const int64_t target = target_of(a, row);
    counted = target >= 0;
    if (counted) {
      const float x = element(kernels, row_of(a, kernels, row), target);
      const double y = double(has_options(a) ? transformed(a, x) : x);
      const double exact = (y - double(p.top)) - double(log_sum);
      log_prob = float(exact);
      loss -= (1.0 - double(a.label_smoothing)) * double(weight_of(a, target)) * exact;
    }
  }
  if (a.z_loss != 0.f) loss += double(a.z_loss) * lse * lse;
  f.losses[row] = counted ? float(loss) : 0.f;
  if (f.log_prob) f.log_prob[row] = log_prob;
}

// The same for up to kLanes rows of at most kBlock classes without options, a row a lane; there
// `maxima` are the largest logits, so no term of a loss is negative and float does.
void finish_short_rows(const ForwardArgs& f, const RowKernels& kernels, int64_t row, int rows,
                       const float* maxima, const float* sums) {
  const Call& a = f.call;
  int64_t target[kLanes];
  float x[kLanes], weight[kLanes];
  int32_t counted[kLanes] = {};
  for (int r = 0; r < rows; r++) {
    target[r] = target_of(a, row + r);
    counted[r] = target[r] < 0 ? 0 : -1;
    weight[r] = target[r] < 0 ? 0.f : weight_of(a, target[r]);
  }
  kernels.elements(row_of(a, kernels, row), a.row_stride, target, rows, x);
  const Tail lanes{rows};
  const vf top = load(maxima), log_sum = top == -INFINITY ? set1(NAN) : log(load(sums));
  const vf lse = top + log_sum, part = lse - top;
  const vf log_prob = (load(x) - top) - log_sum;
  const vf loss = a.z_loss * lse * lse - load(weight) * log_prob;
  vi is_counted;
  memcpy(&is_counted, counted, sizeof is_counted);
  store(f.lse + row, lse, lanes);
  store(f.lse + a.rows + row, (top - (lse - part)) + (log_sum - part), lanes);
  store(f.losses + row, is_counted ? loss : vf{}, lanes);
  if (f.log_prob) store(f.log_prob + row, is_counted ? log_prob : vf{}, lanes);
}

void forward_short_rows(const ForwardArgs& f, const RowKernels& kernels, int threads) {
  const Call& a = f.call;
  for_each_group(a, threads, [&](int64_t row, int rows) {
    float maxima[kLanes + kRowsInFlight], sums[kLanes + kRowsInFlight];
    int r = 0;
    for (; r + kRowsInFlight <= rows; r += kRowsInFlight) {
      kernels.short_rows(row_of(a, kernels, row + r), a.row_stride, a.cols, maxima + r, sums + r);
    }
    for (; r < rows; r++) {  // one row in all places
      kernels.short_rows(row_of(a, kernels, row + r), 0, a.cols, maxima + r, sums + r);
    }
    finish_short_rows(f, kernels, row, rows, maxima, sums);
    for (r = 0; r < rows; r++) find_largest(f, kernels, row + r);
  });
}

void forward_long_rows(const ForwardArgs& f, const RowKernels& kernels, int threads) {
  const Call& a = f.call;
  const bool options = has_options(a);
  auto partial = [&](int64_t row, int64_t begin, int64_t n) {
    return options ? partial_with_options(a, kernels, row, begin, n)
                   : kernels.partial(row_of(a, kernels, row) + begin * kernels.element_size, n);
  };
  if (!shared_out_by_chunk(a, threads)) {
    parallel_for(a.rows, threads, [&](int64_t row) {
      Partial sums = partial(row, 0, a.cols < kChunk ? a.cols : kChunk);
      for (int64_t begin = kChunk; begin < a.cols; begin += kChunk) {
        const int64_t rest = a.cols - begin;
        combine(sums, partial(row, begin, rest < kChunk ? rest : kChunk));
      }
      finish_row(f, kernels, row, sums);
      find_largest(f, kernels, row);
    });
    return;
  }
  const int64_t chunks = chunks_of(a.cols);
  const Scratch scratch(1, a.rows * chunks * int64_t(sizeof(Partial) / sizeof(float)));
  Partial* parts = reinterpret_cast<Partial*>(scratch[0]);
  for_each_chunk(a, threads, [&](int64_t row, int64_t chunk, int64_t begin, int64_t n) {
    parts[row * chunks + chunk] = partial(row, begin, n);
  });
  for (int64_t row = 0; row < a.rows; row++) {
    Partial all = parts[row * chunks];
    for (int64_t c = 1; c < chunks; c++) combine(all, parts[row * chunks + c]);
    finish_row(f, kernels, row, all);
  }
  parallel_for(a.rows, threads, [&](int64_t row) { find_largest(f, kernels, row); });
}

void forward(const ForwardArgs& f) {
  const Call& a = f.call;
  const RowKernels& kernels = row_kernels(a.dtype);
  const int threads = threads_for(a.rows * a.cols);
  if (a.cols <= kBlock && !has_options(a)) {
    forward_short_rows(f, kernels, threads);
  } else {
    forward_long_rows(f, kernels, threads);
  }
}

// ---- backward ----

// `weights`: the sum of k_c with a scale of 1.
Row row_to_differentiate(const BackwardArgs& b, int64_t row, double weights) {
  const Call& a = b.call;
  const float lse = b.lse[row], rest = b.lse[a.rows + row];
  const float g = b.dlosses[row * b.dlosses_stride], dlse = b.dlse ? b.dlse[row] : 0.f;
  double on = 0;
  int64_t target = -1;
  if (a.target) {
    target = a.target[row];
    if (target == a.ignore_index) return {lse, rest, dlse, 0.f, dlse, -1, b.dlse == nullptr};
    if (target < 0 || target >= a.cols) return {NAN, NAN, NAN, NAN, NAN, -1, false};
    on = (1.0 - double(a.label_smoothing)) * double(weight_of(a, target));
  }
  const double others = weights + 2.0 * double(a.z_loss) * double(lse);
  return {lse, rest, g * float(others + on) + dlse, g, g * float(others) + dlse, target, false};
}

// Past the caches, where the gradient is too large to stay in them.
bool use_stream(const BackwardArgs& b, int64_t element_size) {
  constexpr int64_t kFromBytes = int64_t{24} << 20;
  constexpr int64_t kFromRowBytes = 4096;  // shorter rows would feel the fence after each
  const int64_t row_bytes = b.call.cols * element_size;
  return b.dinput != b.call.input && b.call.rows * row_bytes >= kFromBytes &&
         row_bytes >= kFromRowBytes && uintptr_t(b.dinput) % 64 == 0 && row_bytes % 64 == 0;
}

char* gradient_of(const BackwardArgs& b, const RowKernels& kernels, int64_t row) {
  return static_cast<char*>(b.dinput) + row * b.dinput_stride * kernels.element_size;
}

// Up to kLanes rows of at most kBlock classes without options, of which r[0] is number `row`.
void gradients_of_short_rows(const BackwardArgs& b, const RowKernels& kernels,
                             decltype(RowKernels::gradients) gradients, int64_t row, const Row* r,
                             int rows) {
  const Call& a = b.call;
  const int64_t size = kernels.element_size;
  int64_t target[kLanes];
  float x[kLanes], lse[kLanes], rest[kLanes], slope[kLanes], others[kLanes], at_target[kLanes];
  for (int i = 0; i < rows; i++) {
    target[i] = r[i].target;
    lse[i] = r[i].lse;
    rest[i] = r[i].rest;
    slope[i] = r[i].slope;
    others[i] = r[i].others;
  }
  // Before dx, which may be x, is written.
  kernels.elements(row_of(a, kernels, row), a.row_stride, target, rows, x);
  store(at_target,
        gradient_at_target(load(x), load(lse), load(rest), load(slope), load(others), vf{}));
  alignas(float) char narrow[kLanes * sizeof(float)];
  kernels.from_float(at_target, rows, narrow);
  for (int i = 0, end; i < rows; i = end) {
    end = i + 1;
    if (r[i].zero) {
      memset(gradient_of(b, kernels, row + i), 0, size_t(a.cols * size));
      continue;
    }
    while (end < rows && !r[end].zero) end++;
    gradients(row_of(a, kernels, row + i), a.row_stride, gradient_of(b, kernels, row + i),
              b.dinput_stride, a.cols, r + i, end - i);
  }
  for (int i = 0; i < rows; i++) {
    if (r[i].target < 0) continue;
    memcpy(gradient_of(b, kernels, row + i) + r[i].target * size, narrow + i * size, size_t(size));
  }
}

// Classes begin to begin + n of a row.
void gradient_of_chunk(const BackwardArgs& b, const RowKernels& kernels,
                       decltype(RowKernels::gradients) gradients, int64_t row, int64_t begin,
                       int64_t n, const Row& r) {
  const int64_t size = kernels.element_size;
  const char* x = row_of(b.call, kernels, row);
  char* dx = gradient_of(b, kernels, row);
  if (r.zero) {
    memset(dx + begin * size, 0, size_t(n * size));
  } else if (has_options(b.call)) {
    gradient_with_options(b, kernels, dx, row, begin, n, r);
  } else {
    const bool has_target = r.target >= begin && r.target < begin + n;
    float at_target = 0.f;
    if (has_target) {  // before dx, which may be x, is written
      at_target = gradient_at_target(element(kernels, x, r.target), r, 0.f);
    }
    gradients(x + begin * size, 0, dx + begin * size, 0, n, &r, 1);
    if (has_target) kernels.from_float(&at_target, 1, dx + r.target * size);
  }
}

void backward(const BackwardArgs& b) {
  const Call& a = b.call;
  const RowKernels& kernels = row_kernels(a.dtype);
  const int64_t size = kernels.element_size;
  const int threads = threads_for(a.rows * a.cols);
  if (b.dinput != a.input) prefer_huge_pages(b.dinput, a.rows * a.cols * size);
  const auto gradients = use_stream(b, size) ? kernels.streamed_gradients : kernels.gradients;
  const double common = a.probabilities ? 0.0 : sum_of_weights(a, 0);
  auto prepared = [&](int64_t row) {
    return row_to_differentiate(b, row, a.probabilities ? sum_of_weights(a, row) : common);
  };
  if (a.cols <= kBlock && !has_options(a)) {
    for_each_group(a, threads, [&](int64_t row, int rows) {
      Row r[kLanes];
      for (int i = 0; i < rows; i++) r[i] = prepared(row + i);
      gradients_of_short_rows(b, kernels, gradients, row, r, rows);
    });
  } else if (!shared_out_by_chunk(a, threads)) {
    parallel_for(a.rows, threads, [&](int64_t row) {
      gradient_of_chunk(b, kernels, gradients, row, 0, a.cols, prepared(row));
    });
  } else {
    const Scratch scratch(1, a.rows * int64_t(sizeof(Row) / sizeof(float)));
    Row* rows = reinterpret_cast<Row*>(scratch[0]);
    for (int64_t row = 0; row < a.rows; row++) rows[row] = prepared(row);
    for_each_chunk(a, threads, [&](int64_t row, int64_t, int64_t begin, int64_t n) {
      gradient_of_chunk(b, kernels, gradients, row, begin, n, rows[row]);
    });
  }
}

}  // namespace
}  // namespace cross_entropy

const kernels::cross_entropy::CpuKernels cross_entropy_kernels = {cross_entropy::forward,
                                                                  cross_entropy::backward};

}  // namespace kernels::ISA
