"""logs/report.py: parsing, table, figures, submission.json, and the review of good and broken folders."""

import ast
import hashlib
import html
import importlib.util
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_gpt as t

SCRIPT = Path(__file__).resolve().parent.parent / "logs" / "report.py"
spec = importlib.util.spec_from_file_location("report", SCRIPT)
report = importlib.util.module_from_spec(spec)
sys.modules["report"] = report
spec.loader.exec_module(report)

SEEDS, BPBS = (1337, 42, 7), (1.05612345, 1.05633333, 1.05598765)
TOKENS, BYTES = 40_540_159, 151_078_000
CODE = b'"""A script."""\nimport math\n\n\ndef main():\n    return math.pi\n'
MODEL_BYTES = 15_900_000
COUNTS = f"tokens:{TOKENS} bytes:{BYTES}"


def score(bpb, method=None):
    """'val_loss:.. val_bpb:.. tokens:.. bytes:..' that belong together."""
    head = f"method:{method} " if method else ""
    return f"{head}val_loss:{bpb * math.log(2) * BYTES / TOKENS:.8f} val_bpb:{bpb:.8f} {COUNTS}"


def log_text(seed=1337, bpb=1.05612345, code=CODE, run_id="20261122-101500_record_seed", matrix_lr="0.025", noise=0.02):
    """A whole log of an 8xH100 run in train_gpt.py's grammar."""
    rng = random.Random(seed)
    lines = [f"run preset:record seed:{seed} world_size:8 gpu:NVIDIA_H100_80GB_HBM3 torch:2.13.0+cu130 "
             f"code_bytes:{len(code)} code_sha256:{hashlib.sha256(code).hexdigest()} max_wallclock_seconds:600",
             f"config_changed run_id:{run_id}{seed} default:-", f"config seed:{seed}", f"config matrix_lr:{matrix_lr}",
             "config final_score:exact", "config matrix_bits:6", "config compressor:brotli", "config stack:gdn*5,swa:a",
             "config tokenizer_path:./data/tokenizers/fineweb_8192_bpe.model",
             f"model parameters:33900000 val_tokens:{TOKENS + 1} train_tokens:900000000",
             "kernel gdn:flashqla swa:varlen_attn loss:compiled micro_batch_tokens:98304 start_up:141s"]
    for step in (1, 2, 3, *range(50, 6001, 50)):
        loss = 2.3 + 4.6 * (step + 10) ** -0.5 + rng.gauss(0, noise)
        if step % 1000 == 0:
            lines.append(f"step:{step}/20000 val_loss:{loss:.4f} val_bpb:{loss / 2.583:.4f} train_time:{step * 98}ms "
                         "step_avg:98.00ms")
        lines.append(f"step:{step}/20000 train_loss:{loss:.4f} lr_mul:1.000 train_time:{step * 98}ms step_avg:98.00ms "
                     f"tok_s:{8_000_000 + step} eta:10s peak_mem_mb:{31200 + step // 1000}")
    lines += ["stopping_early: wallclock_cap train_time:592012ms step:6020/20000",
              "hessians matrices:66 loop_end_s:592.0 hessian_end_s:597.9",
              f"pre_quantization_post_ema {score(bpb - 0.01)} eval_time:4000ms"]
    lines += [f"gptq name:blocks.{i}.{part} bits:{8 if part == 'mixer.k' else 6} rows:512 "
              f"rel_err:{rng.uniform(.01, .03):.4f}"
              for i in range(12) for part in ("mixer.q", "mixer.k", "mlp.up", "mlp.down")]
    lines += [f"artifact model_bytes:{MODEL_BYTES} code_bytes:{len(code)} cap_bytes:16000000 export_time:31000ms",
              f"final_int6_roundtrip {score(bpb + 0.004)} eval_time:2500ms bits:6",
              f"final_int6_exact {score(bpb)} eval_time:3456ms bits:6 spans:64 warmup_tokens:8192",
              f"final {score(bpb, 'exact')}", f"Serialized model int6+brotli: {MODEL_BYTES} bytes",
              f"Total submission size int6+brotli: {MODEL_BYTES + len(code)} bytes",
              f"compliance train_s:598.1 eval_s:5.2 total_bytes:{MODEL_BYTES + len(code)} cap_bytes:16000000 "
              f"bytes_per_token:{BYTES / TOKENS:.5f} tokens_scored:{TOKENS} causal:ok normalized:ok score_first:ok "
              "coverage:ok bytes:ok verdict:ok"]
    return "\n".join(lines) + "\n"


def ttt_lines(gain=0.0, bpb=1.05):
    """Chunk lines of test-time training, which has learned `gain` by the last chunk."""
    return "".join(f"ttt chunk:{i}/61 scored_tokens:{i * 400_000} running_bpb:{bpb + .05 / i - gain * i / 61:.4f} "
                   f"chunk_bpb:{bpb - 2 * gain * i / 61:.4f} lr:0.004900 time:3512ms\n" for i in range(1, 62))


ROLES = """role name:mixer tensors:40 symbols:10485760 raw_bytes:10485760 packed_bytes:7700000 bits_per_symbol:5.87
role name:mlp tensors:24 symbols:12000000 raw_bytes:12000000 packed_bytes:8100000 bits_per_symbol:5.40
role name:scale tensors:66 symbols:30000 raw_bytes:60000 packed_bytes:50000 bits_per_symbol:13.33
"""
POSITIONS = "".join(f"position from:{start} to:{end} tokens:{tokens} bytes:{2 * tokens} val_bpb:{bpb:.4f}\n"
                    for start, end, tokens, bpb in ((0, 64, 53440, 1.9), (64, 128, 50_000, 1.3), (128, 256, 900, 1.1)))


def with_lines(text, before, lines):
    """`text` with `lines` put before the line that begins with `before`."""
    cut = text.index("\n" + before) + 1
    return text[:cut] + lines + text[cut:]


