"""The page of report.py --html: one file, no script, no network; light and dark as the browser is.

Runs stand side by side, then the figures of figures.py as inline SVG, whose colors become CSS
variables, so that one drawing serves both schemes.
"""

import html
import math
from statistics import mean, median

from report import (CAP_BYTES, CHECKS, COUNT_FORMAT, DASH, TIME_LIMIT_S, baseline,
                    by_configuration, configuration, number, stdev, untrained)

try:
    from figures import for_page
except ImportError:  # without matplotlib the page has its table and says what is missing
    for_page = None

# Colors of lines and bars in figures.py -> what they are on a dark page.
SERIES = {"#0072B2": "#5CB3E8", "#D55E00": "#FF9455", "#009E73": "#3CC79A", "#AA3377": "#E489CF",
          "#7F6A00": "#C9B04A", "#444444": "#B4B4B4", "#56B4E9": "#9AD4F5", "#004C78": "#2F7FB0",
          "#BBBBBB": "#6B6B6B", "#CFE8DF": "#39564B", "#E69F00": "#E69F00"}
# Colors of figures.py that mean ink, paper and grid -> their values, light and dark.
PLAIN = {"#000000": ("ink", "#1F2328", "#E6EDF3"), "#FFFFFF": ("paper", "#FFFFFF", "#0D1117"),
         "#E4E4E4": ("grid", "#E4E4E4", "#30363D")}
VARIABLES = PLAIN | {light: (f"c{i}", light, dark)
                     for i, (light, dark) in enumerate(SERIES.items())}
STYLE = """
body { margin: 0 auto; padding: 1.2rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; vertical-align: top; max-width: 14rem;
  overflow-wrap: anywhere; border-bottom: 1px solid var(--grid); }
th:first-child { text-align: left; white-space: nowrap; position: sticky; left: 0;
  background: var(--paper); font-weight: normal; }
thead th, thead th:first-child, .part th, .best { font-weight: bold; }
.part th { padding-top: 1rem; border-bottom: 2px solid var(--grid); }
small { display: block; opacity: .75; }
.bar { height: .4rem; min-width: 7rem; background: var(--grid); border-radius: .2rem; }
.bar div { height: 100%; background: var(--c0); border-radius: .2rem; }
.bar .over, .bad { background: #C62828; color: white; }
.bad { padding: 0 .4rem; border-radius: .2rem; }
svg { display: block; width: 100%; min-width: 40rem; max-width: 60rem; height: auto; }
svg text { fill: var(--ink); }
dt { float: left; clear: left; width: 9rem; font-weight: bold; } dd { margin-left: 9.5rem; }
"""
TERMS = {
    "bpb": "bits per byte of the text, lower is better; the challenge's score",
    "final": "the one score of the run, by the method that FINAL_SCORE named beforehand",
    "TTT": "test-time training: a chunk is scored first, then the model is trained on it",
    "windows": "text scored in windows side by side, each from an empty state",
    "exact": "the recurrent state is carried through the whole text",
    "GPTQ": "rounding of a matrix column by column, with correction of the errors before",
    "relative error": "squared error of a layer's output by quantization, over its power",
    "bits per weight": "what the entropy coder leaves of an integer; the integers themselves may "
                       "be as wide as 8 bits"}


def scheme(dark):
    """The CSS variables of one color scheme."""
    return " ".join(f"--{name}: {pair[dark]};" for name, *pair in VARIABLES.values())


def themed(svg):
    """The SVG with its colors as CSS variables."""
    for color, (name, _, _) in VARIABLES.items():
        svg = svg.replace(color.lower(), f"var(--{name})")
    return svg


def text(value, form="{}"):
    """A cell's text: the formatted value, escaped; a dash for None."""
    return DASH if value is None else html.escape(form.format(value))


def bar(value, limit, form, unit):
    """A cell with a number, its limit and a bar that shows their ratio."""
    if value is None:
        return DASH
    share = value / limit
    over = ' class="over"' if share > 1 else ""
    return (f"{form.format(value)}<small>of {limit:,.0f} {unit}</small>"
            f'<div class="bar"><div{over} style="width: {min(1, share):.1%}"></div></div>')


def judged(word):
    """A cell with a verdict: anything but ok and holdout stands out."""
    if word is None:
        return DASH
    good = word in ("ok", "holdout")
    return html.escape(word) if good else f'<span class="bad">{html.escape(word)}</span>'


def errors(log):
    """The relative quantization errors of the log's matrices."""
    return [error for error, in log.series("gptq", "rel_err")]


def limit_s(log):
    """Seconds of training that the run was given; the challenge's where it does not say."""
    return number(log.run.get("max_wallclock_seconds")) or TIME_LIMIT_S


def gain(log, logs):
    """A cell: what test-time training gained [bpb], and against which score."""
    found = baseline(log, untrained(log, logs))
    if not (log.final and log.final.method == "ttt" and found):
        return DASH
    bpb, what = found
    return f"{bpb - log.final.bpb:+.4f}<small>{what}: {bpb:.4f}</small>"


