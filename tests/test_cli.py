"""The command line: train_gpt.py as users start it, at toy size, against its exit codes, its files, the log's grammar
and one clear line for each fault.

Whole processes are few (they cost seconds to start); everything else calls train_gpt.entry() in this process.
"""

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (EVALUATION, NUM_VAL, ROOT, TINY, files_in, parse, process_env, tiny_config,
                      tiny_model, values)

import train_gpt as t

SCRIPT = ROOT / "train_gpt.py"
LINE = re.compile(r"(?:[a-z][a-z0-9_]* )?[a-z][a-z0-9_]*:\S+(?: [a-z][a-z0-9_]*:\S+)*")
VERBATIM = [re.compile(r"stopping_early: wallclock_cap train_time:\d+ms step:\d+/\d+"),
            re.compile(r"Serialized model int\d\+\w+: \d+ bytes"),
            re.compile(r"Total submission size int\d\+\w+: \d+ bytes")]
@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run to its end in a process of its own: code, out, err, folder."""
    folder = tmp_path_factory.mktemp("finished")
    done = subprocess.run([sys.executable, str(SCRIPT)], env=process_env(tiny, OUT_DIR=str(folder), RUN_ID="whole"),
                          cwd=folder, capture_output=True, text=True, timeout=300)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, folder=folder)


def outside_grammar(text):
    """The lines that are neither in the grammar nor one of the three verbatim forms."""
    return [line for line in text.splitlines()
            if not LINE.fullmatch(line) and not any(form.fullmatch(line) for form in VERBATIM)]


# ---- a whole run ---------------------------------------------------------------------------------


def test_whole_run_ends_well(finished):
    assert (finished.code, finished.err) == (0, "")


def test_whole_run_leaves_log_artifact_and_checkpoint(finished):
    assert files_in(finished.folder) == ["whole.artifact", "whole.ckpt/exported.json", "whole.ckpt/trained.npz",
                                         "whole.txt"]


def test_console_and_log_file_are_the_same_text(finished):
    assert finished.out == (finished.folder / "whole.txt").read_text()


def test_events_come_in_the_order_of_the_run(finished):
    events = [event or next(iter(pairs)) for event, pairs in parse(finished.out)]
    order = [event for i, event in enumerate(events) if not i or events[i - 1] != event]
    order = [event for event in order if event not in ("config", "config_changed")]
    assert order == ["run", "model", "kernel", "step", "hessians", "pre_quantization_post_ema", "fill_cap", "gptq",
                     "role", "quantized", "artifact", "reload", "evaluation_plan", "final_int6_roundtrip",
                     "final_int6_exact", "final_int6_sliding_window", "final", "position", "compliance"]
    assert finished.out.splitlines()[-3].startswith("Serialized model int8+rans: ")
    assert finished.out.splitlines()[-2].startswith("Total submission size int8+rans: ")


def test_every_line_is_in_the_grammar(finished):
    assert outside_grammar(finished.out) == []
    assert sum(not LINE.fullmatch(line) for line in finished.out.splitlines()) == 2  # the two sizes


def test_log_shows_every_setting_once_and_marks_the_changed_ones(finished, tiny):
    shown = [(event, next(iter(pairs))) for event, pairs in parse(finished.out) if event.startswith("config")]
    assert [name for _, name in shown] == [f.name for f in t.fields(t.Config)]
    changed = {name for event, name in shown if event == "config_changed"}
    assert {"model_dim", "stack", "data_path", "run_id", "out_dir", "val_loss_every"} <= changed
    assert not {"seed", "matrix_lr", "grid", "cap_bytes"} & changed


def test_changed_settings_show_value_and_default_alike(finished):
    pairs = {next(iter(pairs)): pairs for event, pairs in parse(finished.out) if event == "config_changed"}
    assert pairs["eval_diagnostics"] == dict(eval_diagnostics="1", default="0")
    assert pairs["max_wallclock_seconds"] == dict(max_wallclock_seconds="0", default="600")
    assert pairs["run_id"] == dict(run_id="whole", default="-")


def test_validation_happens_at_its_steps_and_at_the_end(finished):
    steps = [pairs["step"] for event, pairs in parse(finished.out) if not event and "val_bpb" in pairs]
    assert steps == ["0/3", "2/3", "3/3"]


def test_training_lines_show_the_loss(finished):
    losses = [float(pairs["train_loss"]) for event, pairs in parse(finished.out) if "train_loss" in pairs]
    assert len(losses) == 3 and all(5 < loss < 8 for loss in losses)  # ln 1024 = 6.93


@pytest.mark.parametrize("event", ["pre_quantization_post_ema", "final_int6_roundtrip", "final_int6_exact",
                                   "final_int6_sliding_window", "final"])
def test_final_lines_make_their_numbers_checkable(finished, event):
    found = values(finished.out, event)
    loss, bpb, tokens, num_bytes = (found[key] for key in ("val_loss", "val_bpb", "tokens", "bytes"))
    assert len(loss.split(".")[1]) == len(bpb.split(".")[1]) == 8
    assert int(tokens) == NUM_VAL - 1
    assert float(bpb) == pytest.approx(float(loss) * int(tokens) / np.log(2) / int(num_bytes), rel=1e-7)


def test_final_score_is_the_one_set_beforehand(finished):
    final, exact = values(finished.out, "final"), values(finished.out, "final_int6_exact")
    assert final["method"] == "exact" and final["val_bpb"] == exact["val_bpb"]


def test_printed_sizes_are_those_of_the_files(finished):
    artifact, code = (finished.folder / "whole.artifact").stat().st_size, SCRIPT.stat().st_size
    assert f"int8+rans: {artifact} bytes\nTotal submission size int8+rans: {artifact + code} bytes" in finished.out
    assert values(finished.out, "compliance")["total_bytes"] == str(artifact + code)
    assert values(finished.out, "run")["code_bytes"] == str(code)


def test_verdict_is_ok_and_rests_on_every_check(finished):
    found = values(finished.out, "compliance")
    checks = ("causal", "normalized", "score_first", "coverage", "bytes", "verdict")
    assert {name: found[name] for name in checks} == dict.fromkeys(checks, "ok")
    assert found["tokens_scored"] == str(NUM_VAL - 1)


def test_checkpoint_holds_the_weights_before_rounding(finished):
    tensors, _ = t.load_tensors(finished.folder / "whole.ckpt" / "trained.npz")
    weights = {name.removeprefix("model."): value for name, value in tensors.items()}
    model = t.load_artifact(finished.folder / "whole.artifact")
    assert weights.keys() == dict(model.named_parameters()).keys()
    largest = max(float((weights[name] - p.detach()).abs().max()) for name, p in model.named_parameters())
    assert 0 < largest < 0.1


# ---- what an artifact is good for ----------------------------------------------------------------


def test_evaluating_the_artifact_alone_gives_the_same_score(finished, run):
    """No setting of the model is repeated: all of them come from the file."""
    only = {name: None for name in TINY if name not in EVALUATION and name not in ("PRESET", "DEVICE")}
    again = run(**only, EVAL_ONLY="1", ARTIFACT=str(finished.folder / "whole.artifact"))
    assert again.code == 0, again.err
    assert values(again.out, "final")["val_bpb"] == values(finished.out, "final")["val_bpb"]
    assert values(again.out, "final_int6_sliding_window")["val_bpb"] == values(
        finished.out, "final_int6_sliding_window")["val_bpb"]
    assert values(again.out, "compliance")["train_s"] == "-"


def test_what_the_artifact_is_stands_in_the_log_whatever_the_settings_say(finished, run):
    again = run(EVAL_ONLY="1", ARTIFACT=str(finished.folder / "whole.artifact"), LOGIT_SOFTCAP="5", SWA_WINDOW="7")
    assert values(again.out, "artifact_config") == dict(logit_softcap="30", swa_window="16")
    assert values(again.out, "final") == values(finished.out, "final")


def test_evaluation_writes_a_log_alone(finished, run):
    again = run(EVAL_ONLY="1", ARTIFACT=str(finished.folder / "whole.artifact"), RUN_ID="again", EVAL_DIAGNOSTICS="0")
    assert files_in(again.folder) == ["again.txt"]


def test_prompt_is_continued_and_nothing_written(finished, run):
    artifact = str(finished.folder / "whole.artifact")
    results = [run(PROMPT="The river", PROMPT_TOKENS="8", ARTIFACT=artifact, **changes)
               for changes in ({}, {}, dict(SEED="5"), dict(PROMPT_TEMPERATURE="0"))]
    assert [result.code for result in results] == [0] * 4
    assert all(result.out.startswith("The river") and len(result.out) > len("The river\n") for result in results)
    assert results[0].out == results[1].out != results[2].out
    assert not results[0].folder.exists()


def test_prompt_uses_the_document_start_of_the_artifact(tmp_path, run):
    """BOS_ID is a setting of the model: the environment's must not matter."""
    cfg = tiny_config(vocab_size=1024, bos_id=2)
    t.save_artifact(tmp_path / "other", tiny_model(cfg), cfg)
    greedy = dict(PROMPT="The", PROMPT_TOKENS="20", PROMPT_TEMPERATURE="0", ARTIFACT=str(tmp_path / "other"))
    results = [run(**greedy, BOS_ID=bos) for bos in ("2", "1", "-1")]
    assert [result.code for result in results] == [0, 0, 0]
    assert len({result.out for result in results}) == 1


