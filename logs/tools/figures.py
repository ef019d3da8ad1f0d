"""The figures of report.py --figures and --html, each drawn if the logs have its lines.

As wide as a README (830 pixels, doubled), on white, so that they read on dark pages too. Lines are
labelled at their ends; the title says the finding, with numbers that the figure shows.
A figure_* function returns (name, finding, Figure), or None if the logs lack its lines.
"""

import io
import math
import re
import textwrap
from collections import Counter
from itertools import cycle
from statistics import mean, median

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image  # a dependency of matplotlib
from report import (CAP_BYTES, METHODS, TIME_LIMIT_S, baseline, by_configuration, configuration,
                    number, stdev, stream, untrained)

DASHES = ("-", "--", ":", "-.")  # the seeds of one configuration
COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#7F6A00", "#444444", "#56B4E9")
PARTS = {"start-up": "#BBBBBB", "training": "#0072B2", "calibration": "#004C78",
         "export": "#E69F00", "score": "#009E73", "diagnostics": "#CFE8DF"}
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "font.size": 9.5, "axes.labelsize": 9.5, "axes.titlesize": 9.5, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#E4E4E4", "svg.fonttype": "none", "svg.hashsalt": "report"}


def new_figure(height_in, rows=1, columns=1, **options):
    """A figure of our width and its 2-D array of axes."""
    fig = Figure(figsize=(8.3, height_in))
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def save(fig, folder, name, finding):
    """Title the figure and write it as PNG (128 colors) and SVG; returns both paths."""
    fig.suptitle(textwrap.fill(finding, 88), x=0.01, ha="left", size=10.5, weight="bold")
    fig.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    fig.savefig(png, dpi=200)
    with Image.open(png) as image:  # MAXCOVERAGE keeps the color of a lone label
        image = image.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=0)
    image.save(png, optimize=True)
    fig.savefig(svg, metadata={"Date": None})
    return [png, svg]


def inline_svg(fig, name):
    """The figure as an <svg> element for a page, without title; `name` keeps its ids unique."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        fig.tight_layout()
        fig.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format")),
                    transparent=True)
    svg = text.getvalue()
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", "", svg[svg.index("<svg"):])
    return re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)  # groups; no reference names them


def label(log):
    """The log's name without folder and time stamp, and its seed."""
    name = re.sub(r"^20\d{6}-\d{6}_", "", log.path.stem)
    name, _, seed = re.fullmatch(r"(.*?)([-_]*seed[-_]?(\d+))?", name).groups()
    seed = seed or log.seed
    name = name or log.path.resolve().parent.name
    return name[:22] if seed is None else f"{name[:22]}, seed {seed}"


def label_ends(ax, ends):
    """Write (y, text, color[, dashes]) right of the axes near the heights y, none over another."""
    low, high = ax.get_ylim()
    height_in = ax.get_position().height * ax.figure.get_figheight()
    gap = min(0.17 / height_in, 1 / max(1, len(ends) - 1))
    places = []
    for y, *_ in sorted(ends):
        places.append(max((y - low) / (high - low), places[-1] + gap if places else -1.0))
    top = 1.0
    for i, place in reversed(list(enumerate(places))):  # too many at the top: push them down
        places[i] = min(place, top)
        top = places[i] - gap
    for place, (_, text, color, *dashes) in zip(places, sorted(ends)):
        ax.text(1.06 if dashes else 1.015, place, text, color=color, transform=ax.transAxes,
                va="center", size=9)
        if dashes:
            ax.plot([1.012, 1.05], [place, place], color=color, ls=dashes[0], lw=1.4,
                    transform=ax.transAxes, clip_on=False)


def smooth(y, width):
    """The mean of each value and its neighbours, `width` together, fewer at the edges."""
    ones = np.ones(width)
    return np.convolve(y, ones, "same") / np.convolve(np.ones(len(y)), ones, "same")


def curve(log, points, key):
    """[(step, seconds, y)] of the log's Points; without those that lack a time or a loss."""
    rows = [(p.step, p.seconds, getattr(p, key)) for _, p in sorted(getattr(log, points).items())]
    return [row for row in rows if None not in row and not math.isnan(sum(row))]


