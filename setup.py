"""Builds the extension ``vllm_xlayer/_C.abi3.so`` with CMake and Ninja; metadata is in pyproject.toml.

Environment:
  VLLM_XLAYER_CUDA    1: CUDA ops are required (no nvcc is an error); 0: none; unset: required where a GPU
                      is visible, else if nvcc is found
  VLLM_XLAYER_ARCHS   CUDA architectures, e.g. "80;90" (default: this machine's GPUs, else all supported)
  VLLM_XLAYER_FORCE_SM80  1: kernels use only instructions that sm_80 has, to test that path on any GPU
  CUDACXX, CUDA_HOME  where to look for nvcc first
  MAX_JOBS            parallel compilations
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
TORCH_REQUIREMENT = "torch==2.11.0"
"""Built against the oldest, so that the extension can only use what every torch since has."""
STABLE_HEADER = "include/torch/csrc/stable/library.h"
# What a source distribution must have beside the Python files.
SOURCES = ["CMakeLists.txt", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.*"))]
ALL_ARCHS = "80;86;89;90a;100f;120f"
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"))
"""Of which NVIDIA's driver makes one at least. Asking torch would need a torch, and make a CUDA context."""
NVCC_PLACES = "CUDACXX, CUDA_HOME, /usr/local/cuda, PATH or the environment's packages"


def say(message: str) -> None:
    """Report a build decision: shown by ``pip install -v`` and always by ``python setup.py``."""
    print(f"vllm_xlayer: {message}", file=sys.stderr, flush=True)


def torch_version(torch_dir: Path) -> tuple[int, int]:
    """(major, minor) of an installed torch, (0, 0) if it cannot be read. Does not import torch."""
    version_file = torch_dir / "version.py"
    if version_file.is_file():
        for line in version_file.read_text().splitlines():
            if line.startswith("__version__ ="):
                major, minor = line.split("'")[1].split(".")[:2]
                return int(major), int(minor)
    return 0, 0


def find_torch() -> Path | None:
    """The folder of an installed torch >= 2.11, without importing it.

    pip's build isolation hides the site-packages of the environment that is installed into, but runs that
    environment's interpreter: sysconfig still names the folders, so torch need not be downloaded again.
    """
    candidates = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent)
    candidates += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    for torch_dir in candidates:
        if (torch_dir / STABLE_HEADER).is_file() and torch_version(torch_dir) >= (2, 11):
            return torch_dir
    return None


