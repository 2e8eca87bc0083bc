# SPDX-License-Identifier: Apache-2.0
"""The profiling job's numbers, by SQL from the Parquet of its runs; their tables and figure.

Used by: `jobs.profiling`.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.power_law import Fit, fit_geometric, fit_power_law
from streaminator.summary import PHASES

# duckdb is imported late, so that --help and typos are answered at once.
if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATIC, WITHOUT, WITH = "static", "no-speculation", "speculation"
"""The runs: the first with speculation, the others with continuous batching."""
_TITLES = {
    WITH: "continuous batching, speculation",
    WITHOUT: "continuous batching, no speculation",
    STATIC: "static batching, speculation",
}
COMPONENTS = (*PHASES, "other")
"""Phases of `steps/`, and what lies between steps: rows, Parquet, the driver. On a GPU these go on while the
model computes."""
_NUM_POINTS = 200
"""Most points of a curve over steps."""

_SECONDS = " + ".join(f"seconds_{phase}" for phase in PHASES)
_COMPLETIONS_SQL = """
    SELECT count(DISTINCT prompt_id), count(*), count(*) FILTER (finish_reason = 'failed'),
           sum(num_completion_tokens) / nullif(sum(num_steps), 0),
           sum(num_accepted_tokens) / nullif(sum(num_draft_tokens), 0)
    FROM read_parquet($completions)"""
_STEPS_SQL = f"""
    SELECT count(*), sum(num_new_tokens), avg(num_running) / $width,
           avg(num_blocks_used), max(num_blocks_used), max(device_memory),
           epoch(max(time)) - min(epoch(time) - ({_SECONDS})),
           {", ".join(f"sum(seconds_{phase})" for phase in PHASES)}
    FROM read_parquet($steps)"""
_CURVE_SQL = """
    SELECT avg(step), avg(num_running) / $width, avg(num_blocks_used)
    FROM read_parquet($steps), (SELECT count(*) AS total FROM read_parquet($steps))
    GROUP BY step * least($points, total) // total ORDER BY 1"""
_ACCEPTED_SQL = """
    SELECT num_accepted, count(*) FROM (
        SELECT unnest(drafted) AS num_drafted, unnest(accepted) AS num_accepted
        FROM read_parquet($completions))
    WHERE num_drafted > 0 GROUP BY 1 ORDER BY 1"""
_DIFFERING_SQL = """
    SELECT count(*) FROM (
        SELECT 1 FROM read_parquet($completions) GROUP BY prompt_id, sample_index
        HAVING count(DISTINCT token_ids) > 1 OR count(*) < $runs)"""


def summarize(folder: str, *, stream_width: int) -> dict[str, Any]:
    """The numbers of the runs in `folder`, each run's named after it."""
    runs = {name: _measure(Path(folder) / name, stream_width) for name in _TITLES}
    counts = dict(_query(_ACCEPTED_SQL, completions=_parts(Path(folder) / WITH, "completions")))
    everywhere = _parts(Path(folder) / "*", "completions")
    ((num_differing,),) = _query(_DIFFERING_SQL, completions=everywhere, runs=len(runs))
    return {
        "num_differing": num_differing,
        "runs": runs,
        "accepted": {
            "counts": {str(value): num for value, num in counts.items()},
            "power_law": _rounded(fit_power_law(counts)),
            "geometric": _rounded(fit_geometric(counts)),
        },
    }


def _parts(run: Path, table: str) -> str:
    return str(run / table / "*.parquet")


def _query(sql: str, **parameters: Any) -> list[tuple[Any, ...]]:
    import duckdb

    return duckdb.execute(sql, parameters).fetchall()


