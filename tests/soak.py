"""Does memory stay flat?  Many epochs of the loader, training steps and evaluations on the sample, in one process.

    python tests/soak.py [--tokens 14000000] [--rounds 12]
    python tests/soak.py --text 100000000 [--adapt]

14 M tokens are what PRESET=sample reads in 30 minutes at 7,800 tokens/s.  Each round reads its share of them, trains a
few steps, scores the validation split by every method, and prints the resident memory.  With --text one random text of
so many tokens is scored by a model of one small layer, exact, with --adapt by test-time training with a tilt, and the
memory printed 20 times.  The exit code is 1 if it grew by more than 2 % (at least 16 MiB) after the first third.
"""

import argparse
import gc
import os
import resource
import sys

import numpy as np
import torch
from conftest import ROOT, tiny_config, tiny_model

import train_gpt as t


def resident_mib():
    """Memory of this process now [MiB]."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize() / 2**20


def grew(memory):
    """Whether it went above what the first third of its samples reached, by more than noise."""
    early = max(memory[:max(1, len(memory) // 3)])
    return max(memory) > early + max(16.0, 0.02 * early)


def score_text(length, adapt):
    """Score one text of `length` tokens; memory of this process [MiB] at 20 places."""
    tokens = np.random.default_rng(0).integers(2, 64, length, dtype=np.uint16)
    tokens[::997] = 1
    cfg = tiny_config(stack="gdn", model_dim=16, num_heads=1, num_kv_heads=1, gdn_heads=1, gdn_head_dim=8, mlp_mult=1.0,
                      ngram_buckets=0, smear=False, train_seq_len=2048, train_batch_tokens=2048, eval_spans=64,
                      eval_batch_tokens=1 << 17, ttt_enabled=adapt, ttt_scoring="exact", ttt_epochs=1,
                      ttt_chunk_tokens=1 << 15, ttt_freeze_blocks=0, ttt_tilt=0.1 if adapt else 0.0)
    model, run, add, memory = tiny_model(cfg), t.Run(), t.Ledger.add, []
    none, entered = torch.zeros(64, dtype=torch.bool), 0

    def watched(ledger, first, nll, num_bytes):
        nonlocal entered
        entered += len(nll)
        if entered * 20 >= length * (len(memory) + 1):
            memory.append(resident_mib())
            print(f"soak targets:{entered} resident_mib:{memory[-1]:.1f}", flush=True)
        return add(ledger, first, nll, num_bytes)

    t.Ledger.add = watched
    adapter = t.Adapter(model, length - 1, run) if adapt else None
    if adapter:
        adapter.report = lambda ledger, scored: None
    t.evaluate(model, tokens, t.ByteTable(torch.ones(64, dtype=torch.int64), none, none), "exact", adapter, run)
    return memory


def main():
    """Run the rounds, print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=14_000_000)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--text", type=int, default=0)
    parser.add_argument("--adapt", action="store_true")
    options = parser.parse_args()
    if options.text:
        return int(grew(score_text(options.text, options.adapt)))
    cfg = t.resolve_kernels(t.Config.from_env(dict(PRESET="sample", DEVICE="cpu", MODEL_DIM="64", GDN_HEAD_DIM="16",
                                                   EVAL_STRIDE="256")), t.Run())
    run, data = t.Run(), t.open_data(cfg)
    data = data._replace(val=data.val[:20_000])
    model = t.init_weights(t.LM(cfg), cfg.seed)
    optimizer, average, loader = t.Optimizer(model, cfg, run), t.Average(model, cfg), t.Loader(data.train, cfg, run)
    batches = options.tokens // options.rounds // cfg.train_batch_tokens
    memory = []
    for round_number in range(options.rounds):
        for i in range(batches):
            batch = next(loader)
            if i % max(1, batches // 4) == 0:
                t.train_step(model, optimizer, batch, 8, 0.1)
                average.update(i, 1.0)
        for method in ("roundtrip", "sliding", "exact"):
            ledger = t.evaluate(model, data.val, data.table, method, run=run)
        gc.collect()
        memory.append(resident_mib())
        print(f"soak round:{round_number + 1}/{options.rounds} epoch:{loader.state()[0]} "
              f"tokens:{(round_number + 1) * batches * cfg.train_batch_tokens} val_bpb:{ledger.bpb:.4f} "
              f"resident_mib:{memory[-1]:.1f}", flush=True)
    loader.close()
    return int(grew(memory))


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
