"""CRC-32 for compiled code: zlib-ng's function, by its address, so that a thread verifies without the GIL."""

import ctypes
import zlib
from typing import Any

from llvmlite import binding
from numba import types


@ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32)  # type: ignore[untyped-decorator]
def by_zlib(crc: int, data: int, size: int) -> int:
    """For platforms without zlib-ng: a thirteenth of the speed, and with the GIL."""
    return zlib.crc32(ctypes.string_at(data, size), crc)


def _fastest() -> Any:
    try:
        from zlib_ng import zlib_ng

        return ctypes.CDLL(zlib_ng.__file__).zng_crc32
    except (ImportError, OSError, AttributeError):
        return by_zlib


SYMBOL = "imagenet_express_crc32"
binding.add_symbol(SYMBOL, ctypes.cast(_fastest(), ctypes.c_void_p).value)
crc32: Any = types.ExternalFunction(SYMBOL, types.uint32(types.uint32, types.uintp, types.uint32))
