"""Who may import whom: bench -> training -> spectralar -> kernels -> torch/triton, and nothing undeclared.

Everything is read from the sources with `ast`, so imports inside functions count as well, and no module is run.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "spectralar", "training", "bench")  # each may import itself and those before it

# Imports whose package can't be looked up where it is not installed, or that are spelt unlike it.
DISTRIBUTIONS = {"flash_attn": "flash-attn-4", "nvidia": "nvidia-dali-cuda130"}
# FlashAttention 3 is on no package index: it is built from source by those who want it.
FROM_SOURCE = {"flash_attn_interface"}


class Import(NamedTuple):
    """One imported name: `name` is the full dotted path, `optional` if it is inside a function or a `try`."""

    name: str
    line: int
    optional: bool


def modules() -> dict[str, Path]:
    """Dotted name -> file for every module, each seen once (the links inside spectralar/ are not followed)."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if path.name == "__init__.py":
                parts.pop()
            if room != "spectralar":
                parts.insert(0, "spectralar")
            elif len(parts) > 1 and parts[1] in ROOMS:
                continue  # the same files again, should rglob enter links
            found[".".join(parts)] = path
    return found


MODULES = modules()


def room_of(name: str) -> str:
    """The room that the dotted name `spectralar...` belongs to."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "spectralar"


def imports(source: str, module: str, *, package: bool) -> Iterator[Import]:
    """All imports of a module's source, relative ones made absolute."""

    def visit(node: ast.AST, optional: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, optional) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if package else -1]
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, *filter(None, [base])])
            yield from (Import(f"{base}.{alias.name}", node.lineno, optional) for alias in node.names)
        inside = optional or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def imports_of(module: str) -> list[Import]:
    path = MODULES[module]
    return list(imports(path.read_text(encoding="utf-8"), module, package=path.name == "__init__.py"))


def wrong_direction(module: str, found: list[Import]) -> list[str]:
    """Imports of a room that comes after the module's own."""
    rank = ROOMS.index(room_of(module))
    return [
        f"line {item.line}: {module} imports {item.name}"
        for item in found
        if item.name.split(".")[0] == "spectralar" and ROOMS.index(room_of(item.name)) > rank
    ]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, set[str]]:
    """Names of the distributions in pyproject.toml: under "core" and under each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {
        group: {normalised(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements}
        for group, requirements in groups.items()
    }


def undeclared(module: str, found: list[Import]) -> list[str]:
    """Third-party imports that pyproject.toml does not declare; optional ones may be in any extra."""
    groups = declared()
    required = groups["core"]
    if room_of(module) == "bench":
        required = required | groups["bench"]  # the suites are pytest files: they run with this extra or not at all
    installed = importlib.metadata.packages_distributions()
    wrong = []
    for item in found:
        top = item.name.split(".")[0]
        if top == "spectralar" or top in sys.stdlib_module_names or (item.optional and top in FROM_SOURCE):
            continue
        names = {DISTRIBUTIONS[top]} if top in DISTRIBUTIONS else {normalised(n) for n in installed.get(top, [top])}
        allowed = set().union(*groups.values()) if item.optional else required
        if not names & allowed:
            wrong.append(
                f"line {item.line}: {module} imports {item.name} ({'optional' if item.optional else 'always'})"
            )
    return wrong


def test_the_tree_is_seen() -> None:
    seen = {room_of(name) for name in MODULES}
    present = {room for room in ROOMS if any((ROOT / room).rglob("*.py"))}
    assert seen == present >= {"kernels", "spectralar"}
    assert len(set(map(Path.resolve, MODULES.values()))) == len(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_dependence_goes_one_way(module: str) -> None:
    assert not wrong_direction(module, imports_of(module))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_third_party_imports_are_declared(module: str) -> None:
    # Catches bare `kernels`, `training` and `bench` as well: those are not packages of ours.
    assert not undeclared(module, imports_of(module))


@pytest.mark.parametrize(
    ("module", "source", "ok"),
    [
        ("spectralar.kernels.dct", "from spectralar.kernels.vq import lookup", True),
        ("spectralar.kernels.dct", "from ..vq import lookup", False),  # from a module, `..` is spectralar
        ("spectralar.kernels.dct.kernel", "from ..vq import lookup", True),
        ("spectralar.kernels.dct", "import spectralar", False),
        ("spectralar.kernels.dct", "from spectralar import kernels", True),
        ("spectralar.kernels.dct", "def f():\n    from spectralar.config import Mask", False),
        ("spectralar.cli", "from spectralar import training", False),
        ("spectralar.cli", "import spectralar.bench.report", False),
        ("spectralar.cli", "from .kernels.dct import dct2", True),
        ("spectralar.training.loop", "from spectralar.config import Mask", True),
        ("spectralar.training.loop", "try:\n    from spectralar import bench\nexcept ImportError:\n    pass", False),
        ("spectralar.bench.report", "import spectralar.training.loop, spectralar.kernels.dct", True),
    ],
)
def test_direction_is_judged_rightly(module: str, source: str, ok: bool) -> None:
    assert (not wrong_direction(module, list(imports(source, module, package=False)))) == ok


@pytest.mark.parametrize(
    ("module", "source", "ok"),
    [
        ("spectralar.cli", "import os, torch.nn, numpy as np, yaml\nfrom PIL import Image", True),
        ("spectralar.cli", "import matplotlib", False),
        ("spectralar.cli", "def f():\n    import matplotlib.pyplot", True),
        ("spectralar.cli", "try:\n    import flash_attn\nexcept Exception:\n    flash_attn = None", True),
        ("spectralar.cli", "def f():\n    import flash_attn_interface", True),
        ("spectralar.cli", "def f():\n    import no_such_package", False),
        ("spectralar.cli", "import pytest", False),
        ("spectralar.bench.suite", "import pytest", True),
        ("spectralar.training.loop", "import kernels.dct", False),
        ("spectralar.bench.suite", "def f():\n    from training.data import Batch", False),
    ],
)
def test_declaration_is_judged_rightly(module: str, source: str, ok: bool) -> None:
    assert (not undeclared(module, list(imports(source, module, package=False)))) == ok
