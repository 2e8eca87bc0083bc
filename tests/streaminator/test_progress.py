# SPDX-License-Identifier: Apache-2.0
import io
import os
import pty
import subprocess
import sys

import pytest

from streaminator.progress import Progress, Report
from streaminator.terminal import say, show

HALF = Report(
    num_finished=3,
    num_failed=1,
    num_new_tokens=100,
    num_draft_tokens=40,
    num_accepted_tokens=10,
    num_steps=2,
    num_running_slots_sum=6,
    num_slots_sum=8,
    device_memory=500,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_reports_add_up():
    total = HALF + Report(num_finished=1, num_draft_tokens=10, device_memory=200)
    assert total.num_finished == 4
    assert total.acceptance_rate == 0.2
    assert total.stream_utilization == 0.75
    assert total.device_memory == 500


def test_rates_without_data_are_none():
    assert Report().acceptance_rate is None
    assert Report().stream_utilization is None


def test_without_a_terminal_lines_go_to_stderr(capsys):
    with Progress(20, 6, 1, seconds_per_line=0.0) as progress:
        progress.update(HALF)
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[0]
    assert line.startswith("10/20 completions, ")
    for part in ("tokens/s", "acceptance 25%", "stream 75% (3.0/4)", "1 failed", "ETA 0:"):
        assert part in line


def test_lines_are_rare_and_the_last_state_is_always_told(capsys):
    progress = Progress(1000, 0, 1, seconds_per_line=60.0)
    for _ in range(500):
        progress.update(Report(num_finished=2))
    assert capsys.readouterr().err == ""
    progress.close()
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("1,000/1,000 completions")
    assert "ETA" not in lines[0]


def test_a_run_without_work_is_told_too(capsys):
    Progress(5, 5, 1).close()
    assert capsys.readouterr().err.startswith("5/5 completions")


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress(20, 6, 1) as progress:
        progress.update(HALF)
    assert "10/20" in terminal.getvalue()
    assert "acceptance 25%" in terminal.getvalue()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("module", ["rich", "torch", "wandb"])
def test_reports_need_no_heavy_imports(module):
    code = f"import sys, streaminator.progress; assert {module!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_terminal_that_is_closed_ends_nothing(monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress(10, 0, 1) as progress:
            assert progress._bar is not None
            os.close(ours)
            progress.update(Report(num_finished=3))
        say("and nothing that is said later does")


def test_streams_that_are_no_files_or_none_end_nothing(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError("full")

    for stream in (None, Full()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        say("a line")
        show("a table")
