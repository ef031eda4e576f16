"""The picture stream: every batch a function of its number, bad files named and replaced."""

import itertools
import logging
import math
import multiprocessing.resource_sharer
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from PIL import ExifTags, Image
from torch import Tensor

from fastgan.images import ImageError, load_image
from fastgan.training.data import Augmentation, PictureStream, ReadBatch, ReaderError
from fastgan.training.guards import quiet_threads
from pictures import all_workers_end


def picture(path: Path, width: int = 40, height: int = 36, seed: int = 0) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """5 contents and 3 styles, each different."""
    for i in range(5):
        picture(tmp_path / "content" / f"{i}.png", seed=i)
    for i in range(3):
        picture(tmp_path / "style" / "sub" / f"{i}.png", 36, 50, seed=10 + i)
    return {"content": tmp_path / "content", "style": tmp_path / "style"}


SMALL = Augmentation(16, 20, jitter=0.2, rotate=5.0)


def stream(folders: dict[str, Path], **options: Any) -> PictureStream:
    return PictureStream(
        folders, options.pop("augmentation", SMALL), **{"batch_size": 2, **options}
    )


def take(pictures: PictureStream, count: int, start: int = 0) -> list[ReadBatch]:
    return list(itertools.islice(pictures.batches(start), count))


def assert_equal(actual: list[ReadBatch], expected: list[ReadBatch]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.paths == e.paths
        assert list(a.images) == list(e.images)
        for domain, images in e.images.items():
            assert torch.equal(a.images[domain], images), domain


# --- the stream -------------------------------------------------------------------------------


def test_a_batch(folders: dict[str, Path]) -> None:
    (batch,) = take(stream(folders, batch_size=3), 1)
    assert list(batch.images) == ["content", "style"]
    for images in batch.images.values():
        assert images.shape == (3, 3, 16, 16)
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert [path.parent.name for path in batch.paths] == ["content"] * 3 + ["sub"] * 3


def test_every_epoch_has_every_file_once_in_another_order(folders: dict[str, Path]) -> None:
    files = [path for batch in take(stream(folders, batch_size=1), 30) for path in batch.paths]
    for own, size in ((files[::2], 5), (files[1::2], 3)):
        epochs = [own[i : i + size] for i in range(0, len(own), size)]
        assert all(sorted(epoch) == sorted(set(own)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 2


def test_domains_are_unpaired(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.png", seed=i)
    pictures = stream({"A": tmp_path, "B": tmp_path}, batch_size=1)
    pairs = Counter(tuple(batch.paths) for batch in take(pictures, 200))
    assert len(pairs) == 16
    assert max(pairs.values()) < 40


def test_seeds_differ_in_order_and_crops(folders: dict[str, Path]) -> None:
    first, second = (take(stream(folders, seed=seed), 5) for seed in (0, 1))
    assert [batch.paths for batch in first] != [batch.paths for batch in second]
    style = folders["style"] / "sub" / "0.png"
    alone = [stream({"style": style}, seed=seed).batch(0).images["style"] for seed in (0, 1)]
    assert not torch.equal(*alone)


def test_the_same_file_is_cropped_anew_each_time(folders: dict[str, Path]) -> None:
    crops = take(stream({"style": folders["style"] / "sub" / "0.png"}, batch_size=1), 8)
    assert len({bytes(batch.images["style"].flatten().tolist()) for batch in crops}) == 8


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_batches(folders: dict[str, Path]) -> None:
    (folders["content"] / "2.png").write_bytes(b"")
    expected = take(stream(folders), 12)
    for workers in (1, 3):
        assert_equal(take(stream(folders, workers=workers), 12), expected)
        assert_equal(take(stream(folders, workers=workers), 5, start=7), expected[7:])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(start=st.integers(0, 10**9), batch_size=st.integers(1, 7), seed=st.integers(0, 2**63))
def test_a_stream_goes_on_from_any_position(
    folders: dict[str, Path], start: int, batch_size: int, seed: int
) -> None:
    whole = take(stream(folders, batch_size=batch_size, seed=seed), 4, start)
    resumed = take(stream(folders, batch_size=batch_size, seed=seed, cache_mb=0), 2, start + 2)
    assert_equal(resumed, whole[2:])
    assert_equal([stream(folders, batch_size=batch_size, seed=seed).batch(start)], whole[:1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batch_of_one_process(folders: dict[str, Path], world_size: int) -> None:
    (folders["content"] / "0.png").write_text("no picture")
    parts = [
        take(stream(folders, rank=rank, world_size=world_size), 6) for rank in range(world_size)
    ]
    for step, whole in enumerate(take(stream(folders, batch_size=2 * world_size), 6)):
        for domain, images in whole.images.items():
            joined = torch.cat([part[step].images[domain] for part in parts])
            assert torch.equal(joined, images)


def test_steps_per_epoch(folders: dict[str, Path]) -> None:
    assert stream(folders, batch_size=1).steps_per_epoch == 5
    assert stream(folders, batch_size=2).steps_per_epoch == 3
    assert stream(folders, batch_size=2, rank=1, world_size=2).steps_per_epoch == 2
    assert stream(folders, batch_size=9).steps_per_epoch == 1


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_global_random_numbers_are_left_alone(folders: dict[str, Path], workers: int) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    take(stream(folders, workers=workers), 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_files_are_decoded_once_as_far_as_the_cache_reaches(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[Path] = Counter()

    def counted(path: Path, **options: Any) -> Tensor:
        reads[path] += 1
        return load_image(path, **options)

    monkeypatch.setattr("fastgan.training.data.load_image", counted)
    cached = take(stream(folders), 20)
    assert set(reads.values()) == {1}
    assert len(reads) == 8
    reads.clear()
    assert_equal(take(stream(folders, cache_mb=0), 20), cached)
    assert reads.total() == 84  # 20 batches and the trial batch


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_memory(folders: dict[str, Path], workers: int) -> None:
    expected = take(stream(folders), 3)
    pinned = take(stream(folders, workers=workers, pin_memory=True), 3)
    assert_equal(pinned, expected)
    for batch in pinned:
        for images in batch.images.values():
            assert images.is_pinned()
            assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_signals_to_the_process_group_leave_the_workers_alive(folders: dict[str, Path]) -> None:
    script = """
import os, signal, sys
from fastgan.training.data import Augmentation, PictureStream
received = []
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, lambda signum, frame: received.append(signum))
stream = PictureStream({"a": sys.argv[1]}, Augmentation(16), batch_size=1, workers=2)
for number, batch in enumerate(stream.batches()):
    print(number, flush=True)
    if number == 5:
        sys.stdin.readline()
    if number == 60:
        sys.exit(f"received {received}")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folders["content"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "5\n":
        assert process.poll() is None
    for signum in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, signum)
        time.sleep(0.2)
    _, error = process.communicate("\n", timeout=60)
    assert error.strip() == f"received [{int(signal.SIGINT)}, {int(signal.SIGTERM)}]"


# --- workers that fail ------------------------------------------------------------------------


# PyTorch's iterator raises in its finalizer if its constructor has.
half_built = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.slow
def test_workers_live_from_the_first_batch_to_the_close(folders: dict[str, Path]) -> None:
    with all_workers_end() as workers:
        batches = stream(folders, workers=2).batches()
        assert not workers()
        next(batches)
        assert len(workers()) == 2
        batches.close()
        assert not workers()


@pytest.mark.slow
def test_the_death_of_a_worker_interrupts_nothing_but_the_next_read(
    folders: dict[str, Path],
) -> None:
    with all_workers_end() as workers:
        batches = stream(folders, workers=1).batches()
        next(batches)
        (worker,) = workers()
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        signal.raise_signal(signal.SIGCHLD)
        with pytest.raises(ReaderError, match=r"^a process that .* was killed \(signal 9\); "):
            for _ in batches:
                pass


@pytest.fixture
def broken_connections(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """As to a worker that is killed a moment before its pictures are fetched from it."""

    def break_them(error: Exception) -> None:
        def detach(self: object) -> int:
            raise error

        monkeypatch.setattr(multiprocessing.resource_sharer.DupFd, "detach", detach)

    return break_them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConnectionResetError(104, "reset"), "[Errno 104] reset"),
        (EOFError(), "EOFError"),
        (RuntimeError("received 0 items of ancdata"), "received 0 items of ancdata"),
    ],
)
def test_the_connection_to_a_worker_breaks(
    folders: dict[str, Path],
    broken_connections: Callable[[Exception], None],
    error: Exception,
    text: str,
) -> None:
    broken_connections(error)
    with all_workers_end(), pytest.raises(ReaderError) as caught:
        next(stream(folders, workers=1).batches())
    assert str(caught.value).startswith(f"the processes that read pictures failed ({text}); ")


@pytest.mark.slow
def test_a_worker_that_ends_by_itself(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = stream(folders, workers=2)
    monkeypatch.setattr(Augmentation, "__call__", lambda *given: os._exit(3))
    with all_workers_end(), pytest.raises(ReaderError, match=r"pictures ended \(exit code 3\); "):
        next(pictures.batches())


@pytest.mark.slow
def test_the_connection_of_the_thread_that_pins_memory_breaks(
    folders: dict[str, Path],
    broken_connections: Callable[[Exception], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    broken_connections(ConnectionResetError(104, "reset"))
    # It needs an accelerator to start, but not to fail.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    with (
        all_workers_end(),
        quiet_threads(),
        pytest.raises(ReaderError, match=r"failed \(Pin memory thread exited unexpectedly\)"),
    ):
        next(stream(folders, workers=1, pin_memory=True).batches())
    assert caplog.messages == ["the thread that pins memory: ConnectionResetError(104, 'reset')"]
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.slow
def test_full_shared_memory(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own attempt is in a thread of the worker: training would wait for ever."""
    full = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device"

    def fail(self: torch.Tensor) -> None:
        raise RuntimeError(full)

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with all_workers_end(), pytest.raises(ReaderError) as caught:
        next(stream(folders, workers=1).batches())
    assert str(caught.value).startswith(
        "shared memory could not take the pictures that were read "
        f"(RuntimeError: {full}); these help: fewer workers "
    )


@pytest.mark.slow
@half_built
def test_no_more_processes(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fork, forks = os.fork, itertools.count()

    def second_fails() -> int:
        if next(forks) == 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", second_fails)
    # `held` keeps the traceback, and what it refers to.
    with all_workers_end(), pytest.raises(ReaderError, match=r"failed \(\[Errno 11\]") as held:
        next(stream(folders, workers=2).batches())
    assert str(held.value).startswith("the processes that read pictures failed (")


@pytest.mark.slow
@half_built
def test_no_more_threads(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One feeds the queue of each worker, from the moment on that all are there."""

    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with all_workers_end(), pytest.raises(ReaderError, match=r"failed \(can't start new thread\)"):
        next(stream(folders, workers=2).batches())


@pytest.mark.slow
@half_built
def test_errors_of_the_gpu_stay_what_they_are(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.accelerator, "is_available", fail)
    with all_workers_end(), pytest.raises(torch.AcceleratorError):
        next(stream(folders, workers=1, pin_memory=True).batches())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_code_in_a_worker_stay_what_they_are(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    pictures = stream(folders, workers=workers)

    def fail(self: Augmentation, *given: object) -> Tensor:
        raise EOFError("a bug")

    monkeypatch.setattr(Augmentation, "__call__", fail)
    with all_workers_end(), pytest.raises(EOFError, match="a bug"):
        next(pictures.batches())


def test_what_a_worker_sends_fits_one_write_to_a_pipe(tmp_path: Path) -> None:
    """Else training could wait for the rest of what one was killed amid."""
    folder = tmp_path / ("long" * 50)
    for number in range(300):
        picture(folder / f"{number:0200d}.png", 16, 16)
    read = stream({"a": folder, "b": folder}, batch_size=128)._reader[1]
    header = 4
    assert header + len(ForkingPickler.dumps((1, read))) < select.PIPE_BUF


# --- augmentation -----------------------------------------------------------------------------


def coordinates(height: int, width: int) -> Tensor:
    """Picture whose red is the row and whose green is the column."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None].expand(height, width)
    return torch.stack([rows, columns, torch.zeros_like(rows)])


def test_crops_are_windows_of_the_picture_anywhere_mirrored_half_the_time() -> None:
    whole = coordinates(12, 20)
    seen = Counter[tuple[int, int, bool]]()
    for seed in range(2000):
        crop = Augmentation(8)(whole, np.random.default_rng(seed))
        mirrored = bool(crop[1, 0, 0] > crop[1, 0, 1])
        crop = crop.flip(-1) if mirrored else crop
        top, left = int(crop[0, 0, 0]), int(crop[1, 0, 0])
        assert torch.equal(crop, whole[:, top : top + 8, left : left + 8])
        seen[top, left, mirrored] += 1
    assert len(seen) == 5 * 13 * 2
    assert max(seen.values()) < 45  # 15 expected of each
    assert 900 < sum(n for (_, _, mirrored), n in seen.items() if mirrored) < 1100


def test_no_flip() -> None:
    whole = coordinates(12, 20)
    for seed in range(20):
        crop = Augmentation(8, flip=False)(whole, np.random.default_rng(seed))
        assert (crop[1].diff(dim=-1) == 1).all()


@pytest.mark.parametrize("rotate", [1.0, 30.0, 180.0])
def test_rotation_leaves_no_empty_corner(rotate: float) -> None:
    white = torch.full((3, 24, 40), 255, dtype=torch.uint8)
    for seed in range(50):
        crop = Augmentation(24, rotate=rotate)(white, np.random.default_rng(seed))
        assert crop.shape == (3, 24, 24)
        assert crop.min() == 255


def test_rotation_turns_the_picture_by_the_angles_asked_for() -> None:
    ramp = torch.arange(0, 240, 2, dtype=torch.uint8).expand(3, 120, 120).contiguous()
    angles = []
    for seed in range(40):
        crop = Augmentation(40, rotate=30.0, flip=False)(ramp, np.random.default_rng(seed)).double()
        down = (crop[0, -1] - crop[0, 0]).mean().item()
        across = (crop[0, :, -1] - crop[0, :, 0]).mean().item()
        angles.append(math.degrees(math.atan2(down, across)))
    assert 20 < max(angles) < 31
    assert -31 < min(angles) < -20
    assert abs(float(np.mean(angles))) < 8


def test_jitter_changes_colours_within_its_range() -> None:
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    values = [
        int(Augmentation(8, jitter=0.2)(grey, np.random.default_rng(seed))[0, 0, 0])
        for seed in range(50)
    ]
    assert 79 <= min(values) < 90
    assert 110 < max(values) <= 120


def test_one_setting_does_not_change_the_others() -> None:
    whole = coordinates(12, 20)
    for seed in range(10):
        plain, unflipped = (
            Augmentation(8, flip=flip)(whole, np.random.default_rng(seed)) for flip in (True, False)
        )
        assert torch.equal(plain, unflipped) or torch.equal(plain.flip(-1), unflipped)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": 8, "resize": 7}, "resize must be at least the size 8, got 7; give both"),
        ({"rotate": -1.0}, r"rotate must be in \[0, 180\] degrees, got -1.0"),
        ({"jitter": 1.5}, r"jitter must be in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Augmentation(**settings)


def test_pictures_are_scaled_to_the_shorter_side(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 300).round().astype(np.uint8)
    Image.fromarray(np.tile(ramp[None, :, None], (150, 1, 3))).save(tmp_path / "a.png")
    batch = stream({"a": tmp_path}, augmentation=Augmentation(30, 50, flip=False)).batch(0)
    slope = batch.images["a"][0, 0, 15].double().diff().mean().item()
    assert slope == pytest.approx(255 / 100, abs=0.1)


# --- files of all kinds -----------------------------------------------------------------------


def write_bad_files(folder: Path) -> set[str]:
    folder.mkdir(exist_ok=True)
    whole = picture(folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("this is no picture\n")
    (folder / "empty.webp").touch()
    return {"truncated.jpg", "text.png", "empty.webp"}


def write_odd_files(folder: Path) -> set[str]:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    rgb.resize((1, 1)).save(folder / "one_pixel.png")
    rgb.convert("L").save(folder / "grey.jpg")
    rgb.convert("P").save(folder / "palette.gif")
    rgb.convert("RGBA").save(folder / "transparent.png")
    rgb.convert("CMYK").save(folder / "cmyk.JPG")
    Image.fromarray(np.asarray(rgb.convert("L")) * np.uint16(257)).save(folder / "16bit.tiff")
    rgb.save(folder / "turned.jpeg", exif=exif)
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_folder_of_odd_and_bad_files_trains_and_the_bad_ones_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    good = write_odd_files(tmp_path)
    bad = write_bad_files(tmp_path)
    pictures = stream({"a": tmp_path}, workers=workers)
    with caplog.at_level(logging.WARNING):
        seen = {path.name for batch in take(pictures, 30) for path in batch.paths}
    assert seen == good
    assert {path.name for path in pictures.unreadable} == bad
    named = [name for record in caplog.records for name in bad if name in record.getMessage()]
    assert sorted(named) == sorted(bad)
    assert "10 pictures" in pictures.summary()
    assert "3 unreadable files skipped" in pictures.summary()
    small = [record for record in caplog.records if "smaller than the crop" in record.getMessage()]
    assert len(small) == 1
    assert len(caplog.records) == 4


def test_a_bad_file_is_warned_of_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture(tmp_path / "good.png")
    (tmp_path / "bad.png").touch()
    pictures = stream({"a": tmp_path})
    take(pictures, 10)
    take(pictures, 10)
    (record,) = [record for record in caplog.records if "bad.png" in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert "empty file" in record.getMessage()


def test_a_bad_file_is_replaced_by_the_one_after_it(folders: dict[str, Path]) -> None:
    before = take(stream(folders, batch_size=5), 4)
    (folders["content"] / "1.png").write_bytes(b"")
    (folders["content"] / "4.png").write_bytes(b"")
    after = take(stream(folders, batch_size=5), 4)
    instead = {"1.png": "2.png", "4.png": "0.png"}
    for old, new in zip(before, after, strict=True):
        assert [path.name for path in new.paths[:5]] == [
            instead.get(path.name, path.name) for path in old.paths[:5]
        ]
        assert new.paths[5:] == old.paths[5:]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_strict_makes_a_bad_file_fatal(folders: dict[str, Path], workers: int) -> None:
    (folders["content"] / "3.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"3\.png: no picture"):
        take(stream(folders, workers=workers, strict=True), 5)


def test_small_pictures_are_scaled_up_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.png", 10 + i, 12, seed=i)
    pictures = stream({"a": tmp_path})
    assert all(batch.images["a"].shape == (2, 3, 16, 16) for batch in take(pictures, 10))
    (record,) = caplog.records
    assert "smaller than the crop of 16 px" in record.getMessage()


def test_a_thin_strip_does_not_fill_the_memory(tmp_path: Path) -> None:
    picture(tmp_path / "strip.png", width=20_000, height=1)
    batch = stream({"a": tmp_path}, augmentation=Augmentation(64, 128)).batch(0)
    assert batch.images["a"].shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [("no file", "no pictures in"), ("bad files", "no readable picture in")],
    ids=["no file", "bad files"],
)
def test_no_readable_picture_is_an_error_naming_the_folder(
    folders: dict[str, Path], tmp_path: Path, content: str, message: str
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    if content == "bad files":
        write_bad_files(bad)
    with pytest.raises(ValueError, match=rf"style: {message} {bad}"):
        stream({"content": folders["content"], "style": bad}, workers=2)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_pictures_that_vanish_end_the_stream_with_an_error(
    folders: dict[str, Path], workers: int
) -> None:
    pictures = stream(folders, workers=workers, cache_mb=0)
    for path in folders["style"].rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=rf"style: no pictures in {folders['style']}"):
        take(pictures, 3)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no such file or folder: {tmp_path}/absent"):
        stream({"a": tmp_path / "absent"})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
    ],
)
def test_impossible_options_are_named(
    folders: dict[str, Path], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        stream(folders, **options)


def test_without_torchvision_one_line_says_what_to_install() -> None:
    script = "import sys; sys.modules['torchvision'] = None; import fastgan.training.data"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: fastgan.training needs torchvision: pip install 'fastgan[train]'"
