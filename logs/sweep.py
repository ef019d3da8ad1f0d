"""Runs variants of settings on this machine, one after another or one on each GPU, and tables their final scores.

    python logs/sweep.py variants.txt --out DIR                         seeds outermost, so that a cut costs seeds
    python logs/sweep.py variants.txt --out DIR --limit-s 7200          starts nothing that would not end in 2 h
    python logs/sweep.py variants.txt --out DIR --launch "torchrun --standalone --nproc_per_node=8"
    python logs/sweep.py variants.txt --out DIR --gpus 0 1 2 3          four runs at a time, each on one GPU

A line of the table is a name and its settings; `all` gives those of all variants below it; SEED may be a list:

    all       PRESET=sample MAX_WALLCLOCK_SECONDS=100 SEED=1337,42,7
    hybrid                                              # the first row is what the others are compared with
    gdn_only  STACK="gdn*5"

DIR gets each run's log, `results.json` and `results.md`.  Called again, it goes on: a run whose log has ended, with the
same settings and script, is not repeated; a log that is begun again is kept as <name>.old.
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

from report import COUNT_FORMAT, DASH, SCORE_FORMAT, ReportError, cell, last_line, markdown, parse_log, stdev


def read_table(path):
    """{variant: {setting: value}} of the table at `path`, SEED a list of strings; ReportError for a bad line."""
    variants = {"all": {}}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        name, pairs = words[0], [word.partition("=") for word in words[1:]]
        if name in variants and name != "all" or not name.replace("_", "").replace("-", "").isalnum():
            raise ReportError(f"{path}:{number}: variant '{name}' is named twice or has other characters than a-z0-9_-")
        if bad := [key for key, equals, _ in pairs if not equals or not key.isupper() or key in ("RUN_ID", "OUT_DIR")]:
            raise ReportError(f"{path}:{number}: '{bad[0]}' is no NAME=value; RUN_ID and OUT_DIR are set here")
        variants[name] = variants["all"] | {key: value for key, _, value in pairs}
    del variants["all"]
    if not variants:
        raise ReportError(f"{path}: no variant; give lines 'name NAME=value ...'")
    return {name: settings | {"SEED": settings.get("SEED", "1337").split(",")} for name, settings in variants.items()}


def outcome(log_path):
    """{val_bpb, steps, ...} of a log that has ended; empty for one that has not, or is not there."""
    try:
        log = parse_log(log_path)
    except ReportError:
        return {}
    return dict(val_bpb=log.final.bpb, val_loss=log.final.val_loss, method=log.final.method, steps=log.steps,
                tok_s=log.tok_s, total_bytes=log.total_bytes, verdict=log.verdict) if log.finished else {}


def run_one(command, settings, out, run_id, gpus):
    """Run the script once, on the GPUs given unless None; its outcome, or {error: one line}, and its seconds."""
    log_path, began = out / f"{run_id}.txt", time.monotonic()
    if log_path.exists():
        log_path.replace(log_path.with_suffix(".old"))
    env = os.environ | settings | {"RUN_ID": run_id, "OUT_DIR": str(out)}
    env |= {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.split("\n")  # the first error is the cause: torchrun writes its own behind it
    errors = [line.strip() for line in lines if re.match(r"(error|[\w.]*Error): ", line)] or [last_line(done.stderr)]
    failed = dict(error=errors[0] or f"ended with code {done.returncode}, no score")
    return (outcome(log_path) or failed) | dict(seconds=round(time.monotonic() - began, 1))


def summarize(variants, runs):
    """A dict per variant: its runs, mean and std of the bpb, and the difference to the first variant.

    beyond_spread: whether that difference exceeds the larger of the two standard deviations over seeds; None unless
    both variants have at least two seeds.
    """
    rows = []
    for name, settings in variants.items():
        mine = {seed: runs[f"{name}-seed{seed}"] for seed in settings["SEED"] if f"{name}-seed{seed}" in runs}
        bpbs = [run["val_bpb"] for run in mine.values() if "val_bpb" in run]
        rows.append(dict(name=name, settings=settings, runs=mine, mean=mean(bpbs) if bpbs else None,
                         std=stdev(bpbs) if len(bpbs) > 1 else None, difference=None, beyond_spread=None))
    for row in rows[1:]:
        if None not in (row["mean"], rows[0]["mean"]):
            row["difference"] = row["mean"] - rows[0]["mean"]
            if None not in (row["std"], rows[0]["std"]):
                row["beyond_spread"] = abs(row["difference"]) > max(row["std"], rows[0]["std"])
    return rows


def results_table(rows):
    """The rows of `summarize` in Markdown."""
    lines = []
    for row in rows:
        ended, wanted = [run for run in row["runs"].values() if "val_bpb" in run], len(row["settings"]["SEED"])
        notes = dict.fromkeys(run.get("error") or run["verdict"] for run in row["runs"].values())
        notes |= {f"{wanted - len(row['runs'])} not run": None} if len(row["runs"]) < wanted else {}
        means = [cell([mean(values)] if values and None not in values else [], COUNT_FORMAT)
                 for values in ([run[key] for run in ended] for key in ("steps", "tok_s", "total_bytes"))]
        own = " ".join(f"{k}={v}" for k, v in row["settings"].items()
                       if k != "SEED" and any(other["settings"].get(k) != v for other in rows))
        lines.append([row["name"], own or DASH, f"{len(ended)} of {wanted}",
                      cell([run["val_bpb"] for run in ended], SCORE_FORMAT), cell([row["difference"]], "{:+.5f}"),
                      {None: DASH, True: "yes", False: "no"}[row["beyond_spread"]], *means, "; ".join(notes)])
    titles = ["variant", "settings", "seeds", "final bpb", "difference", "beyond the seed spread", "steps", "tok/s",
              "total bytes", "remarks"]
    return markdown(titles, lines, [False, False] + [True] * 3 + [False] + [True] * 3 + [False])


def sweep(table, out, launch, script, limit_s, places=(None,)):
    """Run what is not finished yet, write the results after every run; returns the rows of `summarize`.

    places: the GPUs of each of the runs at a time, as CUDA_VISIBLE_DEVICES names them; None leaves them alone.
    """
    variants, out, began = read_table(table), Path(out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    results, code = out / "results.json", hashlib.sha256(Path(script).read_bytes()).hexdigest()
    known = json.loads(results.read_text(encoding="utf-8"))["all_runs"] if results.exists() else {}
    todo = [(name, settings | {"SEED": settings["SEED"][i]})
            for i in range(max(len(settings["SEED"]) for settings in variants.values()))
            for name, settings in variants.items() if i < len(settings["SEED"])]
    runs, lock, free, started = {}, threading.Lock(), SimpleQueue(), []

    def write():
        rows = summarize(variants, runs)
        results.write_text(json.dumps(dict(variants=rows, all_runs=known | runs), indent=1) + "\n", encoding="utf-8")
        (out / "results.md").write_text(results_table(rows) + "\n", encoding="utf-8")
        return rows

    def run(run_id, ran, place):
        try:
            done = run_one([*shlex.split(launch), str(script)], ran["settings"], out, run_id, place) | ran
            with lock:
                runs[run_id] = done
                write()
                print(f"{run_id}: {done.get('error') or done['val_bpb']} ({done['seconds']:.0f} s)", flush=True)
        finally:
            free.put(place)

    for place in places:
        free.put(place)
    with ThreadPoolExecutor(len(places)) as pool:
        for name, settings in todo:
            run_id, ran = f"{name}-seed{settings['SEED']}", dict(settings=settings, code_sha256=code)
            old = known.get(run_id, {})
            if "val_bpb" in old and outcome(out / f"{run_id}.txt") and all(old[key] == ran[key] for key in ran):
                with lock:
                    runs[run_id] = old
                continue
            place = free.get()  # waits until one is free
            with lock:
                longest = max((one["seconds"] for one in (known | runs).values()), default=0.0)
            if limit_s and time.monotonic() - began + longest > limit_s:
                print(f"{run_id}: not started, {longest:.0f} s do not fit in what is left of {limit_s:.0f} s",
                      flush=True)
                free.put(place)
                continue
            started.append(pool.submit(run, run_id, ran, place))
    for one in started:
        one.result()  # raises what the thread did
    return write()


def main(argv=None):
    """The command line; returns 0, 1 if a run failed or is missing, 2 for bad input."""
    p = argparse.ArgumentParser(prog="sweep.py", description="Runs of variants of settings, as a table.")
    p.add_argument("table", help="text file: a line 'name NAME=value ...' per variant, 'all NAME=value ...' for all")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of logs and results; called again, it goes on")
    p.add_argument("--launch", default=sys.executable, help="what starts the script; default: this Python")
    p.add_argument("--script", default=Path(__file__).resolve().parent.parent / "train_gpt.py", metavar="FILE")
    p.add_argument("--limit-s", type=float, default=0.0, metavar="S", help="start no run that would end after this")
    p.add_argument("--gpus", nargs="+", default=[None], metavar="N", help="run one variant on each of these at a time; "
                   "'0,1 2,3' for pairs, with torchrun as --launch")
    args = p.parse_args(argv)
    try:
        rows = sweep(args.table, args.out, args.launch, args.script, args.limit_s, args.gpus)
    except (ReportError, OSError, ValueError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    print("\n" + results_table(rows))
    ended = [len([run for run in row["runs"].values() if "val_bpb" in run]) for row in rows]
    return int(ended != [len(row["settings"]["SEED"]) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
