"""Times implementations of one computation against each other, and believes none that is wrong.

A `Case` is one row of a results table, its `Variant`s are the columns. `measure` builds every
variant, compares its results and gradients with fp64, and only then times it: host time per call,
and on a GPU device time by replaying a CUDA graph. Variants take turns within each round, so that
a change of clock or a busy neighbour meets all of them; medians and quartiles are over rounds.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import step_trace
from fastgan.ops import _dispatch
from store import Record, significant
from tolerances import RELATIVE

Function = Callable[..., Any]

# Competitors may round intermediate results to 16 bits where fastgan does not: what the tests
# allow fastgan, times this, is what the gate allows everybody.
GATE = 4.0


@dataclass(frozen=True)
class Variant:
    """One implementation of a case."""

    name: str
    kind: str
    """``"eager"``, ``"compile"``, ``"library"`` (cuBLAS, cuDNN), ``"fastgan"``, ``"peer"`` or
    ``"experiment"``: of fastgan, but nothing that a user can choose."""
    build: Callable[[], Function]
    """Called once per case, untimed. What it returns is timed, called with the case's inputs."""
    replays: bool = False
    """Whether it replays CUDA graphs of its own, whose memory no single call allocates."""


def eager(name: str, function: Function) -> Variant:
    return Variant(name, "eager", lambda: function)


def library(name: str, function: Function) -> Variant:
    return Variant(name, "library", lambda: function)


def fused(function: Function) -> Variant:
    return Variant("fastgan", "fastgan", lambda: function)


def compiled(function: Function, *, tune: bool = False) -> Variant:
    """torch.compile; CUDA graphs stay out of it, since device time replays one anyway."""
    name, mode = "torch.compile", "default"
    if tune:
        name, mode = "torch.compile max-autotune", "max-autotune-no-cudagraphs"
    return Variant(
        name, "compile", lambda: torch.compile(function, mode=mode, dynamic=False, fullgraph=True)
    )


@dataclass(frozen=True)
class Case:
    """One computation on inputs of one kind."""

    op: str
    shape: str
    dtype: str
    layout: str
    """``"nchw"``, ``"channels_last"`` or ``""`` where it means nothing."""
    mode: str
    """``"forward"`` (no autograd), ``"forward+backward"`` or ``"step"`` (the variant decides)."""
    inputs: Callable[[torch.device, torch.Generator], tuple[Tensor, ...]]
    """Fresh random inputs; those that require grad are differentiated in the backward."""
    exact: Function
    """The formula, on fp64 inputs."""
    variants: tuple[Variant, ...]
    bytes: int | None = None
    """The fewest bytes that have to move: every input read once, every result written once."""
    flops: int | None = None
    rotate: bool = True
    """Turn through inputs larger together than the GPU's L2, for what is bound by memory."""
    precision: torch.dtype | None = None
    """Whose row of the tolerance table holds; None: that of each result's own dtype."""
    deep: bool = False
    """Judge by root mean squares: a whole network in 16 bits has outliers in every form."""

    @property
    def key(self) -> str:
        return " ".join(filter(None, (self.op, self.shape, self.dtype, self.layout, self.mode)))

    def __str__(self) -> str:
        return self.key.replace(" ", "-")


Report = Callable[[Case, str], None]
"""The `record` fixture: measures a case, reports the named variant of it."""


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    block_seconds: float
    """Calls are timed in blocks of about this length, with one synchronisation at the end."""
    rounds: tuple[int, int]
    case_seconds: float
    """Rounds stop being added, above their minimum, when a case has taken this long."""


EFFORTS = {
    "tiny": Effort(1e-4, (3, 5), 0.05),
    "cpu": Effort(5e-3, (9, 40), 3.0),
    "gpu": Effort(2e-3, (15, 60), 1.5),
}


# --- Inputs -------------------------------------------------------------------------------------


@dataclass
class InputSet:
    """Inputs of one call and, where there is a backward, the gradient that flows into it."""

    inputs: tuple[Tensor, ...]
    upstream: Tensor | None

    def __post_init__(self) -> None:
        self.differentiated = [x for x in self.inputs if x.requires_grad]

    def with_upstream(self, dtype: torch.dtype) -> InputSet:
        return self if self.upstream is None else replace(self, upstream=self.upstream.to(dtype))

    @property
    def nbytes(self) -> int:
        tensors = [*self.inputs] + ([] if self.upstream is None else [self.upstream])
        return sum(tensor.nbytes for tensor in tensors)


