# SPDX-License-Identifier: Apache-2.0
"""Time the memory's own work in a step, without a model.

A stream of slots at a large vocabulary: texts of Zipf-distributed tokens of which each completion
of a prompt changes some, with made-up distributions; or a run's texts, with the distributions that
`--store_distributions` kept of them. The last completion is timed. Prints microseconds per step.

Used by: the command line (`python -m jobs.benchmark_memory`).
"""

import argparse
import sys
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator.config import ModelConfig
from streaminator.data.finished import read_distributions
from streaminator.engine.checkpoint import load_tokenizer
from streaminator.engine.sampler import noise_key
from streaminator.errors import DataError, StreaminatorError
from streaminator.speculative.memory import Memory
from streaminator.speculative.replay_log import Columns, encode, read_log

_LENGTH, _NUM_COMPLETIONS, _NUM_PROMPT = 400, 4, 100


class _Workload(NamedTuple):
    """Texts of `n` prompts, `c` completions of `length` tokens of each."""

    prompts: list[list[int]]
    keys: list[list[int]]
    """[n][c] of the sampler's noise."""
    texts: NDArray[np.int64]
    """[c, n, length]"""
    ids: NDArray[np.int64]
    """[c, n, length, M] the likeliest tokens at each place."""
    probs: NDArray[np.float32]
    """[c, n, length, M]"""


