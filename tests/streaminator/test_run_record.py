# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest

from streaminator.config import JobConfig
from streaminator.data.parquet import STEPS, PartWriter
from streaminator.errors import ConfigError, OutputError, RunMismatchError
from streaminator.progress import Opened
from streaminator.run_record import default_run_id, open_run, record_workers, resolve_run_id


def config(**values):
    return JobConfig.from_flat(values)


def start(output, run_id="r", *, fingerprint="f", gpus=(), **values):
    return open_run(
        str(output), run_id, config(**values), fingerprints={"model": fingerprint}, gpus=gpus
    )


def test_the_same_command_gets_the_same_run_id():
    assert default_run_id(config(seed=3)) == default_run_id(config(seed=3))


def test_the_run_id_depends_on_what_changes_tokens_only():
    plain = default_run_id(config())
    speed = config(stream_width=3, spec_decoding=False, num_workers=2, output="elsewhere")
    assert default_run_id(speed) == plain
    ids = {plain, *(default_run_id(config(**{name: 5})) for name in ("seed", "top_k"))}
    assert len(ids | {default_run_id(config(metadata_columns=("level",)))}) == 4


def test_the_run_id_is_readable():
    run_id = default_run_id(
        config(model_name="meta-llama/Llama-3.2-3B-Instruct", dataset="data/My set.jsonl")
    )
    assert run_id.startswith("llama-3.2-3b-instruct-my-set-")
    assert len(run_id.rsplit("-", 1)[1]) == 8


def test_a_run_id_that_was_asked_for_is_taken():
    assert resolve_run_id(config(run_id="mine")) == "mine"
    assert resolve_run_id(config()) == default_run_id(config())


def test_a_new_run_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["streaminator", "sample", "--seed", "5"])
    run = start(tmp_path, "r", fingerprint="abc", gpus=["H100"], seed=5, stream_width=3)
    assert (run.attempt, run.path) == (1, str(tmp_path / "r"))
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["settings"] == config(seed=5, stream_width=3).flat()
    assert record["fingerprints"] == {"model": "abc"}
    assert record["command"] == ["streaminator", "sample", "--seed", "5"]
    assert {"streaminator", "python", "torch"} <= set(record["versions"])
    assert record["hardware"]["gpus"] == ["H100"]
    assert record["hardware"]["num_cores"] >= 1
    assert record["hardware"]["memory_bytes"] > 0
    assert record["started_at"].endswith("+00:00")
    assert [a["attempt"] for a in record["attempts"]] == [1]
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["run.json"]


def test_what_an_attempts_workers_are_like_is_recorded(tmp_path):
    start(tmp_path)
    run = start(tmp_path)
    record_workers(run, {1: Opened(stream_width=8), 0: Opened(stream_width=64, layers="fused")})
    first, second = json.loads((tmp_path / "r" / "run.json").read_text())["attempts"]
    assert "workers" not in first
    assert [worker["stream_width"] for worker in second["workers"].values()] == [64, 8]
    assert second["workers"]["worker-0"]["layers"] == "fused"
    assert start(tmp_path).attempt == 3


def test_speed_settings_may_differ_when_a_run_is_resumed(tmp_path):
    start(tmp_path, stream_width=3)
    run = start(tmp_path, stream_width=7, num_workers=0, spec_decoding=False, logprobs=True)
    assert run.attempt == 2
    attempts = json.loads((tmp_path / "r" / "run.json").read_text())["attempts"]
    assert [a["settings"]["stream_width"] for a in attempts] == [3, 7]
    assert "seed" not in attempts[1]["settings"]


def test_a_mismatch_lists_every_difference_on_one_line(tmp_path):
    start(tmp_path, seed=1, stop=("END",))
    before = (tmp_path / "r" / "run.json").read_bytes()
    with pytest.raises(RunMismatchError) as error:
        start(tmp_path, fingerprint="g", seed=2, stop=("END",), temperature=0.5, grader="none")
    message = str(error.value)
    assert "seed: recorded 1, now 2" in message
    assert "temperature: recorded 0.8, now 0.5" in message
    assert "fingerprint of the model: recorded f, now g" in message
    assert "grader: recorded None, now none" in message
    assert "stop" not in message
    assert "--run_id" in message
    assert "\n" not in message
    assert (tmp_path / "r" / "run.json").read_bytes() == before


def test_a_setting_younger_than_the_record_counts_as_its_default(tmp_path):
    start(tmp_path)
    path = tmp_path / "r" / "run.json"
    record = json.loads(path.read_text())
    del record["settings"]["min_p"]
    path.write_text(json.dumps(record))
    assert start(tmp_path).attempt == 2
    with pytest.raises(RunMismatchError, match=r"min_p: recorded 0\.0, now 0\.5"):
        start(tmp_path, min_p=0.5)


def test_results_without_a_record_are_not_touched(tmp_path):
    with PartWriter(
        str(tmp_path / "r" / "completions"), STEPS, writer_id="a", max_rows=1, max_seconds=1
    ) as writer:
        writer.write({"step": 1})
    with pytest.raises(RunMismatchError, match=r"no run.json.*--run_id"):
        start(tmp_path)
    assert not (tmp_path / "r" / "run.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": "r"}', "\x00\xff"])
def test_an_unreadable_record_is_named(tmp_path, content):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(content)
    with pytest.raises(OutputError, match=r"run.json: cannot be read") as error:
        start(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["settings", "fingerprints", "attempts", "started_at"])
def test_a_record_of_other_types_is_named(tmp_path, name):
    start(tmp_path)
    file = tmp_path / "r" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: 7}))
    with pytest.raises(OutputError, match=rf"run.json: cannot be read \({name} is a int\)"):
        start(tmp_path)


def test_other_blocks_are_another_run(tmp_path):
    """Only one size lets a CPU's layers be fused, which changes the last bits of their logits."""
    start(tmp_path)
    with pytest.raises(RunMismatchError, match="block_size: recorded 16, now 32"):
        start(tmp_path, block_size=32)


def test_an_output_that_cannot_be_written_is_a_wrong_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output"):
        start(tmp_path / "file")


def test_a_uri_keeps_its_form_for_other_processes(tmp_path):
    run = start(f"file://{tmp_path}")
    assert run.uri == f"file://{tmp_path}/r"
    assert (tmp_path / "r" / "run.json").exists()


def test_recording_imports_neither_ray_nor_torch(tmp_path):
    code = (
        "import sys; from streaminator.config import JobConfig\n"
        "from streaminator.run_record import open_run\n"
        "open_run(sys.argv[1], 'r', JobConfig(), fingerprints={'model': 'f'})\n"
        "assert not {'ray', 'torch', 'wandb', 'duckdb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_run_from_before_a_fingerprint_was_recorded_is_resumed(tmp_path):
    start(tmp_path)
    both = {"model": "f", "tokenizer": "t"}
    assert open_run(str(tmp_path), "r", config(), fingerprints=both).attempt == 2
    with pytest.raises(RunMismatchError, match="fingerprint of the model"):
        open_run(str(tmp_path), "r", config(), fingerprints=both | {"model": "g"})
