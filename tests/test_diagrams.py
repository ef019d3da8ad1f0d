"""logs/tools/diagrams.py: numbers of the model and the settings, legible type, no overlaps."""

import html
import re
from itertools import combinations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_report import ROOT  # and this puts the tools on sys.path

import train_gpt as t

import diagrams  # isort: skip

FIGURES = ROOT / "logs" / "figures"


def texts(svg):
    """The texts that an SVG of matplotlib shows: each stands as a comment before its paths."""
    return [html.unescape(text) for text in re.findall("<!-- (.*?) -->", svg.read_text())]


@pytest.mark.parametrize("name", ["architecture", "evaluation"])
def test_committed_sheets_are_those_of_now_and_their_texts_legible_and_apart(name, tmp_path):
    sheet = getattr(diagrams, name)(t.Config())
    sheet.save(tmp_path, name)
    shown = texts(tmp_path / f"{name}.svg")
    assert texts(FIGURES / f"{name}.svg") == shown, "run python logs/tools/diagrams.py"
    assert all((FIGURES / f"{name}{end}.png").stat().st_size < 150_000 for end in diagrams.PALETTES)
    with diagrams.matplotlib.rc_context(diagrams.STYLE):
        renderer = FigureCanvasAgg(sheet.fig).get_renderer()
        written = [text for text in sheet.ax.texts if text.get_text()]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in written]
    card = sheet.fig.bbox.padded(-19 * sheet.fig.dpi / 72)
    assert min(text.get_fontsize() for text in written) >= 11
    assert [text for text, box in boxes if box.x0 < card.x0 or box.x1 > card.x1] == []
    for (a, box_a), (b, box_b) in combinations(boxes, 2):
        assert not box_a.padded(-1).overlaps(box_b.padded(-1)), (a, b)


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
