# SPDX-License-Identifier: Apache-2.0
"""`streaminator replay` on logged completions, as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streaminator.cli import main
from streaminator.speculative.replay import LoggedPrompt, match_drafted, replay
from streaminator.speculative.replay_speculators import SPECULATORS
from tests.fakes import TOKENIZER

DEMO = ["--tokenizer_name", "demo"]
QUICK = ["--speculators", "memory,bigram", "--num_speculative_tokens", "1,4"]
TEXT = "Tom has 3 apples. He buys 4 more apples. 3 + 4 = 7 apples."


@pytest.fixture
def run(capsys, monkeypatch):
    """Exit code, stdout and stderr of `streaminator` with the given words."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["streaminator", *map(str, words)])
        capsys.readouterr()
        code = main()
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def real_run(tmp_path_factory) -> Path:
    """A small run of the bundled model."""
    output = tmp_path_factory.mktemp("run")
    flags = ["--num_samples", "4", "--num_completions", "3", "--max_length", "48"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["streaminator", "sample", *flags, "--output", str(output)])
        assert main() == 0
    (folder,) = output.iterdir()
    return folder


def texts(num_prompts: int = 3, num_completions: int = 4) -> list[dict]:
    return [
        {"prompt_id": i, "question": f"How many {i}?", "completions": [TEXT] * num_completions}
        for i in range(num_prompts)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(out: str, title: str) -> dict[tuple[str, int], list[float]]:
    """{(speculator, k): numbers} of the printed table whose title begins so."""
    lines = out[out.index(title) :].splitlines()
    start = next(n for n, line in enumerate(lines) if "──" in line) + 1
    rows = {}
    for line in lines[start:]:
        if not line.strip():
            break
        name, rest = line.strip().split("  ", 1)
        k, *numbers = rest.split()
        rows[name, int(k)] = [float(n) if n != "-" else 0.0 for n in numbers]
    return rows


def test_repeated_completions_are_accepted_more_from_one_to_the_next(tmp_path, run):
    code, out, _ = run("replay", write(tmp_path / "log.jsonl", texts()), *DEMO, *QUICK)
    assert code == 0
    rates = table(out, "First drafted token right")["memory", 1]
    assert len(rates) == 4
    assert rates[0] < rates[1]
    assert rates[-1] > 0.8
    assert "3 prompts, 12 completions" in out


def test_a_run_is_replayed_with_its_own_tokenizer_and_its_own_token_ids(real_run, run):
    code, out, err = run("replay", real_run, *QUICK)
    assert (code, err) == (0, "")
    num = duckdb.sql(f"""SELECT sum(len(token_ids)) FROM '{real_run}/completions/*.parquet'
        """).fetchall()[0][0]
    assert f"4 prompts, 12 completions, {num:,} tokens" in out
    tokens_per_step = {key: row[2] for key, row in table(out, "Speculators").items()}
    assert tokens_per_step["memory", 4] > tokens_per_step["bigram", 4] > 1


def test_the_same_log_in_other_shapes_gives_the_same_table(tmp_path, run):
    words = np.random.default_rng(0).choice(TEXT.split(), (3, 4, 12))
    drawn = [[" ".join(words) for words in completions] for completions in words]
    long = [
        {"sample_index": index, "q": f"How many {prompt}?", "said": drawn[prompt][index]}
        for index in (1, 3, 0, 2)
        for prompt in range(3)
    ]
    lists = [{"id": i, "problem": f"How many {i}?", "responses": drawn[i]} for i in range(3)]
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "streaminator" / "demo")
    ids = [
        {
            "prompt_token_ids": encode(row["problem"])["input_ids"],
            "token_ids": encode(row["responses"], add_special_tokens=False)["input_ids"],
        }
        for row in lists
    ]
    pq.write_table(pa.Table.from_pylist(long), tmp_path / "long.parquet")
    pq.write_table(pa.Table.from_pylist(ids), tmp_path / "ids.parquet")
    map_columns = ["--prompt-column", "q", "--completions_column", "said"]
    tables = []
    for words in (
        [write(tmp_path / "lists.jsonl", lists), *DEMO],
        [tmp_path / "long.parquet", *DEMO, *map_columns],
        [tmp_path / "ids.parquet", *DEMO],
        [tmp_path / "ids.parquet"],
    ):
        code, out, err = run("replay", *words, *QUICK)
        assert (code, err) == (0, "")
        tables.append(out[out.index("First drafted") :])
    # Without the tokenizer the memory does not know numbers.
    assert tables[0] == tables[1] == tables[2] != tables[3]


