"""What a stranger relies on: a light import, imports that run one way, a public API with docstrings."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import thresholdnet as tn

PACKAGE = Path(tn.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "lightning",
    "torchvision",
    "sklearn",
    "matplotlib",
    "rich",
    "typer",
    "huggingface_hub",
    "PIL",
    "tensorboard",
    "timm",
    "onnx",
    "torch._dynamo",  # of torch the compiler, which takes as long as all the rest
}
# Imports go down this list, never up (CONTRIBUTING.md).
ORDER = [
    "checks", "constants", "ahead", "recording", "pooling", "together", "recorder", "overlap", "replay", "packing",
    "links", "plan", "batchnorm", "reference", "backends", "sync", "gradients", "engine", "transition",
    "transforms", "ops", "functional", "layers", "linked", "blocks", "chain", "graphs", "models", "recognise",
    "convert", "export", "timm", "weights", "counting", "memory", "tables", "diagrams", "data", "loaders",
    "checkpoint", "figures", "inference", "train", "info", "selftest", "bench", "cli", "__main__",
]  # fmt: skip


def test_import_loads_torch_and_numpy_alone():
    # the bench as well: the command's help lists its providers
    code = f"import sys, thresholdnet, thresholdnet.bench; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_checkout_needs_no_install():
    """As on a machine that gets the checkout alone, PYTHONPATH naming it: bench/gpu.sh runs so."""
    if not (ROOT / "kernels" / "launch.py").is_file():
        pytest.skip("run outside a checkout")
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)];"
        "import thresholdnet, thresholdnet.kernels.slots as slots; print(slots.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "slots.py"


def _modules():
    """(name of the first part below the package, file) of every module but the package's own __init__."""
    for file in sorted(PACKAGE.rglob("*.py")):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__" and "kernels" not in part:
            yield part, file


def _imports(file):
    """First parts below the package that a file imports, anywhere in it."""
    depth = len(file.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (name.split(".")[0] for name in names)


def test_imports_run_one_way():
    for part, file in _modules():
        assert part in ORDER, f"{part} has no place in the order of imports"
        for other in _imports(file):
            if other in ORDER and other != part:
                assert ORDER.index(other) < ORDER.index(part), f"{file.name} imports {other}, which lies above it"


def test_public_functions_have_docstrings():
    for part, file in _modules():
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree) or part == "__main__", file
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file.name}: {node.name}"


def test_public_names_exist():
    assert all(hasattr(tn, name) for name in tn.__all__)
    assert tn.__version__.count(".") >= 1
