# SPDX-License-Identifier: Apache-2.0
import json
import subprocess

import pyarrow as pa
import pytest
from pyarrow import fs as pafs

from streaminator.config import JobConfig
from streaminator.data.parquet import COMPLETIONS, STEPS, PartWriter
from streaminator.errors import OutputError
from streaminator.run_record import open_run
from streaminator.summary import PHASES, summarise
from streaminator.summary_table import render

START = 1_700_000_000.0


def microseconds(seconds):
    return pa.scalar(round((START + seconds) * 1e6), pa.timestamp("us", tz="UTC")).as_py()


def completion(prompt_id, sample_index, **changes):
    row = {
        "prompt_id": prompt_id,
        "sample_index": sample_index,
        "finish_reason": "stop",
        "num_completion_tokens": 30,
        "num_steps": 20,
        "num_draft_tokens": 40,
        "num_accepted_tokens": 10 * (sample_index + 1),
        "answer": "1",
        "gold_answer": "1",
        "is_correct": True,
        "attempt": 1,
        "started_at": microseconds(0),
        "finished_at": microseconds(9),
    }
    return row | changes


def step(index, num_running, **changes):
    row = {"worker_id": "w", "attempt_id": 1, "step": index, "num_running": num_running}
    row |= {f"seconds_{phase}": 0.0 for phase in PHASES}
    row |= {"time": microseconds(index), "seconds_forward": 0.75, "seconds_draft": 0.25}
    return row | changes


def write(folder, schema, rows):
    writer_id = f"w{len(list(folder.glob('*')))}"
    with PartWriter(str(folder), schema, writer_id=writer_id, max_rows=3, max_seconds=99) as writer:
        for row in rows:
            writer.write(row)


def start(output, **values):
    config = JobConfig.from_flat({"stream_width": 4} | values)
    return open_run(str(output), "r", config, fingerprints={"model": "f"})


@pytest.fixture
def run(tmp_path):
    start(tmp_path)
    wrong = {"is_correct": False, "answer": "2"}
    failed = {"finish_reason": "failed", "is_correct": None, "num_completion_tokens": 0}
    failed |= {"num_steps": 0, "num_draft_tokens": 0, "num_accepted_tokens": 0}
    rows = [completion("a", i) for i in range(4)]
    rows += [completion("b", i, **(wrong if i else {})) for i in range(4)]
    rows += [completion("c", 0, is_correct=None, answer=None)]
    rows += [completion("d", i, error=f"reason {min(i, 4)}", **failed) for i in range(6)]
    write(tmp_path / "r" / "completions", COMPLETIONS, rows)
    write(tmp_path / "r" / "steps", STEPS, [step(i, i) for i in range(1, 5)])
    return tmp_path / "r"


def test_counts_and_failures(run):
    summary = summarise(run)
    assert (summary.num_prompts, summary.num_completions, summary.num_failed) == (4, 15, 6)
    assert summary.failures == {"reason 4": 2, "reason 0": 1, "reason 1": 1}
    assert summary.num_tokens == 9 * 30
    assert summary.wall_seconds == pytest.approx(9)
    assert summary.tokens_per_second == pytest.approx(30)


def test_what_was_not_graded_counts_in_no_accuracy(run):
    summary = summarise(run)
    assert summary.num_graded == 8
    assert summary.accuracy == pytest.approx(5 / 8)
    assert list(summary.pass_at_k) == list(summary.majority_at_k) == [1, 2, 4]
    assert summary.pass_at_k[1] == pytest.approx(5 / 8)
    assert summary.pass_at_k[2] == pytest.approx((1 + 0.5) / 2)
    assert summary.pass_at_k[4] == pytest.approx(1)
    assert summary.majority_at_k[4] == pytest.approx(0.5)