@pytest.fixture
def logs(tmp_path):
    """Paths of the logs of three seeds of one configuration."""
    paths = [tmp_path / f"seed{seed}.txt" for seed in SEEDS]
    for path, seed, bpb in zip(paths, SEEDS, BPBS):
        path.write_text(log_text(seed, bpb))
    return paths


OPTIONS = ["--author", "Ada", "--github-id", "ada", "--name", "Hybrid", "--blurb", "GDN and windows"]


TYPED = dict(author="Ada", github_id="ada", name="Hybrid", blurb="GDN and windows", track="10min_16mb",
             attribution={"baseline": "the challenge"})


def make_folder(folder, code=CODE, **changes):
    """A submission folder without a fault; `code` is its script."""
    folder.mkdir()
    (folder / "train_gpt.py").write_bytes(code)
    (folder / "requirements.txt").write_text("torch\n")
    for seed, bpb in zip(SEEDS, BPBS):
        (folder / f"train_seed{seed}.log").write_text(log_text(seed, bpb, code, **changes))
    out = report.submission(report.collect(sorted(folder.glob("*.log"))), TYPED)
    (folder / "submission.json").write_text(json.dumps(out))
    rows = "".join(f"| {seed} | 6020 | {bpb:.5f} | {MODEL_BYTES + len(code):,} |\n" for seed, bpb in zip(SEEDS, BPBS))
    (folder / "README.md").write_text(f"# Hybrid: {sum(BPBS) / 3:.5f} ± {out['val_bpb_std']:.5f} bpb\n\nTrack A.\n\n"
                                      f"| seed | steps | bpb | bytes |\n|---|---|---|---|\n{rows}")
    return folder


# -------------------------------------------------------------------------------------------------
# Parsing and table
# -------------------------------------------------------------------------------------------------


def test_every_final_event_of_the_script_is_known():
    assert {report.method_of(event): event for event in t.FINAL_EVENTS.values()} == t.FINAL_EVENTS
    assert set(t.FINAL_EVENTS) <= set(report.METHODS)
    names = {f for f in t.Config.__dataclass_fields__}
    assert {"seed", "run_id", "out_dir", "final_score", "tokenizer_path", "matrix_bits", "train_batch_tokens"} <= names


def test_lines_that_the_script_writes_are_parsed(tmp_path, capsys):
    run = t.Run()
    run.log_path = tmp_path / "a.txt"
    run.log("run", preset="sample", seed=3, world_size=1, gpu="none", torch="2", code_bytes=5, code_sha256="ab")
    run.log("config_changed", stack="gdn swa:a", default="gdn")
    run.log("", step="4/9", train_loss=3.25, train_time="1500ms", tok_s="1000", peak_mem_mb=7)
    run.log("final_int6_exact", val_loss="2.00000000", val_bpb="1.00000000", tokens=5, bytes=9, eval_time="1500ms")
    run.log("final", method="exact", val_loss="2.00000000", val_bpb="1.00000000", tokens=5, bytes=9)
    capsys.readouterr()
    log = report.parse_log(run.log_path)
    assert log.ours and log.seed == 3 and log.hardware == "CPU" and log.config["stack"] == "gdn,swa:a"
    assert log.train[4].loss == 3.25 and log.train[4].seconds == 1.5 and log.peak_mib == 7
    assert log.final.bpb == 1.0 and log.final.num_bytes == 9 and log.scores["exact"].seconds == 1.5
    assert log.steps == 9 and log.verdict == "unfinished"  # no compliance line yet


def test_one_log(logs):
    log = report.parse_log(logs[0])
    assert (log.seed, log.steps, log.train_s, log.eval_s, log.peak_mib) == (1337, 6020, 598.1, 5.2, 31206)
    assert log.date == "2026-11-22" and log.hardware == "8xH100 80GB HBM3"
    assert [part[1:] for part in report.time_parts(log)] == [
        ("start-up", 141), ("training", pytest.approx(592.2)), ("calibration", pytest.approx(5.9)), ("unquantized", 4),
        ("export", 31), ("roundtrip", 2.5), ("exact", 5.2)]
    assert log.tok_s == pytest.approx(8_000_000 + (3050 + 6000) / 2)
    assert log.hessian_s == pytest.approx(5.9) and len(log.series("gptq", "bits", "rel_err")) == 48
    assert log.final.method == "exact" and log.final.bpb == BPBS[0] and log.scores["pre"].bpb == BPBS[0] - 0.01
    assert len(log.val) == 6 and log.model_bytes == MODEL_BYTES and log.total_bytes == MODEL_BYTES + len(CODE)


def test_series(tmp_path):
    text = with_lines(with_lines(log_text(), "artifact", ROLES), "final method", ttt_lines() + "ttt chunk:x\n")
    (tmp_path / "a.txt").write_text(text + POSITIONS)
    log = report.parse_log(tmp_path / "a.txt")
    assert log.final.bpb == BPBS[0] and log.verdict == "ok" and len(log.val) == 6  # none of them is a score
    assert log.series("role", "packed_bytes", "bits_per_symbol")[0] == (7_700_000, 5.87)
    assert log.last("role")["name"] == "scale" and log.last("no such event") == {}
    assert log.series("position", "from", "to", "tokens", "bytes", "val_bpb")[1] == (64, 128, 50_000, 100_000, 1.3)
    assert len(log.series("ttt", "scored_tokens", "running_bpb", "chunk_bpb", "lr")) == 61  # a broken line is left out
    assert report.stream(log, "chunk_bpb")[400_000] == 1.05


JUNK = ("nan", "inf", "-1", "0", "x", "1e999", "999999999999999999999", "None")


