# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the forward: a padded step of a known shape is one launch.

A forward is hundreds of launches, of an unmodified model a thousand, which take the host longer than
the device needs for them. Each shape (`Batch.shape`) is run as it is when it is first met, captured when
it is met again, and replayed from then on. What the first replay gives is compared with what the
forward gave; where capturing fails or they differ, all steps run as they are.

Used by: `model_runner`.
"""

import gc
import logging
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from streaminator.engine.batch import Batch
from streaminator.engine.kv_cache import KVCache
from streaminator.errors import kind_and_line

MOST_GRAPHS = 64
_MEETINGS = 2
"""After so many a shape is captured, while there is room for more graphs."""
MEETINGS_TO_REPLACE = 16
"""And so many where it takes the place of another one: a capture takes as long as a few forwards."""
_TOLERANCE = 0.02
"""Of the largest logit: products may add up in another order."""

_log = logging.getLogger("streaminator")

Forward = Callable[[Batch, KVCache], torch.Tensor]
Work = Callable[[], None]
Capture = Callable[[Work], Work]


class CudaCapture:
    """Captures work on a device; all that one captures shares a pool of memory.

    PyTorch's own context manager (`torch.cuda.graph`) uses one stream for all of a process, whose
    workspaces would lie in the pool of whoever came first, and stays on it where a capture fails.
    A pool cannot be used again when all of its graphs are gone: take a new `CudaCapture` then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        self._is_tried = False

    def __call__(self, work: Work) -> Work:
        """What repeats `work` on the same memory.

        Raises: RuntimeError where it asks for something that no graph can do.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            if not self._is_tried:
                self._try(work)
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream), _no_collection():
                # Other threads of the process may go on using the device.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
            current.wait_stream(self._stream)

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay

    def _try(self, work: Work) -> None:
        """Find out whether the host waits for the device in it: a capture that fails leaves damage."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        self._is_tried = True


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may be another graph, and giving that back would spoil a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class _Graph:
    replay: Work
    numbers: torch.Tensor
    """What it reads: a step's numbers go there."""
    logits: torch.Tensor
    """What it writes."""


class StepGraphs:
    """Forwards, replayed where they can be."""

    def __init__(self, make_capture: Callable[[], Capture]) -> None:
        self._make_capture = make_capture
        self._capture: Capture | None = None
        self._graphs: dict[tuple, _Graph] = {}  # least recently used first
        self._meetings: Counter[tuple] = Counter()
        self._too_large: set[tuple] = set()
        self._cache: Callable[[], KVCache | None] = lambda: None
        self._num_blocks = 0
        self._logits: torch.Tensor | None = None
        self.why_not = ""
        """Why nothing is captured any more, in words."""
        self.was_usual = True
        """Whether the newest step took what others of its shape will take."""

    @property
    def num_graphs(self) -> int:
        """Shapes that are replayed."""
        return len(self._graphs)

    def run(self, forward: Forward, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Logits of the batch's sampled rows, padded ones too, until the next call."""
        self.was_usual = True
        if batch.numbers is None or self.why_not:
            return forward(batch, cache)
        if self._cache() is not cache or self._num_blocks != cache.num_blocks:
            # Graphs know where the keys lay.
            self._forget()
            self._cache = weakref.ref(cache, self._forget)
            self._num_blocks = cache.num_blocks
        shape = batch.shape
        graph = self._graphs.pop(shape, None)
        if graph is not None:
            self._graphs[shape] = graph
            graph.numbers.copy_(batch.numbers)
            graph.replay()
            return graph.logits
        self.was_usual = False
        try:
            logits = forward(batch, cache)
        except torch.OutOfMemoryError:
            self._forget()  # their memory may be what is missing when the step is tried again
            raise
        self._meetings[shape] += 1
        is_full = len(self._graphs) == MOST_GRAPHS
        enough = MEETINGS_TO_REPLACE if is_full else _MEETINGS
        if self._meetings[shape] >= enough and shape not in self._too_large:
            self._add(shape, forward, batch, cache, logits)
        return logits

    def _forget(self, _: object = None) -> None:
        self._drop(*self._graphs)
        self._meetings.clear()
        self._logits = self._capture = None

    def _drop(self, *shapes: tuple) -> None:
        for shape in shapes:
            device = self._graphs[shape].logits.device
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # it may be on its way
            del self._graphs[shape]

    def _add(
        self, shape: tuple, forward: Forward, batch: Batch, cache: KVCache, expected: torch.Tensor
    ) -> None:
        """Capture the forward of `batch`, whose memory later steps use."""
        try:
            graph = self._try_capture(forward, batch, cache, expected)
        except torch.OutOfMemoryError:
            self._too_large.add(shape)
            self._forget()
            return
        except RuntimeError as error:
            # Ending a capture that has failed fails, too.
            cause = error.__context__ or error
            self.why_not = kind_and_line(cause)
            self._forget()
            _log.warning("steps run without CUDA graphs, which is slower: %s", self.why_not)
            return
        if len(self._graphs) == MOST_GRAPHS:
            self._drop(next(iter(self._graphs)))
        self._graphs[shape] = graph
        del self._meetings[shape]

    def _try_capture(
        self, forward: Forward, batch: Batch, cache: KVCache, expected: torch.Tensor
    ) -> _Graph:
        assert batch.numbers is not None
        if self._capture is None:
            self._capture = self._make_capture()
        output = self._room_for(expected)

        def work() -> None:
            # Copied, so that the memory of what a graph makes is free for the next one's.
            output.copy_(forward(batch, cache))

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
    finite = expected.masked_fill(~expected.isfinite(), 0)
    limit = _TOLERANCE * finite.abs().max().item()
    return torch.allclose(output, expected, rtol=0, atol=limit, equal_nan=True)
