"""The lean decoding steps against transformers' own forward: logits, ragged prompts, rows that leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common import peak_bytes
from slmreason.embedded.families import make_problems
from slmreason.rollout import lean as lean_steps
from slmreason.rollout import steps
from slmreason.rollout import transformers as hf
from slmreason.rollout.engine import EngineError, Sampling
from slmreason.rollout.lean import LeanSteps, StaticSteps
from slmreason.rollout.steps import PlainSteps, is_lean, prefill
from slmreason.rollout.transformers import HFEngine, without_gaps
from slmreason.student import Lora, Student
from tests.models import make_checkpoint

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
ROPE = {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip


def other(folder: Path, kind: str) -> str:
    """A random model of another type, with the tokenizer of a known one."""
    base = Student(str(make_checkpoint(folder / "base", "qwen2.5")))
    common = {**SIZES, "vocab_size": base.network.config.vocab_size, "eos_token_id": base.tokenizer.eos_token_id}
    torch.manual_seed(1)
    network = {
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**common, head_dim=32)),
        "llama 3 rope": lambda: LlamaForCausalLM(LlamaConfig(**common, rope_parameters=ROPE, attention_bias=True)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**common, sliding_window=None)),
    }[kind]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # norms of exactly 1 and biases of 0 would hide mistakes
    network.save_pretrained(folder / kind)
    base.tokenizer.save_pretrained(folder / kind)
    return str(folder / kind)


def a_student(kind: str, folder: Path) -> Student:
    if kind.startswith("embedded"):
        return Student(kind, instruction="")
    if kind == "lora":
        student = Student("embedded:qwen2", instruction="", lora=Lora(r=4, alpha=16))
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return student
    return Student(other(folder, kind), instruction="")


def prompts_of(student: Student, count: int) -> list[tuple[int, ...]]:
    return [student.encode_question(problem.question) for problem in make_problems("chain", "train", count)]


@torch.no_grad()
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("kind", ["embedded:qwen2", "embedded:llama", "lora", "qwen3", "llama 3 rope", "mistral"])
def test_logits_are_those_of_transformers(
    kind: str, ragged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = a_student(kind, tmp_path)
    prompts = prompts_of(student, 4)
    if not ragged:
        prompts = [prompts[0]] * 4
    assert (len({len(prompt) for prompt in prompts}) > 1) == ragged
    lean, first = prefill(student, prompts, 2, 12)
    assert isinstance(lean, LeanSteps)
    monkeypatch.setattr(steps, "is_lean", lambda student: False)
    plain, theirs = prefill(student, prompts, 2, 12)
    assert isinstance(plain, PlainSteps)
    torch.testing.assert_close(first, theirs)
    generator, rows = torch.Generator().manual_seed(0), 8
    for step in range(12):
        if step in (3, 7):  # some rows leave, the last among them once
            alive = torch.ones(rows, dtype=torch.bool)
            alive[[0, 2] if step == 3 else [1, rows - 1]] = False
            stay = without_gaps(alive)
            for each in (lean, plain):
                each.keep(stay)
            rows = len(stay)
        tokens = torch.randint(5, 500, (rows,), generator=generator)
        torch.testing.assert_close(lean.step(tokens), plain.step(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_tokens_are_drawn(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student("embedded:qwen2", instruction="")
    sampling = Sampling(48, temperature, seed=5)
    found = HFEngine(max_sequences=24).generate(student, prompts_of(student, 9), 4, sampling)
    monkeypatch.setattr(steps, "is_lean", lambda student: False)
    monkeypatch.setattr(hf, "SHRINK", 0.0)
    theirs = HFEngine(max_sequences=24).generate(student, prompts_of(student, 9), 4, sampling)
    for ours, plain in zip(sum(found, []), sum(theirs, []), strict=True):
        assert ours.token_ids == plain.token_ids
        assert ours.truncated == plain.truncated
        assert ours.log_probs == pytest.approx(plain.log_probs, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_is_as_close_as_its_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student("embedded:qwen2", instruction="").to(dtype)
    lean, _ = prefill(student, prompts_of(student, 3), 1, 4)
    monkeypatch.setattr(steps, "is_lean", lambda student: False)
    plain, _ = prefill(student, prompts_of(student, 3), 1, 4)
    exact, _ = prefill(Student("embedded:qwen2", instruction=""), prompts_of(student, 3), 1, 4)
    tokens = torch.tensor([30, 40, 50])
    ours, theirs, truth = (each.step(tokens).float() for each in (lean, plain, exact))
    assert ours.dtype == theirs.dtype
    assert (ours - truth).norm() < 1.5 * (theirs - truth).norm()


@torch.no_grad()
def test_under_autocast_it_is_as_close_as_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    student, generator = Student("embedded:qwen2", instruction=""), torch.Generator().manual_seed(0)
    exact, _ = prefill(student, prompts_of(student, 8), 1, 24)
    with torch.autocast("cpu", torch.bfloat16):
        lean, _ = prefill(student, prompts_of(student, 8), 1, 24)
        monkeypatch.setattr(steps, "is_lean", lambda student: False)
        plain, _ = prefill(student, prompts_of(student, 8), 1, 24)
    assert isinstance(lean, LeanSteps)
    off, allowed = 0.0, 0.0
    for _ in range(20):
        tokens = torch.randint(10, 60, (8,), generator=generator)
        truth = exact.step(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = lean.step(tokens).float(), plain.step(tokens).float()
        off, allowed = off + float((ours - truth).norm()), allowed + float((theirs - truth).norm())
    assert off < 1.02 * allowed


def test_what_the_lean_steps_do_not_know_goes_the_plain_way(tmp_path: Path) -> None:
    assert is_lean(Student("embedded:llama"))
    assert not is_lean(Student(str(make_checkpoint(tmp_path / "gemma", "gemma"))))
    changed = Student("embedded:qwen2")
    changed.base_model.config.rope_parameters["rope_type"] = "dynamic"  # depends on how long a sequence has become
    assert not is_lean(changed)
    changed = Student("embedded:qwen2")
    changed.base_model.config.hidden_act = "gelu"
    assert not is_lean(changed)


@torch.no_grad()
@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_reading_prompts_copies_the_vocabulary_projection_for_no_row(lora: Lora | None) -> None:
    """24 prompts and a projection of 0.15 MB; frozen weights, as adapters leave them, once were copied for each."""
    student = Student("embedded:qwen2", instruction="", lora=lora, dtype="bfloat16")
    prompts = [(5, 6, 7)] * 24
    projection = student.network.get_output_embeddings().weight
    prefill(student, prompts, 1, 2)  # what is right for the architecture is found here
    assert peak_bytes(lambda: prefill(student, prompts, 1, 2)) < 8 * projection.nbytes


@torch.no_grad()
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("kind", ["embedded:qwen2", "embedded:llama", "lora", "qwen3"])
def test_steps_over_a_cache_that_stays_where_it_is_give_the_same_logits(
    kind: str, ragged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU records: eleven rows in buckets of three, a cache that is read in windows of 16 places."""
    monkeypatch.setattr(lean_steps, "LENGTHS", 16)
    monkeypatch.setattr(lean_steps, "ROW_BUCKETS", 4)
    student = a_student(kind, tmp_path)
    prompts = prompts_of(student, 11) if ragged else [prompts_of(student, 1)[0]] * 11
    lean, _ = prefill(student, prompts, 1, 36)
    static, _ = prefill(student, prompts, 1, 36, cuda_graphs=True)
    assert isinstance(static, StaticSteps)
    generator, rows, windows = torch.Generator().manual_seed(0), 11, set()
    for step in range(36):
        if step in (4, 9, 17):
            alive = torch.ones(rows, dtype=torch.bool)
            alive[[0, rows - 2]] = False
            stay = without_gaps(alive)
            for each in (lean, static):
                each.keep(stay)
            rows = len(stay)
        tokens = torch.randint(5, 500, (rows,), generator=generator)
        torch.testing.assert_close(static.step(tokens), lean.step(tokens), rtol=1e-4, atol=1e-4)
        windows.add(static._window)
    assert {rows for rows, _ in windows} == {11, 9, 6}
    assert len({upto for _, upto in windows}) > 2


