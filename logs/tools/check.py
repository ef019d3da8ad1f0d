"""Review of a submission folder, as a reviewer of the challenge would do it.

    python logs/tools/check.py FOLDER      prints every fault; exit code 1 if there is one

The folder holds README.md, submission.json, train_gpt.py, requirements.txt, train_seed<seed>.log of
at least three seeds. Numbers must follow from the logs, the logs must be those of the script, and
the script must import on a CPU without effects. verify.py audits each log. If the folder also
holds its artifact (*<seed>*.artifact), and --data and --tokenizer (or the log's paths) exist, it
repeats the scores, all of them on a GPU, the first --sample targets on a CPU; that runs the
folder's script. Reading order: review(), then what it calls.
"""

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
from pathlib import Path
from statistics import mean

import torch
import verify
from report import (CAP_BYTES, CHECKS, TIME_LIMIT_S, ReportError, derived_compliance, differences,
                    integer, logged_fields, number, parse_log, plain_output, stdev)

REQUIRED_FILES = ("README.md", "submission.json", "train_gpt.py", "requirements.txt")
TEXTS = ("author", "github_id", "name", "blurb", "date", "track", "technique_summary")
# Fields of submission.json that follow from the logs -> the kind of fault if they do not.
DERIVED = dict(val_loss="mean", val_bpb="mean", val_bpb_std="mean", seeds="seeds",
               seed_results="seed_result", bytes_total="total_bytes", bytes_code="code_bytes",
               hardware="environment", pytorch_version="environment")
# Bytes per token of the challenge's validation split by tokenizer: a score with others is wrong.
BYTES_PER_TOKEN = {"fineweb_1024_bpe": 2.43593, "fineweb_4096_bpe": 3.3197,
                   "fineweb_8192_bpe": 3.72663}
IMPORT_PROBE = Path(__file__).with_name("import_probe.py")
ROUNDING = 5.1e-6  # submissions give five decimals or more
DATE = r"20\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"


class Faults(list):
    """The faults found so far, each (kind, text); a kind is one word."""

    def add(self, kind, text):
        """A fault."""
        self.append((kind, text))

    def expect(self, kind, what, found, truth, slack=0.0):
        """A fault unless `found` is `truth`, tables key by key; numbers may differ by `slack`."""
        if isinstance(found, dict) and isinstance(truth, dict):
            for key in truth | found:
                self.expect(kind, f"{what} {key}", found.get(key), truth.get(key), slack)
            return
        numbers = isinstance(found, (int, float)) and isinstance(truth, (int, float))
        if not (abs(found - truth) <= slack if numbers else found == truth):
            self.add(kind, f"{what} is {found}, expected {truth}")


def review(folder, **options):
    """(Faults, [note]) of the folder; a missing file is one fault, not the end.

    options: data, tokenizer, sample of verify_runs.
    """
    folder = Path(folder)
    faults, notes = Faults(), []
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder")
    for name in REQUIRED_FILES:
        if not (folder / name).is_file():
            faults.add("missing_file", f"{name} is not in the folder")
    if not re.fullmatch(DATE + r"_\w.*", folder.resolve().name):
        notes.append(f"the folder's name, {folder.resolve().name}, is not YYYY-MM-DD_Name")
    script = folder / "train_gpt.py"
    code = script.read_bytes() if script.is_file() else None
    logs = read_logs(folder, faults)
    for log in logs:
        check_log(log, code, faults)
    if found := differences(logs):
        faults.add("configurations_differ", "; ".join(found))
    check_json(folder / "submission.json", logs, code, faults)
    check_readme(folder / "README.md", logs, faults, notes)
    if code is not None:
        check_python(code, faults, notes)
        check_import(folder, faults)
        verify_runs(folder, logs, faults, notes, **options)
    return faults, notes


def read_logs(folder, faults):
    """The finished logs of the folder; artifacts beside them must have the sizes that they say."""
    paths = sorted(folder.glob("train_seed*.log"))
    logs = []
    if len(paths) < 3:
        faults.add("missing_logs", f"{len(paths)} of at least 3 logs train_seed<seed>.log")
    for path in paths:
        try:
            log = parse_log(path)
        except ReportError as error:
            faults.add("log_unreadable", str(error))
            continue
        if log.ours and log.finished:
            logs.append(log)
        else:
            faults.add("log_unfinished", f"{path.name}: no run, final, size or compliance line")
    sizes = [log.model_bytes for log in logs]
    for path in folder.glob("*.artifact"):
        if (size := path.stat().st_size) not in sizes:
            faults.add("artifact_bytes", f"{path.name}: {size} bytes, the logs say {sizes}")
    return logs