def figure_curves(logs):
    """Validation bpb and training loss against step and seconds, without the steep beginning.

    Losses of single batches are noise of some 0.05 nats: thin as logged, thick their running mean,
    whose end is the number that stands at the line.
    """
    kinds = [("val", "bpb", "validation bpb"), ("train", "loss", "training loss [nats]")]
    kinds = [kind for kind in kinds if any(len(curve(log, *kind[:2])) > 1 for log in logs)]
    if not kinds:
        return None
    count = min(len(logs), 10)
    fig, axes = new_figure(0.9 + max(2.7, 0.19 * count + 0.4) * len(kinds), len(kinds), 2,
                           sharey="row", sharex="col")
    findings = []
    for row, (points, key, what) in zip(axes, kinds):
        ends, means = [], []
        for color, group in zip(cycle(COLORS), by_configuration(logs)):
            curves = [(log, curve(log, points, key)) for log in group]
            curves = [(log, rows) for log, rows in curves if len(rows) > 1]
            last = []
            for dashes, (log, rows) in zip(cycle(DASHES), curves):
                after = [r for r in rows if r[0] >= 0.04 * rows[-1][0]]
                steps, seconds, y = zip(*(after if len(after) > 1 else rows))
                line = y
                if points == "train":
                    line = smooth(y, max(1, len(y) // 20))
                    for ax, x in zip(row, (steps, seconds)):
                        ax.plot(x, y, color=color, lw=0.6, alpha=0.3)
                for ax, x in zip(row, (steps, seconds)):
                    ax.plot(x, line, color=color, lw=1.3, ls=dashes)
                last.append(float(line[-1]))
                ends.append((last[-1], f"{label(log)}: {last[-1]:.4f}", color, dashes))
            if curves:
                name = label(curves[0][0])
                if len(curves) > 1:
                    name = f"{name.split(',')[0]}, mean of {len(curves)} seeds"
                scores = [log.final.bpb for log, _ in curves if log.final]
                means.append((mean(last), name, color, scores))
        row[0].set_ylabel(what + "\n(thin: single batches)" * (points == "train"))
        shown = ends if len(ends) <= 10 else [(y, f"{name}: {y:.4f}", color)
                                              for y, name, color, _ in means][:14]
        label_ends(row[1], shown)
        (best, name, _, scores), *others = sorted(means)
        finding = f"{what.split(' [')[0].capitalize()} while training ends at {best:.4f} ({name})"
        if others:
            finding += f", {others[0][0] - best:.4f} below {others[0][1]}"
        if scores:
            finding += f"; the artifact scores {mean(scores):.4f}"
        findings.append(finding)
    for ax, below, title, x in zip(axes[0], axes[-1], ("(a) by steps", "(b) by seconds"),
                                   ("step", "training clock [s]")):
        ax.set(title=title, xlim=(0, None))
        below.set_xlabel(x)
    return "curves", findings[0], fig


def time_parts(log):
    """(part, what, seconds) of a run in order; `diagnostics` are evaluations that do not count."""
    train_s = log.train_s
    if train_s and log.hessian_s:  # calibration is inside the training clock
        train_s -= log.hessian_s
    before = log.scores.get("pre")
    parts = [("start-up", "start-up", number(log.last("kernel").get("start_up"))),
             ("training", "training", train_s), ("calibration", "calibration", log.hessian_s),
             ("diagnostics", "unquantized", before and before.seconds),
             ("export", "export", number(log.last("artifact").get("export_time")))]
    for method in METHODS:
        if log.final and log.final.method == method:
            parts.append(("score", method, log.eval_s))
        elif method in log.scores:
            parts.append(("diagnostics", method, log.scores[method].seconds))
    return [part for part in parts if part[2]]


def figure_time(logs):
    """A bar per configuration, at most 16: where the seconds went; seeds give mean and spread."""
    bars = []
    for group in by_configuration(logs):
        parts = {}
        for log in group:
            for part, what, seconds in time_parts(log):
                parts.setdefault((part, what), []).append(seconds)
        if parts:
            name = label(group[0])
            if len(group) > 1:
                name = f"{name.split(',')[0]}, mean of {len(group)} seeds"
            bars.append((name, parts))
    bars = bars[:16]
    if not bars:
        return None
    fig, [[ax]] = new_figure(1.2 + 0.62 * len(bars))
    whole = max(sum(map(mean, parts.values())) for _, parts in bars)
    for y, (_, parts) in enumerate(bars):
        left = 0.0
        told = []
        for (part, what), seconds in parts.items():
            hatch = "///" if part == "diagnostics" else None
            ax.barh(y, mean(seconds), left=left, height=0.5, color=PARTS[part], edgecolor="white",
                    hatch=hatch)
            left += mean(seconds)
            told.append(f"{what} {mean(seconds):.{int(mean(seconds) < 10)}f}")
            if len(seconds) > 1 and (spread := stdev(seconds)) > 0.05 * mean(seconds):
                told[-1] += f" ± {spread:.{int(spread < 10)}f}"
        ax.text(0, y + 0.29, f"{', '.join(told)} s", va="top", fontsize=8)
    ax.set_yticks(range(len(bars)), [name.replace(", ", "\n") for name, _ in bars], fontsize=8.5)
    ax.set(ylim=(len(bars) - 0.3, -0.5), xlim=(0, whole * 1.01))
    ax.set_xlabel("wall clock [s]; hatched: evaluations that do not count")
    ax.grid(axis="y", visible=False)
    train_s = max(log.train_s or 0 for log in logs)
    eval_s = max(log.eval_s or 0 for log in logs)
    return "time", (f"Longest training {train_s:.0f} s, longest evaluation {eval_s:.1f} s "
                    f"({TIME_LIMIT_S:.0f} s allowed for each)"), fig


def last_with(logs, event):
    """The last log with lines of this event, and those lines; (None, []) without one."""
    found = [(log, log.events[event]) for log in logs if event in log.events]
    return found[-1] if found else (None, [])


def roles(log):
    """[(role, packed bytes, bytes before, bits per symbol or None)] of an artifact, largest first.

    Older logs have `role` lines. In newer ones the `gptq` lines give each matrix' size and bits.
    """
    keys = ("packed_bytes", "raw_bytes", "bits_per_symbol")
    rows = [(v.get("name", "?"), *(number(v.get(key)) for key in keys))
            for v in log.events.get("role", [])]
    rows = [row for row in rows if None not in row]
    if not rows:
        sums = {}
        keys = ("rows", "columns", "bits_per_weight")
        for v in log.events.get("gptq", []):
            size = [number(v.get(key)) for key in keys]
            kind = re.search(r"mlp|mixer|embed|$", v.get("name", ""))[0] or "other matrices"
            if None not in size:
                sums.setdefault(kind, []).append((size[0] * size[1], math.prod(size) / 8))
        for kind, sizes in sums.items():
            count, packed = map(sum, zip(*sizes))
            rows.append((kind, packed, count, 8 * packed / count))
    rest = (log.model_bytes or 0) - sum(row[1] for row in rows)
    rows = sorted(rows, key=lambda row: -row[1])
    if rows and rest > 0:
        rows.append(("header" if "role" in log.events else "steps, vectors", rest, rest, None))
    return rows


def figure_roles(logs):
    """Where the artifact's bytes are, by role, of the last log that says."""
    log, rows = next(((log, rows) for log in reversed(logs) if (rows := roles(log))), (None, []))
    if not rows:
        return None
    code = log.code_bytes or 0
    rows.append(("train_gpt.py", code, code, None))
    largest = max(max(row[1:3]) for row in rows)
    fig, [[ax]] = new_figure(1.1 + 0.3 * len(rows))
    for y, (_, size, raw, bits) in enumerate(rows):
        ax.barh(y, raw / 1e3, height=0.62, color="none", edgecolor="#888888", lw=0.8)
        ax.barh(y, size / 1e3, height=0.62, color=COLORS[5] if bits is None else COLORS[0])
        rate = "" if bits is None else f", {bits:.2f} bits per number"
        text = f"{size / 1e3:,.1f} kB{rate}"
        ax.text((max(raw, size) + 0.012 * largest) / 1e3, y, text, va="center", size=9)
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.34 * largest / 1e3))
    ax.set_xlabel("kB; outlined: before the entropy coder, most numbers a byte each")
    ax.grid(axis="y", visible=False)
    total = sum(row[1] for row in rows)
    return "roles", (f"{label(log)}: {total / 1e6:.3f} MB of {CAP_BYTES / 1e6:.0f}"
                     f" MB, {rows[0][1] / total:.0%} of it {rows[0][0]}"), fig


