# SPDX-License-Identifier: Apache-2.0
"""Tests of the word-problem generator."""

import pytest

from jobs.word_problems import CALCULATION, FINAL_ANSWER, calculate, generate, split


def test_calculations_are_right_and_end_in_the_answer() -> None:
    for problem in generate(2000, seed=1):
        calculations = CALCULATION.findall(problem["answer"])
        assert 2 <= len(calculations) <= 4
        for left, operator, right, result in calculations:
            assert calculate(int(left), operator, int(right)) == int(result)
        assert FINAL_ANSWER.findall(problem["answer"]) == [calculations[-1][3]]
        assert int(calculations[-1][3]) > 0
        assert problem["answer"].split("\n")[-1].startswith("#### ")
        assert "{" not in problem["question"] + problem["answer"]


def test_calculations_start_from_the_question() -> None:
    for problem in generate(200, seed=2):
        left, _, right, _ = CALCULATION.findall(problem["answer"])[0]
        words = problem["question"].replace("?", " ").replace(".", " ").replace(",", " ").split()
        assert left in words
        assert right in words or right == "2"


def test_same_seed_same_problems() -> None:
    assert list(generate(50, seed=3)) == list(generate(80, seed=3))[:50]
    assert list(generate(50, seed=3)) != list(generate(50, seed=4))


def test_held_out_questions_are_not_in_the_training_data() -> None:
    training, held_out = split(20000, 500, seed=5)
    questions = [problem["question"] for problem in training]
    kept_back = {problem["question"] for problem in held_out}
    assert len(questions) == len(set(questions)) == 20000
    assert len(kept_back) == 500
    assert kept_back.isdisjoint(questions)


def test_training_skips_a_question_that_was_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(["1", "2", "1", "2", "3", "4"])

    def next_problem(rng: object) -> dict[str, str]:
        return {"question": next(numbers), "answer": "#### 1"}

    monkeypatch.setattr("jobs.word_problems._problem", next_problem)
    training, held_out = split(2, 2, seed=0)
    assert [problem["question"] for problem in held_out] == ["1", "2"]
    assert [problem["question"] for problem in training] == ["3", "4"]


def test_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        next(generate(-1, seed=0))
