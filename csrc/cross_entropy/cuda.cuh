// Cross-entropy on CUDA, host side: picks the kernel and the grid from the shape, and launches.
// Kernels: cuda_forward.cuh, cuda_backward.cuh. No torch, no Python: this file compiles alone.
#pragma once

#include "cross_entropy/cuda_backward.cuh"

namespace kernels::cross_entropy {

constexpr int kPartClasses = 4096;  // of a row that several blocks share, the least that one takes
constexpr int kPartUnit = 256;      // it takes a multiple of these: parts start as their row does

// Where a launch goes, and how many multiprocessors the persistent grids may count on.
struct Target {
  int multiprocessors;
  cudaStream_t stream;
};

inline int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Calls f<T>() for the type that `dtype` names.
template <typename F>
void dispatch(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) return f.template operator()<float>();
  if (dtype == DType::kBFloat16) return f.template operator()<__nv_bfloat16>();
  f.template operator()<__half>();
}

// Threads for rows, or parts of rows, of so many bytes: about 8 vectors each.
inline dim3 row_block(int64_t bytes) {
  unsigned threads = kWarp;
  while (threads < kRowThreads && threads * 8 * kVectorBytes < bytes) threads *= 2;
  return dim3(threads, threads == kWarp ? 8 : 1);
}

inline int64_t resident_blocks(int multiprocessors, dim3 block) {
  return int64_t{multiprocessors} * (kRowThreads * kRowBlocks / (block.x * block.y));
}

// How the kernels of long rows are launched.
struct RowPlan {
  dim3 block;
  int parts, part_classes;  // of every row

  dim3 grid(int64_t rows, int multiprocessors, const char* kernel) const {
    const int64_t most = resident_blocks(multiprocessors, block);
    const int64_t blocks = balanced_blocks(ceil_div(rows, block.y), most);
    return dim3(checked_grid(blocks, kernel), static_cast<unsigned>(parts));
  }
};

// Rows too few to give every multiprocessor two blocks are cut into parts.
inline RowPlan plan_rows(int64_t rows, int classes, int element_bytes, int multiprocessors) {
  const int64_t wanted = ceil_div(int64_t{multiprocessors} * kRowBlocks, rows);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max(1, classes / kPartClasses));
  const int64_t part_classes = ceil_div(ceil_div(classes, parts), kPartUnit) * kPartUnit;
  return {row_block(part_classes * element_bytes),
          static_cast<int>(ceil_div(classes, part_classes)), static_cast<int>(part_classes)};
}

// Whether rows are short and lie one after another.
inline bool in_tiles(const Problem& p, int element_bytes) {
  return int64_t{p.classes} * element_bytes <= kTileRowBytes && p.row_stride == p.classes;
}

inline unsigned tile_grid(int64_t rows, Tile tile, int multiprocessors, const char* kernel) {
  const int64_t most = int64_t{multiprocessors} * kTileBlocks;
  return checked_grid(balanced_blocks(ceil_div(rows, tile.rows), most), kernel);
}

// States per row that the forward needs room for: more than one where blocks share a row.
inline int forward_parts(int64_t rows, int classes, int64_t row_stride, DType dtype,
                         int multiprocessors) {
  const Problem p{.rows = rows, .row_stride = row_stride, .classes = classes};
  if (rows == 0 || in_tiles(p, bytes_of(dtype))) return 1;
  return plan_rows(rows, classes, bytes_of(dtype), multiprocessors).parts;
}

