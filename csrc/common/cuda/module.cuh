// Calls from Python into the CUDA kernels: tensors come as addresses (0: absent), dtypes as codes
// (common/dtype.h), the stream as its handle. By Python's own calling convention: pybind11's
// headers would take nvcc ten seconds in every source.
#pragma once

#include <Python.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <type_traits>

namespace kernels {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

struct PythonError {};  // thrown where Python knows already what is wrong

// Lets other Python threads run while kernels are launched.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// The arguments of a call, taken one after another.
class Arguments {
 public:
  Arguments(PyObject* const* first, Py_ssize_t count) : next_(first), end_(first + count) {}

  template <typename T>
  T take() {
    if (next_ == end_) throw std::invalid_argument("too few arguments");
    PyObject* given = *next_++;
    T value;
    if constexpr (std::is_floating_point_v<T>) {
      value = static_cast<T>(PyFloat_AsDouble(given));
    } else if constexpr (std::is_unsigned_v<T> && !std::is_same_v<T, bool>) {
      static_assert(sizeof(T) == sizeof(unsigned long long));
      value = PyLong_AsUnsignedLongLong(given);
    } else {
      const long long whole = PyLong_AsLongLong(given);
      value = static_cast<T>(whole);
      if (value != whole) PyErr_Format(PyExc_OverflowError, "%lld is out of range", whole);
    }
    if (PyErr_Occurred()) throw PythonError();
    return value;
  }

  template <typename T = void>
  T* pointer() {
    return kernels::pointer<T>(take<Address>());
  }

  void end() const {
    if (next_ != end_) throw std::invalid_argument("too many arguments");
  }

 private:
  PyObject *const *next_, *const *end_;
};

template <auto function, typename R, typename... T>
PyObject* call(R (*)(T...), Arguments& given) {
  const std::tuple<T...> values{given.take<T>()...};  // the braces take them in order
  given.end();
  const auto run = [&] {
    const WithoutGil released;
    return std::apply(function, values);
  };
  if constexpr (std::is_void_v<R>) {
    run();
    Py_RETURN_NONE;
  } else {
    return PyLong_FromLongLong(run());
  }
}

// For functions of very many arguments, which take them themselves.
template <auto function>
PyObject* call(void (*)(Arguments&), Arguments& given) {
  function(given);
  given.end();
  Py_RETURN_NONE;
}
template <auto function>
PyObject* call(int64_t (*)(Arguments&), Arguments& given) {
  const int64_t result = function(given);
  given.end();
  return PyLong_FromLongLong(result);
}

template <auto function>
PyObject* entry(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  try {
    Arguments given(arguments, count);
    return call<function>(function, given);
  } catch (const PythonError&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// An element of an op's `PyMethodDef entry_points[]`, which ends with an empty one.
#define ENTRY_POINT(function)                                               \
  {#function,                                                               \
   reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(              \
       static_cast<PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t)>( \
           &::kernels::entry<&function>))),                                 \
   METH_FASTCALL, nullptr}

}  // namespace kernels