def test_artifact_of_another_vocabulary_is_one_line(tmp_path, run):
    cfg = tiny_config(vocab_size=512)
    t.save_artifact(tmp_path / "other", tiny_model(cfg), cfg)
    result = run(EVAL_ONLY="1", ARTIFACT=str(tmp_path / "other"))
    assert result.code == 2 and re.fullmatch(r"error: .*512.*1024.*\n|error: .*1024.*512.*\n", result.err)


def test_plan_prints_its_lines_and_writes_nothing(run):
    result = run(PLAN="1")
    assert result.code == 0 and not result.folder.exists()
    assert [event for event, _ in parse(result.out)] == ["plan", "plan_size", "plan_memory", "plan_time"]
    assert all(LINE.fullmatch(line) for line in result.out.splitlines())


def test_plan_of_the_record_needs_no_gpu_and_no_data(run, tiny):
    result = run(**{name: None for name in tiny}, PLAN="1")
    assert result.code == 0
    assert int(values(result.out, "plan_size")["total_bytes"]) < 16_000_000
    assert int(values(result.out, "plan")["parameters"]) > 30_000_000


def test_plan_that_exceeds_the_cap_warns(run):
    assert "warning" in [event for event, _ in parse(run(PLAN="1", CAP_BYTES="1000").out)]