def _measure(run: Path, width: int) -> dict[str, Any]:
    completions, steps = _parts(run, "completions"), _parts(run, "steps")
    ((num_prompts, num, num_failed, per_step, acceptance),) = _query(
        _COMPLETIONS_SQL, completions=completions
    )
    ((num_steps, num_tokens, utilization, blocks, most_blocks, memory, wall, *seconds),) = _query(
        _STEPS_SQL, steps=steps, width=width
    )
    curve = _query(_CURVE_SQL, steps=steps, width=width, points=_NUM_POINTS)
    # Steps are stamped by another clock than the one that times their phases.
    wall = max(wall, sum(seconds))
    times = dict(zip(COMPONENTS, [*seconds, wall - sum(seconds)], strict=True))
    return {
        "num_prompts": num_prompts,
        "num_completions": num,
        "num_failed": num_failed,
        "num_tokens": num_tokens,
        "num_steps": num_steps,
        "seconds": round(wall, 3),
        "tokens_per_second": round(num_tokens / wall, 1),
        "tokens_per_slot_step": _round(per_step, 4),
        "acceptance_rate": _round(acceptance, 4),
        "shares": {name: round(value / wall, 6) for name, value in times.items()},
        "utilization": round(utilization, 4),
        "mean_blocks": round(blocks, 1),
        "most_blocks": most_blocks,
        "most_memory_bytes": memory,
        "over_steps": {
            "step": [round(row[0], 1) for row in curve],
            "utilization": [round(row[1], 4) for row in curve],
            "blocks": [round(row[2], 1) for row in curve],
        },
    }


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _rounded(fit: Fit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    return {
        "parameter": round(fit.parameter, 4),
        "standard_error": round(fit.standard_error, 4),
        "log_likelihood": round(fit.log_likelihood, 4),
        "distance": round(fit.distance, 4),
        "chances": [round(chance, 6) for chance in fit.chances],
    }


def write_table(result: dict[str, Any]) -> str:
    """The job's result as Markdown."""
    settings, runs = result["settings"], result["runs"]
    lines = [
        f"# Profile: {result['model']}",
        "",
        f"{runs[WITH]['num_prompts']} prompts of {result['dataset']} x "
        f"{result['num_completions']} completions of at most {settings['max_length']} tokens, "
        f"temperature {settings['temperature']}, stream width {settings['stream_width']}, "
        f"speculator {settings['speculator']}, {settings['dtype']}, {result['device']}, "
        f"{_count(result['num_threads'], 'thread')}. Regenerated by `python -m jobs.profiling` "
        "(`results/README.md`).",
        "",
        f"Completions that differ between the runs: {result['num_differing']} of "
        f"{runs[WITH]['num_completions']}.",
        "",
        "## Share of time by component",
        "",
        "Continuous batching. `other` lies between the steps: rows, Parquet, the driver. In brackets: "
        "microseconds per new token.",
        "",
        "| component | no speculation | speculation |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {_time(runs[WITHOUT], name)} | {_time(runs[WITH], name)} |" for name in COMPONENTS),
        "",
        "## Stream utilization and memory",
        "",
        "Utilization: slots in use / stream width, mean over steps. KV blocks of "
        f"{settings['block_size']} tokens in use. Memory: torch's on a GPU; on a CPU the process's "
        "resident set, one process for all runs. The first run, with static batching, warms the "
        "others up, so that its speed is no measure.",
        "",
        "| run | steps | tokens per slot-step | utilization | KV blocks, mean | most | most memory, "
        "MiB | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_run_line(name, runs[name]) for name in _TITLES),
        "",
        "## Accepted tokens per step",
        "",
        *_accepted_lines(result["accepted"]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}" if num == 1 else f"{num} {noun}s"


def _time(run: dict[str, Any], component: str) -> str:
    share = run["shares"][component]
    return f"{share:.1%} ({1e6 * share * run['seconds'] / run['num_tokens']:.1f})"


def _run_line(name: str, run: dict[str, Any]) -> str:
    speed = "-" if name == STATIC else f"{run['tokens_per_second']:,.0f}"
    per_step = run["tokens_per_slot_step"]
    cells = [
        _TITLES[name],
        f"{run['num_steps']:,}",
        "-" if per_step is None else f"{per_step:.2f}",
        f"{run['utilization']:.1%}",
        f"{run['mean_blocks']:,.0f}",
        f"{run['most_blocks']:,}",
        f"{run['most_memory_bytes'] / 2**20:,.0f}",
        speed,
    ]
    return f"| {' | '.join(cells)} |"


def _accepted_lines(accepted: dict[str, Any]) -> list[str]:
    counts: Mapping[str, int] = accepted["counts"]
    power, geometric = accepted["power_law"], accepted["geometric"]
    total = sum(counts.values())
    num = total - counts.get("0", 0)
    if power is None or geometric is None:
        return [
            f"Of {total:,} slot-steps with a draft none accepted more than one token: nothing to fit."
        ]
    gap = power["log_likelihood"] - geometric["log_likelihood"]
    nearer = power["distance"] < geometric["distance"]
    names = ("geometric", "power law")
    lines = [
        "Slot-steps of the run with speculation that had a draft. Both distributions are fitted to "
        "the counts from 1 on, by maximum likelihood: the power law x^-a / zeta(a) by eq. 3.5 of "
        "Clauset, Shalizi & Newman (2009) with x_min = 1, solved exactly, its error by their eq. 3.6; "
        "the geometric (1 - p)^(x-1) p in closed form. Drafts have a longest length, at which the "
        "counts end and steps may pile up; the fits know nothing of it.",
        "",
        f"Power law: a = {power['parameter']:.3f} +- {power['standard_error']:.3f}, log-likelihood "
        f"{power['log_likelihood']:.3f} per slot-step, Kolmogorov-Smirnov distance "
        f"{power['distance']:.3f}. Geometric: p = {geometric['parameter']:.3f} +- "
        f"{geometric['standard_error']:.3f}, {geometric['log_likelihood']:.3f}, "
        f"{geometric['distance']:.3f}. By likelihood the {names[gap > 0]} fits better, by "
        f"{abs(gap):.3f} per slot-step over {num:,} slot-steps; by distance the {names[nearer]}.",
        "",
        "| accepted | slot-steps | share from 1 on | power law | geometric |",
        "| ---: | ---: | ---: | ---: | ---: |",
        f"| 0 | {counts.get('0', 0):,} | - | - | - |",
    ]
    pairs = zip(power["chances"], geometric["chances"], strict=True)
    for value, (one, other) in enumerate(pairs, start=1):
        count = counts.get(str(value), 0)
        lines.append(f"| {value} | {count:,} | {count / num:.3f} | {one:.3f} | {other:.3f} |")
    return lines


def draw_figure(result: dict[str, Any]) -> bytes:
    """Three panels, as PNG: time by component, the stream over steps, accepted tokens."""
    # Imported late: it takes a second.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(0.8, 1.2, 1))
    _draw_shares(figure.add_subplot(grid[:, 0]), result)
    upper = figure.add_subplot(grid[0, 1])
    _draw_stream(upper, figure.add_subplot(grid[1, 1], sharex=upper), result)
    _draw_accepted(figure.add_subplot(grid[:, 2]), result)
    sink = io.BytesIO()
    # Without the library's version in it, the same numbers give the same bytes.
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _draw_shares(panel: "Axes", result: dict[str, Any]) -> None:
    names = {WITHOUT: "no speculation", WITH: "speculation"}
    bottoms = dict.fromkeys(names, 0.0)
    for index, component in enumerate(COMPONENTS):
        shares = {name: result["runs"][name]["shares"][component] for name in names}
        panel.bar(
            list(names.values()),
            list(shares.values()),
            0.6,
            bottom=list(bottoms.values()),
            color=f"C{index}",
            label=component,
        )
        bottoms = {name: bottoms[name] + shares[name] for name in names}
    panel.set_title(f"{result['model']}: share of time", fontsize=10)
    panel.set_xlim(-0.5, 2.4)  # room for the legend
    panel.set_ylim(0, 1)
    handles, labels = panel.get_legend_handles_labels()
    panel.legend(handles[::-1], labels[::-1], loc="center right", fontsize=8)


def _draw_stream(upper: "Axes", lower: "Axes", result: dict[str, Any]) -> None:
    for name, title in ((WITH, "continuous"), (STATIC, "static")):
        run = result["runs"][name]
        curve = run["over_steps"]
        upper.plot(curve["step"], curve["utilization"], label=f"{title}, {run['utilization']:.0%}")
        lower.plot(curve["step"], curve["blocks"], label=f"{title}, {run['mean_blocks']:.0f}")
    upper.set_title("stream utilization and memory, by batching, with means", fontsize=10)
    upper.set_ylabel("slots in use / width")
    lower.set_ylabel("KV blocks in use")
    lower.set_xlabel("step")
    for panel in (upper, lower):
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(loc="lower left", fontsize=8)


def _draw_accepted(panel: "Axes", result: dict[str, Any]) -> None:
    accepted = result["accepted"]
    values = [int(value) for value in accepted["counts"] if value != "0"]
    counts = [accepted["counts"][str(value)] for value in values]
    panel.plot(values, counts, "o", color="black", markersize=5, label="slot-steps")
    for color, name, title in (
        ("C3", "power_law", "power law, a"),
        ("C0", "geometric", "geometric, p"),
    ):
        fit = accepted[name]
        if fit is not None:
            expected = [sum(counts) * chance for chance in fit["chances"]]
            label = f"{title} = {fit['parameter']:.2f}"
            panel.plot(range(1, len(expected) + 1), expected, color=color, label=label)
    panel.set_title("accepted tokens per slot-step", fontsize=10)
    panel.set_xlabel("accepted tokens")
    if counts:
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylim(bottom=min(counts) / 3)
        panel.set_xticks(ticks := [2**n for n in range(max(values).bit_length())], ticks)
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3, which="both")
