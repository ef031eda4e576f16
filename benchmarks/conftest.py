"""Runs cases as pytest-benchmark tests: `pytest benchmarks/bench_gram.py`.

Every test is one variant of one case. The first test of a case measures all its selected variants
by turns (harness.measure) and each hands its own samples to pytest-benchmark, whose table, JSON and
comparison work as usual; what pytest-benchmark has no column for is in `extra_info`. With
`--store` the records go to a folder that report.py reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import harness
import store


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgan")
    group.addoption(
        "--sizes",
        choices=tuple(harness.EFFORTS),
        default="gpu" if torch.cuda.is_available() else "cpu",
        help="set of shapes: by default that of the device",
    )
    group.addoption(
        "--store",
        nargs="?",
        type=Path,
        const=store.run_folder(_device()),
        help="folder for the results; without a value benchmarks/results/<device>",
    )
    group.addoption(
        "--resume", action="store_true", help="keep stored results of the same sources and device"
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A bench file's `cases(sizes)` become its tests, those of one case side by side."""
    if "variant" in metafunc.fixturenames:
        cases = metafunc.module.cases(metafunc.config.getoption("--sizes"))
        pairs = [(case, variant.name) for case in cases for variant in case.variants]
        ids = [f"{case}-{name.replace(' ', '-')}" for case, name in pairs]
        metafunc.parametrize(("case", "variant"), pairs, ids=ids)


class ReplayClock:
    """pytest-benchmark's timer: stands still except when a measured duration is replayed."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


CLOCK = ReplayClock()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and "variant" in item.fixturenames:
            case = item.callspec.params["case"]
            item.add_marker(pytest.mark.benchmark(group=case.key, timer=CLOCK, disable_gc=False))


class Runner:
    """Measures a case when the first of its variants is asked for."""

    def __init__(self, config: pytest.Config, part: str) -> None:
        self._effort = harness.EFFORTS[config.getoption("--sizes")]
        self._device = _device()
        self._folder: Path | None = config.getoption("--store")
        self._resume: bool = config.getoption("--resume")
        self._part_name = part
        self._part: store.Part | None = None
        self._case: harness.Case | None = None
        self._records: dict[str, harness.Record] = {}

    def outcome(self, case: harness.Case, variant: str, selected: list[str]) -> harness.Record:
        if case is not self._case:
            self._case = case
            self._records = self._measure(case, selected)
        return self._records[variant]

    def _measure(self, case: harness.Case, selected: list[str]) -> dict[str, harness.Record]:
        key = (case.op, case.shape, case.dtype, case.layout, case.mode)
        if self._folder is None:
            return harness.measure(case, selected, self._device, self._effort)
        if self._part is None:
            header = store.environment(self._device)
            quick = self._effort is harness.EFFORTS["tiny"]
            header["ceilings"] = store.ceilings(self._device, quick=quick)
            path = self._folder / f"{self._part_name}.json"
            self._part = store.Part(path, header, resume=self._resume)
        if self._part.has(key, selected):
            return {name: self._part.record(key, name) for name in selected}
        records = harness.measure(case, selected, self._device, self._effort)
        kept = [{k: v for k, v in r.items() if k != "samples"} for r in records.values()]
        self._part.add(kept)
        return records


@pytest.fixture(scope="module")
def _runner(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.config, request.module.__name__.rpartition(".")[2].removeprefix("bench_"))


@pytest.fixture
def record(request: pytest.FixtureRequest, _runner: Runner, benchmark: Any) -> harness.Report:
    """Measure a variant of a case and report it; one that is wrong has no time.

    The test fails if that is fastgan, and is skipped, with the reason, if it is a competitor.
    """

    def report(case: harness.Case, variant: str) -> None:
        items = [item for item in request.session.items if isinstance(item, pytest.Function)]
        params = [item.callspec.params for item in items if hasattr(item, "callspec")]
        selected = [p["variant"] for p in params if p.get("case") is case]
        outcome = _runner.outcome(case, variant, selected)
        reason = outcome.get("wrong") or outcome.get("failed")
        if reason and outcome["kind"] == "fastgan":
            pytest.fail(f"{case.key}, {variant}: {reason}", pytrace=False)
        elif reason:
            pytest.skip(f"{variant}: {reason}")
        samples = outcome.get("samples") or [outcome["wall"]["median"]]  # resumed: the median alone
        durations = iter(samples)
        benchmark.extra_info.update({k: v for k, v in outcome.items() if k != "samples"})
        benchmark.pedantic(lambda: CLOCK.advance(next(durations)), rounds=len(samples))

    return report
