"""Runs that stop early and go on; checkpoints that are damaged or of another run; full disks.

Most runs here are of a tiny model in this process; tests/faults.py kills whole runs at random.
"""

import itertools
import os
import re
import shutil
import signal
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (SCRIPT, assert_same, enter, files_in, fixed_data, launch, on_ranks, parse,
                      tiny_config, values, weights_of)

import train_gpt as t

pytestmark = pytest.mark.slow  # most train two or three times


class Halt(Exception):
    """Stands for a machine that dies."""


def job_config(folder, **overrides):
    """Eight steps that write a checkpoint after each."""
    return tiny_config(**(dict(iterations=8, out_dir=str(folder), run_id="job", resume="auto",
                               checkpoint_every_seconds=1e-9) | overrides))


def before_step(number, act):
    """Inside, act() runs before that call of train_step."""
    calls = itertools.count(1)

    def step(*arguments, train_step=t.train_step, **more):
        if next(calls) == number:
            act()
        return train_step(*arguments, **more)
    return mock.patch.object(t, "train_step", step)


def find(cfg):
    """What a run of cfg goes on from."""
    return t.find_checkpoint(cfg, fixed_data(cfg))


def train(cfg, halt_at=0, run=None):
    """Train as a run does, dying before the step of that number: (weights, Trained)."""
    run = run or t.Run()
    saved = run.from_rank_0(lambda: find(cfg))
    model = t.init_weights(t.LM(cfg), cfg.seed)
    with before_step(halt_at, mock.Mock(side_effect=Halt)):
        trained = t.train(model, fixed_data(cfg), cfg, run, saved)
    return weights_of(model), trained


@pytest.fixture
def dead(tmp_path):
    """The Config of a run that died before its second step, and the path of its checkpoint."""
    cfg = job_config(tmp_path)
    with pytest.raises(Halt):
        train(cfg, halt_at=2)
    return cfg, tmp_path / "job.ckpt"


def change_facts(path, **changes):
    """Write a checkpoint again with other facts."""
    tensors, facts = t.load_tensors(path)
    t.save_tensors(path, tensors, facts | changes)


@pytest.mark.parametrize("overrides", [
    {}, dict(average_every=2, warmdown_frac=1.0), dict(qat_frac=0.6, grid="sdclip"),
    dict(train_batch_tokens=1024, micro_batch_tokens=512, ema_decay=0.0),
], ids=lambda overrides: "-".join(overrides) or "ema")
def test_resumed_training_is_bit_equal_to_an_undisturbed_one(tmp_path, overrides):
    whole, (_, first) = train(job_config(tmp_path / "a", checkpoint_every_seconds=0.0, **overrides))
    cfg = job_config(tmp_path / "b", **overrides)
    for number in (6, 2):  # the second time one step after it went on
        with pytest.raises(Halt):
            train(cfg, halt_at=number)
    assert find(cfg)[1]["step"] == 6
    resumed, (_, again) = train(cfg)
    assert_same(whole, resumed)
    assert_same(first.H, again.H)


def test_trained_run_calibrates_again_on_a_clock_that_goes_on(tmp_path):
    whole, (_, first) = train(job_config(tmp_path))
    assert files_in(tmp_path) == ["job.ckpt"]  # no .part
    change_facts(tmp_path / "job.ckpt", elapsed_s=1000.0)
    resumed, (train_s, again) = train(job_config(tmp_path), halt_at=1)
    assert_same(whole, resumed)
    assert_same(first.H, again.H)
    assert 1000.02 < train_s < 1100


def halted_rank(run, folder):
    """One of two ranks that die before step 4."""
    with pytest.raises(Halt):
        train(job_config(folder), 4, run)


