"""bench/gpu_kit.py: sets of kernels, a kit of one, a second run that goes on, and a set that fails."""

import tarfile
from functools import partial

import pytest
from without_gpu import BENCH, python, require

require("gpu_kit.py")
run = partial(python, BENCH / "gpu_kit.py")


@pytest.fixture
def kit(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import gpu_kit

    return gpu_kit


def test_sets(kit):
    names = [each.name for each in kit.sets()]
    assert len(set(names)) == len(names) == 12
    done = run("anywhere", "--list", "--only", "tables")
    assert done.returncode == 0 and done.stdout.split("\n")[:-1] == [f"tables {model} 32" for model in kit.MODELS]


def test_what_travels(kit, tmp_path, monkeypatch):
    """tests/test_precompile.py compiles."""
    asked = []

    def compile_kernels(kernels, cache, capability):
        asked.append((kernels.name, capability))
        (cache / f"{kernels.name}.cubin").write_text("a kernel")

    checkout = tmp_path / "checkout"
    (checkout / "thresholdnet").mkdir(parents=True)
    (checkout / "thresholdnet" / "_csrc.abi3.so").write_text("a library")
    monkeypatch.setattr(kit, "ROOT", checkout)
    monkeypatch.setattr(kit, "compile_kernels", compile_kernels)
    assert kit.main([str(tmp_path), "--only", "overlap", "--capability", "10.0"]) == 0
    assert asked == [("overlap thresholdnet_v1 224", "10.0"), ("overlap thresholdnet_v1 32", "10.0")]
    with tarfile.open(tmp_path / "kit.tar.xz") as archive:
        names = archive.getnames()
    kernels = [f"triton/{name}.cubin" for name, _ in asked]
    assert sorted(names) == ["thresholdnet/_csrc.abi3.so", "triton", "triton.key", *kernels]


def test_errors(kit, tmp_path, monkeypatch, capsys):
    assert kit.main([str(tmp_path), "--only", "vgg"]) == 2
    assert capsys.readouterr().err.startswith("error: only must name some of thresholdnet_v1 224, ")
    monkeypatch.setattr(kit, "sets", lambda: [kit.Kernels("odd", ("--model", "thresholdnet_v9"))])
    assert kit.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: odd: error: ") and "thresholdnet_v9" in said and said.count("\n") == 1
    assert not (tmp_path / "kit.tar.xz").exists()
