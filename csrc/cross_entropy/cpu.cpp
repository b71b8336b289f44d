// Cross-entropy on CPUs: which thread does which rows; compiled once per instruction set.
//
// A row is done in chunks of kChunk classes whose sums are combined in order.  Where there are
// enough rows a thread does whole rows; few long rows are shared out by the chunk.  Either way the
// same sums are added in the same order, so results never depend on the number of threads.
#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "cross_entropy/cpu_kernel.h"

namespace kernels::ISA {
namespace cross_entropy {
namespace {

using kernels::cross_entropy::BackwardArgs;
using kernels::cross_entropy::Call;
using kernels::cross_entropy::ForwardArgs;

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

template <class T>
const T* row_of(const Call& a, int64_t row) {
  return static_cast<const T*>(a.input) + row * a.row_stride;
}

float weight_of(const Call& a, int64_t target) { return a.weight ? a.weight[target] : 1.f; }

template <bool value_>
struct Bool {
  static constexpr bool value = value_;
};

// Calls f(transform, term_of) with the types this call needs; term_of(row, scale) is scale times
// the weights k_c of that row.
template <class T, class F>
void dispatch_call(const Call& a, F f) {
  auto with_term = [&](auto transform) {
    const float share = a.label_smoothing / float(a.cols), keep = 1.f - a.label_smoothing;
    auto with_probabilities = [&](auto q) {
      using Q = decltype(q);
      f(transform, [&a, keep, share](int64_t row, float scale) {
        return Probabilities<Q>{static_cast<const Q*>(a.probabilities) + row * a.cols, a.weight,
                                keep * scale, share * scale};
      });
    };
    if (a.probabilities && a.probabilities_dtype == a.dtype) {
      with_probabilities(T{});
    } else if (a.probabilities) {
      with_probabilities(float{});
    } else if (share != 0.f) {
      f(transform, [&a, share](int64_t, float scale) { return Uniform{a.weight, share * scale}; });
    } else {
      f(transform, [](int64_t, float) { return NoTerm{}; });
    }
  };
  if (a.softcap == 0.f && a.logit_scale == 1.f) {
    with_term(Plain{});
  } else {
    with_term(Transformed{a.logit_scale, a.softcap});
  }
}

// ---- forward ----

// Writes all that a row's sums give.
template <class T, class Transform>
void finish_row(const ForwardArgs& f, int64_t row, const Partial& p, Transform transform) {
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
    const int64_t target = a.target[row];
    counted = target != a.ignore_index;
    if (counted) {
      const float x = transform(set1(load_one(row_of<T>(a, row) + target)))[0];
      const double exact = (double(x) - double(p.top)) - double(log_sum);
      log_prob = float(exact);
      loss -= (1.0 - double(a.label_smoothing)) * weight_of(a, target) * exact;
    }
  }
  if (a.z_loss != 0.f) loss += double(a.z_loss) * lse * lse;
  f.losses[row] = counted ? float(loss) : 0.f;
  if (f.log_prob) f.log_prob[row] = log_prob;
}

void combine(Largest& best, const Largest& next) {
  if (best.value == best.value && !(next.value <= best.value)) best = next;
}

template <class T>
void forward_as(const ForwardArgs& f) {
  const Call& a = f.call;
  const int threads = threads_for(a.rows * a.cols);
  const int64_t chunks = chunks_of(a.cols);
  const float sign = a.logit_scale < 0.f ? -1.f : 1.f;
  dispatch_call<T>(a, [&](auto transform, auto term_of) {
    auto partial = [&](int64_t row, int64_t begin, int64_t n) {
      return row_partial(row_of<T>(a, row), begin, n, transform, term_of(row, 1.f));
    };
    auto largest = [&](int64_t row, int64_t begin, int64_t n) {
      return f.best ? row_largest(row_of<T>(a, row), begin, n, sign) : Largest{};
    };
    auto finish = [&](int64_t row, const Partial& p, const Largest& best) {
      finish_row<T>(f, row, p, transform);
      if (f.best) f.best[row] = best.at;
    };
    if (shared_out_by_chunk(a, threads)) {
      struct Part {
        Partial sums;
        Largest largest;
      };
      const Scratch scratch(1, a.rows * chunks * int64_t(sizeof(Part) / sizeof(float)));
      Part* parts = reinterpret_cast<Part*>(scratch[0]);
      for_each_chunk(a, threads, [&](int64_t row, int64_t chunk, int64_t begin, int64_t n) {
        parts[row * chunks + chunk] = {partial(row, begin, n), largest(row, begin, n)};
      });
      for (int64_t row = 0; row < a.rows; row++) {
        Part all = parts[row * chunks];
        for (int64_t c = 1; c < chunks; c++) {
          combine(all.sums, parts[row * chunks + c].sums);
          combine(all.largest, parts[row * chunks + c].largest);
        }
        finish(row, all.sums, all.largest);
      }
      return;
    }
    if (a.cols <= kBlock && !decltype(term_of(0, 1.f))::kUsed && !f.best) {
      parallel_for((a.rows + 3) / 4, threads, [&](int64_t group) {
        const int64_t row = 4 * group, rows = a.rows - row < 4 ? a.rows - row : 4;
        Partial sums[4];
        if (rows == 4) {
          short_rows<4>(row_of<T>(a, row), a.row_stride, a.cols, transform, sums);
        } else {
          for (int64_t r = 0; r < rows; r++) sums[r] = partial(row + r, 0, a.cols);
        }
        for (int64_t r = 0; r < rows; r++) finish_row<T>(f, row + r, sums[r], transform);
      });
      return;
    }
    parallel_for(a.rows, threads, [&](int64_t row) {
      Partial sums{};
      Largest best{};
      for (int64_t begin = 0; begin < a.cols; begin += kChunk) {
        const int64_t n = a.cols - begin < kChunk ? a.cols - begin : kChunk;
        const Partial next = partial(row, begin, n);
        const Largest next_best = largest(row, begin, n);
        if (begin == 0) {
          sums = next;
          best = next_best;
        } else {
          combine(sums, next);
          combine(best, next_best);
        }
      }
      finish(row, sums, best);
    });
  });
}

// ---- backward ----

// Sum of k_c over a row.
template <class Term>
double sum_of_weights(const Call& a, Term term) {
  double total = 0;
  for (int64_t b = 0; b < a.cols; b += kBlock) {
    const int64_t n = a.cols - b < kBlock ? a.cols - b : kBlock;
    Accumulator sum;
    for_each_vector(n, [&](int64_t i, auto lanes, int u) { sum.slot[u] += term(b + i, lanes); });
    total += double(Accumulator::total(sum));
  }
  return total;
}

// What is the same for all classes of a row.
struct Row {
  Gradient gradient;
  float scale;     // dlosses: what the term is times
  float on;        // what the target's class has besides
  int64_t target;  // -1 where there is none
  bool zero;       // ignored, and no gradient of lse
};

// `weights`: the sum of k_c with a scale of 1.
Row row_to_differentiate(const BackwardArgs& b, int64_t row, double weights) {
  const Call& a = b.call;
  const float lse = b.lse[row], rest = b.lse[a.rows + row];
  const float g = b.dlosses[row * b.dlosses_stride], dlse = b.dlse ? b.dlse[row] : 0.f;
  float on = 0.f;
  int64_t target = -1;
  if (a.target) {
    target = a.target[row];
    if (target == a.ignore_index) return {{lse, rest, dlse}, 0.f, 0.f, -1, b.dlse == nullptr};
    if (target < 0 || target >= a.cols) return {{NAN, NAN, NAN}, NAN, 0.f, -1, false};
    on = float((1.0 - double(a.label_smoothing)) * weight_of(a, target));
  }
  const float slope = float(weights + double(on) + 2.0 * double(a.z_loss) * lse);
  return {{lse, rest, g * slope + dlse}, g, g * on, target, false};
}

// Classes begin to begin + n of a row of dinput.
template <bool Stream, class T, class Transform, class Term>
void gradient_chunk(const BackwardArgs& b, int64_t row, int64_t begin, int64_t n, const Row& r,
                    Transform transform, Term term) {
  const T* x = row_of<T>(b.call, row);
  T* dx = static_cast<T*>(b.dinput) + row * b.dinput_stride;
  if (r.zero) {
    memset(dx + begin, 0, n * sizeof(T));
    return;
  }
  const bool has_target = r.target >= begin && r.target < begin + n;
  vf at_target{};
  if (has_target) {  // before dx, which may be x, is written
    const vf v = set1(load_one(x + r.target));
    at_target = gradient_at_target(v, r.gradient, transform, term, r.target, r.on);
  }
  row_gradient<Stream>(x, dx, begin, n, r.gradient, transform, term);
  if constexpr (Stream) stream_fence();  // before the target is written over
  if (has_target) store(dx + r.target, at_target, Tail{1});
}

// Past the caches, where the gradient is too large to stay in them.
template <class T>
bool use_stream(const BackwardArgs& b) {
  constexpr int64_t kFromBytes = int64_t{24} << 20;
  constexpr int64_t kFromRowBytes = 4096;  // shorter rows would feel the fence after each
  const int64_t row_bytes = b.call.cols * int64_t(sizeof(T));
  return b.dinput != b.call.input && b.call.rows * row_bytes >= kFromBytes &&
         row_bytes >= kFromRowBytes && uintptr_t(b.dinput) % 64 == 0 && row_bytes % 64 == 0;
}

template <class T>
void backward_as(const BackwardArgs& b) {
  const Call& a = b.call;
  const int threads = threads_for(a.rows * a.cols);
  dispatch_call<T>(a, [&](auto transform, auto term_of) {
    using Term = decltype(term_of(0, 1.f));
    constexpr bool kMayStream = !Term::kUsed && decltype(transform)::kIdentity;
    constexpr bool kSameForAllRows = !Term::kPerRow;
    double common = 0;
    if constexpr (Term::kUsed && kSameForAllRows) common = sum_of_weights(a, term_of(0, 1.f));
    auto prepared = [&](int64_t row) {
      double weights = common;
      if constexpr (!kSameForAllRows) weights = sum_of_weights(a, term_of(row, 1.f));
      return row_to_differentiate(b, row, weights);
    };
    auto chunk = [&](auto stream, int64_t row, int64_t begin, int64_t n, const Row& r) {
      gradient_chunk<decltype(stream)::value, T>(b, row, begin, n, r, transform,
                                                 term_of(row, r.scale));
    };
    if (shared_out_by_chunk(a, threads)) {
      const Scratch scratch(1, a.rows * int64_t(sizeof(Row) / sizeof(float)));
      Row* rows = reinterpret_cast<Row*>(scratch[0]);
      for (int64_t row = 0; row < a.rows; row++) rows[row] = prepared(row);
      for_each_chunk(a, threads, [&](int64_t row, int64_t, int64_t begin, int64_t n) {
        chunk(Bool<false>{}, row, begin, n, rows[row]);
      });
      return;
    }
    auto all_rows = [&](auto stream) {
      parallel_for(a.rows, threads,
                   [&](int64_t row) { chunk(stream, row, 0, a.cols, prepared(row)); });
    };
    if constexpr (kMayStream) {
      if (use_stream<T>(b)) return all_rows(Bool<true>{});
    }
    all_rows(Bool<false>{});
  });
}

void forward(const ForwardArgs& f) {
  dispatch_float(f.call.dtype, [&](auto t) { forward_as<decltype(t)>(f); });
}

void backward(const BackwardArgs& b) {
  const Call& a = b.call;
  dispatch_float(a.dtype, [&](auto t) {
    if (b.dinput != a.input) prefer_huge_pages(b.dinput, a.rows * a.cols * int64_t(sizeof t));
    backward_as<decltype(t)>(b);
  });
}

}  // namespace
}  // namespace cross_entropy

const kernels::cross_entropy::CpuKernels cross_entropy_kernels = {cross_entropy::forward,
                                                                  cross_entropy::backward};

}  // namespace kernels::ISA