def figure_gptq(logs):
    """Relative quantization error of every matrix, kind by layer, of the last log that says."""
    log, lines = last_with(logs, "gptq")
    errors = {}  # (kind, block or -1) -> relative error
    for values in lines:
        name, error = values.get("name", "?"), number(values.get("rel_err"))
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        kind = (block[2] if block else name).replace("_proj", "").replace(".kv.", ".")
        if error and error > 0:
            errors[kind, int(block[1]) if block else -1] = error
    if not errors:
        return None
    columns = sorted({column for _, column in errors})
    kinds = list(dict.fromkeys(kind for kind, _ in errors))
    norm = LogNorm(min(errors.values()) / 2, max(errors.values()))  # the least error is not white
    fig, [[ax]] = new_figure(1.2 + 0.25 * len(kinds))
    cells = [[errors.get((kind, column), math.nan) for column in columns] for kind in kinds]
    ax.pcolormesh(np.ma.masked_invalid(cells), cmap="Blues", norm=norm, edgecolor="face", lw=0.2)
    for (kind, column), error in errors.items():
        if len(columns) <= 20:  # more would not be legible
            ax.text(columns.index(column) + 0.5, kinds.index(kind) + 0.5, f"{1000 * error:.3g}",
                    ha="center", va="center", size=8,
                    color="#FFFFFE" if norm(error) > 0.6 else "#111111")
    middles = np.arange(max(len(columns), len(kinds))) + 0.5
    ax.set_xticks(middles[:len(columns)], ["–" if column < 0 else column for column in columns])
    ax.set_yticks(middles[:len(kinds)], kinds, fontsize=8.5)
    ax.set_ylim(len(kinds), 0)
    ax.grid(visible=False)
    ax.set_xlabel("block (–: outside the blocks); a shared matrix stands in its first block")
    (kind, column), error = max(errors.items(), key=lambda item: item[1])
    where = kind if column < 0 else f"block {column}, {kind}"
    finding = (f"{label(log)}: relative quantization error x 1000; largest {1000 * error:.3g} "
               f"({where}), median {1000 * median(errors.values()):.3g}")
    return "gptq", finding, fig