def test_completions_not_drawn_count_in_the_majority_only(tmp_path):
    start(tmp_path)
    wrong = {"is_correct": False, "answer": "2"}
    nothing = {"finish_reason": "settled", "is_correct": None, "answer": None}
    nothing |= {"num_steps": 0, "num_draft_tokens": 0, "num_accepted_tokens": 0}
    nothing |= {"num_completion_tokens": 0}
    rows = [completion("easy", i, **(nothing if i >= 2 else {})) for i in range(8)]
    rows += [completion("hard", i, **(wrong if i else {})) for i in range(8)]
    rows += [completion("even", i, **(nothing if i >= 6 else wrong)) for i in range(8)]
    write(tmp_path / "r" / "completions", COMPLETIONS, rows)
    summary = summarise(tmp_path / "r")
    assert (summary.num_settled, summary.num_settled_prompts) == (8, 2)
    assert summary.num_tokens_saved == 8 * 30
    assert summary.num_graded == 6
    assert summary.accuracy == pytest.approx(3 / 6)
    assert summary.pass_at_k == pytest.approx({1: (1 + 0.5 + 0) / 3, 2: 2 / 3})
    assert summary.majority_at_k == pytest.approx({1: 2 / 3, 2: 2 / 3, 4: 1 / 3, 8: 1 / 3})
    assert [g.num_completions for g in summary.generations] == [3, 3, 2, 2, 2, 2, 1, 1]
    assert "pass@8              -, majority@8 33.3%" in render(summary)


def test_acceptance_overall_and_by_generation(run):
    summary = summarise(run)
    assert summary.acceptance_rate == pytest.approx(210 / 360)
    assert summary.tokens_per_step == pytest.approx(1.5)
    rates = [g.acceptance_rate for g in summary.generations]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == [None, None]
    assert [g.num_completions for g in summary.generations] == [4, 3, 3, 3, 1, 1]


def test_the_stream_and_its_phases(run):
    summary = summarise(run)
    assert summary.stream_utilization == pytest.approx((1 + 2 + 3 + 4) / 4 / 4)
    assert list(summary.phase_shares) == list(PHASES)
    assert summary.phase_shares["forward"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("changes", "bottleneck", "share"),
    [
        ({}, "decode", 0.75),
        ({"num_running": 1}, "tail", 0.75 * 0.75),
        ({"num_prefill_tokens": 24}, "prefill", 0.75 * 0.75),
        ({"seconds_forward": 0.25, "seconds_sample": 0.5}, "overhead", 0.75),
    ],
)
def test_the_bottleneck_is_named_with_its_share(tmp_path, changes, bottleneck, share):
    start(tmp_path)
    tokens = {"num_prefill_tokens": 0, "num_decode_tokens": 4, "num_draft_tokens": 4}
    rows = [step(i, **({"num_running": 4} | tokens | changes)) for i in range(3)]
    write(tmp_path / "r" / "steps", STEPS, rows)
    summary = summarise(tmp_path / "r")
    assert sum(summary.bound_shares.values()) == pytest.approx(1)
    assert max(summary.bound_shares, key=summary.bound_shares.get) == bottleneck
    assert summary.bound_shares[bottleneck] == pytest.approx(share)
    assert f"{bottleneck}, {share:.0%} of the step time" in render(summary)


def test_the_chances_given_to_drafts_are_compared_with_what_came(tmp_path):
    start(tmp_path)
    some = {"num_draft_by_survival": [0] * 7 + [4, 0, 10]}
    some |= {"num_accepted_by_survival": [0] * 7 + [3, 0, 9]}
    none = {"num_draft_by_survival": [], "num_accepted_by_survival": []}
    write(tmp_path / "r" / "steps", STEPS, [step(1, 4, **some), step(2, 4, **none), step(3, 4)])
    write(tmp_path / "r" / "steps", STEPS, [step(4, 4, **some)])
    summary = summarise(tmp_path / "r")
    rows = [(c.from_chance, c.num_drafted, c.num_accepted) for c in summary.calibration]
    assert rows == [(0.7, 8, 6), (0.9, 20, 18)]
    assert "75% of 8 given 70% to 80%" in render(summary)


def test_attempts_have_their_own_width_and_the_time_between_them_does_not_count(tmp_path):
    start(tmp_path, stream_width=4)
    start(tmp_path, stream_width=8)
    rows = [step(1, 4), step(2, 4)]
    rows += [step(i, 4, attempt_id=2, time=microseconds(1000 + i)) for i in (1, 2)]
    write(tmp_path / "r" / "steps", STEPS, rows)
    summary = summarise(tmp_path / "r")
    assert summary.stream_utilization == pytest.approx(0.75)
    assert summary.wall_seconds == pytest.approx(4)


