"""logs/tools/diagrams.py: the committed sheets show the model and the settings of now."""

import html
import re

import diagrams
import pytest
import torch
from conftest import ROOT

import train_gpt as t

FIGURES = ROOT / "logs" / "figures"


def texts(svg):
    """The texts that an SVG of matplotlib shows: each stands as a comment before its paths."""
    return [html.unescape(text) for text in re.findall("<!-- (.*?) -->", svg.read_text())]


@pytest.mark.parametrize("name", ["architecture", "evaluation"])
def test_committed_sheets_are_those_of_now(name, tmp_path):
    getattr(diagrams, name)(t.Config()).save(tmp_path, name)
    shown = texts(tmp_path / f"{name}.svg")
    assert texts(FIGURES / f"{name}.svg") == shown, "run python logs/tools/diagrams.py"
    assert all((FIGURES / f"{name}{end}.png").stat().st_size < 150_000 for end in diagrams.PALETTES)


def test_numbers_are_those_of_the_model_and_its_settings(tmp_path):
    model = t.LM(t.Config())
    total = sum(p.numel() for p in model.parameters())
    shown = texts(FIGURES / "architecture.svg")
    label = r"^(\d+)? ?(embedding|GDN mixer|SWA mixer|MLP|other).*(?:of|:) ([\d,]+)$"
    parts = re.findall(label, "\n".join(shown), re.M)
    parts = [int(times or 1) * int(number.replace(",", "")) for times, _, number in parts]
    assert f"Parameters: {total:,}" in shown and len(parts) == 5 and sum(parts) == total
    with torch.inference_mode():
        _, state = model(torch.zeros(1, 512, dtype=torch.int64))
    kept = sum(x.numel() for part in state for x in part)
    assert f"Carried from segment to segment: {kept:,} numbers" in shown
    cfg = t.Config(eval_stride=256, eval_spans=7, ttt_epochs=5)
    diagrams.evaluation(cfg).save(tmp_path, "evaluation")
    assert {"8 passes per token", "context 1,793 to 2,048", "+ 5 epochs of training",
            "7 spans at once, each after"} <= {*texts(tmp_path / "evaluation.svg")}
