# SPDX-License-Identifier: Apache-2.0
"""What replays found: tables for a terminal, three tables of Parquet, a figure.

Used by: `streaminator.cli_replay`.
"""

import io
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from streaminator.data.files import open_output, reason, write_whole
from streaminator.errors import OutputError
from streaminator.speculative.replay import NUM_BINS, ReplayReport

_WIDE = 160  # columns of the tables where stdout is no terminal


class Result(NamedTuple):
    """One replay of one log."""

    log: str
    speculator: str
    num_speculative_tokens: int
    regime: str
    matched_to: str | None
    """Speculator whose drafted tokens per step were matched; None: drafts as it likes."""
    warm_start: str | None
    report: ReplayReport

    @property
    def label(self) -> str:
        """Name in a table or a figure's legend."""
        regime = "" if self.regime == "both" else f", {self.regime} only"
        matched = f" = {self.matched_to}" if self.matched_to else ""
        return f"{self.speculator}{matched}{regime}"


def print_tables(results: Sequence[Result], title: str) -> None:
    """The tables of one log on stdout."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDE)
    console.print(title, highlight=False, markup=False)
    for name, columns, rows in _tables(results):
        if rows:
            _print_table(console, name, columns, rows)


def _print_table(console: Any, name: str, columns: Sequence[str], rows: Iterable) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False, markup=False)


def _tables(results: Sequence[Result]) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of each table."""
    yield (
        "Speculators (accepted: share of steps whose first drafted token was right, mean over "
        "generations)",
        ["", "k", "accepted", "of drafting", "tokens/step", "drafted/step", "accepted/drafted",
         "us/token", "bytes/token"],
        [_summary(result) for result in results],
    )  # fmt: skip
    shown = _shown(max(len(result.report.num_steps) for result in results))
    yield (
        "First drafted token right, by generation",
        ["", "k", *(str(n + 1) for n in shown)],
        [
            [
                r.label,
                str(r.num_speculative_tokens),
                *(f"{r.report.acceptance[n]:.3f}" for n in shown),
            ]
            for r in results
        ],
    )
    positions = _shown(max(result.num_speculative_tokens for result in results))
    yield (
        "Drafted tokens accepted, by draft position",
        ["", "k", *(str(n + 1) for n in positions)],
        [
            [r.label, str(r.num_speculative_tokens), *_by_position(r.report, positions)]
            for r in results
            if r.num_speculative_tokens > 1
        ],
    )
    yield (
        "Calibration: predicted survival of a drafted token, observed, number drafted",
        ["", "k", *(f"{n / NUM_BINS:.1f}-" for n in range(NUM_BINS))],
        [
            [r.label, str(r.num_speculative_tokens), *_by_bin(r.report)]
            for r in results
            if r.report.reliability.any() and r.matched_to is None
        ],
    )


def _summary(result: Result) -> list[str]:
    report = result.report
    return [
        result.label,
        str(result.num_speculative_tokens),
        f"{report.acceptance.mean():.3f}",
        f"{report.acceptance_when_drafting:.3f}",
        f"{report.tokens_per_step:.3f}",
        f"{report.drafted_per_step:.2f}",
        f"{report.accepted_per_drafted:.3f}",
        f"{report.microseconds_per_token:.1f}",
        f"{report.bytes_per_token:.0f}" if report.num_bytes else "-",
    ]


def _shown(num: int) -> list[int]:
    """Indices of the columns shown of `num`."""
    return [n for n in range(num) if num <= 16 or n == num - 1 or (n + 1) & n == 0]


def _by_position(report: ReplayReport, positions: list[int]) -> list[str]:
    counts, rates = report.drafted.sum(0), report.acceptance_by_position
    return [f"{rates[n]:.3f}" if n < len(counts) and counts[n] else "-" for n in positions]


def _by_bin(report: ReplayReport) -> list[str]:
    return [
        f"{predicted / number:.2f} {accepted / number:.2f}\n{number:.0f}" if number else "-"
        for number, predicted, accepted in report.reliability
    ]


def _doc(*columns: tuple[str, pa.DataType, str]) -> list[pa.Field]:
    return [pa.field(name, kind, metadata={"doc": doc}) for name, kind, doc in columns]


_KEYS = _doc(
    ("log", pa.string(), "file, folder or URI"),
    ("speculator", pa.string(), "as --speculators names it"),
    ("num_speculative_tokens", pa.int32(), "most tokens drafted per step"),
    ("regime", pa.string(), "what it learned from: prompt, generations or both"),
    ("matched_to", pa.string(), "speculator whose drafted tokens per step it was held to"),
    ("warm_start", pa.string(), "log it had learned from before"),
)
_SCHEMAS = {
    "speculators": pa.schema([
        *_KEYS,
        *_doc(
            ("num_steps", pa.int64(), "slot-steps"),
            ("num_tokens", pa.int64(), "tokens of completions"),
            ("num_draft_tokens", pa.int64(), "tokens drafted"),
            ("num_accepted_tokens", pa.int64(), "drafted tokens accepted"),
            ("num_second_choices", pa.int64(), "drafted tokens that stood beside the chain"),
            ("num_accepted_second_choices", pa.int64(), "of them accepted"),
            ("mean_acceptance", pa.float64(), "mean over generations of the share of steps whose "
             "first drafted token was right"),
            ("seconds", pa.float64(), "time in the speculator"),
            ("num_bytes", pa.int64(), "most memory held; 0: not known"),
            ("num_learned_tokens", pa.int64(), "tokens of prompts, warm start and completions"),
        ),
    ]),
    "acceptance": pa.schema([
        *_KEYS,
        *_doc(
            ("sample_index", pa.int32(), "generation, from 0"),
            ("position", pa.int32(), "place in the draft, from 0"),
            ("num_steps", pa.int64(), "slot-steps of the generation"),
            ("num_draft_tokens", pa.int64(), "tokens of the chain drafted at the position"),
            ("num_accepted_tokens", pa.int64(), "of them accepted"),
        ),
    ]),
    "reliability": pa.schema([
        *_KEYS,
        *_doc(
            ("bin", pa.int32(), f"of predicted survival, 1/{NUM_BINS} wide, from 0"),
            ("num_draft_tokens", pa.int64(), "tokens drafted"),
            ("predicted", pa.float64(), "mean predicted survival"),
            ("observed", pa.float64(), "share accepted"),
        ),
    ]),
}  # fmt: skip


