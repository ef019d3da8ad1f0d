"""Scoring: windows against lists written out and the challenge's rule, the Ledger against gaps and repeats,
evaluate() against plain loops over the text, any batch, span and world size against each other, adapters against what
they may see, and the run's own probes against planted faults.
"""

import math
import pickle
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import train_gpt as t

SEQ_LEN, STRIDE, VOCAB = 64, 16, 64
METHODS = ("roundtrip", "exact", "sliding")


def random_text(n, seed=0):
    """n tokens, with the document start (1) now and then."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(n) < 0.02, 1, rng.integers(0, VOCAB, n)).astype(np.uint16)


def random_table(seed=0):
    rng = torch.Generator().manual_seed(seed)
    spaced, boundary = (torch.rand(VOCAB, generator=rng) < p for p in (0.4, 0.05))
    return t.ByteTable(torch.randint(0, 7, (VOCAB,), generator=rng), spaced, boundary)


TABLE = random_table()
LM = tiny_model(tiny_config())
LM.requires_grad_(False)


def model_with(**settings):
    """The tiny model under other evaluation settings (weights shared with LM)."""
    model = t.LM(LM.cfg)
    model.load_state_dict(LM.state_dict())
    model.cfg = replace(LM.cfg, **settings)
    return model.requires_grad_(False)


class Lookup(nn.Module):
    """A model whose nats depend on the current token alone: exact in any batch, so sums may be compared closely."""

    def __init__(self, **settings):
        super().__init__()
        self.cfg = tiny_config(**settings)
        self.logits = nn.Parameter(2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)),
                                   requires_grad=False)

    def forward(self, ids, state=None):
        return self.logits[ids.long()], state


class Constant(nn.Module):
    """A model that gives every token the probability 1 / VOCAB, or e^-nats where `nats` is set."""

    def __init__(self, **settings):
        super().__init__()
        self.cfg, self.nats = tiny_config(**settings), math.log(VOCAB)
        self.place = nn.Parameter(torch.zeros(1))

    def forward(self, ids, state=None):
        return torch.zeros(*ids.shape, VOCAB), state


def nats_of(model, tokens, first, last, start):
    """Nats of targets first .. last - 1 by one plain forward over tokens start .. last - 1."""
    ids = torch.from_numpy(tokens[start:last].astype(np.int64))
    with torch.inference_mode():
        logits, _ = model(ids[None])
    targets = torch.from_numpy(tokens[start + 1:last + 1].astype(np.int64))
    nats = -logits[0].double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return float(nats[first - start:].sum())


def all_bytes(tokens):
    ids = torch.from_numpy(tokens.astype(np.int64))
    return int(t.count_bytes(TABLE, ids[:-1], ids[1:]).sum())


def by_hand(model, tokens, method):
    """Nats of all targets by plain loops: the oracle of evaluate()."""
    cfg, total, sum_nats = model.cfg, len(tokens) - 1, 0.0
    if method == "exact":
        edges = [total * i // cfg.eval_spans for i in range(cfg.eval_spans + 1)]
        for first, last in zip(edges, edges[1:], strict=False):
            if last > first:
                sum_nats += nats_of(model, tokens, first, last, max(0, first - cfg.eval_warmup_tokens))
        return sum_nats
    stride = cfg.eval_stride if method == "sliding" else cfg.train_seq_len
    first = 0
    while first < total:  # each window ends `stride` targets after the one before it; the first is a whole one
        last = min(total, first + (stride if first else cfg.train_seq_len))
        start = max(0, first + stride - cfg.train_seq_len)
        sum_nats += nats_of(model, tokens, first, last, start)
        first = last
    return sum_nats


# ---- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, expected", [
    ((1, 4, 2), [(0, 1, 0)]),
    ((3, 4, 1), [(0, 3, 0)]),
    ((4, 4, 2), [(0, 4, 0)]),
    ((5, 4, 1), [(0, 4, 0), (1, 5, 4)]),
    ((5, 4, 2), [(0, 4, 0), (2, 5, 4)]),
    ((10, 4, 2), [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]),
    ((11, 4, 2), [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8), (8, 11, 10)]),
    ((9, 4, 3), [(0, 4, 0), (3, 7, 4), (6, 9, 7)]),
    ((10, 4, 4), [(0, 4, 0), (4, 8, 4), (8, 10, 8)]),
    ((8, 4, 4), [(0, 4, 0), (4, 8, 4)]),
    ((3, 1, 1), [(0, 1, 0), (1, 2, 1), (2, 3, 2)]),
])
def test_windows_are_these(arguments, expected):
    assert list(t.windows(*arguments)) == expected


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_windows_score_every_target_once_within_their_range(data):
    total, seq_len = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 80))
    stride = data.draw(st.integers(1, seq_len))
    scored = []
    for start, end, score_from in t.windows(total, seq_len, stride):
        assert 0 <= start <= score_from < end <= min(start + seq_len, total)
        scored += range(score_from, end)
    assert scored == list(range(total))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_windows_follow_the_challenges_rule(data):
    total, seq_len = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 80))
    stride = data.draw(st.integers(1, seq_len))
    starts = [ws for ws in range(0, total, stride) if ws == 0 or ws + seq_len - stride < total]
    rule = [(ws, min(ws + seq_len, total), ws + seq_len - stride if ws else 0) for ws in starts]
    assert list(t.windows(total, seq_len, stride)) == rule


# ---- Ledger --------------------------------------------------------------------------------------


def entry(count, nats=1.0, num_bytes=2):
    return torch.full((count,), nats), torch.full((count,), num_bytes)


def test_ledger_sums_what_is_entered():
    ledger = t.Ledger()
    ledger.add(0, torch.tensor([0.5, 1.5]), torch.tensor([3, 0]))
    ledger.add(2, torch.tensor([2.0]), torch.tensor([1]))
    assert (ledger.first, ledger.next_target, ledger.tokens, ledger.nats, ledger.bytes) == (0, 3, 3, 4.0, 4)
    assert ledger.val_loss == pytest.approx(4 / 3) and ledger.bpb == pytest.approx(1 / math.log(2))


@pytest.mark.parametrize("first", [0, 4, 6, 100, -1], ids=["repeat", "overlap", "gap", "far gap", "negative"])
def test_ledger_refuses_targets_out_of_order(first):
    ledger = t.Ledger()
    ledger.add(0, *entry(5))
    with pytest.raises(RuntimeError, match="gap"):
        ledger.add(first, *entry(1))
    assert (ledger.tokens, ledger.nats) == (5, 5.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.5])
def test_ledger_refuses_impossible_scores(bad):
    ledger, nll = t.Ledger(), torch.ones(5)
    nll[3] = bad
    with pytest.raises(RuntimeError, match="finite"):
        ledger.add(0, nll, torch.ones(5, dtype=torch.int64))
    assert ledger.tokens == 0


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((2, 2), (2, 2)), ((), ())], ids=["lengths", "matrices", "scalars"])
def test_ledger_refuses_other_shapes(shapes):
    with pytest.raises(RuntimeError, match="byte counts"):
        t.Ledger().add(0, torch.ones(shapes[0]), torch.ones(shapes[1], dtype=torch.int64))


def test_ledger_sums_in_float64():
    ledger = t.Ledger()
    ledger.add(0, torch.full((1_000_000,), 0.1), torch.ones(1_000_000, dtype=torch.int64))
    assert ledger.nats == pytest.approx(1_000_000 * float(torch.tensor(0.1)), rel=1e-12)


def test_ledgers_join_end_to_end():
    left, right = t.Ledger(3), t.Ledger(7)
    left.add(3, *entry(4, 1.0, 2))
    right.add(7, *entry(2, 3.0, 1))
    joined = left.join(right)
    assert (joined.first, joined.next_target, joined.tokens, joined.nats, joined.bytes) == (3, 9, 6, 10.0, 10)
    for other in (t.Ledger(6), t.Ledger(8), left):
        with pytest.raises(RuntimeError, match="gap"):
            left.join(other)


@pytest.mark.parametrize("method", METHODS)
def test_uniform_model_has_log2_of_the_vocabulary_per_token(method):
    tokens = random_text(1000)
    ledger = t.evaluate(Constant(), tokens, TABLE, method)
    assert ledger.val_loss == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert ledger.bpb == pytest.approx(math.log2(VOCAB) * 999 / all_bytes(tokens), rel=1e-6)


# ---- evaluate against plain loops ----------------------------------------------------------------

SIZES = [2, 3, 17, SEQ_LEN, SEQ_LEN + 1, SEQ_LEN + 2, SEQ_LEN + STRIDE + 1, 2 * SEQ_LEN, 300, 517]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", SIZES)
def test_score_is_that_of_a_plain_loop(method, n):
    tokens = random_text(n, seed=n)
    ledger = t.evaluate(LM, tokens, TABLE, method)
    assert (ledger.first, ledger.tokens, ledger.bytes) == (0, n - 1, all_bytes(tokens))
    assert ledger.nats == pytest.approx(by_hand(LM, tokens, method), rel=2e-6)


@pytest.mark.parametrize("batch_tokens", [64, 128, 320, 4096])
def test_exact_in_one_span_is_one_forward_over_the_whole_text(batch_tokens):
    """The segments differ in number and length; the carried state makes them one stream."""
    tokens = random_text(701)
    model = model_with(eval_spans=1, eval_batch_tokens=batch_tokens)
    ledger = t.evaluate(model, tokens, TABLE, "exact")
    assert ledger.nats == pytest.approx(nats_of(model, tokens, 0, 700, 0), rel=2e-6)


def test_context_lowers_or_raises_the_score():
    """The three methods differ: a test that confuses them would notice."""
    tokens = random_text(700)
    nats = [t.evaluate(LM, tokens, TABLE, method).nats for method in METHODS]
    assert min(abs(a - b) for a in nats for b in nats if a is not b) > 1e-3


@settings(max_examples=150, deadline=None)
@given(n=st.integers(2, 900), spans=st.integers(1, 40), warmup=st.sampled_from([0, 1, 32, 64, 500]),
       batch_rows=st.integers(1, 20), method=st.sampled_from(METHODS), chunk=st.sampled_from([None, 7, 64, 300]))
def test_every_target_counts_once_for_any_settings(n, spans, warmup, batch_rows, method, chunk):
    model = Lookup(eval_spans=spans, eval_warmup_tokens=warmup, eval_batch_tokens=64 * batch_rows,
                   ttt_chunk_tokens=chunk or 1)
    tokens = random_text(n, seed=n)
    ledger = t.evaluate(model, tokens, TABLE, method, adapt=(lambda seen: None) if chunk else None)
    assert (ledger.first, ledger.tokens, ledger.bytes) == (0, n - 1, all_bytes(tokens))
    assert ledger.nats == pytest.approx(nats_of(model, tokens, 0, n - 1, 0), rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [64, 192, 4096])
@pytest.mark.parametrize("method", METHODS)
def test_batch_size_does_not_change_the_score(method, batch_tokens):
    tokens = random_text(1100)
    model = model_with(eval_spans=7, eval_batch_tokens=batch_tokens)
    assert t.evaluate(model, tokens, TABLE, method).nats == pytest.approx(
        t.evaluate(model_with(eval_spans=7), tokens, TABLE, method).nats, rel=1e-6)


def test_warmup_gives_a_span_the_text_before_it():
    """Warm-up as long as the text makes any number of spans one stream."""
    tokens = random_text(600)
    whole = t.evaluate(model_with(eval_spans=1), tokens, TABLE).nats
    warmed = t.evaluate(model_with(eval_spans=4, eval_warmup_tokens=600), tokens, TABLE).nats
    cold = t.evaluate(model_with(eval_spans=4, eval_warmup_tokens=0), tokens, TABLE).nats
    assert warmed == pytest.approx(whole, rel=2e-6) and abs(cold - whole) > 1e-3


def test_the_next_batch_is_made_before_one_is_taken_in():
    events = []

    def made():
        for i in range(3):
            events.append(f"make {i}")
            yield i

    for i in t.one_late(made()):
        events.append(f"take {i}")
    assert events == ["make 0", "make 1", "take 0", "make 2", "take 1", "take 2"]
    assert list(t.one_late([])) == []


@pytest.mark.gpu
def test_a_copy_to_the_host_is_of_the_time_when_it_was_asked_for():
    x = torch.arange(1 << 22, device="cuda", dtype=torch.float32)
    wait = t.Run(device="cuda").to_host(x, x.int())
    x.zero_()
    floats, integers = wait()
    assert floats.device.type == "cpu"
    assert torch.equal(floats, torch.arange(1 << 22).float()) and torch.equal(integers.long(), torch.arange(1 << 22))


def test_unknown_method_is_refused():
    with pytest.raises(KeyError):
        t.evaluate(LM, random_text(10), TABLE, "both")


# ---- several ranks -------------------------------------------------------------------------------


class ThreadRun(t.Run):
    """One rank of several in one process: `gather` meets the other threads."""

    def __init__(self, rank, world_size, barrier, box):
        super().__init__(rank, world_size)
        self.barrier, self.box = barrier, box

    def gather(self, value):
        self.box[self.rank] = pickle.dumps(value)
        self.barrier.wait(60)
        everyone = [pickle.loads(one) for one in self.box]
        self.barrier.wait(60)
        return everyone


def evaluate_on_ranks(world_size, *arguments, **keywords):
    """The Ledger of every rank."""
    barrier, box, ledgers = threading.Barrier(world_size), [None] * world_size, [None] * world_size

    def work(rank):
        try:
            ledgers[rank] = t.evaluate(*arguments, run=ThreadRun(rank, world_size, barrier, box), **keywords)
        except BaseException:
            barrier.abort()
            raise
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ledgers), "a rank failed"
    return ledgers


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("n", [2, 5, 200, 700])
@pytest.mark.parametrize("method", METHODS)
def test_every_rank_gets_the_ledger_of_one_rank(method, n, world_size):
    tokens, model = random_text(n, seed=n), Lookup(eval_spans=5)
    alone = t.evaluate(model, tokens, TABLE, method)
    for ledger in evaluate_on_ranks(world_size, model, tokens, TABLE, method):
        assert (ledger.first, ledger.tokens, ledger.bytes) == (0, n - 1, alone.bytes)
        assert ledger.nats == pytest.approx(alone.nats, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_with_one_rank_on_the_real_model(method):
    tokens = random_text(700)
    alone = t.evaluate(LM, tokens, TABLE, method)
    for ledger in evaluate_on_ranks(2, LM, tokens, TABLE, method):
        assert ledger.nats == pytest.approx(alone.nats, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_agree_when_adapting(method):
    tokens, model = random_text(700), Lookup(ttt_chunk_tokens=100)
    alone = t.evaluate(model, tokens, TABLE, method, adapt=lambda seen: None)
    for ledger in evaluate_on_ranks(3, model, tokens, TABLE, method, adapt=lambda seen: None):
        assert ledger.nats == pytest.approx(alone.nats, rel=1e-9)


# ---- score before update -------------------------------------------------------------------------


def spied(model, tokens, method, action=lambda: None):
    """(Ledger, lengths of what the adapter saw); checks that it saw the text's beginning."""
    lengths = []

    def adapt(seen):
        assert np.array_equal(seen, tokens[:len(seen)])
        lengths.append(len(seen))
        action()
    return t.evaluate(model, tokens, TABLE, method, adapt=adapt), lengths


