# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled records of distributions: each is stored once, contexts point to it.

A context that was told a distribution holds what followed it the last NUM_CELLS times:

    context row    -, total, cell, cell, cell, cell, cell, last touched

The newest cell comes first. A cell is a token (all the mass), the row of a record, or EMPTY. The
low bits of the total hold RECORDS and how many tokens the newest one has.

    record         number of entries, entry, entry, ... in one or two rows

An entry is a token (20 bits) and its probability (12 bits); likeliest first.

Used by: all compiled loops of the memory.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from streaminator.compiled import jit, jit_inline

Ints = NDArray[np.int64]
Rows = NDArray[np.int32]

EMPTY = -1
RECORDS = 512
"""Flag in the low bits of a total: this context's row has cells."""
NUM_CELLS = 5
MAX_ENTRIES = 15
"""Of a record: two rows."""
_PER_ROW = 8
ONE = 4095
"""Fixed point of probabilities."""
_LEAST = 40  # of ONE: less of a distribution is not stored
_SURE = 3900  # of ONE: such a token stands for the whole distribution
_TOKEN_BITS, _SHIFT = (1 << 20) - 1, 12
_COUNT = -1024
"""The bits of a total that count."""


def _start_of(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Address of a row, where `rows` and a row's number are what an intrinsic is called with."""
    kind = signature.args[0]
    array = context.make_array(kind)(context, builder, arguments[0])
    at = [arguments[1], context.get_constant(types.intp, 0)]
    return cgutils.get_item_pointer(context, builder, kind, array, at, wraparound=False)


def _prefetch(context: Any, rows: Any, index: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _start_of(context, builder, signature, arguments)
        byte = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        shape = ir.FunctionType(ir.VoidType(), [byte.type, flag, flag, flag])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte.type], shape)
        builder.call(fetch, [byte, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.none(rows, types.intp), generate


prefetch: Any = intrinsic(_prefetch)
"""`prefetch(rows, index)` has the processor fetch `rows[index]` meanwhile."""


def _match(context: Any, rows: Any, row: Any, value: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _start_of(context, builder, signature, arguments)
        lanes = ir.VectorType(ir.IntType(32), _PER_ROW)
        there = builder.load(builder.bitcast(pointer, lanes.as_pointer()), align=4 * _PER_ROW)
        one = builder.insert_element(
            ir.Constant(lanes, ir.Undefined),
            builder.trunc(arguments[2], ir.IntType(32)),
            ir.IntType(32)(0),
        )
        places = ir.Constant(lanes, [0] * _PER_ROW)
        same = builder.icmp_signed("==", there, builder.shuffle_vector(one, one, places))
        bits = builder.bitcast(same, ir.IntType(_PER_ROW))
        # The first of the bits; one more behind them is always there.
        number = ir.IntType(64)
        bits = builder.or_(builder.zext(bits, number), number(1 << _PER_ROW))
        return builder.cttz(bits, ir.IntType(1)(0))

    return types.int64(rows, types.intp, types.int64), generate


match: Any = intrinsic(_match)
"""`match(rows, row, value)` is the column of a row that has a value, 8: none. One comparison."""


@jit_inline
def nth(index: int) -> int:
    """An index that does not count from the end, so that nothing is done in case it does."""
    return np.uint64(index)


@jit_inline
def peek(rows: Rows, row: int, column: int) -> int:
    """What is in a row."""
    return np.int64(rows[nth(row), nth(column)])


def _leading_zeros(context: Any, x: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.int64), generate


_zeros: Any = intrinsic(_leading_zeros)


@jit_inline
def log_bin(x: int, num: int) -> int:
    """0 for 1, 1 for 2, 2 for 3..4, 3 for 5..8 and so on, up to `num` - 1."""
    return min(64 - _zeros(max(x - 1, 0)), num - 1)


@jit
def num_rows_of(num_entries: int) -> int:
    """Rows of a record."""
    return 1 if num_entries < 8 else 2


@jit_inline
def entry_of(rows: Rows, record: int, index: int) -> tuple[int, int]:
    """Token and probability (of ONE) of an entry."""
    # An entry beyond the first row is where the next one begins: rows lie side by side.
    packed = np.int64(np.uint32(peek(rows, record, index + 1)))
    return packed >> _SHIFT, packed & ONE


@jit
def pack_record(token: int, ids: Ints, probs: NDArray[np.float32], record: Rows) -> int:
    """Pack a distribution into `record` [MAX_ENTRIES + 1] as it is stored.

    Returns: the token that stands for it where `record` has no entry.
    """
    record[0] = 0
    num, left, is_listed = 0, ONE, False
    for j in range(len(ids)):
        mass = min(left, np.int64(probs[j] * ONE + 0.5))
        if mass >= _SURE:
            return np.int64(ids[j])
        is_listed |= ids[j] == token
        if mass >= _LEAST and num < MAX_ENTRIES:
            num += 1
            record[nth(num)] = ((np.int64(ids[j]) & _TOKEN_BITS) << _SHIFT) | mass
            left -= mass
    # A token drawn from outside the stored candidates stands for the mass they leave.
    if not is_listed and left >= _LEAST and num < MAX_ENTRIES:
        num += 1
        place = num
        while place > 1 and np.int64(record[nth(place - 1)]) & ONE < left:
            record[nth(place)] = record[nth(place - 1)]
            place -= 1
        record[nth(place)] = ((np.int64(token) & _TOKEN_BITS) << _SHIFT) | left
    record[0] = num
    return token


@jit
def write_record(
    rows: Rows, start: int, free: int, end: int, token: int, record: Rows
) -> tuple[int, int, int]:
    """Store a record in a table's rows from `free` on, and before `end`.

    Returns: its cell, its number of entries, the rows it took (0: the cell is a token).
    """
    num = min(np.int64(record[0]), MAX_ENTRIES if free + 2 <= end else _PER_ROW - 1)
    if free >= end:
        return token, 1, 0
    for index in range(num + 1):
        rows[nth(start + free + (index >> 3)), index & 7] = record[index]
    rows[nth(start + free), 0] = num
    return -2 - free, num, num_rows_of(num)


@jit_inline
def push_cell(rows: Rows, row: int, cell: int, num: int) -> None:
    """One more observation of a context; the oldest makes room."""
    packed = peek(rows, row, 1)
    if packed & RECORDS == 0:
        # It was told tokens until now: the two in its row stay.
        rows[row, 3] = rows[row, 4]
        rows[row, 4] = rows[row, 5] = EMPTY
    for column in range(NUM_CELLS + 1, 2, -1):
        rows[nth(row), column] = rows[nth(row), column - 1]
    rows[nth(row), 2] = cell
    rows[nth(row), 1] = (packed & _COUNT) | RECORDS | num


@jit
def share_in_cells(rows: Rows, start: int, row: int, token: int) -> float:
    """Share of a token in what a context was told."""
    num, share = 0, 0.0
    while num < NUM_CELLS and rows[row, 2 + num] != EMPTY:
        share += mass_in_cell(rows, start, np.int64(rows[row, 2 + num]), token)
        num += 1
    return share / num


@jit
def mass_in_cell(rows: Rows, start: int, cell: int, token: int) -> float:
    """Probability of a token in one cell."""
    if cell >= 0:
        return 1.0 if cell == token else 0.0
    record = start - 2 - cell
    for index in range(rows[record, 0]):
        there, mass = entry_of(rows, record, index)
        if there == token:
            return mass / ONE
    return 0.0
