"""Which implementation runs: precedence, errors, explanations, and what an import may do."""

import os
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastgan
from fastgan.ops import _dispatch

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two families whose implementations are all there, whatever this installation has."""
    monkeypatch.setattr(
        _dispatch,
        "ORDER",
        {
            "gram": {"cuda": ("triton",), "cpu": ()},
            "gan_loss": {"cuda": ("native",), "cpu": ("native",)},
        },
    )
    monkeypatch.setattr(_dispatch, "_TRITON_MISSING", None)
    monkeypatch.setattr(_dispatch, "_NATIVE_MISSING", None)
    monkeypatch.setattr(_dispatch, "_NATIVE_WITHOUT_CUDA", None)
    monkeypatch.setattr(_dispatch, "_FROM_ENVIRONMENT", {})
    monkeypatch.setattr(_dispatch, "INTERPRETING", False)
    return


def choose(family: str, device: torch.device, impl: str | None = None, **reasons: str) -> str:
    return _dispatch.choose("op", family, impl, device, cannot=reasons)


@pytest.mark.usefixtures("families")
class TestChoice:
    def test_the_fastest_that_can_run_is_chosen(self) -> None:
        assert choose("gram", CUDA) == "triton"
        assert choose("gram", CPU) == "reference"
        assert choose("gan_loss", CPU) == "native"
        assert choose("gan_loss", CPU, native="no int8") == "reference"

    def test_a_slower_one_is_passed_over_but_may_be_asked_for(self) -> None:
        slower = {"triton": "no tensor cores"}
        assert _dispatch.choose("op", "gram", None, CUDA, slower=slower) == "reference"
        assert _dispatch.choose("op", "gram", "triton", CUDA, slower=slower) == "triton"

    def test_argument_beats_block_beats_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_dispatch, "_FROM_ENVIRONMENT", {"gan_loss": "reference"})
        assert choose("gan_loss", CPU) == "reference"
        with fastgan.use_impl("native"):
            assert choose("gan_loss", CPU) == "native"
            assert choose("gan_loss", CPU, "reference") == "reference"
        assert choose("gan_loss", CPU) == "reference"

    def test_a_name_leaves_families_without_it_alone(self) -> None:
        with fastgan.use_impl("native"):
            assert choose("gram", CUDA) == "triton"

    def test_a_choice_per_family(self) -> None:
        with fastgan.use_impl(gan_loss="reference"):
            assert choose("gan_loss", CPU) == "reference"
            assert choose("gram", CUDA) == "triton"
            with fastgan.use_impl(gram="reference"):
                assert choose("gan_loss", CPU) == "reference"
                assert choose("gram", CUDA) == "reference"
            assert choose("gram", CUDA) == "triton"

    def test_the_block_ends_with_an_exception(self) -> None:
        with pytest.raises(RuntimeError), fastgan.use_impl("reference"):
            raise RuntimeError
        assert choose("gan_loss", CPU) == "native"

    def test_the_block_is_of_its_thread(self) -> None:
        seen: list[str] = []
        with fastgan.use_impl("reference"):
            thread = threading.Thread(target=lambda: seen.append(choose("gan_loss", CPU)))
            thread.start()
            thread.join()
        assert seen == ["native"]

    def test_an_explicit_choice_never_falls_back(self) -> None:
        with pytest.raises(fastgan.ImplUnavailableError, match="op: native: no int8"):
            choose("gan_loss", CPU, "native", native="no int8")
        with pytest.raises(fastgan.ImplUnavailableError, match="set TRITON_INTERPRET=1"):
            choose("gram", CPU, "triton")

    def test_what_is_missing_is_said_with_the_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_dispatch, "_TRITON_MISSING", "Triton is not installed; pip install")
        with pytest.raises(fastgan.ImplUnavailableError, match=r"triton: Triton is not installed"):
            choose("gram", CUDA, "triton")

    def test_a_cuda_call_on_the_reference_path_warns_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_dispatch, "_TRITON_MISSING", "Triton is missing, said once")
        monkeypatch.setattr(_dispatch, "_warned", set())
        with pytest.warns(UserWarning, match="said once"):
            choose("gram", CUDA)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose("gram", CUDA) == "reference"

    def test_unknown_names_are_listed_with_the_valid_ones(self) -> None:
        with pytest.raises(ValueError, match=r"one of reference, triton, got 'native'"):
            choose("gram", CUDA, "native")
        with pytest.raises(ValueError, match=r"unknown implementation 'cuda', expected one of"):
            fastgan.use_impl("cuda")
        with pytest.raises(ValueError, match=r"unknown op family 'grams'"):
            fastgan.use_impl(grams="triton")
        with pytest.raises(ValueError, match=r"gram has no implementation 'native'"):
            fastgan.use_impl(gram="native")
        with pytest.raises(ValueError, match="expected use_impl"):
            fastgan.use_impl()

    def test_the_environment_variable_is_read_like_a_block(self) -> None:
        assert _dispatch._parse("native") == {"gan_loss": "native"}
        both = _dispatch._parse("gram=triton, gan_loss=native")
        assert both == {"gram": "triton", "gan_loss": "native"}
        assert _dispatch._parse("") == {}
        for wrong in ("cuda", "gram=native", "gram=triton,gan_loss"):
            with pytest.raises(ValueError, match=f"FASTGAN_IMPL={wrong}"):
                _dispatch._parse(wrong)


def test_explain_names_the_reason_of_each_implementation() -> None:
    x = torch.randn(2, 3, 8, 8)
    explanation = fastgan.explain(fastgan.adain, x, x, alpha=0.5, impl="reference")
    assert explanation.op == "adain"
    assert explanation.impl == "reference"
    others = set(_dispatch.offered("instance_norm")) - {"reference"}
    assert set(explanation.reasons) == others
    assert "adain: runs reference" in str(explanation)


def test_explain_checks_arguments_and_runs_nothing() -> None:
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="style must be"):
        fastgan.explain(fastgan.adain, x, torch.randn(2, 4, 8, 8))
    with _Recorder() as recorder:
        fastgan.explain(fastgan.adain, x, x, alpha=0.5)
        assert recorder.calls == []
        fastgan.adain(x, x, alpha=0.5, impl="reference")
        assert recorder.calls != []


def test_explain_an_impossible_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETING", False)
    x = torch.randn(2, 3, 8, 8)
    with _Recorder() as recorder:
        explanation = fastgan.explain(fastgan.adain, x, x, impl="triton")
    assert recorder.calls == []
    assert explanation.impl is None
    assert "set TRITON_INTERPRET=1" in explanation.reasons["triton"]
    assert explanation.reasons["reference"] == "'triton' was asked for"
    assert str(explanation).startswith("adain: cannot run\n")
    with pytest.raises(fastgan.ImplUnavailableError, match="set TRITON_INTERPRET=1"):
        fastgan.adain(x, x, impl="triton")


class _Recorder(TorchDispatchMode):
    """Lists every operator that runs, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.calls.append(func)
        return func(*args, **(kwargs or {}))