@pytest.mark.parametrize("chunk, expected", [
    (100, [101, 201, 301, 401, 501, 601]), (700, []), (699, [700]), (1000, []), (350, [351])])
def test_exact_adapter_is_called_after_each_chunk_but_the_last(chunk, expected):
    _, lengths = spied(model_with(ttt_chunk_tokens=chunk), random_text(701), "exact")
    assert lengths == expected


@pytest.mark.parametrize("chunk, expected", [
    # Windows end at targets 64, 80, 96, ...; a chunk takes the windows that begin scoring below its end.
    (100, [113, 209, 305, 401]), (64, [65, 129, 193, 257, 321, 385, 449]), (500, [])])
def test_sliding_adapter_is_called_after_each_chunk_but_the_last(chunk, expected):
    _, lengths = spied(model_with(ttt_chunk_tokens=chunk), random_text(501), "sliding")
    assert lengths == expected


@pytest.mark.parametrize("chunk", [1, 10, 16, 50, 64, 333])
@pytest.mark.parametrize("method", METHODS)
def test_adapter_never_sees_the_same_text_twice(method, chunk):
    _, lengths = spied(Lookup(ttt_chunk_tokens=chunk), random_text(300), method)
    assert lengths == sorted(set(lengths)) and all(2 <= length < 300 for length in lengths)


