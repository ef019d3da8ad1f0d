"""Logs -> JSON lines, TensorBoard or Weights & Biases, from finished runs or running ones.

    python logs/tools/convert.py LOG... > runs.jsonl            every line of the logs as an object
    python logs/tools/convert.py LOG... --tensorboard runs/     then: tensorboard --logdir runs
    python logs/tools/convert.py LOG... --wandb PROJECT         uploads with your own login

Only the last two need a package: tensorboard with torch, or wandb (WANDB_MODE=offline writes
without a network). A LOG is what report.py takes.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from report import (ANY_SCORE, EVENT, MEMORY, PAIR, PREFIX, SIZE, STEP, STOPPED, ReportError,
                    collect, integer, number, plain_output)

TIMED = re.compile(r"-?\d+\.?\d*(ms|s|m)")
TEXT_KEYS = {"commit", "code_sha256", "date", "torch", "run_id"}  # digits that are no number


def value_of(key, text):
    """(key, value) as JSON has it: numbers as such, times in seconds under key_s, else text."""
    if key in TEXT_KEYS:
        return key, text
    if TIMED.fullmatch(text):
        return key.removesuffix("_s") + "_s", round(number(text), 6)
    if (whole := integer(text)) is not None:
        return key, whole
    plain = number(text) if not text[-1:].isalpha() else None
    return key, text if plain is None or plain != plain else plain


def record(line, ours):
    """The object of one line of a log, or None for a line without meaning for report.py."""
    pairs = dict(value_of(*pair) for pair in PAIR.findall(line))
    if match := STEP.match(line):
        pairs.pop("step", None)
        return dict(event="step", step=int(match[1]), planned_steps=int(match[2])) | pairs
    if match := STOPPED.fullmatch(line):
        return dict(event="stopping_early", train_time_s=number(match[1]), step=integer(match[2]))
    if match := SIZE.match(re.sub(r" \((un)?compressed\)", "", line)):
        return dict(event=match[1].lower().replace(" ", "_"), bytes=int(match[2]))
    if match := MEMORY.match(line):
        return dict(event="peak_memory", peak_mem_mib=int(match[1]))
    if ours and (match := EVENT.fullmatch(line)) or pairs and ANY_SCORE.search(line):
        event = match[1] if ours and match else line.split("val_loss")[0]
        return dict(event=re.sub(r"\W+", "_", event or "note").strip("_")) | pairs
    return None


def records(log):
    """Every line of a RunLog's file as an object, in order, each with the run's name."""
    for line in log.path.read_text(encoding="utf-8", errors="replace").splitlines():
        line = line[PREFIX.match(line).end():].rstrip()
        if line and (found := record(line, log.ours)):
            yield {"run": log.name} | found


def scalars(log):
    """(tag, step, seconds on the training clock or None, value) of all that has a step."""
    for step, point in sorted(log.train.items()):
        yield "train/loss", step, point.seconds, point.loss
        if point.tok_s:
            yield "train/tokens_per_second", step, point.seconds, point.tok_s
    for step, point in sorted(log.val.items()):
        yield "val/bpb", step, point.seconds, point.bpb
        if point.loss is not None:
            yield "val/loss", step, point.seconds, point.loss
    for tokens, bpb in log.series("ttt", "scored_tokens", "running_bpb"):
        yield "ttt/running_bpb", int(tokens), None, bpb


def summary(log):
    """The numbers that a run ends with; those that its log has."""
    found = {f"{name}_bpb": score.bpb for name, score in log.scores.items()}
    found |= dict(final_bpb=log.final and log.final.bpb, total_bytes=log.total_bytes,
                  model_bytes=log.model_bytes, train_s=log.train_s, eval_s=log.eval_s,
                  verdict=log.verdict)
    return {key: value for key, value in found.items() if value is not None}


def to_tensorboard(logs, folder):
    """A subfolder of event files for each log, its settings as text."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ReportError(f"--tensorboard: pip install torch tensorboard ({error})") from None
    for log in logs:
        with SummaryWriter(str(Path(folder) / log.name)) as writer:
            for tag, step, seconds, value in scalars(log):
                writer.add_scalar(tag, value, step, walltime=seconds)
            writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in log.config.items()))
            for key, value in summary(log).items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(f"summary/{key}", value, 0)


def to_wandb(logs, project):
    """A run of the project for each log."""
    try:
        import wandb
    except ImportError as error:
        raise ReportError(f"--wandb: pip install wandb, then wandb login ({error})") from None
    for log in logs:
        config = dict(value_of(*pair) for pair in (log.run | log.config).items())
        run = wandb.init(project=project, name=log.name, config=config)
        # W&B's own step must not fall; the axes of training and TTT are therefore metrics.
        run.define_metric("train/*", step_metric="step")
        run.define_metric("val/*", step_metric="step")
        run.define_metric("ttt/*", step_metric="scored_tokens")
        for tag, step, seconds, value in scalars(log):
            axis = "scored_tokens" if tag.startswith("ttt/") else "step"
            clock = {} if seconds is None else {"train_time_s": seconds}
            run.log({tag: value, axis: step} | clock)
        run.summary.update(summary(log))
        run.finish()


def main(argv=None):
    """The command line; returns the exit code: 0, or 2 for bad input."""
    plain_output()
    p = argparse.ArgumentParser(prog="convert.py", description="Logs as JSON lines on stdout, or "
                                "for TensorBoard or Weights & Biases.")
    p.add_argument("logs", nargs="+", metavar="LOG", help="log files, or folders of logs")
    p.add_argument("--tensorboard", metavar="DIR", help="write event files instead")
    p.add_argument("--wandb", metavar="PROJECT", help="upload to this project instead")
    args = p.parse_args(argv)
    try:
        logs = collect(args.logs)
        if args.tensorboard:
            to_tensorboard(logs, args.tensorboard)
        if args.wandb:
            to_wandb(logs, args.wandb)
        if not (args.tensorboard or args.wandb):
            for log in logs:
                for found in records(log):
                    print(json.dumps(found, allow_nan=False))
    except (ReportError, OSError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
