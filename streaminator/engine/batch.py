# SPDX-License-Identifier: Apache-2.0
"""Pack: the scheduled tokens of all sequences as one row of tokens, with attention's indices.

Shapes: T packed tokens (padded), B sequences of an attention group, Q queries per sequence
(padded), M blocks per sequence (padded), L = M * block_size keys per sequence, R sampled rows.

Used by: `engine.Engine`, `step_costs` (make it), `model_runner`, `fused_model`, `attention`, `sampler`.
"""

import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from streaminator.engine.layout import lay_out
from streaminator.sequence import Sequence

ROW_MULTIPLE = 8
"""Rows are padded so that element-wise kernels never meet a partial vector, and products never have
very few rows (this project's own may, see `ModelRunner.row_multiple`): with either, a token's value
would depend, in the last bit, on how many others are in the batch."""

MOST_SHORT = 17
"""Queries: sequences with more are a group of their own in a padded step. Few have: the memory's
longest draft is of 16 tokens."""

_QUERIES = (1, 4, MOST_SHORT)  # per sequence, that a padded step's are padded to; then 64, 256 ...
_MOST_PADDED = 1024  # tokens: longer steps keep a GPU busy for longer than their launches take
_KEYS = 512  # a padded step's block tables have room for 1, 2, 4 ... times as many
_NUM_FACTS = 8  # of a sequence, see `lay_out`
_ALIGNMENT = 16  # numbers; Triton compiles anew for pointers that are not multiples of 16 bytes


@dataclass(slots=True)
class AttentionGroup:
    """Sequences of similar query length, attended in one padded call."""

    rows: torch.Tensor
    """[B, Q] packed row of each query; -1 where padded."""
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


class Newest(NamedTuple):
    """Tokens of the step before, which the device knows and the host does not."""

    tokens: torch.Tensor
    """[R] on the device; below 0: none was drawn there."""
    rows: dict[Sequence, int]
    """Where the last token of a sequence is among them, for which a placeholder stands."""


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
    num_sampled: int = 0
    """R: a tensor's length costs the host microseconds."""
    _groups: list[AttentionGroup] | None = None
    numbers: torch.Tensor | None = None
    """Of a padded step all that the forward reads, in one piece: of steps of the same `shape` each
    number has the same place in it."""

    @property
    def groups(self) -> list[AttentionGroup]:
        """All lines, in groups of similar length; made on first use."""
        if self._groups is None:
            assert self.lines is not None
            groups = _make_groups(self.lines, None)
            self._groups = [group.place(torch.from_numpy) for group in groups]
        return self._groups

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """Of a padded step, sizes of all that the forward reads; each row has a slot there."""
        sizes = self.input_ids.shape[1], len(self.sampled_rows)
        groups = ((*g.rows.shape, g.block_table.shape[1], g.has_own_keys) for g in self.groups)
        return (sizes, *groups)


