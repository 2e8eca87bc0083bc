# SPDX-License-Identifier: Apache-2.0
"""Answers are found, put in one form and compared as a reader would; the rates are exact."""

import itertools
import json
import math
import sys
import time
from pathlib import Path

import pytest

from streaminator.config import DataConfig
from streaminator.errors import ConfigError
from streaminator.grading import (
    Grade,
    is_settled,
    lead_chance,
    majority_at_k,
    make_grader,
    pass_at_k,
)

GSM8K = Path(__file__).parents[2].parent / "shared" / "gsm8k"


def grade(text, gold, grader=None):
    return make_grader(DataConfig(grader=grader))(text, gold)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 3 = 5\n#### 5", "5"),
        ("#### 4\nno, wait\n#### 5\n", "5"),
        ("so it is \\boxed{5} of the 7", "5"),
        ("#### \\boxed{5}", "5"),
        ("#### **5**", "5"),
        ("5 + 7 = 12, so she has 12.", "12"),
        ("it costs $1,250.50 in all", "1250.5"),
        ("16 - 4", "4"),
        ("the change is -4", "-4"),
        ("the change is \u22124", "-4"),
        ("#### ", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_gsm8k_takes_hashes_then_box_then_last_number(text, answer):
    assert grade(text, None, "gsm8k") == Grade(answer, None, None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{4} and then \\boxed{5}", "5"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{\\sqrt{2}+\\frac{x}{3}}", "\\sqrt{2}+\\frac{x}{3}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1,2\\}"),
        ("\\boxed{4} and then \\boxed{5", "4"),
        ("a stray } and { but \\boxed{5}", "5"),
        ("#### 3 but \\boxed{5}", "5"),
        ("#### 3 of 5", "3 of 5"),
        ("3 of 5", "5"),
    ],
)
def test_boxed_takes_the_last_balanced_box_first(text, answer):
    assert grade(text, None, "boxed").answer == answer


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1,234,567", "1234567"),
        ("$18", "18"),
        ("\\$18.00", "18"),
        ("€18", "18"),
        ("£18", "18"),
        ("18.", "18"),
        ("3.0", "3"),
        (".5", "0.5"),
        ("3/4", "0.75"),
        ("\\frac{3}{4}", "3/4"),
        ("\\dfrac{3}{4}", "\\frac34"),
        ("-\\frac{3}{4}", "\\frac{-3}{4}"),
        ("1\\frac{1}{2}", "3/2"),
        ("1 1/2", "1.5"),
        ("2/6", "1/3"),
        ("-5", "\u22125"),
        ("+5", "5"),
        ("18 dollars", "18"),
        ("18 dollars per day", "$18"),
        ("Total: 18 apples.", "18"),
        ("x = 5", "5"),
        ("10\\text{ cm}^2", "10"),
        ("10 cm", "10"),
        ("90^\\circ", "90"),
        ("1{,}000", "1000"),
        ("1e3", "1000"),
        ("50%", "50\\%"),
        ("50%", "50"),
        ("50 percent", "50%"),
        ("\\text{Paris}", "Paris"),
        ("New York.", "New York"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        ("$x + 1$", "x+1"),
        ("2 x", "2x"),
    ],
)
def test_different_spellings_of_one_answer_are_equal(answer, gold):
    assert grade(f"#### {answer}", f"#### {gold}").is_correct is True


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("17", "18"),
        ("-18", "18"),
        ("50%", "0.5"),
        ("0.5", "50%"),
        ("50", "50%"),
        ("1,2", "12"),
        ("5x", "5"),
        ("\\sqrt{2}", "2"),
        ("x^2", "2"),
        ("3:4", "3"),
        ("24 or 25", "24"),
        ("5/0", "5"),
        ("2\\pi", "2"),
        ("0.33", "1/3"),
        ("x", "X"),
    ],
)
def test_different_answers_are_not_equal(answer, gold):
    assert grade(f"#### {answer}", f"#### {gold}").is_correct is False


def test_spellings_of_one_number_are_stored_alike():
    answers = {grade(f"#### {text}", None).answer for text in ("$3.50", "7/2", "3.5 dollars")}
    assert answers == {"3.5"}
    assert grade("#### 1/3", None).answer == "1/3"


def test_the_gold_answer_decides_where_no_grader_is_named():
    both = "#### 1 and \\boxed{2}"
    assert grade(both, "because\n#### 2").is_correct is True  # the box inside the marked line
    assert grade("#### 1\n\\boxed{2}", "because\n#### 1").is_correct is True
    assert grade("#### 1\n\\boxed{2}", "thus \\boxed{2}").is_correct is True
    assert grade("so \\boxed{2}", "2").is_correct is True
    assert grade("so it is 2", "2").is_correct is True
    assert grade("so it is 2", "Paris").is_correct is False


def test_without_a_gold_answer_nothing_is_graded():
    assert grade("#### 5", None) == Grade("5", None, None)
    assert grade("#### 5", " ") == Grade("5", None, None)
    assert grade("no number", "5") == Grade(None, "5", False)


def test_grader_none_grades_nothing():
    assert grade("#### 5", "#### 5", "none") == Grade(None, None, None)


@pytest.mark.parametrize(
    "text",
    [
        "#### " + "9" * 50_000,
        "#### 1" + ",000" * 20_000,
        "0." + "3" * 50_000,
        "#### 5" + " " * 50_000 + "\\",
        "\\boxed{" * 20_000,
        "{" * 50_000,
        "#### " + "ab" * 20_000 + "1!x",
        "-" * 50_000,
        "1 " * 20_000,
        "\\text{" * 10_000,
    ],
    ids=range(10),
)
def test_endless_repetition_is_graded_quickly(text):
    started = time.perf_counter()
    assert grade(text, "#### 5").is_correct is False
    assert grade(text, "\\boxed{5}").is_correct is False
    assert time.perf_counter() - started < 2


