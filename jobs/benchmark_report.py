# SPDX-License-Identifier: Apache-2.0
"""What the benchmark's runs come to: speeds, ratios, checks, the roofline; as data and as a table.

Used by: `jobs.benchmark`.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jobs.benchmark_measure import Measured
from jobs.engines.protocol import Run
from jobs.engines.registry import OWN, SIBLINGS

# They load torch, which --help does not need.
if TYPE_CHECKING:
    from jobs.benchmark_check import Verdict
    from jobs.roofline import Machine, Roofline


def summarize(
    measured: Measured,
    verdicts: dict[str, "Verdict"],
    rooflines: dict[str, "Roofline | None"],
    machine: "Machine",
    *,
    stream_width: int,
    is_greedy: bool,
) -> dict[str, Any]:
    """Speeds, ratios, and what the check says."""
    runs = measured.runs
    correct = [name for name in runs if verdicts[name].is_correct]
    reference = _reference(runs, correct)
    base = "plain" if "plain" in runs else next(iter(runs))
    drawn = runs[base][0].completions
    # Another sampler draws other text.
    same = [name for name in runs if is_greedy or name in OWN]
    differing = {
        name: max(_num_differing(drawn, run.completions) for run in runs[name]) for name in same
    }
    engines = {}
    for name, own in runs.items():
        limit = rooflines[name]
        engines[name] = _summarize_engine(own, stream_width) | {
            "ratio_to_reference": _ratio(own, runs[reference])["median"] if reference else None,
            "check": asdict(verdicts[name]) | {"is_correct": verdicts[name].is_correct},
            "roofline": limit and asdict(limit) | {"share": limit.share},
            "versions": measured.versions.get(name, {}),
        }
    return {
        "engines": engines,
        "failed": measured.failed,
        "reference": reference,
        "ratios": {
            f"{above}/{below}": _ratio(runs[above], runs[below])
            for above, below in _pairs(list(runs))
            if {above, below} <= set(correct)
        },
        "outputs": {
            "num_completions": sum(map(len, drawn)),
            "compared_with": base,
            "differing": differing,
        },
        "machine": asdict(machine),
    }


def _reference(runs: dict[str, list[Run]], correct: Sequence[str]) -> str | None:
    """The fastest correct engine of others; without one, this one without speculation."""
    peers = [name for name in correct if name not in OWN]
    if peers:
        return max(peers, key=lambda name: _speed(runs[name]))
    return "plain" if "plain" in correct else next(iter(correct), None)


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    own = [name for name in names if name in OWN]
    pairs = [(name, "plain") for name in own if name != "plain" and "plain" in own]
    pairs += [
        (name, strict)
        for name in own
        if (strict := name.removesuffix(SIBLINGS)) in own and strict not in (name, "plain")
    ]
    return pairs + [(name, peer) for peer in names if peer not in OWN for name in own]


def _ratio(above: Sequence[Run], below: Sequence[Run]) -> dict[str, Any]:
    values = [a.speed / b.speed for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(values), "values": values}


def _num_differing(one: list[list[list[int]]], other: list[list[list[int]]]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(a != b for first, second in pairs for a, b in zip(first, second, strict=False))


def _speed(runs: Sequence[Run]) -> float:
    return statistics.median(run.speed for run in runs)


def _summarize_engine(runs: list[Run], stream_width: int) -> dict[str, Any]:
    def total(count: Callable[[Run], float | None]) -> float | None:
        counts = [count(run) for run in runs]
        return None if None in counts else sum(c for c in counts if c is not None)

    def share(part: float | None, whole: float | None) -> float | None:
        return part / whole if part is not None and whole else None

    seconds = sum(run.seconds for run in runs)
    num_steps = total(lambda run: run.num_steps)
    num_busy = total(lambda run: run.num_busy_slots)
    used = share(num_busy, total(lambda run: run.num_rows))
    phases = {
        name: sum((run.phases or {}).get(name, 0.0) for run in runs) / seconds
        for name in runs[0].phases or {}
    }
    return {
        "tokens_per_second": _speed(runs),
        "runs": [
            {"tokens_per_second": r.speed, "seconds": r.seconds, "num_tokens": r.num_tokens}
            for r in runs
        ],
        "tokens_per_step": share(total(lambda run: run.num_tokens), num_steps),
        "acceptance_rate": share(total(lambda r: r.num_accepted), total(lambda r: r.num_drafted)),
        "occupancy": share(num_busy, num_steps and num_steps * stream_width),
        "padded_waste": None if used is None else 1 - used,
        # Only this engine counts its phases.
        "phases": phases | {"other": 1 - sum(phases.values())} if phases else None,
    }


def table(result: dict[str, Any]) -> str:
    """One stream width's result, for people."""
    lines = [
        f"{result['model']}: {result['num_parameters'] / 1e6:.1f}M parameters, {result['dtype']}, "
        f"{result['gpu'] or result['cpu']}, {result['num_threads']} threads",
        f"{result['num_prompts']} prompts of {result['mean_prompt_length']:.0f} tokens x "
        f"{result['num_completions']} completions, stream width {result['stream_width']}, "
        f"max length {result['settings']['max_length']}, "
        f"temperature {result['settings']['temperature']}, {result['repeats']} repeats",
        "",
        f"{'':20}{'tokens/s':>10}{'ratio':>7}{'tokens/step':>13}{'accepted':>10}{'occupancy':>11}"
        f"{'padded waste':>14}{'length':>8}{'nats/token':>12}  check",
    ]
    for name, engine in result["engines"].items():
        check = engine["check"]
        is_correct = check["is_correct"]
        lines.append(
            f"{name:20}{engine['tokens_per_second']:10.1f}"
            f"{_number(engine['ratio_to_reference']) if is_correct else '-':>7}"
            f"{_number(engine['tokens_per_step']):>13}{_percent(engine['acceptance_rate']):>10}"
            f"{_percent(engine['occupancy']):>11}{_percent(engine['padded_waste']):>14}"
            f"{check['mean_length']:8.1f}{check['logprob']:12.3f}"
            f"  {'ok' if is_correct else 'wrong'}"
        )
    lines += [f"{name:20}{'-':>10}  {reason}" for name, reason in result["failed"].items()]
    if result["reference"]:
        lines.append(f"ratio: of tokens per second to {result['reference']}'s, median over repeats")
    for name, engine in result["engines"].items():
        lines += [f"{name} is wrong: {problem}" for problem in engine["check"]["problems"]]
    lines += ["", "Ratios of tokens per second, median over repeats (least to most)"]
    for name, ratio in result["ratios"].items():
        values = ratio["values"]
        lines.append(f"{name:34}{ratio['median']:7.2f}  ({min(values):.2f} to {max(values):.2f})")
    return "\n".join(
        [*lines, *_phase_lines(result), *_roofline_lines(result), *_text_lines(result)]
    )


