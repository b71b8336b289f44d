// Blocks of outputs: kBlock columns, and some groups of rows or all single ones.
//
// The weights are read where they lie, so no second copy of them exists; a block that cannot be
// (bytes without vpdpbusd, columns side by side) is converted into scratch memory a piece of K at a
// time.
#pragma once
#include "int8_matmul/cpu_output.h"
#include "int8_matmul/cpu_ready.h"

namespace kernels::ISA::int8_matmul {

constexpr int kChunkGroups = 4 * kVectors;  // of rows of x, in one block

// The work of one thread on blocks of outputs.
template <class A>
class Blocks {
 public:
  using Value = typename A::Value;
  using Weight = typename A::Weight;
  using Sum = typename A::Sum;
  using Sums = typename A::Sums;

  static constexpr int64_t kPiece = A::kPiece;
  static constexpr int64_t kSums = kChunkGroups * kLanes * kBlock;
  static constexpr int64_t kFloats = kSums + kBlock * kPiece * int64_t(sizeof(Weight)) / 4;

  Blocks(const Ready<A>& x, ThreadMemory& memory)
      : x_(x), call_(x.call), sums_(reinterpret_cast<Sum*>(memory.take(kSums))) {
    pieces_ = reinterpret_cast<Weight*>(memory.take(kFloats - kSums));
  }

  static int64_t columns(const MatmulCall& c) { return (c.cols + kBlock - 1) / kBlock; }
  static int64_t chunks(const Ready<A>& x) {
    return (x.groups + kChunkGroups - 1) / kChunkGroups + (x.singles ? 1 : 0);
  }

  [[gnu::noinline]] void run(int64_t item) {
    const int64_t block = item / chunks(x_), chunk = item % chunks(x_);
    const int64_t first = block * kBlock;
    const Columns columns(call_, first, int(least(call_.cols - first, kBlock)));
    if (chunk * kChunkGroups < x_.groups) {
      multiply_groups(columns, chunk * kChunkGroups);
    } else {
      multiply_singles(columns);
    }
  }

 private:
  const int8_t* weights(int64_t row, int64_t k) const {
    return call_.weight + row * call_.weight_row + k * call_.weight_column;
  }

  // Weights [k, k + n) of the block's rows: where they lie, or as converted to `pieces_`.
  Steps steps(const Columns& columns, int64_t k, int64_t n) const {
    const int64_t padded = round_up(n, kValues<A>);
    if (call_.weight_column == 1) {
      if constexpr (sizeof(Weight) == 1) {
        const auto* data = reinterpret_cast<const char*>(weights(columns.first, k));
        return {data, call_.weight_row, 4, columns.count, n / A::kStep, int(n % A::kStep)};
      }
      for (int r = 0; r < columns.count; r++) {
        const int8_t* from = weights(columns.first + r, k);
        Weight* to = pieces_ + r * padded;
        int64_t i = 0;
        for (; i + kValues<A> <= n; i += kValues<A>) {
          store_vector(to + i, load_weights<A>(from + i));
        }
        if (i < n) store_vector(to + i, load_some_weights<A>(from + i, n - i));
      }
      const auto* data = reinterpret_cast<const char*>(pieces_);
      return {data, padded * int64_t(sizeof(Weight)), 4, columns.count, padded / A::kStep, 0};
    }
    for (int64_t i = 0; i < padded; i += kValues<A>) {  // rows of K far apart: each page once
      for (int r = 0; r < columns.count; r += kLanes) {
        alignas(64) Sums steps[kLanes];
        for (int s = 0; s < kLanes; s++) steps[s] = step(columns, r, k + i + s * A::kStep, k + n);
        transpose_steps(steps, pieces_ + r * padded + i, padded * int64_t(sizeof(Weight)));
      }
    }
    const auto* data = reinterpret_cast<const char*>(pieces_);
    return {data, padded * int64_t(sizeof(Weight)), 4, columns.count, padded / A::kStep, 0};
  }

  // Where columns lie side by side: one step, at k < end, of up to kLanes of them from `column` on.
  [[gnu::noinline]] Sums step(const Columns& columns, int column, int64_t k, int64_t end) const {
    const int64_t left = columns.count - column;
    if (k >= end) return Sums{};
    const int8_t* from = weights(columns.first + column, k);
    return left >= kLanes && k + A::kStep <= end
               ? interleave_weights<A>(from, call_.weight_column)
               : interleave_some_weights<A>(from, call_.weight_column, int(least(left, kLanes)),
                                            end - k);
  }