def main(arguments: list[str] | None = None) -> int:
    """Print one line per number of stored candidates."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark_memory", description=str(__doc__).split("\n", 1)[0]
    )
    parser.add_argument("--width", type=int, default=64, help="slots")
    parser.add_argument("--cap", type=int, default=8, help="most drafted tokens per slot")
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--num_top_tokens", default="0,16", help="stored candidates, several")
    parser.add_argument("--min_survival", type=float, default=0.0, help="0: always drafts the cap")
    parser.add_argument("--changed", type=float, default=0.15, help="share of tokens that differ")
    parser.add_argument("--run", help="a run's folder: its texts, of the prompts that said most")
    args = parser.parse_args(arguments)
    for number in args.num_top_tokens.split(","):
        try:
            workload = _of_run(int(number), args) if args.run else _made_up(int(number), args)
        except StreaminatorError as error:
            parser.exit(2, f"error: {error}\n")
        sys.stdout.write(f"{number:>2} candidates: {_time(workload, args)}\n")
    return 0


def _made_up(num_top: int, args: argparse.Namespace) -> _Workload:
    rng = np.random.default_rng(0)
    zipf = np.minimum(rng.pareto(0.6, 1 << 20) * 3, args.vocabulary - 1).astype(np.int64)
    base = rng.choice(zipf, (args.width, _LENGTH))
    shape = (_NUM_COMPLETIONS, *base.shape)
    texts = np.where(rng.random(shape) < args.changed, rng.choice(zipf, shape), base)
    ids = rng.choice(zipf, (*shape, num_top))
    ids[..., :1] = texts[..., None][..., : min(num_top, 1)]
    probs = -np.sort(-rng.dirichlet(np.full(max(num_top, 1), 0.1), shape))
    return _Workload(
        prompts=[row[:_NUM_PROMPT].tolist() for row in base],
        keys=[[n * 8 + c for c in range(_NUM_COMPLETIONS)] for n in range(args.width)],
        texts=texts,
        ids=ids,
        probs=probs[..., :num_top].astype(np.float32),
    )


def _of_run(num_top: int, args: argparse.Namespace) -> _Workload:
    """The prompts whose shortest completion is longest, all cut to the shortest.

    Raises: StreaminatorError when the folder holds no run, or too little of one.
    """
    log = read_log(args.run, Columns())
    settings = log.record.settings if log.record else {}
    name = str(settings.get("tokenizer_name") or settings.get("model_name"))
    logged = encode(log, load_tokenizer(ModelConfig(tokenizer_name=name)))
    logged = [prompt for prompt in logged if len(prompt.completions) >= _NUM_COMPLETIONS]
    logged.sort(key=lambda prompt: -min(map(len, prompt.completions[:_NUM_COMPLETIONS])))
    chosen = logged[: args.width]
    kept = read_distributions(args.run, {prompt.prompt_id for prompt in chosen})
    tops = [list(kept.get(p.prompt_id, {}).values())[:_NUM_COMPLETIONS] for p in chosen]
    stored = [top.top_ids.shape[1] for row in tops for top in row]
    length = min((len(c) for p in chosen for c in p.completions[:_NUM_COMPLETIONS]), default=0)
    is_short = len(stored) < args.width * _NUM_COMPLETIONS or length < args.cap + 2
    if is_short or min(stored) < num_top:
        raise DataError(
            f"{args.run}: must hold {_NUM_COMPLETIONS} completions of {args.width} prompts, each of "
            f"{args.cap + 2} tokens or more, drawn with --store_distributions --num_top_tokens "
            f"{max(num_top, 1)}; draw such a run, or give a smaller --width, --cap or --num_top_tokens"
        )

    def stack(arrays: list[list[NDArray]]) -> NDArray:
        return np.array([[array[:length] for array in row] for row in arrays]).swapaxes(0, 1)

    return _Workload(
        prompts=[prompt.token_ids.tolist() for prompt in chosen],
        keys=[
            [noise_key(int(settings["seed"]), p.prompt_id, c) for c in range(_NUM_COMPLETIONS)]
            for p in chosen
        ],
        texts=stack([prompt.completions[:_NUM_COMPLETIONS] for prompt in chosen]),
        ids=stack([[top.top_ids for top in row] for row in tops])[..., :num_top].astype(np.int64),
        probs=stack([[top.top_probs for top in row] for row in tops])[..., :num_top],
    )


def _time(workload: _Workload, args: argparse.Namespace) -> str:
    prompts, num_top = workload.prompts, workload.ids.shape[-1]
    memory = Memory(noise=num_top > 0, min_survival=args.min_survival)
    for slot, prompt in enumerate(prompts):
        memory.open(str(slot), prompt, ())
    steps: list[tuple[float, float, int, int]] = []
    for index, (texts, ids, probs) in enumerate(
        zip(workload.texts, workload.ids, workload.probs, strict=True)
    ):
        handles = np.array(
            [memory.start(str(n), prompts[n], workload.keys[n][index]) for n in range(args.width)]
        )
        positions = np.zeros(args.width, np.int64)
        steps.clear()
        while (positions + args.cap + 1 < texts.shape[1]).all():
            begun = time.perf_counter()
            drafts = memory.draft(handles, np.full(args.width, args.cap))
            drafted = time.perf_counter()
            taken = []
            for n in range(args.width):
                draft = drafts.tokens[n, 0, : drafts.lengths[n]]
                differs = draft != texts[n, positions[n] : positions[n] + len(draft)]
                num = (int(differs.argmax()) if differs.any() else len(draft)) + 1
                taken.append(slice(positions[n], positions[n] + num))
                positions[n] += num
            new, new_ids, new_probs = (
                np.concatenate([array[n][part] for n, part in enumerate(taken)])
                for array in (texts, ids, probs)
            )
            lengths = np.array([part.stop - part.start for part in taken])
            ready = time.perf_counter()
            if num_top:
                memory.commit(handles, new, lengths, new_ids, new_probs)
            else:
                memory.commit(handles, new, lengths)
            spent = time.perf_counter() - ready
            steps.append((drafted - begun, spent, int((drafts.survival > 0).sum()), len(new)))
        for handle in handles.tolist():
            memory.finish(handle)
    draft, commit, num_drafted, num_new = np.mean(steps, axis=0)
    middle = np.median(np.sum(np.array(steps)[:, :2], axis=1))
    return (
        f"draft {1e6 * draft:.0f} us of {num_drafted:.0f} tokens, "
        f"commit {1e6 * commit:.0f} us of {num_new:.0f}, "
        f"both {1e6 * (draft + commit):.0f} us per step (median {1e6 * middle:.0f}), "
        f"{memory.num_bytes / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    sys.exit(main())
