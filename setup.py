"""Build script; the metadata stands in pyproject.toml. The folder kernels/ is the package thresholdnet.kernels.

The two libraries of csrc/ are optional: `_csrc` for the CPU, with every operator's schema, and `_csrc_cuda` with CUDA's
kernels. What is missing for one of them (torch, ninja, a compiler) or fails leaves a working package without it: a
warning names the cause, and so does a line in the package, `_csrc.missing`, for `thresholdnet info`. They use torch's
headers and stable ABI, never torch itself: a build neither imports nor downloads torch, it finds the one that is
installed beside the running Python, also from within pip's isolated build environment. Objects stay in build/csrc,
where ninja makes again what changed: a source, a header, or a command.

Environment: THRESHOLDNET_SKIP_CUDA=1 leaves the CUDA library out; THRESHOLDNET_FORCE_CUDA=1 makes its failure an error;
TORCH_CUDA_ARCH_LIST, such as "8.0;9.0a;10.0+PTX"; MAX_JOBS, compilers at once; CXX, NVCC and CUDA_HOME name compilers;
CXXFLAGS and LDFLAGS are added to the C++ compiler's and the linker's flags.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = Path("build/csrc")  # below ROOT, and not pip's temporary folder: the next build takes up from here
ARCHITECTURES = "8.0;9.0;10.0"  # those of them that nvcc knows, the last of those as PTX too
OLDEST_ARCHITECTURE = 80  # bf16 on tensor cores, asynchronous copies
WINDOWS = sys.platform == "win32"


class Missing(Exception):
    """Why a library cannot be built here, in one sentence."""


def switch(name: str) -> bool:
    """Whether an environment variable is set to something but 0."""
    return os.environ.get(name, "0") not in ("", "0")


def torch_folder() -> Path:
    """The folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    # pip's isolation hides site-packages, but leaves the paths of the Python that runs
    places = [Path(p) for p in (*(spec.submodule_search_locations or ()),)] if spec else []
    places += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    places += [Path(p) / "torch" for p in (*site.getsitepackages(), site.getusersitepackages())]
    for place in places:
        if (place / "include/torch/csrc/stable/library.h").is_file():
            return place
    raise Missing("torch 2.11 or newer is not installed beside this Python: install it, then thresholdnet again")


def torch_version(torch: Path) -> str:
    """Such as "2.14.1+cu130"."""
    found = re.search(r"__version__ = '(.+)'", (torch / "version.py").read_text())
    return found[1] if found else "of unknown version"


def ninja() -> str:
    """The program that runs the compilers."""
    found = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if found is None:
        raise Missing("ninja was not found: pip install ninja")
    return found


def cxx() -> list[str]:
    """The C++ compiler's command."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["cl"]] if WINDOWS else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    if named:
        raise Missing(f"the C++ compiler {named[0]!r}, named in CXX, was not found")
    wanted = "cl, from an x64 Native Tools prompt" if WINDOWS else "g++ or clang++"
    raise Missing(f"no C++ compiler was found: install {wanted}, or name one in CXX")


def nvcc() -> str:
    """The CUDA compiler."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    paths = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = shutil.which(os.environ.get("NVCC") or "nvcc", path=os.pathsep.join(paths))
    if found is None:
        raise Missing("nvcc was not found in NVCC, CUDA_HOME, the PATH or /usr/local/cuda")
    return found


def architectures(compiler: str) -> list[str]:
    """Compute capabilities to compile for, such as "9.0", "9.0a" or "10.0+PTX"."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";").split(";")
    wished = [name for name in listed if name]
    for name in wished:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise Missing(f"TORCH_CUDA_ARCH_LIST must hold capabilities such as 8.0;9.0a;10.0+PTX, got {name!r}")
    if not wished:
        known = output([compiler, "--list-gpu-code"]).split()
        wished = [name for name in ARCHITECTURES.split(";") if f"sm_{number(name)}" in known]
        if wished:
            wished[-1] += "+PTX"  # newer GPUs compile that
    new = [name for name in wished if int(number(name).rstrip("af")) >= OLDEST_ARCHITECTURE]
    if not new:
        raise Missing(f"the CUDA kernels need capability 8.0 or newer, got {';'.join(wished) or 'none from nvcc'}")
    return new


def number(architecture: str) -> str:
    """ "9.0a+PTX" -> "90a"."""
    return architecture.removesuffix("+PTX").replace(".", "")


def output(command: list[str]) -> str:
    """What a tool prints, stderr included."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise Missing(f"{command[0]} cannot be run: {error.strerror}") from error
    return done.stdout


def cxx_flags() -> list[str]:
    """Flags of the C++ compiler, the same for every file; loops for newer instructions carry pragmas of their own."""
    if WINDOWS:
        made = ["/nologo", "/std:c++17", "/O2", "/EHsc", "/MD"]
    else:
        made = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    return made + shlex.split(os.environ.get("CXXFLAGS", ""))