def figure_ttt(logs):
    """Running bpb along the text under test-time training, the score without it, and the gain.

    The first 8 runs: more labels have no place.
    """
    runs = [log for log in logs if log.final and stream(log, "running_bpb")][:8]
    runs = [(log, untrained(log, logs)) for log in runs]
    if not runs:
        return None
    paired = any(other and stream(other, "running_bpb") for _, other in runs)
    fig, axes = new_figure((1 + paired) * max(2.7, 0.19 * 2 * len(runs) + 0.4) + 0.5, 1 + paired,
                           sharex=True)
    top, low = axes[0][0], axes[-1][0]
    ends, gains = [], []
    heights = []
    bases = Counter()
    for color, (log, other) in zip(cycle(COLORS), runs):
        points = stream(log, "running_bpb")
        if log.final.method == "ttt" and log.final.tokens:  # the last chunk may have no line
            points[log.final.tokens] = log.final.bpb
        tokens, bpb = zip(*sorted(points.items()))
        top.plot([n / 1e6 for n in tokens], bpb, color=color, lw=1.4)
        ends.append((bpb[-1], f"{label(log)}: {bpb[-1]:.4f}", color))
        heights += bpb[len(bpb) // 20:]  # the first are noise
        if base := baseline(log, other):
            bases[base] += 1
            gains.append((base[0] - bpb[-1], label(log), color, base[1]))
            if bases[base] == 1:  # several runs of one artifact share it
                top.axhline(base[0], color=color, lw=1, ls="--")
                ends.append((base[0], f"{base[1]} (dashed): {base[0]:.4f}", color))
                heights.append(base[0])
        for key, style in (("chunk_bpb", "o"), ("running_bpb", "-")):  # old logs have chunk_bpb
            was = stream(other, key) if other else {}
            gain = [(n / 1e6, was[n] - y) for n, y in stream(log, key).items() if n in was]
            if gain:
                low.plot(*zip(*gain), style, ms=2.5, color=color, lw=1.4)
    margin = 0.1 * (max(heights) - min(heights) or 0.01)
    top.set(ylim=(min(heights) - margin, max(heights) + margin), ylabel="running bpb [bits/byte]")
    label_ends(top, ends)
    if paired:
        top.set_title("(a) score so far")
        low.set(title="(b) gain over no training, so far (dots: by chunk)", ylabel="gain [bpb]")
        told = [(gain, f"{name}: {gain:+.4f}", color) for gain, name, color, _ in gains]
        label_ends(low, told)
    low.set(xlim=(0, None), xlabel="tokens scored [millions]")
    finding = f"With test-time training {min(ends)[0]:.4f} bpb; these logs have no score without it"
    if gains:
        gain, name, _, what = max(gains)
        finding = f"Test-time training gains {gain:.4f} bpb ({name})"
        if what != "not trained":
            finding = f"With test-time training {gain:.4f} bpb below “{what}” ({name})"
    return "ttt", finding, fig


def exports(logs):
    """The largest group of exports of one checkpoint that differ in export settings alone."""
    own = ("grid", "matrix_bits", "matrix_clip_sigmas", "cap_bytes", "float_matrices")
    groups = {}
    for log in logs:
        if log.finished and log.config.get("resume", "-") != "-":
            settings = [item for item in configuration(log).items() if item[0] not in own]
            groups.setdefault((log.config["resume"], *sorted(settings)), []).append(log)
    return max(groups.values(), key=len, default=[])


def figure_export(logs):
    """bpb over the artifact's bytes for exports of one checkpoint; a line per grid and bits."""
    found = exports(logs)
    if len(found) < 3:
        return None
    lines = {}
    for log in found:
        name = log.config.get("grid", "rate")
        if name != "rate":
            name += f", integers of {log.config.get('matrix_bits', '6')} bits"
        if log.last("quantized").get("matrices") == "0":
            name = "all float16"
        lines.setdefault(name, []).append((log.model_bytes / 1e3, log.final.bpb))
    fig, [[ax]] = new_figure(4.2)
    ends, gaps = [], []
    for name, color, marker in zip(sorted(lines), cycle(COLORS), cycle("os^Dv*")):
        kilobytes, bpb = zip(*sorted(lines[name]))
        if name == "all float16":  # far to the right
            ax.axhline(bpb[0], color=color, lw=1, ls="--")
        else:
            ax.plot(kilobytes, bpb, marker=marker, ms=5, lw=1.4, color=color)
        told = f"{name} (dashed)" if name == "all float16" else name
        ends.append((bpb[-1], told, color))
        if name.startswith("sdclip") and "rate" in lines:
            rate = zip(*sorted(lines["rate"]))
            at_rate = np.interp(kilobytes, *rate, left=math.nan, right=math.nan)
            gaps += [float(a - b) for a, b in zip(bpb, at_rate) if b == b]
    ax.set(xlabel="artifact [kB], after the entropy coder",
           ylabel=f"bpb, {found[0].final.method} [bits/byte]")
    label_ends(ax, ends)
    finding = "Bits per byte by artifact size"
    if gaps:
        finding = (f"At equal bytes SDClip scores {min(gaps):+.4f} to {max(gaps):+.4f} bpb over "
                   f"GRID=rate ({len(gaps)} exports)")
    return "export", finding, fig


FIGURES = (figure_curves, figure_ttt, figure_time, figure_roles, figure_gptq, figure_export)


def draw(logs, folder):
    """Draw what the logs have data for; returns the paths of the files."""
    with matplotlib.rc_context(STYLE):
        drawn = filter(None, (figure(logs) for figure in FIGURES))
        return [path for name, finding, fig in drawn for path in save(fig, folder, name, finding)]


def for_page(logs):
    """[(name, finding, <svg> element)] of what the logs have data for."""
    with matplotlib.rc_context(STYLE):
        drawn = filter(None, (figure(logs) for figure in FIGURES))
        return [(name, finding, inline_svg(fig, name)) for name, finding, fig in drawn]
