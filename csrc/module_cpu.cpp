// The Python module `kernels._cpu`: every native CPU entry point.
//
// Tensors arrive as addresses and sizes, already checked by kernels/<op>/cpu.py; no torch header is
// needed, so one binary serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "common/cpu/isa.h"

namespace py = pybind11;

namespace kernels {
namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : kInstructionSets) {
    if (set.supported()) names.push_back(set.name);
  }
  return names;
}

void layer_norm_forward(uintptr_t x, int dtype, int64_t rows, int64_t cols, uintptr_t weight,
                        int weight_dtype, uintptr_t bias, int bias_dtype, float eps, uintptr_t y,
                        uintptr_t mean, uintptr_t rstd) {
  current_instruction_set()->layer_norm->forward({.x = pointer(x),
                                                  .dtype = DType(dtype),
                                                  .rows = rows,
                                                  .cols = cols,
                                                  .weight = {pointer(weight), DType(weight_dtype)},
                                                  .bias = {pointer(bias), DType(bias_dtype)},
                                                  .eps = eps,
                                                  .y = pointer(y),
                                                  .mean = pointer<float>(mean),
                                                  .rstd = pointer<float>(rstd)});
}

void layer_norm_backward(uintptr_t dy, uintptr_t x, int dtype, int64_t rows, int64_t cols,
                         uintptr_t weight, int weight_dtype, uintptr_t mean, uintptr_t rstd,
                         uintptr_t dx, uintptr_t dweight, uintptr_t dbias, int bias_dtype) {
  current_instruction_set()->layer_norm->backward(
      {.dy = pointer(dy),
       .x = pointer(x),
       .dtype = DType(dtype),
       .rows = rows,
       .cols = cols,
       .weight = {pointer(weight), DType(weight_dtype)},
       .mean = pointer<float>(mean),
       .rstd = pointer<float>(rstd),
       .dx = pointer(dx),
       .dweight = {pointer(dweight), DType(weight_dtype)},
       .dbias = {pointer(dbias), DType(bias_dtype)}});
}

}  // namespace
}  // namespace kernels

PYBIND11_MODULE(_cpu, m) {
  using namespace kernels;
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("instruction_sets", &instruction_sets, "Those this machine runs, best first.");
  m.def("instruction_set", [] { return current_instruction_set()->name; });
  m.def("use_instruction_set", &use_instruction_set);  // ValueError names the available ones
  m.def("layer_norm_forward", &layer_norm_forward, no_gil);
  m.def("layer_norm_backward", &layer_norm_backward, no_gil);
}
