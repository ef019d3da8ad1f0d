"""logs/tools/report.py, figures.py, page.py: logs of known numbers, and of other scripts."""

import html
import json
import math
import random
import re
import statistics
import subprocess
import sys

import figures
import page as dark
import pytest
import report
from conftest import ROOT

TOOLS = ROOT / "logs" / "tools"

SEEDS, BPBS = (1337, 42, 7), (1.05612345, 1.05633333, 1.05598765)
TOKENS, BYTES = 40_540_159, 151_078_000
CODE = b'"""A script."""\nimport math\n\n\ndef main():\n    return math.pi\n'
MODEL_BYTES = 15_900_000
TOTAL = MODEL_BYTES + len(CODE)
TYPED = dict(author="Ada", github_id="ada", name="Hybrid", blurb="GDN and windows", date="",
             track="10min_16mb", summary="", attribution={"GDN": "Yang"})
OPTIONS = ["--author", "A", "--github-id", "a", "--name", "Hybrid", "--blurb", "GDN and windows"]


def score(bpb):
    nats = bpb * math.log(2) * BYTES / TOKENS
    return f"val_loss:{nats:.8f} val_bpb:{bpb:.8f} tokens:{TOKENS} bytes:{BYTES}"


def log_text(seed=1337, bpb=BPBS[0], sha256="ab12", settings="matrix_lr:0.03"):
    """A whole log of an 8xH100 run in train_gpt.py's grammar."""
    rng = random.Random(seed)
    lines = [f"run preset:record seed:{seed} world_size:8 gpu:NVIDIA_H100_80GB_HBM3 torch:2.13.0 "
             f"commit:d474b71 code_bytes:{len(CODE)} code_sha256:{sha256} date:2026-11-22",
             f"settings run_id:x data_path:fineweb10B_sp8192 final_score:exact "
             f"tokenizer_path:/x/fineweb_8192_bpe.model {settings}",
             f"model parameters:33900000 val_tokens:{TOKENS + 1} train_tokens:900000000",
             "kernel gdn:flashqla attention:flash_attn mlp:own compiled:1 start_up:141s"]
    for step in (1, 2, 3, *range(50, 6001, 50)):
        loss = 2.3 + 4.6 * (step + 10) ** -0.5 + rng.gauss(0, 0.02)
        clock = f"train_time:{step * 98}ms step_avg:98.00ms"
        if step % 1000 == 0:
            lines.append(f"step:{step}/20000 val_loss:{loss:.4f} val_bpb:{loss / 2.5:.4f} {clock}")
        lines.append(f"step:{step}/20000 train_loss:{loss:.4f} lr_mul:1.000 {clock} "
                     f"tok_s:{8_000_000 + step} eta:10s peak_mem_mib:{31200 + step // 1000}")
    for i in range(12):
        lines.append(f"gptq name:blocks.{i}.mlp.up bits:8 rel_err:{rng.uniform(.01, .03):.4f}")
    lines += ["stopping_early: wallclock_cap train_time:592012ms step:6020/20000",
              "hessians matrices:66 loop_end_s:592.0 hessian_end_s:597.9",
              f"pre_quantization_post_ema {score(bpb - 0.01)} eval_time:4000ms",
              f"artifact model_bytes:{MODEL_BYTES} export_time:31000ms",
              f"final_int6_roundtrip {score(bpb + 0.004)} eval_time:2500ms",
              f"final_int6_exact {score(bpb)} eval_time:3456ms spans:64 bits_per_weight:3.17",
              f"final method:exact {score(bpb)}\nSerialized model int6+rans: {MODEL_BYTES} bytes",
              f"Total submission size int6+rans: {TOTAL} bytes",
              f"compliance train_s:598.1 eval_s:5.2 total_bytes:{TOTAL} cap_bytes:16000000 "
              f"bytes_per_token:{BYTES / TOKENS:.5f} tokens_scored:{TOKENS} causal:ok "
              "normalized:ok score_first:ok coverage:ok bytes:ok verdict:ok"]
    return "\n".join(lines) + "\n"


