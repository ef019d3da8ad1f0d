"""Test-time training: every option on one rank and on several, what is scored before and trained
on after, hints against plain dictionaries, the time budget, and faults of the order.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ONE_BYTE, assert_same, tiny_config, tiny_model, weights_of
from test_training import on_threads

import train_gpt as t

EXACT = dict(ttt_scoring="exact")
OPTIONS = {
    "sliding": {}, "exact": EXACT, "odd chunks": EXACT | dict(ttt_chunk_tokens=150),
    "segments": EXACT | dict(eval_batch_tokens=64),
    "adamw": dict(ttt_optimizer="adamw", ttt_lr=0.003), "muon": EXACT | dict(ttt_optimizer="muon"),
    "cosine": EXACT | dict(ttt_schedule="cosine"), "ema": dict(ttt_ema=0.5),
    "phases": EXACT | dict(ttt_phase_chunks=2), "tilt": dict(ttt_tilt=0.7, ttt_epochs=0),
    "hash": EXACT | dict(ttt_hash_buckets=32, ttt_hash_lr=0.05, ttt_lr=0.0),
    "all": EXACT | dict(ttt_tilt=0.7, ttt_hash_buckets=32, ttt_hash_lr=0.05, ttt_ema=0.5,
                        ttt_optimizer="muon", ttt_phase_chunks=2)}
every_option = pytest.mark.parametrize("option", OPTIONS)


def text(length=320, seed=0):
    """Three phrases over and over: what was scored helps with what comes."""
    rng = np.random.default_rng(seed)
    phrases = [rng.integers(2, 64, 24).astype(np.uint16) for _ in range(3)]
    tokens = np.concatenate([phrases[i] for i in rng.integers(0, 3, length // 24 + 1)])[:length]
    tokens[100::101] = 1
    return tokens


def ttt_config(option="sliding", **overrides):
    """Test-time training of two passes over chunks of 128 targets on a small model."""
    usual = dict(ttt_chunk_tokens=128, ttt_epochs=2, ttt_freeze_blocks=1, ttt_lr=0.02,
                 ttt_schedule="constant", stack="gdn swa", model_dim=32, num_heads=2,
                 num_kv_heads=1, gdn_heads=1, eval_stride=32)
    return tiny_config(**(usual | OPTIONS[option] | overrides))


def adapted(cfg, tokens, run=None, model=None, probing=False):
    """(Ledger, Adapter) of one evaluation with test-time training."""
    model = model or tiny_model(cfg)
    run = run or t.Run()
    adapter = t.Adapter(model, len(tokens) - 1, run)
    return t.evaluate(model, tokens, ONE_BYTE, cfg.ttt_scoring, adapter, run, probing), adapter


def scores(cfg, tokens):
    """Nats of every target, in order."""
    out = []
    add = t.Ledger.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Ledger, "add", lambda ledger, first, nll, count: out.append(nll) or add(
            ledger, first, nll, count))
        adapted(cfg, tokens)
    return torch.cat(out)


def stepped(cfg, tokens, *lengths):
    """An Adapter that was handed the text up to each length."""
    adapter = t.Adapter(tiny_model(cfg), len(tokens) - 1, t.Run())
    for length in lengths:
        adapter(tokens[:length])
    return adapter


@every_option
def test_no_score_depends_on_later_text(option):
    """Other text from token 200 on, in the second chunk, leaves all scores before bit for bit."""
    tokens = text()
    other = np.concatenate([tokens[:200], text(120, seed=1)])
    a, b = [scores(ttt_config(option), seen) for seen in (tokens, other)]
    assert torch.equal(a[:199], b[:199]) and not torch.allclose(a[199:], b[199:])


@every_option
def test_ranks_score_as_one_and_every_option_passes_its_probes(option):
    tokens = text(200)
    cfg = ttt_config(option, ttt_chunk_tokens=80)
    alone, adapter = adapted(cfg, tokens, probing=True)
    assert alone.causal == 0 and alone.normalized < 1e-5 and adapter.in_order
    for ledger, adapter in on_threads(2, lambda run: adapted(cfg, tokens, run, probing=True)):
        assert ledger.causal == 0 and (option != "exact" or ledger.probes == alone.probes)
        assert (ledger.tokens, ledger.bytes, adapter.in_order) == (199, 199, True)
        assert ledger.val_loss == pytest.approx(alone.val_loss, rel=1e-5)


@pytest.mark.parametrize("when", ["while text is scored", "after the last call"])
def test_a_weight_that_changes_outside_the_adapter_breaks_the_order(when):
    cfg = ttt_config("exact")
    model = tiny_model(cfg)
    nll = model.nll

    def cheating(*arguments):
        if when == "while text is scored":
            model.blocks[1].mixer_scale.data.add_(1e-3)
        return nll(*arguments)
    model.nll = cheating
    _, adapter = adapted(cfg, text(), model=model)
    if when == "after the last call":
        assert adapter.in_order
        model.embed.weight.data[3, 3] += 0.01
    adapter.close()
    assert not adapter.in_order


def test_text_that_is_handed_over_twice_breaks_the_order():
    assert not stepped(ttt_config(), text(), 129, 129).in_order


@pytest.mark.parametrize("fault, found", [("none", []), ("looks ahead", ["causal"]),
                                          ("not normalized", ["normalized"])])
def test_a_faulty_tilt_fails_its_probe_and_a_right_one_none(fault, found, monkeypatch):
    cfg = ttt_config("tilt", ttt_tilt=5.0)
    model = tiny_model(cfg)
    real = t.Hints.__call__
    if fault == "looks ahead":
        monkeypatch.setattr(t.Hints, "__call__", lambda hints, ids: real(hints, ids.roll(-1, 1)))
    if fault == "not normalized":  # the hinted token's probability is raised behind the softmax
        def unnormalized(ids, targets, state=None, bonus=None):
            plain, _ = t.LM.nll(model, ids, targets, state)
            tilted, after = t.LM.nll(model, ids, targets, state, bonus)
            return (plain + tilted) / 2, after
        model.nll = unnormalized
    ledger, _ = adapted(cfg, np.tile(text(48), 9), model=model, probing=True)
    assert [name for name in ("causal", "normalized") if getattr(ledger, name) > 1e-3] == found


@pytest.mark.parametrize("option", ["sliding", "exact", "adamw", "muon", "tilt", "hash"])
def test_training_on_scored_text_helps_with_what_follows(option):
    cfg = ttt_config(option, **({} if option == "tilt" else dict(ttt_epochs=4)))
    tokens = text(700)
    idle = t.evaluate(tiny_model(cfg), tokens, ONE_BYTE, cfg.ttt_scoring, lambda seen: None)
    assert adapted(cfg, tokens)[0].bpb < idle.bpb - 0.02


@every_option
def test_rate_zero_gives_the_plain_score(option):
    cfg = ttt_config(option, ttt_lr=0.0, ttt_hash_lr=0.0, ttt_tilt=0.0, eval_spans=1)
    plain = t.evaluate(tiny_model(cfg), text(), ONE_BYTE, cfg.ttt_scoring)
    assert adapted(cfg, text())[0].val_loss == pytest.approx(plain.val_loss, rel=1e-6)


def test_a_step_goes_down_the_mean_gradient_of_the_chunk_in_fresh_rows():
    cfg = ttt_config(ttt_epochs=1, ttt_grad_clip=0.0, ttt_freeze_blocks=0, ttt_chunk_tokens=100)
    model = tiny_model(cfg)
    before = weights_of(model)
    ids = torch.from_numpy(text()[:101].astype(np.int64))
    rows = [model.nll(ids[None, a:b], ids[None, a + 1:b + 1])[0] for a, b in ((0, 64), (64, 100))]
    grads = torch.autograd.grad(torch.cat(rows, 1).mean(), list(model.parameters()))
    want = {name: before[name] - 0.02 * grad for name, grad in zip(before, grads)}
    after = stepped(cfg, text(), 101)
    assert_same(weights_of(after.model), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("first, last", [(0, 128), (128, 250), (64, 65)])
def test_rows_of_all_ranks_cover_the_chunk_once_in_one_shape(world_size, first, last):
    covered = []
    shapes = set()
    for rank in range(world_size):
        adapter = t.Adapter(tiny_model(ttt_config()), 319, t.Run(rank, world_size))
        for ids, targets, wanted in adapter.batches(text(), first, last):
            shapes.add(ids.shape)
            covered += targets[wanted].tolist()
    assert covered == text()[first + 1:last + 1].tolist() and len(shapes) == 1


@pytest.mark.parametrize("frozen", [0, 2])
def test_frozen_blocks_stay_and_all_else_trains(frozen):
    cfg = ttt_config(stack="gdn swa gdn", ttt_freeze_blocks=frozen, ttt_optimizer="muon")
    adapter = stepped(cfg, text(), 129)
    assert {group.rule for group in adapter.optimizer.groups} == {"sgd", "muon"}
    after = weights_of(adapter.model)
    before = weights_of(tiny_model(cfg))
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    still = tuple(f"blocks.{i}." for i in range(frozen))
    assert moved == {name for name in before if not (still and name.startswith(still))}


def test_a_phase_trains_on_its_chunks_together():
    cfg = ttt_config("phases", ttt_epochs=3)
    adapter = stepped(cfg, text(), 129)
    assert adapter.epochs_done == 0
    assert_same(weights_of(adapter.model), weights_of(tiny_model(cfg)))
    adapter(text()[:257])
    assert adapter.epochs_done == 6


def test_average_of_the_weights_scores_while_the_newest_train():
    plain = stepped(ttt_config(ttt_epochs=1), text())
    averaged = stepped(ttt_config("ema", ttt_epochs=1), text())
    mean = weights_of(plain.model)
    for length in (129, 257):
        plain(text()[:length])
        averaged(text()[:length])
        newest = weights_of(plain.model)
        mean = {name: 0.5 * mean[name] + 0.5 * newest[name] for name in mean}
    assert_same(weights_of(averaged.model), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_rate_follows_the_schedule_over_the_chunks(schedule, monkeypatch):
    cosine = [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(9)]
    rates = []
    step = t.Optimizer.step
    monkeypatch.setattr(t.Optimizer, "step", lambda optimizer, rate: rates.append(float(rate)) or
                        step(optimizer, rate))
    cfg = ttt_config("exact", ttt_schedule=schedule, ttt_chunk_tokens=32, ttt_epochs=1)
    adapted(cfg, text())
    assert rates == pytest.approx(cosine if schedule == "cosine" else [1.0] * 9)


def test_close_leaves_the_model_as_it_was():
    cfg = ttt_config("all")
    model = tiny_model(cfg)
    _, adapter = adapted(cfg, text(), model=model)
    adapter.close()
    assert_same(weights_of(model), weights_of(tiny_model(cfg)))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def hints_by_hand(scored, ids):
    """The follower of the last occurrence of the longest known context of 3, 2 or 1 tokens."""
    last = {tuple(scored[at - n + 1:at + 1]): scored[at + 1]
            for n in (1, 2, 3) for at in range(3, len(scored) - 1)}
    found = []
    for at in range(len(ids)):
        contexts = [tuple(ids[at - n + 1:at + 1]) for n in (3, 2, 1) if at - n + 1 >= 0]
        found.append(next((last[c] for c in contexts if c in last), -1))
    return found


@pytest.mark.parametrize("parts", [(250,), (4, 5, 130, 250), (2, 250)], ids=str)
def test_hints_are_those_of_plain_dictionaries(parts):
    tokens = np.random.default_rng(0).integers(0, 200, 400).astype(np.uint16)
    hints = t.Hints(400, "cpu")
    for length in parts:
        hints.learn(tokens[:length])
    rows = torch.from_numpy(tokens.astype(np.int32))[40:].view(6, 60)
    want = [hints_by_hand(tokens[:250].tolist(), row.tolist()) for row in rows]
    assert hints(rows).tolist() == want and any(-1 in row for row in want)


def test_contexts_that_share_a_bucket_give_no_wrong_hint(monkeypatch):
    monkeypatch.setattr(t.Hints, "BUCKETS", 64)
    tokens = np.random.default_rng(0).integers(0, 60, 300).astype(np.uint16)
    hints = t.Hints(300, "cpu")
    hints.learn(tokens)
    found = hints(torch.from_numpy(tokens.astype(np.int32))[None])[0].tolist()
    follows = {(a, b) for a, b in zip(tokens.tolist(), tokens[1:].tolist())}
    hinted = [(token, hint) for token, hint in zip(tokens.tolist(), found) if hint >= 0]
    assert len(hinted) > 20 and set(hinted) <= follows


def adapt_by_the_clock(monkeypatch, budget_s, epoch_s, wanted=8, chunks=20):
    """Epochs of each chunk and the seconds in all, if scoring a chunk takes 1 s."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(t, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def train(adapter, chunk):
        clock.now += epoch_s * adapter.epochs * len(adapter.pending)
        adapter.pending = []
    monkeypatch.setattr(t.Adapter, "train", train)
    tokens = text(32 * chunks + 1)
    cfg = ttt_config(ttt_epochs=wanted, ttt_chunk_tokens=32, eval_budget_seconds=budget_s)
    adapter = t.Adapter(tiny_model(cfg), len(tokens) - 1, t.Run())
    epochs = []
    for chunk in range(1, chunks + 1):
        clock.now += 1.0
        if chunk < chunks:
            adapter(tokens[:32 * chunk + 1])
            epochs.append(adapter.epochs)
    return epochs, clock.now - 1000.0


def test_a_budget_that_suffices_keeps_all_epochs_and_one_that_is_spent_none(monkeypatch):
    assert adapt_by_the_clock(monkeypatch, budget_s=600.0, epoch_s=1.0)[0] == [8] * 19
    assert adapt_by_the_clock(monkeypatch, budget_s=30.0, epoch_s=10.0)[0] == [8] + [0] * 18


@pytest.mark.parametrize("epoch_s", [2.0, 5.0])
def test_epochs_are_trimmed_so_that_the_rest_fits_the_budget(monkeypatch, epoch_s):
    epochs, seconds = adapt_by_the_clock(monkeypatch, budget_s=150.0, epoch_s=epoch_s)
    assert epochs[0] == 8 > epochs[1] and 120 < seconds <= 0.96 * 150
