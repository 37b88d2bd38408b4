"""The house rules that a machine can hold: who may import whom, and what stays small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megavideo"

# Package -> packages that it may import besides itself and what all share.
ALLOWED = {
    "config": {"layout"},
    "layout": set(),
    "parallel": set(),
    "ops": {"layout"},
    "sampling": set(),
    "plan": {"config", "layout", "model", "parallel"},
    "benchmark": {
        "config",
        "layout",
        "ops",
        "parallel",
        "model",
        "data",
        "checkpoint",
        "engine",
        "train",
        "generate",
        "plan",
        "verify",
    },
    "model": {"config", "layout", "ops", "parallel"},
    "data": {"config", "layout"},
    "checkpoint": {"config", "model", "parallel"},
    "engine": {"config", "layout", "ops", "model", "parallel", "checkpoint", "data"},
    "train": {"config", "layout", "model", "data", "checkpoint", "engine"},
    "launch": {"cli"},
    "doctor": {"config", "ops", "model", "data", "engine"},
    "metrics": {"data"},
    "superres": {"config", "layout", "ops", "model", "sampling", "data", "checkpoint"},
    "analysis": {"config", "layout", "ops", "model", "data", "checkpoint", "engine"},
    "generate": {
        "config",
        "layout",
        "parallel",
        "model",
        "sampling",
        "data",
        "checkpoint",
        "engine",
        "superres",
    },
    "verify": {
        "config",
        "layout",
        "ops",
        "model",
        "sampling",
        "data",
        "checkpoint",
        "engine",
        "superres",
        "generate",
    },
    "report": {"config", "layout", "model", "data", "checkpoint", "engine", "train", "generate"},
    "data_tools": {"config", "layout", "sampling", "data"},
}
SHARED = {"log", "files", "figures", "options"}


def imports(path: Path) -> set[str]:
    """Every module that `path` imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def package_files() -> list[tuple[str, Path]]:
    inside = [(path.relative_to(PACKAGE).parts[0], path) for path in PACKAGE.glob("*/**/*.py")]
    return inside + [("data_tools", path) for path in (ROOT / "data_tools").glob("*.py")]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    files = [path for name, path in package_files() if name == package]
    assert files, f"{package} is empty; take it out of the table"
    for path in files:
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("megavideo.")}
        stray = ours - ALLOWED[package] - SHARED - {package}
        assert not stray, f"{path.relative_to(ROOT)} imports {sorted(stray)}"


def test_the_table_names_every_package() -> None:
    assert {name for name, _ in package_files()} == set(ALLOWED)


def test_only_the_engine_imports_deepspeed() -> None:
    for name, path in package_files():
        if any(module.split(".")[0] == "deepspeed" for module in imports(path)):
            assert name == "engine", path


def test_layout_and_configuration_import_no_torch() -> None:
    for name, path in package_files():
        if name in ("layout", "config"):
            assert not any(module.split(".")[0] == "torch" for module in imports(path)), path


def test_folders_of_files_are_no_python_packages() -> None:
    """PyPI has packages of these names; an __init__.py here would hide them."""
    for folder in ("kernels", "configs", "launch"):
        assert not (ROOT / folder / "__init__.py").exists()
