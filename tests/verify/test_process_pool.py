"""The verifier against hostile answers, comparisons that hang or eat memory, dying processes, forks and threads."""

from __future__ import annotations

import gzip
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from slmreason.records import Problem
from slmreason.verify.answers import Claim, final_answer, rule, tidy
from slmreason.verify.bounds import too_large
from slmreason.verify.extract import without_thoughts
from slmreason.verify.process_pool import RIGHT, WRONG, Limits, Pair, Pool, Ruling, shared_pool
from slmreason.verify.rewards import AnswerReward, RewardFn, Verdict
from tests.data.test_benchmark_data import FILES, as_listed, problems_of

MEGABYTE = 1_000_000
SLOW: Pair = (r"(x+y+z+w)^{40}-(x-y)^{30}=1", "x+y+z+w=2")
"""An ordinary looking pair that no rule refuses and that keeps math-verify busy for longer than any limit here."""
RIGHT_PAIR: Pair = (r"\frac{1}{2}", r"\frac{2}{4}")
WRONG_PAIR: Pair = (r"\frac{1}{2}", r"\frac{3}{4}")
ROOT, SAME_ROOT, OTHER_ROOT = r"2\sqrt{2}", r"\sqrt{8}", r"\sqrt{7}"
"""Answers that only algebra can compare, so that a worker is asked."""
QUICK_S = 3.0
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or needs Linux' memory limit")


@pytest.fixture(scope="module")
def reward() -> AnswerReward:
    """With its workers started, so that the time this takes is not taken for that of an answer."""
    reward = AnswerReward()
    assert reward(problem(ROOT), boxed(SAME_ROOT)).correct
    return reward


@contextmanager
def pool_of(workers: int = 1, timeout_s: float = 10.0, memory_mb: int = 1024) -> Iterator[Pool]:
    pool = Pool(Limits(workers, timeout_s, memory_mb))
    try:
        yield pool
    finally:
        pool.close()


def problem(gold: str, question: str = "?") -> Problem:
    return Problem("p", question, gold)


def boxed(answer: str) -> str:
    return f"So the answer is \\boxed{{{answer}}}."


def slow_text() -> str:
    return boxed(SLOW[0])


