// The Python module `kernels._cuda`: the entry points of every op, from csrc/<op>/module_cuda.cu.
#include <Python.h>

#include <initializer_list>

// Weak: whoever links this with the file of one op alone gets a module of that op.
#define DECLARE_OP(op)                             \
  namespace kernels::op {                          \
  [[gnu::weak]] extern PyMethodDef entry_points[]; \
  }
DECLARE_OP(attention)
DECLARE_OP(cross_entropy)
DECLARE_OP(int8_matmul)
DECLARE_OP(layer_norm)

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  for (PyMethodDef* entry_points :
       {kernels::attention::entry_points, kernels::cross_entropy::entry_points,
        kernels::int8_matmul::entry_points, kernels::layer_norm::entry_points}) {
    if (module && entry_points && PyModule_AddFunctions(module, entry_points)) Py_CLEAR(module);
  }
  return module;
}
