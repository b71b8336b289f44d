// Attention's entry points of the Python module `kernels._cpu`.
//
// Tensors arrive checked from kernels/attention/cpu.py; None stands for an absent one.
#include "common/cpu/isa.h"
#include "common/cpu/python.h"

namespace kernels::attention {
namespace {

Heads heads(const View& x) { return {x.data, x.stride[0], x.stride[1], x.stride[2]}; }

MaskKind mask_kind(const View& mask) {
  if (!mask.data) return MaskKind::kNone;
  switch (mask.dtype) {
    case int(DType::kFloat32):
      return MaskKind::kFloat32;
    case int(DType::kBFloat16):
      return MaskKind::kBFloat16;
    case int(DType::kFloat16):
      return MaskKind::kFloat16;
    default:
      return MaskKind::kBool;
  }
}

template <class T>
const T* pointer(const Memory& x) {
  return static_cast<const T*>(x.data);
}

// The arguments of kernels/attention/cpu.py's forward, the tensors first.  `sequences` counts the
// batch entries or the packed sequences.
Call make_call(const View& query, const View& key, const View& value, const View& mask,
               const View& alibi_slopes, Memory sinks, Memory global_mask, Memory seed,
               Memory cu_seqlens_q, Memory cu_seqlens_k, int64_t sequences, int64_t causal,
               int64_t lower_right, int64_t left, int64_t right, int64_t global_tokens,
               double scale, double softcap, double dropout_p, const View& out, Memory lse) {
  return {.dtype = DType(query.dtype),
          .batch = query.size[0],
          .heads = query.size[1],
          .kv_heads = key.size[1],
          .queries = query.size[2],
          .keys = key.size[2],
          .head_dim = int(query.size[3]),
          .value_dim = int(value.size[3]),
          .query = heads(query),
          .key = heads(key),
          .value = heads(value),
          .out = heads(out),
          .lse = static_cast<float*>(lse.data),
          .mask = {mask_kind(mask), mask.data, mask.stride[0], mask.stride[1], mask.stride[2],
                   mask.stride[3]},
          .alibi_slopes = pointer<float>(alibi_slopes),
          .alibi_batch = alibi_slopes.stride[0],
          .alibi_head = alibi_slopes.stride[1],
          .sinks = pointer<float>(sinks),
          .global_mask = pointer<uint8_t>(global_mask),
          .cu_seqlens_q = pointer<int32_t>(cu_seqlens_q),
          .cu_seqlens_k = pointer<int32_t>(cu_seqlens_k),
          .sequences = sequences,
          .causal = causal != 0,
          .lower_right = lower_right != 0,
          .left = left,
          .right = right,
          .global_tokens = global_tokens,
          .scale = float(scale),
          .softcap = float(softcap),
          .dropout_p = seed.data ? dropout_p : 0,
          .seed = seed.data ? *pointer<uint64_t>(seed) : 0};
}

void attention_forward(View query, View key, View value, View mask, View alibi_slopes, Memory sinks,
                       Memory global_mask, Memory seed, Memory cu_seqlens_q, Memory cu_seqlens_k,
                       int64_t sequences, int64_t causal, int64_t lower_right, int64_t left,
                       int64_t right, int64_t global_tokens, double scale, double softcap,
                       double dropout_p, View out, Memory lse) {
  const Call call = make_call(query, key, value, mask, alibi_slopes, sinks, global_mask, seed,
                              cu_seqlens_q, cu_seqlens_k, sequences, causal, lower_right, left,
                              right, global_tokens, scale, softcap, dropout_p, out, lse);
  const WithoutGil others_run;
  current_instruction_set()->attention->forward(call);
}

// dsinks: float32 [heads]; delta: float32, as lse.
void attention_backward(View query, View key, View value, View mask, View alibi_slopes,
                        Memory sinks, Memory global_mask, Memory seed, Memory cu_seqlens_q,
                        Memory cu_seqlens_k, int64_t sequences, int64_t causal, int64_t lower_right,
                        int64_t left, int64_t right, int64_t global_tokens, double scale,
                        double softcap, double dropout_p, View out, Memory lse, View dout,
                        View dlse, View dquery, View dkey, View dvalue, Memory dsinks,
                        Memory delta) {
  const Call call = make_call(query, key, value, mask, alibi_slopes, sinks, global_mask, seed,
                              cu_seqlens_q, cu_seqlens_k, sequences, causal, lower_right, left,
                              right, global_tokens, scale, softcap, dropout_p, out, lse);
  const Gradients gradients = {.dout = heads(dout),
                               .dlse = pointer<float>(dlse),
                               .dlse_batch = dlse.stride[0],
                               .dlse_head = dlse.stride[1],
                               .dlse_query = dlse.stride[2],
                               .dquery = heads(dquery),
                               .dkey = heads(dkey),
                               .dvalue = heads(dvalue),
                               .dsinks = static_cast<float*>(dsinks.data),
                               .delta = static_cast<float*>(delta.data)};
  const WithoutGil others_run;
  current_instruction_set()->attention->backward(call, gradients);
}

// The arguments of kernels/attention/decode/cpu.py's forward.
void attention_decode(View query, View key, View value, Memory lengths, View block_table,
                      View key_scale, View value_scale, View alibi_slopes, Memory sinks,
                      int64_t causal, int64_t left, int64_t right, int64_t global_tokens,
                      double scale, double softcap, View out, Memory lse) {
  auto scales = [](const View& x) {
    return Scales{pointer<float>(x), x.stride[0], x.stride[1], x.stride[2]};
  };
  const DecodeCall call = {.dtype = DType(query.dtype),
                           .int8_cache = key.dtype < 0,
                           .cache_dtype = key.dtype < 0 ? DType::kFloat32 : DType(key.dtype),
                           .batch = query.size[0],
                           .heads = query.size[1],
                           .kv_heads = key.size[1],
                           .queries = query.size[2],
                           .head_dim = int(query.size[3]),
                           .value_dim = int(value.size[3]),
                           .query = heads(query),
                           .out = heads(out),
                           .lse = static_cast<float*>(lse.data),
                           .key = heads(key),
                           .value = heads(value),
                           .key_scale = scales(key_scale),
                           .value_scale = scales(value_scale),
                           .lengths = pointer<int32_t>(lengths),
                           .block_table = pointer<int32_t>(block_table),
                           .table_row = block_table.stride[0],
                           .page_size = key.size[2],
                           .alibi_slopes = pointer<float>(alibi_slopes),
                           .alibi_batch = alibi_slopes.stride[0],
                           .alibi_head = alibi_slopes.stride[1],
                           .sinks = pointer<float>(sinks),
                           .causal = causal != 0,
                           .left = left,
                           .right = right,
                           .global_tokens = global_tokens,
                           .scale = float(scale),
                           .softcap = float(softcap)};
  const WithoutGil others_run;
  current_instruction_set()->attention->decode(call);
}

}  // namespace

PyMethodDef entry_points[] = {ENTRY_POINT(attention_forward),
                              ENTRY_POINT(attention_decode),
                              ENTRY_POINT(attention_backward),
                              {nullptr, nullptr, 0, nullptr}};

}  // namespace kernels::attention
