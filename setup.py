"""Build script; the metadata stands in pyproject.toml. The folder kernels/ is the package thresholdnet.kernels.

The C++ library in csrc/ is optional: without torch, without a compiler, or where the compiler fails, the package is
built without it, with a warning that says why. It uses torch's headers and stable ABI, never torch itself: a build
neither imports nor downloads torch, it finds the one that is installed beside the running Python, also from within
pip's isolated build environment.

Environment: THRESHOLDNET_SKIP_CUDA=1 leaves the CUDA library out; THRESHOLDNET_FORCE_CUDA=1 makes its failure an error;
TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX"; MAX_JOBS, compilers at once; CXX and CC, NVCC.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "8.0;9.0;10.0+PTX"
PYTHON_TAG = "cp310"  # the oldest Python; the libraries use no Python at all
WINDOWS = sys.platform == "win32"


def switch(name: str) -> bool:
    """Whether an environment variable is set to something but 0."""
    return os.environ.get(name, "0") not in ("", "0")


def torch_folder() -> Path | None:
    """The folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    # pip's isolation hides site-packages, but leaves the paths of the Python that runs
    places = [Path(p) for p in (*(spec.submodule_search_locations or ()),)] if spec else []
    places += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    places += [Path(p) / "torch" for p in (*site.getsitepackages(), site.getusersitepackages())]
    return next((p for p in places if (p / "include/torch/csrc/stable/library.h").is_file()), None)


def flags(kind: str) -> list[str]:
    """Every flag of one tool: "c++", "link", "nvcc"."""
    if kind == "c++":
        if WINDOWS:
            return ["/std:c++17", "/O2", "/EHsc"]
        return ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    if kind == "link":
        return (
            [] if WINDOWS else ["-Wl,--no-undefined"] if sys.platform == "linux" else ["-undefined", "dynamic_lookup"]
        )
    host = ["-Xcompiler", "/EHsc"] if WINDOWS else ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return ["-std=c++17", "-O3", "-lineinfo", *host, *architecture_flags()]


def architecture_flags() -> list[str]:
    """-gencode of every architecture in TORCH_CUDA_ARCH_LIST."""
    made = []
    for name in os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES).replace(",", ";").replace(" ", ";").split(";"):
        if not name:
            continue
        number = name.removesuffix("+PTX").replace(".", "")
        made.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            made.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return made


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] + ["/usr/local/cuda"]
    return (
        os.environ.get("NVCC")
        or shutil.which("nvcc")
        or shutil.which("nvcc", path=os.pathsep.join(f"{h}/bin" for h in homes))
    )


def extensions() -> list[Extension]:
    """The libraries that can be built here: `_csrc` for the CPU with all schemas, `_csrc_cuda` with CUDA's kernels."""
    torch = torch_folder()
    if torch is None:
        warn("torch is not installed beside this Python: install it, then run: pip install --no-deps .")
        return []
    made = [extension("_csrc", torch, ["csrc/ops.cpp", *sources("csrc/cpu/*.cpp")], ["torch_cpu"])]
    kernels = [*sources("csrc/*_binding.cpp"), *sources("csrc/cuda/*.cu")]
    compiler = None if switch("THRESHOLDNET_SKIP_CUDA") else nvcc()
    problem = None
    if not any(name.endswith(".cu") for name in kernels):
        problem = "this source tree has no CUDA kernels"
    elif compiler is None:
        problem = "nvcc was not found on the PATH, in NVCC, CUDA_HOME or /usr/local/cuda"
    elif not list((torch / "lib").glob("*torch_cuda.*")):
        problem = f"the torch in {torch.parent} was built without CUDA"
    if problem is None and compiler is not None:
        cuda = extension("_csrc_cuda", torch, kernels, ["torch_cuda", "torch_cpu", "cudart_static"])
        cuda.include_dirs.append(str(Path(compiler).resolve().parent.parent / "include"))
        cuda.library_dirs += [str(Path(compiler).resolve().parent.parent / folder) for folder in ("lib64", "lib/x64")]
        cuda.libraries += [] if WINDOWS else ["dl", "rt", "pthread"]
        cuda.optional = not switch("THRESHOLDNET_FORCE_CUDA")
        made.append(cuda)
    elif switch("THRESHOLDNET_FORCE_CUDA"):
        raise SystemExit(f"error: THRESHOLDNET_FORCE_CUDA is set, but {problem}")
    return made


def extension(name: str, torch: Path, files: list[str], libraries: list[str]) -> Extension:
    """A library on torch's stable ABI, inside the package."""
    shown = " ".join(flags("c++"))
    return Extension(
        f"thresholdnet.{name}",
        files,
        include_dirs=[str(torch / "include")],
        define_macros=[("THRESHOLDNET_FLAGS", shown)],
        library_dirs=[str(torch / "lib")],
        libraries=libraries,
        extra_compile_args=flags("c++"),
        extra_link_args=flags("link"),
        depends=["setup.py", *sources("csrc/**/*.h"), *sources("csrc/**/*.inl"), *sources("csrc/**/*.cuh")],
        py_limited_api=True,
        optional=True,
    )


def sources(pattern: str) -> list[str]:
    """Files below this folder, relative to it."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def warn(cause: str) -> None:
    """Say why the package comes without a library."""
    print(f"warning: thresholdnet is built without its C++ library: {cause}", file=sys.stderr)


class Build(build_ext):
    """Several compilers at once; nvcc for .cu files; libraries that export nothing to Python."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one library; a failure is one CompileError with its cause."""
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(Path(name).stat().st_mtime for name in [*ext.sources, *ext.depends])
        if target.is_file() and target.stat().st_mtime > newest and not self.force:
            return
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        try:
            with ThreadPoolExecutor(jobs) as pool:
                objects = list(pool.map(lambda source: self._object(ext, source), ext.sources))
            self.compiler.link_shared_object(
                objects, str(target), libraries=ext.libraries, library_dirs=ext.library_dirs,
                extra_postargs=ext.extra_link_args, build_temp=self.build_temp, target_lang="c++",
            )  # fmt: skip
        except Exception as error:
            if not ext.optional:
                raise
            warn(f"{ext.name}: {error}")
            raise CompileError(str(error)) from error

    def _object(self, ext: Extension, source: str) -> str:
        folder = Path(self.build_temp) / ext.name
        if not source.endswith(".cu"):
            return self.compiler.compile(
                [source], output_dir=str(folder), macros=ext.define_macros, include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args, depends=ext.depends,
            )[0]  # fmt: skip
        target = folder / source.replace(".cu", ".obj" if WINDOWS else ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc(), *flags("nvcc"), "-c", source, "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout + done.stderr, end="")
        if done.returncode:
            raise CompileError(f"nvcc failed on {source}: {(done.stderr or done.stdout).strip()[-500:]}")
        return str(target)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: torch.ops.load_library opens these libraries, Python never imports them."""
        return []


os.chdir(ROOT)
built = extensions()
setup(
    packages=[
        "thresholdnet", "thresholdnet.backends", "thresholdnet.kernels", "thresholdnet.models", "thresholdnet.train",
    ],
    package_dir={"thresholdnet.kernels": "kernels"},
    ext_modules=built,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}} if built else {},
)  # fmt: skip
