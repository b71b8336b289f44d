// Rows of x made ready for the inner loops: quantised, and put side by side or one after another.
#pragma once
#include "common/cpu/parallel.h"
#include "int8_matmul/cpu.h"
#include "int8_matmul/cpu_fixed_point.h"
#include "int8_matmul/cpu_quantize.h"
#include "int8_matmul/cpu_tiles.h"

namespace kernels::ISA::int8_matmul {

using kernels::int8_matmul::MatmulCall;
using kernels::int8_matmul::Mode;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Some rows of x, made ready: the first in groups of kLanes, the rest singly.
template <class A>
struct Ready {
  using Value = typename A::Value;

  const MatmulCall& call;
  int64_t first, rows;
  bool by_bytes;  // single rows are the bytes of fixed-point numbers, four for each row
  int64_t groups, singles;
  int64_t length;  // of a row, padded with zeros
  Value* grouped;  // [groups][length / kStep][kLanes][kStep]
  Value* single;   // [singles][length], then with an offset a row of ones
  float* scale;    // [rows], padded with zeros

  Ready(const MatmulCall& c, int64_t first_row, int64_t count)
      : call(c), first(first_row), rows(count), length(round_up(c.depth, kValues<A>)) {
    const int64_t left = rows % kLanes;
    by_bytes = A::kOffset && c.mode == Mode::kWeightOnly;
    if (by_bytes) {
      singles = 4 * rows;
    } else if (c.weight_column != 1) {
      singles = rows <= kLanes / 2 ? rows : 0;
    } else if (rows <= A::kMostSingles) {
      singles = rows;
    } else {
      singles = left <= A::kMostSinglesLeft ? left : 0;
    }
    groups = by_bytes ? 0 : (rows - singles + kLanes - 1) / kLanes;
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

  int64_t items() const { return by_bytes ? rows : groups + singles; }
  [[gnu::noinline]] void make(int64_t item) const {
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
    if constexpr (A::kOffset && sizeof(T) > 1) {
      if (by_bytes) {
        const FixedPoint f = fixed_point_of(row_of_x<T>(item), depth);
        Value* to = single + 4 * item * length;
        memset(to, 0, size_t(4 * length));
        split_into_bytes(row_of_x<T>(item), depth, f.multiplier, to, length);
        scale[item] = f.unit;
        return;
      }
    }
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
      transpose_steps(values, to + k * kLanes, kLanes * 4);
    }
  }
};

}  // namespace kernels::ISA::int8_matmul
