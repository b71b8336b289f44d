// Int8 matmul on CPUs: which thread does which block; compiled once per instruction set.
//
// The rows of x are made ready once, then threads share the blocks of outputs.  Every sum is added
// up by one thread in a fixed order: results do not depend on the number of threads.
#include "int8_matmul/cpu.h"

#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "int8_matmul/cpu_blocks.h"
#include "int8_matmul/cpu_rows.h"

namespace kernels::ISA {
namespace int8_matmul {
namespace {

constexpr int64_t kReadyBytes = int64_t{1} << 20;  // of x made ready at a time: it stays in L2

template <class A>
void matmul_rows(const MatmulCall& c, int64_t first, int64_t rows) {
  Ready<A> x(c, first, rows);
  const int threads = threads_for(c.cols * c.depth / 16 + rows * c.cols * c.depth / 256);
  ThreadMemory memory(x.scratch_floats() + Blocks<A>::kFloats);
  x.place(memory);
  const bool made = rows * c.depth <= kElementsPerThread;
  if (made) {
    for (int64_t item = 0; item < x.items(); item++) x.make(item);
  }
  const int64_t items = Blocks<A>::columns(c) * Blocks<A>::chunks(x);
  on_threads(threads, [&] {
    const bool is_caller = thread_number() == 0;
    ThreadMemory others(is_caller ? 0 : Blocks<A>::kFloats);
    Blocks<A> blocks(x, is_caller ? memory : others);
    if (!made) {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < x.items(); item++) x.make(item);
    }
    if (x.groups) {
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < items; item++) blocks.run(item);
    } else {  // the same weights to the same thread: they may still lie in its cache
#pragma omp for schedule(static)
      for (int64_t item = 0; item < items; item++) blocks.run(item);
    }
    if (streams_output(c)) stream_fence();
  });
}

template <class A>
void matmul_as(const MatmulCall& c) {
  const int64_t ready = kReadyBytes / (c.depth * int64_t(sizeof(typename A::Value)));
  const int64_t most = round_up(ready < 1 ? 1 : ready, kPanelRows);
  for (int64_t first = 0; first < c.rows; first += most) {
    matmul_rows<A>(c, first, least(c.rows - first, most));
  }
}

// Whether few rows of floats go through integers: cpu_fixed_point.h.
bool goes_by_bytes(const MatmulCall& c) {
  if (!Integers::kOffset || c.mode != Mode::kWeightOnly || c.rows > Integers::kMostSingles / 4 ||
      c.weight_column != 1 || c.depth > kMostFixedPointTerms) {
    return false;
  }
  bool fit = true;
  dispatch_float(c.x_dtype, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(c.x);
    for (int64_t row = 0; row < c.rows; row++) {
      fit = fit && fixed_point_of(x + row * c.x_row, c.depth).fits;
    }
  });
  return fit;
}

void matmul(const MatmulCall& c) {
  if (c.mode != Mode::kRaw) {
    dispatch_float(c.y_dtype,
                   [&](auto t) { prefer_huge_pages(c.y, c.rows * c.cols * int64_t(sizeof t)); });
  }
  if (c.mode != Mode::kWeightOnly || goes_by_bytes(c)) {
    matmul_as<Integers>(c);
  } else {
    matmul_as<Floats>(c);
  }
}

}  // namespace
}  // namespace int8_matmul

const kernels::int8_matmul::CpuKernels int8_matmul_kernels = {int8_matmul::matmul,
                                                              int8_matmul::rows};

}  // namespace kernels::ISA
