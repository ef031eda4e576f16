"""The demo, a few steps of it; and a finished one, if there is one, against what it promises."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan import cli
from fastgan.demo import Demo, _load, run_demo
from fastgan.images import load_image, to_float
from fastgan.inference import load_recipe, stylize
from fastgan.metrics import gram_distance, structure_correlation
from fastgan.models.features import RandomFeatures

pytestmark = pytest.mark.slow
STEPS = 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return run_demo(tmp_path_factory.mktemp("demo"), steps=STEPS)


def test_demo_trains(demo: Demo):
    lines = (demo.grid.parent / "run" / "losses.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == STEPS
    assert all(np.isfinite(value) for value in last.values())


def test_demo_leaves_what_it_names(demo: Demo):
    styles = sorted(path.stem for path in demo.styles.iterdir())
    assert len(styles) >= 3
    assert sorted(demo.scores) == styles
    grid, alpha, curves = (load_image(p) for p in (demo.grid, demo.alpha, demo.curves))
    assert grid.shape[1] == 2 * 256  # each style over its result
    assert grid.shape[2] % (1 + len(styles)) == 0
    assert min(alpha.shape[1:]) > 200
    assert min(curves.shape[1:]) > 200
    assert all(picture.float().std() > 10 for picture in (grid, alpha, curves))
    assert load_recipe(demo.checkpoint).name == "style_transfer"


def test_no_photograph_is_trained_on_and_shown(demo: Demo):
    shown = load_image(demo.content)
    for path in (demo.grid.parent / "content").iterdir():
        other = load_image(path)
        assert other.shape != shown.shape or not torch.equal(other, shown)


def test_results_in_the_grid_are_those_that_stylize_makes(demo: Demo):
    content, style = (_load(path) for path in (demo.content, demo.styles / "night.png"))
    result = stylize(content, style, checkpoint=demo.checkpoint)
    column = 1 + sorted(demo.scores).index("night")
    height, width = content.shape[2:]
    shown = load_image(demo.grid)[:, height:, column * width :][:, :, :width]
    torch.testing.assert_close(to_float(shown[None]), result, rtol=0, atol=2 / 255)


def test_only_a_demo_is_replaced(demo: Demo, tmp_path: Path):
    mine, former = tmp_path / "mine", tmp_path / "former"
    (mine / "run").mkdir(parents=True)
    (mine / "metrics.json").write_text('{"accuracy": 0.9}')
    with pytest.raises(ValueError, match="holds other things than a demo"):
        run_demo(mine, steps=1)
    assert sorted(path.name for path in mine.iterdir()) == ["metrics.json", "run"]
    shutil.copytree(demo.grid.parent, former)
    (former / "style" / ".DS_Store").write_text("")  # as file managers leave them
    assert run_demo(former, steps=1).scores.keys() == demo.scores.keys()


def test_a_demo_that_was_interrupted_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(out: Path) -> None:
        (out / "content").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastgan.demo._write_pictures", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path, steps=1)
    assert run_demo(tmp_path, steps=1).scores


def test_metrics_file_holds_the_scores(demo: Demo):
    written = json.loads((demo.grid.parent / "metrics.json").read_text())["styles"]
    for name, scores in demo.scores.items():
        assert written[name]["gram_result"] == scores.gram_result
        assert scores.gram_drop == 1 - scores.gram_result / scores.gram_content
        assert scores.structure_of_others < 0.5


def test_finished_demo_keeps_its_promise():
    """What `make demo` left in ``demo/``: style taken on, texture alone too, content kept."""
    path = Path("demo/metrics.json")
    if not path.exists():
        pytest.skip("no demo/metrics.json: run `make demo` first")
    metrics = json.loads(path.read_text())
    if metrics["steps"] < cli._DemoFlags().steps:
        pytest.skip(f"demo/metrics.json is of {metrics['steps']} steps, no finished demo")
    scores = metrics["styles"]
    assert len(scores) >= 3
    for name, s in scores.items():
        assert s["gram_result"] <= 0.4 * s["gram_content"], name
        assert s["grey_gram_result"] <= 0.75 * s["grey_gram_content"], name
        assert s["structure"] >= 0.6 > 2 * s["structure_of_others"], name


def test_command_line(demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "x"), "--steps", "0"]) == 2
    assert "steps must be at least 1, got 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


# --- Metrics ------------------------------------------------------------------------------------


def test_gram_distance_is_zero_for_the_style_and_one_for_black_features():
    style = torch.rand(1, 3, 40, 40) * 2 - 1
    judge = RandomFeatures(levels=2)
    assert gram_distance(style, style, judge).item() == 0
    nothing = [torch.zeros_like(m) for m in judge(style)]

    class Nothing(torch.nn.Module):
        def forward(self, images):
            return nothing if images is content else judge(images)

    content = torch.rand(1, 3, 40, 40)
    assert gram_distance(content, style, Nothing()).item() == pytest.approx(1)


def test_gram_distance_equals_its_definition():
    images, styles = torch.rand(2, 3, 24, 20), torch.rand(1, 3, 16, 30)
    judge = RandomFeatures(levels=2, channels=5)
    expected = np.zeros(2)
    for f, t in zip(judge(images), judge(styles), strict=True):
        f, t = (x.double().flatten(2).numpy() for x in (f, t))
        g, t = (np.einsum("bcm,bdm->bcd", x, x) / x[0].size for x in (f, t))
        expected += ((g - t) ** 2).sum((1, 2)) / (t**2).sum((1, 2)) / 2
    np.testing.assert_allclose(gram_distance(images, styles, judge).numpy(), expected, rtol=1e-4)


def test_structure_correlation_sees_structure_alone():
    image = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8), scale_factor=8)
    tinted = 0.3 * image + torch.tensor([0.5, 0.1, -0.3]).view(1, 3, 1, 1)
    strokes = torch.randn_like(image) * 0.1
    assert (structure_correlation(tinted, image) > 0.999).all()
    assert (structure_correlation(image + strokes, image) > 0.95).all()
    assert (structure_correlation(-image, image) < -0.999).all()
    assert (structure_correlation(torch.rand_like(image), image).abs() < 0.3).all()
