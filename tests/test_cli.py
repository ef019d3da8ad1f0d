"""The script as users start it, at toy size: exit codes, files, the log's grammar, clear faults.

Whole processes are few (they cost seconds); the rest calls train_gpt.entry() in this process.
"""

import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (EVALUATION, NUM_VAL, ROOT, SAMPLE, SCRIPT, enter, files_in, fixed_data,
                      launch, on_ranks, parse, tiny_config, tiny_model, values, weights_of)

import train_gpt as t

LINE = re.compile(r"(?:[a-z][a-z0-9_]* )?[a-z][a-z0-9_]*:\S+(?: [a-z][a-z0-9_]*:\S+)*")
VERBATIM = re.compile(r"stopping_early: wallclock_cap train_time:\d+ms step:\d+/\d+|"
                      r"(?:Serialized model|Total submission size) int\d\+\w+: \d+ bytes")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run to its end in a process of its own, scored by every method: code, out, err, folder."""
    folder = tmp_path_factory.mktemp("whole")
    env = tiny | dict(OUT_DIR=str(folder), RUN_ID="night/run", VAL_LOSS_EVERY="2",
                      EVAL_DIAGNOSTICS="1", TTT_CHUNK_TOKENS="1024", STACK="(gdn\n\tswa:a  )*2")
    process = launch(env)
    out, err = process.communicate(timeout=300)
    return SimpleNamespace(code=process.returncode, out=out, err=err, folder=folder, env=env)


def test_whole_run_ends_well_in_silence_and_its_log_is_what_it_printed(whole):
    """A RUN_ID with a slash is a folder of the run's files."""
    assert (whole.code, whole.err) == (0, "")
    assert files_in(whole.folder) == ["night/run.artifact", "night/run.ckpt", "night/run.txt"]
    assert whole.out.split("\n\n")[0] + "\n" == (whole.folder / "night" / "run.txt").read_text()
    steps = [pairs for event, pairs in parse(whole.out) if not event]
    assert [pairs["step"] for pairs in steps if "val_bpb" in pairs] == ["0/3", "2/3", "3/3"]
    losses = [float(pairs["train_loss"]) for pairs in steps if "train_loss" in pairs]
    assert losses == pytest.approx(3 * [np.log(1024)], abs=0.2)


def test_lines_are_in_the_grammar_and_in_the_order_of_the_run(whole):
    wanted = ["run", "settings", "model", "kernel", "step", "hessians",
              "pre_quantization_post_ema", "fill_cap", "gptq", "quantized", "artifact", "reload",
              "final_int6_roundtrip", "final_int6_exact", "final_int6_sliding_window", "ttt",
              "final_int6_ttt", "final", "compliance"]
    events = [event or "step" for event, _ in parse(whole.out)]
    assert list(dict.fromkeys(event for event in events if event in wanted)) == wanted
    log = (whole.folder / "night" / "run.txt").read_text()
    outside = [line for line in log.splitlines() if not LINE.fullmatch(line)]
    assert [bool(VERBATIM.fullmatch(line)) for line in outside] == [True, True]  # the two sizes


def test_first_lines_show_changed_settings_and_commit(whole, tmp_path, monkeypatch, capsys):
    cfg = t.Config.from_env(whole.env)
    changed = {f.name: ",".join(t.plain(getattr(cfg, f.name)).split()) for f in t.fields(cfg)
               if getattr(cfg, f.name) != f.default}
    assert values(whole.out, "settings") == changed
    monkeypatch.chdir(tmp_path)
    t.start_log(t.Config(), t.Run())
    found = values(capsys.readouterr().out, "settings")
    assert found == dict(data_path="./data/datasets/fineweb10B_sp8192",
                         tokenizer_path="./data/tokenizers/fineweb_8192_bpe.model")
    found = values(whole.out, "run")
    assert found["code_sha256"] == t.hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout[:12] or "unknown"
    assert found["commit"].removesuffix("-dirty") == head


@pytest.mark.parametrize("event", ["pre_quantization_post_ema", *t.FINAL_EVENTS.values(), "final"])
def test_final_lines_make_their_numbers_checkable(whole, event):
    found = values(whole.out, event)
    bits = float(found["val_loss"]) * int(found["tokens"]) / np.log(2)
    assert int(found["tokens"]) == NUM_VAL - 1
    assert float(found["val_bpb"]) == pytest.approx(bits / int(found["bytes"]), rel=1e-7)
    if event == "final":  # the score of the method that was set beforehand
        assert found["method"] == "exact"
        assert found["val_bpb"] == values(whole.out, "final_int6_exact")["val_bpb"]