def find_nvcc() -> Path | None:
    candidates = [os.environ.get("CUDACXX")]
    candidates += [f"{home}/bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    candidates += [shutil.which("nvcc")]
    # vLLM's requirements bring nvcc as a package: who has no CUDA toolkit has this one.
    candidates += [str(Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin/nvcc")]
    for candidate in candidates:
        path = shutil.which(candidate) if candidate else None
        if path is not None:
            return Path(path)
    return None


def build_requirements() -> list[str]:
    """torch where none is installed; under PEP 517 this becomes a build requirement.

    Raises:
        SystemExit: the build would end for want of nvcc; said before torch is downloaded for it.
    """
    if find_torch() is not None:
        return []
    if os.environ.get("VLLM_XLAYER_CUDA", "") == "" and find_nvcc() is None:
        stop_beside_gpu(f"no nvcc in {NVCC_PLACES}")
    return [TORCH_REQUIREMENT]


def stop_beside_gpu(missing: str) -> None:
    """Ends a build that nobody asked to be without CUDA ops, if this machine has a GPU that needs them.

    Raises:
        SystemExit: it has, and here is what to do.
    """
    gpu = next((device for device in GPU_DEVICES if device.exists()), None)
    if gpu is not None:
        raise SystemExit(
            f"vllm_xlayer: this machine has a GPU ({gpu}), but there is {missing}, and the build would have "
            'CPU ops only: run `pip install "vllm==0.33.0"`, which brings both along, in its own command '
            "first (if it is there already: build with pip instead of uv, or with --no-build-isolation), or "
            "set VLLM_XLAYER_CUDA=0 for CPU ops only"
        )


def local_archs() -> str | None:
    """Architectures of the GPUs of this machine, None without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        result = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    archs = set()
    for capability in result.stdout.split():
        major, _, minor = capability.partition(".")
        if not (major.isdigit() and minor.isdigit()) or int(major) < 8:
            say(f"GPU with compute capability {capability}: not supported, expected 8.0 or newer")
        elif int(major) in (10, 12):
            archs.add(f"{major}0f")  # the family: 10.0 and 10.3, 12.0 and 12.1
        else:
            archs.add(major + minor)
    return ";".join(sorted(archs)) or None


def cuda_arguments() -> list[str]:
    """CMake arguments for the CUDA part, after saying what was decided and why."""
    wish = os.environ.get("VLLM_XLAYER_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"VLLM_XLAYER_CUDA: expected 0, 1 or unset, got {wish!r}")
    if wish == "0":
        say("CUDA ops left out: VLLM_XLAYER_CUDA=0")
        return ["-DXLAYER_CUDA=OFF"]
    nvcc = find_nvcc()
    if nvcc is None:
        if wish == "1":
            raise SystemExit(f"VLLM_XLAYER_CUDA=1: expected nvcc in {NVCC_PLACES}, found none")
        stop_beside_gpu(f"no nvcc in {NVCC_PLACES}")
        say(f"CUDA ops LEFT OUT: no nvcc in {NVCC_PLACES}. Only CPU ops are built.")
        return ["-DXLAYER_CUDA=OFF"]
    archs = os.environ.get("VLLM_XLAYER_ARCHS")
    source = "VLLM_XLAYER_ARCHS"
    if not archs:
        archs, source = local_archs(), "the GPUs of this machine"
    if not archs:
        archs, source = ALL_ARCHS, "no GPU visible: all supported"
    say(f"CUDA ops with {nvcc} for {archs} ({source})")
    arguments = ["-DXLAYER_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DXLAYER_ARCHS={archs}"]
    if os.environ.get("VLLM_XLAYER_FORCE_SM80") == "1":
        say("kernels FORCED to the instructions of sm_80: VLLM_XLAYER_FORCE_SM80=1")
        arguments.append("-DXLAYER_FORCE_SM80=ON")
    packaged = sorted((nvcc.parent.parent / "lib").glob("libcudart.so.*"))
    if packaged:
        # nvcc's package has no libcudart.so without a version, which CMake looks for (and we do not link).
        arguments.append(f"-DCUDA_CUDART={packaged[0]}")
    return arguments


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch_dir = find_torch()
        if torch_dir is None:
            raise SystemExit(f"expected torch >= 2.11 with {STABLE_HEADER}, found none")
        python_header = Path(sysconfig.get_path("include")) / "Python.h"
        if not python_header.is_file():
            raise SystemExit(
                f"expected Python's development headers, but {python_header} is not there "
                "(on Debian and Ubuntu: apt install python3-dev)"
            )
        say(f"torch headers from {torch_dir}")
        cuda = cuda_arguments()
        if "-DXLAYER_CUDA=ON" in cuda and not (torch_dir / "lib/libtorch_cuda.so").is_file():
            if os.environ.get("VLLM_XLAYER_CUDA") == "1":
                raise SystemExit(f"VLLM_XLAYER_CUDA=1: expected a torch with CUDA, got {torch_dir}")
            stop_beside_gpu(f"no CUDA in the torch at {torch_dir}")
            say(f"CUDA ops LEFT OUT: the torch at {torch_dir} has no CUDA")
            cuda = ["-DXLAYER_CUDA=OFF"]

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Kept apart from CMake caches of other interpreters, and kept between in-place builds.
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "--fresh",  # the cache names pip's temporary environment of an earlier build
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DXLAYER_TORCH_DIR={torch_dir}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *cuda,
        ]
        build = ["cmake", "--build", str(build_dir)]
        if jobs := os.environ.get("MAX_JOBS"):
            build += ["-j", jobs]
        for command in (configure, build):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"the build of vllm_xlayer._C failed (see above): {error}") from error
        if not target.is_file():
            raise SystemExit(f"the build ran, but {target} is not there")
        say(f"built {target.name} ({target.stat().st_size / 1e6:.1f} MB)")


class Abi3Wheel(bdist_wheel):
    """One wheel for every CPython from 3.11 on."""

    def get_tag(self) -> tuple[str, str, str]:
        return "cp311", "abi3", super().get_tag()[2]


setup(
    ext_modules=[Extension("vllm_xlayer._C", sources=[], depends=SOURCES, py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Abi3Wheel},
    setup_requires=build_requirements(),
)
