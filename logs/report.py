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
from pathlib import Path
from statistics import mean, median, stdev

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
SCORE_FORMAT = "{:.5f}"


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
    compliance: dict | None = None
    over_limit: list = field(default_factory=list)
    start_up_s: float | None = None
    hessian_s: float | None = None
    export_s: float | None = None
    planned: int | None = None  # the M of step:N/M
    stopped: tuple | None = None  # seconds, step
    sizes: dict = field(default_factory=dict)
    val_tokens: int | None = None
    peak_mib: int | None = None
    gptq: list = field(default_factory=list)
    ttt: list = field(default_factory=list)
    order: list = field(default_factory=list)  # event names as they came

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
        told = number((self.compliance or {}).get("train_s"))
        if told is not None:
            return told
        if self.stopped:
            return self.stopped[0]
        points = (*self.train.values(), *self.val.values())
        return max((p.seconds for p in points if p.seconds is not None), default=None)

    @property
    def eval_s(self):
        """Seconds of the counted evaluation."""
        told = number((self.compliance or {}).get("eval_s"))
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
        """'ok', or 'fail (what)', 'unfinished', or a dash for older logs, which judge nothing."""
        if not self.final:
            return "unfinished"
        if not self.compliance:
            return "unfinished" if self.ours else DASH
        if self.compliance.get("verdict") == "ok":
            return "ok"
        broken = [k for k in CHECKS if self.compliance.get(k) not in (None, "ok")] + self.over_limit
        return f"fail ({', '.join(broken) or 'unsaid'})"


def number(text):
    """The float in `text`, its unit dropped and times turned into seconds; None where there is none."""
    match = re.fullmatch(r"(-?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|nan|inf))(ms|s|m|)", str(text), re.IGNORECASE)
    return float(match[1]) / PER_UNIT[match[2].lower()] if match else None


def integer(text):
    """The int in `text`, or None."""
    return int(text) if re.fullmatch(r"\d+", str(text)) else None


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
    """A score line; `final` of an older log is its last one, ours has a line for it."""
    values = dict(PAIR.findall(text))
    loss, bpb = number(values.get("val_loss")), number(values.get("val_bpb"))
    if loss is None or bpb is None:
        return False
    score = Score(values.get("method", ""), loss, bpb, integer(values.get("tokens")), integer(values.get("bytes")),
                  number(values.get("eval_time")))
    if event == "final":
        log.final = score
        return True
    method = method_of(event)
    if method is None:
        return False
    score.method = method
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
    if (loss := number(values.get("train_loss"))) is not None:
        rate = number(values.get("tok_s", values.get("tok/s")))
        log.train[step] = Point(step, seconds, loss, tok_s=rate)
    if (bpb := number(values.get("val_bpb"))) is not None:
        if seconds is None and step in log.train:
            seconds = log.train[step].seconds
        log.val[step] = Point(step, seconds, number(values.get("val_loss")), bpb)
    if (memory := number(values.get("peak_mem_mb"))) is not None:
        log.peak_mib = max(log.peak_mib or 0, int(memory))


def add_event(log, event, values):
    """A line of our grammar other than progress and scores; unknown events are passed over."""
    if event == "run":
        log.run = values
    elif event in ("config", "config_changed"):
        log.config.update({k: v for k, v in values.items() if k != "default"})
    elif event == "kernel":
        log.start_up_s = number(values.get("start_up"))
    elif event == "model":
        log.val_tokens = integer(values.get("val_tokens"))
    elif event == "hessians":
        end, begin = number(values.get("hessian_end_s")), number(values.get("loop_end_s"))
        log.hessian_s = end - begin if end is not None and begin is not None else None
    elif event == "artifact":
        log.export_s = number(values.get("export_time"))
    elif event == "compliance":
        log.compliance = values
    elif event == "over_limit":
        log.over_limit.append(values.get("limit", "?"))
    elif event == "gptq" and (error := number(values.get("rel_err"))) is not None:
        log.gptq.append((values.get("name", "?"), integer(values.get("bits")), error))
    elif event == "ttt":
        tokens, bpb = integer(values.get("scored_tokens")), number(values.get("running_bpb"))
        if tokens is not None and bpb is not None:
            log.ttt.append((tokens, bpb))


def event_line(line):
    """(event, {key: value}) of a line of our grammar, or None."""
    words = line.split(" ")
    event = words.pop(0) if ":" not in words[0] else ""
    pairs = [word.split(":", 1) for word in words]
    if not pairs or any(len(p) != 2 or not p[1] or not re.fullmatch(r"[a-z][a-z0-9_]*", p[0]) for p in pairs):
        return None
    return event, dict(pairs)


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
    for line in lines:
        line = line.rstrip()
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
            log.order.append(match[1])
        elif log.ours and (found := event_line(line)):
            log.order.append(found[0])
            add_event(log, *found)
        elif not log.ours and not log.train:
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
        found = []
        for file in sorted((*path.rglob("*.txt"), *path.rglob("*.log"))):
            try:
                found.append(parse_log(file))
            except ReportError:
                continue
        if not found:
            raise ReportError(f"{path}: no training log (*.txt, *.log) in this folder")
        logs += found
    return logs


# -------------------------------------------------------------------------------------------------
# 2 Configurations
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


# -------------------------------------------------------------------------------------------------
# 3 Table
# -------------------------------------------------------------------------------------------------


def columns():
    """The table's columns: (title, value of a RunLog, format of a number; SCORE_FORMAT for a Score; None for text)."""
    count = "{:,.0f}"
    methods = [(f"{method} bpb", lambda log, method=method: log.scores.get(method), SCORE_FORMAT)
               for method in METHODS]
    return [("run", lambda log: log.name, None), ("preset", lambda log: log.preset, None),
            ("seed", lambda log: log.seed if log.seed is None else str(log.seed), None),
            ("gpu", lambda log: log.hardware, None),
            ("steps", lambda log: log.steps, count), ("tok/s", lambda log: log.tok_s, count),
            ("ms/step", lambda log: log.ms_per_step, "{:,.1f}"), ("train s", lambda log: log.train_s, "{:.1f}"),
            ("peak MiB", lambda log: log.peak_mib, count),
            ("pre-quant bpb", lambda log: log.scores.get("pre"), SCORE_FORMAT), *methods,
            ("final bpb", lambda log: log.final.bpb if log.final else None, SCORE_FORMAT),
            ("final by", lambda log: log.final.method or None if log.final else None, None),
            ("artifact bytes", lambda log: log.model_bytes, count),
            ("total bytes", lambda log: log.total_bytes, count), ("verdict", lambda log: log.verdict, None)]


