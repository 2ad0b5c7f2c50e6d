"""Makes the embedded students again: `python -m slmreason.embedded.pretrain qwen2 llama`.

A byte-level BPE tokenizer and a small transformer are trained from nothing on the five families, just far enough that
the student stands where a real base model does: easy problems mastered, some solved now and then, long ones not at all.
The same library versions on the same kind of processor give the same files, byte for byte (one thread is used).
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from slmreason.embedded.families import make_problem, rebuild, write_solution
from slmreason.objectives import cross_entropy
from slmreason.records import Example
from slmreason.student import EMBEDDED, Student
from slmreason.student.packing import collate, plan_batches

VOCAB_SIZE = 640
WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The word pattern of Qwen2 (digits apart): transformers puts it back whenever it loads a tokenizer for that model."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MIXTURE: dict[tuple[str, int], int] = {
    ("chain", 1): 12,
    ("chain", 2): 12,
    ("chain", 3): 8,
    ("chain", 4): 4,
    ("chain", 5): 1,
    ("one_step", 1): 6,
    ("one_step", 2): 8,
    ("distractor", 1): 8,
    ("distractor", 2): 4,
    ("expression", 1): 12,
    ("expression", 2): 12,
    ("expression", 3): 1,
    ("logic", 1): 12,
    ("logic", 2): 6,
}
"""How often each family and difficulty stands in the pretraining corpus; what is missing is left to post-training."""

VOCABULARY_TEXTS = (
    "system user assistant Question Attempt A student wrote Find the first wrong step and say why it is wrong. "
    "Step is wrong: should be not The operation does not fit the story. Correct steps so far Continue from here. "
    "The attempt stops too early. There are missing steps. The verdict is wrong. right Let us think about it. "
)


@dataclass(frozen=True)
class Recipe:
    """One embedded student: its architecture and how long it is trained."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    template: str
    turn_end: str
    special: tuple[str, ...]
    steps: int
    learning_rate: float
    seed: int


RECIPES = {
    "qwen2": Recipe(
        "qwen2", 128, 352, 4, 4, 2, CHATML, "<|im_end|>",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), 800, 2e-3, 1,
    ),
    "llama": Recipe(
        "llama", 128, 384, 4, 4, 4, HEADERS, "<|eot_id|>",
        ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        800, 2e-3, 2,
    ),
}  # fmt: skip


def corpus(seed: int) -> Iterator[tuple[str, str, str]]:
    """(problem id, question, solution), without end, drawn from MIXTURE."""
    rng = random.Random(f"corpus/{seed}")
    kinds, weights = list(MIXTURE), list(MIXTURE.values())
    while True:
        family, difficulty = rng.choices(kinds, weights)[0]
        problem = make_problem(family, "pretrain", difficulty, rng.randrange(100_000_000))
        steps = [step.text for step in rebuild(problem.id).steps]
        yield problem.id, problem.question, write_solution(steps, problem.answer)


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the corpus, digits apart, so any text at all can be encoded."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(recipe.special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stream = corpus(recipe.seed)
    texts = [text for _ in range(4000) for text in next(stream)[1:]] + [VOCABULARY_TEXTS] * 400
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=recipe.turn_end,
        pad_token=recipe.special[0],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = recipe.template
    return tokenizer


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(recipe.seed)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.key_value_heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "initializer_range": 0.04,
    }
    if recipe.architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape))
    return LlamaForCausalLM(LlamaConfig(**shape))


def pretrain(student: Student, recipe: Recipe, steps: int, sequences: int = 96, log_every: int = 100) -> None:
    """Trains on the corpus with AdamW, warm-up, and a cosine decay to a tenth of the peak learning rate."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    stream, started = corpus(recipe.seed), time.perf_counter()
    for step in range(steps):
        progress = step / steps
        factor = min(1.0, (step + 1) / 100) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * factor
        examples = [
            Example(student.encode_question(question), student.encode_target(solution), identifier, "teacher")
            for identifier, question, solution in (next(stream) for _ in range(sequences))
        ]
        total = sum(len(example.target_ids) for example in examples)
        for members in plan_batches([len(example) for example in examples], token_budget=16_384):
            batch = collate([examples[i] for i in members], student.pad_token_id, total)
            loss = cross_entropy(student.score(batch).log_probs, total)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if log_every and (step + 1) % log_every == 0:
            print(f"step {step + 1}/{steps} loss {loss.item():.4f} {time.perf_counter() - started:.0f} s", flush=True)


def make_student(name: str, folder: Path, steps: int | None = None, log_every: int = 100) -> str:
    """Trains one embedded student and writes it to `folder`.

    Returns:
        The sha256 of its weights file.
    """
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums are then taken in one order, however many cores there are
    recipe = RECIPES[name]
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, max_new_tokens=128
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    student = Student(str(folder), instruction="")
    pretrain(student, recipe, steps or recipe.steps, log_every=log_every)
    student.save(folder)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="where a folder for each student is written")
    parser.add_argument("--steps", type=int, default=None, help="fewer steps, to try things out")
    args = parser.parse_args()
    for name in args.students:
        digest = make_student(name, args.out / name, args.steps)
        print(f"{name}: model.safetensors sha256 {digest}")


if __name__ == "__main__":
    main()
