"""The artifact file: codecs and rANS against what went in, a reloaded model against its quantized
weights bit for bit, damaged and hostile files against one GolfError in bounded memory.
"""

import random
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_same, opened, seal, tiny_config, tiny_model, weight_of, weights_of
from fuzz import FASTEST

import train_gpt as t

HEAD = t.ARTIFACT_HEAD
COMPRESSORS = ("brotli", "lzma", "zstd")  # of bytes
CODERS = ("rans", *COMPRESSORS)
BASE = dict(grid="sdclip", matrix_clip_sigmas=12.85, model_dim=32, num_heads=2, num_kv_heads=1,
            gdn_head_dim=8, ngram_dim=8)


def quantized(model, calibration=t.UNCALIBRATED, strength=12.85 / t.SDCLIP_QMAX):
    """{name: Quantized} as the export makes them at a strength."""
    matrices = t.prepare_matrices(model, model.cfg, calibration, t.Run())
    return t.quantize(matrices, strength)


def stored(model):
    """The weights that an artifact of the model stands for."""
    weights = {name: p.detach() if p.numel() <= 64 else p.detach().half().float()
               for name, p in model.named_parameters()}
    return weights | {name: weight_of(q) for name, q in quantized(model).items()}


@pytest.fixture(scope="module")
def model():
    """A perturbed model whose artifact has about 30 kB."""
    return tiny_model(tiny_config(**BASE))


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """{coder: path} of an artifact of the model."""
    folder = tmp_path_factory.mktemp("artifacts")
    for name in CODERS:
        t.save_artifact(folder / name, model, replace(model.cfg, compressor=name))
    return {name: folder / name for name in CODERS}


def test_the_runs_own_bytes_need_its_tokenizer_no_more(tmp_path, model):
    """A tokenizer that is replaced or deleted while a run trains does not end the run."""
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"a")
    cfg = replace(model.cfg, tokenizer_path=str(tokenizer))
    t.save_artifact(tmp_path / "artifact", model, cfg)
    tokenizer.write_bytes(b"b")
    t.load_artifact((tmp_path / "artifact").read_bytes(), base=cfg)
    with pytest.raises(t.GolfError, match="made with another tokenizer"):
        t.load_artifact(tmp_path / "artifact", base=cfg)


@pytest.fixture(scope="module")
def blob(files):
    return files["brotli"].read_bytes()


def forged(blob, change):
    """The artifact with its header changed, under a right checksum; `change` may return another."""
    header, payload = opened(blob)
    return seal(change(header) or header, payload)


def fault(path):
    """The message of the GolfError that loading raises within a second."""
    began = time.process_time()
    with pytest.raises(t.GolfError) as caught:
        t.load_artifact(path)
    assert time.process_time() - began < 1.0
    return str(caught.value)


def encoded(symbols, classes, freq):
    """A case of RANS, encoded."""
    return t.rans_encode(classes.astype(np.int32) << 8 | symbols, freq)


def rans_case(symbols, classes):
    """(symbols, classes, freq) for rans_decode."""
    symbols = np.asarray(symbols, np.uint8)
    classes = np.asarray(classes, np.uint8)
    counts = np.zeros((t.RANS_CLASSES, 256), np.int64)
    np.add.at(counts, (classes, symbols), 1)
    return symbols, classes, t.rans_frequencies(counts)


LIMIT = np.zeros((t.RANS_CLASSES, 256), np.uint16)
LIMIT[0, :3] = 1, 4096, 2**14 - 4097  # 0, then 1 brings a state to exactly where it must shrink
RNG = np.random.default_rng(0)
RANS = {
    "state at its limit": (np.array([1, 0], np.uint8), np.zeros(2, np.uint8), LIMIT),
    "one symbol": rans_case([7], [0]), "one kind": rans_case([255] * 5000, [95] * 5000),
    "all symbols": rans_case(np.arange(256), np.zeros(256)),
    "uniform": rans_case(RNG.integers(0, 256, 20_000), RNG.integers(0, 96, 20_000)),
    "one among a million": rans_case([0] * 999_999 + [255], np.zeros(10**6)),
    "gaussian": rans_case((128 + 9 * RNG.standard_normal(50_000)).round(), np.arange(50_000) % 3)}


