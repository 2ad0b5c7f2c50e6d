"""Log-probs against a full forward of transformers; tokens, templates, adapters, the saved folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from slmreason.embedded.families import make_problems
from slmreason.records import Example
from slmreason.student import Lora, Student
from slmreason.student import logprobs as head
from slmreason.student.bundles import Bundle, alone
from slmreason.student.packing import collate, collate_bundles
from tests.models import make_checkpoint


def examples_for(student: Student, count: int = 6) -> list[Example]:
    problems = [p for d in (1, 2, 6) for p in make_problems("chain", "train", count // 3, (d,))]
    return [
        Example(student.encode_question(p.question), student.encode_target(f"Let me see.\n{p.answer}"), p.id, "teacher")
        for p in problems
    ]


def full_forward(student: Student, example: Example, temperature: float = 1.0) -> torch.Tensor:
    """The slow way: one sequence, no mask, no packing, every logit."""
    ids = torch.tensor([example.prompt_ids + example.target_ids])
    log_probs = (student.network(input_ids=ids).logits[0, :-1] / temperature).log_softmax(-1)
    every = log_probs.gather(1, ids[0, 1:, None]).squeeze(1)
    return every[len(example.prompt_ids) - 1 :]


@pytest.mark.parametrize("name", ["embedded:qwen2", "embedded:llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_log_probs_equal_a_full_forward(name: str, temperature: float) -> None:
    student = Student(name, instruction="")
    examples = examples_for(student)
    batch = collate(examples, student.pad_token_id)
    assert batch.input_ids.shape[0] < len(examples)  # some rows really hold several sequences
    with torch.no_grad():
        ours = student.score(batch, temperature).log_probs
        theirs = torch.cat([full_forward(student, examples[i], temperature) for i in batch.order])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["embedded:qwen2", "embedded:llama"])
def test_a_shared_prompt_gives_the_log_probs_and_gradients_of_one_repeated(name: str) -> None:
    student = Student(name, instruction="")
    assert student.shares_prompts
    prompts = [example.prompt_ids for example in examples_for(student, 3)]
    texts = ["1+2=3\nThe answer is \\boxed{3}.", "4", "I do not know.", "2*2=4\n4+4=8"]
    examples = [Example(p, student.encode_target(t), "", "rollout") for p in prompts for t in texts]
    bounds = [0, 3, 4, 8, 10, 12]
    together = [Bundle(tuple(examples[start:end])) for start, end in itertools.pairwise(bounds)]
    found, sizes = [], []
    for bundles in (together, alone(examples)):
        batch = collate_bundles(bundles, student.pad_token_id)
        student.zero_grad()
        scores = student.score(batch, 0.9, with_entropy=True)
        assert scores.entropy is not None
        pieces = scores.log_probs.split(batch.target_lengths.tolist())
        in_order = torch.cat([piece for _, piece in sorted(zip(batch.order, pieces, strict=True))])
        (in_order * torch.linspace(-1, 1, len(in_order))).sum().backward()
        found.append([in_order.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)])
        sizes.append(batch.input_ids.numel())
    assert sizes[0] < 0.7 * sizes[1]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)  # sums of hundreds of terms in float32


def test_only_models_that_attend_by_the_mask_alone_share_prompts(tmp_path: Path) -> None:
    """A sliding window is part of what transformers' own mask says."""
    shares = {family: Student(str(make_checkpoint(tmp_path / family, family))).shares_prompts
              for family in ("qwen2.5", "llama3", "gemma")}  # fmt: skip
    assert shares == {"qwen2.5": True, "llama3": True, "gemma": False}


