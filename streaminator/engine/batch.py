# SPDX-License-Identifier: Apache-2.0
"""Pack: the scheduled tokens of all sequences as one row of tokens, with attention's indices.

Shapes: T packed tokens (padded), B sequences of an attention group, Q queries per sequence
(padded), M blocks per sequence (padded), L = M * block_size keys per sequence, R sampled rows.

Used by: `engine.Engine` (makes it), `model_runner`, `attention`, `sampler`.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch

from streaminator.sequence import Sequence

# Rows are padded so that element-wise kernels never meet a partial vector, and products never have
# very few rows: with either, a token's value would depend, in the last bit, on how many others are
# in the batch.
ROW_MULTIPLE = 8

_ROOM = 2**17  # numbers of a step that go to a GPU in one copy
_ALIGNMENT = 16  # numbers; Triton compiles anew for pointers that are not multiples of 16 bytes


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
    groups: list[AttentionGroup]
    sampled_rows: torch.Tensor
    """[R, padded] rows whose logits are needed."""
    noise_keys: torch.Tensor
    """[R] signed 64-bit key of each sampled row's sequence."""
    noise_positions: torch.Tensor
    """[R] index in its completion of the token each sampled row draws."""
    num_tokens: int
    """T without padding."""


def pack(sequences: Seq[Sequence], *, block_size: int, device: torch.device) -> Batch:
    """Lay out each sequence's scheduled tokens and its draft, one sequence after another, then the
    second choices of all.
    """
    tokens: list[int] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    starts: list[int] = []
    lengths: list[int] = []
    sampled: list[int] = []
    keys: list[int] = []
    noise_positions: list[int] = []
    for sequence in sequences:
        first = sequence.num_cached_tokens
        last = first + sequence.num_scheduled_tokens
        starts.append(len(tokens))
        tokens.extend(sequence.token_ids[first:last])
        tokens.extend(sequence.draft)
        length = last - first + len(sequence.draft)
        lengths.append(length)
        position = np.arange(first, first + length)
        positions.append(position)
        table = np.array(sequence.block_table)
        slots.append(table[position // block_size] * block_size + position % block_size)
        if sequence.is_sampled:
            num_rows = 1 + len(sequence.draft)
            sampled.extend(range(len(tokens) - num_rows, len(tokens)))
            keys.extend([sequence.noise_key] * num_rows)
            drawn = len(sequence.token_ids) - sequence.num_prompt_tokens
            noise_positions.extend(range(drawn, drawn + num_rows))
    seconds = [(s, *item) for s in sequences for item in s.alternatives.items()]
    first_second = len(tokens)
    for sequence, place, token in seconds:
        sampled.append(len(tokens))
        tokens.append(token)
        positions.append(np.array([len(sequence.token_ids) + place]))
        keys.append(sequence.noise_key)
        drawn = len(sequence.token_ids) - sequence.num_prompt_tokens
        noise_positions.append(drawn + place + 1)
    padding = -len(tokens) % ROW_MULTIPLE

    upload = _Upload(device) if device.type == "cuda" else None
    tensor = upload or _to_tensor
    pad = np.zeros(padding, dtype=np.int64)
    groups = [
        _group([sequences[i] for i in members], starts, lengths, members, tensor)
        for members in _group_by_length(lengths)
    ]
    if seconds:
        groups.append(_group_of_seconds(seconds, first_second, tensor))
    batch = Batch(
        input_ids=tensor([*tokens, *pad])[None],
        positions=tensor(np.concatenate([*positions, pad]))[None],
        slot_mapping=tensor(np.concatenate(slots)),
        groups=groups,
        sampled_rows=tensor(sampled + [0] * (-len(sampled) % ROW_MULTIPLE)),
        noise_keys=tensor(keys),
        noise_positions=tensor(noise_positions),
        num_tokens=len(tokens),
    )
    if upload is not None:
        upload.send()
    return batch


def _to_tensor(values: object) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.int64))


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

    def __call__(self, values: object) -> torch.Tensor:
        new = _to_tensor(values)
        end = self._used + new.numel()
        if end > len(self._host):
            return new.to(self._device.device)
        self._host[self._used : end] = new.flatten()
        placed = self._device[self._used : end].view(new.shape)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        return placed

    def send(self) -> None:
        """Start the copy."""
        end = min(self._used, len(self._host))
        self._device[:end].copy_(self._host[:end], non_blocking=True)


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


def _group(members, starts, lengths, indices, tensor) -> AttentionGroup:  # noqa: ANN001
    num_queries = max(lengths[i] for i in indices)
    num_blocks = max(len(s.block_table) for s in members)
    rows = np.zeros((len(members), num_queries), dtype=np.int64)
    query_positions = np.zeros_like(rows)
    table = np.zeros((len(members), num_blocks), dtype=np.int64)
    is_valid = np.zeros(rows.shape, dtype=bool)
    for line, (sequence, index) in enumerate(zip(members, indices, strict=True)):
        length = lengths[index]
        rows[line, :length] = np.arange(starts[index], starts[index] + length)
        first = sequence.num_cached_tokens
        query_positions[line, :length] = np.arange(first, first + length)
        table[line, : len(sequence.block_table)] = sequence.block_table
        is_valid[line, :length] = True
    return AttentionGroup(
        rows=tensor(rows),
        block_table=tensor(table),
        query_positions=tensor(query_positions),
        valid=None if is_valid.all() else tensor(np.flatnonzero(is_valid)),
    )


def _group_of_seconds(seconds, first, tensor) -> AttentionGroup:  # noqa: ANN001
    table = np.zeros((len(seconds), max(len(s.block_table) for s, _, _ in seconds)), dtype=np.int64)
    for line, (sequence, _, _) in enumerate(seconds):
        table[line, : len(sequence.block_table)] = sequence.block_table
    return AttentionGroup(
        rows=tensor(first + np.arange(len(seconds))[:, None]),
        block_table=tensor(table),
        query_positions=tensor([[len(s.token_ids) + place] for s, place, _ in seconds]),
        valid=None,
        has_own_keys=True,
    )