@pytest.mark.parametrize("method", METHODS)
def test_adapter_changes_only_targets_that_it_has_not_seen(method, monkeypatch):
    """After each call every later target costs one nat more: the total shows when each target was scored."""
    model, tokens, extra = Constant(ttt_chunk_tokens=100), random_text(701), [0.0]
    plain = t.token_nll
    monkeypatch.setattr(t, "token_nll", lambda logits, targets: plain(logits, targets) + extra[0])

    def dearer():
        extra[0] += 1.0
    ledger, lengths = spied(model, tokens, method, dearer)
    edges = [0, *(length - 1 for length in lengths), 700]  # tokens seen = targets scored + 1
    expected = sum(calls * (b - a) for calls, (a, b) in enumerate(zip(edges, edges[1:], strict=False)))
    assert lengths and ledger.nats - 700 * math.log(VOCAB) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["sliding", "roundtrip"])
def test_adapter_that_does_nothing_changes_nothing(method):
    tokens = random_text(700)
    model = model_with(ttt_chunk_tokens=90)
    alone = t.evaluate(model, tokens, TABLE, method)
    ledger = t.evaluate(model, tokens, TABLE, method, adapt=lambda seen: None)
    assert (ledger.tokens, ledger.bytes) == (alone.tokens, alone.bytes)
    assert ledger.nats == pytest.approx(alone.nats, rel=1e-6)