def test_a_chunked_head_gives_the_same_scores_under_every_kind_of_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied and not, with adapters, and one whose model caps its logits afterwards, which goes the plain way."""
    for family, lora in (("qwen2.5", None), ("qwen2.5-base", None), ("llama3", Lora(r=2)), ("gemma", None)):
        folder = make_checkpoint(tmp_path / f"{family}", family)
        if family == "gemma":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 2.0}))
        student = Student(str(folder), instruction="", lora=lora)
        examples = examples_for(student)
        batch = collate(examples, student.pad_token_id)
        found = []
        for elements in (1 << 30, 2000):
            monkeypatch.setattr(head, "CHUNK_ELEMENTS", elements)
            student.zero_grad()
            scores = student.score(batch, 0.8, with_entropy=True, with_ranks=True)
            scores.log_probs.sum().backward()
            gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
            found.append([scores.log_probs.detach(), scores.entropy, scores.ranks, *gradients])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            theirs = torch.cat([full_forward(student, examples[i], 0.8) for i in batch.order])
        torch.testing.assert_close(found[1][0], theirs, rtol=1e-4, atol=1e-4)


def test_loss_is_the_same_packed_padded_or_alone(student: Student) -> None:
    examples = examples_for(student)
    packed = collate(examples, student.pad_token_id)
    with torch.no_grad():
        together = student.score(packed).log_probs.sum()
        alone = sum(student.score(collate([e], student.pad_token_id)).log_probs.sum() for e in examples)
        pairs = [collate(examples[i : i + 2], student.pad_token_id) for i in range(0, len(examples), 2)]
        padded = sum(student.score(pair).log_probs.sum() for pair in pairs)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, padded, rtol=1e-5, atol=1e-5)


def test_only_target_positions_reach_the_vocabulary_projection(student: Student) -> None:
    batch = collate(examples_for(student), student.pad_token_id)
    seen: list[int] = []
    handle = student.network.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].numel())
    )
    student.score(batch)
    handle.remove()
    hidden = student.network.config.hidden_size
    assert seen[-1] == batch.input_ids.numel() * hidden  # our hook runs after this one and cuts it down
    assert len(student.score(batch).log_probs) == batch.num_target_tokens


def test_entropy_and_ranks_equal_a_full_distribution(student: Student) -> None:
    [example] = examples_for(student, 3)[:1]
    batch = collate([example], student.pad_token_id)
    scores = student.score(batch, with_entropy=True, with_ranks=True)
    ids = torch.tensor([example.prompt_ids + example.target_ids])
    log_probs = student.network(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(scores.entropy, -(log_probs.exp() * log_probs).sum(-1), rtol=1e-4, atol=1e-5)
    order = log_probs.argsort(-1, descending=True)
    theirs = [(row == target).nonzero().item() + 1 for row, target in zip(order, example.target_ids, strict=True)]
    assert scores.ranks is not None
    assert scores.ranks.tolist() == theirs


def test_target_ends_with_the_token_that_stops_generation(student: Student) -> None:
    ids = student.encode_target("The answer is \\boxed{4}.")
    assert ids[-1] in student.eos_ids
    assert sum(token in student.eos_ids for token in ids) == 1
    assert student.decode(ids) == "The answer is \\boxed{4}."


def test_prompt_has_each_special_token_once_and_opens_the_answer(student: Student) -> None:
    rendered = student.tokenizer.decode(list(student.encode_question("What is 1+1?")))
    assert rendered == "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    llama = Student("embedded:llama", instruction="Box it.", system_prompt="Be brief.")
    rendered = llama.tokenizer.decode(list(llama.encode_question("What?")))
    assert rendered.count("<|begin_of_text|>") == 1
    assert "system<|end_header_id|>\n\nBe brief.<|eot_id|>" in rendered
    assert rendered.endswith("What?\nBox it.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_base_model_without_template_gets_a_plain_one(embedded_copy: Callable[[str], Path]) -> None:
    folder = embedded_copy("qwen2")
    (folder / "chat_template.jinja").unlink()
    student = Student(str(folder), instruction="")
    assert student.tokenizer.decode(list(student.encode_question("1+1?"))) == "1+1?\n\n"


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8)])
def test_saved_folder_loads_with_plain_transformers_and_scores_the_same(tmp_path: Path, lora: Lora | None) -> None:
    torch.manual_seed(0)
    student = Student("embedded:llama", instruction="", lora=lora)
    with torch.no_grad():
        for parameter in student.trained.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    student.save(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([student.encode_question("Compute 3 + 4.")])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, student.network(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer.chat_template == student.tokenizer.chat_template


def test_lora_trains_adapters_only(lora_student: Student) -> None:
    names = [name for name, parameter in lora_student.network.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize("name", ["embedded:nothing", "/no/such/folder"])
def test_a_model_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Student(name)


def test_gradient_checkpointing_gives_the_same_gradient(student: Student) -> None:
    other = Student("embedded:qwen2", instruction="", gradient_checkpointing=True).train()
    batch = collate(examples_for(student), student.pad_token_id)
    for each in (student, other):
        each.score(batch).log_probs.sum().backward()
    for mine, theirs in zip(student.trained.parameters(), other.trained.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_flash_attention_sees_each_packed_sequence_alone(student: Student) -> None:
    """It tells sequences apart in a single row only. A stand-in that does the same, since the real one needs a GPU."""

    def varlen(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        positions = kwargs["position_ids"]
        assert positions.shape[0] == query.shape[0] == 1
        starts = [*(positions[0] == 0).nonzero().flatten().tolist(), positions.shape[1]]
        pieces = [
            sdpa_attention_forward(
                module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], None, scaling=kwargs["scaling"],
                is_causal=True,
            )[0]
            for a, b in itertools.pairwise(starts)
        ]  # fmt: skip
        return torch.cat(pieces, dim=1), None

    AttentionInterface.register("flash_stand_in", varlen)
    AttentionMaskInterface.register("flash_stand_in", lambda *_, **__: None)
    batch = collate(examples_for(student), student.pad_token_id, hidden_size=16)
    assert batch.input_ids.shape[0] > 1
    expected = student.score(batch).log_probs
    config = student.network.config
    try:
        config._attn_implementation = "flash_stand_in"
        assert not student.shares_prompts
        torch.testing.assert_close(student.score(batch).log_probs, expected, atol=1e-5, rtol=1e-5)
    finally:
        config._attn_implementation = "sdpa"
