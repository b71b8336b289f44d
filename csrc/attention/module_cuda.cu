// Attention's entry points of the Python module `kernels._cuda`. Their many arguments arrive flat,
// in the order in which `Arguments` takes them: kernels/attention/cuda.py has the other side.
#include "attention/cuda.cuh"
#include "common/cuda/module.cuh"

namespace kernels::attention {
namespace {

namespace py = pybind11;

class Arguments {
 public:
  explicit Arguments(const py::args& all) : all_(all) {}

  template <typename T>
  T take() {
    if (next_ == all_.size()) throw std::invalid_argument("too few arguments");
    return all_[next_++].cast<T>();
  }
  template <typename T = void>
  T* pointer() {
    return kernels::pointer<T>(take<Address>());
  }
  void end() const {
    if (next_ != all_.size()) throw std::invalid_argument("too many arguments");
  }

  // Address, strides of batch, heads and rows, columns.
  Heads heads(DType dtype) {
    Heads h{};
    h.at = pointer();
    h.batch = take<int64_t>();
    h.head = take<int64_t>();
    h.row = take<int64_t>();
    h.columns = take<int>();
    const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
    const int64_t bits = static_cast<int64_t>(reinterpret_cast<Address>(h.at)) |
                         (h.batch | h.head | h.row) * element;
    h.vectors = bits % kVectorBytes == 0;
    return h;
  }

  Problem problem() {
    Problem p{};
    p.batches = take<int>();
    p.heads = take<int>();
    p.group = take<int>();
    p.queries = take<int>();
    p.keys = take<int>();
    p.all_queries = take<int64_t>();
    p.cu_q = pointer<const int>();
    p.cu_k = pointer<const int>();
    p.low = take<int>();
    p.high = take<int>();
    p.limit = take<int>();
    p.lower_right = take<int>();
    p.global_tokens = take<int>();
    p.global_mask = pointer<const uint8_t>();
    p.global_batch = take<int64_t>();
    p.global_key = take<int64_t>();
    p.globals = pointer<const int>();
    p.n_globals = pointer<const int>();
    p.mask = pointer();
    p.mask_kind = static_cast<Mask>(take<int>());
    p.mask_batch = take<int64_t>();
    p.mask_head = take<int64_t>();
    p.mask_query = take<int64_t>();
    p.mask_key = take<int64_t>();
    p.alibi_slopes = pointer<const float>();
    p.alibi_batch = take<int64_t>();
    p.alibi_head = take<int64_t>();
    p.sinks = pointer<const float>();
    p.scale = take<float>();
    p.softcap = take<float>();
    p.seed = pointer<const int64_t>();
    p.threshold = take<unsigned>();
    p.keep_factor = take<float>();
    return p;
  }

 private:
  py::args all_;
  size_t next_ = 0;
};

// Mask, strides of batch and key, batches, keys, global tokens, list, counts, device, stream.
void attention_globals(const py::args& all) {
  Arguments take(all);
  GlobalsArgs a{};
  a.mask = take.pointer<const uint8_t>();
  a.batch = take.take<int64_t>();
  a.key = take.take<int64_t>();
  const int batches = take.take<int>();
  a.keys = take.take<int>();
  a.global_tokens = take.take<int>();
  a.globals = take.pointer<int>();
  a.count = take.pointer<int>();
  const DeviceGuard guard(take.take<int>());
  auto* stream = take.pointer<CUstream_st>();
  take.end();
  list_globals(a, batches, stream);
}

// Dtype, problem, query, key, value, out, lse, device, stream.
void attention_forward(const py::args& all) {
  Arguments take(all);
  const DType dtype = checked_dtype(take.take<int>());
  ForwardArgs a{};
  a.problem = take.problem();
  for (Heads* heads : {&a.query, &a.key, &a.value, &a.out}) *heads = take.heads(dtype);
  a.lse = take.pointer<float>();
  const DeviceGuard guard(take.take<int>());
  auto* stream = take.pointer<CUstream_st>();
  take.end();
  forward(a, dtype, stream);
}

// Dtype, problem, query, key, value, dout, dquery, dkey, dvalue, out, lse, dlse, delta, dsinks,
// batch entries of lse, device, stream.
void attention_backward(const py::args& all) {
  Arguments take(all);
  const DType dtype = checked_dtype(take.take<int>());
  BackwardArgs a{};
  a.problem = take.problem();
  for (Heads* heads : {&a.query, &a.key, &a.value, &a.dout, &a.dquery, &a.dkey, &a.dvalue}) {
    *heads = take.heads(dtype);
  }
  DeltaArgs d{};
  d.dout = a.dout;
  d.out = take.heads(dtype);
  d.lse = a.lse = take.pointer<const float>();
  d.dlse = take.pointer<const float>();
  d.delta = take.pointer<float>();
  a.delta = d.delta;
  const Problem& p = a.problem;
  SinkArgs s{p.sinks,          a.lse,   a.delta,      take.pointer<float>(),
             take.take<int>(), p.heads, p.all_queries};
  d.heads = p.heads;
  d.queries = static_cast<int>(p.all_queries);
  d.rows = int64_t{s.batches} * p.heads * p.all_queries;
  const DeviceGuard guard(take.take<int>());
  auto* stream = take.pointer<CUstream_st>();
  take.end();
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
void attention_decode(const py::args& all) {
  Arguments take(all);
  const DType dtype = checked_dtype(take.take<int>());
  DecodeArgs a{};
  CombineArgs c{};
  a.cache = static_cast<Cache>(take.take<int>());
  for (Heads* heads : {&a.query, &a.keys, &a.values, &c.out}) *heads = take.heads(dtype);
  a.lengths = take.pointer<const int>();
  a.table = take.pointer<const int>();
  a.table_batch = take.take<int64_t>();
  for (int* number : {&a.pages, &a.page_size, &a.cache_rows}) *number = take.take<int>();
  a.key_scale = take.pointer<const float>();
  for (int64_t& stride : a.key_scale_stride) stride = take.take<int64_t>();
  a.value_scale = take.pointer<const float>();
  for (int64_t& stride : a.value_scale_stride) stride = take.take<int64_t>();
  a.alibi_slopes = take.pointer<const float>();
  a.alibi_batch = take.take<int64_t>();
  a.alibi_head = take.take<int64_t>();
  c.sinks = take.pointer<const float>();
  for (int* number :
       {&a.batches, &a.heads, &a.group, &a.queries, &a.low, &a.high, &a.limit, &a.global_tokens}) {
    *number = take.take<int>();
  }
  a.scale = take.take<float>();
  a.softcap = take.take<float>();
  a.splits = take.take<int>();
  c.part_out = a.part_out = take.pointer<float>();
  c.part_lse = a.part_lse = take.pointer<float>();
  c.lse = take.pointer<float>();
  c.heads = a.heads;
  c.queries = a.queries;
  c.rows = int64_t{a.batches} * a.heads * a.queries;
  const DeviceGuard guard(take.take<int>());
  auto* stream = take.pointer<CUstream_st>();
  take.end();
  decode(a, c, dtype, stream);
}

}  // namespace

void bind(pybind11::module_& m) {
  m.def("attention_globals", &attention_globals);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("attention_decode_splits", &attention_decode_splits);
  m.def("attention_decode", &attention_decode);
}

}  // namespace kernels::attention
