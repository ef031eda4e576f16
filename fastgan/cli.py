"""The command line: ``fastgan train | stylize | export | demo | env``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import fastgan
from fastgan.ops._dispatch import ImplUnavailableError, check_environment

if TYPE_CHECKING:
    from fastgan.recipes import Recipe
    from fastgan.training.config import TrainConfig

_USAGE = """\
usage: fastgan COMMAND ...

  train RECIPE   train on two folders of pictures
  stylize        render pictures with a trained model
  export         a trained model as one file for other programs, ONNX or torch.export
  demo           train a small model on bundled photographs and show what it does
  env            versions, devices, live implementations: the text for a bug report

fastgan COMMAND --help shows the flags of a command; fastgan --version the version."""

_OF_EXTRA = {
    **dict.fromkeys(("PIL", "safetensors", "tensorboard", "torchvision", "tqdm", "tyro"), "train"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    **dict.fromkeys(("matplotlib", "pooch", "skimage"), "demo"),
}


class Failure(Exception):
    """Ends the command with `code` and one line that says why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    0: done; 2: wrong arguments; 1: failed on the way; 128 + N: ended by signal N.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may be no text
    try:
        code = _run(arguments)
        print(end="", flush=True)
    except BrokenPipeError:  # as of `| head`; what is left to write at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(1, f"standard output: {error.strerror}")
    return code


def _run(arguments: Sequence[str] | None) -> int:
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    if command == "--version":
        print(fastgan.__version__)
        return 0
    if command not in _COMMANDS:
        return _fail(2, f"unknown command {command!r}; known: {', '.join(_COMMANDS)}")
    try:
        if command != "env":  # which tells of it
            check_environment()
    except ValueError as error:
        return _fail(2, str(error))
    try:
        return _COMMANDS[command](rest)
    except Failure as failure:
        return _fail(failure.code, str(failure))
    except ImportError as error:
        extra = _OF_EXTRA.get((error.name or "").partition(".")[0])
        if extra is not None:
            return _fail(1, f"{command} needs {error.name}: pip install 'fastgan[{extra}]'")
        if "pip install" in str(error):
            return _fail(1, str(error))
        raise
    except SystemExit as end:  # tyro printed help, or what is wrong with a flag
        return end.code if isinstance(end.code, int) else 2
    except MemoryError as error:
        return _fail(1, str(error) or "out of memory")
    except KeyboardInterrupt:
        return _fail(130, "interrupted")


def _train(arguments: list[str]) -> int:
    from fastgan.training.distributed import launched_rank, say_once

    try:
        return _train_here(arguments)
    except Failure as failure:
        code = failure.code
        bar = "\n" if launched_rank() > 0 else ""  # the first process's may be on the screen
        say_once(str(failure), lambda message: print(f"{bar}fastgan: {message}", file=sys.stderr))
        return code


def _train_here(arguments: list[str]) -> int:
    import tyro

    from fastgan.recipes import RECIPES, recipe_class
    from fastgan.training import Trainer
    from fastgan.training.config import TrainConfig
    from fastgan.training.distributed import first_speaks, launched_rank, leave_world

    if not arguments or arguments[0] in ("-h", "--help"):
        names = ", ".join(name.replace("_", "-") for name in RECIPES)
        print(
            f"usage: fastgan train RECIPE ...\n\nrecipes: {names}\n\n"
            "fastgan train RECIPE --help shows the flags"
        )
        return 0
    name, *flags = arguments
    first = launched_rank() == 0
    _log_to_stderr(logging.INFO if first else logging.ERROR)
    with _argument_errors(), first_speaks():
        recipe = recipe_class(name)
        config = tyro.cli(
            TrainConfig,
            prog=f"fastgan train {name}",
            description=f"{_first_line(recipe)} Presets: {', '.join(recipe.presets)}.",
            default=_starting_config(recipe, flags),
            args=flags,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
        )
    with _training_errors():
        with _argument_errors():
            trainer = Trainer(recipe, config, progress=True)
        trainer.train()
    leave_world()
    if not first:
        return 0
    run = config.output.out
    how = f"--direction {recipe.directions[0]}" if recipe.directions else "--style STYLE"
    print(
        f"{trainer.step} steps: {trainer.folder.newest()}\n"
        f"look: {run}/samples, {run}/losses.jsonl, tensorboard --logdir {run}\n"
        f"use:  fastgan stylize --checkpoint {run} --content PHOTO {how} --out OUT.png"
    )
    return 0


