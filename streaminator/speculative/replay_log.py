# SPDX-License-Identifier: Apache-2.0
"""Logged completions -> `LoggedPrompt`s: runs, JSON lines, JSON, CSV, Parquet.

Invariants
- A row holds one completion or a list of them; rows with the same prompt id (or, without an id,
  the same prompt) belong together, by sample index where there is one, else in the file's order.
- Recorded token ids are taken as they are; text is tokenized only where there are none.
- What is left out is counted and said (`Log.notes`).

Used by: `streaminator.cli_replay`, `jobs.benchmark_memory`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from streaminator.data.files import list_parts, reason, resolve
from streaminator.data.rows import Row, load_file
from streaminator.errors import ConfigError, DataError, OutputError
from streaminator.run_record import RunRecord, read_record, tokenizer_fingerprint
from streaminator.speculative.replay import LoggedPrompt
from streaminator.speculative.replay_speculators import Ints
from streaminator.unicode import half_a_pair

Tokenizer = Any  # transformers' PreTrainedTokenizerBase, which is not imported here
_NUM_COMPARED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Names of a log's columns; None: the first of `_DEFAULTS` that is there."""

    id_column: str | None = None
    prompt_column: str | None = None
    completions_column: str | None = None
    token_ids_column: str | None = None
    prompt_token_ids_column: str | None = None
    sample_index_column: str | None = None


_DEFAULTS = {
    "id_column": ("prompt_id", "id"),
    "prompt_column": ("prompt", "question", "problem", "query", "input", "instruction"),
    "completions_column": ("completions", "completion", "responses", "response", "text"),
    "token_ids_column": ("token_ids",),
    "prompt_token_ids_column": ("prompt_token_ids",),
    "sample_index_column": ("sample_index",),
}
_RUN_COLUMNS = ("prompt_id", "prompt", "num_prompt_tokens", "sample_index", "text", "token_ids")


@dataclass(slots=True)
class _Completion:
    place: str
    text: str | None
    token_ids: list[int] | None
    sample_index: int | None


@dataclass(slots=True)
class _Prompt:
    place: str
    text: str | None
    token_ids: list[int] | None
    num_tokens: int | None
    completions: list[_Completion] = field(default_factory=list)


