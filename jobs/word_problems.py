# SPDX-License-Identifier: Apache-2.0
"""Grade-school word problems in GSM8K format, made from story templates.

A problem is a question and an answer; the answer is a short chain of thought with one calculation
on every line and ends in a line ``#### N``. Each reasoning step has several wordings, so that two
answers to one question differ in words but agree in substance.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
FINAL_ANSWER = re.compile(r"^#### (\d+)$", re.MULTILINE)
LARGEST_NUMBER = 150

_MEN = ("Adam", "Ben", "Carl", "David", "Eric", "Felix", "Gary", "Hugo", "Ivan", "Jack")
_WOMEN = ("Anna", "Bella", "Clara", "Dora", "Emma", "Fiona", "Grace", "Helen", "Ivy", "Julia")
_PEOPLE = (*((name, "he") for name in _MEN), *((name, "she") for name in _WOMEN))
_WORDS = {
    "fruit": ("apples", "pears", "plums", "lemons", "peaches", "oranges"),
    "toy": ("marbles", "stickers", "cards", "shells", "beads", "coins", "stamps", "buttons"),
    "bake": ("cookies", "muffins", "rolls", "pies", "cupcakes"),
    "snack": ("sandwich", "pretzel", "burger", "taco", "hot dog"),
    "drink": ("juice", "soda", "lemonade", "iced tea"),
    "day": ("Tuesday", "Wednesday", "Thursday", "Friday"),
    "hall": ("theater", "school hall", "cinema", "library"),
    "chore": ("walking dogs", "washing cars", "mowing lawns", "babysitting"),
    "sport": ("runs", "swims", "walks", "cycles"),
}
_LEADS = (
    ("", "", "first, ", "to begin, ", "we see that "),
    ("", "", "then ", "next, ", "after that, "),
    ("", "", "so ", "finally, ", "this means "),
)


# A story holds, in this order: the ranges of its numbers, the question's wordings (``?``), and the
# reasoning steps ``name = left op right | wording | wording ...``, where a wording has ``{eq}`` in
# the place of the calculation. An indented line continues the one before it.
_STORIES = """
a 6-60 b 6-60 c 3-50
? {name} picks {a} {fruit} on Monday and {b} {fruit} on {day}. {He} gives {c} of them to {friend}.
  How many {fruit} does {name} have left?
? On Monday {name} picks {a} {fruit}. On {day} {he} picks {b} more and then sells {c}. How many
  {fruit} are left?
t = a + b | {name} picks {eq} {fruit} | in all there are {eq} {fruit} | the two days give {eq}
  {fruit}
r = t - c | {name} keeps {eq} {fruit} | there are {eq} {fruit} left | taking away {c} leaves {eq}
  {fruit}

a 2-9 b 3-12 c 5-40 d 3-40
? {name} buys {a} boxes of {toy} with {b} {toy} in each box. {He} already had {c} {toy}. {He} gives
  {d} {toy} to {friend}. How many {toy} does {name} have now?
? {name} has {c} {toy} and gets {a} boxes with {b} {toy} each. If {he} loses {d} {toy}, how many
  {toy} does {he} have?
t = a * b | the boxes hold {eq} {toy} | {name} gets {eq} new {toy} | {a} boxes make {eq} {toy}
s = t + c | with the old ones {he} has {eq} {toy} | that makes {eq} {toy} | {name} has a total of
  {eq} {toy}
r = s - d | {name} now has {eq} {toy} | {he} is left with {eq} {toy} | without {d} of them it is
  {eq} {toy}

a 2-9 b 2-6 c 2-9 d 2-9
? A {snack} costs {a} dollars and a {drink} costs {b} dollars. {name} buys {c} of the first and {d}
  of the second. How many dollars does {he} spend?
? {name} orders {c} times a {snack} for {a} dollars and {d} times a {drink} for {b} dollars. What is
  the total price in dollars?
t = c * a | the food costs {eq} dollars | for each {snack} {he} pays {a}, which is {eq} | {name}
  pays {eq} dollars for food
u = d * b | the drinks cost {eq} dollars | for each {drink} {he} pays {b}, which is {eq} | {name}
  pays {eq} dollars for drinks
r = t + u | the total is {eq} dollars | {name} spends {eq} dollars | together that is {eq} dollars

m 40-140 a 2-9 c 2-9 b 4-30
? {name} has {m} dollars. {He} buys {c} packs of {toy} for {a} dollars each and a book for {b}
  dollars. How many dollars are left?
? A pack of {toy} costs {a} dollars and a book costs {b} dollars. {name} pays for {c} packs and one
  book with {m} dollars. How much change does {he} get?
t = c * a | the packs cost {eq} dollars | {name} pays {eq} dollars for the {toy} | {c} packs are
  {eq} dollars
