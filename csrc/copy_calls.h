// block_copy.h for Python. kvtier/_core.pyi has the signature, kvtier/_fallback.py says what it does.
#pragma once

#include "python.h"

namespace kvtier {

PyObject* CopyBlocksOf(PyObject* const* args, Py_ssize_t num_args);

}  // namespace kvtier
