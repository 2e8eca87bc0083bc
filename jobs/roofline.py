# SPDX-License-Identifier: Apache-2.0
"""What a step must at least read and compute, and what this machine can.

Counted are the weights, once per step, the keys and values read and written, and the products with
both. Activations, sampling and the host are not: a share of 100 % is out of reach. Experts of a
mixture are not counted, so that mixtures have no roofline.

Used by: `jobs.benchmark`, `jobs.benchmark_step`.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from jobs.engines.protocol import Run
from streaminator.engine.compile_kernels import KernelsMissingError
from streaminator.engine.huge_pages import Pages
from streaminator.engine.kernels import Kernels
from streaminator.engine.kv_cache import bytes_per_block
from streaminator.engine.model_runner import ModelRunner

_COPY_BYTES = 1 << 28
_SIZE = 1024
"""Rows and columns of the product; 8 times as many on a GPU."""
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """What it does at best, with the benchmark's threads."""

    copy_rate: float
    """Bytes per second, those read and those written."""
    matmul_rate: float
    """Floating-point operations per second of a square product in the model's type; in bfloat16 on a CPU with
    AMX this project's own, since PyTorch's does without here (`engine.reproducible`)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model its cost depends on."""

    body: int
    """Weights that multiply every token."""
    head: int
    """Weights that multiply sampled tokens only: the output embedding."""
    itemsize: int
    """Bytes of a weight."""
    kv_bytes: int
    """Per token, over all layers."""
    attended: int
    """Operations per pair of a query and a key, over all layers."""

    @property
    def weight_bytes(self) -> int:
        """That a step reads."""
        return (self.body + self.head) * self.itemsize


@dataclass(frozen=True, slots=True)
class Roofline:
    """An engine's average step against the machine."""

    seconds_per_step: float
    bytes_per_step: float
    flops_per_step: float
    share_of_copy: float
    share_of_matmul: float

    @property
    def share(self) -> float:
        """Of the nearer limit."""
        return max(self.share_of_copy, self.share_of_matmul)


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The best of a few copies and of a few products. Other work on the machine spoils it."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = _SIZE * 8 if device.type == "cuda" else _SIZE
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products: list[Callable[[], Any]] = [lambda: left @ right]
    if device.type == "cpu":
        with suppress(KernelsMissingError):
            kernels = Kernels(dtype)
            if kernels.has_product(size, size):
                packed = kernels.product(right, None, Pages())
                products.append(lambda: packed(left))
    return Machine(
        copy_rate=2 * _COPY_BYTES / _least_seconds(lambda: target.copy_(source), device),
        matmul_rate=2 * size**3 / min(_least_seconds(product, device) for product in products),
    )


def seconds_on_card(body: Callable[[], Any]) -> float:
    """What the current card takes for what `body` launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # so that the host gets ahead, whose calls are not to be measured
    start.record()
    body()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _least_seconds(body: Callable[[], Any], device: torch.device) -> float:
    def once() -> float:
        if device.type == "cuda":
            return seconds_on_card(body)
        start = time.perf_counter()
        body()
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(_REPEATS))


def model_shape(runner: ModelRunner) -> Shape | None:
    """None for a mixture of experts."""
    if any(parameter.dim() > 2 for parameter in runner.model.parameters()):
        return None
    head = runner.model.get_output_embeddings().weight
    rows = {id(m.weight) for m in runner.model.modules() if isinstance(m, torch.nn.Embedding)}
    body = sum(
        parameter.numel()
        for parameter in runner.model.parameters()
        if parameter.dim() == 2 and parameter is not head and id(parameter) not in rows
    )
    config = runner.model.config.get_text_config()
    shapes = runner.shapes.values()
    per_pair = sum(2 * (shape.key_dim + shape.value_dim) for shape in shapes)
    return Shape(
        body=body,
        head=head.numel(),
        itemsize=runner.dtype.itemsize,
        kv_bytes=bytes_per_block(runner.shapes, 1, runner.dtype),
        attended=per_pair * config.num_attention_heads,
    )


def roofline(run: Run, shape: Shape, machine: Machine) -> Roofline | None:
    """None for an engine that does not count what it computes."""
    if (
        run.num_steps is None
        or run.num_prefill_tokens is None
        or run.num_sampled_tokens is None
        or run.num_read_tokens is None
        or run.num_attended_tokens is None
    ):
        return None
    num_tokens = run.num_prefill_tokens + run.num_sampled_tokens
    num_bytes = (
        run.num_steps * shape.weight_bytes + (run.num_read_tokens + num_tokens) * shape.kv_bytes
    )
    flops = (
        2 * shape.body * num_tokens
        + 2 * shape.head * run.num_sampled_tokens
        + shape.attended * run.num_attended_tokens
    )
    return Roofline(
        seconds_per_step=run.seconds / run.num_steps,
        bytes_per_step=num_bytes / run.num_steps,
        flops_per_step=flops / run.num_steps,
        share_of_copy=num_bytes / machine.copy_rate / run.seconds,
        share_of_matmul=flops / machine.matmul_rate / run.seconds,
    )
