"""What every test file shares: a tiny model and text, runs at toy size, ranks, the log's parser.

Tests marked gpu are skipped where torch finds no CUDA GPU.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("", "logs/tools", "data", "tests/cheats")]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes: for tiny shapes more are slower

import train_gpt as t  # noqa: E402

SCRIPT = ROOT / "train_gpt.py"
SAMPLE = ROOT / "data" / "sample"
TOKENIZER = SAMPLE / "corpus_1024_bpe.model"

torch.set_num_threads(1)  # the shapes are tiny: more threads are slower
settings.register_profile("busy", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("busy")


def tiny_config(**overrides):
    """A Config of four small layers, one tag shared, with reference kernels and short passes."""
    settings = dict(
        device="cpu", vocab_size=64, stack="gdn swa:a gdn swa:a", model_dim=64, num_heads=4,
        num_kv_heads=2, swa_window=16, qk_gain_init=1.5, gdn_heads=2, gdn_head_dim=16, mlp_mult=2.0,
        ngram_buckets=64, ngram_dim=16, train_seq_len=64, train_batch_tokens=512, iterations=4,
        max_wallclock_seconds=0.0, warmup_steps=0, val_loss_every=0, matrix_lr=0.025,
        muon_momentum=0.97, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=10,
        kernel="reference", compile="0", gptq_calibration_batches=2, eval_stride=16, eval_spans=3,
        eval_warmup_tokens=32, eval_batch_tokens=256, final_score="exact", ttt_chunk_tokens=100,
        ttt_scoring="sliding", ttt_optimizer="sgd", ttt_lr=0.005, ttt_schedule="cosine",
        ttt_epochs=3)
    return t.Config(**(settings | overrides))


def tiny_model(cfg, seed=0):
    """LM(cfg) with noise added to every parameter, so that no path is zero or one."""
    model = t.init_weights(t.LM(cfg), cfg.seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return model


def weights_of(model):
    """{name: a copy of the parameter}."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(got, want, rtol=0.0, atol=0.0):
    """The same names, whose tensors are equal or this close."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol,
                                   msg=lambda text, name=name: f"{name}: {text}")


def weight_of(q):
    """The float32 matrix that a Quantized stands for."""
    return q.Q * t.full_step(q.rows, q.columns)


NONE = torch.zeros(64, dtype=torch.bool)
ONE_BYTE = t.ByteTable(torch.ones(64, dtype=torch.int64), NONE, NONE)  # each token has one


class TextShard(SimpleNamespace):
    """A shard in memory: path (a Path, only its name counts) and text np.uint16 (n,)."""

    def __len__(self):
        return len(self.text)

    def __getitem__(self, part):
        return self.text[part]


def fixed_data(cfg):
    """Text of one fixed pattern as training and validation split, and a byte table that varies."""
    rng = np.random.default_rng(0)
    text = 2 + (np.cumsum(rng.integers(1, 4, 5000)) % (cfg.vocab_size - 2))
    text[::97] = 1
    text = text.astype(np.uint16)
    shards = [TextShard(path=Path("a.bin"), text=text[:3000]),
              TextShard(path=Path("b.bin"), text=text[3000:4200])]
    ids = torch.arange(cfg.vocab_size)
    return t.Data(shards, text[4200:], t.ByteTable(ids % 5, ids % 3 == 0, ids < 2))


def shard_bytes(tokens, count=None):
    """A shard file's bytes; `count` is what its header promises."""
    head = struct.pack("<3i", 20240520, 1, len(tokens) if count is None else count)
    return head.ljust(1024, b"\0") + np.asarray(tokens, "<u2").tobytes()


def write_split(folder, split, *parts):
    """One shard for each list of tokens."""
    for i, tokens in enumerate(parts):
        (folder / f"fineweb_{split}_{i:06d}.bin").write_bytes(shard_bytes(tokens))


def trained_tokenizer(path, texts, **changes):
    """A processor of 400 BPE pieces trained on `texts`, saved as `path`."""
    options = dict(model_type="bpe", vocab_size=400, byte_fallback=True, add_dummy_prefix=False,
                   pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, num_threads=1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(path.with_suffix("")),
        **(options | changes))
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def seal(header, payload):
    """An artifact's bytes with right lengths and checksum; a header that is no bytes as JSON."""
    head = zlib.compress(header if isinstance(header, bytes) else json.dumps(header).encode())
    digest = hashlib.sha256(head + payload).digest()
    return t.ARTIFACT_HEAD.pack(t.ARTIFACT_MAGIC, t.ARTIFACT_VERSION, len(head),
                                digest) + head + payload


def opened(blob):
    """(header, payload) of an artifact's bytes."""
    body = blob[t.ARTIFACT_HEAD.size:]
    packed = t.ARTIFACT_HEAD.unpack_from(blob)[2]
    return json.loads(zlib.decompress(body[:packed])), body[packed:]


