# SPDX-License-Identifier: Apache-2.0
"""Pack: the scheduled tokens of all sequences as one row of tokens, with attention's indices.

Shapes: T packed tokens (padded), B sequences of an attention group, Q queries per sequence
(padded), M blocks per sequence (padded), L = M * block_size keys per sequence, R sampled rows.

Used by: `engine.Engine`, `step_costs` (make it), `model_runner`, `fused_model`, `attention`, `sampler`.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from streaminator.sequence import Sequence

ROW_MULTIPLE = 8
"""Rows are padded so that element-wise kernels never meet a partial vector, and products never have
very few rows (this project's own may, see `ModelRunner.row_multiple`): with either, a token's value
would depend, in the last bit, on how many others are in the batch."""

_MOST_SHORT = 16  # queries: sequences with more are a group of their own in a padded step
_KEYS = 256  # a padded step's block tables have room for 1, 2, 4 ... times as many
_ROOM = 2**17  # numbers of a step that go to a GPU in one copy
_ALIGNMENT = 16  # numbers; Triton compiles anew for pointers that are not multiples of 16 bytes


_ToTensor = Callable[[np.ndarray], torch.Tensor]


@dataclass(slots=True)
class AttentionGroup:
    """Sequences of similar query length, attended in one padded call."""

    rows: torch.Tensor
    """[B, Q] packed row of each query; 0 where padded, which is behind a sequence's first query."""
    block_table: torch.Tensor
    """[B, M] KV blocks; the null block where padded."""
    query_positions: torch.Tensor
    """[B, Q] position of each query in its sequence; 0 where padded."""
    valid: torch.Tensor | None
    """[num_valid] flat indices into B * Q that are not padding; None: all are valid."""
    has_own_keys: bool = False
    """Second choices (Q = 1): each sees its own key and value, not what the cache holds at its
    position, which is the first choice's."""
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)
    """Additive masks [B, 1, G * Q, L] by sliding window and G, made on first use."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Where each sequence's rows lie, and then those of the second choices; on the host."""

    starts: np.ndarray
    """[B] packed row of the first query."""
    counts: np.ndarray
    """[B] number of queries."""
    firsts: np.ndarray
    """[B] position of the first query in its sequence."""
    tables: np.ndarray
    """[B, M] KV blocks; the null block where padded."""
    slots: np.ndarray
    """[n] `Batch.slot_mapping`."""
    num_seconds: int
    """How many of B are second choices, the last."""


