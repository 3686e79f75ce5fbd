"""CRC-32 inside compiled code, at the speed of a copy: by carry-less multiplication where the processor has it.

The polynomial of zlib. After Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ" (Intel,
2009): 64 bytes at a time are folded into 64, which a table brings down to the checksum.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.extending import intrinsic

from ..jit import compiled

u64, u32 = np.uint64, np.uint32
cgutils: Any = untyped_cgutils

# Whether this processor multiplies without carries, and LLVM knows how to tell it to.
AVAILABLE = bool(llvmlite.binding.get_host_cpu_features().get("pclmul"))

KEYS = (0x154442BD4, 0x1C6E41596)  # x^(512+64) and x^512 modulo the polynomial, bits reflected: 64 bytes further on


def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0xEDB88320), table >> 1).astype(np.uint32)
    return table


TABLE = _table()


def _fold_blocks_in_llvm(typing: Any, data: Any, start: Any, count: Any, state: Any) -> Any:
    """Folds `count` blocks of 64 bytes from data[start] on into state, (8,) uint64."""
    signature = types.void(data, types.uintp, types.uintp, types.Array(types.uint64, 1, "C"))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(64), 2)
        multiply = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector, vector, ir.IntType(8)]), "llvm.x86.pclmulqdq"
        )
        array = context.make_array(signature.args[0])(context, builder, args[0])
        states = context.make_array(signature.args[3])(context, builder, args[3])
        keys = ir.Constant(vector, [ir.Constant(ir.IntType(64), k) for k in KEYS])
        base = builder.gep(array.data, [args[1]])
        first = builder.bitcast(states.data, vector.as_pointer())
        lanes = [builder.gep(first, [context.get_constant(types.intp, i)]) for i in range(4)]
        folded = [cgutils.alloca_once_value(builder, builder.load(lane, align=8)) for lane in lanes]
        with cgutils.for_range(builder, args[2], intp=args[2].type) as loop:
            at = builder.mul(loop.index, ir.Constant(args[2].type, 64))
            block = builder.bitcast(builder.gep(base, [at]), vector.as_pointer())
            for i in range(4):
                value = builder.load(folded[i])
                low = builder.call(multiply, [value, keys, ir.Constant(ir.IntType(8), 0x00)])
                high = builder.call(multiply, [value, keys, ir.Constant(ir.IntType(8), 0x11)])
                more = builder.load(builder.gep(block, [context.get_constant(types.intp, i)]), align=1)
                builder.store(builder.xor(builder.xor(low, high), more), folded[i])
        for lane, value in zip(lanes, folded, strict=True):
            builder.store(builder.load(value), lane, align=8)
        return context.get_dummy_value()

    return signature, codegen


_fold_blocks: Any = intrinsic(_fold_blocks_in_llvm)


@compiled
def _by_table(data: np.ndarray, start: int, end: int, crc: np.uint32) -> np.uint32:
    for i in range(start, end):
        crc = TABLE[(crc ^ u32(data[i])) & u32(0xFF)] ^ (crc >> u32(8))
    return crc


@compiled
def crc32(data: np.ndarray, start: int, size: int) -> int:
    """Of data[start : start + size], uint8, as zlib.crc32; 0 where there is nothing to compute it with: AVAILABLE."""
    if not AVAILABLE:
        return 0
    crc, at = u32(0xFFFFFFFF), start
    if size >= 128:
        state = np.zeros(8, np.uint64)
        rest = state.view(np.uint8)
        for i in range(64):
            rest[i] = data[start + i]
        state[0] ^= u64(0xFFFFFFFF)
        blocks = size // 64 - 1
        _fold_blocks(data, np.uintp(start + 64), np.uintp(blocks), state)
        # What is folded is a message with the same remainder: from here on it is taken byte by byte.
        crc = _by_table(rest, 0, 64, u32(0))
        at = start + 64 * (blocks + 1)
    return int(_by_table(data, at, start + size, crc) ^ u32(0xFFFFFFFF))
