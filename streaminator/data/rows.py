# SPDX-License-Identifier: Apache-2.0
"""Rows of a dataset, one at a time: the bundled problems, a local file or a hub dataset.

Invariants
- Rows come in the dataset's order, and each knows where it stands, for error messages.
- JSONL, CSV and Parquet files are never in memory as a whole; a .json file has to be.

Used by: `streaminator.data.prompts`.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streaminator.errors import DataError, first_line

DEMO_FILE = Path(__file__).parents[1] / "demo" / "problems.jsonl"
_DEFAULT_HUB_CONFIGS = {"openai/gsm8k": "main", "gsm8k": "main"}
_PARQUET_BATCH_ROWS = 256
_LONGEST_FIELD = 2**31 - 1  # of a CSV file; Python's own limit is 131,072 characters


@dataclass(frozen=True, slots=True)
class Row:
    """One example, unchecked."""

    place: str
    """File and row (counted from 1; for JSONL the line), as an error message names it."""
    values: dict[str, Any]


def load_rows(dataset: str, dataset_config: str | None, split: str) -> Iterator[Row]:
    """Rows of "demo", of a local file or of a hub dataset; configuration and split are the hub's.

    What exists here or ends like a data file is a local file.

    Raises:
        DataError: while rows are taken: the dataset or a row cannot be read.
    """
    if dataset == "demo":
        return load_file(DEMO_FILE)
    path = Path(dataset)
    if path.exists() or path.suffix.lower() in _READERS:
        return load_file(path)
    return _load_hub(dataset, dataset_config, split)


def load_file(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl, .json, .csv or .parquet file.

    Raises:
        DataError: while rows are taken: the file or a row cannot be read.
    """
    read = _READERS.get(path.suffix.lower())
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if read is None or not path.is_file():
        raise DataError(f"{path}: must be a .jsonl, .json, .csv or .parquet file")
    try:
        yield from read(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place}: not valid JSON ({error.msg} at column {error.colno}); "
                    "give one complete object per line"
                ) from error
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{place}: not readable ({first_line(error)}); give UTF-8 text"
                ) from error
            yield _object_row(place, values)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); "
            "a file with one object per line must be named .jsonl"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable ({first_line(error)}); give UTF-8 text") from error
    if isinstance(content, dict):
        content = content.get("data")
    if isinstance(content, dict):
        content = _rows_of_columns(path, content)
    if not isinstance(content, list):
        raise DataError(f'{path}: must hold a list of objects, or an object of lists under "data"')
    for number, values in enumerate(content, start=1):
        yield _object_row(f"{path} row {number}", values)


def _rows_of_columns(path: Path, columns: dict[str, Any]) -> list[dict[str, Any]]:
    if not all(isinstance(column, list) for column in columns.values()):
        raise DataError(f'{path}: each column under "data" must be a list')
    if len({len(column) for column in columns.values()}) > 1:
        raise DataError(f'{path}: the lists under "data" must have the same length')
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _object_row(place: str, values: Any) -> Row:
    if not isinstance(values, dict):
        raise DataError(
            f'{place}: must be an object such as {{"question": "...", "answer": "..."}}'
        )
    return Row(place, values)


def _read_csv(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            csv.field_size_limit(_LONGEST_FIELD)
            reader = csv.reader(file, strict=True)
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}: two columns have the same name; rename one")
            for fields in reader:
                if not fields:
                    continue
                number += 1
                place = f"{path} row {number}"
                if len(fields) != len(names):
                    raise DataError(
                        f"{place}: {len(fields)} fields where the header has {len(names)}; "
                        "put fields that hold commas or newlines in double quotes"
                    )
                yield Row(place, dict(zip(names, fields, strict=True)))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} row {number + 1}: not valid CSV in UTF-8 ({first_line(error)})"
        ) from error


def _read_parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", values)
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: not a valid Parquet file ({first_line(error)}); write it again"
        ) from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _load_hub(name: str, config: str | None, split: str) -> Iterator[Row]:
    try:
        # Local files must work where this package is missing or broken.
        import datasets

        loaded = datasets.load_dataset(name, config or _DEFAULT_HUB_CONFIGS.get(name), split=split)
        for number, values in enumerate(loaded, start=1):
            yield Row(f"{name} ({split}) row {number}", dict(values))
    except Exception as error:
        # Scripts, servers, caches and parsers fail in their own ways; all mean the same here.
        raise DataError(
            f"dataset {name} (split {split}): cannot be loaded from the hub "
            f"({first_line(error)}); give a local .jsonl, .json, .csv or .parquet file, or check "
            "the name, the configuration, the split and the network"
        ) from error
