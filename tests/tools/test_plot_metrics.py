"""tools/plot_metrics.py: the picture shows the recorded numbers, and bad input is reported, not traced."""

import importlib.util
import sys
from pathlib import Path

import pytest

from megatron.metrics.sinks.jsonl import JsonLines

TOOL = Path(__file__).parents[2] / "tools" / "plot_metrics.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("plot_metrics", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def run_directory(tmp_path):
    sink = JsonLines(tmp_path / "small" / "metrics.jsonl")
    for iteration in range(1, 101):
        loss = 2.0 + 6.0 / iteration
        sink.write(iteration, {"train/lm_loss": loss, "train/learning_rate": 1e-3, "consumed_tokens": 512 * iteration})
        if iteration % 25 == 0:
            sink.write(iteration, {"validation/lm_loss": loss + 0.1})
    sink.close()
    return tmp_path / "small"


def test_it_writes_a_picture_of_the_recorded_curves(tool, run_directory, capsys, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot

    def spy(axes, x, y, **style):
        if "label" in style:
            drawn[style["label"]] = (list(x), list(y))
        return plot(axes, x, y, **style)

    monkeypatch.setattr(Axes, "plot", spy)
    assert tool.main([str(run_directory)]) == 0
    picture = Path(capsys.readouterr().out.strip())
    assert picture == run_directory / "metrics.png"
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[0] > 600 and pixels[..., :3].std() > 0.05  # a blank page has no spread
    assert drawn["validation, last 2.160"] == ([25, 50, 75, 100], pytest.approx([2.34, 2.22, 2.18, 2.16]))


def test_several_runs_and_an_output_name(tool, run_directory, tmp_path):
    other = tmp_path / "elsewhere" / "two.svg"
    assert (
        tool.main([str(run_directory), str(run_directory / "metrics.jsonl"), "-o", str(other), "--title", "both"]) == 0
    )
    assert "<svg" in other.read_text()


def test_a_picture_that_cannot_be_written_is_reported(tool, run_directory, tmp_path, capsys):
    (tmp_path / "taken.png").mkdir()
    assert tool.main([str(run_directory), "-o", str(tmp_path / "taken.png")]) == 2
    assert "taken.png'" in (said := capsys.readouterr().err) and "cannot be written" in said


def test_every_missing_run_is_reported_at_once(tool, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    assert tool.main([str(tmp_path / "nowhere"), str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "nowhere" in errors[0] and "no loss" in errors[1]


def test_the_running_mean_is_a_mean(tool):
    assert tool.running_mean([3.0] * 9, 5) == pytest.approx([3.0] * 9)
    assert tool.running_mean([0.0, 1.0, 2.0, 6.0], 3) == pytest.approx([0.0, 1.0, 3.0, 4.0])


def test_counts_for_people(tool):
    assert [tool.human_count(n) for n in (0, 512, 51200, 2.5e9)] == ["0", "512", "51.2 k", "2.5 B"]
