"""How setup.py decides what to build, what it built, and the machine code of the kernels."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension

from fastgan.ops import _dispatch

ROOT = Path(__file__).parent.parent
CUDA_SETTINGS = ("FASTGAN_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")
SETTINGS = ("CXX", "MAX_JOBS", *CUDA_SETTINGS)

# Runs setup.py with setup() replaced by one that prints what it was given.
PROBE = """
import json, os, runpy, setuptools
def setup(ext_modules=(), cmdclass=None):
    print(json.dumps({
        "sources": [s for module in ext_modules for s in module.sources],
        "nvcc": [f for module in ext_modules for f in module.extra_compile_args["nvcc"]],
        "macros": dict(m for module in ext_modules for m in module.define_macros),
        "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST"),
        "cuda_home": os.environ.get("CUDA_HOME"),
        "cxx": os.environ.get("CXX"),
    }))
setuptools.setup = setup
runpy.run_path("setup.py")
"""


def run_setup(**environment: str | None) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    given = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=ROOT,
        env=inherited | given,
        capture_output=True,
        text=True,
        timeout=120,
    )


def planned(**environment: str | None) -> dict[str, object]:
    result = run_setup(**environment)
    assert result.returncode == 0, result.stderr
    plan: dict[str, object] = json.loads(result.stdout)
    return plan


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one that setup.py wrote; torch may have written others."""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fastgan: ")]
    return line


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def fake_toolkit(folder: Path, version: str, architectures: str) -> Path:
    """A folder with an nvcc that answers setup.py's questions and compiles nothing."""
    nvcc = folder / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.1';;\n"
        f"--list-gpu-arch) printf '{architectures}';;\n"
        f"--dryrun) echo '#$ TOP={nvcc.parent}/..' >&2;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return folder / "toolkit"


@pytest.fixture
def wrapped_toolkit(tmp_path: Path) -> tuple[Path, str]:
    """A toolkit of torch's CUDA version and a PATH with a script that calls its nvcc."""
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA, so there is nothing to choose")
    toolkit = fake_toolkit(
        tmp_path, torch.version.cuda, r"compute_75\ncompute_80\ncompute_90\ncompute_999\n"
    )
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    return toolkit, f"{script.parent}:{os.environ['PATH']}"


def test_cuda_can_be_left_out() -> None:
    plan = planned(FASTGAN_BUILD_CUDA="0")
    assert "csrc/gan_loss_cpu.cpp" in plan["sources"]
    assert not [source for source in plan["sources"] if source.endswith(".cu")]
    assert "FASTGAN_WITH_CUDA" not in plan["macros"]


def test_a_script_named_nvcc_leads_to_the_toolkit(wrapped_toolkit: tuple[Path, str]) -> None:
    toolkit, path = wrapped_toolkit
    plan = planned(PATH=path, FASTGAN_BUILD_CUDA="auto")
    assert plan["cuda_home"] == str(toolkit)
    assert "csrc/gan_loss_cuda.cu" in plan["sources"]
    assert "FASTGAN_WITH_CUDA" in plan["macros"]


def test_architectures_are_those_that_nvcc_knows(wrapped_toolkit: tuple[Path, str]) -> None:
    _, path = wrapped_toolkit
    assert planned(PATH=path)["architectures"] == "7.5;8.0;9.0+PTX"
    chosen = planned(PATH=path, TORCH_CUDA_ARCH_LIST="8.6")
    assert chosen["architectures"] == "8.6"
    assert chosen["macros"]["FASTGAN_CUDA_ARCHITECTURES"] == '"8.6"'


def test_max_jobs_bounds_nvcc_too() -> None:
    for jobs, threads in {None: 4, "1": 1, "64": 4}.items():
        plan = planned(MAX_JOBS=jobs, FASTGAN_BUILD_CUDA="0")
        assert f"--threads={threads}" in plan["nvcc"]


