"""What can be learnt about a Triton kernel without a GPU.

Two halves that never meet in one process, because Triton reads TRITON_INTERPRET when a kernel is
decorated:

* in the test process, under TRITON_INTERPRET=1, kernels run on CPU tensors: `poisoned_buffers`,
  `shuffled_programs`, `counted_traffic` and `counted_launches` watch them;
* in a child process, `compile_launches` runs the real launchers on meta tensors (shapes, strides
  and alignment, no memory) behind a stand-in driver, so that exactly the specialisations that a
  GPU would see are compiled for every capability, by the ptxas that ships with Triton.

A code-generation test is a file with a function `launches()` that yields (name, thunk) pairs and
tests over `compile_launches(__file__)`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
# Whether every kernel is compiled for all of these, as `make codegen` has it, or each for two.
COMPLETE = os.environ.get("FASTGAN_CODEGEN") == "complete"
# Shared memory that one block may ask for, bytes.
SHARED_LIMIT = {
    75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376,
}  # fmt: skip


# ---------------------------------------------------------------- in the interpreter


@contextlib.contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Fresh buffers hold NaN (integers: their maximum), so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """The programs of every launch run in a random order: results must keep their bits."""
    from triton.runtime.interpreter import InterpreterBuilder

    random = np.random.default_rng(seed)
    set_dim, set_idx = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    order: list[int] = []

    def set_grid_dim(self: Any, nx: int, ny: int, nz: int) -> None:
        order[:] = random.permutation(nx * ny * nz).tolist()
        set_dim(self, nx, ny, nz)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        i = order[(x * ny + y) * nz + z]
        set_idx(self, i // (ny * nz), i // nz % ny, i % nz)

    with mock.patch.multiple(
        InterpreterBuilder, set_grid_dim=set_grid_dim, set_grid_idx=set_grid_idx
    ):
        yield


@dataclasses.dataclass
class Traffic:
    """Bytes that kernels asked for. A second read of the same address counts again."""

    loaded: int = 0
    stored: int = 0
    atomics: int = 0  # calls


@contextlib.contextmanager
def counted_traffic() -> Iterator[Traffic]:
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def size(pointers: Any, mask: Any) -> int:
        bits = pointers.get_element_ty().primitive_bitwidth
        return int(np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape))) * bits // 8

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        traffic.loaded += size(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def masked_store(
        self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any
    ) -> Any:
        traffic.stored += size(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def counting(atomic: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            traffic.atomics += 1
            return atomic(*args)

        return call

    with mock.patch.multiple(
        InterpreterBuilder,
        create_masked_load=masked_load,
        create_masked_store=masked_store,
        create_atomic_rmw=counting(rmw),
        create_atomic_cas=counting(cas),
    ):
        yield traffic


_ALLOCATES_ONLY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class _AtenLaunches(TorchDispatchMode):
    """Every aten call that is neither a view nor an allocation, inside fastgan's ops as well."""

    def __init__(self, launches: list[str]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastgan":
            with self:
                key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return func.redispatch(key, *args, **kwargs)
        name = func._schema.name.split("::")[1]
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in _ALLOCATES_ONLY:
            self.launches.append(name)
        return func(*args, **kwargs)


@contextlib.contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Names of everything that would be a kernel launch on a GPU: Triton kernels, aten ops."""
    from triton.runtime.interpreter import GridExecutor

    launches: list[str] = []
    execute = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter itself moves tensors with aten calls
            execute(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", call), _AtenLaunches(launches):
        yield launches


# ---------------------------------------------------------------- compiled offline


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel as one launch specialises it, compiled for one capability."""

    launch: str  # the name that launches() gave
    kernel: str
    capability: int
    constants: dict[str, Any]  # its constexpr arguments
    warps: int
    registers: int
    stack: int  # bytes per thread; spilled registers live here
    shared: int  # bytes
    accesses: dict[str, int]  # global and asynchronous memory instructions in PTX, by width
    products: list[str]  # PTX instructions of the tensor cores, without modifiers
    instructions: dict[str, int]  # SASS opcodes with modifiers; empty unless asked for

    def widest(self, kind: str) -> int:
        """Bytes of the widest access of a kind: "ld.global", "st.global" or "cp.async"."""
        return max(
            (access_width(name) for name in self.accesses if name.startswith(kind)), default=0
        )

    def moved(self, kind: str, width: int) -> int:
        """Bytes that a thread moves by accesses of a kind and width, a loop's body once."""
        return sum(
            width * count
            for name, count in self.accesses.items()
            if name.startswith(kind) and access_width(name) == width
        )

    def problems(self) -> list[str]:
        """What no kernel may have."""
        found = []
        if self.stack:
            found.append(f"{self}: {self.stack} bytes of spills, {self.registers} registers")
        if self.shared > SHARED_LIMIT[self.capability]:
            found.append(f"{self}: {self.shared} bytes of shared memory")
        return found

    def __str__(self) -> str:
        return f"{self.kernel} [{self.launch}] sm_{self.capability}"


_ACCESS = re.compile(r"\b((?:ld|st)\.global[\w.:]*|cp\.async\.c[ag]\.shared\.global)([^;]*)")
_PRODUCT = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_OPCODE = re.compile(r"^\S+\t(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


def access_width(access: str) -> int:
    """Bytes of a memory instruction as Compiled.accesses names it."""
    if access.startswith("cp.async"):
        return int(access.rsplit("/", 1)[1])
    vector = re.search(r"\.v(\d)", access)
    bits = re.search(r"\.[busf](\d+)$", access)
    assert bits is not None, access
    return (int(vector.group(1)) if vector else 1) * int(bits.group(1)) // 8


def _accesses(ptx: str) -> dict[str, int]:
    names: Counter[str] = Counter()
    for name, operands in _ACCESS.findall(ptx):
        if name.startswith("cp.async"):  # cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10
            name += f"/{int(operands.split(',')[2], 0)}"
        names[name] += 1
    return dict(names)


class _Driver:
    """Stands in for the CUDA driver: enough to compile, nothing to launch with."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # one cache of compiled kernels per device, so per capability

    def get_current_stream(self, device: int) -> int:
        return 0


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("codegen_launches", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class _Job:
    """What Triton would compile for a launch."""

    launch: str
    capability: int
    kernel: Any
    signature: Any
    constants: Any
    options: Any
    attributes: Any


def _jobs(launches: Iterable[tuple[str, Callable[[], object]]], capability: int) -> list[_Job]:
    """One for each distinct specialisation that launches ask for; nothing is compiled."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    jobs: dict[tuple[Any, str], _Job] = {}
    launch = ""

    def collect(
        self: Any, key: str, signature: Any, device: int, constants: Any, options: Any,
        attributes: Any, warmup: bool,
    ) -> None:  # fmt: skip
        job = _Job(launch, capability, self, signature, constants, options, attributes)
        jobs.setdefault((self, key), job)

    driver.set_active(_Driver(capability))
    with mock.patch.object(JITFunction, "_do_compile", collect):
        for launch, thunk in launches:  # noqa: B007 - read above
            thunk()
    return list(jobs.values())


def _compile(job: _Job, sass: bool) -> Compiled:
    import triton
    from triton.runtime.driver import driver

    driver.set_active(_Driver(job.capability))  # which kernels may ask for their target
    source = job.kernel.ASTSource(job.kernel, job.signature, job.constants, job.attributes)
    target = driver.active.get_current_target()
    kernel = triton.compile(source, target=target, options=job.options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = _USAGE.search(usage)
    assert found is not None, usage
    opcodes = _OPCODE.findall(kernel.asm["sass"]) if sass else []
    names = job.kernel.arg_names
    return Compiled(
        launch=job.launch, kernel=job.kernel.__name__, capability=job.capability,
        constants={names[path[0]]: v for path, v in job.constants.items() if len(path) == 1},
        warps=kernel.metadata.num_warps, registers=int(found[1]), stack=int(found[2]),
        shared=kernel.metadata.shared, accesses=_accesses(kernel.asm["ptx"]),
        products=sorted(set(_PRODUCT.findall(kernel.asm["ptx"]))),
        instructions=dict(Counter(opcodes)),
    )  # fmt: skip


_queue: list[tuple[_Job, bool]] = []  # workers are forked with it: a job cannot be pickled


def _compile_queued(i: int) -> Compiled:
    return _compile(*_queue[i])


def compile_launches(
    path: str,
    capabilities: Iterable[int] = CAPABILITIES,
    *,
    spread: bool = False,
    sass: str = "$^",
) -> list[Compiled]:
    """Compile every launch that `launches()` of the file at `path` makes, in a child process.

    Each for every capability or, if `spread`, for 90 and one that follows from its name. Where the
    name of a launch matches `sass`, its machine code is disassembled (slower).
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        [root, str(Path(__file__).resolve().parent), environment.get("PYTHONPATH", "")]
    )
    command = [sys.executable, __file__, path, "--capabilities", *map(str, capabilities)]
    command += ["--sass", sass, *["--spread"] * spread]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if done.returncode:
        raise RuntimeError(f"offline compilation of {path} failed:\n{done.stderr}")
    return [Compiled(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--capabilities", type=int, nargs="*", default=CAPABILITIES)
    parser.add_argument("--sass", default="$^")
    parser.add_argument("--spread", action="store_true")
    options = parser.parse_args()
    launches = list(_load(options.path).launches())
    for i, capability in enumerate(options.capabilities):
        own = [
            (name, launch)
            for name, launch in launches
            if not options.spread
            or capability == 90
            or zlib.crc32(name.encode()) % len(options.capabilities) == i
        ]
        jobs = _jobs(own, capability)
        _queue.extend((job, re.search(options.sass, job.launch) is not None) for job in jobs)
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), fork) as pool:
        compiled = list(pool.map(_compile_queued, range(len(_queue)), chunksize=4))
    print(json.dumps([dataclasses.asdict(c) for c in compiled]))


if __name__ == "__main__":
    _main()
