"""Test-time training: what is scored before, what is trained on after, and that the check of the order can fail."""

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model

import train_gpt as t

NONE = torch.zeros(64, dtype=torch.bool)
TABLE = t.ByteTable(torch.ones(64, dtype=torch.int64), NONE, NONE)


def text(length=700, seed=0):
    """A text of a few phrases over and over: what was scored helps with what comes."""
    rng = np.random.default_rng(seed)
    phrases = [rng.integers(2, 64, 24).astype(np.uint16) for _ in range(3)]
    return np.concatenate([phrases[i] for i in rng.integers(0, 3, length // 24 + 1)])[:length]


def ttt_config(**overrides):
    """tiny_config with test-time training of three passes a chunk of 128 targets."""
    settings = dict(ttt_enabled=True, ttt_chunk_tokens=128, ttt_epochs=3, ttt_freeze_blocks=1, ttt_lr=0.02,
                    eval_stride=16)
    return tiny_config(**(settings | overrides))


def adapted(cfg, tokens, run=None):
    """Ledger, Adapter and model of one evaluation with test-time training."""
    model, run = tiny_model(cfg), run or t.Run()
    adapter = t.Adapter(model, len(tokens) - 1, run)
    return t.evaluate(model, tokens, TABLE, cfg.ttt_scoring, adapter, run), adapter, model


@pytest.mark.parametrize("scoring", ["sliding", "exact"])
@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.05), ("adamw", 0.003), ("muon", 0.02)])
def test_training_on_scored_text_helps_with_what_follows(scoring, optimizer, lr):
    cfg, tokens = ttt_config(ttt_scoring=scoring, ttt_optimizer=optimizer, ttt_lr=lr), text()
    plain = t.evaluate(tiny_model(cfg), tokens, TABLE, scoring)
    assert adapted(cfg, tokens)[0].bpb < plain.bpb - 0.05


@pytest.mark.parametrize("scoring, other", [("sliding", {}), ("exact", dict(eval_spans=1))])
def test_rate_zero_gives_the_score_without(scoring, other):
    cfg, tokens = ttt_config(ttt_scoring=scoring, ttt_lr=0.0, **other), text()
    with_ttt, plain = adapted(cfg, tokens)[0], t.evaluate(tiny_model(cfg), tokens, TABLE, scoring)
    assert with_ttt.tokens == plain.tokens and with_ttt.nats == pytest.approx(plain.nats, rel=1e-6)


@pytest.mark.parametrize("scoring", ["sliding", "exact"])
def test_first_chunk_is_scored_by_the_weights_of_the_artifact(scoring):
    cfg, tokens, ledgers, add = ttt_config(ttt_scoring=scoring, ttt_lr=1.0), text(), {}, t.Ledger.add
    for name, lr in (("trained", 1.0), ("untrained", 0.0)):
        model = tiny_model(cfg)
        adapter = t.Adapter(model, len(tokens) - 1, t.Run())
        adapter.cfg, seen = t.replace(cfg, ttt_lr=lr), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(t.Ledger, "add", lambda book, first, nll, n, seen=seen: seen.append((first, nll)) or
                          add(book, first, nll, n))
            t.evaluate(model, tokens, TABLE, scoring, adapter)
        ledgers[name] = torch.cat([nll for first, nll in seen])
    assert torch.equal(ledgers["trained"][:128], ledgers["untrained"][:128])
    assert not torch.allclose(ledgers["trained"][160:], ledgers["untrained"][160:])


@pytest.mark.parametrize("length, calls", [(129, 0), (130, 1), (257, 1), (258, 2)])
def test_last_chunk_is_scored_and_never_trained_on(length, calls):
    _, adapter, _ = adapted(ttt_config(ttt_scoring="exact"), text(length))
    assert adapter.calls == calls


def test_frozen_blocks_stay_and_the_others_move():
    cfg = ttt_config(stack="gdn swa gdn", ttt_freeze_blocks=2)
    _, _, model = adapted(cfg, text())
    for (name, p), q in zip(model.named_parameters(), tiny_model(cfg).parameters(), strict=True):
        assert torch.equal(p, q) == name.startswith(("blocks.0.", "blocks.1.")), name


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("first, last", [(0, 128), (128, 250), (64, 65)])
def test_rows_of_all_ranks_cover_the_chunk_once(world_size, first, last):
    cfg, tokens, covered, shapes = ttt_config(), text(), [], set()
    for rank in range(world_size):
        adapter = t.Adapter(tiny_model(cfg), len(tokens) - 1, t.Run(rank, world_size))
        rows = adapter.rows(tokens, first, last)
        shapes.add(rows.ids.shape)
        covered += rows.targets[rows.wanted].tolist()
    assert covered == tokens[first + 1:last + 1].tolist() and len(shapes) == 1


def test_ranks_together_take_the_step_of_one():
    cfg, tokens = ttt_config(ttt_epochs=1), text()
    alone = t.Adapter(tiny_model(cfg), len(tokens) - 1, t.Run())
    alone(tokens[:129])
    grads = []
    for summing in (False, True):  # first both ranks' gradients, then rank 0 again with their sum
        for rank in range(2):
            run = t.Run(rank, 2)
            run.all_sum = (lambda g: g.copy_(sum(grads))) if summing else (lambda g: grads.append(g.clone()) or g)
            one = t.Adapter(tiny_model(cfg), len(tokens) - 1, run)
            one(tokens[:129])
    for p, q in zip(one.params, alone.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_weight_that_changes_while_text_is_scored_is_noticed():
    cfg, tokens = ttt_config(), text()
    _, adapter, _ = adapted(cfg, tokens)
    assert adapter.in_order
    model = tiny_model(cfg)
    adapter, score = t.Adapter(model, len(tokens) - 1, t.Run()), t.score_rows

    def cheating(*arguments):
        with torch.inference_mode(False), torch.no_grad():
            model.blocks[2].mixer_scale.add_(1e-3)
        return score(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "score_rows", cheating)
        t.evaluate(model, tokens, TABLE, "sliding", adapter)
    assert not adapter.in_order


def test_final_score_by_ttt_needs_ttt():
    with pytest.raises(ValueError, match="FINAL_SCORE=ttt: needs TTT_ENABLED=1"):
        t.Config.from_env({"FINAL_SCORE": "ttt"})
