# SPDX-License-Identifier: Apache-2.0
"""Rows become prompts: found, worded, tokenised and named as asked, or refused by name."""

import json
import subprocess
import sys
import types
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from streaminator.config import DataConfig
from streaminator.data.prompts import load_prompts
from streaminator.data.rows import DEMO_FILE, load_rows
from streaminator.errors import ConfigError, DataError

GSM8K = Path(__file__).parents[2].parent / "shared" / "gsm8k"
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(5)]


def make_tokenizer(chat_template=None):
    """A byte-level tokenizer that puts <s> first where special tokens are asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = chat_template
    return wrapped


PLAIN = make_tokenizer()
CHATTY = make_tokenizer(CHAT)


def write(path, rows):
    """Write rows in the format of the file's suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [rows[0], *(row.values() for row in rows)]
        path.write_text("\n".join(",".join(f'"{cell}"' for cell in line) for line in lines))
    return str(path)


def load(dataset, tokenizer=PLAIN, **settings):
    return list(load_prompts(DataConfig(dataset=str(dataset), **settings), tokenizer))


def error_of(kind, dataset, tokenizer=PLAIN, **settings):
    with pytest.raises(kind) as raised:
        load(dataset, tokenizer, **settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.fixture
def problems(tmp_path):
    return write(tmp_path / "problems.jsonl", ROWS)


# Where rows come from


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".JSON"])
def test_every_format_gives_the_same_prompts(tmp_path, problems, suffix):
    other = tmp_path / f"other{suffix}"
    write(other.with_suffix(suffix.lower()), ROWS)
    other.with_suffix(suffix.lower()).rename(other)
    assert load(other) == load(problems)
    assert [prompt.question for prompt in load(other)] == [row["question"] for row in ROWS]
    assert [prompt.gold_answer for prompt in load(other)] == [row["answer"] for row in ROWS]


def test_a_json_file_may_hold_columns(tmp_path, problems):
    path = tmp_path / "columns.json"
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    path.write_text(json.dumps({"data": columns}))
    assert load(path) == load(problems)


def test_empty_lines_and_a_byte_order_mark_are_skipped(tmp_path, problems):
    path = tmp_path / "gaps.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    path.write_text("\ufeff" + "\n\n  \n".join(lines), encoding="utf-8")
    assert load(path) == load(problems)


def test_num_samples_takes_the_first(problems):
    assert load(problems, num_samples=2) == load(problems)[:2]
    assert len(load(problems, num_samples=50)) == 5


def test_later_rows_are_not_read_before_they_are_taken(tmp_path):
    path = tmp_path / "late.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + "\nbroken\n")
    prompts = load_prompts(DataConfig(dataset=str(path)), PLAIN)
    assert len(list(islice(prompts, 2))) == 2
    with pytest.raises(DataError, match="line 3"):
        next(prompts)


