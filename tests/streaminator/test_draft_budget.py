# SPDX-License-Identifier: Apache-2.0
"""Tests of the draft budget: it spends the forward's room where it pays, and only there."""

import numpy as np
import pytest

from streaminator.config import EngineConfig, SpeculatorConfig
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.step_costs import measure_step_costs
from streaminator.sequence import Sequence
from streaminator.speculative.draft_budget import DraftBudget, StepCosts
from streaminator.speculative.verify import calibration, verify
from tests.fakes import FREE, PROMPTS, drain, make_engine, tokens

# Nothing to 32 packed tokens, then in proportion: a machine that is memory-bound up to there.
MACHINE = ([8, 32, 64, 512], [1.0, 1.0, 2.0, 16.0])
MEMORY = SpeculatorConfig(speculator="memory")
UNPAYABLE = StepCosts([1, 512], [1e-3, 1e3])


def chains(*rows: list[float], seconds: tuple[list[float], ...] = ()) -> np.ndarray:
    """Survival [n, 2, k] of chains, and of the second choices beside them."""
    survival = np.zeros((len(rows), 2, max(map(len, rows))), np.float32)
    for side, given in enumerate((rows, seconds)):
        for line, row in zip(survival, given, strict=False):
            line[side, : len(row)] = row
    return survival


def lengths(verified: np.ndarray) -> list[int]:
    """How much of each chain is verified."""
    return verified[:, 0].sum(1).tolist()


def likely(num: int) -> list[float]:
    return [0.8 ** (n + 1) for n in range(num)]


def cut(width: int, num: int = 16) -> np.ndarray:
    survival = chains(*[likely(num)] * width)
    return DraftBudget(StepCosts(*MACHINE)).cut(survival, width, width)


def test_one_slot_drafts_long_and_a_full_machine_does_not() -> None:
    assert lengths(cut(1)) == [16]
    assert 0 < cut(16).sum() < 16 * 16
    assert cut(256).sum() == 0


def test_drafts_pay_again_where_they_are_nearly_sure() -> None:
    budget = DraftBudget(StepCosts([8, 64, 512], [1.0, 1.2, 16.0]))
    survival = chains(*[[0.99] * 4] * 64)
    assert budget.cut(survival, 64, 64).sum() == 0
    cheap = DraftBudget(StepCosts([8, 64, 512], [1.0, 1.2, 4.0]))
    assert cheap.cut(survival, 64, 64).sum() == 64 * 4


def test_all_slots_compete_and_the_likeliest_tokens_win() -> None:
    survival = chains([0.9, 0.8, 0.1], [0.3], [0.7, 0.05])
    budget = DraftBudget(StepCosts([3, 6, 7, 512], [1.0, 1.0, 9.0, 999.0]))
    assert lengths(budget.cut(survival, 3, 3)) == [2, 0, 1]


def test_second_choices_compete_with_the_ends_of_chains() -> None:
    survival = chains([0.6, 0.3, 0.1], [0.9, 0.8, 0.7], seconds=([0.2, 0.15], [0.05]))
    budget = DraftBudget(StepCosts([2, 8, 9, 512], [1.0, 1.0, 9.0, 999.0]))
    pays = budget.cut(survival, 2, 2)
    assert lengths(pays) == [2, 3]
    assert pays[:, 1].tolist() == [[True, False, False], [False] * 3]


def test_padding_is_filled_because_it_costs_nothing() -> None:
    survival = chains([0.1] * 12)
    budget = DraftBudget(StepCosts([8, 16], [1.0, 50.0], multiple=8))
    assert lengths(budget.cut(survival, 1, 1)) == [7]


def test_drafts_fill_whole_tiles_or_none() -> None:
    costs = StepCosts([16, 32, 64], [1.0, 1.3, 1.9], multiple=16)
    drafts = [[0.5]] * 16 + [[0.45]] * 4
    assert DraftBudget(costs).cut(chains(*drafts), 16, 16).sum() == 16
    assert DraftBudget(costs).cut(chains(*drafts[:8]), 16, 16).sum() == 0


def test_free_steps_verify_everything() -> None:
    survival = chains(likely(8), [], [0.01])
    assert lengths(DraftBudget(StepCosts.free()).cut(survival, 3, 3)) == [8, 0, 1]


def test_what_steps_really_cost_is_learned() -> None:
    budget = DraftBudget(StepCosts([8, 16, 32], [1.0, 1.0, 1.0]))
    survival = chains(*[[0.3]] * 8)
    assert budget.cut(survival, 8, 8).sum() == 8
    for _ in range(100):
        budget.observe(8, 0, 0, 8, 0, 1.0, 0.0)
        budget.observe(16, 0, 8, 9, 1, 2.0, 0.0)
    assert budget.cut(survival, 8, 8).sum() == 0


def num_drafted(price: float, num_steps: int) -> list[int]:
    """In each step, where one without drafts takes 1 s, and 8 of them are said to take 1 s more but take `price`."""
    budget = DraftBudget(StepCosts([8, 16, 32], [1.0, 2.0, 4.0]))
    drafted = []
    for _ in range(num_steps):
        rests = budget.rests()
        num = 0 if rests else int(budget.cut(chains(*[[0.6]] * 8), 8, 8).sum())
        accepted = round(0.6 * num)
        budget.observe(8 + num, 0, num, 8 + accepted, accepted, 1 + price * num / 8, 0.01)
        drafted.append(num)
    return drafted


