# SPDX-License-Identifier: Apache-2.0
"""New weights for a model that stays where it is.

Invariants
- Everything is checked before the first weight is written: refused weights change nothing.
- The model's tensors are written in place, so that whoever refers to them sees the new values.

Used by: `streaminator.resident_session`, `actors.sampler_pool`.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streaminator.errors import ModelError

_WHERE = "update_weights"


@torch.no_grad()
def copy_weights(model: Any, weights: object) -> None:
    """Write a state dict into `model`, in its own type and on its device.

    Of weights that the model ties to each other, one name is enough.

    Raises: ModelError naming the first weight that is unknown, missing or of another shape.
    """
    weights = check_tensors(weights)
    own: dict[str, torch.Tensor] = model.state_dict()
    for name in weights:
        if name not in own:
            raise ModelError(
                f"{_WHERE}: the model has no weight {name!r} (it has {next(iter(own))!r}, say); "
                "give the bare model's state dict, unwrapped and with adapters merged"
            )
    given: dict[_Place, str] = {}
    for name, value in weights.items():
        target = own[name]
        if value.shape != target.shape:
            raise ModelError(
                f"{_WHERE}: {name!r} has the shape {list(value.shape)} and the model's has "
                f"{list(target.shape)}; give weights of the same architecture"
            )
        if value.is_floating_point() != target.is_floating_point():
            raise ModelError(
                f"{_WHERE}: {name!r} is {value.dtype} and the model's is {target.dtype}; "
                "give weights that are not quantised"
            )
        first = given.setdefault(_place(target), name)
        if first != name and not _are_equal(weights[first], value):
            raise ModelError(
                f"{_WHERE}: {name!r} differs from {first!r}, and the model ties the two; tie them "
                "in training, too"
            )
    for name, target in own.items():
        if _place(target) not in given:
            raise ModelError(f"{_WHERE}: {name!r} is missing; give all weights of the model")
    for name in given.values():
        own[name].copy_(weights[name])


def check_tensors(weights: object) -> Mapping[str, torch.Tensor]:
    """What is a state dict of plain tensors. Raises: ModelError for anything else."""
    if not isinstance(weights, Mapping):
        raise ModelError(
            f"{_WHERE}: got a {type(weights).__name__}; give a state dict, the folder of a "
            "checkpoint, or on Ray a reference to a state dict"
        )
    for name, value in weights.items():
        is_empty = getattr(value, "is_meta", False)
        is_plain = type(value) in (torch.Tensor, torch.nn.Parameter)
        if not is_plain or is_empty or value.layout != torch.strided:
            kind = "a tensor without data" if is_empty else f"a {type(value).__name__}"
            kind += f" ({value.layout})" if is_plain and not is_empty else ""
            raise ModelError(
                f"{_WHERE}: {name!r} is {kind}; give plain tensors, a sharded model's whole "
                "(full_tensor)"
            )
    return weights


_Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


def _place(tensor: torch.Tensor) -> _Place:
    """Tensors with the same one are the same; a view, say a transposed one, is another."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return _place(one) == _place(other) or bool(torch.equal(one, other.to(one)))


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A state dict as bytes, which processes can share without copies; tied weights once."""

    arrays: dict[str, tuple[np.ndarray, torch.dtype, tuple[int, ...]]]

    @classmethod
    def of(cls, weights: object) -> "PackedWeights":
        """Pack a state dict, from whatever device. Raises: ModelError."""
        bytes_of: dict[_Place, np.ndarray] = {}
        arrays = {}
        for name, value in check_tensors(weights).items():
            place = _place(value)
            if place not in bytes_of:
                flat = value.detach().cpu().contiguous().flatten()
                bytes_of[place] = flat.view(torch.uint8).numpy()
            arrays[name] = (bytes_of[place], value.dtype, tuple(value.shape))
        return cls(arrays)

    def unpack(self) -> dict[str, torch.Tensor]:
        """The state dict; to be read only."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return {
                name: torch.from_numpy(array).view(dtype).view(shape)
                for name, (array, dtype, shape) in self.arrays.items()
            }
