# SPDX-License-Identifier: Apache-2.0
"""Which worker gets which prompt."""

from collections import Counter, deque

from streaminator.driver import _take, home_worker
from streaminator.sequence import Prompt


def prompt(name: str) -> Prompt:
    return Prompt(prompt_id=name, token_ids=(1,), text="", question="")


def test_a_prompts_home_is_the_same_in_every_process_and_run():
    assert [home_worker(f"p{i}", 7) for i in range(8)] == [6, 3, 0, 2, 2, 0, 4, 3]


def test_homes_are_spread_evenly():
    counts = Counter(home_worker(f"p{i}", 8) for i in range(8000))
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_a_worker_without_prompts_takes_those_another_would_start_last():
    queues = [deque(), deque(prompt(f"p{i}") for i in range(5)), deque([prompt("q")])]
    assert [p.prompt_id for p in _take(queues, 0, 2)] == ["p4", "p3"]
    assert [p.prompt_id for p in _take(queues, 1, 2)] == ["p0", "p1"]
    assert len(_take(queues, 2, 9)) == 2
    assert not any(queues)