def with_lines(text, before, lines):
    return text.replace("\n" + before, f"\n{lines}\n{before}", 1)


@pytest.fixture
def logs(tmp_path):
    """Paths of the logs of three seeds of one configuration."""
    for seed, bpb in zip(SEEDS, BPBS):
        (tmp_path / f"seed{seed}.txt").write_text(log_text(seed, bpb))
    return [tmp_path / f"seed{seed}.txt" for seed in SEEDS]


def rows_of(text):
    """The rows of a Markdown table as dicts."""
    table = [line.strip("|").split("|") for line in text.splitlines() if line[:1] == "|"]
    titles, _, *rows = [[cell.strip() for cell in row] for row in table]
    return [dict(zip(titles, row, strict=True)) for row in rows]


def test_one_log(logs):
    log = report.parse_log(logs[0])
    assert (log.seed, log.steps, log.train_s, log.eval_s) == (1337, 6020, 598.1, 5.2)
    assert (log.date, log.hardware, log.peak_mib) == ("2026-11-22", "8xH100 80GB HBM3", 31206)
    assert log.config["matrix_lr"] == "0.03" and log.tok_s == 8_000_000 + (3050 + 6000) / 2
    assert log.hessian_s == pytest.approx(5.9) and len(log.series("gptq", "bits", "rel_err")) == 12
    assert {m: s.bpb for m, s in log.scores.items()} == pytest.approx(
        dict(pre=BPBS[0] - 0.01, roundtrip=BPBS[0] + 0.004, exact=BPBS[0]))
    assert (log.model_bytes, log.total_bytes, log.code_bytes) == (MODEL_BYTES, TOTAL, len(CODE))
    assert log.final.method == "exact" and log.finished and len(log.val) == 6
    summary = ("\nscore    1.0561 bits per byte, verdict ok\nbytes    15,900,061 of 16,000,000\n"
               "seconds  598.1 training, 5.2 evaluation\nfiles    logs/x.txt logs/x.artifact\n"
               "next     python logs/tools/report.py logs/x.txt --html page.html\n")
    logs[1].write_text(logs[0].read_text() + summary)
    screen = report.parse_log(logs[1])
    assert screen.left_out == [] and screen.events == log.events
    assert (screen.final, screen.scores, screen.verdict) == (log.final, log.scores, "ok")
    logs[1].write_text(log_text().replace("verdict:ok", "verdict:other_limits"))
    assert report.parse_log(logs[1]).verdict == "other_limits"
    old = "config_changed run_id:x default:-\nconfig matrix_lr:0.03"
    text = re.sub("settings .*", old, log_text()).replace("peak_mem_mib", "peak_mem_mb")
    logs[0].write_text(text)
    log = report.parse_log(logs[0])
    assert log.config == dict(run_id="x", matrix_lr="0.03") and log.peak_mib == 31206


@pytest.mark.parametrize("junk", ["nan", "inf", "-1", "x", "1e999", "9" * 21])
def test_damaged_numbers_are_missing_or_refused(junk, logs, tmp_path):
    logs[1].write_text(re.sub(r":[\d.]+", f":{junk}", log_text()))
    command = [str(tmp_path), "--submission", str(tmp_path / "x.json"), *OPTIONS]
    assert report.main(command) in (0, 2)


