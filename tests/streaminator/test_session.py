# SPDX-License-Identifier: Apache-2.0
"""One worker without Ray: staging, giving prompts back, running out of memory, failing storage."""

from dataclasses import replace

import duckdb
import pytest
import torch

import streaminator.session as session_module
from streaminator.config import DataConfig, EngineConfig, JobConfig, ModelConfig, SamplingParams
from streaminator.data import parquet
from streaminator.data.files import publish, resolve
from streaminator.data.prompts import load_prompts
from streaminator.engine.checkpoint import load_tokenizer
from streaminator.errors import DeviceError, OutputError
from streaminator.pool import WorkResult
from streaminator.session import Session

CONFIG = JobConfig(
    model=ModelConfig(device="cpu", dtype="float32"),
    sampling=SamplingParams(max_length=16),
    data=DataConfig(num_samples=4, num_completions=3),
    engine=EngineConfig(stream_width=4),
)


@pytest.fixture(scope="module")
def loaded() -> Session:
    return Session(CONFIG)


@pytest.fixture(params=["in turn", "overlapping"])
def session(loaded, tmp_path, request) -> Session:
    if request.param == "overlapping":
        request.getfixturevalue("overlapping")
    loaded.open(str(tmp_path), worker_id="worker-0", attempt=1, max_prompt_length=200)
    return loaded


@pytest.fixture(scope="module")
def prompts():
    return list(load_prompts(CONFIG.data, load_tokenizer(CONFIG.model)))


def publish_all(run, *results: WorkResult) -> dict[tuple[str, int], str]:
    filesystem, path = resolve(str(run))
    (run / "completions").mkdir(exist_ok=True)
    for part in (part for result in results for part in result.parts):
        publish(filesystem, f"{path}/{part.path}", f"{path}/completions/{part.path[-20:]}")
    files = f"{run}/completions/*.parquet"
    rows = duckdb.sql(f"SELECT prompt_id, sample_index, text FROM '{files}'").fetchall()
    assert len({row[:2] for row in rows}) == len(rows)
    return {row[:2]: row[2] for row in rows}


def draw_all(session, prompts) -> list[WorkResult]:
    results = [session.work(prompts, max_seconds=60)]
    while results[-1].num_open_prompts:
        results.append(session.work([], max_seconds=60))
    return results


@pytest.fixture(scope="module")
def undisturbed(loaded, prompts, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    loaded.open(str(run), worker_id="worker-0", attempt=1, max_prompt_length=200)
    return publish_all(run, *draw_all(loaded, prompts))


def test_nothing_is_visible_until_it_is_published(session, prompts, tmp_path, undisturbed):
    results = draw_all(session, prompts)
    assert not list(tmp_path.glob("completions/*"))
    assert not list(tmp_path.glob("*/*.parquet"))
    keys = [key for result in results for part in result.parts for key in part.keys]
    assert sorted(keys) == sorted(undisturbed)
    assert publish_all(tmp_path, *results) == undisturbed


def test_a_prompt_moves_between_two_completions_with_what_it_has_drawn(
    session, prompts, tmp_path, undisturbed
):
    results = [session.work(prompts, max_seconds=0)]  # one step: all four are in flight
    released: list[str] = []
    while len(released) < 4:
        results.append(session.work([], num_to_release=4 - len(released), max_seconds=60))
        released += results[-1].released
        assert results[-1].released, "it came back for nothing"
    assert results[-1].num_open_prompts == 0
    drawn = {key for result in results for part in result.parts for key in part.keys}
    done = publish_all(tmp_path, *results)
    assert set(done) == drawn
    assert 0 < len(done) < 12
    names = tuple(part.path[-20:] for result in results for part in result.parts)
    rest = []
    for prompt in prompts:
        left = tuple(i for i in prompt.sample_indices if (prompt.prompt_id, i) not in drawn)
        rest.append(replace(prompt, sample_indices=left, finished_parts=names))
    with_tokens = session._with_finished(rest)
    assert sum(len(prompt.finished) for prompt in with_tokens) == len(drawn)
    assert publish_all(tmp_path, *draw_all(session, rest)) == undisturbed


def run_out_of_memory(session, monkeypatch, *, times: int) -> None:
    forward, left = session.engine.runner.forward, [times]

    def fail(batch, cache):
        if batch.num_tokens and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(batch, cache)

    monkeypatch.setattr(session.engine.runner, "forward", fail)


def test_out_of_memory_halves_the_stream_and_changes_no_token(
    session, prompts, tmp_path, undisturbed, monkeypatch
):
    session.work(prompts, max_seconds=0)
    run_out_of_memory(session, monkeypatch, times=1)
    results = draw_all(session, [])
    assert session.engine.scheduler.stream_width == 2
    events = [event for result in results for event in result.events]
    assert [kind for kind, _ in events] == ["out of memory"]
    assert "stream width 4 -> 2" in events[0][1]
    assert publish_all(tmp_path, *results) == undisturbed


def test_out_of_memory_with_one_completion_in_flight_says_what_to_lower(
    session, prompts, monkeypatch
):
    run_out_of_memory(session, monkeypatch, times=9)
    with pytest.raises(DeviceError, match="--max_length"):
        session.work(prompts, max_seconds=60)
    assert session.engine.scheduler.stream_width == 1


def storage_that_fails(monkeypatch, seconds_of_patience: float, times: int) -> None:
    real, left = parquet.write_whole, [times]

    def fail(filesystem, path, data):
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        real(filesystem, path, data)

    monkeypatch.setattr(parquet, "write_whole", fail)
    monkeypatch.setattr(session_module, "STORAGE_SECONDS", seconds_of_patience)


def test_storage_that_recovers_loses_nothing_and_is_recorded(
    loaded, prompts, tmp_path, undisturbed, monkeypatch
):
    storage_that_fails(monkeypatch, 60.0, times=2)
    loaded.open(str(tmp_path), worker_id="worker-0", attempt=1, max_prompt_length=200)
    results = draw_all(loaded, prompts)
    assert [kind for result in results for kind, _ in result.events] == ["storage failed"]
    assert publish_all(tmp_path, *results) == undisturbed


def test_storage_that_stays_broken_ends_the_run_with_one_line(
    loaded, prompts, tmp_path, monkeypatch
):
    storage_that_fails(monkeypatch, 0.1, times=99)
    loaded.open(str(tmp_path), worker_id="worker-0", attempt=1, max_prompt_length=200)
    with pytest.raises(OutputError, match="No space left on device; mend that") as error:
        draw_all(loaded, prompts)
    assert "\n" not in str(error.value)
    loaded._completions._rows.clear()
