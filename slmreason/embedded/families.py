"""Five families of problems that need no download, with a difficulty dial and a known solution program.

Each mirrors one of the paper's benchmarks: `chain` (GSM8K, in domain), `one_step` (MAWPS), `distractor` (SVAMP),
`expression` (MATH) and `logic` (LogiQA, multiple choice). A problem is a pure function of its id, so whoever holds
the id can rebuild the true solution; that is how the procedural teacher knows it. Splits are disjoint by the hash
of the question's text, not by luck of the seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from slmreason.records import Problem

NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Eva", "Leo", "Zoe", "Max", "Ida")
ITEMS = ("apples", "coins", "books", "cards", "pens", "stamps", "shells", "stones")
SPLITS = ("pretrain", "train", "test")
MAX_VALUE = 99
"""Every running value stays in 1..MAX_VALUE, so a blind guess of the answer is right about once in a hundred."""

_ADD = ("{n} buys {b} more {i}.", "{n} finds {b} {i}.", "A friend gives {n} {b} {i}.")
_SUB = ("{n} gives away {b} {i}.", "{n} loses {b} {i}.", "{n} sells {b} {i}.")
_MUL = ("{n} works hard and then has {b} times as many {i}.",)
_DIV = ("{n} splits them into {b} equal bags and keeps one bag.",)


@dataclass(frozen=True)
class Step:
    """One operation of a solution: `left op right=value`, or a relation `left > right` without a value."""

    left: str
    op: str
    right: str
    value: str = ""

    @property
    def text(self) -> str:
        if self.value:
            return f"{self.left}{self.op}{self.right}={self.value}"
        return f"{self.left} {self.op} {self.right}"


@dataclass(frozen=True)
class Program:
    """A question with the steps that solve it, in order, and its answer."""

    question: str
    steps: tuple[Step, ...]
    answer: str
    choices: tuple[str, ...] | None = None


def write_solution(steps: tuple[str, ...] | list[str], answer: str) -> str:
    """The student's own format: one step a line, then the boxed answer."""
    return "\n".join([*steps, answer_line(answer)])


def answer_line(answer: str) -> str:
    return f"The answer is \\boxed{{{answer}}}."


def problem_id(family: str, split: str, difficulty: int, index: int) -> str:
    return f"{family}-{split}-{difficulty}-{index:05d}"


def is_embedded_id(identifier: str) -> bool:
    """True when `rebuild` can give the solution program of this problem id."""
    parts = identifier.split("-")
    return len(parts) == 4 and parts[0] in FAMILIES and parts[1] in SPLITS and parts[2].isdigit() and parts[3].isdigit()


def rebuild(identifier: str) -> Program:
    """The solution program of an embedded problem.

    Raises:
        ValueError: the id is not of the form `family-split-difficulty-index`.
    """
    if not is_embedded_id(identifier):
        raise ValueError(f"{identifier!r} is not the id of an embedded problem (family-split-difficulty-index)")
    family, split, difficulty, _ = identifier.split("-")
    for attempt in range(10_000):
        program = FAMILIES[family](random.Random(f"{identifier}/{attempt}"), int(difficulty))
        if _split_of(program.question) == split:
            return program
    raise AssertionError(f"no question of {family} at difficulty {difficulty} falls into split {split}")


def make_problem(family: str, split: str, difficulty: int, index: int) -> Problem:
    identifier = problem_id(family, split, difficulty, index)
    program = rebuild(identifier)
    return Problem(
        id=identifier,
        question=program.question,
        answer=program.answer,
        source=f"embedded:{family}/{split}",
        choices=program.choices,
    )


def make_problems(family: str, split: str, count: int, difficulties: tuple[int, ...] | None = None) -> list[Problem]:
    """`count` different problems, the difficulties in rotation.

    Raises:
        ValueError: the family or split is unknown, or a difficulty is outside the family's dial.
    """
    if family not in FAMILIES or split not in SPLITS:
        raise ValueError(f"embedded {family}/{split}: families are {sorted(FAMILIES)}, splits {SPLITS}")
    dial = difficulties or DIALS[family]
    if not set(dial) <= set(DIALS[family]):
        raise ValueError(f"embedded {family}: difficulties {dial} are outside its dial {DIALS[family]}")
    problems: list[Problem] = []
    seen: set[str] = set()
    index = 0
    while len(problems) < count:
        problem = make_problem(family, split, dial[len(problems) % len(dial)], index)
        index += 1
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems


def _split_of(question: str) -> str:
    return SPLITS[hashlib.sha256(question.encode()).digest()[0] % len(SPLITS)]


def apply(left: int, op: str, right: int) -> int | None:
    """`left op right` when it is a whole number, else None."""
    if op == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[op]


def _draw_step(rng: random.Random, value: int) -> tuple[str, int, int]:
    """An operation that keeps the running value in 2..MAX_VALUE: (op, operand, result)."""
    while True:
        op = rng.choices("+-*/", weights=(35, 35, 15, 15))[0]
        operand = rng.randint(2, 4) if op in "*/" else rng.randint(2, 40)
        result = apply(value, op, operand)
        if result is not None and 2 <= result <= MAX_VALUE:
            return op, operand, result


def _sentence(rng: random.Random, op: str, name: str, operand: int, item: str) -> str:
    template = rng.choice({"+": _ADD, "-": _SUB, "*": _MUL, "/": _DIV}[op])
    return template.format(n=name, b=operand, i=item)


