# SPDX-License-Identifier: Apache-2.0
"""Stored distributions: whole, exact, and enough to rebuild a prompt's memory as it was."""

import random
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from streaminator.config import SpeculatorConfig
from streaminator.data.finished import read_distributions, read_finished
from streaminator.data.parquet import (
    COMPLETIONS,
    PartWriter,
    completion_row,
)
from streaminator.engine.engine import Engine
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.sampler import sample
from streaminator.errors import ConfigError, OutputError
from streaminator.grading import Grade
from streaminator.sequence import Completion, Distributions
from streaminator.speculative.memory import Memory
from streaminator.speculative.memory_store import MemoryStore
from tests.fakes import Draws, drain, draw, make_engine, make_prompt, random_tokens, sampling

STORING = SpeculatorConfig(store_distributions=True, num_top_tokens=5)
ENDING = sampling(temperature=0.3, stop_token_ids=(5, 77), max_length=60)
PROMPTS = [make_prompt(f"p{n}", random_tokens(n, seed=n), 4) for n in (4, 19)]


def write(run: Path, completions: list[Completion]) -> str:
    writer = PartWriter(
        str(run / "completions"), COMPLETIONS, writer_id="a", max_rows=999, max_seconds=999
    )
    with writer:
        for completion in completions:
            row = completion_row(
                completion,
                grade=Grade(answer=None, gold=None, is_correct=None),
                worker_id="w",
                node="n",
                attempt=1,
                logprobs=False,
            )
            writer.write(row)
    return str(run)


def distributions(completion: Completion) -> Distributions:
    assert completion.distributions is not None
    return completion.distributions


@pytest.fixture(scope="module")
def drawn(llama: ModelRunner) -> Draws:
    return draw(llama, PROMPTS, sampling=ENDING, speculator=STORING)


def test_distributions_survive_the_round_trip_bit_by_bit(tmp_path: Path, drawn: Draws) -> None:
    run = write(tmp_path, list(drawn.values()))
    kept = read_distributions(run, {"p4", "p19"})
    assert {(name, index) for name in kept for index in kept[name]} == set(drawn)
    for (name, index), completion in drawn.items():
        read, made = kept[name][index], distributions(completion)
        assert read.top_ids.dtype == np.int32
        assert read.top_probs.dtype == np.float32
        assert read.top_ids.shape == (len(completion.token_ids), 5)
        assert (read.top_ids == made.top_ids).all()
        assert (read.top_probs == made.top_probs).all()
        assert read.step_lengths == made.step_lengths
        assert read.rejected_lengths == made.rejected_lengths
        for field in ("rejected_ids", "rejected_top_ids", "rejected_top_probs"):
            assert getattr(read, field).tolist() == getattr(made, field).tolist()
    assert any(max(distributions(c).step_lengths) > 1 for c in drawn.values())
    assert any(sum(distributions(c).rejected_lengths) > 1 for c in drawn.values())
    assert set(read_distributions(run, {"p4"})) == {"p4"}


@pytest.mark.parametrize("accepted", [[1, 1], [1, 0, 2]], ids=["stopped", "failed"])
def test_a_last_step_that_drew_more_than_it_kept_is_read_as_what_it_kept(
    tmp_path: Path, drawn: Draws, accepted: list[int]
) -> None:
    completion = drawn["p4", 0]
    top = distributions(completion)
    cut = replace(
        top,
        top_ids=top.top_ids[:3],
        top_probs=top.top_probs[:3],
        rejected_ids=top.rejected_ids[:0],
        rejected_top_ids=top.rejected_top_ids[:0],
        rejected_top_probs=top.rejected_top_probs[:0],
        rejected_lengths=(0, 0),
    )
    tokens = completion.token_ids[:3]
    short = replace(completion, token_ids=tokens, accepted=accepted, distributions=cut)
    kept = read_distributions(write(tmp_path, [short]), {"p4"})
    assert kept["p4"][0].step_lengths == (2, 1)


def test_duckdb_reads_one_list_per_token(tmp_path: Path, drawn: Draws) -> None:
    parts = write(tmp_path, list(drawn.values())) + "/completions/*.parquet"
    query = f"""SELECT count(*) FROM (
        SELECT num_completion_tokens AS num, top_ids, top_probs FROM '{parts}')
        WHERE len(top_ids) = num AND len(top_probs) = num AND len(top_ids[num]) = 5
        AND list_sum(top_probs[num]) <= 1.0001 AND top_probs[1][1] >= top_probs[1][2]"""
    assert duckdb.sql(query).fetchall() == [(8,)]


