"""Whole runs that end early, by a signal or at random, and the same command again; two runs alike to the last bit."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, files_in, process_env, values


def timeless(text):
    """The lines of a log that name no time, size of memory, or place."""
    timed = ("time", "step_avg", "tok_s", "eta", "peak_mem", "start_up", "_s:", "run_id", "out_dir")
    return [" ".join(w for w in line.split() if not any(name in w.split(":")[0] + ":" for name in timed))
            for line in text.splitlines() if not line.startswith(("run ", "config"))]


def test_deterministic_runs_have_equal_logs(run, tmp_path):
    try:
        logs = [run(DETERMINISTIC="1", RUN_ID=f"d{i}", ITERATIONS="6", TRAIN_LOG_EVERY="1").out for i in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert timeless(logs[0]) == timeless(logs[1]) and "train_loss" in logs[0]


def test_ended_run_is_left_alone(run):
    first = run(RUN_ID="ended", ITERATIONS="1", EVAL_DIAGNOSTICS="0", VAL_LOSS_EVERY="0")
    before = {name: (first.folder / name).read_bytes() for name in files_in(first.folder)}
    again = run(RUN_ID="ended", ITERATIONS="1", EVAL_DIAGNOSTICS="0", VAL_LOSS_EVERY="0", RESUME="auto")
    assert (again.code, again.out) == (0, "RUN_ID=ended: this run has ended, verdict:ok\n")
    assert before == {name: (first.folder / name).read_bytes() for name in files_in(first.folder)}


def test_resume_names_the_run_of_the_checkpoint(run, tmp_path):
    first = run(RUN_ID="mine", ITERATIONS="1", EVAL_DIAGNOSTICS="0", VAL_LOSS_EVERY="0")
    log = first.folder / "mine.txt"
    text = log.read_text()
    log.write_text(text[:text.index("final_int6_exact")])  # as if it had been killed while evaluating
    again = run(ITERATIONS="1", EVAL_DIAGNOSTICS="0", VAL_LOSS_EVERY="0", RESUME=str(first.folder / "mine.ckpt"))
    assert again.code == 0, again.err
    assert values(again.out, "resume") == dict(checkpoint=str(first.folder / "mine.ckpt"), step="1", trained="1",
                                               exported="1", train_time=values(again.out, "resume")["train_time"])
    assert values(log.read_text(), "final") == values(text, "final")
    assert values(again.out, "compliance")["train_s"] == values(text, "compliance")["train_s"]


def start(env, folder):
    return subprocess.Popen([sys.executable, str(ROOT / "train_gpt.py")], env=env, cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """A run to its end: its environment and final line."""
    folder = tmp_path_factory.mktemp("undisturbed")
    env = process_env(tiny, ITERATIONS="8", CHECKPOINT_EVERY_SECONDS="0.01", RUN_ID="x", RESUME="auto",
                      TRAIN_LOG_EVERY="1")
    process = start(env | dict(OUT_DIR=str(folder)), folder)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return SimpleNamespace(env=env, final=values(out, "final"))


def test_run_killed_again_and_again_ends_as_an_undisturbed_one(undisturbed, tmp_path):
    """kill -9 as soon as a line with each mark is seen, each time followed by the same command."""
    env = undisturbed.env | dict(OUT_DIR=str(tmp_path))
    for mark in ("step:3/", "hessians", "gptq name", "final_int6_roundtrip"):
        process = start(env, tmp_path)
        for line in process.stdout:
            if mark in line:
                os.killpg(process.pid, signal.SIGKILL)
                break
        process.communicate()
        assert process.returncode == -signal.SIGKILL, mark
    again = start(env, tmp_path)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0, out
    assert values(out, "final") == undisturbed.final and "resume" in out
    assert not list(tmp_path.rglob("*.part"))


def test_stopped_run_goes_on_bit_equal(undisturbed, tmp_path):
    env = undisturbed.env | dict(OUT_DIR=str(tmp_path), CHECKPOINT_EVERY_SECONDS="0")
    for number, mark in ((signal.SIGINT, "step:2/"), (signal.SIGTERM, "step:5/")):
        process = start(env, tmp_path)
        for line in process.stdout:
            if line.startswith(mark):
                process.send_signal(number)
                break
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 130 and "goes on" in out
    again = start(env, tmp_path)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and values(out, "final") == undisturbed.final