def test_verdict_is_ok_sizes_are_those_of_the_files_and_the_last_screen_a_summary(whole):
    told, final = values(whole.out, "compliance"), values(whole.out, "final")
    size = (whole.folder / "night" / "run.artifact").stat().st_size
    total = size + SCRIPT.stat().st_size
    assert f"\nSerialized model int8+rans: {size} bytes\n" in whole.out
    assert f"\nTotal submission size int8+rans: {total} bytes\n" in whole.out
    assert told["total_bytes"] == str(total)
    assert {told[check] for check in (
        "causal", "normalized", "score_first", "coverage", "bytes", "verdict")} == {"ok"}
    run = f"{whole.folder}/night/run"
    lines = whole.out.split("\n\n")[1].splitlines()
    assert dict(line.split(maxsplit=1) for line in lines) == dict(
        score=f"{float(final['val_bpb']):.4f} bits per byte, verdict ok",
        bytes=f"{int(told['total_bytes']):,} of 16,000,000",
        seconds=f"{told['train_s']} training, {told['eval_s']} evaluation",
        files=f"{run}.txt {run}.artifact",
        next=f"python logs/tools/report.py {run}.txt --html page.html")


@pytest.mark.parametrize("method, phase, num_tokens", [
    ("ttt", 1, 3 * 100 + 1), ("ttt", 3, 7 * 100 + 1),  # so that it trains twice
    ("exact", 1, 1201), ("sliding", 1, 256 + 1), ("roundtrip", 1, 256 + 1)])
def test_warm_up_of_an_evaluation_runs_it_on_synthetic_text(method, phase, num_tokens, capsys,
                                                            monkeypatch):
    cfg = tiny_config(ttt_phase_chunks=phase)  # chunks of 100 tokens, batches of 256
    model = tiny_model(cfg)
    weights = weights_of(model)
    lengths = []
    evaluate = t.evaluate
    monkeypatch.setattr(t, "evaluate", lambda model, tokens, *rest, **options: (
        lengths.append(len(tokens)), evaluate(model, tokens, *rest, **options)))
    t.warm_up_evaluation(model, method, 1200, fixed_data(cfg).table, t.Run())
    assert lengths == [num_tokens]
    assert capsys.readouterr().out == f"warm_up compile:0 evaluation:{method}\n"
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_fresh_process_gives_the_artifact_the_same_scores(whole, tmp_path):
    """No setting of the model is repeated: all come from the file, whatever else is set."""
    kept = {*EVALUATION, "PRESET", "DEVICE", "DATA_PATH", "TTT_CHUNK_TOKENS"}
    env = {name: value for name, value in whole.env.items() if name in kept} | dict(
        ARTIFACT=f"{whole.folder}/night/run.artifact", OUT_DIR=str(tmp_path), RUN_ID="again",
        SWA_WINDOW="7")
    process = launch(env)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err, files_in(tmp_path)) == (0, "", ["again.txt"])
    for event in (*t.FINAL_EVENTS.values(), "final"):
        assert values(out, event)["val_bpb"] == values(whole.out, event)["val_bpb"], event


def test_run_over_the_cap_fails_the_verdict_but_keeps_its_files(run):
    result = run(CAP_BYTES=str(len(t.code_bytes()) + 1000), RUN_ID="big", ITERATIONS="1")
    assert result.code == 1
    found = values(result.out, "compliance")
    assert (found["size"], found["verdict"]) == ("fail", "fail")
    assert files_in(result.folder) == ["big.artifact", "big.ckpt", "big.txt"]


def test_clock_stops_training(run):
    result = run(MAX_WALLCLOCK_SECONDS="1", GPTQ_RESERVE_SECONDS="0.3", ITERATIONS="100000")
    [line] = [line for line in result.out.splitlines() if line.startswith("stopping_early")]
    assert VERBATIM.fullmatch(line)
    assert 0.3 < float(values(result.out, "compliance")["train_s"]) < 1.5