def make_set(
    case: Case, device: torch.device, seed: int, upstream: Callable[..., Tensor] | None = None
) -> InputSet:
    generator = torch.Generator(device).manual_seed(seed)
    inputs = case.inputs(device, generator)
    return InputSet(inputs, None if upstream is None else upstream(generator))


def upstream_maker(case: Case, first: InputSet) -> Callable[..., Tensor] | None:
    """Draws the gradient that flows into a case's first result: ones for a scalar, else random."""
    if case.mode != "forward+backward":
        return None
    with torch.no_grad():
        result = _as_list(case.exact(*(_double(x) for x in first.inputs)))[0]
    shape, device, dtype = result.shape, result.device, first.inputs[0].dtype

    def draw(generator: torch.Generator) -> Tensor:
        if not shape:
            return torch.ones(shape, device=device)
        values = torch.randn(shape, device=device, generator=generator).to(dtype)
        if case.layout == "channels_last" and len(shape) == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        return values

    return draw


def set_count(case: Case, device: torch.device, nbytes: int) -> int:
    """So many sets that they do not fit the L2 cache twice over; one on a CPU."""
    if not (case.rotate and device.type == "cuda"):
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(128, max(1, math.ceil(2 * cache / max(nbytes, 1))))


# --- Right or wrong -----------------------------------------------------------------------------


def run(function: Function, chosen: InputSet) -> list[Tensor]:
    """One call as it is timed: results, and after them gradients if there is a backward."""
    results = _as_list(function(*chosen.inputs))
    if chosen.upstream is None:
        return results
    return [
        *results,
        *torch.autograd.grad(results[0], chosen.differentiated, chosen.upstream),
    ]


def exact_results(case: Case, chosen: InputSet) -> list[Tensor]:
    """Results, and gradients after them, of the formula in fp64."""
    inputs = tuple(_double(x).requires_grad_(x.requires_grad) for x in chosen.inputs)
    upstream = None if chosen.upstream is None else chosen.upstream.double()
    return [value.detach() for value in run(case.exact, InputSet(inputs, upstream))]


def scale_gradients(chosen: InputSet, exact: list[Tensor]) -> float:
    """Scale the gradients of a scalar result to about one, in place, and return the factor.

    Those of a mean over millions of elements vanish in 16 bits; a gradient scaler would do this.
    """
    if chosen.upstream is None or chosen.upstream.ndim > 0:
        return 1.0
    gradients = exact[-len(chosen.differentiated) :]
    largest = max(gradient.abs().max().item() for gradient in gradients)
    factor = 2.0 ** -math.floor(math.log2(largest)) if largest > 0 else 1.0
    for tensor in (chosen.upstream, *gradients):
        tensor.mul_(factor)
    return factor


def relative_error(actual: Tensor, exact: Tensor, *, deep: bool = False) -> float:
    """Largest difference over largest exact magnitude; infinite for NaN or a wrong shape.

    With `deep` the root mean squares of both instead.
    """
    if actual.shape != exact.shape:
        return math.inf
    if exact.numel() == 0:
        return 0.0
    sizes = [(actual.detach().to(exact) - exact).abs(), exact.abs()]
    difference, size = (x.square().mean().sqrt() if deep else x.max() for x in sizes)
    error = (difference / size.clamp_min(torch.finfo(torch.float32).tiny)).item()
    return math.inf if math.isnan(error) else error


def verdict(case: Case, actual: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, str]:
    """The worst error relative to what is allowed, and what is wrong ("" if nothing is)."""
    if len(actual) != len(exact):
        return math.inf, f"{len(actual)} results instead of {len(exact)}"
    worst, wrong = 0.0, ""
    for index, (value, expected) in enumerate(zip(actual, exact, strict=True)):
        error = relative_error(value, expected, deep=case.deep)
        allowed = GATE * RELATIVE[case.precision or value.dtype]
        worst = max(worst, error / allowed)
        if error > allowed and not wrong:
            wrong = f"result {index} is off by {error:.1e} of its size, {allowed:.1e} allowed"
    return worst, wrong


