"""logs/diagrams.py: numbers from the model and the settings, legible type, no overlaps, the same bytes every time."""

import html
import importlib.util
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import train_gpt as t

FIGURES = Path(__file__).resolve().parent.parent / "logs" / "figures"
spec = importlib.util.spec_from_file_location("diagrams", FIGURES.parent / "diagrams.py")
diagrams = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diagrams)

CFG = t.Config(kernel="reference", attn_kernel="sdpa")
SHEETS = ("architecture", "evaluation")


def texts(svg):
    """The texts that an SVG of matplotlib shows: each stands as a comment before its paths."""
    return [html.unescape(text) for text in re.findall("<!-- (.*?) -->", svg.read_text())]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    diagrams.main(folder)
    return folder


def test_parameters_are_those_of_the_model(drawn):
    with torch.device("meta"):
        total = sum(p.numel() for p in t.LM(t.Config()).parameters())
    shown = texts(drawn / "architecture.svg")
    assert f"Parameters: {total:,}" in shown
    label = r"^(\d+)? ?(embedding|GDN mixer|SWA mixer|MLP|other).*(?:of|:) ([\d,]+)$"
    parts = re.findall(label, "\n".join(shown), re.M)
    assert [name for _, name, _ in parts] == ["embedding", "GDN mixer", "SWA mixer", "MLP", "other"]
    assert sum(int(times or 1) * int(number.replace(",", "")) for times, _, number in parts) == total


def test_carried_state_is_that_of_a_forward(drawn):
    cfg = replace(CFG, train_seq_len=64)
    with torch.inference_mode():
        _, state = t.LM(cfg)(torch.zeros(1, cfg.swa_window, dtype=torch.int64))
    kept = sum(x.numel() for part in (state.embed, *state.layers) for x in part)
    assert f"Carried from segment to segment: {kept:,} numbers" in texts(drawn / "architecture.svg")


def test_numbers_follow_the_settings(tmp_path):
    diagrams.evaluation(replace(CFG, eval_stride=256, eval_spans=7, ttt_epochs=5)).save(tmp_path, "evaluation")
    shown = texts(tmp_path / "evaluation.svg")
    assert {"8 passes per token", "context 1,793 to 2,048", "+ 5 epochs of training"} <= set(shown)
    assert "7 spans at once, each after" in shown


@pytest.mark.parametrize("name", SHEETS)
def test_drawn_again_the_bytes_are_the_same(drawn, tmp_path, name):
    getattr(diagrams, name)(CFG).save(tmp_path, name)
    for kind in ("svg", "png"):
        assert (tmp_path / f"{name}.{kind}").read_bytes() == (drawn / f"{name}.{kind}").read_bytes()


@pytest.mark.parametrize("name", SHEETS)
def test_committed_figures_show_what_the_script_draws_now(drawn, name):
    assert texts(FIGURES / f"{name}.svg") == texts(drawn / f"{name}.svg"), "run python logs/diagrams.py"
    assert (FIGURES / f"{name}.png").stat().st_size <= 150_000


@pytest.mark.parametrize("name", SHEETS)
def test_texts_are_legible_and_apart(name):
    with diagrams.matplotlib.rc_context(diagrams.STYLE):
        sheet = getattr(diagrams, name)(CFG)
        renderer = FigureCanvasAgg(sheet.fig).get_renderer()
        boxes = {text: text.get_window_extent(renderer) for text in sheet.ax.texts if text.get_text()}
    card = sheet.fig.bbox.padded(-19 * sheet.fig.dpi / 72)
    for text, box in boxes.items():
        assert text.get_fontsize() >= 11
        assert card.x0 <= box.x0 and box.x1 <= card.x1, text.get_text()
    for (a, box_a), (b, box_b) in combinations(boxes.items(), 2):
        assert not box_a.padded(-1).overlaps(box_b.padded(-1)), (a.get_text(), b.get_text())