def pack(
    sequences: Seq[Sequence],
    *,
    block_size: int,
    device: torch.device,
    row_multiple: int = ROW_MULTIPLE,
    pads: bool = False,
    newest: Newest | None = None,
) -> Batch:
    """Lay out each sequence's scheduled tokens and its draft, one sequence after another, then the
    second choices of all, padded to a multiple of `row_multiple` rows.

    With `pads` all but long steps are padded to few sizes, so that many have the same shape. Rows
    of padding write to the null block; only paged attention can read that.

    `newest` gives tokens that the host does not know; only without drafts.
    """
    facts: list[int] = []
    tokens: list[int] = []
    blocks = array.array("q")
    seconds: list[int] = []
    unknown: list[int] = []
    drawn_rows: list[int] = []
    num_sampled = 0
    for line, sequence in enumerate(sequences):
        known, draft, table = sequence.token_ids, sequence.draft, sequence.block_table
        first, num = sequence.num_cached_tokens, sequence.num_scheduled_tokens
        tokens += known[first : first + num]
        tokens += draft
        blocks.extend(table)
        # What lays them out looks at no bounds.
        assert first + num + len(draft) <= len(table) * block_size, "tokens without a block"
        is_sampled = sequence.is_sampled
        facts += (
            first, num, len(draft), len(known), sequence.num_prompt_tokens, sequence.noise_key,
            is_sampled, len(table),
        )  # fmt: skip
        if is_sampled:
            num_sampled += 1 + len(draft)
            if newest and (row := newest.rows.get(sequence)) is not None:
                unknown.append(len(tokens) - 1)
                drawn_rows.append(row)
        for place, token in sequence.alternatives.items():
            seconds += (line, place, token)
    num_seconds, num_slots = len(seconds) // 3, len(tokens)
    tokens += seconds[2::3]
    num_sampled += num_seconds
    all_facts = np.array(facts, np.int64).reshape(-1, _NUM_FACTS)
    num_lines, width = len(all_facts) + num_seconds, int(all_facts[:, -1].max())
    num_rows = _ceil(len(tokens), row_multiple) * row_multiple
    num_sampled_rows = _ceil(num_sampled, ROW_MULTIPLE) * ROW_MULTIPLE
    padding = None
    if pads and len(tokens) <= _MOST_PADDED:
        num_rows, padding = _rung(len(tokens)), block_size
        has_long = all_facts[:, 1:3].sum(1).max() > MOST_SHORT
        num_sampled_rows = _rung(max(num_sampled, 1)) if has_long else num_rows
    starts, counts, firsts = np.empty((3, num_lines), np.int64)
    tables = np.zeros((num_lines, width), np.int64)
    input_ids, positions, slots, sampled = (
        np.zeros(num, np.int64)
        for num in (num_rows, num_rows, num_rows if padding else num_slots, num_sampled_rows)
    )
    input_ids[: len(tokens)] = tokens
    noise_keys, noise_positions = np.empty((2, num_sampled), np.int64)
    lay_out(
        all_facts, np.array(seconds, np.int64).reshape(-1, 3), np.frombuffer(blocks, np.int64),
        block_size, starts, counts, firsts, tables, positions, slots, sampled, noise_keys,
        noise_positions,
    )  # fmt: skip
    lines = Lines(starts, counts, firsts, tables, slots[:num_slots], num_seconds)
    read = [input_ids, positions, slots, sampled]
    rest = [noise_keys, noise_positions, *(np.array(x, np.int64) for x in (unknown, drawn_rows))]
    placed: Iterator[torch.Tensor]
    if device.type == "cuda" or padding:
        groups = _make_groups(lines, padding)
        read += [array for group in groups for array in group.arrays]
        # What the forward does not read comes last: its size is not padded.
        upload = _Upload([*read, *rest], device)
        placed = iter(upload.tensors)
    else:
        groups, upload = [], None
        placed = map(torch.from_numpy, [*read, *rest])
    batch = Batch(
        input_ids=next(placed)[None],
        positions=next(placed)[None],
        slot_mapping=next(placed),
        sampled_rows=next(placed),
        _groups=[group.place(lambda _: next(placed)) for group in groups] if groups else None,
        numbers=upload.numbers[: _room(read)] if upload and padding else None,
        noise_keys=next(placed),
        noise_positions=next(placed),
        num_tokens=len(tokens),
        num_sampled=num_sampled,
        lines=lines,
    )
    if newest and unknown:
        rows, drawn = placed
        batch.input_ids[0].index_copy_(0, rows, newest.tokens[drawn].clamp_(min=0))
    return batch


def _padded(numbers: np.ndarray, *shape: int) -> np.ndarray:
    """`numbers`, and zeros behind them up to `shape`."""
    padded = np.zeros(shape, dtype=np.int64)
    padded[tuple(slice(length) for length in np.shape(numbers))] = numbers
    return padded


def _rung(number: int) -> int:
    """The next of 8, 16 ... 64, then of four sizes per power of two."""
    step = max(8, 1 << max((number - 1).bit_length() - 3, 0))
    return _ceil(number, step) * step


