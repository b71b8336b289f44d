// The Python module `kernels._cuda`: the entry points of every op, from csrc/<op>/module_cuda.cu.
#include <pybind11/pybind11.h>

// Weak: whoever links this with the file of one op alone gets a module of that op.
#define DECLARE_OP(op)                         \
  namespace kernels::op {                      \
  [[gnu::weak]] void bind(pybind11::module_&); \
  }
DECLARE_OP(layer_norm)

PYBIND11_MODULE(_cuda, m) {
  for (auto* bind : {&kernels::layer_norm::bind}) {
    if (bind) bind(m);
  }
}
