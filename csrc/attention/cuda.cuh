// Attention on CUDA, host side: picks the kernel by dtype and head dimension, and launches.
// Kernels: cuda_forward.cuh, cuda_backward.cuh, cuda_rows.cuh, cuda_decode.cuh. No torch, no
// Python.
#pragma once

#include "attention/cuda_backward.cuh"
#include "attention/cuda_decode.cuh"
#include "attention/cuda_forward.cuh"
#include "attention/cuda_rows.cuh"

namespace kernels::attention {

constexpr int kMaxColumns = 256;

// Calls f<T, kColumns>() for the narrowest tiles that hold `columns`.
template <typename F>
void with_shape(DType dtype, int columns, F&& f) {
  if (columns < 1 || columns > kMaxColumns) {
    throw std::invalid_argument("head dimension " + std::to_string(columns) +
                                " is not between 1 and 256");
  }
  const auto with = [&]<typename T>() {
    if (columns <= 64) return f.template operator()<T, 64>();
    if (columns <= 128) return f.template operator()<T, 128>();
    f.template operator()<T, 256>();
  };
  if (dtype == DType::kFloat32) return with.template operator()<float>();
  if (dtype == DType::kBFloat16) return with.template operator()<__nv_bfloat16>();
  with.template operator()<__half>();
}

// Launches a kernel whose tiles need more shared memory than a block has without asking.
template <typename Args>
void launch(void (*kernel)(Args), const char* name, const Args& args, int sequences, int parts,
            int threads, size_t shared, cudaStream_t stream) {
  const int64_t blocks = int64_t{args.grid.blocks()} * args.grid.heads * sequences;
  if (blocks == 0) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared)),
             name);
  const dim3 grid(checked_grid(blocks, name), static_cast<unsigned>(parts));
  kernel<<<grid, threads, shared, stream>>>(args);
  check_launch(name);
}

// The list of global positions that forward and backward need where there is a global mask.
inline void list_globals(const GlobalsArgs& a, int batches, cudaStream_t stream) {
  constexpr const char* kName = "attention globals_kernel";
  if (batches == 0) return;
  globals_kernel<<<checked_grid(batches, kName), kRowThreads, 0, stream>>>(a);
  check_launch(kName);
}

inline void forward(ForwardArgs a, DType dtype, cudaStream_t stream) {
  const int columns = std::max(a.query.columns, a.value.columns);
  with_shape(dtype, columns, [&]<typename T, int kColumns>() {
    using Shape = ForwardShape<T, kColumns>;
    const Problem& p = a.problem;
    a.grid = grid_of(p, p.queries, Shape::kRows, p.heads, p.limit == 0);
    launch(forward_kernel<T, kColumns>, "attention forward_kernel", a, p.batches, 1,
           Shape::kThreads, Shape::kShared, stream);
  });
}

template <typename T>
void launch_delta(const DeltaArgs& a, cudaStream_t stream) {
  constexpr const char* kName = "attention delta_kernel";
  const int64_t blocks = ceil_div(a.rows, kRowThreads / kLanesPerRow);
  delta_kernel<T><<<checked_grid(blocks, kName), kRowThreads, 0, stream>>>(a);
  check_launch(kName);
}

inline void delta(const DeltaArgs& a, DType dtype, cudaStream_t stream) {
  if (a.rows == 0) return;
  if (dtype == DType::kFloat32) return launch_delta<float>(a, stream);
  if (dtype == DType::kBFloat16) return launch_delta<__nv_bfloat16>(a, stream);
  launch_delta<__half>(a, stream);
}

inline void dsinks(const SinkArgs& a, cudaStream_t stream) {
  constexpr const char* kName = "attention dsinks_kernel";
  dsinks_kernel<<<checked_grid(a.heads, kName), kRowThreads, 0, stream>>>(a);
  check_launch(kName);
}

// The gradients whose pointers are given, after `delta`.
inline void backward(BackwardArgs a, DType dtype, cudaStream_t stream) {
  const int columns = std::max(a.query.columns, a.value.columns);
  with_shape(dtype, columns, [&]<typename T, int kColumns>() {
    const Problem& p = a.problem;
    if (a.dkey.at != nullptr || a.dvalue.at != nullptr) {
      using Shape = BackwardShape<T, kColumns, true>;
      a.grid = grid_of(p, p.keys, Shape::kRows, p.heads / p.group, false);
      launch(dkey_dvalue_kernel<T, kColumns>, "attention dkey_dvalue_kernel", a, p.batches,
             Shape::kSplit ? 2 : 1, Shape::kThreads, Shape::kShared, stream);
    }
    if (a.dquery.at != nullptr) {
      using Shape = BackwardShape<T, kColumns, false>;
      a.grid = grid_of(p, p.queries, Shape::kRows, p.heads, p.limit == 0);
      launch(dquery_kernel<T, kColumns>, "attention dquery_kernel", a, p.batches, 1,
             Shape::kThreads, Shape::kShared, stream);
    }
  });
}

// Splits of the keys: enough blocks for two per multiprocessor, none with less than four tiles.
inline int decode_splits(int64_t planes, int keys, int multiprocessors) {
  const int64_t wanted = ceil_div(2 * int64_t{multiprocessors}, std::max<int64_t>(planes, 1));
  return static_cast<int>(
      std::clamp<int64_t>(wanted, 1, std::max<int64_t>(ceil_div(keys, 256), 1)));
}

constexpr int kDecodeParts = 4;  // of a split: the warps of a block, at most

inline void decode(const DecodeArgs& a, CombineArgs combine, DType dtype, cudaStream_t stream) {
  with_shape(dtype, std::max(a.query.columns, a.values.columns), [&]<typename T, int kColumns>() {
    using Shape = DecodeShape<T, kColumns>;
    constexpr const char* kName = "attention decode_kernel";
    const int64_t row_blocks = ceil_div(int64_t{a.group} * a.queries, 16);
    const int64_t blocks = row_blocks * (a.heads / a.group) * a.batches;
    check_cuda(cudaFuncSetAttribute(decode_kernel<T, kColumns>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(Shape::kShared)),
               kName);
    const dim3 grid(checked_grid(blocks, kName), static_cast<unsigned>(a.splits));
    decode_kernel<T, kColumns><<<grid, Shape::kThreads, Shape::kShared, stream>>>(a);
    check_launch(kName);
    combine.parts = a.splits * Shape::kWarps;
    constexpr const char* kCombine = "attention combine_kernel";
    const unsigned rows = checked_grid(ceil_div(combine.rows, kRowThreads / kWarp), kCombine);
    combine_kernel<T><<<rows, kRowThreads, 0, stream>>>(combine);
    check_launch(kCombine);
  });
}

}  // namespace kernels::attention