def is_gone(pid: int) -> bool:
    """True when a process has ended, whether or not somebody has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


# Hostile answers ------------------------------------------------------------------------------------------------------

SEVENS = r"\frac{7}{" * 10_000
HOSTILE = {
    "a tower of powers": (boxed("9^{9^{9^9}}"), "12", False),
    "a tower of powers without braces": (boxed("9^9^9^9"), "12", False),
    "a factorial": (boxed("99999999!"), "12", False),
    "factorials of factorials": (boxed("((9!)!)!"), "12", False),
    "a binomial": (boxed(r"\binom{999999999}{499999999}"), "12", False),
    "a binomial with another name": (boxed(r"\dbinom{999999999}{499999999}"), "12", False),
    "a sum": (boxed(r"\sum_{i=1}^{99999999} i!"), "12", False),
    "a large power is no excuse for a larger one": (boxed("2^{99999999}"), "2^{1009}", False),
    "fractions 10,000 deep": (boxed(SEVENS + "2" + "}" * 10_000), "12", False),
    "fractions 10,000 deep that end in the answer": (boxed(SEVENS + "12" + "}" * 10_000), "12", False),
    "fractions 10,000 deep that nothing closes": (r"\boxed{" + SEVENS, "12", False),
    "fractions 10,000 deep before the answer": (boxed(SEVENS + "}" * 10_000) + boxed("12"), "12", True),
    "a megabyte of digits": ("1" * MEGABYTE, "1", False),
    "a megabyte of digits in a box": (boxed("1" * MEGABYTE), "1", False),
    "a megabyte of digits after a marker": ("#### " + "1" * MEGABYTE, "1", False),
    "a megabyte of digits with separators": ("1," * (MEGABYTE // 2), "1", False),
    "a megabyte of digits before the answer": ("1" * MEGABYTE + boxed("1"), "1", True),
    "a megabyte of braces": ("{" * MEGABYTE, "12", False),
    "a megabyte of braces in a box": (r"\boxed{12" + "{" * MEGABYTE, "13", False),
    "a megabyte of closed braces in a box": (boxed("{" * (MEGABYTE // 2) + "}" * (MEGABYTE // 2)), "12", False),
    "a megabyte of boxes": (r"\boxed{" * (MEGABYTE // 7), "12", False),
    "a megabyte of closed boxes": (r"\boxed{" * (MEGABYTE // 8) + "12" + "}" * (MEGABYTE // 8), "12", True),
    "a megabyte of empty boxes": (r"\boxed{}" * (MEGABYTE // 8), "12", False),
    "a megabyte of spaces": (" " * MEGABYTE, "12", False),
    "a megabyte of spaces in a box": (boxed(" " * MEGABYTE), "12", False),
    "a megabyte of spaces in a box before the answer": (boxed(" " * MEGABYTE + "12"), "12", True),
    "a megabyte of spaces before the brace of a box": (r"\boxed" + " " * MEGABYTE + "{12}", "12", True),
    "a megabyte of spaces after a box": (boxed("12") + " " * MEGABYTE, "12", True),
    "a megabyte of line ends after a marker": ("The answer is" + "\n" * MEGABYTE, "12", False),
    "a megabyte of markers": ("Answer: " * (MEGABYTE // 8), "12", False),
    "a megabyte of minus signs": ("-" * MEGABYTE + "12", "-12", True),
    "a megabyte of nothing that is printed": ("\u200b" * MEGABYTE + boxed("1\u200b2"), "12", True),
    "a box that is too long after a right one": (boxed("12") + boxed("13" + "+0" * 2000), "12", False),
    "an escape for half a character": (boxed("\ud800"), "12", False),
    "half a character in an expression": (boxed("x+\ud800"), "x+1", False),
    "a null byte": (boxed("1\x003"), "12", False),
    "a line end, as a request for a second comparison": (boxed('x"]\n["12'), "12", False),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_answer_gets_its_verdict_in_time(reward: AnswerReward, case: str) -> None:
    text, gold, verdict = HOSTILE[case]
    started = time.process_time()
    [graded] = reward.grade([(problem(gold), text)])
    assert time.process_time() - started < QUICK_S
    assert graded == Verdict(float(verdict), verdict)


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("\uff14\uff12", "42", True),  # full-width digits
        ("\u0664\u0662", "42", True),  # Arabic digits
        ("\U0001d7d2\U0001d7d0", "42", True),  # bold digits
        ("\uff0842\uff09", "(42)", True),  # full-width brackets
        ("\u221242", "-42", True),  # minus sign
        ("\u201342", "-42", True),  # en dash
        ("\uff0d42", "-42", True),  # full-width minus
        ("\u221242", "42", False),
        ("4\u200b2", "42", True),  # zero width space
        ("\ufeff42\u2060", "42", True),  # byte order mark, word joiner
        ("\u200e42\u200f", "42", True),  # direction marks
        ("\u202e42\u202c", "42", True),  # an override turns the print round, and not the number
        ("\u202e24\u202c", "42", False),
        ("\u0441", "c", False),  # Cyrillic
        ("\u0445^2", "x^2", False),
        ("\u03b1+1", "a+1", False),  # Greek
        ("l0", "10", False),
        ("1O", "10", False),
        ("\U0001d465", "x", False),  # a mathematical italic is another character
        ("\u2014", "-", False),
    ],
)
def test_characters_count_as_what_a_reader_sees(reward: AnswerReward, answer: str, gold: str, verdict: bool) -> None:
    assert reward(problem(gold), boxed(answer)).correct is verdict


def test_a_letter_of_another_alphabet_is_another_choice(reward: AnswerReward) -> None:
    choice = Problem("p", "?", "C", choices=("1", "2", "3", "4"))
    assert reward(choice, boxed("C")).correct
    assert reward(choice, boxed("\uff23")).correct
    assert not reward(choice, boxed("\u0421")).correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}, no, \boxed{6}, no, \boxed{7}", "7"),
        (r"\boxed{5, \boxed{7}}", "7"),  # the one that begins last
        (r"\boxed{5} and then \boxed{7", "5"),  # what is never closed is no box
        (r"\boxed{5} or rather 7", "5"),  # behind the last box nothing counts, were it marked or not
        ("\\boxed{5}\n#### 7", "5"),
        ("\\boxed{5}. The final answer is 7.", "5"),
        ("#### 5\nNo, the answer is 7", "7"),  # the last of the marks
        ("#### 5\nor 7", "5"),  # a mark counts more than a number behind it
        (r"\boxed{}", None),
        (r"7 \boxed{}", "7"),  # an empty box holds no answer and is passed over
        (r"\boxed{7} \boxed{ }", "7"),
        ("#### 7\n\\boxed{}", "7"),
        ("", None),
    ],
)
def test_the_last_box_is_the_answer_then_the_last_mark_then_the_last_number(
    reward: AnswerReward, text: str, answer: str | None
) -> None:
    assert final_answer(text) == answer
    assert [gold for gold in ("5", "6", "7") if reward(problem(gold), text).correct] == ([answer] if answer else [])


def test_an_answer_copied_from_the_prompt_does_not_count(reward: AnswerReward) -> None:
    question = "An example: 2 + 3?\n#### 5\nThe answer is \\boxed{5}. Now: 3 + 4?"
    assert not reward(problem("5", question), f"{question}\n3 + 4 = 7, so \\boxed{{7}}").correct
    assert reward(problem("7", question), f"{question}\n3 + 4 = 7, so \\boxed{{7}}").correct
    assert not reward(problem("7", question), f"{question}\nI cannot tell").correct


# Comparisons that meet a limit ----------------------------------------------------------------------------------------


def test_a_comparison_that_hangs_ends_at_its_limit_and_is_counted() -> None:
    assert not too_large(*SLOW)
    reward = AnswerReward(workers=1, timeout_s=0.5)
    quick = problem(ROOT)
    assert reward(quick, boxed(r"\sqrt{2}+\sqrt{2}")).correct
    graded = reward.grade([(problem(SLOW[1]), slow_text()), (quick, boxed(SAME_ROOT))])
    assert graded == [Verdict(0.0, False), Verdict(1.0, True)]  # the second by a new worker
    [reject] = reward.drain_rejects()
    assert (reject.id, reject.reason, reject.detail) == ("p", "timeout", {"answer": SLOW[0]})
    assert reward.drain_rejects() == []


def test_a_comparison_that_hangs_is_killed_and_the_next_one_works() -> None:
    with pool_of(timeout_s=0.5) as pool:
        assert pool.compare([RIGHT_PAIR]) == [RIGHT]
        assert pool.compare([SLOW]) == [Ruling(False, "timeout")]
        assert pool.compare([WRONG_PAIR]) == [WRONG]


def test_a_worker_that_does_not_answer_at_all_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmreason.verify.process_pool.GRACE_SECONDS", 0.5)
    with pool_of(timeout_s=0.2) as pool:
        pool.compare([RIGHT_PAIR])
        [first] = pool.pids()
        os.kill(first, signal.SIGSTOP)
        assert pool.compare([WRONG_PAIR]) == [Ruling(False, "timeout")]
        assert not Path(f"/proc/{first}").exists()  # not even as a zombie
        assert pool.compare([(ROOT, SAME_ROOT)]) == [RIGHT]
        assert first not in pool.pids()


def test_a_limit_is_paid_for_once() -> None:
    with pool_of(timeout_s=0.3) as pool:
        assert pool.compare([SLOW]) == [Ruling(False, "timeout")]
        pool.compare([RIGHT_PAIR])
        pool.close()
        assert pool.compare([RIGHT_PAIR, SLOW, RIGHT_PAIR]) == [RIGHT, Ruling(False, "timeout"), RIGHT]
        assert pool.pids() == []  # nobody had to be asked


def test_a_call_has_a_budget_for_comparisons_without_a_verdict() -> None:
    slow = [(rf"(x+y+z+w)^{{{40 + i}}}-(x-y)^{{30}}=1", "x+y+z+w=2") for i in range(12)]
    pool = Pool(Limits(1, timeout_s=2.0, budget_s=2.0))
    allowed = [pool.limits.seconds(lost) for lost in (0.0, 1.0, 1.9, 5.0)]
    assert allowed == pytest.approx([1.0, 0.5, 0.05, 0.05])
    try:
        assert pool.compare([*slow, RIGHT_PAIR]) == [*[Ruling(False, "timeout")] * 12, RIGHT]
        pool.close()
        assert pool.compare([*slow, RIGHT_PAIR]) == [*[Ruling(False, "timeout")] * 12, RIGHT]
        assert pool.pids() == []  # the next call does not pay again
    finally:
        pool.close()


def test_a_comparison_that_hangs_does_not_hold_up_the_other_workers() -> None:
    with pool_of(workers=2, timeout_s=4.0) as pool:
        pool.compare([RIGHT_PAIR, WRONG_PAIR])
        pairs = [(rf"\frac{{{i}}}{{7}}", rf"\frac{{{2 * i}}}{{14}}") for i in range(1, 40)]
        assert pool.compare([SLOW, *pairs, SLOW]) == [Ruling(False, "timeout"), *[RIGHT] * 39, Ruling(False, "timeout")]


@linux
def test_a_worker_keeps_its_memory_limit() -> None:
    with pool_of(memory_mb=200) as pool:
        pool.compare([RIGHT_PAIR])
        limits = Path(f"/proc/{pool.pids()[0]}/limits").read_text().splitlines()
    [row] = [line.split() for line in limits if line.startswith("Max address space")]
    assert row[3:5] == [str(200 * 2**20)] * 2


@linux
def test_a_comparison_that_eats_memory_is_refused_and_the_next_one_works() -> None:
    # math-verify itself would take the failure for a no.
    with pool_of(timeout_s=60.0, memory_mb=128) as pool:
        pool.compare([RIGHT_PAIR])
        [ruling] = pool.compare([("2^{99999999999}=x", "12=x")])
        assert ruling in (Ruling(False, "memory"), Ruling(False, "died"))
        assert pool.compare([WRONG_PAIR]) == [WRONG]


@linux
def test_a_worker_that_is_killed_before_it_was_ready_is_replaced() -> None:
    with pool_of(workers=2) as pool:
        pool.compare([RIGHT_PAIR])
        pool._staff(2)  # the second one may still be starting when a call has its answers
        starting = pool.pids()[1]
        os.kill(starting, signal.SIGKILL)
        assert wait_until(lambda: is_gone(starting), 10)
        assert pool.compare([(r"\frac{1}{3}", r"\frac{2}{6}"), WRONG_PAIR]) == [RIGHT, WRONG]


@linux
def test_too_little_memory_to_start_is_an_error_that_says_so() -> None:
    with pool_of(memory_mb=20) as pool, pytest.raises(RuntimeError, match=r"is reward\.memory_mb enough"):
        pool.compare([RIGHT_PAIR])
    assert pool.pids() == []


@pytest.mark.parametrize("limits", [{"workers": 0}, {"timeout_s": 0.0}, {"memory_mb": 0}, {"budget_s": 0.0}])
def test_a_limit_that_is_none_is_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1|above 0"):
        AnswerReward(**limits)


def test_a_worker_that_is_killed_in_the_middle_makes_the_answer_wrong_and_is_replaced() -> None:
    reward = AnswerReward(workers=1, timeout_s=31.0)
    pool = shared_pool(reward.limits)
    pool.compare([RIGHT_PAIR])
    [worker] = pool.pids()
    killer = threading.Timer(0.3, os.kill, [worker, signal.SIGKILL])
    killer.start()
    graded = reward.grade([(problem(SLOW[1]), slow_text()), (problem(ROOT), boxed(SAME_ROOT))])
    killer.join()
    assert [verdict.correct for verdict in graded] == [False, True]
    assert [reject.reason for reject in reward.drain_rejects()] == ["died"]
    assert worker not in pool.pids()
    pool.close()


def test_a_worker_that_dies_idle_is_replaced_and_costs_no_verdict() -> None:
    with pool_of(workers=2) as pool:
        pool.compare([RIGHT_PAIR, WRONG_PAIR])
        before = pool.pids()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: all(map(is_gone, before)), 10)
        assert pool.compare([(r"\frac{1}{3}", r"\frac{2}{6}"), (r"\frac{1}{3}", r"\frac{2}{7}")]) == [RIGHT, WRONG]
        assert not set(before) & set(pool.pids())


# Threads, forks and the processes around ------------------------------------------------------------------------------


def test_threads_share_a_pool() -> None:
    found: dict[int, list[bool]] = {}

    def grade(thread: int) -> None:
        pairs = [
            (rf"\frac{{{i}}}{{{thread + 7}}}", rf"\frac{{{2 * i}}}{{{2 * thread + 14 + i % 2}}}") for i in range(1, 21)
        ]
        found[thread] = [ruling.correct for pair in pairs for ruling in pool.compare([pair])]

    with pool_of(workers=2) as pool:
        threads = [threading.Thread(target=grade, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(pool.pids()) <= 2
    assert found == {number: [i % 2 == 0 for i in range(1, 21)] for number in range(6)}


def forked(work: Callable[[], Any]) -> Any:
    """What `work` gives in a forked process, as JSON."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