# ---- variants of a run ---------------------------------------------------------------------------


def test_run_over_the_cap_fails_but_keeps_its_files(run):
    result = run(CAP_BYTES="1000", RUN_ID="big", ITERATIONS="1", EVAL_DIAGNOSTICS="0")
    assert result.code == 1
    assert values(result.out, "compliance")["verdict"] == "fail"
    assert values(result.out, "over_limit")["limit"] == "size"
    assert files_in(result.folder) == ["big.artifact", "big.ckpt/exported.json", "big.ckpt/trained.npz", "big.txt"]


def test_clock_stops_training(run):
    result = run(MAX_WALLCLOCK_SECONDS="1", GPTQ_RESERVE_SECONDS="0.3", ITERATIONS="100000", EVAL_DIAGNOSTICS="0",
                 VAL_LOSS_EVERY="0")
    [line] = [line for line in result.out.splitlines() if line.startswith("stopping_early")]
    assert VERBATIM[0].fullmatch(line)
    assert 0.3 < float(values(result.out, "compliance")["train_s"]) < 1.5


class SimulatedDevice:
    """A clock and a device that works through steps behind the host's back, or with it (`queued` False: a CPU)."""

    def __init__(self, seed, queued):
        self.rng, self.queued, self.now, self.done = np.random.default_rng(seed), queued, 0.0, 0.0

    def train_step(self, *arguments, qat=False):
        self.done = max(self.now, self.done) + self.rng.uniform(0.9, 1.1)
        self.now = self.now + 0.01 if self.queued else self.done
        return torch.tensor(1.0)

    def synchronize(self):
        self.now = max(self.now, self.done)

    def event(self):
        fence = SimpleNamespace()

        def record():
            fence.at = self.done

        def synchronize():
            self.now = max(self.now, fence.at)
        fence.record, fence.synchronize = record, synchronize
        return fence


