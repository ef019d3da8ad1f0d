"""What every test file shares: the root on sys.path, one torch thread, a tiny model, and skipping without a GPU.

`tiny_config(**overrides)` and `tiny_model(cfg)` are plain functions; fixtures of the same names hand them to tests.
"""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as t  # noqa: E402

torch.set_num_threads(1)  # the shapes are tiny: more threads are slower


def tiny_config(**overrides):
    """A Config of four small layers, one tag shared, with CPU kernels and small evaluation settings."""
    settings = dict(
        device="cpu", vocab_size=64, stack="gdn swa:a gdn swa:a", model_dim=64, num_heads=4, num_kv_heads=2,
        swa_window=16, qk_gain_init=1.5, gdn_heads=2, gdn_head_dim=16, mlp_mult=2.0, ngram_buckets=64, ngram_dim=16,
        train_seq_len=64, train_batch_tokens=512, iterations=4, max_wallclock_seconds=0.0, warmup_steps=0,
        muon_momentum_warmup_steps=10, val_loss_every=0, kernel="reference", attn_kernel="sdpa", compile="0",
        eval_stride=16, eval_spans=3, eval_warmup_tokens=32, eval_batch_tokens=256, ttt_chunk_tokens=100)
    return t.Config(**(settings | overrides))


def tiny_model(cfg, seed=0):
    """LM(cfg) whose every parameter is moved from its initial value by noise, so that no path is zero or one."""
    model = t.init_weights(t.LM(cfg), cfg.seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return model


@pytest.fixture(name="tiny_config")
def fixture_tiny_config():
    return tiny_config


@pytest.fixture(name="tiny_model")
def fixture_tiny_model():
    return tiny_model


def pytest_collection_modifyitems(items):
    """Skip tests marked gpu where torch finds no CUDA GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
