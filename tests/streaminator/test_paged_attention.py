# SPDX-License-Identifier: Apache-2.0
"""The paged kernels against float64: in Triton's interpreter, or on the card if there is one."""

from dataclasses import replace

import pytest
import torch

from streaminator.config import EngineConfig, ModelConfig, SamplingParams, SpeculatorConfig
from streaminator.engine import paged_attention, paged_trial
from streaminator.engine.attention import LayerCall
from streaminator.engine.batch import MOST_SHORT, AttentionGroup
from streaminator.engine.kv_cache import LayerShape
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.paged_attention import attend_paged, has_triton
from streaminator.engine.paged_trial import why_not_paged
from tests.fakes import draw, make_prompt, random_tokens, save_model

needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BLOCK = 16
SPLIT = 512 if torch.cuda.is_available() else 256  # see `interpreter`
SPLIT_EDGES = [0, BLOCK - 1, SPLIT - 1, SPLIT, 2 * SPLIT - 3, 600]
"""Positions of first queries."""


pytestmark = pytest.mark.usefixtures("interpreter")


class Case:
    """Random keys of sequences that lie scattered over a cache, and queries at their ends."""

    def __init__(
        self, contexts, lengths, *, dtype=torch.float32, num_kv_heads=1, num_groups=3, key_dim=64,
        value_dim=None, own=False, window=None, softcap=None, seed=0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        value_dim = value_dim or key_dim
        num_blocks = max(
            -(-(context + length) // BLOCK)
            for context, length in zip(contexts, lengths, strict=True)
        )
        order = torch.randperm(len(contexts) * num_blocks, generator=generator) + 1
        rows = torch.full((len(contexts), max(lengths)), -1)
        positions, is_valid = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        self.num_rows = 0
        for line, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
            rows[line, :length] = torch.arange(self.num_rows, self.num_rows + length)
            positions[line, :length] = torch.arange(context, context + length)
            is_valid[line, :length] = True
            self.num_rows += length
        # As the models lay them out: heads of a token side by side, more rows than are used.
        num_tokens = self.num_rows + 3
        self.query = random(num_tokens, num_kv_heads * num_groups, key_dim)
        self.key = random(num_tokens, num_kv_heads, key_dim)
        self.value = random(num_tokens, num_kv_heads, value_dim)
        self.pools = (
            random(len(order) + 1, BLOCK, num_kv_heads, key_dim),
            random(len(order) + 1, BLOCK, num_kv_heads, value_dim),
        )
        self.group = AttentionGroup(
            rows.to(DEVICE),
            order.view(len(contexts), num_blocks).to(DEVICE),
            positions.to(DEVICE),
            None,
            has_own_keys=own,
        )
        self.is_valid = is_valid
        self.options = {"scale": key_dim**-0.5, "window": window, "softcap": softcap}

    def run(self, group=None):
        shape = (*self.query.shape[:2], self.value.shape[-1])
        output = torch.full(shape, 7.0, dtype=self.query.dtype, device=DEVICE)
        attend_paged(
            output, self.query, self.key, self.value, self.pools, group or self.group,
            **self.options,
        )  # fmt: skip
        return output

    def expected(self):
        """Each row by itself, in float64; rows that are nobody's keep what they have."""
        query, key, value, *pools = (
            x.double().cpu() for x in (self.query, self.key, self.value, *self.pools)
        )
        rows, table, positions = (
            x.cpu() for x in (self.group.rows, self.group.block_table, self.group.query_positions)
        )
        scale, window, softcap = self.options.values()
        num_groups = query.shape[1] // key.shape[1]
        output = query.new_full((*query.shape[:2], value.shape[-1]), 7.0)
        for line, column in self.is_valid.nonzero().tolist():
            row, position = rows[line, column], positions[line, column]
            first = 0 if window is None else max(position - window + 1, 0)
            keys, values = (
                pool[table[line]].flatten(0, 1)[first : position + 1].clone() for pool in pools
            )
            if self.group.has_own_keys:
                keys[-1], values[-1] = key[row], value[row]
            keys, values = (x.repeat_interleave(num_groups, 1) for x in (keys, values))
            scores = torch.einsum("nh,lnh->nl", query[row], keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            output[row] = torch.einsum("nl,lnv->nv", scores.softmax(-1), values)
        return output

    def check(self):
        tolerance = TOLERANCE[self.query.dtype]
        torch.testing.assert_close(
            self.run().double().cpu(), self.expected(), rtol=tolerance, atol=tolerance
        )


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "num_groups", "key_dim", "value_dim"),
    [
        (torch.float32, 1, 64, 64),
        (torch.float32, 3, 80, 80),
        (torch.float32, 4, 128, 128),
        (torch.float32, 3, 32, 16),
        (torch.float16, 4, 64, 64),
        (torch.bfloat16, 1, 128, 128),
        (torch.bfloat16, 3, 80, 80),
    ],
    ids=str,
)
def test_drafts_of_every_length_see_their_keys_and_no_others(dtype, num_groups, key_dim, value_dim):
    Case(
        [*SPLIT_EDGES, 5, 100, 37],
        range(1, 10),
        dtype=dtype,
        num_groups=num_groups,
        key_dim=key_dim,
        value_dim=value_dim,
    ).check()


@needs_triton
@pytest.mark.parametrize("context", [0, SPLIT - 20])
def test_a_chunk_of_a_prompt_takes_several_tiles(context):
    Case([context, 3], [40, 33], num_groups=3).check()


@needs_triton
def test_a_long_chunk_goes_in_pieces(monkeypatch):
    case = Case([SPLIT - 10, 3], [20, 12], num_groups=1)
    whole = case.run()
    monkeypatch.setattr("streaminator.engine.paged_attention._MOST_PART_BYTES", 8_000)
    assert torch.equal(case.run(), whole)
    case.check()


@needs_triton
def test_many_sequences_go_in_pieces(monkeypatch):
    case = Case([SPLIT + 9, 3, 40, SPLIT - 1, 7], [3, 1, 4, 2, 4], num_groups=1)
    whole = case.run()
    # Of two splits, two heads and 64 numbers: two sequences of four queries at a time.
    monkeypatch.setattr("streaminator.engine.paged_attention._MOST_PART_BYTES", 0)
    monkeypatch.setattr("streaminator.engine.paged_attention.MOST_SHORT", 11)
    assert [lines.stop for lines, _ in paged_attention._pieces(5, 4, 1040)] == [2, 4, 6]
    assert torch.equal(case.run(), whole)
    case.check()


@pytest.mark.parametrize(
    ("num_lines", "num_queries"), [(1, 1), (64, 1), (64, 17), (63, 9), (3, 40), (1, 2000), (2, 999)]
)
@pytest.mark.parametrize("bytes_per_query", [0, 5_000, 500_000, 2**23])
def test_pieces_are_all_there_is_and_read_the_keys_of_a_draft_once(
    num_lines, num_queries, bytes_per_query
):
    count = torch.zeros(num_lines, num_queries)
    reads = torch.zeros(num_lines)
    for lines, queries in paged_attention._pieces(num_lines, num_queries, bytes_per_query):
        count[lines, queries] += 1
        reads[lines] += 1
        num = (lines.stop - lines.start) * (queries.stop - queries.start)
        assert num * bytes_per_query <= max(2**26, MOST_SHORT * bytes_per_query)
    assert (count == 1).all()
    if num_queries <= MOST_SHORT or not bytes_per_query:
        assert (reads == 1).all()


@needs_triton
@pytest.mark.parametrize("window", [1, 16, 17, SPLIT, 300])
def test_a_window_hides_what_lies_before_it(window):
    Case(SPLIT_EDGES, [4] * len(SPLIT_EDGES), window=window).check()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_capped(dtype):
    Case(SPLIT_EDGES, [2] * len(SPLIT_EDGES), dtype=dtype, softcap=1.5, window=90).check()


@needs_triton
@pytest.mark.parametrize("window", [None, 20])
def test_second_choices_see_their_own_key_and_leave_the_cache_alone(window):
    case = Case(SPLIT_EDGES, [1] * len(SPLIT_EDGES), own=True, window=window, num_kv_heads=2)
    before = [pool.clone() for pool in case.pools]
    case.check()
    assert all(map(torch.equal, case.pools, before))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_the_same_in_any_batch(dtype):
    """Alone, as the last of a draft, with fewer and with more splits than it needs."""
    case = Case(SPLIT_EDGES, [9, 1, 8, 2, 7, 3], dtype=dtype, num_groups=2)
    together = case.run()
    group = case.group
    for line, column in case.is_valid.nonzero().tolist()[::3]:
        row, position = group.rows[line, column].item(), group.query_positions[line, column].item()
        alone = replace(
            group,
            rows=group.rows[line : line + 1, column : column + 1],
            query_positions=group.query_positions[line : line + 1, column : column + 1],
            block_table=group.block_table[line : line + 1, : position // BLOCK + 1].contiguous(),
        )
        assert torch.equal(case.run(alone)[row], together[row])


@needs_triton
def test_a_second_choice_equals_the_row_that_it_stands_for():
    """Its own key in the first choice's place, or already in the cache: the same bits."""
    case = Case([300, 20], [1, 1])
    for line, row in enumerate(case.group.rows[:, 0].tolist()):
        position = case.group.query_positions[line, 0].item()
        block = case.group.block_table[line, position // BLOCK]
        for pool, new in zip(case.pools, (case.key, case.value), strict=True):
            pool[block, position % BLOCK] = new[row]
    expected = case.run()
    for line, position in enumerate(case.group.query_positions[:, 0].tolist()):
        for pool in case.pools:
            pool[case.group.block_table[line, position // BLOCK], position % BLOCK] = torch.nan
    assert torch.equal(case.run(replace(case.group, has_own_keys=True)), expected)


@needs_triton
def test_what_lies_behind_a_sequence_is_not_read():
    case = Case([600, 20], [3, 1])
    for pool in case.pools:
        pool[case.group.block_table[1, 2:]] = torch.nan
        pool[case.group.block_table[1, 1], 5:] = torch.nan
    case.check()


CALL = LayerCall(6, LayerShape(2, 64, 64), torch.float32, None, None, None)


@needs_triton
@pytest.mark.parametrize(
    "call",
    [
        CALL,
        replace(CALL, dtype=torch.bfloat16, scaling=0.3),
        replace(CALL, sliding_window=4096, softcap=50.0, shape=LayerShape(2, 32, 16)),
    ],
)
def test_kernels_that_are_right_are_used(call):
    assert why_not_paged([call], BLOCK, DEVICE) is None


@needs_triton
def test_kernels_that_are_wrong_or_do_not_run_are_not_used(monkeypatch):
    assert "float64" in why_not_paged([replace(CALL, dtype=torch.float64)], BLOCK, DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(
            "streaminator.engine.attention.attend_paged", lambda output, *_, **__: output.fill_(1)
        )
        assert "off by" in why_not_paged([CALL], BLOCK, DEVICE)

    def fails(*args, **kwargs):
        raise RuntimeError("no C compiler\nat all")

    monkeypatch.setattr("streaminator.engine.attention.attend_paged", fails)
    assert "(RuntimeError: no C compiler)" in why_not_paged([CALL], BLOCK, DEVICE)
    monkeypatch.setattr(paged_trial, "has_triton", lambda: False)
    assert "not installed" in why_not_paged([CALL], BLOCK, DEVICE)


def runner_of(folder, *, paged, dtype="float32"):
    return ModelRunner(
        ModelConfig(model_name=str(folder), dtype=dtype, device="cuda", paged_attention=paged)
    )


@needs_triton
@needs_card
@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
def test_the_engine_draws_the_same_with_paged_attention(architecture, tmp_path):
    """In float32 both paths are near enough to each other that these tokens do not flip."""
    folder = save_model(tmp_path, architecture, dtype=torch.float32)
    prompts = [make_prompt(f"p{n}", random_tokens(n, seed=n), 4) for n in (3, 31, 300)]
    drawn = []
    for paged in (True, False):
        runner = runner_of(folder, paged=paged)
        drawn.append(
            draw(
                runner,
                prompts,
                sampling=SamplingParams(temperature=0.8, max_length=24, ignore_eos=True),
                engine=EngineConfig(stream_width=3),
                speculator=SpeculatorConfig(),
            )
        )
        assert runner.is_paged is paged
    tokens = [{key: c.token_ids for key, c in each.items()} for each in drawn]
    assert tokens[0] == tokens[1]