u = t + b | with the book it is {eq} dollars | {he} spends {eq} dollars | the whole price is {eq}
  dollars
r = m - u | {name} has {eq} dollars left | the change is {eq} dollars | what remains is {eq} dollars

a 2-12 b 3-12 c 2-9
? {name} has {a} bags with {b} {toy} in each. {He} shares all of them equally among {c} friends. How
  many {toy} does each friend get?
? There are {a} bags of {b} {toy}. {name} splits the {toy} evenly between {c} children. How many
  does each child get?
t = a * b | the bags hold {eq} {toy} | {name} has {eq} {toy} | there are {eq} {toy} in all
r = t / c | each one gets {eq} {toy} | sharing gives {eq} {toy} each | a fair part is {eq} {toy}

a 3-12 b 2-7 c 2-7 d 5-40
? {name} earns {a} dollars an hour {chore}. {He} works {b} hours on Monday and {c} hours on {day}.
  Then {he} spends {d} dollars. How many dollars does {he} have?
? {name} makes {a} dollars per hour {chore}. After {b} hours on Monday and {c} hours on {day}, {he}
  pays {d} dollars for a gift. How much money is left?
t = b + c | {name} works {eq} hours | the time is {eq} hours | there are {eq} hours of work
u = t * a | {he} earns {eq} dollars | the pay is {eq} dollars | at {a} dollars an hour that is {eq}
  dollars
r = u - d | {name} has {eq} dollars | {eq} dollars are left | after paying {d} dollars {he} has {eq}

a 50-150 b 4-12 c 3-9 d 5-30
? A book has {a} pages. {name} reads {b} pages a day for {c} days and then {d} pages on one day. How
  many pages are left to read?
? {name} reads a book with {a} pages. For {c} days {he} reads {b} pages each day, and {friend} reads
  {d} more to {name}. How many pages remain?
t = b * c | in {c} days {name} reads {eq} pages | the daily reading is {eq} pages | {he} reads {eq}
  pages at first
u = t + d | with {d} more it is {eq} pages | the pages read are {eq} | this adds up to {eq} pages
r = a - u | there are {eq} pages left | {name} still has {eq} pages | the rest of the book is {eq}
  pages

a 3-25 b 2-5
? {name} has {a} {toy}. {friend} has {b} times as many. How many {toy} do they have together?
? {friend} has {b} times as many {toy} as {name}, who has {a}. How many {toy} are there in all?
t = a * b | {friend} has {eq} {toy} | {b} times as many is {eq} {toy} | the number for {friend} is
  {eq}
r = t + a | together they have {eq} {toy} | in total there are {eq} {toy} | adding both gives {eq}
  {toy}

a 8-40 b 3-30 c 2-30
? {name} scores {a} points. {friend} scores {b} points more than {name}. {third} scores {c} points
  less than {friend}. How many points do the three score?
? In a game {name} gets {a} points, {friend} gets {b} more than {name}, and {third} gets {c} fewer
  than {friend}. What is the total of all points?
t = a + b | {friend} scores {eq} points | {friend} has {eq} points | for {friend} it is {eq} points
u = t - c | {third} scores {eq} points | {third} has {eq} points | for {third} it is {eq} points
v = a + t | {name} and {friend} make {eq} points | the first two have {eq} points
r = v + u | all three score {eq} points | the total is {eq} points | with {third} it is {eq} points

a 3-12 b 3-12 c 2-7 d 5-60
? {name} keeps {a} hens and {b} ducks. Each bird lays {c} eggs a week. {name} sells {d} eggs. How
  many eggs are left after one week?
? On a farm there are {a} hens and {b} ducks, and every bird lays {c} eggs a week. If {d} eggs
  break, how many eggs does the farm have after a week?
t = a + b | there are {eq} birds | the farm has {eq} birds | hens and ducks make {eq} birds
u = t * c | they lay {eq} eggs | in a week there are {eq} eggs | with {c} eggs each we get {eq} eggs
r = u - d | there are {eq} eggs left | {eq} eggs remain | taking {d} away leaves {eq} eggs

a 3-12 b 4-12 c 4-60 d 3-30
? A {hall} has {a} rows with {b} chairs in each row. {c} chairs are taken, and then {d} more people
  sit down. How many chairs are free?
? In a {hall} there are {a} rows of {b} chairs. {c} people have a seat and {d} more people come in.
  How many chairs stay empty?
t = a * b | the {hall} has {eq} chairs | there are {eq} chairs | the rows make {eq} chairs
u = c + d | {eq} chairs are taken | the number of people is {eq} | people use {eq} chairs
r = t - u | {eq} chairs are free | there are {eq} empty chairs | that leaves {eq} chairs

a 12-60 b 3-40 c 3-40 d 3-40
? A bus has {a} people on it. At the first stop {b} get off and {c} get on. At the next stop {d}
  more get on. How many people are on the bus?
