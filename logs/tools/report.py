"""Logs -> Markdown table, index, page, figures, submission.json, and the test against a record.

    python logs/tools/report.py LOG...                    the table
    python logs/tools/report.py LOG... --record-bpb X     and whether the scores beat a record
    python logs/tools/report.py LOG... --html FILE        and one page with figures, for a browser
    python logs/tools/report.py LOG... --figures DIR      and figures (figures.py draws them)
    python logs/tools/report.py LOG... --submission FILE  and submission.json; see --help
    python logs/tools/report.py --index                   writes logs/INDEX.md, one row per log

A LOG is a log of train_gpt.py, a log of another script of the challenge, or a folder of logs.
Only --figures needs more than the standard library: matplotlib; --html has figures with it.
Reading order: parse_log(), RunLog, table(), submission(), main().
"""

import argparse
import codecs
import json
import math
import re
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

LOGS = Path(__file__).resolve().parent.parent
CAP_BYTES = 16_000_000  # decimal; code and compressed model together
TIME_LIMIT_S = 600.0  # training; evaluation may take as long again
MARGIN_NATS = 0.005  # a record must be better by this much ...
ALPHA = 0.01  # ... at this significance level
METHODS = ("roundtrip", "exact", "sliding", "ttt")
CHECKS = ("causal", "normalized", "score_first", "coverage", "bytes")
# Seeds of one configuration may differ in these settings, and in no key of MACHINE_KEYS.
NOT_CONFIGURATION = {"seed", "run_id", "out_dir", "logfile", "resume", "data_path"}
MACHINE_KEYS = ("world_size", "gpu", "torch", "code_sha256")
DASH = "–"
SCORE_FORMAT = "{:.5f}"
COUNT_FORMAT = "{:,.0f}"


class ReportError(ValueError):
    """Bad input; the message says what was found and what to do."""


# ------------------------------------------------------------------------------------------------
# 1 Parsing
# ------------------------------------------------------------------------------------------------
# Our grammar is '[event ]key:value[ key:value]...' and three verbatim lines. Other scripts share
# the step lines and most names of scores; their logs hold anything else too, such as their source.

PREFIX = re.compile(r"(?:(?:\[[^\]]*\]:?|\d{9,}\.\d+|20\d\d-\d\d-\d\d[ T][\d:.,]+Z?:?) )*")
PAIR = re.compile(r"(?<!\S)([A-Za-z_][\w/]*)[:=] ?(\S+)")
STEP = re.compile(r"(?:step:)?(\d+)/(\d+) (?:\[[^\]]*\] )?(?=(?:train|val)_loss)")
STOPPED = re.compile(r"stopping_early: \w+ train_time: ?(\S+)(?: step: ?(\d+)/\d+)?")
SIZE = re.compile(r"(Serialized model|Total submission size|Code size)(?: \S+)?: (\d+) bytes")
MEMORY = re.compile(r"peak memory(?: allocated)?: (\d+) MiB")
EVENT = re.compile(r"(?:([a-z]\w*) )?[a-z]\w*:\S+(?: [a-z]\w*:\S+)*")
SETTING = re.compile(r"(?:  )?[a-z]\w*: ?[^\s(]+(?: [a-z]\w*:\S+)*")
DEVICE = re.compile(r"\bNVIDIA ([A-Z]+\d+\w*(?: \d+GB)?(?: HBM\d\w*)?)")
ANY_SCORE = re.compile(r"bpb\"?[:=] *\d|(?:train|val)_loss[:=] *\d")
NUMBER = re.compile(r"(-?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+)|nan)(ms|s|m|)", re.IGNORECASE)
PER_UNIT = {"ms": 1000, "s": 1, "m": 1 / 60, "": 1}


def number(text):
    """The float in `text`, times in seconds; nan for 'nan'; None for inf or without a number."""
    match = NUMBER.fullmatch(str(text))
    value = float(match[1]) / PER_UNIT[match[2].lower()] if match else math.inf
    return None if math.isinf(value) else value


def integer(text):
    """The int in `text`, or None."""
    return int(text) if re.fullmatch(r"\d+", str(text)) else None


def stdev(values):
    """The sample standard deviation; unlike statistics.stdev it returns nan if a value is nan."""
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))


