# SPDX-License-Identifier: Apache-2.0
"""The simulation: everything comes once, also when workers are lost, and the figures are there."""

import json
import subprocess
import sys

import pytest

from jobs.simulate import main
from streaminator.errors import InputError

SMALL = ["--num_workers", "8", "--num_prompts", "200", "--num_completions", "3"]


def test_everything_is_drawn_once_and_lost_workers_lose_nothing(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert main([*SMALL, "--stream_width", "4", "--lose", "0.25", "--json_out", str(path)]) == 0
    result = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["num_completions"] == 600
    assert result["num_retried"] == result["num_events"] == 0
    for name in ("idle_before_tail", "idle_overall", "slots_empty_before_tail"):
        assert 0 <= result[name] < 1
    for name in ("seconds", "tail_seconds", "driver_seconds_per_1000_prompts", "driver_peak_mb"):
        assert result[name] > 0
    lossy = result["with_losses"]
    assert (lossy["num_completions"], lossy["num_events"]) == (600, 2)
    assert lossy["num_retried"] > 0


def test_lengths_come_from_a_run(tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "completions").mkdir()
    pq.write_table(
        pa.table({"num_completion_tokens": [40] * 5}), tmp_path / "completions" / "part-0.parquet"
    )
    run = ["--lengths_from", str(tmp_path), "--tokens_per_step", "1", "--step_costs", "1:1"]
    assert main([*SMALL, *run]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    # 16 slots take 25 prompts a worker in two rounds; most have to wait for a free slot.
    assert 3 * 40 < result["seconds"] < 4 * 3 * 40


def test_a_driver_loads_no_engine_no_numba_and_no_pandas():
    code = (
        "import sys, jobs.simulate as simulate; simulate._load_what_a_driver_loads();"
        "assert 'actors.pool' in sys.modules; assert 'streaminator.driver' in sys.modules;"
        "engine = {'streaminator.session', 'streaminator.engine.engine', 'numba', 'pandas'};"
        "assert not engine & set(sys.modules), engine & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_workers", "0"],
        ["--lose", "1"],
        ["--step_costs", "a:b"],
        ["--lengths_from", "/nowhere"],
        ["--json_out", "no/such/folder/x.json"],
        ["--json_out", "/dev/null/x.json"],
    ],
)
def test_bad_input_names_the_flag(flags):
    with pytest.raises(InputError, match=flags[0]):
        main(flags)