class NoBatches:
    """A loader for steps that read nothing."""

    def __next__(self):
        return None

    def fault(self):
        return ""

    def state(self):
        return 0, 0

    def close(self):
        pass


@pytest.mark.parametrize("kind, saving", [("cpu", False), ("cpu", True), ("cuda", False)])
def test_training_never_outlasts_its_clock(tiny, monkeypatch, kind, saving):
    """Steps of 0.9 to 1.1 simulated seconds against a limit of 100: a step that would end too late is not begun, also
    after a checkpoint that took 2."""
    cfg = t.resolve_kernels(t.Config.from_env(tiny | dict(
        MAX_WALLCLOCK_SECONDS="100", ITERATIONS="100000", VAL_LOSS_EVERY="0", WARMUP_STEPS="0", EMA_DECAY="0",
        MICRO_BATCH_TOKENS="512", GPTQ_ENABLED="0")), t.Run())
    monkeypatch.setattr(t, "Loader", lambda *arguments: NoBatches())
    monkeypatch.setattr(t, "Optimizer", lambda *arguments: SimpleNamespace(bad_steps=torch.zeros(())))
    data = SimpleNamespace(train=[], val=np.zeros(1000, np.uint16), table=None)
    model, ends = t.init_weights(t.LM(cfg), 0), []
    for seed in range(40):
        device, run = SimulatedDevice(seed, queued=kind == "cuda"), t.Run()
        run.device, run.peak_memory_mib, run.synchronize = SimpleNamespace(type=kind), lambda: 0, device.synchronize
        monkeypatch.setattr(t, "time", SimpleNamespace(perf_counter=lambda device=device: device.now))
        monkeypatch.setattr(t, "train_step", device.train_step)
        monkeypatch.setattr(torch.cuda, "Event", device.event)
        saved = []

        def save_step(job, device=device, saved=saved):
            saved.append(job.step)
            device.now += 2.0
        checkpoints = SimpleNamespace(due=lambda elapsed, saved=saved: saving and elapsed > 96.5 and not saved,
                                      save=lambda *arguments: None, save_step=save_step)
        ends.append(t.train(model, data, cfg, run, checkpoints).train_s)
        assert bool(saved) == saving
    assert max(ends) <= 100 and min(ends) > 96


def test_run_without_a_step_is_a_whole_run(run):
    result = run(ITERATIONS="0", EVAL_DIAGNOSTICS="0", VAL_LOSS_EVERY="0")
    assert result.code == 0 and float(values(result.out, "final")["val_loss"]) == pytest.approx(np.log(1024), abs=0.05)


def test_holdout_scores_training_text_instead_of_validation(run):
    result = run(HOLDOUT_TOKENS="1000", ITERATIONS="1", EVAL_DIAGNOSTICS="0", FINAL_SCORE="roundtrip")
    assert result.code == 0 and values(result.out, "final")["tokens"] == "999"
    assert values(result.out, "compliance")["verdict"] == "holdout"  # not a score of the validation split


def test_presets_combine(run, tiny):
    """pr1749 at sample size, architecture as the presets give it."""
    kept = ("PRESET", "DEVICE", "DATA_PATH", "MAX_WALLCLOCK_SECONDS", *EVALUATION)
    result = run(**{name: None for name in tiny if name not in kept} | dict(
        PRESET="pr1749,sample", ITERATIONS="1", TRAIN_BATCH_TOKENS="256", EVAL_DIAGNOSTICS="0", COMPRESSOR="lzma"))
    assert result.code == 0 and values(result.out, "run")["preset"] == "pr1749,sample"


