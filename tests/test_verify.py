"""logs/tools/verify.py: a right log passes; what is changed in log, files or script is found."""

import re
import shutil
from types import SimpleNamespace

import pytest
import report
import sentencepiece
import torch
import verify
from conftest import SCRIPT, TOKENIZER, enter, tiny_config, tiny_model, write_split
from test_check import edit
from test_report import CODE, log_text

import train_gpt as t

DOCUMENTS = ["The mayor spoke for an hour.", "Ünïcode 漢字 and 😀 are text, too.\nSo is this."] * 12
SP = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
TOKENS = [i for text in DOCUMENTS for i in (SP.bos_id(), *SP.encode(text))]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A folder of a finished run: script, log, artifact, shards, and the text that they hold."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny["DATA_PATH"], folder / "shards")
    write_split(folder / "shards", "val", TOKENS)
    (folder / "text.txt").write_text("\n\x1e\n".join(DOCUMENTS))
    shutil.copy(SCRIPT, folder)
    ended = enter(tiny | dict(
        DATA_PATH=str(folder / "shards"), OUT_DIR=str(folder), RUN_ID="run", FINAL_SCORE="ttt",
        EVAL_DIAGNOSTICS="1", TTT_CHUNK_TOKENS="256", TTT_TILT="0.5", TTT_LR="0.01",
        TTT_SCORING="exact"))
    assert "verdict:ok" in ended.out, ended.err
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def differing(folder, *options):
    """The claims that differ."""
    log, args = verify.parse([
        str(folder / "run.txt"), "--cpu", "--places", "16", "--data", str(folder / "shards"),
        "--script", str(folder / "train_gpt.py"), "--artifact", str(folder / "run.artifact"),
        *options])
    return verify.differing(verify.verify(log, args))


def test_right_log_holds_and_is_a_table(folder, capsys):
    code = verify.main([str(folder / "run.txt"), "--cpu", "--places", "16", "--artifact",
                        str(folder / "run.artifact"), "--text", str(folder / "text.txt")])
    out = capsys.readouterr().out
    assert code == 0 and ": holds (all targets, cpu" in out, out
    for claim in ("bytes of the source text", "ttt: val_bpb", "exact: val_bpb",
                  "roundtrip: val_bpb", "sliding: val_bpb", "later tokens change no earlier logit"):
        assert re.search(rf"^{claim} .* ok$", out, re.MULTILINE), claim
    tokens = verify.read_shards(folder / "shards")
    assert verify.text_bytes(SP, tokens) == (len("".join(DOCUMENTS).encode()), "")
    (folder / "text.txt").write_text("Another text.")
    assert verify.text_bytes(SP, tokens, [folder / "text.txt"])[1]


ALTERED = [  # pattern, replacement, the beginning of the claim that then differs
    (r"^(final\S* .*val_loss:\d\.)\d\d", r"\g<1>00", "ttt: val_loss", "exact: val_loss"),
    (r"( bytes:)\d+( eval_time|$)", r"\g<1>900\2", "bytes of the decoded tokens"),
    (r"( tokens_scored:)\d+", r"\g<1>7", "every target is counted once"),
    (r"(val_sha256:)\w", r"\g<1>x", "validation tokens are the log's"),
    (r"^(Serialized model .*: )\d+", r"\g<1>99", "artifact on disk"),
    (r"( code_bytes:)\d+( code_sha)", r"\g<1>99\2", "code bytes of all that is shipped"),
    (r"( train_s:)\S+", r"\g<1>601.0", "last step, loop, Hessians, training, limit"),
    (r"( wall_s:)\S+", r"\g<1>99.0", "a clock that is never paused agrees"),
    (r"( load_time:)\d+", r"\g<1>9999", "load + score = evaluation <= 600 s"),
    (r"^(step:3/.*train_time:)\d+", r"\g<1>0", "the training clock never goes back"),
    (r"( initial_weights:)\S+", r"\g<1>1", "the clock began at the seed's weights"),
    (r"^(run .*)", r"\1\n\1", "one run, one score"),
]


@pytest.mark.parametrize("alterations", [ALTERED[::2], ALTERED[1::2]], ids=["even", "odd"])
def test_altered_log_is_found(folder, monkeypatch, alterations):
    """Several at once, each of which makes a claim of its own differ."""
    for check in ("check_causality", "check_carried_state", "check_normalization"):
        monkeypatch.setattr(verify, check, lambda *arguments: None)
    for old, new, *_ in alterations:
        edit("run.txt", old, new)(folder)
    found = differing(folder)
    assert [claim for _, _, *claims in alterations for claim in claims
            if not any(name.startswith(claim) for name in found)] == []


