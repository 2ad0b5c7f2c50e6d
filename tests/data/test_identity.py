"""Evidence, traces and critiques belong to a question with its gold, wherever the row stands and the file lies."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmreason.cli import main
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.evidence import matched_evidence, of_pool, readable_row
from slmreason.data.identity import check_pool, given_critiques, given_traces, pool_text
from slmreason.data.recorded import read_recorded
from slmreason.data.sources import load_problems
from slmreason.data.strata import Bands
from slmreason.records import BridgeResult, Critique, Evidence, Problem, Rollout, RolloutGroup, Trace, Turn, to_json
from tests.runs import SMALL

FIT = [*SMALL, "--curriculum.stages=[sft]", "--curriculum.probe.attempts=1", "--sft.epochs=1", "--benchmarks=[]",
       "--teacher=TraceTeacher", "--grpo.max_completion_tokens=16"]  # fmt: skip


def characters(problem: Problem) -> int:
    """How long a prompt is, without a tokenizer."""
    return len(problem.question)


def row(number: int) -> dict[str, str]:
    return {
        "question": f"What is {number} + {number}?",
        "answer": f"{number} + {number} = {2 * number}\n#### {2 * number}",
    }


def pool(path: Path | str, numbers: Sequence[int]) -> str:
    Path(path).write_text("".join(json.dumps(row(number)) + "\n" for number in numbers))
    return str(path)


def group(problem: Problem, right: int = 0) -> RolloutGroup:
    rollouts = (Rollout((1,), (2,), (-0.5,), f"text {i}", float(i < right), i < right, False, 0) for i in range(2))
    return RolloutGroup(problem, tuple(rollouts))


def row_of(rollouts: RolloutGroup) -> dict[str, Any]:
    return readable_row(Evidence.of(rollouts), rollouts.problem, Bands())


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def number_of(problem: Problem) -> int:
    return int(problem.answer) // 2


@given(data=st.data())
@settings(deadline=None)
def test_evidence_stays_with_its_problem_when_a_file_is_cut_sorted_and_moved(data: st.DataObject) -> None:
    before = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=12), label="rows that were measured")
    after = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=12), label="rows of the pool now")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = load_problems(pool(folder / "a.jsonl", before)).problems
        rows = [row_of(group(problem, number_of(problem) % 3)) for problem in measured]
        evidence = write(folder / "bands.jsonl", rows)
        source = pool(folder / "b.jsonl", after)
        problems = load_problems(f"other={source}").problems
        matched = matched_evidence(evidence, problems)
    by_id = {problem.id: problem for problem in problems}
    found = {evidence.problem_id: evidence for evidence in of_pool(matched)}
    assert set(found) == {problem.id for problem in problems if number_of(problem) in before}
    for identifier, evidence_of_it in found.items():
        assert evidence_of_it.successes == number_of(by_id[identifier]) % 3
    assert len(matched.rejects) == sum(number not in after for number in before)


def module(source: str, evidence: Path) -> ReasoningDataModule:
    return ReasoningDataModule(source, evidence=str(evidence), decontaminate=False)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    import logging

    monkeypatch.setattr(logging.getLogger("slmreason"), "propagate", True)  # a command before has set it
    caplog.set_level("INFO")
    return caplog


def test_how_many_lines_match_is_said_and_the_others_are_rejected(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    measured = load_problems(pool(tmp_path / "a.jsonl", [1, 2, 3])).problems
    evidence = write(tmp_path / "bands.jsonl", [row_of(group(problem, 1)) for problem in measured])
    data = module(pool(tmp_path / "a.jsonl", [2, 3, 4]), evidence)
    data.load(characters, {})
    assert "2 of 3 lines match, 2 of 3 problems have one; 1 are rejected: not in data.train" in said.text
    assert [reject.where for reject in data.unmatched] == [str(evidence)]
    assert "What is 1 + 1?" in data.unmatched[0].reason


def test_a_gold_that_was_corrected_is_another_problem(tmp_path: Path) -> None:
    [problem] = load_problems(pool(tmp_path / "a.jsonl", [1])).problems
    evidence = write(tmp_path / "bands.jsonl", [row_of(group(problem, 1))])
    Path(tmp_path / "a.jsonl").write_text(json.dumps({"question": "What is 1 + 1?", "answer": "3"}) + "\n")
    with pytest.raises(ValueError, match=r"data.evidence: .*bands.jsonl: none of its 1 lines is about a problem"):
        module(str(tmp_path / "a.jsonl"), evidence).load(characters, {})


def test_evidence_that_holds_an_id_alone_is_refused(tmp_path: Path) -> None:
    source = pool(tmp_path / "a.jsonl", [1])
    evidence = write(tmp_path / "bands.jsonl", [{"problem_id": f"{source}-000000", "attempts": 4, "successes": 2}])
    with pytest.raises(ValueError, match="without question and gold: by its id alone"):
        module(source, evidence).load(characters, {})


def test_evidence_of_an_earlier_version_is_matched_by_its_question_and_answer(tmp_path: Path) -> None:
    source = pool(tmp_path / "a.jsonl", [1, 2])
    old = {"problem_id": "elsewhere-000007", "attempts": 4, "successes": 2, "question": "What is 2 + 2?", "answer": "4"}
    data = module(source, write(tmp_path / "bands.jsonl", [old]))
    data.load(characters, {})
    assert [found.problem_id for found in data.given_evidence] == [f"{source}-000001"]


def test_an_embedded_problem_is_known_by_its_id(tmp_path: Path) -> None:
    source = "embedded:chain/train?count=2"
    first = load_problems(source).problems[0].id
    evidence = write(tmp_path / "bands.jsonl", [{"problem_id": first, "attempts": 4, "successes": 2}])
    data = module(source, evidence)
    data.load(characters, {})
    assert [found.problem_id for found in data.given_evidence] == [first]


def test_the_ledger_of_a_run_is_evidence_by_the_pool_that_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    before = load_problems(pool(tmp_path / "a.jsonl", [1, 2, 3])).problems
    (tmp_path / "run" / "pool.json").write_text(pool_text(before))
    ledger = [{"problem_id": problem.id, "attempts": 4, "successes": number_of(problem)} for problem in before]
    evidence = write(tmp_path / "run" / "ledger.jsonl", ledger)
    data = module(pool(tmp_path / "a.jsonl", [3, 2]), evidence)
    data.load(characters, {})
    assert {found.problem_id[-1]: found.successes for found in data.given_evidence} == {"0": 3, "1": 2}


def test_traces_and_critiques_go_to_the_problem_that_they_are_about(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    before = load_problems(pool(tmp_path / "a.jsonl", [1, 2, 3])).problems
    after = load_problems(pool(tmp_path / "a.jsonl", [3, 2])).problems
    results = [BridgeResult(p, (), Trace(p.id, f"about {number_of(p)}", "teacher")) for p in before]
    records = [Critique(p, f"about {number_of(p)}", None, "", None, None) for p in before]
    traces, others = given_traces(results, after, "bridge.jsonl")
    assert {trace.problem_id: trace.text for trace in traces.values()} == {p.id: f"about {number_of(p)}" for p in after}
    assert all(identifier == trace.problem_id for identifier, trace in traces.items())
    assert len(others) == 1
    kept, others = given_critiques(records, after, "critique.jsonl")
    assert [(record.problem, record.attempt) for record in kept] == [(after[1], "about 2"), (after[0], "about 3")]
    assert len(others) == 1
    assert said.text.count("2 of 3 lines match, 2 of 2 problems have one; 1 are rejected") == 2


def test_recorded_rollouts_of_one_question_with_two_golds_are_two_problems(tmp_path: Path) -> None:
    rows = [{"question": "Which?", "gold": gold, "response": "It is \\boxed{2}."} for gold in ("2", "3", "2")]
    groups, _, _ = read_recorded(write(tmp_path / "rollouts.jsonl", rows))
    assert [(g.problem.answer, [r.correct for r in g.rollouts]) for g in groups] == [
        ("2", [True, True]),
        ("3", [False]),
    ]


def test_the_gold_of_recorded_rollouts_may_stand_in_a_solution(tmp_path: Path) -> None:
    rows = [{"question": "Which?", "answer": row(1)["answer"] + "\nThat is all.", "response": "It is \\boxed{2}."}]
    [recorded], _, _ = read_recorded(write(tmp_path / "rollouts.jsonl", rows))
    assert (recorded.problem.answer, recorded.num_correct) == ("2", 1)


# -- the pool of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ([1, 3], "1 of 3 problems match, 1 are gone or changed, 2 are there now; the first that differs: "),
        ([2, 1, 3], "1 of 3 problems match, 0 are gone or changed"),
        ([1, 2], "2 of 3 problems match, 1 are gone or changed, 2 are there now; the first that is gone: "),
        ([1, 2, 3, 4], "3 of 3 problems match, 0 are gone or changed, 4 are there now; the first that is new: "),
    ],
)
def test_a_run_does_not_go_on_with_another_pool(tmp_path: Path, now: list[int], says: str) -> None:
    source = tmp_path / "a.jsonl"
    (tmp_path / "pool.json").write_text(pool_text(load_problems(pool(source, [1, 2, 3])).problems))
    check_pool(tmp_path / "pool.json", load_problems(str(source)).problems)
    with pytest.raises(ValueError, match="pool.json: data.train is not as the run was begun with") as error:
        check_pool(tmp_path / "pool.json", load_problems(pool(source, now)).problems)
    assert says in str(error.value)


def test_the_command_matches_by_question_and_refuses_to_resume_with_another_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pool("a.jsonl", [1, 2, 3, 4])
    data = ["--data.train=a.jsonl"]
    assert main(["stratify", *FIT, *data, "--out=bands.jsonl"]) == 0
    capsys.readouterr()
    pool("a.jsonl", [4, 2, 3])  # one is gone, one stands elsewhere
    assert main(["stratify", *FIT, *data, "--out=bands.jsonl"]) == 0
    assert "--out bands.jsonl: 3 of 4 lines match, 3 of 3 problems have one; 1 are rejected" in capsys.readouterr().out
    fit = ["fit", *FIT, "--data.train=./a.jsonl", "--data.evidence=bands.jsonl", "--run_dir=run"]
    assert main(fit) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "data.evidence bands.jsonl: 3 of 4 lines match, 3 of 3 problems have one" in shown
    assert "round 1 sft, traces: " in shown
    ledger = [json.loads(line) for line in Path("run/ledger.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in ledger[:3]] == ["stratify"] * 3
    assert "probe" not in {line["stage"] for line in ledger}
    rejects = [json.loads(line) for line in Path("run/rejects.jsonl").read_text().splitlines()]
    assert [reject["where"] for reject in rejects] == ["bands.jsonl"]
    pool("a.jsonl", [2, 3, 4])
    assert main([*fit, "--resume=run"]) == 2
    assert "pool.json: data.train is not as the run was begun with: 0 of 3 problems match" in capsys.readouterr().err


def test_a_pool_whose_name_is_not_utf_8_is_trained_on_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9.jsonl")
    Path(name).write_text("".join(json.dumps(row(number)) + "\n" for number in (1, 2)) + "{}\n")
    fit = ["fit", *FIT, f"--data.train={name}", "--run_dir=run"]
    assert main(fit) == 0
    assert main([*fit, "--resume=run"]) == 0
    shown = capsys.readouterr()
    assert "UnicodeEncodeError" not in shown.out + shown.err
    ledger = [json.loads(line) for line in Path("run/ledger.jsonl").read_text().splitlines()]
    assert {line["problem_id"] for line in ledger} == {r"caf\xe9.jsonl-000000", r"caf\xe9.jsonl-000001"}
    assert json.loads(Path("run/rejects.jsonl").read_text())["where"] == r"caf\xe9.jsonl, line 3"


def test_the_file_of_a_group_tells_its_problem_whole() -> None:
    problem = Problem("a", "q ?", "1")
    assert problem.key == Problem("b", " q\n?", "1").key != Problem("a", "q ?", "2").key
    assert "key" not in to_json(problem)


def test_evidence_of_a_question_after_earlier_turns_is_not_that_of_the_question_alone(tmp_path: Path) -> None:
    alone = Problem("a", "How many?", "3")
    after = Problem("b", "How many?", "3", turns=(Turn("user", "Hi."), Turn("assistant", "Yes?")))
    file = write(tmp_path / "bands.jsonl", [row_of(group(p, right)) for p, right in ((alone, 0), (after, 2))])
    found = of_pool(matched_evidence(file, [after, alone]))
    assert {evidence.problem_id: evidence.successes for evidence in found} == {"a": 0, "b": 2}