def test_checkpoint_of_two_ranks_goes_on_under_one(tmp_path):
    whole, _ = train(job_config(tmp_path / "whole"))
    on_ranks(2, halted_rank, tmp_path)
    tensors, facts = find(job_config(tmp_path))
    assert facts["step"] == 3
    momenta = [bool(x.any()) for name, x in tensors.items() if name.startswith("m.")]
    assert all(momenta) and len(momenta) == len(whole)  # the shares of both ranks are there
    resumed, _ = train(job_config(tmp_path))
    assert_same(resumed, whole, atol=2e-3)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run to its end: its environment, final line and artifact."""
    env = tiny | dict(ITERATIONS="8", RUN_ID="x", RESUME="auto", TRAIN_LOG_EVERY="1",
                      CHECKPOINT_EVERY_SECONDS="0", WARMUP_STEPS="0")
    ended = enter(env | dict(OUT_DIR=str(tmp_path_factory.mktemp("whole"))))
    return SimpleNamespace(env=env, final=values(ended.out, "final"),
                           artifact=(ended.folder / "x.artifact").read_bytes())


def assert_goes_on(run, whole, **changes):
    """The same command again ends with the same score and artifact; its resume line."""
    again = run(**whole.env | changes)
    assert again.code == 0, again.err
    assert values(again.out, "final") == whole.final
    assert (again.folder / "x.artifact").read_bytes() == whole.artifact
    return values(again.out, "resume")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
                         ids=["Ctrl-C", "SIGTERM", "SIGHUP"])
def test_run_stopped_at_a_step_goes_on_bit_equal(run, whole, number):
    signal.signal(number, signal.SIG_DFL)  # nohup, or a shell's `&`, may have it ignored
    with before_step(5, lambda: os.kill(os.getpid(), number)):
        stopped = run(**whole.env)
    assert (stopped.code, stopped.err) == (130, f"error: stopped by {number.name} at step 5; "
                                                "RUN_ID=x RESUME=auto goes on\n")
    assert files_in(stopped.folder) == ["x.ckpt", "x.txt"]
    assert assert_goes_on(run, whole)["step"] == "5"


def test_ignored_hangup_stays_ignored(run, whole):
    """As under nohup, for which a terminal that closes is no reason to stop."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with before_step(5, lambda: os.kill(os.getpid(), signal.SIGHUP)):
            assert run(**whole.env).code == 0
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_run_stopped_in_calibration_goes_on_bit_equal(run, whole):
    def signalled(*arguments, collect=t.collect_hessians):
        if t.STOP.deferred:  # not in the warm-up
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(*arguments)
    with mock.patch.object(t, "collect_hessians", signalled):
        stopped = run(**whole.env)
    assert (stopped.code, stopped.err) == (130, "error: stopped by SIGTERM at step 8; "
                                                "RUN_ID=x RESUME=auto goes on\n")
    assert assert_goes_on(run, whole)["trained"] == "1"


@pytest.mark.parametrize("mark", ["step:3/", "reload "])
def test_killed_process_goes_on_bit_equal(run, whole, tmp_path, mark):
    changes = dict(CHECKPOINT_EVERY_SECONDS="0.01", OUT_DIR=str(tmp_path / "out"))
    process = launch(whole.env | changes)
    next(line for line in process.stdout if line.startswith(mark))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert int(assert_goes_on(run, whole, **changes)["step"]) > 0
    assert not list(tmp_path.rglob("*.part"))


def test_signal_to_two_ranks_leaves_a_checkpoint_and_no_traceback(run, whole, tmp_path):
    """Ctrl-C in a terminal reaches torchrun and every rank at once."""
    process = launch(whole.env | dict(OUT_DIR=str(tmp_path), ITERATIONS="1000000"), 2)
    next(line for line in process.stdout if line.startswith("step:3/"))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "error: stopped by SIGINT at step" in err and f'{SCRIPT}", line' not in err
    assert files_in(tmp_path) == ["x.ckpt", "x.txt"]