def to_tables(results: Sequence[Result]) -> dict[str, pa.Table]:
    """Three tidy tables: totals; counts by generation and position; reliability by bin."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in _SCHEMAS}
    for result in results:
        report = result.report
        keys = {field.name: getattr(result, field.name) for field in _KEYS}
        rows["speculators"].append(
            keys
            | {
                "num_steps": int(report.num_steps.sum()),
                "num_tokens": report.num_tokens,
                "num_draft_tokens": report.num_drafted,
                "num_accepted_tokens": report.num_accepted,
                "num_second_choices": int(report.num_seconds[0]),
                "num_accepted_second_choices": int(report.num_seconds[1]),
                "mean_acceptance": float(report.acceptance.mean()),
                "seconds": report.seconds,
                "num_bytes": report.num_bytes,
                "num_learned_tokens": report.num_learned,
            }
        )
        rows["acceptance"] += [
            keys
            | {
                "sample_index": index,
                "position": position,
                "num_steps": int(report.num_steps[index]),
                "num_draft_tokens": int(report.drafted[index, position]),
                "num_accepted_tokens": int(report.accepted[index, position]),
            }
            for index in range(len(report.num_steps))
            for position in range(result.num_speculative_tokens)
        ]
        rows["reliability"] += [
            keys
            | {
                "bin": number,
                "num_draft_tokens": int(drafted),
                "predicted": predicted / drafted,
                "observed": accepted / drafted,
            }
            for number, (drafted, predicted, accepted) in enumerate(report.reliability)
            if drafted
        ]
    return {name: pa.Table.from_pylist(rows[name], schema=_SCHEMAS[name]) for name in _SCHEMAS}


def write_report(results: Sequence[Result], output: str) -> list[str]:
    """Write the tables and the figure into a folder or URI; returns the files' paths.

    Raises: ConfigError when there can be no such folder; OutputError.
    """
    filesystem, folder = open_output(output)
    files: dict[str, bytes | pa.Buffer] = {}
    for name, table in to_tables(results).items():
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        files[f"{name}.parquet"] = sink.getvalue()
    files["replay.png"] = _figure(results)
    try:
        for name, data in files.items():
            write_whole(filesystem, f"{folder}/{name}", data)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {reason(error)}") from error
    return [f"{folder}/{name}" for name in files]


def _figure(results: Sequence[Result]) -> bytes:
    """A row per log: acceptance by generation, by draft position, and the calibration."""
    from matplotlib.figure import Figure

    logs = [list(group) for _, group in groupby(results, lambda result: result.log)]
    figure = Figure(figsize=(15, 4.2 * len(logs)), layout="constrained")
    for axes, group in zip(figure.subplots(len(logs), 3, squeeze=False), logs, strict=True):
        first = [r for r in group if r.num_speculative_tokens == group[0].num_speculative_tokens]
        deepest = max(r.num_speculative_tokens for r in group)
        last = [r for r in group if r.num_speculative_tokens == deepest]
        name = group[0].log.rstrip("/").rsplit("/", 1)[-1]
        axes[0].set(title=f"{name}, k = {first[0].num_speculative_tokens}", xlabel="generation",
                    ylabel="first drafted token right", ylim=(0, 1))  # fmt: skip
        axes[1].set(title=f"k = {deepest}", xlabel="draft position", ylabel="accepted / drafted",
                    ylim=(0, 1))  # fmt: skip
        axes[2].set(title=f"calibration, k = {deepest}", xlabel="predicted survival",
                    ylabel="observed", xlim=(0, 1), ylim=(0, 1))  # fmt: skip
        axes[2].plot((0, 1), (0, 1), color="0.8")
        for result in first:
            if result.matched_to is None:
                _plot(axes[0], result.report.acceptance, result.label)
        for result in last:
            rate = f"{result.report.tokens_per_step:.2f} tokens/step"
            _plot(axes[1], result.report.acceptance_by_position, f"{result.label}: {rate}")
            drafted, predicted, accepted = result.report.reliability.T
            if drafted.any() and result.matched_to is None:
                known = drafted > 0
                axes[2].plot(predicted[known] / drafted[known], accepted[known] / drafted[known],
                             marker="o", label=result.label)  # fmt: skip
        for axis in axes:
            if axis.get_legend_handles_labels()[1]:
                axis.legend(fontsize="small")
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110)
    return sink.getvalue()


def _plot(axis: Any, values: Any, label: str) -> None:
    axis.plot(range(1, len(values) + 1), values, marker="o", label=label)
