"""The figures of report.py --figures, each drawn if the logs have its lines.

As wide as a README (830 pixels, doubled), on white, so that they read on dark pages too. Lines are
labelled at their ends; the title says the finding, with numbers that the figure shows.
"""

import math
import re
import textwrap
from itertools import cycle
from statistics import mean, median

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image  # a dependency of matplotlib
from report import CAP_BYTES, METHODS, TIME_LIMIT_S, by_configuration, configuration, number

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


def label(log):
    """The log's name without folder and time stamp, and its seed."""
    name = re.sub(r"^20\d{6}-\d{6}_", "", log.path.stem)
    name, _, seed = re.fullmatch(r"(.*?)([-_]*seed[-_]?(\d+))?", name).groups()
    seed = seed or log.seed
    name = name or log.path.resolve().parent.name
    return name[:22] if seed is None else f"{name[:22]}, seed {seed}"


def label_ends(ax, ends):
    """Write (y, text, color) right of the axes at the heights y, none over another."""
    low, high = ax.get_ylim()
    place = -1.0
    for y, text, color in sorted(ends):
        place = max((y - low) / (high - low), place + 0.07)
        ax.text(1.015, place, text, color=color, transform=ax.transAxes, va="center", size=9)


def curve(log, points, key):
    """[(step, seconds, y)] of the log's Points; without those that lack a time or a loss."""
    rows = [(p.step, p.seconds, getattr(p, key)) for _, p in sorted(getattr(log, points).items())]
    return [row for row in rows if None not in row and not math.isnan(sum(row))]


def figure_curves(logs, folder):
    """Validation bpb and training loss against step and seconds; the steep beginning is cut off."""
    kinds = [("val", "bpb", "validation bpb"), ("train", "loss", "training loss [nats]")]
    kinds = [kind for kind in kinds if any(len(curve(log, *kind[:2])) > 1 for log in logs)]
    if not kinds:
        return []
    fig, axes = new_figure(0.9 + 2.7 * len(kinds), len(kinds), 2, sharey="row", sharex="col")
    findings = []
    for row, (points, key, what) in zip(axes, kinds):
        ends, means = [], []
        tops = []
        for color, group in zip(cycle(COLORS), by_configuration(logs)):
            curves = [(label(log), curve(log, points, key)) for log in group]
            curves = [(name, rows) for name, rows in curves if len(rows) > 1]
            for name, rows in curves:
                steps, seconds, y = zip(*rows)
                row[0].plot(steps, y, color=color, lw=1)
                row[1].plot(seconds, y, color=color, lw=1)
                tops.append(max(v for step, v in zip(steps, y) if step >= 0.04 * steps[-1]))
                ends.append((y[-1], name, color))
            if curves:
                name = ", ".join([curves[0][0].split(",")[0], f"mean of {len(curves)} seeds"])
                end = mean(rows[-1][2] for _, rows in curves)
                means.append((end, name if len(curves) > 1 else curves[0][0], color))
        bottom = row[0].dataLim.y0
        margin = 0.05 * (max(tops) - bottom or 1)
        row[0].set(ylim=(bottom - margin, max(tops) + margin), ylabel=what)
        shown = ends if len(ends) <= 10 else means
        label_ends(row[1], [(y, f"{name}: {y:.4f}", color) for y, name, color in shown])
        (best, name, _), *others = sorted(means)
        findings.append(f"{what.split(' [')[0].capitalize()} ends at {best:.4f} ({name})")
        if others:
            findings[-1] += f", {others[0][0] - best:.4f} below {others[0][1]}"
    for ax, below, title, x in zip(axes[0], axes[-1], ("(a) by steps", "(b) by seconds"),
                                   ("step", "training clock [s]")):
        ax.set(title=title, xlim=(0, None))
        below.set_xlabel(x)
    return save(fig, folder, "curves", findings[0])


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


