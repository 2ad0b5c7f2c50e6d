"""The mathematics against TRL's own code, run on the same tensors: its trainers without a model, data or a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from slmreason.objectives import (
    entropy_surrogate,
    group_advantages,
    masked_importance,
    overlong_penalty,
    policy_loss,
    supervised_loss,
    token_weights,
)
from tests.test_objectives import ADVANTAGES, LENGTHS, flat_inputs

pytest.importorskip("trl")

TOKENS = sum(LENGTHS)
REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.1, 1.1, 1.1, 1.1], [0.0, 0.0, 0.0, 0.0]]


def padded(flat: Tensor) -> Tensor:
    """[N] -> [S, longest], as TRL has it."""
    return pad_sequence(list(flat.split(LENGTHS)), batch_first=True)


def flat(values: Tensor) -> Tensor:
    """The inverse of `padded`."""
    return torch.cat([row[:length] for row, length in zip(values, LENGTHS, strict=True)])


def one_process() -> Any:
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        gather=lambda value: value,
        gather_for_metrics=lambda value: value,
        reduce=lambda value, reduction: value,
        parallelism_config=None,
        sync_gradients=False,
    )


def trainer(**options: Any) -> MagicMock:
    """What stands for `self` in methods of TRL's trainers."""
    stand_in = MagicMock()
    plain: dict[str, Any] = {
        "accelerator": one_process(), "aux_loss_enabled": False, "beta": 0.0, "current_gradient_accumulation_steps": 1,
        "environment_factories": None, "environments": [], "tools": [], "images": None, "pad_to_multiple_of": None,
        "_pending_extra_logs": {}, "_pending_metrics": {}, "off_policy_mask_threshold": None, "use_vllm": False,
        "top_entropy_quantile": 1.0, "_entropy_bonus_enabled": False, "use_adaptive_entropy": False,
        "multi_objective_aggregation": "sum_then_normalize", "reward_weights": torch.ones(1),
        "reward_func_names": ["r"], "importance_sampling_level": "token", "reward_clip_range": None,
        "normalize_advantages": False, "mask_truncated_completions": False,
    }  # fmt: skip
    for name, value in {**plain, **options}.items():
        setattr(stand_in, name, value)
    stand_in.model.is_gradient_checkpointing = False
    stand_in._tokenizer.pad_token_id = 0
    stand_in.args.delta = None
    stand_in.args.steps_per_generation = 1
    stand_in.args.gradient_accumulation_steps = 1
    return stand_in


def trl_loss(
    loss_type: str, new: Tensor, old: Tensor, entropy: Tensor | None = None, ratio: Tensor | None = None, **options: Any
) -> Tensor:
    from trl import GRPOTrainer
    from trl.experimental.gmpo import GMPOTrainer

    mask = padded(torch.ones(TOKENS))
    stand_in = trainer(loss_type=loss_type, max_completion_length=7, use_vllm=ratio is not None, **options)
    stand_in.args.sapo_temperature_pos, stand_in.args.sapo_temperature_neg = 0.9, 1.3
    entropies = padded(torch.zeros(TOKENS) if entropy is None else entropy)
    stand_in._get_per_token_logps_and_entropies.return_value = (padded(new), entropies, None)
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1), "prompt_mask": torch.ones(len(LENGTHS), 1),
        "completion_ids": torch.zeros_like(mask), "completion_mask": mask, "old_per_token_logps": padded(old),
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float64), "num_items_in_batch": torch.tensor(TOKENS),
        "importance_sampling_ratio": ratio,
    }  # fmt: skip
    of = GMPOTrainer if loss_type == "gmpo" else GRPOTrainer
    return of._compute_loss(stand_in, MagicMock(), inputs)  # type: ignore[no-any-return]


def gradient(loss: Tensor, new: Tensor) -> Tensor:
    [found] = torch.autograd.grad(loss, new)
    return found


@pytest.mark.parametrize(
    ("kind", "high", "options"),
    [
        ("grpo", 0.28, {}),
        ("dr_grpo", 0.28, {}),
        ("dapo", 0.28, {}),
        ("gspo", 0.28, {"importance_sampling_level": "sequence"}),
        ("cispo", 1.2, {}),
        ("sapo", 0.28, {}),
        ("gmpo", 0.28, {}),
    ],
)
def test_policy_losses_and_their_gradients_are_trls(kind: str, high: float, options: dict[str, Any]) -> None:
    new, old, advantages, lengths = flat_inputs(seed=2)
    new.requires_grad_()
    weights = token_weights(kind, lengths, len(LENGTHS), TOKENS, 7).double()  # type: ignore[arg-type]
    ours, _ = policy_loss(
        new, old, advantages, weights, lengths, kind, 0.2, high, cispo_cap=high, sapo_temperatures=(0.9, 1.3)  # type: ignore[arg-type]
    )  # fmt: skip
    name = "grpo" if kind == "gspo" else kind
    theirs = trl_loss(name, new, old, epsilon_low=0.2, epsilon_high=high, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient(ours, new), gradient(theirs, new), rtol=1e-6, atol=1e-8)