def test_diverging_run_says_so(run):
    result = run(MATRIX_LR="1e30", TIED_EMBED_LR="1e30", GRAD_CLIP_NORM="0", ITERATIONS="5", MAX_BAD_STEPS="2",
                 VAL_LOSS_EVERY="0")
    assert result.code == 2
    assert re.fullmatch(r"error: step \d: 3 steps had gradients that are not finite.*\n", result.err)
    assert not list(result.folder.glob("*.artifact"))


def test_run_id_names_time_preset_and_seed_when_unset(run):
    result = run(ITERATIONS="0", EVAL_DIAGNOSTICS="0", SEED="7")
    [log] = [name for name in files_in(result.folder) if name.endswith(".txt")]
    assert re.fullmatch(r"\d{8}-\d{6}_sample_seed7\.txt", log)


# ---- faults: one line, exit code 2 ---------------------------------------------------------------


def assert_one_line(result, *parts):
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert all(part in result.err for part in parts), result.err


FAULTS = [
    (dict(DATA_PATH="/nowhere"), ["DATA_PATH=/nowhere", "data/download.py", "PRESET=sample"]),
    (dict(TOKENIZER_PATH="/nowhere.model"), ["TOKENIZER_PATH=/nowhere.model", "no such file"]),
    (dict(TOKENIZER_PATH=str(SCRIPT)), ["TOKENIZER_PATH=", "not a SentencePiece model"]),
    (dict(VOCAB_SIZE="2048"), ["VOCAB_SIZE=2048", "1024 pieces"]),
    (dict(TRAIN_SEQLEN="64"), ["TRAIN_SEQLEN", "TRAIN_SEQ_LEN"]),
    (dict(SEED="one"), ["SEED='one'", "whole number"]),
    (dict(PRESET="smaple"), ["PRESET=smaple", "sample"]),
    (dict(DEVICE="cuda"), ["DEVICE=cuda", "DEVICE=cpu"]),
    (dict(PRESET=None, DEVICE=None), ["PRESET=sample", "DEVICE=cpu"]),
    (dict(KERNEL="fla"), ["KERNEL=fla", "CPU"]),
    (dict(ATTN_KERNEL="varlen"), ["ATTN_KERNEL=varlen", "CPU"]),
    (dict(EVAL_ONLY="1"), ["ARTIFACT"]),
    (dict(EVAL_ONLY="1", ARTIFACT="/nowhere"), ["/nowhere", "No such file"]),
    (dict(PROMPT="x", ARTIFACT="/nowhere"), ["/nowhere", "No such file"]),
    (dict(PROMPT="x", ARTIFACT=str(SCRIPT)), [str(SCRIPT), "not an artifact"]),
    (dict(HOLDOUT_TOKENS="1000000"), ["HOLDOUT_TOKENS=1000000", "40000 tokens"]),
    (dict(OUT_DIR="a\udcff"), ["OUT_DIR=", "must be UTF-8"]),
    (dict(RANK="x"), ["RANK", "must be numbers", "torchrun"]),
    (dict(WORLD_SIZE="2"), ["WORLD_SIZE=2", "MASTER_ADDR", "torchrun"]),
]


@pytest.mark.parametrize("changes, parts", FAULTS, ids=[" ".join(f"{k}={v}" for k, v in c.items()) for c, _ in FAULTS])
def test_fault_of_the_user_is_one_line(run, monkeypatch, changes, parts):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(**changes)
    assert_one_line(result, *parts)
    assert not result.folder.exists()


def test_foreign_artifact_is_refused_before_any_work(run):
    result = run(EVAL_ONLY="1", ARTIFACT=str(SCRIPT))
    assert result.code == 2 and "not an artifact" in result.err


def test_earlier_run_is_not_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert_one_line(run(RUN_ID="mine"), "RUN_ID=mine", "mine.txt")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious" and files_in(tmp_path) == ["out/mine.txt"]


def test_unwritable_folder_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(run(OUT_DIR=str(tmp_path / "file" / "logs")), f"OUT_DIR={tmp_path}/file/logs")


