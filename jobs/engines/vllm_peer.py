# SPDX-License-Identifier: Apache-2.0
"""vLLM for the benchmark: `vllm` as it is, `vllm-ngram`, `vllm-suffix` (ArcticInference's trees).

Runs in the peers' environment (`make bench-peers`), which has nothing of this project's.

Used by: `jobs.engines.registry`.
"""

import os
from typing import Any

from jobs.engines.protocol import Draw, Drawer, Load, Run, cut, serve, timed

_SPECULATION: dict[str, dict[str, Any] | None] = {
    "vllm": None,
    # The lengths that vLLM's own guide uses.
    "vllm-ngram": {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    },
    "vllm-suffix": {"method": "suffix", "num_speculative_tokens": 16},
}
_GPU_SHARE = 0.3
"""Of a GPU's memory: the other engines are loaded beside it."""


def load(what: Load) -> Drawer:
    """The engine in this process; the seed is its own, as it refuses one per request on CPUs."""
    _set_environment(what)
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    settings = what.settings
    llm = LLM(
        model=what.model,
        dtype=what.dtype,
        skip_tokenizer_init=True,
        max_num_seqs=what.stream_width,
        max_model_len=what.max_prompt_length + settings["max_length"],
        speculative_config=_SPECULATION[what.engine],
        trust_remote_code=settings["trust_remote_code"],
        gpu_memory_utilization=_GPU_SHARE,
        seed=settings["seed"],
        disable_log_stats=False,  # they count the drafts
    )

    def draw(draw: Draw) -> Run:
        # What earlier runs left must not help this one.
        llm.reset_prefix_cache()
        llm.collective_rpc(_forget_suffixes)
        params = SamplingParams(
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            top_p=settings["top_p"],
            min_p=settings["min_p"],
            max_tokens=draw.max_length,
            ignore_eos=True,  # the ends are given one by one
            stop_token_ids=list(what.end_token_ids),
            detokenize=False,
        )
        num = draw.num_completions  # one request each: it refuses several where greedy
        prompts: Any = [{"prompt_token_ids": list(p)} for p in draw.prompts for _ in range(num)]
        before = _counts(llm)
        run = Run()
        drawn: list[list[int]] = []

        def body() -> None:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            drawn.extend(cut(one.outputs[0].token_ids, what.end_token_ids) for one in outputs)

        run.seconds = timed(body)
        run.completions = [drawn[at : at + num] for at in range(0, len(drawn), num)]
        if _SPECULATION[what.engine]:
            run.num_drafted, run.num_accepted = (
                after - first for after, first in zip(_counts(llm), before, strict=True)
            )
        return run

    return draw


def _set_environment(what: Load) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if what.device == "cpu":
        cores = sorted(os.sched_getaffinity(0))[: what.num_threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB


def _counts(llm: Any) -> tuple[int, int]:
    """Tokens drafted and accepted so far."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
    drafted, accepted = (int(values.get(name, 0)) for name in names)
    return drafted, accepted


def _forget_suffixes(worker: Any) -> None:
    drafter: Any = getattr(worker.model_runner, "drafter", None)
    cache = getattr(drafter, "suffix_cache", None)
    if cache is not None:
        drafter.suffix_cache = type(cache)(
            max_tree_depth=cache.max_tree_depth, max_cached_requests=cache.max_cached_requests
        )


if __name__ == "__main__":
    serve(load)