@pytest.mark.parametrize("seed", range(20))
def test_damaged_logs_are_read_or_refused(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(report.Review, "check_import", lambda self: None)
    rng, folder = random.Random(seed), make_folder(tmp_path / "2026-11-22_F")
    lines = with_lines(with_lines(log_text(), "artifact", ROLES), "final method", ttt_lines()).splitlines()
    for i in rng.sample([i for i, line in enumerate(lines) if not line.startswith("step:")], 20):
        words = lines[i].split(" ")
        j = rng.randrange(len(words))
        words[j] = words[j].split(":")[0] + ":" + rng.choice(JUNK)
        lines[i] = " ".join(words) if rng.random() < 0.8 else rng.choice(lines)
    (folder / LOG).write_text("\n".join(lines))
    report.Review(folder, python310="no-such-python").run()
    try:
        logs = report.collect([folder])
        assert len(rows_of(report.table(logs))) >= 3
        report.submission(logs, TYPED)
    except report.ReportError:
        pass


@pytest.mark.parametrize("text, value", [
    ("7", 7), ("1.5e-3", 0.0015), ("2500ms", 2.5), ("2m", 120), (".5", 0.5), ("nan", None), ("1e999", None),
    ("x", None), ("", None), (None, None)])
def test_number(text, value):
    assert report.number(text) == value


def rows_of(text):
    """The rows of a Markdown table as dicts."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in text.splitlines() if line.startswith("|")]
    assert all(len(line) == len(lines[0]) for line in lines)
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_table(logs, capsys):
    assert report.main([str(p) for p in logs]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row["seed"] for row in rows] == ["1337", "42", "7", "n = 3"]
    assert rows[0]["final bpb"] == "1.05612" and rows[0]["exact bpb"] == "1.05612 (3.5 s)"
    assert rows[0]["roundtrip bpb"] == "1.06012 (2.5 s)" and "sliding bpb" not in rows[0]
    assert rows[0]["steps"] == "6,020" and rows[0]["ms/step"] == f"{598100 / 6020:.1f}" and rows[0]["verdict"] == "ok"
    deviation = math.sqrt(sum((b - sum(BPBS) / 3) ** 2 for b in BPBS) / 2)
    assert rows[3]["final bpb"] == f"{sum(BPBS) / 3:.5f} ± {deviation:.5f}"


def test_other_settings_give_no_mean(logs, capsys):
    logs[1].write_text(log_text(42, matrix_lr="0.03"))
    assert report.main([str(p) for p in logs]) == 0
    assert "n = 2" in capsys.readouterr().out  # the other two still belong together


def test_failed_and_unfinished_runs(tmp_path):
    text = log_text()
    (tmp_path / "a.txt").write_text(text.replace("verdict:ok", "verdict:fail").replace("causal:ok", "causal:fail")
                                    + "over_limit limit:train train_s:601.0\n")
    (tmp_path / "b.txt").write_text(text[:text.index("stopping_early")])
    rows = {row["verdict"]: row for row in rows_of(report.table(report.collect([tmp_path])))}
    assert set(rows) == {"fail (causal, train)", "unfinished"}
    assert rows["unfinished"]["final bpb"] == report.DASH and rows["unfinished"]["steps"] == "6,000"


BASELINE = """logs/0.txt
seed:1337
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000
world_size:8 grad_accum_steps:1
| NVIDIA H100 80GB HBM3          On  |
    log0(f"final_int8_zlib_roundtrip_exact val_loss:{q_val_loss:.8f} val_bpb:{q_val_bpb:.8f}")
warmup_step:20/20
step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.02ms
step:13700/20000 train_loss:2.0323 train_time:596577ms step_avg:43.55ms
step:13750/20000 train_loss:1.9910 train_time:598726ms step_avg:43.54ms
step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
peak memory allocated: 10184 MiB reserved: 10200 MiB
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""
SLIDING = """seed:1337
step:9000/9000 val_loss:1.9225 val_bpb:1.1386 train_time:600027ms step_avg:88.06ms
DIAGNOSTIC post_ema val_loss:1.9208 val_bpb:1.1376 eval_time:2240ms
Serialized model int6+zstd: 13666914 bytes
Total submission size int6+zstd: 13773116 bytes
final_int6_roundtrip val_loss:1.9689 val_bpb:1.1661 eval_time:37008ms
final_int6_roundtrip_exact val_loss:1.96888819 val_bpb:1.16608649
final_int6_sliding_window val_loss:1.9264 val_bpb:1.1410 stride:64 eval_time:96465ms
final_int6_sliding_window_exact val_loss:1.92644292 val_bpb:1.14095103
final_int8_zlib_roundtrip_exact val_loss:1.92644292 val_bpb:1.14095103
"""
COLON_SPACE = """Hyperparameters:
  seed: 0
  train_batch_tokens: 786432
  world_size: 8
train_shards: 1499
0/20000 val_loss: 9.0094 val_bpb: 4.1166
500/20000 train_loss: 2.7428 train_time: 0.8m tok/s: 8435706
5000/20000 train_loss: 2.2804 train_time: 9.9m tok/s: 6620551
5041/20000 val_loss: 2.3492 val_bpb: 1.0734
stopping_early: wallclock_cap train_time: 599637ms step: 5041/20000
peak memory allocated: 41697 MiB reserved: 41720 MiB
diagnostic pre-quantization post-ema val_loss:2.32227068 val_bpb:1.06109460 eval_time:10977ms
Serialized model: 135418111 bytes
Code size (uncompressed): 191274 bytes
Code size (compressed): 37155 bytes
Serialized model quantized+pergroup: 15907387 bytes
Total submission size quantized+pergroup: 15944542 bytes
diagnostic quantized val_loss:2.34083976 val_bpb:1.06957920 eval_time:11962ms
ttp: b781/782 bl:2.1407 bb:1.0474 rl:2.1407 rb:1.0474 dl:17258-30330 gd:0
quantized_ttt_phased val_loss:2.31287992 val_bpb:1.05689587 eval_time:519703ms
"""


def old_log(tmp_path, text):
    (tmp_path / "train.log").write_text(text)
    return report.parse_log(tmp_path / "train.log")


def test_older_format_baseline(tmp_path):
    log = old_log(tmp_path, BASELINE)
    assert (log.ours, log.seed, log.steps, log.train_s, log.peak_mib) == (False, 1337, 13780, 600.038, 10184)
    assert log.tok_s == pytest.approx(524288 * 50 / 2.149, rel=1e-6)
    assert (log.model_bytes, log.code_bytes, log.total_bytes) == (15815847, 47642, 15863489)
    assert log.final.method == "roundtrip" and log.final.bpb == 1.2243657 and log.final.seconds == 1.401
    assert log.hardware == "8xH100 80GB HBM3" and log.verdict == report.DASH and log.val[13780].bpb == 1.2172


def test_older_format_sliding_window(tmp_path):
    log = old_log(tmp_path, SLIDING)
    assert log.scores["pre"].bpb == 1.1376 and log.scores["roundtrip"].bpb == 1.16608649
    assert log.final.method == "sliding" and log.final.bpb == 1.14095103 and log.final.seconds == 96.465
    assert "exact" not in log.scores  # '_exact' of an older log means more decimals


def test_older_format_with_spaces(tmp_path):
    log = old_log(tmp_path, COLON_SPACE)
    assert (log.seed, log.steps, log.train_s, log.tok_s) == (0, 5041, 599.637, 6620551)
    assert log.scores["pre"].bpb == 1.0610946 and log.scores["roundtrip"].bpb == 1.0695792
    assert log.final.method == "ttt" and log.final.bpb == 1.05689587 and log.code_bytes == 37155
    assert log.train[500].seconds == pytest.approx(48) and log.total_bytes == 15944542
    assert len(rows_of(report.table([log]))) == 1


@pytest.mark.parametrize("args, message", [
    (["missing.txt"], "cannot be read"), (["notes.txt"], "no line of a training log"), (["empty"], "no training log"),
    ([], "give logs"), (["--figures", "x", "--check", "empty"], "need logs"),
    (["--check", "nowhere"], "no such folder")])
def test_bad_input_is_one_clear_line(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("bread\nmilk\n")
    (tmp_path / "empty").mkdir()
    assert report.main(args) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("report.py: ") and message in error


def test_table_needs_only_the_standard_library(logs):
    code = ("import runpy, sys; sys.modules.update(dict.fromkeys(('numpy', 'scipy', 'matplotlib', 'torch'))); "
            f"sys.argv = {[str(SCRIPT), str(logs[0])]!r}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "1.05612" in done.stdout


def test_index(logs, tmp_path, capsys):
    folder = tmp_path / "logs"
    folder.mkdir()
    readme = folder / "README.md"
    readme.write_text("# Logs\n<!-- runs -->\nold\n<!-- /runs -->\nend\n")
    for i, path in enumerate(logs):
        path.rename(folder / path.name)
        if i == 1:
            (folder / path.name).write_text(log_text(42, BPBS[1], run_id="20261201-000000_record_seed"))
    for _ in range(2):  # filling it twice changes nothing
        assert report.main(["--index", str(folder)]) == 0
    text = readme.read_text()
    rows = rows_of(text)
    assert "3 runs" in capsys.readouterr().out and text.startswith("# Logs\n") and text.endswith("-->\nend\n")
    assert [row["date"] for row in rows] == ["2026-12-01", "2026-11-22", "2026-11-22"]
    assert (rows[0]["final bpb"], rows[0]["final by"], rows[0]["gpu"]) == ("1.05633", "exact", "8xH100 80GB HBM3")
    assert "(seed42.txt)" in rows[0]["log"] and "old" not in text
    readme.write_text("# Logs\n")
    assert report.main(["--index", str(folder)]) == 2


def test_the_readme_of_the_folder_has_the_marks():
    text = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    assert all(text.count(mark) == 1 for mark in report.INDEX_MARKS)


# -------------------------------------------------------------------------------------------------
# submission.json
# -------------------------------------------------------------------------------------------------


def test_submission(logs, tmp_path, capsys):
    out = tmp_path / "submission.json"
    assert report.main([*map(str, logs), "--submission", str(out), *OPTIONS, "--attribution", "GDN=Yang et al."]) == 0
    data = json.loads(out.read_text())
    assert list(data) == ("author github_id name blurb date track val_loss val_bpb val_bpb_std seeds seed_results "
                          "bytes_total bytes_code hardware pytorch_version technique_summary compliance "
                          "attribution").split()  # the challenge's fields, in its order
    assert set(data) == {*report.TEXTS, *report.TABLES, *report.FAULT_OF_FIELD} and None not in data.values()
    assert data["val_bpb"] == pytest.approx(sum(BPBS) / 3, abs=1e-8) and data["seeds"] == [7, 42, 1337]
    assert data["seed_results"]["1337"]["val_bpb"] == BPBS[0] and data["seed_results"]["42"]["steps"] == 6020
    assert data["seed_results"]["7"]["artifact_bytes"] == MODEL_BYTES + len(CODE) == data["bytes_total"]
    assert data["seed_results"]["7"]["eval_time_s"] == 5.2 and data["bytes_code"] == len(CODE)
    assert data["date"] == "2026-11-22" and data["hardware"] == "8xH100 80GB HBM3" and data["track"] == "10min_16mb"
    assert data["pytorch_version"] == "2.13.0+cu130" and data["attribution"] == {"GDN": "Yang et al."}
    assert {"train_under_600s", "artifact_under_16mb", "eval_under_600s", "no_slot", "no_pre_quant_ttt",
            "no_ngram_cache", "score_first_ttt", "three_seeds"} <= set(data["compliance"])  # the challenge's names
    assert all(data["compliance"].values())
    assert "warning" not in capsys.readouterr().err


def test_compliance_comes_from_the_logs(logs):
    text = log_text(42).replace("score_first:ok", "score_first:fail").replace("eval_s:5.2", "eval_s:601.0")
    logs[1].write_text(text)
    found = report.derived_compliance(report.collect(logs[:2]))
    denied = {claim for claim, held in found.items() if not held}
    assert denied == {"eval_under_600s", "no_slot", "score_first_ttt", "three_seeds"}


@pytest.mark.parametrize("record_bpb, verdict", [
    (1.0700, "record: per token and per byte"), (1.0605, "record per token only"), (1.0570, "no record")])
def test_record(logs, record_bpb, verdict):
    stats = pytest.importorskip("scipy.stats")
    parsed = report.collect(logs)
    test = report.compare_with_record(parsed, record_bpb, None)
    assert test["verdict"] == verdict
    byte = stats.ttest_1samp([b * math.log(2) for b in BPBS], record_bpb * math.log(2) - 0.005, alternative="less")
    ratio = BYTES / TOKENS
    token = stats.ttest_1samp([log.final.val_loss for log in parsed], record_bpb * math.log(2) * ratio - 0.005,
                              alternative="less")
    assert test["nats_per_byte"]["p"] == pytest.approx(byte.pvalue, rel=1e-6)
    assert test["nats_per_token"]["p"] == pytest.approx(token.pvalue, rel=1e-4)
    # The margin is 0.0072 bpb per byte and 0.00194 bpb per token at SP8192.
    assert 0.005 / math.log(2) == pytest.approx(0.0072, abs=2e-5)
    assert 0.005 / math.log(2) / ratio == pytest.approx(0.00194, abs=1e-5)


def test_record_given_in_nats_and_for_one_seed(logs, tmp_path, capsys):
    parsed = report.collect(logs)
    ratio = BYTES / TOKENS
    a = report.compare_with_record(parsed, 1.07, None)
    b = report.compare_with_record(parsed, None, 1.07 * math.log(2) * ratio)
    assert a["nats_per_byte"]["p"] == pytest.approx(b["nats_per_byte"]["p"], rel=1e-4)
    out = tmp_path / "one.json"
    assert report.main([str(logs[0]), "--submission", str(out), *OPTIONS, "--record-bpb", "1.07"]) == 0
    data = json.loads(out.read_text())
    assert data["record_test"]["verdict"].startswith("undecided") and data["val_bpb_std"] is None
    captured = capsys.readouterr()
    assert "three_seeds" in captured.err and "nats per byte" in captured.out and "nats per token" in captured.out


@pytest.mark.parametrize("change, message", [
    (lambda text: text.replace("matrix_lr:0.025", "matrix_lr:0.03"),
     "matrix_lr: 0.025 (seed1337.txt), 0.03 (seed42.txt)"),
    (lambda text: text.replace("world_size:8", "world_size:4"), "world_size"),
    (lambda text: re.sub("code_sha256:...", "code_sha256:000", text), "code_sha256"),
    (lambda text: re.sub("\nfinal .*", "", text), "did not finish"),
    (lambda text: text.replace("seed:42", "seed:1337"), "same seed"),
    (lambda text: SLIDING, "older log")])
def test_submission_refuses(change, message, logs, tmp_path, capsys):
    logs[1].write_text(change(log_text(42, BPBS[1])))
    assert report.main([*map(str, logs), "--submission", str(tmp_path / "x.json"), *OPTIONS]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_submission_names_what_is_missing(logs, tmp_path, capsys):
    out = str(tmp_path / "x.json")
    assert report.main([str(logs[0]), "--submission", out, *OPTIONS[:4]]) == 2
    assert "--submission needs --name, --blurb" in capsys.readouterr().err
    logs[0].write_text(log_text(run_id="night_run_"))
    assert report.main([str(logs[0]), "--submission", out, *OPTIONS]) == 2
    assert "--date" in capsys.readouterr().err
    assert report.main([str(logs[0]), "--submission", out, *OPTIONS, "--date", "2026-11-22"]) == 0


# -------------------------------------------------------------------------------------------------
# Figures
# -------------------------------------------------------------------------------------------------


def export_text(name, size, bpb, grid="rate", bits=6, matrices=66):
    """The log of an export of another run's weights: no steps, `size` bytes, `matrices` as integers."""
    text = re.sub(r"(?m)^step:.*\n", "", log_text(9, bpb, run_id=name)).replace(str(MODEL_BYTES), str(size))
    settings = dict(resume="a.ckpt", grid=grid, matrix_bits=bits, cap_bytes=size + 1)
    text = with_lines(text, "model ", "".join(f"config {key}:{value}\n" for key, value in settings.items()))
    return with_lines(text, "artifact", f"quantized matrices:{matrices} bits_per_weight:4\n")


EXPORTS = (("fine", 400_000, 1.10), ("coarse", 200_000, 1.20), ("int4", 300_000, 1.17, "sdclip", 4),
           ("int5", 350_000, 1.1350, "sdclip", 5), ("int5_large", 500_000, 1.1, "sdclip", 5),
           ("float16", 900_000, 1.09, "rate", 6, 0))


def test_exports_of_one_checkpoint_are_lines_by_grid_and_bits(tmp_path):
    for values in EXPORTS:
        (tmp_path / f"{values[0]}.txt").write_text(export_text(*values))
    (tmp_path / "other.txt").write_text(export_text(*EXPORTS[0]).replace("a.ckpt", "b.ckpt"))
    (tmp_path / "trained.txt").write_text(log_text())
    found = report.exports(report.collect([tmp_path]))
    assert {log.path.stem for log in found} == {values[0] for values in EXPORTS}
    lines, float_bpb = report.export_lines(found)
    assert lines == {"rate": [(200_000, 1.20), (400_000, 1.10)], "sdclip, 4 bits": [(300_000, 1.17)],
                     "sdclip, 5 bits": [(350_000, 1.135), (500_000, 1.1)]} and float_bpb == 1.09
    assert report.between(lines["rate"], 250_000) == pytest.approx(1.175)
    assert report.between(lines["rate"], 199_999) is report.between(lines["rate"], 400_001) is None


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """{file name: path} of the figures of three seeds, of exports, and of a run with test-time training and without."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("drawn")
    for seed, bpb in zip(SEEDS, BPBS):
        (folder / f"seed{seed}.txt").write_text(log_text(seed, bpb))
    for values in EXPORTS:
        (folder / f"{values[0]}.txt").write_text(export_text(*values))
    for name, lr, gain in (("still", "0", 0.0), ("ttt", "0.005", 0.0123)):
        text = log_text(5, 1.07, matrix_lr="0.03", run_id=name)
        text = with_lines(text, "config stack", f"config artifact:x.artifact\nconfig ttt_lr:{lr}\n")
        text = with_lines(with_lines(text, "final method", ttt_lines(gain)), "artifact", ROLES)
        (folder / f"{name}.txt").write_text(text + POSITIONS)
    assert report.main([*map(str, sorted(folder.glob("*.txt"))), "--figures", str(folder / "figures")]) == 0
    return {path.name: path for path in (folder / "figures").iterdir()}


def test_every_figure_is_png_and_svg(drawn):
    names = ("curves", "time", "roles", "gptq", "ttt", "position", "export")
    assert set(drawn) == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name, path in drawn.items():
        data = path.read_bytes()
        assert len(data) < 150_000 and (data[:8] == b"\x89PNG\r\n\x1a\n" if name.endswith("png") else b"<svg" in data)


def test_no_color_is_lost_in_the_palette(drawn):
    image = pytest.importorskip("PIL.Image")
    with image.open(drawn["curves.png"]) as picture:
        palette = {color[:3] for _, color in picture.convert("RGB").getcolors(1000)}
    for wanted in report.COLORS[:3]:  # three configurations; one has few pixels, its line lies under another
        wanted = [int(wanted[i:i + 2], 16) for i in (1, 3, 5)]
        assert min(max(abs(a - b) for a, b in zip(color, wanted)) for color in palette) <= 16


def test_figures_are_sharp_at_readme_width_on_their_own_background(drawn):
    image = pytest.importorskip("PIL.Image")
    for path in (path for name, path in drawn.items() if name.endswith("png")):
        with image.open(path) as picture:
            pixels = picture.convert("RGBA")
        assert pixels.width == 1660  # two pixels for each of the 830 of a README
        assert {pixels.getpixel((x, y)) for x in (0, pixels.width - 1) for y in (0, pixels.height - 1)} == {(255,) * 4}


FINDINGS = [
    ("curves", "Best: record, 3 seeds at 1.0561 bpb, 0.0139 below", "training loss [nats/token]",
     "validation bpb [bits/byte]", "highest seed"),
    ("time", "training 598 s", "the counted evaluation 5.2 s", "calibration 5.9 s", "600 s allowed"),
    ("roles", "15.900 MB of 16 MB, 51% of it mlp", "7.700 MB, 5.87 bits per symbol", "header", "train_gpt.py"),
    ("gptq", "mixer.k (int8)", "mlp.down (int6)", "relative quantization error"),
    ("ttt", "Test-time training gains 0.0123 bpb over the stream", "unadapted, exact: 1.0700", "ttt5 +0.0123"),
    ("position", "highest 1.900 from 0 to 64, lowest 1.100 from 128 to 256", "bytes [%]"),
    ("export", "SDClip scores +0.0100 to +0.0200 bpb over GRID=rate (2 exports)", "sdclip, 5 bits",
     "all float16 (dashed)", "bpb, exact [bits/byte]")]


@pytest.mark.parametrize("row", FINDINGS, ids=[row[0] for row in FINDINGS])
def test_figures_say_what_they_find(row, drawn):
    svg = drawn[f"{row[0]}.svg"].read_text(encoding="utf-8")
    text = html.unescape(" ".join(re.findall(r">([^<>\n]+)</(?:text|tspan)>", svg)))  # a title may take two lines
    assert [part for part in row[1:] if part not in text] == [], text


def test_figures_of_older_and_unfinished_logs(tmp_path):
    pytest.importorskip("matplotlib")
    log = old_log(tmp_path, BASELINE)
    assert report.figures([log], tmp_path / "a")
    text = log_text()
    (tmp_path / "b.txt").write_text(text[:text.index("kernel ")])  # broken off before the first step
    assert report.figures([report.parse_log(tmp_path / "b.txt")], tmp_path / "b") == []


def test_a_band_needs_no_common_steps():
    logs = [report.RunLog(Path(name)) for name in "ab"]
    for log, shift in zip(logs, (0, 5)):
        log.train = {s + shift: report.Point(s + shift, float(s), 3.0 - s / 100 + shift) for s in (0, 10, 20)}
    grid, middle, low, high = report.band(logs, "train", lambda p: p.step, lambda p: p.loss)
    assert list(grid) == [5, 10, 15, 20] and low[1] == pytest.approx(2.9) and high[1] == pytest.approx(7.95)
    assert middle[1] == pytest.approx((2.9 + 7.95) / 2)


# -------------------------------------------------------------------------------------------------
# The review of a folder
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "2026-11-22_Hybrid")


def test_good_folder(folder, capsys):
    assert report.main(["--check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "0 faults" in out and "Python 3.10 syntax checked by" in out and "fault " not in out.replace("0 faults", "")
    assert "note: the folder's name" not in out
    folder.rename(folder.with_name("Hybrid"))
    assert any("YYYY-MM-DD_Name" in note for note in report.Review(folder.with_name("Hybrid")).run().notes)


@pytest.mark.parametrize("code, kinds", [(CODE, []), (b"def f(:\n    pass\n", ["python310"])], ids=["good", "bad"])
def test_python310_compiles_where_there_is_one(code, kinds, tmp_path, monkeypatch):
    monkeypatch.setattr(report.ast, "parse", lambda *_, **__: ast.Module([], []))  # only the other one judges
    monkeypatch.setattr(report.Review, "check_import", lambda self: None)
    executable = tmp_path / "python310"  # this Python, which says that it is 3.10
    executable.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 10)\nexec(sys.argv[-1])\n")
    executable.chmod(0o755)
    review = report.Review(make_folder(tmp_path / "2026-11-22_F", code=code), python310=str(executable)).run()
    assert [kind for kind, _ in review.faults] == kinds
    assert [note for note in review.notes if "checked by" in note and str(executable) in note]


def edit(name, old, new, count=1):
    """A change of one file of a folder: a regular expression, which must match."""
    def change(folder):
        text, found = re.subn(old, new, (folder / name).read_text(), count=count, flags=re.MULTILINE)
        assert found, old
        (folder / name).write_text(text)
    return change


def edit_json(**values):
    """A change of fields of submission.json; None removes one, 'a.b' goes into a table."""
    def change(folder):
        data = json.loads((folder / "submission.json").read_text())
        for key, value in values.items():
            table, *path = data, *key.split("__")
            for part in path[:-1]:
                table = table[part]
            table.pop(path[-1]) if value is None else table.__setitem__(path[-1], value)
        (folder / "submission.json").write_text(json.dumps(data))
    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


LOG = "train_seed42.log"
BIG = MODEL_BYTES + 200_000
BROKEN = [
    ("missing_file", remove("README.md")), ("missing_file", remove("requirements.txt")),
    ("missing_file", remove("submission.json")), ("missing_file", remove("train_gpt.py")),
    ("missing_logs seeds mean readme_score compliance_claim", remove(LOG)),
    ("log_unreadable seeds mean readme_score compliance_claim", lambda f: (f / LOG).write_text("nothing\n")),
    ("log_unreadable seeds mean readme_score compliance_claim", lambda f: (f / LOG).write_text(SLIDING)),
    ("log_unfinished seeds mean readme_score compliance_claim", edit(LOG, r"^compliance .*\n", "")),
    ("log_unfinished seeds mean readme_score compliance_claim", edit(LOG, r"^final .*\n", "")),
    ("log_seed seeds compliance_claim readme_seed seed_result", edit(LOG, "seed:42 ", "seed:7 ")),
    ("log_inconsistent", edit(LOG, r"(compliance.*)total_bytes:\d+", r"\1total_bytes:1")),
    ("log_inconsistent", edit(LOG, r"^(final .*)", r"\1\n\1")),
    ("log_inconsistent", edit(LOG, "train_time:592012ms", "train_time:611012ms")),
    ("configurations_differ", edit(LOG, "matrix_lr:0.025", "matrix_lr:0.026")),
    ("json_invalid", lambda f: (f / "submission.json").write_text('{"author": ')),
    ("json_invalid", lambda f: (f / "submission.json").write_text("[]")),
    ("json_field", edit_json(github_id=None)), ("json_field", edit_json(val_loss=None)),
    ("json_type", edit_json(author=" ")), ("json_type", edit_json(seed_results=[1.0561])),
    ("json_type", edit_json(date="22 November")), ("json_type", edit_json(compliance="all ok")),
    ("seed_result", edit_json(seed_results__42__steps=None)), ("seed_result", edit_json(seed_results__42=[1.0561])),
    ("mean", edit_json(val_bpb="1.0561")), ("total_bytes", edit_json(bytes_total=True)),
    ("compliance_claim", edit_json(compliance__no_slot="yes")),
    ("seeds", edit_json(seeds=[1, 2, 3])),
    ("seed_result", edit_json(seed_results__42__val_bpb=1.0555)),
    ("seed_result", edit_json(seed_results__7__steps=6021)),
    ("seed_result", edit_json(seed_results__7__artifact_bytes=15_000_000)),
    ("mean", edit_json(val_bpb=1.0559)), ("mean", edit_json(val_loss=2.0)), ("mean", edit_json(val_bpb_std=0.00001)),
    ("environment", edit_json(hardware="8xA100 80GB")), ("environment", edit_json(pytorch_version="2.9.1+cu128")),
    ("code_bytes", edit_json(bytes_code=10)),
    ("code_bytes code_sha256", lambda f: (f / "train_gpt.py").write_bytes(CODE + b"# more\n")),
    ("code_sha256", lambda f: (f / "train_gpt.py").write_bytes(CODE.replace(b"math.pi", b"math.e "))),
    ("total_bytes", edit_json(bytes_total=15_000_000)),
    ("total_bytes", edit(LOG, r"^(Serialized model.*): \d+", r"\1: 15000000")),
    ("size_cap", edit(LOG, "cap_bytes:16000000 bytes_per", "cap_bytes:16777216 bytes_per")),
    ("train_time compliance_claim", edit(LOG, "train_s:598.1", "train_s:600.4")),
    ("train_time compliance_claim", edit(LOG, "train_s:598.1", "train_s:nan")),
    ("eval_time compliance_claim seed_result", edit(LOG, "eval_s:5.2", "eval_s:688.0")),
    ("compliance", edit(LOG, "verdict:ok", "verdict:fail")),
    ("compliance compliance_claim", edit(LOG, "causal:ok ", "")),
    ("compliance_claim", edit_json(compliance__no_slot=None)),
    ("compliance_claim", edit_json(compliance__no_slot=False)),
    ("bytes_per_token", edit(LOG, r"bytes_per_token:\S+", "bytes_per_token:3.70000")),
    ("bytes_per_token", edit(LOG, r"^(final .*bytes:)\d+", r"\g<1>177000000")),
    ("coverage", edit(LOG, r"tokens_scored:\d+", "tokens_scored:40540000")),
    ("coverage", edit(LOG, r"val_tokens:\d+", "val_tokens:62021846")),
    ("final_method configurations_differ", edit(LOG, "final_score:exact", "final_score:roundtrip")),
    ("final_method", edit(LOG, r"^(final_int6_exact val_loss:)\S+", r"\g<1>2.70000000")),
    ("readme_score", edit("README.md", r"1\.05615", "1.05000")),
    ("readme_score", edit("README.md", r"± 0\.\d+", "± 0.00010")),
    ("readme_seed", edit("README.md", r"1\.05633", "1.05600")),
    ("readme_seed", edit("README.md", r"^\| 42 \| 6020", "| 42 | 6021")),
    ("readme_seed", edit("README.md", r"15,9\d\d,\d+", "15,000,000")),
    ("train_time", edit(LOG, "hessian_end_s:597.9", "hessian_end_s:600.1")),
    ("artifact_bytes", lambda f: (f / "seed42.artifact").write_bytes(b"GDN1")),
]


@pytest.mark.parametrize("kinds, change", BROKEN, ids=[f"{i}-{k.split()[0]}" for i, (k, _) in enumerate(BROKEN)])
def test_broken_folder(kinds, change, folder, monkeypatch):
    monkeypatch.setattr(report.Review, "check_import", lambda self: None)
    change(folder)
    review = report.Review(folder, python310="no-such-python").run()
    found = {kind for kind, _ in review.faults}
    assert kinds.split()[0] in found and found <= set(kinds.split()), review.faults


def test_size_over_the_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(report.Review, "check_import", lambda self: None)
    folder = make_folder(tmp_path / "big")
    for path in folder.glob("*.log"):
        path.write_text(path.read_text().replace(str(MODEL_BYTES + len(CODE)), str(BIG + len(CODE)))
                        .replace(str(MODEL_BYTES), str(BIG)))
    kinds = {kind for kind, _ in report.Review(folder).run().faults}
    assert kinds == {"size_cap", "seed_result", "total_bytes", "compliance_claim", "readme_seed"}


def test_a_record_on_other_hardware(tmp_path, monkeypatch):
    monkeypatch.setattr(report.Review, "check_import", lambda self: None)
    folder = make_folder(tmp_path / "small")
    for path in folder.glob("*.log"):
        path.write_text(path.read_text().replace("world_size:8", "world_size:1"))
    edit_json(hardware="1xH100 80GB")(folder)
    assert [kind for kind, _ in report.Review(folder).run().faults] == ["environment"]
    edit_json(track="non_record_16mb")(folder)
    assert report.Review(folder).run().faults == []


SCRIPTS = [
    ("python310", b"def f(:\n    pass\n"), ("python310", b"try:\n    pass\nexcept* ValueError:\n    pass\n"),
    ("exec_wrapper", b"import zlib\n\n\ndef run(blob):\n    exec(zlib.decompress(blob))\n"),
    ("import_failed", b"import a_library_that_nobody_has\n"), ("import_failed", b"raise SystemExit(0)\n"),
    ("import_effect", b"print('hello')\n"), ("import_effect", b"import os\nSEED = os.environ.get('SEED')\n"),
    ("import_effect", b"import os\nSEED = os.getenv('SEED', '1')\n"),
    ("import_effect", b"open('x.txt', 'w').close()\n"), ("import_effect", b"CODE = open(__file__).read()\n"),
    ("import_effect", b"from pathlib import Path\nCODE = Path(__file__).read_bytes()\n"),
    ("import_effect", b"import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])\n"),
    ("import_effect", b"import threading, time\nthreading.Thread(target=time.sleep, args=(1,), daemon=True).start()\n"),
]


@pytest.mark.parametrize("kind, code", SCRIPTS, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(SCRIPTS)])
def test_broken_script(kind, code, tmp_path):
    review = report.Review(make_folder(tmp_path / "f", code=code), python310="no-such-python").run()
    found = {k for k, _ in review.faults}
    assert found == {kind} | ({"import_failed"} if kind == "python310" and b"def f(:" in code else set()), review.faults


def test_definitions_are_no_effect(tmp_path):
    code = (b"from dataclasses import dataclass, fields\nfrom typing import NamedTuple\nimport argparse, json\n\n"
            b"@dataclass(frozen=True)\nclass A:\n    x: int = 1\n\n\nclass B(NamedTuple):\n    y: int = 2\n\n"
            b"NAMES = [f.name for f in fields(A)]\nif __name__ == '__main__':\n    print('no')\n")
    assert report.Review(make_folder(tmp_path / "f", code=code)).run().faults == []


def test_every_kind_of_fault_is_shown():
    shown = {kind for kinds, _ in BROKEN for kind in kinds.split()[:1]} | {kind for kind, _ in SCRIPTS}
    source = SCRIPT.read_text(encoding="utf-8")
    kinds = re.findall(r'self\.(?:fault|expect|at_most)\(\s*"(\w+)"', source)
    assert shown == {*kinds, *report.FAULT_OF_FIELD.values()} and len(shown) >= 15


def test_faults_are_printed_and_the_exit_code_is_one(folder, capsys, monkeypatch):
    monkeypatch.setattr(report.Review, "check_import", lambda self: None)
    remove("requirements.txt")(folder)
    edit_json(val_bpb=1.0)(folder)
    assert report.main(["--check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "fault missing_file: requirements.txt" in out and "2 faults" in out
    assert "fault mean: submission.json: val_bpb is 1.0, expected 1.056" in out
