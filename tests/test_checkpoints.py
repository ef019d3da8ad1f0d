"""Checkpoints and faults: what a run leaves, what another goes on from, what is refused, and bad steps without a trace.

The runs here are of a tiny model; tests/faults.py kills whole runs of PRESET=sample at random moments.
"""

import json
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_in, parse, tiny_config, tiny_model
from test_training import fixed_data, two_ranks, weights_of

import train_gpt as t


class Halt(Exception):
    """Stands for a machine that dies."""


def job_config(folder, **overrides):
    return tiny_config(**(dict(iterations=8, out_dir=str(folder), run_id="job", resume="auto",
                               stack="gdn swa:a gdn swa:a gdn", gdn_v_heads=4) | overrides))


def train(cfg, die_at=None, every=None, run=None, saved=None):
    """Train as make_artifact does, a checkpoint every `every` steps, dying before step die_at; model and Trained."""
    run, model, data = run or t.Run(), t.init_weights(t.LM(cfg), cfg.seed), fixed_data(cfg)
    checkpoints, done = t.Checkpoints(cfg, run, data), 0

    def step(*args, train_step=t.train_step, **kw):
        nonlocal done
        done += 1
        if done == die_at:
            raise Halt
        return train_step(*args, **kw)
    saved = saved or checkpoints.load()
    begun = saved[1]["step"] if saved else 0
    checkpoints.due = lambda elapsed: every and done and (begun + done) % every == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "train_step", step)
        stop = t.train(model, data, cfg, run, checkpoints, saved)
    return model, stop


def test_ranks_whose_clocks_differ_agree_on_when_to_save(tmp_path):
    cfg = job_config(tmp_path, checkpoint_every_seconds=30.0)
    told = []
    for rank, late_s in enumerate((0.0, 0.2, 1.5)):
        checkpoints = t.Checkpoints(cfg, t.Run(rank=rank, world_size=3), fixed_data(cfg))
        told.append([])
        for elapsed in (0.0, 29.9, 30.1, 59.9, 60.2, 61.0, 200.0, 229.9):  # rank 0's clock, as train_loop gives it
            told[-1].append(checkpoints.due(elapsed))
            if told[-1][-1]:
                checkpoints.last_s = elapsed
                checkpoints.save("step_1", {}, dict(elapsed_s=elapsed + late_s, trained=False))
    assert told == 3 * [[False, False, True, False, True, False, True, False]]


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# ---- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [
    {}, dict(average_every=2, warmdown_frac=1.0), dict(qat_frac=0.6, grid="sdclip"),
    dict(train_batch_tokens=1024, ema_decay=0.0),
], ids=lambda overrides: "-".join(overrides) or "ema")
def test_resumed_run_is_bit_equal_to_an_undisturbed_one(tmp_path, overrides):
    whole, stop = train(job_config(tmp_path / "a", **overrides))
    cfg = job_config(tmp_path / "b", **overrides)
    with pytest.raises(Halt):
        train(cfg, die_at=6, every=2)
    with pytest.raises(Halt):
        train(cfg, die_at=3, every=3)
    resumed, again = train(cfg)
    assert_same(weights_of(whole), weights_of(resumed))
    assert_same(stop.calibration.H, again.calibration.H)
    assert stop.steps == again.steps == 8


def test_two_step_files_are_kept_and_no_part(tmp_path):
    train(job_config(tmp_path), every=1)
    assert files_in(tmp_path) == ["job.ckpt/step_00000006.npz", "job.ckpt/step_00000007.npz", "job.ckpt/trained.npz"]


def test_clock_goes_on_where_it_stood(tmp_path):
    cfg = job_config(tmp_path)
    with pytest.raises(Halt):
        train(cfg, die_at=6, every=5)
    tensors, facts = t.Checkpoints(cfg, t.Run(), fixed_data(cfg)).load()
    assert facts["step"] == 5 and facts["elapsed_s"] > 0
    _, stop = train(cfg, saved=(tensors, facts | dict(elapsed_s=1000.0)))
    assert 1000 < stop.train_s < 1100


def test_trained_run_only_calibrates_again(tmp_path):
    whole, stop = train(job_config(tmp_path))
    resumed, again = train(job_config(tmp_path), die_at=1)
    assert_same(weights_of(whole), weights_of(resumed))
    assert_same(stop.calibration.H, again.calibration.H)


