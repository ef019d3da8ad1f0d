"""Random bad input against every reader of train_gpt.py: each case must be refused in one clear line or be read right.

    python tests/fuzz.py [--cases N] [--seed S] [TARGET ...]        default: 5,000 cases of every target

Prints a table: cases, refusals, reads, faults (anything else: traceback, hang, memory), slowest case, peak memory.
A fault is printed with its seed; `--seed S --cases 1 TARGET` repeats it.  tests/test_fuzz.py runs a few hundred.
"""

import argparse
import dataclasses
import io
import json
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, SAMPLE, tiny_config, tiny_model

import train_gpt as t

REFUSALS = (t.GolfError,)
SLOWEST_S = 5.0  # a case that takes longer counts as a hang


def mutated(rng, blob):
    """`blob` cut, stretched, or with some bytes, words or runs of it changed."""
    blob = bytearray(blob)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at, kind = rng.randrange(max(1, len(blob))), rng.randrange(7)
        if kind == 0:
            del blob[at:]
        elif kind == 1:
            blob += rng.randbytes(rng.choice([1, 2, 100, 4096]))
        elif kind == 2:
            blob[at:at + 4] = struct.pack("<i", rng.choice([0, -1, 1, 2**31 - 1, -2**31, 65536, 255]))
        elif kind == 3:
            blob[at:at + 64] = rng.randbytes(rng.randrange(64))
        elif kind == 4:
            del blob[at:at + rng.choice([1, 2, 3, 256])]
        elif blob:
            blob[min(at, len(blob) - 1)] = rng.randrange(256)
    return bytes(blob)


# ---- targets: each makes one case from rng, reads it, and raises what the reader raises ------------


@cache
def shard_bytes():
    """The first 3,000 tokens of the sample as a shard."""
    raw = (SAMPLE / "fineweb_train_000000.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4").copy()
    header[2] = 3000
    return header.tobytes() + raw[1024:1024 + 6000]


def shard(rng, folder):
    """A damaged shard: opened, checked, and two batches read from it."""
    blob = shard_bytes()
    if rng.random() < 0.5:  # lengths that fit the header, with other tokens: the checks behind the first are reached
        count = rng.choice([0, 1, 2, 64, 65, 500])
        header = np.frombuffer(blob[:1024], "<i4").copy()
        header[2] = count
        tokens = np.frombuffer(rng.randbytes(2 * count), "<u2").astype(int) % rng.choice([1, 2, 1024, 1025, 65536])
        blob = header.tobytes() + tokens.astype("<u2").tobytes()
    path = folder / "fineweb_train_000000.bin"
    path.write_bytes(blob if rng.random() < 0.1 else mutated(rng, blob))
    cfg = tiny_config(vocab_size=1024, data_path=str(folder))
    shards = t.open_shards(folder, "train")
    t.check_vocabulary(path, shards[0][1][:], cfg.vocab_size)
    loader = t.Loader(shards, cfg, t.Run())
    try:
        for _ in range(2):
            assert next(loader).shape == (8, 65)
    finally:
        loader.close()


def tokenizer(rng, folder):
    """A damaged SentencePiece model: opened, its byte table built and used."""
    blob = (SAMPLE / "corpus_1024_bpe.model").read_bytes()
    path = folder / "t.model"
    path.write_bytes(mutated(rng, blob))
    cfg = tiny_config(vocab_size=rng.choice([1024, 1024, 1024, 512]), tokenizer_path=str(path))
    table = t.byte_table(t.open_tokenizer(cfg), cfg.vocab_size)
    ids = torch.arange(cfg.vocab_size)
    assert int(t.count_bytes(table, ids, ids).min()) >= 0


VALUES = ["", "0", "1", "-1", "2", "3", "64", "0.5", "1e9", "1e308", "1e400", "nan", "inf", "-inf", "true", "x", "16",
          "512", "99999999999999999999", "0x10", "1_000", "1e3", " 1", "gdn", "gdn*99 swa:a", "swa:a gdn:a", "é", "a b",
          "../..", "\t", "auto", "cpu", "sample", "record,sample", "sample,pr1698", "pr456", "1" * 5000]


def settings(rng, folder):
    """Random settings: read, and where they are allowed, the model is built and the plan printed."""
    names = [f.name.upper() for f in dataclasses.fields(t.Config)]
    env = {"DEVICE": "cpu"}
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        name = rng.choice(names)
        if rng.random() < 0.1:
            name = name[:-1] + rng.choice("XS_") if rng.random() < 0.5 else rng.choice(["TTT_X", "GDN", "NUM_LAYERS"])
        default = next((f.default for f in dataclasses.fields(t.Config) if f.name.upper() == name), 0)
        number = default if isinstance(default, int | float) else 1
        env[name] = rng.choice(VALUES + 4 * [str(default), str(-number), str(number * 2), str(number + 1)])
    env["PLAN"] = "1"
    cfg = t.Config.from_env(env)
    run = t.Run()
    run.write = lambda line: None
    t.print_plan(t.settle_batch(cfg, run), run)


@cache
def artifact_bytes(compressor):
    """A tiny model's artifact."""
    cfg = tiny_config(compressor=compressor)
    with tempfile.TemporaryDirectory() as folder:
        t.save_artifact(Path(folder) / "a", tiny_model(cfg), cfg)
        return (Path(folder) / "a").read_bytes()