def test_missing_shard_and_missing_tail_are_found(folder):
    write_split(folder / "shards", "val", TOKENS[:-100])
    assert "validation shards are whole" in differing(folder, "--sample", "64")
    shard = folder / "shards" / "fineweb_val_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(report.ReportError, match="fineweb_val_000000.bin: header"):
        differing(folder)


@pytest.mark.parametrize("code, file", [
    ("import helper\n", "helper.py"), ("from helper import a\n", "helper.py"),
    ("import helper.part\n", "helper/part.py"), ("open('weights.bin')\n", "weights.bin"),
    ("__import__('helper')\n", "helper.py")])
def test_code_outside_the_script_is_shipped(tmp_path, code, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("a = 1\n")
    (tmp_path / "train_gpt.py").write_text(SCRIPT.read_text() + code)
    assert (tmp_path / file).resolve() in verify.shipped_files(tmp_path / "train_gpt.py")


@pytest.mark.parametrize("padding", [b"", b"weights"], ids=["the run's", "padded"])
def test_tokenizer_that_the_script_names_is_no_code(folder, padding):
    script, model = folder / "train_gpt.py", folder / "a.model"
    script.write_text(script.read_text() + "PATH = 'a.model'\n")
    model.write_bytes(TOKENIZER.read_bytes() + padding)
    counted = model.stat().st_size if padding else 0
    rows = verify.audit(report.parse_log(folder / "run.txt"), script, TOKENIZER)
    shipped = next(row[1] for row in rows if row[0] == "code bytes of all that is shipped")
    assert shipped.startswith(f"{script.stat().st_size + counted:,}: a.model")


def faults_of(check, model, *arguments):
    table = verify.Table()
    with torch.inference_mode():
        check(model, *arguments, "cpu", table)
    return verify.differing(table)


MODEL = tiny_model(tiny_config())


class Leaky(t.Embedding):
    """At the end of one chunk in which the state is carried, the next token is known."""

    def forward(self, ids, state, dtype):
        x, after = super().forward(ids, state, dtype)
        place = torch.arange(ids.shape[1]) % 64 == 17
        return x + x.roll(-1, 1) * (place & (state[0] >= 0).any()).view(1, -1, 1), after


def test_model_that_is_not_causal_is_found():
    leaky = tiny_model(MODEL.cfg)
    leaky.embed.__class__ = Leaky
    assert faults_of(verify.check_causality, leaky, 320) == ["later tokens change no earlier logit"]


def test_state_that_is_not_carried_is_found():
    forgets = SimpleNamespace(cfg=MODEL.cfg, ops=MODEL.ops,
                              forward=lambda ids, state: MODEL.forward(ids, None))
    assert faults_of(verify.check_carried_state, forgets) == ["carried state = one pass"]


@pytest.mark.parametrize("change", [lambda nats: nats.clamp_max(4.0), lambda nats: 0.99 * nats])
def test_scores_that_are_no_probabilities_are_found(change):
    cheap = SimpleNamespace(cfg=MODEL.cfg, ops=MODEL.ops, nll=lambda ids, targets: (
        change(MODEL.nll(ids, targets)[0]), None))
    assert faults_of(verify.check_normalization, cheap, 39) == ["probabilities sum to 1"]


@pytest.mark.slow
def test_sample_is_compared_at_the_lines_of_test_time_training(folder, capsys):
    options = [str(folder / "run.txt"), "--cpu", "--places", "4", "--artifact",
               str(folder / "run.artifact"), "--sample", "300"]
    assert verify.main(options) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ttt: running_bpb of 256 targets .* ok$", out, re.MULTILINE)
    edit("run.txt", r"(scored_tokens:256 running_bpb:)\d", r"\g<1>9")(folder)
    assert differing(folder, "--sample", "300") == ["ttt: running_bpb of 256 targets"]


def test_unfinished_log_is_bad_input(folder, capsys):
    edit("run.txt", "^compliance .*", "")(folder)
    assert verify.main([str(folder / "run.txt")]) == 2
    assert "no final, size or compliance line" in capsys.readouterr().err


def test_clock_that_runs_slower_than_the_steps_is_found(tmp_path):
    """Throughput says 98 ms a step throughout, the clock half of it from step 4,000 on."""
    (tmp_path / "train_gpt.py").write_bytes(CODE)
    slow = re.sub(r"^(step:(\d+)/20000 train_loss.*train_time:)\d+", lambda m: m[1] + str(
        98 * int(m[2]) - 49 * max(0, int(m[2]) - 4000)), log_text(), flags=re.MULTILINE)
    for text, found in ((log_text(), 0), (slow, 1)):
        (tmp_path / "run.txt").write_text(text)
        table = verify.audit(report.parse_log(tmp_path / "run.txt"), tmp_path / "train_gpt.py",
                             tmp_path / "no.model")
        assert verify.differing(table).count("training = steps x step time") == found
