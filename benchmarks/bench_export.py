"""An exported generator in onnxruntime beside the same networks in PyTorch, on a CPU.

As many threads each. The results are compared with fp64.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench_inference import CPU, OnReferencePath, inference_case
from bench_training import TINY_STYLE, seeded
from fastgan.export import export
from fastgan.recipes.style_transfer import StyleTransfer, StyleTransferRecipeConfig
from harness import Case, Report

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
pytest.importorskip("onnxscript", reason="needs the extra [export]")

# batch and side of the pictures
SETTINGS: dict[str, list[tuple[int, int]]] = {
    "tiny": [(1, 24)],
    "cpu": [(1, 256), (1, 512), (4, 256)],
    "gpu": [],  # the extra [export] brings an onnxruntime for CPUs
}


def cases(sizes: str) -> Iterator[Case]:
    for batch, size in SETTINGS[sizes]:
        yield case((batch, 3, size, size), **(TINY_STYLE if sizes == "tiny" else {}))


def test_export(record: Report, case: Case, variant: str) -> None:
    record(case, variant)


class InOnnxruntime(torch.nn.Module):
    """The generator of a recipe, exported and run by onnxruntime with as many threads as torch."""

    def __init__(self, recipe: StyleTransfer) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Or its threads would go on turning while the next variant is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with tempfile.TemporaryDirectory() as folder:
            path = export(Path(folder) / "model.onnx", checkpoint=recipe)
            self.session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        self.alpha = torch.ones(1).numpy()

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        inputs = {
            "content": content.contiguous().numpy(),
            "style": style.contiguous().numpy(),
            "alpha": self.alpha,
        }
        return torch.from_numpy(self.session.run(None, inputs)[0])


def case(shape: tuple[int, ...], **config: int) -> Case:
    """A content picture in the style of a style picture."""
    with seeded():
        recipe = StyleTransfer(StyleTransferRecipeConfig(**config))

    def model() -> torch.nn.Module:
        return copy.deepcopy(recipe.generator).to(memory_format=torch.channels_last)

    return inference_case(
        "style_transfer generator beside onnxruntime",
        shape,
        CPU,
        pictures=2,
        exact=model,
        variants={
            "reference path": ("eager", lambda: OnReferencePath(model())),
            "onnxruntime": ("peer", lambda: InOnnxruntime(recipe)),
            "fastgan": ("fastgan", model),
        },
    )