def test_a_toolkit_of_another_cuda_is_one_line(tmp_path: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA, so no toolkit is looked for")
    toolkit = fake_toolkit(tmp_path, "10.2", "")
    line = last_line(run_setup(CUDA_HOME=str(toolkit)))
    assert "is 10.2, torch was built for CUDA " + torch.version.cuda in line
    assert "FASTGAN_BUILD_CUDA=0" in line
    assert planned(CUDA_HOME=str(toolkit), FASTGAN_BUILD_CUDA="0")["sources"]


def test_without_a_toolkit_cuda_is_left_out_unless_demanded(tmp_path: Path) -> None:
    nothing = str(tmp_path)
    plan = planned(CUDA_HOME=nothing)
    assert not [source for source in plan["sources"] if source.endswith(".cu")]
    for name in ("CUDA_HOME", "CUDA_PATH") if torch.version.cuda else ():
        reason = f"{name}={nothing} has no bin/nvcc"
        left_out = only_line(run_setup(**{name: nothing}))
        assert left_out.startswith(f"fastgan: {reason} (put nvcc on PATH")
        assert "installing without CUDA kernels" in left_out
        line = last_line(run_setup(**{name: nothing}, FASTGAN_BUILD_CUDA="1"))
        assert line == f"fastgan: FASTGAN_BUILD_CUDA=1 needs nvcc on PATH, or CUDA_HOME: {reason}"


@pytest.mark.parametrize(
    ("script", "mode", "found_by", "wanted"),
    [
        ("exit 1", 0o755, "CUDA_HOME", "auto"),
        ("exit 1", 0o755, "PATH", "auto"),
        ("echo 'no version'", 0o755, "CUDA_HOME", "1"),
        ("", 0o644, "CUDA_HOME", "auto"),
    ],
)
def test_an_nvcc_that_does_not_work_is_one_line(
    script: str, mode: int, found_by: str, wanted: str, tmp_path: Path
) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA, so no toolkit is looked for")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(mode)
    value = {"CUDA_HOME": str(tmp_path), "PATH": f"{nvcc.parent}:{os.environ['PATH']}"}[found_by]
    line = last_line(run_setup(**{found_by: value}, FASTGAN_BUILD_CUDA=wanted))
    assert line.startswith(f"fastgan: {nvcc} --version does not answer as nvcc should")
    assert "FASTGAN_BUILD_CUDA=0" in line


def test_an_nvcc_that_lists_no_architecture_is_one_line(tmp_path: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA, so no toolkit is looked for")
    toolkit = str(fake_toolkit(tmp_path, torch.version.cuda, ""))
    line = last_line(run_setup(CUDA_HOME=toolkit))
    assert line.startswith(f"fastgan: {toolkit}/bin/nvcc --list-gpu-arch lists none of 7.5, ")
    assert line.endswith(": set TORCH_CUDA_ARCH_LIST")
    chosen = planned(CUDA_HOME=toolkit, TORCH_CUDA_ARCH_LIST="9.0a")
    assert chosen["architectures"] == "9.0a"


def test_a_compiler_that_does_not_work_is_replaced() -> None:
    result = run_setup(CXX="no-such-compiler", FASTGAN_BUILD_CUDA="0")
    found = json.loads(result.stdout)["cxx"]
    assert found not in (None, "no-such-compiler")
    line = only_line(result)
    assert line == f"fastgan: CXX=no-such-compiler does not work, using {found}"
    assert planned(CXX="g++ -pipe", FASTGAN_BUILD_CUDA="0")["cxx"] == "g++ -pipe"


def test_without_a_compiler_the_package_is_pure_python(tmp_path: Path) -> None:
    result = run_setup(PATH=str(tmp_path))
    assert json.loads(result.stdout)["sources"] == []
    assert "no C++ compiler that finds Python.h" in result.stderr
    assert "needs a C++ compiler" in last_line(
        run_setup(PATH=str(tmp_path), FASTGAN_BUILD_CUDA="1")
    )


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_without_torch_there_is_one_line(error: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"raise {error}('none here')\n")
    line = last_line(run_setup(PYTHONPATH=str(tmp_path)))
    assert "(none here)" in line
    assert "pip install torch, then pip install --no-build-isolation ." in line


def test_a_wrong_setting_is_one_line() -> None:
    line = last_line(run_setup(FASTGAN_BUILD_CUDA="yes"))
    assert line == "fastgan: FASTGAN_BUILD_CUDA must be auto, 0 or 1, got 'yes'"


# --- What was built -----------------------------------------------------------------------------


def test_build_info() -> None:
    info = _dispatch.BUILD_INFO
    if info is None:
        pytest.skip(_dispatch.missing("native", "cpu") or "")
    assert info["torch"] == torch.__version__.split("+")[0]
    assert info["openmp"] or sys.platform == "darwin"
    if "native" in os.environ.get("FASTGAN_REQUIRE", "") and torch.version.cuda is not None:
        assert info["cuda"] is not None
    if info["cuda"] is not None:
        assert info["cuda"].split(".")[0] == str(torch.version.cuda).split(".")[0]
        assert re.fullmatch(r"[\w.;+ ]+", info["cuda_architectures"])


@pytest.mark.parametrize(("clone", "registers"), [("v3", "%ymm"), ("v4", "%[yz]mm")])
def test_cpu_kernels_are_vectorised(clone: str, registers: str) -> None:
    """Every function over floats, for AVX2 and for AVX-512: where its loop stayed scalar, it would
    use the 128-bit registers alone."""
    library = pytest.importorskip("fastgan._C").__file__
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    command = ["objdump", "--disassemble", "--demangle", library]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = dict(re.findall(r"^\w+ <(.+)>:\n((?:.+\n)*)", listing, re.MULTILINE))
    clones = {
        name: code
        for name, code in functions.items()
        if f"[clone .arch_x86_64_{clone}" in name and "float const*" in name
    }
    if not clones:
        pytest.skip("this compiler made no clones")
    assert len(clones) > 30
    assert [name for name, code in clones.items() if not re.search(registers, code)] == []


@pytest.mark.parametrize("capability", ["75", "90", "120"])
def test_cuda_kernels_compile_without_spills(capability: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None or torch.version.cuda is None:
        if "native" in os.environ.get("FASTGAN_REQUIRE", ""):
            pytest.fail("FASTGAN_REQUIRE=native, but there is no nvcc or no CUDA build of torch")
        pytest.skip("needs nvcc and a CUDA build of torch")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    if f"compute_{capability}" not in known.split():
        pytest.skip(f"this nvcc does not know capability {capability}")
    include = [f"-I{path}" for path in torch.utils.cpp_extension.include_paths()]
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    assert sources
    for source in sources:
        result = subprocess.run(
            [
                nvcc,
                "-std=c++20",
                "-O3",
                "-cubin",
                f"-arch=sm_{capability}",
                "--expt-relaxed-constexpr",
                "-Xptxas=-v",
                f"-I{sysconfig.get_path('include')}",
                *include,
                str(source),
                "-o",
                str(tmp_path / "kernels.cubin"),
            ],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", result.stderr)
        kernels = len(re.findall(r"Compiling entry function", result.stderr))
        assert kernels > 20
        assert used.count(("0", "0")) == len(used) >= kernels, result.stderr