def test_table(logs, capsys):
    text = log_text(42, BPBS[1], settings="matrix_lr:0.03 resume:auto")
    text = text.replace("data_path:", "data_path:/elsewhere/").replace("path:/x", "path:/y")
    logs[1].write_text(text)
    assert report.main([*map(str, logs)]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row["seed"] for row in rows] == ["1337", "42", "7", "n = 3"]  # one configuration
    assert rows[0]["final bpb"] == "1.05612" and rows[0]["exact bpb"] == "1.05612 (3.5 s)"
    assert rows[0]["steps"] == "6,020" and "sliding bpb" not in rows[0]
    assert rows[3]["final bpb"] == f"{sum(BPBS) / 3:.5f} ± {statistics.stdev(BPBS):.5f}"
    logs[2].write_text(log_text(7).replace("l:ok", "l:fail").replace("t:ok", "t:fail"))
    logs[0].write_text(log_text(settings="matrix_lr:0.02").split("stopping_early")[0])
    verdicts = {row["verdict"] for row in rows_of(report.table(report.collect(logs)))}
    assert verdicts == {"fail (causal, score_first)", "unfinished", "ok", report.DASH}


BASELINE = """    log0(f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")
| NVIDIA H100 80GB HBM3          On  |
world_size:8 grad_accum_steps:1
step:13750/20000 train_loss:1.9910 train_time:598726ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
Code size: 47642 bytes
Total submission size: 67272625 bytes
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""
REPEATED = """DIAGNOSTIC post_ema val_loss:1.9208 val_bpb:1.1376 eval_time:2240ms
final_int6_roundtrip_exact val_loss:1.96888819 val_bpb:1.16608649
final_int6_sliding_window val_loss:1.9264 val_bpb:1.1410 stride:64 eval_time:96465ms
final_int6_sliding_window_exact val_loss:1.92644292 val_bpb:1.14095103
final_int8_zlib_roundtrip_exact val_loss:1.92644292 val_bpb:1.14095103
  sliding_eval [ 12.0%] 1200/9000 windows running_bpb=1.131