def test_drafts_that_became_cheap_are_found_out() -> None:
    """Measured while the machine was busy with something else, none would ever be tried."""
    drafted = num_drafted(0.2, 600)
    assert drafted[:5] == [0] * 5
    assert all(drafted[-100:])


def test_drafts_that_stay_dear_are_tried_ever_more_seldom() -> None:
    tried = np.flatnonzero(num_drafted(1.0, 3000))
    assert sum(step >= 1000 for step in tried) in range(5, 12), tried


def test_a_faster_machine_is_no_reason_to_draft_more() -> None:
    """Steps of one size only tell how fast the machine is, not what a wider step costs more."""
    costs = StepCosts([8, 16], [1.0, 1.5])
    for _ in range(300):
        costs.observe(8, 8, 0.75)
    assert costs(8, 8) == pytest.approx(0.75, rel=0.02)
    assert costs(8) == pytest.approx(0.5, rel=0.1)


def test_what_drafts_cost_is_told_from_how_fast_the_machine_is() -> None:
    costs = StepCosts([8, 16, 32], [1.0, 1.5, 2.5])
    for num in [0, 4, 8, 2, 12] * 40:
        costs.observe(8, num, 2 * (1 + 0.02 * num))
    assert costs(8) == pytest.approx(2, rel=0.02)
    assert costs(8, 8) - costs(8) == pytest.approx(0.32, rel=0.1)


def test_the_tokens_of_prompts_do_not_make_drafts_dear() -> None:
    budget = DraftBudget(StepCosts([8, 16, 128], [1.0, 1.1, 8.0]))
    for _ in range(100):
        budget.observe(128, 112, 0, 16, 0, 80.0, 0.0)
    assert budget.costs(16) - budget.costs(8) == pytest.approx(0.1)


def test_steps_of_a_kind_that_will_be_quicker_teach_no_costs() -> None:
    budget = DraftBudget(StepCosts([8, 16], [1.0, 1.1]))
    for _ in range(100):
        budget.observe(16, 0, 8, 9, 1, 20.0, 0.0, teaches_costs=False)
    assert budget.costs(8, 8) == pytest.approx(budget.costs(16), rel=0.02)
    assert budget.costs(16) == pytest.approx(1.1, rel=0.02)


def test_drafts_are_chosen_after_steps_that_gained_nothing() -> None:
    budget = DraftBudget(StepCosts(*MACHINE))
    for _ in range(3):
        budget.cut(np.zeros((0, 2, 0), np.float32), 8, 0)
        budget.observe(8, 8, 0, 0, 0, 1.0, 0.0)
    assert lengths(budget.cut(chains(likely(16)), 1, 1)) == [16]


def steps_that_draft(
    budget: DraftBudget, chance: float, num_steps: int, drafting: float = 0.1
) -> list[bool]:
    """Run steps of 8 sequences with a draft of one token each, which takes `drafting` seconds."""
    drafted = []
    for _ in range(num_steps):
        drafts = not budget.rests()
        num = int(budget.cut(chains(*[[chance]] * 8), 8, 8).sum()) if drafts else 0
        gained = 8 + chance * num
        taken = drafting * drafts
        seconds = budget.costs(8, num) + taken
        budget.observe(8 + num, 0, num, gained, chance * num, seconds, taken)
        drafted.append(drafts)
    return drafted


def test_drafting_that_does_not_pay_for_its_time_is_left_out() -> None:
    def costs() -> StepCosts:
        return StepCosts([8, 16], [1.0, 1.5])

    # One drafted token costs 1/16 s, one token as it is 1/8 s.
    assert all(steps_that_draft(DraftBudget(costs()), 0.9, 100))
    never = steps_that_draft(DraftBudget(costs()), 0.1, 200)
    assert 5 < sum(never) < 20, "now and then it looks whether that has changed"
    hardly = steps_that_draft(DraftBudget(costs()), 0.52, 200)
    assert sum(hardly) < 20, "what it brings is less than the time it takes"


@pytest.mark.parametrize("drafting", [0.1, 1.0])
def test_drafting_begins_again_when_it_pays(drafting: float) -> None:
    budget = DraftBudget(StepCosts([8, 16], [1.0, 1.5]))
    steps_that_draft(budget, 0.1, 100, drafting)
    again = steps_that_draft(budget, 0.9, 300)
    assert all(again[-50:])


def test_where_drafting_takes_as_long_as_a_step_it_is_tried_more_seldom() -> None:
    """As where a GPU waits for it, and for all else that is hidden otherwise."""
    tried = [
        sum(steps_that_draft(DraftBudget(StepCosts([8, 16], [1.0, 1.5])), 0.1, 1000, drafting))
        for drafting in (0.1, 1.0)
    ]
    assert 10 < tried[1] < tried[0] / 2


