# SPDX-License-Identifier: Apache-2.0
"""The memory: bounded, a function of what it observed, never more than asked for."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaminator.speculative.arena import Arena
from streaminator.speculative.draft_budget import DraftBudget, StepCosts
from streaminator.speculative.memory import Memory
from streaminator.speculative.memory_noise import gumbel

SMALL = 1 << 20


def commit(memory, handle, tokens):
    for first in range(0, len(tokens), 32):
        step = np.array(tokens[first : first + 32], np.int64)
        memory.commit(np.array([handle]), step, np.array([len(step)]))


def draft(memory, handle, cap):
    drafts = memory.draft(np.array([handle]), np.array([cap]))
    [length] = drafts.lengths
    return drafts.tokens[0, 0, :length].tolist(), drafts.survival[0, 0, :length]


def text(seed, length, vocabulary=50):
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(length)]


def test_a_repeated_text_is_drafted_to_its_end():
    memory = Memory(max_bytes=SMALL, min_survival=0.02)
    prompt, completion = [1, 2, 3, 4], text(0, 60, 10_000)
    memory.open("a", prompt, [completion, completion])
    handle = memory.start("a", prompt, 0)
    commit(memory, handle, completion[:20])
    drafted, survival = draft(memory, handle, 8)
    assert drafted == completion[20 : 20 + len(drafted)]
    assert len(drafted) >= 3
    assert (np.diff(survival) <= 0).all()


def test_a_running_completion_is_learned_from_at_once():
    memory = Memory(max_bytes=SMALL, min_survival=0)
    memory.open("a", [1], ())
    handle = memory.start("a", [1], 0)
    commit(memory, handle, [5, 6, 7, 8, 5, 6])
    assert draft(memory, handle, 2)[0] == [7, 8]


def test_prompts_share_short_contexts_only_where_asked():
    for shared in (True, False):
        memory = Memory(max_bytes=SMALL, shared=shared, min_survival=0)
        memory.open("a", [1], [[5, 6, 7, 8]])
        memory.open("b", [2], ())
        handle = memory.start("b", [2], 0)
        commit(memory, handle, [5, 6])
        assert draft(memory, handle, 1)[0] == ([7] if shared else [])


def test_of_what_other_prompts_said_what_was_named_here_is_preferred():
    memory = Memory(max_bytes=SMALL, min_survival=0)
    hits = 0
    for n in range(60):
        name = 10 + n * 7 % 5
        memory.open(str(n), [name, 1], ())
        handle = memory.start(str(n), [name, 1], 0)
        commit(memory, handle, [2, 3, 4, 5])
        hits += n >= 40 and draft(memory, handle, 1)[0] == [name]
        commit(memory, handle, [name])
        memory.finish(handle)
        memory.close(str(n))
    assert hits >= 18  # of 20; by frequency 4


def test_drafting_leaves_no_trace():
    answers = []
    for num_drafts in (0, 5):
        memory = Memory(max_bytes=SMALL, min_survival=0)
        memory.open("a", [1, 2], [text(5, 60, 8)])
        handle = memory.start("a", [1, 2], 0)
        commit(memory, handle, text(6, 20, 8))
        for _ in range(num_drafts):
            draft(memory, handle, 8)
        answers.append(draft(memory, handle, 8)[0])
    assert answers[0] == answers[1]


def test_close_gives_memory_back():
    memory = Memory(max_bytes=4 * SMALL, shared=False)
    for n in range(5):
        memory.open(str(n), text(n, 200), [text(n + 9, 500)])
    assert memory.num_bytes > 0
    for n in range(5):
        memory.close(str(n))
    assert memory.num_bytes == 0
    assert memory.num_prompts == 0


def test_memory_stays_bounded_and_goes_on_drafting():
    memory = Memory(max_bytes=SMALL)
    for n in range(40):
        memory.open(str(n), text(n, 100, 100_000), [text(n + 99, 900, 100_000)])
        assert memory.num_bytes <= SMALL
    completion = text(1, 100, 100_000)
    handle = memory.start("39", [1], 0)
    commit(memory, handle, completion)
    commit(memory, handle, completion[:30])
    assert draft(memory, handle, 1)[0] == completion[30:31]
    first = memory.start("0", [1], 0)
    commit(memory, first, completion)
    assert memory.num_bytes <= SMALL


def test_a_table_that_gave_way_to_another_that_grew_is_not_grown_itself():
    # There is room for eight tables at most; all are full in the same step, the last one is the oldest.
    memory = Memory(max_bytes=SMALL, shared=False)
    for n in range(10):
        memory.open(str(n), text(n, 100, 100_000), ())
    handles = np.array([memory.start(str(n), [1], n) for n in reversed(range(10))])
    for step in range(100):
        tokens = np.concatenate([text(100 * n + step, 12, 100_000) for n in range(10)])
        memory.commit(handles, tokens, np.full(10, 12))
        assert memory.num_bytes <= SMALL
    held = [memory.has_table(str(n)) for n in range(10)]
    assert any(held)
    assert not all(held)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=40), min_size=1, max_size=4),
    caps=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    budget=st.integers(0, 12),
)
def test_drafts_keep_caps_and_budget_and_depend_on_the_observed_only(texts, caps, budget):
    answers = []
    for noise in (False, False, True):
        memory = Memory(max_bytes=SMALL, min_survival=0, noise=noise)
        handles = []
        for n in range(3):
            memory.open(str(n), [n, n + 1], texts)
            handles.append(memory.start(str(n), [n, n + 1], n))
        handles = np.array(handles)
        for tokens in texts:
            memory.commit(handles, np.array(tokens * 3), np.full(3, len(tokens)))
        drafts = memory.draft(handles, np.array(caps))
        chances = drafts.survival
        assert (np.count_nonzero(chances, axis=(1, 2)) <= caps).all()
        assert (np.diff(chances[:, 0], axis=1) <= 0).all()
        assert (chances[:, 1] <= chances[:, 0]).all()
        assert (chances <= 1).all()
        both = (chances[:, 0] > 0) & (chances[:, 1] > 0)
        assert (drafts.tokens[:, 0] != drafts.tokens[:, 1])[both].all()
        most = DraftBudget(StepCosts([budget], [1.0]))  # whatever is verified costs the same
        verified = most.cut(chances, len(handles), len(handles))
        assert verified.sum() <= budget
        assert (chances[verified] > 0).all()
        assert (verified[:, 0, 1:] <= verified[:, 0, :-1]).all()
        answers.append([drafts.tokens.tolist(), drafts.survival.tolist()])
    assert answers[0] == answers[1]


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=40), min_size=1, max_size=4))
def test_of_what_a_longer_draft_has_a_shorter_one_is_the_likeliest(texts):
    most = 16
    for noise in (False, True):
        memory = Memory(max_bytes=SMALL, min_survival=0, noise=noise)
        memory.open("a", [5, 6], texts)
        handle = np.array([memory.start("a", [5, 6], 1)])
        for tokens in texts:
            commit(memory, int(handle[0]), tokens)
        chances = [memory.draft(handle, np.array([cap])).survival for cap in range(most + 1)]
        falling = np.sort(chances[most], axis=None)[::-1]
        for cap, shorter in enumerate(chances):
            kept = np.sort(shorter[shorter > 0])[::-1]
            assert kept.tolist() == falling[falling > 0][:cap].tolist()


def test_longer_and_wider_steps_between_change_no_draft():
    answers = []
    for has_others in (False, True):
        memory = Memory(max_bytes=SMALL, shared=False, min_survival=0, noise=True)
        memory.open("a", text(0, 30, 5), [text(1, 40, 5)])
        handle = memory.start("a", text(0, 30, 5), 0)
        if has_others:
            for n in range(3):
                memory.open(str(n), text(n + 3, 200, 5), ())
            handles = [memory.start(str(n), text(n + 3, 200, 5), n) for n in range(3)]
        for step in range(4):
            if has_others:
                memory.draft(np.array([*handles, handle]), np.full(4, 16))
            tokens, survival = draft(memory, handle, 4)
            answers.append([tokens, survival.tolist()])
            commit(memory, handle, text(step + 9, 5 - step, 5))
    assert answers[:4] == answers[4:]


def test_counts_do_not_depend_on_the_steps_they_came_in():
    completion = text(3, 80, 8)
    answers = []
    for sizes in ([32, 32, 16], [1] * 80, [7, 13, 30, 30]):
        memory = Memory(max_bytes=SMALL, min_survival=0)
        memory.open("a", [1, 2], ())
        handle = memory.start("a", [1, 2], 0)
        first = 0
        for size in sizes:
            commit(memory, handle, completion[first : first + size])
            first += size
        answers.append(draft(memory, handle, 8)[0])
    assert answers[0] == answers[1] == answers[2]


def test_a_known_distribution_is_drafted_with_the_samplers_noise():
    memory = Memory(max_bytes=SMALL, shared=False, noise=True, min_survival=0)
    ids, probs = np.array([[7, 8, 9]]), np.array([[0.4, 0.35, 0.25]], np.float32)
    memory.open("a", [1], ())
    hits = 0
    for key in range(300):
        handle = memory.start("a", [1], key)
        drawn = max(range(3), key=lambda j: math.log(probs[0, j]) + gumbel(key, 0, ids[0, j]))
        hits += draft(memory, handle, 1)[0] == [ids[0, drawn]]
        memory.commit(
            np.array([handle]), ids[0, drawn : drawn + 1], np.array([1]), ids.copy(), probs
        )
        memory.finish(handle)
    assert hits > 270  # without noise 120


def test_told_distributions_memory_stays_bounded_and_keeps_what_contexts_point_to():
    memory = Memory(max_bytes=SMALL, noise=True, min_survival=0)
    rng = np.random.default_rng(0)
    for n in range(30):
        tokens = rng.integers(0, 2**20, 600)
        memory.open(str(n), [1], ())
        handle = memory.start(str(n), [1], n)
        for first in range(0, 600, 6):
            ids = rng.integers(0, 2**20, (6, 16))
            ids[:, 0] = tokens[first : first + 6]
            probs = np.tile(np.float32([0.8] + [0.2 / 15] * 15), (6, 1))
            memory.commit(np.array([handle]), ids[:, 0].copy(), np.array([6]), ids, probs)
            assert memory.num_bytes <= SMALL
        memory.finish(handle)
    handle = memory.start("29", [1, *tokens[:580].tolist()], 0)
    drafted, _ = draft(memory, handle, 19)
    assert drafted[0] == tokens[580]
    assert sum(drafted == tokens[580 : 580 + len(drafted)]) > 10


def test_what_would_have_followed_a_rejected_draft_is_known_when_it_is_drawn():
    memory = Memory(max_bytes=SMALL, shared=False, min_survival=0)
    memory.open("a", [1], ())
    handle = memory.start("a", [1], 0)
    # 4 5 6 was drafted, 4 accepted and 9 drawn: after 4 5 comes 6, after 4 5 6 comes 7.
    ids = np.array([[4], [9], [6], [7]])
    memory.commit(
        np.array([handle]), np.array([4, 9]), np.array([2]), ids, np.ones((4, 1), np.float32),
        np.array([5, 6]), np.array([2]),
    )  # fmt: skip
    memory.finish(handle)
    handle = memory.start("a", [1, 4, 5], 0)
    assert draft(memory, handle, 2)[0] == [6, 7]
    memory.finish(handle)
    handle = memory.start("a", [1, 4], 0)
    assert draft(memory, handle, 1)[0] == [9]  # a rejected draft is no observation of itself


def test_a_second_choice_is_drafted_where_two_tokens_are_as_likely():
    memory = Memory(max_bytes=SMALL, min_survival=0)
    memory.open("a", [1], ())
    rng = random.Random(0)
    for _ in range(60):
        handle = memory.start("a", [1], 0)
        drafts = memory.draft(np.array([handle]), np.array([4]))
        commit(memory, handle, [7, rng.choice([8, 9]), 5])
        memory.finish(handle)
    assert drafts.tokens[0, 0, 0] == 7
    assert set(drafts.tokens[0, :, 1].tolist()) == {8, 9}
    assert 0.2 < drafts.survival[0, 1, 1] <= drafts.survival[0, 0, 1]
    assert np.count_nonzero(drafts.survival) == 4


def test_survival_is_learned():
    memory = Memory(max_bytes=SMALL, min_survival=0.5)
    rng = random.Random(0)
    memory.open("a", [1], ())
    handle = memory.start("a", [1], 0)
    for _ in range(600):
        commit(memory, handle, [rng.randrange(6)])
        drafted, _ = draft(memory, handle, 4)
    assert drafted == []  # one in six is not worth it


def test_a_prompt_opens_once():
    memory = Memory(max_bytes=SMALL)
    memory.open("a", [1], ())
    with pytest.raises(ValueError, match="open already"):
        memory.open("a", [1], ())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_arena_ranges_never_overlap_and_join_again(levels, rng):
    arena = Arena(32 << 8)
    held = {}
    for level in levels:
        start = arena.allocate(1 << level)
        if start is not None:
            assert (arena.rows[start : start + (1 << level)] == 0).all()
            arena.rows[start : start + (1 << level)] = 1
            assert all(start + (1 << level) <= s or s + (1 << k) <= start for s, k in held.items())
            held[start] = level
        elif held:
            start = rng.choice(sorted(held))
            arena.free(start, 1 << held.pop(start))
    for start, level in held.items():
        arena.free(start, 1 << level)
    assert arena.num_used == 0
    assert arena.allocate(1 << 8) == 0


def test_the_noise_is_the_samplers():
    torch = pytest.importorskip("torch")
    from streaminator.engine import sampler

    rng = random.Random(0)
    keys = [rng.randrange(-(2**63), 2**63) for _ in range(20)]
    for key in keys:
        position, token = rng.randrange(4000), rng.randrange(200_000)
        theirs = sampler.gumbel(
            torch.tensor([key]), torch.tensor([position]), torch.tensor([[token]])
        )
        assert gumbel(key, position, token) == pytest.approx(theirs.item(), rel=1e-12)
