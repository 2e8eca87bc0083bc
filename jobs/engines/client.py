# SPDX-License-Identifier: Apache-2.0
"""The benchmark's half of the protocol: start an engine, ask it, end it.

Used by: `jobs.benchmark_measure`.
"""

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict
from types import TracebackType
from typing import Any

from jobs.engines.protocol import Draw, Load, Run
from jobs.engines.registry import ROOT, Program
from streaminator.engine.reproducible import ADDED
from streaminator.errors import StreaminatorError

_LOAD_LIMIT = 900.0  # seconds; vLLM compiles the model


class EngineFailedError(StreaminatorError, RuntimeError):
    """An engine of the benchmark said that it cannot go on, ended, or took too long."""


class Client:
    """An engine in a process of its own, which begins to import as soon as it is started."""

    def __init__(self, program: Program, load: Load) -> None:
        self.program = program
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (until the end of the process)
        threads = {"OMP_NUM_THREADS": str(load.num_threads)} if load.device == "cpu" else {}
        # What keeps this engine exact would make others slow; its own process sets it again.
        kept = {name: value for name, value in os.environ.items() if name not in ADDED}
        self._process = subprocess.Popen(
            program.command,
            cwd=ROOT,
            env=kept | threads | program.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._buffer = b""
        self._what = load

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """End the process, if need be by force; the second time nothing is left to do."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def load(self) -> dict[str, str]:
        """Let it load the model; returns the versions it runs with. Raises: EngineFailedError."""
        self._send({"load": asdict(self._what)})
        return self._answer("ready", _LOAD_LIMIT)

    def draw(self, draw: Draw, limit: float) -> Run:
        """All completions asked for. Raises: EngineFailedError, also after `limit` seconds."""
        self._send({"draw": asdict(draw)})
        return Run(**self._answer("run", limit))

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(message) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why

    def _answer(self, key: str, limit: float) -> dict[str, Any]:
        line = self._read_line(limit)
        if line is None:
            raise EngineFailedError(f"no answer within {limit:.0f} s")
        try:
            message = json.loads(line)
        except ValueError:
            message = {}
            if line:
                raise EngineFailedError(f"it answered {line[:80]!r}, which is no JSON") from None
        if key in message:
            return message[key]
        raise EngineFailedError(message.get("error") or f"it ended: {self._last_words()}")

    def _read_line(self, limit: float) -> bytes | None:
        assert self._process.stdout is not None
        end = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    break
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _last_words(self) -> str:
        """The last line of what it wrote to stderr, or what ended it."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        if code < 0:
            return f"by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"exit code {code}"