def run_rank(work, rank, count, port, arguments):
    """In its own process: work(run, *arguments) as one of `count` ranks joined by gloo."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run = t.Run.from_env(dict(RANK=str(rank), WORLD_SIZE=str(count)), tiny_config())
    try:
        return work(run, *arguments)
    finally:
        torch.distributed.destroy_process_group()


def on_ranks(count, work, *arguments):
    """[work(run, *arguments) of each rank]; `work` is a function at the top of a test file."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hypothesis", "sentencepiece"])  # once for all ranks
    with ProcessPoolExecutor(count, context) as pool:
        ranks = [pool.submit(run_rank, work, i, count, port, arguments) for i in range(count)]
        return [rank.result(timeout=300) for rank in ranks]


NUM_VAL, NUM_TRAIN = 2501, 40_000
EVALUATION = dict(FINAL_SCORE="exact", EVAL_STRIDE="32", EVAL_SPANS="4", EVAL_WARMUP_TOKENS="128",
                  EVAL_BATCH_TOKENS="1024", EVAL_DIAGNOSTICS="0")
TINY = EVALUATION | dict(
    PRESET="sample", DEVICE="cpu", STACK="gdn swa:a gdn swa:a", MODEL_DIM="32", NUM_HEADS="2",
    NUM_KV_HEADS="1", SWA_WINDOW="16", GDN_HEADS="2", GDN_HEAD_DIM="16", NGRAM_BUCKETS="64",
    NGRAM_DIM="8", TRAIN_SEQ_LEN="64", TRAIN_BATCH_TOKENS="512", ITERATIONS="3",
    MAX_WALLCLOCK_SECONDS="0", GPTQ_CALIBRATION_BATCHES="2")


def write_tiny_shards(folder):
    """The first tokens of the sample's shards, in a new folder."""
    folder.mkdir()
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        [shard] = t.open_shards(SAMPLE, split)
        write_split(folder, split, shard[:count])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The environment of a run of three steps on the first tokens of the sample's shards."""
    folder = tmp_path_factory.mktemp("tiny") / "shards"
    write_tiny_shards(folder)
    return TINY | dict(DATA_PATH=str(folder))


def enter(env, *arguments, script=t):
    """script.entry() in this process under env, of which None unsets: code, out, err, folder."""
    env = {name: value for name, value in env.items() if value is not None}
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    try:
        with (mock.patch.dict(os.environ, env, clear=True), contextlib.redirect_stdout(out),
              contextlib.redirect_stderr(err),
              mock.patch.object(sys, "argv", ["train_gpt.py", *arguments]),
              mock.patch.object(script, "STOP", script.StopRequest())):
            code = script.entry()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(),
                           folder=Path(env.get("OUT_DIR", "logs")))


@pytest.fixture
def run(tiny, tmp_path):
    """run(*arguments, **changes): enter() under the tiny settings and these changes."""
    usual = tiny | dict(OUT_DIR=str(tmp_path / "out"))
    return lambda *arguments, **changes: enter(usual | changes, *arguments)


def launch(env, ranks=0):
    """The script in a process group of its own, under torchrun if `ranks`; its output on pipes."""
    kept = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
    env = {name: os.environ[name] for name in kept if name in os.environ} | dict(
        OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1") | env
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks else []), str(SCRIPT)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)


def parse(text):
    """[(event, {key: value})] of the lines in the grammar; '' is the event of a step line."""
    lines = []
    for line in text.splitlines():
        words = line.split(" ")
        event = "" if ":" in words[0] else words.pop(0)
        if all(":" in word for word in words):
            lines.append((event, dict(word.split(":", 1) for word in words)))
    return lines


def values(text, event):
    """The values of the one line of this event."""
    [found] = [pairs for name, pairs in parse(text) if name == event]
    return found


def files_in(folder):
    """Names of all files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pytest_collection_modifyitems(items):
    """Skip tests marked gpu where torch finds no CUDA GPU."""
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def no_tuning():
    """An autotuned Triton kernel takes its first configuration that runs: timing takes minutes."""
    if not torch.cuda.is_available():
        return
    from triton.runtime.autotuner import Autotuner
    bench = Autotuner._bench

    def bench_until_found(tuner, *args, **kwargs):
        if getattr(tuner, "found_at", -1) == len(tuner.cache):  # the cache has one entry a shape
            return [float("inf")] * 3
        times = bench(tuner, *args, **kwargs)
        tuner.found_at = len(tuner.cache) if times[0] < float("inf") else -1
        return times

    Autotuner._bench = bench_until_found
    Autotuner.check_disk_cache = lambda tuner, key, configs, bench_all: bench_all()  # no disk