def test_steps_are_recorded_on_a_gpu_alone() -> None:
    with pytest.raises(EngineError, match="cuda_graphs: .* the student is a qwen2 on cpu"):
        HFEngine(cuda_graphs=True).generate(Student("embedded:qwen2"), [(5, 6)], 1, Sampling(2))


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2.5", "gemma"])
@pytest.mark.parametrize(("bound", "size"), [("READ_AT_ONCE", 24), ("WORTH_A_PASS", 20)])
def test_prompts_that_are_read_in_parts_give_the_same(
    family: str, bound: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Student(str(make_checkpoint(tmp_path / family, family)), instruction="")
    prompts = [tuple(range(5, 5 + length)) for length in (9, 12, 7, 12, 10)]
    whole, expected = prefill(student, prompts, 2, 6)
    monkeypatch.setattr(steps, bound, size)
    assert len(steps.passes([len(prompt) for prompt in prompts])) == 3
    parts, first = prefill(student, prompts, 2, 6)
    torch.testing.assert_close(first, expected)
    for tokens in torch.randint(5, 100, (6, 10), generator=torch.Generator().manual_seed(0)):
        torch.testing.assert_close(parts.step(tokens), whole.step(tokens), rtol=1e-4, atol=1e-4)


def test_a_pass_ends_where_it_is_full_or_would_pad() -> None:
    assert steps.passes([100] * 30) == [30]
    assert steps.passes([100] * 12 + [90] * 3) == [12, 3]  # 1,200 tokens were read, and 90 would be padded to 100
    assert steps.passes([100] * 5 + [90] * 3) == [8]  # a pass of 500 tokens is not worth another
    assert steps.passes([100] * 12 + [99] * 3) == [15]
    assert steps.passes([40_000, 40_000]) == [1, 1]
    assert sum(steps.passes(list(range(500, 20, -1)))) == 480


def test_rows_without_gaps_by_hand() -> None:
    assert without_gaps(torch.tensor([1, 0, 1, 0, 1, 1], dtype=torch.bool)).tolist() == [0, 4, 2, 5]
    assert without_gaps(torch.tensor([1, 1, 0, 0], dtype=torch.bool)).tolist() == [0, 1]
    assert without_gaps(torch.tensor([0, 0, 1], dtype=torch.bool)).tolist() == [2]
