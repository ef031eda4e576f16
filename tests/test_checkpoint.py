"""The checkpoint format: round trips to the bit, damage, foreign files, interrupted writes."""

import json
import math
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from fastgan import checkpoint
from fastgan.checkpoint import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def round_trip(path: Path, state: Any) -> Any:
    checkpoint.save(path, state)
    return checkpoint.load(path)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_same(actual: Any, expected: Any) -> None:
    """Equal in type, structure and every bit; tensors in dtype and strides too."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    elif isinstance(expected, Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.stride() == expected.stride()
        assert bits(actual) == bits(expected)
    elif isinstance(expected, float):
        assert repr(actual) == repr(expected)
    else:
        assert actual == expected


@st.composite
def dense_tensors(draw: st.DrawFn) -> Tensor:
    """Any stored dtype, 0 to 4 dimensions, empty ones too, dimensions in any order of memory."""
    dtype = draw(st.sampled_from(sorted(checkpoint._DTYPES, key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    size = math.prod(shape) * dtype.itemsize
    # a bool holds 0 or 1; any other bit pattern, NaNs included, is a value of its dtype
    top = 1 if dtype == torch.bool else 255
    data = draw(st.lists(st.integers(0, top), min_size=size, max_size=size))
    flat = torch.tensor(data, dtype=torch.uint8).view(dtype)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.reshape([shape[i] for i in order]).permute(inverse)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=20)
)
keys = st.one_of(st.text(), st.sampled_from(["$tensor", "a.b", "__metadata__", ""]), st.integers())
trees = st.recursive(
    scalars | dense_tensors(),
    lambda children: st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.dictionaries(keys, children, max_size=4),
    ),
    max_leaves=12,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(state=trees)
def test_any_tree_comes_back_to_the_bit(path: Path, state: Any) -> None:
    assert_same(round_trip(path, state), state)


@pytest.mark.parametrize("dtype", sorted(checkpoint._DTYPES, key=str), ids=str)
def test_every_dtype_scalar_and_empty(path: Path, dtype: torch.dtype) -> None:
    full = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    assert_same(round_trip(path, {"a": full, "b": full[0, 1].clone(), "c": full[:0].clone()}), {
        "a": full, "b": full[0, 1], "c": full[:0],
    })  # fmt: skip


def test_names_in_the_file_are_paths_of_the_tree(path: Path) -> None:
    state = {"net": {"weight": torch.ones(2), "0": [torch.zeros(1)]}, "net.weight": torch.zeros(3)}
    assert_same(round_trip(path, state), state)
    stored = safetensors.torch.load_file(path)
    assert sorted(stored) == ["net.0.0", "net.weight", "net.weight~2"]
    assert torch.equal(stored["net.weight"], torch.ones(2))


def test_channels_last_is_contiguous_in_the_file_and_channels_last_again(path: Path) -> None:
    weight = torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last)
    pointwise = torch.randn(4, 1, 1, 1).as_strided((4, 1, 1, 1), (1, 1, 4, 4))
    loaded = round_trip(path, {"weight": weight, "pointwise": pointwise})
    assert_same(loaded, {"weight": weight, "pointwise": pointwise})
    assert torch.equal(safetensors.torch.load_file(path)["weight"], weight)


def test_slices_and_expanded_tensors_come_back_dense(path: Path) -> None:
    base = torch.randn(6, 4)
    loaded = round_trip(path, {"slice": base[::2, 1:3], "expanded": base[:, :1].expand(6, 4)})
    assert torch.equal(loaded["slice"], base[::2, 1:3])
    assert loaded["slice"].is_contiguous()
    assert torch.equal(loaded["expanded"], base[:, :1].expand(6, 4))
    loaded["expanded"][0, 0] = 7  # elements no longer share memory
    assert loaded["expanded"][0, 1] != 7
    assert path.stat().st_size < 2000, "a slice must not store its base"


def test_tied_tensors_are_stored_once_and_tied_again(path: Path) -> None:
    shared = nn.Linear(64, 64, bias=False)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    state = {"model": model.state_dict(), "transposed": shared.weight.detach().t()}
    loaded = round_trip(path, state)
    assert loaded["model"]["a.weight"] is loaded["model"]["b.0.weight"]
    assert len(safetensors.torch.load_file(path)) == 2
    assert_same(loaded["transposed"], state["transposed"])
    assert loaded["transposed"].data_ptr() != loaded["model"]["a.weight"].data_ptr()


def test_equal_and_empty_tensors_are_not_tied(path: Path) -> None:
    loaded = round_trip(path, [torch.zeros(2), torch.zeros(2), torch.zeros(0), torch.zeros(0)])
    assert len({id(tensor) for tensor in loaded}) == 4


def test_loaded_tensors_do_not_depend_on_the_file(path: Path) -> None:
    loaded = round_trip(path, {"a": torch.arange(1000.0)})
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(loaded["a"], torch.arange(1000.0))


def test_states_of_random_number_generators(path: Path) -> None:
    numpy_generator = np.random.default_rng(1)
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - what a training script may have used
        "generator": numpy_generator.bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    expected = (random.random(), np.random.rand(), numpy_generator.random(), torch.rand(1))  # noqa: NPY002
    loaded = round_trip(path, state)
    random.setstate(loaded["python"])
    np.random.set_state(loaded["numpy"])  # noqa: NPY002
    numpy_generator.bit_generator.state = loaded["generator"]
    torch.set_rng_state(loaded["torch"])
    assert (random.random(), np.random.rand(), numpy_generator.random(), torch.rand(1)) == expected  # noqa: NPY002


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_channels_last_training_goes_on_in_the_same_bits(path: Path, amsgrad: bool) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))
        net = net.to(memory_format=torch.channels_last)
        return net, torch.optim.Adam(net.parameters(), 0.01, fused=True, amsgrad=amsgrad)

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            net(torch.randn(2, 3, 9, 9)).square().mean().backward()
            optimizer.step()

    whole, optimizer = build()
    train(whole, optimizer, range(6))

    net, optimizer = build()
    train(net, optimizer, range(3))
    checkpoint.save(path, {"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    net, optimizer = build()
    loaded = checkpoint.load(path)
    net.load_state_dict(loaded["net"])
    optimizer.load_state_dict(loaded["optimizer"])
    train(net, optimizer, range(3, 6))
    assert_same(dict(net.state_dict()), dict(whole.state_dict()))


def test_header_without_the_tensors(path: Path) -> None:
    weight = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    checkpoint.save(path, {"recipe": "cyclegan", "step": 7, "net": {"weight": weight}})
    with path.open("r+b") as file:  # ruin the data: the header must not depend on it
        file.seek(-weight.nbytes, os.SEEK_END)
        file.write(b"\xff" * weight.nbytes)
    header = checkpoint.read_header(path)
    assert (header["recipe"], header["step"]) == ("cyclegan", 7)
    stub = header["net"]["weight"]
    assert stub.is_meta
    assert (stub.shape, stub.dtype, stub.stride()) == (weight.shape, weight.dtype, weight.stride())


@pytest.mark.gpu
def test_to_and_from_the_gpu(path: Path) -> None:
    weight = torch.randn(4, 3, 2, 5, device="cuda").to(memory_format=torch.channels_last)
    checkpoint.save(path, [weight, weight])
    on_cpu, _ = checkpoint.load(path)
    assert_same(on_cpu, weight.cpu())
    on_gpu, twin = checkpoint.load(path, device="cuda")
    assert on_gpu is twin
    assert on_gpu.stride() == weight.stride()
    assert torch.equal(on_gpu, weight)


# --- what cannot be saved ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Path("a"), "PosixPath"),
        ({1, 2}, "set"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (np.zeros(2, dtype=np.complex128), "complex128"),
        (np.array(["a"]), "ndarray"),
    ],
)
def test_what_has_no_place_in_a_file_is_named(path: Path, value: Any, named: str) -> None:
    with pytest.raises(TypeError, match=rf"state\['a'\]\['1'\] is a .*{named}"):
        checkpoint.save(path, {"a": [0, value]})
    assert not list(path.parent.iterdir())


def test_the_name_must_end_in_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors"):
        checkpoint.save(tmp_path / "model.pt", {})


# --- what cannot be loaded --------------------------------------------------------------------


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle"])
def test_a_pickle_is_refused_and_not_executed(path: Path, kind: str) -> None:
    bomb = Bomb(path.parent / "exploded")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=kind == "torch")
    for read in (checkpoint.load, checkpoint.read_header):
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*pickle"):
            read(path)
    assert not bomb.mark.exists()


def test_every_truncation_is_an_error(path: Path) -> None:
    checkpoint.save(path, {"a": torch.arange(40), "b": [1, 2.5, "c"]})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: (truncated|the file is e)"):
            checkpoint.load(path)


@pytest.mark.parametrize("content", [b"hello", b"<html><body>not found</body></html>", b"\0" * 64])
def test_other_files_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.load(path)


def test_missing_files_and_folders(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^could not read \S+: no such file or folder$"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match=str(path.parent)):
        checkpoint.load(path.parent)
    with pytest.raises(CheckpointError, match=r"could not write .*absent.*No such file"):
        checkpoint.save(path.parent / "absent" / path.name, {})


def test_safetensors_files_of_others_are_refused(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not one that fastgan wrote"):
        checkpoint.load(path)


def write_header(path: Path, header: Any) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    safetensors.torch.save_file({"a": torch.zeros(2, 3)}, path, {"fastgan": text})


def test_a_later_format_is_refused_with_the_remedy(path: Path) -> None:
    write_header(path, {"version": 2, "tree": None})
    with pytest.raises(CheckpointError, match="format 2, this fastgan reads 1"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "header",
    [
        "{",
        "[]",
        "7",
        "[" * 5000,
        {"version": 1},
        *(
            {"version": 1, "tree": tree}
            for tree in (
                {"$tensor": "absent"},
                {"$tensor": 3},
                {"$tensor": "a", "stride": [1]},
                {"$tensor": "a", "stride": [0, 0]},
                {"$tensor": "a", "stride": [10**12, 1]},
                {"$tensor": "a", "stride": [10**30, 1]},
                {"$tensor": "a", "stride": ["3", "1"]},
                {"$tensor": "a", "stride": "31"},
                {"$float": "one"},
                {"$bytes": "%"},
                {"$dict": [[1, 2, 3]]},
                {"$dict": [[[], 1]]},
                {"$eval": "1"},
                {"$tuple": {"a": 1}},
            )
        ),
    ],
    ids=str,
)
def test_a_forged_header_is_an_error_and_no_crash(path: Path, header: Any) -> None:
    write_header(path, header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.load(path)


# --- interrupted writes -----------------------------------------------------------------------


def state_number(number: int) -> dict[str, Any]:
    return {"number": number, "weights": torch.full((100_000,), float(number))}


def assert_complete(path: Path) -> int:
    loaded = checkpoint.load(path)
    assert_same(loaded, state_number(loaded["number"]))
    return int(loaded["number"])


def test_a_full_disk_leaves_the_last_file(path: Path) -> None:
    checkpoint.save(path, state_number(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # writes beyond fail, as when full
    try:
        with pytest.raises(
            CheckpointError, match=r"could not write .*model\.safetensors: File too"
        ):
            checkpoint.save(path, state_number(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert assert_complete(path) == 1
    assert list(path.parent.iterdir()) == [path]


def test_the_disk_has_the_bytes_before_the_file_has_its_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        synced = [p for p in (path.parent, *path.parent.iterdir()) if p.stat().st_ino == inode]
        events.extend(f"fsync {p.name}" for p in synced)
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        events.append(f"{self.name} -> {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    checkpoint.save(path, {"a": torch.zeros(3)})
    temporary = "model.safetensors.tmp"
    assert events == [
        f"fsync {temporary}",
        f"{temporary} -> model.safetensors",
        f"fsync {path.parent.name}",
    ]


@pytest.mark.slow
def test_kill_while_saving_leaves_a_complete_file(path: Path) -> None:
    script = """
import sys
import torch
from fastgan import checkpoint
number = int(sys.argv[2])
while True:
    number += 1
    state = {"number": number, "weights": torch.full((100_000,), float(number))}
    checkpoint.save(sys.argv[1], state)
    print(number, flush=True)
"""
    number = 0
    pause = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(path), str(number)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        reported = int(process.stdout.readline())
        time.sleep(pause.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        reported = int((process.stdout.read().split() or [reported])[-1])
        process.wait()
        number = assert_complete(path)
        assert number >= reported, "a save that returned must survive"
    assert {file.name for file in path.parent.iterdir()} <= {path.name, path.name + ".tmp"}


def test_without_safetensors_one_line_says_what_to_install() -> None:
    script = "import sys; sys.modules['safetensors'] = None; import fastgan.checkpoint"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: fastgan.checkpoint needs safetensors: pip install 'fastgan[train]'"
    )
