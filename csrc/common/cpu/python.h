// Calls from Python into the CPU kernels, cheap enough for small tensors: arguments are read
// through Python's C API, so no torch header is needed and one binary serves every torch version.
#pragma once
#include <Python.h>

#include <cstdint>
#include <new>
#include <utility>

#include "common/cpu/dtype.h"

namespace kernels {

// What kernels take of a tensor that is dense and on the CPU, or of a bytearray, which costs a
// tenth of a small tensor; None is a null pointer.
struct Memory {
  void* data;
};
struct Tensor : Memory {
  DType dtype;
};
// A tensor that may have any strides, in elements, and any dtype: -1 where kernels have no code for
// it.  Of None, everything is 0.
struct View : Memory {
  static constexpr Py_ssize_t kMaxDims = 4;
  int dtype;
  int64_t size[kMaxDims], stride[kMaxDims];
};

struct PythonError {};  // thrown where Python knows already what is wrong

[[noreturn]] inline void raise_type_error(const char* message) {
  PyErr_SetString(PyExc_TypeError, message);
  throw PythonError();
}

// A reference that is given back at the end of the scope.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (!object) throw PythonError();
  }
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

// torch's types and names, looked up once.
class Torch {
 public:
  static const Torch& get() {
    static const Torch torch;
    return torch;
  }

  // The code of a tensor's dtype, or -1 where kernels have none.
  int dtype_code(PyObject* tensor) const {
    const Owned dtype = attribute(tensor, dtype_);
    for (int code = 0; code < kDtypes; code++) {
      if (dtype.get() == dtypes_[code]) return code;
    }
    return -1;
  }

  void* address(PyObject* tensor) const {
    const Owned data(PyObject_CallMethodNoArgs(tensor, data_ptr_));
    return PyLong_AsVoidPtr(data.get());
  }

  View view(PyObject* tensor) const {
    View view{{address(tensor)}, dtype_code(tensor), {}, {}};
    const Owned shape = attribute(tensor, shape_);
    const Owned strides(PyObject_CallMethodNoArgs(tensor, stride_));
    const Py_ssize_t dims = PyTuple_GET_SIZE(shape.get());
    if (dims > View::kMaxDims) raise_type_error("accepted are up to four dimensions");
    for (Py_ssize_t i = 0; i < dims; i++) {
      view.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.get(), i));
      view.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.get(), i));
    }
    return view;
  }

  // A contiguous torch.Tensor or Parameter, no subclass of them, on the CPU, of a dtype that
  // kernels have.
  bool is_plain(PyObject* x) const {
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
    return (type == tensor_ || type == parameter_) && attribute(x, is_cpu_).get() == Py_True &&
           dtype_code(x) >= 0 &&
           Owned(PyObject_CallMethodNoArgs(x, is_contiguous_)).get() == Py_True;
  }

  // How many tensors of shape `tail`, a tuple of ints, `x` holds one after the other; 0 where the
  // shape of `x` does not end in `tail`, or they hold nothing.
  int64_t count_of(PyObject* x, PyObject* tail) const {
    const Owned shape = attribute(x, shape_);
    const Py_ssize_t n = PyTuple_GET_SIZE(tail), before = PyTuple_GET_SIZE(shape.get()) - n;
    if (before < 0) return 0;
    int64_t count = 1;
    for (Py_ssize_t i = 0; i < before; i++) {
      count *= PyLong_AsLongLong(PyTuple_GET_ITEM(shape.get(), i));
    }
    for (Py_ssize_t i = 0; i < n; i++) {
      PyObject *size = PyTuple_GET_ITEM(shape.get(), before + i), *want = PyTuple_GET_ITEM(tail, i);
      if (PyObject_RichCompareBool(size, want, Py_EQ) != 1 || PyObject_IsTrue(size) != 1) return 0;
    }
    return count;
  }

  bool has_shape(PyObject* x, PyObject* shape) const {
    const Owned own = attribute(x, shape_);
    return PyObject_RichCompareBool(own.get(), shape, Py_EQ) == 1;
  }

 private:
  static constexpr int kDtypes = 3;

  Torch() {
    const Owned torch(PyImport_ImportModule("torch")), nn = attribute(torch.get(), name("nn"));
    tensor_ = attribute(torch.get(), name("Tensor")).release();
    parameter_ = attribute(nn.get(), name("Parameter")).release();
    const char* dtypes[kDtypes] = {"float32", "bfloat16", "float16"};  // the order of DType
    for (int code = 0; code < kDtypes; code++) {
      dtypes_[code] = attribute(torch.get(), name(dtypes[code])).release();
    }
  }

  static PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

  static Owned attribute(PyObject* x, PyObject* name) { return Owned(PyObject_GetAttr(x, name)); }

  PyObject *tensor_, *parameter_, *dtypes_[kDtypes];  // these and the names are never freed
  PyObject *dtype_ = name("dtype"), *shape_ = name("shape"), *is_cpu_ = name("is_cpu"),
           *is_contiguous_ = name("is_contiguous"), *data_ptr_ = name("data_ptr"),
           *stride_ = name("stride");
};