def test_one_long_pause_of_the_machine_stops_no_drafting() -> None:
    budget = DraftBudget(StepCosts([8, 16], [1.0, 1.5]))
    steps_that_draft(budget, 0.9, 20)
    assert not budget.rests()
    budget.cut(chains(*[[0.9]] * 8), 8, 8)
    budget.observe(16, 0, 8, 15, 7, 100.0, 98.5)
    assert all(steps_that_draft(budget, 0.9, 100))


def test_one_outlier_hardly_counts() -> None:
    costs = StepCosts([8, 64], [1.0, 2.0])
    for _ in range(50):
        costs.observe(8, 0, 1.0)
        costs.observe(8, 56, 2.0)
    costs.observe(8, 56, 1000.0)
    assert costs(8, 56) < 2.2


def test_more_tokens_never_cost_less() -> None:
    costs = StepCosts([8, 16, 32], [1.0, 3.0, 2.0])
    assert (np.diff([costs(num) for num in range(1, 100)]) >= 0).all()


def test_what_is_drafted_follows_what_is_verified() -> None:
    budget = DraftBudget(StepCosts.free())
    survival = chains([0.8, 0.6])
    for _ in range(20):
        budget.cut(survival, 1, 1)
    assert budget.floor < 0.05, "all of it paid: perhaps more would"
    dear = DraftBudget(UNPAYABLE)
    dear.cut(survival, 1, 1)
    assert dear.floor == pytest.approx(0.4)


@pytest.mark.parametrize(("width", "most"), [(1, 8), (3, 8), (5, 8), (1, 1), (1, 3), (2, 1)])
def test_every_size_a_stream_may_need_is_measured(
    llama: ModelRunner, width: int, most: int
) -> None:
    config = EngineConfig(num_blocks=2)
    costs = measure_step_costs(llama, config, FREE, stream_width=width, max_draft=most, num_top=4)
    assert costs.max_tokens >= width * (1 + most)
    assert all(costs(num) > 0 for num in range(1, width * (1 + most)))


@pytest.mark.parametrize("shape", [(0, 2, 0), (3, 2, 0), (0, 2, 4)])
def test_without_drafts_nothing_is_verified(shape: tuple[int, ...]) -> None:
    pays = DraftBudget(StepCosts(*MACHINE)).cut(np.zeros(shape, np.float32), 4, 3)
    assert pays.shape == shape
    assert not pays.any()


def test_costs_decide_what_is_drafted_and_no_token(llama: ModelRunner) -> None:
    free = make_engine(llama, sampling=FREE, speculator=MEMORY, step_costs=StepCosts.free())
    dear = make_engine(llama, sampling=FREE, speculator=MEMORY, step_costs=UNPAYABLE)
    many, none = drain(free, PROMPTS), drain(dear, PROMPTS)
    assert tokens(many) == tokens(none)
    assert sum(sum(completion.drafted) for completion in none.values()) == 0
    assert sum(sum(completion.drafted) for completion in many.values()) > 0


def test_drafts_are_counted_by_the_chance_they_were_given() -> None:
    survival = chains([0.95, 0.55, 0.2], [0.95], [1.0], seconds=([0.03, 0.25], [], [0.0]))
    drafting = [
        Sequence(PROMPTS[0], index, [1], 0, 9, 0.0, num_scheduled_tokens=1, draft=draft)
        for index, draft in enumerate([[5, 6], [7], []])
    ]
    drafting[0].alternatives = {1: 8}
    # Of the first chain 5 is accepted and then 8, the second choice; the second chain is not.
    tokens = [5, 8, 1, 2, 3, 4, 9]
    verdicts = verify(drafting, tokens, [0.0] * len(tokens))
    verified, accepted = calibration(drafting, survival, verdicts)
    assert verified == [0, 0, 1, 0, 0, 1, 0, 0, 0, 2]
    assert accepted == [0, 0, 1, 0, 0, 0, 0, 0, 0, 1]


def test_the_budget_is_told_how_many_drafts_a_step_had(
    llama: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(
        StepCosts,
        "observe",
        lambda _, num_tokens, num_drafts, __: told.append((num_tokens, num_drafts)),
    )
    costs = StepCosts([1, 512], [1.0, 1.0])
    engine = make_engine(llama, sampling=FREE, speculator=MEMORY, step_costs=costs)
    engine.add(PROMPTS[0])
    had = []
    while engine.has_work:
        engine.step()
        stats = engine.last_step
        assert stats is not None
        if not stats.num_prefill_tokens:
            had.append((stats.num_decode_tokens, stats.num_draft_tokens))
    assert told == had
    assert any(num_drafts for _, num_drafts in had)


def test_a_step_tells_its_drafts_by_their_chance(llama: ModelRunner) -> None:
    engine = make_engine(llama, sampling=FREE, speculator=MEMORY, step_costs=StepCosts.free())
    for prompt in PROMPTS:
        engine.add(prompt)
    num_drafted = 0
    while engine.has_work:
        engine.step()
        stats = engine.last_step
        assert stats is not None
        assert sum(stats.num_draft_by_survival) == stats.num_draft_tokens
        num_drafted += stats.num_draft_tokens
    assert num_drafted > 0