def test_what_is_wrong_with_the_first_row_is_told_at_once(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        load_prompts(DataConfig(dataset=str(tmp_path / "absent.jsonl")), PLAIN)


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.json", "absent.csv", "absent.parquet"])
def test_a_missing_file_is_named(tmp_path, name):
    assert f"{tmp_path / name}: no such file" in error_of(DataError, tmp_path / name)


def test_a_folder_or_an_unknown_suffix_is_refused(tmp_path):
    (tmp_path / "rows.txt").write_text("x")
    for path in (tmp_path, tmp_path / "rows.txt"):
        assert f"{path}: must be a .jsonl, .json, .csv or .parquet file" in error_of(
            DataError, path
        )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"question": "x"}\n\n{"question": \n', "a.jsonl line 3: not valid JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl line 1: must be an object"),
        ("a.jsonl", b'{"question": "x"}\n{"question": "\xff"}\n', "a.jsonl line 2: not readable"),
        ("a.jsonl", '{"question": "\\ud800"}\n', "a.jsonl line 1: column 'question' is not valid"),
        ("a.jsonl", '{"question": ' + "[" * 100_000, "a.jsonl line 1: not readable"),
        ("a.json", '{"question": "x"}\n{"question": "y"}', "must be named .jsonl"),
        ("a.json", "5", "a.json: must hold a list of objects"),
        ("a.json", '{"data": {"question": ["x"], "answer": []}}', "same length"),
        ("a.json", '{"data": {"question": "x"}}', "must be a list"),
        ("a.json", '[{"question": "x"}, 5]', "a.json row 2: must be an object"),
        ("a.csv", "question,answer\nx,1\ny\n", "a.csv row 2: 1 fields where the header has 2"),
        ("a.csv", 'question\nx\n"y\n', "a.csv row 2: not valid CSV"),
        ("a.csv", b"question\nx\n\xff\n", "not valid CSV in UTF-8"),
        ("a.csv", "question,question\nx,y\n", "two columns have the same name"),
        ("a.parquet", "PAR1", "a.parquet: not a valid Parquet file"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.csv", "question,answer\n", "no rows"),
        ("a.csv", "", "no rows"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_named_with_its_row(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = error_of(DataError, path)
    assert expected in message
    assert str(path) in message


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets` that records its calls."""
    calls = []

    def load_dataset(name, config=None, split=None):
        calls.append((name, config, split))
        if name == "no/such":
            raise ConnectionError("Couldn't reach 'no/such'\nlong advice")
        return iter(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_other_names_are_hub_datasets(hub, problems):
    assert load("openai/gsm8k") == load("some/set", dataset_config="hard", split="train[:5]")
    assert load("gsm8k", dataset_config="socratic") == load(problems)
    assert hub == [
        ("openai/gsm8k", "main", "test"),
        ("some/set", "hard", "train[:5]"),
        ("gsm8k", "socratic", "test"),
    ]


def test_a_hub_failure_is_one_line_with_the_way_out(hub):
    message = error_of(DataError, "no/such")
    assert "dataset no/such" in message
    assert "Couldn't reach" in message
    assert "local" in message
    assert "network" in message


def test_a_missing_datasets_package_stops_only_hub_names(monkeypatch, problems):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load(problems)) == 5
    assert "datasets" in error_of(DataError, "openai/gsm8k")


def test_the_bundled_problems_load():
    if not DEMO_FILE.exists():
        pytest.skip("the bundled problems are not made yet (streaminator/demo/problems.jsonl)")
    prompts = load("demo")
    assert prompts
    assert all(prompt.gold_answer for prompt in prompts)


def test_all_real_gsm8k_test_problems_load():
    path = GSM8K / "test.jsonl"
    if not path.exists():
        pytest.skip("the GSM8K test set is not beside the repository (../shared/gsm8k)")
    prompts = load(path)
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts) == 1319
    assert all("####" in str(prompt.gold_answer) for prompt in prompts)


# Columns


@pytest.mark.parametrize("name", ["question", "problem", "prompt", "query", "input", "instruction"])
def test_the_question_column_is_found(tmp_path, name):
    path = write(tmp_path / "a.jsonl", [{"other": "no", name: "Why?"}])
    assert load(path)[0].question == "Why?"
    assert load(path, question_column="other")[0].question == "no"


@pytest.mark.parametrize("name", ["answer", "solution", "gold", "target"])
def test_the_answer_column_is_found(tmp_path, name):
    path = write(tmp_path / "a.jsonl", [{"question": "Why?", "other": "no", name: "So."}])
    assert load(path)[0].gold_answer == "So."
    assert load(path, answer_column="other")[0].gold_answer == "no"


@pytest.mark.parametrize(
    ("answer", "gold_answer"), [(18, "18"), (1.5, "1.5"), (None, None), ("", None), ("x", "x")]
)
def test_answers_are_text(tmp_path, answer, gold_answer):
    path = write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": answer}])
    assert load(path)[0].gold_answer == gold_answer


def test_without_an_answer_column_nothing_is_gold(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "Why?"}])
    assert load(path)[0].gold_answer is None
    assert "'answer'" in error_of(DataError, path, answer_column="answer")


@pytest.mark.parametrize("question", ["", "  ", 5, None, ["x"]])
def test_a_question_that_is_no_text_is_refused(tmp_path, question):
    path = write(tmp_path / "a.jsonl", [ROWS[0], {"question": question}])
    message = error_of(DataError, path)
    assert f"{path} line 2: column 'question'" in message
    assert "--question_column" in message


def test_a_row_without_the_question_is_named_with_what_it_has(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS[0], {"text": "x"}])
    message = error_of(DataError, path)
    assert f"{path} line 2: no column" in message
    assert "it has text" in message
    assert "no column title" in error_of(DataError, path, question_column="title")


def test_a_structured_answer_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": ["x"]}])
    assert f"{path} line 1: column 'answer'" in error_of(DataError, path)


def test_metadata_is_copied_as_text(tmp_path):
    row = {"question": "Why?", "level": 3, "tags": ["a", "é"], "topic": "b", "none": None}
    path = write(tmp_path / "a.jsonl", [row])
    columns = ("level", "tags", "topic", "none")
    assert load(path, metadata_columns=columns)[0].metadata == {
        "level": "3",
        "tags": '["a", "é"]',
        "topic": "b",
        "none": "null",
    }
    assert "'source'" in error_of(DataError, path, metadata_columns=("source",))


# Ids


def test_ids_depend_on_question_and_answer_only(tmp_path, problems):
    ids = [prompt.prompt_id for prompt in load(problems)]
    assert len(set(ids)) == 5
    assert all(len(prompt_id) == 16 and int(prompt_id, 16) >= 0 for prompt_id in ids)
    moved = write(tmp_path / "moved.jsonl", [{"n": 1, **row} for row in reversed(ROWS)])
    chat = load(moved, CHATTY, system_prompt="Think.", num_completions=2)
    assert [prompt.prompt_id for prompt in chat] == ids[::-1]
    bare = write(tmp_path / "bare.jsonl", [{"question": row["question"]} for row in ROWS])
    assert not {prompt.prompt_id for prompt in load(bare)} & set(ids)


def test_ids_never_change(tmp_path):
    """An id is part of the key of the sampling noise and of every recorded run."""
    path = write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "So."}, {"question": "é"}])
    assert [prompt.prompt_id for prompt in load(path)] == ["a90f6f9f37b7fa00", "cb1abf8beff3192f"]


def test_repeated_rows_get_numbered_ids(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS[0], ROWS[1], ROWS[0], ROWS[0]])
    first, other, second, third = (prompt.prompt_id for prompt in load(path))
    assert (second, third) == (f"{first}-2", f"{first}-3")
    assert other != first


def test_ids_come_from_the_id_column(tmp_path):
    rows = [{"id": 7, "question": "x"}, {"id": "b", "question": "x"}]
    path = write(tmp_path / "a.jsonl", rows)
    assert [prompt.prompt_id for prompt in load(path, id_column="id")] == ["7", "b"]


def test_an_id_that_is_taken_names_both_rows(tmp_path):
    rows = [{"id": 7, "question": "x"}, {"id": 8, "question": "y"}, {"id": "7", "question": "z"}]
    path = write(tmp_path / "a.jsonl", rows)
    message = error_of(DataError, path, id_column="id")
    assert f"{path} line 3" in message
    assert f"{path} line 1" in message


def test_many_ids_are_told_apart_and_a_late_repetition_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr("streaminator.data.finished.HashSet._MAX_LATEST", 4)
    rows = [{"id": f"n{number}", "question": "x"} for number in range(50)]
    path = write(tmp_path / "a.jsonl", rows)
    assert len(load(path, id_column="id")) == 50
    message = error_of(DataError, write(tmp_path / "b.jsonl", [*rows, rows[9]]), id_column="id")
    assert "line 51" in message
    assert "line 10;" in message


def test_two_ids_with_one_hash_are_two_prompts(monkeypatch, tmp_path):
    monkeypatch.setattr("streaminator.data.prompts.stable_hash", lambda name: 7)
    path = write(tmp_path / "a.jsonl", [{"id": name, "question": "x"} for name in "abc"])
    assert [prompt.prompt_id for prompt in load(path, id_column="id")] == ["a", "b", "c"]


@pytest.mark.parametrize("values", [{}, {"id": None}, {"id": ""}, {"id": [1]}])
def test_a_row_without_an_id_is_named(tmp_path, values):
    path = write(tmp_path / "a.jsonl", [{"question": "x", **values}])
    assert f"{path} line 1: " in error_of(DataError, path, id_column="id")


# Wording


def test_a_prompt_has_all_its_completions_to_draw(problems):
    assert load(problems, num_completions=3)[0].sample_indices == (0, 1, 2)


def test_without_a_chat_template_the_prompt_template_words_it(problems):
    prompt = load(problems)[1]
    assert prompt.text == "Question: What is 1 + 1?\nAnswer:"
    assert prompt.token_ids == tuple(PLAIN(prompt.text)["input_ids"])
    assert prompt.token_ids[0] == PLAIN.bos_token_id


def test_braces_in_questions_and_templates_are_safe(tmp_path):
    question = "Is {x} in {question} or \\frac{1}{2}?"
    path = write(tmp_path / "a.jsonl", [{"question": question}])
    prompt = load(path, prompt_template="{Q} {question} {0}")[0]
    assert prompt.text == "{Q} " + question + " {0}"


def test_a_chat_template_words_it_with_its_special_tokens_once(problems):
    prompt = load(problems, CHATTY, system_prompt="Think.")[1]
    assert prompt.text == "<s>[system]Think.\n[user]What is 1 + 1?\n[assistant]"
    assert prompt.token_ids.count(CHATTY.bos_token_id) == 1
    assert CHATTY.decode(list(prompt.token_ids)) == prompt.text


def test_an_explicit_prompt_template_and_no_chat_template_win_over_the_tokenizers(problems):
    assert load(problems, CHATTY, prompt_template="Q {question}")[1].text == "Q What is 1 + 1?"
    assert load(problems, CHATTY, chat_template=False) == load(problems)


@pytest.mark.parametrize(
    ("tokenizer", "settings", "reason"),
    [
        (PLAIN, {}, "has none"),
        (CHATTY, {"chat_template": False}, "--no_chat_template"),
        (CHATTY, {"prompt_template": "{question}"}, "--prompt_template replaces"),
    ],
)
def test_a_system_prompt_without_effect_is_refused(problems, tokenizer, settings, reason):
    message = error_of(ConfigError, problems, tokenizer, system_prompt="Think.", **settings)
    assert "--system_prompt" in message
    assert reason in message


def test_a_chat_template_that_drops_or_refuses_a_turn_is_refused(problems):
    last_only = make_tokenizer("{{ messages[-1]['content'] }}")
    refusing = make_tokenizer("{{ raise_exception('no system role\nplease') }}")
    settings = {"few_shot": problems, "num_few_shot": 1}
    assert "--system_prompt" in error_of(ConfigError, problems, last_only, system_prompt="Think.")
    assert "--few_shot" in error_of(ConfigError, problems, last_only, **settings)
    assert "no system role" in error_of(ConfigError, problems, refusing, system_prompt="Think.")


def test_todays_date_never_enters_a_prompt(problems):
    dated = make_tokenizer("{{ strftime_now('%d %b %Y') }} {{ messages[-1]['content'] }}")
    assert load(problems, dated)[0].text == "26 Jul 2024 What is 0 + 0?"
    assert str(dated.chat_template).startswith("{{ strftime_now(")


# Worked examples


def test_examples_come_first_in_the_same_wording(tmp_path, problems):
    examples = write(tmp_path / "examples.jsonl", ROWS[2:])
    prompt = load(problems, few_shot=examples, num_few_shot=2)[0]
    assert prompt.text == (
        "Question: What is 2 + 2?\nAnswer: #### 4\n\n"
        "Question: What is 3 + 3?\nAnswer: #### 6\n\n"
        "Question: What is 0 + 0?\nAnswer:"
    )
    spaced = load(problems, few_shot=examples, num_few_shot=1, prompt_template="Q {question}\nA\n")
    assert spaced[0].text == "Q What is 2 + 2?\nA\n#### 4\n\nQ What is 0 + 0?\nA\n"


def test_examples_are_earlier_turns_of_a_chat(tmp_path, problems):
    examples = write(tmp_path / "examples.csv", ROWS[2:])
    prompt = load(problems, CHATTY, few_shot=examples, num_few_shot=1, system_prompt="Think.")[0]
    assert prompt.text == (
        "<s>[system]Think.\n[user]What is 2 + 2?\n[assistant]#### 4\n"
        "[user]What is 0 + 0?\n[assistant]"
    )


def test_examples_may_name_their_columns_differently(tmp_path, problems):
    examples = write(tmp_path / "examples.jsonl", [{"problem": "Why?", "solution": "So."}])
    data = DataConfig(
        dataset=problems,
        few_shot=examples,
        num_few_shot=1,
        question_column="question",
        answer_column="answer",
    )
    assert next(load_prompts(data, PLAIN)).text.startswith("Question: Why?\nAnswer: So.\n\n")


def test_too_few_examples_or_one_without_an_answer_are_refused(tmp_path, problems):
    message = error_of(DataError, problems, few_shot=problems)
    assert f"{problems}: 5 rows where --num_few_shot asks for 8" in message
    bare = write(tmp_path / "bare.jsonl", [{"question": "Why?"}])
    assert f"{bare} line 1: " in error_of(DataError, problems, few_shot=bare, num_few_shot=1)
    assert "no such file" in error_of(DataError, problems, few_shot="absent.jsonl")


def test_importing_does_not_need_the_hub_package():
    code = "import sys; sys.modules['datasets'] = None; import streaminator.data.prompts"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_long_field_of_a_csv_file_is_read(tmp_path):
    question = "word " * 40_000
    file = tmp_path / "long.csv"
    file.write_text(f'question,answer\n"{question}",1\n')
    (row,) = load_rows(str(file), None, "test")
    assert row.values["question"] == question
