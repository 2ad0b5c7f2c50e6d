"""The embedded families and students stand where the docs say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from slmreason.data.ledger import Ledger
from slmreason.data.strata import Bands, stratify
from slmreason.embedded.families import DIALS, FAMILIES, SPLITS, make_problems, rebuild
from slmreason.embedded.pretrain import RECIPES, make_student
from slmreason.records import Place
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.student import EMBEDDED, Student
from slmreason.verify.equations import equation_holds
from slmreason.verify.rewards import AnswerReward


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_splits_are_disjoint_by_question(family: str) -> None:
    questions = [{p.question for p in make_problems(family, split, 300)} for split in SPLITS]
    assert all(len(each) == 300 for each in questions)
    assert not questions[0] & questions[1] | questions[1] & questions[2] | questions[0] & questions[2]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"logic"}))
def test_answers_are_hard_to_guess(family: str) -> None:
    answers = Counter(p.answer for p in make_problems(family, "test", 1000))
    assert answers.most_common(1)[0][1] < 50


def test_choices_are_balanced_and_stand_in_the_question() -> None:
    problems = make_problems("logic", "test", 1000)
    assert max(Counter(p.answer for p in problems).values()) < 300
    for problem in problems[:50]:
        assert problem.choices is not None
        assert all(f"{label}) {name}" in problem.question for label, name in zip("ABCD", problem.choices, strict=True))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"logic"}))
def test_programs_are_true_and_end_in_the_answer(family: str) -> None:
    for problem in make_problems(family, "train", 200):
        program = rebuild(problem.id)
        assert all(equation_holds(step.text) for step in program.steps)
        assert program.steps[-1].value == program.answer == problem.answer


def test_the_dial_of_chain_is_the_number_of_steps() -> None:
    for difficulty in DIALS["chain"]:
        for problem in make_problems("chain", "train", 10, (difficulty,)):
            assert len(rebuild(problem.id).steps) == difficulty


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_students_are_small_and_their_tokenizer_loses_nothing(name: str) -> None:
    files = list((EMBEDDED / name).iterdir())
    assert sum(path.stat().st_size for path in files) < 5_000_000
    student = Student(f"embedded:{name}")
    for text in ("12+7=19\nThe answer is \\boxed{19}.", "Ünïcode – 漢字 \t!", "def f(x): return x ** 2"):
        assert student.tokenizer.decode(student.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_each_band_holds_at_least_15_percent_of_the_pool(name: str) -> None:
    student = Student(f"embedded:{name}", instruction="")
    problems = make_problems("chain", "train", 240)
    groups = collect(student, HFEngine(), AnswerReward(), problems, 8, Sampling(80, seed=1))
    ledger = Ledger(None)
    ledger.record(groups, Place(0, "probe"))
    counts = stratify(ledger, problems, Bands()).counts
    assert min(counts["simple"], counts["medium"], counts["hard"]) >= 0.15 * 240, counts


def test_the_script_writes_the_same_file_again(tmp_path: Path) -> None:
    digests = {make_student("qwen2", tmp_path / str(i), steps=3, log_every=0) for i in range(2)}
    assert len(digests) == 1