def rows(logs):
    """(title, cells) of the table, a cell a run; (title, None) begins a part."""
    def each(title, value, form="{}"):
        return title, [text(value(log), form) for log in logs]

    bits = [number(log.last("quantized").get("bits_per_weight")) for log in logs]
    out = [("Score", None)]
    out.append(("final bpb", [f'<span class="best">{text(log.final and log.final.bpb, "{:.5f}")}'
                              "</span>" for log in logs]))
    out.append(each("final by", lambda log: log.final and (log.final.method or None)))
    for name in dict.fromkeys(name for log in logs for name in log.scores):
        title = "before export, windows" if name == "pre" else name
        found = [log.scores.get(name) for log in logs]
        out.append((title, [text(s and s.bpb, "{:.5f}") + (f" ({s.seconds:.1f} s)" if s and
                                                           s.seconds else "") for s in found]))
    out.append(("TTT gain", [gain(log, logs) for log in logs]))
    out.append(("Budgets", None))
    out.append(("bytes", [bar(log.total_bytes, CAP_BYTES, "{:,}", "bytes") for log in logs]))
    out.append(("training", [bar(log.train_s, limit_s(log), "{:.1f}", "s") for log in logs]))
    out.append(("evaluation", [bar(log.eval_s, TIME_LIMIT_S, "{:.1f}", "s") for log in logs]))
    out.append(("Export", None))
    out.append(("bits per weight", [text(b, "{:.2f}") for b in bits]))
    out.append(each("script [bytes]", lambda log: log.code_bytes, COUNT_FORMAT))
    out.append(each("relative error, median", lambda log: median(errors(log)) if errors(log)
                    else None, "{:.3g}"))
    out.append(each("relative error, largest", lambda log: max(errors(log), default=None),
                    "{:.3g}"))
    out.append(("Compliance", None))
    for name in (*CHECKS, "probes"):
        cells = [log.compliance.get(name) for log in logs]
        out.append((name, [text(c) if name == "probes" else judged(c) for c in cells]))
    out.append(("verdict", [judged(log.verdict) for log in logs]))
    out.append(("Run", None))
    for key in ("preset", "seed", "hardware", "date", "steps"):
        out.append(each(key, lambda log, key=key: getattr(log, key)))
    for key in ("torch", "commit"):
        out.append(each(key, lambda log, key=key: log.run.get(key)))
    out.append(each("tokens/s", lambda log: log.tok_s, COUNT_FORMAT))
    out.append(each("ms/step", lambda log: log.ms_per_step, "{:.1f}"))
    out.append(each("peak memory [MiB]", lambda log: log.peak_mib, COUNT_FORMAT))
    tables = [configuration(log) for log in logs]
    names = [key for key in dict.fromkeys(key for table in tables for key in table)
             if len({table.get(key) for table in tables}) > 1
             and key not in ("world_size", "gpu", "torch")]
    out.append(("Settings that differ", None))
    out += [(key, [text(table.get(key, "default")[:12 if key == "code_sha256" else 80])
                    for table in tables]) for key in names]
    # A row without a value, and a part without a row, say nothing.
    out = [row for row in out if row[1] is None or set(row[1]) != {DASH}]
    return [row for row, after in zip(out, [*out[1:], ("", None)]) if row[1] or after[1]]


def headline(logs):
    """The best configuration's score in one sentence."""
    scores = [(mean(bpbs), group, bpbs) for group in by_configuration(logs)
              if (bpbs := [log.final.bpb for log in group if log.final])]
    scores = [row for row in scores if not math.isnan(row[0])]
    if not scores:
        return "No run has ended with a score."
    best, group, bpbs = min(scores, key=lambda row: row[0])
    spread = f" ± {stdev(bpbs):.4f} ({len(bpbs)} seeds)" if len(bpbs) > 1 else ""
    name = group[0].name if len(group) == 1 else f"{group[0].name} and its other seeds"
    broken = sum(log.verdict not in ("ok", "holdout", None) for log in logs)
    told = f"{broken} of {len(logs)} without the verdict ok." if broken else "No check failed."
    return f"Best: {best:.4f}{spread} bpb, {name}. {told}"


def page(logs):
    """The HTML text for RunLogs."""
    names = [log.name if [other.name for other in logs].count(log.name) == 1
             else f"{log.path.resolve().parent.name}/{log.name}" for log in logs]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    lines = []
    for title, cells in rows(logs):
        if cells is None:
            lines.append(f'<tr class="part"><th scope="rowgroup" colspan="{len(logs) + 1}">'
                         f"{title}</th></tr>")
        else:
            lines.append(f'<tr><th scope="row">{html.escape(title)}</th>'
                         + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    drawn = [f'<section id="{name}"><h2>{html.escape(finding)}</h2>'
             f'<div class="wide" role="img" aria-label="{html.escape(finding)}">{themed(svg)}</div>'
             "</section>" for name, finding, svg in (for_page(logs) if for_page else ())]
    if not for_page:
        drawn = ["<p>For the figures, <code>pip install matplotlib</code> and write it again.</p>"]
    terms = "".join(f"<dt>{term}</dt><dd>{meaning}</dd>" for term, meaning in TERMS.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{len(logs)} run(s) of train_gpt.py</title>
<style>
:root {{ {scheme(False)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {scheme(True)} }} }}
{STYLE}</style>
</head>
<body>
<h1>{", ".join(map(html.escape, names[:4]))}{" …" * (len(names) > 4)}</h1>
<p>{html.escape(headline(logs))}</p>
<div class="wide" tabindex="0">
<table>
<thead><tr><th scope="col">run</th>{head}</tr></thead>
<tbody>
{chr(10).join(lines)}
</tbody>
</table>
</div>
{chr(10).join(drawn)}
<h2>Terms</h2>
<dl>{terms}</dl>
</body>
</html>
"""