class Score(NamedTuple):
    """One evaluation: nats per token, bits per byte, the counts, seconds (None if not logged)."""

    event: str
    method: str
    val_loss: float
    bpb: float
    tokens: int = None
    num_bytes: int = None
    seconds: float = None


class Point(NamedTuple):
    """A step line: `seconds` on the training clock; a training loss, or validation loss and bpb."""

    step: int
    seconds: float
    loss: float
    bpb: float = None
    tok_s: float = None


class RunLog:
    """What the log at `path` says: its lines, and what derive() concludes from them."""

    def __init__(self, path, ours):
        self.path = Path(path)
        self.ours = ours  # a log of train_gpt.py
        self.run = {}  # the run line
        self.config = {}  # settings; in new logs only those that differ from the defaults
        self.train = {}  # step -> Point
        self.val = {}  # step -> Point
        self.scores = {}  # method, or "pre" (before quantization) -> Score
        self.final = None  # the Score that counts
        self.planned = None  # the M of step:N/M
        self.stopped = None  # (seconds, step)
        self.sizes = {}
        self.peak_mib = None
        self.events = {}  # event -> [{key: text}]
        self.order = []  # all events
        self.left_out = []  # lines with a score that were not understood

    def last(self, event):
        """{key: text} of the last line of this event; empty without one."""
        return self.events.get(event, [{}])[-1]

    def series(self, event, *keys):
        """The numbers under `keys` of every line of this event that has all of them, as tuples."""
        rows = [tuple(number(v.get(key)) for key in keys) for v in self.events.get(event, [])]
        return [row for row in rows if not any(value is None or math.isnan(value) for value in row)]

    def derive(self):
        """Set what follows from several lines; None where the log does not say."""
        run, config = self.run, self.config
        folder, stem = self.path.resolve().parent.name, self.path.stem
        self.name = f"{folder}/{stem}" if re.match("train|seed|log", stem) else stem
        self.preset = run.get("preset") if self.ours else folder
        in_name = re.search(r"seed[_-]?(\d+)", stem)
        self.seed = integer(run.get("seed", config.get("seed", in_name and in_name[1])))
        self.hardware = "CPU" if "gpu" in run else None
        if run.get("gpu", "none") != "none":
            world_size = run.get("world_size", config.get("world_size", "1"))
            self.hardware = f"{world_size}x" + run["gpu"].replace("_", " ").removeprefix("NVIDIA ")
        dated = f"{run.get('date')} {config.get('run_id')} {stem} {folder}"
        date = re.search(r"(?<!\d)(20\d\d)-?([01]\d)-?([0-3]\d)(?!\d)", dated)
        self.date = "-".join(date.groups()) if date else None

        self.compliance = self.last("compliance")
        self.model_bytes = self.sizes.get("Serialized model")
        self.total_bytes = self.sizes.get("Total submission size")
        self.code_bytes = self.sizes.get("Code size", integer(run.get("code_bytes")))
        sizes = self.total_bytes and self.model_bytes
        self.finished = bool(self.final and self.compliance and sizes)
        self.verdict = self.find_verdict()

        points = [*self.train.values(), *self.val.values()]
        self.steps = max((p.step for p in points), default=None)
        self.train_s = max((p.seconds for p in points if p.seconds is not None), default=None)
        if self.stopped:
            self.train_s = self.stopped[0]
            self.steps = self.steps if self.stopped[1] is None else self.stopped[1]
        elif self.ours and self.final:
            self.steps = self.planned
        if "train_s" in self.compliance:
            self.train_s = number(self.compliance["train_s"])
        self.ms_per_step = 1000 * self.train_s / self.steps if self.steps and self.train_s else None
        spans = self.series("hessians", "loop_end_s", "hessian_end_s")
        self.hessian_s = spans[0][1] - spans[0][0] if spans else None
        self.eval_s = self.final and self.final.seconds
        if "eval_s" in self.compliance:
            self.eval_s = number(self.compliance["eval_s"])
        rates = [p.tok_s for step, p in sorted(self.train.items()) if step > 3 and p.tok_s]
        self.tok_s = median(rates[len(rates) // 2:]) if rates else None
        return self

    def find_verdict(self):
        """'ok', 'holdout', 'other_limits', 'fail (what)', 'unfinished'; None for other scripts."""
        if not self.final or self.ours and not self.compliance:
            return "unfinished"
        if not self.ours or self.compliance.get("verdict") in (
                "ok", "holdout", "other_limits"):
            return self.compliance.get("verdict")
        broken = [k for k, v in self.compliance.items() if v == "fail" and k != "verdict"]
        return f"fail ({', '.join(broken) or 'no reason given'})"


def method_of(event):
    """What a score's event means: one of METHODS, 'pre', another final_* name as it is, or None."""
    name = event.lower()
    if re.fullmatch(r"final_int\d+_exact", name):  # elsewhere '_exact' means: with all decimals
        return "exact"
    if re.search("pre.?quant|post.?ema", name):
        return "pre"
    for method in ("ttt", "sliding", "roundtrip"):
        if method in name:
            return method
    if name.endswith("quantized"):
        return "roundtrip"
    return name if name.startswith("final_") else None


def add_score(log, line, values):
    """Keep a score line and return True; False if it is none.

    Other scripts have no `final` line: their last score counts. They print a score twice, with 4
    and with 8 decimals, and some print it again under the name that the challenge searches for.
    """
    words = line.split("val_loss")[0].split()
    nats = number(values.get("val_loss"))
    bpb = number(values.get("val_bpb"))
    if not words or nats is None or bpb is None:
        return False
    event = " ".join([words[0].split(":")[0], *(w for w in words[1:] if not re.search("[:=]", w))])
    is_final = log.ours and event == "final"
    method = values.get("method", "") if is_final else method_of(event)
    if method is None:
        return False
    score = Score(event, method, nats, bpb, integer(values.get("tokens")),
                  integer(values.get("bytes")), number(values.get("eval_time")))
    log.order.append(event)
    if is_final:
        log.final = score
        return True
    if not log.ours and any(s.bpb == bpb and s.method != method for s in log.scores.values()):
        return True
    known = log.scores.get(method)
    renamed = known and known.event.removesuffix("_exact") != event.removesuffix("_exact")
    if renamed and abs(known.bpb - bpb) > 1e-4:
        score = score._replace(method=event)  # two different scores may not share a name
    elif known and score.seconds is None:
        score = score._replace(seconds=known.seconds)
    log.scores[score.method] = score
    if not log.ours and method != "pre":
        log.final = score
    return True


def add_step(log, match, values):
    """A step line; in a resumed run the later line of the same step counts."""
    step = int(match[1])
    log.planned = int(match[2])
    seconds = number(values.get("train_time"))
    nats = number(values.get("train_loss"))
    bpb = number(values.get("val_bpb"))
    if nats is not None:
        tok_s = number(values.get("tok_s", values.get("tok/s")))
        log.train[step] = Point(step, seconds, nats, tok_s=tok_s)
    if bpb is not None:
        if seconds is None and step in log.train:
            seconds = log.train[step].seconds
        log.val[step] = Point(step, seconds, number(values.get("val_loss")), bpb)
    memory = integer(values.get("peak_mem_mib", values.get("peak_mem_mb")))
    log.peak_mib = max(log.peak_mib or 0, memory or 0) or None


def add_event(log, event, values):
    """Any other line of our grammar."""
    log.order.append(event)
    if event == "run":
        log.run = values
    elif event in ("settings", "config", "config_changed"):
        values.pop("default", None)
        if values != {"all": "default"}:
            log.config.update(values)
    else:
        log.events.setdefault(event, []).append(values)


def add_line(log, line):
    """Put one line where it belongs."""
    values = dict(PAIR.findall(line))
    if match := STEP.match(line):
        add_step(log, match, values)
    elif match := STOPPED.fullmatch(line):
        log.stopped = number(match[1]), integer(match[2])
    elif match := SIZE.match(re.sub(r" \((un)?compressed\)", "", line)):
        log.sizes[match[1]] = int(match[2])  # the last one counts; uncompressed sizes come first
    elif match := MEMORY.match(line):
        log.peak_mib = int(match[1])
    elif "val_bpb" in values and add_score(log, line, values):
        pass
    elif log.ours and (match := EVENT.fullmatch(line)):
        add_event(log, match[1] or "", values)
    elif not log.ours and not log.train and SETTING.fullmatch(line):
        log.config.update(values)
    elif ANY_SCORE.search(line):
        log.left_out.append(line.strip())
    if not log.ours and (match := DEVICE.search(line)):
        log.run.setdefault("gpu", match[1])


def parse_log(path):
    """The RunLog of the file at `path`; ReportError if it cannot be read or is no training log."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from None
    lines = [line[PREFIX.match(line).end():].rstrip() for line in text.splitlines()]
    ours = any(line.startswith("run ") and " code_sha256:" in line for line in lines)
    log = RunLog(path, ours)
    for line in lines:
        add_line(log, line)
    if not (ours or log.train or log.val or log.scores):
        raise ReportError(f"{path}: not a training log; give logs of train_gpt.py or their folders")
    return log.derive()


def collect(paths):
    """The logs at `paths`, folders replaced by all logs in them; stderr says what is left out."""
    logs = []
    left_out = []
    for path in map(Path, paths):
        if not path.is_dir():
            logs.append(parse_log(path))
            continue
        before = len(logs)
        for file in sorted((*path.rglob("*.txt"), *path.rglob("*.log"))):
            try:
                logs.append(parse_log(file))
            except ReportError:
                left_out.append(file.name)
        if len(logs) == before:
            raise ReportError(f"{path}: no training log (*.txt, *.log) in this folder")
    if left_out:
        print(f"note: left out, not training logs: {', '.join(left_out)}", file=sys.stderr)
    for log in logs:
        for word, count in Counter(line.split()[0] for line in log.left_out).items():
            print(f"note: {log.path}: left out {count} line(s) with a score, '{word} ...'",
                  file=sys.stderr)
    return logs


def plain_output():
    """On a terminal that knows only ASCII print -, +- and x for the three other signs."""
    signs = {"–": "-", "±": "+-", "×": "x"}
    codecs.register_error("plain", lambda e: (signs.get(e.object[e.start], "?"), e.start + 1))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="plain")


# ------------------------------------------------------------------------------------------------
# 2 Configurations and tables
# ------------------------------------------------------------------------------------------------


def configuration(log):
    """Every setting that must be the same for two logs to be seeds of one configuration."""
    found = {k: v for k, v in log.config.items() if k not in NOT_CONFIGURATION}
    found |= {k: log.run[k] for k in MACHINE_KEYS if k in log.run}
    if "tokenizer_path" in found:
        found["tokenizer_path"] = Path(found["tokenizer_path"]).name
    if not log.ours:  # scripts in other folders are other scripts
        found["folder"] = str(log.path.resolve().parent)
    return found


def differences(logs):
    """The settings that differ between `logs`, each as 'name: value (log), value (log)'."""
    tables = [configuration(log) for log in logs]
    found = []
    for key in dict.fromkeys(chain(*tables)):
        values = [table.get(key, "default") for table in tables]
        if len(set(values)) > 1:
            named = (f"{value} ({log.path.name})" for value, log in zip(values, logs))
            found.append(f"{key}: {', '.join(named)}")
    return found


def by_configuration(logs):
    """Groups of logs with one configuration, in order of appearance."""
    groups = {}
    for log in logs:
        key = str(log.path)  # without settings nothing shows that two logs belong together
        if log.ours or log.config:
            key = json.dumps(configuration(log), sort_keys=True)
        groups.setdefault(key, []).append(log)
    return list(groups.values())


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


def baseline(log, other):
    """(bpb without test-time training, what it is) from the log, or from its `other`."""
    if "exact" in log.scores:
        return log.scores["exact"].bpb, "not trained"
    if other:
        return other.final.bpb, "not trained"
    for method, what in (("sliding", "sliding windows"), ("roundtrip", "windows"),
                         ("pre", "windows, before export")):
        if method in log.scores:
            return log.scores[method].bpb, f"not trained, {what}"
    return None


# Columns: title, value of a RunLog, format of a number or None for text. Scores come in between.
FIRST_COLUMNS = (
    ("run", lambda log: log.name, None),
    ("preset", lambda log: log.preset, None),
    ("seed", lambda log: None if log.seed is None else str(log.seed), None),
    ("gpu", lambda log: log.hardware, None),
    ("steps", lambda log: log.steps, COUNT_FORMAT),
    ("tok/s", lambda log: log.tok_s, COUNT_FORMAT),
    ("ms/step", lambda log: log.ms_per_step, "{:,.1f}"),
    ("train s", lambda log: log.train_s, "{:.1f}"),
    ("peak MiB", lambda log: log.peak_mib, COUNT_FORMAT),
    ("pre-quant bpb", lambda log: log.scores.get("pre"), SCORE_FORMAT))
LAST_COLUMNS = (
    ("final bpb", lambda log: log.final and log.final.bpb, SCORE_FORMAT),
    ("final by", lambda log: log.final and (log.final.method or None), None),
    ("artifact bytes", lambda log: log.model_bytes, COUNT_FORMAT),
    ("total bytes", lambda log: log.total_bytes, COUNT_FORMAT),
    ("verdict", lambda log: log.verdict, None))
IN_INDEX = ("gpu", "preset", "seed", "steps", "final bpb", "final by", "total bytes", "verdict")


def cell(values, form):
    """One cell: a value, or 'mean ± std' of several; text only if all agree; a dash for unknown."""
    if not values or None in values:
        return DASH
    if form is None:
        return values[0] if len(set(values)) == 1 else DASH
    if isinstance(values[0], Score):
        seconds = [score.seconds for score in values]
        took = "" if None in seconds else f" ({mean(seconds):.1f} s)"
        return cell([score.bpb for score in values], form) + took
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
    return form.format(mean(values)) + spread


def markdown(titles, rows, numeric):
    """A Markdown table; columns whose flag in `numeric` is set are aligned right."""
    lines = ["| " + " | ".join(titles) + " |"]
    lines.append("|" + "|".join("---:" if n else "---" for n in numeric) + "|")
    for row in rows:
        lines.append("| " + " | ".join(str(text).replace("|", "\\|") for text in row) + " |")
    return "\n".join(lines)


def table(logs):
    """The Markdown table of `logs`; after several seeds of one configuration their mean ± std."""
    names = dict.fromkeys(chain(METHODS, *(log.scores for log in logs)))
    scores = [(f"{name} bpb", lambda log, name=name: log.scores.get(name), SCORE_FORMAT)
              for name in names if name != "pre"]
    columns = [*FIRST_COLUMNS, *scores, *LAST_COLUMNS]
    rows = []
    for group in by_configuration(logs):
        rows += [[cell([value(log)], form) for _, value, form in columns] for log in group]
        if len({log.seed for log in group}) > 1:
            row = [cell([value(log) for log in group], form) for _, value, form in columns]
            rows.append(["**mean ± std**", row[1], f"n = {len(group)}", *row[3:]])
    kept = [i for i in range(len(columns)) if any(row[i] != DASH for row in rows)]
    return markdown([columns[i][0] for i in kept], [[row[i] for i in kept] for row in rows],
                    [columns[i][2] is not None for i in kept])


def index(folder):
    """Write INDEX.md into `folder`: a row for each log there and below it; returns how many."""
    columns = [column for column in FIRST_COLUMNS + LAST_COLUMNS if column[0] in IN_INDEX]
    rows = []
    for log in collect([folder]):
        path = log.path.relative_to(folder).as_posix()
        link = f"[{path.rsplit('.', 1)[0]}]({path.replace(' ', '%20')})"
        cells = [cell([value(log)], form) for _, value, form in columns]
        rows.append([link, log.date or DASH, *cells])
    titles = ["log", "date", *(title for title, *_ in columns)]
    numeric = [False, False, *(form is not None for *_, form in columns)]
    body = markdown(titles, sorted(rows), numeric)
    head = "# Index of runs\n\nWritten by `python logs/tools/report.py --index`.\n\n"
    Path(folder, "INDEX.md").write_text(f"{head}{body}\n", encoding="utf-8")
    return len(rows)


# ------------------------------------------------------------------------------------------------
# 3 submission.json and the test against a record
# ------------------------------------------------------------------------------------------------


def student_p(t, freedom):
    """P(T < t) for Student's t: by T = sqrt(freedom) tan(a) the density is cos(a)^(freedom-1)."""
    def area(low, high, parts=2000):  # Simpson's rule
        width = (high - low) / parts
        y = [math.cos(low + i * width) ** (freedom - 1) for i in range(parts + 1)]
        return width / 3 * (y[0] + y[-1] + 4 * sum(y[1:-1:2]) + 2 * sum(y[2:-1:2]))
    angle = math.atan(t / math.sqrt(freedom))
    return area(-math.pi / 2, angle) / area(-math.pi / 2, math.pi / 2)


def t_test(values, record):
    """One-sided t-test that the mean of `values` [nats] is below `record` - MARGIN_NATS; a dict.

    p is None for a single value: one run shows no spread.
    """
    bar = record - MARGIN_NATS
    std = stdev(values) if len(values) > 1 else None
    p = None if std is None else float(mean(values) >= bar)
    if std:
        p = student_p((mean(values) - bar) / (std / math.sqrt(len(values))), len(values) - 1)
    return dict(n=len(values), mean=mean(values), std=std, record=record, bar=bar, p=p,
                holds=p is not None and p < ALPHA)


def record_test(logs, record_bpb):
    """The test in nats per byte and in nats per token, as both are in use; a dict.

    The record's nats per token follow from the bytes per token of these logs: right for a record
    with their tokenizer.
    """
    losses = [log.final.val_loss for log in logs]
    byte_losses = [log.final.bpb * math.log(2) for log in logs]
    bytes_per_token = mean(losses) / mean(byte_losses)
    token = t_test(losses, record_bpb * math.log(2) * bytes_per_token)
    byte = t_test(byte_losses, record_bpb * math.log(2))
    held = [unit for unit, test in (("token", token), ("byte", byte)) if test["holds"]]
    verdict = "record per " + " and per ".join(held) if held else "no record"
    if len(logs) == 1:
        verdict = "undecided: one seed shows no spread"
    return dict(record_bpb=record_bpb, margin_nats=MARGIN_NATS, alpha=ALPHA, nats_per_token=token,
                nats_per_byte=byte, verdict=verdict)


def derived_compliance(logs):
    """submission.json's compliance table, each entry from the logs' own lines."""
    def all_ok(name):
        return all(log.compliance.get(name) == "ok" for log in logs)

    def within(values, limit):
        return all(value is not None and value <= limit for value in values)

    def before_artifact(log):
        return log.order[:log.order.index("artifact")] if "artifact" in log.order else []

    return dict(
        train_under_600s=within([log.train_s for log in logs], TIME_LIMIT_S),
        artifact_under_16mb=within([log.total_bytes for log in logs], CAP_BYTES),
        eval_under_600s=within([log.eval_s for log in logs], TIME_LIMIT_S),
        no_slot=all_ok("causal") and all_ok("score_first"),  # SLOT: a loss depends on its own token
        no_pre_quant_ttt=not any("ttt" in before_artifact(log) for log in logs),
        no_ngram_cache=all_ok("normalized"),  # a hashed cache's probabilities do not sum to 1
        score_first_ttt=all_ok("score_first"), three_seeds=len({log.seed for log in logs}) >= 3,
        every_token_scored_once=all_ok("coverage"), bytes_match_text=all_ok("bytes"))


def logged_fields(logs):
    """The fields of submission.json that follow from finished logs.

    As in the challenge, artifact_bytes is code and model together, bytes_total the largest of them.
    """
    losses = [log.final.val_loss for log in logs]
    bpbs = [log.final.bpb for log in logs]
    results = {}
    for log in logs:
        results[str(log.seed)] = dict(
            val_loss=log.final.val_loss, val_bpb=log.final.bpb, artifact_bytes=log.total_bytes,
            steps=log.steps, eval_time_s=log.eval_s)
    return dict(
        val_loss=round(mean(losses), 8), val_bpb=round(mean(bpbs), 8),
        val_bpb_std=round(stdev(bpbs), 8) if len(bpbs) > 1 else None,
        seeds=[log.seed for log in logs], seed_results=results,
        bytes_total=max(log.total_bytes for log in logs), bytes_code=logs[0].code_bytes,
        hardware=logs[0].hardware, pytorch_version=logs[0].run.get("torch"))


def submission(logs, typed):
    """The dict of submission.json from the logs of the seeds of one configuration.

    typed: what no log says: author, github_id, name, blurb, track, attribution, date and summary
    (these two may be None).
    """
    for log in logs:
        if not log.ours or not log.finished or log.seed is None:
            raise ReportError(f"{log.path}: not a finished run of train_gpt.py with a seed")
    if found := differences(logs):
        raise ReportError(f"logs of several configurations; they differ in {'; '.join(found)}")
    logs = sorted(logs, key=lambda log: log.seed)
    seeds = [log.seed for log in logs]
    if len(set(seeds)) < len(seeds):
        raise ReportError(f"two logs have the same seed: {', '.join(map(str, seeds))}")
    date = typed["date"] or max((log.date for log in logs if log.date), default=None)
    if not date:
        raise ReportError("the logs name no date; give --date YYYY-MM-DD")
    out = {key: typed[key] for key in ("author", "github_id", "name", "blurb")}
    return out | dict(
        date=date, track=typed["track"], **logged_fields(logs),
        technique_summary=typed["summary"] or logs[0].config.get("stack", "the default settings"),
        compliance=derived_compliance(logs), attribution=typed["attribution"])


# ------------------------------------------------------------------------------------------------
# 4 Command line
# ------------------------------------------------------------------------------------------------


def parser():
    """The command line."""
    p = argparse.ArgumentParser(prog="report.py", description="Logs as a table and figures; the "
                                "submission.json and record test of seeds of one configuration.")
    p.add_argument("logs", nargs="*", metavar="LOG", help="log files, or folders of logs")
    p.add_argument("--html", metavar="FILE", help="write one page that needs no network")
    p.add_argument("--figures", metavar="DIR", help="draw what the logs hold, as PNG and SVG")
    p.add_argument("--index", action="store_true", help="write INDEX.md of folder LOG, or logs/")
    p.add_argument("--record-bpb", type=float, metavar="X", help="score to beat [bits per byte]")
    p.add_argument("--submission", metavar="FILE", help="submission.json; needs the next four")
    for name in ("author", "github-id", "name", "blurb"):
        p.add_argument(f"--{name}", metavar="TEXT")
    p.add_argument("--date", metavar="YYYY-MM-DD", help="default: the date in the logs")
    p.add_argument("--track", default="10min_16mb", choices=("10min_16mb", "non_record_16mb"))
    p.add_argument("--summary", metavar="TEXT", help="technique_summary; default: STACK")
    p.add_argument("--attribution", action="append", default=[], metavar="WHAT=WHOM")
    return p


def write_submission(logs, args, test):
    """--submission: write the file; say which claims the logs do not support."""
    typed = vars(args)
    if not all(typed[name] for name in ("author", "github_id", "name", "blurb")):
        raise ReportError("--submission needs --author, --github-id, --name and --blurb")
    pairs = [text.partition("=") for text in args.attribution]
    if not all(whom for _, _, whom in pairs):
        raise ReportError("--attribution: give WHAT=WHOM")
    out = submission(logs, typed | {"attribution": {what: whom for what, _, whom in pairs}})
    if test:
        out["record_test"] = test
    text = json.dumps(out, indent=2, ensure_ascii=False) + "\n"
    Path(args.submission).write_text(text, encoding="utf-8")
    print(f"\n{args.submission}: {out['val_bpb']:.5f} bpb, {len(logs)} seed(s)")
    for claim in (k for k, held in out["compliance"].items() if not held):
        print(f"warning: the logs do not show {claim}", file=sys.stderr)


def run(args):
    """Do what the command line asks for."""
    if args.index:
        folder = args.logs[0] if args.logs else LOGS
        print(f"{Path(folder, 'INDEX.md')}: {index(folder)} runs")
        return
    if not args.logs:
        raise ReportError("give logs, or --index; --help lists the options")
    logs = collect(args.logs)
    print(table(logs))
    if args.html:
        from page import page
        Path(args.html).write_text(page(logs), encoding="utf-8")
        print(f"\n{args.html}: open it in a browser")
    if args.figures:
        try:
            from figures import draw
        except ImportError:
            raise ReportError("--figures needs matplotlib: pip install matplotlib") from None
        print("\n" + "\n".join(map(str, draw(logs, Path(args.figures)))))
    test = None
    if args.record_bpb:
        if not all(log.final for log in logs):
            raise ReportError("the test against a record needs finished runs")
        test = record_test(logs, args.record_bpb)
        for unit in ("nats_per_token", "nats_per_byte"):
            told = [f"{k} {cell([v], '{:.6g}')}" for k, v in test[unit].items() if k != "holds"]
            print(f"{unit}: {', '.join(told)}")
        print(f"verdict (p < {ALPHA}): {test['verdict']}")
    if args.submission:
        write_submission(logs, args, test)


def main(argv=None):
    """The command line; returns the exit code: 0, or 2 for bad input."""
    plain_output()
    try:
        run(parser().parse_args(argv))
    except (ReportError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