def test_steps_tell_their_streams_widths_and_earlier_versions_did_not(tmp_path):
    start(tmp_path, stream_width=4)
    start(tmp_path, stream_width=None)
    names = [name for name in STEPS.names if name != "stream_width"]
    old = pa.schema([STEPS.field(name) for name in names])
    write(tmp_path / "r" / "steps", old, [step(1, 2)])
    summary = summarise(tmp_path / "r")
    assert (summary.stream_widths, summary.stream_utilization) == ([4], 0.5)
    assert "stream width        4\n" in render(summary)
    new = [step(1, 32, attempt_id=2, stream_width=32), step(2, 4, attempt_id=2, stream_width=16)]
    write(tmp_path / "r" / "steps", STEPS, new)
    summary = summarise(tmp_path / "r")
    assert summary.stream_widths == [4, 16, 32]
    assert summary.stream_utilization == pytest.approx(1.75 / 3)
    assert "stream width        4 to 32\n" in render(summary)


def test_an_empty_run_has_a_summary(tmp_path):
    start(tmp_path)
    summary = summarise(tmp_path / "r")
    assert (summary.num_completions, summary.num_tokens, summary.wall_seconds) == (0, 0, 0)
    assert summary.acceptance_rate is None
    assert summary.pass_at_k == {}
    assert summary.generations == []
    assert "completions" in render(summary)
    json.dumps(summary.to_dict(), allow_nan=False)


def test_a_run_without_drafts_has_no_acceptance_rate(tmp_path):
    start(tmp_path)
    rows = [completion("a", 0, num_draft_tokens=0, num_accepted_tokens=0)]
    write(tmp_path / "r" / "completions", COMPLETIONS, rows)
    summary = summarise(tmp_path / "r")
    assert summary.acceptance_rate is None
    assert summary.generations[0].acceptance_rate is None


def test_no_run_and_a_damaged_part_are_named(tmp_path, run):
    with pytest.raises(OutputError, match="no run here"):
        summarise(tmp_path / "nothing")
    (run / "completions" / "part-bad-000001.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(OutputError, match="part-bad") as error:
        summarise(run)
    assert "\n" not in str(error.value)


def test_the_closing_table_tells_everything_once(run):
    text = render(summarise(run))
    for line in ("pass@4", "majority@4", "generation 4", "stream utilization", "forward 75.0%"):
        assert text.count(line) == 1
    assert "6" in text
    assert "2 x reason 4" in text
    assert str(run / "completions") in text


def test_the_query_can_be_pasted(run):
    query = summarise(run).query
    result = subprocess.run(query, shell=True, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "0.25" in result.stdout


def test_without_drafts_the_query_has_no_rate(tmp_path):
    start(tmp_path)
    write(
        tmp_path / "r" / "completions",
        COMPLETIONS,
        [completion("a", 0, num_draft_tokens=0, num_accepted_tokens=0)],
    )
    query = summarise(tmp_path / "r").query
    result = subprocess.run(query, shell=True, capture_output=True, text=True, timeout=60)
    assert "NULL" in result.stdout
    assert "nan" not in result.stdout


@pytest.mark.parametrize("name", ["it's", "a*[b]", "$HOME", "k=v", "why?"])
def test_unusual_folder_names_work(tmp_path, name):
    folder = tmp_path / name
    start(folder)
    write(folder / "r" / "completions", COMPLETIONS, [completion("a", 0)])
    summary = summarise(folder / "r")
    assert summary.num_completions == 1
    result = subprocess.run(summary.query, shell=True, capture_output=True, text=True, timeout=60)
    assert "acceptance" in result.stdout, result.stderr


def test_other_file_systems_give_the_same_summary(run, monkeypatch):
    expected = summarise(run).to_dict()
    remote = pafs.SubTreeFileSystem(str(run.parent), pafs.LocalFileSystem())
    monkeypatch.setattr("streaminator.summary.resolve", lambda uri: (remote, "r"))
    actual = summarise("mock://bucket/r").to_dict()
    assert actual["path"] == "mock://bucket/r"
    for name in ("path", "query"):
        del actual[name], expected[name]
    assert actual == expected


def test_a_summary_is_json(run):
    content = json.loads(json.dumps(summarise(run).to_dict(), allow_nan=False))
    assert content["pass_at_k"]["4"] == 1.0
    assert content["generations"][0]["acceptance_rate"] == 0.25


def test_a_damaged_part_of_the_steps_is_named_with_what_to_do(run):
    (part, *_) = sorted((run / "steps").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(OutputError, match="delete it and run the same command again") as raised:
        summarise(run)
    assert str(part) in str(raised.value)
