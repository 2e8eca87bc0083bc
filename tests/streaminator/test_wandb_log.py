# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

from streaminator.config import JobConfig
from streaminator.errors import ConfigError
from streaminator.progress import Report
from streaminator.wandb_log import WandbLog

OFFLINE_RUN = """
from streaminator.config import JobConfig
from streaminator.progress import Report
from streaminator.summary import Generation, Summary
from streaminator.wandb_log import WandbLog

summary = Summary(
    path="x", num_prompts=1, num_completions=2, num_failed=0, failures={}, events={},
    num_settled=0, num_settled_prompts=0, num_tokens_saved=0, calibration=[], num_tokens=9,
    wall_seconds=1.0, tokens_per_second=9.0, num_graded=2, grader_errors={}, accuracy=0.5, pass_at_k={1: 0.5},
    majority_at_k={1: 0.5}, acceptance_rate=0.25, tokens_per_step=1.5, stream_utilization=None,
    stream_widths=[4],
    generations=[
        Generation(sample_index=0, num_completions=1, acceptance_rate=None, tokens_per_step=1.0)
    ],
    phase_shares={"forward": 1.0},
    bound_shares={"decode": 1.0},
)
log = WandbLog(JobConfig.from_flat({"stop": ("a",)}), "my run")
log.log(Report(num_finished=1, num_new_tokens=5, num_steps=3, num_draft_tokens=4,
               num_accepted_tokens=1, num_running_slots_sum=3, num_slots_sum=4))
log.finish(summary)
"""


@pytest.fixture
def clean_wandb(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))


def run_python(code, *arguments, cwd):
    paths = f"import sys; sys.path[:0] = {sys.path!r}\n"
    return subprocess.run(
        [sys.executable, "-c", paths + code, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.usefixtures("clean_wandb")
def test_an_offline_run_is_written(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = run_python(OFFLINE_RUN, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    series = ["stream_utilization", "acceptance_rate", "device_memory", "step", "completions"]
    for name in [*series, "tokens_per_second", "acceptance_by_generation", "pass@1", "accuracy"]:
        assert name.encode() in content


@pytest.mark.usefixtures("clean_wandb")
def test_without_a_login_the_way_out_is_told(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "from streaminator.config import JobConfig\n"
        "from streaminator.errors import ConfigError\n"
        "from streaminator.wandb_log import WandbLog\n"
        "try: WandbLog(JobConfig(), 'r')\n"
        "except ConfigError as error: print(error)\n"
    )
    result = run_python(code, cwd=tmp_path)
    assert "wandb login" in result.stdout, result.stderr
    assert "WANDB_MODE=offline" in result.stdout


def test_a_missing_wandb_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb is not installed; pip install"):
        WandbLog(JobConfig(), "r")


def test_a_leftover_folder_is_not_wandb(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()
    stdlib = [path for path in sys.path if "site-packages" not in path]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *stdlib])
    with pytest.raises(ConfigError, match="wandb is not installed"):
        WandbLog(JobConfig(), "r")


def test_wandb_is_imported_only_when_used(tmp_path):
    code = (
        "import sys, streaminator.wandb_log, streaminator.summary, streaminator.run_record\n"
        "assert 'wandb' not in sys.modules"
    )
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_reports_between_points_are_summed(monkeypatch):
    points = []
    log = WandbLog.__new__(WandbLog)
    log._sum = log._pending = Report()
    log._last_point = 0.0
    log._run = type("Run", (), {"log": lambda self, point: points.append(point)})()
    clock = iter([0.4, 0.8, 1.2, 1.2])
    monkeypatch.setattr("streaminator.wandb_log.time.monotonic", lambda: next(clock))
    for _ in range(3):
        log.log(Report(num_finished=1, num_new_tokens=6, num_steps=2))
    assert len(points) == 1
    assert points[0]["completions"] == 3
    assert points[0]["step"] == 6
    assert points[0]["tokens_per_second"] == pytest.approx(15)
    assert "acceptance_rate" not in points[0]
