// Layer norm's entry points of the Python module `kernels._cuda`; shapes stand in the callers.
#include "layer_norm/cuda.cuh"

#include "common/cuda/module.cuh"

namespace kernels::layer_norm {
namespace {

Target target(int multiprocessors, Address stream) {
  return {multiprocessors, reinterpret_cast<cudaStream_t>(stream)};
}

void layer_norm_forward(Address x, Address weight, Address bias, Address y, Address mean,
                        Address rstd, int64_t rows, int64_t cols, float eps, int x_dtype,
                        int weight_dtype, int bias_dtype, int multiprocessors, int device,
                        Address stream) {
  const DeviceGuard guard(device);
  const ForwardArgs args{pointer(x),
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
  forward(args, checked_dtype(x_dtype), target(multiprocessors, stream));
}

// Rows of fp32 partial sums per parameter gradient that layer_norm_backward needs room for.
int64_t layer_norm_backward_partials(int64_t rows, int64_t cols, bool dx, int multiprocessors) {
  return plan_backward(rows, cols, dx, true, multiprocessors).partials;
}

void layer_norm_backward(Address dy, Address x, Address weight, Address mean, Address rstd,
                         Address dx, Address dweight, Address dbias, Address partials, int64_t rows,
                         int64_t cols, int x_dtype, int weight_dtype, int bias_dtype,
                         int multiprocessors, int device, Address stream) {
  const DeviceGuard guard(device);
  const BackwardArgs args{pointer(dy),
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
  backward(args, checked_dtype(x_dtype), pointer<float>(partials), target(multiprocessors, stream));
}

}  // namespace

PyMethodDef entry_points[] = {ENTRY_POINT(layer_norm_forward),
                              ENTRY_POINT(layer_norm_backward_partials),
                              ENTRY_POINT(layer_norm_backward),
                              {nullptr, nullptr, 0, nullptr}};

}  // namespace kernels::layer_norm
