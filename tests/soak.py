"""Does memory stay flat?  Many epochs, steps and evaluations of the sample, or one long text.

    python tests/soak.py [--rounds 12]            14 M tokens through the loader, minutes
    python tests/soak.py --text 100000000         one random text by a one-layer model, with a tilt

Prints the resident memory; the exit code is 1 if it grew by more than 2 % (at least 16 MiB) after
the first third.
"""

import argparse
import resource
import sys

import numpy as np
from conftest import ONE_BYTE, tiny_config, tiny_model

import train_gpt as t

MEMORY = []


def report(*_, **__):
    """Print the memory of this process now [MiB] and keep it."""
    with open("/proc/self/statm") as f:
        MEMORY.append(int(f.read().split()[1]) * resource.getpagesize() / 2**20)
    print(f"soak part:{len(MEMORY)} resident_mib:{MEMORY[-1]:.1f}", flush=True)


def sample_rounds(rounds):
    """Read a twelfth of 14 M tokens a round, take some steps, score by every method."""
    cfg = t.Config.from_env(dict(PRESET="sample", DEVICE="cpu", MODEL_DIM="64", GDN_HEAD_DIM="16"))
    data = t.open_data(cfg)
    model = t.init_weights(t.LM(cfg), cfg.seed)
    optimizer = t.training_optimizer(model, cfg, t.Run())
    loader = t.Loader(data.train, cfg, t.Run())
    for _ in range(rounds):
        for i in range(14_000_000 // 12 // cfg.train_batch_tokens):
            batch = next(loader)
            if i % 70 == 0:
                t.train_step(model, optimizer, batch, 8, 0.1, i)
        for method in ("roundtrip", "sliding", "exact"):
            t.evaluate(model, data.val[:20_000], data.table, method)
        report()


def long_text(length):
    """Score one text in twenty chunks, with training between them."""
    cfg = tiny_config(stack="gdn", model_dim=16, gdn_heads=1, gdn_head_dim=8, mlp_mult=1.0,
                      ngram_buckets=0, train_seq_len=2048, train_batch_tokens=2048,
                      eval_batch_tokens=1 << 17, ttt_scoring="exact", ttt_epochs=1,
                      ttt_chunk_tokens=length // 20, ttt_freeze_blocks=0, ttt_tilt=0.1)
    tokens = np.random.default_rng(0).integers(2, 64, length, dtype=np.uint16)
    model = tiny_model(cfg)
    run = t.Run()
    run.log = report  # once a chunk
    t.evaluate(model, tokens, ONE_BYTE, "exact", t.Adapter(model, length - 1, run), run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--text", type=int, default=0)
    options = parser.parse_args()
    long_text(options.text) if options.text else sample_rounds(options.rounds)
    early = max(MEMORY[:max(1, len(MEMORY) // 3)])
    sys.exit(int(max(MEMORY) > early + max(16.0, 0.02 * early)))
