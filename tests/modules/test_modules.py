"""The LightningModules under a real Trainer: normalisation, accumulation, and what GRPO trains on."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from slmreason.callbacks import HarvestAllZeroGroups, RecordRollouts, TokenBudget
from slmreason.data.batches import PackedDataset
from slmreason.data.ledger import Ledger
from slmreason.embedded.families import make_problems, rebuild, write_solution
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.policy_batch import PolicyBatch
from slmreason.modules.settings import CFTSettings, GRPOSettings, SFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.records import Example, Place, Problem, Rollout, RolloutGroup, Tokens
from slmreason.rollout.collect import collect
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Lora, Student
from slmreason.student.packing import PromptBatch, collate, plan_batches
from slmreason.verify.rewards import AnswerReward, Verdict
from tests import reference
from tests.plugins import CoinReward

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                         "enable_model_summary": False, "accelerator": "cpu"}  # fmt: skip


def solution_examples(student: Student, count: int) -> list[Example]:
    problems = make_problems("chain", "train", count)
    texts = [write_solution([s.text for s in rebuild(p.id).steps], p.answer) for p in problems]
    return [
        Example(student.encode_question(p.question), student.encode_target(t), p.id, "teacher")
        for p, t in zip(problems, texts, strict=True)
    ]


def weights_after_sft(batch_size: int, accumulate: int) -> list[torch.Tensor]:
    student = Student("embedded:qwen2", instruction="")
    examples = solution_examples(student, 32)
    plan = plan_batches([len(e) for e in examples], 10**6, batch_size)
    module = SFTModule(student, SFTSettings(learning_rate=0.1))
    # Plain SGD: Adam would hide a wrong scale of the gradient.
    module.configure_optimizers = lambda: torch.optim.SGD(student.parameters(), lr=0.1)  # type: ignore[method-assign]
    trainer = L.Trainer(max_epochs=1, accumulate_grad_batches=accumulate, **QUIET)
    loader = DataLoader(PackedDataset(examples, plan, accumulate, student.pad_token_id), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    assert trainer.global_step == 1  # all examples are one window
    return [parameter.detach().clone() for parameter in student.parameters()]


def test_accumulation_1_x_32_equals_4_x_8_equals_uneven_windows() -> None:
    whole = weights_after_sft(32, 1)
    for batch_size, accumulate in ((8, 4), (4, 8), (5, 7)):
        for theirs, ours in zip(whole, weights_after_sft(batch_size, accumulate), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_one_sft_step_equals_transformers_loss_and_plain_sgd(student: Student) -> None:
    examples = solution_examples(student, 32)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    tokens = sum(len(e.target_ids) for e in examples)
    for example in examples:  # transformers' own loss, one padded-free sequence at a time
        ids = torch.tensor([example.prompt_ids + example.target_ids])
        labels = torch.tensor([[-100] * len(example.prompt_ids) + list(example.target_ids)])
        student.network(input_ids=ids, labels=labels, num_items_in_batch=tokens).loss.backward()
    theirs = [
        b - 0.1 * (p.grad if p.grad is not None else 0) for b, p in zip(before, student.parameters(), strict=True)
    ]
    for ours, expected in zip(weights_after_sft(32, 1), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [SFTSettings, CFTSettings])
def test_a_dft_step_weighs_each_token_by_its_probability(student: Student, settings: type[SFTSettings]) -> None:
    module = (SFTModule if settings is SFTSettings else CFTModule)(student, settings(loss="dft"))  # type: ignore[arg-type]
    batch = collate(solution_examples(student, 4), student.pad_token_id, global_target_tokens=50)
    log_probs = student.score(batch).log_probs.tolist()
    theirs = -sum(math.exp(value) * value for value in log_probs) / 50
    assert module.loss_of(batch).item() == pytest.approx(theirs, rel=1e-5)


def test_a_batch_planned_for_another_accumulation_is_refused(student: Student) -> None:
    examples = solution_examples(student, 8)
    loader = DataLoader(PackedDataset(examples, [[0, 1], [2, 3]], 1, 0), batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="accumulate_grad_batches=1, the trainer now has 2"):
        L.Trainer(max_epochs=1, accumulate_grad_batches=2, **QUIET).fit(SFTModule(student), loader)


def test_a_limit_of_tokens_ends_the_fit_at_the_step_that_reaches_it_with_the_rate_fallen(student: Student) -> None:
    """2 of 5 epochs' tokens may be taken, of which a tenth was before the fit."""
    examples = solution_examples(student, 32)
    plan = plan_batches([len(e) for e in examples], 10**6, 4)
    loader = DataLoader(PackedDataset(examples, plan, 1, student.pad_token_id), batch_size=None)  # type: ignore[arg-type]
    epoch = sum(len(e) for e in examples)
    student.tokens = Tokens(sampled=epoch // 5)
    budget = TokenBudget(student.tokens, 2 * epoch)
    module = SFTModule(student, SFTSettings(learning_rate=1e-3, decay="linear"))
    module.share_spent = budget.share_spent
    rates: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = L.Trainer(max_epochs=5, **{**QUIET, "callbacks": [budget, Watch()]})
    trainer.fit(module, loader)
    largest = max(sum(len(examples[i]) for i in batch) for batch in plan)
    assert 0 <= student.tokens.total - 2 * epoch < largest
    assert student.tokens.trained == student.tokens.total - epoch // 5
    assert rates[0] == pytest.approx(1e-3, rel=0.01)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 1e-3 * largest / (2 * epoch - epoch // 5) * 1.01  # one step before there is nothing left


# -- GRPO --------------------------------------------------------------------------------------------------------


def rollout(student: Student, problem: Problem, text: str, reward: float) -> Rollout:
    ids = student.encode_target(text)
    return Rollout(
        student.encode_question(problem.question), ids, (-0.1,) * len(ids), text, reward, reward > 0.5, False, 0
    )


def made_groups(student: Student) -> list[RolloutGroup]:
    """Three groups: mixed, all zero, mixed."""
    first, second, third = make_problems("chain", "train", 3, (2,))
    return [
        RolloutGroup(first, tuple(rollout(student, first, f"{i}+1={i + 1}", float(i % 2)) for i in range(4))),
        RolloutGroup(second, tuple(rollout(student, second, f"no {i}", 0.0) for i in range(4))),
        RolloutGroup(third, tuple(rollout(student, third, "so " * (i + 1), float(i == 0)) for i in range(4))),
    ]


def grpo(student: Student, **options: Any) -> GRPOModule:
    settings = GRPOSettings(**{"max_completion_tokens": 40, **options})
    return GRPOModule(student, HFEngine(), AnswerReward(), settings)


OF_THE_REFERENCE: dict[str, dict[str, Any]] = {
    "cispo": {"cispo_cap": 1.2},
    "sapo": {"sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.3},
}


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "gmpo"])
@pytest.mark.parametrize("token_budget", [10_000, 90])
def test_grpo_loss_over_micro_batches_equals_plain_python(student: Student, loss: str, token_budget: int) -> None:
    module = grpo(student, loss=loss, **OF_THE_REFERENCE.get(loss, {}))
    module.token_budget = token_budget
    groups = made_groups(student)
    batches = module.policy_batches(groups)
    assert (len(batches) > 1) == (token_budget == 90)
    ours, old, new, advantages = 0.0, [], [], []
    for batch in batches:
        with torch.no_grad():
            current = student.score(batch.packed).log_probs
        torch.manual_seed(0)
        batch.old_log_probs = current + 0.3 * torch.randn(len(current))  # off policy, so that clipping matters
        ours += module.policy_step(batch)[0].item()
        lengths = batch.packed.target_lengths.tolist()
        old += [piece.tolist() for piece in batch.old_log_probs.split(lengths)]
        new += [piece.tolist() for piece in current.split(lengths)]
        advantages += [piece[0].item() for piece in batch.advantages.split(lengths)]
    theirs = reference.loss(loss, new, old, advantages, 0.2, 0.28, 40)
    assert ours == pytest.approx(theirs, rel=1e-4)
    expected = [a for g in (groups[0], groups[2]) for a in reference.advantages([r.reward for r in g.rollouts], True)]
    assert sorted(advantages) == pytest.approx(sorted(expected), rel=1e-5)


def test_groups_without_variance_and_truncated_rollouts_are_not_trained_on(student: Student) -> None:
    from dataclasses import replace

    groups = made_groups(student)
    cut = RolloutGroup(groups[0].problem, tuple(replace(r, truncated=i == 1) for i, r in enumerate(groups[0].rollouts)))
    [batch] = grpo(student).policy_batches([cut, groups[1]])
    assert len(batch.packed.target_lengths) == 3
    assert grpo(student).policy_batches([groups[1]]) == []
    assert len(grpo(student, mask_truncated=False).policy_batches([cut])[0].packed.target_lengths) == 4


def test_first_step_is_exactly_on_policy(student: Student) -> None:
    module = grpo(student)
    [batch] = module.policy_batches(made_groups(student))
    _, metrics = module.policy_step(batch)
    assert batch.old_log_probs is not None
    ratio = (student.score(batch.packed).log_probs - batch.old_log_probs).exp()
    assert (ratio == 1).all()
    assert metrics["clipped"] == 0


class OtherNumbers(HFEngine):
    """An engine whose log-probs are not the trainer's."""

    exact = False


@pytest.mark.parametrize(
    ("engine", "precision", "corrected"),
    [
        (HFEngine(), "32", False),
        (OtherNumbers(), "32", True),
        (HFEngine(), "bf16-true", True),
        (HFEngine(), "bf16-mixed", True),
    ],
)
def test_the_sampler_is_corrected_for_where_its_numbers_are_not_the_trainers(
    student: Student, engine: HFEngine, precision: str, corrected: bool
) -> None:
    """The rollouts' log-probs are far below the trainer's here, so each weight of the correction is at its cap."""
    if precision == "bf16-true":
        student.to(torch.bfloat16)
    module = grpo(student, importance_cap=1.5)
    module.engine = engine
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        [batch] = module.policy_batches(made_groups(student))
        batch.sampler_log_probs = torch.full_like(batch.sampler_log_probs, -100.0)
        batch.advantages = batch.advantages.abs()  # at a ratio of 1 nothing is clipped, and the loss is a plain sum
        loss, _ = module.policy_step(batch)
    plain = -(batch.weights * batch.advantages).sum().item()
    assert loss.item() == pytest.approx(plain * (1.5 if corrected else 1.0), rel=1e-4)


def mismatched(module: GRPOModule, student: Student) -> PolicyBatch:
    """A batch on policy whose first token the sampler had at a quarter, and whose second at half, of what we have."""
    module.engine = OtherNumbers()
    [batch] = module.policy_batches(made_groups(student))
    with torch.no_grad():
        batch.sampler_log_probs = student.score(batch.packed).log_probs.clone()
    batch.sampler_log_probs[0] -= math.log(4)
    batch.sampler_log_probs[1] -= math.log(2)
    batch.advantages = batch.advantages.abs()
    return batch


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_the_sampler_drew_against_our_odds_is_masked(
    student: Student, level: Literal["token", "sequence"]
) -> None:
    module = grpo(student, mask_mismatch=level, mask_mismatch_above=3.0)
    batch = mismatched(module, student)
    loss, metrics = module.policy_step(batch)
    length = int(batch.packed.target_lengths[0])
    weights = batch.weights * batch.advantages
    if level == "token":  # the first token is left out, the second weighs 2
        expected, masked = weights.sum() - weights[0] + weights[1], 1
    else:  # the first rollout is left out
        expected, masked = weights[length:].sum(), length
    assert loss.item() == pytest.approx(-expected.item(), rel=1e-4)
    assert metrics["masked"] == masked


def test_a_mask_that_does_nothing_is_said(student: Student, caplog: pytest.LogCaptureFixture) -> None:
    module = grpo(student, mask_mismatch="token")
    recorder = RecordRollouts(Ledger(None), Place(1, "grpo"))
    with caplog.at_level("INFO"):
        trainer = L.Trainer(max_epochs=1, **{**QUIET, "callbacks": [recorder]})
        trainer.fit(module, Prompts([make_problems("chain", "train", 8)]))
    said = [line for line in caplog.messages if "mask_mismatch" in line]
    assert said == ["grpo.mask_mismatch does nothing here: HFEngine has the trainer's own numbers"]
    assert trainer.callback_metrics["grpo/masked"] == 0


def test_the_entropy_bonus_is_of_the_mean_token_of_the_step(student: Student) -> None:
    plain, rewarded = grpo(student), grpo(student, entropy_bonus=0.5)
    plain.token_budget = rewarded.token_budget = 90
    batches = plain.policy_batches(made_groups(student))
    assert len(batches) > 1
    difference = entropy = 0.0
    for batch in batches:
        loss, metrics = plain.policy_step(batch)
        difference += (rewarded.policy_step(batch)[0] - loss).item()
        entropy += metrics["entropy"]
    tokens = sum(batch.packed.num_target_tokens for batch in batches)
    assert difference == pytest.approx(-0.5 * entropy / tokens, rel=1e-4)


def test_an_entropy_bonus_raises_the_entropy_of_what_the_student_draws(student: Student) -> None:
    """By the bonus alone: the policy gradient is taken away."""
    module = grpo(student, entropy_bonus=1.0, mask_truncated=False)
    problems, sampling = make_problems("chain", "train", 8, (3, 6)), module.settings.sampling("here")
    groups = collect(student, HFEngine(), CoinReward(), problems=problems, group_size=8, sampling=sampling)
    [batch] = module.policy_batches(groups)
    batch.advantages = torch.zeros_like(batch.advantages)
    loss, before = module.policy_step(batch)
    loss.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * -parameter.grad if parameter.grad is not None else 0
    _, after = module.policy_step(batch)
    assert after["entropy"] > 1.02 * before["entropy"]


OBJECTIVES: list[dict[str, Any]] = [
    {"loss": "cispo", "advantage_scale": "batch", "updates_per_batch": 2},
    {"loss": "sapo", "advantage_scale": "rloo", "updates_per_batch": 2, "overlong_cache": 20},
    {"loss": "gmpo", "advantage_scale": "maxrl", "updates_per_batch": 2, "entropy_bonus": 0.01},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o["loss"])
def test_a_fit_goes_by_its_objective(student: Student, objective: dict[str, Any]) -> None:
    """The same rollouts give other weights than the default does, all of them finite."""
    weights = []
    for options in ({"updates_per_batch": 2}, objective):
        trained = copy.deepcopy(student)
        module = grpo(trained, learning_rate=1e-3, **options)
        recorder = RecordRollouts(Ledger(None), Place(1, "grpo"))
        trainer = L.Trainer(max_epochs=1, **{**QUIET, "callbacks": [recorder]})
        trainer.fit(module, Prompts([make_problems("chain", "train", 8)]))
        assert trained.policy_version == 1
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trained.parameters()]))
    assert weights[1].isfinite().all()
    assert not torch.allclose(weights[0], weights[1])


