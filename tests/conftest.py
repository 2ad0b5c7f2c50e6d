"""Fixtures: small students, and the real data where it is present."""

from __future__ import annotations

import os

# One thread for each process: the suite runs in several, and two threads each on two cores wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from slmreason.student import EMBEDDED, Lora, Student

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests that are marked long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the long tests, where neither `--long` nor `-m` asks for them."""
    if config.option.long or "long" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="takes long; --long runs it"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Public datasets, beside the checkout or where SLMREASON_DATA says; tests that need them skip without."""
    folder = Path(os.environ.get("SLMREASON_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real datasets are not here")
    return folder


@pytest.fixture
def student() -> Student:
    """The embedded Qwen2 student, newly loaded."""
    return Student("embedded:qwen2", instruction="")


@pytest.fixture
def lora_student() -> Student:
    """The embedded Qwen2 student with adapters whose B matrices are not zero, so they change the output."""
    student = Student("embedded:qwen2", instruction="", lora=Lora(r=4, alpha=8))
    torch.manual_seed(1)
    for name, parameter in student.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return student


@pytest.fixture(scope="session")
def random_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a very small random Qwen2 and the embedded tokenizer: it loads like any checkpoint."""
    folder = tmp_path_factory.mktemp("random-qwen2")
    torch.manual_seed(0)
    tokenizer = Student("embedded:qwen2").tokenizer
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def embedded_copy(tmp_path: Path) -> Callable[[str], Path]:
    """Copies an embedded student's folder, to change its files."""
    import shutil

    def copy(name: str) -> Path:
        return Path(shutil.copytree(EMBEDDED / name, tmp_path / name))

    return copy