def go_on_by_two(run, folder):
    """One of two ranks: stop at step 3, go on from there, stop at step 6."""
    cfg = job_config(folder)
    for die_at in (4, 4):
        try:
            train(cfg, die_at=die_at, every=3, run=run)
        except Halt:
            continue


def test_checkpoint_goes_on_under_another_number_of_ranks(tmp_path):
    whole, _ = train(job_config(tmp_path / "whole"))
    with two_ranks(go_on_by_two, tmp_path):
        pass
    assert files_in(tmp_path)[:2] == ["job.ckpt/step_00000003.npz", "job.ckpt/step_00000006.npz"]
    resumed, _ = train(job_config(tmp_path))
    for name, one in weights_of(whole).items():
        torch.testing.assert_close(weights_of(resumed)[name], one, rtol=0, atol=2e-3)
    tensors, _ = t.load_tensors(tmp_path / "job.ckpt" / "step_00000003.npz")
    momenta = [x for name, x in tensors.items() if name.startswith("muon.")]
    assert len(momenta) > 20 and all(bool(x.any()) for x in momenta)  # both ranks' shares are there


# ---- what is refused -----------------------------------------------------------------------------


def test_other_configuration_is_refused_with_the_fields_that_differ(tmp_path):
    train(job_config(tmp_path), every=4)
    (tmp_path / "job.ckpt" / "trained.npz").unlink()
    cfg = job_config(tmp_path, matrix_lr=0.5, mlp_act="leaky_relu2", eval_spans=7, matrix_bits=5)
    with pytest.raises(t.SettingError) as caught:
        t.Checkpoints(cfg, t.Run(), fixed_data(cfg)).load()
    message = str(caught.value)
    assert "MATRIX_LR was 0.025, is 0.5" in message and "MLP_ACT was relu2, is leaky_relu2" in message
    assert "MATRIX_BITS was 6, is 5" in message and "EVAL_SPANS" not in message


def test_a_batch_left_to_the_script_goes_on_as_it_was_under_other_ranks(tmp_path):
    train(job_config(tmp_path), every=4)
    cfg, two = job_config(tmp_path, train_batch_tokens=0), t.Run(world_size=2)
    saved = t.Checkpoints(cfg, t.Run(), fixed_data(job_config(tmp_path))).load()
    assert t.settle_batch(cfg, two, int(saved[1]["config"]["train_batch_tokens"])) == job_config(tmp_path)
    with pytest.raises(t.SettingError, match="TRAIN_BATCH_TOKENS was 512, is 1024"):
        other = job_config(tmp_path, train_batch_tokens=1024)
        t.Checkpoints(other, t.Run(), fixed_data(other)).load()


def test_trained_weights_may_be_exported_otherwise(tmp_path):
    train(job_config(tmp_path))
    cfg = job_config(tmp_path, matrix_bits=5, final_score="sliding")
    assert t.Checkpoints(cfg, t.Run(), fixed_data(cfg)).load()[1]["trained"]
    with pytest.raises(t.SettingError, match="SEED was 1337, is 1"):
        t.Checkpoints(job_config(tmp_path, seed=1), t.Run(), fixed_data(cfg)).load()


def test_other_data_is_refused(tmp_path):
    train(job_config(tmp_path))
    cfg = job_config(tmp_path)
    data = fixed_data(cfg)
    data = data._replace(train=data.train[:1])
    with pytest.raises(t.SettingError, match="the training shards of DATA_PATH have other names or lengths"):
        t.Checkpoints(cfg, t.Run(), data).load()


def damage(path, how):
    blob = path.read_bytes()
    path.write_bytes({"cut": blob[:len(blob) // 2], "flipped": blob[:5000] + bytes([blob[5000] ^ 1]) + blob[5001:],
                      "empty": b"", "foreign": b"PK\x03\x04" + os.urandom(500)}[how])


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "foreign"])
def test_damaged_file_is_passed_over_for_the_one_before(tmp_path, how, capsys):
    cfg = job_config(tmp_path)
    with pytest.raises(Halt):
        train(cfg, die_at=7, every=3)
    damage(tmp_path / "job.ckpt" / "step_00000006.npz", how)
    assert t.Checkpoints(cfg, t.Run(), fixed_data(cfg)).load()[1]["step"] == 3
    assert "checkpoint_skipped" in capsys.readouterr().out
    damage(tmp_path / "job.ckpt" / "step_00000003.npz", how)
    with pytest.raises(t.FileError, match="no whole checkpoint"):
        t.Checkpoints(cfg, t.Run(), fixed_data(cfg)).load()


