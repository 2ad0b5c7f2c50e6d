"""Merged, gathered and frozen weights against peft's merge and a plain copy, sharded (a world of one) and not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from slmreason.records import Example
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Lora, Student, weights
from slmreason.student.packing import collate
from slmreason.student.weights import units
from tests.models import make_checkpoint


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one: FSDP2 shards, gathers and frees as in a larger one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_student(folder: Path, family: str = "llama3", lora: bool = False) -> Student:
    path = folder / family
    if not path.exists():
        make_checkpoint(path, family)
    student = Student(str(path), instruction="", lora=Lora(r=4, alpha=8) if lora else None)
    torch.manual_seed(1)
    for name, parameter in student.network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return student


def shard(student: Student) -> None:
    weights.shard(student.network, student.base_model, init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize("family", ["llama3", "qwen2.5-base", "gemma"])  # tied, untied, tied with scaled embeddings
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_merged_weights_equal_pefts(tmp_path: Path, group: None, family: str, lora: bool, sharded: bool) -> None:
    reference = make_student(tmp_path, family, lora)
    network = reference.network.merge_and_unload() if lora else reference.network  # type: ignore[operator]
    theirs = dict(network.named_parameters())  # tied weights once
    student = make_student(tmp_path, family, lora)
    if sharded:
        shard(student)
    ours = {name: tensor.clone() for name, tensor in student.weights()}
    assert list(ours.keys() ^ theirs.keys()) == []
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor.detach(), rtol=0, atol=1e-6)


def test_one_unit_at_a_time_is_gathered(tmp_path: Path, group: None) -> None:
    student = make_student(tmp_path, lora=True)
    shard(student)
    shard(student)  # asking again does nothing
    assert len(units(student.network)) == 3  # two blocks and the rest

    def whole_units() -> int:
        return sum(
            not all(isinstance(p, DTensor) for p in unit.parameters(recurse=False))
            or any(
                not isinstance(p, DTensor)
                for child in unit.children()  # type: ignore[attr-defined]
                if child not in units(student.network)
                for p in child.parameters()
            )
            for unit in units(student.network)[1:]  # type: ignore[attr-defined]
        )

    seen = [whole_units() for _ in student.weights()]
    assert max(seen) == 1
    assert whole_units() == 0
    with student.whole():
        assert whole_units() == 2
    assert whole_units() == 0


def test_sampling_and_scores_are_the_same_sharded_and_whole(tmp_path: Path, group: None) -> None:
    plain, sharded = make_student(tmp_path), make_student(tmp_path)
    shard(sharded)
    prompts = [plain.encode_question(f"What is {i}?") for i in range(3)]
    sampling = Sampling(12, seed=1)
    before = HFEngine().generate(plain, prompts, 2, sampling)
    assert HFEngine().generate(sharded, prompts, 2, sampling) == before
    batch = collate([Example(p, plain.encode_target("4"), "", "teacher") for p in prompts], plain.pad_token_id)
    for student in (plain, sharded):
        student.train()
        optimizer = torch.optim.SGD(student.trained.parameters(), lr=0.5)
        for _ in range(2):  # sampled between two steps: no unit may stay whole with old weights
            optimizer.zero_grad()
            (-student.score(batch).log_probs.mean()).backward()
            optimizer.step()
            after = HFEngine().generate(student, prompts, 2, sampling)
    assert after == HFEngine().generate(plain, prompts, 2, sampling) != before


@pytest.mark.parametrize("sharded", [False, True])
def test_the_frozen_reference_answers_between_forward_and_backward(tmp_path: Path, group: None, sharded: bool) -> None:
    student, untouched = make_student(tmp_path).train(), make_student(tmp_path)
    if sharded:
        shard(student)
    batch = collate([Example(student.encode_question("1?"), student.encode_target("4"), "", "")], 0)
    frozen = untouched.score(batch).log_probs.detach()
    optimizer = torch.optim.SGD(student.trained.parameters(), lr=0.5)
    student.reference_policy.freeze()
    gradients = []
    for with_reference in (True, False, True):
        optimizer.zero_grad()
        loss = -student.score(batch).log_probs.mean()
        if with_reference:
            with torch.no_grad(), student.reference_policy.answering():
                torch.testing.assert_close(student.score(batch).log_probs, frozen, rtol=0, atol=1e-6)
        loss.backward()
        gradients.append([p.grad.clone() for p in student.trained.parameters() if p.grad is not None])
        if not with_reference:
            optimizer.step()
    for with_it, without in zip(*gradients[:2], strict=True):
        assert torch.equal(with_it, without)
    assert not torch.equal(gradients[2][0], gradients[0][0])  # the policy moved, the reference did not


@pytest.mark.parametrize("sharded", [False, True])
def test_state_goes_to_a_fresh_student_and_a_wrong_one_is_refused(tmp_path: Path, group: None, sharded: bool) -> None:
    student = make_student(tmp_path, lora=True)
    if sharded:
        shard(student)
    state = {name: tensor.clone() for name, tensor in student.trained.state()}
    assert state
    assert all("lora_" in name for name in state)
    fresh = Student(str(tmp_path / "llama3"), lora=Lora(r=4, alpha=8))
    fresh.trained.load(state, "weights.safetensors")
    ours, theirs = ({name: w.clone() for name, w in each.weights()} for each in (student, fresh))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    other = Student(str(tmp_path / "llama3"), lora=Lora(r=8, alpha=8))
    with pytest.raises(ValueError, match=r"weights.safetensors: not the weights of this student, first at .*lora_A"):
        other.trained.load(state, "weights.safetensors")
