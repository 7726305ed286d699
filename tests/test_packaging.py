"""The layout works in every way of using it: wheel, sdist, editable install, and the root without installation.

The code of spectralar.kernels, .training and .bench lives in top-level folders which spectralar/ links to. All builds
and installs happen on a copy of the tree with the tools that are installed, without a network.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("kernels", "training", "bench")

# One process installs and imports, or xdist would build everything once per worker.
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: object, cwd: Path, path: Path | None = None, ok: bool = True) -> str:
    """Run a command, return its output; `path` is put first on sys.path of a Python process."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, text=True, capture_output=True)
    assert not ok or done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def module_names(root: Path) -> list[str]:
    """Every module of the tree, by its dotted name."""
    names = []
    for folder, _, files in os.walk(root / "spectralar", followlinks=True):
        parts = Path(folder).relative_to(root).parts
        for file in files:
            if file.endswith(".py"):
                names.append(".".join(parts if file == "__init__.py" else (*parts, file[:-3])))
    return sorted(names)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, links kept as links."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("spectralar", *LINKS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="session")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the sdist's content."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree, cwd=tree)
    return folder


@pytest.fixture(scope="session")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `pip install .` makes it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ("-m", "pip", "wheel", "--quiet", "--no-index", "--no-build-isolation", "--no-deps", "-w", folder, tree)
    run(sys.executable, *command, cwd=tree)
    (path,) = folder.glob("*.whl")
    return path


def environment(folder: Path, *install: object) -> Path:
    """A virtual environment that sees the packages of this one, with one more installed; returns its Python.

    The packages are seen through a .pth file. Such files in *that* folder are not read, so an editable installation of
    spectralar in the running environment is not seen.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    (site(folder) / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *install, cwd=folder.parent)
    return python


def site(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))


@pytest.fixture(scope="session")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("from_wheel") / "venv", wheel)


@pytest.fixture(scope="session")
def editable(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("editable") / "venv", "--editable", tree)


IMPORT_ALL = """
    import importlib, importlib.util, sys
    for name in sys.argv[1:]:
        module = importlib.import_module(name)
        print(module.__file__)
    for name in ("kernels", "training", "bench"):
        spec = importlib.util.find_spec(name)
        print(name, spec and (spec.origin or list(spec.submodule_search_locations)), file=sys.stderr)
        assert spec is None or spec.origin, f"{name} is importable"
"""


def import_all(python: Path, names: list[str], cwd: Path) -> list[Path]:
    """Import every module in a fresh process, check that the folders' bare names are not importable; the files."""
    output = run(python, "-c", textwrap.dedent(IMPORT_ALL), *names, cwd=cwd)
    return [Path(line) for line in output.splitlines()]


def test_links_are_relative_and_kernels_is_no_package() -> None:
    for name in LINKS:
        assert os.readlink(ROOT / "spectralar" / name) == f"../{name}"
        assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_modules_are_short() -> None:
    for name in ("spectralar", *LINKS):
        for path in (ROOT / name).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) < 600, path


def test_constraints_pin_all_that_the_makefile_installs_but_triton() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["demo"], *extras["bench"], *extras["dev"]]
    names = {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in wanted}
    assert names - pins.keys() == {"triton"}
    assert not any("+" in version for version in pins.values())  # 2.13.0+cpu would shut out the CUDA builds


def test_wheel_holds_the_tree_and_nothing_else(tree: Path, wheel: Path, built: Path) -> None:
    (second,) = built.glob("*.whl")
    for path in (wheel, second):
        with zipfile.ZipFile(path) as archive:
            files = {name for name in archive.namelist() if ".dist-info/" not in name}
        modules = {name for name in files if name.endswith(".py")}
        assert sorted(file_to_module(name) for name in modules) == module_names(tree)
        assert "spectralar/py.typed" in files
        notes = {f"spectralar/{note.relative_to(tree)}" for note in tree.glob("kernels/*/README.md")}
        weights = {
            str(file.relative_to(tree))
            for file in tree.glob("spectralar/weights/emoji/**/*")
            if file.suffix in (".safetensors", ".json", ".md")
        }
        assert files - modules == {"spectralar/py.typed"} | notes | weights
        assert {name.split("/")[0] for name in files} == {"spectralar"}


