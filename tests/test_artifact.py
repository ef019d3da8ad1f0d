"""Quantization and the artifact file: rounding against its bounds, a reloaded model against the quantized weights bit
for bit, damaged and hostile files against one ArtifactError that names the file, in bounded time and memory.
"""

import errno
import hashlib
import json
import lzma
import os
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

HEAD = t.ARTIFACT_HEAD


def fixed_config(**overrides):
    """A tiny Config with the row clip set, not searched for."""
    return tiny_config(**dict(matrix_clip_sigmas=12.85, grid="sdclip", compressor="brotli") | overrides)


COMPRESSORS = ("brotli", "lzma", "zstd")  # of bytes
CODERS = ("rans", *COMPRESSORS)


@pytest.fixture(scope="module")
def model():
    """A perturbed model whose artifact is about 30 kB."""
    return tiny_model(fixed_config(model_dim=32, num_heads=2, num_kv_heads=1, gdn_head_dim=8, ngram_dim=8))


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """One artifact per coder: dict of paths."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name in CODERS:
        t.save_artifact(folder / name, model, replace(model.cfg, compressor=name))
    return {name: folder / name for name in CODERS}


@pytest.fixture(scope="module")
def blob(files):
    return files["brotli"].read_bytes()


def test_the_smallest_model_is_read_back_too(tmp_path):
    """Its integers are fewer than the coder's table of frequencies."""
    cfg = fixed_config(model_dim=8, vocab_size=16, stack="gdn", gdn_heads=1, gdn_head_dim=8, mlp_mult=1.0,
                       ngram_buckets=0, compressor="rans")
    small = tiny_model(cfg)
    assert sum(p.numel() for p in small.parameters()) < 1000
    t.save_artifact(tmp_path / "small", small, cfg)
    assert t.load_artifact(tmp_path / "small").cfg.model_dim == 8


def seal(version, head, unpacked, payload):
    """An artifact's bytes with right lengths and checksum around any packed header and payload."""
    digest = hashlib.sha256(head + payload).digest()
    return HEAD.pack(t.ARTIFACT_MAGIC, version, len(head), unpacked, len(payload), digest) + head + payload


def opened(blob):
    """(header dict, payload) of an artifact's bytes."""
    packed = HEAD.unpack_from(blob)[2]
    body = blob[HEAD.size:]
    return json.loads(zlib.decompress(body[:packed])), body[packed:]


def forged(blob, change):
    """The artifact with its header changed by change(header), lengths and checksum recomputed."""
    header, payload = opened(blob)
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return seal(t.ARTIFACT_VERSION, zlib.compress(text), len(text), payload)


def load_fault(path, match=None):
    """The message of the ArtifactError that loading raises, within a second of CPU time."""
    began = time.process_time()
    with pytest.raises(t.ArtifactError, match=match) as caught:
        t.load_artifact(path)
    assert time.process_time() - began < 1.0
    return str(caught.value)


# ---- quantize ------------------------------------------------------------------------------------


def random_matrix(rows=40, columns=300, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=rng) * torch.logspace(-2, 1, rows)[:, None]


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_stay_in_the_range_of_their_bits(bits):
    Q, scale = t.quantize(random_matrix(), bits, 2.0)
    qmax = 2 ** (bits - 1) - 1
    assert (Q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float16, (40,))
    assert int(Q.max()) == qmax and int(Q.min()) == -qmax


@pytest.mark.parametrize("bits, sigmas", [(6, 12.85), (8, 20.0), (2, 1.0), (4, 3.0)])
def test_step_is_clip_over_largest_integer(bits, sigmas):
    W = random_matrix()
    _, scale = t.quantize(W, bits, sigmas)
    step = sigmas * W.std(1, correction=0) / (2 ** (bits - 1) - 1)
    assert torch.allclose(scale.float(), step, rtol=2**-10)


@pytest.mark.parametrize("bits, sigmas", [(6, 12.85), (8, 20.0), (4, 2.0), (2, 1.5)])
def test_error_is_half_a_step_where_nothing_is_clipped(bits, sigmas):
    W = random_matrix()
    Q, scale = t.quantize(W, bits, sigmas)
    step, qmax = scale.float()[:, None], 2 ** (bits - 1) - 1
    inside = W.abs() <= qmax * step
    error = (W - t.dequantize(Q, scale)).abs()
    assert (error <= 0.5 * step * (1 + 1e-5))[inside].all()
    assert (Q.abs() == qmax)[~inside].all() and inside.float().mean() > 0.5


