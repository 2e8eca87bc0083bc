# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the forward: a padded step of a known shape is one launch.

A forward of an unmodified model is a thousand small launches, which take the host longer than the
device needs for them. Each shape (`Batch.shape`) is run as it is when it is first met, captured when
it is met again, and replayed from then on. What a replay gives is compared with what the forward
gave before it is used; where capturing fails or they differ, all steps run as they are.

Used by: `model_runner`.
"""

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from streaminator.engine.batch import Batch
from streaminator.engine.kv_cache import KVCache
from streaminator.errors import first_line

MOST_GRAPHS = 64
_MOST_ROWS = 1024
"""Longer steps keep the device busy for longer than their launches take."""
_TOLERANCE = 0.02
"""Of the largest logit: products may add up in another order."""

_log = logging.getLogger("streaminator")

Forward = Callable[[Batch, KVCache], torch.Tensor]
Work = Callable[[], None]


class CudaCapture:
    """Captures work on a device; all that is captured shares one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """What repeats `work` on the same memory.

        Raises: RuntimeError where it asks for something that no graph can do.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            # Other threads of the process may go on using the device.
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            work()

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay


@dataclass(frozen=True, slots=True)
class _Graph:
    replay: Work
    numbers: torch.Tensor
    """What it reads: a step's numbers go there."""
    logits: torch.Tensor
    """What it writes."""


class StepGraphs:
    """A forward, replayed where it can be."""

    def __init__(self, forward: Forward, capture: Callable[[Work], Work]) -> None:
        self._forward = forward
        self._capture = capture
        self._graphs: dict[tuple, _Graph] = {}  # least recently used first
        self._met: set[tuple] = set()
        self._cache: Callable[[], KVCache | None] = lambda: None
        self._num_blocks = 0
        self._logits: torch.Tensor | None = None
        self.why_not = ""
        """Why nothing is captured any more, in words."""

    @property
    def num_graphs(self) -> int:
        """Shapes that are replayed."""
        return len(self._graphs)

    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Logits of the batch's sampled rows, padded ones too, until the next call."""
        if batch.numbers is None or batch.input_ids.shape[1] > _MOST_ROWS or self.why_not:
            return self._forward(batch, cache)
        if self._cache() is not cache or self._num_blocks != cache.num_blocks:
            # Graphs know where the keys lay.
            self._graphs.clear()
            self._cache, self._num_blocks = weakref.ref(cache), cache.num_blocks
        shape = batch.shape
        graph = self._graphs.pop(shape, None)
        if graph is None:
            logits = self._forward(batch, cache)
            if shape in self._met:
                self._add(shape, batch, cache, logits)
            self._met.add(shape)
            return logits
        self._graphs[shape] = graph
        graph.numbers.copy_(batch.numbers)
        graph.replay()
        return graph.logits

    def _add(self, shape: tuple, batch: Batch, cache: KVCache, expected: torch.Tensor) -> None:
        """Capture the forward of `batch`, whose memory later steps use."""
        try:
            graph = self._try_capture(batch, cache, expected)
        except RuntimeError as error:
            self.why_not = f"{type(error).__name__}: {first_line(error)}"
            self._graphs.clear()
            self._logits = None
            _log.warning("steps run without CUDA graphs, which is slower: %s", self.why_not)
            return
        if len(self._graphs) == MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[shape] = graph

    def _try_capture(self, batch: Batch, cache: KVCache, expected: torch.Tensor) -> _Graph:
        assert batch.numbers is not None
        output = self._room_for(expected)

        def work() -> None:
            # Copied, so that the memory of what a graph makes is free for the next one's.
            output.copy_(self._forward(batch, cache))

        replay = self._capture(work)
        output.zero_()
        replay()
        if not _agree(output, expected):
            raise RuntimeError("a replayed step gave other logits")
        return _Graph(replay, batch.numbers, output)

    def _room_for(self, logits: torch.Tensor) -> torch.Tensor:
        """Memory of its shape that all graphs share."""
        if self._logits is None or len(self._logits) < len(logits):
            # What is there already stays with the graphs that write to it.
            self._logits = torch.empty_like(logits)
        return self._logits[: len(logits)]


def _agree(output: torch.Tensor, expected: torch.Tensor) -> bool:
    limit = _TOLERANCE * expected.nan_to_num().abs().max().item()
    return torch.allclose(output, expected, rtol=0, atol=limit, equal_nan=True)
