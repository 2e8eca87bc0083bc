# SPDX-License-Identifier: Apache-2.0
"""How many completions a stream has in flight where the settings leave it open (`auto`).

The least of
- the completions that there are, and that prompts let be in flight;
- those whose keys and values find room, each taken to be half as long as it may get, as it is on
  average on its way; where all get longest at once, the scheduler lets the youngest wait;
- the narrowest stream whose tokens per second, measured, are within `_LEFT` of the best.

Drafts do not count. A step that packs T tokens costs about the same whose ever they are, and a
drafted one is worth less than a completion's next one, which is kept for certain: so where plain
steps are saturated no narrower stream with drafts is faster, and drafts fill what is left of a
stream that the first two keep narrow. Among widths that are equally fast the narrowest is best: its
prompts are finished sooner, and it takes less memory.

Used by: `engine.Engine`.
"""

from collections.abc import Mapping

from streaminator.config import EngineConfig, SamplingParams
from streaminator.engine.batch import ROW_MULTIPLE
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.step_costs import PlainSteps, measure_widths

_LEFT = 0.05
"""Share of the best tokens per second that a narrower stream may lack."""
_MOST_ON_GPU = 512
_MOST_ON_CPU = 256


def find_stream_width(
    runner: ModelRunner,
    config: EngineConfig,
    sampling: SamplingParams,
    *,
    max_prompt_length: int,
    max_in_flight: int | None,
    num_top: int,
) -> tuple[int, PlainSteps | None]:
    """Choose a stream's width, before its KV cache is made.

    Args:
        runner: the loaded model.
        config: what bounds the KV cache.
        sampling: how completions are drawn.
        max_prompt_length: tokens of the longest prompt to come.
        max_in_flight: completions that can ever be in flight at once; None: not known.
        num_top: the model's most likely tokens that a step tells.

    Returns:
        The width, and what was measured for it, if there was a choice.

    Raises: ConfigError when not one completion fits into `kv_memory`.
    """
    length = max_prompt_length + sampling.max_length // 2
    length = min(length, runner.max_model_len or length)
    most = _MOST_ON_GPU if runner.device.type == "cuda" else _MOST_ON_CPU
    if max_in_flight is not None:
        most = min(most, max_in_flight)
    most = max(min(most, runner.num_fitting(config, length)), 1)
    if most <= ROW_MULTIPLE:
        return most, None  # steps of so few rows take about as long as one of 1
    plain = measure_widths(runner, config, sampling, most=most, context=length, num_top=num_top)
    return narrowest_fast(plain.seconds), plain


def narrowest_fast(seconds: Mapping[int, float]) -> int:
    """The least width whose tokens per second are close to the best.

    Args:
        seconds: of a step without drafts, by width.
    """
    best = max(width / taken for width, taken in seconds.items())
    return min(width for width, taken in seconds.items() if width / taken >= (1 - _LEFT) * best)