class NotesWhenItIsSynced(HFEngine):
    """An engine that notes at which version of the student it got the weights, and at which it sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: list[tuple[str, int]] = []

    def sync(self, student: Student) -> None:
        self.versions.append(("sync", student.policy_version))

    def generate(self, student, *args, **options):  # type: ignore[no-untyped-def]
        self.versions.append(("sample", student.policy_version))
        return super().generate(student, *args, **options)


def test_the_engine_gets_the_weights_before_each_sampling_and_not_after_the_last_step(student: Student) -> None:
    """What the last sync of a fit would leave on the GPU, the next stage has no use for."""
    engine, problems = NotesWhenItIsSynced(), make_problems("chain", "train", 24, (1, 3, 6))
    settings = GRPOSettings(max_completion_tokens=40, learning_rate=1e-4)
    module = GRPOModule(student, engine, AnswerReward(), settings)
    trainer = L.Trainer(max_epochs=1, **{**QUIET, "callbacks": [RecordRollouts(Ledger(None), Place(1, "grpo"))]})
    trainer.fit(module, DataLoader([PromptBatch(problems[i : i + 8]) for i in (0, 8, 16)], batch_size=None))  # type: ignore[arg-type]
    versions = [version for what, version in engine.versions if what == "sample"]
    assert student.policy_version > 1
    expected = [("sync", 0), ("sample", 0)]
    for before, version in zip(versions, versions[1:], strict=False):
        expected += [("sync", version), ("sample", version)] if version != before else [("sample", version)]
    assert engine.versions == expected


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8)])
def test_kl_term_pulls_toward_the_reference(lora: Lora | None) -> None:
    student = Student("embedded:qwen2", instruction="", lora=lora)
    student.reference_policy.freeze()
    with torch.no_grad():
        for parameter in student.trained.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    groups = made_groups(student)
    plain, penalised = grpo(student), grpo(student, kl=0.5)
    [batch] = plain.policy_batches(groups)
    without, _ = plain.policy_step(batch)
    with_kl, metrics = penalised.policy_step(batch)
    with torch.no_grad():
        policy = student.score(batch.packed).log_probs
        with student.reference_policy.answering():
            base = student.score(batch.packed).log_probs
    k3 = torch.tensor([reference.k3(p, b) for p, b in zip(policy.tolist(), base.tolist(), strict=True)])
    assert (with_kl - without).item() == pytest.approx(0.5 * (batch.weights * k3).sum().item(), rel=1e-3)
    assert metrics["kl"] == pytest.approx(k3.sum().item(), rel=1e-3)


class Prompts(L.LightningDataModule):
    def __init__(self, batches: Sequence[list[Problem]]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([PromptBatch(batch) for batch in self.batches], batch_size=None)  # type: ignore[arg-type]


def test_every_rollout_reaches_the_ledger_and_all_zero_groups_the_harvest(student: Student, tmp_path: Path) -> None:
    problems = make_problems("chain", "train", 16, (1, 3, 6))
    ledger, place = Ledger(tmp_path), Place(1, "grpo")
    callbacks = [RecordRollouts(ledger, place), HarvestAllZeroGroups(ledger, place)]
    trainer = L.Trainer(max_epochs=1, callbacks=callbacks, **QUIET)  # type: ignore[arg-type]
    trainer.fit(grpo(student, learning_rate=1e-5), Prompts([problems[:8], problems[8:]]))
    zero = {p.id for p in problems if ledger.get(p.id).successes == 0}  # type: ignore[union-attr]
    assert 0 < len(zero) < 16
    assert {g.problem.id for g in ledger.harvested(1)} == zero
    assert all(ledger.get(p.id).attempts == 8 for p in problems)  # type: ignore[union-attr]
    assert student.policy_version == trainer.global_step


def test_a_step_without_an_informative_group_changes_nothing(student: Student) -> None:
    class Nothing(AnswerReward):
        def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
            return [Verdict(0.0, False) for _ in pairs]

    before = [parameter.detach().clone() for parameter in student.parameters()]
    settings = GRPOSettings(max_completion_tokens=20, learning_rate=0.1)
    module = GRPOModule(student, HFEngine(), Nothing(), settings)
    recorder = RecordRollouts(Ledger(None), Place(1, "grpo"))
    L.Trainer(max_epochs=1, callbacks=[recorder], **QUIET).fit(module, Prompts([make_problems("chain", "train", 4)]))
    assert all(torch.equal(b, p) for b, p in zip(before, student.parameters(), strict=True))
    assert student.policy_version == 0


def test_a_step_without_an_update_does_not_show_the_loss_of_the_step_before(student: Student, tmp_path: Path) -> None:
    class FirstStepAlone(AnswerReward):
        steps = 0

        def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
            self.steps += 1
            right = [self.steps == 1 and n % 2 == 1 for n in range(len(pairs))]
            return [Verdict(float(r), r) for r in right]

    class Logs(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
            pl_module.log("mine", float(batch_idx), batch_size=1, on_step=True, on_epoch=False)

    settings = GRPOSettings(group_size=8, max_completion_tokens=120, mask_truncated=False)
    module = GRPOModule(student, HFEngine(), FirstStepAlone(), settings)
    loader = Prompts([make_problems("chain", "train", 1), make_problems("chain", "train", 1)])
    recorder = RecordRollouts(Ledger(None), Place(1, "grpo"))
    logger = CSVLogger(tmp_path, name="", version="")
    options = QUIET | {"logger": logger, "log_every_n_steps": 1}
    L.Trainer(max_epochs=1, callbacks=[recorder, Logs()], **options).fit(module, loader)
    with open(tmp_path / "metrics.csv", newline="") as file:
        first, second = list(csv.DictReader(file))[:2]
    of_the_update = {"grpo/loss", "grpo/entropy", "grpo/clipped", "grpo/gradient_norm", "grpo/sampler_mismatch"}
    assert all(first[name] for name in of_the_update)
    assert (first["grpo/informative_step"], second["grpo/informative_step"]) == ("1.0", "0.0")
    assert {name for name in of_the_update if second[name]} == set()
    assert second["grpo/reward_step"] == "0.0"
    assert (first["mine"], second["mine"]) == ("0.0", "1.0")


@pytest.mark.parametrize(("decay", "last"), [("constant", 1.0), ("linear", 0.25), ("cosine", 0.5 * (1 + 2**-0.5 * -1))])
def test_learning_rate_warms_up_and_decays_over_the_share_that_is_done(
    student: Student, decay: str, last: float
) -> None:
    seen: list[float] = []

    class Spy(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

    examples = solution_examples(student, 4)
    loader = DataLoader(PackedDataset(examples, [[0], [1], [2], [3]], 1, 0), batch_size=None)  # type: ignore[arg-type]
    module = SFTModule(student, SFTSettings(1e-3, warmup_steps=1, decay=decay))  # type: ignore[arg-type]
    L.Trainer(max_epochs=1, callbacks=[Spy()], **QUIET).fit(module, loader)
    assert seen[0] == pytest.approx(0.5e-3)
    assert seen[-1] == pytest.approx(1e-3 * last, rel=1e-6)


@pytest.mark.parametrize(("warmup_steps", "is_said"), [(1, False), (2, True)])
def test_a_fit_that_is_over_within_its_warm_up_says_so(
    warmup_steps: int, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    student = Student("embedded:qwen2", instruction="")
    examples = solution_examples(student, 4)
    plan = plan_batches([len(example) for example in examples], 10**6, 2)
    module = SFTModule(student, SFTSettings(learning_rate=1e-4, warmup_steps=warmup_steps))
    loader = DataLoader(PackedDataset(examples, plan, 1, student.pad_token_id), batch_size=None)  # type: ignore[arg-type]
    with caplog.at_level("INFO", logger="slmreason"):
        L.Trainer(max_epochs=1, **QUIET).fit(module, loader)
    said = (
        "sft: the fit has about 2 optimizer steps and is over within its warm-up: the learning rate stays below 0.0001"
    )
    assert (said in caplog.text) == is_said