"""
COLON_SPACE = """  seed: 0
5000/20000 train_loss: 2.2804 train_time: 9.9m tok/s: 6620551
stopping_early: wallclock_cap train_time: 599637ms step: 5041/20000
diagnostic pre-quantization post-ema val_loss:2.32227068 val_bpb:1.06109460
Code size (uncompressed): 191274 bytes
Code size (compressed): 37155 bytes
Total submission size quantized+pergroup: 15944542 bytes
diagnostic quantized val_loss:2.34083976 val_bpb:1.06957920 eval_time:11962ms
quantized_ttt_phased val_loss:2.31287992 val_bpb:1.05689587 eval_time:519703ms
"""
SLIDING_AFTER = """step:1/20 train_loss:6.9000 train_time:100ms step_avg:100.00ms
final_int8_zlib_roundtrip_exact val_loss:2.05000000 val_bpb:1.21000000
final_int6_roundtrip val_loss:2.06 val_bpb:1.22
final_int8_zlib_roundtrip_exact sliding val_loss:2.02000000 sliding val_bpb:1.19000000
Total submission size: 50000000 bytes
Total submission size: 15000000 bytes
"""
FOREIGN = [  # text; steps, seconds, code and total bytes, final method; scores
    (BASELINE, (13780, 600.038, 47642, 15863489, "roundtrip"), dict(roundtrip=1.2243657)),
    (REPEATED, (None,) * 4 + ("sliding",),
     dict(pre=1.1376, roundtrip=1.16608649, sliding=1.14095103)),
    (COLON_SPACE, (5041, 599.637, 37155, 15944542, "ttt"),
     dict(pre=1.0610946, roundtrip=1.0695792, ttt=1.05689587)),
    (SLIDING_AFTER, (1, 0.1, None, 15000000, "sliding"),
     dict(roundtrip=1.21, sliding=1.19, final_int6_roundtrip=1.22))]


@pytest.mark.parametrize("prefix", ["", "1776142348.135 ", "[rank0]: 2026-11-22T10:15:00.123Z "])
@pytest.mark.parametrize("text, numbers, scores", FOREIGN, ids=range(len(FOREIGN)))
def test_logs_of_other_scripts(text, numbers, scores, prefix, tmp_path):
    path = tmp_path / "train.log"
    path.write_text("".join(prefix + line + "\n" for line in text.splitlines()))
    log = report.parse_log(path)
    found = log.steps, log.train_s, log.code_bytes, log.total_bytes, log.final.method
    assert found == numbers and {m: s.bpb for m, s in log.scores.items()} == scores
    if text == BASELINE:  # the seconds stand in the line with 4 decimals
        assert log.hardware == "8xH100 80GB HBM3" and log.final.seconds == 1.401


def run_bare(folder, *arguments):
    """report.py in a process without any package, whose terminal knows ASCII only."""
    code = ("import runpy, sys; sys.modules.update(numpy=None, matplotlib=None, torch=None); "
            f"sys.path.insert(0, {str(TOOLS)!r}); sys.argv = ['report.py', *{arguments!r}]; "
            f"runpy.run_path({str(TOOLS / 'report.py')!r}, run_name='__main__')")
    return subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True,
                          cwd=folder, env={"PYTHONIOENCODING": "ascii"})


def test_it_says_what_it_left_out_and_needs_only_an_ascii_terminal(logs, tmp_path):
    (tmp_path / "train.log").write_text(REPEATED)
    (tmp_path / "notes.txt").write_text("bread\n")
    done = run_bare(tmp_path, ".")
    assert "mean +- std" in done.stdout and "| - |" in done.stdout and "notes.txt" in done.stderr
    assert "left out 1 line(s) with a score, 'sliding_eval ...'" in done.stderr


def test_bad_input_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("bread\nmilk\n")
    for args, message in (([str(tmp_path / "no")], "cannot be read"), ([], "give logs"),
                          ([str(tmp_path)], "no training log")):
        assert report.main(args) == 2
        error = capsys.readouterr().err
        assert error.startswith("report.py: ") and message in error and error.count("\n") == 1


def test_index(logs, tmp_path):
    (tmp_path / "a b").mkdir()
    logs[1].rename(tmp_path / "a b" / "x.txt")
    for _ in range(2):  # the second call does not take INDEX.md for a log
        assert report.main(["--index", str(tmp_path)]) == 0
    rows = rows_of((tmp_path / "INDEX.md").read_text())
    assert [row["log"] for row in rows] == [
        "[a b/x](a%20b/x.txt)", "[seed1337](seed1337.txt)", "[seed7](seed7.txt)"]
    assert (rows[0]["final bpb"], rows[0]["date"]) == ("1.05633", "2026-11-22")


def test_submission(logs, tmp_path, capsys):
    out = tmp_path / "submission.json"
    command = [*map(str, logs), "--submission", str(out), *OPTIONS, "--attribution", "GDN=Yang"]
    assert report.main(command) == 0 and "warning" not in capsys.readouterr().err
    data = json.loads(out.read_text())
    assert list(data) == (  # the challenge's fields, in its order
        "author github_id name blurb date track val_loss val_bpb val_bpb_std seeds seed_results "
        "bytes_total bytes_code hardware pytorch_version technique_summary compliance "
        "attribution").split()
    assert data["val_bpb"] == round(sum(BPBS) / 3, 8) and data["bytes_code"] == len(CODE)
    assert data["seed_results"]["7"] == dict(
        val_loss=pytest.approx(BPBS[2] * math.log(2) * BYTES / TOKENS, abs=1e-8), val_bpb=BPBS[2],
        artifact_bytes=TOTAL, steps=6020, eval_time_s=5.2)
    assert all(data["compliance"].values()) and data["attribution"] == {"GDN": "Yang"}
    text = log_text(42).replace("first:ok", "first:fail").replace("eval_s:5", "eval_s:605")
    logs[1].write_text(with_lines(text, "artifact", "ttt chunk:1/9"))
    found = report.derived_compliance(report.collect(logs[:2]))
    assert {claim for claim, held in found.items() if not held} == {
        "eval_under_600s", "no_slot", "score_first_ttt", "three_seeds", "no_pre_quant_ttt"}


@pytest.mark.parametrize("old, new, message", [
    ("lr:0.03", "lr:0.1", "lr: 0.03 (seed1337.txt), 0.1 (seed42.txt)"),
    ("world_size:8", "world_size:4", "world_size"), ("sha256:a", "sha256:b", "code_sha256"),
    ("\nfinal .*", "", "not a finished run"), ("seed:42", "seed:1337", "same seed")])
def test_submission_refuses(old, new, message, logs, tmp_path, capsys):
    logs[1].write_text(re.sub(old, new, log_text(42, BPBS[1])))
    command = [*map(str, logs), "--submission", str(tmp_path / "x.json"), *OPTIONS]
    assert report.main(command) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("record_bpb, verdict", [
    (1.0700, "record per token and per byte"), (1.0605, "record per token"), (1.0570, "no record")])
def test_record(logs, record_bpb, verdict, capsys):
    assert report.main([*map(str, logs), "--record-bpb", str(record_bpb)]) == 0
    assert capsys.readouterr().out.endswith(f": {verdict}\n")
    test = report.record_test(report.collect(logs), record_bpb)["nats_per_byte"]
    t = (test["mean"] - record_bpb * math.log(2) + 0.005) / (test["std"] / math.sqrt(3))
    assert test["p"] == pytest.approx(0.5 + t / 2 / math.sqrt(2 + t * t))  # 2 degrees of freedom
    assert report.student_p(-3.365, 5) == pytest.approx(0.01, abs=2e-5)  # from tables
    assert report.record_test(report.collect(logs[:1]), 1.07)["verdict"].startswith("undecided")


ROLES = """role name:mixer tensors:40 raw_bytes:10485760 packed_bytes:7700000 bits_per_symbol:5.87
role name:mlp tensors:24 raw_bytes:12000000 packed_bytes:8100000 bits_per_symbol:5.40"""
EXPORTS = (("fine", 400_000, 1.1, "rate", 66), ("coarse", 200_000, 1.2, "rate", 66),
           ("int5", 350_000, 1.135, "sdclip", 66), ("float16", 900_000, 1.09, "rate", 0))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """{file name: path} of the figures of seeds, of exports, and of test-time training."""
    folder = tmp_path_factory.mktemp("drawn")
    for seed, bpb in zip(SEEDS, BPBS):
        (folder / f"20261122-101500_base_seed{seed}.txt").write_text(log_text(seed, bpb))
    for name, size, bpb, grid, matrices in EXPORTS:
        text = log_text(9, bpb, settings=f"resume:a.ckpt grid:{grid}").replace("step:", "none:")
        text = with_lines(text, "artifact", f"quantized matrices:{matrices}")
        (folder / f"{name}.txt").write_text(text.replace(str(MODEL_BYTES), str(size)))
    for name, rate, gain in (("still", "0", 0.0), ("ttt", "0.005", 0.0123)):
        text = log_text(5, 1.0574 - gain, settings=f"artifact:x ttt_lr:{rate}")
        text = text.replace("step:", "none:").replace(str(MODEL_BYTES), "15900001")
        text = text.replace("int6_exact", "int6_ttt").replace("method:exact", "method:ttt")
        for i in range(1, 10):
            scores = f"running_bpb:{1.0574 - gain * i / 9:.4f} chunk_bpb:{1.05 - gain * i / 5:.4f}"
            text = with_lines(text, "final m", f"ttt chunk:{i}/9 scored_tokens:{i}00000 {scores}")
        (folder / f"{name}.txt").write_text(with_lines(text, "artifact", ROLES))
    (folder / "old.txt").write_text(BASELINE)
    (folder / "cut.txt").write_text(log_text(3).split("kernel ")[0])
    assert report.main([str(folder), "--figures", str(folder / "figures")]) == 0
    return {path.name: path for path in (folder / "figures").iterdir()}


NUMBERS = {  # what the titles and labels of each figure must hold
    "curves": ["seed 42", f"{statistics.mean(BPBS):.4f}"], "time": ["600 s", "5.2 s", "5.9"],
    "roles": ["51%", "7,700.0 kB", "5.87", "train_gpt.py"], "gptq": ["mlp.up"],
    "ttt": ["ttt, seed 5: +0.0123", "still, seed 5: 1.0574"], "export": ["+0.0100 to +0.0100"]}


@pytest.mark.parametrize("name", NUMBERS)
def test_figures_show_the_numbers_of_the_logs(name, drawn):
    svg = drawn[f"{name}.svg"].read_text(encoding="utf-8")
    text = html.unescape(" ".join(re.findall(r">([^<>\n]+)</(?:text|tspan)>", svg)))
    assert [part for part in NUMBERS[name] if part not in text] == [], text
    assert set(drawn) == {f"{figure}.{kind}" for figure in NUMBERS for kind in ("png", "svg")}
    assert drawn[f"{name}.png"].stat().st_size < 150_000


def ttt_lines(*chunks):
    return "\n".join(f"ttt chunk:{i}/9 scored_tokens:{i}00000 running_bpb:{bpb}"
                     for i, bpb in chunks)


def test_log_of_the_script_tells_where_the_artifacts_bytes_are(run):
    folder = run(RUN_ID="a", ITERATIONS="1", FINAL_SCORE="roundtrip", COMPRESSOR="brotli").folder
    log = report.parse_log(folder / "a.txt")
    found = {kind: bits for kind, _, _, bits in figures.roles(log)}
    assert all(1 < found[kind] <= 8 for kind in ("mlp", "mixer", "embed"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two seeds, of which one fails a check, and of a run of another script."""
    folder = tmp_path_factory.mktemp("page")
    failed = with_lines(log_text(42, BPBS[1]), "final m", ttt_lines((1, 1.1))).replace(
        "causal:ok", "causal:fail").replace("verdict:ok", "verdict:fail")
    paths = [folder / name for name in ("seed1337.txt", "seed42.txt", "foreign&co.log")]
    for path, text in zip(paths, (log_text(), failed, BASELINE)):
        path.write_text(text)
    assert report.main([*map(str, paths), "--html", str(folder / "page.html")]) == 0
    return folder / "page.html"