@linux
def test_a_forked_process_has_workers_of_its_own_which_end_with_it() -> None:
    with pool_of() as pool:
        pool.compare([RIGHT_PAIR])
        ours = pool.pids()

        def work() -> tuple[list[bool], list[int]]:
            fresh = [(r"\frac{1}{5}", r"\frac{2}{10}"), (r"\frac{1}{5}", r"\frac{2}{11}")]
            return [ruling.correct for ruling in pool.compare([*fresh, RIGHT_PAIR])], pool.pids()

        verdicts, theirs = forked(work)
        assert verdicts == [True, False, True]
        assert len(theirs) == 1
        assert not set(theirs) & set(ours)
        assert wait_until(lambda: all(map(is_gone, theirs)), 10)
        assert pool.compare([WRONG_PAIR]) == [WRONG]
        assert pool.pids() == ours


def test_a_process_forked_in_the_middle_of_a_comparison_can_compare() -> None:
    with pool_of(timeout_s=3.0) as pool:
        pool.compare([RIGHT_PAIR])
        found: list[Ruling] = []
        thread = threading.Thread(target=lambda: found.extend(pool.compare([SLOW])))
        thread.start()
        assert wait_until(pool._lock.locked, 10)
        assert forked(lambda: pool.compare([WRONG_PAIR])[0].correct) is False
        thread.join()
        assert found == [Ruling(False, "timeout")]


