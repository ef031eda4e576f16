"""Several processes, and several passes per update, are one process with a larger batch."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import scaling
from distributed_worker import CONFIGS, STEPS, STOP, train
from dummy_recipe import Dummy
from fastgan import checkpoint
from fastgan.recipes import RECIPES
from fastgan.recipes.unit import UNIT
from fastgan.run_folder import RunFolder
from fastgan.training import distributed
from fastgan.training.config import Training
from fastgan.training.data import Augmentation, PictureStream
from fastgan.training.distributed import Exchange, own_device
from fastgan.training.engine import phase_parameters
from pictures import write_folders
from test_resume import assert_same_training

every_recipe = pytest.mark.parametrize("recipe", CONFIGS)

RTOL = 1e-9


def torchrun(
    script: str, *arguments: object, options: Sequence[str] = (), **environment: object
) -> subprocess.CompletedProcess[str]:
    """A script of this folder in two processes."""
    if script == "dummy_recipe.py":
        pytest.importorskip("tyro", reason="the command line needs the extra [train]")
    tests = Path(__file__).parent
    paths = [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(*options, str(tests / script), *map(str, arguments)),
    ]
    process = subprocess.Popen(
        command,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            **{name: str(value) for name, value in environment.items()},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends what it has started
        process.communicate(timeout=60)
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def said(process: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that fastgan wrote, but for the progress bar."""
    lines = process.stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("fastgan: ")]


Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Fills a folder of that name once for all of xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def fill(name: str, work: Callable[[Path], None]) -> Path:
        folder = root / f"distributed-{name}"
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = folder.with_suffix(".done")
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                work(folder)
                done.touch()
        return folder

    return fill


@pytest.fixture(scope="module")
def data(once: Once) -> Path:
    names = ("trainA", "trainB", "content", "style")

    def work(root: Path) -> None:
        write_folders(root, names)
        with contextlib.suppress(OSError):  # some systems want UTF-8
            for path in (root / "content").iterdir():
                path.rename(path.with_name(f"caf\udce9-{path.name}"))

    return once("data", work)


@pytest.fixture(scope="module")
def one(data: Path, once: Once) -> Path:
    """What one process left, with twice the batch."""

    def work(out: Path) -> None:
        for name in CONFIGS:
            train(name, data, out, batch_size=2)

    return once("one", work)


@pytest.fixture(scope="module")
def two(data: Path, one: Path, once: Once) -> Path:
    """What two processes left: whole, in parts, and in graphs."""

    def work(out: Path) -> None:
        ended = torchrun("distributed_worker.py", data, out, one, FAULT_RANK=1)
        assert ended.returncode == 0, ended.stderr

    return once("two", work)


