"""Kill PRESET=sample at random moments with SIGKILL, start the same command again, compare with an undisturbed run.

    python tests/faults.py [--points 24] [--seed 0] [--iterations 24]        minutes on 2 CPU cores

Steps are counted, not timed (MAX_WALLCLOCK_SECONDS=0), so that both runs do the same; checkpoints every 2 s.  Prints
one row per point: when it was killed and after which line of the log, where it went on, steps lost, and whether every
file left was whole and the final score is equal to the last digit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, parse, values

import train_gpt as t

COLUMNS = "killed_at_s after went_on_at steps_lost files_whole final_equal".split()


def start(folder, iterations):
    """The sample run in a process of its own, its log on a pipe."""
    env = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ} | dict(
        PRESET="sample", DEVICE="cpu", OUT_DIR=str(folder), RUN_ID="x", RESUME="auto", ITERATIONS=str(iterations),
        MAX_WALLCLOCK_SECONDS="0", CHECKPOINT_EVERY_SECONDS="2", EVAL_SAVE_SECONDS="2",
        TRAIN_LOG_EVERY="1", EVAL_DIAGNOSTICS="0")
    return subprocess.Popen([sys.executable, str(ROOT / "train_gpt.py")], env=env, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def whole_run(folder, iterations):
    """Output and seconds of a run to its end; raises RuntimeError if it does not end well."""
    began, process = time.monotonic(), start(folder, iterations)
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}:\n{out[-2000:]}")
    return out, time.monotonic() - began


def files_are_whole(folder):
    """Whether everything that looks like a checkpoint or an artifact is one."""
    try:
        for path in folder.rglob("*.npz"):
            t.load_tensors(path)
        for path in folder.rglob("*.artifact"):
            t.load_artifact(path)
    except t.GolfError as error:
        print(error)
        return False
    return True


def killed_run(folder, seconds, iterations, final):
    """One row of the table: kill after `seconds`, start again, compare with the undisturbed final line."""
    process = start(folder, iterations)
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
    lines = parse(out)
    steps = [int(pairs["step"].split("/")[0]) for event, pairs in lines if event == "" and "step" in pairs]
    after = "start" if not lines else lines[-1][0] or f"step {steps[-1]}"
    whole = files_are_whole(folder)
    again, _ = whole_run(folder, iterations)
    resumed = [pairs for event, pairs in parse(again) if event == "resume"]
    at = "the beginning" if not resumed else "the artifact" if resumed[0]["exported"] == "1" else (
        "the trained weights" if resumed[0]["trained"] == "1" else f"step {resumed[0]['step']}")
    lost = max(steps, default=0) - (int(resumed[0]["step"]) if resumed else 0)
    ended = "this run has ended" in again
    found = values((folder / "x.txt").read_text() if ended else again, "final")
    return dict(zip(COLUMNS, (f"{seconds:.1f}", after, "its end" if ended else at, 0 if ended else lost, whole,
                              found == final), strict=True))


def main():
    """Run all points, print the table; the exit code is 1 if a point did not end as the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=24)
    options = parser.parse_args()
    rng, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as folder:
        out, total_s = whole_run(Path(folder) / "undisturbed", options.iterations)
        final = values(out, "final")
        print(f"undisturbed: {total_s:.1f} s, val_bpb {final['val_bpb']}", flush=True)
        for point in range(options.points):
            at = total_s * (point + rng.random()) / options.points
            rows.append(killed_run(Path(folder) / str(point), at, options.iterations, final))
            print(rows[-1], flush=True)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join("yes" if v is True else "NO" if v is False else str(v) for v in row.values()) + " |")
    return int(not all(row["files_whole"] and row["final_equal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