? {name} drives a bus with {a} people. {b} people leave at the first stop, {c} people enter, and {d}
  more enter later. How many people are on the bus now?
t = a - b | {eq} people stay on the bus | after some leave there are {eq} people | the bus keeps
  {eq} people
u = t + c | with the new ones there are {eq} people | the bus then has {eq} people | {c} more makes
  {eq} people
r = u + d | now the bus has {eq} people | there are {eq} people on the bus | at the end it is {eq}
  people

a 2-9 b 4-12 c 2-20 d 2-9
? {name} bakes {a} trays of {b} {bake}. {He} eats {c} and puts the rest into bags of {d}. How many
  bags does {he} fill?
? There are {a} trays with {b} {bake} each. {friend} takes {c} of them. {name} packs the others in
  bags with {d} {bake} each. How many bags are there?
t = a * b | {name} bakes {eq} {bake} | there are {eq} {bake} | the trays hold {eq} {bake}
u = t - c | {eq} {bake} are left | this leaves {eq} {bake} | the rest is {eq} {bake}
r = u / d | {name} fills {eq} bags | there are {eq} bags | packing makes {eq} bags

a 3-12 b 3-9 c 4-50 d 5-50
? {name} saves {a} dollars each week for {b} weeks. {He} spends {c} dollars on {toy} and gets {d}
  dollars from {friend}. How many dollars does {he} have?
? For {b} weeks {name} saves {a} dollars a week. Then {he} gets {d} dollars as a gift and pays {c}
  dollars for {toy}. How much money does {he} have?
t = a * b | {name} saves {eq} dollars | the savings are {eq} dollars | {b} weeks give {eq} dollars
u = t + d | with the gift {he} has {eq} dollars | adding {d} gives {eq} dollars | that grows to {eq}
  dollars
r = u - c | {name} has {eq} dollars | what is left is {eq} dollars | after buying {toy} {he} has
  {eq} dollars

a 4-15 b 2-12 c 2-4 d 2-20
? {name} is {a} years old. {friend} is {b} years older. {third} is {c} times as old as {friend}. How
  old will {third} be in {d} years?
? {friend} is {b} years older than {name}, who is {a}. {third} is {c} times as old as {friend}. What
  is the age of {third} in {d} years?
t = a + b | {friend} is {eq} years old | the age of {friend} is {eq}
u = t * c | {third} is {eq} years old | the age of {third} is {eq}
r = u + d | in {d} years {third} is {eq} | {third} will be {eq} years old | later the age is {eq}

a 2-12 b 2-15 c 3-6 d 3-40
? {name} {sport} {a} miles on each of {c} days and {b} miles on each of the 2 weekend days. {friend}
  {sport} {d} miles less. How many miles is that for {friend}?
? On {c} days {name} {sport} {a} miles a day, and on 2 more days {b} miles a day. {friend} {sport}
  {d} miles less than {name}. How far does {friend} get in miles?
t = a * c | the {c} days make {eq} miles | {name} {sport} {eq} miles at first
u = b * 2 | the other days make {eq} miles | {he} also {sport} {eq} miles
v = t + u | {name} {sport} {eq} miles in all | both parts make {eq} miles
r = v - d | {friend} {sport} {eq} miles | the distance for {friend} is {eq} miles

a 10-120 b 5-60 c 3-40
? {name} has {a} {toy} and gives half of them to {friend}. Then {he} finds {b} and loses {c}. How
  many {toy} does {name} have?
? {friend} gets half of the {a} {toy} that {name} has. Later {name} buys {b} more but drops {c}. How
  many {toy} does {name} have?
t = a / 2 | {name} keeps {eq} {toy} | half of them is {eq} {toy} | each has {eq} {toy}
u = t + b | with the new ones {he} has {eq} {toy} | that makes {eq} {toy} | {b} more gives {eq}
  {toy}
r = u - c | {name} has {eq} {toy} | {he} ends with {eq} {toy} | this leaves {eq} {toy}

a 3-12 b 4-12 c 3-12 d 2-6
? {name} cuts {a} pizzas into {b} slices each. At a party {c} children eat {d} slices each. How many
  slices are left?
? At a party {c} children eat {d} slices of pizza each. There are {a} pizzas with {b} slices each.
  How many slices does {name} find after the party?
t = a * b | there are {eq} slices | the pizzas make {eq} slices | {name} has {eq} slices
u = c * d | the children eat {eq} slices | {eq} slices are eaten | {c} children need {eq} slices
r = t - u | {eq} slices are left | this leaves {eq} slices | {name} finds {eq} slices

a 5-15 b 2-9 c 4-50
? {name} and {friend} sell {a} cups of {drink} for {b} dollars each. They paid {c} dollars to make
  it. They split the profit in half. How many dollars does each get?
