"""Options of peft's LoraConfig against peft's own forward pass, merge and transformers' generate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from slmreason.records import Example
from slmreason.rollout import HFEngine, Sampling
from slmreason.rollout.projections import folded
from slmreason.rollout.vllm.adapters import rank_and_refusal
from slmreason.student import Lora, Student
from slmreason.student.loading import resolve_model
from slmreason.student.packing import collate
from tests.student.test_weights import shard

OPTIONS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"use_rslora": True},
    {"use_dora": True, "use_rslora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4", "use_dora": True},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"bias": "all"},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    {"exclude_modules": ["lm_head", "down_proj"]},
]
IDS = [" ".join(map(str, [*options, *[v for v in options.values() if isinstance(v, str)]])) for options in OPTIONS]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=IDS)
EXAMPLES = [Example((5, 6, 7), (8, 9, 10), "", "rollout"), Example((11, 12), (13, 14), "", "rollout")]


def made(options: dict[str, Any], **more: Any) -> Student:
    return Student("embedded:qwen2", instruction="", lora=Lora(r=4, alpha=8, options=options), **more)


def learn(network: Any) -> None:
    """Moves everything that is trained, the same way each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def trained(options: dict[str, Any], **more: Any) -> Student:
    torch.manual_seed(0)
    student = made(options, **more)
    learn(student.network)
    return student


def pefts(options: dict[str, Any]) -> Any:
    """The same by peft alone."""
    base = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:qwen2"), dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    torch.manual_seed(0)  # which is what a student whose base changes is made with
    return get_peft_model(base, config).eval()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one, in which FSDP2 shards."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@torch.no_grad()
def log_probs(student: Student) -> Tensor:
    return student.score(collate(EXAMPLES, 0)).log_probs


@torch.no_grad()
def log_probs_of(network: Any) -> Tensor:
    found = []
    for example in EXAMPLES:
        logits = network(input_ids=torch.tensor([[*example.prompt_ids, *example.target_ids]])).logits[0]
        rows = logits[len(example.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(1, torch.tensor(example.target_ids)[:, None])[:, 0])
    return torch.cat(found)


@every_option
def test_scores_are_those_of_pefts_own_forward(options: dict[str, Any]) -> None:
    student, theirs = trained(options), pefts(options)
    theirs.load_state_dict({n: p for n, p in student.network.state_dict().items() if "lora_" in n}, strict=False)
    if options.get("bias"):
        learn(theirs)
        theirs.load_state_dict(student.network.state_dict())
    ours = log_probs(student)
    torch.testing.assert_close(ours, log_probs_of(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, log_probs(Student("embedded:qwen2", instruction="")), atol=1e-3)


@every_option
def test_greedy_decoding_is_that_of_generate(options: dict[str, Any]) -> None:
    student = trained(options)
    prompts = [student.encode_question(text) for text in ("Ann has 3 apples.", "2 + 2")]
    ours = HFEngine().generate(student, prompts, 1, Sampling(24, temperature=0.0))
    for prompt, group in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        whole = student.network.generate(input_ids=ids, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
        assert list(group[0].token_ids) == whole[0, len(prompt) :].tolist()


@every_option
def test_the_saved_student_scores_as_the_trained_one(options: dict[str, Any], tmp_path: Path) -> None:
    student = trained(options)
    student.save(tmp_path / "saved")
    saved = Student(str(tmp_path / "saved"), instruction="")
    torch.testing.assert_close(log_probs(saved), log_probs(student), rtol=1e-4, atol=1e-4)
    merged = student.network.merge_and_unload()  # type: ignore[operator]
    for name, theirs in merged.named_parameters():
        torch.testing.assert_close(dict(saved.network.named_parameters())[name], theirs, rtol=1e-5, atol=1e-6)


@every_option
def test_the_reference_policy_is_the_model_that_was_given(options: dict[str, Any]) -> None:
    student, plain = trained(options), Student("embedded:qwen2", instruction="")
    before = {name: parameter.detach().clone() for name, parameter in student.network.named_parameters()}
    with student.reference_policy.answering():
        torch.testing.assert_close(log_probs(student), log_probs(plain), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.network.named_parameters())


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"}])
def test_what_is_taken_out_of_the_base_is_the_same_in_every_process(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    first = dict(made(options).network.named_parameters())
    torch.manual_seed(4)
    expected = torch.Generator().manual_seed(4).get_state()
    second = made(options)
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert all(torch.equal(parameter, first[name]) for name, parameter in second.network.named_parameters())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_sharded_weights_have_the_same_reference_and_merge_alike(options: dict[str, Any], one_process: None) -> None:
    student, plain = trained(options), Student("embedded:qwen2", instruction="")
    scores, merged = log_probs(student), {name: tensor.clone() for name, tensor in student.weights()}
    shard(student)
    torch.testing.assert_close(log_probs(student), scores)
    with student.reference_policy.answering():
        torch.testing.assert_close(log_probs(student), log_probs(plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_probs(student), scores)
    for name, tensor in student.weights():
        torch.testing.assert_close(tensor, merged.pop(name))
    assert merged == {}


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "mica"}])
def test_adapters_that_are_saved_alone_are_read_by_peft(options: dict[str, Any], tmp_path: Path) -> None:
    student = trained(options)
    student.network.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:qwen2"), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(log_probs_of(theirs), log_probs(student), rtol=1e-4, atol=1e-4)


def test_half_precision_takes_variants_too() -> None:
    options = {"use_dora": True}
    student = trained(options, dtype="bfloat16")
    scores = student.score(collate(EXAMPLES, 0)).log_probs
    scores.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.trained.parameters())
    assert (scores.detach() - log_probs(trained(options))).abs().mean() < 0.3


def test_plain_adapters_are_folded_for_decoding_and_variants_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), folded(trained({"use_rslora": True})) as is_folded:
        assert is_folded
    assert "peft's own layers" not in caplog.text
    with caplog.at_level("INFO"), folded(trained({"use_dora": True})) as is_folded:
        assert not is_folded
    assert caplog.text.count("peft's own layers") == 1


def test_vllm_gets_variants_folded_in() -> None:
    assert rank_and_refusal(made({"use_rslora": True})) == (4, None)
    assert "use_dora" in str(rank_and_refusal(made({"use_dora": True}))[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dorra": True}, "options.use_dorra: peft's LoraConfig has no such option; near: use_dora"),
        ({"lora_alpha": 3}, "options.lora_alpha: write student.lora.alpha in its place"),
        ({"task_type": "SEQ_CLS"}, "options.task_type: it says what the student is"),
        ({"modules_to_save": ["lm_head"]}, "options.modules_to_save: it trains or changes more"),
        ({"lora_bias": True}, "options.lora_bias: where a layer has no bias"),
        ({"init_lora_weights": "eva"}, "options.init_lora_weights: 'eva' is none of true, false, gaussian"),
        ({"layers_to_transform": [0], "layers_pattern": 3, "rank_pattern": 1}, "student.lora"),
        ({"init_lora_weights": "pissa_4"}, "student.lora: peft cannot adapt Qwen2ForCausalLM: init_lora_weights"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="student") as caught:
        made(options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
