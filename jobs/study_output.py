# SPDX-License-Identifier: Apache-2.0
"""What a study's results have in common: files of one name, settings without this machine's paths.

Used by: `jobs.acceptance_rates`, `jobs.profiling`, `jobs.benchmark`.
"""

import platform
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streaminator.config import JobConfig
from streaminator.errors import OutputError
from streaminator.run_record import cpu_model

# pyarrow and torch are imported late, so that --help and typos are answered at once.
if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def width_of(config: JobConfig) -> int:
    """A study's stream width: what the program would choose differs from machine to machine."""
    return config.engine.stream_width or 16


def with_width(config: JobConfig) -> JobConfig:
    """The settings with the study's stream width in them."""
    return replace(config, engine=replace(config.engine, stream_width=width_of(config)))


def open_study(config: JobConfig, folder_name: str) -> tuple["FileSystem", str]:
    """Where a study's files go: the file system and their path less the suffix.

    A study takes minutes: what cannot be written is refused before it. Raises: ConfigError.
    """
    from streaminator.data.files import join_uri, open_output

    filesystem, folder = open_output(join_uri(config.run.output, folder_name))
    return filesystem, f"{folder}/{config.run.run_id or Path(config.model.model_name).name}"


def write_study(filesystem: "FileSystem", stem: str, files: Mapping[str, bytes]) -> None:
    """Write the files, by suffix. Raises: OutputError."""
    from streaminator.data.files import reason, write_whole

    try:
        for suffix, data in files.items():
            write_whole(filesystem, f"{stem}.{suffix}", data)
    except OSError as error:
        raise OutputError(f"{stem}: cannot be written: {reason(error)}") from error


def describe(config: JobConfig, *, without: Collection[str]) -> dict[str, Any]:
    """What was measured, and on what; no path of this machine.

    Args:
        config: resolved settings.
        without: settings that are the study's own.
    """
    import torch

    dropped = {"output", "run_id", *without}
    settings = {name: value for name, value in config.flat().items() if name not in dropped}
    for name in ("model_name", "tokenizer_name", "dataset", "few_shot"):
        settings[name] = settings[name] and _name(settings[name])
    is_gpu = config.model.device.startswith("cuda")
    return {
        "model": settings["model_name"],
        "dataset": settings["dataset"],
        "num_completions": config.data.num_completions,
        "device": torch.cuda.get_device_name(config.model.device) if is_gpu else cpu_model(),
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
        "settings": settings,
    }


def versions() -> dict[str, str]:
    """Of what computes."""
    found = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), **found}


def _name(value: str) -> str:
    """A hub name, or the last part of a path."""
    return Path(value).name if Path(value).exists() else value
