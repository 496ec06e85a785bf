// io_ring.h for Python. kvtier/_core.pyi has the signatures; kvtier/io/ring_engine.py uses them.
#pragma once

#include "python.h"

namespace kvtier {

PyObject* RingOpenOf(PyObject* const* args, Py_ssize_t num_args);
PyObject* RingRegisterOf(PyObject* const* args, Py_ssize_t num_args);
PyObject* RingSubmitOf(PyObject* const* args, Py_ssize_t num_args);
PyObject* RingWakeOf(PyObject* const* args, Py_ssize_t num_args);
PyObject* RingWaitOf(PyObject* const* args, Py_ssize_t num_args);
PyObject* RingCloseOf(PyObject* const* args, Py_ssize_t num_args);

}  // namespace kvtier