@dataclass(slots=True)
class Log:
    """A log as it was read, not tokenized."""

    source: str
    record: RunRecord | None
    """Of a run."""
    prompts: dict[str, _Prompt] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What the user should know, one line each."""
    numbers: NDArray[np.bool_] | None = None
    """[V] which tokens are parts of numbers, where the tokenizer is known."""


def read_log(source: str, columns: Columns) -> Log:
    """Read a run's folder or URI, or a file. `columns` are a file's; a run's are known.

    Raises: DataError naming the file, the row and what is wrong with it.
    """
    try:
        record, rows = _open(source)
    except OutputError as error:
        raise DataError(str(error)) from error
    log = Log(source, record)
    names: Columns | None = None
    empty: list[str] = []
    for row in rows:
        if names is None:
            names = _find_columns(row, Columns() if record else columns)
        empty += _add_row(log, row, names)
    if empty:
        log.notes.append(f"{source}: {len(empty)} empty completions left out, first {empty[0]}")
    log.prompts = {name: prompt for name, prompt in log.prompts.items() if prompt.completions}
    if not log.prompts:
        what = f"every completion is empty (first {empty[0]})" if empty else "no rows"
        raise DataError(f"{source}: {what}; give a log with text or token ids of completions")
    return log


def _open(source: str) -> tuple[RunRecord | None, Iterator[Row]]:
    if "://" not in source and not Path(source).is_dir():
        return None, load_file(Path(source))
    filesystem, path = resolve(source)
    record = read_record(filesystem, path)
    parts = list_parts(filesystem, f"{path}/completions") or list_parts(filesystem, path)
    if not parts:
        raise DataError(f"{source}: no Parquet in it; give a run's folder or a file")

    def rows() -> Iterator[Row]:
        for part in parts:
            number = 0
            try:
                with filesystem.open_input_file(part) as file:
                    parquet = pq.ParquetFile(file)
                    held = parquet.schema_arrow.names
                    wanted = [n for n in _RUN_COLUMNS if n in held] if record else held
                    for batch in parquet.iter_batches(batch_size=256, columns=wanted):
                        for values in batch.to_pylist():
                            number += 1
                            yield Row(f"{part} row {number}", values)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{part}: cannot be read ({reason(error)})") from error

    return record, rows()


def _find_columns(row: Row, columns: Columns) -> Columns:
    there = f"it has {', '.join(map(str, row.values)) or 'none'}"
    found = {}
    for flag, defaults in _DEFAULTS.items():
        name = getattr(columns, flag)
        if name is not None and name not in row.values:
            raise DataError(f"{row.place}: no column {name!r} ({there}); change --{flag}")
        found[flag] = name or next((n for n in defaults if n in row.values), None)
    if found["completions_column"] is None and found["token_ids_column"] is None:
        raise DataError(
            f"{row.place}: no completions column ({there}); name it with --completions_column, or "
            "--token_ids_column"
        )
    return Columns(**found)


def _add_row(log: Log, row: Row, names: Columns) -> Iterator[str]:
    """Take in a row; yields the places of its empty completions."""
    texts = row.values.get(names.completions_column)  # type: ignore[arg-type]
    ids = row.values.get(names.token_ids_column)  # type: ignore[arg-type]
    is_list = isinstance(texts, list) or (
        texts is None and isinstance(ids, list) and bool(ids) and isinstance(ids[0], list)
    )
    what = "valid text, or a list of texts, one per completion"
    all_texts = _cells(row, texts, is_list, _is_text, f"{what}; change --completions_column")
    what = "a list of token ids, or one such list per completion"
    all_ids = _cells(row, ids, is_list, _is_ids, f"{what}; change --token_ids_column")
    if texts is not None and ids is not None and len(all_texts) != len(all_ids):
        raise DataError(
            f"{row.place}: {len(all_texts)} completions and {len(all_ids)} lists of token ids"
        )
    prompt = _prompt_of(log, row, names, is_list=is_list)
    index = None if is_list else _sample_index(row, names.sample_index_column)
    if index is not None and any(c.sample_index == index for c in prompt.completions):
        raise DataError(f"{row.place}: completion {index} of its prompt was there before")
    cells = list(zip_longest(all_texts, all_ids))
    if not cells:
        yield row.place
    for number, (text, token_ids) in enumerate(cells):
        place = f"{row.place}, completion {number}" if is_list else row.place
        if token_ids or (text and token_ids is None):
            prompt.completions.append(_Completion(place, text, token_ids, index))
        else:
            yield place


def _cells(
    row: Row, value: Any, is_list: bool, is_right: Callable[[Any], bool], what: str
) -> list[Any]:
    """The completions in a cell; None for one that has no text, or no token ids."""
    cells = [value] if not is_list else value or []
    if isinstance(cells, list) and all(cell is None or is_right(cell) for cell in cells):
        return cells
    raise DataError(f"{row.place}: a completion must be {what}")


def _is_text(cell: Any) -> bool:
    return isinstance(cell, str) and half_a_pair(cell) is None  # JSON may hold one


def _is_ids(cell: Any) -> bool:
    return isinstance(cell, list) and all(type(token) is int and token >= 0 for token in cell)


def _prompt_of(log: Log, row: Row, names: Columns, *, is_list: bool) -> _Prompt:
    text = None if names.prompt_column is None else row.values.get(names.prompt_column)
    if text is not None and not _is_text(text):
        raise DataError(
            f"{row.place}: column {names.prompt_column!r} must be valid text; change --prompt_column"
        )
    key = row.place if is_list else None
    if names.id_column is not None:
        key = row.values.get(names.id_column)
        if not isinstance(key, str | int):
            raise DataError(
                f"{row.place}: column {names.id_column!r} must be text or a number; change "
                "--id_column"
            )
    elif text is not None:
        key = text
    if key is None:
        raise DataError(
            f"{row.place}: nothing says which prompt the completion belongs to; name a column "
            "with --id_column or --prompt_column"
        )
    prompt = log.prompts.get(str(key))
    if prompt is None:
        token_ids = row.values.get(names.prompt_token_ids_column)  # type: ignore[arg-type]
        if token_ids is not None and not _is_ids(token_ids):
            raise DataError(
                f"{row.place}: column {names.prompt_token_ids_column!r} must be a list of token "
                "ids; change --prompt_token_ids_column"
            )
        num_tokens = row.values.get("num_prompt_tokens") if log.record else None
        prompt = _Prompt(row.place, text, token_ids, num_tokens)
        log.prompts[str(key)] = prompt
    elif prompt.text != text:
        raise DataError(
            f"{row.place}: has the prompt id of {prompt.place} and another prompt; change "
            "--id_column"
        )
    return prompt


def _sample_index(row: Row, name: str | None) -> int | None:
    if name is None:
        return None
    index = row.values.get(name)
    if not str(index).isdecimal():
        raise DataError(
            f"{row.place}: column {name!r} must be a number; change --sample_index_column"
        )
    return int(str(index))


def encode(
    log: Log,
    tokenizer: Tokenizer | None,
    *,
    num_samples: int | None = None,
    num_completions: int | None = None,
) -> list[LoggedPrompt]:
    """Token ids of the first prompts and of the first completions of each.

    Raises: ConfigError when text is to be tokenized and there is no tokenizer; DataError when the
    recorded token ids are not the tokenizer's.
    """
    prompts = dict(islice(log.prompts.items(), num_samples))
    for name, prompt in prompts.items():
        drawn = sorted(prompt.completions, key=lambda c: c.sample_index or 0)
        prompts[name] = replace(prompt, completions=drawn[:num_completions])
    completions = [c for prompt in prompts.values() for c in prompt.completions]
    if tokenizer is not None:
        _check_ids(log, tokenizer, [c for c in completions if c.token_ids is not None])
    missing = [c for c in completions if c.token_ids is None]
    if missing and tokenizer is None:
        raise ConfigError(
            f"{missing[0].place}: has text and no token ids; give the folder or hub name of a "
            "tokenizer with --tokenizer_name"
        )
    for completion, ids in zip(missing, _tokens(tokenizer, missing, special=False), strict=True):
        completion.token_ids = ids
    _encode_prompts(log, tokenizer, list(prompts.values()))
    return [
        LoggedPrompt(
            name,
            np.array(prompt.token_ids or (), np.int64),
            [np.array(c.token_ids, np.int64) for c in prompt.completions if c.token_ids],
        )
        for name, prompt in prompts.items()
        if any(c.token_ids for c in prompt.completions)
    ]


def _tokens(
    tokenizer: Tokenizer | None, texts: Sequence[_Completion | _Prompt], *, special: bool
) -> list[list[int]]:
    if not texts or tokenizer is None:
        return []
    found = tokenizer([text.text for text in texts], add_special_tokens=special)
    return found["input_ids"]


def _encode_prompts(log: Log, tokenizer: Tokenizer | None, prompts: list[_Prompt]) -> None:
    missing = [p for p in prompts if p.token_ids is None and p.text]
    for prompt, ids in zip(missing, _tokens(tokenizer, missing, special=True), strict=False):
        prompt.token_ids = ids
    # A chat template writes the special tokens itself.
    other = [p for p in missing if p.num_tokens not in (None, len(p.token_ids or ()))]
    for prompt, ids in zip(other, _tokens(tokenizer, other, special=False), strict=False):
        prompt.token_ids = ids
    num_unknown = sum(not prompt.token_ids for prompt in prompts)
    if num_unknown:
        log.notes.append(
            f"{log.source}: the tokens of {num_unknown} prompts are not known, so nothing is "
            "learned from them (--tokenizer_name, --prompt_column or --prompt_token_ids_column)"
        )


def _check_ids(log: Log, tokenizer: Tokenizer, completions: list[_Completion]) -> None:
    """Recorded ids must be the tokenizer's, and decode to the recorded text."""
    advice = "give the tokenizer that made the log with --tokenizer_name"
    recorded = log.record and log.record.fingerprints.get("tokenizer")
    if recorded and recorded != tokenizer_fingerprint(tokenizer):
        raise DataError(
            f"{log.source}: made with another vocabulary than the tokenizer's; {advice}"
        )
    size = len(tokenizer)
    for completion in completions:
        largest = max(completion.token_ids or (0,))
        if largest >= size:
            raise DataError(
                f"{completion.place}: token id {largest} is not in the tokenizer's vocabulary of "
                f"{size}; {advice}"
            )
    compared = [c for c in completions if c.text][:_NUM_COMPARED]
    differ = [completion for completion in compared if not _decodes(completion, tokenizer)]
    if len(differ) * 2 > len(compared):
        text = tokenizer.decode(differ[0].token_ids, skip_special_tokens=True)
        raise DataError(
            f"{differ[0].place}: its token ids decode to {text.strip()[:30]!r}, but its text is "
            f"{str(differ[0].text).strip()[:30]!r}; {advice}"
        )