class Graded(Dataset[list[Any]]):
    """Grades in the process that loads the data."""

    def __init__(self, reward: AnswerReward) -> None:
        self.reward = reward

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> list[Any]:
        texts = [boxed(rf"{i + 1}\sqrt{{13}}"), boxed(rf"{i + 1}\sqrt{{14}}")]
        graded = self.reward.grade([(problem(rf"\sqrt{{{13 * (i + 1) ** 2}}}"), text) for text in texts])
        daemonic = multiprocessing.current_process().daemon
        return [verdict.correct for verdict in graded], daemonic, shared_pool(self.reward.limits).pids()


@linux
def test_a_dataloader_worker_can_grade(reward: AnswerReward) -> None:
    rows = list(DataLoader(Graded(reward), batch_size=None, num_workers=2, collate_fn=None))
    assert [verdicts for verdicts, _, _ in rows] == [[True, False]] * 6
    assert all(daemonic for _, daemonic, _ in rows)
    theirs = {pid for _, _, pids in rows for pid in pids}
    assert len(theirs) >= 2
    assert wait_until(lambda: all(map(is_gone, theirs)), 10)
    assert reward(problem(r"\sqrt{17}"), boxed(r"\frac{\sqrt{68}}{2}")).correct


@linux
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_no_worker_outlives_a_killed_parent(busy: bool) -> None:
    script = f"""
import threading, time
from slmreason.verify.process_pool import Limits, Pool
pool = Pool(Limits(1, 1.0))
pool.compare([{RIGHT_PAIR!r}])
if {busy}:
    threading.Thread(target=pool.compare, args=([{SLOW!r}],), daemon=True).start()
    time.sleep(0.2)
print(*pool.pids(), flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 1
    assert not is_gone(pids[0])
    parent.kill()
    parent.wait()
    parent.stdout.close()
    # A busy one does not see that its input ended: it has an alarm.
    assert wait_until(lambda: all(map(is_gone, pids)), 15 if busy else 5)


@linux
def test_a_worker_has_no_secret_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "a-secret-value")
    with pool_of() as pool:
        pool.compare([RIGHT_PAIR])
        variables = Path(f"/proc/{pool.pids()[0]}/environ").read_bytes()
    assert b"PATH=" in variables
    assert b"secret" not in variables.lower()
    assert b"TOKEN" not in variables
    assert b"API_KEY" not in variables


def test_a_worker_runs_the_code_of_its_parent(tmp_path: Path) -> None:
    """A checkout that is not installed is found through the empty entry of the path: the folder the parent is in."""
    import shutil

    import slmreason

    for package in ("verify", "runtime"):
        shutil.copytree(Path(slmreason.__file__).parent / package, tmp_path / "slmreason" / package)
    for name in ("__init__.py", "records.py", "py.typed"):
        shutil.copy(Path(slmreason.__file__).parent / name, tmp_path / "slmreason" / name)
    worker = tmp_path / "slmreason" / "verify" / "process_worker.py"
    worker.write_text(worker.read_text().replace('return "equal"', 'return "different"'))
    script = f"from slmreason.verify.process_pool import Pool; print(Pool().compare([{RIGHT_PAIR!r}])[0].correct)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_a_comparison_prints_is_no_reply() -> None:
    script = """
