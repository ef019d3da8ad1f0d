"""Whole runs that end early, by a signal or at random, and the same command again; two runs alike to the last bit."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, files_in, parse, process_env, values

import train_gpt as t


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
    assert (again.code, again.out) == (
        0, "RUN_ID=ended: this run has ended, verdict:ok; for another one set another RUN_ID\n")
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


# ---- whose files they are ------------------------------------------------------------------------

SHORT = dict(ITERATIONS="1", EVAL_DIAGNOSTICS="0", VAL_LOSS_EVERY="0")


def forget_the_evaluation(log):
    """As if the run had been killed while evaluating."""
    text = log.read_text()
    log.write_text(text[:text.index("reload artifact_bytes")])


def test_other_export_settings_export_again(run):
    first = run(RUN_ID="a", **SHORT)
    forget_the_evaluation(first.folder / "a.txt")
    again = run(RUN_ID="a", RESUME="auto", **SHORT | dict(MATRIX_BITS="4", GRID="sdclip"))
    assert again.code == 0 and values(again.out, "resume")["exported"] == "0"
    assert (first.folder / "a.artifact").stat().st_size == int(values(again.out, "reload")["artifact_bytes"]) < int(
        values(first.out, "reload")["artifact_bytes"])


def test_artifact_that_was_replaced_is_exported_again(run):
    first = run(RUN_ID="a", **SHORT)
    artifact = (first.folder / "a.artifact").read_bytes()
    other = run(RUN_ID="b", **SHORT | dict(SEED="2"))
    shutil.copy(other.folder / "b.artifact", first.folder / "a.artifact")
    forget_the_evaluation(first.folder / "a.txt")
    again = run(RUN_ID="a", RESUME="auto", **SHORT)
    assert values(again.out, "resume")["exported"] == "0" and values(again.out, "final") == values(first.out, "final")
    assert (first.folder / "a.artifact").read_bytes() == artifact


def test_checkpoint_of_another_run_is_not_scored_as_ones_own(run):
    first, second = run(RUN_ID="a", **SHORT), run(RUN_ID="b", **SHORT | dict(SEED="2"))
    forget_the_evaluation(second.folder / "b.txt")
    mixed = run(RUN_ID="b", RESUME=str(first.folder / "a.ckpt"), **SHORT)
    assert mixed.code == 2 and "RUN_ID=b, which has checkpoints of its own" in mixed.err
    third = run(RUN_ID="c", RESUME=str(first.folder / "a.ckpt"), **SHORT)  # an export of its own is what one may want
    assert third.code == 0 and values(third.out, "final") == values(first.out, "final")


@pytest.mark.parametrize("kept", ["a.artifact", "a.ckpt"])
def test_files_of_a_run_whose_log_was_moved_are_left_alone(run, kept):
    first = run(RUN_ID="a", **SHORT)
    for name in {"a.artifact", "a.ckpt"} - {kept}:
        (first.folder / name).rename(first.folder / ("moved_" + name))
    (first.folder / "a.txt").rename(first.folder / "moved.txt")
    before = files_in(first.folder)
    again = run(RUN_ID="a", **SHORT)
    assert again.code == 2 and f"{kept}" in again.err and "of an earlier run exists" in again.err
    assert files_in(first.folder) == before
    (first.folder / "moved.txt").rename(first.folder / "a.txt")
    assert "RESUME=auto" in run(RUN_ID="a", **SHORT).err


def test_two_processes_are_not_at_one_run(run):
    first = run(RUN_ID="a", **SHORT)
    forget_the_evaluation(first.folder / "a.txt")
    with open(first.folder / "a.txt") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        again = run(RUN_ID="a", RESUME="auto", **SHORT)
        assert again.code == 2 and again.err == "error: RUN_ID=a: another process is at this run; set another RUN_ID\n"
    assert run(RUN_ID="a", RESUME="auto", **SHORT).code == 0


def test_folder_that_tells_no_name_asks_for_one(run, tmp_path):
    first = run(RUN_ID="a", **SHORT)
    (first.folder / "a.ckpt").rename(tmp_path / "my ck")
    again = run(RESUME=str(tmp_path / "my ck" / "trained.npz"), **SHORT)
    assert again.code == 2 and "set RUN_ID" in again.err


# ---- signals and full disks at awkward moments ---------------------------------------------------


def test_signal_in_calibration_keeps_the_trained_weights(tiny, tmp_path):
    env = process_env(tiny, OUT_DIR=str(tmp_path), RUN_ID="x", RESUME="auto")
    process = start(env | dict(GPTQ_CALIBRATION_BATCHES="100000"), tmp_path)
    for line in process.stdout:
        if line.startswith("step:3/3 val_loss"):
            process.send_signal(signal.SIGTERM)
            break
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert f"stopped by SIGTERM after training; RESUME={tmp_path}/x.ckpt/trained.npz goes on" in out
    again = start(env, tmp_path)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and values(out, "resume")["trained"] == "1"
    whole = start(env | dict(RUN_ID="whole"), tmp_path)
    assert values(out, "final") == values(whole.communicate(timeout=120)[0], "final")


def test_fault_in_calibration_keeps_the_trained_weights(run, monkeypatch):
    def broken(*arguments):
        raise t.KernelError("broken")
    with monkeypatch.context() as patch:
        patch.setattr(t, "calibrate", broken)
        first = run(RUN_ID="a", **SHORT)
    assert first.code == 2 and files_in(first.folder) == ["a.ckpt/trained.npz", "a.txt"]
    again = run(RUN_ID="a", RESUME="auto", **SHORT)
    assert again.code == 0 and values(again.out, "resume")["trained"] == "1"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_console_on_a_full_disk_goes_on_in_the_log(tiny, tmp_path):
    env = process_env(tiny, OUT_DIR=str(tmp_path), RUN_ID="x", **SHORT)
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=env, cwd=tmp_path, stdout=full,
                              stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert values((tmp_path / "x.txt").read_text(), "compliance")["verdict"] == "ok"


def test_artifact_on_a_full_disk_is_scored_and_fails_the_verdict(run, monkeypatch):
    whole, write = run(RUN_ID="whole", **SHORT), t.write_whole

    def full(path, write_to):
        if str(path).endswith(".artifact"):
            raise t.FileError(f"{path}: cannot be written (No space left on device)")
        write(path, write_to)
    with monkeypatch.context() as patch:
        patch.setattr(t, "write_whole", full)
        result = run(RUN_ID="full", **SHORT)
        assert result.code == 1 and values(result.out, "final") == values(whole.out, "final")
        assert result.out.count("artifact_not_written reason:") == 2 and "No,space" in result.out
        assert values(result.out, "over_limit")["limit"] == "file"
        other = run(RUN_ID="whole", RESUME="auto", **SHORT)  # that one has ended
        assert other.code == 0 and "has ended" in other.out
        forget_the_evaluation(whole.folder / "whole.txt")
        other = run(RUN_ID="whole", RESUME="auto", **SHORT | dict(MATRIX_BITS="4", GRID="sdclip"))
        assert other.code == 1 and values(other.out, "over_limit")["limit"] == "file"  # another file is in its place
    again = run(RUN_ID="full", RESUME="auto", **SHORT)
    assert again.code == 0 and values(again.out, "final") == values(whole.out, "final")


def test_disk_that_was_full_for_a_moment_gets_the_artifact_after_all(run, monkeypatch):
    write, calls = t.write_whole, []

    def full(path, write_to):
        calls.append(path)
        if str(path).endswith(".artifact") and len([p for p in calls if p == path]) == 1:
            raise t.FileError(f"{path}: cannot be written")
        write(path, write_to)
    monkeypatch.setattr(t, "write_whole", full)
    result = run(RUN_ID="a", **SHORT)
    assert result.code == 0 and (result.folder / "a.artifact").stat().st_size == int(
        values(result.out, "reload")["artifact_bytes"])


def test_training_clock_of_a_calibration_that_was_done_again_is_kept(run, monkeypatch):
    def slow(model, loader, cfg, run, clock):
        t.time.sleep(0.5)
        return calibrate(model, loader, cfg, run, clock)
    calibrate, first = t.calibrate, run(RUN_ID="a", **SHORT)
    (first.folder / "a.artifact").unlink()
    forget_the_evaluation(first.folder / "a.txt")
    with monkeypatch.context() as patch:
        patch.setattr(t, "calibrate", slow)
        second = run(RUN_ID="a", RESUME="auto", **SHORT)
    log = first.folder / "a.txt"
    log.write_text(log.read_text()[:log.read_text().rindex("reload artifact_bytes")])
    third = run(RUN_ID="a", RESUME="auto", **SHORT)
    assert values(third.out, "resume")["exported"] == "1"
    assert float(values(third.out, "compliance")["train_s"]) == float(values(second.out, "compliance")["train_s"]) > 0.5


def test_file_system_without_locks_is_no_obstacle(run, monkeypatch):
    def none(*arguments):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "flock", none)
    assert run(RUN_ID="a", **SHORT).code == 0


def test_trimmed_epochs_hold_to_the_end_of_the_evaluation(run, monkeypatch):
    """A plan on a machine that is slower when it goes on would trim to fewer."""
    ttt = SHORT | dict(FINAL_SCORE="ttt", TTT_ENABLED="1", TTT_CHUNK_TOKENS="256", TTT_EPOCHS="9",
                       EVAL_SAVE_SECONDS="0.000001", RESUME="auto")
    plan = t.plan_evaluation

    def planned(epochs):
        def trim(model, cfg, run, num_targets, again=False):
            plan(model, cfg, run, num_targets, again)
            model.cfg = t.replace(model.cfg, ttt_epochs=epochs)
        return trim

    class Stop(t.GolfError):
        pass

    def stop(adapter, ledger, scored):
        if ledger.next_target > 1000:
            raise Stop
    monkeypatch.setattr(t, "plan_evaluation", planned(2))
    whole = run(RUN_ID="whole", **ttt)
    with monkeypatch.context() as patch:
        patch.setattr(t.Adapter, "report", stop)
        assert run(RUN_ID="cut", **ttt).code == 2
    monkeypatch.setattr(t, "plan_evaluation", planned(1))
    again = run(RUN_ID="cut", **ttt)
    assert values(again.out, "evaluation_resume") == dict(used="yes", next_target="768", ttt_epochs="2")
    assert values(again.out, "final") == values(whole.out, "final")
    [line] = [pairs for event, pairs in parse(again.out) if event == "final_int6_ttt"]
    assert line["epochs"] == "2"
