# SPDX-License-Identifier: Apache-2.0
"""The closing table, as text.

Used by: `streaminator.driver`.
"""

from streaminator.data.files import join_uri
from streaminator.summary import Generation, Summary


def render(summary: Summary) -> str:
    """The closing table as plain text, one figure a line."""
    s = summary
    lines = [
        ("prompts", f"{s.num_prompts:,}"),
        ("completions", f"{s.num_completions:,}"),
        ("failed", f"{s.num_failed:,}"),
        *(("", f"{count:,} x {why.splitlines()[0]}") for why, count in s.failures.items()),
        *(
            ("" if i else "events", f"{n:,} x {kind}")
            for i, (kind, n) in enumerate(s.events.items())
        ),
        *_settled_lines(s),
        ("tokens", f"{s.num_tokens:,}"),
        ("wall time", f"{s.wall_seconds:,.1f} s"),
        ("tokens per second", _number(s.tokens_per_second, ",.1f")),
        ("accuracy", f"{_number(s.accuracy, '.1%')} of {s.num_graded:,} graded"),
        *(("", f"{count:,} x the grader {why}") for why, count in s.grader_errors.items()),
        *(
            (
                f"pass@{k}",
                f"{_number(s.pass_at_k.get(k), '.1%')}, "
                f"majority@{k} {_number(s.majority_at_k.get(k), '.1%')}",
            )
            for k in sorted(s.pass_at_k.keys() | s.majority_at_k.keys())
        ),
        ("acceptance rate", _number(s.acceptance_rate, ".1%")),
        ("tokens per step", _number(s.tokens_per_step, ".2f")),
        *(
            (
                f"  generation {g.sample_index + 1}",
                f"{_number(g.acceptance_rate, '.1%')} accepted, "
                f"{_number(g.tokens_per_step, '.2f')} tokens per step",
            )
            for g in _shown(s.generations)
        ),
        *(
            (
                "accepted of drafts" if not i else "",
                f"{c.num_accepted / c.num_drafted:.0%} of {c.num_drafted:,} given "
                f"{c.from_chance:.0%} to {c.from_chance + 0.1:.0%}",
            )
            for i, c in enumerate(s.calibration)
        ),
        ("stream width", " to ".join(str(w) for w in _ends(s.stream_widths)) or "-"),
        ("stream utilization", _number(s.stream_utilization, ".1%")),
        ("step time", ", ".join(f"{k} {v:.1%}" for k, v in s.phase_shares.items()) or "-"),
        *_bottleneck_lines(s),
        ("results", join_uri(s.path, "completions")),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in lines), "", s.query])


def _settled_lines(s: Summary) -> list[tuple[str, str]]:
    if not s.num_settled:
        return []
    share = s.num_tokens_saved / max(s.num_tokens + s.num_tokens_saved, 1)
    saved = f"about {s.num_tokens_saved:,} tokens ({share:.0%}) saved"
    text = f"{s.num_settled:,} of {s.num_settled_prompts:,} prompts not drawn, {saved}"
    return [("settled", text)]


_REMEDIES = {
    "decode": "the model itself",
    "prefill": "more completions per prompt, or a longer common preamble, would lower it",
    "tail": "more prompts, or a smaller --stream_width, would lower it",
    "overhead": "see the step time",
}


def _bottleneck_lines(s: Summary) -> list[tuple[str, str]]:
    if not s.bound_shares:
        return []
    largest = max(s.bound_shares, key=lambda name: s.bound_shares[name])
    others = ", ".join(f"{k} {v:.0%}" for k, v in s.bound_shares.items() if k != largest)
    share = f"{s.bound_shares[largest]:.0%} of the step time"
    return [("bottleneck", f"{largest}, {share} ({_REMEDIES[largest]}); {others}")]


def _ends(values: list[int]) -> list[int]:
    return values if len(values) < 2 else [values[0], values[-1]]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _shown(generations: list[Generation]) -> list[Generation]:
    last = len(generations) - 1
    return [g for i, g in enumerate(generations) if last < 16 or i == last or (i + 1) & i == 0]
