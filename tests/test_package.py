"""What a stranger relies on: a light import, imports that run one way, a public API with docstrings."""

import ast
import os
import re
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
    "checks", "activations", "pixels", "places", "constants", "stamps", "packing", "replay", "links", "plan",
    "batchnorm", "reference", "kernels", "backends", "sync", "gradients", "engine", "downsampling", "transition",
    "transforms", "ops", "functional", "layers", "biases", "operands", "linked", "blocks", "chain", "graphs", "models",
    "dataflow", "recognise", "convert", "export", "timm", "weights", "counting", "tables", "diagrams", "memory", "data",
    "loaders", "checkpoint", "figures", "inference", "train", "info", "selftest", "bench", "cli", "__main__",
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
    """(path below the package, file) of every module but the package's own __init__."""
    for root in (PACKAGE, *tn.__path__[1:]):  # a checkout's kernels/ lies beside the package
        for file in sorted((root if root == PACKAGE else Path(root) / "kernels").rglob("*.py")):
            path = file.relative_to(root)
            if path != Path("__init__.py"):
                yield path, file


def _first(path):
    return path.parts[0].removesuffix(".py")


def _imports(path, file):
    """First parts below the package that a file imports, anywhere in it."""
    here = ["thresholdnet", *path.parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            start = [*here[: len(here) - node.level + 1], *module] if node.level else module
            names = [[*start, alias.name] for alias in node.names]
            yield from (name[1] for name in names if name[0] == "thresholdnet")


def test_imports_run_one_way():
    found = 0
    for path, file in _modules():
        part = _first(path)
        assert part in ORDER, f"{part} has no place in the order of imports"
        for other in _imports(path, file):
            if other in ORDER and other != part:
                assert ORDER.index(other) < ORDER.index(part), f"{path} imports {other}, which lies above it"
                found += 1
    assert found > 100


def test_the_map_of_modules_has_this_order():
    file = ROOT / "CONTRIBUTING.md"
    if not file.is_file():
        pytest.skip("run outside a checkout")
    cells = [line.split("|")[1] for line in file.read_text().splitlines() if line.startswith("| `")]
    names = [name.removeprefix("../").strip("/").removesuffix(".py") for name in re.findall(r"`(.+?)`", "".join(cells))]
    assert [name for name in names if name != "hubconf"] == [name for name in ORDER if name != "__main__"]


def test_public_functions_have_docstrings():
    for _, file in _modules():
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree), file
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file.name}: {node.name}"


def test_public_names_exist():
    assert all(hasattr(tn, name) for name in tn.__all__)
    assert tn.__version__.count(".") >= 1
