// What the Python module and the per-instruction-set attention kernels agree on.
// Math and shapes: kernels/attention/README.md.
#pragma once
#include <cstdint>

#include "common/cpu/dtype.h"

namespace kernels::attention {

constexpr int kMaxHeadDim = 256;

// [batch, heads, rows, columns] with any strides but the last, which is 1.  All in elements.
struct Heads {
  void* data;
  int64_t batch, head, row;  // strides
};

enum class MaskKind : int { kNone, kBool, kFloat32, kBFloat16, kFloat16 };

struct Mask {  // [batch, heads, queries, keys]
  MaskKind kind;
  const void* data;
  int64_t batch, head, query, key;  // strides; key is 1 or 0
};

// The arguments of the op; packed sequences come with both cu_seqlens and a batch of 1.
struct Call {
  DType dtype;  // of query, key, value, their gradients, out and dout
  int64_t batch, heads, kv_heads, queries, keys;
  int head_dim, value_dim;
  Heads query, key, value, out;
  float* lse;  // [batch, heads, queries]
  Mask mask;
  const float* alibi_slopes;  // [batch or sequences, heads] or null
  int64_t alibi_batch, alibi_head;
  const float* sinks;                          // [heads] or null
  const uint8_t* global_mask;                  // [batch, keys] or null
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [sequences + 1] or both null
  int64_t sequences;                           // batch where not packed
  bool causal, lower_right;
  int64_t left, right, global_tokens;  // -1: the window is unbounded on that side
  float scale, softcap;                // softcap 0: none
  double dropout_p;
  uint64_t seed;
};

struct Gradients {
  Heads dout;         // last stride 1
  const float* dlse;  // [batch, heads, queries] or null
  int64_t dlse_batch, dlse_head, dlse_query;
  Heads dquery, dkey, dvalue;  // data is null where not wanted
  float* dsinks;               // [heads] or null
  float* delta;                // [batch, heads, queries], scratch
};

struct Scales {  // float32 [batch or pages, heads, rows]; absent where data is null
  const float* data;
  int64_t batch, head, row;  // strides
};

// A few queries, the last of each sequence, against a cache of keys and values.
struct DecodeCall {
  DType dtype;      // of query and out
  bool int8_cache;  // else the cache is of `cache_dtype`
  DType cache_dtype;
  int64_t batch, heads, kv_heads, queries;
  int head_dim, value_dim;
  Heads query, out;
  float* lse;        // [batch, heads, queries]
  Heads key, value;  // with a block table the first dimension is pages
  Scales key_scale, value_scale;
  const int32_t* lengths;      // [batch]
  const int32_t* block_table;  // [batch, table_row] or null
  int64_t table_row, page_size;
  const float* alibi_slopes;  // [batch, heads] or null
  int64_t alibi_batch, alibi_head;
  const float* sinks;  // [heads] or null
  bool causal;
  int64_t left, right, global_tokens;  // as in Call
  float scale, softcap;
};

struct CpuKernels {
  void (*forward)(const Call&);
  void (*decode)(const DecodeCall&);
  void (*backward)(const Call&, const Gradients&);
};

}  // namespace kernels::attention

// One table per compiled instruction set; common/cpu/isa.h lists them.
namespace kernels::baseline {
extern const kernels::attention::CpuKernels attention_kernels;
}
namespace kernels::avx2 {
extern const kernels::attention::CpuKernels attention_kernels;
}
namespace kernels::avx512 {
extern const kernels::attention::CpuKernels attention_kernels;
}
namespace kernels::avx512_bf16 {
extern const kernels::attention::CpuKernels attention_kernels;
}
namespace kernels::neon_dotprod {
extern const kernels::attention::CpuKernels attention_kernels;
}
