"""Runs variants of settings, one after another or one on each GPU, and compares their final scores.

    python logs/tools/sweep.py variants.txt --out DIR                 one run at a time
    python logs/tools/sweep.py variants.txt --out DIR --limit-s 7200  none that would end later
    python logs/tools/sweep.py variants.txt --out DIR --gpus 0 1 2 3  four at a time
    python logs/tools/sweep.py variants.txt --out DIR --launch "torchrun --nproc_per_node=8"

A line of the table is a name and its settings; `all` gives those of all variants below it. SEED may
be a list; seeds are outermost, so that a sweep that is cut short lacks seeds, not variants:

    all       PRESET=sample MAX_WALLCLOCK_SECONDS=100 SEED=1337,42,7
    hybrid                                        # the others are compared with the first
    gdn_only  STACK="gdn*5"

DIR gets each run's log, results.json and results.md. Called again, it goes on: what has ended with
the same settings and script is not repeated; a log that is begun again is kept as <name>.old.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from statistics import mean

from report import (COUNT_FORMAT, DASH, SCORE_FORMAT, ReportError, cell, markdown, parse_log,
                    plain_output, stdev)

SCRIPT = Path(__file__).resolve().parents[2] / "train_gpt.py"
TITLES = ("variant", "settings", "seeds", "final bpb", "difference", "beyond the seed spread",
          "steps", "tok/s", "total bytes", "remarks")


def read_table(path):
    """{variant: {setting: value}} of the table at `path`, SEED a list; ReportError if it is bad."""
    shared, variants = {}, {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        name = words[0]
        settings = {}
        if name in variants or not re.fullmatch(r"[\w-]+", name):
            raise ReportError(f"{path}:{number}: '{name}' is named twice, or not of a-z 0-9 _ -")
        for word in words[1:]:
            key, equals, settings[key] = word.partition("=")
            if not equals or not key.isupper() or key in ("RUN_ID", "OUT_DIR"):
                raise ReportError(f"{path}:{number}: '{word}' is not NAME=value, or is set here")
        if name == "all":
            shared |= settings
        else:
            variants[name] = {"SEED": "1337"} | shared | settings
    if not variants:
        raise ReportError(f"{path}: no variant; give lines 'name NAME=value ...'")
    return {name: s | {"SEED": s["SEED"].split(",")} for name, s in variants.items()}


def outcome(log_path):
    """{val_bpb, steps, ...} of a log that has ended; else empty."""
    try:
        log = parse_log(log_path)
    except ReportError:
        return {}
    if not log.finished:
        return {}
    return dict(val_bpb=log.final.bpb, val_loss=log.final.val_loss, verdict=log.verdict,
                steps=log.steps, tok_s=log.tok_s, total_bytes=log.total_bytes)


def run_one(command, settings, out, run_id, gpus):
    """Run the script once, on these GPUs unless None; its outcome or {error}, and its seconds."""
    log_path = out / f"{run_id}.txt"
    began = time.monotonic()
    if log_path.exists():
        log_path.replace(log_path.with_suffix(".old"))
    env = os.environ | settings | {"RUN_ID": run_id, "OUT_DIR": str(out)}
    if gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpus
    done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True)
    result = outcome(log_path)
    if not result:  # the first error is the cause: torchrun writes its own below it
        lines = [line.strip() for line in done.stderr.split("\n") if line.strip()]
        errors = [line for line in lines if re.match(r"(error|[\w.]*Error): ", line)] + lines[-1:]
        result = dict(error=errors[0] if errors else f"exit code {done.returncode}, no score")
    return result | dict(seconds=round(time.monotonic() - began, 1))


def results_table(variants, runs):
    """Markdown: mean ± std over seeds, and the difference of the means to the first variant.

    Beyond the seed spread: it exceeds the larger of the two deviations over seeds.
    """
    rows = []
    first = None
    for name, settings in variants.items():
        mine = [runs[f"{name}-seed{s}"] for s in settings["SEED"] if f"{name}-seed{s}" in runs]
        ended = [run for run in mine if "val_bpb" in run]
        bpbs = [run["val_bpb"] for run in ended]
        first = bpbs if first is None else first
        difference, beyond = None, None
        if bpbs and first and bpbs is not first:
            difference = mean(bpbs) - mean(first)
            if min(len(bpbs), len(first)) > 1:
                beyond = "yes" if abs(difference) > max(stdev(bpbs), stdev(first)) else "no"
        changed = [f"{k}={v}" for k, v in settings.items()
                   if k != "SEED" and any(other.get(k) != v for other in variants.values())]
        remarks = dict.fromkeys(run.get("error") or run["verdict"] for run in mine)
        missing = len(settings["SEED"]) - len(mine)
        remarks |= {f"{missing} not run": None} if missing else {}
        counts = [[run[key] for run in ended] for key in ("steps", "tok_s", "total_bytes")]
        counts = [[mean(values)] if values and None not in values else [] for values in counts]
        rows.append([name, " ".join(changed) or DASH, f"{len(ended)} of {len(settings['SEED'])}",
                     cell(bpbs, SCORE_FORMAT), cell([difference], "{:+.5f}"), beyond or DASH,
                     *(cell(values, COUNT_FORMAT) for values in counts), "; ".join(remarks)])
    return markdown(TITLES, rows, [title not in TITLES[:2] + TITLES[-1:] for title in TITLES])


def sweep(variants, out, command, code_sha256, limit_s, places):
    """Run what is not finished yet and write the results after every run; returns {run: outcome}.

    places: the GPUs of each run at a time, for CUDA_VISIBLE_DEVICES; None leaves them alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.json"
    known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    began = time.monotonic()
    lock, free = threading.Lock(), SimpleQueue()
    todo, runs = [], {}
    for i in range(max(len(settings["SEED"]) for settings in variants.values())):
        for name, settings in variants.items():
            for seed in settings["SEED"][i:i + 1]:
                todo.append((f"{name}-seed{seed}", settings | {"SEED": seed}))
    for place in places:
        free.put(place)

    def write():
        results.write_text(json.dumps(known | runs, indent=1) + "\n", encoding="utf-8")
        table = results_table(variants, runs)
        (out / "results.md").write_text(table + "\n", encoding="utf-8")

    def work(job):
        """Do one run, unless it is done or would end too late."""
        run_id, settings = job
        ran = dict(settings=settings, code_sha256=code_sha256)
        old = known.get(run_id, {})
        if old == old | ran and "val_bpb" in old and outcome(out / f"{run_id}.txt"):
            runs[run_id] = old
            return
        longest = max((run["seconds"] for run in (known | runs).values()), default=0.0)
        if limit_s and time.monotonic() - began + longest > limit_s:
            print(f"{run_id}: not started, {longest:.0f} s more would be too late", flush=True)
            return
        place = free.get()
        done = run_one(command, settings, out, run_id, place) | ran
        free.put(place)
        with lock:
            runs[run_id] = done
            write()
        told = done.get("error") or done["val_bpb"]
        print(f"{run_id}: {told} ({done['seconds']:.0f} s)", flush=True)

    pool = ThreadPoolExecutor(len(places))
    try:
        list(pool.map(work, todo))
    finally:  # Ctrl-C starts no more runs
        pool.shutdown(cancel_futures=True)
    write()
    return runs