def nvcc_flags(names: list[str]) -> list[str]:
    """Flags of nvcc for these architectures. No fast-math: NaN, infinities and denormals stay as in torch."""
    made = ["-std=c++17", "-O3", "-lineinfo"]
    made += ["-Xcompiler", "/EHsc,/MD"] if WINDOWS else ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for name in names:
        made.append(f"-gencode=arch=compute_{number(name)},code=sm_{number(name)}")
        if name.endswith("+PTX"):
            made.append(f"-gencode=arch=compute_{number(name)},code=compute_{number(name)}")
    return made


def link_flags(folders: list[str], libraries: list[str]) -> list[str]:
    """Flags of the linker."""
    if WINDOWS:
        return ["/nologo", "/DLL", *(f"/LIBPATH:{folder}" for folder in folders), *(f"{lib}.lib" for lib in libraries)]
    # symbols that torch exports from some release on are weak references: a library must be named all the same
    form = (
        ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,--no-undefined"]
    )
    form += [] if sys.platform == "darwin" else ["-Wl,--no-as-needed"]
    added = shlex.split(os.environ.get("LDFLAGS", ""))
    return [*form, *(f"-L{folder}" for folder in folders), *(f"-l{library}" for library in libraries), *added]


class Library(Extension):
    """A library on torch's stable ABI inside the package; it exports nothing to Python, torch.ops opens it."""

    def __init__(self, name: str, sources: list[str]):
        super().__init__(f"thresholdnet.{name}", sources, py_limited_api=True)
        self.short = name
        self.cuda = name == "_csrc_cuda"

    def make(self) -> Path:
        """Compile and link what changed; the library's file, below build/csrc.

        Raises:
            Missing: with the cause.
        """
        folder = OBJECTS / self.short
        folder.mkdir(parents=True, exist_ok=True)
        rules, record = self._rules(folder)
        write(folder / "build_record.inc", "".join(json.dumps(line + "\n") + "\n" for line in record))
        made = folder / f"{self.short}.library"
        objects = []
        for source in self.sources:
            objects.append(f"{(folder / source).as_posix()}.o")
            rules.append(f"build {objects[-1]}: {'nvcc' if source.endswith('.cu') else 'cxx'} {source}")
        rules.append(f"build {made.as_posix()}: link {' '.join(objects)}")
        rules.insert(0, f"builddir = {folder.as_posix()}")  # ninja's own records beside the objects
        write(folder / "build.ninja", "\n".join(rules) + "\n")
        jobs = os.environ.get("MAX_JOBS", "")
        if jobs and not (jobs.isdecimal() and int(jobs)):
            raise Missing(f"MAX_JOBS must be a positive integer, got {jobs!r}")
        command = [ninja(), "-f", str(folder / "build.ninja"), *(["-j", jobs] if jobs else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, end="")
        if done.returncode:
            raise Missing(cause_in(done.stdout))
        return made

    def _rules(self, folder: Path) -> tuple[list[str], list[str]]:
        """Ninja's rules, and the lines of the record that stays in the library."""
        if self.cuda and switch("THRESHOLDNET_SKIP_CUDA"):
            raise Missing("THRESHOLDNET_SKIP_CUDA was set when thresholdnet was installed")
        torch = torch_folder()
        includes, folders, libraries = [str(torch / "include")], [str(torch / "lib")], ["torch_cpu"]
        compiler = cxx()
        version = "" if WINDOWS else output([*compiler, "--version"]).partition("\n")[0]
        record = ["thresholdnet build record", f"torch {torch_version(torch)}", f"compiler {version or compiler[0]}"]
        record.append(f"flags {shlex.join(cxx_flags())}")
        rules = []
        if self.cuda:
            if not any(source.endswith(".cu") for source in self.sources):
                raise Missing("this source tree has no CUDA kernels")
            if not list((torch / "lib").glob("*torch_cuda.*")):
                raise Missing(f"torch {torch_version(torch)} was built without CUDA")
            cuda = nvcc()
            names = architectures(cuda)
            release = re.search(r"V([\d.]+)", output([cuda, "--version"]))
            record += [f"nvcc {release[1] if release else cuda}", f"architectures {';'.join(names)}"]
            record.append(f"nvcc_flags {shlex.join(nvcc_flags(names))}")
            toolkit = output([cuda, "--dryrun", "-c", "nothing.cu"])  # nvcc may be a script that calls another one
            includes += dict.fromkeys(re.findall(r'"-I(.+?)"', toolkit))
            folders += dict.fromkeys(re.findall(r'"-L(.+?)"', toolkit))
            # libtorch.so brings torch_cuda where there is one; without it the library still loads
            libraries += ["torch_cuda" if WINDOWS else "torch", "cudart_static"]
            libraries += [] if WINDOWS else ["dl", "rt", "pthread"]
            host = ["-ccbin", compiler[0]] if len(compiler) == 1 and os.environ.get("CXX") else []
            rules += rule("nvcc", [cuda, *host, *nvcc_flags(names)])
        searched = [f"/I{path}" if WINDOWS else f"-isystem{path}" for path in includes]
        rules += rule("cxx", [*compiler, *cxx_flags(), f"-I{folder}", *searched])
        rules += rule("link", ["link"] if WINDOWS else compiler, link_flags(folders, libraries))
        return rules, record


def rule(name: str, command: list[str], behind: list[str] | None = None) -> list[str]:
    """A rule of ninja's; compilers tell it the headers that they read."""
    text, last = quoted(command), quoted(behind or [])
    if name == "link":
        return [f"rule {name}", f"  command = {text} $in {'/OUT:' if WINDOWS else '-o '}$out {last}"]
    if name == "cxx" and WINDOWS:
        return [f"rule {name}", f"  command = {text} /showIncludes /c $in /Fo$out", "  deps = msvc"]
    dependencies = ["  depfile = $out.d", "  deps = gcc"]
    return [f"rule {name}", f"  command = {text} -MD -MF $out.d -c $in -o $out", *dependencies]


def quoted(command: list[str]) -> str:
    """A command line for ninja's shell."""
    text = subprocess.list2cmdline(command) if WINDOWS else shlex.join(command)
    return text.replace("$", "$$")


def write(file: Path, text: str) -> None:
    """Write a file whose time stamp stays where nothing changes."""
    if not file.is_file() or file.read_text() != text:
        file.write_text(text)


def cause_in(log: str) -> str:
    """The line of a failed build that says why; where a compiler said nothing, which one failed on what."""
    lines = log.splitlines()
    for line in lines:
        if re.search(r"\berror\b[: ]|undefined reference|not found|cannot find", line, re.IGNORECASE):
            return line.strip()[:500]
    for line, command in itertools.pairwise(lines):
        if line.startswith("FAILED"):
            return f"{command.partition(' ')[0]} failed on {line.split()[-1]} and said nothing"
    return f"ninja failed: {log.strip()[:500]}"


class Build(build_ext):
    """Libraries by ninja. One that is not made leaves its reason; where none is made the wheel is pure Python's."""

    def run(self) -> None:
        """Build into the package's folder; with --inplace (pip install --editable) into this one's as well."""
        super().run()
        made = [library for library in self.extensions if Path(self.get_ext_fullpath(library.name)).is_file()]
        self.extensions = self.distribution.ext_modules = made
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None and not made:
            wheel.root_is_pure, wheel.py_limited_api = True, False

    def build_extension(self, ext: Library) -> None:
        """Make one library, or say why not."""
        target = Path(self.get_ext_fullpath(ext.name))
        reason = target.with_name(f"{ext.short}.missing")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # what an earlier build left there
        reason.unlink(missing_ok=True)
        try:
            shutil.copy(ext.make(), target)
        except Missing as cause:
            if ext.cuda and switch("THRESHOLDNET_FORCE_CUDA"):
                raise SystemExit(f"error: THRESHOLDNET_FORCE_CUDA is set, but {cause}") from None
            what = "CUDA" if ext.cuda else "C++"
            print(f"warning: thresholdnet is built without its {what} library: {cause}", file=sys.stderr)
            reason.write_text(f"{cause}\n")

    def copy_extensions_to_source(self) -> None:
        """Libraries and reasons into the checkout; what an earlier build left there goes."""
        for stale in (ROOT / "thresholdnet").glob("_csrc*"):
            stale.unlink()
        for file in Path(self.build_lib, "thresholdnet").glob("_csrc*"):
            shutil.copy(file, ROOT / "thresholdnet")


def sources(*patterns: str) -> list[str]:
    """Files below this folder, relative to it."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


LIBRARIES = [
    Library("_csrc", sources("csrc/ops.cpp", "csrc/described.cpp", "csrc/build_record.cpp", "csrc/cpu/*.cpp")),
    Library("_csrc_cuda", sources("csrc/build_record.cpp", "csrc/*_binding.cpp", "csrc/cuda/*.cu")),
]
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # has no limited API; the libraries use no Python

if __name__ == "__main__":
    os.chdir(ROOT)
    setup(
        packages=[
            "thresholdnet", "thresholdnet.backends", "thresholdnet.bench", "thresholdnet.cli", "thresholdnet.engine",
            "thresholdnet.kernels", "thresholdnet.models", "thresholdnet.replay", "thresholdnet.train",
        ],
        package_dir={"thresholdnet.kernels": "kernels"},
        package_data={"thresholdnet.kernels": ["tuned/*.json"]},
        ext_modules=LIBRARIES,
        cmdclass={"build_ext": Build},
        options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )  # fmt: skip
