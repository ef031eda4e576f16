"""The benchmarks: a wrong result gets no time, a slower one is noticed, a run can be resumed.

No test here depends on how fast anything is; durations that decide something are made up.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bench_training
import fastgan
import harness
import plots
import report
import step_trace
import store
from fastgan import reference
from harness import Case, Effort, Variant, eager, fused
from rows import rows_of
from step_experiments import TwoStreamCycleGAN
from targets import TARGETS, Target, over

CPU = torch.device("cpu")
QUICK = Effort(block_seconds=1e-5, rounds=(2, 2), case_seconds=0.0)
FAMILIES = ("bench_gram", "bench_instance_norm", "bench_gan_loss")
BENCHES = (*FAMILIES, "bench_training", "bench_inference", "bench_export")


def square_case(*variants: Variant, mode: str = "forward+backward", **fields: Any) -> Case:
    """x -> x² on a small tensor."""

    def inputs(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(2, 3, 4, 5, device=device, generator=generator).requires_grad_(),)

    return Case(
        **{"op": "square", "shape": "2x3x4x5", "dtype": "float32", "layout": "nchw"} | fields,
        mode=mode,
        inputs=inputs,
        exact=torch.square,
        variants=variants,
        bytes=480,
    )


def measure(case: Case) -> dict[str, harness.Record]:
    return harness.measure(case, [v.name for v in case.variants], CPU, QUICK)


# --- Right or wrong -----------------------------------------------------------------------------


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream * ctx.saved_tensors[0] * 2.001


def one_element_unwritten(x: Tensor) -> Tensor:
    out = torch.full_like(x, math.nan)
    out.view(-1)[:-1] = x.detach().view(-1)[:-1] ** 2
    return out


@pytest.mark.parametrize(
    ("mode", "wrong"),
    [
        ("forward", lambda x: x * x + 1e-3),
        ("forward", lambda x: (x * x)[:1]),
        ("forward", lambda x: (x * x, x)),
        ("forward", one_element_unwritten),
        ("forward+backward", WrongGradient.apply),
    ],
)
def test_a_wrong_variant_is_named_and_not_timed(mode: str, wrong: Any) -> None:
    records = measure(square_case(eager("right", torch.square), fused(wrong), mode=mode))
    assert "wrong" in records["fastgan"]
    assert "wall" not in records["fastgan"]
    assert "gb_per_s" not in records["fastgan"]
    assert records["right"]["wall"]["median"] > 0


def test_a_wrong_kernel_of_a_family_is_wrong_in_its_benchmark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("bench_gan_loss")
    right = reference.discriminator_loss
    monkeypatch.setattr(
        fastgan, "discriminator_loss", lambda r, f, mode: 1.001 * right(r[0], f[0], mode)
    )
    case = module.discriminator_case([(2, 1, 5, 7)], torch.float32, "bce", "forward+backward")
    records = harness.measure(case, ["public", "fastgan"], CPU, QUICK)
    assert "wrong" in records["fastgan"]
    assert "wall" in records["public"]


def test_a_variant_that_raises_is_one_failed_cell() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    records = measure(square_case(eager("right", torch.square), fused(broken)))
    assert records["fastgan"]["failed"] == "RuntimeError: no such kernel"
    assert "wall" in records["right"]


def test_vanishing_gradients_are_scaled_before_they_are_compared() -> None:
    """In fp16 the gradient of 1e-9 times a mean over 1e6 elements is 0; scaled it is not."""

    def inputs(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(10**6, generator=generator).half().requires_grad_(),)

    def tiny(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32)).mean() * 1e-9

    case = square_case(fused(tiny))
    case = Case(**{**vars(case), "inputs": inputs, "exact": tiny})
    assert "wall" in measure(case)["fastgan"]


@pytest.mark.parametrize("name", BENCHES)
def test_every_form_in_the_benchmarks_computes_the_same(name: str) -> None:
    module = importlib.import_module(name)
    for case in module.cases("tiny"):
        names = [variant.name for variant in case.variants if "compile" not in variant.name]
        for variant, record in harness.measure(case, names, CPU, QUICK).items():
            assert "wall" in record, f"{case.key}, {variant}: {record}"


@pytest.mark.parametrize("sizes", sorted(harness.EFFORTS))
@pytest.mark.parametrize("name", BENCHES)
def test_cases_differ_in_their_keys(name: str, sizes: str) -> None:
    keys = [case.key for case in importlib.import_module(name).cases(sizes)]
    assert keys or (name, sizes) == ("bench_export", "gpu")
    assert len(set(keys)) == len(keys)


# --- What is recorded ---------------------------------------------------------------------------


def test_variants_take_turns() -> None:
    order: list[str] = []

    def block(name: str) -> harness.Block:
        def run() -> float:
            order.append(name)
            return 1.0

        return run

    effort = Effort(block_seconds=1.0, rounds=(3, 3), case_seconds=0.0)
    samples = harness.sample({name: block(name) for name in "abc"}, effort)
    assert order == list("abc" + "bca" + "cab")
    assert samples == {name: [1.0] * 3 for name in "abc"}


def test_rounds_stop_at_their_maximum_or_with_the_time() -> None:
    endless = Effort(block_seconds=1.0, rounds=(2, 5), case_seconds=1e9)
    over_time = Effort(block_seconds=1.0, rounds=(2, 5), case_seconds=-1.0)
    assert len(harness.sample({"a": lambda: 1.0}, endless)["a"]) == 5
    assert len(harness.sample({"a": lambda: 1.0}, over_time)["a"]) == 2


def test_summary_is_the_median_and_the_quartiles() -> None:
    found = harness.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"median": 3.0, "q1": 2.0, "q3": 4.0, "rounds": 5}


def test_rates_are_of_the_fewest_bytes_and_of_device_time() -> None:
    record = {
        "bytes": 6_000_000,
        "flops": 10**9,
        "wall": {"median": 1.0},
        "device": {"median": 2e-3},
    }
    harness._rate(record)
    assert record["gb_per_s"] == 3.0
    assert record["tflop_per_s"] == 0.5


def test_the_implementation_that_ran_is_recorded() -> None:
    x = torch.randn(1, 2, 3, 4)
    case = square_case(
        fused(lambda x: fastgan.adain(x, x, impl="reference") * 0 + x * x), mode="forward"
    )
    assert measure(case)["fastgan"]["impl"] == "reference"
    assert fastgan.explain(fastgan.adain, x, x).impl is not None  # the hook is gone again


def test_saved_bytes_count_each_storage_once_and_no_input() -> None:
    x = torch.randn(10, requires_grad=True)

    def forward() -> Tensor:
        once = x.exp()  # saved by exp, and by the product, as one storage
        return once * once

    assert harness.saved_bytes(forward, [x]) == 40


def test_inputs_are_twice_the_cache_on_a_gpu_and_single_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: types.SimpleNamespace(L2_cache_size=1000),
    )
    case = square_case()
    assert harness.set_count(case, CPU, 10) == 1
    assert harness.set_count(case, gpu, 150) == 14
    assert harness.set_count(case, gpu, 10**6) == 1
    assert harness.set_count(square_case(rotate=False), gpu, 10) == 1


# --- Device time, with a stand-in for CUDA graphs -----------------------------------------------


class Recorder(TorchDispatchMode):
    """Notes every op of a capture, so that a replay can write the same storages again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class FakeGraph:
    """torch.cuda.CUDAGraph as far as the harness uses it; every replay takes one millisecond."""

    clock = 0.0

    def __init__(self) -> None:
        self.recorder = Recorder()

    def replay(self) -> None:
        FakeGraph.clock += 1.0
        for func, args, kwargs, out in self.recorder.calls:
            again = func(*args, **kwargs)
            if isinstance(out, Tensor) and not func.is_view:
                out.copy_(again)


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = FakeGraph.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.time - self.time


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def capture(graph: FakeGraph, stream: Any) -> Iterator[None]:
        with graph.recorder:
            yield

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": FakeGraph,
        "Event": FakeEvent,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "graph": capture,
        "synchronize": lambda *device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.usefixtures("fake_cuda")
