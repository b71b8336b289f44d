// Attention on CUDA, host side: picks the kernel by dtype and head dimension, and launches.
// Kernels: cuda_forward.cuh, cuda_forward_sm90.cuh, cuda_backward.cuh, cuda_rows.cuh,
// cuda_decode.cuh. No torch, no Python.
#pragma once

#include "attention/cuda_backward.cuh"
#include "attention/cuda_decode.cuh"
#include "attention/cuda_forward.cuh"
#include "attention/cuda_forward_sm90.cuh"
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

// Does forward_sm90_kernel serve this call? Causality, windows, fewer key heads and sinks it has;
// what looks at scores one by one, gathers rows or packs sequences is left to forward_kernel.
template <typename T, int kColumns>
bool takes_sm90(const ForwardArgs& a) {
  const Problem& p = a.problem;
  const bool plain = p.scale > 0.f && p.softcap == 0.f && p.alibi_slopes == nullptr &&
                     p.mask_kind == Mask::kNone && p.seed == nullptr && p.cu_q == nullptr &&
                     !p.has_globals();
  const auto panels = [](const Heads& h, int rows) {  // can TMA copy it?
    return h.columns == kColumns && h.vectors && rows > 0 && (rows == 1 || h.row > 0);
  };
  if (!plain || !panels(a.query, p.queries) || !panels(a.key, p.keys) || !panels(a.value, p.keys)) {
    return false;
  }
  int device = 0, major = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "cudaDeviceGetAttribute");
  if (major != 9) return false;
  cudaFuncAttributes built;  // empty, for fewer threads, unless the module was built for sm_90a
  check_cuda(cudaFuncGetAttributes(&built, forward_sm90_kernel<T, kColumns>),
             "cudaFuncGetAttributes");
  return built.maxThreadsPerBlock >= ForwardSm90Shape<kColumns>::kThreads;
}

template <typename T, int kColumns>
void forward_sm90(const ForwardArgs& forward, DType dtype, cudaStream_t stream) {
  using Shape = ForwardSm90Shape<kColumns>;
  const Problem& p = forward.problem;
  const auto map = [&](const Heads& h, int heads, int rows, int panel_rows) {
    constexpr int64_t kBytes = sizeof(T);
    return panel_map({h.at,
                      {p.batches, heads, rows},
                      {h.batch * kBytes, h.head * kBytes, h.row * kBytes},
                      h.columns},
                     dtype, panel_rows);
  };
  const int kv_heads = p.heads / p.group;
  ForwardSm90Args a{forward, map(forward.query, p.heads, p.queries, Shape::kGroupRows),
                    map(forward.key, kv_heads, p.keys, Shape::kKeys),
                    map(forward.value, kv_heads, p.keys, Shape::kKeys)};
  a.grid = grid_of(p, p.queries, Shape::kRows, p.heads, p.limit == 0);
  launch(forward_sm90_kernel<T, kColumns>, "attention forward_sm90_kernel", a, p.batches, 1,
         Shape::kThreads, Shape::kShared, stream);
}

inline void forward(ForwardArgs a, DType dtype, cudaStream_t stream) {
  const int columns = std::max(a.query.columns, a.value.columns);
  with_shape(dtype, columns, [&]<typename T, int kColumns>() {
    if constexpr (sizeof(T) == 2 && kColumns <= 128) {
      if (takes_sm90<T, kColumns>(a)) return forward_sm90<T, kColumns>(a, dtype, stream);
    }
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