def test_path_without_a_checkpoint_is_named(tmp_path):
    cfg = job_config(tmp_path, resume=str(tmp_path / "none"))
    with pytest.raises(t.FileError, match="RESUME=.*none: no checkpoint there"):
        t.Checkpoints(cfg, t.Run(), fixed_data(cfg)).load()


@pytest.mark.parametrize("change", [
    dict(step=-1), dict(step="1"), dict(loader=[0]), dict(loader=[0, -5]), dict(config=3), dict(config={}),
    dict(elapsed_s=float("inf")), dict(config=dict(train_batch_tokens="many")), dict(trained=True),
    dict(averaged=None)], ids=str)
def test_impossible_facts_are_refused(tmp_path, change):
    cfg = job_config(tmp_path)
    with pytest.raises(Halt):
        train(cfg, die_at=3, every=2)
    path = tmp_path / "job.ckpt" / "step_00000002.npz"
    tensors, facts = t.load_tensors(path)
    t.save_tensors(path, tensors, facts | change)
    with pytest.raises(t.FileError, match="no whole checkpoint"):
        t.Checkpoints(cfg, t.Run(), fixed_data(cfg)).load()


@pytest.mark.parametrize("prefix", ["model.", "muon.", "adamw.", "average.", "bad_steps"])
@pytest.mark.parametrize("fault", ["missing", "reshaped"])
def test_missing_or_reshaped_tensor_is_named(tmp_path, prefix, fault):
    cfg = job_config(tmp_path)
    with pytest.raises(Halt):
        train(cfg, die_at=3, every=2)
    tensors, facts = t.Checkpoints(cfg, t.Run(), fixed_data(cfg)).load()
    name = next(n for n in tensors if n.startswith(prefix))
    tensors = {n: x for n, x in tensors.items() if n != name} | (
        {name: torch.zeros(3, 5, 7)} if fault == "reshaped" else {})
    with pytest.raises(t.FileError, match=name.replace(".", r"\.")):
        train(cfg, saved=(tensors, facts))