def test_page_is_whole_and_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    alone = re.findall(r"<(\w+)[^>]*/>", text) + re.findall("<(meta|br)[^>]*[^/>]>", text)
    assert sorted(re.findall(r"<(\w+)", text)) == sorted(re.findall(r"</(\w+)>", text) + alone)
    targets = re.findall(r'(?:src|href|srcset)="([^"]*)"', text)
    assert targets and all(target.startswith("#") for target in targets)
    assert not re.search("<script|@import|url\\(http", text)
    svgs = re.findall(r"(?s)<svg.*?</svg>", text)
    ids = re.findall(r' id="([^"]+)"', "".join(svgs))
    used = re.findall(r'(?:xlink:href="|url\()#([^")]+)', "".join(svgs))
    assert len(svgs) >= 4 and len(ids) == len(set(ids)) and set(used) <= set(ids)
    assert {*figures.COLORS, *figures.PARTS.values()} == set(dark.SERIES)
    for scheme in ("#ffffff", "#000000", "#0072b2"):  # every color has a dark counterpart
        assert scheme not in "".join(svgs)


def test_page_shows_what_the_logs_say(page):
    text = html.unescape(re.sub("<[^>]*>", " ", page.read_text(encoding="utf-8")))
    for shown in ("1.05612", "1.22437", "15,863,489", "598.1", "5.2", "fail", "seed1337", "ab12",
                  "foreign&co", "1 of 3 without the verdict ok.", "causal", "bits per weight"):
        assert shown in text, shown
    assert "int8" not in text


def test_page_without_matplotlib_has_the_table_and_says_what_is_missing(logs, tmp_path):
    assert run_bare(tmp_path, "seed7.txt", "--html", "page.html").returncode == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"{BPBS[2]:.5f}" in text and "pip install matplotlib" in text and "<svg" not in text