def test_device_time_is_that_of_a_replay_over_its_calls() -> None:
    sets = [torch.randn(3) for _ in range(4)]
    effort = Effort(block_seconds=5e-3, rounds=(1, 1), case_seconds=0.0)
    block = harness.GraphBlock(lambda i: [sets[i % 4] * 2], 4, 1e-3, effort)
    # 5 ms of calls that take 1 ms are 5, rounded up to all sets once more: 8 calls to a replay
    assert block() == pytest.approx(1e-3 / 8)
    results = block.results_of_first_set()
    assert torch.equal(results[0], sets[0] * 2)


@pytest.mark.usefixtures("fake_cuda")
def test_a_replay_that_leaves_results_unwritten_is_wrong() -> None:
    case = square_case(mode="forward")
    x = torch.randn(2, 3)
    written_once = x * x
    graphs: dict[str, harness.Block] = {}
    record: harness.Record = {"variant": "fastgan"}
    harness._capture(graphs, record, case, lambda i: [written_once], 1, [x.double() ** 2], QUICK)
    assert "replayed" in record["wrong"]
    assert not graphs


@pytest.mark.usefixtures("fake_cuda")
def test_a_variant_that_cannot_be_captured_keeps_its_host_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams: list[object] = []  # a capture that fails may leave its own one current
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    calls = iter(range(4))  # the probe and the warm-up go well

    def call(index: int) -> list[Tensor]:
        if next(calls, None) is None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return [torch.ones(1)]

    record: harness.Record = {"variant": "eager"}
    graphs: dict[str, harness.Block] = {}
    harness._capture(graphs, record, square_case(), call, 1, [torch.ones(1).double()], QUICK)
    assert record["uncaptured"] == "operation not permitted when stream is capturing"
    assert "wrong" not in record
    assert not graphs
    assert streams == [torch.cuda.current_stream()]