def cell(values, form):
    """One cell: a value, or 'mean ± std' (the sample's) of several; text only where all agree; a dash for unknown."""
    if None in values:
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
    layout = columns()
    rows = []
    for group in by_configuration(logs):
        rows += [[cell([value(log)], form) for _, value, form in layout] for log in group]
        if len({log.seed for log in group}) > 1:
            rows.append([cell([value(log) for log in group], form) for _, value, form in layout])
            rows[-1][0], rows[-1][2] = "**mean ± std**", f"n = {len(group)}"
    kept = [i for i in range(len(layout)) if any(row[i] != DASH for row in rows)]
    return markdown([layout[i][0] for i in kept], [[row[i] for i in kept] for row in rows],
                    [layout[i][2] is not None for i in kept])


INDEX_MARKS = ("<!-- runs -->", "<!-- /runs -->")


def index(folder):
    """Fill the README of `folder`, between its two marks, with a table of the logs there; returns how many."""
    readme = Path(folder) / "README.md"
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{readme}: cannot be read ({error.strerror})") from None
    start, end = (text.find(mark) for mark in INDEX_MARKS)
    if start < 0 or end < start:
        raise ReportError(f"{readme}: needs the two marks {INDEX_MARKS[0]} and {INDEX_MARKS[1]}, in this order")
    try:
        logs = collect([folder])
    except ReportError:
        logs = []
    logs.sort(key=lambda log: (log.date or "", log.name), reverse=True)
    rows = [[log.date or DASH, log.hardware or DASH, log.preset, log.seed if log.seed is not None else DASH,
             f"{log.steps:,}" if log.steps else DASH,
             f"{log.final.bpb:.5f} ({log.final.method or DASH})" if log.final else DASH,
             f"{log.total_bytes:,}" if log.total_bytes else DASH, log.verdict,
             f"[{log.name}]({log.path.relative_to(folder).as_posix().replace(' ', '%20')})"] for log in logs]
    body = markdown(["date", "gpu", "preset", "seed", "steps", "final bpb", "total bytes", "verdict", "log"], rows,
                    [False, False, False, True, True, True, True, False, False]) if rows else "No runs yet."
    readme.write_text(f"{text[:start]}{INDEX_MARKS[0]}\n{body}\n{text[end:]}", encoding="utf-8")
    return len(logs)


# -------------------------------------------------------------------------------------------------
# 4 submission.json
# -------------------------------------------------------------------------------------------------


def record_test(values, record, margin=MARGIN_NATS):
    """One-sided one-sample t-test that the mean of `values` [nats] is below `record` - `margin`; a dict.

    p is None for a single value: one run shows no spread.
    """
    bar, n = record - margin, len(values)
    result = dict(n=n, mean=mean(values), std=stdev(values) if n > 1 else None, record=record, bar=bar, t=None, p=None)
    if n > 1 and result["std"] > 0:
        try:
            from scipy import stats
        except ImportError:
            raise ReportError("the test against a record needs scipy: pip install scipy") from None
        result["t"] = (result["mean"] - bar) / (result["std"] / math.sqrt(n))
        result["p"] = float(stats.t.cdf(result["t"], n - 1))
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
    if token["p"] is None:
        verdict = "undecided: one seed shows no spread"
    elif token["holds"] and byte["holds"]:
        verdict = "record: per token and per byte"
    elif token["holds"] or byte["holds"]:
        verdict = f"record per {'token' if token['holds'] else 'byte'} only"
    else:
        verdict = "no record"
    return dict(record_bpb=record_bpb, margin_nats=MARGIN_NATS, alpha=ALPHA, nats_per_token=token, nats_per_byte=byte,
                verdict=verdict)


def describe_test(test):
    """Lines for the screen."""
    lines = []
    for unit in ("nats_per_token", "nats_per_byte"):
        r = test[unit]
        spread = DASH if r["std"] is None else f"{r['std']:.5f}"
        p = DASH if r["p"] is None else f"{r['p']:.3g}"
        lines.append(f"{unit.replace('_', ' ')}: mean {r['mean']:.5f} ± {spread} (n = {r['n']}), record "
                     f"{r['record']:.5f}, bar {r['bar']:.5f} ({MARGIN_NATS} below), p = {p} "
                     f"{'<' if r['holds'] else 'not <'} {ALPHA}")
    return "\n".join([*lines, f"verdict: {test['verdict']}"])


