"""Logs -> Markdown table, figures, submission.json, and the review of a submission folder.

Run (from anywhere; the README beside this file shows more):
    python logs/report.py LOG...                       the table
    python logs/report.py LOG... --figures DIR         learning curves, time budget, and what else the logs hold
    python logs/report.py LOG... --submission OUT.json --author A --github-id G --name N --blurb B --record-bpb X
    python logs/report.py --check FOLDER               every fault a reviewer would find; exit code 1 if any
    python logs/report.py --index                      the index of runs in the README beside this file

A LOG is a log of train_gpt.py, a log in one of the challenge's older formats, or a folder of logs.
Read in this order: parse_log(), RunLog, table(), submission(), Review, main().
Only --figures needs matplotlib and only --record-bpb / --record-nats need scipy; the rest is the standard library.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import mean, median

CAP_BYTES = 16_000_000  # decimal; code and compressed model together
TIME_LIMIT_S = 600.0  # training; evaluation has as much again
MARGIN_NATS, ALPHA = 0.005, 0.01  # a record is better by this much, at this level
METHODS = ("roundtrip", "exact", "sliding", "ttt")
CHECKS = ("causal", "normalized", "score_first", "coverage", "bytes")
NOT_CONFIGURATION = {"seed", "run_id", "out_dir", "logfile"}  # what may differ between seeds of one configuration
MACHINE_KEYS = ("world_size", "gpu", "torch", "code_sha256")  # of the run line; these must not differ either
# Bytes per token of the challenge's validation split by tokenizer file: a score with other bytes is wrong.
CHALLENGE_BYTES_PER_TOKEN = {"fineweb_1024_bpe": 2.43593, "fineweb_4096_bpe": 3.3197, "fineweb_8192_bpe": 3.72663}
DASH = "–"
SCORE_FORMAT, COUNT_FORMAT = "{:.5f}", "{:,.0f}"


class ReportError(ValueError):
    """Bad input; the message says what was found and what to do."""


# -------------------------------------------------------------------------------------------------
# 1 Parsing
# -------------------------------------------------------------------------------------------------
# Our grammar is '[event ]key:value[ key:value]...' with three verbatim lines.  The challenge's older logs
# share the progress lines; their score lines and settings differ, and anything may stand between.

PAIR = re.compile(r"(?<!\S)([A-Za-z_][\w/]*): ?(\S+)")
PROGRESS = re.compile(r"(?:step:)?(\d+)/(\d+) (?=train_loss|val_loss)(.*)")
SCORE = re.compile(r"(?:diagnostic )?([\w-]+(?: post-ema)?) (?=.*val_loss: ?(?:\d|nan))(.*val_bpb: ?\S+.*)",
                   re.IGNORECASE)
STOPPED = re.compile(r"stopping_early: \w+ train_time: ?(\S+) step: ?(\d+)/(\d+)")
SIZE = re.compile(r"(Serialized model|Total submission size|Code size)(?: (\S+))?: (\d+) bytes")
MEMORY = re.compile(r"peak memory allocated: (\d+) MiB")
DEVICE = re.compile(r"\bNVIDIA ([A-Z]+\d+\w*(?: \d+GB)?(?: HBM\d\w*)?)")
PER_UNIT = {"ms": 1000, "s": 1, "m": 1 / 60, "": 1}


def number(text):
    """The finite float in `text`, its unit dropped and times turned into seconds; None where there is none."""
    match = re.fullmatch(r"(-?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+))(ms|s|m|)", str(text), re.IGNORECASE)
    value = float(match[1]) / PER_UNIT[match[2].lower()] if match else math.inf
    return value if math.isfinite(value) else None


def loss(text):
    """As `number`, but a loss may be nan."""
    return math.nan if str(text).lower() == "nan" else number(text)


def integer(text):
    """The int in `text`, or None."""
    return int(text) if re.fullmatch(r"\d+", str(text)) else None


def stdev(values):
    """The sample's standard deviation; nan where a value is, on which statistics.stdev breaks."""
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))


@dataclass
class Score:
    """One evaluation: nats per token, bits per byte, what was scored, seconds (None where the log does not say)."""
    method: str
    val_loss: float
    bpb: float
    tokens: int | None = None
    num_bytes: int | None = None
    seconds: float | None = None


@dataclass
class Point:
    """A progress line: at `step`, `seconds` on the training clock; a training loss or a validation score."""
    step: int
    seconds: float | None
    loss: float
    bpb: float | None = None
    tok_s: float | None = None