def test_tensor_file_executes_nothing_and_claims_no_more_than_it_has(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(t.FileError, match="not a whole tensor file"):
        t.load_tensors(path)
    for header in ("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
                   "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "__import__('os').getcwd()"):
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("a", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 8)
            z.writestr("facts.json", b"")
        with pytest.raises(t.FileError):
            t.load_tensors(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:  # a bomb: 64 MiB of zeros in 64 KiB
        z.writestr("a", b"\0" * 2**26)
    with pytest.raises(t.FileError):
        t.load_tensors(path)


# ---- writing -------------------------------------------------------------------------------------


def test_checkpoint_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "job.ckpt").write_text("a file where the folder should be")
    _, stop = train(job_config(tmp_path, resume=""), every=2)
    assert stop.steps == 8
    failed = [pairs for event, pairs in parse(capsys.readouterr().out) if event == "checkpoint_failed"]
    assert len(failed) == 4 and "cannot,be,written" in failed[0]["reason"]


def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    cfg, sync, calls = job_config(tmp_path), os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return sync(descriptor)
    monkeypatch.setattr(t.os, "fsync", full)
    train(cfg, every=3)
    assert files_in(tmp_path) == ["job.ckpt/step_00000003.npz"]
    assert capsys.readouterr().out.count("checkpoint_failed reason:") == 2
    assert t.Checkpoints(cfg, t.Run(), fixed_data(cfg)).load()[1]["step"] == 3


def test_log_on_a_full_disk_goes_on_at_the_console(tmp_path, capfd):
    run = t.Run()
    run.log_path = tmp_path / "gone" / "log.txt"
    run.log("step", a=1)
    run.log("step", a=2)
    out, err = capfd.readouterr()
    assert out == "step a:1\nstep a:2\n" and err.count("cannot be written") == 1
    run.log_path.parent.mkdir()  # there is room again
    run.log("step", a=3)
    assert run.log_path.read_text() == "step a:3\n"


def test_console_that_has_gone_does_not_end_a_run(tmp_path, monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")
        flush = write
    run = t.Run()
    monkeypatch.setattr(t.sys, "stdout", Gone())
    with pytest.raises(OSError):
        run.log("step", a=1)  # where there is no log, somebody must be told
    run.log_path, run.live = tmp_path / "log.txt", True
    run.progress("step 1")
    assert not run.live
    run.log("step", a=2)
    assert run.log_path.read_text() == "step a:2\n"
    monkeypatch.setattr(t.sys, "stderr", Gone())
    run.log_path = tmp_path / "nowhere" / "log.txt"
    run.log("step", a=3)  # nothing is left to say it on, and the run can still be scored


def test_weights_that_are_not_finite_are_never_written(tmp_path, capsys):
    cfg = job_config(tmp_path)
    checkpoints = t.Checkpoints(cfg, t.Run(), fixed_data(cfg))
    facts = dict(step=1, elapsed_s=1.0, loader=[0, 0], averaged=0, trained=False)
    checkpoints.save("step_00000001", {"model.x": torch.tensor([1.0, float("nan")])}, facts)
    assert files_in(tmp_path) == [] and "not,finite" in capsys.readouterr().out


# ---- numbers -------------------------------------------------------------------------------------


def test_bad_step_leaves_weights_momenta_and_moments_as_they_were():
    cfg = tiny_config()
    model, run = tiny_model(cfg), t.Run()
    optimizer = t.Optimizer(model, cfg, run)

    def step(value):
        rng = torch.Generator().manual_seed(3)
        optimizer.flat_grad.copy_(torch.randn(optimizer.flat_grad.shape, generator=rng))
        optimizer.flat_grad[7] = value
        optimizer.step(1.0)
    step(0.5)
    before = weights_of(model) | {n: x.clone() for n, x in optimizer.state().items() if n != "bad_steps"}
    for value in (float("nan"), float("inf"), -float("inf")):
        step(value)
        assert_same(before, weights_of(model) | {n: x for n, x in optimizer.state().items() if n != "bad_steps"})
    assert int(optimizer.bad_steps) == 3 and not optimizer.flat_grad.any()
    step(0.5)
    assert not torch.equal(before["blocks.0.mixer.q_proj"], weights_of(model)["blocks.0.mixer.q_proj"])


def test_run_goes_on_after_a_bad_step_and_says_so(tmp_path, capsys):
    def poison(model, ids, targets, mean=t.mean_nll, count=[0]):  # noqa: B006 (counts the calls)
        count[0] += 1
        return mean(model, ids, targets) * (float("nan") if count[0] == 3 else 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "mean_nll", poison)
        model, stop = train(job_config(tmp_path, resume=""))
    assert stop.steps == 8 and all(bool(p.isfinite().all()) for p in model.parameters())
    [found] = [pairs for event, pairs in parse(capsys.readouterr().out) if event == "bad_step"]
    assert found == dict(step="3", count="1", most="10")


@pytest.mark.parametrize("after", ["opening", "a_batch"])
def test_shard_that_changes_or_vanishes_under_way_is_named(tiny, tmp_path, after):
    shard = tmp_path / "fineweb_train_000000.bin"
    for change, expected in ((lambda: os.truncate(shard, 5000), "changed while"),
                             (lambda: shard.unlink(), "vanished while")):
        shard.write_bytes((Path(tiny["DATA_PATH"]) / shard.name).read_bytes())
        cfg, shards = tiny_config(vocab_size=1024), t.open_shards(tmp_path, "train")
        if after == "opening":
            change()
        loader = t.Loader(shards, cfg, t.Run())
        if after == "a_batch":
            next(loader)
            change()
        with pytest.raises(t.DataError, match=f"{shard.name}: {expected}"):
            for _ in range(10):
                next(loader)
        loader.close()


def test_fault_of_a_shard_leaves_a_checkpoint(tmp_path, monkeypatch):
    cfg, calls = job_config(tmp_path), []

    def fault(loader):
        calls.append(loader)
        return "shard: vanished" if len(calls) > 3 else ""
    with monkeypatch.context() as patch:
        patch.setattr(t.Loader, "fault", fault)
        with pytest.raises(t.DataError, match=r"vanished; stopped at step 3; RESUME=\S+step_00000003.npz goes on"):
            train(cfg)
    model, _ = train(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(t.Loader, "fault", lambda loader: "behind the last step" if loader.state() == (0, 64) else "")
        whole, _ = train(job_config(tmp_path, resume="", run_id="whole"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters()))


def test_signal_in_the_last_validation_ends_the_run(tmp_path, monkeypatch):
    cfg = job_config(tmp_path, val_loss_every=8)

    def evaluate(*arguments, **more):
        t.STOP.signal = int(t.signal.SIGTERM)
        return t.Ledger(0, 1, 1.0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(t.STOP, "signal", 0)
        patch.setattr(t, "evaluate", evaluate)
        facts = dict(step=7, elapsed_s=1.0, loader=[0, 56], averaged=0, trained=False)
        with pytest.raises(t.Interrupted, match=r"stopped by SIGTERM after training; RESUME=\S+trained.npz goes on"):
            patch.setattr(t.Optimizer, "load", lambda *arguments: None)
            patch.setattr(t.Average, "load", lambda *arguments: None)
            model = t.init_weights(t.LM(cfg), cfg.seed)
            train(cfg, saved=({f"model.{name}": p for name, p in model.named_parameters()}, facts))
    assert t.Checkpoints(cfg, t.Run(), fixed_data(cfg)).load()[1]["step"] == 8


def test_stop_on_a_full_disk_promises_no_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "job.ckpt").write_text("a file where the folder should be")
    monkeypatch.setattr(t.STOP, "signal", int(t.signal.SIGTERM))
    with pytest.raises(t.Interrupted, match="at step 0; its checkpoint could not be written"):
        train(job_config(tmp_path, resume=""))


def test_going_back_to_an_earlier_step_keeps_what_is_newest(tmp_path):
    cfg = job_config(tmp_path)
    train(cfg, every=3)
    folder = tmp_path / "job.ckpt"
    (folder / "trained.npz").unlink()
    for name in ("step_00000030.npz", "step_00000040.npz"):  # of a run that had gone further
        (folder / name).write_bytes((folder / "step_00000006.npz").read_bytes())
        os.utime(folder / name, (1, 1))
    checkpoints = t.Checkpoints(cfg, t.Run(), fixed_data(cfg))
    tensors, facts = t.load_tensors(folder / "step_00000006.npz")
    for step in (7, 8):
        checkpoints.save(f"step_{step:08d}", tensors, facts)
    assert files_in(folder) == ["step_00000007.npz", "step_00000008.npz"]


def test_place_beyond_the_epoch_begins_the_next(tiny):
    cfg = tiny_config(vocab_size=1024)
    loader = t.Loader(t.open_shards(tiny["DATA_PATH"], "train"), cfg, t.Run(), (0, 10**6))
    assert next(loader).shape == (8, 65) and loader.state() == (1, 8)
    loader.close()


# ---- ranks that are lost -------------------------------------------------------------------------


def lose_a_rank(run, folder, leave=lambda: os._exit(0)):
    """Rank 1 dies in the third step; what rank 0 then says."""
    cfg = job_config(folder, resume="")
    step = t.train_step

    def dying(*args, count=[0], **kw):  # noqa: B006 (counts the calls)
        count[0] += 1
        if run.rank == 1 and count[0] == 3:
            leave()
        return step(*args, **kw)
    t.train_step = dying
    began = time.monotonic()
    try:
        train(cfg, run=run)
    except t.RankError as error:
        Path(folder, "said.json").write_text(json.dumps([str(error), time.monotonic() - began]))
        os._exit(0)


def hang_a_rank(run, folder):
    """Rank 1 goes to sleep instead, for longer than ranks wait for it."""
    lose_a_rank(run, folder, leave=lambda: (time.sleep(14), os._exit(0)))


@pytest.mark.parametrize("fault", [lose_a_rank, hang_a_rank], ids=["dies", "hangs"])
def test_rank_that_is_lost_stops_the_others_with_one_message(tmp_path, fault):
    with two_ranks(fault, tmp_path, rank_timeout_seconds=8):
        pass
    message, seconds = json.loads((tmp_path / "said.json").read_text())
    assert message.startswith("rank 0: lost another rank") and "RESUME" in message and seconds < 30
