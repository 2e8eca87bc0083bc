# SPDX-License-Identifier: Apache-2.0
"""Time the memory's own work in a step, without a model.

A stream of slots at a large vocabulary: texts of Zipf-distributed tokens of which each completion
of a prompt changes some. The last completion is timed. Prints microseconds per step.

Used by: the command line (`python -m jobs.benchmark_memory`).
"""

import argparse
import sys
import time

import numpy as np

from streaminator.speculative.memory import Memory

_LENGTH, _NUM_COMPLETIONS, _NUM_PROMPT = 400, 4, 100


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
    args = parser.parse_args(arguments)
    for number in args.num_top_tokens.split(","):
        sys.stdout.write(f"{number:>2} candidates: {_time(int(number), args)}\n")
    return 0


def _time(num_top: int, args: argparse.Namespace) -> str:
    rng = np.random.default_rng(0)
    zipf = np.minimum(rng.pareto(0.6, 1 << 20) * 3, args.vocabulary - 1).astype(np.int64)
    memory = Memory(noise=num_top > 0, min_survival=args.min_survival)
    base = rng.choice(zipf, (args.width, _LENGTH))
    prompts = [row[:_NUM_PROMPT].tolist() for row in base]
    for slot, prompt in enumerate(prompts):
        memory.open(str(slot), prompt, ())
    steps: list[tuple[float, float, int, int]] = []
    for index in range(_NUM_COMPLETIONS):
        changed = rng.random(base.shape) < args.changed
        texts = np.where(changed, rng.choice(zipf, base.shape), base)
        ids = rng.choice(zipf, (*base.shape, num_top))
        ids[..., :1] = texts[..., None][..., : min(num_top, 1)]
        probs = -np.sort(-rng.dirichlet(np.full(max(num_top, 1), 0.1), base.shape))
        probs = probs[..., :num_top].astype(np.float32)
        handles = np.array(
            [memory.start(str(n), prompts[n], n * 8 + index) for n in range(args.width)]
        )
        positions = np.zeros(args.width, np.int64)
        steps.clear()
        while (positions + args.cap + 1 < _LENGTH).all():
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
