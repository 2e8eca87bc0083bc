# SPDX-License-Identifier: Apache-2.0
"""Final answers: taken out of a text, put in one form, compared; and the rates made of them.

Invariants
- Answers that are written differently and mean the same number have the same `Grade.answer`, so
  a majority can be counted on it.
- A percentage is not the number a hundred times smaller. "50%" equals "50%", and equals a gold
  "50" that leaves the sign out; it never equals "0.5", and "50" never equals a gold "50%".

Used by: the writer of completions, `jobs.*`.
"""

import hashlib
import importlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, NoReturn

from streaminator.config import DataConfig
from streaminator.errors import ConfigError

BUILTIN_GRADERS = ("gsm8k", "boxed", "none")

_MAX_NUMBER_LENGTH = 300
"""What is longer is no number: a model may repeat a digit to its last token."""

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?(?:e[-+]?\d{1,3}(?!\d))?|\.\d+"
_FRACTION = r"\d+\s*/\s*\d+"
_VALUE = rf"(?:(?P<whole>\d+)\s+)?(?P<fraction>{_FRACTION})|(?P<decimal>{_UNSIGNED})"
# A single letter is a unit only where it is one by custom ("5 m"), else a variable ("2 x").
_UNIT = r"(?:[a-z]{2,}|[aghlms])(?:[/'-][a-z]+)*(?:\s?(?:\^\{?[23]\}?|[²³]))?"
_LONE_NUMBER = re.compile(
    # "x =" or words; sign and value; percent sign; a unit, attached or as words; punctuation.
    r"(?:[a-z]\s*=\s*)?(?:[a-z]{2,}[\s.:=]+)*"
    rf"(?P<sign>[-+]?)\s*(?:{_VALUE})\s*(?P<percent>%|percent\b)?"
    rf"(?:/?(?=[a-z]{{2}}){_UNIT})?(?:[.,;:]?\s+\(?{_UNIT})*[\s.,;:!)]*",
    re.ASCII | re.IGNORECASE,
)
_NUMBER_IN_TEXT = re.compile(
    rf"(?:(?<![\w.)\]}}])[-\u2212])?[$€£]?(?:{_FRACTION}|{_UNSIGNED})(?:\s?\\?%)?",
    re.ASCII | re.IGNORECASE,
)
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\u2212", "-"),
        (r"\{,\}", ","),
        (r"\\(?:left|right)(?![A-Za-z])", ""),
        (r"\\[$]|[$€£]|\*\*|(?<!\\)\\[!,;: ()\[\]]", ""),
        (r"\\%", "%"),
        (r"\^\s*\{?\\circ\}?|°", ""),
        (r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2 "),
    )
)


@dataclass(frozen=True, slots=True)
class Grade:
    """What a completion answered and whether that is right."""

    answer: str | None
    """The answer in one form; None: there is none, or it was not looked for."""
    gold: str | None
    """The reference answer in the same form; None: there is none."""
    is_correct: bool | None
    """None: not graded."""
    error: str | None = None
    """Why a grader of the user's could not say."""


Grader = Callable[[str, str | None], Grade]
"""Completion text and the dataset's answer text (None: there is none) -> grade."""


def make_grader(data: DataConfig) -> Grader:
    r"""The grader that `data.grader` names.

    "gsm8k" takes the last `#### x`, else the last `\boxed{x}`, else the last number; "boxed" the
    last `\boxed{x}`, else the last `#### x`, else the last number. Without a name the gold answer
    decides: "boxed" if it has a box and no `####`, else "gsm8k". A gold answer with neither mark
    is taken whole. "module:function" is called with the completion's text and the gold answer's;
    it returns whether the answer is right, or (answer, whether it is right), and is not called
    where there is no gold answer.

    A grader of the user's that fails leaves that completion ungraded, with the reason in its row.

    Raises:
        ConfigError: there is no such grader.
    """
    name = data.grader
    if name == "none":
        return lambda text, gold: Grade(None, None, None)
    if name is None or name in BUILTIN_GRADERS:
        return lambda text, gold: _grade(text, gold, name)
    return _user_grader(name)


def grader_fingerprint(data: DataConfig) -> str:
    """Hash of the source of a grader of the user's; of the name for the others."""
    name = data.grader or "by the answers"
    module_name, colon, _ = name.partition(":")
    source = inspect.getsource(importlib.import_module(module_name)) if colon else name
    return hashlib.blake2b(source.encode(), digest_size=8).hexdigest()


def pass_at_k(num: int, correct: int, k: int) -> float:
    """Chance that k of `num` completions, `correct` of them right, hold a right one.

    The unbiased estimate 1 - C(num - correct, k) / C(num, k) of Chen et al. 2021.

    Raises:
        ValueError: k is not between 1 and `num`, or `correct` not between 0 and `num`.
    """
    if not 1 <= k <= num or not 0 <= correct <= num:
        raise ValueError(f"pass_at_k of num={num}, correct={correct}, k={k}: out of range")
    if num - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num - correct + 1, num + 1))


def is_settled(answers: Iterable[str | None], threshold: float) -> bool:
    """Whether the lead of one answer was settled after some of the first answers, or all.

    Adaptive-Consistency (Aggarwal et al. 2023): completions are drawn until the chance that the
    most frequent answer is more likely than the second exceeds `threshold`. Completions without
    an answer do not vote.
    """
    votes: Counter[str] = Counter()
    for answer in answers:
        if answer is not None:
            votes[answer] += 1
            first, second, *_ = *(count for _, count in votes.most_common(2)), 0
            if lead_chance(first, second) > threshold:
                return True
    return False