class Simulated(t.Run):
    """A host and a device in simulated seconds; a GPU works through steps behind the host."""

    def __init__(self, seed, on_cuda):
        super().__init__()
        self.on_cuda = on_cuda
        self.rng = np.random.default_rng(seed)
        self.now = self.done = 1.0  # the host's time, and when the device will have done its work

    def train_step(self, *arguments, **more):
        self.done = max(self.now, self.done) + self.rng.uniform(0.9, 1.1)
        self.now = self.now + 0.01 if self.on_cuda else self.done
        return torch.tensor(1.0)

    def wait(self, until):
        self.now = max(self.now, until)
        return 0

    def synchronize(self):
        self.wait(self.done)

    def to_host(self, tensor):
        return t.partial(self.wait, self.done)

    def save(self):
        self.now += 2.0


def test_clock_stands_before_resume_and_after_pause(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(t, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    clock = t.Clock(t.Run(), 7.0)
    assert clock.elapsed() == 7.0
    clock.resume()
    assert (clock.elapsed(), clock.pause(), clock.elapsed(), clock.elapsed()) == (8, 9, 9, 9)
    clock.resume()
    assert clock.elapsed() == 10


@pytest.mark.parametrize("on_cuda, saving, logging", [
    (False, False, False), (False, True, False), (True, False, False), (True, False, True)])
def test_training_never_outlasts_its_clock(monkeypatch, on_cuda, saving, logging):
    """A step that would end after 100 s is not begun, also behind a checkpoint that took 2 s.

    On a GPU a step is launched in milliseconds; a log line waits until it is done.
    """
    cfg = tiny_config(max_wallclock_seconds=100.0, iterations=10**6, gptq_enabled=False,
                      checkpoint_every_seconds=96.5 * saving, train_log_every=1)
    monkeypatch.setattr(t, "log_step", lambda job, *_: logging and job.run.synchronize())
    for seed in range(40):
        run = Simulated(seed, on_cuda)
        monkeypatch.setattr(t, "time", SimpleNamespace(perf_counter=lambda run=run: run.now))
        monkeypatch.setattr(t, "train_step", run.train_step)
        loader = mock.MagicMock()
        loader.ahead[0].exception.return_value = None
        job = SimpleNamespace(model=None, cfg=cfg, run=run, step=0, clock=t.Clock(run),
                              save=mock.Mock(side_effect=run.save), average=mock.Mock(),
                              optimizer=SimpleNamespace(bad_steps=0), loader=loader, averaged=0)
        job.clock.resume()
        t.train_loop(job, None, 8)
        assert 96 < job.clock.pause() <= 100
        assert job.save.call_count == saving


def assert_one_line(result, *parts):
    """It ended with exit code 2 and one line on stderr that contains these parts."""
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"error: .*\n", result.err)
    assert all(part in result.err for part in parts), result.err


@pytest.mark.parametrize("changes, parts", [
    ("DATA_PATH=/nowhere", ["DATA_PATH=/nowhere", "data/download.py", "PRESET=sample"]),
    ("DEVICE=cuda", ["DEVICE=cuda", "PRESET=sample"]),
    ("PRESET= DEVICE=auto", ["PRESET=sample", "DEVICE=cpu"]),
    ("KERNEL=fla", ["KERNEL=fla", "CPU"]), ("ARTIFACT=/not/here", ["/not/here", "o such file"]),
    (f"ARTIFACT={SCRIPT}", [str(SCRIPT), "not an artifact of this script"]),
    ("RESUME=/nowhere/a", ["/nowhere/a", "not a whole checkpoint", "No such file"]),
    (f"OUT_DIR={SCRIPT}", [str(SCRIPT), "File exists"]),
    (f"OUT_DIR={SCRIPT}/logs", [f"{SCRIPT}/logs", "Not a directory"]),
    ("CAP_BYTES=1000", ["CAP_BYTES=1000", "script's", "too few for"]),
    ("ARTIFACT=/dev/zero", ["ARTIFACT=/dev/zero", "No such file"]),
    ("RUN_ID=" + 300 * "a", [f"={80 * 'a'}: must be up to"]),
], ids=lambda text: text[:25] if isinstance(text, str) else "")
def test_fault_of_the_user_is_one_line(run, monkeypatch, changes, parts):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_one_line(run(**dict(pair.split("=") for pair in changes.split())), *parts)


@pytest.mark.parametrize("make", [
    os.mkfifo, lambda path: path.touch() or os.truncate(path, 1 << 40)], ids=["pipe", "sparse"])
def test_artifact_that_is_no_file_or_too_large_is_not_read(run, tmp_path, make):
    make(tmp_path / "a")
    assert_one_line(run(ARTIFACT=f"{tmp_path}/a"), f"ARTIFACT={tmp_path}/a: No such file, or more")


@pytest.mark.parametrize("name, module", [
    ("zstd", None), ("brotli", SimpleNamespace(compress=lambda *a, **k: b"", Decompressor=int))],
    ids=["missing", "too old"])
def test_compressor_that_does_not_work_is_found_before_training(run, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, "zstandard" if name == "zstd" else name, module)
    assert_one_line(run(COMPRESSOR=name), f"COMPRESSOR={name}", "requirements.txt")


def test_artifact_is_scored_with_its_own_tokenizer_only(whole, run, tmp_path):
    """Another file of the same pieces is another tokenizer; the hash is in the artifact."""
    (tmp_path / "other.model").write_bytes(
        (SAMPLE / "corpus_1024_bpe.model").read_bytes() + b"\xa2\x06\0")  # an unknown, empty field
    settings = dict(ARTIFACT=str(whole.folder / "night" / "run.artifact"),
                    TOKENIZER_PATH=str(tmp_path / "other.model"))
    assert_one_line(run(**settings), "run.artifact: made with another tokenizer", "other.model")


@pytest.mark.slow
@pytest.mark.parametrize("closed, changes, code", [
    (">&- 2>&- <&-", dict(ITERATIONS="0"), 0), ("2>&-", dict(VOCAB_SIZE="3"), 2)])
def test_closed_streams_end_no_run(tiny, tmp_path, closed, changes, code):
    """Also of a fault, whose exit code stays."""
    env = os.environ | tiny | dict(OUT_DIR=str(tmp_path), RUN_ID="x", PYTHON=sys.executable)
    done = subprocess.run(f'"$PYTHON" {SCRIPT} {closed}', shell=True, env=env | changes,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert code or "verdict:ok" in (tmp_path / "x.txt").read_text()


def test_where_posix_is_missing_the_run_is_the_same(run, monkeypatch):
    """Windows has no SIGHUP."""
    monkeypatch.delattr(signal, "SIGHUP")
    assert run(ITERATIONS="1", FINAL_SCORE="roundtrip").code == 0


@pytest.mark.slow
def test_torchruns_summary_has_the_cause(tiny):
    _, err = launch(tiny | dict(VOCAB_SIZE="3"), 2).communicate(timeout=60)
    assert err.count("error: TOKENIZER_PATH=") == 1
    assert "GolfError: TOKENIZER_PATH=" in err.split("Root Cause")[1]


@pytest.mark.parametrize("name, resume", [("mine.txt", ""), ("mine.artifact", ""),
                                          ("mine.ckpt", ""), ("mine.artifact", "auto")])
def test_another_runs_files_are_not_overwritten(run, tmp_path, name, resume):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    result = run(RUN_ID="mine", RESUME=resume, ITERATIONS="0")
    assert (tmp_path / "out" / name).read_text() == "precious"
    assert (result.code, files_in(tmp_path)) == (2, [f"out/{name}"])
    assert "RUN_ID=mine" in result.err and "set another RUN_ID" in result.err


def test_help_is_the_only_argument(run):
    assert_one_line(run("--seed=1"), "--seed=1", "--help")
    result = run("--help")
    assert (result.code, result.out, result.err) == (0, t.help_text() + "\n", "")


def enter_as_rank(run, env):
    """The script in this process as one of several ranks, whose group `run` has joined."""
    return enter(env | dict(RANK=str(run.rank), WORLD_SIZE=str(run.world_size)))


@pytest.mark.slow
def test_eight_ranks_give_the_scores_of_one(whole, tmp_path):
    first, *others = on_ranks(8, enter_as_rank, whole.env | dict(
        OUT_DIR=str(tmp_path), RUN_ID="many", EVAL_DIAGNOSTICS="0", FINAL_SCORE="ttt",
        VAL_LOSS_EVERY="0"))
    assert first.code == 0, first.err
    assert {(rank.code, rank.out) for rank in others} == {(0, "")}
    assert first.out.split("\n\n")[0] + "\n" == (tmp_path / "many.txt").read_text()
    for event in ("pre_quantization_post_ema", "final_int6_ttt"):
        one = float(values(whole.out, event)["val_bpb"])
        assert float(values(first.out, event)["val_bpb"]) == pytest.approx(one, rel=1e-5), event