def test_deterministic_runs_have_equal_losses_and_artifacts(run):
    try:
        runs = [run(DETERMINISTIC="1", RUN_ID=f"d{i}") for i in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    losses = [re.findall(r"(?:train|val)_loss:\S+", result.out) for result in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    one, two = [(runs[0].folder / f"d{i}.artifact").read_bytes() for i in range(2)]
    assert one == two


SHORT = dict(ITERATIONS="1", FINAL_SCORE="roundtrip")
SCORED = dict(ITERATIONS="1", EVAL_DIAGNOSTICS="1", RUN_ID="a", RESUME="auto")


@pytest.fixture(scope="module")
def ended_runs(tiny, tmp_path_factory):
    """A folder of three runs that have ended: night/a and b, short, and a with all scores."""
    folder = tmp_path_factory.mktemp("ended")
    for settings in (SHORT | dict(RUN_ID="night/a"), SHORT | dict(RUN_ID="b"), SCORED):
        assert enter(tiny | dict(OUT_DIR=str(folder)) | settings).code == 0
    return folder


@pytest.fixture
def ended(ended_runs, tmp_path):
    """A copy of that folder, where `run` writes."""
    return shutil.copytree(ended_runs, tmp_path / "out")


def cut_log(log, mark="reload artifact_bytes"):
    """As if the run had been killed before that line, while it evaluated: the whole log."""
    whole = log.read_text()
    log.write_text(whole.partition(mark)[0])
    return whole


def test_ended_run_is_left_alone(run, ended):
    before = {name: (ended / name).read_bytes() for name in files_in(ended)}
    again = run(RUN_ID="b", RESUME="auto", **SHORT)
    assert again.code == 2 and "this run has ended" in again.err
    assert before == {name: (ended / name).read_bytes() for name in files_in(ended)}


def test_resume_by_a_path_begins_a_run_of_its_own(run, ended):
    before = (ended / "night" / "a.txt").read_text()
    again = run(RESUME=f"{ended}/night/a.ckpt", PRESET="sample, sample", **SHORT)
    assert re.fullmatch(r"\d{8}-\d{6}_sample-sample_seed1337",
                        values(again.out, "settings")["run_id"])
    assert values(again.out, "final") == values(before, "final")
    assert (ended / "night" / "a.txt").read_text() == before


@pytest.mark.parametrize("cut", ["final_int6_exact", "final method"])
def test_settings_of_a_score_that_was_seen_are_fixed(run, ended, cut):
    """Killed behind a score, a run may not go on with the method or export that looks better."""
    whole = cut_log(ended / "a.txt", cut)
    for change in (dict(FINAL_SCORE="sliding"), dict(EVAL_SPANS="2"), dict(MATRIX_BITS="5")):
        again = run(**SCORED | change)
        assert again.code == 2 and f"{[*change][0]}: must stay as they were" in again.err
    again = run(**SCORED)
    assert again.code == 0 and values(again.out, "final") == values(whole, "final")


def test_trained_weights_may_be_exported_otherwise(run, ended):
    whole = cut_log(ended / "b.txt")
    again = run(RUN_ID="b", RESUME="auto", **SHORT | dict(MATRIX_BITS="4", GRID="sdclip"))
    sizes = [int(values(text, "reload")["artifact_bytes"]) for text in (whole, again.out)]
    assert again.code == 0 and sizes[1] < sizes[0]
    assert (ended / "b.artifact").stat().st_size == sizes[1]


def test_checkpoint_of_another_run_is_not_taken_for_ones_own(run, ended):
    cut_log(ended / "b.txt")
    mixed = run(RUN_ID="b", RESUME=f"{ended}/night/a.ckpt", **SHORT)
    assert mixed.code == 2 and "RUN_ID=b has a checkpoint of its own" in mixed.err


@pytest.mark.parametrize("changes, parts", [
    (dict(matrix_lr=0.5, mlp_act="leaky_relu2"),
     ["MATRIX_LR was 0.025, is 0.5", "MLP_ACT was relu2, is leaky_relu2"]),
    (dict(seed=1), ["SEED was 1337, is 1"]),
    (dict(train_batch_tokens=1024), ["TRAIN_BATCH_TOKENS was 512, is 1024"])])
def test_other_configuration_is_refused_with_what_differs(dead, changes, parts):
    cfg, path = dead
    with pytest.raises(t.GolfError) as caught:
        find(t.replace(cfg, **changes))
    assert all(part in str(caught.value) for part in parts)
    change_facts(path, config=t.load_tensors(path)[1]["config"] | {"seed": "\x1b[31m\nok"})
    with pytest.raises(t.GolfError) as caught:
        find(cfg)
    assert str(caught.value).isprintable()  # also where a checkpoint is hostile


def test_other_data_is_refused_but_not_settings_that_change_no_weight(dead):
    data = fixed_data(dead[0])
    with pytest.raises(t.GolfError, match="DATA_PATH was 2 shards of 4200 tokens, is 1 shards"):
        t.find_checkpoint(dead[0], data._replace(train=data.train[:1]))
    assert find(t.replace(dead[0], eval_spans=7, train_log_every=3, matrix_bits=5))


class Bomb:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return sys.exit, ("unpickled",)


def pickled(path, blob):
    """Write an .npz file of a pickled object."""
    with path.open("wb") as file:
        np.savez(file, facts=np.array([Bomb()], object))


@pytest.mark.parametrize("damage", [
    pickled, lambda path, blob: path.write_bytes(blob[:len(blob) // 2]),
    lambda path, blob: path.write_bytes(b""),
    lambda path, blob: path.write_bytes(blob[:5000] + bytes([blob[5000] ^ 1]) + blob[5001:]),
    lambda path, blob: change_facts(path, another=1),
], ids=["pickled", "cut", "empty", "flipped", "other facts"])
def test_damaged_checkpoint_is_named(dead, damage):
    cfg, path = dead
    damage(path, path.read_bytes())
    with pytest.raises(t.GolfError, match="job.ckpt: not a whole checkpoint"):
        find(cfg)


@pytest.mark.parametrize("prefix", ["model.", "m.", "v.", "average."])
@pytest.mark.parametrize("fault", ["missing", "reshaped"])
def test_missing_or_reshaped_tensor_is_named(dead, prefix, fault):
    cfg, _ = dead
    tensors, facts = find(cfg)
    name = next(n for n in tensors if n.startswith(prefix))
    removed = tensors.pop(name)
    if fault == "reshaped":
        tensors[name] = removed[None, None]
    with pytest.raises(t.GolfError, match=f"tensor {re.escape(name)} is "):
        t.Training(t.LM(cfg), fixed_data(cfg), cfg, t.Run(), (tensors, facts))


def full_disk(monkeypatch, pattern, after=0):
    """Files whose name matches cannot be written, but for the first `after` of them."""
    count = itertools.count()

    def full(path, write_to, write=t.write_whole):
        if re.search(pattern, str(path)) and next(count) >= after:
            raise OSError(28, "No space left on device", str(path))
        write(path, write_to)
    monkeypatch.setattr(t, "write_whole", full)


def test_file_on_a_full_disk_keeps_what_it_held(tmp_path, monkeypatch):
    t.write_whole(tmp_path / "a", lambda f: f.write(b"old"))
    monkeypatch.setattr(t.os, "fsync", mock.Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left.*/a'"):
        t.write_whole(tmp_path / "a", lambda f: f.write(b"new"))
    assert files_in(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_full_disk_keeps_the_last_checkpoint_and_the_run(tmp_path, monkeypatch, capsys):
    full_disk(monkeypatch, "ckpt", after=2)
    train(job_config(tmp_path))
    failed = [pairs for event, pairs in parse(capsys.readouterr().out)
              if event == "checkpoint_failed"]
    assert len(failed) == 7 and "No,space,left" in failed[0]["reason"]
    assert find(job_config(tmp_path))[1]["step"] == 2


def test_stop_on_a_full_disk_promises_no_checkpoint(run, whole, monkeypatch):
    full_disk(monkeypatch, "ckpt")
    with before_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        stopped = run(**whole.env)
    assert "at step 5; its checkpoint could not be written" in stopped.err


def test_artifact_that_cannot_be_written_ends_the_run_which_goes_on_later(run, ended, monkeypatch):
    full_disk(monkeypatch, "artifact")
    result = run(RUN_ID="full", **SHORT)
    assert result.code == 2 and re.fullmatch("error: .*No space left.*artifact'\n", result.err)
    monkeypatch.undo()
    again = run(RUN_ID="full", RESUME="auto", **SHORT)
    assert values(again.out, "final") == values((ended / "b.txt").read_text(), "final")


def test_log_whose_disk_or_console_is_full(tmp_path, capsys):
    run = t.Run()
    run.log_path = tmp_path / "log.txt"
    run.log("step", a=1)
    full = SimpleNamespace(write=mock.Mock(side_effect=OSError(28, "No space left on device")))
    with mock.patch.object(t.sys, "stdout", full):
        run.log("step", a=2)
    assert run.log_path.read_text() == "step a:1\nstep a:2\n"
    run.log_path = tmp_path / "gone" / "log.txt"
    run.log("step", a=3)
    run.log_path = tmp_path / "foreign"
    run.log("settings", data_path="/data/\udcff")  # no UTF-8
    assert run.log_path.read_text() == "settings data_path:/data/?\n"
    assert capsys.readouterr().out == "step a:1\nstep a:3\n"


@pytest.mark.parametrize("resume, goes_on", [("auto", True), ("other.ckpt", False)])
def test_run_whose_log_is_gone_goes_on_from_its_own_checkpoints(tmp_path, resume, goes_on):
    (tmp_path / "job.ckpt").touch()
    with nullcontext() if goes_on else pytest.raises(t.GolfError, match="job.ckpt exists"):
        t.start_log(job_config(tmp_path, resume=resume), t.Run())


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    cfg = job_config(tmp_path)
    model = t.LM(cfg)
    job = t.Training(model, fixed_data(cfg), cfg, t.Run(), None)
    with torch.no_grad():
        model.embed.weight[3, 3] = float("nan")
    assert "could not be written" in job.save()
    assert files_in(tmp_path) == []


def broken_rank(run, folder):
    """One of two ranks; the second cannot read its part of the batches behind step 4."""
    broken = mock.Mock(side_effect=t.GolfError("gone")) if run.rank else t.check_vocabulary
    with before_step(4, lambda: setattr(t, "check_vocabulary", broken)):
        with pytest.raises(t.GolfError, match="gone"):
            train(job_config(folder, checkpoint_every_seconds=0.0), run=run)


def test_shard_that_one_rank_cannot_read_leaves_a_checkpoint(tmp_path):
    on_ranks(2, broken_rank, tmp_path)
    assert find(job_config(tmp_path))[1]["step"] >= 4


def test_resume_by_the_path_of_its_own_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(t.GolfError, match="No such file"):
        find(job_config(tmp_path, resume=str(tmp_path / "job.ckpt")))