def _phase_lines(result: dict[str, Any]) -> list[str]:
    phases = {name: e["phases"] for name, e in result["engines"].items() if e["phases"]}
    if not phases:
        return []
    lines = ["", f"{'Share of time':20}" + "".join(f"{n:>10}" for n in next(iter(phases.values())))]
    for name, shares in phases.items():
        lines.append(f"{name:20}" + "".join(f"{_percent(share):>10}" for share in shares.values()))
    return lines


def _roofline_lines(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    limits = {name: e["roofline"] for name, e in result["engines"].items() if e["roofline"]}
    if not limits:
        return []
    lines = [
        "",
        f"Roofline: copy {machine['copy_rate'] / 1e9:.1f} GB/s, {result['dtype']} product "
        f"{machine['matmul_rate'] / 1e9:.0f} GFLOP/s; weights, keys and values only",
        f"{'':20}{'ms/step':>10}{'MB/step':>10}{'GFLOP/step':>12}{'of copy':>10}{'of product':>12}",
    ]
    for name, limit in limits.items():
        lines.append(
            f"{name:20}{limit['seconds_per_step'] * 1e3:10.1f}{limit['bytes_per_step'] / 1e6:10.1f}"
            f"{limit['flops_per_step'] / 1e9:12.2f}{_percent(limit['share_of_copy']):>10}"
            f"{_percent(limit['share_of_matmul']):>12}"
        )
    return lines


def _text_lines(result: dict[str, Any]) -> list[str]:
    outputs = result["outputs"]
    base = outputs["compared_with"]
    lines = ["", f"Completions: {outputs['num_completions']}, of which differ from {base}'s"]
    for name, num in outputs["differing"].items():
        ties = result["engines"][name]["check"]["num_ties"]
        near = f" ({ties} tokens tie with the model's first)" if ties else ""
        if name != base or near:
            lines.append(f"{name:20}{num}{near}")
    return lines


def overview(results: Sequence[dict[str, Any]]) -> str:
    """Tokens per second of every engine at every width, wrong ones marked, and at its best."""
    widths = [result["stream_width"] for result in results]
    names = list(dict.fromkeys(name for result in results for name in result["engines"]))
    lines, best = ["Tokens per second by stream width"], {}
    lines.append(f"{'':20}" + "".join(f"{width:>12}" for width in widths) + f"{'best':>12}")
    for name in names:
        cells, speeds = [], []
        for result in results:
            engine = result["engines"].get(name)
            if engine is None:
                cells.append("-")
            elif not engine["check"]["is_correct"]:
                cells.append("wrong")
            else:
                speeds.append(engine["tokens_per_second"])
                cells.append(f"{speeds[-1]:.1f}")
        if speeds:
            best[name] = max(speeds)
        cells.append(f"{best[name]:.1f}" if speeds else "-")
        lines.append(f"{name:20}" + "".join(f"{cell:>12}" for cell in cells))
    peers = [name for name in best if name not in OWN]
    if peers:
        peer = max(peers, key=best.__getitem__)
        lines += ["", f"Each at its best width, to {peer}"]
        lines += [f"{n:34}{best[n] / best[peer]:7.2f}" for n in best if n != peer]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