def artifact(rng, folder):
    """A damaged artifact, in most cases with its checksum made right again, so that the inner readers are reached."""
    choices = next(f for f in dataclasses.fields(t.Config) if f.name == "compressor").metadata["rule"].text
    blob = artifact_bytes(rng.choice(choices.removeprefix("one of ").split(", ")))
    head = t.ARTIFACT_HEAD.size
    if rng.random() < 0.3:
        blob = mutated(rng, blob)
    else:
        magic, version, packed, unpacked, payload, _ = t.ARTIFACT_HEAD.unpack_from(blob)
        header, body = blob[head:head + packed], blob[head + packed:]
        if rng.random() < 0.5:
            header = t.zlib.compress(changed_json(rng, json.loads(t.zlib.decompress(header))))
        if rng.random() < 0.5:
            body = mutated(rng, body)
        try:
            unpacked = len(t.zlib.decompress(header))
        except t.zlib.error:
            pass
        digest = t.hashlib.sha256(header + body).digest()
        blob = t.ARTIFACT_HEAD.pack(magic, version, len(header), unpacked, len(body), digest) + header + body
    model = t.load_artifact(blob)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model(ids)


def changed_json(rng, value):
    """JSON text of `value` with one place in it replaced by something unexpected."""
    def change(node):
        if isinstance(node, dict) and node and rng.random() < 0.9:
            key = rng.choice(list(node))
            if rng.random() < 0.1:
                return {k: v for k, v in node.items() if k != key}
            return node | {key: change(node[key])}
        if isinstance(node, list) and node and rng.random() < 0.9:
            i = rng.randrange(len(node))
            return node[:i] + [change(node[i])] + node[i + 1:]
        return rng.choice([None, -1, 0, 2**40, 10**30, 1.5, "", "x" * 1000, [], {}, [[]], True, "rows", "f16", "é\0"])
    return json.dumps(change(value)).encode()


@cache
def checkpoint_parts():
    """A real checkpoint of a tiny run as its (tensors, facts), and its file."""
    cfg = tiny_config(resume="auto", run_id="x")
    from test_training import fixed_data
    data, model, run = fixed_data(cfg), tiny_model(cfg), t.Run()
    job = t.Training(model, data, cfg, run)
    job.loader.close()
    t.train_step(model, job.optimizer, torch.zeros(8, 65, dtype=torch.int32), 8, 1.0)
    job.step = 1
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = t.Checkpoints(t.replace(cfg, out_dir=folder), run, data)
        path = checkpoints.save_step(job)
        return *t.load_tensors(path), path.read_bytes(), data


def checkpoint(rng, folder):
    """A damaged checkpoint: its bytes, its facts or its tensors."""
    tensors, facts, blob, data = checkpoint_parts()
    path, kind = folder / "x.npz", rng.randrange(3)
    if kind == 0:
        path.write_bytes(mutated(rng, blob))
    elif kind == 1:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(blob)) as z, zipfile.ZipFile(out, "w") as new:
            for info in z.infolist():
                content = z.read(info)
                if info.filename == t.FACTS + ".npy" and rng.random() < 0.8:
                    text = changed_json(rng, facts)
                    member = io.BytesIO()
                    np.lib.format.write_array(member, np.frombuffer(text, np.uint8))
                    content = member.getvalue()
                elif rng.random() < 0.02:
                    content = mutated(rng, content)
                if rng.random() > 0.005:
                    new.writestr(info.filename, content)
        path.write_bytes(out.getvalue())
    else:
        name = rng.choice(list(tensors))
        other = rng.choice([torch.zeros(0), torch.zeros(3, 3, dtype=torch.int64), torch.full((2,), float("nan"))])
        t.save_tensors(path, tensors | {name: other}, facts)
    cfg = tiny_config(resume=str(path), run_id="x")
    run = t.Run()
    run.write = lambda line: None
    saved = t.Checkpoints(cfg, run, data).load()
    t.Training(t.LM(cfg), data, cfg, run, saved).loader.close()


TARGETS = dict(shard=shard, tokenizer=tokenizer, settings=settings, artifact=artifact, checkpoint=checkpoint)


def fuzz(name, cases, seed, report=print):
    """Run `cases` of one target; returns its row of the table (dict)."""
    row = dict(target=name, cases=cases, refused=0, read=0, faults=0, slowest_s=0.0)
    with tempfile.TemporaryDirectory() as folder:
        for case in range(seed, seed + cases):
            began = time.perf_counter()
            try:
                TARGETS[name](random.Random(f"{name} {case}"), Path(folder))
                row["read"] += 1
            except REFUSALS as error:
                row["refused"] += 1
                fault = "" if str(error).strip() and "\n" not in str(error).strip() else f"message {str(error)!r}"
            except BaseException:  # noqa: B036 (whatever it is, it is what we look for)
                fault = traceback.format_exc()
            else:
                fault = ""
            seconds = time.perf_counter() - began
            fault = fault or (f"took {seconds:.1f} s" if seconds > SLOWEST_S else "")
            if fault:
                row["faults"] += 1
                report(f"{name} --seed {case}: {fault}")
            row["slowest_s"] = max(row["slowest_s"], seconds)
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def main():
    """Run the targets that the command line names, print the table; the exit code is 1 after any fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [fuzz(name, options.cases, options.seed) for name in options.targets or TARGETS]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