@pytest.mark.parametrize("name", RANS)
def test_rans_gives_back_every_symbol_within_a_percent_of_the_entropy(name):
    symbols, classes, freq = RANS[name]
    data = encoded(symbols, classes, freq)
    assert np.array_equal(t.rans_decode(data, classes, freq), symbols)
    counts = np.zeros(freq.shape)
    np.add.at(counts, (classes, symbols), 1)
    share = (counts / counts.sum(1, keepdims=True).clip(1))[classes, symbols]
    states = 4 * (1 + len(symbols) // 4096)
    assert len(data) < 1.01 * -np.log2(share).sum() / 8 + states + 100


@pytest.mark.parametrize("damage", [lambda data: data[:-2], lambda data: data[:-1],
                                    lambda data: b""], ids=["cut", "odd", "empty"])
def test_cut_rans_data_is_refused(damage):
    symbols, classes, freq = RANS["gaussian"]
    with pytest.raises(ValueError):  # load_artifact makes it an GolfError
        t.rans_decode(damage(encoded(symbols, classes, freq)), classes, freq)


@pytest.mark.parametrize("change", [
    lambda freq: freq.fill(65535), lambda freq: freq[0].fill(0),
    lambda freq: freq.__setitem__((0, 128), 0)], ids=["too large", "class missing", "too small"])
def test_hostile_table_of_frequencies_is_refused(change):
    symbols, classes, freq = RANS["gaussian"]
    data = encoded(symbols, classes, freq)
    hostile = freq.copy()
    change(hostile)
    with pytest.raises(t.GolfError, match="frequencies"):
        t.rans_decode(data, classes, hostile)


@pytest.mark.parametrize("changes", [
    dict(stack="gdn*2"), dict(stack="(attn::a swa::b)*2"), dict(ngram_buckets=0, smear=False),
    dict(mlp_act="leaky_relu2", mlp_mult=0.25, kv_share=2, unet=True),
    dict(bos_id=-1, ngram_order=2, vocab_size=300), dict(rope_base=100.0, swa_window=5),
    dict(model_dim=8, vocab_size=16, stack="gdn", gdn_heads=1, mlp_mult=1.0, ngram_buckets=0),
    dict(matrix_bits=2, mlp_bits=3, embed_bits=5, embed_clip_sigmas=4.0, sandwich_bits=8)], ids=str)
def test_any_model_and_bits_come_back(tmp_path, changes):
    cfg = tiny_config(**(BASE | dict(compressor="rans", train_batch_tokens=0) | changes))
    model = tiny_model(cfg)
    t.save_artifact(tmp_path / "a", model, cfg)
    loaded = t.load_artifact(tmp_path / "a")
    assert_same(weights_of(loaded), stored(model))
    assert [n for n in t.STORED_FIELDS if getattr(loaded.cfg, n) != getattr(cfg, n)] == []


@pytest.mark.parametrize("codec", ["rans", "brotli"])
def test_row_and_column_scales_of_the_rate_grid_come_back(codec):
    changes = dict(grid="rate", matrix_clip_sigmas=0.0, compressor=codec)
    model = tiny_model(tiny_config(**(BASE | changes)))
    ids = torch.randint(64, (4, 65), generator=torch.Generator().manual_seed(0))
    calibration = t.collect_hessians(model, [ids], t.Run())
    parts = quantized(model, calibration, strength=0.3)
    assert all(len(q.columns.unique()) > 1 for n, q in parts.items() if n in calibration.H)
    loaded = t.load_artifact(t.pack_artifact(model, model.cfg, parts))
    for name, q in parts.items():
        assert torch.equal(loaded.get_parameter(name), weight_of(q)), name


def test_control_bits_store_long_vectors_as_int8_rows():
    model = tiny_model(tiny_config(**(BASE | dict(model_dim=128, num_heads=4, control_bits=8))))
    loaded = t.load_artifact(t.pack_artifact(model, model.cfg, quantized(model)))
    for name in ("blocks.0.mixer_scale", "blocks.1.resid_mix"):
        p, q = model.get_parameter(name).detach(), loaded.get_parameter(name).detach()
        step = p.abs().amax(-1, keepdim=True) / 127
        assert not torch.equal(p.half().float(), q) and ((p - q).abs() <= 0.51 * step).all(), name
    assert torch.equal(loaded.blocks[1].qk_gain, model.blocks[1].qk_gain)


def test_base_supplies_the_settings_that_the_file_does_not_fix(files, model):
    base = replace(model.cfg, eval_spans=9, stack="gdn")
    loaded = t.load_artifact(files["brotli"], base=base).cfg
    assert (loaded.eval_spans, loaded.stack) == (9, model.cfg.stack)
    with pytest.raises(t.GolfError, match="unfit for a setting .*EVAL_STRIDE=512"):
        t.load_artifact(files["rans"], base=tiny_config(train_seq_len=512, eval_stride=512,
                                                        eval_batch_tokens=512))


@pytest.mark.parametrize("codec", CODERS)
def test_reloaded_weights_are_the_quantized_ones_and_the_same_bytes_again(model, files, codec,
                                                                          tmp_path):
    assert_same(weights_of(t.load_artifact(files[codec])), stored(model))
    size = t.save_artifact(tmp_path / "again", model, replace(model.cfg, compressor=codec))
    assert (tmp_path / "again").read_bytes() == files[codec].read_bytes()
    assert size == files[codec].stat().st_size


@pytest.mark.parametrize("codec", CODERS)
def test_long_streams_are_cut_and_joined_again(model, monkeypatch, codec):
    monkeypatch.setattr(t, "PIECE", 1000)
    blob = t.pack_artifact(model, replace(model.cfg, compressor=codec), quantized(model))
    assert len(opened(blob)[0]["streams"]) > 8
    assert_same(weights_of(t.load_artifact(blob)), stored(model))


def test_missing_cut_longer_or_foreign_file_is_refused_by_name(blob, tmp_path):
    path = tmp_path / "a"
    assert f"{path}: No such file" in fault(path)
    packed = HEAD.unpack_from(blob)[2]
    lengths = (0, 1, 8, HEAD.size - 1, HEAD.size, HEAD.size + packed - 1, HEAD.size + packed,
               len(blob) // 2, len(blob) - 1)
    for content in (*(blob[:keep] for keep in lengths), blob + b"\0", b"It was the best. " * 20,
                    b"PK\x03\x04" * 99, random.Random(1).randbytes(100_000)):
        path.write_bytes(content)
        assert str(path) in fault(path), content[:30]


def test_every_flipped_bit_is_noticed(blob):
    """All bits of the head, and one bit in each of 200 places of the rest."""
    rng = random.Random(0)
    bits = [*range(8 * HEAD.size)]
    bits += [8 * at + rng.randrange(8) for at in rng.sample(range(HEAD.size, len(blob)), 200)]
    for bit in bits:
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(t.GolfError):
            t.load_artifact(bytes(damaged))


def test_another_version_is_named(blob):
    for version in (0, t.ARTIFACT_VERSION - 1, t.ARTIFACT_VERSION + 1, 2**32 - 1):
        assert f"version {version}" in fault(blob[:8] + version.to_bytes(4, "little") + blob[12:])


FORGERIES = {
    "not an object": lambda h: b"[]", "not UTF-8": lambda h: b'"\xff"',
    "nested too deep": lambda h: b"[" * 10**6,
    "no settings": lambda h: h.pop("config") and None,
    "setting missing": lambda h: h["config"].pop("smear") and None,
    "setting outside its rule": lambda h: h["config"].update(model_dim=-8),
    "text for a number": lambda h: h["config"].update(rope_base="x"),
    "other model": lambda h: h["config"].update(stack="gdn"),
    "larger than any memory": lambda h: h["config"].update(vocab_size=65536, model_dim=2**30),
    "tensor missing": lambda h: h["tensors"].pop() and None,
    "shape of fractions": lambda h: h["tensors"][0].__setitem__(1, [64.0, 32.0]),
    "matrix that is not there": lambda h: next(
        entry for entry in h["tensors"] if entry[2] == "f32").__setitem__(2, "int8"),
    "streams missing": lambda h: h.update(streams=[]),
    "stream length negative": lambda h: h["streams"][0].__setitem__(2, -1),
    "packed length longer": lambda h: h["streams"][0].__setitem__(3, h["streams"][0][3] + 1),
    "words without tables": lambda h: h["streams"][0].__setitem__(0, "words"),
    "50000 empty streams": lambda h: h["streams"].extend([["x", "lzma", 0, 0]] * 50_000)}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_header_is_refused(blob, forgery):
    fault(forged(blob, FORGERIES[forgery]))


@pytest.mark.parametrize("text", ["\x1b[31m\nok", "é" * 1000], ids=["control", "long"])
def test_text_of_a_hostile_file_is_not_printed_raw(blob, text):
    for change in (lambda h: h["streams"][0].__setitem__(1, text),
                   lambda h: h["tensors"][0].__setitem__(2, text),
                   lambda h: h["config"].update(stack=text)):
        message = fault(forged(blob, change))
        assert message.isascii() and message.isprintable() and len(message) < 700


def test_artifact_of_before_tokenizers_were_named_is_read(model, blob, tmp_path):
    (tmp_path / "a").write_bytes(forged(blob, lambda h: h.pop("tokenizer") and None))
    assert_same(weights_of(t.load_artifact(tmp_path / "a", base=tiny_config())), stored(model))


def test_header_of_more_weights_than_its_bytes_can_code_is_refused():
    """It agrees with itself: 100 M weights that are all zero, in 4 kB."""
    cfg = tiny_config(model_dim=512, mlp_mult=20.0, gdn_heads=32)
    with torch.device("meta"):
        shapes = [(name, list(p.shape)) for name, p in t.LM(cfg).named_parameters()]
    size = sum(4 * np.prod(shape) for _, shape in shapes)
    header = dict(config={name: getattr(cfg, name) for name in t.STORED_FIELDS},
                  tensors=[[name, shape, "f32"] for name, shape in shapes],
                  streams=[["f32", "lzma", int(size), 10]])
    assert "weights in" in fault(seal(header, bytes(10)))


def peak_of_refusal(blob):
    """Bytes that refusing an artifact takes at most at one time."""
    tracemalloc.start()
    try:
        with pytest.raises(t.GolfError):
            t.load_artifact(blob)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", COMPRESSORS)
@pytest.mark.parametrize("claimed", [1000, 2**26, 2**62], ids=str)
def test_a_stream_that_expands_a_thousandfold_is_not_expanded(blob, codec, claimed):
    stream = FASTEST[codec](bytes(2**26))
    header = opened(blob)[0] | dict(streams=[["integers", codec, claimed, len(stream)]])
    assert peak_of_refusal(seal(header, stream)) < 2**23


@pytest.mark.parametrize("streams, payload, most", [
    ([["f16", "none", 1, 2**20], ["f16", "none", 1, -2**20]] * 100 + [["f16", "none", 1, 2**20]],
     bytes(2**20), 2**23),
    ([["integers", "lzma", 1000, len(FASTEST["lzma"](bytes(1000)))]],
     FASTEST["lzma"](bytes(1000))[:1] + b"\xff" * 4 + FASTEST["lzma"](bytes(1000))[5:], 2**28)],
    ids=["back in the payload", "dictionary of gigabytes"])
def test_hostile_streams_are_refused_in_little_memory(blob, streams, payload, most):
    assert peak_of_refusal(seal(opened(blob)[0] | dict(streams=streams), payload)) < most


def test_a_header_that_expands_a_thousandfold_is_refused():
    bomb = b"[" + b" " * 2**26 + b"]"
    assert peak_of_refusal(seal(bomb, b"")) < 5 * t.MAX_HEADER_BYTES