  // offset -= what x's offset adds to the block's sums over n terms: kOffset times the weights.
  void take_off(const Columns& columns, const Steps& steps, int64_t n, Sum* offset) const {
    if constexpr (A::kOffset != 0) {
      const Value* ones = x_.single + x_.singles * x_.length;
      for (int i = 0; i < columns.count; i += kLanes) {
        const int8_t* rows[kLanes];
        for (int r = 0; r < kLanes; r++) {
          const char* row = steps.data + least(i + r, columns.count - 1) * steps.row;
          rows[r] = reinterpret_cast<const int8_t*>(row);
        }
        const Sums sum = dot_tile<A, 1>(ones, 0, rows, n);
        store_vector(offset + i, load_vector<Sums>(offset + i) - sum * A::kOffset);
      }
    }
  }

  template <int kRows>
  void row_pointers(const Columns& columns, int column, const int8_t* (&rows)[kRows]) const {
    for (int i = 0; i < kRows; i++) {
      rows[i] = weights(columns.first + least(column + i, columns.count - 1), 0);
    }
  }

  void multiply_groups(const Columns& columns, int64_t first_group) {
    const int64_t groups = least(x_.groups - first_group, kChunkGroups);
    alignas(64) Sum offset[kBlock] = {};
    for (int64_t k = 0; k < call_.depth; k += kPiece) {
      const int64_t n = least(call_.depth - k, kPiece);
      const Steps w = steps(columns, k, n);
      const bool last = k + n == call_.depth;
      for_each_panel(groups, [&](int64_t group, auto used) {
        const int64_t row = (first_group + group) * kLanes;
        const int64_t rows = least(rows_in_groups() - row, decltype(used)::value * kLanes);
        const Value* x = x_.grouped + row * x_.length + k * kLanes;
        Sum* sums = sums_ + group * kLanes * kBlock;
        constexpr int kRows = tile_rows(decltype(used)::value);
        for (int r = 0; r < columns.count; r += kRows) {
          if (last) fetch_output(columns, row, rows, r, kRows);
          multiply_tile<A, decltype(used)::value>(x, kLanes * x_.length, w, r, k > 0,
                                                  sums + r * kPanelRows);
        }
        if (group == 0) take_off(columns, w, n, offset);  // the weights are in the cache now
        for (int64_t i = 0; last && i < rows; i += kLanes) {
          write_group<Sums>(call_, columns, x_.first + row + i, int(least(rows - i, kLanes)),
                            x_.scale + row + i, sums + i, offset);
        }
      });
    }
  }

  // Fetches what the panel's results will overwrite into L2, a few rows with each of its tiles: a
  // store to a line that is not in the cache waits for it.
  void fetch_output(const Columns& columns, int64_t row, int64_t rows, int tile_row,
                    int tile_rows) const {
    const int64_t end = least(rows, (tile_row + tile_rows) * rows / columns.count);
    for (int64_t r = tile_row * rows / columns.count; r < end; r++) {
      fetch_row(call_, columns, x_.first + row + r);
    }
  }

  int64_t rows_in_groups() const { return x_.rows - x_.singles; }

  // f(first group, how many) for whole panels and what is left.
  template <class F>
  static void for_each_panel(int64_t groups, F f) {
    int64_t group = 0;
    for (; group + kVectors <= groups; group += kVectors) {
      f(group, std::integral_constant<int, kVectors>());
    }
    switch (groups - group) {
      case 1:
        return f(group, std::integral_constant<int, 1>());
      case 2:
        return f(group, std::integral_constant<int, kVectors >= 2 ? 2 : 1>());
      case 3:
        return f(group, std::integral_constant<int, kVectors >= 3 ? 3 : 1>());
    }
  }

  // Rows of x from `row` on, kRows of them with the rows of weights from `column` on.
  template <int kRows>
  void dot_rows(const Columns& columns, int column, int64_t row, const int8_t* next = nullptr) {
    constexpr int kCols = kLanes / kRows;
    const int8_t* rows[kCols];
    row_pointers(columns, column, rows);
    Sums products{};
    for (int64_t k = 0; k < call_.depth; k += A::kMostTerms) {
      const Value* x = x_.single + row * x_.length + k;
      products +=
          dot_tile<A, kRows>(x, x_.length, rows, least(call_.depth - k, A::kMostTerms), next);
      for (int i = 0; i < kCols; i++) rows[i] += A::kMostTerms;
    }
    alignas(64) Sum sums[kLanes];
    store_vector(sums, products);
    for (int r = 0; r < kRows; r++) {
      memcpy(sums_ + (row + r) * kBlock + column, sums + r * kCols, sizeof(Sum) * kCols);
    }
  }