def test_real_reference_answers_are_all_correct_against_themselves():
    path = GSM8K / "test.jsonl"
    if not path.exists():
        pytest.skip("the GSM8K test set is not beside the repository (../shared/gsm8k)")
    golds = [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()]
    assert len(golds) == 1319
    for name in (None, "gsm8k", "boxed"):
        grader = make_grader(DataConfig(grader=name))
        assert all(grader(gold, gold).is_correct for gold in golds)
        wrong = [f"#### {grader(gold, gold).answer}1" for gold in golds]
        assert not any(
            grader(text, gold).is_correct for text, gold in zip(wrong, golds, strict=True)
        )


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_graders.py").write_text(
        "def same(text, gold): return text == gold\n"
        "def pair(text, gold): return text.upper(), text == gold\n"
        "def none(text, gold): return None\n"
        "def triple(text, gold): return ('a', True, 1)\n"
        "def number(text, gold): return (5, True)\n"
        "def broken(text, gold): raise KeyError('x\\ny')\n"
        "constant = 5\n"
    )
    (tmp_path / "bad_syntax.py").write_text("def (:\n")
    yield "my_graders"
    sys.modules.pop("my_graders", None)


def test_a_user_function_grades(user_module):
    assert grade("a", "a", f"{user_module}:same") == Grade(None, "a", True)
    assert grade("b", "a", f"{user_module}:pair") == Grade("B", "a", False)
    assert grade("a", None, f"{user_module}:none") == Grade(None, None, None)


@pytest.mark.parametrize(
    "name",
    ["exact", "my_graders", "my_graders:", ":same", "my_graders:missing", "my_graders:constant",
     "no_such_module:f", "bad_syntax:f"],
)  # fmt: skip
def test_a_grader_that_cannot_be_imported_is_named_in_one_line(user_module, name):
    with pytest.raises(ConfigError) as raised:
        make_grader(DataConfig(grader=name))
    assert f"--grader {name}: " in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("function", ["none", "triple", "number", "broken"])
def test_a_grader_that_misbehaves_leaves_the_completion_ungraded_and_says_why(
    user_module, function
):
    result = grade("a", "a", f"{user_module}:{function}")
    assert result.is_correct is None
    assert result.error
    assert "\n" not in result.error


def test_pass_at_k_is_the_share_of_subsets_with_a_right_completion():
    for num in range(1, 7):
        for correct in range(num + 1):
            for k in range(1, num + 1):
                subsets = list(itertools.combinations(range(num), k))
                share = sum(min(subset) < correct for subset in subsets) / len(subsets)
                assert pass_at_k(num, correct, k) == pytest.approx(share)


def test_pass_at_k_is_stable_for_many_completions():
    exact = 1 - math.comb(9_000, 500) / math.comb(10_000, 500)
    assert pass_at_k(10_000, 1_000, 500) == pytest.approx(exact, rel=1e-12)
    assert pass_at_k(10_000, 0, 500) == 0.0


@pytest.mark.parametrize("arguments", [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1), (0, 0, 1)])
def test_pass_at_k_rejects_what_is_out_of_range(arguments):
    with pytest.raises(ValueError, match="out of range"):
        pass_at_k(*arguments)


def test_majority_counts_the_first_k_votes():
    answers = ["5", "4", "4", "5", "5"]
    is_correct = [True, False, False, True, True]
    assert majority_at_k(answers, is_correct, 1) == 1.0
    assert majority_at_k(answers, is_correct, 2) == 1.0  # a tie goes to the first seen
    assert majority_at_k(answers, is_correct, 3) == 0.0
    assert majority_at_k(answers, is_correct, 5) == 1.0


def test_completions_without_an_answer_do_not_vote():
    assert majority_at_k([None, None, "5"], [False, False, True], 3) == 1.0
    assert majority_at_k([None, None, "5"], [False, False, True], 2) == 0.0


@pytest.mark.parametrize("k", [0, 3])
def test_majority_rejects_what_is_out_of_range(k):
    with pytest.raises(ValueError, match="out of range"):
        majority_at_k(["5", "5"], [True, True], k)


def test_the_chance_of_a_lead_is_the_upper_half_of_its_beta_distribution():
    grid = [(i + 0.5) / 20_000 for i in range(20_000)]
    for first, second in itertools.product(range(7), repeat=2):
        density = [x**first * (1 - x) ** second for x in grid]
        upper = sum(density[10_000:]) / sum(density)
        assert lead_chance(first, second) == pytest.approx(upper, abs=1e-6)
        assert lead_chance(first, second) + lead_chance(second, first) == pytest.approx(1)
    assert lead_chance(2000, 0) == 1.0


def test_more_votes_for_the_leader_settle_and_more_for_the_second_unsettle():
    for first, second in itertools.product(range(20), repeat=2):
        assert lead_chance(first + 1, second) > lead_chance(first, second)
        assert lead_chance(first, second + 1) < lead_chance(first, second)


def test_answers_are_settled_once_the_lead_is_large_enough_and_stay_so():
    assert not is_settled(["1"] * 3, 0.95)
    assert is_settled(["1"] * 4, 0.95)
    assert is_settled(["1"] * 4 + ["2"] * 9, 0.95)
    assert not is_settled(["1", "2", "1", "2", "1", "2", "1"], 0.95)
    assert is_settled(["3", "1", "1", None, "1", "1", "2", "1", "1"], 0.95)


def test_completions_without_an_answer_settle_nothing():
    assert not is_settled([], 0.5)
    assert not is_settled([None] * 100, 0.5)
