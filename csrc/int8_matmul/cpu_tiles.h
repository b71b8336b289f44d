// The two inner loops of int8 matmul: panels of x against rows of weights, and dot products.
//
// With many rows of x, kLanes of them lie side by side in a group, [step][row], and a vector holds
// one step of each; a step of the weights is read where it lies and broadcast.  So the weights are
// never rearranged, and no sum is spread over the lanes of a vector: tile_rows rows of weights
// against up to kVectors groups fill the registers.  With few rows of x the lanes go along K,
// the weights stream through once, and the lanes are added up at the end.
#pragma once
#include "common/cpu/transpose.h"
#include "int8_matmul/cpu_arithmetic.h"

namespace kernels::ISA::int8_matmul {

constexpr int kVectors = kLanes == 16 ? 4 : 2;  // groups of rows of x
constexpr int kPanelRows = kVectors * kLanes;   // of x
constexpr int kStepsAhead = 32;                 // that a panel is fetched from L2
constexpr int kBlock = 96;                      // rows of weights in a block

// Rows of weights in a tile with so many groups: a divisor of kBlock.
constexpr int tile_rows(int groups) {
  if (kLanes < 16) return 6;
  return groups == 4 ? 6 : groups == 3 ? 8 : 12;
}

// The steps of kLanes rows one after another to the same steps of all rows, or back; `stride` is
// the bytes from one result to the next.  One copy serves all types.
[[gnu::noinline]] static void transpose_steps(const void* from, void* to, int64_t stride) {
  vf steps[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) {
    steps[i] = load_vector<vf>(static_cast<const char*>(from) + i * sizeof(vf));
  }
  transpose(steps);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) store_vector(static_cast<char*>(to) + i * stride, steps[i]);
}

// Rows of weights in steps: bytes from one row and from one step to the next.
struct Steps {
  const char* data;
  int64_t row, step;
  int rows;
  int64_t count;  // whole steps
  int rest;       // weights in a last, incomplete one
};

// sums [tile rows][kPanelRows] (+)= weights [tile rows, K] * x [K, kUsed groups].  Rows past the
// last one repeat it.
template <class A, int kUsed>
void multiply_tile(const typename A::Value* x, int64_t group, const Steps& w, int first_row,
                   bool add, typename A::Sum* sums) {
  using Sum = typename A::Sum;
  using Sums = typename A::Sums;
  constexpr int kRows = tile_rows(kUsed);
  Sums sum[kRows][kUsed] = {};
  int64_t row[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
    row[r] = (first_row + r < w.rows ? first_row + r : w.rows - 1) * w.row;
  }
  auto add_step = [&](const typename A::Value* xs, const char* weights, auto broadcast) {
    Sums steps[kUsed];
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; v++) steps[v] = load_vector<Sums>(xs + v * group);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const Sums weight = broadcast(weights + row[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kUsed; v++) sum[r][v] = A::multiply_add(sum[r][v], steps[v], weight);
    }
  };
  const char* weights = w.data;
  for (int64_t s = 0; s < w.count; s++) {
    add_step(x, weights, [](const char* p) { return broadcast_step(p, Sums{}); });
    x += kValues<A>;
    weights += w.step;
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; v++) {
      __builtin_prefetch(x + v * group + kStepsAhead * kValues<A>);
    }
  }
  if (w.rest) {
    add_step(x, weights, [&](const char* p) {
      char step[4] = {};
      memcpy(step, p, size_t(w.rest));
      return broadcast_step(step, Sums{});
    });
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; v++) {
      Sum* to = sums + r * kPanelRows + v * kLanes;
      store_vector(to, add ? load_vector<Sums>(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// Products of kRows rows of x, x_row apart and padded with zeros, with kLanes / kRows rows of
// weights; that of row r and weights c is lane r * (kLanes / kRows) + c.  `next` are as many bytes
// as a row of weights has, fetched on the way; or null.
template <class A, int kRows>
[[gnu::noinline]] typename A::Sums dot_tile(const typename A::Value* x, int64_t x_row,
                                            const int8_t* const (&weights)[kLanes / kRows],
                                            int64_t depth, const int8_t* next = nullptr) {
  constexpr int kCols = kLanes / kRows;
  using Sums = typename A::Sums;
  Sums sum[kLanes] = {};
  auto add = [&](int64_t k, auto load_from) {
    Sums w[kCols];
#pragma GCC unroll 16
    for (int c = 0; c < kCols; c++) w[c] = load_from(weights[c] + k);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const Sums values = load_vector<Sums>(x + r * x_row + k);
#pragma GCC unroll 16
      for (int c = 0; c < kCols; c++) {
        sum[r * kCols + c] = A::multiply_add(sum[r * kCols + c], values, w[c]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kValues<A> <= depth; k += kValues<A>) {
    add(k, [](const int8_t* p) { return load_weights<A>(p); });
    if (next) __builtin_prefetch(next + k);
  }
  if (k < depth) add(k, [&](const int8_t* p) { return load_some_weights<A>(p, depth - k); });
  return sums_of(sum);
}

}  // namespace kernels::ISA::int8_matmul
