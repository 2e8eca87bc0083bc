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
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streaminator.cli import main_program
from streaminator.cli_replay import tokenizer_of
from streaminator.data.finished import read_distributions
from streaminator.engine.sampler import noise_key
from streaminator.errors import DataError
from streaminator.speculative.memory import Memory
from streaminator.speculative.memory_texts import number_tokens
from streaminator.speculative.replay_log import Columns, encode, read_log

_PROGRAM = "python -m jobs.benchmark_memory"
_LENGTH, _NUM_COMPLETIONS, _NUM_PROMPT = 400, 4, 100


class Workload(NamedTuple):
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
    numbers: NDArray[np.bool_] | None = None
    """[V] which tokens are parts of numbers; None: not known."""


def main(argv: Sequence[str]) -> int:
    """Print one line per number of stored candidates.

    Raises: InputError, OutputError for a run that cannot be read, or holds too little.
    """
    parser = argparse.ArgumentParser(prog=_PROGRAM, description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--width", type=int, default=64, help="slots")
    parser.add_argument("--cap", type=int, default=8, help="most drafted tokens per slot")
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--num_top_tokens", default="0,16", help="stored candidates, several")
    parser.add_argument("--min_survival", type=float, default=0.0, help="0: always drafts the cap")
    parser.add_argument("--changed", type=float, default=0.15, help="share of tokens that differ")
    parser.add_argument("--run", help="a run's folder: its texts, of the prompts that said most")
    parser.add_argument("--tokenizer_name", help="of the run; default: the one that it names")
    args = parser.parse_args(argv)
    numbers = [int(word) for word in args.num_top_tokens.split(",")]
    read = read_run(max(numbers), args) if args.run else None
    for number in numbers:
        if read is None:
            workload = _made_up(number, args)
        else:
            workload = read._replace(ids=read.ids[..., :number], probs=read.probs[..., :number])
        sys.stdout.write(f"{number:>2} candidates: {_time(workload, args)}\n")
    return 0


def _made_up(num_top: int, args: argparse.Namespace) -> Workload:
    rng = np.random.default_rng(0)
    zipf = np.minimum(rng.pareto(0.6, 1 << 20) * 3, args.vocabulary - 1).astype(np.int64)
    base = rng.choice(zipf, (args.width, _LENGTH))
    shape = (_NUM_COMPLETIONS, *base.shape)
    texts = np.where(rng.random(shape) < args.changed, rng.choice(zipf, shape), base)
    ids = rng.choice(zipf, (*shape, num_top))
    ids[..., :1] = texts[..., None][..., : min(num_top, 1)]
    probs = -np.sort(-rng.dirichlet(np.full(max(num_top, 1), 0.1), shape))
    return Workload(
        prompts=[row[:_NUM_PROMPT].tolist() for row in base],
        keys=[[n * 8 + c for c in range(_NUM_COMPLETIONS)] for n in range(args.width)],
        texts=texts,
        ids=ids,
        probs=probs[..., :num_top].astype(np.float32),
    )


def read_run(num_top: int, args: argparse.Namespace) -> Workload:
    """The prompts whose shortest completion is longest, all cut to the shortest.

    Raises: InputError, OutputError when the folder holds no run, or too little of one.
    """
    log = read_log(args.run, Columns())
    if log.record is None:
        raise DataError(f"{args.run}: has no run.json; give a run's folder")
    tokenizer = tokenizer_of(log, args.tokenizer_name)
    logged = encode(log, tokenizer, num_completions=_NUM_COMPLETIONS)
    chosen = [prompt for prompt in logged if len(prompt.completions) == _NUM_COMPLETIONS]
    chosen.sort(key=lambda prompt: -min(map(len, prompt.completions)))
    chosen = chosen[: args.width]
    length = min((len(c) for prompt in chosen for c in prompt.completions), default=0)
    drawn = [log.prompts[prompt.prompt_id].completions for prompt in chosen]
    indices = [sorted(c.sample_index or 0 for c in row)[:_NUM_COMPLETIONS] for row in drawn]
    kept = read_distributions(args.run, {p.prompt_id for p in chosen}) if num_top else {}
    pairs = [(p.prompt_id, i) for p, row in zip(chosen, indices, strict=True) for i in row]
    tops = [top for name, i in pairs if (top := kept.get(name, {}).get(i)) is not None]
    tops = [top for top in tops if top.top_ids.shape[1] >= num_top]
    is_short = len(chosen) < args.width or length < args.cap + 2
    if is_short or (num_top and len(tops) < len(pairs)):
        flags = f", drawn with --store_distributions --num_top_tokens {num_top}" if num_top else ""
        raise DataError(
            f"{args.run}: must hold {_NUM_COMPLETIONS} completions of {args.width} prompts, each of "
            f"{args.cap + 2} tokens or more{flags}; draw such a run, or give a smaller --width, "
            "--cap or --num_top_tokens"
        )
    shape = (args.width, _NUM_COMPLETIONS, length, num_top)
    ids, probs = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for place, top in enumerate(tops):
        where = divmod(place, _NUM_COMPLETIONS)
        ids[where] = top.top_ids[:length, :num_top]
        probs[where] = top.top_probs[:length, :num_top]
    for note in log.notes:
        sys.stderr.write(f"{note}\n")
    seed = int(log.record.settings["seed"])
    return Workload(
        prompts=[prompt.token_ids.tolist() for prompt in chosen],
        keys=[
            [noise_key(seed, prompt.prompt_id, index) for index in row]
            for prompt, row in zip(chosen, indices, strict=True)
        ],
        texts=np.array([[c[:length] for c in p.completions] for p in chosen]).swapaxes(0, 1),
        ids=ids.swapaxes(0, 1),
        probs=probs.swapaxes(0, 1),
        numbers=None if tokenizer is None else number_tokens(tokenizer),
    )


def _time(workload: Workload, args: argparse.Namespace) -> str:
    prompts, num_top = workload.prompts, workload.ids.shape[-1]
    memory = Memory(noise=num_top > 0, min_survival=args.min_survival, numbers=workload.numbers)
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
    sys.exit(main_program(_PROGRAM, main, advice=""))