def _decodes(completion: _Completion, tokenizer: Tokenizer) -> bool:
    """Whether the ids begin with the text: a stop string, or half a character, may be cut off."""
    text = str(completion.text).strip().rstrip("\ufffd")
    return any(
        tokenizer.decode(completion.token_ids, skip_special_tokens=skip).strip().startswith(text)
        for skip in (True, False)
    )


def vocabulary(log: Log, tokenizer: Tokenizer | None) -> str | None:
    """Hash of the vocabulary of a log's token ids; None if nothing says."""
    if log.record and "tokenizer" in log.record.fingerprints:
        return log.record.fingerprints["tokenizer"]
    return None if tokenizer is None else tokenizer_fingerprint(tokenizer)


def warm(
    prompts: list[LoggedPrompt], log: Log, earlier: list[LoggedPrompt], of: Log
) -> list[LoggedPrompt]:
    """The prompts with the completions of the same prompts in an earlier log, by id, else text.

    Raises: ConfigError when there is none.
    """
    texts = {of.prompts[p.prompt_id].text: p for p in earlier}
    texts.pop(None, None)
    ids = {p.prompt_id: p for p in earlier}
    found: dict[str, list[Ints]] = {}
    for prompt in prompts:
        match = ids.get(prompt.prompt_id) or texts.get(log.prompts[prompt.prompt_id].text)
        if match is not None:
            found[prompt.prompt_id] = match.completions
    if not found:
        raise ConfigError(
            f"--warm_start {of.source}: has no prompt of {log.source}, by id or by text"
        )
    log.notes.append(
        f"{log.source}: {len(found)} of {len(prompts)} prompts start warm from {of.source}"
    )
    return [replace(p, finished=found.get(p.prompt_id, [])) for p in prompts]
