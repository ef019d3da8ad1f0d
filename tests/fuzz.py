"""Random bad input against every reader of train_gpt.py: read, or refused in one clear line.

    python tests/fuzz.py [--cases N] [--seed S] [TARGET ...]    default: 5,000 cases of every target

Prints a table; a fault (a traceback, a hang) with its seed: `--seed S --cases 1 TARGET` repeats it.
"""

import argparse
import dataclasses
import lzma
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path

import brotli
import torch
import zstandard
from conftest import TOKENIZER, fixed_data, opened, seal, shard_bytes, tiny_config, tiny_model

import train_gpt as t

SLOWEST_S = 5.0  # of CPU time; a case that takes longer counts as a hang
QUIET = t.Run()
QUIET.write = lambda line: None


def mutated(rng, blob):
    """`blob` cut, stretched, or with some of its bytes changed."""
    blob = bytearray(blob)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(max(1, len(blob)))
        size = rng.choice([1, 1, 2, 4, 64, 4096])
        word = struct.pack("<i", rng.choice([0, -1, 1, 2**31 - 1, -2**31, 65536]))
        blob = rng.choice([blob[:at], blob[:at] + blob[at + size:], blob + rng.randbytes(size),
                           blob[:at] + word + blob[at + 4:],
                           blob[:at] + rng.randbytes(size) + blob[at + size:]])
    return bytes(blob)


def changed(rng, node):
    """JSON data with one place in it removed or replaced by something unexpected."""
    if isinstance(node, dict) and node and rng.random() < 0.9:
        key = rng.choice(list(node))
        rest = {k: v for k, v in node.items() if k != key}
        return rest if rng.random() < 0.1 else node | {key: changed(rng, node[key])}
    if isinstance(node, list) and node and rng.random() < 0.9:
        i = rng.randrange(len(node))
        return [*node[:i], changed(rng, node[i]), *node[i + 1:]]
    return rng.choice([None, -1, 0, 2**40, 10**30, 1.5, "", "x" * 1000, [], {}, [[]], True, "f16",
                       "gdn*999 " * 10_000, "é\0"])


def shard(rng, folder):
    """Open a damaged shard and read two batches."""
    count = rng.choice([0, 1, 2, 64, 65, 500, 3000])
    top = rng.choice([1, 2, 1024, 1025, 65536])  # tokens that may be outside the vocabulary
    blob = shard_bytes([rng.randrange(top) for _ in range(count)])
    path = folder / "fineweb_train_000000.bin"
    path.write_bytes(blob if rng.random() < 0.3 else mutated(rng, blob))
    loader = t.Loader(t.open_shards(folder, "train"), tiny_config(vocab_size=1024), QUIET)
    assert next(loader).shape == next(loader).shape == (8, 65)


def tokenizer(rng, folder):
    """Open a damaged SentencePiece model and use its byte table."""
    path = folder / "t.model"
    path.write_bytes(mutated(rng, TOKENIZER.read_bytes()))
    cfg = tiny_config(vocab_size=rng.choice([1024, 1024, 1024, 512]), tokenizer_path=str(path))
    table = t.byte_table(t.open_tokenizer(cfg), cfg.vocab_size)
    ids = torch.arange(cfg.vocab_size)
    assert int(t.count_bytes(table, ids, ids).min()) >= 0


VALUES = ["", "0", "1", "-1", "2", "3", "64", "0.5", "1e9", "1e308", "1e400", "nan", "inf", "true",
          "x", "512", "99999999999999999999", "0x10", "1_000", " 1", "gdn", "gdn*99 swa:a", "é",
          "swa:a gdn:a", "a b", "../..", "\t", "auto", "cpu", "sample", "record,sample", "(gdn",
          "sample,pr1698", "((gdn*999)*999)*9", "1" * 5000]


def settings(rng, folder):
    """Read random settings; if they are allowed, build the model without its memory."""
    odd = ["TTT_X", "GDN", "NUM_LAYERS", "MODEL_DIN", "EVAL_ONLY"]
    env = {rng.choice(odd): "1"} if rng.random() < 0.05 else {}
    for f in rng.sample(dataclasses.fields(t.Config), rng.choice([1, 1, 2, 3, 8])):
        near = [f.default]
        if isinstance(f.default, int | float):
            near = [f.default, -f.default, f.default * 2, f.default + 1]
        env[f.name.upper()] = str(rng.choice(VALUES + 8 * near))
    cfg = t.Config.from_env(env)
    t.micro_batch_rows(t.settle_batch(cfg, QUIET), QUIET)
    with torch.device("meta"):
        t.LM(cfg)


@cache
def artifact_bytes(compressor):
    """A tiny model's artifact."""
    cfg = tiny_config(compressor=compressor)
    return t.export(tiny_model(cfg), cfg, t.UNCALIBRATED, QUIET)