def test_a_warm_start_helps_the_first_generation_most(tmp_path, real_run, run):
    code, out, _ = run("replay", real_run, *QUICK)
    warm_code, warm_out, err = run("replay", real_run, *QUICK, "--warm_start", real_run)
    assert code == warm_code == 0
    assert "4 of 4 prompts start warm" in err
    for name in ("memory", "bigram"):
        cold, warm = (table(o, "First drafted")[name, 1] for o in (out, warm_out))
        assert warm[0] > cold[0] + 0.2
    log = write(tmp_path / "log.jsonl", texts(num_completions=1))
    earlier = [{"question": row["question"], "text": TEXT} for row in texts(2)]
    flags = [*DEMO, *QUICK, "--warm_start", write(tmp_path / "earlier.jsonl", earlier)]
    _, cold, _ = run("replay", log, *flags[:-2])
    _, warm, err = run("replay", log, *flags)
    assert "2 of 3 prompts start warm" in err  # matched by their text
    for name in ("memory", "bigram"):
        one, other = (table(out, "First drafted")[name, 1] for out in (cold, warm))
        assert other[0] > one[0] + 0.2


def test_the_regimes_learn_from_what_they_say(tmp_path, run):
    log = write(tmp_path / "log.jsonl", texts())
    flags = ["--regimes", "prompt,generations,both", "--speculators", "memory_private,ngram"]
    _, out, _ = run("replay", log, *DEMO, *flags, "--num_speculative_tokens", "1")
    for name in ("memory_private", "ngram"):
        prompt, generations, both = (
            table(out, "First drafted")[name + suffix, 1]
            for suffix in (", prompt only", ", generations only", "")
        )
        assert len(set(prompt)) == 1  # nothing is learned from one generation to the next
        assert generations[1] > 0.5 > prompt[1]
        assert both[1] > 0.5
    assert table(out, "First drafted")["ngram, generations only", 1][0] == 0


def test_parquet_and_figure_say_what_the_tables_say(tmp_path, real_run, run):
    output = tmp_path / "out"
    flags = ["--match_drafted", "bigram", "--output", output]
    code, out, _ = run("replay", real_run, *QUICK, *flags)
    assert code == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "acceptance.parquet", "reliability.parquet", "replay.png", "speculators.parquet",
    ]  # fmt: skip
    assert (output / "replay.png").read_bytes().startswith(b"\x89PNG")
    label = "speculator || coalesce(' = ' || matched_to, ''), num_speculative_tokens"

    def ask(columns: str, name: str, rest: str = "") -> list[tuple]:
        sql = f"SELECT {label}, {columns} FROM '{output}/{name}.parquet' {rest}"
        return duckdb.sql(sql).fetchall()

    printed = table(out, "Speculators")
    totals = "num_tokens / num_steps, num_accepted_tokens / num_draft_tokens, mean_acceptance"
    rows = ask(totals, "speculators")
    assert len(rows) == len(printed) == 5
    for name, k, tokens_per_step, accepted, mean in rows:
        assert printed[name, k][0] == pytest.approx(mean, abs=6e-4)
        assert printed[name, k][2] == pytest.approx(tokens_per_step, abs=6e-4)
        assert printed[name, k][4] == pytest.approx(accepted, abs=6e-4)
    for title, column, where in (
        ("First drafted", "sample_index", "num_accepted_tokens / num_steps"),
        ("Drafted tokens", "position", "sum(num_accepted_tokens) / sum(num_draft_tokens)"),
    ):
        by_generation = column == "sample_index"
        rest = "WHERE position = 0" if by_generation else "WHERE num_speculative_tokens > 1"
        rest += "" if by_generation else f" GROUP BY {label}, {column}"
        found = table(out, title)
        for name, k, index, rate in ask(f"{column}, {where}", "acceptance", rest):
            assert found[name, k][index] == pytest.approx(rate or 0.0, abs=6e-4)
    matched, other = printed["memory = bigram", 4], printed["bigram", 4]
    assert matched[3] <= other[3]
    assert matched[4] > other[4]
    sql = f"""SELECT sum(num_draft_tokens), sum(predicted * num_draft_tokens) FROM
        '{output}/reliability.parquet' WHERE num_speculative_tokens = 4 AND matched_to IS NULL"""
    ((num_drafted, predicted),) = duckdb.sql(sql).fetchall()
    assert (num_drafted,) in [row[2:] for row in ask("num_draft_tokens", "speculators")]
    assert 0 < predicted < num_drafted


