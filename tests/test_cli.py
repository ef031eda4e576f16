"""The command line: what it says, and with which exit code."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastgan
from dummy_recipe import Dummy
from fastgan import cli
from fastgan.ops import _dispatch
from fastgan.recipes import RECIPES
from fastgan.recipes.style_transfer import StyleTransfer
from fastgan.training.config import Pictures
from fastgan.training.data import Augmentation, PictureStream
from pictures import write_pictures
from tiny import save_tiny_recipe, tiny_flags, tiny_style_transfer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def train(folders: Pictures, out: Path, *more: str, recipe: str = "dummy") -> int:
    return cli.main(
        [
            "train", recipe, "--content", str(folders.content), "--style", str(folders.style),
            "--out", str(out), "--steps", "2", "--workers", "0",
            "--device", "cpu", *more,
        ]
    )  # fmt: skip


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What standard error holds, which must be one line of fastgan's."""
    said = capsys.readouterr().err
    assert said.startswith("fastgan: "), said
    assert said.endswith("\n"), said
    assert said.count("\n") == 1, said
    return said.removeprefix("fastgan: ").strip()


def test_train_then_stylize(
    folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folders, tmp_path / "run") == 0
    assert (
        str(tmp_path / "run" / "checkpoints" / "step_00000002.safetensors")
        in capsys.readouterr().out
    )
    stylize = [
        "stylize", "--checkpoint", str(tmp_path / "run"), "--content",
        str(folders.content / "0.png"), str(folders.content / "1.png"),
        "--style", str(folders.style / "0.png"), "--out", str(tmp_path / "out"), "--alpha", "0.5",
        "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(stylize) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out' / '0.png'} and 1 more\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png"]


def test_flags_win_over_the_preset_and_over_the_checkpoint(
    folders: Pictures, tmp_path: Path
) -> None:
    assert train(folders, tmp_path, "--preset", "large", "--batch-size", "1", "--no-flip") == 0
    first = fastgan.checkpoint.read_header(tmp_path / "latest.safetensors")["config"]
    assert first["recipe"]["width"] == 16
    assert first["augmentation"] == {
        "size": 48, "resize": None, "flip": False, "rotate": 0.0, "jitter": 0.0,
    }  # fmt: skip
    assert first["training"]["batch_size"] == 1
    resume = ["train", "dummy", "--out", str(tmp_path), "--resume", "--steps", "3"]
    assert cli.main([*resume, "--weight-content", "2.5"]) == 0
    second = fastgan.checkpoint.read_header(tmp_path / "latest.safetensors")
    assert second["step"] == 3
    assert second["config"]["augmentation"] == first["augmentation"]
    assert second["config"]["recipe"] == {**first["recipe"], "weight_content": 2.5}
    # the same command once more, --no-flip included, with --resume
    assert train(folders, tmp_path, "--no-flip", "--resume") == 0