def figure_time(logs, folder):
    """A bar per run, at most 16: where the seconds went."""
    bars = [(log, parts) for log in logs if (parts := time_parts(log))][:16]
    if not bars:
        return []
    fig, [[ax]] = new_figure(1.2 + 0.62 * len(bars))
    whole = max(sum(s for *_, s in parts) for _, parts in bars)
    for y, (_, parts) in enumerate(bars):
        left = 0.0
        for part, _, seconds in parts:
            hatch = "///" if part == "diagnostics" else None
            ax.barh(y, seconds, left=left, height=0.5, color=PARTS[part], edgecolor="white",
                    hatch=hatch)
            left += seconds
        told = ", ".join(f"{what} {s:.{int(s < 10)}f}" for _, what, s in parts)
        ax.text(0, y + 0.29, f"{told} s", va="top", fontsize=8, color="#333333")
    names = [label(log).replace(", ", "\n") for log, _ in bars]
    ax.set_yticks(range(len(bars)), names, fontsize=8.5)
    ax.set(ylim=(len(bars) - 0.3, -0.5), xlim=(0, whole * 1.01))
    ax.set_xlabel("wall clock [s]; hatched: evaluations that do not count")
    ax.grid(axis="y", visible=False)
    train_s = max(log.train_s or 0 for log, _ in bars)
    eval_s = max(log.eval_s or 0 for log, _ in bars)
    return save(fig, folder, "time", f"Longest training {train_s:.0f} s, longest evaluation "
                                     f"{eval_s:.1f} s ({TIME_LIMIT_S:.0f} s allowed for each)")


def last_with(logs, event):
    """The last log with lines of this event, and those lines; (None, []) without one."""
    found = [(log, log.events[event]) for log in logs if event in log.events]
    return found[-1] if found else (None, [])


def figure_roles(logs, folder):
    """Where the artifact's bytes are, by role, of the last log that says."""
    log, lines = last_with(logs, "role")
    keys = ("packed_bytes", "raw_bytes", "bits_per_symbol")
    rows = [(v.get("name", "?"), *(number(v.get(key)) for key in keys)) for v in lines]
    rows = sorted((row for row in rows if None not in row), key=lambda row: -row[1])
    if not rows:
        return []
    header = (log.model_bytes or 0) - sum(row[1] for row in rows)
    code = log.code_bytes or 0
    rows += [("header", header, header, None), ("train_gpt.py", code, code, None)]
    largest = max(max(row[1:3]) for row in rows)
    fig, [[ax]] = new_figure(1.1 + 0.3 * len(rows))
    for y, (_, size, raw, bits) in enumerate(rows):
        ax.barh(y, raw / 1e3, height=0.62, color="none", edgecolor="#888888", lw=0.8)
        ax.barh(y, size / 1e3, height=0.62, color=COLORS[5] if bits is None else COLORS[0])
        rate = "" if bits is None else f", {bits:.2f} bits per symbol"
        text = f"{size / 1e3:,.1f} kB{rate}"
        ax.text((max(raw, size) + 0.012 * largest) / 1e3, y, text, va="center", size=9)
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.34 * largest / 1e3))
    ax.set_xlabel("kB; outlined: before compression")
    ax.grid(axis="y", visible=False)
    total = sum(row[1] for row in rows)
    return save(fig, folder, "roles", f"{label(log)}: {total / 1e6:.3f} MB of {CAP_BYTES / 1e6:.0f}"
                                      f" MB, {rows[0][1] / total:.0%} of it {rows[0][0]}")


def figure_gptq(logs, folder):
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
        return []
    columns = sorted({column for _, column in errors})
    kinds = list(dict.fromkeys(kind for kind, _ in errors))
    norm = LogNorm(min(errors.values()) / 2, max(errors.values()))  # the least error is not white
    fig, [[ax]] = new_figure(1.2 + 0.25 * len(kinds))
    cells = [[errors.get((kind, column), math.nan) for column in columns] for kind in kinds]
    ax.imshow(cells, aspect="auto", cmap="Blues", norm=norm)
    for (kind, column), error in errors.items():
        if len(columns) <= 20:  # more would not be legible
            ax.text(columns.index(column), kinds.index(kind), f"{1000 * error:.3g}", ha="center",
                    va="center", size=8, color="white" if norm(error) > 0.6 else "black")
    ax.set_xticks(range(len(columns)), ["–" if column < 0 else column for column in columns])
    ax.set_yticks(range(len(kinds)), kinds, fontsize=8.5)
    ax.grid(visible=False)
    ax.set_xlabel("block (–: outside the blocks); a shared matrix stands in its first block")
    (kind, column), error = max(errors.items(), key=lambda item: item[1])
    where = kind if column < 0 else f"block {column}, {kind}"
    return save(fig, folder, "gptq", f"{label(log)}: relative quantization error x 1000; largest "
                f"{1000 * error:.3g} ({where}), median {1000 * median(errors.values()):.3g}")


