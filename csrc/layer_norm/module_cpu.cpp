// Layer norm's entry points of the Python module `kernels._cpu`.
//
// Tensors arrive checked and contiguous from kernels/layer_norm/cpu.py; None stands for an absent
// one.
#include "common/cpu/isa.h"
#include "common/cpu/python.h"

namespace kernels::layer_norm {
namespace {

// statistics: float32 [2 * rows], every row's mean and then every row's rstd.
void layer_norm_forward(Tensor x, int64_t rows, int64_t cols, Tensor weight, Tensor bias, float eps,
                        Memory y, Memory statistics) {
  float* mean = static_cast<float*>(statistics.data);
  const WithoutGil others_run;
  current_instruction_set()->layer_norm->forward({.x = x.data,
                                                  .dtype = x.dtype,
                                                  .rows = rows,
                                                  .cols = cols,
                                                  .weight = {weight.data, weight.dtype},
                                                  .bias = {bias.data, bias.dtype},
                                                  .eps = eps,
                                                  .y = y.data,
                                                  .mean = mean,
                                                  .rstd = mean ? mean + rows : nullptr});
}

void layer_norm_backward(Memory dy, Tensor x, int64_t rows, int64_t cols, Tensor weight,
                         Memory statistics, Memory dx, Tensor dweight, Tensor dbias) {
  const float* mean = static_cast<const float*>(statistics.data);
  const WithoutGil others_run;
  current_instruction_set()->layer_norm->backward({.dy = dy.data,
                                                   .x = x.data,
                                                   .dtype = x.dtype,
                                                   .rows = rows,
                                                   .cols = cols,
                                                   .weight = {weight.data, weight.dtype},
                                                   .mean = mean,
                                                   .rstd = mean + rows,
                                                   .dx = dx.data,
                                                   .dweight = {dweight.data, dweight.dtype},
                                                   .dbias = {dbias.data, dbias.dtype}});
}

// The rows of a call that is one of the common ones: it passes every check of
// kernels/layer_norm/op.py, these kernels take it, and nothing has to be made contiguous first.
// Asked attribute by attribute in Python that costs a small call as much as its arithmetic; here a
// quarter.  Anything unusual is 0, and is checked there.
int64_t layer_norm_rows(PyObject* input, PyObject* normalized_shape, PyObject* weight,
                        PyObject* bias, PyObject* eps) {
  const Torch& torch = Torch::get();
  if (!PyFloat_CheckExact(eps) || !is_shape(normalized_shape) || !torch.is_plain(input)) return 0;
  const int64_t rows = torch.count_of(input, normalized_shape);
  if (rows < 1) return 0;
  for (PyObject* parameter : {weight, bias}) {
    if (parameter != Py_None &&
        !(torch.is_plain(parameter) && torch.has_shape(parameter, normalized_shape))) {
      return 0;
    }
  }
  return rows;
}

}  // namespace

PyMethodDef entry_points[] = {ENTRY_POINT(layer_norm_forward),
                              ENTRY_POINT(layer_norm_backward),
                              ENTRY_POINT(layer_norm_rows),
                              {nullptr, nullptr, 0, nullptr}};

}  // namespace kernels::layer_norm
