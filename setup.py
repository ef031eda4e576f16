"""Builds fastgan._C from csrc/. Everything else about the package is in pyproject.toml.

Environment variables:
    FASTGAN_BUILD_CUDA    auto (default): with CUDA kernels if torch is a CUDA build and a CUDA
                          toolkit is found; 1: with CUDA kernels or not at all; 0: without
    TORCH_CUDA_ARCH_LIST  GPU architectures, for example "8.0;9.0+PTX"
    CUDA_HOME             the CUDA toolkit
    CXX, MAX_JOBS         the C++ compiler; how many compilers run at once
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import setup

try:
    import torch
except (ImportError, OSError) as error:  # OSError: torch lacks a shared library
    reason = str(error).partition("\n")[0]
    sys.exit(
        f"fastgan: building the C++ extension needs torch in this environment ({reason}): "
        "pip install torch, then pip install --no-build-isolation ."
    )

CUDA_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


def run(*command):
    """The finished process; a command that cannot be started has failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def compiles(compiler, source, *flags):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        result = run(*shlex.split(compiler), path, *flags, "-o", Path(folder, "probe"))
        return result.returncode == 0


def find_compiler():
    """A C++ compiler that finds Python's headers, or None."""
    pythons_own = (sysconfig.get_config_var("CXX") or "").split()[:1]
    candidates = [os.environ.get("CXX"), *pythons_own, "c++", "g++", "clang++"]
    source = "#include <Python.h>\n#include <vector>\nint main() { return std::vector<int>(1)[0]; }"
    for compiler in filter(None, candidates):
        if compiles(compiler, source, "-c", f"-I{sysconfig.get_path('include')}"):
            return compiler
    return None


def openmp_flags(compiler):
    """Without OpenMP at::parallel_for is serial; Apple's clang has none."""
    source = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
    return ["-fopenmp"] if compiles(compiler, source, "-fopenmp") else []


def find_cuda_home():
    """The toolkit's folder. nvcc on PATH may be a script that calls one elsewhere."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if not home and nvcc:
        plan = run(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull).stderr
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        home = os.path.realpath(top[1] if top else Path(nvcc).resolve().parents[1])
    return home or "/usr/local/cuda"


def find_cuda():
    """The toolkit to build CUDA kernels with, or None for a build without them."""
    wanted = os.environ.get("FASTGAN_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"fastgan: FASTGAN_BUILD_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    if torch.version.cuda is None:
        if wanted == "1":
            sys.exit("fastgan: FASTGAN_BUILD_CUDA=1 needs a CUDA build of torch")
        return None
    cuda_home = find_cuda_home()
    nvcc = Path(cuda_home, "bin", "nvcc")
    if not nvcc.exists():
        given = [f"{name}=" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        reason = f"{''.join(given[:1])}{cuda_home} has no bin/nvcc"
        if wanted == "1":
            sys.exit(f"fastgan: FASTGAN_BUILD_CUDA=1 needs nvcc on PATH, or CUDA_HOME: {reason}")
        print(
            f"fastgan: {reason} (put nvcc on PATH, or set CUDA_HOME): "
            "installing without CUDA kernels, GAN losses on a GPU run on the slower reference path",
            file=sys.stderr,
        )
        return None
    answer = run(nvcc, "--version")
    release = re.search(r"release (\d+\.\d+)", answer.stdout)
    if answer.returncode != 0 or release is None:
        sys.exit(
            f"fastgan: {nvcc} --version does not answer as nvcc should: set CUDA_HOME to a toolkit "
            "that works, or FASTGAN_BUILD_CUDA=0 to build without CUDA kernels"
        )
    version = release[1]
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        sys.exit(
            f"fastgan: the CUDA toolkit in {cuda_home} is {version}, torch was built for CUDA "
            f"{torch.version.cuda}: set CUDA_HOME to a toolkit of that major version, or "
            "FASTGAN_BUILD_CUDA=0 to build without CUDA kernels"
        )
    return cuda_home


def default_architectures(cuda_home):
    nvcc = Path(cuda_home, "bin", "nvcc")
    known = run(nvcc, "--list-gpu-arch").stdout.split()
    chosen = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    if not chosen:
        sys.exit(
            f"fastgan: {nvcc} --list-gpu-arch lists none of {', '.join(CUDA_ARCHITECTURES)}: "
            "set TORCH_CUDA_ARCH_LIST"
        )
    return ";".join(chosen) + "+PTX"


def extension():
    """The arguments that make setuptools build fastgan._C; none without a compiler."""
    compiler = find_compiler()
    if compiler is None:
        if os.environ.get("FASTGAN_BUILD_CUDA") == "1":
            sys.exit("fastgan: FASTGAN_BUILD_CUDA=1 needs a C++ compiler and Python's headers")
        print(
            "fastgan: no C++ compiler that finds Python.h (install g++ and python3-dev): "
            "installing without fastgan._C, ops run on the slower reference path",
            file=sys.stderr,
        )
        return {}
    if os.environ.get("CXX") not in (None, "", compiler):
        print(f"fastgan: CXX={os.environ['CXX']} does not work, using {compiler}", file=sys.stderr)
    os.environ["CXX"] = compiler  # torch would try c++, whatever was found
    cuda_home = find_cuda()
    openmp = openmp_flags(compiler)
    # A conditional product may be computed for all lanes only where it may not trap: without that
    # flag, loops with an activation stay scalar on processors that have no AVX-512.
    cxx_flags = ["-O3", "-g0", "-fvisibility=hidden"]
    cxx_flags += ["-fno-math-errno", "-fno-trapping-math", *openmp]
    jobs = os.environ.get("MAX_JOBS", "")
    threads = min(4, int(jobs) or 4) if jobs.isdecimal() else 4  # nvcc's own compilers, per source
    nvcc_flags = ["-O3", f"--threads={threads}"]
    sources = ["bindings.cpp", "gan_loss.cpp", "gan_loss_cpu.cpp", "instance_norm_cpu.cpp"]
    macros = []
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(cuda_home)
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        macros = [("FASTGAN_WITH_CUDA", None), ("FASTGAN_CUDA_ARCHITECTURES", f'"{architectures}"')]
        sources.append("gan_loss_cuda.cu")

    # Imported only now: cpp_extension reads CUDA_HOME when it is imported.
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    kind = CUDAExtension if cuda_home else CppExtension
    module = kind(
        "fastgan._C",
        [f"csrc/{name}" for name in sources],
        depends=[f"csrc/{path.name}" for path in Path("csrc").glob("*.h")],
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        extra_link_args=openmp,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
