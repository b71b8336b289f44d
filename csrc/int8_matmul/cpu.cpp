// Int8 matmul on CPUs: which thread does which block; compiled once per instruction set.
//
// The rows of x are made ready once (quantised, and most of them put side by side in groups), then
// threads share the blocks of kBlock outputs times kChunkGroups groups.  The weights are read where
// they lie, so no second copy of them exists; a block that cannot be (bytes without vpdpbusd,
// columns side by side) is converted into scratch memory a piece of K at a time.  Every sum is
// added up by one thread in a fixed order: results do not depend on the number of threads.
#include "int8_matmul/cpu.h"

#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "int8_matmul/cpu_output.h"
#include "int8_matmul/cpu_quantize.h"
#include "int8_matmul/cpu_rows.h"
#include "int8_matmul/cpu_tiles.h"

namespace kernels::ISA {
namespace int8_matmul {
namespace {

constexpr int kChunkGroups = 4 * kVectors;         // of rows of x, in one work item
constexpr int64_t kPieceBytes = 4096;              // of a row of x, in one piece of K
constexpr int64_t kReadyBytes = int64_t{4} << 20;  // of x made ready at a time
constexpr int kMostSingles = kLanes + kLanes / 2;  // rows that are multiplied without groups
constexpr int kMostSinglesLeft = kLanes * 3 / 4;   // the same, beside groups

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Some rows of x, made ready: the first in groups of kLanes, the rest singly.
template <class A>
struct Ready {
  using Value = typename A::Value;

  const MatmulCall& call;
  int64_t first, rows;
  int64_t groups, singles;
  int64_t length;  // of a row, padded with zeros
  Value* grouped;  // [groups][length / kStep][kLanes][kStep]
  Value* single;   // [singles][length], then with an offset a row of ones
  float* scale;    // [rows], padded with zeros

  Ready(const MatmulCall& c, int64_t first_row, int64_t count)
      : call(c), first(first_row), rows(count), length(round_up(c.depth, kValues<A>)) {
    const int64_t left = rows % kLanes;
    if (c.weight_column != 1) {
      singles = 0;
    } else if (rows <= kMostSingles) {
      singles = rows;
    } else {
      singles = left <= kMostSinglesLeft ? left : 0;
    }
    groups = (rows - singles + kLanes - 1) / kLanes;
  }

  int64_t grouped_floats() const { return floats(groups * kLanes * length); }
  int64_t single_floats() const { return floats((singles + 1) * length); }
  int64_t scale_floats() const { return round_up(rows, kLanes); }
  int64_t scratch_floats() const {
    return ThreadMemory::rounded(grouped_floats()) + ThreadMemory::rounded(single_floats()) +
           ThreadMemory::rounded(scale_floats());
  }
  void place(ThreadMemory& memory) {
    grouped = reinterpret_cast<Value*>(memory.take(grouped_floats()));
    single = reinterpret_cast<Value*>(memory.take(single_floats()));
    scale = memory.take(scale_floats());
    for (int64_t i = rows; i < scale_floats(); i++) scale[i] = 0;
    if (!A::kOffset) return;
    for (int64_t k = 0; k < length; k++) single[singles * length + k] = 1;
  }

  int64_t items() const { return groups + singles; }
  void make(int64_t item) const {
    if constexpr (A::kStep > 1) {
      if (call.mode == Mode::kRaw || call.mode == Mode::kInt8) return make_from<int8_t>(item);
    }
    dispatch_float(call.x_dtype, [&](auto type) { make_from<decltype(type)>(item); });
  }

 private:
  static int64_t floats(int64_t values) {
    return (values * int64_t(sizeof(Value)) + 3) / int64_t(sizeof(float));
  }

  template <class T>
  const T* row_of_x(int64_t row) const {
    return static_cast<const T*>(call.x) + (first + row) * call.x_row;
  }

  template <class T>
  Scaling scaling(int64_t row) const {
    if (call.mode == Mode::kInt8) {
      return {0.f, call.x_scale.data[(first + row) * call.x_scale.step]};
    }
    if constexpr (A::kStep > 1 && sizeof(T) > 1) {
      const Scaling own = scaling_of(largest_bits(row_of_x<T>(row), call.depth));
      const float given = call.mode == Mode::kStatic ? *call.x_scale.data : own.scale;
      if (call.mode == Mode::kDynamic || own.scale != own.scale) return own;
      return {1.f / given, given};
    }
    return {1.f, 1.f};
  }

  template <class T>
  void make_from(int64_t item) const {
    const int64_t depth = call.depth;
    if (item >= groups) {
      const int64_t row = groups * kLanes + item - groups;
      const Scaling s = scaling<T>(row);
      scale[row] = s.scale;
      Value* to = single + (item - groups) * length;
      for (int64_t k = 0; k < depth; k += kValues<A>) {
        convert<A>(row_of_x<T>(row) + k, least(depth - k, kValues<A>), s.inverse, to + k);
      }
      return;
    }
    const int64_t row = item * kLanes, count = least(rows - row, kLanes);
    float inverse[kLanes];
    for (int64_t r = 0; r < count; r++) {
      const Scaling s = scaling<T>(row + r);
      scale[row + r] = s.scale;
      inverse[r] = s.inverse;
    }
    alignas(64) Value values[kLanes][kValues<A>] = {};
    Value* to = grouped + item * kLanes * length;
    for (int64_t k = 0; k < depth; k += kValues<A>) {
      for (int64_t r = 0; r < count; r++) {
        convert<A>(row_of_x<T>(row + r) + k, least(depth - k, kValues<A>), inverse[r], values[r]);
      }
      vf steps[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; r++) steps[r] = load_vector<vf>(values[r]);
      transpose(steps);
#pragma GCC unroll 16
      for (int s = 0; s < kLanes; s++) {
        store_vector(to + k * kLanes + s * kValues<A>, steps[s]);
      }
    }
  }
};

// The work of one thread on blocks of outputs.
template <class A>
class Blocks {
 public:
  using Value = typename A::Value;
  using Weight = typename A::Weight;
  using Sum = typename A::Sum;
  using Sums = typename A::Sums;

