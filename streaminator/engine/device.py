# SPDX-License-Identifier: Apache-2.0
"""What --device and --dtype mean on this machine.

Used by: `streaminator.cli`, `engine.model_runner`, and whoever launches kernels of Triton.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from streaminator.errors import DeviceError, first_line


def resolve_device(name: str) -> torch.device:
    """The device meant by --device.

    Raises: DeviceError when it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--device {name}: give cpu, cuda, cuda:N or auto")
    if device.type == "cuda":
        num = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= num:
            raise DeviceError(f"--device {name}: this machine has {num} CUDA devices; use cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type meant by --dtype: auto is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)


def with_index(device: torch.device) -> torch.device:
    """The card that "cuda" means here and now: it would mean another one in another thread."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_card(device: torch.device) -> None:
    """Raises: DeviceError where nothing runs any more, as after an access out of bounds."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceError(
                f"the card fails since a kernel was tried ({first_line(error)}); give "
                "--no_paged_attention, which does without this project's kernels"
            ) from error


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes `device` the current one while it lasts: there Triton launches, wherever tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
