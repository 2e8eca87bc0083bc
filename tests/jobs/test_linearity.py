# SPDX-License-Identifier: Apache-2.0
"""Few and many prompts in turn, each in a process of its own."""

import json

import pytest

from jobs.linearity import main
from streaminator.errors import ConfigError

SMALL = ["--few", "4", "--many", "8", "--num_completions", "2", "--stream_width", "2"]


def test_each_size_has_its_rate_and_its_memory(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert main([*SMALL, "--max_length", "24", "--json_out", str(path)]) == 0
    result = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert {num: len(done) for num, done in result["runs"].items()} == {"4": 1, "8": 1}
    for (run,) in result["runs"].values():
        assert run["tokens_per_second"] > 0
        assert 100 < run["peak_mb"] < 10_000
    (ratio,) = result["many_to_few"]["values"]
    few, many = (run["tokens_per_second"] for (run,) in result["runs"].values())
    assert ratio == pytest.approx(many / few)
    assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--few", "0"], "--few 0"),
        (["--few", "200", "--many", "200"], "--many 200"),
        (["--few", "8", "--stream_width", "16"], "--few 8"),
        (["--json_out", "no/such/folder.json"], "--json_out"),
    ],
)
def test_settings_that_measure_nothing_are_refused(flags, named):
    with pytest.raises(ConfigError, match=named):
        main(flags)