def derived_compliance(logs):
    """submission.json's compliance table: each entry from what the logs' own lines say."""
    def all_ok(*names):
        return all((log.compliance or {}).get(name) == "ok" for log in logs for name in names)

    def adapted_early(log):  # a ttt line before the artifact was written
        end = log.order.index("artifact") if "artifact" in log.order else len(log.order)
        return "ttt" in log.order[:end]

    return dict(
        train_under_600s=all(log.train_s is not None and log.train_s <= TIME_LIMIT_S for log in logs),
        artifact_under_16mb=all(log.total_bytes is not None and log.total_bytes <= CAP_BYTES for log in logs),
        eval_under_600s=all(log.eval_s is not None and log.eval_s <= TIME_LIMIT_S for log in logs),
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
        if not (log.final and log.compliance and log.total_bytes):
            raise ReportError(f"{log.path}: the run did not finish (no 'final', size or 'compliance' line)")
        if log.seed is None:
            raise ReportError(f"{log.path}: its run line has no seed")
    if found := differences(logs):
        raise ReportError("the logs are not of one configuration; they differ in " + "; ".join(found))
    seeds = [log.seed for log in logs]
    if len(set(seeds)) < len(seeds):
        raise ReportError(f"two logs have the same seed: {', '.join(map(str, seeds))}")


def technique_summary(log):
    """One line from the settings, for those who give none."""
    c = log.config
    parts = [c.get("stack") and f"stack {c['stack']}", c.get("model_dim") and f"width {c['model_dim']}",
             c.get("matrix_bits") and f"int{c['matrix_bits']} + {c.get('compressor', '?')}",
             f"scored by {log.final.method}"]
    return ", ".join(p for p in parts if p)


def submission(logs, author, github_id, name, blurb, date=None, track="10min_16mb", summary=None, attribution=None,
               record_bpb=None, record_nats=None):
    """The dict of submission.json, from the logs of the seeds of one configuration.

    As in the challenge, artifact_bytes of a seed is code and model together, and bytes_total the largest of them.
    """
    check_same_configuration(logs)
    logs = sorted(logs, key=lambda log: log.seed)
    date = date or max((log.date for log in logs if log.date), default=None)
    if not date:
        raise ReportError("the logs name no date (RUN_ID has none); give --date YYYY-MM-DD")
    losses, bpbs = [log.final.val_loss for log in logs], [log.final.bpb for log in logs]
    results = {str(log.seed): dict(val_loss=log.final.val_loss, val_bpb=log.final.bpb, artifact_bytes=log.total_bytes,
                                   steps=log.steps, eval_time_s=log.eval_s) for log in logs}
    out = dict(
        author=author, github_id=github_id, name=name, blurb=blurb, date=date, track=track,
        val_loss=round(mean(losses), 8), val_bpb=round(mean(bpbs), 8),
        val_bpb_std=round(stdev(bpbs), 8) if len(bpbs) > 1 else None,
        seeds=[log.seed for log in logs], seed_results=results,
        bytes_total=max(log.total_bytes for log in logs), bytes_code=logs[0].code_bytes,
        hardware=logs[0].hardware, pytorch_version=logs[0].run.get("torch"),
        technique_summary=summary or technique_summary(logs[0]), compliance=derived_compliance(logs),
        attribution=attribution or {})
    if record_bpb is not None or record_nats is not None:
        out["record_test"] = compare_with_record(logs, record_bpb, record_nats)
    return out


# -------------------------------------------------------------------------------------------------
# 5 Figures
# -------------------------------------------------------------------------------------------------
# White background, so that they read the same on light and dark pages; labels on the lines, no legends.

COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#7F6A00", "#444444")
PARTS = {"start-up": "#BBBBBB", "training": "#0072B2", "Hessians": "#004C78", "export": "#E69F00",
         "evaluation": "#009E73", "diagnostics": "#CFE8DF"}
MAX_PNG_BYTES = 150_000


def pyplot():
    """matplotlib.pyplot without a display and with our style."""
    try:
        import matplotlib
    except ImportError:
        raise ReportError("--figures needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.size": 10,
        "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": "#E4E4E4", "axes.axisbelow": True,
        "svg.fonttype": "none", "svg.hashsalt": "report", "path.simplify": True})
    return plt


def save(fig, folder, name):
    """Write PNG (at most MAX_PNG_BYTES) and SVG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    from PIL import Image  # matplotlib needs it, so it is there
    for dpi in (150, 120, 100, 80):
        fig.savefig(png, dpi=dpi)
        with Image.open(png) as image:
            few_colors = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
        few_colors.save(png, optimize=True)
        if png.stat().st_size <= MAX_PNG_BYTES:
            break
    fig.savefig(svg, metadata={"Date": None})
    return [png, svg]


def spread_labels(ax, labels, gap=0.055):
    """Write (y, text, color) labels right of the axes, at least `gap` of its height apart."""
    low, high = ax.get_ylim()
    placed = []
    for y, text, color in sorted(labels):
        place = min(max((y - low) / (high - low), 0.0), 1.0)
        place = max(place, placed[-1][0] + gap) if placed else place
        placed.append((place, text, color))
    overflow = max(0.0, placed[-1][0] - 1.0) if placed else 0.0
    for place, text, color in placed:
        ax.text(1.015, place - overflow, text, color=color, transform=ax.transAxes, va="center", fontsize=9)


def band(group, points, x, y):
    """Common x, then mean, lowest and highest y of the group's runs, interpolated; None where no run has points."""
    lines = []
    for log in group:
        got = sorted((x(p), y(p)) for p in getattr(log, points).values() if x(p) is not None)
        if len(got) > 1:
            lines.append(got)
    if not lines:
        return None
    first, last = max(line[0][0] for line in lines), min(line[-1][0] for line in lines)
    grid = sorted({a for line in lines for a, _ in line if first <= a <= last})
    values = [[interpolate(line, a) for line in lines] for a in grid]
    return (grid, [mean(v) for v in values], [min(v) for v in values], [max(v) for v in values]) if grid else None