def next_power(number: int, base_bits: int = 1) -> int:
    """The next power of 2 ** `base_bits`."""
    return 1 << _ceil((number - 1).bit_length(), base_bits) * base_bits


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _room(arrays: Seq[np.ndarray]) -> int:
    """Numbers that they take in an upload."""
    return sum(_ceil(array.size, _ALIGNMENT) * _ALIGNMENT for array in arrays)


class _Upload:
    """A step's numbers, sent to the device in one copy: each alone costs the host more than it takes.

    PyTorch keeps the pinned memory until the copy is done.
    """

    def __init__(self, arrays: Seq[np.ndarray], device: torch.device) -> None:
        is_pinned = device.type == "cuda"
        host = torch.empty(_room(arrays), dtype=torch.int64, device="cpu", pin_memory=is_pinned)
        self.numbers = torch.empty(len(host), dtype=torch.int64, device=device)
        """All of them, in one piece."""
        self.tensors: list[torch.Tensor] = []
        """Each of them, on the device."""
        numbers = host.numpy()  # a tensor's slices take the host longer than what is copied
        rooms = [_room([part]) for part in arrays]
        first = 0
        for part, room, piece in zip(arrays, rooms, self.numbers.split(rooms), strict=True):
            numbers[first : first + part.size] = part.ravel()
            placed = piece if part.size == room else piece[: part.size]
            self.tensors.append(placed if part.ndim == 1 else placed.view(part.shape))
            first += room
        self.numbers.copy_(host, non_blocking=True)


class _Group(NamedTuple):
    """An `AttentionGroup` on the host."""

    rows: np.ndarray
    block_table: np.ndarray
    query_positions: np.ndarray
    valid: np.ndarray | None
    has_own_keys: bool

    @property
    def arrays(self) -> list[np.ndarray]:
        return [x for x in self[:4] if x is not None]

    def place(self, tensor: Callable[[np.ndarray], torch.Tensor]) -> AttentionGroup:
        """On the device, where `tensor` puts each of its arrays, in order."""
        rows, table, positions = (tensor(x) for x in self[:3])
        valid = None if self.valid is None else tensor(self.valid)
        return AttentionGroup(rows, table, positions, valid, self.has_own_keys)


def _make_groups(lines: Lines, padding: int | None) -> list[_Group]:
    """`padding`: the block size, where groups are padded to few sizes."""
    first_second = len(lines.counts) - lines.num_seconds
    counts = lines.counts[:first_second]
    if padding is None:
        members = _group_by_length(counts.tolist())
    else:
        is_short = counts <= MOST_SHORT
        members = [np.flatnonzero(is_short), np.flatnonzero(~is_short)]
    groups = [_group(lines, part, padding) for part in members if len(part)]
    if lines.num_seconds:
        seconds = np.arange(first_second, len(lines.counts))
        group = _group(lines, seconds, padding, least=first_second)
        groups.append(group._replace(has_own_keys=True))
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
    lines: Lines, members: Seq[int] | np.ndarray, padding: int | None, least: int = 1
) -> _Group:
    """`least`: sequences that it is padded to at least."""
    starts, counts, firsts, tables = (
        x[members] for x in (lines.starts, lines.counts, lines.firsts, lines.tables)
    )
    num_queries = int(counts.max())
    if padding is not None:
        num_lines = next_power(max(len(members), least))
        num_queries = next((n for n in _QUERIES if num_queries <= n), next_power(num_queries, 2))
        # All groups of a step have tables of one length, so that there are fewer shapes.
        num_keys = next_power(_ceil(tables.shape[1] * padding, _KEYS)) * _KEYS
        starts, counts, firsts = (_padded(x, num_lines) for x in (starts, counts, firsts))
        tables = _padded(tables, num_lines, _ceil(num_keys, padding))
    places = np.arange(num_queries)
    is_valid = places < counts[:, None]
    rows = np.where(is_valid, starts[:, None] + places, -1)
    positions = np.where(is_valid, firsts[:, None] + places, 0)
    valid = None
    if padding is None:
        tables = tables[:, : int(np.flatnonzero(tables.any(0)).max(initial=0)) + 1]
        valid = None if is_valid.all() else np.flatnonzero(is_valid)
    return _Group(rows, tables, positions, valid, has_own_keys=False)