# --- What might speed a step up -----------------------------------------------------------------


def on_a_gpu(experiment: dict[str, Any]) -> Any:
    return pytest.param("cuda", {"engine": "graph", **experiment}, marks=pytest.mark.gpu)


@pytest.mark.parametrize(
    ("device", "experiment"),
    [
        ("cpu", {"padded": True}),
        on_a_gpu({"padded": True}),
        on_a_gpu({"kind": TwoStreamCycleGAN}),
        on_a_gpu({"tune": True}),
        on_a_gpu({"engine": "compiled graph"}),
    ],
)
def test_experiments_with_a_step_do_not_change_it(device: str, experiment: dict[str, Any]) -> None:
    setting = bench_training.Setting("cyclegan", bench_training.TINY_CYCLEGAN, 2, 24)
    images = torch.rand(2, 2, 3, 24, 24, device=device, dtype=torch.float64)
    weights = []
    for options in ({"engine": "graph" if device == "cuda" else "eager"}, experiment):
        step = bench_training.RecipeStep(setting, **options)
        for _ in range(8):
            step(*images)
        weights.append(torch.cat([p.detach().flatten() for p in step._recipe.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)


# --- Where a step's time goes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["sm90_xmma_fprop_implicit_gemm", "aten::cudnn_convolution", "aten::conv2d"],
            "convolution",
        ),
        (
            ["void at::native::vectorized_elementwise_kernel", "aten::copy_", "aten::conv2d"],
            "casts",
        ),
        (["nchwToNhwcKernel", "aten::cudnn_convolution"], "casts"),
        (["reduce_kernel", "aten::sum", "ConvolutionBackward0"], "convolution"),
        (["elementwise_kernel", "aten::batch_norm", "aten::instance_norm"], "norm"),
        (["instance_norm_fwd_kernel", "fastgan::instance_norm"], "norm"),
        (["elementwise_kernel", "aten::threshold_backward", "ReluBackward0"], "activation"),
        (["elementwise_kernel", "aten::leaky_relu_"], "activation"),
        (["reflection_pad2d_out_kernel", "aten::reflection_pad2d"], "padding"),
        (["gram_fwd_kernel", "fastgan::gram_matrix"], "loss"),
        (["elementwise_kernel", "aten::mse_loss"], "loss"),
        (["elementwise_kernel", "aten::mul", "Optimizer.step#Adam.step"], "optimizer"),
        (["multi_tensor_apply_kernel", "aten::_fused_adam_"], "optimizer"),
        (["Memcpy HtoD (Pinned -> Device)", "aten::copy_"], "data"),
        (["elementwise_kernel", "aten::div_", step_trace.DATA], "data"),
        (["triton_poi_fused_convolution_relu_3", "Torch-Compiled Region"], "activation"),
        (["triton_poi_fused_convolution_4"], "other"),
        (["elementwise_kernel", "aten::add"], "other"),
    ],
)
def test_work_is_told_apart_by_its_names(names: list[str], expected: str) -> None:
    assert step_trace.category([*names, step_trace.STEP]).startswith(expected)


