// Attention's entry points of the Python module `kernels._cuda`. Their many arguments arrive flat,
// in the order in which `Arguments` takes them: kernels/attention/cuda.py has the other side.
#include "attention/cuda.cuh"

#include "common/cuda/module.cuh"

namespace kernels::attention {
namespace {

// Address, strides of batch, heads and rows, columns.
Heads take_heads(Arguments& given, DType dtype) {
  Heads h{};
  h.at = given.pointer();
  h.batch = given.take<int64_t>();
  h.head = given.take<int64_t>();
  h.row = given.take<int64_t>();
  h.columns = given.take<int>();
  const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t bits =
      static_cast<int64_t>(reinterpret_cast<Address>(h.at)) | (h.batch | h.head | h.row) * element;
  h.vectors = bits % kVectorBytes == 0;
  return h;
}

Problem take_problem(Arguments& given) {
  Problem p{};
  p.batches = given.take<int>();
  p.heads = given.take<int>();
  p.group = given.take<int>();
  p.queries = given.take<int>();
  p.keys = given.take<int>();
  p.all_queries = given.take<int64_t>();
  p.cu_q = given.pointer<const int>();
  p.cu_k = given.pointer<const int>();
  p.low = given.take<int>();
  p.high = given.take<int>();
  p.limit = given.take<int>();
  p.lower_right = given.take<int>();
  p.global_tokens = given.take<int>();
  p.global_mask = given.pointer<const uint8_t>();
  p.global_batch = given.take<int64_t>();
  p.global_key = given.take<int64_t>();
  p.globals = given.pointer<const int>();
  p.n_globals = given.pointer<const int>();
  p.mask = given.pointer();
  p.mask_kind = static_cast<Mask>(given.take<int>());
  p.mask_batch = given.take<int64_t>();
  p.mask_head = given.take<int64_t>();
  p.mask_query = given.take<int64_t>();
  p.mask_key = given.take<int64_t>();
  p.alibi_slopes = given.pointer<const float>();
  p.alibi_batch = given.take<int64_t>();
  p.alibi_head = given.take<int64_t>();
  p.sinks = given.pointer<const float>();
  p.scale = given.take<float>();
  p.softcap = given.take<float>();
  p.seed = given.pointer<const int64_t>();
  p.threshold = given.take<int>();
  p.keep_factor = given.take<float>();
  return p;
}

// Mask, strides of batch and key, batches, keys, global tokens, list, counts, device, stream.
void attention_globals(Arguments& given) {
  GlobalsArgs a{};
  a.mask = given.pointer<const uint8_t>();
  a.batch = given.take<int64_t>();
  a.key = given.take<int64_t>();
  const int batches = given.take<int>();
  a.keys = given.take<int>();
  a.global_tokens = given.take<int>();
  a.globals = given.pointer<int>();
  a.count = given.pointer<int>();
  const DeviceGuard guard(given.take<int>());
  auto* stream = given.pointer<CUstream_st>();
  given.end();
  list_globals(a, batches, stream);
}

// Dtype, problem, query, key, value, out, lse, device, stream.
void attention_forward(Arguments& given) {
  const DType dtype = checked_dtype(given.take<int>());
  ForwardArgs a{};
  a.problem = take_problem(given);
  for (Heads* heads : {&a.query, &a.key, &a.value, &a.out}) *heads = take_heads(given, dtype);
  a.lse = given.pointer<float>();
  const DeviceGuard guard(given.take<int>());
  auto* stream = given.pointer<CUstream_st>();
  given.end();
  forward(a, dtype, stream);
}

// Dtype, problem, query, key, value, dout, dquery, dkey, dvalue, out, lse, dlse, delta, dsinks,
// batch entries of lse, device, stream.
void attention_backward(Arguments& given) {
  const DType dtype = checked_dtype(given.take<int>());
  BackwardArgs a{};
  a.problem = take_problem(given);
  for (Heads* heads : {&a.query, &a.key, &a.value, &a.dout, &a.dquery, &a.dkey, &a.dvalue}) {
    *heads = take_heads(given, dtype);
  }
  DeltaArgs d{};
  d.dout = a.dout;
  d.out = take_heads(given, dtype);
  d.lse = a.lse = given.pointer<const float>();
  d.dlse = given.pointer<const float>();
  d.delta = given.pointer<float>();
  a.delta = d.delta;
  const Problem& p = a.problem;
  SinkArgs s{p.sinks,           a.lse,   a.delta,      given.pointer<float>(),
             given.take<int>(), p.heads, p.all_queries};
  d.heads = p.heads;
  d.queries = static_cast<int>(p.all_queries);
  d.rows = int64_t{s.batches} * p.heads * p.all_queries;
  const DeviceGuard guard(given.take<int>());
  auto* stream = given.pointer<CUstream_st>();
  given.end();
  delta(d, dtype, stream);
  if (s.dsinks != nullptr) dsinks(s, stream);
  backward(a, dtype, stream);
}

int attention_decode_splits(int64_t planes, int keys, int multiprocessors) {
  return decode_splits(planes, keys, multiprocessors);
}

// Dtype, cache, query, keys, values, out, lengths, table and its stride, pages, page size, rows of
// the cache, scales of keys and values with three strides each, slopes and strides, sinks, batches,
// heads, group, queries, low, high, limit, global tokens, scale, softcap, splits, parts' out and
// lse, lse, device, stream.
void attention_decode(Arguments& given) {
  const DType dtype = checked_dtype(given.take<int>());
  DecodeArgs a{};
  CombineArgs c{};
  a.cache = static_cast<Cache>(given.take<int>());
  for (Heads* heads : {&a.query, &a.keys, &a.values, &c.out}) *heads = take_heads(given, dtype);
  a.lengths = given.pointer<const int>();
  a.table = given.pointer<const int>();
  a.table_batch = given.take<int64_t>();
  for (int* number : {&a.pages, &a.page_size, &a.cache_rows}) *number = given.take<int>();
  a.key_scale = given.pointer<const float>();
  for (int64_t& stride : a.key_scale_stride) stride = given.take<int64_t>();
  a.value_scale = given.pointer<const float>();
  for (int64_t& stride : a.value_scale_stride) stride = given.take<int64_t>();
  a.alibi_slopes = given.pointer<const float>();
  a.alibi_batch = given.take<int64_t>();
  a.alibi_head = given.take<int64_t>();
  c.sinks = given.pointer<const float>();
  for (int* number :
       {&a.batches, &a.heads, &a.group, &a.queries, &a.low, &a.high, &a.limit, &a.global_tokens}) {
    *number = given.take<int>();
  }
  a.scale = given.take<float>();
  a.softcap = given.take<float>();
  a.splits = given.take<int>();
  c.part_out = a.part_out = given.pointer<float>();
  c.part_lse = a.part_lse = given.pointer<float>();
  c.lse = given.pointer<float>();
  c.heads = a.heads;
  c.queries = a.queries;
  c.rows = int64_t{a.batches} * a.heads * a.queries;
  const DeviceGuard guard(given.take<int>());
  auto* stream = given.pointer<CUstream_st>();
  given.end();
  decode(a, c, dtype, stream);
}

}  // namespace

PyMethodDef entry_points[] = {ENTRY_POINT(attention_globals),  ENTRY_POINT(attention_forward),
                              ENTRY_POINT(attention_backward), ENTRY_POINT(attention_decode_splits),
                              ENTRY_POINT(attention_decode),   {nullptr, nullptr, 0, nullptr}};

}  // namespace kernels::attention