def test_compiled_code_sees_the_block() -> None:
    """torch.compile must guard the choice and trace the block itself."""
    torch._dynamo.reset()
    compiled = torch.compile(_chosen, fullgraph=True, backend="eager")
    x = torch.zeros(2, 3)
    assert compiled(x).item() == len(_dispatch.choose("op", "gan_loss", None, CPU))
    with fastgan.use_impl("reference"):
        assert compiled(x).item() == len("reference")

    def inside(x: torch.Tensor) -> torch.Tensor:
        with fastgan.use_impl(gan_loss="reference"):
            return _chosen(x)

    assert torch.compile(inside, fullgraph=True, backend="eager")(x).item() == len("reference")


def _chosen(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(()) + len(_dispatch.choose("op", "gan_loss", None, x.device))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_import_is_cheap_and_touches_no_device() -> None:
    code = """
import sys, torch
def refuse(*args, **kwargs): raise SystemExit("a device was queried")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
import fastgan
heavy = {"triton", "torchvision", "PIL", "safetensors", "tyro", "tensorboard"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_the_environment_variable_chooses() -> None:
    code = "import torch, fastgan as f; x = torch.ones(1, 2, 3, 3); print(f.explain(f.adain, x, x))"
    assert "runs reference" in run(code, FASTGAN_IMPL="reference").stdout
    wrong = run(f"import fastgan; print('imported'); {code}", FASTGAN_IMPL="fastest")
    assert (wrong.returncode, wrong.stdout) == (1, "imported\n")
    assert "ValueError: FASTGAN_IMPL=fastest: unknown implementation" in wrong.stderr


def test_the_environment_report_tells_what_the_variable_asks_for() -> None:
    report = "from fastgan.env import main; main()"
    assert "\nFASTGAN_IMPL=gram=reference\n" in run(report, FASTGAN_IMPL="gram=reference").stdout
    wrong = run(report, FASTGAN_IMPL="fastest").stdout
    assert "\nwrong: FASTGAN_IMPL=fastest: unknown implementation" in wrong


def reason_against(monkeypatch: pytest.MonkeyPatch, extension: Callable[[str], object]) -> str:
    """Why an extension that imports as ``extension(name)`` is not used."""
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_dispatch.importlib, "import_module", extension)
    info, reason = _dispatch._load_native()
    assert info is None
    assert reason is not None
    return reason


def built_with(info: dict[str, str | None]) -> types.SimpleNamespace:
    return types.SimpleNamespace(build_info=lambda: info)


def test_a_stale_extension_is_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = built_with({"torch": "1.0.0", "cuda": "11.8"})
    assert "was built for torch 1.0.0" in reason_against(monkeypatch, lambda name: stale)

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10\nmore lines")

    reason = reason_against(monkeypatch, broken)
    assert "undefined symbol: _ZN3c10" in reason
    assert "more lines" not in reason


@pytest.mark.parametrize("lacking", ["torch", "cuda"])
def test_an_extension_of_an_older_fastgan_is_a_reason(
    lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"torch": torch.__version__, "cuda": None}
    del info[lacking]
    reason = reason_against(monkeypatch, lambda name: built_with(info))
    assert "was built for another version of fastgan; rebuild it" in reason


def test_the_environment_report_needs_nothing_but_torch() -> None:
    result = run("from fastgan.env import main; main()")
    assert result.returncode == 0, result.stderr
    for line in ("fastgan 0", "torch 2", "extension:", "gan_loss on cuda:", "gram on cpu:"):
        assert line in result.stdout
