"""The README's two drawings, architecture and evaluation; every number in them is train_gpt's.

    python logs/tools/diagrams.py [FOLDER]        default: logs/figures; needs matplotlib

Each as PNG and SVG, and as <name>_dark.png for dark pages. Units are pixels at the README's width:
a sheet is WIDTH of them wide, y goes down, type of size 11 is 11 pixels high.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image  # a dependency of matplotlib

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt as t  # noqa: E402

WIDTH = 830
# (line, fill) by what a color stands for; the last two are those of text.
PALETTES = {
    "": dict(gdn=("#0B5C94", "#D9E8F3"), swa=("#A84A00", "#FBE2CC"), state=("#0A7355", "#CDEEDD"),
             rest=("#646D76", "#ECEEF0"), card=("#D0D7DE", "#FBFBF9"), panel=("#D0D7DE", "white"),
             ink=("#1F2328", ""), paper=("white", "")),
    "_dark": dict(gdn=("#6CB6F0", "#17344C"), swa=("#F0A566", "#4A2C12"),
                  state=("#5CCBA5", "#12402F"), rest=("#9DA7B1", "#2B3138"),
                  card=("#3D444D", "#161B22"), panel=("#3D444D", "#0D1117"),
                  ink=("#E6EDF3", ""), paper=("#0D1117", ""))}
STYLE = {"font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "diagrams"}


class Sheet:
    """A drawing of WIDTH x height pixels on a card, with a title; colors are names of a palette."""

    def __init__(self, height, title, subtitle, theme=""):
        self.title = title
        self.theme = theme
        self.palette = PALETTES[theme]
        self.fig = Figure(figsize=(WIDTH / 72, height / 72), facecolor=self.palette["card"][1])
        self.ax = self.fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        self.ax.axis("off")
        self.box(0.5, 0.5, WIDTH - 1, height - 1, color="card", round=0)
        self.text(20, 28, title, 15.5, ha="left", weight="bold")
        self.text(20, 52, subtitle, 12, ha="left")

    def text(self, x, y, text, size=11, color="ink", ha="center", weight="normal"):
        """Lines of text, 16 px apart, around the height y."""
        lines = text.split("\n")
        for i, line in enumerate(lines):
            height = y - 0.5 + 16 * (i - (len(lines) - 1) / 2)
            self.ax.text(x, height, line, fontsize=size, color=self.palette[color][0], ha=ha,
                         va="center_baseline", weight=weight)

    def box(self, x, y, w, h, text="", color="rest", round=3, solid=False, frame=""):
        """A rounded box with centred text; states are dashed.

        solid: filled with the line color.   frame: name of the edge's color if not that.
        """
        line, fill = self.palette[color]
        edge = self.palette["card"][1] if solid else self.palette[frame or color][0]
        dashes = (0, (3, 2)) if color == "state" and round else "-"
        self.ax.add_patch(FancyBboxPatch(
            (x, y), w, h, boxstyle=f"round,pad=0,rounding_size={round}", edgecolor=edge,
            linewidth=1, facecolor=line if solid else fill, linestyle=dashes))
        self.text(x + w / 2, y + h / 2, text, color="paper" if solid else "ink")

    def arrow(self, x0, y0, x1, y1, color="rest", head=7, curve=0.0):
        """An arrow; head 0: a line; curve: height of its bow over its length, times two."""
        self.ax.add_patch(FancyArrowPatch(
            (x0, y0), (x1, y1), arrowstyle="-|>" if head else "-", mutation_scale=head or 1,
            color=self.palette[color][0], linewidth=1.2, shrinkA=0, shrinkB=0,
            connectionstyle=f"arc3,rad={curve}"))

    def bar(self, y, title, ink, parts):
        """A bar in proportion to parts [(label, number, color)], labelled within it or below."""
        self.text(20, y - 10, title, color=ink, ha="left", weight="bold")
        x = 20
        scale = (WIDTH - 40) / sum(number for _, number, _ in parts)
        for label, number, color in parts:
            w = number * scale
            inside = w > 7 * len(label)
            self.box(x, y, w, 20, label if inside else "", color, round=0)
            if not inside and x < 100:
                self.text(x, y + 29, label, ha="left")
            elif not inside and x > WIDTH - 100:
                self.text(x + w, y + 29, label, ha="right")
            elif not inside:
                self.text(x + w / 2, y + 29, label)
            x += w

    def save(self, folder, name):
        """Write the PNG, and the SVG of the light one; the same bytes with the same matplotlib."""
        folder.mkdir(parents=True, exist_ok=True)
        png = folder / f"{name}{self.theme}.png"
        with matplotlib.rc_context(STYLE):
            if not self.theme:
                facts = {"Title": self.title, "Date": None, "Creator": None}
                self.fig.savefig(folder / f"{name}.svg", metadata=facts)
            self.fig.savefig(png, dpi=144)
        with Image.open(png) as image:
            image = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        image.save(png, optimize=True)


def count(tensors):
    """Numbers in all these tensors."""
    return sum(x.numel() for x in tensors)


def shape(x):
    """'3 × 1536': the shape of x (1, ...) without its first axis."""
    return " × ".join(map(str, x.shape[1:]))


def architecture(cfg, theme=""):
    """The sheet of the model that cfg describes; all shapes and numbers are those of LM(cfg)."""
    with torch.device("meta"), torch.no_grad():
        model = t.LM(cfg)
        _, states = model(torch.zeros(1, 2 * cfg.swa_window, dtype=torch.int64))
    kinds = [layer.kind for layer in t.parse_stack(cfg.stack)]
    gdn, swa = model.blocks[kinds.index("gdn")], model.blocks[kinds.index("swa")]
    conv, S = states[1 + kinds.index("gdn")]
    k, v = states[1 + kinds.index("swa")]
    num_gdn, num_swa = kinds.count("gdn"), kinds.count("swa")
    total = count(model.parameters())
    kept = sum(count(state) for state in states)
    sheet = Sheet(684, f"{num_gdn} recurrent layers carry the past; {num_swa} attention layers "
                  "share one mixer", f"{total:,} parameters. All that is kept of the text before, "
                  f"however long: {kept:,} numbers.", theme)
    draw_stack(sheet, cfg)
    draw_panels(sheet, gdn, swa)
    embed, mlp, gdn_mixer, swa_mixer = [
        count(m.parameters()) for m in (model.embed, gdn.mlp, gdn.mixer, swa.mixer)]
    parts = [(f"embedding and head: {embed:,}", embed, "rest"),
             (f"{num_gdn} GDN mixers of {gdn_mixer:,}", num_gdn * gdn_mixer, "gdn"),
             (f"1 SWA mixer: {swa_mixer:,}", swa_mixer, "swa"),
             (f"{len(kinds)} MLPs of {mlp:,}", len(kinds) * mlp, "rest")]
    other = total - sum(number for _, number, _ in parts)
    parts.append((f"other vectors: {other:,}", other, "rest"))
    sheet.bar(570, f"Parameters: {total:,}", "ink", parts)
    sheet.bar(632, f"Carried from segment to segment: {kept:,} numbers", "state", [
        (f"{num_gdn} GDN: S, {shape(S)}", num_gdn * S.numel(), "state"),
        (f"{num_gdn} GDN: inputs of the convolution, {shape(conv)}", num_gdn * conv.numel(),
         "state"),
        (f"{num_swa} SWA: keys and values, {shape(k)} each", num_swa * count([k, v]), "state"),
        (f"2 ids, 1 embedding: {count(states[0])}", count(states[0]), "state")])
    return sheet


def draw_stack(sheet, cfg):
    """The upper row: embedding, the layers with what they share, head."""
    D, vocab = cfg.model_dim, cfg.vocab_size
    left, pitch = 178, 45
    w = 37
    layers = t.parse_stack(cfg.stack)
    table = f"{cfg.ngram_buckets} × {cfg.ngram_dim}"
    ngrams = f"+ bigrams, trigrams\n{table} → {D}\n" if cfg.ngram_buckets else ""
    embedding = f"ids (B, T)\ntoken {vocab} × {D}\n{ngrams}RMSNorm\nSmearGate"
    head = (f"RMSNorm\ntied table\n{D} × {vocab}\nsoftcap {cfg.logit_softcap:g}\nlogits\n"
            f"(B, T, {vocab})")
    for x, width, title, lines in ((20, 138, "Embedding e", embedding), (722, 88, "Head", head)):
        sheet.box(x, 92, width, 140)
        sheet.text(x + width / 2, 107, title, weight="bold")
        sheet.text(x + width / 2, 171, lines)
    sheet.arrow(158, 152, 722, 152)
    shared = []
    for i, layer in enumerate(layers):
        x = left + i * pitch
        sheet.box(x - 2, 100, w + 4, 110, color="panel")
        sheet.box(x + 1, 103, w - 2, 70, color="gdn" if layer.kind == "gdn" else "swa")
        sheet.text(x + w / 2, 119, layer.kind.upper(), weight="bold")
        sheet.box(x + 5, 136, w - 10, 31, "S" if layer.kind == "gdn" else "k, v", "state")
        sheet.box(x + 1, 177, w - 2, 30, "MLP")
        sheet.arrow(x + w / 2, 226, x + w / 2, 210)
        if [other.mixer for other in layers].count(layer.mixer) > 1:
            shared.append(x + w / 2)
            sheet.arrow(x + w / 2, 87, x + w / 2, 102, "swa")
    sheet.arrow(158, 226, x + w / 2, 226, head=0)
    sheet.text(left - 2, 240, f"x and e are (B, T, {D}); e is mixed into the input of every layer",
               ha="left")
    sheet.arrow(shared[0], 87, shared[-1], 87, "swa", head=0)
    middle = sum(shared) / len(shared)
    sheet.text(middle, 77, "the same weights, stored once", color="swa")


ROWS = (290, 322, 354, 386, 418, 474, 506)  # tops of the steps in the panels
HEIGHTS = (22, 22, 22, 22, 46, 22, 22)


def panel(sheet, x, w, title, color, steps, paths):
    """A frame with steps (row, x, width, text[, color]) and, by x, the rows that arrows connect."""
    sheet.box(x, 260, w, 278, color="panel", frame=color)
    sheet.text(x + 12, 274, title, 12, color, ha="left", weight="bold")
    for at, path in paths.items():
        for first, last in zip(map(int, path), map(int, path[1:])):
            sheet.arrow(at, ROWS[first] + HEIGHTS[first], at, ROWS[last])
    for row, left, width, text, *own in steps:
        sheet.box(left, ROWS[row], width, HEIGHTS[row], text, *own or [color])


def draw_panels(sheet, gdn, swa):
    """The lower row: what every layer does, and inside the mixers of the blocks gdn and swa."""
    width, D = gdn.mlp.up_proj.shape
    panel(sheet, 20, 200, "Every layer", "rest", [
        (0, 32, 176, "x ← m x + n e"), (1, 58, 150, "RMSNorm"), (2, 58, 150, "mixer: GDN or SWA"),
        (3, 32, 176, "x ← x + r × mixer"), (5, 32, 176, "x ← x + s × MLP"),
        (4, 58, 150, f"RMSNorm, MLP:\n{D} → {width}, relu² → {D}")], {45: "035", 133: "012345"})
    sheet.text(120, ROWS[6] + 11, f"m, n, r, s: vectors of {D}")

    H, K = gdn.mixer.cfg.gdn_heads, gdn.mixer.cfg.gdn_head_dim
    taps = gdn.mixer.TAPS
    panel(sheet, 232, 356, "GDN mixer: each layer has its own", "gdn", [
        (0, 244, 332, f"in-projection {D} → {4 * H * K + 2 * H}"),
        (1, 244, 64, f"q {H} × {K}"), (1, 314, 64, f"k {H} × {K}"), (1, 384, 64, f"v {H} × {K}"),
        (1, 454, 28, f"a {H}"), (1, 488, 28, f"b {H}"), (1, 522, 54, "gate"),
        (2, 244, 204, ""), (2, 454, 28, "α"), (2, 488, 28, "β"),
        (3, 244, 134, "l2 norm per head"), (4, 244, 272, ""),
        (5, 244, 332, "RMSNorm per head × SiLU(gate)"),
        (6, 244, 332, f"out-projection {H * K} → {D}")],
        {276: "01234", 346: "01234", 416: "0124", 468: "0124", 502: "0124", 549: "015", 380: "45",
         410: "56"})
    sheet.text(318, ROWS[2] + 11, f"{taps}-tap convolution, SiLU")
    sheet.box(394, ROWS[2] + 3, 50, 16, f"last {taps - 1}", "state")
    sheet.text(339, ROWS[4] + 23, "gated delta rule: o = S q / √K\nS ← α S (I − β k kᵀ) + β v kᵀ")
    sheet.box(437, ROWS[4] + 4, 75, 38, f"S\n{H}×{K}×{K}", "state")

    H, Hk = swa.mixer.cfg.num_heads, swa.mixer.cfg.num_kv_heads
    window = swa.mixer.window
    d = D // H
    panel(sheet, 600, 210, "SWA mixer: one for all", "swa", [
        (0, 612, 186, f"in-projection {D} → {D + 2 * Hk * d}"), (1, 612, 58, f"q {H} × {d}"),
        (1, 676, 58, f"k {Hk} × {d}"), (1, 740, 58, f"v {Hk} × {d}"),
        (2, 612, 122, "RMSNorm per head"), (3, 676, 122, f"+ last {window - 1}", "state"),
        (4, 612, 122, "rotary; q × gain\n(each layer's own)"),
        (5, 612, 186, f"softmax over {window} tokens"), (6, 612, 186, f"out-projection {D} → {D}")],
        {641: "0124", 705: "01234", 769: "0135", 673: "45", 706: "56"})


def evaluation(cfg, theme=""):
    """The sheet of the four methods; windows and spans of a short text place the boxes."""
    seq, stride = cfg.train_seq_len, cfg.eval_stride
    warmup = cfg.eval_warmup_tokens
    passes = seq / stride
    sheet = Sheet(518, f"Carried state gives long context at 1 pass per token; sliding windows "
                  f"take {passes:g}", "By any method every target is scored exactly once, left to "
                  "right, before anything is trained on it.", theme)
    for x, color, label in ((20, "gdn", "scored"), (112, "rest", "read, not scored"),
                            (260, "swa", "trained on")):
        sheet.box(x, 72, 24, 12, color=color, solid=color == "gdn")
        sheet.text(x + 31, 78, label, ha="left")
    fresh(sheet, 386, 78)
    sheet.text(395, 78, "fresh state", ha="left")
    sheet.arrow(488, 80, 506, 80, "state", curve=-0.6)
    sheet.text(513, 78, "state carried", ha="left")
    for y, left, right in (
            (128, f"roundtrip\nwindows of {seq:,} tokens,\nside by side",
             f"1 pass per token\ncontext 1 to {seq:,}"),
            (208, f"sliding\nwindows of {seq:,} tokens,\neach {stride} after the one before",
             f"{passes:g} passes per token\ncontext {seq - stride + 1:,} to {seq:,}"),
            (302, f"exact\n{cfg.eval_spans} spans at once, each after\na run-up of {warmup:,} "
             "tokens", f"1 pass per token\n+ run-up; context ≥ {warmup + 1:,}"),
            (389, f"ttt\nchunks of {cfg.ttt_chunk_tokens:,}: scored, in the\nledger, then trained "
             "on", f"passes of its scoring\n+ {cfg.ttt_epochs} epochs of training"),
            (457, "Ledger\ntakes the next target only", "a gap or a repeat\nends the run")):
        for x, text in ((20, left), (658, right)):
            first, rest = text.split("\n", 1)
            top = y - 8 * text.count("\n")
            sheet.text(x, top, first, ha="left", weight="bold")
            sheet.text(x, top + 8 + 8 * text.count("\n"), rest, ha="left")
    for y in (165, 253, 344, 431):
        sheet.arrow(20, y, WIDTH - 20, y, "card", head=0)
    draw_methods(sheet, 208, 440, 88)
    sheet.text(20, 500, "Not to scale: a drawn window moves by a quarter of itself. Context: the "
               "tokens that a target is predicted from, once there are as many.", ha="left")
    return sheet


def fresh(sheet, x, y):
    """The mark of a state that begins here."""
    sheet.ax.plot([x], [y], "o", color=sheet.palette["paper"][0], markersize=6, markeredgewidth=1.4,
                  markeredgecolor=sheet.palette["state"][0])


def draw_methods(sheet, left, N, W):
    """The boxes: a text of N targets begins at x = left, its windows and chunks are W long."""
    def scored(first, last, y, h=22, text=""):
        sheet.box(left + first, y, last - first, h, text, "gdn", 2, solid=True)

    for start, end, _ in t.windows(N, W, W):
        scored(start, end, 117, text="scored")
        fresh(sheet, left + start + 8, 128)
    for i, (start, end, score_from) in enumerate(t.windows(N, W, W // 4)):
        y = 174 + 18 * (i % 4)
        sheet.box(left + start, y, end - start, 14, round=2)
        scored(score_from, end, y, 14)
        fresh(sheet, left + start + 8, y + 7)
    run_up = segment = 37
    for i, (start, last, first) in enumerate(t.spans(N, 4, run_up)):
        y = 270 + 38 * (i % 2)
        if first > start:
            sheet.box(left + start, y, first - start, 22, round=2)
        for a in range(start, last, segment):
            if a >= first:
                scored(a, min(a + segment, last), y)
            if a > start:
                sheet.arrow(left + a - 11, y - 1, left + a + 11, y - 1, "state", curve=-0.5)
        fresh(sheet, left + start + 8, y + 11)
    for i, first in enumerate(range(0, N, W)):
        x, last = left + first, min(first + W, N)
        scored(first, last, 358, text=f"scored by W{i}")
        if last < N:
            sheet.box(x + 24, 400, 54, 22, "train", "swa")
            sheet.arrow(x + 51, 380, x + 51, 400, "swa")
            sheet.arrow(x + 78, 411, x + W + 8, 411, "swa", head=0)
            sheet.arrow(x + W + 8, 411, x + W + 8, 380, "swa")
    sheet.text(x + 46, 405, "never\ntrained on")
    scored(0, N, 446, text="targets 0 … n − 1, each once, in order")


def main(folder):
    """Draw both sheets of the default settings into folder, light and dark."""
    for theme in PALETTES:
        architecture(t.Config(), theme).save(folder, "architecture")
        evaluation(t.Config(), theme).save(folder, "evaluation")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "logs" / "figures")
    main(parser.parse_args().folder)