def _double(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x


def _as_list(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


# --- Time ---------------------------------------------------------------------------------------

Block = Callable[[], float]
"""Runs a number of calls; returns seconds per call."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_block(call: Callable[[int], Any], device: torch.device, effort: Effort) -> Block:
    """Host time: calls back to back, one synchronisation, all inside the timed region."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for index in range(calls):
            call(index)
        synchronize(device)
        return (time.perf_counter() - start) / calls

    once = min(timed(1) for _ in range(3))  # the first of them warm up
    calls = max(1, round(effort.block_seconds / max(once, 1e-7)))
    timed(calls)
    return lambda: timed(calls)


class GraphBlock:
    """Device time: a captured graph of many calls, replayed between two events.

    The results of as many calls as there are input sets stay alive during the capture, so that
    the calls do not write into each other's cache lines any more than they read them.
    """

    def __init__(self, call: Callable[[int], Any], sets: int, once: float, effort: Effort) -> None:
        calls = math.ceil(effort.block_seconds / max(once, 1e-6))
        calls = sets * math.ceil(min(calls, 64) / sets)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(3):
                call(index)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        self._results: deque[Any] = deque(maxlen=sets)
        with torch.cuda.graph(self._graph, stream=stream):
            for index in range(calls):
                self._results.append(call(index))
        self._calls = calls
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._replays = 1
        self._replays = max(1, round(effort.block_seconds / (calls * self())))

    def results_of_first_set(self) -> list[Tensor]:
        """What a replay writes, over poison."""
        results = [result.detach() for result in self._results[0]]
        for result in results:
            result.fill_(math.nan)
        self._graph.replay()
        torch.cuda.synchronize()
        return results

    def __call__(self) -> float:
        self._graph.replay()  # work that hides the launch of what is timed
        self._start.record()
        for _ in range(self._replays):
            self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3 / (self._replays * self._calls)


def sample(blocks: Mapping[str, Block], effort: Effort) -> dict[str, list[float]]:
    """Seconds per call of every block, round by round; each round begins with another block."""
    names = list(blocks)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        least, most = effort.rounds
        end = time.perf_counter() + effort.case_seconds
        for number in range(most):
            if number >= least and time.perf_counter() > end:
                break
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(blocks[name]())
    finally:
        if collecting:
            gc.enable()
    return samples


def summary(samples: Sequence[float]) -> Record:
    """Median and quartiles in seconds."""
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return {
        "median": significant(median),
        "q1": significant(lower),
        "q3": significant(upper),
        "rounds": len(samples),
    }


# --- What else one call costs -------------------------------------------------------------------


@contextlib.contextmanager
def _choices() -> Iterator[set[str]]:
    """The implementations that fastgan's ops choose inside the block."""
    chosen: set[str] = set()
    choose = _dispatch.choose

    def noting(*args: Any, **kwargs: Any) -> str:
        name = choose(*args, **kwargs)
        chosen.add(name)
        return name

    _dispatch.choose = noting
    try:
        yield chosen
    finally:
        _dispatch.choose = choose


def kernel_names(call: Callable[[], Any]) -> list[str]:
    """Kernels, copies and fills that one call launches on the GPU, in order."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return step_trace.device_work(path)


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes that one call allocates at its worst, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    del results
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Callable[[], Any], inputs: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps from a forward for its backward, beside the inputs."""
    own = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = forward()
    del results
    return sum(kept.values())


# --- One case -----------------------------------------------------------------------------------


def measure(
    case: Case, names: Sequence[str], device: torch.device, effort: Effort
) -> dict[str, Record]:
    """A record for each named variant: ``wrong`` or ``failed`` with the reason, or its times."""
    torch.compiler.reset()  # a limit on recompilations would turn later cases to dynamic shapes
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the graphs of the case before held
    with torch.set_grad_enabled(case.mode != "forward"):
        return _measure(case, names, device, effort)


def _measure(
    case: Case, names: Sequence[str], device: torch.device, effort: Effort
) -> dict[str, Record]:
    upstream = upstream_maker(case, make_set(case, device, 0))
    sets = [make_set(case, device, 0, upstream)]
    exact = exact_results(case, sets[0])
    scale = scale_gradients(sets[0], exact)
    for seed in range(1, set_count(case, device, sets[0].nbytes)):
        sets.append(make_set(case, device, seed, upstream))
        if sets[-1].upstream is not None:
            sets[-1].upstream.mul_(scale)

    records: dict[str, Record] = {}
    calls: dict[str, Callable[[int], Any]] = {}
    replays = {variant.name: variant.replays for variant in case.variants}
    for variant in case.variants:
        if variant.name in names:
            record = records[variant.name] = describe(case, variant)
            with _noting_failure(record):
                calls[variant.name] = _gate(record, case, variant, sets, exact)
    calls = {name: call for name, call in calls.items() if "wrong" not in records[name]}

    blocks: dict[str, Block] = {}
    graphs: dict[str, Block] = {}
    for name, call in calls.items():
        with _noting_failure(records[name]):
            blocks[name] = wall_block(call, device, effort)
            if device.type == "cuda":
                _count(records[name], call, memory=not replays[name])
                if case.mode != "step":
                    _capture(graphs, records[name], case, call, len(sets), exact, effort)
    right = {name: block for name, block in blocks.items() if _is_right(records[name])}
    for name, seconds in sample(right, effort).items() if right else ():
        records[name]["wall"] = summary(seconds)
        records[name]["samples"] = seconds
    graphs = {name: block for name, block in graphs.items() if _is_right(records[name])}
    for name, seconds in sample(graphs, effort).items() if graphs else ():
        records[name]["device"] = summary(seconds)
    for name in right:
        _rate(records[name])
    return records


def _is_right(record: Record) -> bool:
    return "wrong" not in record and "failed" not in record


def describe(case: Case, variant: Variant) -> Record:
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "layout": case.layout,
        "mode": case.mode,
        "variant": variant.name,
        "kind": variant.kind,
        "bytes": case.bytes,
        "flops": case.flops,
    }


@contextlib.contextmanager
def _noting_failure(record: Record) -> Iterator[None]:
    """A variant that raises is one cell of the table, not the end of the run."""
    try:
        yield
    except Exception as error:
        text = str(error).strip() or "no message"
        record["failed"] = f"{type(error).__name__}: {text.splitlines()[0]}"[:300]


def _gate(
    record: Record, case: Case, variant: Variant, sets: Sequence[InputSet], exact: Sequence[Tensor]
) -> Callable[[int], Any]:
    """The call to time, after its results on the first set were compared with fp64."""
    function = variant.build()
    first = sets[0]
    if first.upstream is not None:  # in the dtype of this variant's result
        dtype = _as_list(function(*first.inputs))[0].dtype
        sets = [chosen.with_upstream(dtype) for chosen in sets]
        first = sets[0]
    results = run(function, first)
    if variant.kind == "fastgan" and case.mode != "step":
        with _choices() as chosen:
            run(function, first)
        record["impl"] = "+".join(sorted(chosen))
    share, wrong = verdict(case, results, exact)
    record["error_of_allowed"] = significant(min(share, 1e9))
    if wrong:
        record["wrong"] = wrong
    elif first.upstream is not None:
        record["saved_bytes"] = saved_bytes(lambda: function(*first.inputs), first.inputs)
    return lambda index: run(function, sets[index % len(sets)])


def _count(record: Record, call: Callable[[int], Any], *, memory: bool) -> None:
    if memory:
        record["peak_memory"] = peak_memory(lambda: call(0))
    names = kernel_names(lambda: call(0))
    record["launches"] = len(names)
    if len(names) <= 8:
        record["kernels"] = [name[:100] for name in names]


def _capture(
    graphs: dict[str, Block],
    record: Record,
    case: Case,
    call: Callable[[int], Any],
    sets: int,
    exact: Sequence[Tensor],
    effort: Effort,
) -> None:
    """A graph to replay, if the variant can be captured and the replay computes what it should."""
    start = time.perf_counter()
    call(0)
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    stream = torch.cuda.current_stream()
    try:
        block = GraphBlock(call, sets, once, effort)
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # which a capture that CUDA ended leaves behind
        record["uncaptured"] = str(error).splitlines()[0][:200]
        return
    _, wrong = verdict(case, block.results_of_first_set(), exact)
    if wrong:
        record["wrong"] = f"replayed from a CUDA graph, {wrong}"
    else:
        graphs[record["variant"]] = block


def _rate(record: Record) -> None:
    """Bandwidth and arithmetic rate from the fewest bytes and operations, by device time."""
    seconds = record.get("device", record["wall"])["median"]
    if record["bytes"]:
        record["gb_per_s"] = significant(record["bytes"] / seconds / 1e9)
    if record["flops"]:
        record["tflop_per_s"] = significant(record["flops"] / seconds / 1e12)


# --- Inputs that the families share -------------------------------------------------------------


def feature_map(
    shape: Sequence[int],
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    generator: torch.Generator,
    *,
    requires_grad: bool = False,
) -> Tensor:
    """Random features whose channels differ in mean and scale, as those of a network do."""
    channels = shape[1]
    scale, mean = torch.randn(2, 1, channels, 1, 1, device=device, generator=generator)
    values = torch.randn(shape, device=device, generator=generator)
    values = (values * scale.exp() + mean).to(dtype)
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    return values.requires_grad_(requires_grad)


def product(**axes: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of some arguments."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