def _starting_config(recipe: type[Recipe], flags: list[str]) -> TrainConfig:
    """What the flags are laid over: the config of the run to resume, else the preset's."""
    import tyro

    from fastgan.run_folder import RunFolder
    from fastgan.training.config import Output, pictures_class, preset_config
    from fastgan.training.trainer import config_to_resume

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", nargs="?")  # tyro says it where a value is missing
    early.add_argument("--out", nargs="?", type=Path)
    early.add_argument("--resume", action="store_true")
    given, _ = early.parse_known_args(flags)
    resumes = given.resume and given.out
    config = config_to_resume(RunFolder(given.out), recipe) if resumes else None
    if config is None:
        pictures = pictures_class(recipe)
        required = [
            field.name
            for field in dataclasses.fields(pictures)
            if field.default is dataclasses.MISSING
        ]
        return preset_config(
            recipe,
            given.preset,
            pictures(**dict.fromkeys(required, tyro.MISSING)),
            Output(out=tyro.MISSING),
        )
    if given.preset not in (None, config.preset):
        raise ValueError(f"preset: {given.out} was begun with {config.preset}, got {given.preset}")
    return dataclasses.replace(
        config, output=dataclasses.replace(config.output, resume=False, overwrite=False)
    )


@dataclasses.dataclass(frozen=True)
class _StylizeFlags:
    """Render pictures in the style of another one, or as pictures of another domain.

    Each keeps its size.
    """

    content: tuple[Path, ...]
    """Pictures and folders of pictures to render."""
    out: Path
    """A picture for one result, else a folder, where results keep the names of the content."""
    style: tuple[Path, ...] = ()
    """The picture whose style they take on, or several to mix; a folder counts as one style, the
    mean of its pictures. For checkpoints of style-transfer."""
    style_weights: tuple[float, ...] = ()
    """One number per style, divided by their sum; equal if left out."""
    alpha: float = 1.0
    """Strength of the style, 0 to 1."""
    keep_color: bool = False
    """Keep the colours of the content and take only brightness from the result."""
    checkpoint: Path | None = None
    """A checkpoint, the folder of a run, one with the public CycleGAN code's latest_net_G_A.pth and
    latest_net_G_B.pth, or with its latest_net_G.pth, or one such file; None: the pretrained one."""
    direction: Literal["AtoB", "BtoA"] | None = None
    """From which domain to which; for checkpoints of recipes that translate between two."""
    max_side: int | None = None
    """Reduce pictures with a longer side than this, in pixels, to it first."""
    batch_size: int = 1
    """So many pictures of one size at a time."""
    device: str | None = None
    """cpu, cuda, mps; None: a GPU if there is one."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """None: bf16 on GPUs of capability 8.0 and up, fp16 on older ones, fp32 elsewhere."""
    strict: bool = False
    """End with an error at a file that is no readable picture, rather than skip it."""


def _stylize(arguments: list[str]) -> int:
    import tyro

    from fastgan.inference import stylize

    flags = tyro.cli(
        _StylizeFlags,
        prog="fastgan stylize",
        args=arguments,
        config=(tyro.conf.DisallowNone,),
    )
    _log_to_stderr()
    with _argument_errors():
        written = stylize(
            flags.content,
            flags.style,
            flags.out,
            checkpoint=flags.checkpoint,
            style_weights=flags.style_weights or None,
            alpha=flags.alpha,
            keep_color=flags.keep_color,
            direction=flags.direction,
            max_side=flags.max_side,
            device=flags.device,
            precision=flags.precision,
            batch_size=flags.batch_size,
            strict=flags.strict,
            progress=True,
        )
    print(f"wrote {written[0]}" + (f" and {len(written) - 1} more" if len(written) > 1 else ""))
    return 0


@dataclasses.dataclass(frozen=True)
class _ExportFlags:
    """Write a trained generator to one file that runs without fastgan.

    Pictures are fp32 RGB in [-1, 1], of any batch, height and width.
    """

    out: Path
    """The file: .onnx, or .pt2 for torch.export.load."""
    checkpoint: Path | None = None
    """As for stylize; None: the pretrained one."""
    format: Literal["onnx", "torch-export"] | None = None
    """None: what the name of the file ends in."""
    direction: Literal["AtoB", "BtoA"] | None = None
    """From which domain to which; for checkpoints of recipes that translate between two."""


def _export(arguments: list[str]) -> int:
    import tyro

    from fastgan.export import export

    flags = tyro.cli(
        _ExportFlags, prog="fastgan export", args=arguments, config=(tyro.conf.DisallowNone,)
    )
    _log_to_stderr()
    with _argument_errors():
        written = export(
            flags.out,
            checkpoint=flags.checkpoint,
            format=flags.format,
            direction=flags.direction,
        )
    print(f"wrote {written}, {written.stat().st_size / 1e6:.1f} MB")
    return 0


@dataclasses.dataclass(frozen=True)
class _DemoFlags:
    """Train a small model on pictures that come along and show what it does."""

    out: Path = Path("demo")
    """Folder for the pictures, the run and its checkpoint; a demo it holds is replaced."""
    steps: int = 500
    """Training steps."""
    seed: int = 0
    """Decides the initial weights and the crops."""


def _demo(arguments: list[str]) -> int:
    import tyro

    from fastgan.demo import run_demo

    flags = tyro.cli(_DemoFlags, prog="fastgan demo", args=arguments)
    _log_to_stderr()
    with _training_errors(), _argument_errors():
        demo = run_demo(flags.out, steps=flags.steps, seed=flags.seed, progress=True)
    for name, scores in demo.scores.items():
        print(
            f"{name:8} {scores.gram_drop:4.0%} nearer to the style "
            f"(texture alone: {scores.grey_gram_drop:.0%}), "
            f"content kept: {scores.structure:.2f} (other photographs: at most "
            f"{scores.structure_of_others:.2f})"
        )
    print(
        f"trained for {demo.seconds:.0f} s\n"
        f"look: {demo.grid} (a photograph it has not seen, in four styles), {demo.alpha} (strength "
        f"0 to 1), {demo.curves} (losses)\n"
        f"try:  fastgan stylize --checkpoint {demo.checkpoint} --content YOUR_PHOTO "
        f"--style {demo.styles}/night.png --out result.png\n"
        "      fastgan train style-transfer --content PHOTOS --style PAINTINGS --out RUN"
    )
    return 0


def _env(arguments: list[str]) -> int:
    from fastgan import env

    if arguments in (["-h"], ["--help"]):
        print(f"usage: fastgan env\n\n{_first_line(env)}")
        return 0
    if arguments:
        raise Failure(2, f"env takes no arguments, got {' '.join(arguments)}")
    env.main()
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "stylize": _stylize,
    "export": _export,
    "demo": _demo,
    "env": _env,
}


@contextlib.contextmanager
def _argument_errors() -> Iterator[None]:
    """What wrong arguments brought about."""
    from fastgan.checkpoint import CheckpointError
    from fastgan.images import ImageError, WriteError

    try:
        yield
    except WriteError as error:  # a full disk
        raise Failure(1, str(error)) from error
    except BrokenPipeError:  # of what is printed, such as the help
        raise
    except (ValueError, OSError, CheckpointError, ImageError, ImplUnavailableError) as error:
        if isinstance(error, OSError) and error.filename and error.strerror:
            raise Failure(2, f"{error.filename}: {error.strerror}") from error
        raise Failure(2, str(error)) from error


@contextlib.contextmanager
def _training_errors() -> Iterator[None]:
    """What went wrong on the way."""
    from fastgan.checkpoint import CheckpointError
    from fastgan.images import ImageError
    from fastgan.training import TrainingError, TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as error:
        raise Failure(128 + error.signum, str(error)) from error
    except ImplUnavailableError as error:  # asked for by FASTGAN_IMPL
        raise Failure(2, str(error)) from error
    except (TrainingError, CheckpointError, ImageError, OSError) as error:
        raise Failure(1, str(error)) from error


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]


def _log_to_stderr(level: int = logging.INFO) -> None:
    """Log lines go above a progress bar, not through it."""
    from tqdm import tqdm

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
            tqdm.write(f"fastgan: {level}{self.format(record)}", file=sys.stderr)

    logger = logging.getLogger("fastgan")
    if not logger.handlers:
        logger.addHandler(Lines())
        logger.setLevel(level)


def _fail(code: int, message: str) -> int:
    print(f"fastgan: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
