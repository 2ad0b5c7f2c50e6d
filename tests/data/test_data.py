"""Sources, ledger, strata, sets."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from slmreason.data.ledger import Ledger
from slmreason.data.sources import KNOWN, Columns, load_problems
from slmreason.data.strata import Bands, acquisition_set, consolidation_set, still_unsolved, stratify
from slmreason.records import Place, Problem, Rollout, RolloutGroup, from_json, to_json
from slmreason.verify.answers import is_correct


def group(problem_id: str, right: int, of: int = 8, version: int = 0) -> RolloutGroup:
    rollouts = tuple(
        Rollout((1,), (2,), (-0.5,), f"text {i}", float(i < right), i < right, False, version) for i in range(of)
    )
    return RolloutGroup(Problem(problem_id, "q", "a"), rollouts)


PLACE = Place(1, "grpo", 0)


def pool(ledger: Ledger, rights: dict[str, int]) -> list[Problem]:
    ledger.record([group(name, right) for name, right in rights.items()], PLACE)
    return [Problem(name, "q", "a") for name in rights]


def test_bands_are_closed_below_and_open_above() -> None:
    bands = Bands()
    assert [bands.of(right / 8) for right in range(9)] == ["hard"] * 2 + ["medium"] * 4 + ["simple"] * 3
    with pytest.raises(ValueError, match="medium=0.8"):
        Bands(simple=0.5, medium=0.8)


def test_sets_follow_the_method() -> None:
    ledger = Ledger(None)
    problems = pool(ledger, {"zero": 0, "one": 1, "half": 4, "most": 6, "all": 8}) + [Problem("new", "q", "a")]
    strata = stratify(ledger, problems, Bands())
    assert strata.counts == {"simple": 2, "medium": 1, "hard": 2, "unknown": 1}
    assert [p.id for p in acquisition_set(strata)] == ["half", "zero", "one"]
    # Hard is not all-zero: 1 of 8 right still carries a gradient.
    assert [p.id for p in consolidation_set(strata, 0.0, random.Random(0))] == ["half", "one"]
    assert {p.id for p in consolidation_set(strata, 0.5, random.Random(0))} == {"half", "one", "most", "all"}
    assert [p.id for p in still_unsolved(strata, problems[:2])] == ["zero"]


def test_review_share_bounds_the_mastered_part() -> None:
    ledger = Ledger(None)
    problems = pool(ledger, {f"m{i}": 4 for i in range(18)} | {f"s{i}": 8 for i in range(50)})
    drawn = consolidation_set(stratify(ledger, problems, Bands()), 0.1, random.Random(0))
    assert sum(p.id.startswith("s") for p in drawn) == 2
    assert len(drawn) == 20


def test_newest_evidence_wins_and_moves_are_counted() -> None:
    ledger = Ledger(None)
    problems = pool(ledger, {"a": 0, "b": 4, "c": 8})
    before = stratify(ledger, problems, Bands())
    ledger.record([group("a", 3, version=5), group("c", 8, version=5)], PLACE)
    after = stratify(ledger, problems, Bands())
    assert dict(after.moves_from(before.band_of)) == {"hard->medium": 1}
    assert ledger.get("a").policy_version == 5  # type: ignore[union-attr]


def test_ledger_is_read_back_and_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record([group("a", 2), group("b", 8)], PLACE)
    ledger.harvest([group("c", 0)], PLACE)
    with open(tmp_path / "ledger.jsonl", "ab") as file:
        file.write(b'{"problem_id":"torn","att')
    again = Ledger(tmp_path)
    assert again.get("a") == ledger.get("a")
    assert "torn" not in again
    assert again.harvested(1) == ledger.harvested(1) == [group("c", 0)]
    again.record([group("d", 1)], PLACE)
    assert len(Ledger(tmp_path)) == 3


def test_a_broken_line_inside_the_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"broken\n{}\n')
    with pytest.raises(ValueError, match=r"ledger\.jsonl, line 1"):
        Ledger(tmp_path)


def test_only_all_zero_groups_are_harvested() -> None:
    with pytest.raises(ValueError, match="problem a"):
        Ledger(None).harvest([group("a", 1)], PLACE)


def test_records_have_one_json_form() -> None:
    mine = group("a", 3)
    assert from_json(RolloutGroup, json.loads(json.dumps(to_json(mine)))) == mine
    with pytest.raises(ValueError, match=r"unknown fields \['oops'\], missing fields \['answer'\]"):
        from_json(Problem, {"id": "a", "question": "q", "oops": 1})


def write_jsonl(path: Path, rows: list[object]) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.write("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_gsm8k_and_math_answers_are_told_apart_by_themselves(tmp_path: Path, name: str) -> None:
    source = write_jsonl(
        tmp_path / name,
        [
            {"question": "q1", "answer": "48/2 = <<48/2=24>>24\n#### 24"},
            {"question": "q2", "answer": r"so \boxed{\frac{1}{2}}"},
            {"question": "q3", "answer": 7.0},
        ],
    )
    problems = load_problems(source).problems
    assert [p.answer for p in problems] == ["24", r"\frac{1}{2}", "7"]
    assert [p.trace is not None for p in problems] == [True, True, False]


def test_rows_that_cannot_be_used_are_set_aside_with_file_and_line(tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"question": "q", "answer": "1"},
            "{broken",
            {"question": "", "answer": "1"},
            {"question": "q"},
            [1],
            {"question": "q", "answer": None},
        ],
    )
    loaded = load_problems(source)
    assert len(loaded.problems) == 1
    assert [reject.where.rpartition(", ")[2] for reject in loaded.rejects] == [f"line {n}" for n in (2, 3, 4, 5, 6)]
    assert "no column" in loaded.rejects[2].reason


def test_column_mapping_joins_columns_and_reads_choices(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"b": "Body.", "q": "Who?", "o": ["x", "y"], "right": 1, "n": 9}])
    columns = Columns(question="{b} {q}", answer="right", choices="o", id="n", answer_format="index")
    [problem] = load_problems(source, columns).problems
    assert problem == Problem(
        "9", "Body. Who?\nA) x B) y\nAnswer with the letter of the right option.", "B", None, source, ("x", "y")
    )


def test_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"problem": ["q1", "q2"], "answer": ["1", "2"]}), tmp_path / "a.parquet")
    assert [p.answer for p in load_problems(str(tmp_path / "a.parquet")).problems] == ["1", "2"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/file.jsonl", "no such file"),
        ("embedded:nothing/train", "families are chain"),
        ("embedded:chain/train?size=3", r"unknown options \['size'\]"),
        ("embedded:chain/train?difficulty=99", "outside its dial"),
    ],
)
def test_a_source_that_is_not_there_is_named(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_problems(source)


def test_a_broken_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: cannot be read"):
        load_problems(str(tmp_path / "a.jsonl.gz"))


HUB_ROWS: dict[str, dict[str, object]] = {
    "gsm8k": {"question": "q", "answer": "1+1 = <<1+1=2>>2\n#### 2"},
    "gsm8k_platinum": {"question": "q", "answer": "#### 2", "cleaning_status": "consensus"},
    "svamp": {"ID": "chal-1", "Body": "q", "Question": "?", "Answer": "2.0", "Equation": "( 1.0 + 1.0 )"},
    "mawps": {"id": "mawps__1", "question": "q", "chain": "", "result": "2", "result_float": 2.0},
    "math500": {"problem": "q", "solution": r"\boxed{2}", "answer": "2", "unique_id": "test/1.json"},
    "logiqa": {"context": "q", "query": "?", "options": ["a", "b", "c", "d"], "correct_option": 2},
    "amc23": {"id": 0, "question": "q", "answer": "2", "url": ""},
    "aime24": {"id": 60, "problem": "q", "solution": r"\boxed{2}", "url": ""},
    "minerva": {"question": "q", "answer": "2"},
    "olympiadbench": {"question": "q", "final_answer": ["2"], "is_multiple_answer": False, "unit": None, "error": None},
}
"""A row of each benchmark with the columns that it has on the hub."""


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_benchmark_is_read_with_its_columns_on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, subset: str | None, split: str, revision: str | None) -> list[dict[str, object]]:
        asked.append((path, subset, split, revision))
        return [HUB_ROWS[name]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [problem] = load_problems(name).problems
    spec = KNOWN[name]
    assert asked == [(spec.path, spec.subset, "test", spec.revision)]
    assert problem.question.startswith("q")
    assert is_correct(r"\boxed{C}" if name == "logiqa" else r"\boxed{2}", problem.answer, problem.choices is not None)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"final_answer": ["$1$,$3$"], "is_multiple_answer": True}, r"\{1, 3\}"),
        ({"final_answer": ["1", "3"], "is_multiple_answer": True}, r"\{1, 3\}"),
        ({"final_answer": ["$(0,2),(4,-2)$"], "is_multiple_answer": True}, r"\{(0,2), (4,-2)\}"),
        ({"final_answer": ["1,234"], "is_multiple_answer": True}, "1,234"),
        ({"final_answer": ["(1,3)"], "is_multiple_answer": True}, "(1,3)"),
        ({"final_answer": ["1,3"], "is_multiple_answer": False}, "1,3"),
    ],
)
def test_answers_in_any_order_become_a_set(tmp_path: Path, row: dict[str, object], answer: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "error": "", **row}])
    assert [p.answer for p in load_problems(f"olympiadbench={source}").problems] == [answer]


def test_a_tolerance_or_an_order_that_is_none_is_set_aside(tmp_path: Path) -> None:
    good = {"question": "q", "final_answer": ["4.2"], "is_multiple_answer": False, "error": "1e-1"}
    bad: list[dict[str, object]] = [
        {"error": "1e-1,1e-2"},
        {"error": "-1"},
        {"error": "nan"},
        {"is_multiple_answer": 2},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", [good, *(good | change for change in bad)])
    loaded = load_problems(f"olympiadbench={source}")
    assert [p.tolerance for p in loaded.problems] == [0.1]
    assert [reject.where.rpartition(", ")[2] for reject in loaded.rejects] == [f"line {n}" for n in (2, 3, 4, 5)]
    assert all("column 'error' must be" in reject.reason for reject in loaded.rejects[:3])
    assert "column 'is_multiple_answer' must be true or false, not 2" in loaded.rejects[3].reason


LOGIQA = """
b
Every cat in the house is grey. Tom is a cat in the house.
Which conclusion follows?
A.Tom is black.
B.Tom is grey.
C.All grey animals are cats.
D.No dog is grey.