import slmreason.verify.process_worker as worker
def compare(answer, gold):
    print("equal", flush=True)
    return "different"
worker.serve(1024, compare, lambda: None)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input='[1.0, "1", "2"]\n', capture_output=True, text=True, check=True
    )
    assert done.stdout == "ready\ndifferent\n"


# Rewards of one's own -------------------------------------------------------------------------------------------------


class Shouted(AnswerReward):
    """Wants capitals; leaves the rest to its parent."""

    def __call__(self, problem: Problem, text: str) -> Verdict:
        return super().__call__(problem, text) if text.isupper() else Verdict(0.0, False)


class ShoutedTwice(Shouted):
    pass


class Batched(AnswerReward):
    def grade(self, pairs: Any) -> list[Verdict]:
        return [Verdict(0.5, True) for _ in pairs]


@pytest.mark.parametrize("cls", [Shouted, ShoutedTwice])
def test_a_subclass_that_overrides_the_call_alone_is_graded_by_it(cls: type[AnswerReward]) -> None:
    graded = cls().grade([(problem("7"), "THE LAST: 7"), (problem("7"), "the last: 7"), (problem("7"), "THE LAST: 8")])
    assert [verdict.correct for verdict in graded] == [True, False, False]


def test_a_subclass_that_overrides_grade_keeps_it() -> None:
    assert Batched().grade([(problem("7"), "8")]) == [Verdict(0.5, True)]