def test_without_the_flag_the_columns_are_null(tmp_path: Path, llama: ModelRunner) -> None:
    completions = draw(llama, PROMPTS, sampling=ENDING, speculator=SpeculatorConfig())
    run = write(tmp_path, list(completions.values()))
    query = f"SELECT count(top_ids), count(top_probs), count(*) FROM '{run}/*/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(0, 0, 8)]
    assert read_distributions(run, {"p4", "p19"}) == {}


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize(
    "speculator",
    [
        SpeculatorConfig(),
        SpeculatorConfig(generation_training=False),
        SpeculatorConfig(speculator="ngram"),
        SpeculatorConfig(spec_decoding=False),
    ],
    ids=["memory", "prompt_only", "ngram", "off"],
)
def test_storing_changes_neither_tokens_nor_drafts(
    llama: ModelRunner, temperature: float, speculator: SpeculatorConfig
) -> None:
    drawn = sampling(temperature=temperature)
    plain = draw(llama, PROMPTS, sampling=drawn, speculator=speculator)
    storing = replace(speculator, store_distributions=True)
    stored = draw(llama, PROMPTS, sampling=drawn, speculator=storing)
    for key, completion in stored.items():
        assert completion.token_ids == plain[key].token_ids
        assert completion.drafted == plain[key].drafted
        top = distributions(completion)
        assert top.top_ids.shape == top.top_probs.shape == (len(completion.token_ids), 8)
        if temperature == 0:
            assert top.top_ids[:, 0].tolist() == completion.token_ids


def test_greedy_distributions_are_the_models_own() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    drawn = sample(logits, torch.tensor([1]), torch.tensor([0]), sampling(temperature=0), 2)
    assert drawn.top_ids.tolist() == [[1, 2]]
    assert drawn.top_probs[0].tolist() == pytest.approx(logits.softmax(-1)[0, [1, 2]].tolist())


def everywhere(memory: Memory, prompt_id: str, texts: list[list[int]], prompt: list[int]) -> list:
    """Drafts (with their survival) at every place of the texts, under two noise keys."""
    answers = []
    for text in texts:
        for end in range(len(text)):
            handle = memory.start(prompt_id, prompt + text[:end], end % 2)
            tokens, survival = memory.draft(np.array([handle]), np.array([4]))
            memory.finish(handle)
            answers.append((tokens.tolist(), survival.tolist()))
    return answers


def test_a_resumed_prompts_memory_drafts_as_if_never_interrupted(
    tmp_path: Path, llama: ModelRunner
) -> None:
    # One memory for all, so that what is learned across prompts (how to mix) is the same.
    [prompt] = PROMPTS[1:]
    speculator = replace(STORING, shared_memory=False)
    engine: Engine = make_engine(llama, sampling=ENDING, speculator=speculator)
    engine.add(prompt)
    done: list[Completion] = []
    while len(done) < 3:
        done += engine.step()
    run = write(tmp_path, done)
    read, kept = read_finished(run)["p19"], read_distributions(run, {"p19"})["p19"]
    finished = [read[index] for index in range(3)]
    assert isinstance(engine.store, MemoryStore)
    memory = engine.store._memory
    memory.min_survival = 0
    memory.open("rebuilt", prompt.token_ids, finished, [kept[index] for index in range(3)])
    memory.open("tokens only", prompt.token_ids, finished)
    start = list(prompt.token_ids)
    live = everywhere(memory, "p19", finished, start)
    assert everywhere(memory, "rebuilt", finished, start) == live
    assert everywhere(memory, "tokens only", finished, start) != live


def said(seed: int, num: int, vocabulary: int, num_top: int) -> tuple[list[int], Distributions]:
    """A text with a distribution at each place, in steps of 1 to 9 tokens."""
    rng, steps = np.random.default_rng(seed), random.Random(seed)
    top_ids = np.stack([rng.permutation(vocabulary)[:num_top] for _ in range(num)])
    top_probs = np.sort(rng.dirichlet(np.full(num_top, 0.3), num), axis=1)[:, ::-1]
    lengths: list[int] = []
    while sum(lengths) < num:
        lengths.append(min(steps.randint(1, 9), num - sum(lengths)))
    rejected = [steps.randint(0, 3) for _ in lengths]
    kept = Distributions(
        top_ids=top_ids.astype(np.int32),
        top_probs=top_probs.astype(np.float32),
        step_lengths=tuple(lengths),
        rejected_ids=rng.integers(0, vocabulary, sum(rejected)).astype(np.int32),
        rejected_top_ids=rng.permuted(
            np.tile(np.arange(vocabulary, dtype=np.int32), (sum(rejected), 1)), axis=1
        )[:, :num_top],
        rejected_top_probs=rng.dirichlet(np.full(num_top, 0.3), sum(rejected)).astype(np.float32),
        rejected_lengths=tuple(rejected),
    )
    return top_ids[:, 0].tolist(), kept