def test_every_flag_of_stylize(
    folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = save_tiny_recipe(tiny_style_transfer(), tmp_path)
    flags = [
        "stylize", "--checkpoint", str(recipe), "--content", str(folders.content), "--style",
        str(folders.style / "0.png"), str(folders.style), "--out", str(tmp_path / "out"),
        "--style-weights", "0.7", "0.3", "--alpha", "0.9", "--keep-color", "--max-side", "40",
        "--batch-size", "2", "--precision", "bf16", "--strict", "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(flags) == 0
    said = capsys.readouterr()
    assert said.out == f"wrote {tmp_path / 'out' / '0.png'} and 4 more\n"
    assert "5/5" in said.err  # the progress bar
    assert cli.main([*flags, "--style-weights", "1", "-1"]) == 2
    assert "style_weights must be finite, not negative" in one_line(capsys)


@pytest.mark.skipif(sys.platform == "darwin", reason="all names are text there")
def test_names_that_are_no_text(folders: Pictures, tmp_path: Path) -> None:
    recipe = save_tiny_recipe(tiny_style_transfer(), tmp_path)
    content = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(folders.content / "0.png", content)
    command = ["stylize", "--checkpoint", str(recipe), "--content", content, "--device", "cpu"]
    command += ["--style", str(folders.style / "0.png"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    ended = subprocess.run(
        [sys.executable, "-m", "fastgan.cli", *command],
        capture_output=True, text=True, timeout=60, env=environment, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"wrote {tmp_path}/out/caf\\udce9.png\n"


class TestWrongArguments:
    """One clear line, exit code 2, no traceback."""

    def test_missing_folder(
        self, folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        missing = Pictures(tmp_path / "nowhere", folders.style)
        assert train(missing, tmp_path / "run") == 2
        assert one_line(capsys) == f"no such file or folder: {tmp_path / 'nowhere'}"
        assert not (tmp_path / "run").exists()

    def test_empty_folder(
        self, folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty").mkdir()
        assert train(Pictures(folders.content, tmp_path / "empty"), tmp_path / "run") == 2
        assert one_line(capsys) == f"style: no pictures in {tmp_path / 'empty'}"
        (tmp_path / "empty" / "phone.heic").write_bytes(b"")
        assert train(Pictures(folders.content, tmp_path / "empty"), tmp_path / "run") == 2
        assert "style: no pictures in" in (line := one_line(capsys))
        assert "(looked for .bmp" in line

    def test_strict(
        self, folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "text.png").write_text("no picture")
        bad = Pictures(folders.content, tmp_path / "bad")
        assert train(bad, tmp_path / "run", "--strict") == 2
        assert "text.png" in one_line(capsys)

    def test_unknown_recipe(
        self, folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train(folders, tmp_path / "run", recipe="dumy") == 2
        said = one_line(capsys)
        assert said.startswith("unknown recipe 'dumy'; known: ")
        assert "dummy" in said

    def test_unknown_preset(
        self, folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train(folders, tmp_path / "run", "--preset", "huge") == 2
        assert one_line(capsys) == "unknown preset 'huge' of dummy; known: small, large"

    def test_checkpoint_of_another_recipe(
        self,
        folders: Pictures,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        class Other(Dummy):
            name = "other"

        monkeypatch.setitem(RECIPES, "other", Other)
        assert train(folders, tmp_path) == 0
        capsys.readouterr()
        assert train(folders, tmp_path, "--resume", recipe="other") == 2
        assert "safetensors: of the recipe dummy, not of other" in one_line(capsys)

    def test_preset_of_another_run(
        self, folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train(folders, tmp_path) == 0
        capsys.readouterr()
        assert train(folders, tmp_path, "--resume", "--preset", "large") == 2
        assert one_line(capsys) == f"preset: {tmp_path} was begun with small, got large"

    def test_future_checkpoint(
        self,
        folders: Pictures,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert train(folders, tmp_path) == 0
        latest = (tmp_path / "latest.safetensors").resolve()
        state = fastgan.checkpoint.load(latest)
        state["config"]["recipe"]["invention"] = 1
        fastgan.checkpoint.save(latest, {**state, "fastgan": "9.0"})
        capsys.readouterr()
        assert train(folders, tmp_path, "--resume") == 2
        assert one_line(capsys) == (
            f"{latest} (fastgan 9.0): config.recipe.invention: "
            "unknown to this version of fastgan; a newer one wrote it"
        )

    def test_damaged_checkpoint(
        self, folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train(folders, tmp_path) == 0
        (tmp_path / "latest.safetensors").resolve().write_bytes(b"nonsense")
        capsys.readouterr()
        assert train(folders, tmp_path, "--resume") == 2
        assert "truncated, or no safetensors file" in one_line(capsys)

    def test_out_holds_a_run(
        self, folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train(folders, tmp_path) == 0
        capsys.readouterr()
        assert train(folders, tmp_path) == 2
        assert one_line(capsys) == (
            f"out: {tmp_path} holds a run; --resume goes on with it, "
            "--overwrite deletes it and starts anew"
        )
        assert train(folders, tmp_path, "--overwrite") == 0

    @pytest.mark.parametrize("out", ["/proc/run", "/dev/null", "/dev/null/run"])
    def test_out_not_writable(
        self, folders: Pictures, capsys: pytest.CaptureFixture[str], out: str
    ) -> None:
        if not Path("/proc/self").exists():
            pytest.skip("needs /proc")
        assert train(folders, Path(out)) == 2
        assert one_line(capsys).startswith("out: ")

    def test_device_that_is_not_here(
        self, folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train(folders, tmp_path / "run", "--device", "cuda:99") == 2
        assert one_line(capsys).startswith("device 'cuda:99' cannot be used here: ")
        assert train(folders, tmp_path / "run", "--device", "toaster") == 2
        assert one_line(capsys).startswith("device 'toaster' cannot be used here: ")

    @pytest.mark.parametrize("command", ["train", "stylize"])
    def test_implementation_that_cannot_run(
        self,
        folders: Pictures,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        command: str,
    ) -> None:
        recipe = save_tiny_recipe(tiny_style_transfer(), tmp_path)
        monkeypatch.setattr(_dispatch, "_FROM_ENVIRONMENT", {"instance_norm": "triton"})
        monkeypatch.setattr(_dispatch, "INTERPRETING", False)
        if command == "train":
            code = train(folders, tmp_path / "run", *tiny_flags("style_transfer"),
                         recipe="style-transfer")  # fmt: skip
        else:
            flags = ["--style", str(folders.style / "0.png"), "--out", str(tmp_path / "out.png")]
            flags += ["--content", str(folders.content / "0.png"), "--device", "cpu"]
            code = cli.main(["stylize", "--checkpoint", str(recipe), *flags])
        assert code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert ": triton: CPU tensors run only in Triton's interpreter" in said.splitlines()[-1]

    def test_implementation_that_is_unknown(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_dispatch, "_WRONG_ENVIRONMENT", "FASTGAN_IMPL=bogus: unknown")
        assert cli.main(["export"]) == 2
        assert one_line(capsys) == "FASTGAN_IMPL=bogus: unknown"
        assert cli.main(["env"]) == 0
        assert "wrong: FASTGAN_IMPL=bogus: unknown" in capsys.readouterr().out

    def test_unknown_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["trian"]) == 2
        assert one_line(capsys).startswith("unknown command 'trian'; known: train, ")

    @pytest.mark.parametrize(
        "more",
        [
            ("--steps", "0"),
            ("--size", "-3"),
            ("--stepz", "3"),
            ("--resume", "--overwrite"),
            ("--out",),
        ],
    )
    def test_bad_flags(
        self, folders: Pictures, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str
    ) -> None:
        assert train(folders, tmp_path / "run", *more) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert more[0].strip("-") in said
        assert not (tmp_path / "run").exists()

    def test_flags_left_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["train", "dummy"]) == 2
        said = capsys.readouterr().err
        assert all(flag in said for flag in ("--content", "--style", "--out"))


class TestFaults:
    """One clear line and exit code 1 for what goes wrong on the way."""

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("loss", "step 1: the loss generator/content is not finite"),
            ("gradient", "step 1: the weights generator"),
            ("memory", "out of memory: 2 pictures of 32 px"),
        ],
    )
    def test_fault(
        self,
        folders: Pictures,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        fault: str,
        message: str,
    ) -> None:
        flags = ("--fault", fault, "--fault-step", "0", "--checkpoint-every", "1")
        assert train(folders, tmp_path, *flags) == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said
        *earlier, last = [line for line in said.splitlines() if line.startswith("fastgan: ")]
        assert last.startswith(f"fastgan: {message}")
        assert len(earlier) == 2  # device and precision, pictures

    def test_too_little_memory_to_stylize(
        self,
        folders: Pictures,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

        recipe = save_tiny_recipe(tiny_style_transfer(), tmp_path)
        monkeypatch.setattr(StyleTransfer, "stylize", fail)
        flags = ["--style", str(folders.style / "0.png"), "--out", str(tmp_path / "out.png")]
        content = ["--content", str(folders.content / "0.png"), "--device", "cpu"]
        assert cli.main(["stylize", "--checkpoint", str(recipe), *content, *flags]) == 1
        assert one_line(capsys).startswith("out of memory: 1 picture of 60x50 px in float32 on cpu")

    @pytest.mark.parametrize(
        ("out", "room", "message"),
        [
            ("out.png", 500, "could not write {}/out.png: File too large"),
            ("file/out.png", None, "could not make the folder {}/file: File exists"),
        ],
    )
    def test_a_picture_that_cannot_be_written(
        self,
        folders: Pictures,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        out: str,
        room: int | None,
        message: str,
    ) -> None:
        (tmp_path / "file").touch()
        recipe = save_tiny_recipe(tiny_style_transfer(), tmp_path)
        flags = ["--style", str(folders.style / "0.png"), "--out", str(tmp_path / out)]
        content = ["--content", str(folders.content / "0.png"), "--device", "cpu"]
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room or limits[0], limits[1]))
        try:
            code = cli.main(["stylize", "--checkpoint", str(recipe), *content, *flags])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 1
        assert one_line(capsys) == message.format(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", recipe.name]

    def test_a_picture_that_goes_bad_under_strict(
        self,
        folders: Pictures,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        bad = write_pictures(tmp_path / "pictures")
        late = PictureStream(bad.folders, Augmentation(32), batch_size=2).batch(1).paths[0]
        late.write_text("no picture")
        assert train(bad, tmp_path / "run", "--strict") == 1
        said = capsys.readouterr().err
        assert f"fastgan: {late}: no picture\n" in said
        assert "Traceback" not in said

    @pytest.mark.parametrize(
        ("module", "command"),
        [("tyro", "train"), ("tqdm", "stylize"), ("safetensors", "stylize"), ("PIL", "train")],
    )
    def test_missing_extra(
        self, capsys: pytest.CaptureFixture[str], command: str, module: str, tmp_path: Path
    ) -> None:
        code = (
            "import sys\n"
            f"sys.modules[{module!r}] = None\n"
            "from fastgan import cli\n"
            "sys.exit(cli.main(sys.argv[1:]))\n"
        )
        flags = {
            "train": ["x", "--content", "a", "--style", "b", "--out", "c"],
            "stylize": ["--checkpoint", "a", "--content", "b", "--style", "c", "--out", "d"],
        }[command]
        ended = subprocess.run(
            [sys.executable, "-c", code, command, *flags],
            capture_output=True, text=True, timeout=60, check=False,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        assert ended.returncode == 1, ended.stderr
        assert ended.stderr.count("\n") == 1, ended.stderr
        assert "pip install 'fastgan[train]'" in ended.stderr


class TestHelp:
    def test_top(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in ([], ["--help"]):
            assert cli.main(arguments) == 0
            said = capsys.readouterr().out
            assert all(f"  {command} " in said for command in ("train", "stylize", "export", "env"))

    def test_train(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["train", "--help"]) == 0
        assert "dummy" in capsys.readouterr().out

    def test_recipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["train", "dummy", "--help", "--preset", "large"]) == 0
        said = capsys.readouterr().out
        flags = (
            "content style out steps size batch-size preset precision seed checkpoint-every resume "
            "overwrite weight-content objective strict workers log-every device"
        )
        assert all(f"--{flag}" in said for flag in flags.split())
        assert "Presets: small, large." in said
        assert "(default: 48)" in said

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == fastgan.__version__

    def test_env(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["env"]) == 0
        assert f"fastgan {fastgan.__version__}" in capsys.readouterr().out
        assert cli.main(["env", "now"]) == 2
        assert cli.main(["env", "--help"]) == 0

    @pytest.mark.parametrize("arguments", [["train", "dummy", "--help"], ["--help"]])
    def test_nobody_reads_on(self, arguments: list[str]) -> None:
        code = (
            "import dummy_recipe, sys\nfrom fastgan import cli\nsys.exit(cli.main(sys.argv[1:]))\n"
        )
        read, write = os.pipe()
        os.close(read)
        ended = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        os.close(write)
        assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")

    def test_as_a_module(self) -> None:
        ended = subprocess.run(
            [sys.executable, "-m", "fastgan.cli", "--version"],
            capture_output=True, text=True, timeout=60, check=True,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        assert ended.stdout.strip() == fastgan.__version__


@pytest.mark.parametrize(
    ("package", "missing", "needs"),
    [
        ("fastgan.inference", "PIL", "Pillow and tqdm"),
        ("fastgan.inference", "tqdm", "Pillow and tqdm"),
        ("fastgan.training", "tensorboard", "tensorboard and tqdm"),
        ("fastgan.training", "tqdm", "tensorboard and tqdm"),
    ],
)
def test_without_an_extra_one_line_says_what_to_install(
    package: str, missing: str, needs: str
) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; import {package}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {package} needs {needs}: pip install 'fastgan[train]' (")
    assert missing in last