def interpolate(line, x):
    """y at x of a line of sorted (x, y), straight between its points."""
    for (x0, y0), (x1, y1) in zip(line, line[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return line[-1][1]


def short_name(log):
    """The run's name without the time that RUN_ID begins with."""
    return re.sub(r"^20\d{6}-\d{6}_", "", log.name)


def group_label(group):
    """A short name for a configuration: its run, or preset and number of seeds."""
    if len(group) == 1:
        return short_name(group[0])
    return f"{group[0].preset}, {len(group)} seeds"


def curve_title(groups):
    """The finding: the best final score and its distance to the next."""
    ranked = sorted((mean(log.final.bpb for log in g), group_label(g)) for g in groups if all(log.final for log in g))
    if not ranked:
        return "Learning curves (no run has finished)"
    if len(ranked) == 1:
        return f"{ranked[0][1]} ends at {ranked[0][0]:.4f} bpb"
    return f"Best: {ranked[0][1]} at {ranked[0][0]:.4f} bpb, {ranked[1][0] - ranked[0][0]:.4f} below {ranked[1][1]}"


def draw_curves(ax, groups, points, x, y, label):
    """One panel: a line per configuration, a band over its seeds; the first, steep part runs off the top."""
    labels, early = [], []
    for color, group in zip(COLORS * len(groups), groups):
        found = band(group, points, x, y)
        if not found:
            continue
        grid, middle, low, high = found
        ax.plot(grid, middle, color=color, lw=1.4 if len(grid) < 60 else 0.9)
        if len(group) > 1:
            ax.fill_between(grid, low, high, color=color, alpha=0.25, lw=0)
        labels.append((middle[-1], group_label(group), color))
        early.append(next(m for a, m in zip(grid, middle) if a >= 0.04 * grid[-1] or a == grid[-1]))
        early.append(max(middle[-max(1, len(middle) // 3):]))
    if labels:
        bottom = min(ax.dataLim.y0, *(value for value, _, _ in labels))
        top = max(early) + 0.03 * (max(early) - bottom) if len(early) else ax.dataLim.y1
        if top > bottom:
            ax.set_ylim(bottom - 0.06 * (top - bottom), top)
    ax.set_ylabel(label)
    return labels


def figure_curves(logs, folder):
    """Training loss, and validation bpb where the logs have it, against step and against seconds."""
    groups = [g for g in by_configuration(logs) if any(len(log.train) > 1 for log in g)]
    if not groups:
        return []
    plt = pyplot()
    has_val = any(len(log.val) > 1 for g in groups for log in g)
    rows = [("train", lambda p: p.loss, "training loss [nats/token]")]
    rows += [("val", lambda p: p.bpb, "validation bpb [bits/byte]")] if has_val else []
    fig, axes = plt.subplots(len(rows), 2, figsize=(10, 1.0 + 3.1 * len(rows)), sharey="row", sharex="col",
                             squeeze=False)
    for row, (points, y, label) in zip(axes, rows):
        for ax, x in zip(row, (lambda p: p.step, lambda p: p.seconds)):
            labels = draw_curves(ax, groups, points, x, y, label if ax is row[0] else "")
        spread_labels(row[1], labels)
    for row, letters in zip(axes, ("ab", "cd")):
        for ax, letter, against in zip(row, letters, ("step", "training time")):
            ax.set_title(f"({letter}) against {against}", fontweight="normal")
            ax.set_xlim(left=0)
    axes[-1][0].set_xlabel("step")
    axes[-1][1].set_xlabel("training clock [s]")
    finding = curve_title(groups) + ("; bands: lowest to highest seed" if any(len(g) > 1 for g in groups) else "")
    fig.suptitle(textwrap.fill(finding, 95), x=0.01, ha="left", fontsize=11, fontweight="bold")
    fig.tight_layout()
    return save(fig, folder, "curves")


def time_parts(log):
    """(part, what, seconds) of a run in order; `diagnostics` are evaluations that do not count."""
    train = log.train_s
    if train is not None and log.hessian_s:
        train -= log.hessian_s  # they are inside the training clock
    parts = [("start-up", "start-up", log.start_up_s), ("training", "training", train),
             ("Hessians", "Hessians", log.hessian_s),
             ("diagnostics", "unquantized", log.scores["pre"].seconds if "pre" in log.scores else None),
             ("export", "export", log.export_s)]
    for method in METHODS:
        counted = bool(log.final and log.final.method == method)
        seconds = log.eval_s if counted else log.scores[method].seconds if method in log.scores else None
        parts.append(("evaluation" if counted else "diagnostics", method, seconds))
    return [part for part in parts if part[2]]


def figure_time(logs, folder):
    """A bar per run: where the seconds went, against the limit of the training clock."""
    bars = [(log, time_parts(log)) for log in logs]
    bars = [(log, parts) for log, parts in bars if parts][:16]
    if not bars:
        return []
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(10, 1.75 + 0.62 * len(bars)))
    whole = max(sum(s for *_, s in parts) for _, parts in bars)
    for i, (_, parts) in enumerate(bars):
        left, small = 0.0, []
        for part, what, seconds in parts:
            ax.barh(i, seconds, left=left, height=0.6, color=PARTS[part], edgecolor="white", lw=0.8,
                    hatch="///" if part == "diagnostics" else None)
            text = f"{what} {seconds:.1f} s" if seconds < 10 else f"{what} {seconds:.0f} s"
            if seconds > 0.0088 * len(what) * whole:
                dark = part in ("training", "Hessians", "evaluation")
                box = None if dark else dict(facecolor=PARTS[part], edgecolor="none", pad=1.0)
                if seconds < 0.0088 * len(text) * whole:
                    text = text.replace(" ", "\n", 1)
                ax.text(left + seconds / 2, i, text, ha="center", va="center", fontsize=8.5, bbox=box,
                        color="white" if dark else "black")
            else:
                small.append(text)
            left += seconds
        if small:
            ax.text(0, i + 0.33, "in order, not labelled: " + ", ".join(small), va="top", fontsize=8, color="#333333")
    ax.set_yticks(range(len(bars)), [short_name(log) for log, _ in bars])
    ax.set_ylim(len(bars) - 0.3, -0.5)
    ax.set_xlim(0, whole * 1.01)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("wall clock [s]; hatched: evaluations that do not count")
    fig.suptitle(time_title(bars), x=0.01, ha="left", fontsize=11, fontweight="bold")
    fig.tight_layout()
    return save(fig, folder, "time")


def time_title(bars):
    """The finding: the longest training and the longest counted evaluation."""
    train = max((log.train_s for log, _ in bars if log.train_s), default=None)
    counted = max((log.eval_s for log, _ in bars if log.eval_s), default=None)
    parts = [f"training took {train:.0f} s" if train else None,
             f"the counted evaluation {counted:.{0 if counted >= 10 else 1}f} s" if counted else None]
    told = ", ".join(p for p in parts if p) + " (600 s allowed for each)"
    return f"At most: {told}" if len(bars) > 1 else told[:1].upper() + told[1:]


def figure_gptq(logs, folder):
    """Relative quantization error of every matrix, in the order of the log; the worst are named."""
    logs = [log for log in logs if log.gptq]
    if not logs:
        return []
    plt = pyplot()
    log = logs[-1]
    fig, ax = plt.subplots(figsize=(10, 3.6))
    kinds = list(dict.fromkeys(bits for _, bits, _ in log.gptq))
    for color, marker, bits in zip(COLORS, "osD^vP", kinds):
        xs = [i for i, (_, b, _) in enumerate(log.gptq) if b == bits]
        ax.plot(xs, [log.gptq[i][2] for i in xs], marker, color=color, ms=5)
        ax.annotate(f"int{bits}" if bits else "other", (xs[-1], log.gptq[xs[-1]][2]), textcoords="offset points",
                    xytext=(8, -3), color=color, fontsize=9, annotation_clip=False)
    n, worst, named = len(log.gptq), sorted(range(len(log.gptq)), key=lambda i: -log.gptq[i][2]), []
    for i in worst[:4]:
        side, y = -1 if i > 0.5 * n else 1, log.gptq[i][2]
        if all(abs(i + 0.1 * n * side - x) > 0.2 * n or abs(y - other) > 0.08 * log.gptq[worst[0]][2]
               for x, other in named):  # leave out a name that would lie on another
            ax.annotate(log.gptq[i][0], (i, y), textcoords="offset points", xytext=(7 * side, 4), fontsize=8,
                        ha="right" if side < 0 else "left")
            named.append((i + 0.1 * n * side, y))
    ax.set_ylim(0, 1.15 * log.gptq[worst[0]][2])
    ax.set_xlabel("matrix, in the order of export")
    ax.set_ylabel("relative error, rel_err [1]")
    name, bits, error = log.gptq[worst[0]]
    middle = median(e for *_, e in log.gptq)
    ax.set_title(f"{short_name(log)}: largest quantization error {error:.4f} in {name} (int{bits}), "
                 f"median {middle:.4f}", pad=10)
    fig.tight_layout()
    return save(fig, folder, "gptq")


def figure_ttt(logs, folder):
    """Running bpb along the validation stream under test-time training, with the unadapted score as a line."""
    logs = [log for log in logs if len(log.ttt) > 1]
    if not logs:
        return []
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(10, 3.6))
    labels, findings = [], []
    for color, log in zip(COLORS * len(logs), logs):
        tokens, bpb = zip(*log.ttt)
        ax.plot([n / 1e6 for n in tokens], bpb, color=color, lw=1.4)
        labels.append((bpb[-1], f"{short_name(log)} {bpb[-1]:.4f}", color))
        base = log.scores.get("exact") or log.scores.get("sliding")
        if base:
            ax.axhline(base.bpb, color=color, lw=1, ls="--")
            labels.append((base.bpb, f"unadapted, {base.method} {base.bpb:.4f}", color))
            findings.append(base.bpb - bpb[-1])
    values = [value for log in logs for _, value in log.ttt[len(log.ttt) // 20:]] + [value for value, _, _ in labels]
    pad = 0.08 * (max(values) - min(values) or 0.01)
    ax.set_ylim(min(values) - pad, max(values) + pad)
    ax.set_xlim(left=0)
    spread_labels(ax, labels, gap=0.07)
    ax.set_xlabel("tokens scored [millions]")
    ax.set_ylabel("running bpb [bits/byte]")
    gain = (f"Test-time training {'gains' if findings[0] > 0 else 'loses'} {abs(findings[0]):.4f} bpb over the stream"
            if findings else f"Running bpb under test-time training ends at {logs[0].ttt[-1][1]:.4f}")
    ax.set_title(gain, pad=10)
    fig.tight_layout()
    return save(fig, folder, "ttt")


def figures(logs, folder):
    """Draw what the logs have data for; returns the paths of the files."""
    paths = []
    for draw in (figure_curves, figure_time, figure_gptq, figure_ttt):
        paths += draw(logs, Path(folder))
    if paths:
        pyplot().close("all")
    return paths


# -------------------------------------------------------------------------------------------------
# 6 Review of a submission folder
# -------------------------------------------------------------------------------------------------

FAULTS = {
    "missing_file": "a required file is not there",
    "missing_logs": "fewer than three train_seed<seed>.log",
    "log_unreadable": "a log holds no line of a training log of this script",
    "log_unfinished": "a log has no final, size or compliance line",
    "log_seed": "a log's seed is not the one in its file name",
    "log_inconsistent": "two lines of a log contradict each other",
    "configurations_differ": "the seeds were run with different settings, code or machines",
    "json_invalid": "submission.json is not a JSON object",
    "json_field": "a field of submission.json is missing",
    "json_type": "a field of submission.json has the wrong type or form",
    "seeds": "submission.json's seeds are not those of the logs",
    "seed_result": "a seed's result in submission.json is not the log's",
    "mean": "val_loss, val_bpb or val_bpb_std is not that of the logs",
    "environment": "hardware or pytorch_version is not that of the logs, or not the track's",
    "code_bytes": "the script's size is not the one logged or declared",
    "code_sha256": "the script is not the one that ran",
    "total_bytes": "code and model do not add up to the total, or it is not the one declared",
    "size_cap": "code and model exceed 16,000,000 bytes",
    "train_time": "training took more than 600 s, or the log does not say",
    "eval_time": "evaluation took more than 600 s, or the log does not say",
    "compliance": "a compliance line says fail, or lacks a check",
    "compliance_claim": "submission.json claims what the logs deny, or leaves it out",
    "bytes_per_token": "loss, bpb, bytes and tokens do not belong together",
    "coverage": "not every validation token was scored once",
    "final_method": "the final score is not the one of the method that was set beforehand",
    "readme_score": "the README does not give the mean bpb of the logs",
    "readme_seed": "a seed's row in the README has a score that its log does not have",
    "python310": "the script is no Python 3.10",
    "exec_wrapper": "the script executes code from a string",
    "import_failed": "the script cannot be imported on a CPU-only machine",
    "import_effect": "importing the script does more than define things",
}
REQUIRED_FILES = ("README.md", "submission.json", "train_gpt.py", "requirements.txt")
FIELDS = dict(author=str, github_id=str, name=str, blurb=str, date=str, track=str, val_loss=float, val_bpb=float,
              val_bpb_std=float, seeds=list, seed_results=dict, bytes_total=int, bytes_code=int, hardware=str,
              pytorch_version=str, technique_summary=str, compliance=dict, attribution=dict)
RESULT_FIELDS = dict(val_loss=float, val_bpb=float, artifact_bytes=int, steps=int, eval_time_s=float)
CLAIMS = ("train_under_600s", "artifact_under_16mb", "eval_under_600s", "no_slot", "no_pre_quant_ttt", "no_ngram_cache",
          "score_first_ttt", "three_seeds")
ROUNDING = 5.1e-6  # submissions give five decimals or more


def is_type(value, kind):
    """Whether a JSON value is of `kind`; an int passes for a float, true and false pass for no number."""
    if kind in (int, float):
        numeric = (int,) if kind is int else (int, float)
        return isinstance(value, numeric) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is not str or bool(value.strip()))


class Review:
    """Every fault of a submission folder: `run()` fills `faults` [(kind, text)] and `notes` [text]."""

    def __init__(self, folder, python310="python3.10"):
        self.folder, self.python310 = Path(folder), python310
        self.faults, self.notes = [], []
        self.logs, self.json, self.code = [], None, None

    def fault(self, kind, text):
        """Record a fault; `kind` is a key of FAULTS."""
        if kind not in FAULTS:
            raise KeyError(kind)
        self.faults.append((kind, text))

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
            self.check_json_types()
            self.check_json_seeds()
            self.check_json_means()
            self.check_json_claims()
        self.check_readme()
        if self.code is not None:
            self.check_python()
            self.check_import()
        return self

    def read_files(self):
        """Which files are there; logs, JSON and script."""
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
            elif not (log.final and log.compliance and log.total_bytes and log.model_bytes):
                self.fault("log_unfinished", f"{path.name}: lacks its final, size or compliance line")
            else:
                self.logs.append(log)
        script, declared = self.folder / "train_gpt.py", self.folder / "submission.json"
        self.code = script.read_bytes() if script.is_file() else None
        if declared.is_file():
            try:
                self.json = json.loads(declared.read_text(encoding="utf-8"))
            except (ValueError, UnicodeDecodeError) as error:
                self.fault("json_invalid", f"submission.json: {error}")
            if self.json is not None and not isinstance(self.json, dict):
                self.fault("json_invalid", "submission.json: not an object")
                self.json = None

    def check_log(self, log):
        """Seed, code and sizes of one log, against its name, the script and itself."""
        name = log.path.name
        if name != f"train_seed{log.seed}.log":
            self.fault("log_seed", f"{name}: its run line says seed:{log.seed}")
        if self.code is not None:
            if log.code_bytes != len(self.code):
                self.fault("code_bytes", f"{name}: code_bytes:{log.code_bytes}, train_gpt.py has {len(self.code)}")
            if log.run.get("code_sha256") != hashlib.sha256(self.code).hexdigest():
                self.fault("code_sha256", f"{name}: ran another train_gpt.py (code_sha256 differs)")
        if (log.code_bytes or 0) + log.model_bytes != log.total_bytes:
            self.fault("total_bytes", f"{name}: {log.code_bytes} of code and {log.model_bytes} of model are not "
                                      f"{log.total_bytes}")
        for event in ("run", "final", "compliance"):
            if log.order.count(event) != 1:
                self.fault("log_inconsistent", f"{name}: {log.order.count(event)} lines '{event}', a run writes one")
        told = integer(log.compliance.get("total_bytes"))
        if told != log.total_bytes:
            self.fault("log_inconsistent", f"{name}: total_bytes:{told} in the compliance line, {log.total_bytes} in "
                                           "'Total submission size'")
        later = log.train_s - log.stopped[0] if log.stopped else 0.0  # Hessians come after the stop, inside the clock
        if later < -0.1 or later > 0.1 and not log.hessian_s:
            self.fault("log_inconsistent", f"{name}: training stopped at {log.stopped[0]:.1f} s, the compliance line "
                                           f"says {log.train_s} s")

    def check_score(self, log):
        """The final line of one log: its method, coverage, and bytes per token."""
        name, final = log.path.name, log.final
        beforehand = log.config.get("final_score")
        if beforehand not in (None, final.method):
            self.fault("final_method", f"{name}: final_score was set to {beforehand}, the final line has "
                                       f"{final.method}")
        elif (own := log.scores.get(final.method)) is None or (own.val_loss, own.bpb) != (final.val_loss, final.bpb):
            self.fault("final_method", f"{name}: the final line is not the score of method {final.method}")
        told = integer(log.compliance.get("tokens_scored"))
        if told != final.tokens or (log.val_tokens is not None and final.tokens != log.val_tokens - 1):
            self.fault("coverage", f"{name}: {final.tokens} tokens in the final line, {told} in the compliance line, "
                                   f"{log.val_tokens} in the validation split (one less is scored)")
        if not (final.tokens and final.num_bytes and math.isfinite(final.val_loss) and final.bpb > 0):
            return self.fault("bytes_per_token", f"{name}: the final line lacks a finite score, tokens or bytes")
        by_score, by_count = final.val_loss / (math.log(2) * final.bpb), final.num_bytes / final.tokens
        declared = number(log.compliance.get("bytes_per_token"))
        if abs(by_score - by_count) > 2e-6 * by_count or declared is None or abs(declared - by_count) > 1e-5:
            self.fault("bytes_per_token", f"{name}: val_loss/(ln2 val_bpb) = {by_score:.5f}, bytes/tokens = "
                                          f"{by_count:.5f}, compliance line {declared}")
        for tokenizer, known in CHALLENGE_BYTES_PER_TOKEN.items():
            if tokenizer in log.config.get("tokenizer_path", "") and abs(by_count - known) > 0.005 * known:
                self.fault("bytes_per_token", f"{name}: {by_count:.5f} with {tokenizer}, whose split has {known}")

    def check_limits(self, log):
        """Caps and verdicts of one log."""
        name = log.path.name
        total = log.model_bytes + (len(self.code) if self.code is not None else log.code_bytes or 0)
        if max(total, log.total_bytes) > CAP_BYTES:
            self.fault("size_cap", f"{name}: {max(total, log.total_bytes):,} bytes, the cap is {CAP_BYTES:,}")
        if integer(cap := log.compliance.get("cap_bytes")) != CAP_BYTES:
            self.fault("size_cap", f"{name}: ran with cap_bytes:{cap}, the cap is {CAP_BYTES:,}")
        for kind, seconds in (("train_time", number(log.compliance.get("train_s"))),
                              ("eval_time", number(log.compliance.get("eval_s")))):
            if seconds is None or not seconds <= TIME_LIMIT_S:
                self.fault(kind, f"{name}: {DASH if seconds is None else seconds} s, the limit is {TIME_LIMIT_S:.0f} s")
        found = {key: log.compliance.get(key, "missing") for key in (*CHECKS, "verdict")}
        if broken := [f"{key}:{value}" for key, value in found.items() if value != "ok"]:
            self.fault("compliance", f"{name}: {' '.join(broken)}")

    def check_json_types(self):
        """Fields and types of submission.json; a field of the wrong type is dropped, so that it is one fault."""
        for key, kind in FIELDS.items():
            if key not in self.json:
                self.fault("json_field", f"submission.json: {key} is missing")
            elif not is_type(self.json[key], kind):
                self.fault("json_type", f"submission.json: {key} is {json.dumps(self.json.pop(key))[:60]}, not a "
                                        f"{'non-empty ' if kind is str else ''}{kind.__name__}")
        date = self.json.get("date")
        if date and not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", date):
            self.fault("json_type", f"submission.json: date is {date!r}, not YYYY-MM-DD")
        for seed, result in self.json.get("seed_results", {}).items():
            for key, kind in RESULT_FIELDS.items():
                if not isinstance(result, dict) or key not in result:
                    self.fault("json_field", f"submission.json: seed_results {seed} has no {key}")
                elif not is_type(result[key], kind):
                    self.fault("json_type", f"submission.json: seed_results {seed} {key} is {result[key]!r}")

    def check_json_seeds(self):
        """seeds and seed_results against the logs."""
        logged, results = {log.seed: log for log in self.logs}, self.json.get("seed_results", {})
        if "seeds" in self.json and sorted(map(str, self.json["seeds"])) != sorted(map(str, logged)):
            self.fault("seeds", f"submission.json: seeds {self.json['seeds']}, logs of {sorted(map(str, logged))}")
        if "seed_results" in self.json and set(results) != set(map(str, logged)):
            self.fault("seeds", f"submission.json: seed_results of {sorted(results)}, "
                                f"logs of {sorted(map(str, logged))}")
        for seed, log in logged.items():
            result = results.get(str(seed))
            if not isinstance(result, dict):
                continue
            truth = dict(val_loss=(log.final.val_loss, ROUNDING), val_bpb=(log.final.bpb, ROUNDING),
                         steps=(log.steps, 0), artifact_bytes=(log.total_bytes, 0), eval_time_s=(log.eval_s, 0.051))
            for key, (value, slack) in truth.items():
                told = result.get(key)
                if is_type(told, float) and (value is None or abs(told - value) > slack):
                    self.fault("seed_result", f"submission.json: seed {seed} has {key} {told}, the log {value}")

    def check_json_means(self):
        """Means, sizes and machine against the logs."""
        if not self.logs:
            return
        losses, bpbs = [log.final.val_loss for log in self.logs], [log.final.bpb for log in self.logs]
        truth = dict(val_loss=mean(losses), val_bpb=mean(bpbs), val_bpb_std=stdev(bpbs) if len(bpbs) > 1 else None)
        for key, value in truth.items():
            if value is not None and key in self.json and abs(self.json[key] - value) > ROUNDING:
                self.fault("mean", f"submission.json: {key} {self.json[key]}, the logs give {value:.8f}")
        total = max(log.total_bytes for log in self.logs)
        if (told := self.json.get("bytes_total", total)) != total:
            self.fault("total_bytes", f"submission.json: bytes_total {told}, the logs' largest {total}")
        size = len(self.code) if self.code is not None else self.logs[0].code_bytes
        if self.json.get("bytes_code", size) != size:
            self.fault("code_bytes", f"submission.json: bytes_code {self.json['bytes_code']}, train_gpt.py has {size}")
        ran = self.logs[0].hardware
        if self.json.get("pytorch_version", self.logs[0].run.get("torch")) != self.logs[0].run.get("torch"):
            self.fault("environment", f"submission.json: pytorch_version {self.json['pytorch_version']}, the logs say "
                                      f"{self.logs[0].run.get('torch')}")
        if "hardware" in self.json and not same_hardware(self.json["hardware"], ran):
            self.fault("environment", f"submission.json: hardware {self.json['hardware']}, the logs say {ran}")
        if self.json.get("track", "").removeprefix("track_") == "10min_16mb" and not same_hardware("8xH100", ran):
            self.fault("environment", f"track 10min_16mb is run on 8xH100, the logs say {ran}")

    def check_json_claims(self):
        """The compliance table of submission.json against the logs' own lines."""
        claims = self.json.get("compliance", {})
        if not self.logs:
            return
        truth = derived_compliance(self.logs)
        for key in CLAIMS:
            if key not in claims:
                self.fault("compliance_claim", f"submission.json: compliance has no {key}")
            elif not isinstance(claims[key], bool):
                self.fault("json_type", f"submission.json: compliance {key} is {claims[key]!r}, not true or false")
        for key, held in truth.items():
            if claims.get(key) is True and not held:
                self.fault("compliance_claim", f"submission.json: claims {key}, the logs do not show it")
            elif claims.get(key) is False:
                self.fault("compliance_claim", f"submission.json: {key} is false")

    def check_readme(self):
        """The README's mean, and the scores in its rows of single seeds, against the logs."""
        path = self.folder / "README.md"
        if not path.is_file() or not self.logs:
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        average = mean(log.final.bpb for log in self.logs)
        if not any(rounds_to(average, figure) for figure in re.findall(r"\d\.\d{4,}", text)):
            self.fault("readme_score", f"README.md: the logs' mean, {average:.5f} bpb, is not in it (4 decimals or "
                                       "more)")
        if not re.search(r"\btrack[ -]?[AB]\b", text, re.IGNORECASE):
            self.notes.append("README.md does not declare Track A (nothing built from evaluated tokens) or Track B")
        for log in self.logs:
            known = [v for s in (*log.scores.values(), log.final) for v in (s.bpb, s.val_loss)]
            for line in text.splitlines():
                cells = [cell.strip(" *`") for cell in line.split("|")]
                if str(log.seed) not in cells:
                    continue
                for figure in re.findall(r"(?<![\d.,-])[0-9]\.\d{4,}(?![\d.])", line):
                    if float(figure) >= 0.5 and not any(rounds_to(v, figure) for v in known):
                        self.fault("readme_seed", f"README.md: {figure} in the row of seed {log.seed} is no score of "
                                                  "its log")

    def check_python(self):
        """Python 3.10 syntax, by the parser here and by python3.10 where there is one; no exec wrapper."""
        path = self.folder / "train_gpt.py"
        try:
            tree = ast.parse(self.code, filename=path.name, feature_version=(3, 10))
        except (SyntaxError, ValueError) as error:
            return self.fault("python310", f"train_gpt.py: {error}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("exec", "eval"):
                self.fault("exec_wrapper", f"train_gpt.py: {node.func.id}() in line {node.lineno}")
        here = "ast.parse(feature_version=(3, 10)) in Python {}.{}".format(*sys.version_info)
        command = shutil.which(self.python310)
        version = "import sys; sys.exit(sys.version_info[:2] != (3, 10))"
        if not command or subprocess.run([command, "-I", "-c", version], capture_output=True).returncode:
            self.notes.append(f"Python 3.10 syntax checked by {here}; no working {self.python310} here for py_compile")
            return
        with tempfile.TemporaryDirectory() as scratch:
            compile_ = "import py_compile, sys; py_compile.compile(sys.argv[1], sys.argv[2], doraise=True)"
            done = subprocess.run([command, "-I", "-c", compile_, str(path.resolve()), str(Path(scratch) / "x.pyc")],
                                  capture_output=True, text=True)
        self.notes.append(f"Python 3.10 syntax checked by {here} and by py_compile of {self.python310}")
        if done.returncode:
            self.fault("python310", f"train_gpt.py: {self.python310} py_compile: {last_line(done.stderr)}")

    def check_import(self):
        """Import the script in a process without a GPU, in an empty folder, and see what it did."""
        with tempfile.TemporaryDirectory() as scratch:
            work, result = Path(scratch) / "work", Path(scratch) / "seen.json"
            work.mkdir()
            env = {k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if k in os.environ}
            env |= {"CUDA_VISIBLE_DEVICES": "", "HOME": scratch, "TMPDIR": scratch}
            script = (self.folder / "train_gpt.py").resolve()
            try:
                done = subprocess.run([sys.executable, "-B", "-c", IMPORT_PROBE, str(script), str(result)], cwd=work,
                                      env=env, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL)
            except subprocess.TimeoutExpired:
                return self.fault("import_failed", "train_gpt.py: the import did not end within 180 s")
            if not result.is_file():
                why = last_line(done.stderr) or "exited during the import"
                return self.fault("import_failed", f"train_gpt.py: {why}")
            seen = json.loads(result.read_text())
            seen += [f"leaves {path.name} in the working directory" for path in sorted(work.iterdir())]
        for what in dict.fromkeys(seen):
            self.fault("import_effect", f"train_gpt.py: importing it {what}")


# Runs in a fresh interpreter: argv is the script and the file that gets the list of what its import did.
# An act counts as the script's where the nearest caller outside the standard library is the script itself;
# network, threads and CUDA count whoever started them.
IMPORT_PROBE = r'''
import importlib.util, json, os, sys, threading
script, result = sys.argv[1], sys.argv[2]
library, seen = os.path.dirname(os.__file__), []
sys.argv = [script]

def by_script():
    frame = sys._getframe(2)
    while frame:
        name = frame.f_code.co_filename
        if name == script:
            return True
        if name.startswith("<frozen importlib") or not (
                name.startswith(("<frozen", "<string>")) or name.startswith(library) and "site-packages" not in name):
            return False
        frame = frame.f_back
    return False

FILES = {"open": "opens", "os.listdir": "lists", "os.scandir": "lists", "os.mkdir": "makes", "os.remove": "removes"}
ALWAYS = {"socket.connect": "connects to a network", "socket.getaddrinfo": "looks up a network name"}
STARTS = {"subprocess.Popen": "starts a process", "os.system": "starts a process"}

def audit(event, args):
    if event in FILES and by_script():
        seen.append("%s the file %s" % (FILES[event], args[0]))
    elif event in ALWAYS:
        seen.append(ALWAYS[event])
    elif event in STARTS and by_script():
        seen.append(STARTS[event])

get, loop = os._Environ.__getitem__, os._Environ.__iter__
def read(self, key):
    if by_script():
        seen.append("reads the environment variable %s" % key)
    return get(self, key)
def iterate(self):
    if by_script():
        seen.append("reads the environment")
    return loop(self)

class Screen:
    def __init__(self, stream):
        self.stream = stream
    def write(self, text):
        if by_script():
            seen.append("prints")
        return self.stream.write(text)
    def __getattr__(self, name):
        return getattr(self.stream, name)

os._Environ.__getitem__, os._Environ.__iter__ = read, iterate
sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
threads, home = threading.active_count(), os.getcwd()
sys.addaudithook(audit)
spec = importlib.util.spec_from_file_location("train_gpt", script)
module = importlib.util.module_from_spec(spec)
sys.modules["train_gpt"] = module
spec.loader.exec_module(module)
events, seen = list(seen), []
if threading.active_count() > threads:
    events.append("starts a thread")
if os.getcwd() != home:
    events.append("changes the working directory")
torch = sys.modules.get("torch")
if hasattr(torch, "cuda") and torch.cuda.is_initialized():
    events.append("initialises CUDA")
if hasattr(torch, "distributed") and torch.distributed.is_available() and torch.distributed.is_initialized():
    events.append("starts torch.distributed")
with open(result, "w") as file:
    json.dump(events, file)
'''


def last_line(text):
    """The last line of an error output that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def rounds_to(value, figure):
    """Whether `value`, rounded to the decimals of the text `figure`, is that figure."""
    return abs(value - float(figure)) <= 0.5001 * 10.0 ** -len(figure.split(".")[1])


def same_hardware(declared, ran):
    """Whether two descriptions have the same number of GPUs of one kind: '8xH100 80GB SXM' and '8xH100 80GB HBM3'."""
    def short(text):
        match = re.search(r"(\d+)\s*[x×]\s*(?:NVIDIA )?([A-Z]+\d+)", text or "", re.IGNORECASE)
        return (match[1], match[2].upper()) if match else (text or "").strip().upper()
    return short(declared) == short(ran)


# -------------------------------------------------------------------------------------------------
# 7 Command line
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
    out = submission(logs, args.author, args.github_id, args.name, args.blurb, args.date, args.track, args.summary,
                     dict(item.split("=", 1) for item in args.attribution), args.record_bpb, args.record_nats)
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