template <typename T>
void launch_forward(ForwardArgs a, Target target) {
  const Problem& p = a.problem;
  if (in_tiles(p, sizeof(T))) {
    constexpr const char* kName = "cross_entropy forward_tile_kernel";
    const Tile tile = plan_tile(p.rows, p.classes, sizeof(T), target.multiprocessors);
    const unsigned grid = tile_grid(p.rows, tile, target.multiprocessors, kName);
    const size_t shared = tile_bytes(tile, p.classes, sizeof(T), sizeof(RowState));
    const dim3 block(tile.lanes, kTileThreads / tile.lanes);
    forward_tile_kernel<T><<<grid, block, shared, target.stream>>>(a, tile.rows);
    return check_launch(kName);
  }
  constexpr const char* kName = "cross_entropy forward_rows_kernel";
  const RowPlan plan = plan_rows(p.rows, p.classes, sizeof(T), target.multiprocessors);
  const dim3 grid = plan.grid(p.rows, target.multiprocessors, kName);
  a.part_classes = plan.part_classes;
  forward_rows_kernel<T><<<grid, plan.block, 0, target.stream>>>(a);
  check_launch(kName);
  if (plan.parts == 1) return;
  constexpr const char* kMerge = "cross_entropy merge_parts_kernel";
  merge_parts_kernel<<<checked_grid(p.rows, kMerge), kWarp, 0, target.stream>>>(a, plan.parts);
  check_launch(kMerge);
}

// Losses and lse of every row; a.parts is given where forward_parts are more than one. Nothing is
// launched where there are no rows.
inline void forward(const ForwardArgs& a, DType dtype, Target target) {
  if (a.problem.rows == 0) return;
  dispatch(dtype, [&]<typename T>() { launch_forward<T>(a, target); });
}

template <typename T>
void launch_backward(BackwardArgs a, Target target) {
  const Problem& p = a.problem;
  // Tiles are written as they were read: from the same distance to a 128-bit boundary.
  const bool alike =
      (reinterpret_cast<uintptr_t>(p.input) - reinterpret_cast<uintptr_t>(a.dinput)) %
          kVectorBytes ==
      0;
  if (in_tiles(p, sizeof(T)) && a.dinput_stride == p.classes && alike) {
    constexpr const char* kName = "cross_entropy backward_tile_kernel";
    const Tile tile = plan_tile(p.rows, p.classes, sizeof(T), target.multiprocessors);
    const unsigned grid = tile_grid(p.rows, tile, target.multiprocessors, kName);
    const size_t shared = tile_bytes(tile, p.classes, sizeof(T), sizeof(RowGradient));
    const dim3 block(tile.lanes, kTileThreads / tile.lanes);
    backward_tile_kernel<T><<<grid, block, shared, target.stream>>>(a, tile.rows);
    return check_launch(kName);
  }
  constexpr const char* kName = "cross_entropy backward_rows_kernel";
  const RowPlan plan = plan_rows(p.rows, p.classes, sizeof(T), target.multiprocessors);
  const dim3 grid = plan.grid(p.rows, target.multiprocessors, kName);
  a.part_classes = plan.part_classes;
  backward_rows_kernel<T><<<grid, plan.block, 0, target.stream>>>(a);
  check_launch(kName);
}

template <typename Q>
void launch_mass(const Problem& p, float* mass, Target target) {
  constexpr const char* kName = "cross_entropy mass_kernel";
  const dim3 block(row_block(int64_t{p.classes} * sizeof(Q)).x);
  const int64_t blocks = balanced_blocks(p.rows, resident_blocks(target.multiprocessors, block));
  mass_kernel<Q><<<checked_grid(blocks, kName), block, 0, target.stream>>>(p, mass);
  check_launch(kName);
}

// The gradient of every row. `mass` has room for [rows] floats where there are probabilities.
// Nothing is launched where there are no rows.
inline void backward(BackwardArgs a, float* mass, DType dtype, Target target) {
  const Problem& p = a.problem;
  if (p.rows == 0) return;
  if (p.probabilities != nullptr) {
    dispatch(p.wide_probabilities ? DType::kFloat32 : dtype,
             [&]<typename Q>() { launch_mass<Q>(p, mass, target); });
    a.mass = mass;
  }
  dispatch(dtype, [&]<typename T>() { launch_backward<T>(a, target); });
}

}  // namespace kernels::cross_entropy