def test_batch_that_the_ranks_cannot_share_names_the_nearest():
    cfg = t.Config.from_env(TINY)
    with pytest.raises(ValueError, match=r"TRAIN_BATCH_TOKENS=512: .*3 ranks; set TRAIN_BATCH_TOKENS=576"):
        t.micro_batch_rows(cfg, t.Run(0, 3))


@pytest.mark.parametrize("argument", ["--seed=1", "sample", "-v"])
def test_arguments_are_refused(run, argument):
    assert_one_line(run(argument), argument, "--help")


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_is_printed(run, argument):
    result = run(argument)
    assert (result.code, result.err) == (0, "") and result.out == t.help_text() + "\n"


def test_values_with_any_white_space_keep_the_grammar(run):
    result = run(ITERATIONS="0", EVAL_DIAGNOSTICS="0", STACK="gdn\n\tswa:a  gdn swa:a")
    assert result.code == 0
    assert outside_grammar(result.out) == []


# ---- processes: interruption and several ranks ---------------------------------------------------


def start(command, env, folder):
    """A process in a group of its own, so that signals to its group reach no one else."""
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def wait_for_step(process):
    """Read the console until training is under way; returns what was read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if " train_loss:" in line or line.startswith("step:3"):
            return "".join(lines)
    raise AssertionError("".join(lines) + process.stderr.read())


def end(process, read, timeout=60):
    """(code, whole stdout, stderr) once the process has ended; it is killed if it does not."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, read + out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_training_ends_with_one_line(tiny, tmp_path, number):
    env = process_env(tiny, OUT_DIR=str(tmp_path), RUN_ID="cut", ITERATIONS="1000000", VAL_LOSS_EVERY="0")
    process = start([sys.executable, str(SCRIPT)], env, tmp_path)
    read = wait_for_step(process)
    process.send_signal(number)
    code, out, err = end(process, read)
    assert code == 130
    [saved] = re.fullmatch(rf"error: stopped by {number.name} at step \d+; RESUME=(\S+) goes on\n", err).groups()
    assert files_in(tmp_path) == [str(Path(saved).relative_to(tmp_path)), "cut.txt"]
    log = (tmp_path / "cut.txt").read_text()  # the signal may come between console and file
    assert log.startswith("run preset:sample") and out.startswith(log) and out[len(log):].count("\n") <= 1


def torchrun():
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]


def test_two_ranks_give_the_score_of_one(finished, tiny, tmp_path):
    env = process_env(tiny, OUT_DIR=str(tmp_path), RUN_ID="two", EVAL_DIAGNOSTICS="0")
    code, out, err = end(start(torchrun(), env, tmp_path), "", 120)
    assert code == 0, err
    assert out == (tmp_path / "two.txt").read_text()  # rank 1 is silent
    assert values(out, "run")["world_size"] == "2"
    for event in ("pre_quantization_post_ema", "final"):
        one, two = (float(values(text, event)["val_bpb"]) for text in (finished.out, out))
        assert two == pytest.approx(one, rel=1e-5), event
    one, two = ([float(pairs["train_loss"]) for _, pairs in parse(text) if "train_loss" in pairs]
                for text in (finished.out, out))
    assert two == pytest.approx(one, rel=1e-4)


TTT = dict(TTT_ENABLED="1", FINAL_SCORE="ttt", TTT_CHUNK_TOKENS="512", TTT_EPOCHS="2", TTT_LR="0.02",
           EVAL_DIAGNOSTICS="0")


@pytest.mark.parametrize("scoring", ["sliding", "exact"])
def test_run_scored_by_test_time_training(run, scoring):
    result = run(TTT_SCORING=scoring, **TTT)
    assert result.code == 0, result.err
    found, final, last = (values(result.out, event) for event in ("final_int6_ttt", "final", "compliance"))
    assert final["method"] == "ttt" and final["val_bpb"] == found["val_bpb"] and found["scoring"] == scoring
    assert last["score_first"] == last["coverage"] == last["verdict"] == "ok"


