# SPDX-License-Identifier: Apache-2.0
"""--profile: a trace of a worker's steps that a viewer can read, or a word why there is none."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from streaminator.config import DataConfig, EngineConfig, JobConfig, RunConfig, SamplingParams
from streaminator.data.prompts import load_prompts
from streaminator.engine.checkpoint import load_tokenizer
from streaminator.sequence import Prompt
from streaminator.session import Session
from streaminator.step_trace import NUM_STEPS

CONFIG = JobConfig(
    data=DataConfig(num_samples=1, num_completions=1),
    engine=EngineConfig(stream_width=1),
    sampling=SamplingParams(max_length=80, ignore_eos=True),
    run=RunConfig(profile=True),
)


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(CONFIG)


@pytest.fixture(scope="module")
def prompt() -> Prompt:
    [prompt] = load_prompts(CONFIG.data, load_tokenizer(CONFIG.model))
    return prompt


def run(session: Session, prompts: list[Prompt], folder: Path) -> tuple[tuple[str, str], ...]:
    session.open(str(folder), worker_id="worker-0", attempt=1, max_prompt_length=200)
    session.work(prompts, max_seconds=60)
    return session.close().events


def test_the_trace_holds_the_steps_it_promises(
    session: Session, prompt: Prompt, tmp_path: Path
) -> None:
    prompts = [replace(prompt, prompt_id=f"p{n}", sample_indices=(0,)) for n in range(4)]
    assert run(session, prompts, tmp_path) == ()
    [trace] = (tmp_path / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    embeddings = [event for event in events if event.get("name") == "aten::embedding"]
    assert len(embeddings) == NUM_STEPS  # one a forward


def test_a_run_too_short_for_a_trace_says_so(
    session: Session, prompt: Prompt, tmp_path: Path
) -> None:
    [(kind, why)] = run(session, [], tmp_path)
    assert kind == "not profiled"
    assert "begins with step 10, this worker had 0" in why
    assert not (tmp_path / "profile").exists()