@lru_cache(maxsize=4096)
def lead_chance(first: int, second: int) -> float:
    """P(Beta(first + 1, second + 1) > 1/2) of the two largest counts.

    As a sum: at most `first` of first + second + 1 throws of a coin are heads.
    """
    num = first + second + 1
    return sum(math.comb(num, heads) for heads in range(first + 1)) / 2**num


def majority_at_k(answers: Sequence[str | None], is_correct: Sequence[bool], k: int) -> float:
    """1.0 if the most frequent of the first k answers is right, else 0.0.

    Completions without an answer do not vote; ties go to the answer seen first.

    Raises:
        ValueError: k is not between 1 and the number of answers, or the lengths differ.
    """
    if not 1 <= k <= len(answers) or len(answers) != len(is_correct):
        raise ValueError(
            f"majority_at_k of {len(answers)} answers, {len(is_correct)} verdicts, k={k}: "
            "out of range"
        )
    votes = Counter(answer for answer in answers[:k] if answer is not None)
    if not votes:
        return 0.0
    winner = max(votes, key=votes.__getitem__)
    return 1.0 if is_correct[answers.index(winner)] else 0.0


def _grade(text: str, gold: str | None, name: str | None) -> Grade:
    boxed_first = name == "boxed" or (
        name is None and gold is not None and "####" not in gold and "\\boxed" in gold
    )
    extracted = _marked_answer(text, boxed_first) or _last_number(text)
    answer = _canonical(extracted or "") or None
    if gold is not None:
        gold = _canonical(_marked_answer(gold, boxed_first) or gold) or None
    if gold is None:
        return Grade(answer, None, None)
    return Grade(answer, gold, answer is not None and _is_equal(answer, gold))


def _marked_answer(text: str, boxed_first: bool) -> str | None:
    if boxed_first:
        return _last_boxed(text) or _last_hashes(text)
    return _last_hashes(text) or _last_boxed(text)


def _last_hashes(text: str) -> str | None:
    found = _HASHES.findall(text)
    return _last_boxed(found[-1]) or found[-1] if found else None


def _last_boxed(text: str) -> str | None:
    last_start, content = -1, None
    starts: list[int] = []  # of the open braces' contents; -1 for braces that are no box
    for match in _BOX_OR_BRACE.finditer(text):
        if match[0].startswith("\\boxed"):
            starts.append(match.end())
        elif match[0] == "{":
            starts.append(-1)
        elif match[0] == "}" and starts:
            # A box that was cut off never gets here, so the one before it counts.
            start = starts.pop()
            if start > last_start:
                last_start, content = start, text[start : match.start()].strip()
    return content or None


def _last_number(text: str) -> str | None:
    found = _NUMBER_IN_TEXT.findall(text)
    return found[-1] if found else None


def _canonical(text: str) -> str:
    """The one form in which an answer is stored and compared."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    number = _canonical_number(text)
    if number is not None:
        return number
    return re.sub(r"\s*([^\w\s])\s*", r"\1", text.removesuffix("."))


def _is_equal(answer: str, gold: str) -> bool:
    if answer.replace(" ", "") == gold.replace(" ", ""):
        return True
    return answer == gold + "%" and _canonical_number(gold) is not None


def _canonical_number(text: str) -> str | None:
    match = _LONE_NUMBER.fullmatch(text) if len(text) <= _MAX_NUMBER_LENGTH else None
    if match is None:
        return None
    digits = match["fraction"] or match["decimal"]
    try:
        value = int(match["whole"] or 0) + Fraction(re.sub(r"[\s,]", "", digits))
    except ZeroDivisionError:
        return None
    if match["sign"] == "-":
        value = -value
    decimal = format(Decimal(value.numerator) / Decimal(value.denominator), "f")
    written = decimal if Fraction(decimal) == value else str(value)
    return written + "%" if match["percent"] else written


def _user_grader(name: str) -> Grader:
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        _reject(name, f"must be {', '.join(BUILTIN_GRADERS)} or module:function")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        raise ConfigError(
            f"--grader {name}: cannot be imported ({type(error).__name__}: {_one_line(error)}); "
            "check the spelling and that the module is on PYTHONPATH"
        ) from error
    if not callable(function):
        _reject(name, f"{function_name} is not a function")

    def grade(text: str, gold: str | None) -> Grade:
        if gold is None:
            return Grade(None, None, None)
        try:
            result: Any = function(text, gold)
        except Exception as error:  # noqa: BLE001 - hours of work must not end with one text
            return Grade(None, gold, None, f"raised {type(error).__name__}: {_one_line(error)}")
        answer, is_correct = result if _is_pair(result) else (None, result)
        if not isinstance(is_correct, bool) or not (answer is None or isinstance(answer, str)):
            why = f"must return a bool or (text or None, bool), not {result!r:.100}"
            return Grade(None, gold, None, why)
        # Half a surrogate pair cannot be written.
        clean = answer.encode("utf-8", "replace").decode() if answer is not None else None
        return Grade(clean, gold, is_correct)

    return grade


def _is_pair(result: Any) -> bool:
    return isinstance(result, tuple) and len(result) == 2


def _reject(name: str, reason: str) -> NoReturn:
    raise ConfigError(f"--grader {name}: {reason}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