  // The products of single rows with weights whose rows run along K.
  void multiply_along_rows(const Columns& columns) {
    const int64_t rows = x_.singles + (A::kOffset ? 1 : 0), by_four = rows / 4 * 4;
    for (int column = 0; column < columns.count; column += kLanes) {
      for (int c = column; c < column + kLanes; c += kLanes / 4) {
        for (int64_t row = 0; row < by_four; row += 4) {
          const int64_t next = columns.first + c + kLanes / 4 + row / 4;  // each tile another row
          dot_rows<4>(columns, c, row, next < call_.cols ? weights(next, 0) : nullptr);
        }
      }
      int64_t row = by_four;
      for (; row + 2 <= rows; row += 2) {
        for (int c = column; c < column + kLanes; c += kLanes / 2) dot_rows<2>(columns, c, row);
      }
      if (row < rows) dot_rows<1>(columns, column, row);
    }
  }

  // Rows of x from `row` on with kAtOnce vectors of the columns from `column` on, over the `count`
  // steps of piece k, which `pieces_` holds as [step][column].
  template <int kRows, int kAtOnce>
  void add_products(int64_t count, int column, int64_t row, int64_t k) {
    Sums sum[kRows][kAtOnce] = {};
    const Value* x = x_.single + row * x_.length + k;
    for (int64_t s = 0; s < count; s++) {
      Sums weight[kAtOnce];
#pragma GCC unroll 3
      for (int v = 0; v < kAtOnce; v++) {
        weight[v] = load_vector<Sums>(pieces_ + (s * kBlock + column + v * kLanes) * A::kStep);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const Sums value = broadcast_step(x + r * x_.length + s * A::kStep, Sums{});
#pragma GCC unroll 3
        for (int v = 0; v < kAtOnce; v++) {
          sum[r][v] = A::multiply_add(sum[r][v], value, weight[v]);
        }
      }
    }
    for (int r = 0; r < kRows; r++) {
      for (int v = 0; v < kAtOnce; v++) {
        Sum* to = sums_ + (row + r) * kBlock + column + v * kLanes;
        store_vector(to, k ? load_vector<Sums>(to) + sum[r][v] : sum[r][v]);
      }
    }
  }

  // The same where columns lie side by side: the lanes go along them.
  void multiply_along_columns(const Columns& columns) {
    constexpr int kAtOnce = 3;  // vectors of columns; a block is a multiple of them
    const int64_t rows = x_.singles + (A::kOffset ? 1 : 0);
    for (int64_t k = 0; k < call_.depth; k += kPiece) {
      const int64_t n = least(call_.depth - k, kPiece), count = (n + A::kStep - 1) / A::kStep;
      const int64_t stride = call_.weight_column;
      for (int64_t s = 0; s < count; s++) {
        const int64_t at = k + s * A::kStep;
        const int8_t* from = weights(columns.first, at);
        Weight* to = pieces_ + s * A::kStep * kBlock;
        int column = 0;
        for (; at + A::kStep <= k + n && column + kLanes <= columns.count; column += kLanes) {
          store_vector(to + column * A::kStep, interleave_weights<A>(from + column, stride));
        }
        for (; column < columns.count; column += kLanes) {
          store_vector(to + column * A::kStep, step(columns, column, at, k + n));
        }
      }
      for (int column = 0; column < columns.count; column += kAtOnce * kLanes) {
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) add_products<4, kAtOnce>(count, column, row, k);
        for (; row < rows; row++) add_products<1, kAtOnce>(count, column, row, k);
      }
    }
  }

  void multiply_singles(const Columns& columns) {
    call_.weight_column == 1 ? multiply_along_rows(columns) : multiply_along_columns(columns);
    x_.by_bytes ? write_rows_of_bytes(columns) : write_singles(columns);
  }

  void write_rows_of_bytes(const Columns& columns) {
    if constexpr (A::kOffset != 0) {
      alignas(64) float products[kBlock] = {};
      for (int64_t row = 0; row < x_.rows; row++) {
        combine_bytes(sums_ + 4 * row * kBlock, kBlock, sums_ + x_.singles * kBlock, columns.count,
                      x_.scale[row], products);
        write_single<vf>(call_, columns, x_.first + row, 1.f, products);
      }
    }
  }

  void write_singles(const Columns& columns) {
    for (int64_t row = 0; row < x_.singles; row++) {
      Sum* sums = sums_ + row * kBlock;
      if constexpr (A::kOffset != 0) {
        const Sum* of_weights = sums_ + x_.singles * kBlock;
        for (int i = 0; i < columns.count; i += kLanes) {
          store_vector(sums + i, load_vector<Sums>(sums + i) -
                                     load_vector<Sums>(of_weights + i) * A::kOffset);
        }
      }
      const int64_t at = x_.groups * kLanes + row;
      write_single<Sums>(call_, columns, x_.first + at, x_.scale[at], sums);
    }
  }

  const Ready<A>& x_;
  const MatmulCall& call_;
  Sum* sums_;       // [panel][column][kPanelRows] or [single][column]
  Weight* pieces_;  // of converted weights
};

}  // namespace kernels::ISA::int8_matmul