def test_a_reward_needs_the_call_alone() -> None:
    class Length(RewardFn):
        def __call__(self, problem: Problem, text: str) -> Verdict:
            return Verdict(float(len(text)), bool(text))

    assert Length().grade([(problem("7"), "abc"), (problem("7"), "")]) == [Verdict(3.0, True), Verdict(0.0, False)]
    assert Length().drain_rejects() == []


# Any text -------------------------------------------------------------------------------------------------------------

LATEX = r"""
\boxed{ \boxed{ \boxed{5} \fbox{x} \frac{ \frac12 \sqrt{ \sqrt[3]{ \left( \right) \{ \} { } { } ( ) [ ] }{ }^{ }_{
\text{ \text{and} \mathrm{cm} \pi \infty \cup \cdot \times \pm \le \ne \in \sin \log \ln \theta \% ^\circ \to \det
\begin{pmatrix} \end{pmatrix} \begin{cases} \\ & \, \! ~ $ $$ \( \) \[ \] ^ _ ^2 ^{-1} ! % = < > | + - * / ** , ; : .
0 1 2 7 12 42 0.5 1,234 1e5 1e999 99999 10^{9} 1./3 x y x^2 e i E_1 f(x) dx 3x (1,2) [0,1) \{1,2\} 1/2 \overline{3}
#### A: Answer: or and dollars cm \int \sum \lim \binom{9}{4} \mod
"""
UNICODE = "\u2212\uff15\u200b\u202e\u00bd\u00b2\u221a\u00b0\x00\ud800 \n"
FRAGMENTS = (*LATEX.split(), *UNICODE, "The answer is ", "  ")
COMPLETIONS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=12).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), min_size=2, max_size=10).map(lambda parts: boxed("".join(parts))),
    st.text(max_size=25),
    st.text(max_size=15).map(boxed),
)
GOLDS = (
    "12",
    "0.5",
    r"\frac{1}{2}",
    "x^2+1",
    r"\{1, 2\}",
    "(1, 2]",
    "10, 4, -2",
    r"\text{Evelyn}",
    r"\frac{\sqrt{3}}{2}",
)
FUZZ = AnswerReward(timeout_s=1.5)
graded_texts: list[float] = []


