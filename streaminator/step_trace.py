# SPDX-License-Identifier: Apache-2.0
"""A trace of a worker's steps by PyTorch's profiler, for Perfetto or chrome://tracing.

Used by: `session`, with `--profile`.
"""

import gzip
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from streaminator.data.files import reason, resolve, write_whole
from streaminator.errors import OutputError

FIRST_STEP, NUM_STEPS = 10, 20
"""The steps before compile and allocate."""


class StepTrace:
    """Records `NUM_STEPS` steps from `FIRST_STEP` on, fewer where the work ends before."""

    def __init__(self, uri: str, device: torch.device) -> None:
        """`uri` is of the file to write, ending in .json.gz."""
        self._uri = uri
        self._num_steps = 0
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = profile(activities=activities)
        self._is_on = False

    def step(self) -> None:
        """A step ends. Raises: OutputError when the trace cannot be written."""
        self._num_steps += 1
        if self._profile is not None and self._num_steps == FIRST_STEP:
            self._profile.start()
            self._is_on = True
        elif self._num_steps == FIRST_STEP + NUM_STEPS:
            self.close()

    def close(self) -> str | None:
        """Write what was recorded; returns why there is nothing. Raises: OutputError."""
        recorded, self._profile = self._profile, None
        if recorded is None:
            return None
        if not self._is_on:
            return f"no trace: it begins with step {FIRST_STEP}, this worker had {self._num_steps}"
        recorded.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(path))
            data = gzip.compress(path.read_bytes())
        filesystem, path = resolve(self._uri)
        try:
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            write_whole(filesystem, path, data)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {reason(error)}") from error
        return None