def verify_runs(folder, logs, faults, notes, data=None, tokenizer=None, sample=4096):
    """What verify.py finds of each log, with its artifact if that and the text are at hand."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for log in logs:
        _, args = verify.parse([str(log.path), "--script", str(folder / "train_gpt.py")])
        args.data, args.tokenizer = data or args.data, tokenizer or args.tokenizer
        args.sample = 0 if device == "cuda" else sample
        artifacts = [path for path in folder.glob("*.artifact")  # of seed 7, not of 1337
                     if str(log.seed) in re.findall(r"\d+", path.name)]
        part = "log and script only: no artifact, or no text"
        if artifacts and Path(args.data).is_dir() and Path(args.tokenizer).is_file():
            args.artifact, args.fast = str(artifacts[0]), device == "cuda"
            part = f"the first {sample:,} targets" if args.sample else "all targets"
        try:
            for claim, found, verdict in verify.verify(log, args):
                if verdict == "DIFFERS":
                    faults.add("verify", f"{log.path.name}: {claim}: {found}")
        except (ReportError, ValueError, OSError, SyntaxError) as error:
            faults.add("verify", f"{log.path.name}: {error}")
        notes.append(f"{log.path.name}: verified on {device}: {part}")


def check_log(log, code, faults):
    """One log against its name, the script, the limits, and itself."""
    name = log.path.name
    final, told = log.final, log.compliance
    own = log.scores.get(final.method) or final._replace(bpb=math.nan)
    wanted = log.config.get("final_score", final.method)
    tokens = final.tokens or math.nan
    ratio = (final.num_bytes or math.nan) / tokens
    split = integer(log.last("model").get("val_tokens")) or tokens + 1
    tokenizer = Path(log.config.get("tokenizer_path", "fineweb_1024_bpe.model")).stem
    is_known = "fineweb10B" in log.config.get("data_path", "fineweb10B")  # the challenge's text
    known = BYTES_PER_TOKEN.get(tokenizer, ratio) if is_known else ratio
    counts = [log.order.count(event) for event in ("run", "final", "compliance")]
    size = log.code_bytes or 0
    if code is not None:
        digest = hashlib.sha256(code).hexdigest()
        faults.expect("code_bytes", f"{name}: code_bytes", size, len(code))
        faults.expect("code_sha256", f"{name}: SHA-256", log.run.get("code_sha256"), digest)
    for kind, what, found, truth, slack in (
            ("log_seed", "its name", name, f"train_seed{log.seed}.log", 0),
            ("total_bytes", "total", log.total_bytes, size + log.model_bytes, 0),
            ("log_inconsistent", "counts of run, final, compliance lines", counts, [1, 1, 1], 0),
            ("log_inconsistent", "total_bytes", told.get("total_bytes"), str(log.total_bytes), 0),
            ("final_method", "method", final.method, wanted, 0),
            ("final_method", "final val_loss", final.val_loss, own.val_loss, 0),
            ("final_method", "final val_bpb", final.bpb, own.bpb, 0),
            ("coverage", "tokens_scored", integer(told.get("tokens_scored")), tokens, 0),
            ("coverage", "tokens of the final line", tokens, split - 1, 0),
            ("bytes_per_token", "val_loss", final.val_loss, final.bpb * math.log(2) * ratio, 1e-5),
            ("bytes_per_token", "its ratio", number(told.get("bytes_per_token")), ratio, 1e-5),
            ("bytes_per_token", f"with {tokenizer} it", ratio, known, 0.005 * known),
            ("size_cap", "cap_bytes", integer(told.get("cap_bytes")), CAP_BYTES, 0)):
        faults.expect(kind, f"{name}: {what}", found, truth, slack)
    for kind, found, limit in (
            ("size_cap", max(log.total_bytes, log.model_bytes + len(code or b"")), CAP_BYTES),
            ("train_time", number(told.get("train_s")), TIME_LIMIT_S),
            ("train_time", number(log.last("hessians").get("hessian_end_s", 0)), TIME_LIMIT_S),
            ("eval_time", number(told.get("eval_s")), TIME_LIMIT_S)):
        if found is None or not found <= limit:
            faults.add(kind, f"{name}: {found}, the limit is {limit:,}")
    scored = [i for i, event in enumerate(log.order) if event.startswith(("final", "ttt"))]
    if scored and "run" in log.order[scored[0]:]:
        faults.add("rerun", f"{name}: the run was started again when it had shown a score")
    if log.run.get("commit", "").endswith("-dirty"):
        faults.add("dirty_commit", f"{name}: the script was not that of {log.run['commit']}")
    if broken := [f"{k}:{told.get(k)}" for k in (*CHECKS, "verdict") if told.get(k) != "ok"]:
        faults.add("compliance", f"{name}: {' '.join(broken)}")
    stop_s = log.stopped[0] if log.stopped else None
    later = (log.train_s or math.nan) - (stop_s or math.nan)  # calibration follows the stop
    if later < -0.1 or later > 0.1 and not log.hessian_s:
        faults.add("log_inconsistent", f"{name}: training ended {later:.1f} s after it stopped")


def check_json(path, logs, code, faults):
    """submission.json: its fields, and the values of those that follow from the logs."""
    if not path.is_file():
        return
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        kinds = dict.fromkeys(TEXTS, str) | dict.fromkeys(DERIVED, object)
        kinds |= dict.fromkeys(("seed_results", "compliance", "attribution"), dict)
        missing = kinds.keys() - told.keys()
    except (ValueError, AttributeError) as error:  # no JSON, or not an object
        faults.add("json_invalid", f"{path.name}: {error}")
        return
    if missing:
        faults.add("json_field", f"{path.name}: missing: {', '.join(sorted(missing))}")
    for key in [key for key in kinds if key in told]:
        good = isinstance(told[key], kinds[key]) and str(told[key]).strip()
        if not good or key == "date" and not re.fullmatch(DATE, told[key]):
            faults.add("json_type", f"{path.name}: {key} is {json.dumps(told.pop(key))[:60]}")
    if not logs:
        return
    truth = logged_fields(logs) | ({} if code is None else {"bytes_code": len(code)})
    for key in [key for key in DERIVED if key in told]:
        found, wanted = comparable(key, told[key]), comparable(key, truth[key])
        faults.expect(DERIVED[key], f"{path.name}: {key}", found, wanted, ROUNDING)
    if told.get("track", "").removeprefix("track_") == "10min_16mb":
        machine = comparable("hardware", truth["hardware"])
        faults.expect("environment", "the machine of track 10min_16mb", machine, "8xH100")
    for key, held in derived_compliance(logs).items() if "compliance" in told else ():
        claim = told["compliance"].get(key)
        if not (claim is True and held):
            faults.add("compliance_claim", f"{path.name}: {key} is {claim}, by the logs {held}; "
                       "an entry needs true")


def comparable(key, value):
    """A field as it can be compared: machine as number and kind of its GPUs, seeds in order."""
    if key == "seeds" and isinstance(value, list):
        return sorted(map(str, value))
    gpus = re.search(r"(\d+)\s*[x×]\s*(?:NVIDIA )?([A-Z]+\d+)", str(value), re.IGNORECASE)
    return f"{gpus[1]}x{gpus[2].upper()}" if key == "hardware" and gpus else value


def is_among(figure, values):
    """Whether one of `values` gives the text `figure` when it is rounded to its decimals."""
    slack = 0.5001 * 10.0 ** -len(figure.split(".")[1])
    return any(abs(value - float(figure)) <= slack for value in values)


def check_readme(path, logs, faults, notes):
    """The README's mean and deviation, and the numbers in its table rows of single seeds.

    In such a row scores (4 decimals or more) and counts (1,000 or more) must be those of its log.
    """
    if not path.is_file() or not logs:
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    average = mean(log.final.bpb for log in logs)
    if not any(is_among(figure, [average]) for figure in re.findall(r"\d\.\d{4,}", text)):
        faults.add("readme_score", f"{path.name} lacks the mean of the logs, {average:.5f} bpb")
    spreads = []
    for same in zip(*(log.scores.values() for log in logs)):
        if len(same) > 1:
            spreads += [stdev([s.bpb for s in same]), stdev([s.val_loss for s in same])]
    for figure in re.findall(r"± *(\d\.\d{4,})", text):
        if not is_among(figure, spreads):
            faults.add("readme_score", f"{path.name}: ± {figure} is no deviation of the scores")
    if not re.search(r"\btrack[ -]?[AB]\b", text, re.IGNORECASE):
        notes.append("README.md does not declare Track A (nothing built from scored tokens) or B")
    for log in logs:
        counts = [log.seed, log.steps, log.peak_mib, round(log.tok_s or 0)]
        counts += [log.model_bytes, log.total_bytes, log.code_bytes]
        values = []
        for s in (*log.scores.values(), log.final):
            values += [s.bpb, s.val_loss]
            counts += [s.tokens, s.num_bytes]
        rows = [row for row in text.splitlines() if re.search(rf"\|[ *`]*{log.seed}[ *`]*\|", row)]
        for figure in re.findall(r"(?<![\d.,-])\d\.\d{4,}(?![\d.])", " ".join(rows)):
            if float(figure) >= 0.5 and not is_among(figure, values):
                faults.add("readme_seed", f"{path.name}: {figure} is not in the log of {log.seed}")
        for figure in re.findall(r"(?<![\w.,-])\d[\d,]{3,}(?![\w.,-])", " ".join(rows)):
            if int(figure.replace(",", "")) not in counts:
                faults.add("readme_seed", f"{path.name}: {figure} is not in the log of {log.seed}")


def check_python(code, faults, notes):
    """Python 3.10, or this Python by the rules of 3.10, compiles it; no exec wrapper."""
    try:
        tree = ast.parse(code, filename="train_gpt.py", feature_version=(3, 10))
    except (SyntaxError, ValueError) as error:
        faults.add("python310", f"train_gpt.py: {error}")
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("exec", "eval"):
            faults.add("exec_wrapper", f"train_gpt.py: {node.func.id}() in line {node.lineno}")
    python = shutil.which("python3.10") or sys.executable
    compile_it = ("import sys; print('%d.%d' % sys.version_info[:2], flush=True); "
                  "compile(sys.stdin.buffer.read(), 'train_gpt.py', 'exec')")
    done = subprocess.run([python, "-I", "-c", compile_it], input=code, capture_output=True)
    version = done.stdout.decode().strip()  # none: a shim that starts nothing
    notes.append("syntax of Python 3.10 checked by the parser here and the compiler of Python "
                 f"{version or '(python3.10 does not start)'}")
    if version and done.returncode:
        last = done.stderr.decode().strip().split("\n")[-1]
        faults.add("python310", f"train_gpt.py: Python {version}: {last}")


def check_import(folder, faults):
    """Import the script in a process without a GPU, in an empty folder, and see what it did."""
    with tempfile.TemporaryDirectory() as scratch:
        env = {k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH") if k in os.environ}
        env |= {"CUDA_VISIBLE_DEVICES": "", "HOME": scratch, "TMPDIR": scratch}
        command = [sys.executable, "-B", IMPORT_PROBE, folder.resolve()]
        try:
            done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True,
                                  timeout=180, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return faults.add("import_failed", "train_gpt.py: its import took more than 180 s")
    *printed, seen = done.stdout.split("\n")
    if not seen.startswith("["):
        why = done.stderr.strip().split("\n")[-1] or "exited during the import"
        faults.add("import_failed", f"train_gpt.py: {why}")
        return
    for what in dict.fromkeys(json.loads(seen) + ["prints"] * any(printed)):
        faults.add("import_effect", f"train_gpt.py: importing it {what}")


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for a folder with faults, 2 for bad input."""
    plain_output()
    p = argparse.ArgumentParser(prog="check.py", description="Review of a submission folder.")
    p.add_argument("folder")
    p.add_argument("--data", help="folder of the validation shards (default: the log's)")
    p.add_argument("--tokenizer", help="SentencePiece model (default: the log's)")
    p.add_argument("--sample", type=int, default=4096, help="targets that a CPU scores again")
    args = p.parse_args(argv)
    try:
        faults, notes = review(**vars(args))
    except (ReportError, OSError) as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 2
    for kind, text in [*faults, *(("", text) for text in notes)]:
        print(f"fault {kind}: {text}" if kind else f"note: {text}")
    print(f"{args.folder}: {len(faults)} fault(s)")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
