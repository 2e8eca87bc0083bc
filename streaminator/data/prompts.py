# SPDX-License-Identifier: Apache-2.0
"""Dataset rows -> `Prompt`: columns, wording, token ids and a stable, unique id.

Invariants
- The same settings and rows give the same prompts on any day: the current date never enters a
  chat template.
- Rows are read as prompts are taken; 8 bytes per id are kept.

Used by: `streaminator.cli`, `jobs.*`.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import chain, islice
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from streaminator.config import DataConfig
from streaminator.data.finished import HashSet, stable_hash
from streaminator.data.rows import Row, load_file, load_rows
from streaminator.errors import ConfigError, DataError
from streaminator.sequence import Prompt
from streaminator.unicode import half_a_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION_COLUMNS = ("question", "problem", "prompt", "query", "input", "instruction")
ANSWER_COLUMNS = ("answer", "solution", "gold", "target")
DEFAULT_PROMPT_TEMPLATE = "Question: {question}\nAnswer:"
_TEMPLATE_DATE = datetime(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")

_Example = tuple[str, str]


def load_prompts(data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Prompt]:
    """Prompts of the dataset in its order, each with its completions still to draw.

    The settings, the few-shot file and the first row are checked at once, later rows as they are
    taken.

    Raises:
        ConfigError: a setting would have no effect, or the chat template refuses the messages.
        DataError: the dataset, a file or a row cannot be used; also while prompts are taken.
    """
    examples = _load_examples(data)
    render = _make_renderer(data, tokenizer, examples)
    prompts = _make_prompts(data, render)
    first = next(prompts, None)
    if first is None:
        raise DataError(f"dataset {data.dataset}: no rows; give one with at least one question")
    return chain((first,), prompts)


def _make_prompts(
    data: DataConfig, render: Callable[[str], tuple[str, tuple[int, ...]]]
) -> Iterator[Prompt]:
    sample_indices = tuple(range(data.num_completions))
    prompt_id = _prompt_ids(data)
    rows = load_rows(data.dataset, data.dataset_config, data.split)
    for row in islice(rows, data.num_samples):
        question = _question(row, data.question_column)
        gold_answer = _answer(row, data.answer_column)
        text, token_ids = render(question)
        if not token_ids:
            raise DataError(f"{row.place}: the tokenizer makes no tokens of it; check the question")
        yield Prompt(
            prompt_id=prompt_id(row, question, gold_answer),
            token_ids=token_ids,
            text=text,
            question=question,
            gold_answer=gold_answer,
            metadata={name: _metadata(row, name) for name in data.metadata_columns},
            sample_indices=sample_indices,
        )


def _make_renderer(
    data: DataConfig, tokenizer: "PreTrainedTokenizerBase", examples: list[_Example]
) -> Callable[[str], tuple[str, tuple[int, ...]]]:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    # An explicit prompt template would be ignored without a word if the chat template won.
    if data.chat_template and has_template and data.prompt_template is None:
        return _chat_renderer(data, tokenizer, examples)

    if data.system_prompt is not None:
        reason = (
            "the tokenizer has none"
            if not has_template
            else "--prompt_template replaces it"
            if data.prompt_template is not None
            else "--no_chat_template switches it off"
        )
        raise ConfigError(
            f"--system_prompt needs the tokenizer's chat template, and {reason}; "
            "put the text into --prompt_template"
        )
    template = data.prompt_template or DEFAULT_PROMPT_TEMPLATE
    preamble = ""
    for question, answer in examples:
        opening = template.replace("{question}", question)
        preamble += opening + ("" if opening[-1].isspace() else " ") + answer + "\n\n"

    def render(question: str) -> tuple[str, tuple[int, ...]]:
        text = preamble + template.replace("{question}", question)
        return text, tuple(tokenizer(text)["input_ids"])

    return render


def _chat_renderer(
    data: DataConfig, tokenizer: "PreTrainedTokenizerBase", examples: list[_Example]
) -> Callable[[str], tuple[str, tuple[int, ...]]]:
    preamble = []
    if data.system_prompt is not None:
        preamble.append({"role": "system", "content": data.system_prompt})
    for question, answer in examples:
        preamble.append({"role": "user", "content": question})
        preamble.append({"role": "assistant", "content": answer})

    def render(question: str) -> tuple[str, tuple[int, ...]]:
        text = _chat_text(tokenizer, [*preamble, {"role": "user", "content": question}])
        # The template writes the special tokens itself.
        return text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    probe, _ = render("question")
    for flag, content in (
        ("--system_prompt", data.system_prompt),
        ("--few_shot", examples[0][1] if examples else None),
    ):
        if content is not None and content.strip() not in probe:
            raise ConfigError(
                f"{flag}: the tokenizer's chat template leaves it out; drop it, or use "
                "--prompt_template"
            )
    return render


def _chat_text(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> str:
    try:
        # Templates that write today's date would give other tokens tomorrow.
        template = _DATE_CALL.sub(
            lambda call: repr(_TEMPLATE_DATE.strftime(call[2])), tokenizer.get_chat_template()
        )
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"the tokenizer's chat template cannot be used ({reason}); drop --system_prompt or "
            "--few_shot, or use --no_chat_template"
        ) from error
    return str(text)


def _load_examples(data: DataConfig) -> list[_Example]:
    if data.few_shot is None:
        return []
    path = Path(data.few_shot)
    examples = []
    for row in islice(load_file(path), data.num_few_shot):
        # The examples' file may name its columns in its own way.
        question = _question(row, _if_there(data.question_column, row))
        answer = _answer(row, _if_there(data.answer_column, row))
        if answer is None:
            raise DataError(
                f"{row.place}: an example needs an answer; add a column {ANSWER_COLUMNS[0]!r} or "
                "name it with --answer_column"
            )
        examples.append((question, answer))
    if len(examples) < data.num_few_shot:
        raise DataError(
            f"{path}: {len(examples)} rows where --num_few_shot asks for {data.num_few_shot}; "
            "lower it or add examples"
        )
    return examples


def _if_there(column: str | None, row: Row) -> str | None:
    return column if column in row.values else None


def _question(row: Row, column: str | None) -> str:
    name = column or next((name for name in QUESTION_COLUMNS if name in row.values), None)
    if name is None or name not in row.values:
        raise DataError(
            f"{row.place}: no column {name or ', '.join(QUESTION_COLUMNS)} (it has "
            f"{_names(row)}); name the question's with --question_column"
        )
    question = row.values[name]
    if not isinstance(question, str) or not question.strip():
        raise DataError(
            f"{row.place}: column {name!r} must be text that is not empty; correct the row or "
            "choose another with --question_column"
        )
    return _checked_text(row, name, question)


def _answer(row: Row, column: str | None) -> str | None:
    name = column or next((name for name in ANSWER_COLUMNS if name in row.values), None)
    if name is None:
        return None
    answer = _cell(row, name, "--answer_column")
    if answer is None or answer == "" or answer != answer:  # NaN is no answer
        return None
    if not isinstance(answer, str | Number):
        raise DataError(
            f"{row.place}: column {name!r} must be text or a number; write lists and objects as "
            "JSON text or choose another with --answer_column"
        )
    return _checked_text(row, name, str(answer))


def _prompt_ids(data: DataConfig) -> Callable[[Row, str, str | None], str]:
    seen = HashSet()
    repeats: Counter[str] = Counter()
    """Of contents that came more than once."""

    def from_column(row: Row, question: str, gold_answer: str | None) -> str:
        value = _cell(row, str(data.id_column), "--id_column")
        if not isinstance(value, str | Number) or value == "":
            raise DataError(
                f"{row.place}: column {data.id_column!r} must be text or a number; give each row "
                "an id or drop --id_column"
            )
        prompt_id = _checked_text(row, str(data.id_column), str(value))
        if not seen.add(stable_hash(prompt_id)):
            first = _first_place(data, prompt_id)
            if first != row.place:  # else two ids share their hash
                raise DataError(
                    f"{row.place}: id {prompt_id!r} is taken by {first}; make ids unique or drop "
                    "--id_column"
                )
        return prompt_id

    def from_content(row: Row, question: str, gold_answer: str | None) -> str:
        content = question if gold_answer is None else f"{question}\0{gold_answer}"
        digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        if seen.add(int(digest, 16)):
            return digest
        repeats[digest] += 1
        return f"{digest}-{repeats[digest] + 1}"

    return from_content if data.id_column is None else from_column


def _first_place(data: DataConfig, prompt_id: str) -> str:
    """Where an id stands first: the dataset is read once more rather than all places kept."""
    rows = load_rows(data.dataset, data.dataset_config, data.split)
    return next(row.place for row in rows if str(row.values.get(str(data.id_column))) == prompt_id)


def _metadata(row: Row, name: str) -> str:
    value = _cell(row, name, "--metadata_columns")
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return _checked_text(row, name, value)


def _cell(row: Row, name: str, flag: str) -> Any:
    if name not in row.values:
        raise DataError(
            f"{row.place}: no column {name!r} (it has {_names(row)}); add it or change {flag}"
        )
    return row.values[name]


def _checked_text(row: Row, name: str, text: str) -> str:
    place = half_a_pair(text)  # JSON may hold one
    if place is not None:
        raise DataError(
            f"{row.place}: column {name!r} is not valid Unicode at character {place}; "
            "correct the row"
        )
    return text


def _names(row: Row) -> str:
    return ", ".join(map(str, row.values)) or "none"