def test_the_entropy_bonus_is_trls_in_value() -> None:
    new, old, advantages, lengths = flat_inputs(seed=4)
    entropy = torch.rand(TOKENS, dtype=torch.float64)
    weights = token_weights("grpo", lengths, len(LENGTHS), TOKENS, 7).double()
    ours = policy_loss(new, old, advantages, weights, lengths)[0]
    ours = ours - 0.3 * entropy_surrogate(new, old, entropy).sum() / TOKENS
    options = {"_entropy_bonus_enabled": True, "entropy_coef": 0.3, "epsilon_low": 0.2, "epsilon_high": 0.28}
    torch.testing.assert_close(ours, trl_loss("grpo", new, old, entropy=entropy, **options), rtol=1e-6, atol=1e-8)


def generated(of: Any, rewards: Tensor, old: Tensor, sampler: Tensor, **options: Any) -> dict[str, Tensor]:
    """What a trainer of TRL makes of rollouts, all of which are given."""
    count = rewards.numel()
    stand_in = trainer(num_generations=rewards.shape[1], vllm_importance_sampling_clip_min=None, **options)
    rows = (LENGTHS * count)[:count]
    ids = [[1] * length for length in rows]
    log_probs = pad_sequence([old[:length] for length in rows], batch_first=True)
    stand_in._get_per_token_logps_and_entropies.return_value = (log_probs, None, None)
    sampled = [sampler[:length].tolist() for length in rows]
    everything = ([[1]] * count, ids, None, [""] * count, sampled, {}, None, [])
    stand_in._generate.return_value = everything if "scale_rewards" in options else ([[1]] * count, ids, [""] * count)
    stand_in._calculate_rewards.return_value = rewards.reshape(-1, 1)
    return of._generate_and_score_completions(stand_in, [{"prompt": "?"}] * count)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scale", ["group", "none", "batch", "rloo"])
def test_advantages_are_trls(scale: str) -> None:
    from trl import GRPOTrainer, RLOOTrainer

    rewards = torch.tensor(REWARDS)
    options = {} if scale == "rloo" else {"scale_rewards": scale}
    of = RLOOTrainer if scale == "rloo" else GRPOTrainer
    theirs = generated(of, rewards, torch.zeros(TOKENS), torch.zeros(TOKENS), **options)["advantages"]
    ours = torch.stack(
        [group_advantages(row[None], scale, step_rewards=rewards)[0] for row in rewards]  # type: ignore[arg-type]
    )
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_masked_importance_is_trls(level: str) -> None:
    """One group of the four completions, all of the same first tokens: of ratios 1.5, 0.9, 2.5, 0.5 and 1.1."""
    from trl import GRPOTrainer

    ratios = torch.tensor([1.5, 0.9, 2.5, 0.5, 1.1])
    options = {"use_vllm": True, "vllm_importance_sampling_mode": f"{level}_mask", "scale_rewards": "none"}
    old, lengths = ratios.log() - 1, torch.tensor(LENGTHS)
    theirs = generated(
        GRPOTrainer, torch.tensor([[1.0, 0.0, 1.0, 0.0]]), old, -torch.ones(5),
        vllm_importance_sampling_correction=True, vllm_importance_sampling_clip_max=2.0, **options,
    )["importance_sampling_ratio"]  # fmt: skip
    theirs = flat(theirs.expand(len(LENGTHS), max(LENGTHS)))
    sampled = torch.cat([old[:length] for length in LENGTHS])
    ours = masked_importance(sampled, -torch.ones(TOKENS), lengths, level, threshold=2.0)  # type: ignore[arg-type]
    assert (ours == 0).any()
    assert (ours > 0).any()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_masked_surrogate_is_trls() -> None:
    new, old, advantages, lengths = flat_inputs(seed=6)
    ratio = masked_importance(old, old - 0.5 * torch.rand(TOKENS, dtype=torch.float64), lengths, "sequence", 1.6)
    weights = token_weights("dapo", lengths, len(LENGTHS), TOKENS, 7).double()
    ours, _ = policy_loss(new, old, advantages, weights, lengths, "dapo", importance_weights=ratio)
    options = {"vllm_importance_sampling_correction": True, "epsilon_low": 0.2, "epsilon_high": 0.28}
    theirs = trl_loss("dapo", new, old, ratio=padded(ratio), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_the_overlong_penalty_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = [1, 79, 80, 81, 90, 99, 100]
    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)([[1] * n for n in lengths])
    ours = overlong_penalty(torch.tensor(lengths), max_completion_tokens=100, cache=20)
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_supervised_losses_and_their_gradients_are_trls(loss: str) -> None:
    from trl import SFTTrainer

    log_probs = flat_inputs(seed=7)[0].requires_grad_()
    stand_in = trainer(compute_loss_func=None, label_smoother=None, _total_train_tokens=0, _tp_size=1)
    stand_in.args.loss_type = loss
    stand_in.args.average_tokens_across_devices = False
    everywhere = torch.ones(TOKENS)
    outputs = SimpleNamespace(log_probs=log_probs, label_mask=everywhere, entropy=everywhere, is_top1=everywhere)
    inputs = {"labels": torch.ones(1, TOKENS), "attention_mask": torch.ones(1, TOKENS)}
    theirs = SFTTrainer.compute_loss(stand_in, lambda **_: outputs, inputs, num_items_in_batch=torch.tensor(29))
    ours = supervised_loss(log_probs, 29, loss)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient(ours, log_probs), gradient(theirs, log_probs), rtol=1e-6, atol=1e-8)
