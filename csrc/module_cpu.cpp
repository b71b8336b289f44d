// The Python module `kernels._cpu`: the entry points of every op, from csrc/<op>/module_cpu.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "common/cpu/isa.h"

namespace kernels {

namespace attention {
extern PyMethodDef entry_points[];
}
namespace cross_entropy {
extern PyMethodDef entry_points[];
}
namespace int8_matmul {
extern PyMethodDef entry_points[];
}
namespace layer_norm {
extern PyMethodDef entry_points[];
}

namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : kInstructionSets) {
    if (set.supported()) names.push_back(set.name);
  }
  return names;
}

}  // namespace
}  // namespace kernels

PYBIND11_MODULE(_cpu, m) {
  using namespace kernels;
  m.def("instruction_sets", &instruction_sets, "Those this machine runs, best first.");
  m.def("instruction_set", [] { return current_instruction_set()->name; });
  m.def("use_instruction_set", &use_instruction_set);  // ValueError names the available ones
  for (PyMethodDef* entry_points : {attention::entry_points, cross_entropy::entry_points,
                                    int8_matmul::entry_points, layer_norm::entry_points}) {
    if (PyModule_AddFunctions(m.ptr(), entry_points)) throw pybind11::error_already_set();
  }
}
