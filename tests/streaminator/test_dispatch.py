# SPDX-License-Identifier: Apache-2.0
"""Which worker gets which prompt, and what becomes of a lost worker's, in virtual time."""

from collections import Counter

import pytest

from streaminator.backlog import Work, home_worker
from streaminator.errors import WorkerDiedError
from streaminator.sequence import Prompt
from tests.fake_pool import FakePool, dispatch, random_faults


def test_a_prompts_home_is_the_same_in_every_process_and_run():
    assert [home_worker(f"p{i}", 7) for i in range(8)] == [6, 3, 0, 2, 2, 0, 4, 3]


def test_homes_are_spread_evenly():
    counts = Counter(home_worker(f"p{i}", 8) for i in range(8000))
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_prompts_go_home_while_every_worker_has_some():
    output = dispatch(FakePool(3), num_prompts=600)
    at_home = [row.worker == home_worker(name, 3) for (name, _), row in output.rows.items()]
    assert sum(at_home) > 0.8 * len(at_home)


def test_few_prompts_are_shared_out_among_all_workers():
    output = dispatch(FakePool(4, width=16), num_prompts=8)
    assert Counter(row.worker for row in output.rows.values()) == dict.fromkeys(range(4), 6)


def test_each_worker_has_prompts_for_a_width_of_its_own():
    pool = FakePool(3, widths={0: 2, 1: 8, 2: 100})
    dispatch(pool, num_prompts=1500)
    assert pool.most_open == [4, 16, 200]


@pytest.mark.parametrize("seed", range(40))
def test_random_faults_lose_nothing_double_nothing_and_overlap_nothing(seed):
    kinds = ("killed", "hang", "node")
    pool = FakePool(
        3,
        faults=random_faults(seed, 0.04, kinds),
        steps_of=lambda n, i: 5 + home_worker(f"{n} {i}", 40),
    )
    dispatch(pool, num_prompts=40)


def test_a_killed_workers_prompts_are_drawn_by_others_and_their_rows_say_so():
    def faults(pool, worker, held):
        return "killed" if worker == 1 and pool.num_starts[1] == 1 and pool.now > 2 else None

    output = dispatch(FakePool(2, faults=faults))
    assert output.events == ["worker died"]
    assert {row.num_retries for row in output.rows.values()} == {0, 1}


def test_a_worker_that_stops_reporting_is_replaced_and_its_late_part_is_not_seen():
    def faults(pool, worker, held):
        return "hang" if worker == 0 and pool.num_starts[0] == 1 and pool.now > 5 else None

    pool = FakePool(2, faults=faults)
    output = dispatch(pool, worker_timeout=20)
    assert output.events == ["worker hung"]
    assert pool.num_starts == [2, 1]


def test_the_first_report_may_take_longer_than_the_time_limit():
    pool = FakePool(1, speeds={0: 1 / 60})  # a step takes a minute
    output = dispatch(pool, num_prompts=1, num_completions=1, worker_timeout=90)
    assert output.events == []


def test_a_poison_prompt_fails_alone_after_a_bounded_number_of_deaths():
    def faults(pool, worker, held):
        return "killed by p7" if "p7" in held else None

    pool = FakePool(2, faults=faults)
    output = dispatch(pool)
    failed = {name for (name, _), row in output.rows.items() if row.error}
    assert failed == {"p7"}
    assert "killed by p7" in output.rows["p7", 0].error
    assert output.events == ["worker died"] * 4 + ["prompt failed"]


def test_a_lost_machine_is_no_prompts_fault():
    def faults(pool, worker, held):
        return "node" if pool.num_starts[worker] < 5 and pool.now % 7 > 6 else None

    output = dispatch(FakePool(2, faults=faults))
    assert "prompt failed" not in output.events
    assert all(row.error is None for row in output.rows.values())


def test_workers_that_cannot_be_placed_are_waited_for_by_nobody():
    here = dispatch(FakePool(2))
    absent = dispatch(FakePool(8, joins_at=dict.fromkeys(range(2, 8), 1000000000.0)))
    assert len(absent.rows) == len(here.rows)
    assert {row.worker for row in absent.rows.values()} <= {0, 1}
    assert absent.pool.now < 1.3 * here.pool.now


def test_a_late_worker_takes_its_share():
    output = dispatch(FakePool(2, joins_at={1: 10.0}), num_prompts=200)
    counts = Counter(row.worker for row in output.rows.values())
    assert counts[1] > 0.3 * counts[0]


def test_lost_workers_that_never_come_back_leave_the_work_to_the_others():
    def faults(pool, worker, held):
        return "node" if worker != 0 and pool.now > 3 else None

    dispatch(FakePool(4, faults=faults, restarts_after=1e9))


def test_a_worker_that_only_dies_is_given_up_and_without_any_the_run_ends():
    pool = FakePool(2, faults=lambda pool, worker, held: "killed" if worker == 1 else None)
    output = dispatch(pool, num_prompts=2000, num_completions=1)
    assert "worker given up" in output.events
    assert pool.num_starts[1] == 5
    with pytest.raises(WorkerDiedError, match="in a row; the last time: killed"):
        dispatch(FakePool(2, faults=lambda *_: "killed"), num_prompts=2000)


def test_in_the_tail_a_slow_workers_prompts_move_between_completions():
    """Alone, the slow worker would need 8 completions x 20 steps / 2 a second for its last ones."""
    steps = {"steps_of": lambda name, index: 20}
    fast = dispatch(FakePool(4, **steps), num_prompts=64, num_completions=8)
    one_slow = dispatch(FakePool(4, speeds={0: 2.0}, **steps), num_prompts=64, num_completions=8)
    workers = {}
    for (name, _), row in one_slow.rows.items():
        workers.setdefault(name, set()).add(row.worker)
    assert any(len(names) > 1 for names in workers.values()), "no prompt moved"
    # Three fast workers do four workers' work, and a completion under way ends where it began.
    assert one_slow.pool.now < 1.5 * fast.pool.now + 20 / 2


def test_equal_workers_do_not_pass_the_last_prompts_around():
    output = dispatch(FakePool(8), num_prompts=3, num_completions=6)
    workers = {}
    for (name, _), row in output.rows.items():
        workers.setdefault(name, set()).add(row.worker)
    assert all(len(names) == 1 for names in workers.values())


def test_workers_begin_before_the_queues_are_full():
    num_read = []
    pool = FakePool(200, faults=lambda pool, *_: num_read.append(pool.source.num_taken))
    dispatch(pool, num_prompts=3000)
    assert num_read[0] < 200, "queues of 800"


def test_a_prompt_that_waits_loses_nothing():
    prompt = Prompt(
        prompt_id="p",
        token_ids=(1, 70_000),
        text="q?",
        question="q",
        gold_answer="4",
        metadata={"level": "1"},
        sample_indices=(2, 3),
        warm_parts=("a", "b"),
    )
    assert Work.of(prompt, (2, 3)).as_prompt() == prompt


def test_the_dataset_is_read_as_it_is_drawn_and_windows_are_bounded():
    pool = FakePool(3, width=4)
    most = []

    def watch(source, output):
        most.append(source.num_taken - len(output.rows) // 3)

    dispatch(pool, num_prompts=3000, on_report=watch)
    per_worker = 4 + 2 * 4 + 4 * 20  # queue, window, finished within a part's time
    assert max(most) <= 3 * per_worker
    assert pool.largest_window <= 8
