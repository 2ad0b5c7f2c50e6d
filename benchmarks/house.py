"""How the code is laid out, in figures: sizes of files and functions, methods of classes, arguments of constructors.

    python -m benchmarks.house                 # of this checkout
    python -m benchmarks.house OTHER_CHECKOUT  # of another, to compare

Lines are those of code and docstrings, without blank ones. A constructor's arguments are those of `__init__`; fields
of a dataclass are settings or parts, and are not counted.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSION = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def sources(root: Path) -> list[Path]:
    """The package's Python files."""
    found = [*(root / "slmreason").rglob("*.py"), *(root / "callbacks").glob("*.py")]
    return sorted({path.resolve() for path in found})


def lines_of(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


def length(node: FUNCTION) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def share(values: list[int], part: float) -> int:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0


def methods(node: ast.ClassDef) -> list[FUNCTION]:
    return [child for child in node.body if isinstance(child, FUNCTION)]


def arguments(node: ast.ClassDef) -> int:
    """Of the constructor, without `self`."""
    made = next((method for method in methods(node) if method.name == "__init__"), None)
    if made is None:
        return 0
    return len(made.args.args) + len(made.args.kwonlyargs) - 1


def nodes(trees: dict[Path, ast.Module]) -> Iterator[tuple[Path, ast.AST]]:
    for path, tree in trees.items():
        for node in ast.walk(tree):
            yield path, node


def figures(root: Path) -> dict[str, str]:
    """What is printed, by name."""
    paths = sources(root)
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    files = [lines_of(text) for text in texts.values()]
    functions = [length(node) for _, node in nodes(trees) if isinstance(node, FUNCTION)]
    classes = [node for _, node in nodes(trees) if isinstance(node, ast.ClassDef)]
    code = sum(files)
    comprehensions = sum(isinstance(node, COMPREHENSION) for _, node in nodes(trees))
    conditional = sum(isinstance(node, ast.IfExp) for _, node in nodes(trees))
    crowded = [f"{node.name} {len(methods(node))}" for node in classes if len(methods(node)) > 15]
    wide = [f"{node.name} {arguments(node)}" for node in classes if arguments(node) > 8]
    at_root = [path.name for path in paths if path.parent == (root / "slmreason").resolve()]
    return {
        "files": f"{len(files)}, {code:,} lines; p50 {share(files, 0.5)}, p90 {share(files, 0.9)}, most {max(files)}",
        "functions": f"p50 {share(functions, 0.5)}, p90 {share(functions, 0.9)}, most {max(functions)} lines",
        "comprehensions per 100 lines": f"{100 * comprehensions / code:.1f}",
        "conditional expressions per 100 lines": f"{100 * conditional / code:.1f}",
        "classes over 15 methods": ", ".join(crowded) or "none",
        "constructors over 8 arguments": ", ".join(wide) or "none",
        "files at the root": f"{len(at_root)}: {', '.join(at_root)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).parents[1])
    for name, value in figures(parser.parse_args().root).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
