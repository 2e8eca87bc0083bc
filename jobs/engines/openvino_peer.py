# SPDX-License-Identifier: Apache-2.0
"""OpenVINO GenAI for the benchmark: `openvino` as it is, `openvino-lookup` with prompt lookup.

Runs in an environment of its own (`make bench-peers`), on CPUs only. The checkpoint is converted when it
is loaded. A prompt's completions are one request where that can be, since its prompt is computed once
then; how many are in flight is up to the engine, whatever `stream_width` says.

Used by: `jobs.engines.registry`.
"""

import os
import tempfile
from typing import Any

from jobs.engines.protocol import Draw, Drawer, Load, Run, cut, serve, timed

_PRECISION = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_CACHE_GIB = 1
_LOOKUP = {"num_assistant_tokens": 5, "max_ngram_size": 3}
"""The lengths that OpenVINO's own sample uses."""


def load(what: Load) -> Drawer:
    """The engine in this process.

    Raises: ValueError for what it cannot do.
    """
    settings = what.settings
    if what.device != "cpu" or what.dtype not in _PRECISION or settings["min_p"]:
        raise ValueError("it runs on CPUs, in bfloat16, float16 or float32, and without min_p")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np
    import openvino  # type: ignore[import-not-found]
    import openvino_genai as genai  # type: ignore[import-not-found]
    from optimum.exporters.openvino import main_export  # type: ignore[import-not-found]

    looks_up = what.engine == "openvino-lookup"
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = what.stream_width
    scheduler.cache_size = _CACHE_GIB
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _PRECISION[what.dtype],
        "INFERENCE_NUM_THREADS": what.num_threads,
    }
    if looks_up:
        properties["prompt_lookup"] = True
    with tempfile.TemporaryDirectory(prefix="openvino-") as folder:
        main_export(
            what.model,
            folder,
            task="text-generation-with-past",
            convert_tokenizer=True,  # not used, but it does not load without
            trust_remote_code=settings["trust_remote_code"],
        )
        pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)

    is_greedy = settings["temperature"] == 0
    forks = not is_greedy and not looks_up

    def configure(draw: Draw, seed: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = draw.max_length
        config.rng_seed = seed
        config.do_sample = not is_greedy
        if not is_greedy:
            config.temperature = settings["temperature"]
            config.top_k = settings["top_k"]
            config.top_p = settings["top_p"]
        if forks:
            config.num_return_sequences = draw.num_completions
        if looks_up:
            for name, value in _LOOKUP.items():
                setattr(config, name, value)
        config.ignore_eos = not what.end_token_ids
        if what.end_token_ids:
            config.eos_token_id = what.end_token_ids[0]
            config.stop_token_ids = set(what.end_token_ids)
        return config

    def draw(draw: Draw) -> Run:
        num = draw.num_completions
        prompts = [prompt for prompt in draw.prompts for _ in range(1 if forks else num)]
        inputs = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        configs = [configure(draw, draw.seed * len(inputs) + at) for at in range(len(inputs))]
        drawn: list[list[int]] = []

        def body() -> None:
            for result in pipeline.generate(inputs, configs):
                drawn.extend(cut(ids, what.end_token_ids) for ids in result.m_generation_ids)

        run = Run()
        run.seconds = timed(body)
        run.completions = [drawn[at : at + num] for at in range(0, len(drawn), num)]
        return run

    return draw


if __name__ == "__main__":
    serve(load)