def test_rows_of_zeros_stay_zeros():
    W = random_matrix()
    W[3] = 0.0
    Q, scale = t.quantize(W, 6, 12.85)
    assert scale[3] == 1 and not Q[3].any() and scale.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-4, 1e3])
def test_rows_of_any_size_dequantize_to_numbers_of_that_size(size):
    W = size * random_matrix(4, 50)
    back = t.dequantize(*t.quantize(W, 6, 12.85))
    assert back.isfinite().all() and (back - W).abs().max() <= W.abs().max()


def test_quantizing_twice_changes_nothing():
    """A dequantized row lies on the grid of its own scale."""
    Q, scale = t.quantize(random_matrix(), 6, 12.85)
    assert torch.equal((t.dequantize(Q, scale) / scale.float()[:, None]).round().to(torch.int8), Q)


# ---- compress ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", COMPRESSORS)
@pytest.mark.parametrize("data", [b"", b"x", bytes(100_000), random.Random(0).randbytes(50_000)],
                         ids=["empty", "one byte", "zeros", "noise"])
def test_compressors_are_lossless(codec, data):
    assert t.decompress(t.compress(data, codec), codec, len(data)) == data


@pytest.mark.parametrize("codec", COMPRESSORS)
@pytest.mark.parametrize("size", [0, 999, 1001, 10**8])
def test_stream_of_another_length_than_promised_is_refused(codec, size):
    with pytest.raises(t.ArtifactError, match="expected"):
        t.decompress(t.compress(b"ab" * 500, codec), codec, size)


@pytest.mark.parametrize("codec", COMPRESSORS)
def test_stream_of_rubbish_is_refused(codec):
    rng = random.Random(0)
    for _ in range(50):
        with pytest.raises(t.ArtifactError):
            t.decompress(rng.randbytes(rng.randrange(1, 200)), codec, 1000)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([2, 4]))
