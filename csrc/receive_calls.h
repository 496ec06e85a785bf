// receive.h for Python. kvtier/_core.pyi has the signature, kvtier/_fallback.py says what it does.
#pragma once

#include "python.h"

namespace kvtier {

PyObject* ReceiveOf(PyObject* const* args, Py_ssize_t num_args);
PyObject* PortableReceiveOf(PyObject* const* args, Py_ssize_t num_args);

}  // namespace kvtier
