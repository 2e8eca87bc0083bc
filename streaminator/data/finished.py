# SPDX-License-Identifier: Apache-2.0
"""What a run has on disk already: which completions (`Finished`), and their tokens.

Invariants
- `Finished` keeps per finished prompt 8 bytes, a hash of its id; only prompts with some completions there and some
  missing are kept by name, and a run has at most its workers' windows of them.
- A completion that is in two parts is refused.
- `EarlierRun` keeps 12 bytes per prompt and part that holds it.

Used by: the driver, when a run is resumed; workers that go on with a prompt; `jobs.benchmark_memory`.
"""

from array import array
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from streaminator.data.files import list_parts, reason, resolve
from streaminator.errors import OutputError
from streaminator.sequence import Distributions, FinishReason, Prompt


def stable_hash(prompt_id: str) -> int:
    """64 bits, the same in every process and run."""
    return int.from_bytes(blake2b(prompt_id.encode(), digest_size=8).digest(), "little")


class HashSet:
    """64-bit hashes, 8 bytes each: a sorted array and a small set of the latest."""

    _MAX_LATEST = 1 << 15

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._latest: set[int] = set()

    def add(self, key: int) -> bool:
        """Add a hash; False if it was there."""
        place = int(self._sorted.searchsorted(np.uint64(key)))
        if key in self._latest or (place < len(self._sorted) and int(self._sorted[place]) == key):
            return False
        self._latest.add(key)
        if len(self._latest) == self._MAX_LATEST:
            latest = np.fromiter(self._latest, np.uint64)
            self._sorted = np.concatenate([self._sorted, latest])
            self._sorted.sort()  # in place
            self._latest.clear()
        return True


@dataclass(slots=True)
class _Partial:
    sample_indices: set[int] = field(default_factory=set)
    parts: list[str] = field(default_factory=list)


