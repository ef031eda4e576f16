"""A training that was killed or stopped ends, once resumed, in the bits of one that was not."""

import dataclasses
import json
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dummy_recipe import Dummy
from fastgan import checkpoint, cli
from fastgan.recipes import Batch
from fastgan.recipes.style_transfer import StyleTransfer
from fastgan.run_folder import RunFolder
from fastgan.training import Trainer, preset_config
from fastgan.training.config import Output, Pictures, TrainConfig
from fastgan.training.engine import EagerEngine
from fastgan.training.state import engine_state, restore_engine
from pictures import write_folders, write_pictures
from tiny import TWO_DOMAIN_RECIPES, tiny_flags

STEPS = 23
TWO_DOMAINS = [recipe.name for recipe in TWO_DOMAIN_RECIPES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def make_config(
    pictures: Pictures, out: Path, resume: bool = False, **training: Any
) -> TrainConfig:
    output = Output(out, checkpoint_every=5, log_every=3, sample_every=4, resume=resume)
    config = preset_config(Dummy, None, pictures, output)
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, steps=STEPS, device="cpu", **training),
    )


def flags(out: Path, **more: Any) -> list[str]:
    given = {
        "out": out,
        "device": "cpu",
        "steps": STEPS,
        "checkpoint-every": 5,
        "log-every": 3,
        "sample-every": 4,
        **more,
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def run_and_signal(
    arguments: list[str], step: int, signum: int
) -> subprocess.CompletedProcess[str]:
    """`fastgan train` in a process of its own that sends itself `signum` in `step`."""
    pytest.importorskip("tyro", reason="the command line needs the extra [train]")
    script = Path(__file__).with_name("dummy_recipe.py")
    root = str(script.parent.parent)
    return subprocess.run(
        [sys.executable, str(script), "train", *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "SIGNAL_STEP": str(step),
            "SIGNAL": str(int(signum)),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def recipe_flags(recipe: str, root: Path) -> list[str]:
    """For a small training of `recipe` on pictures that are written below `root`."""
    tiny = [] if recipe == "dummy" else tiny_flags(recipe)
    if recipe in TWO_DOMAINS:
        write_folders(root, ("trainA", "trainB"))
        return ["--data", str(root), *tiny]
    write_pictures(root)
    return ["--content", str(root / "content"), "--style", str(root / "style"), *tiny]


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a tree by its path."""
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in leaves(item, f"{path}/{key}").items()
        }
    if isinstance(value, list | tuple):
        return {
            k: v for i, item in enumerate(value) for k, v in leaves(item, f"{path}/{i}").items()
        }
    return {path: value}


def assert_same_training(ours: Path, theirs: Path) -> None:
    """The same bits in everything but the configs, which name the folder."""
    states = [leaves(checkpoint.load(path / "latest.safetensors")) for path in (ours, theirs)]
    for state in states:
        for name in [name for name in state if name.startswith("/config/")]:
            del state[name]
    assert states[0].keys() == states[1].keys()
    tensors = 0
    for name, value in states[0].items():
        other = states[1][name]
        if isinstance(value, torch.Tensor):
            tensors += 1
            assert value.stride() == other.stride(), name
            assert torch.equal(value, other), name
        elif isinstance(value, np.ndarray):
            assert np.array_equal(value, other), name
        else:
            assert value == other, name
    assert tensors > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        ("dummy", "fp32"),
        ("dummy", "bf16"),
        ("dummy", "fp16"),
        *((recipe, "fp32") for recipe in ("style_transfer", *TWO_DOMAINS)),
    ],
)
def test_kill_and_resume(tmp_path: Path, recipe: str, precision: str) -> None:
    own = recipe_flags(recipe, tmp_path)
    whole, killed = (
        [recipe, *own, *flags(tmp_path / name, precision=precision, workers=0)]
        for name in ("whole", "killed")
    )
    step = random.SystemRandom().randrange(5, STEPS)  # from 0: a checkpoint is there
    print(f"killed in step {step}")
    assert cli.main(["train", *whole]) == 0
    ended = run_and_signal(killed, step, signal.SIGKILL)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    saved = [path.stem for path in RunFolder(tmp_path / "killed").checkpoints()]
    assert saved == [f"step_{done:08d}" for done in range(5, step + 1, 5)][-3:]
    assert cli.main(["train", *killed, "--resume"]) == 0
    assert_same_training(tmp_path / "killed", tmp_path / "whole")
    weights = checkpoint.load(tmp_path / "killed" / "latest.safetensors")["networks"].values()
    filters = [weight for weight in weights if weight.ndim == 4 and weight.shape[1] > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in filters)


def test_style_transfer_resumes_to_the_bit_in_bf16(folders: Pictures, tmp_path: Path) -> None:
    def train(out: Path, steps: int, resume: bool) -> None:
        config = preset_config(StyleTransfer, "lite", folders, Output(out, resume=resume))
        config = dataclasses.replace(
            config,
            training=dataclasses.replace(
                config.training, steps=steps, batch_size=1, device="cpu", precision="bf16"
            ),
            augmentation=dataclasses.replace(config.augmentation, size=32, resize=40),
        )
        Trainer(StyleTransfer, config).train()

    train(tmp_path / "whole", 4, resume=False)
    train(tmp_path / "parts", 2, resume=False)
    torch.rand(5)  # what happens between is nobody's concern
    train(tmp_path / "parts", 4, resume=True)
    assert_same_training(tmp_path / "parts", tmp_path / "whole")


class DrawsOnTheHost(Dummy):
    """Weighs its losses by numbers of the global generators of Python and NumPy."""

    def losses(self, phase: str, batch: Batch, scratch: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = random.random() + np.random.random()  # noqa: NPY002
        terms = super().losses(phase, batch, scratch)
        return {name: weight * term for name, term in terms.items()}


def test_random_numbers_of_python_and_numpy_go_on(folders: Pictures, tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        Trainer(DrawsOnTheHost, make_config(folders, tmp_path / name)).train()
    RunFolder(tmp_path / "parts").newest().unlink()  # as if killed in the last step
    Trainer(DrawsOnTheHost, make_config(folders, tmp_path / "parts", resume=True)).train()
    assert_same_training(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "signum"),
    [
        ("dummy", signal.SIGINT),
        ("dummy", signal.SIGTERM),
        ("cyclegan", signal.SIGTERM),
        ("style_transfer", signal.SIGTERM),
    ],
)
def test_stop_and_resume(tmp_path: Path, recipe: str, signum: int) -> None:
    own = recipe_flags(recipe, tmp_path)
    assert cli.main(["train", recipe, *own, *flags(tmp_path / "whole", workers=0)]) == 0
    stopped = [recipe, *own, *flags(tmp_path / "stopped", workers=2)]
    ended = run_and_signal(stopped, 7, signum)
    assert ended.returncode == 128 + signum, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"fastgan: {signal.Signals(signum).name} after step 8: saved")
    assert "Traceback" not in ended.stderr
    # --resume alone goes on with the settings of the checkpoint
    assert cli.main(["train", recipe, "--out", str(tmp_path / "stopped"), "--resume"]) == 0
    assert_same_training(tmp_path / "stopped", tmp_path / "whole")
    lines = (tmp_path / "stopped" / "losses.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [3, 6, 9, 12, 15, 18, 21, 23]


def test_killed_before_the_first_checkpoint(
    folders: Pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """--resume alone begins anew, with the settings that are in run.json."""
    for name in ("whole", "killed"):
        trainer = Trainer(Dummy, make_config(folders, tmp_path / name, batch_size=1))
        trainer.train() if name == "whole" else trainer._write_settings()
    resume = ["train", "dummy", "--out", str(tmp_path / "killed"), "--resume"]
    assert cli.main(resume) == 0
    assert f"{tmp_path / 'killed'} has no checkpoint yet: training from the start" in caplog.text
    assert_same_training(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "run.json: damaged"),
        ("3", "run.json: damaged"),
        ("{}", "run.json: of the recipe None, not of dummy"),
        ('{"recipe": "dummy"}', "run.json (fastgan unknown): config: expected an object"),
    ],
)
def test_damaged_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "run.json").write_text(content)
    assert cli.main(["train", "dummy", "--out", str(tmp_path), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fastgan: {tmp_path}/{message}")
    assert said.count("\n") == 1


def test_losses_and_pictures_of_undone_steps_are_replaced(
    folders: Pictures, tmp_path: Path
) -> None:
    Trainer(Dummy, make_config(folders, tmp_path)).train()
    complete = (tmp_path / "losses.jsonl").read_text()
    run = RunFolder(tmp_path)
    run.newest().unlink()  # as if killed after step 23 was logged and before it was saved
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"step": 24, "genera')
    Trainer(Dummy, make_config(folders, tmp_path, resume=True)).train()

    def without_speed(text: str) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in text.splitlines()]
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]

    again = without_speed((tmp_path / "losses.jsonl").read_text())
    assert [line["step"] for line in again] == [3, 6, 9, 12, 15, 18, 21, 23]
    assert again[:6] == without_speed(complete)[:6]  # of step 21, one step out of three was redone
    assert again[-1] == without_speed(complete)[-1]


def test_a_complete_run_is_left_alone(folders: Pictures, tmp_path: Path) -> None:
    Trainer(Dummy, make_config(folders, tmp_path)).train()
    before = (tmp_path / "latest.safetensors").stat()
    Trainer(Dummy, make_config(folders, tmp_path, resume=True)).train()
    after = (tmp_path / "latest.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_other_settings_are_said(
    folders: Pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(Dummy, make_config(folders, tmp_path)).train()
    with caplog.at_level(logging.WARNING, "fastgan"):
        Trainer(Dummy, make_config(folders, tmp_path, resume=True, batch_size=3))
    assert "other settings than before: training.batch_size: 2 -> 3" in caplog.text


def test_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    pictures = Pictures(Path("content"), Path("style"), workers=0)
    with caplog.at_level(logging.INFO, "fastgan"):
        Trainer(Dummy, make_config(pictures, tmp_path / "run")).train()
    assert "content: 5 pictures in content; style: 5 pictures in style" in caplog.messages
    with caplog.at_level(logging.WARNING, "fastgan"):
        Trainer(Dummy, make_config(pictures, tmp_path / "run", resume=True))
    assert not [each for each in caplog.messages if "before" in each]  # the same settings
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume = ["train", "dummy", "--out", "../run", "--resume", "--steps", str(STEPS + 1)]
    assert cli.main(resume) == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    state = checkpoint.load(tmp_path / "run" / "latest.safetensors")
    assert state["step"] == STEPS + 1
    for stored in (settings["pictures"], state["config"]["pictures"]):
        assert stored["content"] == str(tmp_path / "content")


def test_other_pictures_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = write_pictures(tmp_path)
    Trainer(Dummy, make_config(pictures, tmp_path / "run")).train()
    resumed = make_config(pictures, tmp_path / "run", resume=True)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastgan"):
        moved = dataclasses.replace(pictures, content=pictures.content.rename(tmp_path / "moved"))
        Trainer(Dummy, dataclasses.replace(resumed, pictures=moved))
        (message,) = caplog.messages  # that the folder is another one; its pictures are the same
        assert "pictures.content: " in message
        moved.content.rename(pictures.content)
        caplog.clear()
        (pictures.content / "sub").mkdir()
        (pictures.content / "0.png").rename(pictures.content / "sub" / "0.png")
        for number in range(8):
            (pictures.style / f"new{number}.png").symlink_to(pictures.style / "0.png")
        Trainer(Dummy, resumed)
    assert caplog.messages == [
        "resumed with other pictures than before: "
        "content: as many pictures, not the same ones; their order changes",
        "resumed with other pictures than before: "
        "style: 5 -> 13 pictures; order and schedule change",
    ]


def test_an_older_checkpoint_knows_no_pictures(
    folders: Pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(Dummy, make_config(folders, tmp_path)).train()
    latest = (tmp_path / "latest.safetensors").resolve()
    state = checkpoint.load(latest)
    del state["folders"]
    checkpoint.save(latest, state)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastgan"):
        assert Trainer(Dummy, make_config(folders, tmp_path, resume=True)).step == STEPS
    assert not caplog.messages


def test_other_networks_are_refused(folders: Pictures, tmp_path: Path) -> None:
    Trainer(Dummy, make_config(folders, tmp_path)).train()
    config = make_config(folders, tmp_path, resume=True)
    wider = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, width=9))
    with pytest.raises(ValueError, match=r"generator.0.weight is \[8, 6, 3, 3\] there and \[9, 6"):
        Trainer(Dummy, wider)


def test_optimizer_state_takes_the_strides_of_its_parameter() -> None:
    """With NCHW moments beside channels_last weights, fused Adam on a CPU goes wrong silently."""

    def engine(seed: int) -> EagerEngine:
        torch.manual_seed(seed)
        recipe = Dummy(Dummy.presets["small"].config)
        recipe.begin_training(size=16)
        recipe.to(memory_format=torch.channels_last)
        return EagerEngine(recipe, torch.device("cpu"), "fp32", 0.9)

    keys = list(Dummy(Dummy.presets["small"].config).state_dict())
    batch = {domain: torch.rand(2, 3, 16, 16) for domain in Dummy.domains}
    batch |= {"slot": torch.tensor([0]), "fault": torch.tensor(False)}
    first, second = engine(0), engine(1)
    first.step(batch, 0, 10)
    state = engine_state(first, keys)
    for moments in state["optimizers"]["generator"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].contiguous()
    restore_engine(second, keys, state)
    second.recipe.extractor.load_state_dict(first.recipe.extractor.state_dict())
    for each in (first, second):
        torch.manual_seed(2)
        for step in (1, 2):
            each.step(batch, step, 10)
    for ours, theirs in zip(first.recipe.parameters(), second.recipe.parameters(), strict=True):
        assert torch.equal(ours, theirs)