def test_two_ranks_adapt_as_one(run, tiny, tmp_path):
    one = run(**TTT)
    folder = tmp_path / "two"
    env = process_env(tiny, OUT_DIR=str(folder), RUN_ID="two", **TTT)
    code, out, err = end(start(torchrun(), env, tmp_path), "", 120)
    assert (one.code, code) == (0, 0), err
    one, two = (float(values(text, "final")["val_bpb"]) for text in (one.out, out))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("rank, local_rank, speaks", [("0", "0", True), ("1", "1", False), ("8", "0", True)])
def test_what_all_ranks_of_a_node_find_is_told_once(run, rank, local_rank, speaks):
    result = run(DATA_PATH="/nowhere", RANK=rank, LOCAL_RANK=local_rank)
    assert (result.code, result.out) == (2, "") and result.err.startswith("error: DATA_PATH=/nowhere") == speaks
    assert bool(result.err) == speaks


def test_interrupted_ranks_leave_no_traceback_of_the_script(tiny, tmp_path):
    """Ctrl-C in a terminal reaches torchrun and every rank at once."""
    env = process_env(tiny, OUT_DIR=str(tmp_path), RUN_ID="cut", ITERATIONS="1000000", VAL_LOSS_EVERY="0")
    process = start(torchrun(), env, tmp_path)
    read = wait_for_step(process)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = end(process, read)
    assert code != 0 and "error: stopped by SIG" in err
    assert str(SCRIPT) + '", line' not in err
    saved, log = files_in(tmp_path)
    assert re.fullmatch(r"cut.ckpt/step_\d{8}.npz", saved) and log == "cut.txt"


# ---- a terminal, two nodes -----------------------------------------------------------------------


@pytest.mark.parametrize("color", [True, False], ids=["color", "NO_COLOR"])
def test_terminal_shows_progress_in_place_and_the_log_stays_plain(tiny, tmp_path, color):
    """A pseudo-terminal sees a line of rate, time left and last bpb, taken away before each line of the log."""
    screen, terminal = pty.openpty()
    env = process_env(tiny, OUT_DIR=str(tmp_path), RUN_ID="tty", TERM="xterm", EVAL_DIAGNOSTICS="0",
                      TRAIN_LOG_EVERY="9", ITERATIONS="6", **({} if color else {"NO_COLOR": "1"}))
    process = subprocess.Popen([sys.executable, str(SCRIPT)], env=env, cwd=tmp_path, stdout=terminal, stderr=terminal)
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the other side has closed
        while part := os.read(screen, 65536):
            seen += part
    os.close(screen)
    assert process.wait(60) == 0
    shown, style = seen.decode().replace("\r\n", "\n"), "\x1b[2m" if color else ""
    form = r"\r\x1b\[K" + re.escape(style) + r"step (\d)/6  [\d,]+ tokens/s  \d+ s left(?:  val_bpb [\d.]+)?"
    found = re.findall(form, shown)
    assert found == list("123456") and "val_bpb" in shown.split("step 6/6")[1] and ("\x1b[2m" in shown) == color
    log = (tmp_path / "tty.txt").read_text()
    assert "\x1b" not in log
    plain = re.sub(r"\r\x1b\[K(?:\x1b\[2m)?step [^\r\x1b]*(?:\x1b\[m)?(?=\r)|\r\x1b\[K", "", shown)
    assert plain == log


def test_two_nodes_train_as_two_ranks(finished, tiny, tmp_path):
    """torchrun --nnodes=2 on the loopback address; only the first node writes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    nodes = []
    for node in range(2):
        env = process_env(tiny, OUT_DIR=str(tmp_path / f"node{node}"), RUN_ID="far", EVAL_DIAGNOSTICS="0")
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}",
                   "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}", str(SCRIPT)]
        nodes.append(start(command, env, tmp_path))
    ends = [end(process, "", 120) for process in nodes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert values(ends[0][1], "run")["world_size"] == "2" and ends[1][1] == ""
    assert float(values(ends[0][1], "final")["val_bpb"]) == pytest.approx(
        float(values(finished.out, "final")["val_bpb"]), rel=1e-5)
    assert files_in(tmp_path) == ["node0/far.artifact", "node0/far.ckpt/exported.json", "node0/far.ckpt/trained.npz",
                                  "node0/far.txt"]
