"""The device itself: its peaks, the attention kernel that PyTorch takes, and what cuDNN's costs at new shapes."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

from benchmarks.gpu_sections.lab import Lab, Outcome, worst

NEAR = 0.75
"""Share of the usual rates that a sound device reaches."""
USUAL_PRODUCTS, USUAL_COPY = 790e12, 3e12
"""Operations and bytes a second of an H100 (SXM) in one large product and one large copy."""


def environment(lab: Lab) -> Outcome:
    source = torch.ones(lab.sizes.copied, dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    copy_rate = 2 * lab.sizes.copied / lab.seconds(lambda: target.copy_(source))
    product_rate = lab.product_rate
    figures: dict[str, Any] = {
        "product_tflops": product_rate / 1e12,
        "copy_gb_per_s": copy_rate / 1e9,
        "attention_kernels": chosen_kernels(lab),
    }
    passed = None
    if lab.peak_flops is not None:
        passed = product_rate > NEAR * USUAL_PRODUCTS and copy_rate > NEAR * USUAL_COPY
    return Outcome(f"{product_rate / 1e12:.3g} TFLOP/s, {copy_rate / 1e9:.3g} GB/s", passed, figures)


def device_facts(lab: Lab) -> dict[str, Any]:
    """What the device and its libraries say of themselves."""
    if not lab.cuda:
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(lab.device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": properties.total_memory / 2**30,
        "free_gib": torch.cuda.mem_get_info()[0] / 2**30,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
    }


def chosen_kernels(lab: Lab) -> dict[str, dict[str, str]]:
    """Which kernel sdpa takes for packed rows and for a decoding step, with cuDNN's allowed and not."""
    packed = attention_inputs(lab, lab.sizes.length)
    step = decoding_inputs(lab, 200)
    kept = torch.backends.cuda.cudnn_sdp_enabled()
    found: dict[str, dict[str, str]] = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(allowed)
            names = {"packed": _chosen(*packed), "decoding": _chosen(*step)}
            found[f"cudnn {'on' if allowed else 'off'}"] = names
    finally:
        torch.backends.cuda.enable_cudnn_sdp(kept)
    return found


def _chosen(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
    choose: Any = getattr(torch, "_fused_sdp_choice", None)  # private: nothing else says it without a profiler
    if choose is None:
        return "not known"
    number = choose(query, key, value, attn_mask=mask)
    return str(next((name for name, kind in SDPBackend.__members__.items() if kind.value == number), number))


def attention_inputs(lab: Lab, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value [rows, heads, length, 64] that want a gradient, and a mask of two sequences a row."""
    shape = (lab.sizes.rows, lab.sizes.heads, length, 64)
    query, key, value = (lab.drawn(*shape).requires_grad_() for _ in range(3))
    which = torch.arange(length, device=lab.device) < length // 2
    mask = (which[:, None] == which[None, :]).tril()
    return query, key, value, mask.expand(lab.sizes.rows, 1, length, length)


def decoding_inputs(lab: Lab, length: int) -> tuple[Tensor, Tensor, Tensor, None]:
    """A decoding step's: the queries that share keys stand where a sequence's would."""
    rows = 256 if lab.cuda else 4
    key, value = (lab.drawn(rows, 2, length, 64) for _ in range(2))
    return lab.drawn(rows, 2, 7, 64), key, value, None


def cudnn(lab: Lab) -> Outcome:
    """New shapes with cuDNN's kernels forbidden and allowed: a first call each, then a second."""
    kept = torch.backends.cuda.cudnn_sdp_enabled()
    figures: dict[str, Any] = {}
    results: dict[bool, list[Tensor]] = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(allowed)
            trained, results[allowed] = _training_calls(lab)
            figures["on" if allowed else "off"] = {**trained, **_decoding_calls(lab)}
    finally:
        torch.backends.cuda.enable_cudnn_sdp(kept)
    apart = [worst(a, b) for a, b in zip(results[False], results[True], strict=True)]
    figures["largest_difference_on_off"] = max(apart)
    off, on = figures["off"], figures["on"]
    cheap = off["training_new_ms"] < 5 * off["training_again_ms"] + 5
    figure = f"new shape: off {off['training_new_ms']:.3g} ms, on {on['training_new_ms']:.3g} ms"
    passed = off["finite"] and cheap if lab.cuda else off["finite"]
    return Outcome(figure, passed, figures)


def _training_calls(lab: Lab) -> tuple[dict[str, Any], list[Tensor]]:
    """(milliseconds of a masked forward and backward pass at six lengths, their outputs)"""
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    new, again, outputs, finite = [], [], [], True
    for index in range(-1, 6):  # the first is a warm-up
        query, key, value, mask = attention_inputs(lab, lab.sizes.length + 37 * (index + 1))
        slope = lab.drawn(*query.shape)
        found: list[Tensor] = []

        def both(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: Tensor, kept: list[Tensor]) -> None:
            output = functional.scaled_dot_product_attention(q, k, v, m)
            output.backward(s)
            kept[:] = [output.detach()]

        inputs = (query, key, value, mask, slope, found)
        first, second = (lab.once(lambda inputs=inputs: both(*inputs)) for _ in range(2))  # type: ignore[misc]
        finite &= all(bool(t.grad.isfinite().all()) for t in (query, key, value) if t.grad is not None)
        if index >= 0:
            new.append(first * 1e3)
            again.append(second * 1e3)
            outputs.append(found[0].float().cpu())
    torch.random.set_rng_state(generator)
    medians = {"training_new_ms": statistics.median(new), "training_again_ms": statistics.median(again)}
    return {**medians, "training_new_each_ms": new, "finite": finite}, outputs


def _decoding_calls(lab: Lab) -> dict[str, float]:
    """Milliseconds of 16 decoding steps whose cache grows by a token, for the first time and again."""
    inputs = [decoding_inputs(lab, length) for length in range(200, 216)]
    functional.scaled_dot_product_attention(*decoding_inputs(lab, 190))

    def steps() -> None:
        for query, key, value, mask in inputs:
            functional.scaled_dot_product_attention(query, key, value, mask)

    first, second = (lab.once(steps) * 1e3 for _ in range(2))
    return {"decoding_16_new_ms": first, "decoding_16_again_ms": second}