def test_counts_add_up_whatever_is_drafted():
    generator = np.random.default_rng(0)
    prompts = [
        LoggedPrompt(str(i), generator.integers(0, 5, 7), list(generator.integers(0, 5, (3, 20 + i))))
        for i in range(9)
    ]  # fmt: skip
    for name in ("memory", "bigram"):
        for width in (1, 4, 20):
            report = replay(prompts, SPECULATORS[name].make("both", 0.0, None), cap=3, width=width)
            assert report.num_tokens == 3 * sum(20 + i for i in range(9))
            # A step adds its accepted tokens and one more, unless the completion ends with them.
            extra = report.num_tokens - report.num_accepted
            assert 0 <= report.num_steps.sum() - extra <= 27
            assert (report.accepted <= report.drafted).all()
            assert report.num_learned == report.num_tokens + 63

    def run(least: float):
        return replay(prompts, SPECULATORS["memory"].make("both", least, None), cap=3, width=4)

    assert match_drafted(run, 0.5).drafted_per_step <= 0.5


def test_empty_completions_are_left_out_aloud(tmp_path, run):
    rows = texts(2)
    rows[0]["completions"][1] = ""
    rows[1]["completions"][0] = None
    code, out, err = run("replay", write(tmp_path / "log.jsonl", rows), *DEMO, *QUICK)
    assert code == 0
    assert "2 empty completions left out, first" in err
    assert "line 1, completion 1" in err
    assert "2 prompts, 6 completions" in out


def test_prompts_without_tokens_are_said_to_teach_nothing(tmp_path, run):
    log = write(tmp_path / "log.jsonl", [{"id": 1, "token_ids": [[1, 2, 3, 1, 2, 3]] * 3}])
    code, _, err = run("replay", log, *QUICK)
    assert code == 0
    assert "the tokens of 1 prompts are not known" in err
    code, _, err = run("replay", log, *QUICK, "--regimes", "prompt")
    assert code == 2
    assert "--regimes prompt" in err