def test_exact_chunks_carry_the_state_from_one_to_the_next():
    tokens = random_text(501)
    model = model_with(ttt_chunk_tokens=250, eval_spans=7, eval_warmup_tokens=100)
    ledger = t.evaluate(model, tokens, TABLE, "exact", adapt=lambda seen: None)
    assert ledger.nats == pytest.approx(nats_of(model, tokens, 0, 500, 0), rel=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_adapter_can_train_the_model(method):
    """Gradients work inside an adapter, and the next chunk is scored with the new weights."""
    model = model_with(ttt_chunk_tokens=200).requires_grad_(True)
    tokens = np.tile(random_text(20), 30)

    def adapt(seen):
        ids = torch.from_numpy(seen.astype(np.int64))[None]
        t.mean_nll(model, ids[:, :-1], ids[:, 1:]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
                p.grad = None
    before = t.evaluate(model, tokens, TABLE, method).nats
    assert t.evaluate(model, tokens, TABLE, method, adapt=adapt).nats < 0.98 * before


# ---- faults planted in the scorer ----------------------------------------------------------------


def dropped_tail(*arguments, real=t.windows):
    return list(real(*arguments))[:-1]


def doubled_window(*arguments, real=t.windows):
    every = list(real(*arguments))
    return every[:2] + every[1:]


def skipped_window(*arguments, real=t.windows):
    every = list(real(*arguments))
    return every[:1] + every[2:]


def short_window(*arguments, real=t.windows):
    every = list(real(*arguments))
    start, end, score_from = every[1]
    return every[:1] + [(start, end - 1, score_from)] + every[2:]


def late_first_score(*arguments, real=t.windows):
    every = list(real(*arguments))
    return [(0, every[0][1], 5)] + every[1:]


@pytest.mark.parametrize("fault", [dropped_tail, doubled_window, skipped_window, short_window, late_first_score])
@pytest.mark.parametrize("method", ["roundtrip", "sliding"])
def test_faulty_windows_raise(fault, method, monkeypatch):
    monkeypatch.setattr(t, "windows", fault)
    with pytest.raises(RuntimeError):
        t.evaluate(Lookup(), random_text(500), TABLE, method)


@pytest.mark.parametrize("parts", [
    lambda real: real[:-1], lambda real: real[1:], lambda real: real + real[-1:],
    lambda real: [real[1], real[0], real[2]]],
    ids=["tail dropped", "beginning dropped", "span doubled", "spans swapped"])
def test_faulty_spans_raise(parts, monkeypatch):
    real = t.cut
    monkeypatch.setattr(t, "cut", lambda *arguments: parts(real(*arguments)))
    with pytest.raises(RuntimeError):
        t.evaluate(Lookup(), random_text(500), TABLE, "exact")


# ---- the probes of the calls that score ----------------------------------------------------------


class Leak(nn.Module):
    """The tiny model, helped a little by the token `ahead` places to the right."""

    def __init__(self, ahead):
        super().__init__()
        self.model, self.cfg, self.ahead = LM, LM.cfg, ahead

    def forward(self, ids, state=None):
        logits, state = self.model(ids, state)
        later = torch.zeros_like(ids)
        later[:, :-self.ahead] = ids[:, self.ahead:]
        return logits + nn.functional.one_hot(later.long(), VOCAB), state

    def parameters(self, recurse=True):
        return self.model.parameters(recurse)


def probed(model, n=1500, method="exact"):
    """The Ledger of a text whose scoring was probed."""
    return t.evaluate(model, random_text(n), TABLE, method, run=t.Run(), probing=True)


@pytest.mark.parametrize("n", [2, 3, 30, SEQ_LEN + 1, 1500])
@pytest.mark.parametrize("method", METHODS)
def test_model_is_causal_and_normalized_to_the_probes(method, n):
    ledger = probed(LM, n, method)
    assert ledger.causal == 0 and ledger.normalized < 1e-5


def test_probes_do_not_change_the_score():
    tokens = random_text(900)
    for method in METHODS:
        assert t.evaluate(LM, tokens, TABLE, method, probing=True).nats == t.evaluate(LM, tokens, TABLE, method).nats


@pytest.mark.parametrize("ahead, method", [(1, "roundtrip"), (1, "exact"), (1, "sliding"), (2, "exact"), (10, "exact")])
def test_causality_probe_finds_a_look_ahead(ahead, method):
    assert probed(Leak(ahead), method=method).causal > 1e-3


def test_causality_probe_finds_a_leak_in_attention(monkeypatch):
    monkeypatch.setattr(t, "window_mask", lambda q, k, window: (k <= q + 1) & (k > q - window))
    assert probed(LM, method="sliding").causal > 1e-3


def test_causality_probe_finds_a_leak_in_convolutions(monkeypatch):
    real = t.shifted

    def right(x, tail, by, packing):
        return torch.roll(x, -1, 1) if by == 1 and x.dim() == 3 else real(x, tail, by, packing)
    monkeypatch.setattr(t, "shifted", right)
    assert probed(LM).causal > 1e-3


def test_causality_probe_finds_statistics_over_the_whole_row(monkeypatch):
    real = t.rms_norm
    monkeypatch.setattr(t, "rms_norm", lambda x: real(x) - 0.1 * real(x).mean(1, keepdim=True))
    assert probed(LM).causal > 1e-3


def test_probe_takes_scores_that_are_no_numbers_as_a_fault(monkeypatch):
    calls = []

    def broken(model, ids, targets, state=None):
        nll, state = t.token_nll(model(ids, state)[0], targets), None
        calls.append(1)
        return nll * (math.nan if len(calls) == 2 else 1.0), state
    monkeypatch.setattr(t, "score_rows", broken)
    assert probed(LM, 100, "roundtrip").causal == math.inf


@pytest.mark.parametrize("fault", [
    lambda nll, logits, targets: nll + 0.01,
    lambda nll, logits, targets: 2 * nll,
    lambda nll, logits, targets: 40 - logits.gather(-1, targets.long().view(*logits.shape[:2], -1)).view(targets.shape),
    lambda nll, logits, targets: torch.where(targets == 3, nll / 2, nll),
], ids=["constant", "scaled", "no normaliser", "one token favoured"])
def test_normalization_probe_finds_other_scores(fault, monkeypatch):
    real = t.token_nll
    monkeypatch.setattr(t, "token_nll", lambda logits, targets: fault(real(logits, targets), logits, targets))
    assert probed(LM, 1000).normalized > 1e-3


def test_faults_of_any_rank_reach_every_ledger():
    joined = t.Ledger(0, 5, 1.0, 3, causal=0.5).join(t.Ledger(5, 2, 1.0, 3, normalized=0.25))
    assert (joined.causal, joined.normalized) == (0.5, 0.25)
    assert t.Ledger(*joined.numbers()).numbers() == joined.numbers()


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_that_skips_its_part_is_noticed(method):
    """The other rank's part is missing in what is gathered."""
    for rank in range(2):
        run = t.Run(rank, 2)
        run.gather = lambda value, rank=rank: [value, None][::-1 if rank else 1]
        with pytest.raises(RuntimeError, match="gap|scored targets"):
            t.evaluate(Lookup(), random_text(500), TABLE, method, run=run)


# ---- by distance from the document's start -------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_placed_by_the_distance_from_their_documents_start(method):
    tokens, model = random_text(900), Lookup()
    ids = torch.from_numpy(tokens.astype(np.int64))
    nll = t.token_nll(model.logits[ids[None, :-1]], ids[None, 1:])[0].double().numpy()
    num_bytes, expected, distance = t.count_bytes(TABLE, ids[:-1], ids[1:]).numpy(), np.zeros((t.DISTANCES, 3)), 0
    for i in range(899):
        distance = 0 if tokens[i] == 1 else distance + (i > 0)
        bucket = 0 if distance < 64 else int(math.log2(distance)) - 5
        expected[bucket] += (1, num_bytes[i], nll[i])
    ledger = t.evaluate(model, tokens, TABLE, method)
    np.testing.assert_allclose(ledger.by_distance, expected, rtol=1e-6)
    for other in evaluate_on_ranks(2, model, tokens, TABLE, method):
        np.testing.assert_allclose(other.by_distance, expected, rtol=1e-6)


def test_distance_lines_say_bounds_and_add_up():
    ledger, lines = t.Ledger(), []
    distance = np.array([0, 63, 64, 127, 128, 5000])
    nll, num_bytes = torch.ones(6), torch.tensor([1, 2, 3, 4, 5, 6])
    ledger.add(0, nll, num_bytes)
    ledger.place(distance, nll, num_bytes)
    ledger.log_distances(lambda event, **values: lines.append((event, values)))
    assert [(event, v["from"], v["to"], v["tokens"], v["bytes"]) for event, v in lines] == [
        ("position", 0, 64, 2, 3), ("position", 64, 128, 2, 7), ("position", 128, 256, 1, 5),
        ("position", 4096, 8192, 1, 6)]
    assert lines[0][1]["val_bpb"] == pytest.approx(2 / math.log(2) / 3)


# ---- long texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method, adapting", [("roundtrip", False), ("sliding", False), ("sliding", True),
                                              ("exact", True)])
