# SPDX-License-Identifier: Apache-2.0
"""Settings given in Python, which no parser has looked at."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from streaminator.config import (
    ClusterConfig,
    DataConfig,
    EngineConfig,
    JobConfig,
    ModelConfig,
    RunConfig,
    SamplingParams,
    SpeculatorConfig,
)
from streaminator.errors import ConfigError
from streaminator.run_record import default_run_id


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingParams(stop="pens"), "--stop 'pens': must be a list, of text each"),
        (lambda: SamplingParams(stop=("a", 3)), "--stop 3: must be text"),
        (lambda: SamplingParams(stop_token_ids=5), "--stop_token_ids 5: must be a list"),
        (lambda: SamplingParams(stop_token_ids=(5, "6")), "--stop_token_ids '6': must be a whole"),
        (lambda: RunConfig(run_id=7), "--run_id 7: must be text"),
        (lambda: SamplingParams(top_k="3"), "--top_k '3': must be a whole number"),
        (lambda: SamplingParams(seed=True), "--seed True: must be a whole number"),
        (lambda: SamplingParams(max_length=24.5), "--max_length 24.5: must be a whole number"),
        (lambda: SamplingParams(temperature="1"), "--temperature '1': must be a number"),
        (lambda: SamplingParams(ignore_eos=1), "--ignore_eos 1: must be True or False"),
        (lambda: ModelConfig(dtype="fp8"), "--dtype 'fp8': must be auto or float32 or"),
        (lambda: ModelConfig(model_name=None), "--model_name None: must be text"),
        (lambda: SpeculatorConfig(speculator="medusa"), "--speculator 'medusa': must be ngram or"),
        (lambda: DataConfig(num_completions=2.0), r"--num_completions 2\.0: must be a whole"),
        (lambda: EngineConfig(stream_width="auto"), "--stream_width 'auto': must be a whole"),
        (lambda: ClusterConfig(worker_timeout=None), "--worker_timeout None: must be a number"),
    ],
)
def test_a_value_of_another_kind_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_means_the_same_is_taken() -> None:
    params = SamplingParams(stop=["a", "b"], max_length=np.int64(4), temperature=1)
    assert params.stop == ("a", "b")
    same = SamplingParams(stop=("a", "b"), max_length=4, temperature=1.0)
    assert params == same
    # The same run, which can be recorded.
    ids = [default_run_id(JobConfig(sampling=sampling)) for sampling in (params, same)]
    assert ids[0] == ids[1]
    assert SamplingParams(stop_token_ids=np.array([1, 2])).stop_token_ids == (1, 2)
    assert EngineConfig(stream_width=None).stream_width is None