class Finished:
    """The completions of a run that need not be drawn again."""

    def __init__(self, run: str, num_completions: int) -> None:
        """Read ids only. Raises: OutputError for a part that cannot be read, or a duplicate."""
        self.num_completions = 0
        """Rows on disk."""
        self._partial: dict[str, _Partial] = {}
        self._num_wanted = num_completions
        filesystem, parts = _parts(run, None)
        complete = array("Q")
        for part in parts:
            columns = _columns(filesystem, part, ["prompt_id", "sample_index"])
            self.num_completions += len(columns[0])
            for prompt_id, sample_index in zip(*columns, strict=True):
                partial = self._partial.setdefault(prompt_id, _Partial())
                if sample_index in partial.sample_indices:
                    self._refuse(filesystem, parts, prompt_id, sample_index)
                partial.sample_indices.add(sample_index)
                name = part.rpartition("/")[2]
                if name not in partial.parts:
                    partial.parts.append(name)
                if len(partial.sample_indices) == num_completions:
                    complete.append(stable_hash(prompt_id))
                    del self._partial[prompt_id]
        self._complete = np.unique(np.array(complete, np.uint64))
        # A prompt that was complete and then appeared again.
        for prompt_id, partial in self._partial.items():
            if self._is_complete(prompt_id):
                index = min(partial.sample_indices)
                self._refuse(filesystem, parts, prompt_id, index)
        if len(self._complete) < len(complete):
            raise OutputError(
                f"{run}: holds every completion of some prompts twice; choose another --run_id"
            )

    def left(self, prompt: Prompt) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The completions still to draw, and the parts that hold the others."""
        if self._is_complete(prompt.prompt_id):
            return (), ()
        partial = self._partial.get(prompt.prompt_id)
        if partial is None:
            return prompt.sample_indices, ()
        missing = tuple(i for i in prompt.sample_indices if i not in partial.sample_indices)
        return missing, tuple(partial.parts)

    def _is_complete(self, prompt_id: str) -> bool:
        key = np.uint64(stable_hash(prompt_id))
        place = int(np.searchsorted(self._complete, key))
        return place < len(self._complete) and self._complete[place] == key

    @staticmethod
    def _refuse(
        filesystem: pafs.FileSystem, parts: list[str], prompt_id: str, sample_index: int
    ) -> NoReturn:
        first = _first_with(filesystem, parts, prompt_id, sample_index)
        last = _first_with(filesystem, parts[::-1], prompt_id, sample_index)
        raise OutputError(
            f"{last}: completion {sample_index} of prompt {prompt_id} is in {first} too; "
            "delete one of the two: its other rows will be drawn again"
        )


class EarlierRun:
    """Which parts of a run hold completions of a prompt."""

    def __init__(self, run: str) -> None:
        """Read ids only. Raises: OutputError for a part that cannot be read."""
        filesystem, parts = _parts(run, None)
        self._names = [part.rpartition("/")[2] for part in parts]
        hashes, numbers = array("Q"), array("I")
        for number, part in enumerate(parts):
            for prompt_id in set(_columns(filesystem, part, ["prompt_id"])[0]):
                hashes.append(stable_hash(prompt_id))
                numbers.append(number)
        order = np.argsort(np.array(hashes, np.uint64), kind="stable")
        self._hashes = np.array(hashes, np.uint64)[order]
        self._numbers = np.array(numbers, np.uint32)[order]

    def parts_of(self, prompt_id: str) -> tuple[str, ...]:
        """Names of the parts, none for a prompt the run does not have."""
        key = np.uint64(stable_hash(prompt_id))
        start, end = (np.searchsorted(self._hashes, key, side) for side in ("left", "right"))
        return tuple(self._names[number] for number in self._numbers[start:end])


def read_finished(run: str, names: Sequence[str] | None = None) -> dict[str, dict[int, list[int]]]:
    """{prompt_id: {sample_index: token_ids}} of a run's folder or URI, failed completions included.

    Args:
        run: the run's folder.
        names: parts to read; default: all.

    Raises: OutputError for a part that cannot be read, and for a completion that is there twice.
    """
    filesystem, parts = _parts(run, names)
    finished: dict[str, dict[int, list[int]]] = {}
    for part in parts:
        columns = _columns(filesystem, part, ["prompt_id", "sample_index", "token_ids"])
        for prompt_id, sample_index, token_ids in zip(*columns, strict=True):
            samples = finished.setdefault(prompt_id, {})
            if sample_index in samples:
                first = _first_with(filesystem, parts, prompt_id, sample_index)
                raise OutputError(
                    f"{part}: completion {sample_index} of prompt {prompt_id} is in {first} too; "
                    "delete one of the two: its other rows will be drawn again"
                )
            samples[sample_index] = token_ids
    return finished


def read_answers(
    run: str, prompt_ids: AbstractSet[str], names: Sequence[str]
) -> dict[str, dict[int, str | None]]:
    """{prompt_id: {sample_index: answer}} of these prompts in these parts; failed ones have none.

    Raises: OutputError for a part that cannot be read.
    """
    filesystem, parts = _parts(run, names)
    answers: dict[str, dict[int, str | None]] = {}
    for part in parts:
        wanted = ["prompt_id", "sample_index", "finish_reason", "answer"]
        for row in zip(*_columns(filesystem, part, wanted), strict=True):
            prompt_id, sample_index, ended, answer = row
            if prompt_id in prompt_ids:
                samples = answers.setdefault(prompt_id, {})
                samples[sample_index] = None if ended == FinishReason.FAILED else answer
    return answers


def read_distributions(
    run: str, prompt_ids: AbstractSet[str], names: Sequence[str] | None = None
) -> dict[str, dict[int, Distributions]]:
    """{prompt_id: {sample_index: distributions}} of the rows of these prompts that hold them.

    Args:
        run: the run's folder.
        prompt_ids: the prompts.
        names: parts to look into; default: all.

    Raises: OutputError for a part that cannot be read.
    """
    filesystem, parts = _parts(run, names)
    kept: dict[str, dict[int, Distributions]] = {}
    for part in parts if prompt_ids else []:
        # Few parts hold a prompt that is not finished, and these columns are large.
        if prompt_ids.isdisjoint(_columns(filesystem, part, ["prompt_id"])[0]):
            continue
        with _reading(part), filesystem.open_input_file(part) as file:
            table = pq.ParquetFile(file).read(columns=_OF_DISTRIBUTIONS)
            if "rejected_ids" not in table.column_names:  # older than these columns
                continue
            is_wanted = pc.field("prompt_id").isin(list(prompt_ids))
            table = table.filter(is_wanted & pc.field("top_ids").is_valid())
            for values in zip(*(table[name] for name in _OF_DISTRIBUTIONS), strict=True):
                row = dict(zip(_OF_DISTRIBUTIONS, values, strict=True))
                samples = kept.setdefault(row["prompt_id"].as_py(), {})
                samples[row["sample_index"].as_py()] = _distributions(row)
    return kept


_OF_DISTRIBUTIONS = [
    "prompt_id", "sample_index", "num_completion_tokens", "accepted", "top_ids", "top_probs",
    "rejected_ids", "rejected_lengths", "rejected_top_ids", "rejected_top_probs",
]  # fmt: skip


def _distributions(row: dict[str, Any]) -> Distributions:
    """Raises: ValueError where the columns do not fit together."""
    num, rejected = row["num_completion_tokens"].as_py(), row["rejected_ids"].values.to_numpy()
    accepted = np.array(row["accepted"].as_py(), np.int64)
    # A step's last tokens may lie behind the completion's end.
    ends = np.minimum(np.cumsum(accepted + 1), num)
    lengths = np.diff(ends, prepend=0)
    num_rejected = row["rejected_lengths"].as_py()
    shapes = {"top_ids": num, "top_probs": num}
    shapes |= {"rejected_top_ids": len(rejected), "rejected_top_probs": len(rejected)}
    arrays = {
        name: row[name].values.flatten().to_numpy().reshape(size, -1 if size else 0)
        for name, size in shapes.items()
    }
    fits = arrays["top_ids"].shape == arrays["top_probs"].shape and lengths.sum() == num
    fits &= arrays["rejected_top_ids"].shape == arrays["rejected_top_probs"].shape
    steps = lengths[lengths > 0].tolist()
    if not fits or sum(num_rejected) != len(rejected) or len(num_rejected) != len(steps):
        raise ValueError("distributions and accepted do not fit together")
    if not len(rejected):
        shape = (0, arrays["top_ids"].shape[1])
        arrays["rejected_top_ids"] = np.zeros(shape, np.int32)
        arrays["rejected_top_probs"] = np.zeros(shape, np.float32)
    return Distributions(
        **arrays,
        step_lengths=tuple(steps),
        rejected_ids=rejected,
        rejected_lengths=tuple(num_rejected),
    )


def _columns(filesystem: pafs.FileSystem, part: str, names: list[str]) -> list[list[Any]]:
    with _reading(part):
        with filesystem.open_input_file(part) as file:
            table = pq.ParquetFile(file).read(columns=names)
        return [table[name].to_pylist() for name in names]


def _parts(run: str, names: Sequence[str] | None) -> tuple[pafs.FileSystem, list[str]]:
    filesystem, path = resolve(run)
    folder = f"{path}/completions"
    if names is None:
        return filesystem, list_parts(filesystem, folder)
    return filesystem, [f"{folder}/{name}" for name in names]


@contextmanager
def _reading(part: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise OutputError(f"{part}: cannot be read: {reason(error)}") from error
        raise OutputError(
            f"{part}: damaged ({reason(error)}); delete it and run the same command again: "
            "its rows will be drawn again"
        ) from error


def _first_with(
    filesystem: pafs.FileSystem, parts: list[str], prompt_id: str, sample_index: int
) -> str:
    key = (prompt_id, sample_index)
    for part in parts:
        columns = _columns(filesystem, part, ["prompt_id", "sample_index"])
        if key in zip(*columns, strict=True):
            return part
    raise AssertionError(f"{key} is in no part")
