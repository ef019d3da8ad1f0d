"""Does memory stay flat?  Many epochs of the loader, training steps and evaluations on the sample, in one process.

    python tests/soak.py [--tokens 14000000] [--rounds 12]

14 M tokens are what PRESET=sample reads in 30 minutes at 7,800 tokens/s.  Each round reads its share of them, trains a
few steps, scores the validation split by every method, and prints the resident memory; the exit code is 1 if it grew
by more than 2 % (at least 16 MiB) after the first third of the rounds.
"""

import argparse
import gc
import os
import resource
import sys

from conftest import ROOT

import train_gpt as t


def resident_mib():
    """Memory of this process now [MiB]."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize() / 2**20


def main():
    """Run the rounds, print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=14_000_000)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
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
    early = max(memory[:max(1, len(memory) // 3)])
    return int(max(memory) > early + max(16.0, 0.02 * early))


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
