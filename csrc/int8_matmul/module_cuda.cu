// Int8 matmul's entry points of the Python module `kernels._cuda`; shapes stand in the callers. A
// call's many arguments arrive flat: kernels/int8_matmul/cuda.py has the other side.
#include "int8_matmul/cuda.cuh"

#include "common/cuda/module.cuh"

namespace kernels::int8_matmul {
namespace {

// What the plan depends on: mode, x's stride, dtype and alignment, the weight's stride, alignment
// and order, k, m, n.
Call take_shape(Arguments& given) {
  Call c{};
  c.mode = static_cast<Mode>(given.take<int>());
  c.x_stride = given.take<int64_t>();
  c.x_dtype = checked_dtype(given.take<int>());
  c.x_vectors = given.take<int>() != 0;
  c.weight_stride = given.take<int64_t>();
  c.weight_vectors = given.take<int>() != 0;
  c.n_contiguous = given.take<int>() != 0;
  c.k = given.take<int>();
  c.out.m = given.take<int>();
  c.out.n = given.take<int>();
  return c;
}

// Bytes that int8_matmul_forward needs room for besides its tensors. Shape, multiprocessors.
int64_t int8_matmul_workspace(Arguments& given) {
  const Call call = take_shape(given);
  return plan(call, given.take<int>()).bytes;
}

// Shape, x, weight, the scales of x and of the weight with the steps between them, bias and its
// dtype, activation, dtype of y, y, workspace, multiprocessors, device, stream.
void int8_matmul_forward(Arguments& given) {
  Call c = take_shape(given);
  c.x = given.pointer();
  c.weight = given.pointer<const int8_t>();
  Epilogue& e = c.out;
  e.x_scale = given.pointer<const float>();
  e.x_scale_step = given.take<int>();
  e.weight_scale = given.pointer<const float>();
  e.weight_scale_step = given.take<int>();
  e.bias = given.pointer();
  e.bias_dtype = checked_dtype(given.take<int>());
  e.activation = static_cast<Activation>(given.take<int>());
  e.dtype = static_cast<Output>(given.take<int>());
  e.y = given.pointer();
  const bool words = e.dtype == Output::kFloat32 || e.dtype == Output::kInt32;
  e.factor_vectors = vectorisable(0, e.weight_scale, e.bias);
  e.vectors = e.n % 4 == 0 && reinterpret_cast<Address>(e.y) % (words ? 16 : 8) == 0;
  if (c.mode == Mode::kStatic) c.given_scale = e.x_scale;
  auto* workspace = given.pointer<char>();
  const int multiprocessors = given.take<int>();
  const DeviceGuard guard(given.take<int>());
  auto* stream = given.pointer<CUstream_st>();
  given.end();
  matmul(c, workspace, {multiprocessors, stream});
}

// x, its stride and dtype, whether layer norm comes first, its weight and bias with their dtypes,
// eps, values, scale, rows, cols, multiprocessors, device, stream.
void int8_matmul_rows(Arguments& given) {
  RowsArgs a{};
  a.x = given.pointer();
  a.x_stride = given.take<int64_t>();
  const DType dtype = checked_dtype(given.take<int>());
  const bool normalized = given.take<int>() != 0;
  a.weight = given.pointer();
  a.weight_dtype = checked_dtype(given.take<int>());
  a.bias = given.pointer();
  a.bias_dtype = checked_dtype(given.take<int>());
  a.eps = given.take<float>();
  a.values = given.pointer<int8_t>();
  a.scale = given.pointer<float>();
  a.rows = given.take<int64_t>();
  a.values_stride = a.cols = given.take<int>();
  const int multiprocessors = given.take<int>();
  const DeviceGuard guard(given.take<int>());
  auto* stream = given.pointer<CUstream_st>();
  given.end();
  quantize_rows(a, dtype, normalized, {multiprocessors, stream});
}

}  // namespace

PyMethodDef entry_points[] = {ENTRY_POINT(int8_matmul_workspace),
                              ENTRY_POINT(int8_matmul_forward),
                              ENTRY_POINT(int8_matmul_rows),
                              {nullptr, nullptr, 0, nullptr}};

}  // namespace kernels::int8_matmul