def chain(rng: random.Random, difficulty: int) -> Program:
    """`difficulty` operations in a row on one running number."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    value = rng.randint(4, 60)
    sentences, steps = [f"{name} has {value} {item}."], []
    for _ in range(difficulty):
        op, operand, result = _draw_step(rng, value)
        sentences.append(_sentence(rng, op, name, operand, item))
        steps.append(Step(str(value), op, str(operand), str(result)))
        value = result
    sentences.append(f"How many {item} does {name} have now?")
    return Program(" ".join(sentences), tuple(steps), str(value))


def one_step(rng: random.Random, difficulty: int) -> Program:
    """One operation in one of four classic shapes; the dial sets the size of the numbers."""
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    top = {1: 20, 2: 45}[difficulty]
    shape = rng.choice(("total", "left", "product", "share"))
    if shape == "total":
        a, op, b = rng.randint(2, top), "+", rng.randint(2, top)
        text = f"{name} has {a} {item} and {other} has {b} {item}. How many {item} do they have together?"
    elif shape == "left":
        b = rng.randint(2, top)
        a, op = b + rng.randint(2, top), "-"
        text = f"{name} had {a} {item} and used {b} of them. How many {item} are left?"
    elif shape == "product":
        a, op = rng.randint(2, 9), "*"
        b = rng.randint(2, min(MAX_VALUE // a, 9 * difficulty))
        text = f"There are {a} boxes with {b} {item} in each box. How many {item} are there?"
    else:
        b, op = rng.randint(2, 9), "/"
        a = b * rng.randint(2, min(MAX_VALUE // b, 9 * difficulty))
        text = f"{name} shares {a} {item} equally among {b} friends. How many {item} does each friend get?"
    result = apply(a, op, b)
    return Program(text, (Step(str(a), op, str(b), str(result)),), str(result))


def distractor(rng: random.Random, difficulty: int) -> Program:
    """A two-step chain among `difficulty` sentences whose numbers do not matter."""
    name, *others = rng.sample(NAMES, 3)
    item, *other_items = rng.sample(ITEMS, 3)
    value = rng.randint(4, 60)
    sentences, steps = [f"{name} has {value} {item}."], []
    for _ in range(2):
        op, operand, result = _draw_step(rng, value)
        sentences.append(_sentence(rng, op, name, operand, item))
        steps.append(Step(str(value), op, str(operand), str(result)))
        value = result
    for _ in range(difficulty):
        noise = f"{rng.choice(others)} has {rng.randint(2, 60)} {rng.choice(other_items)}."
        sentences.insert(rng.randint(0, len(sentences)), noise)
    sentences.append(f"How many {item} does {name} have now?")
    return Program(" ".join(sentences), tuple(steps), str(value))


def expression(rng: random.Random, difficulty: int) -> Program:
    """`difficulty` operations in a bracketed expression, or a linear equation in x (two operations)."""
    if difficulty == 2 and rng.random() < 0.5:
        x, a = rng.randint(2, 12), rng.randint(2, 4)
        b = rng.randint(2, 40)
        steps = (Step(str(a * x + b), "-", str(b), str(a * x)), Step(str(a * x), "/", str(a), str(x)))
        return Program(f"Solve {a} * x + {b} = {a * x + b} for x.", steps, str(x))
    value = rng.randint(4, 60)
    text, drawn = str(value), []
    for position in range(difficulty):
        op, operand, result = _draw_step(rng, value)
        text = f"{text} {op} {operand}" if position == 0 else f"({text}) {op} {operand}"
        drawn.append(Step(str(value), op, str(operand), str(result)))
        value = result
    return Program(f"Compute {text}.", tuple(drawn), str(value))


def logic(rng: random.Random, difficulty: int) -> Program:
    """Put `difficulty + 2` people in order of height and pick one out of four options; from 2 on `shorter` occurs."""
    count = difficulty + 2
    order = rng.sample(NAMES, max(count, 4))
    ranked, extra = order[:count], order[count:]
    facts = []
    for taller, shorter in zip(ranked, ranked[1:], strict=False):
        plain = f"{taller} is taller than {shorter}."
        facts.append(plain if difficulty == 1 or rng.random() < 0.5 else f"{shorter} is shorter than {taller}.")
    rng.shuffle(facts)
    wants_tallest = rng.random() < 0.5
    target = ranked[0] if wants_tallest else ranked[-1]
    options = rng.sample([n for n in ranked if n != target] + extra, 3) + [target]
    rng.shuffle(options)
    letter = "ABCD"[options.index(target)]
    question = " ".join(facts) + f" Who is the {'tallest' if wants_tallest else 'shortest'}? "
    question += " ".join(f"{label}) {option}" for label, option in zip("ABCD", options, strict=True))
    steps = tuple(Step(a, ">", b) for a, b in zip(ranked, ranked[1:], strict=False))
    return Program(question, steps, letter, tuple(options))


FAMILIES: dict[str, Callable[[random.Random, int], Program]] = {
    "chain": chain,
    "one_step": one_step,
    "distractor": distractor,
    "expression": expression,
    "logic": logic,
}
DIALS: dict[str, tuple[int, ...]] = {
    "chain": (1, 2, 3, 4, 5, 6),
    "one_step": (1, 2),
    "distractor": (1, 2, 3),
    "expression": (1, 2, 3),
    "logic": (1, 2, 3),
}