def artifact(rng, folder):
    """Load and run a damaged artifact, mostly with a right checksum: inner readers are reached."""
    blob = artifact_bytes(rng.choice(["rans", "brotli", "lzma", "zstd"]))
    header, payload = opened(blob)
    if rng.random() < 0.5:
        header = changed(rng, header)
    if rng.random() < 0.5:
        payload = mutated(rng, payload)
    blob = mutated(rng, blob) if rng.random() < 0.3 else seal(header, payload)
    t.load_artifact(blob)(torch.zeros(1, 8, dtype=torch.int64))


def claim(rng, folder):
    """Load an artifact that agrees with itself: any model, whose weights are zeros or noise.

    Read or refused, it must take neither the memory nor the time of what it claims to hold.
    """
    near = dict(vocab_size=64, model_dim=64, gdn_heads=2, gdn_head_dim=16, ngram_buckets=0,
                ngram_dim=16, mlp_mult=2.0, swa_window=16)
    for name in rng.sample(list(near), rng.choice([1, 2, 4])):
        near[name] *= 2 ** rng.randrange(1, 12)
    stack = rng.choice(["gdn", "swa:a", "gdn*5 swa:a"]) + f"*{rng.choice([1, 1, 4, 40])}"
    cfg = tiny_config(**near, stack=stack)
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in t.LM(cfg).named_parameters()}
    table, sizes = [], dict.fromkeys(("integers", "f16", "column", "f32"), 0)
    for name, shape in shapes.items():
        rows, columns = t.math.prod(shape[:-1]), shape[-1]
        coding = rng.choice(["int8", "f16", "f32"] if rng.random() < 0.1 else ["int8"])
        table.append([name, shape, coding])
        matrix = coding == "int8"
        sizes["integers" if matrix else coding] += rows * columns * int(coding.strip("intf")) // 8
        sizes["f16"] += 2 * rows * matrix
        sizes["column"] += 2 * columns * matrix
    codec = rng.choice(["brotli", "lzma", "zstd"])
    streams, body = [], b""
    for name, size in sizes.items():
        if size and size < 2**28:  # what is longer is not worth compressing here
            data = bytes(size) if size > 1e6 or rng.random() < 0.7 else rng.randbytes(size)
            out = FASTEST[codec](data)
            streams.append([name, codec, size, len(out)])
            body += out
    config = {name: getattr(cfg, name) for name in t.STORED_FIELDS}
    t.load_artifact(seal(dict(config=config, tensors=table, streams=streams), body))


FASTEST = dict(brotli=lambda data: brotli.compress(data, quality=1, lgwin=24),
               lzma=lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE, preset=0),
               zstd=lambda data: zstandard.ZstdCompressor(level=1).compress(data))


@cache
def checkpoint_parts():
    """A checkpoint of a tiny run after one step: (tensors, facts), its bytes, the Data."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = tiny_config(run_id="x", out_dir=folder)
        data = fixed_data(cfg)
        job = t.Training(tiny_model(cfg), data, cfg, QUIET, None)
        t.train_step(job.model, job.optimizer, next(job.loader), 8, 1.0, 0)
        job.save()
        [path] = Path(folder).rglob("*.ckpt")
        return t.load_tensors(path), path.read_bytes(), data


def checkpoint(rng, folder):
    """Go on from a damaged checkpoint: its bytes or its tensors."""
    (tensors, facts), blob, data = checkpoint_parts()
    path = folder / "x.npz"
    odd = rng.choice([torch.zeros(0), torch.zeros(3, 3), torch.full((2,), float("nan"))])
    rng.choice([
        lambda: path.write_bytes(mutated(rng, blob)),
        lambda: t.save_tensors(path, tensors | {rng.choice(list(tensors)): odd}, facts)])()
    cfg = tiny_config(resume=str(path), run_id="x")
    saved = t.find_checkpoint(cfg, data)
    t.Training(t.LM(cfg), data, cfg, QUIET, saved)


TARGETS = dict(shard=shard, tokenizer=tokenizer, settings=settings, artifact=artifact,
               claim=claim, checkpoint=checkpoint)


def fuzz(name, cases, seed, report=print):
    """Run `cases` of one target; returns its row of the table (dict)."""
    row = dict(target=name, cases=cases, refused=0, read=0, faults=0, slowest_s=0.0)
    for case in range(seed, seed + cases):
        fault = ""
        began = time.process_time()  # whatever else the machine does
        try:
            with tempfile.TemporaryDirectory() as folder:
                TARGETS[name](random.Random(f"{name} {case}"), Path(folder))
            row["read"] += 1
        except t.GolfError as error:
            row["refused"] += 1
            if len(str(error).splitlines()) != 1:
                fault = f"message {str(error)!r}"
        except BaseException:  # noqa: B036 (whatever it is, it is what we look for)
            fault = traceback.format_exc()
        seconds = time.process_time() - began
        row["slowest_s"] = max(row["slowest_s"], round(seconds, 2))
        if fault or seconds > SLOWEST_S:
            row["faults"] += 1
            report(f"{name} --seed {case}: {fault or f'took {seconds:.1f} s'}")
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def main():
    """Fuzz the targets of the command line, print the table; the exit code is 1 after a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [fuzz(name, options.cases, options.seed) for name in options.targets or TARGETS]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
