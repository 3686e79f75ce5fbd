#!/usr/bin/env python3
"""Checks that Triton can compile here. Part of the image's build; needs no GPU and no driver.

Compiles and loads a module with Python.h and the cuda.h of Triton's wheel, by the functions with which Triton compiles
its launcher before the first kernel. Once with gcc, Triton's compiler, and once with g++, Inductor's.
Raises what Triton raises if a compiler or a header is missing. Does nothing if Triton is missing (torch for CPUs).
"""

from __future__ import annotations

import importlib.util
import os
import tempfile

SOURCE = """
#include <cuda.h>
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "check", NULL, CUDA_SUCCESS};
PyMODINIT_FUNC PyInit_check(void) { return PyModule_Create(&definition); }
"""


def main() -> None:
    if importlib.util.find_spec("triton") is None:
        print("no Triton here: the compiler is not checked")
        return
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # an earlier result would pass without a compiler
        for language in ("c", "c++"):
            compile_module_from_src(SOURCE, "check", include_dirs=driver.include_dirs, language=language)
    print("Triton compiles and loads a module in C and in C++")


if __name__ == "__main__":
    main()