C
If it rains, the match is off. The match is on.
Which of the following must be true?
A.It rains.
C.It does not rain.
B.The match is off.
D.It snows.

a
Mr. A lives north of Mr. B, and Mr. B north of Mr. C.
Who lives farthest to the north?
Mr. A.
B Mr. B.
C? Mr. C.
d.Nobody knows.
"""


def test_logiqa_is_read_from_its_own_text_form(tmp_path: Path) -> None:
    (tmp_path / "Test.txt").write_text(LOGIQA)
    loaded = load_problems(f"logiqa={tmp_path / 'Test.txt'}")
    assert loaded.rejects == ()
    first, out_of_order, garbled = loaded.problems
    assert first.question.startswith("Every cat in the house is grey. Tom is a cat in the house. Which conclusion")
    assert first.question.endswith(
        "A) Tom is black. B) Tom is grey. C) All grey animals are cats. D) No dog is grey.\n"
        "Answer with the letter of the right option."
    )
    assert (first.answer, first.choices is not None and first.choices[1]) == ("B", "Tom is grey.")
    assert out_of_order.choices == ("It rains.", "The match is off.", "It does not rain.", "It snows.")
    assert out_of_order.answer == "C"
    assert garbled.choices == ("Mr. A.", "Mr. B.", "Mr. C.", "Nobody knows.")


@pytest.mark.parametrize(
    ("old", "new"),
    [("\nC\n", "\ne\n"), ("\nC\n", "\n"), ("D.It snows.\n", ""), ("C.It does", "C.It does\n"), ("It rains.", "\n")],
)
def test_a_broken_logiqa_block_is_set_aside_alone(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "a.txt").write_text(LOGIQA.replace(old, new))
    loaded = load_problems(f"logiqa={tmp_path / 'a.txt'}")
    assert [problem.answer for problem in loaded.problems] == ["B", "A"]
    assert loaded.rejects[0].where.endswith("a.txt, line 10")
    assert "a LogiQA block is seven lines" in loaded.rejects[0].reason


def test_a_text_file_that_is_not_logiqa_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time\n")
    with pytest.raises(ValueError, match=r"a\.txt: no usable problem.*seven lines.*starts with 'Once upon a time'"):
        load_problems(str(tmp_path / "a.txt"))


def test_recorded_gsm8k_rollouts_reproduce_every_label_and_give_bands(real_data: Path) -> None:
    from slmreason.data.recorded import read_recorded

    groups, disagreements, labelled = read_recorded(real_data / "model_solutions" / "gsm8k_gpt3_4x1319.jsonl.gz")
    assert (len(groups), labelled, disagreements) == (1319, 5276, [])
    ledger = Ledger(None)
    ledger.record(groups, PLACE)
    counts = stratify(ledger, [g.problem for g in groups], Bands()).counts
    assert sum(counts.values()) == 1319
    assert min(counts["simple"], counts["medium"], counts["hard"]) > 100