def stream(log, key):
    """{tokens scored: bits per byte} along test-time training; key: running_bpb or chunk_bpb."""
    return dict(log.series("ttt", "scored_tokens", key))


def untrained(log, logs):
    """A log of the same artifact and text without training, best with the same chunks; or None."""
    same = [other for other in logs if other.final and other.model_bytes == log.model_bytes
            and other.final.tokens == log.final.tokens and other is not log]
    rates = [(other.config.get("ttt_lr"), other.config.get("ttt_epochs")) for other in same]
    still = [other for other, rate in zip(same, rates) if 0 in map(number, rate)]
    return next(iter(still + [other for other in same if other.final.method != "ttt"]), None)


def figure_ttt(logs, folder):
    """Running bpb along the text under test-time training, the score without it, and the gain.

    The first 8 runs: more labels have no place.
    """
    runs = [log for log in logs if log.final and stream(log, "running_bpb")][:8]
    runs = [(log, untrained(log, logs)) for log in runs]
    if not runs:
        return []
    paired = any(other and stream(other, "running_bpb") for _, other in runs)
    fig, axes = new_figure(3.2 + 2.3 * paired, 1 + paired, sharex=True)
    top, low = axes[0][0], axes[-1][0]
    ends, gains = [], []
    heights = []
    for color, (log, other) in zip(cycle(COLORS), runs):
        tokens, bpb = zip(*stream(log, "running_bpb").items())
        top.plot([n / 1e6 for n in tokens], bpb, color=color, lw=1.4)
        ends.append((bpb[-1], f"{label(log)}: {bpb[-1]:.4f}", color))
        heights += bpb[len(bpb) // 20:]  # the first are noise
        base = log.scores.get("exact") or (other and other.final)
        if base:
            top.axhline(base.bpb, color=color, lw=1, ls="--")
            ends.append((base.bpb, f"not trained (dashed): {base.bpb:.4f}", color))
            heights.append(base.bpb)
            gains.append((base.bpb - bpb[-1], label(log), color))
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
        label_ends(low, [(gain, f"{name}: {gain:+.4f}", color) for gain, name, color in gains])
    low.set(xlim=(0, None), xlabel="tokens scored [millions]")
    finding = f"Running bpb under test-time training ends at {min(ends)[0]:.4f}"
    if gains:
        gain, name, _ = max(gains)
        finding = f"Test-time training gains {gain:.4f} bpb ({name})"
    return save(fig, folder, "ttt", finding)


def exports(logs):
    """The largest group of exports of one checkpoint that differ in export settings alone."""
    own = ("grid", "matrix_bits", "matrix_clip_sigmas", "cap_bytes", "float_matrices")
    groups = {}
    for log in logs:
        if log.finished and log.config.get("resume", "-") != "-":
            settings = [item for item in configuration(log).items() if item[0] not in own]
            groups.setdefault((log.config["resume"], *sorted(settings)), []).append(log)
    return max(groups.values(), key=len, default=[])


def figure_export(logs, folder):
    """bpb over the artifact's bytes for exports of one checkpoint; a line per grid and bits."""
    found = exports(logs)
    if len(found) < 3:
        return []
    lines = {}
    for log in found:
        name = log.config.get("grid", "rate")
        if name != "rate":
            name += f", {log.config.get('matrix_bits', '6')} bits"
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
        ends.append((bpb[-1], name, color))
        if name.startswith("sdclip") and "rate" in lines:
            rate = zip(*sorted(lines["rate"]))
            at_rate = np.interp(kilobytes, *rate, left=math.nan, right=math.nan)
            gaps += [float(a - b) for a, b in zip(bpb, at_rate) if b == b]
    ax.set(xlabel="artifact [kB]", ylabel=f"bpb, {found[0].final.method} [bits/byte]")
    label_ends(ax, ends)
    finding = "Bits per byte by artifact size"
    if gaps:
        finding = (f"At equal bytes SDClip scores {min(gaps):+.4f} to {max(gaps):+.4f} bpb over "
                   f"GRID=rate ({len(gaps)} exports)")
    return save(fig, folder, "export", finding)


def draw(logs, folder):
    """Draw what the logs have data for; returns the paths of the files."""
    paths = []
    with matplotlib.rc_context(STYLE):
        for figure in (figure_curves, figure_time, figure_roles, figure_gptq, figure_ttt,
                       figure_export):
            paths += figure(logs, folder)
    return paths
