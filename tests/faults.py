"""Kill PRESET=sample at random moments, start the same command again, compare with a whole run.

    python tests/faults.py [--points 24] [--seed 0] [--iterations 24]     minutes on 2 CPU cores

Steps are counted, not timed, so that both runs do the same; a checkpoint every 2 s.  One row a
point: when it was killed, after which line of the log, where it went on, steps that were lost, and
whether the final score is equal to the last digit.  A file that is not whole ends the program.
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

from conftest import launch, parse, values

import train_gpt as t


def command(folder, iterations):
    """The sample run in a process of its own."""
    return launch(dict(PRESET="sample", DEVICE="cpu", OUT_DIR=str(folder), RUN_ID="x",
                       RESUME="auto", ITERATIONS=str(iterations), MAX_WALLCLOCK_SECONDS="0",
                       CHECKPOINT_EVERY_SECONDS="2", TRAIN_LOG_EVERY="1", EVAL_DIAGNOSTICS="0"))


def killed_run(folder, seconds, iterations, final):
    """One row of the table."""
    process = command(folder, iterations)
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
    lines = parse(out)
    steps = [int(pairs["step"].split("/")[0]) for event, pairs in lines if not event]
    for path in folder.rglob("*.ckpt"):
        t.load_tensors(path)  # GolfError if it is not whole
    for path in folder.rglob("*.artifact"):
        t.load_artifact(path)
    again, err = command(folder, iterations).communicate()
    if "this run has ended" in err:
        again = (folder / "x.txt").read_text()
    went_on = next((int(pairs["step"]) for event, pairs in parse(again) if event == "resume"), 0)
    return dict(killed_at_s=f"{seconds:.1f}", after=lines[-1][0] or "step" if lines else "start",
                went_on_at=went_on, steps_lost=max(steps, default=0) - went_on,
                final_equal=values(again, "final") == final)


def main():
    """Print the table; the exit code is 1 if a point did not end as the whole run."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("points", 24), ("seed", 0), ("iterations", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        out, _ = command(Path(folder) / "whole", options.iterations).communicate()
        final = values(out, "final")
        total_s = time.monotonic() - began
        for point in range(options.points):
            at = total_s * (point + rng.random()) / options.points
            row = killed_run(Path(folder) / str(point), at, options.iterations, final)
            heading = "| " + " | ".join(row) + " |\n|" + "---|" * len(row) + "\n"
            print(("" if point else heading) + "| " + " | ".join(map(str, row.values())) + " |",
                  flush=True)
            equal &= row["final_equal"]
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
