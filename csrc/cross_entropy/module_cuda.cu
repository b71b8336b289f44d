// Cross-entropy's entry points of the Python module `kernels._cuda`; shapes stand in the callers.
#include "cross_entropy/cuda.cuh"

#include "common/cuda/module.cuh"

namespace kernels::cross_entropy {
namespace {

Target target_of(int multiprocessors, Address stream) {
  return {multiprocessors, reinterpret_cast<cudaStream_t>(stream)};
}

// What forward and backward are told alike. Where `probabilities` are given, `target` is 0.
Problem problem(Address input, Address target, Address probabilities, Address weight, int64_t rows,
                int64_t row_stride, int classes, int64_t ignore_index, bool wide_probabilities,
                double smoothing, float z_loss, float softcap, float logit_scale) {
  return {pointer(input),
          pointer<int64_t>(target),
          pointer(probabilities),
          pointer<float>(weight),
          rows,
          row_stride,
          ignore_index,
          classes,
          wide_probabilities,
          probabilities != 0 || smoothing != 0,
          static_cast<float>(1 - smoothing),
          static_cast<float>(smoothing / classes),
          z_loss,
          softcap,
          logit_scale};
}

// States of 32 bytes per row that cross_entropy_forward needs room for, where more than one.
int cross_entropy_forward_parts(int64_t rows, int classes, int64_t row_stride, int dtype,
                                int multiprocessors) {
  return forward_parts(rows, classes, row_stride, checked_dtype(dtype), multiprocessors);
}

void cross_entropy_forward(Address input, Address target, Address probabilities, Address weight,
                           int64_t rows, int64_t row_stride, int classes, int64_t ignore_index,
                           bool wide_probabilities, double smoothing, float z_loss, float softcap,
                           float logit_scale, Address losses, Address lse, Address log_prob,
                           Address best, Address parts, int dtype, int multiprocessors, int device,
                           Address stream) {
  const DeviceGuard guard(device);
  const ForwardArgs args{
      problem(input, target, probabilities, weight, rows, row_stride, classes, ignore_index,
              wide_probabilities, smoothing, z_loss, softcap, logit_scale),
      pointer<float>(losses),
      pointer<float>(lse),
      pointer<float>(lse) + rows,
      pointer<float>(log_prob),
      pointer<int64_t>(best),
      pointer<RowState>(parts),
      0};
  forward(args, checked_dtype(dtype), target_of(multiprocessors, stream));
}

void cross_entropy_backward(Address dlosses, int64_t dlosses_stride, Address dlse,
                            int64_t dlse_stride, Address input, Address target,
                            Address probabilities, Address weight, int64_t rows, int64_t row_stride,
                            int classes, int64_t ignore_index, bool wide_probabilities,
                            double smoothing, float z_loss, float softcap, float logit_scale,
                            Address lse, Address total_weight, Address mass, Address dinput,
                            int64_t dinput_stride, int dtype, int multiprocessors, int device,
                            Address stream) {
  const DeviceGuard guard(device);
  const BackwardArgs args{
      problem(input, target, probabilities, weight, rows, row_stride, classes, ignore_index,
              wide_probabilities, smoothing, z_loss, softcap, logit_scale),
      pointer<float>(dlosses),
      pointer<float>(dlse),
      dlosses_stride,
      dlse_stride,
      pointer<float>(lse),
      pointer<float>(lse) + rows,
      nullptr,
      pointer<float>(total_weight),
      pointer(dinput),
      dinput_stride,
      0};
  backward(args, pointer<float>(mass), checked_dtype(dtype), target_of(multiprocessors, stream));
}

}  // namespace

PyMethodDef entry_points[] = {ENTRY_POINT(cross_entropy_forward_parts),
                              ENTRY_POINT(cross_entropy_forward),
                              ENTRY_POINT(cross_entropy_backward),
                              {nullptr, nullptr, 0, nullptr}};

}  // namespace kernels::cross_entropy
