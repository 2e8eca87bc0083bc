# SPDX-License-Identifier: Apache-2.0
"""transformers for the benchmark: `generate` on padded batches, or its continuous batching.

`transformers`: left-padded batches of as many rows as slots, all completions of a prompt after one
another. `transformers-batch`: `generate_batch`.

Used by: `jobs.engines.registry`.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from jobs.engines.protocol import Draw, Drawer, Load, Run, cut, serve, timed


def load(what: Load) -> Drawer:
    """The same weights with sdpa attention, drawing as the benchmark's settings say."""
    torch.set_num_threads(what.num_threads)
    dtype = getattr(torch, what.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        what.model,
        dtype=dtype,
        attn_implementation="sdpa",
        trust_remote_code=what.settings["trust_remote_code"],
    )
    # The checkpoint's own settings would fill in whatever is not given.
    model.generation_config = GenerationConfig(**_drawing(what))
    model.to(what.device).eval()
    is_continuous = what.engine.endswith("-batch")

    def draw(draw: Draw) -> Run:
        torch.manual_seed(draw.seed)
        rows = [list(ids) for ids in draw.prompts for _ in range(draw.num_completions)]
        run = Run()
        drawn: list[list[int]] = []

        def body() -> None:
            if is_continuous:
                drawn.extend(_generate_batch(model, rows, draw.max_length, what))
            else:
                drawn.extend(_generate(model, rows, draw.max_length, what, run))

        run.seconds = timed(body)
        if not is_continuous:
            run.num_busy_slots = sum(map(len, drawn))
        num = draw.num_completions
        run.completions = [drawn[at : at + num] for at in range(0, len(drawn), num)]
        return run

    return draw


def _drawing(what: Load) -> dict[str, Any]:
    settings = what.settings
    common: dict[str, Any] = {"eos_token_id": list(what.end_token_ids) or None, "pad_token_id": 0}
    if settings["temperature"] == 0:
        return {**common, "do_sample": False}
    return {
        **common,
        "do_sample": True,
        "temperature": settings["temperature"],
        "top_k": settings["top_k"],
        "top_p": settings["top_p"],
        "min_p": settings["min_p"] or None,
    }


def _generate(
    model: Any, rows: list[list[int]], max_length: int, what: Load, run: Run
) -> list[list[int]]:
    result = []
    run.num_steps = run.num_rows = 0
    width = what.stream_width
    for batch in (rows[at : at + width] for at in range(0, len(rows), width)):
        longest = max(map(len, batch))
        padding = [longest - len(row) for row in batch]
        ids = [[0] * num + row for num, row in zip(padding, batch, strict=True)]
        mask = [[0] * num + [1] * (longest - num) for num in padding]
        with torch.inference_mode():
            output = model.generate(
                torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_length,
            )
        drawn = output[:, longest:].tolist()
        run.num_steps += len(drawn[0])
        run.num_rows += len(drawn) * len(drawn[0])
        result += [cut(tokens, what.end_token_ids) for tokens in drawn]
    return result


def _generate_batch(
    model: Any, rows: list[list[int]], max_length: int, what: Load
) -> list[list[int]]:
    from transformers import ContinuousBatchingConfig

    outputs = model.generate_batch(
        inputs=rows,
        generation_config=GenerationConfig(max_new_tokens=max_length, **_drawing(what)),
        continuous_batching_config=ContinuousBatchingConfig(
            max_requests_per_batch=what.stream_width
        ),
    )
    if len(outputs) != len(rows):
        raise RuntimeError(f"generate_batch drew {len(outputs)} of {len(rows)} completions")
    # In the order of the rows.
    return [cut(output.generated_tokens, what.end_token_ids) for output in outputs.values()]


if __name__ == "__main__":
    serve(load)
