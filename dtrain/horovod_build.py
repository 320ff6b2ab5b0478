"""Owns how Horovod is built where uv does not do it, and what an installed Horovod says it was built with.

pyproject.toml tells uv how to build Horovod; pip does not read that, and builds one without TensorFlow. `dtrain
install-horovod` builds it again, in the same way, against the TensorFlow of this environment. The edits themselves
are made by `_horovod_cmake`. Nothing here imports Horovod or TensorFlow: all is read from files and metadata.
"""

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dtrain._horovod_cmake import EDITS_VERSION
from dtrain.errors import ConfigError, DtrainError

VERSION = "0.28.1"
INSTALL = "dtrain install-horovod"
"""The command that mends a Horovod; error messages name it."""

_CMAKE = "dtrain-horovod-cmake"
_TOOLS = {"g++": "g++", "make": "make", "cmake": "cmake"}  # program: Debian package
_GPU_TOOLS = {"nvcc": "nvidia-cuda-toolkit"}
# Horovod's setup.py imports and asks for these; without build isolation they must be in the environment already.
_BUILD_REQUIREMENTS = ("setuptools", "wheel", "packaging", "cloudpickle", "psutil", "pyyaml")


@dataclass(frozen=True)
class Built:
    """What an installed Horovod was built with.

    Attributes:
        tensorflow: the TensorFlow it was built against; None: it was built without.
        edits: the version of dtrain's edits; None: it was built without them.
        gpu_operations: "NCCL", or "" where there are none.
        library: the compiled library for this Python is there.
    """

    tensorflow: str | None
    edits: str | None
    gpu_operations: str
    library: bool


def install_horovod(gpu: bool = False, dry_run: bool = False) -> None:
    """Builds Horovod against the TensorFlow of this environment and installs it, replacing one that is there.

    Takes some minutes, and shows what pip or uv shows.

    Args:
        gpu: with NCCL, for all-reduces between GPUs. It needs the CUDA toolkit; NCCL is taken from the nvidia-nccl
            wheel (`pip install 'dtrain[gpu]'`) where that is installed, else from where CMake finds it. Not verified
            on hardware.
        dry_run: check everything, print the command, and run nothing.

    Raises:
        ConfigError: a program or a package that the build needs is missing; the message names the command.
        DtrainError: the build failed, or its result does not fit.
    """
    _check_tools(gpu)
    command = install_command()
    with _nccl(gpu) as nccl:
        variables = build_variables() | nccl
        if dry_run:
            print(shlex.join([f"{name}={value}" for name, value in variables.items()] + command))
            return
        status = subprocess.run(command, env=os.environ | variables, check=False).returncode
    if status:
        raise DtrainError(
            f"building Horovod {VERSION} failed with exit code {status}; the reason is in the output above"
        )
    importlib.invalidate_caches()
    problem = problem_of(built(), tensorflow_version(), gpu=gpu)
    if problem:
        raise DtrainError(f"Horovod was installed, but {problem}")


def built() -> Built | None:
    """What the installed Horovod was built with, without importing it; None: there is no Horovod."""
    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    try:
        noted = json.loads((package / "metadata.json").read_text())
    except (OSError, ValueError):
        noted = {}
    return Built(
        tensorflow=noted.get("tensorflow"),
        edits=noted.get("dtrain_edits"),
        gpu_operations=noted.get("gpu_operations", ""),
        library=(package / "tensorflow" / f"mpi_lib{sysconfig.get_config_var('EXT_SUFFIX')}").is_file(),
    )


