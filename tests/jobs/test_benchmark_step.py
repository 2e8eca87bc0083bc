# SPDX-License-Identifier: Apache-2.0
"""The step benchmark: a line for each fast path that is left out, and settings that do not fit."""

import re

import pytest

from jobs import benchmark_step
from streaminator.errors import ConfigError

SMALL = ["--stream_width", "2", "--context", "20", "--num_steps", "3", "--device", "cpu"]


def test_each_variant_has_its_step_beside_the_time_of_reading(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert benchmark_step.main([*SMALL, "--num_drafts", "3"]) == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    reading = float(re.fullmatch(r"([\d.]+) ms to read weights, keys and values once", first)[1])
    assert reading > 0
    rows = {name: words for name, *words in (line.split(maxsplit=5) for line in lines)}
    assert list(rows) == ["all", "--no_compiled_kernels", "--no_packed_linear"]
    assert [words[-1] for words in rows.values()][1:] == ["nothing", "nothing"]
    for words in rows.values():
        step, times_reading, forward, forward_times = map(float, words[:4])
        assert step > forward > 0
        assert times_reading > forward_times > 0
        assert times_reading == pytest.approx(step / reading, rel=0.2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "0"], "--context 0: must be 1 or more"),
        (["--num_steps", "0"], "--num_steps 0: must be 1 or more"),
        (["--context", "1000000"], "--context 1000000: the model's is"),
    ],
)
def test_settings_that_do_not_fit_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark_step.main([*SMALL, *flags])