def losses_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_equal_training(ours: Path, theirs: Path) -> None:
    """Every loss and metric of every step and, after the last, weights and averages."""
    losses, expected = losses_of(ours), losses_of(theirs)
    assert len(losses) == len(expected) == STEPS
    for line, other in zip(losses, expected, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            statistic = name.endswith(("_mean", "_accuracy"))  # fp32
            rtol, atol = (1e-6, 1e-7) if statistic else (RTOL, 1e-12)
            assert line[name] == pytest.approx(value, rel=rtol, abs=atol), name
    state, other = (checkpoint.load(run / "latest.safetensors") for run in (ours, theirs))
    for section in ("networks", "average"):
        assert state[section].keys() == other[section].keys()
        for name, value in other[section].items():
            assert value.dtype == torch.float64
            scale = value.abs().max().item()
            torch.testing.assert_close(
                state[section][name], value, rtol=RTOL, atol=RTOL * scale, msg=name
            )


@pytest.mark.slow
@every_recipe
def test_two_processes_equal_one_with_twice_the_batch(recipe: str, two: Path, one: Path) -> None:
    assert_equal_training(two / "whole" / recipe, one / recipe)


@pytest.mark.slow
@every_recipe
def test_two_passes_equal_one_with_twice_the_batch(
    recipe: str, data: Path, one: Path, tmp_path: Path
) -> None:
    train(recipe, data, tmp_path, accumulate=2)
    assert_equal_training(tmp_path / recipe, one / recipe)


@pytest.mark.slow
@every_recipe
def test_two_processes_resume_to_the_bit(recipe: str, two: Path) -> None:
    assert [path.stem[-1] for path in RunFolder(two / "parts" / recipe).checkpoints()] == [
        str(STOP),
        str(STEPS),
    ]
    assert_same_training(two / "parts" / recipe, two / "whole" / recipe)


@pytest.mark.slow
@every_recipe
def test_pieces_of_a_step_in_graphs(recipe: str, two: Path) -> None:
    assert_same_training(two / "graph" / recipe, two / "whole" / recipe)


@pytest.mark.slow
def test_the_first_process_alone_writes(two: Path) -> None:
    assert (two / "whole").exists()
    assert not (two / "of-another").exists()


@pytest.mark.slow
def test_each_process_has_random_numbers_and_a_pool_of_its_own(two: Path) -> None:
    state = checkpoint.load(two / "whole" / "cyclegan" / "latest.safetensors")
    (other,) = state["other_processes"]
    assert not torch.equal(other["rng"]["torch"], state["rng"]["torch"])
    pool, others_pool = (part["training_state"]["pools.A.images"] for part in (state, other))
    assert not torch.equal(others_pool, pool)
    assert pool[:STEPS].flatten(1).any(1).all()
    assert others_pool[:STEPS].flatten(1).any(1).all()


@pytest.mark.slow
def test_another_number_of_processes_is_refused(data: Path, two: Path, one: Path) -> None:
    with pytest.raises(ValueError, match=r"was trained by 2 processes and cannot be resumed by 1:"):
        train("unit", data, two / "whole", resume=True, steps=STEPS + 1)
    for rank in range(2):
        reason = found_by(rank, two)["refused"]
        assert "was trained by 1 process and cannot be resumed by 2: " in reason


def found_by(rank: int, two: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((two / f"{rank}.json").read_text())
    return found


@pytest.mark.slow
def test_a_gradient_not_finite_in_one_process_is_skipped_by_all(two: Path) -> None:
    scales, updates = [], []
    for run in ("sound", "gradient"):
        state = checkpoint.load(two / run / "latest.safetensors")
        scales.append(state["scaler"]["scale"])
        updates.append(float(state["optimizers"]["generator"]["generator.0.weight"]["step"]))
    assert scales[1] == scales[0] / 2
    assert updates[1] == updates[0] - 1
    assert found_by(0, two)["weights"] == found_by(1, two)["weights"]


@pytest.mark.slow
def test_a_loss_not_finite_in_one_process_stops_all(data: Path, two: Path) -> None:
    stream = PictureStream(
        {domain: data / domain for domain in Dummy.domains},
        Augmentation(size=32, resize=40),
        batch_size=2,
        rank=1,
        world_size=2,
    )
    pictures = ", ".join(map(str, stream.batch(5).paths))
    for rank in range(2):
        assert found_by(rank, two)["fault"] == (
            f"step 6: the loss generator/content is not finite; pictures: {pictures}; "
            "last good checkpoint: none"
        )


# --- What ends one process ends all -------------------------------------------------------------


@pytest.fixture(scope="module")
def dummy_flags(data: Path) -> list[object]:
    own = ["--content", data / "content", "--style", data / "style", "--device", "cpu"]
    return ["dummy", *own, "--steps", 12, "--checkpoint-every", 3, "--workers", 0]


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_all_resume(
    dummy_flags: list[object], tmp_path: Path
) -> None:
    """Those say so themselves, which they could not if they had waited for torchrun's SIGKILL.

    torchrun starts them all again, with the same flags.
    """
    killed = {"SIGNAL_STEP": 7, "SIGNAL": int(signal.SIGKILL), "SIGNAL_RANK": 0}
    flags = ["train", *dummy_flags, "--out", tmp_path / "killed", "--resume"]
    ended = torchrun("dummy_recipe.py", *flags, options=["--max-restarts=1"], **killed)
    assert ended.returncode == 0, ended.stderr
    saved = RunFolder(tmp_path / "killed").checkpoint(6)
    lines = said(ended)
    message = lines.index(
        "fastgan: rank 0 of 2 processes ended without a word, as when killed; last good "
        f"checkpoint: {saved}, --resume goes on from there"
    )
    assert lines[message + 1] == f"fastgan: resumed from {saved}"
    whole = torchrun("dummy_recipe.py", "train", *dummy_flags, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("12 steps: ") == 1
    assert_same_training(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_one_step(
    dummy_flags: list[object], tmp_path: Path
) -> None:
    sent = {"SIGNAL_STEP": 7, "SIGNAL": int(signal.SIGTERM), "SIGNAL_RANK": 1}
    ended = torchrun("dummy_recipe.py", "train", *dummy_flags, "--out", tmp_path, **sent)
    saved = RunFolder(tmp_path).newest()
    message = f"fastgan: SIGTERM after step 8: saved {saved}, --resume goes on from there"
    assert said(ended).count(message) == 1
    assert "exitcode  : 143" in ended.stderr
    assert checkpoint.load(tmp_path / "latest.safetensors")["step"] == 8


@pytest.mark.slow
def test_memory_exhausted_in_one_process_ends_all(
    dummy_flags: list[object], tmp_path: Path
) -> None:
    flags = [*dummy_flags, "--out", tmp_path, "--fault", "memory"]
    ended = torchrun("dummy_recipe.py", "train", *flags, FAULT_RANK=1)
    assert ended.returncode == 1  # torchrun's own, whatever the processes' are
    assert ended.stderr.count("Traceback") == 1  # torchrun's
    (line,) = (line for line in said(ended) if "out of memory" in line)
    assert "--accumulate" in line
    assert "--activation-checkpointing" in line
    assert said(ended)[-1] == line
    assert RunFolder(tmp_path).checkpoints()[-1].stem == "step_00000003"


@pytest.mark.slow
def test_what_the_first_process_alone_finds_before_the_first_step_ends_all(
    dummy_flags: list[object], tmp_path: Path
) -> None:
    """It alone makes the folder: the other learns from it that this cannot be done."""
    out = tmp_path / "caf\udce9"
    ended = torchrun("dummy_recipe.py", "train", *dummy_flags, "--out", out)
    (line,) = said(ended)
    assert line == rf"fastgan: out: TensorBoard needs a name in UTF-8, got {tmp_path}/caf\udce9"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_graphs(data: Path, tmp_path: Path) -> None:
    pictures = ["--content", data / "content", "--style", data / "style", "--workers", 0]
    for engine in ("eager", "graph"):
        ended = torchrun(
            *("dummy_recipe.py", "train", "dummy", *pictures, "--out", tmp_path / engine),
            *("--steps", 12, "--deterministic", "--engine", engine),
        )
        assert ended.returncode == 0, ended.stderr
        assert "using eager" not in ended.stderr
    assert_same_training(tmp_path / "graph", tmp_path / "eager")


# --- The page about it --------------------------------------------------------------------------


def test_the_page_says_what_the_networks_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RECIPES, Dummy.name)
    page = Path(__file__).parents[1] / "docs" / "scaling.md"
    assert scaling.table() in page.read_text()


def test_bytes_are_those_of_the_exchange() -> None:
    recipe = UNIT(dataclasses.replace(UNIT.presets["lite"].config, **CONFIGS["unit"]))
    exchanged = 0
    for phase in recipe.phases:
        losses = torch.zeros(3)
        parameters = list(phase_parameters(recipe, phase).values())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        exchanged += Exchange(parameters, losses).pack(losses).nbytes - losses.nbytes
    assert exchanged == scaling.gradient_bytes(recipe)
    assert scaling.sent_bytes(exchanged, 2) == exchanged


# --- Flags and devices --------------------------------------------------------------------------


def test_accumulate_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        Training(accumulate=0)


def launched_as(monkeypatch: pytest.MonkeyPatch, *, size: int) -> None:
    """As the first of `size` processes of torchrun."""
    launch = {"RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)


def test_a_size_without_a_launch_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clusters set the variable for every program."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.launched_rank() == 0
    assert distributed.join_world(torch.device("cpu")).size == 1
    assert own_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_is_not_for_several(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched_as(monkeypatch, size=2)
    with pytest.raises(ValueError, match=f"device: 2 processes .* got '{device}'"):
        own_device(device)


def test_each_process_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "choose_device", torch.device)
    launched_as(monkeypatch, size=3)
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert own_device(None) == own_device("cuda") == torch.device("cuda", rank)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ValueError, match=r"process 2 of .* which has 2: torchrun --nproc_per_node=2"
    ):
        own_device(None)