def file_to_module(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_sdist_holds_files_and_no_links(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    assert any("/spectralar/kernels/" in member.name for member in members)


def test_wheel_imports(tree: Path, from_wheel: Path, tmp_path: Path) -> None:
    files = import_all(from_wheel, module_names(tree), tmp_path)
    assert files and all(file.is_relative_to(site(from_wheel.parent.parent)) for file in files)


def test_editable_install_imports(tree: Path, editable: Path, tmp_path: Path) -> None:
    files = import_all(editable, module_names(tree), tmp_path)
    assert files and all(file.is_relative_to(tree / "spectralar") for file in files)
    added = tree / "training" / "added_later.py"
    added.write_text("")
    try:  # a new file is seen without installing again
        assert import_all(editable, ["spectralar.training.added_later"], tmp_path) == [
            tree / "spectralar" / "training" / "added_later.py"
        ]
    finally:
        added.unlink()


def test_root_imports_without_installation(tree: Path, tmp_path: Path) -> None:
    # From the root, Python itself offers the bare folder `kernels` as a namespace; tests/test_imports.py sees to it
    # that nobody uses it, and the next test that it gives way to a real package of this name.
    code = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    output = run(sys.executable, "-c", code, *module_names(tree), cwd=tree, path=tree)
    files = [Path(line) for line in output.splitlines()]
    assert files and all(file.is_relative_to(tree / "spectralar") for file in files)


@pytest.mark.parametrize("layout", ["root", "wheel", "editable"])
def test_another_package_named_kernels_wins(
    layout: str, tree: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Hugging Face's `kernels`, which transformers imports, must win even with our root before it on sys.path."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("theirs = True\n")
    python = {"root": "", "wheel": "from_wheel", "editable": "editable"}[layout]
    code = f"""
        import sys
        sys.path.append({str(tmp_path / "site")!r})
        import kernels
        assert kernels.theirs
        import spectralar.kernels
        assert "theirs" not in vars(spectralar.kernels)
        assert sys.path.index({str(tree)!r}) < sys.path.index({str(tmp_path / "site")!r})
    """
    interpreter = request.getfixturevalue(python) if python else sys.executable
    run(interpreter, "-c", textwrap.dedent(code), cwd=tree, path=tree)


def a_public_function(root: Path) -> tuple[str, str]:
    """Some module of spectralar.kernels and a function with a type for its result in it."""
    for path in sorted((root / "kernels").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.returns and not node.decorator_list:
                return "spectralar." + file_to_module(str(path.relative_to(root))), node.name
    raise AssertionError("no typed function in kernels/")


@pytest.mark.parametrize("layout", ["root", "wheel"])
def test_type_errors_are_found_through_the_links(
    layout: str, tree: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A checker that can't resolve a package takes everything from it for `Any` and says nothing."""
    module, function = a_public_function(tree)
    lines = [f"import {module} as room", f"right = room.{function}", f"wrong: int = room.{function}", "room.missing"]
    (tmp_path / "planted.py").write_text("\n".join(lines) + "\n")
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if layout == "wheel":  # as a user has it: no configuration of ours, only the installed py.typed
        config = "[tool.mypy]\n"
    # What lies outside spectralar is left aside here, because reading all of PyTorch takes a minute.
    config += '\n[[tool.mypy.overrides]]\nmodule = ["torch.*", "numpy.*"]\nfollow_imports = "skip"\n'
    folder = tree if layout == "root" else tmp_path
    (folder / "mypy.toml").write_text(config)
    python = sys.executable if layout == "root" else request.getfixturevalue("from_wheel")
    options = ("--config-file", folder / "mypy.toml", "--python-executable", python, "--cache-dir", tmp_path / "cache")
    output = run(sys.executable, "-m", "mypy", *options, tmp_path / "planted.py", cwd=tmp_path, ok=False)
    planted = [line for line in output.splitlines() if "planted.py" in line and "error:" in line]
    assert len(planted) == 2, output
    assert "planted.py:3: error: Incompatible types in assignment" in planted[0]
    assert "planted.py:4: error: Module has no attribute" in planted[1]