def tensorflow_version() -> str | None:
    """The installed TensorFlow's version, without importing it; None: there is no TensorFlow."""
    for distribution in ("tensorflow", "tensorflow-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def problem_of(horovod: Built | None, tensorflow: str | None, gpu: bool = False) -> str | None:
    """Why a Horovod cannot be used with a TensorFlow, with the command that mends it; None: it can."""
    mend = f"{INSTALL} --gpu" if gpu else INSTALL
    if tensorflow is None:
        return "TensorFlow is not installed; run: pip install tensorflow"
    if horovod is None:
        return f"Horovod is not installed; run: {mend}"
    if horovod.tensorflow is None or not horovod.library:
        return f"Horovod was built without TensorFlow, or for another Python; run: {mend}"
    if horovod.tensorflow != tensorflow:
        return f"Horovod was built against TensorFlow {horovod.tensorflow} but {tensorflow} is installed; run: {mend}"
    if gpu and horovod.gpu_operations != "NCCL":
        return f"Horovod was built without NCCL, which use_gpu=True needs; run: {mend}"
    return None


def has_edits(horovod: Built) -> bool:
    """Whether it was built with dtrain's edits as they are today."""
    return horovod.edits == EDITS_VERSION


def build_variables() -> dict[str, str]:
    """The environment of the build: what pyproject.toml gives uv, with HOROVOD_CMAKE as an absolute path."""
    return {
        "HOROVOD_WITH_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_PYTORCH": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_CMAKE": _cmake(),
        "LDFLAGS": "-s",
        "CXXFLAGS": "-include cstdint -include stdexcept -include string",
        "DTRAIN_TF": tensorflow_version() or "",
        "DTRAIN_EDITS": EDITS_VERSION,
    }


def install_command() -> list[str]:
    """pip's command, or uv's where this environment has no pip. A Horovod in their caches is never taken."""
    wanted = ["--no-build-isolation", "--no-binary", "horovod", "--no-deps", f"horovod=={VERSION}"]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--force-reinstall", *wanted]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable, "--no-cache", "--reinstall", *wanted]
    raise ConfigError(f"this environment has neither pip nor uv; run: {sys.executable} -m ensurepip")


def _check_tools(gpu: bool) -> None:
    tools = _TOOLS | _GPU_TOOLS if gpu else _TOOLS
    missing = {program: package for program, package in tools.items() if shutil.which(program) is None}
    if missing:
        raise ConfigError(
            f"Horovod is built from source, and {', '.join(missing)} cannot be found;"
            f" run: sudo apt-get install {' '.join(missing.values())}"
        )
    if tensorflow_version() is None:
        raise ConfigError("Horovod is built against TensorFlow, which is not installed; run: pip install tensorflow")
    absent = [name for name in _BUILD_REQUIREMENTS if not _is_installed(name)]
    if absent:
        raise ConfigError(f"Horovod's build needs {', '.join(absent)}; run: pip install {' '.join(absent)}")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cmake() -> str:
    """The console script that stands in for cmake. It is named in full, as pip's build does not look on PATH for it."""
    beside = Path(sys.executable).parent / _CMAKE  # not resolved: a virtual environment's Python is a link
    found = str(beside) if beside.is_file() else shutil.which(_CMAKE)
    if found is None:
        raise ConfigError(f"{beside} is missing; install dtrain again: pip install --force-reinstall --no-deps dtrain")
    return found


@contextmanager
def _nccl(gpu: bool) -> Iterator[dict[str, str]]:
    """The build's variables for NCCL."""
    if not gpu:
        yield {}
        return
    variables = {"HOROVOD_GPU_OPERATIONS": "NCCL"}
    wheel = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
    if wheel is None or not wheel.submodule_search_locations:
        yield variables
        return
    root = Path(next(iter(wheel.submodule_search_locations)))
    with tempfile.TemporaryDirectory() as folder:
        # CMake looks for libnccl.so; the wheel has libnccl.so.2 only, and that is what is loaded in the end.
        Path(folder, "libnccl.so").symlink_to(root / "lib" / "libnccl.so.2")
        yield variables | {
            "HOROVOD_NCCL_LINK": "SHARED",
            "HOROVOD_NCCL_INCLUDE": str(root / "include"),
            "HOROVOD_NCCL_LIB": folder,
            "LDFLAGS": f"-s -Wl,-rpath,{root / 'lib'}",
        }
