# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels of `csrc/`, called on tensors.

They are compiled when a model is first loaded (`compile_kernels`).

Used by: `fused_layers`, `packed_linear`, `sampler`.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from streaminator.engine.batch import Lines
from streaminator.engine.compile_kernels import KernelsMissingError, compile_library
from streaminator.engine.huge_pages import Pages

BLOCK_SIZE = 16
"""Tokens of a KV block: the kernels read a block's keys as whole vectors."""
KERNEL_ROW_MULTIPLE = 4
"""Rows of half a tile of `csrc/products.c`: a step's are padded to a multiple."""
_PANEL = 32
"""Outputs that a product's kernel computes together."""


class _Shape(ctypes.Structure):
    _fields_ = (
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
    )


class _Way(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "num_candidates", "num_top")),
        ("temperature", ctypes.c_float),
    )


class _Lines(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_rows", "num_written", "num_sequences")),
        *((name, ctypes.c_int64) for name in ("num_own", "table_width")),
        *((name, ctypes.c_void_p) for name in ("slots", "starts", "counts", "firsts", "tables")),
    )


class _Weight(ctypes.Structure):
    _fields_ = (("packed", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class Layer(ctypes.Structure):
    """A layer for `Kernels.run_layers`: widths, and addresses of what must outlive it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dim", "inner")),
        ("shape", _Shape),
        *((name, ctypes.c_void_p) for name in ("first_norm", "second_norm")),
        *((name, ctypes.c_float) for name in ("first_eps", "second_eps")),
        *((name, _Weight) for name in ("qkv", "output", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    )


class Layers(NamedTuple):
    """Layers one after another, as C takes them."""

    array: "ctypes.Array[Layer]"
    room: int
    """Numbers of scratch for a row."""


class Kernels:
    """Kernels for one type of weights and one head dim; every tensor is contiguous and of it.

    Shapes: T packed rows, D width of a row, N heads, K KV heads, H head dim.
    """

    def __init__(self, dtype: torch.dtype, head_dim: int = 16) -> None:
        """Compile them, or load what was compiled before. The number of threads stays from now on.

        Raises: KernelsMissingError when that cannot be done.
        """
        self.dtype = dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise KernelsMissingError(f"none for {dtype}")
        if head_dim % 16:
            raise KernelsMissingError(f"none for heads of {head_dim}: a multiple of 16 is needed")
        self._library = _load(dtype == torch.bfloat16, head_dim)
        self._num_threads = torch.get_num_threads()
        self._has_products = bool(self._library.are_products_fast())

    def has_product(self, num_outputs: int, num_inputs: int) -> bool:
        """Whether there is a product for weights of this shape, and it is fast here."""
        return self._has_products and num_outputs % _PANEL == 0 and num_inputs % 2 == 0

    def rows_at_once(self, num_inputs: int) -> int:
        """Rows for which a product takes about as long as for fewer of them."""
        return self._library.rows_at_once(num_inputs)

    def product(
        self, weight: torch.Tensor, bias: torch.Tensor | None, pages: Pages
    ) -> "KernelProduct":
        """The product with a packed copy of `weight` [D', D]; see `packed_linear.Product`."""
        return KernelProduct(self._library, self._num_threads, weight, bias, pages)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        out = torch.empty_like(x)
        self._library.rms_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, eps, self._num_threads
        )
        return out

    def silu_mul(self, both: torch.Tensor) -> torch.Tensor:
        """Gate and up [T, 2 D] -> silu(gate) * up [T, D]."""
        num_rows, width = both.shape
        out = both.new_empty(num_rows, width // 2)
        self._library.silu_mul(
            both.data_ptr(), out.data_ptr(), num_rows, width // 2, self._num_threads
        )
        return out

    def attend(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor],
        shape: _Shape,
        lines: _Lines,
    ) -> torch.Tensor:
        """Rotate, write keys and values to their blocks, attend.

        Args:
            qkv: [T, (N + 2 K) * H].
            rotary: cosine and sine [T, H].
            cache: a layer's keys and values, of which a block holds the keys transposed (`csrc/attention.h`).
            shape: of `shape_of`.
            lines: of `lines_of`.

        Returns: [T, N * H]; rows of no sequence are 0.
        """
        width = shape.num_heads * rotary[0].shape[1]
        out = qkv.new_empty(len(qkv), width)
        out[lines.num_rows :] = 0
        pointers = (t.data_ptr() for t in (qkv, *rotary, *cache, out))
        failed = self._library.attend(
            *pointers, ctypes.byref(shape), ctypes.byref(lines), self._num_threads
        )
        if failed:
            raise MemoryError("no memory for the scores of attention")
        return out

    def join_layers(self, layers: Sequence[Layer]) -> Layers:
        """Copies of the layers, for `run_layers`."""
        room = max(self._library.room_of(ctypes.byref(layer)) for layer in layers)
        return Layers((Layer * len(layers))(*layers), room)

    def run_layers(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        layers: Layers,
        lines: _Lines,
    ) -> None:
        """Whole layers, one after another, in place on [T, D]; see `attend`."""
        scratch = x.new_empty(len(x) * layers.room)
        pointers = (t.data_ptr() for t in (x, scratch, *rotary))
        failed = self._library.run_layers(
            *pointers,
            layers.array,
            len(layers.array),
            ctypes.byref(lines),
            len(x),
            self._num_threads,
        )
        if failed:
            raise MemoryError("no memory for the layers' scratch")

    def sample(
        self,
        logits: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
        *,
        temperature: float,
        num_candidates: int,
        num_top: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`sampler.sample` without filters, for logits [R, V]; the same fields as `sampler.Drawn`.

        Args:
            logits: [R, V].
            keys: [R] int64.
            positions: [R] int64.
            temperature: 0 takes the most likely token.
            num_candidates: at most 64, and V.
            num_top: M, at most `num_candidates`.
        """
        num_rows, size = logits.shape
        tokens, top_ids = torch.empty_like(keys), keys.new_empty(num_rows, num_top)
        # Not of the default type, nor on the default device, which are a trainer's to choose.
        logprobs = keys.new_empty(num_rows, dtype=torch.float32)
        top_probs = keys.new_empty(num_rows, num_top, dtype=torch.float32)
        tensors = (logits.contiguous(), keys, positions, tokens, logprobs, top_ids, top_probs)
        way = _Way(size, num_candidates, num_top, temperature)
        failed = self._library.sample(
            *(t.data_ptr() for t in tensors), num_rows, ctypes.byref(way), self._num_threads
        )
        if failed:
            raise MemoryError("no memory for the candidates of a row")
        return tokens, logprobs, top_ids, top_probs


class KernelProduct:
    """A product with packed weights; a `packed_linear.Product`."""

    def __init__(
        self,
        library: Any,
        num_threads: int,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        pages: Pages,
    ) -> None:
        self._library, self._num_threads = library, num_threads
        self._num_outputs, self._num_inputs = weight.shape
        self._bias = None if bias is None else bias.contiguous()
        weight = weight.contiguous()
        self._packed = pages.empty_like(weight)
        self.nbytes = weight.nbytes
        library.pack_weight(weight.data_ptr(), self._packed.data_ptr(), *weight.shape)

    @property
    def addresses(self) -> tuple[int, int | None]:
        """Of the packed weights and of the bias, if there is one."""
        bias = None if self._bias is None else self._bias.data_ptr()
        return self._packed.data_ptr(), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D']."""
        return self._run(x, None)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The product, added to `residual` [..., D'] before it is rounded."""
        return self._run(x, residual.contiguous())

    def _run(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self._num_outputs)
        failed = self._library.product(
            x.data_ptr(),
            *self.addresses,
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            x.numel() // self._num_inputs,
            self._num_outputs,
            self._num_inputs,
            None,
            self._num_threads,
        )
        if failed:
            raise MemoryError("no memory for the rows of a product")
        return out


def shape_of(
    num_heads: int,
    num_kv_heads: int,
    *,
    scale: float,
    window: int | None = None,
    eps: float = 0.0,
    norms: Sequence[torch.Tensor] = (),
) -> _Shape:
    """A layer's attention; `norms` [H] of queries and keys, if it has any, must outlive it."""
    pointers = [norm.data_ptr() for norm in norms] or [None, None]
    return _Shape(num_heads, num_kv_heads, scale, eps, window or 1 << 40, *pointers)


def lines_of(lines: Lines) -> _Lines:
    """A batch's lines, which must outlive what is returned."""
    arrays = (lines.slots, lines.starts, lines.counts, lines.firsts, lines.tables)
    assert all(array.dtype == np.int64 and array.flags.c_contiguous for array in arrays)
    return _Lines(
        int(lines.starts[-1] + lines.counts[-1]),
        len(lines.slots),
        len(lines.starts),
        lines.num_seconds,
        lines.tables.shape[1],
        *(array.ctypes.data for array in arrays),
    )


@cache
def _load(is_bf16: bool, head_dim: int) -> Any:
    try:
        defines = {"BF16": int(is_bf16), "HEAD_DIM": head_dim, "BLOCK": BLOCK_SIZE}
        library = ctypes.CDLL(str(compile_library(defines)))
    except OSError as error:  # no OpenMP, or a folder from which nothing may be run
        raise KernelsMissingError(f"they do not load ({error})") from error
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    number = ctypes.c_int
    library.rms_norm.argtypes = (*(pointer,) * 3, integer, integer, ctypes.c_float, number)
    library.silu_mul.argtypes = (*(pointer,) * 2, integer, integer, number)
    library.attend.argtypes = (*(pointer,) * 8, number)
    library.run_layers.argtypes = (*(pointer,) * 5, integer, pointer, integer, number)
    library.room_of.argtypes, library.room_of.restype = (pointer,), integer
    library.pack_weight.argtypes = (*(pointer,) * 2, integer, integer)
    library.product.argtypes = (*(pointer,) * 5, *(integer,) * 3, pointer, number)
    library.rows_at_once.argtypes = (integer,)
    library.sample.argtypes = (*(pointer,) * 7, integer, pointer, number)
    for procedure in (library.rms_norm, library.silu_mul, library.pack_weight):
        procedure.restype = None
    return library