def write_trace(path: Path, events: list[dict[str, Any]]) -> Path:
    defaults = {"ph": "X", "pid": 1, "tid": 1}
    metadata = {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}
    path.write_text(json.dumps({"traceEvents": [metadata, *(defaults | e for e in events)]}))
    return path


def host(name: str, ts: float, dur: float, identity: int = 0, **more: Any) -> dict[str, Any]:
    event = {"cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "args": {"External id": identity}}
    return event | more


def kernel(name: str, ts: float, dur: float, identity: int) -> dict[str, Any]:
    return host(name, ts, dur, identity, cat="kernel", pid=0, tid=7)


def step_label(ts: float, dur: float) -> dict[str, Any]:
    return {"cat": "user_annotation", "name": step_trace.STEP, "ts": ts, "dur": dur}


def test_a_gpu_step_is_its_kernels_and_the_gaps_between_them(tmp_path: Path) -> None:
    trace = write_trace(
        tmp_path / "trace.json",
        [
            step_label(0, 50),
            host("aten::conv2d", 0, 20, 1),
            host("aten::cudnn_convolution", 5, 10, 2),
            host("aten::relu", 30, 5, 3),
            kernel("implicit_gemm", 20, 30, 2),
            kernel("elementwise_kernel", 60, 20, 3),
            kernel("elementwise_kernel", 60, 20, 3),  # at once, on another stream
        ],
    )
    found = step_trace.read(trace)
    assert found.seconds == pytest.approx(80e-6)
    nonzero = {name: seconds for name, seconds in found.categories.items() if seconds}
    share = 50 / 70  # of the time in which kernels ran, over the sum of theirs
    assert nonzero == pytest.approx(
        {
            step_trace.CONVOLUTION: 30e-6 * share,
            "activation": 40e-6 * share,
            step_trace.GAPS: 30e-6,
        }
    )
    without_profiler = step_trace.read(trace, seconds=60e-6)
    assert without_profiler.seconds == pytest.approx(60e-6)
    assert without_profiler.categories[step_trace.GAPS] == pytest.approx(10e-6)


def test_a_cpu_step_is_its_ops_and_what_is_outside_of_them(tmp_path: Path) -> None:
    trace = write_trace(
        tmp_path / "trace.json",
        [
            host("aten::mul", 0, 5),  # before the steps
            step_label(10, 100),
            host("aten::conv2d", 10, 60),
            host("aten::_to_copy", 20, 15),
            host("Optimizer.step#Adam.step", 80, 20, cat="user_annotation"),
            host("aten::mul", 85, 10),
            step_label(110, 100),
        ],
    )
    found = step_trace.read(trace)
    assert found.seconds == pytest.approx(100e-6)
    nonzero = {name: seconds for name, seconds in found.categories.items() if seconds}
    assert nonzero == pytest.approx(
        {
            step_trace.CONVOLUTION: 45e-6 / 2,
            "casts and copies": 15e-6 / 2,
            "optimizer": 20e-6 / 2,
            step_trace.GAPS: 120e-6 / 2,
        }
    )


def test_launches_are_kernels_copies_and_fills(tmp_path: Path) -> None:
    trace = write_trace(
        tmp_path / "trace.json",
        [
            host("aten::mul", 0, 5, 1),
            kernel("second", 20, 1, 1),
            kernel("first", 10, 1, 1) | {"cat": "gpu_memcpy"},
            kernel("third", 30, 1, 1) | {"cat": "gpu_memset"},
            kernel("a label around them", 10, 30, 1) | {"cat": "gpu_user_annotation"},
            host("cudaLaunchKernel", 2, 1, 1, cat="cuda_runtime"),
        ],
    )
    assert step_trace.device_work(trace) == ["first", "second", "third"]


def test_a_trace_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no range called"):
        step_trace.read(write_trace(tmp_path / "trace.json", [host("aten::mul", 0, 5)]))


def test_a_profiled_step_adds_up(tmp_path: Path) -> None:
    """Through torch's profiler: the plain CycleGAN, whose time is in convolutions and norms."""
    module = importlib.import_module("bench_breakdown")
    case = next(module.cases("tiny"))
    record = module.breakdown(case, "public fp32", CPU, 1, tmp_path)
    times = record["categories"]
    assert set(times) == set(step_trace.CATEGORIES)
    assert sum(times.values()) == pytest.approx(record["seconds"], rel=1e-2)
    assert all(
        times[name] > 0
        for name in ("norm", "padding", "loss", "optimizer", "data", step_trace.CONVOLUTION)
    )


# --- Stored runs --------------------------------------------------------------------------------


def header(device_type: str = "cpu", **fields: Any) -> store.Record:
    gpu = {"driver": "580", "cuda": "13.0"} if device_type == "cuda" else {}
    return {
        **store.environment(CPU),
        "device": "Test GPU" if device_type == "cuda" else "Test CPU",
        "device_type": device_type,
        "ceilings": {"copy_gb_per_s": 100.0, "matmul_float32_tflop_per_s": 1.0},
        **gpu,
        **fields,
    }


def result(variant: str, kind: str, median: float, spread: float = 0.01, **fields: Any) -> Any:
    timing = {
        "median": median,
        "q1": median * (1 - spread),
        "q3": median * (1 + spread),
        "rounds": 9,
    }
    return {
        "op": "adain",
        "shape": "8x64x256x256",
        "dtype": "bfloat16",
        "layout": "channels_last",
        "mode": "forward+backward",
        "variant": variant,
        "kind": kind,
        "bytes": 10**9,
        "flops": None,
        "wall": timing,
        "gb_per_s": 1 / median,
        **({"impl": "triton"} if kind == "fastgan" else {}),
        **fields,
    }


def part(*records: Any, device_type: str = "cpu") -> store.Record:
    return {**header(device_type), "records": list(records)}


def test_a_cut_off_run_is_resumed_from_the_same_sources_only(tmp_path: Path) -> None:
    path = tmp_path / "gram.json"
    record = result("fastgan", "fastgan", 1.0)
    store.Part(path, header(), resume=False).add([record])
    case = store.case_of(record)
    assert store.Part(path, header(), resume=True).has(case, ["fastgan"])
    assert not store.Part(path, header(), resume=True).has(case, ["fastgan", "public"])
    assert not store.Part(path, header(sources="other"), resume=True).has(case, ["fastgan"])
    assert not store.Part(path, header(), resume=False).has(case, ["fastgan"])
    assert [p.name for p in tmp_path.iterdir()] == ["gram.json"]


def test_stored_files_have_a_record_to_a_line(tmp_path: Path) -> None:
    path = tmp_path / "gram.json"
    stored = store.Part(path, header(), resume=False)
    stored.add([result("public", "eager", 2.0)])
    stored.add([result("fastgan", "fastgan", 1.0)])
    assert [r["variant"] for r in json.loads(path.read_text())["records"]] == ["public", "fastgan"]
    assert sum('"variant"' in line for line in path.read_text().splitlines()) == 2


def test_the_environment_says_what_a_reader_needs() -> None:
    found = store.environment(CPU)
    assert {"device", "torch", "triton", "commit", "sources", "date", "threads"} <= found.keys()
    assert found["torch"] == torch.__version__


def test_ceilings_are_positive() -> None:
    assert all(value > 0 for value in store.ceilings(CPU, quick=True).values())


# --- Two runs -----------------------------------------------------------------------------------


def run_of(fastgan_seconds: float, others: float = 1.0, **fields: Any) -> dict[str, store.Record]:
    return {
        "instance_norm": part(
            result("public", "eager", 4.0 * others),
            result("torch.compile", "compile", 2.0 * others),
            result("fastgan", "fastgan", fastgan_seconds, **fields),
        )
    }


def test_the_same_speed_twice_is_no_regression() -> None:
    assert not list(report.regressions(run_of(1.0), run_of(1.0)))
    assert not list(report.regressions(run_of(1.0), run_of(1.05)))


def test_a_slower_op_is_a_regression() -> None:
    [line] = report.regressions(run_of(1.0), run_of(1.3))
    assert "1.30x slower" in line
    assert "adain" in line


def test_a_slower_machine_is_no_regression() -> None:
    assert not list(report.regressions(run_of(1.0), run_of(1.5, others=1.5)))


def test_what_noise_explains_is_no_regression() -> None:
    assert not list(report.regressions(run_of(1.0, spread=0.2), run_of(1.3, spread=0.2)))


def test_competitors_that_disagree_are_noise() -> None:
    """As where one of them, and not the op, found its memory in another state."""
    old, new = run_of(1.0), run_of(1.0)
    new["instance_norm"]["records"][0]["wall"]["median"] = 2.0
    assert not list(report.regressions(old, new))
    assert list(report.regressions(run_of(1.0), run_of(1.0, others=0.4)))


def test_an_op_that_became_wrong_is_a_regression() -> None:
    new = run_of(1.0)
    record = new["instance_norm"]["records"][-1]
    del record["wall"]
    record["wrong"] = "result 0 is off"
    [line] = report.regressions(run_of(1.0), new)
    assert "wrong: result 0 is off" in line


def test_an_artificially_slowed_op_is_flagged_from_its_measurement() -> None:
    """Through sampling, with made-up durations that jitter by a few percent."""

    def measured(slowdown: float) -> dict[str, store.Record]:
        def block(median: float) -> harness.Block:
            jitter = iter([1.0, 1.03, 0.98, 1.01, 0.99, 1.02, 0.97, 1.0, 1.01] * 10)
            return lambda: median * next(jitter)

        blocks = {"public": block(4e-3), "fastgan": block(1e-3 * slowdown)}
        samples = harness.sample(blocks, Effort(1.0, (9, 9), 0.0))
        kinds = {"public": "eager", "fastgan": "fastgan"}
        records = [
            {**result(name, kinds[name], 1.0), "wall": harness.summary(seconds)}
            for name, seconds in samples.items()
        ]
        return {"instance_norm": part(*records)}

    assert not list(report.regressions(measured(1.0), measured(1.0)))
    assert list(report.regressions(measured(1.0), measured(1.25)))


def test_comparing_is_a_command_whose_exit_code_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, median in (("old", 1.0), ("new", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "instance_norm.json").write_text(
            json.dumps(run_of(median)["instance_norm"])
        )
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    assert report.main(["--base", old, new]) == 1
    assert "2.00x slower" in capsys.readouterr().out
    assert report.main(["--base", old, old]) == 0


# --- The report ---------------------------------------------------------------------------------


def gpu_run() -> dict[str, store.Record]:
    device = {"median": 1e-3, "q1": 1e-3, "q3": 1e-3, "rounds": 9}
    own = result("fastgan", "fastgan", 2e-3, device=device, launches=4, peak_memory=10**6)
    public = result("public", "eager", 8e-3, device={**device, "median": 6e-3}, launches=31)
    public["peak_memory"] = 3 * 10**6
    wrong = result("torch.compile", "compile", 1.0)
    del wrong["wall"]
    wrong["wrong"] = "result 0 is off by 1e+00"
    return {"instance_norm": part(public, wrong, own, device_type="cuda")}


def test_a_row_compares_device_time_with_device_time() -> None:
    [row] = rows_of(gpu_run()["instance_norm"])
    assert row.speedup("eager") == pytest.approx(6.0)
    assert row.speedup("eager", clock="wall") == pytest.approx(4.0)
    assert row.speedup("compile") is None


def test_a_variant_without_device_time_is_compared_by_host_time() -> None:
    run = gpu_run()
    del run["instance_norm"]["records"][0]["device"]
    [row] = rows_of(run["instance_norm"])
    assert row.speedup("eager") == pytest.approx(4.0)


def test_targets_are_met_missed_or_not_measured() -> None:
    run = {"instance_norm": rows_of(gpu_run()["instance_norm"])}

    def judged(bound: float, part: str = "instance_norm", at_most: bool = False) -> str:
        target = Target("x", "y", "cuda", part, lambda row: True, over("eager"), bound, at_most)
        return target.judge(run).text

    assert judged(5.0) == "met"
    assert judged(7.0) == "missed"
    assert judged(7.0, at_most=True) == "met"
    assert judged(5.0, at_most=True) == "missed"
    assert judged(5.0, part="gram") == "not measured"


def test_a_wrong_row_meets_no_target() -> None:
    run = gpu_run()
    own = run["instance_norm"]["records"][-1]
    del own["wall"]
    own["wrong"] = "result 0 is off by 1e+00"
    target = Target("x", "y", "cuda", "instance_norm", lambda row: True, over("eager"), 1.0)
    assert target.judge({"instance_norm": rows_of(run["instance_norm"])}).text == "missed"


def test_no_experiment_meets_a_target() -> None:
    run = gpu_run()
    run["instance_norm"]["records"].append(
        result("fastgan graph, two streams", "experiment", 1e-6, device={"median": 1e-6})
    )
    [row] = rows_of(run["instance_norm"])
    assert row.speedup("eager") == pytest.approx(6.0)


def test_the_reference_path_meets_no_target() -> None:
    run = gpu_run()
    run["instance_norm"]["records"][-1]["impl"] = "reference"
    rows = {"instance_norm": rows_of(run["instance_norm"])}
    target = Target("x", "y", "cuda", "instance_norm", lambda row: True, over("eager"), 1.0)
    assert target.judge(rows).text == "not measured"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_target_of_a_family_has_a_row_that_can_decide_it(name: str) -> None:
    """A target that no benchmark measures would stay open for ever."""
    module = importlib.import_module(name)
    family = name.removeprefix("bench_")
    for device_type, sizes in (("cuda", "gpu"), ("cpu", "cpu")):
        records = [
            {**result("fastgan", "fastgan", 1.0), **{f: getattr(case, f) for f in store.CASE}}
            for case in module.cases(sizes)
        ]
        rows = rows_of(part(*records, device_type=device_type))
        for target in TARGETS:
            if (target.part, target.device_type) == (family, device_type):
                assert any(target.applies(row) for row in rows), (target.what, target.figure)


def test_the_page_shows_times_refusals_and_verdicts(tmp_path: Path) -> None:
    page = report.results_page({"test-gpu": gpu_run()})
    assert "6.00x" in page
    assert "| wrong |" in page
    assert "torch.compile: result 0 is off by 1e+00" in page
    assert "4 (31)" in page
    assert "No GPU has been measured yet" not in page
    assert "AdaIN forward+backward | over eager | ≥ 2.5 | met: 6.00 |" in page
    assert "not measured" in page
    assert "No GPU has been measured yet" in report.results_page({"test-cpu": run_of(1.0)})


def test_the_readme_section_is_rewritten_between_its_markers() -> None:
    start, end = report.MARKERS
    text = f"before\n{start}\nold\n{end}\nafter\n"
    section = report.readme_section({"test-cpu": run_of(1.0)})
    new = report.rewrite_between_markers(text, section)
    assert new.startswith(f"before\n{start}\n")
    assert new.endswith(f"{end}\nafter\n")
    assert "old" not in new
    assert "| adain, forward+backward | 1 | 4.0x | 2.0x |" in new
    assert report.rewrite_between_markers(new, section) == new
    with pytest.raises(ValueError, match="markers"):
        report.rewrite_between_markers("no markers", section)


def test_the_readme_claims_nothing_for_the_reference_path() -> None:
    section = report.readme_section({"test-cpu": run_of(1.0, impl="reference")})
    assert "4.0x" not in section
    assert "No kernels there, so plain PyTorch: adain forward+backward." in section


def test_the_page_shows_where_a_step_s_time_goes(tmp_path: Path) -> None:
    times = dict.fromkeys(step_trace.CATEGORIES, 0.0) | {
        step_trace.CONVOLUTION: 8.5e-3,
        step_trace.GAPS: 1.5e-3,
    }
    record = result("fastgan", "fastgan", 1.0, op="cyclegan step", shape="8x3x256x256")
    record |= {"mode": "breakdown", "seconds": 1e-2, "categories": times}
    del record["wall"]
    run = {"breakdown": part(record, device_type="cuda")}
    page = report.results_page({"test-gpu": run})
    assert "| fastgan | 10 ms | 85.0% | 15.0% |" in page
    assert "convolutions and GEMMs | of device time | ≥ 0.8 | met: 1.00 |" in page
    plots.draw(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["breakdown.svg"]


def test_report_writes_the_page_and_the_plots(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "test-gpu"
    folder.mkdir(parents=True)
    run = gpu_run()
    product = [
        {**record, "op": "gram_matrix", "flops": 10**12, "tflop_per_s": 0.5}
        for record in run["instance_norm"]["records"]
    ]
    run["gram"] = {**run["instance_norm"], "records": product}
    for name, content in run.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    page = tmp_path / "RESULTS.md"
    arguments = ["--results", str(tmp_path / "results"), "--output", str(page)]
    assert report.main(arguments) == 0
    drawn = {path.name: path.read_bytes() for path in folder.glob("*.svg")}
    assert set(drawn) == {"gram.svg", "instance_norm.svg", "roofline.svg"}
    assert all(f"results/test-gpu/{name}" in page.read_text() for name in drawn)
    plots.draw(run, folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.svg")} == drawn


# --- The whole way ------------------------------------------------------------------------------


@pytest.mark.slow
def test_pytest_benchmark_runs_stores_resumes_and_refuses_a_wrong_kernel(tmp_path: Path) -> None:
    sabotage = tmp_path / "sabotage.py"
    sabotage.write_text(
        "import fastgan\n"
        "right = fastgan.generator_loss\n"
        "fastgan.generator_loss = lambda *a, **k: right(*a, **k) * 1.01\n"
    )
    folder, table = tmp_path / "run", tmp_path / "table.json"
    command = [
        *(sys.executable, "-m", "pytest", "benchmarks/bench_gan_loss.py", "--sizes", "tiny"),
        *("-k", "bce and forward and not compile and not backward", "-p", "sabotage"),
        *(f"--benchmark-json={table}", "--store", str(folder), "--resume", "-q"),
    ]
    environment = {
        # pytest-benchmark would take itself for a worker of this test run and measure nothing
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")},
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{store.ROOT}",
        "OMP_NUM_THREADS": "1",
    }

    def run() -> str:
        done = subprocess.run(
            command, cwd=store.ROOT, env=environment, capture_output=True, text=True
        )
        return done.stdout

    first = run()
    assert "1 failed, 5 passed" in first, first
    assert "generator_loss bce" in first
    assert "is off by" in first
    stored = json.loads((folder / "gan_loss.json").read_text())
    assert len(stored["records"]) == 6
    [wrong] = [record for record in stored["records"] if "wrong" in record]
    assert (wrong["op"], wrong["variant"]) == ("generator_loss bce", "fastgan")
    listed = json.loads(table.read_text())["benchmarks"]
    medians = {bench["extra_info"]["variant"]: bench["stats"]["median"] for bench in listed}
    assert len(listed) == 5
    assert all(median > 0 for median in medians.values())

    before = (folder / "gan_loss.json").read_text()
    assert "1 failed, 5 passed" in run()
    assert (folder / "gan_loss.json").read_text() == before  # nothing was measured again