@dataclass(slots=True)
class Batch:
    """One step's work on the device."""

    input_ids: torch.Tensor
    """[1, T]."""
    positions: torch.Tensor
    """[1, T]."""
    slot_mapping: torch.Tensor
    """Place of each token's key and value: block * block_size + offset; second choices, which come
    last, have none."""
    sampled_rows: torch.Tensor
    """[R, padded] rows whose logits are needed."""
    noise_keys: torch.Tensor
    """[R] signed 64-bit key of each sampled row's sequence."""
    noise_positions: torch.Tensor
    """[R] index in its completion of the token each sampled row draws."""
    num_tokens: int
    """T without padding."""
    lines: Lines | None
    """None where the groups are given."""
    _groups: list[AttentionGroup] | None = None
    numbers: torch.Tensor | None = None
    """Of a padded step all that the forward reads, in one piece: of steps of the same `shape` each
    number has the same place in it."""

    @property
    def groups(self) -> list[AttentionGroup]:
        """All lines, in groups of similar length; made on first use."""
        if self._groups is None:
            assert self.lines is not None
            self._groups = _make_groups(self.lines, torch.from_numpy)
        return self._groups

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of all that the forward reads."""
        sizes = self.input_ids.shape[1], len(self.slot_mapping), len(self.sampled_rows)
        groups = ((*g.rows.shape, g.block_table.shape[1], g.has_own_keys) for g in self.groups)
        return (sizes, *groups)


def pack(
    sequences: Seq[Sequence],
    *,
    block_size: int,
    device: torch.device,
    row_multiple: int = ROW_MULTIPLE,
    pads: bool = False,
) -> Batch:
    """Lay out each sequence's scheduled tokens and its draft, one sequence after another, then the
    second choices of all, padded to a multiple of `row_multiple` rows.

    With `pads` everything is padded to few sizes, so that many steps have the same shape. Rows of
    padding write to the null block; sequences of padding attend in the last row, which is nobody's.
    Only paged attention can read that.
    """
    tokens: list[int] = []
    rows: list[tuple[int, int, int, int, int]] = []
    block_tables: list[list[int]] = []
    for sequence in sequences:
        first = sequence.num_cached_tokens
        last = first + sequence.num_scheduled_tokens
        length = last - first + len(sequence.draft)
        num_rows = 1 + len(sequence.draft) if sequence.is_sampled else 0
        num_drawn = len(sequence.token_ids) - sequence.num_prompt_tokens
        rows.append((first, length, num_rows, num_drawn, sequence.noise_key))
        block_tables.append(sequence.block_table)
        tokens += sequence.token_ids[first:last]
        tokens += sequence.draft
    num_written = len(tokens)
    for sequence in sequences:
        for place, token in sequence.alternatives.items():
            position = len(sequence.token_ids) + place
            num_drawn = position - sequence.num_prompt_tokens + 1
            rows.append((position, 1, 1, num_drawn, sequence.noise_key))
            block_tables.append(sequence.block_table)
            tokens.append(token)
    firsts, counts, num_sampled, num_drawn, keys = np.array(rows, dtype=np.int64).T.copy()
    width = max(map(len, block_tables))
    tables = np.array([blocks + [0] * (width - len(blocks)) for blocks in block_tables])
    ends = counts.cumsum()
    starts = ends - counts
    packed = np.arange(len(tokens))
    owners = np.repeat(np.arange(len(rows)), counts)
    positions = packed + (firsts - starts)[owners]
    written = positions[:num_written]
    slots = tables[owners[:num_written], written // block_size] * block_size + written % block_size
    first_sampled = ends - num_sampled
    sampled = np.flatnonzero(packed >= first_sampled[owners])
    drawers = owners[sampled]
    lines = Lines(starts, counts, firsts, tables, slots, len(rows) - len(sequences))
    if pads:
        num_rows, num_sampled_rows = _rung(len(tokens) + 1), _rung(max(len(sampled), 1))
        padding = _Padding(num_rows - 1, block_size)
    else:
        num_rows = _ceil(len(tokens), row_multiple) * row_multiple
        num_sampled_rows = _ceil(len(sampled), ROW_MULTIPLE) * ROW_MULTIPLE
        padding = None
    upload = _Upload(device) if pads or device.type == "cuda" else None
    tensor = upload or torch.from_numpy
    batch = Batch(
        input_ids=tensor(_padded(tokens, num_rows))[None],
        positions=tensor(_padded(positions, num_rows))[None],
        slot_mapping=tensor(_padded(slots, num_rows) if pads else slots),
        sampled_rows=tensor(_padded(sampled, num_sampled_rows)),
        _groups=_make_groups(lines, upload, padding) if upload else None,
        numbers=upload.numbers if upload and pads else None,
        # What the forward does not read comes last: its size is not padded.
        noise_keys=tensor(keys[drawers]),
        noise_positions=tensor(sampled + (num_drawn - first_sampled)[drawers]),
        num_tokens=len(tokens),
        lines=lines,
    )
    if upload is not None:
        upload.send()
    return batch


def _padded(numbers: Seq[int] | np.ndarray, *shape: int) -> np.ndarray:
    """`numbers`, and zeros behind them up to `shape`."""
    padded = np.zeros(shape, dtype=np.int64)
    padded[tuple(slice(length) for length in np.shape(numbers))] = numbers
    return padded


def _rung(number: int) -> int:
    """The next of 8, 16 ... 64, then of four sizes per power of two."""
    step = max(8, 1 << max((number - 1).bit_length() - 3, 0))
    return _ceil(number, step) * step


def _power(number: int, base_bits: int = 1) -> int:
    """The next power of 2 ** `base_bits`."""
    return 1 << _ceil((number - 1).bit_length(), base_bits) * base_bits


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


class _Upload:
    """A step's numbers, sent to the device in one copy: each alone costs the host more than it takes.

    What a call returns has its numbers after `send`. PyTorch keeps the pinned memory until the copy
    is done.
    """

    def __init__(self, device: torch.device, *, room: int = _ROOM) -> None:
        is_pinned = device.type == "cuda"
        self._host = torch.empty(room, dtype=torch.int64, pin_memory=is_pinned)
        self._device = torch.empty(room, dtype=torch.int64, device=device)
        self._used = 0
        self._is_whole = True

    @property
    def numbers(self) -> torch.Tensor | None:
        """All so far, in one piece; None where there was no room for all."""
        return self._device[: self._used] if self._is_whole else None

    def __call__(self, values: np.ndarray) -> torch.Tensor:
        new = torch.from_numpy(values)
        end = self._used + new.numel()
        if end > len(self._host):
            self._is_whole = False
            return new.to(self._device.device)
        self._host[self._used : end] = new.flatten()
        placed = self._device[self._used : end].view(new.shape)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        return placed

    def send(self) -> None:
        """Start the copy."""
        end = min(self._used, len(self._host))
        self._device[:end].copy_(self._host[:end], non_blocking=True)


class _Padding(NamedTuple):
    """How to pad groups."""

    spare_row: int
    block_size: int


def _make_groups(
    lines: Lines, tensor: _ToTensor, padding: _Padding | None = None
) -> list[AttentionGroup]:
    first_second = len(lines.counts) - lines.num_seconds
    counts = lines.counts[:first_second].tolist()
    if padding is None:
        members = _group_by_length(counts)
    else:
        is_short = np.array(counts) <= _MOST_SHORT
        members = [part.tolist() for part in (np.flatnonzero(is_short), np.flatnonzero(~is_short))]
    groups = [_group(lines, part, tensor, padding) for part in members if part]
    if lines.num_seconds:
        seconds = list(range(first_second, len(lines.counts)))
        groups.append(replace(_group(lines, seconds, tensor, padding), has_own_keys=True))
    return groups


def _group_by_length(lengths: Seq[int]) -> list[list[int]]:
    """Indices grouped so that padding to a group's longest wastes little."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups: list[list[int]] = []
    for index in order:
        if groups and lengths[index] <= 8 + lengths[groups[-1][0]] * 5 // 4:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _group(
    lines: Lines, members: list[int], tensor: _ToTensor, padding: _Padding | None
) -> AttentionGroup:
    counts = lines.counts[members][:, None]
    places = np.arange(counts.max())[None]
    is_valid = places < counts
    tables = lines.tables[members]
    used = int(np.flatnonzero(tables.any(0)).max(initial=0)) + 1
    tables = tables[:, :used]
    rows = np.where(is_valid, lines.starts[members][:, None] + places, 0)
    positions = np.where(is_valid, lines.firsts[members][:, None] + places, 0)
    valid = None if padding or is_valid.all() else tensor(np.flatnonzero(is_valid))
    if padding:
        num_lines, num_queries = _power(len(members)), _power(rows.shape[1], 2)
        num_keys = _power(_ceil(used * padding.block_size, _KEYS)) * _KEYS
        tables = _padded(tables, num_lines, _ceil(num_keys, padding.block_size))
        rows = _padded(rows, num_lines, num_queries)
        positions = _padded(positions, num_lines, num_queries)
        rows[len(members) :, 0] = padding.spare_row
    return AttentionGroup(
        rows=tensor(rows),
        block_table=tensor(tables),
        query_positions=tensor(positions),
        valid=valid,
    )