@pytest.mark.parametrize("max_mib", [1, 64])
def test_a_rebuilt_memory_is_exact_where_lists_overflow_and_tables_are_full(max_mib: int) -> None:
    memory = Memory(max_bytes=max_mib << 20, shared=False, noise=True, min_survival=0)
    memory.open("live", [1, 2], ())
    texts = []
    for seed in range(3):
        tokens, kept = said(seed, num=300, vocabulary=40, num_top=16)
        texts.append((tokens, kept))
        handle, first, first_rejected = memory.start("live", [1, 2], seed), 0, 0
        for length, num in zip(kept.step_lengths, kept.rejected_lengths, strict=True):
            rows = slice(first, first + length)
            others = slice(first_rejected, first_rejected + num)
            new = np.array(tokens[rows], np.int64)
            ids = np.concatenate([kept.top_ids[rows], kept.rejected_top_ids[others]])
            probs = np.concatenate([kept.top_probs[rows], kept.rejected_top_probs[others]])
            memory.commit(
                np.array([handle]), new, np.array([length]), ids.astype(np.int64), probs,
                kept.rejected_ids[others].astype(np.int64), np.array([num]),
            )  # fmt: skip
            first, first_rejected = rows.stop, others.stop
        memory.finish(handle)
    finished = [tokens for tokens, _ in texts]
    memory.open("rebuilt", [1, 2], finished, [kept for _, kept in texts])
    live = everywhere(memory, "live", finished, [1, 2])
    assert everywhere(memory, "rebuilt", finished, [1, 2]) == live


def test_completions_without_distributions_are_learned_as_tokens() -> None:
    memory = Memory(max_bytes=4 << 20, shared=False, min_survival=0)
    (first, kept), (second, _) = said(0, 50, 30, 4), said(1, 50, 30, 4)
    memory.open("mixed", [1], [second, first], [None, kept])
    memory.open("short", [1], [first, second], [kept])
    memory.open("none", [1], [first, second])
    answers = [everywhere(memory, name, [second], [1]) for name in ("mixed", "short", "none")]
    assert answers[0] != answers[2] != answers[1]


def test_a_run_older_than_the_columns_is_read_as_tokens(tmp_path: Path, drawn: Draws) -> None:
    run = write(tmp_path, list(drawn.values()))
    [part] = (tmp_path / "completions").glob("*.parquet")
    newer = [name for name in COMPLETIONS.names if name.startswith("rejected_")]
    pq.write_table(pq.read_table(part).drop_columns(newer), part)
    assert read_distributions(run, {"p4"}) == {}


def test_distributions_that_do_not_fit_their_tokens_name_the_part(
    tmp_path: Path, drawn: Draws
) -> None:
    run = write(tmp_path, list(drawn.values()))
    [part] = (tmp_path / "completions").glob("*.parquet")
    table = pq.read_table(part)
    cut = [rows[:-1] for rows in table["top_probs"].to_pylist()]
    place = table.schema.get_field_index("top_probs")
    column = pa.array(cut, table.schema.field(place).type)
    pq.write_table(table.set_column(place, "top_probs", column), part)
    with pytest.raises(OutputError, match=r"part-a-000001\.parquet: damaged") as error:
        read_distributions(run, {"p4"})
    assert "\n" not in str(error.value)


def test_nothing_to_store_is_refused() -> None:
    with pytest.raises(ConfigError, match="--store_distributions with --num_top_tokens 0"):
        SpeculatorConfig(store_distributions=True, num_top_tokens=0)


def test_a_prompt_that_cannot_run_has_no_distributions(llama: ModelRunner) -> None:
    engine = make_engine(llama, speculator=STORING)
    [completion] = drain(engine, [make_prompt("empty", ())]).values()
    assert completion.error == "the prompt has no tokens"
    assert completion.distributions is None