@dataclass
class RunLog:
    """What a log says; None or empty where it does not.  `ours` tells train_gpt.py's own logs from older ones."""
    path: Path
    ours: bool = False
    run: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)  # step -> Point
    val: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)  # method, or "pre" before quantization -> Score
    final: Score | None = None
    planned: int | None = None  # the M of step:N/M
    stopped: tuple | None = None  # seconds, step
    sizes: dict = field(default_factory=dict)
    peak_mib: int | None = None
    events: dict = field(default_factory=dict)  # name of a line of our grammar -> its {key: text}, as they came
    order: list = field(default_factory=list)  # those names, as they came

    def last(self, event):
        """{key: text} of the last line of this event; empty without one."""
        return self.events.get(event, [{}])[-1]

    def series(self, event, *keys):
        """The numbers under `keys` of every line of this event that has all of them, as tuples."""
        rows = [tuple(number(values.get(key)) for key in keys) for values in self.events.get(event, [])]
        return [row for row in rows if None not in row]

    @property
    def compliance(self):
        """The compliance line; empty where the run did not come that far."""
        return self.last("compliance")

    @property
    def finished(self):
        """Whether the final, size and compliance lines are there."""
        return bool(self.final and self.compliance and self.total_bytes and self.model_bytes)

    @property
    def name(self):
        """RUN_ID, else the file's name (with its folder's, where every folder has a train.log)."""
        stem = self.path.stem
        return self.config.get("run_id") if self.ours and self.config.get("run_id") else (
            f"{self.path.resolve().parent.name}/{stem}" if stem.startswith("train") and not self.ours else stem)

    @property
    def seed(self):
        """The seed as an int, or None."""
        text = self.run.get("seed", self.config.get("seed"))
        if text is None and (match := re.search(r"seed_?(\d+)", self.path.stem)):
            text = match[1]
        return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None

    @property
    def preset(self):
        """PRESET, or the folder's name for older logs."""
        return self.run.get("preset") or (DASH if self.ours else self.path.resolve().parent.name)

    @property
    def hardware(self):
        """Such as '8xH100 80GB HBM3'; 'CPU' without a GPU."""
        gpu = self.run.get("gpu")
        if gpu is None:
            return None
        world = self.run.get("world_size", self.config.get("world_size", "1"))
        return "CPU" if gpu == "none" else f"{world}x" + gpu.replace("_", " ").removeprefix("NVIDIA ")

    @property
    def steps(self):
        """Training steps done, or None."""
        if self.stopped:
            return self.stopped[1]
        return self.planned if self.final and self.ours else max([*self.train, *self.val], default=None)

    @property
    def train_s(self):
        """Seconds on the training clock: the compliance line's, else the last that was printed."""
        if (told := number(self.compliance.get("train_s"))) is not None:
            return told
        if self.stopped:
            return self.stopped[0]
        points = (*self.train.values(), *self.val.values())
        return max((p.seconds for p in points if p.seconds is not None), default=None)

    @property
    def hessian_s(self):
        """Seconds of the training clock that calibration took, or None."""
        return next((end - begin for begin, end in self.series("hessians", "loop_end_s", "hessian_end_s")), None)

    @property
    def eval_s(self):
        """Seconds of the counted evaluation."""
        told = number(self.compliance.get("eval_s"))
        return told if told is not None else self.final.seconds if self.final else None

    @property
    def ms_per_step(self):
        """Milliseconds on the training clock per step."""
        return 1000 * self.train_s / self.steps if self.steps and self.train_s else None

    @property
    def tok_s(self):
        """Tokens per second: the median over the last half of the progress lines after step 3."""
        points = [p for s, p in sorted(self.train.items()) if s > 3]
        rates = [p.tok_s for p in points if p.tok_s]
        batch = number(self.config.get("train_batch_tokens"))
        if not rates and batch:
            rates = [batch * (b.step - a.step) / (b.seconds - a.seconds) for a, b in zip(points, points[1:])
                     if a.seconds is not None and b.seconds is not None and b.seconds > a.seconds]
        return median(rates[len(rates) // 2:]) if rates else None

    @property
    def total_bytes(self):
        """Code and model, as 'Total submission size' has it."""
        return self.sizes.get("Total submission size")

    @property
    def model_bytes(self):
        """The compressed model."""
        return self.sizes.get("Serialized model")

    @property
    def code_bytes(self):
        """The script."""
        return integer(self.run.get("code_bytes")) if self.ours else self.sizes.get("Code size")

    @property
    def date(self):
        """YYYY-MM-DD from the run line, RUN_ID, the file's or its folder's name; or None."""
        folder = self.path.resolve().parent.name
        for text in (self.run.get("date", ""), self.config.get("run_id", ""), self.path.stem, folder):
            if match := re.search(r"(?<!\d)(20\d\d)-?([01]\d)-?([0-3]\d)(?!\d)", text):
                return "-".join(match.groups())
        return None

    @property
    def verdict(self):
        """'ok', 'holdout', 'fail (what)', 'unfinished', or a dash for older logs, which judge nothing."""
        if not (self.final and (self.compliance or not self.ours)):
            return "unfinished"
        if not self.compliance:
            return DASH
        if self.compliance.get("verdict") in ("ok", "holdout"):
            return self.compliance["verdict"]
        broken = [k for k in CHECKS if self.compliance.get(k) not in (None, "ok")]
        broken += [values.get("limit", "?") for values in self.events.get("over_limit", [])]
        return f"fail ({', '.join(broken) or 'unsaid'})"


def method_of(event):
    """The method that a score line's event names: one of METHODS, 'pre', another name of an older log, or None.

    Older logs print a score twice, rounded and then as '<event>_exact' with 8 decimals; only int6_exact is a method.
    """
    event = event.lower()
    if event in ("pre_quantization_post_ema", "pre-quantization post-ema", "post_ema", "pre_quant"):
        return "pre"
    if event == "quantized":
        return "roundtrip"
    match = re.fullmatch(r"(?:final_int\d+|final|quantized|legal)_(\w+)", event)
    if not match:
        return None
    if re.fullmatch(r"final_int\d+_exact", event):
        return "exact"
    name = match[1].removesuffix("_exact")
    if name.startswith("ttt"):
        return "ttt"
    if re.fullmatch(r"sliding_window(_s\d+)?", name):
        return "sliding"
    return "roundtrip" if name.endswith("roundtrip") else name


def add_score(log, event, text):
    """Whether this is a score line, then kept; `final` of an older log is its last one, ours has a line for it."""
    values = dict(PAIR.findall(text))
    nats, bpb, method = loss(values.get("val_loss")), loss(values.get("val_bpb")), method_of(event)
    if nats is None or bpb is None or not (method or event == "final"):
        return False
    score = Score(method or values.get("method", ""), nats, bpb, integer(values.get("tokens")),
                  integer(values.get("bytes")), number(values.get("eval_time")))
    log.order.append(event)
    if event == "final":
        log.final = score
        return True
    known = log.scores.get(method)
    if known and any(s.bpb == bpb for m, s in log.scores.items() if m != method):
        return True  # an older log repeats another method's score under the name that the challenge's reader greps
    if known and score.seconds is None:
        score.seconds = known.seconds
    log.scores[method] = score
    if not log.ours and method != "pre":
        log.final = score
    return True


def add_progress(log, match):
    """A progress line of either format; a resumed run's line replaces the earlier one of the same step."""
    step, values = int(match[1]), dict(PAIR.findall(match[3]))
    log.planned, seconds = int(match[2]), number(values.get("train_time"))
    if (nats := loss(values.get("train_loss"))) is not None:
        log.train[step] = Point(step, seconds, nats, tok_s=number(values.get("tok_s", values.get("tok/s"))))
    if (bpb := loss(values.get("val_bpb"))) is not None:
        if seconds is None and step in log.train:
            seconds = log.train[step].seconds
        log.val[step] = Point(step, seconds, loss(values.get("val_loss")), bpb)
    if (memory := integer(values.get("peak_mem_mb"))) is not None:
        log.peak_mib = max(log.peak_mib or 0, memory)


def add_event(log, line):
    """A line of our grammar other than progress and scores; anything else is passed over."""
    words = line.split(" ")
    event = words.pop(0) if ":" not in words[0] else ""
    pairs = [word.split(":", 1) for word in words]
    if not pairs or any(len(p) != 2 or not p[1] or not re.fullmatch(r"[a-z][a-z0-9_]*", p[0]) for p in pairs):
        return
    values = dict(pairs)
    log.order.append(event)
    if event == "run":
        log.run = values
    elif event in ("config", "config_changed"):
        log.config.update({k: v for k, v in values.items() if k != "default"})
    else:
        log.events.setdefault(event, []).append(values)


def add_old_setting(log, line, in_settings):
    """A settings line of an older log, before its first step: '  key: value' in a block, or 'key:value key:value'."""
    if in_settings and (match := re.fullmatch(r"  (\w+): ?(.*)", line)):
        log.config[match[1]] = match[2]
    elif re.match(r"[a-z_]+:\S", line) and not line.startswith("warmup_step"):
        log.config.update(PAIR.findall(line))
    if match := DEVICE.search(line):
        log.run.setdefault("gpu", match[1])


def parse_log(path):
    """The RunLog of the file at `path`; ReportError where it cannot be read or is no training log."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from None
    log = RunLog(path, ours=any(line.startswith("run ") and " code_sha256:" in line for line in lines))
    in_settings = False
    for line in map(str.rstrip, lines):
        if match := PROGRESS.fullmatch(line):
            add_progress(log, match)
        elif match := STOPPED.fullmatch(line):
            log.stopped = (number(match[1]), int(match[2]))
        elif match := SIZE.match(line):
            if match[1] == "Code size" or match[2] or match[1] not in log.sizes:  # without a coder: not compressed
                log.sizes[match[1]] = int(match[3])
        elif match := MEMORY.match(line):
            log.peak_mib = int(match[1])
        elif (match := SCORE.fullmatch(line)) and add_score(log, match[1], match[2]):
            pass
        elif log.ours:
            add_event(log, line)
        elif not log.train:
            in_settings = line == "Hyperparameters:" or in_settings and line.startswith("  ")
            add_old_setting(log, line, in_settings)
    if not (log.ours or log.train or log.val or log.scores):
        raise ReportError(f"{path}: no line of a training log in it; give logs of train_gpt.py, or folders of them")
    return log


def collect(paths):
    """Parsed logs of all `paths`, folders replaced by the logs in them; files of a folder that are no logs are left."""
    logs = []
    for path in map(Path, paths):
        if not path.is_dir():
            logs.append(parse_log(path))
            continue
        before = len(logs)
        for file in sorted((*path.rglob("*.txt"), *path.rglob("*.log"))):
            try:
                logs.append(parse_log(file))
            except ReportError:
                continue
        if len(logs) == before:
            raise ReportError(f"{path}: no training log (*.txt, *.log) in this folder")
    return logs


# -------------------------------------------------------------------------------------------------
# 2 Configurations and tables
# -------------------------------------------------------------------------------------------------


def configuration(log):
    """Every setting that must be the same for two logs to be seeds of one configuration."""
    machine = {k: log.run[k] for k in MACHINE_KEYS if k in log.run}
    return {k: v for k, v in log.config.items() if k not in NOT_CONFIGURATION} | machine


def differences(logs):
    """The settings that differ between `logs`, each as 'name: value (log), value (log)'."""
    tables = [configuration(log) for log in logs]
    found = []
    for key in dict.fromkeys(k for table in tables for k in table):
        values = [table.get(key, "unset") for table in tables]
        if len(set(values)) > 1:
            found.append(f"{key}: " + ", ".join(f"{v} ({log.path.name})" for v, log in zip(values, logs)))
    return found


def by_configuration(logs):
    """Groups of logs with one configuration, in order of appearance."""
    groups = {}
    for log in logs:
        # Without settings nothing shows that two logs belong together.
        key = json.dumps(configuration(log), sort_keys=True) if log.ours or log.config else str(log.path)
        groups.setdefault(key, []).append(log)
    return list(groups.values())


# The table's columns: title, value of a RunLog, format of a number (of the bpb for a Score), None for text.
COLUMNS = (
    ("run", lambda log: log.name, None), ("preset", lambda log: log.preset, None),
    ("seed", lambda log: None if log.seed is None else str(log.seed), None), ("gpu", lambda log: log.hardware, None),
    ("steps", lambda log: log.steps, COUNT_FORMAT), ("tok/s", lambda log: log.tok_s, COUNT_FORMAT),
    ("ms/step", lambda log: log.ms_per_step, "{:,.1f}"), ("train s", lambda log: log.train_s, "{:.1f}"),
    ("peak MiB", lambda log: log.peak_mib, COUNT_FORMAT),
    ("pre-quant bpb", lambda log: log.scores.get("pre"), SCORE_FORMAT),
    *((f"{method} bpb", lambda log, method=method: log.scores.get(method), SCORE_FORMAT) for method in METHODS),
    ("final bpb", lambda log: log.final.bpb if log.final else None, SCORE_FORMAT),
    ("final by", lambda log: log.final.method or None if log.final else None, None),
    ("artifact bytes", lambda log: log.model_bytes, COUNT_FORMAT),
    ("total bytes", lambda log: log.total_bytes, COUNT_FORMAT), ("verdict", lambda log: log.verdict, None))


def cell(values, form):
    """One cell: a value, or 'mean ± std' (the sample's) of several; text only where all agree; a dash for unknown."""
    if not values or None in values:
        return DASH
    if form is None:
        return values[0] if len(set(values)) == 1 else DASH
    if isinstance(values[0], Score):
        seconds = [score.seconds for score in values]
        took = "" if None in seconds else f" ({mean(seconds):.1f} s)"
        return cell([score.bpb for score in values], form) + took
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


def markdown(titles, rows, numeric):
    """A Markdown table; columns whose flag in `numeric` is set are aligned right."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in rows])


def table(logs):
    """The Markdown table of `logs`; after several seeds of one configuration a row with mean ± std."""
    rows = []
    for group in by_configuration(logs):
        rows += [[cell([value(log)], form) for _, value, form in COLUMNS] for log in group]
        if len({log.seed for log in group}) > 1:
            rows.append([cell([value(log) for log in group], form) for _, value, form in COLUMNS])
            rows[-1][0], rows[-1][2] = "**mean ± std**", f"n = {len(group)}"
    kept = [i for i in range(len(COLUMNS)) if any(row[i] != DASH for row in rows)]
    return markdown([COLUMNS[i][0] for i in kept], [[row[i] for i in kept] for row in rows],
                    [COLUMNS[i][2] is not None for i in kept])


INDEX_MARKS = ("<!-- runs -->", "<!-- /runs -->")
INDEX_COLUMNS = ("gpu", "preset", "seed", "steps", "final bpb", "final by", "total bytes", "verdict")


def index(folder):
    """Fill the README of `folder`, between its two marks, with a table of the logs there; returns how many."""
    readme = Path(folder) / "README.md"
    text = readme.read_text(encoding="utf-8")
    start, end = (text.find(mark) for mark in INDEX_MARKS)
    if start < 0 or end < start:
        raise ReportError(f"{readme}: needs the two marks {INDEX_MARKS[0]} and {INDEX_MARKS[1]}, in this order")
    logs = sorted(collect([folder]), key=lambda log: (log.date or "", log.name), reverse=True)
    layout = [column for title in INDEX_COLUMNS for column in COLUMNS if column[0] == title]
    rows = [[log.date or DASH, *(cell([value(log)], form) for _, value, form in layout),
             f"[{log.name}]({log.path.relative_to(folder).as_posix().replace(' ', '%20')})"] for log in logs]
    body = markdown(["date", *INDEX_COLUMNS, "log"], rows, [False, *(form is not None for *_, form in layout), False])
    readme.write_text(f"{text[:start]}{INDEX_MARKS[0]}\n{body}\n{text[end:]}", encoding="utf-8")
    return len(logs)


# -------------------------------------------------------------------------------------------------
# 3 submission.json
# -------------------------------------------------------------------------------------------------


def record_test(values, record):
    """One-sided one-sample t-test that the mean of `values` [nats] is below `record` - MARGIN_NATS; a dict.

    p is None for a single value: one run shows no spread.
    """
    bar, n = record - MARGIN_NATS, len(values)
    result = dict(n=n, mean=mean(values), std=stdev(values) if n > 1 else None, record=record, bar=bar, t=None, p=None)
    if n > 1 and result["std"] > 0:
        try:
            from scipy import stats
        except ImportError:
            raise ReportError("the test against a record needs scipy: pip install scipy") from None
        result["t"], result["p"] = map(float, stats.ttest_1samp(values, bar, alternative="less"))
    elif n > 1:
        result["p"] = 0.0 if result["mean"] < bar else 1.0
    result["holds"] = result["p"] is not None and result["p"] < ALPHA
    return result


def compare_with_record(logs, record_bpb, record_nats):
    """The test in nats per token and in nats per byte, with a verdict; what was not given follows from the other.

    The conversion takes the bytes per token of these logs, so it holds for a record with the same tokenizer.
    """
    ratio = mean(log.final.val_loss for log in logs) / (math.log(2) * mean(log.final.bpb for log in logs))
    if record_nats is None:
        record_nats = record_bpb * math.log(2) * ratio
    if record_bpb is None:
        record_bpb = record_nats / (math.log(2) * ratio)
    token = record_test([log.final.val_loss for log in logs], record_nats)
    byte = record_test([log.final.bpb * math.log(2) for log in logs], record_bpb * math.log(2))
    verdict = {(True, True): "record: per token and per byte", (True, False): "record per token only",
               (False, True): "record per byte only", (False, False): "no record"}[token["holds"], byte["holds"]]
    if token["p"] is None:
        verdict = "undecided: one seed shows no spread"
    return dict(record_bpb=record_bpb, margin_nats=MARGIN_NATS, alpha=ALPHA, nats_per_token=token, nats_per_byte=byte,
                verdict=verdict)


def describe_test(test):
    """Lines for the screen."""
    lines = []
    for unit in ("nats_per_token", "nats_per_byte"):
        r = test[unit]
        spread, p = cell([r["std"]], "{:.5f}"), cell([r["p"]], "{:.3g}")
        lines.append(f"{unit.replace('_', ' ')}: mean {r['mean']:.5f} ± {spread} (n = {r['n']}), record "
                     f"{r['record']:.5f}, bar {r['bar']:.5f} ({MARGIN_NATS} below), p = {p} "
                     f"{'<' if r['holds'] else 'not <'} {ALPHA}")
    return "\n".join([*lines, f"verdict: {test['verdict']}"])


def derived_compliance(logs):
    """submission.json's compliance table: each entry from what the logs' own lines say."""
    def all_ok(*names):
        return all(log.compliance.get(name) == "ok" for log in logs for name in names)

    def within(name, limit):
        return all(getattr(log, name) is not None and getattr(log, name) <= limit for log in logs)

    def adapted_early(log):  # a ttt line before the artifact was written
        end = log.order.index("artifact") if "artifact" in log.order else len(log.order)
        return "ttt" in log.order[:end]

    return dict(
        train_under_600s=within("train_s", TIME_LIMIT_S), artifact_under_16mb=within("total_bytes", CAP_BYTES),
        eval_under_600s=within("eval_s", TIME_LIMIT_S),
        no_slot=all_ok("causal", "score_first"),  # SLOT lets a token's loss depend on that token
        no_pre_quant_ttt=not any(map(adapted_early, logs)),
        no_ngram_cache=all_ok("normalized"),  # a hashed n-gram cache's probabilities do not sum to 1
        score_first_ttt=all_ok("score_first"), three_seeds=len({log.seed for log in logs}) >= 3,
        every_token_scored_once=all_ok("coverage"), bytes_match_text=all_ok("bytes"))


def check_same_configuration(logs):
    """ReportError unless `logs` are finished runs of ours, of one configuration, with different seeds."""
    for log in logs:
        if not log.ours:
            raise ReportError(f"{log.path}: an older log has no settings to compare; --submission takes our logs only")
        if not log.finished:
            raise ReportError(f"{log.path}: the run did not finish (no 'final', size or 'compliance' line)")
        if log.seed is None:
            raise ReportError(f"{log.path}: its run line has no seed")
    if found := differences(logs):
        raise ReportError("the logs are not of one configuration; they differ in " + "; ".join(found))
    seeds = [log.seed for log in logs]
    if len(set(seeds)) < len(seeds):
        raise ReportError(f"two logs have the same seed: {', '.join(map(str, seeds))}")


def logged_fields(logs):
    """The fields of submission.json that follow from finished logs; not a seed's result, nor the mean, is typed in.

    As in the challenge, artifact_bytes of a seed is code and model together, and bytes_total the largest of them.
    """
    losses, bpbs = [log.final.val_loss for log in logs], [log.final.bpb for log in logs]
    results = {str(log.seed): dict(val_loss=log.final.val_loss, val_bpb=log.final.bpb, artifact_bytes=log.total_bytes,
                                   steps=log.steps, eval_time_s=log.eval_s) for log in logs}
    return dict(
        val_loss=round(mean(losses), 8), val_bpb=round(mean(bpbs), 8),
        val_bpb_std=round(stdev(bpbs), 8) if len(bpbs) > 1 else None, seeds=[log.seed for log in logs],
        seed_results=results, bytes_total=max(log.total_bytes for log in logs), bytes_code=logs[0].code_bytes,
        hardware=logs[0].hardware, pytorch_version=logs[0].run.get("torch"))


def submission(logs, typed, record_bpb=None, record_nats=None):
    """The dict of submission.json, from the logs of the seeds of one configuration.

    typed: what no log says: author, github_id, name, blurb, track, attribution, and, where not None, date and summary.
    """
    check_same_configuration(logs)
    logs = sorted(logs, key=lambda log: log.seed)
    date = typed.get("date") or max((log.date for log in logs if log.date), default=None)
    if not date:
        raise ReportError("the logs name no date (RUN_ID has none); give --date YYYY-MM-DD")
    settings = ", ".join(f"{k} {logs[0].config.get(k)}" for k in ("stack", "model_dim", "matrix_bits", "compressor"))
    out = {key: typed[key] for key in ("author", "github_id", "name", "blurb")}
    out |= dict(date=date, track=typed["track"], **logged_fields(logs),
                technique_summary=typed.get("summary") or settings, compliance=derived_compliance(logs),
                attribution=typed["attribution"])
    if record_bpb is not None or record_nats is not None:
        out["record_test"] = compare_with_record(logs, record_bpb, record_nats)
    return out


# -------------------------------------------------------------------------------------------------
# 4 Figures
# -------------------------------------------------------------------------------------------------
# Made for a README's width, 830 pixels (two of theirs to one of its), on their own white background, so that they
# read the same on light and dark pages; labels on the lines, no legends; the title says the finding.

COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#7F6A00", "#444444")
PARTS = {"start-up": "#BBBBBB", "training": "#0072B2", "calibration": "#004C78", "export": "#E69F00",
         "evaluation": "#009E73", "diagnostics": "#CFE8DF"}
WIDTH_IN, DPI = 8.3, 200
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.size": 9.5,
    "axes.labelsize": 9.5, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#E4E4E4", "axes.axisbelow": True,
    "svg.fonttype": "none", "svg.hashsalt": "report"}


def new_figure(height_in, rows=1, columns=1, **options):
    """matplotlib's (figure, axes) in our width and style, without a display."""
    try:
        import matplotlib
    except ImportError:
        raise ReportError("--figures needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(WIDTH_IN, height_in), **options)


def save(fig, folder, name, finding):
    """Give the figure its title, write PNG (128 colours) and SVG, close it; returns their paths."""
    import matplotlib.pyplot as plt
    from PIL import Image  # matplotlib needs it, so it is there
    fig.suptitle(textwrap.fill(finding, 88), x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    fig.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    fig.savefig(png, dpi=DPI)
    with Image.open(png) as image:  # maximum coverage keeps the color of a lone label, median cut does not
        few_colors = image.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few_colors.save(png, optimize=True)
    fig.savefig(svg, metadata={"Date": None})
    plt.close(fig)
    return [png, svg]


def spread_labels(ax, labels, gap=0.07):
    """Write (y, text, color) labels right of the axes, at least `gap` of its height apart."""
    low, high = ax.get_ylim()
    places = []
    for y, _, _ in sorted(labels):
        place = min(max((y - low) / (high - low), 0.0), 1.0)
        places.append(max(place, places[-1] + gap) if places else place)
    overflow = max(0.0, places[-1] - 1.0) if places else 0.0
    for place, (_, text, color) in zip(places, sorted(labels)):
        ax.text(1.015, place - overflow, text, color=color, transform=ax.transAxes, va="center", fontsize=9)


def run_label(log):
    """The run's name without the time that RUN_ID begins with, at most 24 letters."""
    return re.sub(r"^20\d{6}-\d{6}_", "", log.name)[:24]


def group_label(group):
    """A short name for a configuration: its run, or what its runs' names begin with, and the number of seeds."""
    names = [run_label(log) for log in group]
    if len(group) == 1:
        return names[0]
    shared = re.sub(r"[-_ ]*(seed)?[-_ ]*$", "", os.path.commonprefix(names))
    return f"{shared or group[0].preset}, {len(group)} seeds"


def band(group, points, x, y):
    """Common x, then mean, lowest and highest y of the group's runs, interpolated; None where no run has points."""
    import numpy as np
    lines = [sorted((x(p), y(p)) for p in getattr(log, points).values() if x(p) is not None and y(p) == y(p))
             for log in group]  # without nan
    lines = [list(zip(*line)) for line in lines if len(line) > 1]
    if not lines:
        return None
    first, last = max(xs[0] for xs, _ in lines), min(xs[-1] for xs, _ in lines)
    grid = sorted({a for xs, _ in lines for a in xs if first <= a <= last})
    values = np.array([np.interp(grid, xs, ys) for xs, ys in lines])
    return (np.array(grid), values.mean(0), values.min(0), values.max(0)) if grid else None


def curve_finding(groups):
    """The best final score and its distance to the next."""
    ranked = sorted((mean(log.final.bpb for log in g), group_label(g)) for g in groups if all(log.final for log in g))
    if not ranked:
        return "Learning curves (no run has finished)"
    if len(ranked) == 1:
        return f"{ranked[0][1]}: ends at {ranked[0][0]:.4f} bpb"
    return f"Best: {ranked[0][1]} at {ranked[0][0]:.4f} bpb, {ranked[1][0] - ranked[0][0]:.4f} below {ranked[1][1]}"


def draw_curves(ax, groups, points, x, y):
    """One panel: a line per configuration, a band over its seeds; the first, steep part runs off the top."""
    labels, tops = [], []
    for color, group in zip(cycle(COLORS), groups):
        if not (found := band(group, points, x, y)):
            continue
        grid, middle, low, high = found
        ax.plot(grid, middle, color=color, lw=1.4 if len(grid) < 60 else 0.9)
        if len(group) > 1:
            ax.fill_between(grid, low, high, color=color, alpha=0.25, lw=0)
        labels.append((middle[-1], group_label(group), color))
        tops += [middle[grid >= 0.04 * grid[-1]][0], middle[-(len(middle) // 3 + 1):].max()]
    if labels:
        bottom, top = ax.dataLim.y0, max(tops)
        ax.set_ylim(bottom - 0.06 * (top - bottom or 1), top + 0.03 * (top - bottom or 1))
    return labels


def figure_curves(logs, folder):
    """Validation bpb, where the logs have it, and training loss, against step and against seconds."""
    groups = [g for g in by_configuration(logs) if any(len(log.train) > 1 for log in g)]
    if not groups:
        return []
    panels = [("val", lambda p: p.bpb, "validation bpb [bits/byte]"),
              ("train", lambda p: p.loss, "training loss [nats/token]")]
    panels = [panel for panel in panels if any(len(getattr(log, panel[0])) > 1 for g in groups for log in g)]
    fig, axes = new_figure(0.9 + 2.7 * len(panels), len(panels), 2, sharey="row", sharex="col", squeeze=False)
    for row, (points, y, label), letters in zip(axes, panels, ("ab", "cd")):
        for ax, x, letter, against in zip(row, (lambda p: p.step, lambda p: p.seconds), letters,
                                          ("step", "training time")):
            labels = draw_curves(ax, groups, points, x, y)
            ax.set_title(f"({letter}) against {against}")
            ax.set_xlim(left=0)
        row[0].set_ylabel(label)
        spread_labels(row[1], labels)
    axes[-1][0].set_xlabel("step")
    axes[-1][1].set_xlabel("training clock [s]")
    bands = "; bands: lowest to highest seed" if any(len(g) > 1 for g in groups) else ""
    return save(fig, folder, "curves", curve_finding(groups) + bands)


def time_parts(log):
    """(part, what, seconds) of a run in order; `diagnostics` are evaluations that do not count."""
    train = log.train_s
    if train is not None and log.hessian_s:
        train -= log.hessian_s  # calibration is inside the training clock
    unquantized = log.scores.get("pre")
    parts = [("start-up", "start-up", number(log.last("kernel").get("start_up"))), ("training", "training", train),
             ("calibration", "calibration", log.hessian_s),
             ("diagnostics", "unquantized", unquantized and unquantized.seconds),
             ("export", "export", number(log.last("artifact").get("export_time")))]
    for method in METHODS:
        counted = bool(log.final and log.final.method == method)
        seconds = log.eval_s if counted else log.scores[method].seconds if method in log.scores else None
        parts.append(("evaluation" if counted else "diagnostics", method, seconds))
    return [part for part in parts if part[2]]


def seconds_text(seconds):
    """Such as '8.4 s' and '119 s'."""
    return f"{seconds:.{1 if seconds < 10 else 0}f} s"


def figure_time(logs, folder, most=16):
    """A bar per run, for the first `most`: where the seconds went; parts too short for a label are named below."""
    bars = [(log, parts) for log in logs if (parts := time_parts(log))][:most]
    if not bars:
        return []
    fig, ax = new_figure(1.2 + 0.62 * len(bars))
    whole = max(sum(s for *_, s in parts) for _, parts in bars)
    for y, (_, parts) in enumerate(bars):
        left, small = 0.0, []
        for part, what, seconds in parts:
            ax.barh(y, seconds, left=left, height=0.56, color=PARTS[part], edgecolor="white", lw=0.8,
                    hatch="///" if part == "diagnostics" else None)
            text, light = f"{what}\n{seconds_text(seconds)}", part in ("start-up", "export", "diagnostics")
            if seconds > 0.0118 * whole * len(what):  # what a letter takes of the width
                ax.text(left + seconds / 2, y, text, ha="center", va="center", fontsize=8.5,
                        color="black" if light else "white",
                        bbox=dict(facecolor=PARTS[part], edgecolor="none", pad=1.0) if light else None)
            else:
                small.append(text.replace("\n", " "))
            left += seconds
        if small:
            ax.text(0, y + 0.31, "in order, not labelled: " + ", ".join(small), va="top", fontsize=8, color="#333333")
    ax.set_yticks(range(len(bars)), [log.name.replace("_", "\n", 1) for log, _ in bars], fontsize=8.5)
    ax.set(ylim=(len(bars) - 0.3, -0.5), xlim=(0, whole * 1.01),
           xlabel="wall clock [s]; hatched: evaluations that do not count")
    ax.grid(axis="y", visible=False)
    longest = [(what, max((getattr(log, key) or 0 for log, _ in bars)))
               for what, key in (("training", "train_s"), ("the counted evaluation", "eval_s"))]
    told = ", ".join(f"{what} {seconds_text(seconds)}" for what, seconds in longest if seconds)
    return save(fig, folder, "time", f"{'Longest' if len(bars) > 1 else run_label(bars[0][0])}: {told} "
                                     f"({TIME_LIMIT_S:.0f} s allowed for each)")


def last_with(logs, event):
    """The last log with lines of this event, and those lines; (None, []) without one."""
    return next(((log, log.events[event]) for log in reversed(logs) if log.events.get(event)), (None, []))


def figure_roles(logs, folder):
    """Where the artifact's bytes are, by role, compressed (solid) and before (outlined); of the last log that says."""
    log, lines = last_with(logs, "role")
    rows = [(v.get("name", "?"), *(number(v.get(key)) for key in ("packed_bytes", "raw_bytes", "bits_per_symbol")))
            for v in lines]
    rows = sorted((row for row in rows if None not in row), key=lambda row: -row[1])
    if not rows:
        return []
    header = (log.model_bytes or 0) - sum(row[1] for row in rows)
    rows += [(name, size, size, None) for name, size in (("header", header), ("train_gpt.py", log.code_bytes or 0))
             if size > 0]
    largest, total = max(max(row[1:3]) for row in rows), sum(row[1] for row in rows)
    unit, letters = (1e6, "MB") if largest >= 1e6 else (1e3, "kB")
    fig, ax = new_figure(1.1 + 0.3 * len(rows))
    for i, (_, size, raw, bits) in enumerate(rows):
        ax.barh(i, raw / unit, height=0.62, color="none", edgecolor="#888888", lw=0.8)
        ax.barh(i, size / unit, height=0.62, color=COLORS[5] if bits is None else COLORS[0])
        ax.text((max(raw, size) + 0.012 * largest) / unit, i, va="center", fontsize=9,
                s=f"{size / unit:.3f} {letters}" + (f", {bits:.2f} bits per symbol" if bits is not None else ""))
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.34 * largest / unit),
           xlabel=f"bytes [{letters}]; outlined: before compression")
    ax.grid(axis="y", visible=False)
    return save(fig, folder, "roles", f"{run_label(log)}: {total / 1e6:.3f} MB of {CAP_BYTES / 1e6:.0f} MB, "
                                      f"{rows[0][1] / total:.0%} of it {rows[0][0]}")


def figure_gptq(logs, folder):
    """Relative quantization error of every matrix, kind by layer, of the last log that says."""
    log, lines = last_with(logs, "gptq")
    errors, bits_of = {}, {}  # (kind, block or -1) -> relative error; kind -> its bits
    for values in lines:
        name, error = values.get("name", "?"), number(values.get("rel_err"))
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        kind = (block[2] if block else name).replace("_proj", "").replace(".kv.", ".")
        if error is not None:
            errors[kind, int(block[1]) if block else -1] = max(error, 1e-9)
            bits_of.setdefault(kind, {})[f"int{values.get('bits')}"] = None
    if not errors:
        return []
    from matplotlib.colors import LogNorm
    columns, kinds = sorted({column for _, column in errors}), list(bits_of)
    norm = LogNorm(min(errors.values()) / 2, max(errors.values()))  # the least is not white, as a missing one is
    fig, ax = new_figure(1.2 + 0.25 * len(kinds))
    ax.imshow([[errors.get((kind, column), math.nan) for column in columns] for kind in kinds], aspect="auto",
              cmap="Blues", norm=norm)
    for (kind, column), error in errors.items():
        if len(columns) <= 20:  # more would not be legible
            ax.text(columns.index(column), kinds.index(kind), f"{1000 * error:.3g}", ha="center", va="center",
                    fontsize=8, color="white" if norm(error) > 0.6 else "black")
    ax.set_xticks(range(len(columns)), ["–" if column < 0 else column for column in columns])
    ax.set_yticks(range(len(kinds)), [f"{kind} ({'/'.join(bits_of[kind])})" for kind in kinds], fontsize=8.5)
    ax.grid(visible=False)
    ax.set_xlabel("block (–: outside the blocks); a shared matrix stands in its first block")
    (kind, column), error = max(errors.items(), key=lambda item: item[1])
    where = kind if column < 0 else f"block {column}, {kind}"
    return save(fig, folder, "gptq", f"{run_label(log)}: relative quantization error x 1000; largest "
                f"{1000 * error:.3g} ({where}), median {1000 * median(errors.values()):.3g}")


def draw_lines(ax, lines, **style):
    """Plot (xs, ys, label, color) lines, each labelled at its end, right of the axes."""
    for xs, ys, _, color in lines:
        ax.plot(xs, ys, color=color, lw=1.4, **style)
    spread_labels(ax, [(ys[-1], text, color) for _, ys, text, color in lines])


def without_learning(log, logs):
    """Of `logs`, the same artifact scored in the same chunks without learning (TTT_LR=0 or TTT_EPOCHS=0), or None."""
    def setting(other):
        return {k: v for k, v in configuration(other).items() if k not in ("ttt_lr", "ttt_epochs", "code_sha256")}
    same = [other for other in logs if other is not log and setting(other) == setting(log)]
    return next((other for other in same if log.config.get("artifact", "-") != "-" and
                 0.0 in (number(other.config.get("ttt_lr")), number(other.config.get("ttt_epochs")))), None)


def stream(log, key):
    """{tokens scored: bits per byte} along the stream of test-time training; `key` is running_bpb or chunk_bpb."""
    return dict(log.series("ttt", "scored_tokens", key))


def figure_ttt(logs, folder):
    """Running bpb along the stream under test-time training, with the unadapted score where the log has it; (b) the
    gain along the stream, where a log scored the same artifact without learning."""
    colors = [(color, log) for color, log in zip(cycle(COLORS), logs) if len(stream(log, "running_bpb")) > 1]
    if not colors:
        return []
    pairs = [(color, log, other) for color, log in colors if (other := without_learning(log, logs))]
    fig, axes = new_figure(3.2 + 2.3 * bool(pairs), 1 + bool(pairs), sharex=True, squeeze=False)
    lines, gains, values = [], [], []
    for color, log in colors:
        tokens, bpb = zip(*stream(log, "running_bpb").items())
        lines.append(([n / 1e6 for n in tokens], bpb, f"{run_label(log)} {bpb[-1]:.4f}", color))
        values += bpb[len(bpb) // 20:]  # the first are noise
        if (base := log.scores.get("exact") or log.scores.get("sliding")) and math.isfinite(base.bpb):
            axes[0][0].axhline(base.bpb, color=color, lw=1, ls="--")
            axes[0][0].text(0, base.bpb, f" unadapted, {base.method}: {base.bpb:.4f}", color=color, va="bottom")
            values.append(base.bpb)
            gains.append(base.bpb - bpb[-1])
    pad = 0.1 * (max(values) - min(values) or 0.01)
    axes[0][0].set(ylim=(min(values) - pad, max(values) + pad), ylabel="running bpb [bits/byte]")
    draw_lines(axes[0][0], lines)
    last = [bpb[-1] for _, bpb, _, _ in lines]
    lines = []
    for color, log, other in pairs:
        chunk, so_far = ([(n / 1e6, was - stream(log, key)[n]) for n, was in stream(other, key).items()
                          if n in stream(log, key)] for key in ("chunk_bpb", "running_bpb"))
        axes[1][0].plot(*zip(*chunk), "o", ms=2.5, color=color, alpha=0.6)
        lines.append((*zip(*so_far), f"{run_label(log)} {so_far[-1][1]:+.4f}", color))
    if lines:
        axes[0][0].set_title("(a) score so far")
        axes[1][0].set_title("(b) gain over no learning: line so far, dots by chunk")
        axes[1][0].set_ylabel("gain [bits/byte]")
        axes[1][0].axhline(0, color="#888888", lw=0.8)
        draw_lines(axes[1][0], lines)
        gains = [lines[0][1][-1]]
    axes[-1][0].set(xlim=(0, None), xlabel="tokens scored [millions]")
    ends = dict.fromkeys(f"{end:.4f}" for end in (min(last), max(last)))
    finding = f"Running bpb under test-time training ends at {' to '.join(ends)}"
    if gains:
        finding = f"Test-time training {'gains' if gains[0] > 0 else 'loses'} {abs(gains[0]):.4f} bpb over the stream"
    return save(fig, folder, "ttt", finding)


def figure_position(logs, folder):
    """bpb by a token's distance from the beginning of its document, and each bucket's share of the bytes."""
    found = [(log, rows) for log in logs if len(rows := log.series("position", "from", "to", "bytes", "val_bpb")) > 1]
    if not found:
        return []
    buckets = sorted({row[:2] for _, rows in found for row in rows})
    fig, (top, low) = new_figure(3.9, 2, sharex=True, height_ratios=(3, 1))
    draw_lines(top, [([buckets.index(row[:2]) for row in rows], [row[3] for row in rows], run_label(log), color)
                     for color, (log, rows) in zip(cycle(COLORS), found)], marker="o", ms=3.5)
    log, rows = found[0]
    low.bar([buckets.index(row[:2]) for row in rows], [100 * row[2] / sum(r[2] for r in rows) for row in rows],
            color="#888888")
    low.set_xticks(range(len(buckets)), [f"{start:,.0f}" for start, _ in buckets], fontsize=8.5)
    low.set(ylabel="bytes [%]", xlabel="tokens since the document began, from this many to the next")
    top.set_ylabel("bpb [bits/byte]")
    told = (f"{what} {bpb:.3f} from {start:,.0f} to {end:,.0f}" for what, (start, end, _, bpb) in
            zip(("highest", "lowest"), sorted(rows, key=lambda row: -row[3])[::len(rows) - 1]))
    return save(fig, folder, "position", f"{run_label(log)}, bpb by tokens since the document began: {', '.join(told)}")


EXPORT_KEYS = ("grid", "matrix_bits", "matrix_clip_sigmas", "cap_bytes", "float_matrices")  # differ along its figure


def exports(logs):
    """The most logs that scored exports of one checkpoint which differ in EXPORT_KEYS alone."""
    groups = {}
    for log in logs:
        if log.finished and log.config.get("resume", "-") != "-":
            key = json.dumps({k: v for k, v in configuration(log).items() if k not in EXPORT_KEYS}, sort_keys=True)
            groups.setdefault(key, []).append(log)
    return max(groups.values(), key=len, default=[])


def export_lines(logs):
    """{'rate' or 'sdclip, N bits': [(bytes, bpb)] by size} of `exports`, and the bpb of the one without integers."""
    lines, float_bpb = {}, None
    for log in logs:
        if number(log.last("quantized").get("matrices")) == 0:
            float_bpb = log.final.bpb
        else:
            grid, bits = log.config.get("grid", "?"), log.config.get("matrix_bits", "?")
            label = f"{grid}, {bits} bits" if grid == "sdclip" else grid
            lines.setdefault(label, []).append((log.model_bytes, log.final.bpb))
    return {label: sorted(lines[label]) for label in sorted(lines)}, float_bpb


def between(points, x):
    """y at x on the line through `points`, sorted by x; None outside."""
    pair = next(((a, b) for a, b in zip(points, points[1:]) if a[0] <= x <= b[0] > a[0]), None)
    return pair and pair[0][1] + (pair[1][1] - pair[0][1]) * (x - pair[0][0]) / (pair[1][0] - pair[0][0])


def export_finding(lines):
    """How far the rate grid's line lies below the exports of SDClip at their sizes."""
    gaps = sorted(bpb - at for label, points in lines.items() if label != "rate" for size, bpb in points
                  if (at := between(lines.get("rate", []), size)) is not None)
    if not gaps:
        return "Bits per byte by artifact size"
    return (f"At equal bytes SDClip scores {gaps[0]:+.4f} to {gaps[-1]:+.4f} bpb over GRID=rate "
            f"({len(gaps)} exports)")


def figure_export(logs, folder):
    """Bits per byte over the artifact's bytes, of at least three exports of one checkpoint."""
    found = exports(logs)
    lines, float_bpb = export_lines(found)
    if sum(map(len, lines.values())) < 3:
        return []
    fig, ax = new_figure(4.2)
    labels = []
    for i, ((label, points), color, marker) in enumerate(zip(lines.items(), cycle(COLORS), cycle("os^Dv*"))):
        ax.plot([size / 1e3 for size, _ in points], [bpb for _, bpb in points], marker=marker, ms=max(4, 10 - 1.3 * i),
                lw=1.4, color=color)  # later, smaller markers leave those of a line that they lie upon to be seen
        labels.append((points[-1][1], label, color))
    if float_bpb is not None:
        ax.axhline(float_bpb, color="#444444", lw=1, ls="--")
        labels.append((float_bpb, "all float16 (dashed)", "#444444"))
    ax.set(xlabel="artifact [kB]", ylabel=f"bpb, {found[0].final.method} [bits/byte]")
    spread_labels(ax, labels)
    return save(fig, folder, "export", export_finding(lines))


def figures(logs, folder):
    """Draw what the logs have data for; returns the paths of the files."""
    draw = (figure_curves, figure_time, figure_roles, figure_gptq, figure_ttt, figure_position, figure_export)
    return [path for one in draw for path in one(logs, Path(folder))]


# -------------------------------------------------------------------------------------------------
# 5 Review of a submission folder
# -------------------------------------------------------------------------------------------------

REQUIRED_FILES = ("README.md", "submission.json", "train_gpt.py", "requirements.txt")
TEXTS = ("author", "github_id", "name", "blurb", "date", "track", "technique_summary")  # fields of submission.json
TABLES = ("seed_results", "compliance", "attribution")
FAULT_OF_FIELD = dict(val_loss="mean", val_bpb="mean", val_bpb_std="mean", seeds="seeds", bytes_total="total_bytes",
                      bytes_code="code_bytes", hardware="environment", pytorch_version="environment")
ROUNDING = 5.1e-6  # submissions give five decimals or more
DATE = r"20\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"


def comparable(key, value):
    """A field of submission.json as it can be compared: machine as number and kind of its GPUs, seeds in order."""
    if key == "seeds" and isinstance(value, list):
        return sorted(map(str, value))
    if key == "hardware" and (found := re.search(r"(\d+)\s*[x×]\s*(?:NVIDIA )?([A-Z]+\d+)", str(value), re.I)):
        return f"{found[1]}x{found[2].upper()}"  # '8xH100 80GB SXM' is '8xH100 80GB HBM3'
    return value


def rounds_to(value, figure):
    """Whether `value`, rounded to the decimals of the text `figure`, is that figure."""
    return abs(value - float(figure)) <= 0.5001 * 10.0 ** -len(figure.split(".")[1])


def last_line(text):
    """The last line of an error output that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


class Review:
    """Every fault of a submission folder: `run()` fills `faults` [(kind, text)] and `notes` [text]."""

    def __init__(self, folder, python310="python3.10"):
        self.folder, self.python310 = Path(folder), python310
        self.faults, self.notes = [], []
        self.logs, self.json, self.code = [], None, None

    def fault(self, kind, text):
        """Record a fault; `kind` is one word for it."""
        self.faults.append((kind, text))

    def expect(self, kind, what, found, truth, slack=0.0):
        """A fault unless `found` is `truth`; numbers may differ by `slack`."""
        numbers = isinstance(found, (int, float)) and isinstance(truth, (int, float))
        if not (abs(found - truth) <= slack if numbers else found == truth):
            self.fault(kind, f"{what} is {found}, expected {truth}")

    def at_most(self, kind, what, found, limit):
        """A fault unless `found` is a number of at most `limit`."""
        if found is None or not found <= limit:
            self.fault(kind, f"{what} is {found}, the limit is {limit:,}")

    def run(self):
        """Look at everything that is there; a missing file is one fault, not the end."""
        if not self.folder.is_dir():
            raise ReportError(f"{self.folder}: no such folder")
        self.read_files()
        for log in self.logs:
            self.check_log(log)
            self.check_score(log)
            self.check_limits(log)
        if len(self.logs) > 1 and (found := differences(self.logs)):
            self.fault("configurations_differ", "; ".join(found))
        if self.json is not None:
            self.check_json_form()
            if self.logs:
                self.check_json_values()
        self.check_readme()
        if self.code is not None:
            self.check_python()
            self.check_import()
        return self

    def read_files(self):
        """Which files are there; logs, JSON, script, and the size of an artifact if one is in the folder."""
        for name in REQUIRED_FILES:
            if not (self.folder / name).is_file():
                self.fault("missing_file", f"{name} is not in the folder")
        paths = sorted(self.folder.glob("train_seed*.log"))
        if len(paths) < 3:
            self.fault("missing_logs", f"{len(paths)} of at least 3 logs train_seed<seed>.log")
        for path in paths:
            try:
                log = parse_log(path)
            except ReportError as error:
                self.fault("log_unreadable", str(error))
                continue
            if not log.ours:
                self.fault("log_unreadable", f"{path.name}: not a log of this script (no run line with code_sha256)")
            elif not log.finished:
                self.fault("log_unfinished", f"{path.name}: lacks its final, size or compliance line")
            else:
                self.logs.append(log)
        for path in self.folder.glob("*.artifact"):
            if (size := path.stat().st_size) not in (logged := [log.model_bytes for log in self.logs]):
                self.fault("artifact_bytes", f"{path.name} has {size} bytes, the logs' models {logged}")
        script, declared = self.folder / "train_gpt.py", self.folder / "submission.json"
        self.code = script.read_bytes() if script.is_file() else None
        if declared.is_file():
            try:
                self.json = json.loads(declared.read_text(encoding="utf-8"))
            except ValueError as error:
                self.fault("json_invalid", f"submission.json: {error}")
            if self.json is not None and not isinstance(self.json, dict):
                self.json = self.fault("json_invalid", "submission.json: not an object")
        if not re.fullmatch(DATE + r"_\w.*", name := self.folder.resolve().name):
            self.notes.append(f"the folder's name, {name}, is not YYYY-MM-DD_Name")

    def check_log(self, log):
        """Seed, code and sizes of one log, against its name, the script and itself."""
        name = log.path.name
        self.expect("log_seed", "the name of the log with seed " + str(log.seed), name, f"train_seed{log.seed}.log")
        if self.code is not None:
            self.expect("code_bytes", f"{name}: code_bytes", log.code_bytes, len(self.code))
            self.expect("code_sha256", f"{name}: code_sha256", log.run.get("code_sha256"),
                        hashlib.sha256(self.code).hexdigest())
        self.expect("total_bytes", f"{name}: code and model", (log.code_bytes or 0) + log.model_bytes, log.total_bytes)
        for event in ("run", "final", "compliance"):
            self.expect("log_inconsistent", f"{name}: the number of its '{event}' lines", log.order.count(event), 1)
        self.expect("log_inconsistent", f"{name}: total_bytes of the compliance line",
                    integer(log.compliance.get("total_bytes")), log.total_bytes)
        stopped = (log.stopped or [log.train_s])[0]
        later = 0.0 if None in (log.train_s, stopped) else log.train_s - stopped
        if later < -0.1 or later > 0.1 and not log.hessian_s:  # calibration follows the stop, inside the clock
            self.fault("log_inconsistent", f"{name}: training stopped at {stopped} s, the compliance line says "
                                           f"{log.train_s} s")

    def check_score(self, log):
        """The final line of one log: its method, coverage, and bytes per token."""
        name, final, own = log.path.name, log.final, log.scores.get(log.final.method)
        self.expect("final_method", f"{name}: the final line's method", final.method,
                    log.config.get("final_score", final.method))
        self.expect("final_method", f"{name}: the final line's score", (final.val_loss, final.bpb),
                    own and (own.val_loss, own.bpb))
        scored = integer(log.compliance.get("tokens_scored"))
        self.expect("coverage", f"{name}: tokens_scored", scored, final.tokens)
        if split := integer(log.last("model").get("val_tokens")):
            self.expect("coverage", f"{name}: tokens of the final line", final.tokens, split - 1)
        if not (final.tokens and final.num_bytes and math.isfinite(final.val_loss) and final.bpb > 0):
            return self.fault("bytes_per_token", f"{name}: the final line lacks a finite score, tokens or bytes")
        ratio = final.num_bytes / final.tokens
        self.expect("bytes_per_token", f"{name}: val_loss/(ln2 val_bpb)", final.val_loss / (math.log(2) * final.bpb),
                    ratio, slack=2e-6 * ratio)
        self.expect("bytes_per_token", f"{name}: bytes_per_token", number(log.compliance.get("bytes_per_token")), ratio,
                    slack=1e-5)
        tokenizer = Path(log.config.get("tokenizer_path", "")).stem
        known = CHALLENGE_BYTES_PER_TOKEN.get(tokenizer)
        if known and "fineweb10B" in log.config.get("data_path", "fineweb10B"):  # the challenge's text, not another
            self.expect("bytes_per_token", f"{name}: bytes per token with {tokenizer}", ratio, known, 0.005 * known)

    def check_limits(self, log):
        """Caps and verdicts of one log."""
        name, told = log.path.name, log.compliance
        self.at_most("size_cap", f"{name}: code and model [bytes]",
                     max(log.total_bytes, log.model_bytes + len(self.code or b"")), CAP_BYTES)
        self.expect("size_cap", f"{name}: cap_bytes", integer(told.get("cap_bytes")), CAP_BYTES)
        self.at_most("train_time", f"{name}: train_s", number(told.get("train_s")), TIME_LIMIT_S)
        for end, in log.series("hessians", "hessian_end_s"):
            self.at_most("train_time", f"{name}: hessian_end_s", end, TIME_LIMIT_S)
        self.at_most("eval_time", f"{name}: eval_s", number(told.get("eval_s")), TIME_LIMIT_S)
        if broken := [f"{k}:{told.get(k, 'missing')}" for k in (*CHECKS, "verdict") if told.get(k) != "ok"]:
            self.fault("compliance", f"{name}: {' '.join(broken)}")

    def check_json_form(self):
        """All fields of submission.json, and the kinds of those that no log gives; a wrong one is then left out."""
        for key in (*TEXTS, *TABLES, *FAULT_OF_FIELD):
            kind, value = (str if key in TEXTS else dict if key in TABLES else object), self.json.get(key)
            if key not in self.json:
                self.fault("json_field", f"submission.json: {key} is missing")
            elif not isinstance(value, kind) or kind is str and not value.strip():
                self.fault("json_type", f"submission.json: {key} is {json.dumps(self.json.pop(key))[:60]}, not a "
                                        f"{'text' if kind is str else 'table'}")
        if not re.fullmatch(DATE, date := self.json.get("date", "2026-01-01")):
            self.fault("json_type", f"submission.json: date is {date!r}, not YYYY-MM-DD")

    def check_json_values(self):
        """The other fields of submission.json against what follows from the logs and the script."""
        truth, told = logged_fields(self.logs), self.json
        truth["bytes_code"] = len(self.code) if self.code is not None else truth["bytes_code"]
        for key in told.keys() & FAULT_OF_FIELD.keys():
            self.expect(FAULT_OF_FIELD[key], f"submission.json: {key}", comparable(key, told[key]),
                        comparable(key, truth[key]), slack=ROUNDING)
        if told.get("track", "").removeprefix("track_") == "10min_16mb":
            self.expect("environment", "the machine of track 10min_16mb", comparable("hardware", truth["hardware"]),
                        "8xH100")
        results = told.get("seed_results", truth["seed_results"])
        self.expect("seeds", "submission.json: seed_results of", sorted(results), sorted(truth["seed_results"]))
        for seed in results.keys() & truth["seed_results"].keys():
            result = results[seed] if isinstance(results[seed], dict) else {}
            for key, value in truth["seed_results"][seed].items():
                self.expect("seed_result", f"submission.json: seed {seed} {key}", result.get(key), value,
                            slack=0.051 if key == "eval_time_s" else ROUNDING)
        for key, held in derived_compliance(self.logs).items() if "compliance" in told else ():
            if (claim := told["compliance"].get(key)) is not True or not held:
                self.fault("compliance_claim", f"submission.json: compliance {key} is {json.dumps(claim)}, the logs "
                                               f"say {json.dumps(held)}")

    def check_readme(self):
        """The README's mean and deviation, and the numbers in its rows of single seeds, against the logs."""
        path = self.folder / "README.md"
        if not path.is_file() or not self.logs:
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        average = mean(log.final.bpb for log in self.logs)
        if not any(rounds_to(average, figure) for figure in re.findall(r"\d\.\d{4,}", text)):
            self.fault("readme_score", f"README.md: the logs' mean, {average:.5f} bpb, is not in it (4 decimals or "
                                       "more)")
        scores = [list(log.scores.values()) for log in self.logs]
        spreads = [stdev([getattr(score, key) for score in same]) for same in zip(*scores) if len(same) > 1
                   for key in ("bpb", "val_loss")]
        for figure in re.findall(r"± *(\d\.\d{4,})", text):
            if not any(rounds_to(value, figure) for value in spreads):
                self.fault("readme_score", f"README.md: ± {figure} is no standard deviation of the logs' scores")
        if not re.search(r"\btrack[ -]?[AB]\b", text, re.IGNORECASE):
            self.notes.append("README.md does not declare Track A (nothing built from evaluated tokens) or Track B")
        for log in self.logs:
            for line in text.splitlines():
                if str(log.seed) in [part.strip(" *`") for part in line.split("|")]:
                    self.check_readme_row(log, line)

    def check_readme_row(self, log, row):
        """Scores (4 decimals or more) and counts (1,000 or more) in a row of the README on this seed."""
        scores = [*log.scores.values(), log.final]
        values = [v for s in scores for v in (s.bpb, s.val_loss)]
        counts = {log.seed, log.steps, log.model_bytes, log.total_bytes, log.code_bytes, log.peak_mib,
                  round(log.tok_s or 0), *(n for s in scores for n in (s.tokens, s.num_bytes))}
        wrong = [figure for figure in re.findall(r"(?<![\d.,-])[0-9]\.\d{4,}(?![\d.])", row)
                 if float(figure) >= 0.5 and not any(rounds_to(v, figure) for v in values)]
        wrong += [figure for figure in re.findall(r"(?<![\w.,-])(?:\d{1,3}(?:,\d{3})+|\d{4,})(?![\w.,-])", row)
                  if int(figure.replace(",", "")) not in counts]
        for figure in wrong:
            self.fault("readme_seed", f"README.md: {figure} in the row of seed {log.seed} is not in its log")

    def check_python(self):
        """Python 3.10 syntax, by the parser here and by python3.10 where there is one; no exec wrapper."""
        try:
            tree = ast.parse(self.code, filename="train_gpt.py", feature_version=(3, 10))
        except (SyntaxError, ValueError) as error:
            return self.fault("python310", f"train_gpt.py: {error}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("exec", "eval"):
                self.fault("exec_wrapper", f"train_gpt.py: {node.func.id}() in line {node.lineno}")
        judge, version = "ast.parse(feature_version=(3, 10)) in Python {}.{}".format(*sys.version_info), ""
        compile_ = ("import sys; print('%d.%d' % sys.version_info[:2], flush=True); "
                    "compile(sys.stdin.buffer.read(), 'train_gpt.py', 'exec')")
        if command := shutil.which(self.python310):
            done = subprocess.run([command, "-I", "-c", compile_], input=self.code, capture_output=True)
            version = done.stdout.decode().strip()
        if version == "3.10":
            self.notes.append(f"Python 3.10 syntax checked by {self.python310}, and by {judge}")
            if done.returncode:
                self.fault("python310", f"train_gpt.py: {self.python310}: {last_line(done.stderr.decode())}")
        else:
            self.notes.append(f"Python 3.10 syntax checked by {judge}; no working {self.python310} here")

    def check_import(self):
        """Import the script in a process without a GPU, in an empty folder, and see what it did."""
        with tempfile.TemporaryDirectory() as scratch:
            work, result = Path(scratch, "work"), Path(scratch, "seen.json")
            work.mkdir()
            env = {k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH") if k in os.environ}
            env |= {"CUDA_VISIBLE_DEVICES": "", "HOME": scratch, "TMPDIR": scratch}
            command = [sys.executable, "-B", "-c", IMPORT_PROBE, self.folder.resolve(), result]
            try:
                done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=180,
                                      stdin=subprocess.DEVNULL)
            except subprocess.TimeoutExpired:
                return self.fault("import_failed", "train_gpt.py: the import did not end within 180 s")
            if not result.is_file():
                why = last_line(done.stderr) or "exited during the import"
                return self.fault("import_failed", f"train_gpt.py: {why}")
            seen = json.loads(result.read_text()) + ["prints"] * bool(done.stdout)
            seen += [f"leaves {path.name} in the working directory" for path in sorted(work.iterdir())]
        for what in dict.fromkeys(seen):
            self.fault("import_effect", f"train_gpt.py: importing it {what}")


# Runs in a fresh interpreter: argv is the script's folder and the file that gets the list of what its import did.
# An act counts as the script's where the nearest caller outside the standard library is the script itself;
# network, threads and CUDA count whoever started them.
IMPORT_PROBE = r'''
import json, os, sys, threading
folder, result = sys.argv[1:]
script, library, seen = os.path.join(folder, "train_gpt.py"), os.path.dirname(os.__file__), []

def by_script():
    frame = sys._getframe(2)
    while frame and frame.f_code.co_filename != script:
        name = frame.f_code.co_filename
        standard = name.startswith(("<frozen", "<string>")) or name.startswith(library) and "site-packages" not in name
        if name.startswith("<frozen importlib") or not standard:
            return False
        frame = frame.f_back
    return frame is not None

def audit(event, args):
    acts = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.system", "subprocess.Popen")
    if event in ("socket.connect", "socket.getaddrinfo") or event in acts and by_script():
        seen.append("does %s(%s)" % (event, args[0]))

get = os._Environ.__getitem__
def read(self, key):
    if by_script():
        seen.append("reads the environment variable " + key)
    return get(self, key)

os._Environ.__getitem__ = read
threads, home = threading.active_count(), os.getcwd()
sys.addaudithook(audit)
sys.path.insert(0, folder)
import train_gpt
events, torch = list(seen), sys.modules.get("torch")
if threading.active_count() > threads:
    events.append("starts a thread")
if os.getcwd() != home:
    events.append("changes the working directory")
if hasattr(torch, "cuda") and torch.cuda.is_initialized():
    events.append("initialises CUDA")
with open(result, "w") as file:
    json.dump(events, file)
'''


# -------------------------------------------------------------------------------------------------
# 6 Command line
# -------------------------------------------------------------------------------------------------


def parser():
    """The command line."""
    p = argparse.ArgumentParser(prog="report.py", description="Logs of train_gpt.py, and of the challenge's older "
                                "scripts, as a Markdown table; figures, submission.json, and the review of a "
                                "submission folder.")
    p.add_argument("logs", nargs="*", metavar="LOG", help="log files, or folders of logs")
    p.add_argument("--figures", metavar="DIR", help="draw curves, time budget and what else the logs hold: PNG, SVG")
    p.add_argument("--check", metavar="FOLDER", help="review a submission folder; exit code 1 if it has a fault")
    p.add_argument("--python310", metavar="EXE", default="python3.10", help="the Python 3.10 for --check")
    p.add_argument("--index", nargs="?", const=str(Path(__file__).resolve().parent), metavar="FOLDER",
                   help="write the table of runs into FOLDER/README.md (default: the folder of this script)")
    s = p.add_argument_group("submission.json", "from the logs of the seeds of one configuration")
    s.add_argument("--submission", metavar="OUT.json", help="write it; needs the next four")
    for name in ("author", "github-id", "name", "blurb"):
        s.add_argument(f"--{name}", metavar="TEXT")
    s.add_argument("--date", metavar="YYYY-MM-DD", help="default: the date in the logs")
    s.add_argument("--track", default="10min_16mb", choices=("10min_16mb", "non_record_16mb"))
    s.add_argument("--summary", metavar="TEXT", help="technique_summary; default: from the settings")
    s.add_argument("--attribution", action="append", default=[], metavar="WHAT=WHOM", help="may be repeated")
    s.add_argument("--record-bpb", type=float, metavar="X", help="score to beat [bits per byte]")
    s.add_argument("--record-nats", type=float, metavar="X", help="score to beat [nats per token]")
    return p


def write_submission(logs, args):
    """--submission: write the file, say what was tested."""
    missing = [f"--{n.replace('_', '-')}" for n in ("author", "github_id", "name", "blurb") if not getattr(args, n)]
    if missing:
        raise ReportError(f"--submission needs {', '.join(missing)}")
    wrong = [item for item in args.attribution if "=" not in item]
    if wrong:
        raise ReportError(f"--attribution {wrong[0]}: give WHAT=WHOM")
    typed = vars(args) | dict(attribution=dict(item.split("=", 1) for item in args.attribution))
    out = submission(logs, typed, args.record_bpb, args.record_nats)
    Path(args.submission).write_text(json.dumps(out, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{args.submission}: {out['val_bpb']:.5f} bpb, {len(out['seeds'])} seed(s), {out['bytes_total']:,} bytes")
    if "record_test" in out:
        print(describe_test(out["record_test"]))
    for claim in (k for k, held in out["compliance"].items() if not held):
        print(f"warning: the logs do not show {claim}", file=sys.stderr)


def check(folder, python310):
    """--check: print every fault; the exit code."""
    review = Review(folder, python310).run()
    for kind, text in review.faults:
        print(f"fault {kind}: {text}")
    for text in review.notes:
        print(f"note: {text}")
    print(f"{folder}: {len(review.faults)} fault{'' if len(review.faults) == 1 else 's'}"
          + ("" if review.faults else f"; {len(review.logs)} logs, files, JSON, sizes, times, README and script agree"))
    return 1 if review.faults else 0


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for a folder with faults, 2 for bad input."""
    p = parser()
    args = p.parse_args(argv)
    try:
        if not (args.logs or args.check or args.index):
            p.print_usage(sys.stderr)
            raise ReportError("give logs, --check FOLDER or --index")
        if (args.figures or args.submission) and not args.logs:
            raise ReportError("--figures and --submission need logs")
        if args.logs:
            logs = collect(args.logs)
            print(table(logs))
            if args.figures:
                print("\n" + "\n".join(map(str, figures(logs, args.figures))))
            if args.submission:
                write_submission(logs, args)
        if args.index:
            print(f"{Path(args.index) / 'README.md'}: {index(args.index)} runs")
        return check(args.check, args.python310) if args.check else 0
    except (ReportError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