def test_a_long_text_is_listed_a_unit_at_a_time(method, adapting, monkeypatch):
    monkeypatch.setattr(t, "UNIT_TARGETS", 5000)
    units = t.scoring_units(10**9, method, tiny_config(eval_stride=1), adapting, saving=False)
    first, second = next(units), next(units)
    assert len(first) <= t.UNIT_TARGETS and second[0] > first[-1]


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_units_of_validation_are_whole_batches_on_every_rank(ranks, monkeypatch):
    monkeypatch.setattr(t, "UNIT_TARGETS", 5000)
    cfg = tiny_config(eval_batch_tokens=320)  # 5 rows of 64
    *units, last = t.scoring_units(100_000, "roundtrip", cfg, adapting=False, saving=False, ranks=ranks)
    assert units and {len(unit) % (5 * ranks) for unit in units} == {0}
    assert sum(map(len, units)) + len(last) == -(-100_000 // 64)


# ---- the plan ------------------------------------------------------------------------------------


class Lines(t.Run):
    """A Run that keeps its log as (event, values)."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log(self, event, **values):
        self.lines.append((event, values))


@pytest.mark.parametrize("method, named", [("sliding", "EVAL_STRIDE"), ("exact", "EVAL_SPANS"),
                                           ("roundtrip", "EVAL_BATCH_TOKENS")])
@pytest.mark.parametrize("overrun", ["error", "trim"])
def test_an_evaluation_that_would_overrun_does_not_start(method, named, overrun, monkeypatch):
    monkeypatch.setattr(t, "rehearse", lambda *arguments: 601.0)
    model = model_with(final_score=method, eval_overrun=overrun)
    with pytest.raises(ValueError, match=f"about 601 s for 100 targets.*EVAL_BUDGET_SECONDS=600; change {named}"):
        t.plan_evaluation(model, model.cfg, Lines(), 100)


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_is_the_time_of_one_call_times_their_number(method, monkeypatch):
    """With a clock that counts scored tokens, the plan is the number of tokens that evaluate() runs."""
    clock = [0.0]
    monkeypatch.setattr(t.time, "perf_counter", lambda: clock[0])

    def counting(model, ids, targets, state=None):
        clock[0] += ids.numel()
        return torch.ones(targets.shape), state
    monkeypatch.setattr(t, "score_rows", counting)
    for n in (2, 60, 500, 1401):
        model = Lookup(eval_spans=7)
        planned, clock[0] = t.rehearse(model, method, n - 1, t.Run()), 0.0
        t.evaluate(model, random_text(n), TABLE, method)
        assert clock[0] <= planned <= 1.3 * clock[0]


# ---- the verdict ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault, word", [
    ({}, "verdict:ok"), (dict(causal=1e-3), "causal:fail"), (dict(causal=math.nan), "causal:fail"),
    (dict(normalized=1e-3), "normalized:fail"), (dict(tokens=98), "coverage:fail"), (dict(first=1), "coverage:fail"),
    (dict(in_order=False), "score_first:fail"), (dict(text_bytes=399), "bytes:fail"), (dict(eval_s=601.0), "eval"),
    (dict(artifact_bytes=16_000_000), "size"), (dict(stored=False), "limit:file")])
def test_each_fault_fails_the_verdict(fault, word, monkeypatch, capsys):
    found = dict(first=0, tokens=99, causal=0.0, normalized=0.0, in_order=True, text_bytes=400, eval_s=1.0,
                 artifact_bytes=1000, stored=True) | fault
    monkeypatch.setattr(t, "decoded_bytes", lambda *arguments: (400, found["text_bytes"]))
    ledger = t.Ledger(found["first"], found["tokens"], 100.0, 400, found["causal"], found["normalized"])
    held = t.report(LM, ledger, found["artifact_bytes"], None, found["eval_s"], found["in_order"],
                    t.Data([], random_text(100), None, TABLE), t.Run(), found["stored"])
    out = capsys.readouterr().out
    assert held == (not fault) and word in out and ("verdict:fail" in out) == bool(fault)


# ---- compiled ------------------------------------------------------------------------------------


@t.region
def smeared(embedding, ids):
    """The Embedding's output alone: no state keeps the unsmeared one alive."""
    return embedding(ids, embedding.fresh_state(1, ids.device, torch.float32), None, torch.float32)[0]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_function_computes_the_same():
    """With torch's in-place reuse of what was concatenated, SmearGate would come out wrong by several percent."""
    ids = torch.from_numpy(random_text(64).astype(np.int64))[None]
    with torch.inference_mode():
        torch.testing.assert_close(t.compiled(smeared, True)(LM.embed, ids), smeared(LM.embed, ids), rtol=1e-4,
                                   atol=1e-5)
