"""The training loop: what it computes, what it writes, what stops it."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from dummy_recipe import Dummy, DummyConfig
from fastgan import checkpoint
from fastgan.device import choose_precision
from fastgan.recipes.serialize import from_json, to_json
from fastgan.run_folder import RunFolder
from fastgan.training import (
    Output,
    Pictures,
    TrainConfig,
    Trainer,
    Training,
    TrainingError,
    TrainingInterrupted,
    preset_config,
    reporting,
)
from fastgan.training.config import changed_fields, config_from_json
from fastgan.training.engine import EagerEngine, WeightAverage, phase_parameters
from fastgan.training.guards import StopSignals, stack_losses
from fastgan.training.reporting import grid
from pictures import all_workers_end, write_pictures


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    root = tmp_path_factory.mktemp("pictures")
    return write_pictures(root)


def make_config(
    pictures: Pictures, out: Path, output: dict[str, Any] | None = None, **changes: Any
) -> TrainConfig:
    """The small preset with `changes` to whatever section has a field of that name."""
    changes = {"device": "cpu", **changes}
    given = {"checkpoint_every": 4, "log_every": 2, "sample_every": 100, **(output or {})}
    config = preset_config(Dummy, None, pictures, Output(out, **given))
    for name in ("training", "augmentation", "recipe"):
        section = getattr(config, name)
        known = {field.name for field in dataclasses.fields(section)}
        mine = {key: changes.pop(key) for key in list(changes) if key in known}
        config = dataclasses.replace(config, **{name: dataclasses.replace(section, **mine)})
    assert not changes
    return config


def losses_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


def engine_and_batch(
    precision: Any = "fp32", dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[EagerEngine, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    recipe = Dummy(DummyConfig(**changes))
    recipe.begin_training(size=16)
    recipe.to(dtype).to(memory_format=torch.channels_last)
    engine = EagerEngine(recipe, torch.device("cpu"), precision, 0.9)
    images = {
        domain: torch.rand(2, 3, 16, 16, dtype=dtype).mul(2).sub(1) for domain in Dummy.domains
    }
    return engine, {**images, "slot": torch.tensor([0]), "fault": torch.tensor(False)}


def test_a_step_is_the_plain_loop() -> None:
    """Three steps in fp64 equal the loop one would write by hand."""
    engine, batch = engine_and_batch(dtype=torch.float64)
    plain, _ = engine_and_batch(dtype=torch.float64)
    recipe = plain.recipe
    optimizers = {
        phase: torch.optim.Adam(recipe.get_submodule(phase).parameters(), betas=(0.5, 0.999))
        for phase in recipe.phases
    }
    torch.manual_seed(1)
    for step in range(3):
        engine.step(batch, step, 10)
    torch.manual_seed(1)
    for step in range(3):
        scratch = recipe.begin_step(batch)
        for phase, rate in (("discriminator", 2e-2), ("generator", 1e-2 / (1 + 0.1 * step))):
            optimizers[phase].param_groups[0]["lr"] = rate
            optimizers[phase].zero_grad()
            sum(recipe.losses(phase, batch, scratch).values()).backward()
            optimizers[phase].step()
    for (name, ours), theirs in zip(
        engine.recipe.named_parameters(), recipe.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


def test_a_phase_takes_no_gradients_of_the_other() -> None:
    engine, batch = engine_and_batch()
    seen: dict[str, set[str]] = {}
    for phase, optimizer in engine.optimizers.items():

        def note(optimizer: Any, args: Any, kwargs: Any, phase: str = phase) -> None:
            named = engine.recipe.named_parameters()
            seen[phase] = {name.partition(".")[0] for name, p in named if p.grad is not None}

        optimizer.register_step_pre_hook(note)
    engine.step(batch, 0, 10)
    assert seen == {"discriminator": {"discriminator"}, "generator": {"generator"}}
    trained = {name for name, p in engine.recipe.named_parameters() if p.requires_grad}
    assert trained == {name for ps in engine.parameters.values() for name in ps}


def test_weight_average_formula() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    average = WeightAverage({"w": parameter}, decay=0.6)
    expected = parameter.detach().numpy().copy()
    for step in range(20):
        with torch.no_grad():
            parameter.mul_(-1.1)
        average.begin_step(step)
        average.update()
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach().numpy()
        np.testing.assert_allclose(average.average["w"].numpy(), expected, rtol=1e-12)
    own = parameter.detach().clone()
    with average.applied():
        assert torch.equal(parameter, average.average["w"])
    assert torch.equal(parameter, own)


def test_choose_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    capability = {"value": (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["value"])
    assert choose_precision(None, torch.device("cpu")) == "fp32"
    assert choose_precision(None, gpu) == "fp16"
    capability["value"] = (8, 0)
    assert choose_precision(None, gpu) == "bf16"
    assert choose_precision("fp32", gpu) == "fp32"


def test_a_run_leaves_what_it_says(folders: Pictures, tmp_path: Path) -> None:
    config = make_config(folders, tmp_path / "run", steps=6)
    trainer = Trainer(Dummy, config)
    trainer.train()
    assert trainer.step == 6
    run = RunFolder(tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == [
        "step_00000004.safetensors",
        "step_00000006.safetensors",
    ]
    assert (run.path / "latest.safetensors").resolve() == run.checkpoints()[-1].resolve()
    lines = losses_of(run.path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {"discriminator/real", "generator/content", "metric/brightness"} <= set(lines[0])
    assert lines[-1]["lr/generator"] == pytest.approx(1e-2 / 1.5)
    assert lines[-1]["lr/discriminator"] == 2e-2
    with Image.open(run.path / "samples/step_00000006.png") as grid:
        assert grid.size == (3 * 32, 6 * 32 + 16)
    assert list(run.tensorboard.glob("events.out.tfevents.*"))
    written = json.loads(run.settings.read_text())
    assert written["recipe"] == "dummy"
    assert config_from_json(Dummy, written["config"]) == config
    state = checkpoint.load(run.newest())
    assert set(state["networks"]) == {
        name for name in trainer.recipe.state_dict() if not name.startswith(("extractor", "pool"))
    }
    assert state["training_state"]["pool"].abs().sum() > 0


def test_steps_default_to_the_recipe(folders: Pictures, tmp_path: Path) -> None:
    # 5 pictures per domain, 2 per batch: 3 steps per epoch; the recipe wants two epochs
    assert Trainer(Dummy, make_config(folders, tmp_path / "run")).steps == 6


def test_training_learns(folders: Pictures, tmp_path: Path) -> None:
    config = make_config(folders, tmp_path / "run", {"log_every": 20}, steps=100)
    Trainer(Dummy, config).train()
    lines = losses_of(tmp_path / "run")
    assert lines[-1]["generator/content"] < 0.7 * lines[0]["generator/content"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_close_to_fp32(
    folders: Pictures, tmp_path: Path, precision: Any
) -> None:
    content = {}
    for name in ("fp32", precision):
        config = make_config(folders, tmp_path / name, {"log_every": 30}, steps=60, precision=name)
        Trainer(Dummy, config).train()
        content[name] = losses_of(tmp_path / name)[-1]["generator/content"]
    assert content[precision] == pytest.approx(content["fp32"], rel=0.2)
    assert content[precision] != content["fp32"]


def test_samples_show_the_average_and_draw_nothing(folders: Pictures, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Watched(Dummy):
        def samples(self, batch: Any) -> Any:
            assert not self.training
            assert not torch.is_grad_enabled()
            seen.append(self.generator[0].weight.detach().clone())
            return super().samples(batch)

    results = []
    for every in (1, 100):
        config = make_config(folders, tmp_path / str(every), {"sample_every": every}, steps=3)
        trainer = Trainer(Watched, config)
        trainer.train()
        results.append(checkpoint.load(tmp_path / str(every) / "latest.safetensors"))
    assert len(seen) == 4
    assert torch.equal(seen[-1], results[1]["average"]["generator.0.weight"])
    assert not torch.equal(seen[-1], results[1]["networks"]["generator.0.weight"])
    assert torch.equal(seen[2], seen[3])  # three grids on the way changed nothing


def test_training_state_comes_back_where_it_fits(
    folders: Pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(Dummy, make_config(folders, tmp_path, steps=2)).train()
    saved = checkpoint.load(tmp_path / "latest.safetensors")["training_state"]["pool"]
    pools = []
    for size in (32, 48):
        config = make_config(folders, tmp_path, {"resume": True}, steps=3, size=size, resize=64)
        pools.append(Trainer(Dummy, config).recipe.pool)
    assert torch.equal(pools[0], saved)
    assert pools[1].shape[2] == 12
    assert not pools[1].any()
    assert "the checkpoint's pool cannot be used here" in caplog.text


def test_grid_places_each_picture() -> None:
    black, white = torch.full((2, 3, 4, 5), -1.0), torch.full((2, 3, 4, 5), 1.0)
    white[1] = float("nan")
    pixels = np.asarray(grid({"a": black, "b": white}))[-8:]  # below the titles
    assert pixels.shape == (8, 10, 3)
    assert (pixels[:, :5] == 0).all()
    assert (pixels[:4, 5:] == 255).all()
    assert (pixels[4:, 5:] == 128).all()


def test_keep(folders: Pictures, tmp_path: Path) -> None:
    for keep, left in ((1, [3]), (2, [2, 3]), (0, [1, 2, 3])):
        out = tmp_path / str(keep)
        output = {"checkpoint_every": 1, "keep": keep}
        Trainer(Dummy, make_config(folders, out, output, steps=3)).train()
        assert [int(path.stem[5:]) for path in RunFolder(out).checkpoints()] == left


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    def test_a_step_does_not_wait_for_the_device(self, precision: Any) -> None:
        torch.manual_seed(0)
        device = torch.device("cuda")
        recipe = Dummy(DummyConfig())
        recipe.begin_training(size=16)
        recipe.to(device).to(memory_format=torch.channels_last)
        engine = EagerEngine(recipe, device, precision, 0.9)
        batch = {domain: torch.rand(2, 3, 16, 16, device=device) for domain in Dummy.domains}
        batch |= {name: v.to(device) for name, v in recipe.draw(0, 2, torch.Generator()).items()}
        for step in range(2):
            engine.step(batch, step, 10)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(2, 5):
                engine.step(batch, step, 10)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert engine.ledger.bad() is None

    @pytest.mark.parametrize("precision", [None, "fp16"])
    def test_a_resumed_state_is_exact(
        self, folders: Pictures, tmp_path: Path, precision: Any
    ) -> None:
        config = make_config(folders, tmp_path, steps=6, device=None, precision=precision)
        trainer = Trainer(Dummy, config)
        trainer.train()
        if precision is None and torch.cuda.get_device_capability() >= (8, 0):
            assert trainer._precision == "bf16"
        config = make_config(
            folders, tmp_path, {"resume": True}, steps=9, device=None, precision=precision
        )
        resumed = Trainer(Dummy, config)
        for name, value in trainer.recipe.state_dict().items():
            if not name.startswith("extractor"):
                assert torch.equal(resumed.recipe.state_dict()[name], value), name
        resumed.train()
        assert losses_of(tmp_path)[-1]["step"] == 9

    def test_out_of_memory(self, folders: Pictures, tmp_path: Path) -> None:
        class Huge(Dummy):
            def begin_step(self, batch: Any) -> Any:
                return torch.empty(2**50, device=batch["content"].device)

        with pytest.raises(TrainingError, match=r"^out of memory: 2 pictures of 32 px"):
            Trainer(Huge, make_config(folders, tmp_path, steps=2, device=None)).train()


class TestGuards:
    def test_loss_not_finite(self, folders: Pictures, tmp_path: Path) -> None:
        config = make_config(
            folders, tmp_path, {"log_every": 10, "checkpoint_every": 4}, steps=20,
            fault="loss", fault_step=6,
        )  # fmt: skip
        trainer = Trainer(Dummy, config)
        with pytest.raises(TrainingError) as caught:
            trainer.train()
        message = str(caught.value)
        paths = trainer._stream.batch(6).paths
        assert message.startswith("step 7: the loss generator/content is not finite; pictures: ")
        assert all(str(path) in message for path in paths)
        assert message.endswith(f"last good checkpoint: {RunFolder(tmp_path).newest()}")
        assert "\n" not in message
        assert trainer.step == 8  # the save that was due found out, before the log
        assert [path.stem for path in RunFolder(tmp_path).checkpoints()] == ["step_00000004"]
        checkpoint.load(tmp_path / "latest.safetensors")

    def test_a_picture_whose_name_is_not_utf8(self, tmp_path: Path) -> None:
        pictures = write_pictures(tmp_path / "pictures", count=1)
        path = (pictures.content / "0.png").rename(pictures.content / "caf\udce9.png")
        config = make_config(pictures, tmp_path / "run", steps=2, fault="loss", fault_step=0)
        with pytest.raises(TrainingError, match=f"^step 1: the loss .*; pictures: {path}, "):
            Trainer(Dummy, config).train()

    def test_updates_are_masked_from_the_bad_step_on(self) -> None:
        engine, batch = engine_and_batch(fault="loss")
        engine.step(batch, 0, 10)
        bad = {**batch, "fault": torch.tensor(True)}
        discriminator = [p.detach().clone() for p in engine.parameters["discriminator"].values()]
        generator = [p.detach().clone() for p in engine.parameters["generator"].values()]
        engine.step(bad, 1, 10)
        after = [p.detach().clone() for p in engine.parameters["discriminator"].values()]
        engine.step(batch, 2, 10)
        assert engine.ledger.bad() == (1, ["generator/content"])
        assert not torch.equal(after[0], discriminator[0])  # that loss was still good
        for now, then in zip(engine.parameters["discriminator"].values(), after, strict=True):
            assert torch.equal(now, then)
        for now, then in zip(engine.parameters["generator"].values(), generator, strict=True):
            assert torch.equal(now, then)
        steps = {float(state["step"]) for state in engine.optimizers["generator"].state.values()}
        assert steps == {1.0}

    def test_gradient_not_finite(self, folders: Pictures, tmp_path: Path) -> None:
        config = make_config(
            folders, tmp_path, {"checkpoint_every": 3}, steps=20, fault="gradient", fault_step=5
        )
        with pytest.raises(TrainingError, match=r"^step 6: the weights generator\.\S+, .* finite"):
            Trainer(Dummy, config).train()
        assert [path.stem for path in RunFolder(tmp_path).checkpoints()] == ["step_00000003"]

    def test_grad_scaler_skips_do_not_count(self, folders: Pictures, tmp_path: Path) -> None:
        scales, steps = [], []
        for fault in ("none", "gradient"):
            out = tmp_path / fault
            config = make_config(
                folders, out, steps=12, precision="fp16", fault=fault, fault_steps=3
            )
            Trainer(Dummy, config).train()
            state = checkpoint.load(out / "latest.safetensors")
            scales.append(state["scaler"]["scale"])
            steps.append(float(state["optimizers"]["generator"]["generator.0.weight"]["step"]))
        assert scales[1] == scales[0] / 2**3
        assert steps[1] == steps[0] - 3

    def test_fp16_tolerates_a_forward_that_overflows(
        self, folders: Pictures, tmp_path: Path
    ) -> None:
        for count, out in ((10, tmp_path / "few"), (11, tmp_path / "many")):
            config = make_config(
                folders, out, {"log_every": 5}, steps=25, precision="fp16", fault="loss",
                fault_steps=count,
            )  # fmt: skip
            stops = pytest.raises(TrainingError, match=r"^step 16: the loss generator/content")
            with contextlib.nullcontext() if count == 10 else stops:
                Trainer(Dummy, config).train()

    def test_fp16_gradients_never_finite(self, folders: Pictures, tmp_path: Path) -> None:
        config = make_config(
            folders, tmp_path, {"checkpoint_every": 100}, steps=60, precision="fp16",
            fault="gradient", fault_steps=99,
        )  # fmt: skip
        with pytest.raises(TrainingError, match="not finite at any loss scale"):
            Trainer(Dummy, config).train()

    def test_out_of_memory(self, folders: Pictures, tmp_path: Path) -> None:
        config = make_config(folders, tmp_path, steps=20, fault="memory")
        with pytest.raises(TrainingError) as caught:
            Trainer(Dummy, config).train()
        assert str(caught.value) == (
            "out of memory: 2 pictures of 32 px of each kind in fp32 on cpu; these help: "
            "a smaller --batch-size (--accumulate makes up for it) or --size, "
            "--activation-checkpointing, --precision bf16"
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("moment", ["in a step", "while a checkpoint is written"])
    def test_killed_readers(
        self, folders: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        def kill_before(function: Callable[..., Any]) -> Callable[..., Any]:
            def killing(*given: Any, **named: Any) -> Any:
                if trainer.step >= 4:
                    for reader in readers():
                        os.kill(reader.pid, signal.SIGKILL)
                return function(*given, **named)

            return killing

        target, name = (Dummy, "draw") if moment == "in a step" else (checkpoint, "save")
        monkeypatch.setattr(target, name, kill_before(getattr(target, name)))
        pictures = dataclasses.replace(folders, workers=2)
        trainer = Trainer(Dummy, make_config(pictures, tmp_path, steps=99))
        with all_workers_end() as readers, pytest.raises(TrainingError) as caught:
            trainer.train()
        newest = RunFolder(tmp_path).newest()
        assert newest is not None
        assert re.fullmatch(
            r"a process that reads pictures was killed \(signal 9\); these help: fewer workers "
            r"\(0 reads in the training process\), more shared memory \(docker .*\), .*; "
            rf"last good checkpoint: {newest}",
            str(caught.value),
        )

    def test_losses_must_be_scalars(self) -> None:
        with pytest.raises(ValueError, match=r"'real' of phase 'discriminator' .* got shape \[2\]"):
            stack_losses("discriminator", {"real": torch.zeros(2)})

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_signals(
        self, folders: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int
    ) -> None:
        monkeypatch.setenv("SIGNAL_STEP", "5")
        monkeypatch.setenv("SIGNAL", str(int(signum)))
        before = signal.getsignal(signum)
        trainer = Trainer(Dummy, make_config(folders, tmp_path, steps=20))
        with pytest.raises(TrainingInterrupted, match=r"after step 6: saved \S+step_00000006"):
            trainer.train()
        assert trainer.step == 6
        assert checkpoint.load(tmp_path / "latest.safetensors")["step"] == 6
        assert signal.getsignal(signum) is before

    def test_a_second_signal_acts_at_once(self) -> None:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
        try:
            with StopSignals() as signals:
                os.kill(os.getpid(), signal.SIGINT)
                assert signals.received == signal.SIGINT
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    def test_full_disk(
        self, folders: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trainer = Trainer(Dummy, make_config(folders, tmp_path, steps=20))

        def fail(descriptor: int) -> None:
            if trainer.step == 8:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(checkpoint.CheckpointError, match="No space left"):
            trainer.train()
        assert checkpoint.load(tmp_path / "latest.safetensors")["step"] == 4

    @pytest.mark.parametrize("name", ["run.json", "losses.jsonl"])
    def test_full_disk_at_resuming(
        self, folders: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        Trainer(Dummy, make_config(folders, tmp_path, steps=4)).train()
        before = (tmp_path / name).read_bytes()
        trainer = Trainer(Dummy, make_config(folders, tmp_path, {"resume": True}, steps=6))

        def fail(descriptor: int) -> None:
            if (tmp_path / f"{name}.tmp").exists():
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        expected = f"could not write {tmp_path / name}: No space left on device"
        with pytest.raises(TrainingError, match=f"^{re.escape(expected)}$"):
            trainer.train()
        assert (tmp_path / name).read_bytes() == before
        assert not list(tmp_path.glob("*.tmp"))

    @pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
    @pytest.mark.parametrize("fails", ["at the start", "in a step", "at the end"])
    def test_full_disk_in_the_writer_of_tensorboard(
        self,
        folders: Pictures,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        fails: str,
    ) -> None:
        trainer = Trainer(Dummy, make_config(folders, tmp_path, steps=8))
        first = {"at the start": 0, "in a step": 6, "at the end": 8}[fails]
        method = "flush" if fails == "at the end" else "write"
        before = getattr(RecordWriter, method)

        def fail(self: RecordWriter, *data: bytes) -> None:
            if trainer.step >= first:
                raise OSError(28, "No space left on device")
            before(self, *data)

        monkeypatch.setattr(RecordWriter, method, fail)
        hook = threading.excepthook
        reason = re.escape(f"{tmp_path / 'tensorboard'}: No space left on device")
        if fails == "at the end":
            trainer.train()
            assert re.search(f"could not write all of {reason}", caplog.text)
        else:
            with pytest.raises(TrainingError, match=f"^could not write {reason}$"):
                trainer.train()
        assert threading.excepthook is hook
        written = {"at the start": [], "in a step": [4], "at the end": [4, 8]}[fails]
        assert [f"step_{step:08d}" for step in written] == [
            path.stem for path in RunFolder(tmp_path).checkpoints()
        ]

    @pytest.mark.parametrize("name", ["losses.jsonl", "samples/step_00000006.png"])
    def test_full_disk_at_logging(
        self, folders: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setattr(reporting, "_keep_lines_until", lambda path, step: None)
        trainer = Trainer(Dummy, make_config(folders, tmp_path, {"sample_every": 6}, steps=8))
        (tmp_path / name).symlink_to("/dev/full")
        expected = f"could not write {tmp_path / name}: No space left on device"
        with pytest.raises(TrainingError, match=f"^{re.escape(expected)}$"):
            trainer.train()


class TestOutput:
    def test_overwrite_deletes_the_run_alone(self, folders: Pictures, tmp_path: Path) -> None:
        (tmp_path / "samples").mkdir()
        for mine in ("notes.txt", "config.json", "samples/best.png"):
            (tmp_path / mine).write_text("mine")
        Trainer(Dummy, make_config(folders, tmp_path, steps=8)).train()
        config = make_config(folders, tmp_path, {"overwrite": True}, steps=2)
        trainer = Trainer(Dummy, config)
        assert len(RunFolder(tmp_path).checkpoints()) == 2  # nothing is lost before training starts
        trainer.train()
        assert [path.stem for path in RunFolder(tmp_path).checkpoints()] == ["step_00000002"]
        assert [line["step"] for line in losses_of(tmp_path)] == [2]
        assert len(list(tmp_path.glob("samples/step*"))) == 1
        assert len(list(tmp_path.glob("tensorboard/events*"))) == 1
        for mine in ("notes.txt", "config.json", "samples/best.png"):
            assert (tmp_path / mine).read_text() == "mine"

    @pytest.mark.parametrize("inside", [".", "run", "new/run"])
    def test_a_run_does_not_learn_from_itself(self, tmp_path: Path, inside: str) -> None:
        pictures = write_pictures(tmp_path)
        expected = f"out: {pictures.style / inside} is in {pictures.style}, "
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
            Trainer(Dummy, make_config(pictures, pictures.style / inside))
        assert not (pictures.style / inside / "samples").exists()

    def test_a_hidden_folder_holds_no_pictures(self, tmp_path: Path) -> None:
        pictures = write_pictures(tmp_path)
        Trainer(Dummy, make_config(pictures, pictures.style / ".runs" / "first"))

    def test_a_folder_that_is_a_link_to_itself(self, folders: Pictures, tmp_path: Path) -> None:
        (tmp_path / "loop").symlink_to("loop")
        looped = dataclasses.replace(folders, style=tmp_path / "loop")
        with pytest.raises(OSError, match=str(tmp_path / "loop")):
            Trainer(Dummy, make_config(looped, tmp_path / "run"))

    def test_nothing_is_made_when_something_is_wrong(self, tmp_path: Path) -> None:
        missing = Pictures(tmp_path / "no", tmp_path / "no")
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            Trainer(Dummy, make_config(missing, tmp_path / "run"))
        assert not (tmp_path / "run").exists()


class TestConfig:
    def test_round_trip(self, folders: Pictures, tmp_path: Path) -> None:
        config = make_config(folders, tmp_path, steps=7, width=3, precision="bf16", device="cpu")
        values = json.loads(json.dumps(to_json(config)))
        assert config_from_json(Dummy, values) == config

    def test_tuples(self) -> None:
        @dataclasses.dataclass(frozen=True)
        class Nested:
            pair: tuple[float, float]
            many: tuple[int, ...] = ()
            optional: str | None = None

        config = Nested((0.5, 1.0), (1, 2, 3), "x")
        assert from_json(Nested, json.loads(json.dumps(to_json(config)))) == config
        assert from_json(Nested, {"pair": [1, 2]}) == Nested((1.0, 2.0))
        with pytest.raises(ValueError, match=r"^config\.pair: expected tuple.*got \[1\]"):
            from_json(Nested, {"pair": [1]})
        with pytest.raises(ValueError, match=r"^config\.many\[1\]: expected int, got 0\.5"):
            from_json(Nested, {"pair": [1, 2], "many": [1, 0.5]})

    @pytest.mark.parametrize(
        ("section", "field", "value", "message"),
        [
            ("recipe", "widht", 3, "config.recipe.widht: unknown to this version of fastgan"),
            ("training", "future", 3, "config.training.future: unknown to this version"),
            ("recipe", "width", "3", "config.recipe.width: expected int, got '3'"),
            ("recipe", "width", True, "config.recipe.width: expected int, got True"),
            ("recipe", "objective", "x", "config.recipe.objective: expected one of 'default'"),
            ("output", "out", None, "config.output.out: expected Path, got None"),
            ("output", "keep", -1, "keep must be at least 0"),
        ],
    )
    def test_a_bad_field_is_named(
        self, folders: Pictures, tmp_path: Path, section: str, field: str, value: Any, message: str
    ) -> None:
        values = to_json(make_config(folders, tmp_path))
        values[section][field] = value
        with pytest.raises(ValueError) as caught:
            config_from_json(Dummy, values)
        assert message in str(caught.value)

    def test_a_missing_field_takes_its_default(self, folders: Pictures, tmp_path: Path) -> None:
        config = make_config(folders, tmp_path)
        values = to_json(config)
        del values["training"]["seed"], values["augmentation"]
        assert config_from_json(Dummy, values).training == config.training
        del values["output"]["out"]
        with pytest.raises(ValueError, match=r"config\.output\.out: missing"):
            config_from_json(Dummy, values)

    @pytest.mark.parametrize(
        ("section", "field", "value"),
        [
            (Training, "steps", 0),
            (Training, "batch_size", 0),
            (Training, "seed", -1),
            (Training, "seed", 2**64),
            (Training, "ema_decay", 1.0),
            (Training, "engine", "fast"),
        ],
    )
    def test_bad_values(self, section: Any, field: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"^{field} must be"):
            section(**{field: value})

    def test_changed_fields(self, folders: Pictures, tmp_path: Path) -> None:
        before = make_config(folders, tmp_path, steps=7)
        now = make_config(folders, tmp_path / "moved", {"log_every": 9}, steps=9, batch_size=4)
        assert changed_fields(before, now) == ["training.batch_size: 2 -> 4"]
        wider = make_config(folders, tmp_path, width=9)
        assert changed_fields(before, wider) == ["recipe.width: 8 -> 9"]


def test_tied_parameters_belong_to_a_phase_once() -> None:
    recipe = Dummy(DummyConfig())
    recipe.generator.append(recipe.generator[4])
    assert len(phase_parameters(recipe, "generator")) == 5
