// The Python module `_cuda`: every native CUDA entry point. Tensors come as addresses (0: absent),
// dtypes as codes (common/cuda/dtype.cuh), the stream as its handle; shapes stand in the callers.
#include <pybind11/pybind11.h>

#include "layer_norm/cuda.cuh"

namespace py = pybind11;

namespace kernels {
namespace {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

layer_norm::Target target(int multiprocessors, Address stream) {
  return {multiprocessors, reinterpret_cast<cudaStream_t>(stream)};
}

void layer_norm_forward(Address x, Address weight, Address bias, Address y, Address mean,
                        Address rstd, int64_t rows, int64_t cols, float eps, int x_dtype,
                        int weight_dtype, int bias_dtype, int multiprocessors, int device,
                        Address stream) {
  const DeviceGuard guard(device);
  const layer_norm::ForwardArgs args{pointer(x),
                                     pointer(weight),
                                     pointer(bias),
                                     pointer(y),
                                     pointer<float>(mean),
                                     pointer<float>(rstd),
                                     rows,
                                     cols,
                                     eps,
                                     checked_dtype(weight_dtype),
                                     checked_dtype(bias_dtype)};
  layer_norm::forward(args, checked_dtype(x_dtype), target(multiprocessors, stream));
}

// Rows of fp32 partial sums per parameter gradient that layer_norm_backward needs room for.
int64_t layer_norm_backward_partials(int64_t rows, int64_t cols, bool dx, int multiprocessors) {
  return layer_norm::plan_backward(rows, cols, dx, true, multiprocessors).partials;
}

void layer_norm_backward(Address dy, Address x, Address weight, Address mean, Address rstd,
                         Address dx, Address dweight, Address dbias, Address partials, int64_t rows,
                         int64_t cols, int x_dtype, int weight_dtype, int bias_dtype,
                         int multiprocessors, int device, Address stream) {
  const DeviceGuard guard(device);
  const layer_norm::BackwardArgs args{pointer(dy),
                                      pointer(x),
                                      pointer(weight),
                                      pointer<float>(mean),
                                      pointer<float>(rstd),
                                      pointer(dx),
                                      pointer(dweight),
                                      pointer(dbias),
                                      rows,
                                      cols,
                                      checked_dtype(weight_dtype),
                                      checked_dtype(weight_dtype),
                                      checked_dtype(bias_dtype),
                                      0};
  layer_norm::backward(args, checked_dtype(x_dtype), pointer<float>(partials),
                       target(multiprocessors, stream));
}

}  // namespace
}  // namespace kernels

PYBIND11_MODULE(_cuda, m) {
  const py::call_guard<py::gil_scoped_release> release;
  m.def("layer_norm_forward", &kernels::layer_norm_forward, release);
  m.def("layer_norm_backward_partials", &kernels::layer_norm_backward_partials);
  m.def("layer_norm_backward", &kernels::layer_norm_backward, release);
}