  static constexpr int64_t kPiece = kPieceBytes / int64_t(sizeof(Value));  // of K
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

  void run(int64_t item) {
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
    // [step][row]: neighbouring rows are neighbours in memory.
    memset(pieces_, 0, size_t(padded * kBlock) * sizeof(Weight));
    for (int64_t i = 0; i < n; i++) {
      const int8_t* from = weights(columns.first, k + i);
      Weight* to = pieces_ + i / A::kStep * kBlock * A::kStep + i % A::kStep;
      for (int r = 0; r < columns.count; r++) to[r * A::kStep] = Weight(from[r]);
    }
    const auto* data = reinterpret_cast<const char*>(pieces_);
    return {data, 4, kBlock * 4, columns.count, padded / A::kStep, 0};
  }

  // What the block's sums over [k, k + n) begin with: the offset of x times the sums of weights.
  void starts(const Columns& columns, const Steps& steps, int64_t k, int64_t n, Sum* start) const {
    if constexpr (A::kOffset == 0) {
      for (int i = 0; i < kBlock; i++) start[i] = 0;
    } else {
      const Value* ones = x_.single + x_.singles * x_.length;
      for (int i = 0; i < columns.count; i += kLanes) {
        Sums sum{};
        if (call_.weight_column == 1) {
          const int8_t* rows[kLanes];
          row_pointers(columns, i, k, rows);
          sum = dot_tile<A, 1>(ones, 0, rows, n);
        } else {
          const Sums one = load_vector<Sums>(ones);
          for (int64_t s = 0; s < steps.count; s++) {
            sum = A::multiply_add(sum, one, load_vector<Sums>(steps.data + s * steps.step + i * 4));
          }
        }
        store_vector(start + i, sum * -A::kOffset);
      }
    }
  }

  template <int kRows>
  void row_pointers(const Columns& columns, int column, int64_t k,
                    const int8_t* (&rows)[kRows]) const {
    for (int i = 0; i < kRows; i++) {
      rows[i] = weights(columns.first + least(column + i, columns.count - 1), k);
    }
  }

  void multiply_groups(const Columns& columns, int64_t first_group) {
    const int64_t groups = least(x_.groups - first_group, kChunkGroups);
    alignas(64) Sum start[kBlock + kLanes];
    for (int64_t k = 0; k < call_.depth; k += kPiece) {
      const int64_t n = least(call_.depth - k, kPiece);
      const Steps w = steps(columns, k, n);
      starts(columns, w, k, n, start);
      for_each_panel(groups, [&](int64_t group, auto used) {
        const Value* x = x_.grouped + (first_group + group) * kLanes * x_.length + k * kLanes;
        Sum* sums = sums_ + group / kVectors * kBlock * kPanelRows + group % kVectors * kLanes;
        for (int r = 0; r < columns.count; r += kTileRows) {
          multiply_tile<A, decltype(used)::value>(x, kLanes * x_.length, w, r, start + r, k > 0,
                                                  sums + r * kPanelRows);
        }
      });
    }
    for (int64_t group = 0; group < groups; group++) {
      const int64_t row = (first_group + group) * kLanes;
      write_group<Sums>(call_, columns, x_.first + row, int(least(rows_in_groups() - row, kLanes)),
                        x_.scale + row,
                        sums_ + group / kVectors * kBlock * kPanelRows + group % kVectors * kLanes);
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

  // Rows of x from `row` on, kRows of them with kLanes rows of weights from `column` on.
  template <int kRows>
  void dot_rows(const Columns& columns, int column, int64_t row) {
    constexpr int kCols = kLanes / kRows;
    for (int i = column; i < column + kLanes; i += kCols) {
      const int8_t* rows[kCols];
      row_pointers(columns, i, 0, rows);
      alignas(64) Sum sums[kLanes];
      store_vector(sums,
                   dot_tile<A, kRows>(x_.single + row * x_.length, x_.length, rows, call_.depth));
      for (int r = 0; r < kRows; r++) {
        memcpy(sums_ + (row + r) * kBlock + i, sums + r * kCols, sizeof(Sum) * kCols);
      }
    }
  }

  void multiply_singles(const Columns& columns) {
    const int64_t rows = x_.singles + (A::kOffset ? 1 : 0);
    for (int column = 0; column < columns.count; column += kLanes) {
      int64_t row = 0;
      for (; row + 4 <= rows; row += 4) dot_rows<4>(columns, column, row);
      for (; row + 2 <= rows; row += 2) dot_rows<2>(columns, column, row);
      if (row < rows) dot_rows<1>(columns, column, row);
    }
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

void matmul(const MatmulCall& c) {
  if (c.mode != Mode::kRaw) {
    dispatch_float(c.y_dtype,
                   [&](auto t) { prefer_huge_pages(c.y, c.rows * c.cols * int64_t(sizeof t)); });
  }
  c.mode == Mode::kWeightOnly ? matmul_as<Floats>(c) : matmul_as<Integers>(c);
}

}  // namespace
}  // namespace int8_matmul

const kernels::int8_matmul::CpuKernels int8_matmul_kernels = {int8_matmul::matmul,
                                                              int8_matmul::rows};

}  // namespace kernels::ISA
