"""What every test file shares: the root on sys.path, one torch thread, a tiny model, runs at toy size, skipping without
a GPU.

`tiny_config(**overrides)` and `tiny_model(cfg)` are plain functions; fixtures of the same names hand them to tests.
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as t  # noqa: E402

SAMPLE = ROOT / "data" / "sample"

torch.set_num_threads(1)  # the shapes are tiny: more threads are slower


def tiny_config(**overrides):
    """A Config of four small layers, one tag shared, with CPU kernels and small evaluation settings."""
    settings = dict(
        device="cpu", vocab_size=64, stack="gdn swa:a gdn swa:a", model_dim=64, num_heads=4, num_kv_heads=2,
        swa_window=16, qk_gain_init=1.5, gdn_heads=2, gdn_head_dim=16, mlp_mult=2.0, ngram_buckets=64, ngram_dim=16,
        train_seq_len=64, train_batch_tokens=512, iterations=4, max_wallclock_seconds=0.0, warmup_steps=0,
        muon_momentum_warmup_steps=10, val_loss_every=0, kernel="reference", attn_kernel="sdpa", compile="0",
        eval_stride=16, eval_spans=3, eval_warmup_tokens=32, eval_batch_tokens=256, final_score="exact",
        eval_overrun="error", ttt_enabled=False, ttt_chunk_tokens=100, ttt_scoring="sliding", ttt_optimizer="sgd",
        ttt_lr=0.005, ttt_schedule="cosine", ttt_epochs=3)
    return t.Config(**(settings | overrides))


def tiny_model(cfg, seed=0):
    """LM(cfg) whose every parameter is moved from its initial value by noise, so that no path is zero or one."""
    model = t.init_weights(t.LM(cfg), cfg.seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return model


def quantize_model(model, hessians, cfg, strength):
    """{name: Quantized} of the whole model by a Quantizer on one rank."""
    return t.Quantizer(model, cfg, hessians, t.Run()).at(strength)


@pytest.fixture(name="tiny_config")
def fixture_tiny_config():
    return tiny_config


@pytest.fixture(name="tiny_model")
def fixture_tiny_model():
    return tiny_model


# ---- runs from the command line -------------------------------------------------------------------

NUM_VAL, NUM_TRAIN = 2501, 40_000
EVALUATION = dict(FINAL_SCORE="exact", TTT_ENABLED="0", EVAL_STRIDE="32", EVAL_SPANS="4", EVAL_WARMUP_TOKENS="128",
                  EVAL_BATCH_TOKENS="1024")
TINY = EVALUATION | dict(
    PRESET="sample", DEVICE="cpu", STACK="gdn swa:a gdn swa:a", MODEL_DIM="32", NUM_HEADS="2", NUM_KV_HEADS="1",
    SWA_WINDOW="16", GDN_HEADS="2", GDN_HEAD_DIM="16", NGRAM_BUCKETS="64", NGRAM_DIM="8", TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="512", ITERATIONS="3", MAX_WALLCLOCK_SECONDS="0", VAL_LOSS_EVERY="2",
    GPTQ_CALIBRATION_BATCHES="2")


@pytest.fixture(scope="session")
def tokens_folder(tmp_path_factory):
    """The first tokens of the sample's shards."""
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        raw = (SAMPLE / f"fineweb_{split}_000000.bin").read_bytes()
        header = np.frombuffer(raw[:1024], "<i4").copy()
        header[2] = count
        (folder / f"fineweb_{split}_000000.bin").write_bytes(header.tobytes() + raw[1024:1024 + 2 * count])
    return folder


@pytest.fixture(scope="session")
def tiny(tokens_folder):
    """The environment of a run of three steps."""
    return TINY | dict(DATA_PATH=str(tokens_folder))


@pytest.fixture
def run(tiny, tmp_path, capfd):
    """run(**changes) calls entry() under the tiny settings; None removes one.  Returns code, out, err, folder."""
    def call(*arguments, **changes):
        env = {k: v for k, v in (tiny | dict(OUT_DIR=str(tmp_path / "out")) | changes).items() if v is not None}
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capfd.readouterr()
        try:
            with (mock.patch.dict(os.environ, env, clear=True),
                  mock.patch.object(sys, "argv", ["train_gpt.py", *arguments])):
                code = t.entry()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, folder=tmp_path / "out")
    return call


def process_env(tiny, **changes):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1") | tiny | changes


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
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pytest_collection_modifyitems(items):
    """Skip tests marked gpu where torch finds no CUDA GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", autouse=True)
def no_tuning():
    """An autotuned Triton kernel takes its first configuration that runs: timing them all takes minutes a kernel.

    The kernels that a run tunes are checked at its start (check_kernels).
    """
    if not torch.cuda.is_available():
        yield
        return
    from triton.runtime.autotuner import Autotuner
    run, bench = Autotuner.run, Autotuner._bench

    def run_anew(tuner, *args, **kwargs):
        tuner.found = False
        return run(tuner, *args, **kwargs)

    def bench_until_found(tuner, *args, **kwargs):
        times = [float("inf")] * 3 if tuner.found else bench(tuner, *args, **kwargs)
        tuner.found |= times[0] < float("inf")
        return times

    def bench_without_disk(tuner, key, configs, bench_all):
        bench_all()  # what is found here must not be kept for real runs
        return False

    with mock.patch.multiple(Autotuner, run=run_anew, _bench=bench_until_found, check_disk_cache=bench_without_disk):
        yield