inline bool is_shape(PyObject* shape) {  // a tuple of one int or more
  if (!PyTuple_CheckExact(shape) || PyTuple_GET_SIZE(shape) == 0) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(shape); i++) {
    if (!PyLong_CheckExact(PyTuple_GET_ITEM(shape, i))) return false;
  }
  return true;
}

// Lets other Python threads run while a kernel does.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// One argument, converted to the type the entry point declares.
class Argument {
 public:
  explicit Argument(PyObject* object) : object_(object) {}

  operator PyObject*() const { return object_; }
  operator int64_t() const { return checked(PyLong_AsLongLong(object_)); }
  operator double() const { return checked(PyFloat_AsDouble(object_)); }
  operator float() const { return float(double(*this)); }
  operator View() const { return object_ == Py_None ? View{} : Torch::get().view(object_); }
  operator Memory() const {
    if (object_ == Py_None) return {nullptr};
    if (PyByteArray_CheckExact(object_)) return {PyByteArray_AS_STRING(object_)};
    return {Torch::get().address(object_)};
  }
  operator Tensor() const {
    if (object_ == Py_None) return {{nullptr}, DType::kFloat32};
    const int code = Torch::get().dtype_code(object_);
    if (code < 0) raise_type_error("accepted are float32, bfloat16 and float16 tensors");
    return {{Torch::get().address(object_)}, DType(code)};
  }

 private:
  template <class T>
  static T checked(T value) {
    if (value == T(-1) && PyErr_Occurred()) throw PythonError();
    return value;
  }

  PyObject* object_;
};

template <size_t... I, class... T>
PyObject* call(void (*function)(T...), PyObject* const* arguments, std::index_sequence<I...>) {
  function(Argument(arguments[I])...);
  Py_RETURN_NONE;
}
template <size_t... I, class... T>
PyObject* call(int64_t (*function)(T...), PyObject* const* arguments, std::index_sequence<I...>) {
  return PyLong_FromLongLong(function(Argument(arguments[I])...));
}

// `function` by Python's own calling convention: pybind11's takes a microsecond for ten arguments.
template <auto function, class R, class... T>
PyMethodDef entry_point(const char* name, R (*)(T...)) {
  constexpr auto run = [](PyObject*, PyObject* const* arguments, Py_ssize_t count) -> PyObject* {
    try {
      if (count != sizeof...(T)) raise_type_error("wrong number of arguments");
      return call(function, arguments, std::index_sequence_for<T...>());
    } catch (const PythonError&) {
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    }
    return nullptr;
  };
  PyObject* (*const fast)(PyObject*, PyObject* const*, Py_ssize_t) = run;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fast)), METH_FASTCALL,
          nullptr};
}
#define ENTRY_POINT(function) ::kernels::entry_point<function>(#function, function)

}  // namespace kernels