def main(argv=None):
    """The command line; returns 0, 1 if a run failed or is missing, 2 for bad input."""
    p = argparse.ArgumentParser(prog="sweep.py", description="Runs variants of settings.")
    p.add_argument("table", help="lines 'name NAME=value ...'; 'all NAME=value ...' for all below")
    p.add_argument("--out", required=True, metavar="DIR", help="logs and results; goes on if there")
    p.add_argument("--launch", default=sys.executable, help="what starts the script; this Python")
    p.add_argument("--script", default=SCRIPT, metavar="FILE")
    p.add_argument("--limit-s", type=float, default=0.0, help="start no run that would end later")
    p.add_argument("--gpus", nargs="+", default=[None], metavar="N", help="one run at a time on "
                   "each of these; '0,1 2,3' for pairs, with torchrun as --launch")
    args = p.parse_args(argv)
    plain_output()
    try:
        variants = read_table(args.table)
        code_sha256 = hashlib.sha256(Path(args.script).read_bytes()).hexdigest()
        command = [*shlex.split(args.launch), str(args.script)]
        runs = sweep(variants, Path(args.out), command, code_sha256, args.limit_s, args.gpus)
    except (ReportError, OSError, ValueError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    print("\n" + results_table(variants, runs))
    wanted = sum(len(settings["SEED"]) for settings in variants.values())
    return int(sum("val_bpb" in run for run in runs.values()) != wanted)


if __name__ == "__main__":
    sys.exit(main())
