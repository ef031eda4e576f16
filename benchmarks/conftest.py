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
        if isinstance(item, pytest.Function) and "benchmark" in item.fixturenames:
            case = item.callspec.params["case"]
            item.add_marker(pytest.mark.benchmark(group=case.key, timer=CLOCK, disable_gc=False))


class Session:
    """The device and effort of this run, and the file of the bench file at hand, if any."""

    def __init__(self, config: pytest.Config, part: str) -> None:
        self.device = _device()
        self.sizes: str = config.getoption("--sizes")
        self.effort = harness.EFFORTS[self.sizes]
        self._path: Path | None = config.getoption("--store")
        if self._path is not None:
            self._path = self._path / f"{part}.json"
        self._resume: bool = config.getoption("--resume")
        self._part: store.Part | None = None
        self._case: harness.Case | None = None
        self._records: dict[str, harness.Record] = {}

    def outcomes(self, case: harness.Case, variants: list[str]) -> dict[str, harness.Record]:
        """Records of the variants of a case, measured when the case is first asked for."""
        if case is not self._case:
            self._case = case
            self._records = self.stored(case, variants)
            if not self._records:
                self._records = harness.measure(case, variants, self.device, self.effort)
                self.add(list(self._records.values()))
        return self._records

    def stored(self, case: harness.Case, variants: list[str]) -> dict[str, harness.Record]:
        """Records that a resumed run holds, if it holds those of all these variants."""
        part = self._open()
        key = (case.op, case.shape, case.dtype, case.layout, case.mode)
        if part is None or not part.has(key, variants):
            return {}
        return {name: part.record(key, name) for name in variants}

    def add(self, records: list[harness.Record]) -> None:
        part = self._open()
        if part is not None:
            part.add({k: v for k, v in r.items() if k != "samples"} for r in records)

    def _open(self) -> store.Part | None:
        if self._part is None and self._path is not None:
            header = store.environment(self.device)
            header["ceilings"] = store.ceilings(self.device, quick=self.sizes == "tiny")
            self._part = store.Part(self._path, header, resume=self._resume)
        return self._part


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest) -> Session:
    name = request.module.__name__.rpartition(".")[2]
    return Session(request.config, name.removeprefix("bench_"))


@pytest.fixture
def record(request: pytest.FixtureRequest, session: Session, benchmark: Any) -> harness.Report:
    """Measure a variant of a case and report it; one that is wrong has no time.

    The test fails if that is fastgan, and is skipped, with the reason, if it is a competitor.
    """

    def report(case: harness.Case, variant: str) -> None:
        items = [item for item in request.session.items if isinstance(item, pytest.Function)]
        params = [item.callspec.params for item in items if hasattr(item, "callspec")]
        selected = [p["variant"] for p in params if p.get("case") is case]
        outcome = session.outcomes(case, selected)[variant]
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
