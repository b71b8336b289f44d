// Cross-entropy's entry points of the Python module `kernels._cpu`.
//
// Tensors arrive checked from kernels/cross_entropy/cpu.py; None stands for an absent one.
#include "common/cpu/isa.h"
#include "common/cpu/python.h"

namespace kernels::cross_entropy {
namespace {

// IndexError for the first target that is neither a class nor ignored.
void check_targets(const Call& call) {
  if (!call.target) return;
  for (int64_t row = 0; row < call.rows; row++) {
    const int64_t target = call.target[row];
    if (uint64_t(target) < uint64_t(call.cols) || target == call.ignore_index) continue;
    PyErr_Format(PyExc_IndexError,
                 "cross_entropy: target %lld at position %lld is out of range: accepted are 0 to "
                 "%lld and ignore_index",
                 static_cast<long long>(target), static_cast<long long>(row),
                 static_cast<long long>(call.cols - 1));
    throw PythonError();
  }
}

// input [rows, cols], rows row_stride elements apart; target int64 [rows] or probabilities
// [rows, cols]; weight float32 [cols].  Floating outputs are float32.
Call make_call(Tensor input, int64_t rows, int64_t cols, int64_t row_stride, Memory target,
               Tensor probabilities, Memory weight, int64_t ignore_index, float label_smoothing,
               float z_loss, float softcap, float logit_scale) {
  return {.input = input.data,
          .dtype = input.dtype,
          .rows = rows,
          .cols = cols,
          .row_stride = row_stride,
          .target = static_cast<const int64_t*>(target.data),
          .probabilities = probabilities.data,
          .probabilities_dtype = probabilities.dtype,
          .weight = static_cast<const float*>(weight.data),
          .ignore_index = ignore_index,
          .label_smoothing = label_smoothing,
          .z_loss = z_loss,
          .softcap = softcap,
          .logit_scale = logit_scale};
}

void cross_entropy_forward(Tensor input, int64_t rows, int64_t cols, int64_t row_stride,
                           Memory target, Tensor probabilities, Memory weight, int64_t ignore_index,
                           float label_smoothing, float z_loss, float softcap, float logit_scale,
                           Memory losses, Memory lse, Memory log_prob, Memory best) {
  const Call call = make_call(input, rows, cols, row_stride, target, probabilities, weight,
                              ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  check_targets(call);
  const WithoutGil others_run;
  current_instruction_set()->cross_entropy->forward({.call = call,
                                                     .losses = static_cast<float*>(losses.data),
                                                     .lse = static_cast<float*>(lse.data),
                                                     .log_prob = static_cast<float*>(log_prob.data),
                                                     .best = static_cast<int64_t*>(best.data)});
}

void cross_entropy_backward(Memory dlosses, int64_t dlosses_stride, Memory dlse, Tensor input,
                            int64_t rows, int64_t cols, int64_t row_stride, Memory target,
                            Tensor probabilities, Memory weight, int64_t ignore_index,
                            float label_smoothing, float z_loss, float softcap, float logit_scale,
                            Memory lse, Memory dinput, int64_t dinput_stride) {
  const Call call = make_call(input, rows, cols, row_stride, target, probabilities, weight,
                              ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  const WithoutGil others_run;
  current_instruction_set()->cross_entropy->backward(
      {.call = call,
       .dlosses = static_cast<const float*>(dlosses.data),
       .dlosses_stride = dlosses_stride,
       .dlse = static_cast<const float*>(dlse.data),
       .lse = static_cast<const float*>(lse.data),
       .dinput = dinput.data,
       .dinput_stride = dinput_stride});
}

}  // namespace

PyMethodDef entry_points[] = {ENTRY_POINT(cross_entropy_forward),
                              ENTRY_POINT(cross_entropy_backward),
                              {nullptr, nullptr, 0, nullptr}};

}  // namespace kernels::cross_entropy
