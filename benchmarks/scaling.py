"""What several processes exchange per update, and how long links need for it: arithmetic alone.

python benchmarks/scaling.py     prints the table of docs/scaling.md
"""

from __future__ import annotations

import torch

from fastgan.recipes import RECIPES, Recipe
from fastgan.training.engine import phase_parameters

PROCESSES = 8
LINKS = {  # bytes per second that one GPU, or one machine with one GPU, sends; nominal
    "NVLink 4": 450e9,  # of 900 GB/s in both directions together
    "100 Gbit/s Ethernet": 100e9 / 8,
    "10 Gbit/s Ethernet": 10e9 / 8,
}


def gradient_bytes(recipe: Recipe) -> int:
    """Bytes of all gradients of one update, over the phases."""
    return sum(
        parameter.numel() * parameter.element_size()
        for phase in recipe.phases
        for parameter in phase_parameters(recipe, phase).values()
    )


def sent_bytes(gradients: int, processes: int) -> float:
    """What each process sends in a ring all-reduce of so many bytes: 2 (N - 1) / N times them."""
    return 2 * (processes - 1) / processes * gradients


def table() -> str:
    links = " | ".join(LINKS)
    lines = [
        f"| recipe, preset | gradients | sent by each of {PROCESSES} | {links} |",
        "|---" * (3 + len(LINKS)) + "|",
    ]
    for recipe in RECIPES.values():
        for name, preset in recipe.presets.items():
            with torch.device("meta"):
                gradients = gradient_bytes(recipe(preset.config))
            sent = sent_bytes(gradients, PROCESSES)
            times = " | ".join(f"{1e3 * sent / speed:.3g} ms" for speed in LINKS.values())
            lines.append(
                f"| {recipe.name}, {name} | {gradients / 1e6:.3g} MB | {sent / 1e6:.3g} MB "
                f"| {times} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
