"""Scoring: windows against the challenge's rule, the Ledger against gaps and repeats, evaluate()
against plain loops over the text, ranks against one, adapters against what they may see, and the
probes of the scoring calls against planted faults.
"""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from test_training import on_threads
from torch import nn

import train_gpt as t

SEQ_LEN, STRIDE, VOCAB = 64, 16, 64
METHODS = ("roundtrip", "exact", "sliding")


def random_text(n, seed=0):
    """n tokens, with the document start (1) now and then."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(n) < 0.02, 1, rng.integers(0, VOCAB, n)).astype(np.uint16)


IDS = torch.arange(VOCAB)
TABLE = t.ByteTable(IDS % 7, IDS % 3 == 0, IDS < 4)
MODEL = tiny_model(tiny_config()).requires_grad_(False)


def model_with(**changes):
    """The tiny model under other evaluation settings, its weights shared."""
    model = copy.copy(MODEL)
    model.cfg = replace(MODEL.cfg, **changes)
    return model


class Lookup(nn.Module):
    """A model whose nats depend on the current token alone, the same in any batch."""

    def __init__(self, **changes):
        super().__init__()
        self.cfg = tiny_config(**changes)
        rng = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(2 * torch.randn(VOCAB, VOCAB, generator=rng), False)
        self.extra = 0.0  # added to every score
        self.ops = t.REFERENCE
        self.embed = SimpleNamespace(logits=lambda x: x)

    def nll(self, ids, targets, state=None, bonus=None):
        return t.token_nll(self.logits[ids.long()], targets) + self.extra, state

    def features(self, ids, state):
        return self.logits[ids.long()], state


def nats_of(model, tokens, first, last, start):
    """Nats of targets first .. last - 1 by one plain call over tokens start .. last - 1."""
    ids = torch.from_numpy(tokens[start:last + 1].astype(np.int64))[None]
    with torch.inference_mode():
        nats, _ = model.nll(ids[:, :-1], ids[:, 1:])
    return float(nats[0, first - start:].double().sum())


def by_hand(model, tokens, method):
    """Nats of all targets by plain loops."""
    cfg = model.cfg
    total = len(tokens) - 1
    if method == "exact":
        edges = [total * i // cfg.eval_spans for i in range(cfg.eval_spans + 1)]
        starts = [max(0, first - cfg.eval_warmup_tokens) for first in edges]
    else:  # the first window is whole, every other scores `stride` targets
        stride = cfg.eval_stride if method == "sliding" else SEQ_LEN
        edges = [0, *range(min(SEQ_LEN, total), total, stride), total]
        starts = [max(0, first + stride - SEQ_LEN) for first in edges]
    return sum(nats_of(model, tokens, first, last, start)
               for start, first, last in zip(starts, edges, edges[1:]) if last > first)


def entry(count, value=1.0, num_bytes=2):
    """What Ledger.add takes for `count` targets."""
    return torch.full((count,), value), torch.full((count,), num_bytes)


def all_bytes(tokens):
    ids = torch.from_numpy(tokens.astype(np.int64))
    return int(t.count_bytes(TABLE, ids[:-1], ids[1:]).sum())


def nats(ledger):
    return ledger.val_loss * ledger.tokens


@given(st.integers(1, 400), st.integers(1, 80), st.data())
def test_windows_follow_the_challenges_rule(total, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    starts = [ws for ws in range(0, total, stride) if ws == 0 or ws + seq_len - stride < total]
    rule = [(ws, min(ws + seq_len, total), ws + seq_len - stride if ws else 0) for ws in starts]
    assert list(t.windows(total, seq_len, stride)) == rule


def test_ledger_sums_what_is_entered_in_float64():
    ledger = t.Ledger()
    ledger.add(0, *entry(1_000_000, 0.1, 3))
    ledger.add(1_000_000, *entry(1, 2.0, 0))
    assert (ledger.tokens, ledger.bytes) == (1_000_001, 3_000_000)
    want = 1e6 * float(torch.tensor(0.1)) + 2.0
    assert nats(ledger) == pytest.approx(want, rel=1e-12)
    assert ledger.bpb == pytest.approx(want / math.log(2) / 3e6, rel=1e-12)


def test_ledger_refuses_a_repeat_an_overlap_and_a_gap():
    ledger = t.Ledger()
    ledger.add(0, *entry(5))
    for first in (0, 4, 6, 100, -1):
        with pytest.raises(t.GolfError, match="gap or a repeat"):
            ledger.add(first, *entry(1))
    assert ledger.tokens == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.5])
def test_an_impossible_score_ends_the_evaluation(bad):
    model = Lookup()
    model.extra = torch.zeros(4, SEQ_LEN)
    model.extra[2, 7] = bad - (100 if bad == -0.5 else 0)
    with pytest.raises(t.GolfError, match="diverged"):
        t.evaluate(model, random_text(500), TABLE, "roundtrip")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [2, 3, SEQ_LEN, SEQ_LEN + 1, SEQ_LEN + 2, SEQ_LEN + STRIDE + 1,
                               2 * SEQ_LEN, 300, 517])
def test_score_is_that_of_a_plain_loop(method, n):
    tokens = random_text(n, seed=n)
    model = model_with(eval_batch_tokens=(4096, 64, 192)[n % 3])
    ledger = t.evaluate(model, tokens, TABLE, method)
    assert (ledger.tokens, ledger.bytes) == (n - 1, all_bytes(tokens))
    assert nats(ledger) == pytest.approx(by_hand(MODEL, tokens, method), rel=2e-6)


@given(n=st.integers(2, 900), spans=st.integers(1, 40), warmup=st.sampled_from([0, 1, 64, 500]),
       rows=st.integers(1, 20), method=st.sampled_from(METHODS),
       chunk=st.sampled_from([None, 7, 64, 300]))
def test_every_target_counts_once_for_any_settings(n, spans, warmup, rows, method, chunk):
    model = Lookup(eval_spans=spans, eval_warmup_tokens=warmup, eval_batch_tokens=64 * rows,
                   ttt_chunk_tokens=chunk or 1)
    tokens = random_text(n, seed=n)
    adapter = (lambda seen: None) if chunk else None
    ledger = t.evaluate(model, tokens, TABLE, method, adapter)
    assert (ledger.tokens, ledger.bytes) == (n - 1, all_bytes(tokens))
    assert nats(ledger) == pytest.approx(nats_of(model, tokens, 0, n - 1, 0), rel=1e-6)


@pytest.mark.parametrize("ranks, n", [(2, 2), (2, 700), (3, 5), (3, 700)])
@pytest.mark.parametrize("chunk", [None, 100], ids=["plain", "adapting"])
@pytest.mark.parametrize("method", METHODS)
def test_every_rank_gets_the_ledger_of_one_rank(method, chunk, ranks, n):
    tokens = random_text(n, seed=n)
    model = Lookup(eval_spans=5, ttt_chunk_tokens=chunk or 1)
    adapter = (lambda seen: None) if chunk else None
    alone = t.evaluate(model, tokens, TABLE, method, adapter)
    for ledger in on_threads(ranks, lambda run: t.evaluate(model, tokens, TABLE, method, adapter,
                                                           run, probing=True)):
        assert (ledger.tokens, ledger.bytes) == (n - 1, alone.bytes)
        assert nats(ledger) == pytest.approx(nats(alone), rel=1e-9)
        assert ledger.probes > 0 and ledger.causal == 0


@pytest.mark.parametrize("scored", ["nothing", "the same part"])
def test_a_rank_that_does_not_score_its_own_part_is_noticed(scored):
    run = t.Run(0, 2)
    run.all_sum = lambda tensor: tensor * (1 if scored == "nothing" else 2)
    with pytest.raises(t.GolfError, match="target of 0 .. 498 was not scored exactly once"):
        t.evaluate(Lookup(), random_text(500), TABLE, "sliding", run=run)


@pytest.mark.parametrize("chunk", [1, 50, 64, 130, 299, 1000])
@pytest.mark.parametrize("method", METHODS)
def test_adapter_gets_scored_tokens_only_and_changes_only_later_ones(method, chunk, monkeypatch):
    """After each chunk but the last it sees all scored targets and nothing beyond them.

    Each call makes every later target cost one nat more: the total tells when each was scored.
    """
    model = Lookup(ttt_chunk_tokens=chunk)
    tokens = random_text(300)
    plain = nats_of(model, tokens, 0, 299, 0)
    scored = [0]
    seen = []
    add = t.Ledger.add

    def counting(ledger, first, nll, num_bytes):
        add(ledger, first, nll, num_bytes)
        scored[0] = first + len(nll)

    def spy(text):
        seen.append(len(text))
        assert np.array_equal(text, tokens[:scored[0] + 1])
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        model.extra += 1.0
    monkeypatch.setattr(t.Ledger, "add", counting)
    ledger = t.evaluate(model, tokens, TABLE, method, spy)
    assert seen == sorted(set(seen)) and max(seen, default=0) < 300
    assert bool(seen) == (chunk < 299)
    rise = sum(300 - length for length in seen)
    assert nats(ledger) - plain == pytest.approx(rise, rel=1e-5, abs=1e-2)


FAULTS = {"tail dropped": lambda real: real[:-1], "window twice": lambda real: real[:2] + real[1:],
          "window left out": lambda real: real[:1] + real[2:],
          "window short": lambda real: [(0, real[0][1] - 1, 0), *real[1:]],
          "beginning dropped": lambda real: [(0, real[0][1], 5), *real[1:]],
          "swapped": lambda real: [real[1], real[0], *real[2:]]}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method, cutter", [("roundtrip", "windows"), ("sliding", "windows"),
                                            ("exact", "spans")])
def test_a_text_that_is_cut_wrongly_is_not_scored(method, cutter, fault, monkeypatch):
    real = getattr(t, cutter)
    monkeypatch.setattr(t, cutter, lambda *arguments: FAULTS[fault](list(real(*arguments))))
    with pytest.raises(t.GolfError):
        t.evaluate(Lookup(), random_text(500), TABLE, method)


def probed(model, n=1500, method="exact"):
    """The Ledger of a text whose scoring was probed."""
    return t.evaluate(model, random_text(n), TABLE, method, run=t.Run(), probing=True)


@pytest.mark.parametrize("n", [2, 3, 30, SEQ_LEN + 1, 1500])
@pytest.mark.parametrize("method", METHODS)
def test_model_is_causal_and_normalized_to_the_probes_which_change_no_score(method, n):
    ledger = probed(MODEL, n, method)
    assert ledger.probes > 0 and ledger.causal == 0 and ledger.normalized < 1e-5
    assert nats(ledger) == nats(t.evaluate(MODEL, random_text(n), TABLE, method))


def test_batches_1_4_16_and_64_are_probed_at_8_places_each():
    """4 rows of 64 tokens a batch: 17 batches."""
    assert probed(Lookup(), 17 * 256 + 1, "roundtrip").probes == 3 * 8


def altered(change, **settings):
    """The tiny model with change(nats, ids, targets) as its scores."""
    def nll(ids, targets, state=None, bonus=None):
        nats, after = MODEL.nll(ids, targets, state, bonus)
        return change(nats, ids, targets), after
    return SimpleNamespace(cfg=replace(MODEL.cfg, **settings), embed=MODEL.embed,
                           features=MODEL.features, nll=nll)


def behind(nll, reads, where):
    """nll with something of the next place read at the places where `where`."""
    return nll + 0.01 * F.pad(reads[:, 1:], (0, 1)) * where


@pytest.mark.parametrize("change", [
    lambda nll, ids, y: behind(nll, ids, torch.arange(ids.shape[1]) >= 3 * ids.shape[1] // 4),
    lambda nll, ids, y: behind(nll, ids, torch.arange(ids.shape[1]) % t.GDN_CHUNK == 63),
    lambda nll, ids, y: nll + 0.01 * ids[:, -1:].roll(1, 0),
    lambda nll, ids, y: nll + 0.01 * ids[:, -1:].roll(-1, 0),
    lambda nll, ids, y: behind(nll, y, 1),
    lambda nll, ids, y: nll + 0.01 * (F.pad(ids[:, 10:], (0, 10)) % 2 == 0)],
    ids=["end of the row", "end of a chunk", "row above", "row below", "later target", "ten ahead"])
def test_causality_probe_finds_a_leak_at_few_places_or_from_afar(change):
    assert probed(altered(change, eval_batch_tokens=4096, eval_spans=8), 6000).causal > 1e-3


def test_causality_probe_finds_a_leak_late_in_a_row_at_the_cost_of_six_segments():
    """Two and two for the leaks, two for the normalization; the row itself has 13.

    The model counts segments in its state, and leaks from the fifth on.
    """
    tokens = []  # of each call

    def features(ids, state):
        tokens.append(ids.numel())
        return MODEL.features(ids, state and state[1])

    def nll(ids, targets, state=None, bonus=None):
        tokens.append(ids.numel())
        segment, inner = state or (0, None)
        nll, after = MODEL.nll(ids, targets, inner, bonus)
        return behind(nll, ids, float(segment >= 4)), (segment + 1, after)
    cfg = replace(MODEL.cfg, eval_batch_tokens=512, eval_spans=8)
    model = SimpleNamespace(cfg=cfg, embed=MODEL.embed, features=features, nll=nll)
    assert probed(model, 6000).causal > 1e-3
    assert tokens == [8 * 64] * (13 + 6)


@pytest.mark.parametrize("method", METHODS)
def test_causality_probe_follows_the_carried_state(method):
    """A model that has seen the whole row at its first segment."""
    model = altered(lambda nll, ids, targets: nll + 0.01 * (model.last % 2 == 0))
    nats = t.Scorer.nats

    def peeking(scorer, ids, *rest):
        model.last = ids[:, -1:]
        return nats(scorer, ids, *rest)
    with mock.patch.object(t.Scorer, "nats", peeking):
        assert probed(model, 3000, method).causal > 1e-3


def test_probe_takes_scores_that_are_no_numbers_as_a_fault():
    factors = iter([1.0, math.nan, *9 * [1.0]])  # of each call
    model = altered(lambda nll, ids, targets: nll * next(factors))
    assert probed(model, 100, "roundtrip").causal == math.inf


UNNORMALIZED = {
    "constant": lambda nll, ids, targets: nll + 0.01,
    "scaled": lambda nll, ids, targets: 2 * nll,
    "one token favoured": lambda nll, ids, targets: torch.where(targets == 3, nll / 2, nll),
    "clipped": lambda nll, ids, targets: nll.clamp_max(4.5),
    "better where the target is known": lambda nll, ids, targets: nll - 0.01 * (targets > 31)}


@pytest.mark.parametrize("spans", [1, 4])
@pytest.mark.parametrize("segments", [2, 3, 4, 6])
def test_probes_reach_a_segment_after_the_first(segments, spans):
    """Every score behind a carried state is a tenth too low."""
    model = altered(lambda nll, ids, targets: nll, eval_warmup_tokens=0, eval_spans=spans)
    honest = model.nll
    model.nll = lambda ids, targets, state, bonus: (
        honest(ids, targets, state)[0] * (1 if state is None else 0.9),
        honest(ids, targets, state)[1])
    length = 256 // spans  # of a segment of each span: EVAL_BATCH_TOKENS is 256
    assert probed(model, segments * length * spans + 1).normalized > 0.01


@pytest.mark.parametrize("fault", UNNORMALIZED)
def test_normalization_probe_finds_scores_that_do_not_sum_to_one(fault):
    assert probed(altered(UNNORMALIZED[fault]), 1000).normalized > 1e-3


def reported(capsys, settings=None, tokens=99, extra_bytes=0, causal=0.0, normalized=0.0,
             in_order=True, eval_s=1.0, artifact_bytes=1000, train_s=599.0, fetched=(0.0, 599.0)):
    """Whether report() holds, and what it prints, of a run of 100 tokens with these numbers."""
    text = random_text(100)
    ledger = t.Ledger()
    ledger.add(0, *entry(tokens, num_bytes=0))
    ledger.sums[1] += all_bytes(text) + extra_bytes
    ledger.causal, ledger.normalized = causal, normalized
    model = model_with(**dict(max_wallclock_seconds=600.0) | (settings or {}))
    run = t.Run()
    run.fetched = [*fetched]
    held = t.report((model, ledger, eval_s, in_order), artifact_bytes, train_s, "file",
                    t.Data([], text, TABLE), run)
    return held, capsys.readouterr().out


@pytest.mark.parametrize("fault, word", [
    ({}, "verdict:ok"), (dict(causal=1e-3), "causal:fail"), (dict(causal=math.nan), "causal:fail"),
    (dict(causal=math.inf), "causal:fail"), (dict(normalized=1e-3), "normalized:fail"),
    (dict(tokens=98), "coverage:fail"), (dict(in_order=False), "score_first:fail"),
    (dict(extra_bytes=1), "bytes:fail"),
    (dict(eval_s=601.0), " eval:fail"), (dict(train_s=601.0), " train:fail"),
    (dict(fetched=[0.0, 610.0]), "clock:fail"), (dict(artifact_bytes=16_000_000), "size:fail")],
    ids=str)
def test_each_fault_fails_the_verdict(fault, word, capsys):
    held, out = reported(capsys, **fault)
    assert held == (not fault) and word in out and ("verdict:fail" in out) == bool(fault)


@pytest.mark.parametrize("settings, train_s, verdict", [
    (dict(cap_bytes=16_777_216), 599.0, "other_limits"), (dict(cap_bytes=900_000), 599.0, "ok"),
    (dict(max_wallclock_seconds=1200.0), 599.0, "other_limits"),
    (dict(max_wallclock_seconds=1200.0), None, "ok"),  # an artifact that is only scored
    (dict(max_wallclock_seconds=0.0), 599.0, "ok"),
    (dict(max_wallclock_seconds=0.0), 601.0, "other_limits"),
    (dict(eval_budget_seconds=700.0), 599.0, "other_limits"),
    (dict(holdout_tokens=100, cap_bytes=16_777_216), 599.0, "holdout")], ids=str)
def test_verdict_of_other_limits_is_not_ok(settings, train_s, verdict, capsys):
    """A looser limit than the challenge's is no fault of the run, but no verdict:ok either."""
    fetched = [0.0, 1.0] if train_s else []
    held, out = reported(capsys, settings, train_s=train_s, fetched=fetched)
    assert held and f" verdict:{verdict}\n" in out