? Making {drink} costs {name} and {friend} {c} dollars. They sell {a} cups at {b} dollars a cup and
  share the profit equally. How many dollars does {name} get?
t = a * b | they take in {eq} dollars | the cups bring {eq} dollars | sales are {eq} dollars
u = t - c | the profit is {eq} dollars | after the cost they keep {eq} dollars | without the cost it
  is {eq} dollars
r = u / 2 | each gets {eq} dollars | {name} gets {eq} dollars | half of it is {eq} dollars

a 8-60 b 8-60 c 2-9
? There are {a} boys and {b} girls at a camp. {name} puts them into teams of {c}. How many teams are
  there?
? {name} takes {a} boys and {b} girls to the {hall}. Each table seats {c} children. How many tables
  do the children need?
t = a + b | there are {eq} children | boys and girls make {eq} children | the group has {eq}
  children
r = t / c | they make {eq} groups | we need {eq} groups | groups of {c} give {eq}
"""


@dataclass(frozen=True)
class _Template:
    """One story: its numbers' ranges, question wordings and (calculation, wordings) steps."""

    numbers: dict[str, tuple[int, int]]
    questions: tuple[str, ...]
    steps: tuple[tuple[str, tuple[str, ...]], ...]


def _parse(story: str) -> _Template:
    """Return the template of one story's text."""
    ranges, *lines = re.sub(r"\n +", " ", story.strip()).split("\n")
    numbers = re.findall(r"(\w+) (\d+)-(\d+)", ranges)
    steps = [re.split(r" *\| *", line) for line in lines if not line.startswith("?")]
    return _Template(
        {name: (int(low), int(high)) for name, low, high in numbers},
        tuple(line.removeprefix("? ") for line in lines if line.startswith("?")),
        tuple((calculation, tuple(wordings)) for calculation, *wordings in steps),
    )


_TEMPLATES = tuple(_parse(story) for story in _STORIES.strip().split("\n\n"))


def calculate(left: int, operator: str, right: int) -> int | None:
    """Return the result of one calculation, or None where a division is not exact."""
    if operator == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _solve(template: _Template, rng: random.Random) -> tuple[dict[str, int], list[str]]:
    """Draw numbers until every step's result is in range; return the values and the equations."""
    while True:
        values = {name: rng.randint(*bounds) for name, bounds in template.numbers.items()}
        equations: list[str] = []
        for calculation, _ in template.steps:
            name, _, left, operator, right = calculation.split()
            x, y = (values[part] if part in values else int(part) for part in (left, right))
            result = calculate(x, operator, y)
            if result is None or not 1 < result <= LARGEST_NUMBER:
                break
            values[name] = result
            equations.append(f"{x} {operator} {y} = {result}")
        else:
            return values, equations


def _problem(rng: random.Random) -> dict[str, str]:
    """Return one problem."""
    template = rng.choice(_TEMPLATES)
    (name, he), (friend, _), (third, _) = rng.sample(_PEOPLE, 3)
    values, equations = _solve(template, rng)
    words = {kind: rng.choice(choices) for kind, choices in _WORDS.items()}
    people = {"name": name, "friend": friend, "third": third, "he": he, "He": he.capitalize()}
    fields: dict[str, str | int] = {**words, **people, **values}
    lines = []
    for index, ((_, wordings), equation) in enumerate(zip(template.steps, equations, strict=True)):
        last = index == len(equations) - 1
        lead = rng.choice(_LEADS[2 if last else min(index, 1)])
        sentence = lead + rng.choice(wordings).format(eq=equation, **fields) + "."
        lines.append(sentence[0].upper() + sentence[1:])
    lines.append(f"#### {equations[-1].split()[-1]}")
    question = rng.choice(template.questions).format(**fields)
    return {"question": question, "answer": "\n".join(lines)}


def _distinct(num: int, seed: int, stream: str, excluded: set[str]) -> Iterator[dict[str, str]]:
    """Yield num problems whose questions are neither excluded nor repeated."""
    if num < 0:
        raise ValueError(f"the number of problems must not be negative, got {num}")
    rng = random.Random(f"{stream}:{seed}")
    seen = set(excluded)
    while num > 0:
        problem = _problem(rng)
        if problem["question"] not in seen:
            seen.add(problem["question"])
            num -= 1
            yield problem


def generate(num: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield num problems with distinct questions, the same ones for the same seed."""
    yield from _distinct(num, seed, "train", set())


def split(
    train: int, held_out: int, seed: int
) -> tuple[Iterator[dict[str, str]], list[dict[str, str]]]:
    """Return training problems (lazily) and held-out ones; no question text is in both."""
    kept_back = list(_distinct(held_out, seed, "held-out", set()))
    excluded = {problem["question"] for problem in kept_back}
    return _distinct(train, seed, "train", excluded), kept_back
