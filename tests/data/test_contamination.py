"""Training problems that a benchmark asks too: found through every spelling, and nothing else is."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from slmreason.cli import main
from slmreason.data.contamination import contaminated, normalise
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.sources import load_problems
from slmreason.records import Problem, Turn
from tests.data.test_benchmark_data import FILES, problems_of
from tests.runs import SMALL, Run

QUICK = [*SMALL, "--teacher=null", "--curriculum.stages=[sft]", "--curriculum.probe.attempts=1", "--sft.epochs=1"]


def characters(problem: Problem) -> int:
    """How long a prompt is, without a tokenizer."""
    return len(problem.question)


def found(question: str, asked: str) -> str | None:
    """Why a problem with `question` is rejected when a benchmark asks `asked`."""
    return contaminated([Problem("p", question, "1")], {"bench": [Problem("b-7", asked, "1")]}).get("p")


def pool(path: Path, questions: list[str]) -> str:
    rows = [{"question": question, "answer": str(number)} for number, question in enumerate(questions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def data_module(source: str, decontaminate: bool = True, evidence: Path | None = None) -> ReasoningDataModule:
    return ReasoningDataModule(source, decontaminate=decontaminate, evidence=str(evidence) if evidence else None)


def test_the_very_same_question_is_found_and_its_place_in_the_benchmark_named() -> None:
    assert found("How many?", "How many?") == "contamination: stands in benchmark bench, as b-7"


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("How many apples has Tom?", "how many APPLES has tom?"),
        ("Two\n  lines of\ttext", "Two lines of text"),
        ("Tom's 3 apples; how many?", "Toms 3 apples , how many"),
        ("Wow! Tom has 3 apples...", "Wow, Tom has 3 apples."),
        ("He is twenty-five years old", "He is twenty five years old"),
        ("It costs $5.", "It costs 5"),
        ("It costs $5.", r"It costs \$5."),
        ("What is $x+1$ for $x=2$?", "What is x + 1 for x = 2?"),
        ("He sold 1,234,567 of 12,000", "He sold 1234567 of 12000"),
        ("He sold 1{,}234", "He sold 1,234"),
        (r"Solve $\left(\frac{1}{2}\right) x$", r"Solve $(\frac{1}{2})x$"),
        (r"Solve $\dfrac12 + \tfrac34$", r"Solve $\frac12+\frac34$"),
        (r"Find $a\,b\;c\!d$", "Find $a b c d$"),
        ("１２＋３ ＝ ？", "12+3=?"),
        ("5 − 3", "5 - 3"),
        ("5 – 3", "5 - 3"),
        ("What is 5²?", "What is 5^2?"),
        ("Straße", "STRASSE"),
        ("cafe\u0301 prices", "café prices"),
        ("小明有5个苹果，吃了2个。还剩几个？", "小明有 5 个苹果, 吃了 2 个, 还剩几个?"),
        ("Сколько будет 2 + 2?", "сколько будет 2+2"),
    ],
)
def test_a_question_is_found_through_another_spelling(mine: str, theirs: str) -> None:
    assert found(mine, theirs) == "contamination but for spelling: stands in benchmark bench, as b-7"
    assert found(theirs, mine)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("What is 3 × 4?", "What is 3 ÷ 4?"),
        (r"What is 3 \times 4?", r"What is 3 \div 4?"),
        ("Is 3 < 4?", "Is 3 > 4?"),
        ("Is 3 ≤ 4?", "Is 3 ≥ 4?"),
        ("What is 2^3?", "What is 23?"),
        ("What is 2³?", "What is 23?"),
        ("What is 10₂?", "What is 102?"),
        ("What is f(x)?", "What is fx?"),
        ("What is 1.5?", "What is 15?"),
        ("What is 1.5?", "What is 1 5?"),
        ("What is .5?", "What is 5?"),
        ("What is 1 2?", "What is 12?"),
        ("What is 1,23?", "What is 123?"),
        ("What is 5!?", "What is 5?"),
        ("What is n!?", "What is n?"),
        ("What is 5%?", "What is 5?"),
        ("What is |x|?", "What is x?"),
        ("What is √5?", "What is 5?"),
        ("What is ½?", "What is 12?"),
        ("What is (1, 2)?", "What is [1, 2]?"),
        (r"Is A \leftarrow B?", r"Is A \rightarrow B?"),
        ("It costs €5", "It costs £5"),
        ("小明有五个苹果", "小红有五个苹果"),
        ("小明有五个苹果", "¿?"),
        ("कि", "का"),  # the same consonant, and vowels that are marks
        ("กี่", "กา"),
        ("שלום", "שלוש"),
        ("🍎 + 🍎 = 4, 🍎?", "🍌 + 🍎 = 4, 🍎?"),
        ("Tom has 3 apples", "Tom has 3 pears"),
    ],
)
def test_two_questions_stay_two(mine: str, theirs: str) -> None:
    assert found(mine, theirs) is None
    assert found(theirs, mine) is None


@pytest.mark.parametrize("question", ["?", "...", "$$", "?!", "+", "—", "( )"])
def test_a_question_without_a_letter_or_a_number_is_like_no_other(question: str) -> None:
    assert normalise(question) == ""
    assert found(question, "??" if question == "?" else "?") is None
    assert found(question, question) is not None  # to the letter it is


def test_a_problem_of_the_pool_that_a_benchmark_asks_is_set_aside_with_its_place(tmp_path: Path) -> None:
    source = pool(tmp_path / "pool.jsonl", ["Mine?", "Theirs, 1,000?", "Also mine?", "THEIRS to the letter"])
    theirs = [Problem("t-1", "theirs 1000", "1"), Problem("t-2", "THEIRS to the letter", "3")]
    data = data_module(source)
    data.load(characters, {"other": [], "bench": theirs})
    assert [problem.question for problem in data.problems] == ["Mine?", "Also mine?"]
    assert [(r.id, r.where, r.reason) for r in data.rejects] == [
        (f"{source}-000001", f"{source}, line 2", "contamination but for spelling: stands in benchmark bench, as t-1"),
        (f"{source}-000003", f"{source}, line 4", "contamination: stands in benchmark bench, as t-2"),
    ]


def test_contamination_is_kept_with_a_warning_when_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("slmreason.data.datamodule.log.parent.propagate", True)  # a command before has set it
    data = data_module(pool(tmp_path / "pool.jsonl", ["Mine?", "Theirs?"]), decontaminate=False)
    data.load(characters, {"bench": [Problem("t-1", "theirs", "1")]})
    assert (len(data.problems), data.rejects) == (2, ())
    assert "1 of 2 training problems stand in a benchmark too and are kept (data.decontaminate)" in caplog.text
    assert "stands in benchmark bench, as t-1" in caplog.text


def test_evidence_of_a_problem_that_was_set_aside_is_not_used(tmp_path: Path) -> None:
    source = pool(tmp_path / "pool.jsonl", ["Mine?", "Theirs?"])
    problems = load_problems(source).problems
    ids = [problem.id for problem in problems]
    evidence = tmp_path / "bands.jsonl"
    rows = [{"problem_id": p.id, "key": p.key, "attempts": 4, "successes": 2} for p in problems]
    evidence.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = {"bench": [Problem("t-1", "theirs", "1")]}
    data, all_of_it = data_module(source, evidence=evidence), data_module(source, False, evidence)
    data.load(characters, benchmark)
    all_of_it.load(characters, benchmark)
    assert [row.problem_id for row in data.given_evidence] == ids[:1]
    assert [row.problem_id for row in all_of_it.given_evidence] == ids


def test_a_pool_that_is_a_benchmark_is_refused(tmp_path: Path) -> None:
    source = pool(tmp_path / "pool.jsonl", ["One?", "Two?"])
    with pytest.raises(ValueError, match=r"every problem was rejected: contamination \(2, first .*pool.jsonl, line 1"):
        data_module(source).load(characters, {"bench": load_problems(source).problems})


def test_the_command_counts_what_it_sets_aside_and_writes_it_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pool(Path("pool.jsonl"), ["1 + 1 = ?", "What is 2 + 2?", "3 + 3 = ?", "4 - 4 = ?"])
    pool(Path("held.jsonl"), ["1 + 1 = ?", "what is $2+2$", "4 + 4 = ?"])
    args = ["fit", *QUICK, "--data.train=pool.jsonl", "--benchmarks=[held=held.jsonl]"]
    assert main([*args, "--run_dir=run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "pool: 2 problems from pool.jsonl, 2 rejected: contamination (1, first pool.jsonl, line 1); " in shown
    assert "contamination but for spelling (1, first pool.jsonl, line 2)" in shown
    assert [(row["where"], row["reason"]) for row in Run(Path("run"), "").rows("rejects.jsonl")] == [
        ("pool.jsonl, line 1", "contamination: stands in benchmark held, as held-000000"),
        ("pool.jsonl, line 2", "contamination but for spelling: stands in benchmark held, as held-000001"),
    ]
    assert main([*args, "--run_dir=kept", "--data.decontaminate=false"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 of 4 training problems stand in a benchmark too and are kept (data.decontaminate)" in shown
    assert "pool: 4 problems from pool.jsonl, 0 rejected" in shown
    assert Run(Path("kept"), "").rows("rejects.jsonl") == []


def test_the_command_refuses_a_pool_that_is_a_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pool(Path("pool.jsonl"), ["1 + 1 = ?", "2 + 2 = ?"])
    assert main(["fit", *QUICK, "--data.train=pool.jsonl", "--benchmarks=[held=pool.jsonl]"]) == 2
    error = capsys.readouterr().err
    assert "data.train: pool.jsonl: every problem was rejected: contamination (2, first pool.jsonl, line 1)" in error
    assert "stands in benchmark held, as held-000001" in error
    assert not Path("runs").exists()


@pytest.mark.timing
def test_a_pool_of_thousands_is_looked_through_within_seconds(real_data: Path) -> None:
    sets = {name: problems_of(real_data, name) for name in FILES}
    train = sets.pop("openai/gsm8k")
    start = time.monotonic()
    contaminated(train, sets)
    assert time.monotonic() - start < 5


def test_the_real_training_set_shares_no_question_with_the_benchmarks(real_data: Path) -> None:
    """None is right: of all pairs those with the most words in common tell one story with other numbers."""
    sets = {name: problems_of(real_data, name) for name in FILES}
    train = sets.pop("openai/gsm8k")
    assert contaminated(train, sets) == {}
    leaked = sets["gsm8k"][::100]  # that nothing is found is no accident: what is put in is found
    respelled = [Problem(f"r{i}", f" {p.question.upper()} ", p.answer) for i, p in enumerate(leaked)]
    assert list(contaminated([*train, *respelled], sets)) == [problem.id for problem in respelled]


def test_real_questions_that_stand_in_one_benchmark_twice_are_the_same_but_for_spelling(real_data: Path) -> None:
    """MAWPS has many questions a second time, parted into words: `Sara 's school played 12 games .`"""
    problems = problems_of(real_data, "mawps")
    first: dict[str, Problem] = {}
    twins = []
    for problem in problems:
        seen = first.setdefault(normalise(problem.question), problem)
        if seen.question != problem.question:
            twins.append((seen, problem))
    assert len(twins) == 130
    bare = [["".join(filter(str.isalnum, p.question)).lower() for p in pair] for pair in twins]
    assert all(mine == other for mine, other in bare)
    assert sum(mine.answer != other.answer for mine, other in twins) == 2  # wrong golds of the set itself


def test_a_question_in_another_conversation_is_another_question_and_a_system_turn_is_none() -> None:
    asked = Problem("b", "And twice that?", "4", turns=(Turn("user", "1 + 1?"), Turn("assistant", "2")))
    other = Problem("o", "And twice that?", "8", turns=(Turn("user", "2 + 2?"), Turn("assistant", "4")))
    under = Problem("u", "And twice that?", "4", turns=(Turn("system", "Be brief."), *asked.turns))
    assert set(contaminated([asked, other, under], {"bench": [asked]})) == {"b", "u"}
