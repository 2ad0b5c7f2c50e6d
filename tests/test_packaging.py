"""What a wheel holds, and that imports point one way."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "slmreason").rglob("__init__.py")}
    assert found | {"slmreason.callbacks", "slmreason.configs"} == listed


@pytest.mark.slow
def test_the_wheel_ships_callbacks_recipes_prompts_and_students(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "slmreason/callbacks/harvest.py",
        "slmreason/configs/quickstart.yaml",
        "slmreason/configs/gsm8k-qwen2.5-0.5b.yaml",
        "slmreason/supervision/prompts/diagnosis.jinja",
        "slmreason/teacher/prompts/ask_solve.jinja",
        "slmreason/export/model_card.md.jinja",
        "slmreason/embedded/students/qwen2/model.safetensors",
        "slmreason/embedded/students/llama/tokenizer.json",
        "slmreason/py.typed",
    ):
        assert needed in names, needed
    assert not any(name.startswith(("tests/", "callbacks/", "configs/")) for name in names)
    assert wheel.stat().st_size < 10_000_000


def test_callbacks_have_one_import_name() -> None:
    import slmreason.callbacks as full

    assert full.HarvestAllZeroGroups.__module__ == "slmreason.callbacks.harvest"


def test_no_module_imports_vllm_or_openai_on_the_start_up_path() -> None:
    # (torchmetrics imports matplotlib wherever it is installed; our pictures come when something is drawn.)
    late = {"vllm", "openai", "slmreason.report.pictures"}
    code = f"import sys, slmreason.cli.compare, slmreason.cli.fit; sys.exit(bool({late} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
