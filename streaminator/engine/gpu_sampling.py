# SPDX-License-Identifier: Apache-2.0
"""Draw tokens on a GPU by own kernels, without filters; a row draws the same in any batch.

With PyTorch a row is read some ten times, and written to as often: of a vocabulary of 128k 64 rows
take a tenth of a 3B model's forward. And PyTorch adds up a row in another order where there
are few of them.

Used by: `model_runner`.
"""

import importlib
from typing import Any

import torch

from streaminator.config import SamplingParams
from streaminator.engine.batch import next_power
from streaminator.engine.device import check_card, on_device
from streaminator.engine.sampler import Drawn, sample, to_host
from streaminator.errors import kind_and_line

_GROUP = 64
"""Tokens whose maximum is looked for first."""
_GROUPS = 64
"""In a piece of a row; as many as there are candidates at most."""
_BLOCK = 8192
"""Tokens of a row that are looked at together where none of the candidates is drawn."""
_TRIED_ROWS = 64


def _kernels() -> Any:
    return importlib.import_module("streaminator.engine.sampling_kernels")


class GpuSampling:
    """Takes the place of the code in PyTorch; see `sampler.sample`."""

    def __init__(self, dtype: torch.dtype) -> None:
        """For logits of `dtype`."""
        self.dtype = dtype

    def sample(
        self,
        logits: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
        *,
        temperature: float,
        num_candidates: int,
        num_top: int,
    ) -> Drawn:
        """Draw a token for each row.

        Args:
            logits: [R, V].
            keys: [R] int64.
            positions: [R] int64.
            temperature: 0 takes the most likely token.
            num_candidates: C, at most 64, and V.
            num_top: M, at most C.
        """
        logits, keys, positions = (x.contiguous() for x in (logits, keys, positions))
        num_rows, size = logits.shape
        num_pieces = -(-size // (_GROUPS * _GROUP))
        is_greedy = temperature == 0
        has_rest = not is_greedy and num_candidates < size
        kernels = _kernels()
        with on_device(logits.device):
            groups = keys.new_empty(num_rows, num_pieces * _GROUPS)
            tops = logits.new_empty(num_rows, num_pieces, dtype=torch.float32)
            totals = tops.new_empty(2, num_rows, num_pieces)
            warmth = 1.0 if is_greedy else float(temperature)
            kernels.scan[num_rows, num_pieces](
                groups, tops, totals, logits, size, warmth,
                GROUPS=_GROUPS, GROUP=_GROUP, num_warps=8,
            )  # fmt: skip
            if num_pieces > 1:
                groups = groups.topk(_GROUPS).values
            candidates = keys.new_empty(num_rows, _GROUPS * _GROUP)
            kernels.gather[(num_rows,)](
                candidates, groups, logits, size, GROUPS=_GROUPS, GROUP=_GROUP, num_warps=8
            )
            candidates = candidates.topk(num_candidates).values
            tokens, logprobs = torch.empty_like(keys), tops.new_empty(num_rows)
            log_totals = tops.new_empty(num_rows, dtype=torch.float64)
            top_ids = keys.new_empty(num_rows, num_top)
            top_probs = tops.new_empty(num_rows, num_top)
            kernels.draw[(num_rows,)](
                tokens, logprobs, log_totals, top_ids, top_probs, candidates, tops, totals,
                keys, positions, warmth, num_top, num_pieces,
                C=num_candidates, C_PADDED=next_power(num_candidates),
                P_PADDED=next_power(num_pieces), IS_GREEDY=is_greedy,
                HAS_REST=has_rest, num_warps=1,
            )  # fmt: skip
            if has_rest:
                kernels.settle[(num_rows,)](
                    tokens, logprobs, log_totals, candidates, logits, keys, positions, size, warmth,
                    C=num_candidates, BLOCK=_BLOCK, num_warps=16,
                )  # fmt: skip
        return Drawn(tokens, logprobs, top_ids, top_probs)

    @torch.inference_mode()
    def why_not(self, size: int, device: torch.device) -> str | None:
        """Why it cannot be used for vocabularies of `size`; None: it can.

        Whatever goes wrong in here, from a missing compiler to a wrong token, PyTorch can draw.
        """
        try:
            return self._try(size, device)
        except Exception as problem:  # noqa: BLE001 - compilers raise anything
            check_card(device)
            return f"its kernels do not run ({kind_and_line(problem)})"

    def _try(self, size: int, device: torch.device) -> str | None:
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(
            _TRIED_ROWS, size, generator=generator, dtype=torch.float32, device=device
        )
        logits = (3 * logits).to(self.dtype)
        keys = torch.arange(_TRIED_ROWS, device=device)
        for temperature in (0.0, 0.3, 0.8):
            params = SamplingParams(temperature=temperature)
            expected = to_host(sample(logits, keys, keys, params))[0]
            tokens, logprobs, *_ = to_host(sample(logits, keys, keys, params, 0, self))
            alone = to_host(sample(logits[-1:], keys[-1:], keys[-1:], params, 0, self))
            # Sums that differ in the last bit may lead to a neighbour of a token that is no candidate.
            if sum(ours != theirs for ours, theirs in zip(tokens, expected, strict=True)) > 1:
                return "its kernels draw other tokens on this card"
            if (tokens[-1:], logprobs[-1:]) != alone[:2]:
                return "a row is not the same in any batch on this card"
        return None