ONE = {"prompt_id": 1, "question": "q", "completions": ["a b c"]}
SINGLE = {"prompt_id": 1, "sample_index": 0, "text": "a b c"}


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        (None, [], ["no such file"]),
        ([], [], ["no rows"]),
        ([{"prompt_id": 1, "question": "q"}], [], ["line 1", "completions", "prompt_id, question"]),
        ([ONE | {"completions": []}], [], ["line 1", "empty"]),
        ([ONE | {"completions": ["", None]}], [], ["line 1, completion 0", "empty"]),
        ([ONE | {"completions": [1]}], [], ["line 1", "--completions_column"]),
        ([ONE | {"completions": ["\ud800"]}], [], ["line 1", "valid text"]),
        ([ONE | {"question": 3}], [], ["line 1", "question", "--prompt_column"]),
        ([ONE, ONE | {"question": "r"}], [], ["line 2", "line 1", "--id_column"]),
        ([ONE | {"prompt_id": [1]}], [], ["line 1", "prompt_id", "--id_column"]),
        ([ONE | {"token_ids": [[1], [2]]}], [], ["line 1", "1 completions and 2 lists"]),
        ([ONE | {"token_ids": [[-1]]}], [], ["line 1", "--token_ids_column"]),
        ([ONE | {"token_ids": [[99999]]}], [], ["line 1", "99999", "vocabulary"]),
        ([ONE | {"token_ids": [[5, 6]]}], [], ["line 1", "decode", "'a b c'", "--tokenizer_name"]),
        ([ONE | {"prompt_token_ids": "q"}], [], ["line 1", "--prompt_token_ids_column"]),
        ([SINGLE, SINGLE], [], ["line 2", "completion 0"]),
        ([SINGLE | {"sample_index": None}], [], ["line 1", "--sample_index_column"]),
        ([{"text": "a b c"}], [], ["line 1", "--id_column"]),
        ([ONE], ["--prompt_column", "ask"], ["'ask'", "--prompt_column", "completions"]),
        ([ONE], ["--completions_column", "x"], ["'x'", "--completions_column"]),
        ([ONE], ["--tokenizer_name", "./nowhere"], ["./nowhere", "--tokenizer_name"]),
        ([ONE], ["--speculators", "memory,x"], ["--speculators", "'x'", "memory_private"]),
        ([ONE], ["--regimes", "x"], ["--regimes", "'x'", "generations"]),
        ([ONE], ["--num_speculative_tokens", "0"], ["--num_speculative_tokens", "'0'"]),
        ([ONE], ["--num_speculative_tokens", "99"], ["--num_speculative_tokens", "99"]),
        ([ONE], ["--num_completions", "x"], ["--num_completions", "'x'"]),
        ([ONE], ["--min_survival", "2"], ["--min_survival", "'2'"]),
        ([ONE], ["--match_drafted", "arctic"], ["--match_drafted arctic"]),
        ([ONE], ["--speculator", "memory"], ["--speculator", "--speculators"]),
        ([ONE], ["--warm_start", "missing.jsonl"], ["missing.jsonl", "no such file"]),
        ([ONE], ["--warm_start", "other.jsonl"], ["--warm_start", "other.jsonl", "no prompt"]),
        ([ONE], ["--output", "log.jsonl"], ["--output", "log.jsonl"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_2(tmp_path, monkeypatch, run, rows, flags, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "other.jsonl", [ONE | {"prompt_id": 2, "question": "other"}])
    if rows is not None:
        write(tmp_path / "log.jsonl", rows)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("replay", "log.jsonl", *DEMO, *QUICK, *flags)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert all(word in line for word in words), line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_log_of_text_without_a_tokenizer_asks_for_one(tmp_path, run):
    code, _, err = run("replay", write(tmp_path / "log.jsonl", [ONE]), *QUICK)
    assert code == 2
    assert "--tokenizer_name" in err


def test_files_that_cannot_be_read_are_named(tmp_path, real_run, run):
    (tmp_path / "log.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged" / "completions"
    damaged.mkdir(parents=True)
    (damaged / "part-1.parquet").write_bytes(b"PAR1 and no more")
    for name in ("log.parquet", "empty", "damaged"):
        code, _, err = run("replay", tmp_path / name, *QUICK)
        (line,) = err.splitlines()
        assert code == 2
        assert name in line


def test_a_run_of_another_vocabulary_is_refused(tmp_path, real_run, run):
    TOKENIZER.save_pretrained(tmp_path / "letters")
    code, _, err = run("replay", real_run, *QUICK, "--tokenizer_name", tmp_path / "letters")
    assert code == 2
    assert "another vocabulary" in err

    other = tmp_path / "other"
    (other / "completions").mkdir(parents=True)
    record = json.loads((real_run / "run.json").read_text())
    record["fingerprints"]["tokenizer"] = "0" * 16
    (other / "run.json").write_text(json.dumps(record))
    for part in real_run.glob("completions/*.parquet"):
        (other / "completions" / part.name).write_bytes(part.read_bytes())
    code, _, err = run("replay", real_run, *QUICK, "--warm_start", other)
    (line,) = err.splitlines()
    assert code == 2
    assert "--warm_start" in line
    assert "another vocabulary" in line


def test_arctic_is_asked_for_by_name_where_it_is_not_installed(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "arctic_inference", None)
    log = write(tmp_path / "log.jsonl", [ONE])
    code, _, err = run("replay", log, *DEMO, "--speculators", "memory,arctic")
    (line,) = err.splitlines()
    assert code == 2
    assert "pip install arctic-inference" in line


def test_the_help_comes_without_torch():
    code = (
        "import sys; sys.argv[1:] = ['replay', '--help']\n"
        "from streaminator.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--warm_start" in result.stdout