@settings(max_examples=600, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(COMPLETIONS, min_size=20, max_size=20, unique=True), st.sampled_from(GOLDS))
def fuzz(texts: list[str], gold: str) -> None:
    for text in texts:
        started = time.process_time()
        verdict = FUZZ(problem(gold), text)
        graded_texts.append(time.process_time() - started)
        assert verdict in (Verdict(0.0, False), Verdict(1.0, True))
        assert graded_texts[-1] < QUICK_S
    # Whatever stands before it, a last box decides, unless a thought has begun that never ends.
    spoken = [text for text in texts if without_thoughts(text) == text]
    assert all(
        verdict.correct for verdict in FUZZ.grade([(problem(gold), f"{text}\n{boxed(gold)}") for text in spoken])
    )
    assert not any(
        verdict.correct for verdict in FUZZ.grade([(problem(gold), f"{text}\n{boxed('0')}") for text in texts])
    )


@pytest.mark.long
def test_ten_thousand_texts_get_a_verdict_each_in_time() -> None:
    assert FUZZ(problem(ROOT), boxed(SAME_ROOT)).correct
    graded_texts.clear()
    fuzz()
    assert len(graded_texts) >= 10_000
    assert len(shared_pool(FUZZ.limits)._known) > 500  # so many of them math-verify was asked about
    rejects = FUZZ.drain_rejects()
    assert {reject.reason for reject in rejects} <= {"timeout", "memory", "too large"}  # and nobody died
    assert len(rejects) < 0.05 * len(graded_texts)


# Agreement ------------------------------------------------------------------------------------------------------------


REFUSED: list[Pair] = [("4, 10, -2", "10, 4, -2"), ("4, .1, 2", "0.1, 4, 2")]
"""A bare list is in order, so the recorded cases have it; math-verify takes it for a set."""


def real_pairs(data: Path) -> list[Pair]:
    """Answers and gold answers of all real data, as math-verify is asked about them, each once."""
    cases = [json.loads(line) for line in (data / "grader_cases" / "cases.jsonl").read_text().splitlines()]
    pairs = [(case["pred"], case["gold"]) for case in cases]
    for file in ("model_solutions/gsm8k_gpt3_4x1319.jsonl.gz", "teacher_traces/long_thought_math500.jsonl.gz"):
        rows = [json.loads(line) for line in gzip.decompress((data / file).read_bytes()).splitlines()]
        pairs += [(final_answer(row["response"]) or "", row["gold"]) for row in rows if "," not in row["gold"]]
    for name in FILES:
        problems = problems_of(data, name)
        pairs += [(mine.answer, mine.answer) for mine in problems]
        # Of the next row's answers some: two long expressions that differ take math-verify up to five seconds.
        pairs += [(as_listed(b), a.answer) for a, b in list(zip(problems, problems[1:], strict=False))[::25]]
    return [pair for pair in dict.fromkeys(pairs) if pair[0] and len(pair[0]) <= 256]


def test_every_real_answer_that_math_verify_accepts_is_accepted(
    real_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from math_verify import parse, verify

    caplog.set_level(logging.CRITICAL)
    pairs = real_pairs(real_data)
    assert len(pairs) > 4000
    rulings = rule([Claim(boxed(answer), gold) for answer, gold in pairs])
    assert [pair for pair, ruling in zip(pairs, rulings, strict=True) if ruling.limit] == []
    parsed = cache(parse)  # most golds stand on both sides somewhere
    theirs = [verify(parsed(f"${tidy(gold)}$"), parsed(f"${tidy(answer)}$")) for answer, gold in pairs]
    refused = [pair for pair, ruling, peer in zip(pairs, rulings, theirs, strict=True) if peer and not ruling.correct]
    assert refused == REFUSED
    assert 0.2 < sum(theirs) / len(theirs) < 0.9  # the cases are of both kinds