def test_byte_planes_are_their_own_inverse_turned(data, width):
    data = data[:len(data) // width * width]
    planes = t.byte_planes(data, width)
    assert planes[:len(data) // width] == data[::width]
    assert not data or t.byte_planes(planes, len(data) // width) == data


# ---- save and load -------------------------------------------------------------------------------


def stored(model, cfg):
    """The weights that the artifact stands for, by quantize and dequantize alone."""
    weights, bits = {}, t.stored_bits(model, cfg)
    for name, p in model.named_parameters():
        r = t.route(name)
        if r.bits:
            weights[name] = t.dequantize(*t.quantize(p.detach(), bits[name], getattr(cfg, r.clip)))
        else:
            weights[name] = p.detach() if p.numel() <= 64 else p.detach().half().float()
    return weights


@pytest.mark.parametrize("codec", CODERS)
def test_reloaded_weights_are_the_quantized_ones_bit_for_bit(model, files, codec):
    expected = stored(model, model.cfg)
    reloaded = dict(t.load_artifact(files[codec]).named_parameters())
    assert reloaded.keys() == expected.keys()
    assert all(torch.equal(reloaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize("changes", [
    dict(matrix_bits=4, embed_bits=5), dict(matrix_clip_sigmas=3.0, embed_clip_sigmas=4.0),
    dict(matrix_bits=2, matrix_clip_sigmas=2.0)], ids=["bits", "clips", "two bits"])
def test_bits_and_clips_of_the_settings_are_used(model, tmp_path, changes):
    cfg = replace(model.cfg, **changes)
    t.save_artifact(tmp_path / "a", model, cfg)
    reloaded = dict(t.load_artifact(tmp_path / "a").named_parameters())
    assert all(torch.equal(reloaded[name], value) for name, value in stored(model, cfg).items())


def test_reloaded_model_predicts_as_the_quantized_model(model, files):
    quantized = t.LM(model.cfg)
    quantized.load_state_dict(stored(model, model.cfg), strict=False)
    for name, value in stored(model, model.cfg).items():  # shared tensors: state_dict names them twice
        assert torch.equal(dict(quantized.named_parameters())[name], value)
    ids = torch.randint(64, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, _ = quantized(ids)
        got, _ = t.load_artifact(files["brotli"], base=model.cfg)(ids)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("changes", [
    dict(stack="gdn*2"), dict(stack="attn swa:b attn:c swa:b", share_mlp=True), dict(ngram_buckets=0, smear=False),
    dict(gdn_v_heads=4, gdn_neg_eigval=True, gdn_conv=1), dict(mlp_act="leaky_relu2", mlp_mult=0.25, rope_dims=8),
    dict(bos_id=-1, ngram_order=2, vocab_size=300),
    dict(train_seq_len=320, train_batch_tokens=640, eval_batch_tokens=640),
], ids=lambda changes: " ".join(changes))
def test_any_architecture_comes_back(tmp_path, changes):
    cfg = fixed_config(**changes)
    model = tiny_model(cfg)
    t.save_artifact(tmp_path / "a", model, cfg)
    reloaded = t.load_artifact(tmp_path / "a")
    assert {name: getattr(reloaded.cfg, name) for name in t.MODEL_FIELDS} == {
        name: getattr(cfg, name) for name in t.MODEL_FIELDS}
    expected = stored(model, cfg)
    assert all(torch.equal(p, expected[name]) for name, p in reloaded.named_parameters())


def test_whole_numbers_given_for_fractions_do_not_spoil_the_file(tmp_path):
    """Config(mlp_mult=2) is the same model as Config(mlp_mult=2.0)."""
    cfg = fixed_config(mlp_mult=2, rope_base=10000)
    t.save_artifact(tmp_path / "a", tiny_model(cfg), cfg)
    assert t.load_artifact(tmp_path / "a").cfg.mlp_mult == 2.0


def test_base_supplies_settings_that_the_file_does_not_fix(files, model):
    base = replace(model.cfg, eval_spans=9, eval_stride=32, stack="gdn")
    loaded = t.load_artifact(files["brotli"], base=base).cfg
    assert (loaded.eval_spans, loaded.eval_stride, loaded.stack) == (9, 32, model.cfg.stack)


def test_shared_tensors_are_stored_once(model, blob):
    header, _ = opened(blob)
    names = [entry["name"] for entry in header["tensors"]]
    assert names == [name for name, _ in model.named_parameters()]
    assert sum(".mixer.q_proj" in name for name in names) == 3  # layers gdn swa:a gdn swa:a
    assert len(t.load_artifact(blob).blocks) == 4


def test_returned_size_is_the_size_of_the_file(model, tmp_path):
    assert t.save_artifact(tmp_path / "a", model, model.cfg) == (tmp_path / "a").stat().st_size


def test_file_and_its_bytes_load_alike(files, blob):
    pairs = zip(t.load_artifact(str(files["brotli"])).parameters(), t.load_artifact(blob).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("codec", CODERS)
def test_same_model_gives_the_same_bytes(model, files, codec, tmp_path):
    t.save_artifact(tmp_path / "again", model, replace(model.cfg, compressor=codec))
    assert (tmp_path / "again").read_bytes() == files[codec].read_bytes()


def test_large_roles_are_cut_into_streams_and_joined_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(t, "STREAM_BYTES", 1000)
    t.save_artifact(tmp_path / "a", model, model.cfg)
    header, _ = opened((tmp_path / "a").read_bytes())
    assert len(header["streams"]) > 20
    expected = stored(model, model.cfg)
    assert all(torch.equal(p, expected[name]) for name, p in t.load_artifact(tmp_path / "a").named_parameters())


def test_file_alone_is_enough(files, model, tmp_path):
    """A fresh process in another folder, with nothing but the script and the file."""
    code = ("import sys, hashlib; sys.path.insert(0, sys.argv[1]); import train_gpt as t\n"
            "m = t.load_artifact(sys.argv[2])\n"
            "print(hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in m.parameters())).hexdigest())")
    out = subprocess.run([sys.executable, "-B", "-c", code, str(ROOT), str(files["brotli"])], cwd=tmp_path, env={},
                         capture_output=True, text=True, timeout=120)
    expected = hashlib.sha256(b"".join(value.numpy().tobytes() for value in stored(model, model.cfg).values()))
    assert out.stdout.strip() == expected.hexdigest(), out.stderr


@pytest.mark.parametrize("codec, sigmas", [("rans", 12.85), ("brotli", 12.85), ("lzma", 12.85), ("zstd", 12.85),
                                           ("brotli", 4.0)])
def test_estimate_is_near_the_size_of_a_gaussian_model(tmp_path, codec, sigmas):
    cfg = fixed_config(vocab_size=1024, model_dim=128, gdn_head_dim=32, gdn_heads=4, mlp_mult=3.0, ngram_buckets=1024,
                      ngram_dim=32, compressor=codec, matrix_clip_sigmas=sigmas)
    model = t.init_weights(t.LM(cfg), 0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.02)
    assert sum(p.numel() for p in model.parameters()) > 700_000
    actual = t.save_artifact(tmp_path / "a", model, cfg)
    estimate, _ = t.estimate_artifact_bytes(model, cfg)
    assert estimate == pytest.approx(actual, rel=0.15)


def test_estimate_of_a_searched_grid_fills_the_cap_and_says_how_many_bits_that_leaves():
    sizes = []
    for width in (64, 512, 768):
        with torch.device("meta"):
            model = t.LM(cfg := t.Config.from_env(dict(MODEL_DIM=str(width))))
        total, bits = t.estimate_artifact_bytes(model, cfg)
        sizes.append((total + len(t.code_bytes()), bits))
    (small, _), (default, default_bits), (large, large_bits) = sizes
    assert small < 10_000_000  # too few weights to fill it
    assert default == large == pytest.approx(16_000_000, abs=t.FILL_SLACK) and default <= 16_000_000
    assert default_bits > t.FEWEST_BITS > large_bits > 1


# ---- write_whole ---------------------------------------------------------------------------------


def test_writer_that_fails_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(f):
        f.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(t.FileError, match="No space left"):
        t.write_whole(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_interrupted_writer_leaves_no_part(tmp_path):
    def stop(f):
        raise t.Interrupted("stopped")
    with pytest.raises(t.Interrupted):
        t.write_whole(tmp_path / "new" / "file", stop)
    assert os.listdir(tmp_path / "new") == []


def test_writer_replaces_the_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"first", b"second"):
        t.write_whole(path, lambda f, content=content: f.write(content))
        assert path.read_bytes() == content and os.listdir(path.parent) == ["file"]


def test_old_file_is_whole_while_the_new_one_is_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def look(f):
        f.write(b"new")
        f.flush()
        assert path.read_bytes() == b"old"
    t.write_whole(path, look)
    assert path.read_bytes() == b"new"


# ---- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODERS)
def test_truncated_file_is_refused(files, tmp_path, codec):
    blob = files[codec].read_bytes()
    size, packed = len(blob), HEAD.unpack_from(files[codec].read_bytes())[2]
    path = tmp_path / "cut"
    for keep in (0, 1, 7, 8, HEAD.size - 1, HEAD.size, HEAD.size + 1, HEAD.size + packed - 1, HEAD.size + packed,
                 HEAD.size + packed + 1, size // 2, size - 1):
        path.write_bytes(blob[:keep])
        assert load_fault(path).startswith(f"{path}: ")


def test_longer_file_is_refused(blob, tmp_path):
    path = tmp_path / "long"
    path.write_bytes(blob + b"\0")
    assert load_fault(path, "truncated").startswith(f"{path}: ")


def test_every_flipped_bit_is_noticed(blob):
    """All bits of the head, and one bit in each of 400 places of the rest."""
    rng = random.Random(0)
    bits = [*range(8 * HEAD.size), *(8 * p + rng.randrange(8) for p in rng.sample(range(HEAD.size, len(blob)), 400))]
    unnoticed = []
    for bit in bits:
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            t.load_artifact(bytes(damaged))
        except t.ArtifactError:
            continue
        unnoticed.append(bit)
    assert unnoticed == []


def test_lengths_shifted_between_header_and_streams_are_noticed(blob):
    magic, version, packed, unpacked, payload, digest = HEAD.unpack_from(blob)
    for by in (-1, 1, 100):
        load_fault(HEAD.pack(magic, version, packed + by, unpacked, payload - by, digest) + blob[HEAD.size:])


@pytest.mark.parametrize("content", [
    b"", b"\0", b"It was the best of times, it was the worst of times. " * 20, b"PK\x03\x04" + bytes(500),
    random.Random(1).randbytes(100_000)], ids=["empty", "a byte", "text", "zip", "noise"])
def test_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    assert load_fault(path, "not an artifact|shorter than the head").startswith(f"{path}: ")


def test_checkpoint_in_place_of_an_artifact_is_refused(model, tmp_path):
    torch.save(dict(model.named_parameters()), tmp_path / "model.pt")
    load_fault(tmp_path / "model.pt", "not an artifact of this script")


@pytest.mark.parametrize("version", [0, 1, 3, 2**32 - 1])
def test_other_version_is_named(blob, version):
    load_fault(blob[:8] + version.to_bytes(4, "little") + blob[12:], f"version {version}")


def test_missing_file_is_named(tmp_path):
    assert str(tmp_path / "none") in load_fault(tmp_path / "none", "No such file")


def test_folder_is_named(tmp_path):
    assert str(tmp_path) in load_fault(tmp_path, "directory")


# ---- hostile files: right checksums around wrong contents ----------------------------------------


LOAD_ALL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import train_gpt as t

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB
before = peak()
for path in sys.argv[2:]:
    try:
        t.load_artifact(path)
        print("loaded", path)
    except t.ArtifactError as error:
        print("refused" if str(error).startswith(path) else "nameless", path)
print(peak() - before)
"""


def test_huge_lengths_take_no_memory(files, tmp_path):
    """Lengths claimed in the head, in the stream table and in the tensor table, up to just what is allowed."""
    blob = files["brotli"].read_bytes()
    magic, version, packed, unpacked, payload, digest = HEAD.unpack_from(blob)
    hostile = {
        "head packed": HEAD.pack(magic, version, 2**32 - 1, unpacked, payload, digest) + blob[HEAD.size:],
        "head unpacked": HEAD.pack(magic, version, packed, 2**32 - 1, payload, digest) + blob[HEAD.size:],
        "head payload": HEAD.pack(magic, version, packed, unpacked, 2**64 - 1, digest) + blob[HEAD.size:],
        "deep header": seal(version, zlib.compress(b"[" * 10**6, 9), 10**6, b""),
        "shape": forged(blob, lambda h: h["tensors"][0].update(shape=[2**40, 2**20])),
        "model": forged(blob, lambda h: h["config"].update(vocab_size=65536, model_dim=2**30)),
    }
    for codec in CODERS:
        blob = files[codec].read_bytes()
        for size in (2**30 - 2**22, 2**30 + 1, 2**62, 10**30):
            def claim(header, size=size):
                header["streams"][-1][2] = size
            hostile[f"{codec} stream {size}"] = forged(blob, claim)
    paths = []
    for name, content in hostile.items():
        paths.append(tmp_path / name.replace(" ", "_"))
        paths[-1].write_bytes(content)
    out = subprocess.run([sys.executable, "-B", "-c", LOAD_ALL, str(ROOT), *map(str, paths)], env={},
                         capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    *lines, rise = out.stdout.splitlines()
    assert lines == [f"refused {path}" for path in paths]
    assert int(rise) < 200


def peak_of_refusal(blob):
    """Bytes that refusing an artifact takes at most at one time."""
    tracemalloc.start()
    try:
        with pytest.raises(t.ArtifactError):
            t.load_artifact(blob)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


PACK = {"brotli": lambda data: brotli.compress(data, quality=1),
        "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE, preset=0),  # a small dictionary
        "zstd": lambda data: t.compress(data, "zstd")}


def with_stream(path, stream, size):
    """The artifact at `path` with one stream instead of its own, that promises `size` bytes."""
    header, _ = opened(path.read_bytes())
    header["streams"] = [["embed", header["compressor"], size, len(stream)]]
    text = json.dumps(header).encode()
    return seal(t.ARTIFACT_VERSION, zlib.compress(text), len(text), stream)


@pytest.mark.parametrize("codec", COMPRESSORS)
def test_stream_that_expands_a_thousandfold_is_stopped(files, codec):
    """A stream of zeros far longer than the table promises: no more is made than that."""
    hostile = with_stream(files[codec], PACK[codec](bytes(2**26)), 1000)
    assert "more than 1000 bytes" in load_fault(hostile)
    assert peak_of_refusal(hostile) < 2**22


def test_lzma_dictionary_of_gigabytes_is_refused(files):
    """The stream's own head may ask for 4 GiB of dictionary; the script's compressor uses 64 MiB."""
    stream = bytearray(PACK["lzma"](bytes(1000)))
    stream[1:5] = b"\xff" * 4
    assert peak_of_refusal(with_stream(files["lzma"], bytes(stream), 1000)) < 2**28


def test_header_that_expands_a_thousandfold_is_stopped():
    bomb = zlib.compress(b"[" + b" " * 2**26 + b"]", 1)
    assert peak_of_refusal(seal(t.ARTIFACT_VERSION, bomb, 1000, b"")) < 5 * t.MAX_HEADER_BYTES


def test_streams_longer_than_the_model_needs_are_refused(blob):
    """Half a GB of zeros packs into a few kB: what no tensor of the model uses is not worth decompressing."""
    header, payload = opened(blob)
    bomb = PACK["brotli"](bytes(2**29))
    header["streams"].append(["embed", "brotli", 2**29, len(bomb)])
    text = json.dumps(header).encode()
    load_fault(seal(t.ARTIFACT_VERSION, zlib.compress(text), len(text), payload + bomb))


def matrix_entry(header):
    return next(entry for entry in header["tensors"] if entry["coding"] == "rows")


def vector_entry(header):
    return next(entry for entry in header["tensors"] if entry["coding"] == "f32" and entry["shape"][0] > 8)


FORGERIES = {
    "not an object": lambda h: b"[]",
    "not JSON": lambda h: b"{",
    "not UTF-8": lambda h: b'"\xff"',
    "no settings": lambda h: h.pop("config") and None,
    "settings are a list": lambda h: h.update(config=[]),
    "setting missing": lambda h: h["config"].pop("smear") and None,
    "setting too many": lambda h: h["config"].update(seed=1),
    "setting of another type": lambda h: h["config"].update(smear=1),
    "setting outside its rule": lambda h: h["config"].update(model_dim=-8),
    "setting not finite": lambda h: h["config"].update(rope_base=float("nan")),
    "bad stack": lambda h: h["config"].update(stack="gdn swa:a gdn:a"),
    "other stack": lambda h: h["config"].update(stack="gdn"),
    "larger than any memory": lambda h: h["config"].update(model_dim=2**40, num_heads=1, num_kv_heads=1),
    "larger than any integer": lambda h: h["config"].update(gdn_heads=10**30),
    "endless stack": lambda h: h["config"].update(stack="gdn*99 " * 200),
    "tensors are a number": lambda h: h.update(tensors=3),
    "tensor missing": lambda h: h["tensors"].pop() and None,
    "tensor twice": lambda h: h["tensors"].append(h["tensors"][0]),
    "tensors swapped": lambda h: h["tensors"].reverse(),
    "name changed": lambda h: h["tensors"][0].update(name="embed.w"),
    "shape changed": lambda h: h["tensors"][0].update(shape=[1, 1]),
    "shape of fractions": lambda h: h["tensors"][0].update(shape=[float(n) for n in h["tensors"][0]["shape"]]),
    "coding unknown": lambda h: h["tensors"][0].update(coding="pickle"),
    "coding of a matrix for a vector": lambda h: vector_entry(h).update(
        coding="rows", role="embed"),
    "role unknown": lambda h: h["tensors"][0].update(role="nothing"),
    "role is a list": lambda h: h["tensors"][0].update(role=[]),
    "columns that are not there": lambda h: matrix_entry(h).update(coding="grid"),
    "coding of a vector for a matrix": lambda h: matrix_entry(h).update(coding="f16"),
    "coding missing": lambda h: matrix_entry(h).pop("coding") and None,
    "streams a number": lambda h: h.update(streams=1),
    "streams missing": lambda h: h.update(streams=[]),
    "stream of two parts": lambda h: h["streams"][0].pop() and None,
    "stream length negative": lambda h: h["streams"][0].__setitem__(2, -1),
    "stream length text": lambda h: h["streams"][0].__setitem__(2, "many"),
    "stream length infinite": lambda h: h["streams"][0].__setitem__(2, float("inf")),
    "packed lengths exchanged": lambda h: h["streams"][0].__setitem__(3, h["streams"][0][3] + 1),
    "odd scale stream": lambda h: next(s for s in h["streams"] if s[0] == "scale").__setitem__(0, "f32"),
    "other codec": lambda h: h["streams"][0].__setitem__(1, "lzma"),
    "rans without tables": lambda h: h["streams"][0].__setitem__(1, "rans"),
    "unknown codec": lambda h: h["streams"][0].__setitem__(1, "rar"),
    "unknown compressor": lambda h: h.update(compressor="rar"),
    "compressor is an object": lambda h: h.update(compressor={}),
    "50000 empty streams": lambda h: h.update(streams=h["streams"] + [["x", "lzma", 0, 0]] * 50_000),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_header_is_refused(blob, tmp_path, forgery):
    path = tmp_path / "forged"
    path.write_bytes(forged(blob, FORGERIES[forgery]))
    assert load_fault(path).startswith(f"{path}: ")


# Values that a mutation may put anywhere in the header.
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70),
    st.sampled_from([-2**31, 2**31, 2**40, 2**63, 2**64, 10**30, 1e308, 0.0, 1.5]),
    st.sampled_from(["", "gdn", "rows", "f16", "f32", "embed", "mlp", "mixer", "scale", "brotli", "lzma", "zstd", "a",
                     "rans", "grid"]),
    st.just([]), st.just({}), st.lists(st.integers(0, 70), max_size=3))


def places(node):
    """Every (container, key) in a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from places(value)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_header_gives_an_error_or_a_model(data):
    header, payload = opened(tiny_blob(data.draw(st.sampled_from(["rans", "brotli"]))))
    for _ in range(data.draw(st.integers(1, 3))):
        everywhere = list(places(header))
        container, key = everywhere[data.draw(st.integers(0, len(everywhere) - 1))]
        if isinstance(container, list) or data.draw(st.booleans()):
            container[key] = data.draw(VALUES)
        else:
            del container[key]
    text = json.dumps(header).encode()
    blob = seal(t.ARTIFACT_VERSION, zlib.compress(text, 1), len(text), payload)
    began = time.process_time()
    try:
        model = t.load_artifact(blob)
    except t.ArtifactError:
        pass
    else:
        assert all(p.device.type == "cpu" for p in model.parameters())
    assert time.process_time() - began < 1.0


@cache
def tiny_blob(coder="brotli"):
    """The bytes of an artifact of about 3 kB."""
    cfg = fixed_config(vocab_size=8, model_dim=16, num_heads=2, num_kv_heads=1, gdn_head_dim=8, mlp_mult=1.0,
                      ngram_buckets=4, ngram_dim=2, stack="gdn swa", compressor=coder)
    with tempfile.TemporaryDirectory() as folder:
        t.save_artifact(Path(folder) / "a", tiny_model(cfg), cfg)
        return (Path(folder) / "a").read_bytes()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 60))
def test_random_bytes_are_an_artifact_error(noise, keep):
    blob = tiny_blob()
    with pytest.raises(t.ArtifactError):
        t.load_artifact(blob[:keep] + noise)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_random_header_behind_a_right_checksum_is_an_artifact_error(noise):
    for head in (noise, zlib.compress(noise)):
        with pytest.raises(t.ArtifactError):
            t.load_artifact(seal(t.ARTIFACT_VERSION, head, len(noise), b""))


def test_row_scales_survive_the_byte_planes(model, blob):
    """Scales are read back exactly: one wrong byte order would scale rows by 256."""
    cfg = model.cfg
    expected = [t.quantize(p.detach(), t.stored_bits(model, cfg)[n], getattr(cfg, t.route(n).clip))[1]
                for n, p in model.named_parameters() if t.route(n).bits]
    header, payload = opened(blob)
    scales = np.frombuffer(t.read_streams(header, payload)["scale"], "<f2")
    assert np.array_equal(scales, torch.cat(expected).numpy())


# ---- the coder of integers -----------------------------------------------------------------------


def code(symbols, classes):
    """rANS by the symbols' own counts: (bytes, frequencies)."""
    counts = np.bincount(classes.astype(np.int64) << 8 | symbols, minlength=t.RANS_CLASSES << 8)
    freq = t.rans_frequencies(counts.reshape(t.RANS_CLASSES, 256))
    return t.rans_encode(symbols, classes, freq), freq


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20_000), st.integers(0, 2**32), st.floats(0, 60), st.sampled_from([1, 3, t.RANS_CLASSES]))
def test_coder_returns_any_symbols(count, seed, spread, classes):
    rng = np.random.default_rng(seed)
    symbols = np.clip(rng.normal(128, spread, count), 0, 255).astype(np.uint8)
    symbols[rng.random(count) < 0.01] = rng.integers(256)
    of_class = rng.integers(0, classes, count).astype(np.uint8)
    data, freq = code(symbols, of_class)
    assert np.array_equal(t.rans_decode(data, of_class, freq), symbols)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**7), min_size=256, max_size=256))
def test_frequencies_fill_the_table_and_miss_no_symbol(counts):
    counts = np.array([counts, [0] * 256])
    freq = t.rans_frequencies(counts).astype(int)
    assert freq[0].sum() in (0, 1 << t.RANS_BITS) and not freq[1].any()
    assert ((freq[0] > 0) == (counts[0] > 0)).all()


def test_coder_needs_less_than_each_tensors_entropy():
    """Rows and columns of different sizes, as the rate grid makes them: modelling them pays for its own bytes."""
    rng = np.random.default_rng(0)
    Q = {f"blocks.{i}.mixer.q_proj": np.rint(rng.normal(0, 3, (256, 256)) * 2 ** rng.normal(0, 0.5, (256, 1))
                                             * 2 ** rng.normal(0, 0.5, (1, 256))).clip(-127, 127).astype(np.int8)
         for i in range(4)}
    roles = {}
    with t.ThreadPoolExecutor(2) as pool:
        coded = t.rans_roles({"mixer": list(Q.values())}, roles, pool)
    total = sum(len(out) for *_, out in coded) + sum(len(t.compress(data, "brotli")) for data in roles.values())
    entropy = t.entropy_bytes({name: t.Quantized(torch.from_numpy(q), *[None] * 6) for name, q in Q.items()})
    assert total < 0.99 * entropy


def test_damaged_integers_are_refused():
    """A flipped bit, a lost or an added word: the states do not end where they began, or the words run out."""
    rng = np.random.default_rng(1)
    symbols, classes = np.clip(rng.normal(128, 4, 9000), 0, 255).astype(np.uint8), np.zeros(9000, np.uint8)
    data, freq = code(symbols, classes)
    for _ in range(15):
        bad = bytearray(data)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        for damaged in (bytes(bad), data[:-2], data + b"ab", data[:3]):
            with pytest.raises(t.ArtifactError):
                t.rans_decode(damaged, classes, freq)
    freq[0, 128] += 1
    with pytest.raises(t.ArtifactError, match="table"):
        t.rans_decode(data, classes, freq)


def test_lzma_takes_brotlis_place_where_it_is_missing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(t.importlib.util, "find_spec", lambda name: None)
    t.save_artifact(tmp_path / "a", model, replace(model.cfg, compressor="rans"))
    header, _ = opened((tmp_path / "a").read_bytes())
    assert {stream[1] for stream in header["streams"]} == {"lzma", "rans"}
    expected = stored(model, model.cfg)
    assert all(torch.equal(p, expected[name]) for name, p in t.load_artifact(tmp_path / "a").named_parameters())


def test_control_tensors_of_8_bits_are_within_half_a_step(tmp_path):
    cfg = fixed_config(model_dim=128)
    model = tiny_model(cfg)
    small = t.save_artifact(tmp_path / "a", model, replace(cfg, control_bits=8))
    assert small < t.save_artifact(tmp_path / "b", model, cfg)
    for name, p in t.load_artifact(tmp_path / "a").named_parameters():
        if not t.route(name).bits:
            W = model.get_parameter(name).detach()
            assert ((p - W).abs() <= 0.51 * W.abs().amax(-1, keepdim=True) / 127 + 1e-6).all(), name


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_mutated_bytes_are_refused_or_make_a_model(seed, sealed):
    """Bytes changed anywhere, in most cases behind a right checksum, so that every inner reader is reached."""
    rng = random.Random(seed)
    blob = bytearray(tiny_blob(rng.choice(CODERS)))
    for _ in range(rng.randint(1, 4)):
        blob[rng.randrange(HEAD.size if sealed else 0, len(blob))] = rng.randrange(256)
    if sealed:
        blob[HEAD.size - 32:HEAD.size] = hashlib.sha256(blob[HEAD.size:]).digest()
    try:
        t.load_artifact(bytes(blob))
    except t.ArtifactError:
        pass


def test_kernels_are_chosen_for_the_artifacts_own_heads(monkeypatch, tmp_path):
    """EVAL_ONLY and PROMPT know the width of the heads only once the file is open."""
    cfg = tiny_config(gdn_head_dim=32)
    t.save_artifact(tmp_path / "a", tiny_model(cfg), cfg)
    artifact, seen = (tmp_path / "a").read_bytes(), []

    def resolve(found, run):
        seen.append(found.gdn_head_dim)
        return t.replace(found, kernel="fla")
    monkeypatch.setattr(t, "resolve_kernels", resolve)
    model = t.load_on(t.Run(), artifact, tiny_config(gdn_head_dim=16))
    assert seen == [32] and {m.cfg.kernel for m in model.modules() if hasattr(m, "cfg")} == {"fla"}
    assert sum(hasattr(m, "cfg") for m in model.modules()) > 4
