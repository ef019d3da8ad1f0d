"""Test-time training: what is scored before, what is trained on after, every option on one rank and on two, resumed and
not, and faults of the order that must be noticed.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model
from test_training import two_ranks

import train_gpt as t

NONE = torch.zeros(64, dtype=torch.bool)
TABLE = t.ByteTable(torch.ones(64, dtype=torch.int64), NONE, NONE)
EXACT = dict(ttt_scoring="exact")
TILT = dict(ttt_tilt=0.7, ttt_tilt_order=4)
HASH = dict(ttt_hash_buckets=32, ttt_hash_lr=0.05)
OPTIONS = {
    "sliding": {},
    "exact": EXACT,
    "exact, odd chunks": EXACT | dict(ttt_chunk_tokens=150),
    "exact, several segments a chunk": EXACT | dict(eval_batch_tokens=64),
    "no carry": EXACT | dict(ttt_carry=False),
    "adamw": dict(ttt_optimizer="adamw", ttt_lr=0.003),
    "muon": EXACT | dict(ttt_optimizer="muon"),
    "constant": dict(ttt_schedule="constant", ttt_epochs=1),
    "roles": dict(ttt_roles="mlp,control"),
    "ema": dict(ttt_ema=0.5),
    "phase": EXACT | dict(ttt_phase_chunks=2),
    "reset": dict(ttt_reset=True),
    "lora": EXACT | dict(ttt_lora=2, ttt_optimizer="adamw"),
    "lora muon": dict(ttt_lora=2, ttt_optimizer="muon"),
    "tilt alone": TILT | dict(ttt_epochs=0),
    "hash alone": HASH | dict(ttt_roles=""),
    "all at once": EXACT | TILT | HASH | dict(ttt_optimizer="muon", ttt_ema=0.5, ttt_phase_chunks=2),
}
every_option = pytest.mark.parametrize("option", OPTIONS)


def text(length=320, seed=0):
    """A text of a few phrases over and over, a document start now and then: what was scored helps with what comes."""
    rng = np.random.default_rng(seed)
    phrases = [rng.integers(2, 64, 24).astype(np.uint16) for _ in range(3)]
    tokens = np.concatenate([phrases[i] for i in rng.integers(0, 3, length // 24 + 1)])[:length]
    tokens[100::101] = 1
    return tokens


def ttt_config(option="sliding", **overrides):
    """tiny_config with test-time training of two passes a chunk of 128 targets, and an option."""
    settings = dict(ttt_enabled=True, ttt_chunk_tokens=128, ttt_epochs=2, ttt_freeze_blocks=1,
                    ttt_lr=0.02, stack="gdn swa", model_dim=32, num_heads=2, num_kv_heads=1, gdn_heads=1,
                    eval_stride=32)
    return tiny_config(**(settings | OPTIONS[option] | overrides))


def adapted(cfg, tokens, run=None, **keywords):
    """Ledger, Adapter and model of one evaluation with test-time training."""
    model, run = tiny_model(cfg), run or t.Run()
    adapter = t.Adapter(model, len(tokens) - 1, run)
    return t.evaluate(model, tokens, TABLE, cfg.ttt_scoring, adapter, run, **keywords), adapter, model


def scores(cfg, tokens):
    """Nats of every target, in order."""
    out, add = [], t.Ledger.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.Ledger, "add", lambda book, first, nll, n: out.append(nll) or add(book, first, nll, n))
        adapted(cfg, tokens)
    return torch.cat(out)


# ---- it helps, and only with what was scored before ----------------------------------------------


@pytest.mark.parametrize("option, overrides", [
    ("sliding", dict(ttt_lr=0.05)), ("exact", dict(ttt_lr=0.05)), ("no carry", dict(ttt_lr=0.05)), ("adamw", {}),
    ("muon", {}), ("lora", {}), ("tilt alone", {}), ("hash alone", dict(ttt_epochs=3))])
def test_training_on_scored_text_helps_with_what_follows(option, overrides):
    cfg, tokens = ttt_config(option, **overrides), text(700)
    plain = t.evaluate(tiny_model(cfg), tokens, TABLE, cfg.ttt_scoring, adapt=lambda seen: None)
    assert adapted(cfg, tokens)[0].bpb < plain.bpb - 0.02


@every_option
def test_no_score_depends_on_later_text(option):
    """Other text from token 200 on, in the second chunk, leaves all that was scored before as it was, to the bit."""
    cfg, tokens = ttt_config(option), text()
    other = np.concatenate([tokens[:200], text(120, seed=1)])
    a, b = scores(cfg, tokens), scores(cfg, other)
    assert torch.equal(a[:199], b[:199]) and not torch.allclose(a[199:], b[199:])


@every_option
def test_rate_zero_gives_the_score_without(option):
    cfg, tokens = ttt_config(option, ttt_lr=0.0, ttt_hash_lr=0.0, ttt_tilt=0.0), text()
    with_ttt = adapted(cfg, tokens)[0]
    plain = t.evaluate(tiny_model(cfg), tokens, TABLE, cfg.ttt_scoring, adapt=lambda seen: None)
    assert with_ttt.tokens == plain.tokens and with_ttt.nats == pytest.approx(plain.nats, rel=1e-6)


@pytest.mark.parametrize("method, overrides", [("exact", dict(eval_spans=1)), ("sliding", {})])
def test_an_idle_adapter_gives_the_plain_score(method, overrides):
    cfg, tokens = ttt_config(ttt_scoring=method, ttt_lr=0.0, **overrides), text()
    plain = t.evaluate(tiny_model(cfg), tokens, TABLE, method)
    assert adapted(cfg, tokens)[0].nats == pytest.approx(plain.nats, rel=1e-6)


@pytest.mark.parametrize("option, chunk", [("exact", 319), ("exact, odd chunks", 319), ("no carry", 128),
                                           ("exact, several segments a chunk", 319)])
def test_exact_scores_are_those_of_one_forward_over_what_the_state_has_seen(option, chunk):
    cfg, tokens = ttt_config(option, ttt_lr=0.0), text()
    ids, model = torch.from_numpy(tokens.astype(np.int64))[None], tiny_model(cfg)
    expected = [t.token_nll(model(ids[:, i:i + chunk][:, :319 - i])[0], ids[:, i + 1:i + chunk + 1])[0]
                for i in range(0, 319, chunk)]
    torch.testing.assert_close(scores(cfg, tokens).float(), torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", ["sliding", "exact", "no carry", "all at once"])
def test_first_chunk_is_scored_by_the_weights_of_the_artifact(option):
    tokens = text()
    trained, idle = (scores(ttt_config(option, ttt_lr=lr, ttt_hash_lr=lr, ttt_phase_chunks=1), tokens)
                     for lr in (1.0, 0.0))
    assert torch.equal(trained[:128], idle[:128]) and not torch.allclose(trained[160:], idle[160:])


@pytest.mark.parametrize("length, calls", [(129, 0), (130, 1), (257, 1), (258, 2)])
def test_last_chunk_is_scored_and_never_trained_on(length, calls):
    _, adapter, _ = adapted(ttt_config("exact"), text(length))
    assert adapter.calls == calls and adapter.in_order


# ---- what trains ---------------------------------------------------------------------------------


def moved(cfg):
    """Names of the parameters that an evaluation changed."""
    _, _, model = adapted(cfg, text())
    before = dict(tiny_model(cfg).named_parameters())
    return {name for name, p in model.named_parameters() if name not in before or not torch.equal(p, before[name])}


def test_frozen_blocks_stay_and_the_others_move():
    cfg = ttt_config(stack="gdn swa gdn", ttt_freeze_blocks=2)
    names = {name for name, _ in tiny_model(cfg).named_parameters()}
    assert moved(cfg) == {name for name in names if not name.startswith(("blocks.0.", "blocks.1."))}


@pytest.mark.parametrize("settings, pattern", [
    (dict(ttt_roles="mlp"), r"\.mlp\."), (dict(ttt_roles="embed,gate"), r"^embed\.(weight|ngram_table)|\.[ab]_proj"),
    (dict(ttt_roles=""), r"^$"), (dict(ttt_roles="", **HASH), "hash_table"), (dict(ttt_lora=1), "_proj$")])
def test_only_the_wanted_roles_train(settings, pattern):
    cfg = ttt_config(ttt_freeze_blocks=0, **settings)
    names = {name for name, _ in tiny_model(cfg).named_parameters()} | ({"embed.hash_table"} if HASH.items() <=
                                                                       settings.items() else set())
    assert moved(cfg) == {name for name in names if re.search(pattern, name)}


def test_roles_are_those_of_the_routes():
    assert set(t.ROLES) == {r.role for r in t.ROUTES}


def test_close_leaves_the_model_as_it_was():
    cfg = ttt_config("all at once")
    _, adapter, model = adapted(cfg, text())
    adapter.close()
    for (name, p), q in zip(model.named_parameters(), tiny_model(cfg).parameters(), strict=True):
        assert torch.equal(p, q) and p.grad is None and p.requires_grad, name


@pytest.mark.parametrize("rule, build", [
    ("sgd", lambda p, cfg: torch.optim.SGD([p], lr=1.0, momentum=cfg.ttt_momentum)),
    ("adamw", lambda p, cfg: torch.optim.AdamW([p], lr=1.0, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0))])
def test_directions_are_those_of_torch(rule, build):
    cfg, rng, grad = ttt_config(), torch.Generator().manual_seed(0), torch.zeros(2, 3, 4)
    p = torch.zeros(2, 3, 4, requires_grad=True)
    one, ours, theirs = t.Leaf(rule, [], grad), torch.zeros(2, 3, 4), build(p, cfg)
    for step in range(1, 5):
        grad.copy_(torch.randn(grad.shape, generator=rng))
        p.grad = grad.clone()
        theirs.step()
        ours -= one.direction(step, cfg)
    torch.testing.assert_close(ours, p.detach(), rtol=1e-5, atol=1e-6)


def test_low_rank_gradients_are_those_of_the_product():
    """One SGD step of A and B through an Adapter against autograd through base + B A."""
    cfg, tokens = ttt_config(ttt_lora=2, ttt_epochs=1, ttt_grad_clip=0.0, ttt_schedule="constant"), text()
    model = tiny_model(cfg)
    adapter = t.Adapter(model, len(tokens) - 1, t.Run())
    group = adapter.low_rank[0]
    with torch.no_grad():
        for b in group.B.params:
            b.normal_(generator=torch.Generator().manual_seed(1))
    A, B = (torch.stack(side.params).requires_grad_() for side in (group.A, group.B))
    with torch.no_grad():
        torch._foreach_copy_(group.params, list((group.base + B @ A).unbind()))
    names = {id(p): name for name, p in model.named_parameters()}
    weights = {names[id(p)]: w for p, w in zip(group.params, (group.base + B @ A).unbind(), strict=True)}
    rows = t.make_rows(tokens, [0, 64], [0, 64], [64, 128], 64, torch.device("cpu"))
    logits, _ = torch.func.functional_call(model, weights, (rows.ids,))
    (t.token_nll(logits, rows.targets).sum() / 128).backward()
    adapter(tokens[:129])
    for side, x in ((group.A, A), (group.B, B)):
        torch.testing.assert_close(torch.stack(side.params), x.detach() - cfg.ttt_lr * x.grad, rtol=1e-4, atol=1e-6)


def test_average_of_weights_scores_while_the_newest_train():
    tokens = text()
    plain, averaged = (t.Adapter(tiny_model(cfg), len(tokens) - 1, t.Run())
                       for cfg in (ttt_config(ttt_epochs=1), ttt_config("ema", ttt_epochs=1)))
    mean = [p.clone() for p in plain.base]
    for length in (129, 257):
        plain(tokens[:length])
        averaged(tokens[:length])
        mean = [0.5 * m + 0.5 * p.detach() for m, p in zip(mean, plain.params, strict=True)]
    torch.testing.assert_close(averaged.raw, [p.detach() for p in plain.params])
    torch.testing.assert_close([p.detach() for p in averaged.params], mean)


def test_a_phase_trains_on_its_chunks_together():
    cfg, tokens = ttt_config(ttt_phase_chunks=2, ttt_epochs=3), text()
    adapter = t.Adapter(tiny_model(cfg), len(tokens) - 1, t.Run())
    adapter(tokens[:129])
    assert adapter.steps == 0 and all(map(torch.equal, adapter.params, adapter.base))
    adapter(tokens[:257])
    assert adapter.steps == 6 and not adapter.pending


def test_reset_forgets_what_stood_before_the_document():
    cfg, tokens = ttt_config("reset", ttt_schedule="constant"), text()
    tokens[:257] = np.where(tokens[:257] == 1, 2, tokens[:257])
    tokens[200] = 1
    weights = []
    for first_chunk in (tokens[:128], tokens[128:0:-1]):
        adapter = t.Adapter(tiny_model(cfg), len(tokens) - 1, t.Run())
        adapter(np.concatenate([first_chunk, tokens[128:129]]))
        assert not all(map(torch.equal, adapter.params, adapter.base))
        adapter(np.concatenate([first_chunk, tokens[128:257]]))
        weights.append(adapter.params)
    assert all(map(torch.equal, *weights)) and not all(map(torch.equal, adapter.params, adapter.base))


# ---- training rows -------------------------------------------------------------------------------


def trained_rows(cfg, tokens):
    """Wanted targets of every row that an evaluation trained on."""
    seen, real = [], t.summed_nll

    def spy(model, ids, targets, wanted):
        seen.extend(targets[row][wanted[row]] for row in range(len(ids)))
        return real(model, ids, targets, wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t, "summed_nll", spy)
        adapted(cfg, tokens)
    return seen


@pytest.mark.parametrize("option", ["sliding", "exact", "exact, odd chunks"])
def test_rows_cover_every_scored_chunk_once(option):
    cfg, tokens = ttt_config(option, ttt_epochs=1, ttt_lr=0.0, eval_stride=64), text()
    targets = torch.cat(trained_rows(cfg, tokens))
    last = 319 // cfg.ttt_chunk_tokens * cfg.ttt_chunk_tokens
    assert sorted(targets.tolist()) == sorted(tokens[1:last + 1].tolist())


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("first, last", [(0, 128), (128, 250), (64, 65)])
def test_rows_of_all_ranks_cover_the_chunk_once(world_size, first, last):
    cfg, tokens, covered, shapes = ttt_config(), text(), [], set()
    for rank in range(world_size):
        adapter = t.Adapter(tiny_model(cfg), len(tokens) - 1, t.Run(rank, world_size))
        for rows in adapter._batches(tokens, first, last):
            shapes.add(rows.ids.shape)
            covered += rows.targets[rows.wanted].tolist()
    assert covered == tokens[first + 1:last + 1].tolist() and len(shapes) == 1


# ---- one rank and two ----------------------------------------------------------------------------


def evaluate_options(run, folder, name=None):
    """The Ledger of every option, and whether its order was kept, saved under the rank or a name."""
    out, run.log = {}, lambda *event, **values: None
    for option in OPTIONS:
        cfg = ttt_config(option, ttt_chunk_tokens=80)
        cfg = replace(cfg, ttt_epochs=min(1, cfg.ttt_epochs))
        ledger, adapter, _ = adapted(cfg, text(200), run, probing=name is not None)
        out[option] = (ledger.tokens, ledger.bytes, ledger.nats, ledger.causal, ledger.normalized, adapter.in_order)
    torch.save(out, f"{folder}/{name or run.rank}.pt")


def test_two_ranks_score_as_one_and_every_option_is_legal(tmp_path):
    with two_ranks(evaluate_options, tmp_path):
        evaluate_options(t.Run(), tmp_path, "alone")
    found = [torch.load(tmp_path / f"{name}.pt") for name in ("alone", 0, 1)]
    for option in OPTIONS:
        one, *both = (ranks[option] for ranks in found)
        for other in both:
            assert other[:2] == one[:2] == (199, 199) and other[2] == pytest.approx(one[2], rel=1e-6), option
            assert one[3] == 0 and 0 < one[4] < 1e-5 and one[5] and other[5], option
        assert both[0] == both[1], option


# ---- faults --------------------------------------------------------------------------------------


def test_a_weight_that_changes_while_text_is_scored_is_noticed(monkeypatch):
    cfg, tokens = ttt_config(), text()
    model, score = tiny_model(cfg), t.score_rows
    adapter = t.Adapter(model, len(tokens) - 1, t.Run())

    def cheating(*arguments):
        with torch.inference_mode(False), torch.no_grad():
            model.blocks[1].mixer_scale.add_(1e-3)
        return score(*arguments)
    monkeypatch.setattr(t, "score_rows", cheating)
    t.evaluate(model, tokens, TABLE, "sliding", adapter)
    assert not adapter.in_order


@pytest.mark.parametrize("option", ["sliding", "exact", "tilt alone"])
def test_an_adapter_that_trains_before_scoring_is_noticed(option, monkeypatch):
    real = t.Scorer.__call__

    def eager(scorer, parts):
        with torch.inference_mode(False), torch.enable_grad():
            scorer.adapter(scorer.tokens[:parts[-1][1] + 1])
        return real(scorer, parts)
    monkeypatch.setattr(t.Scorer, "__call__", eager)
    assert not adapted(ttt_config(option, ttt_carry=False), text())[1].in_order


def test_a_tilt_that_is_not_normalised_is_noticed(monkeypatch):
    """The hinted token's probability raised behind the softmax, the others left as they are."""
    def unnormalised(model, ids, targets, state=None, tilt=None, before=None):
        logits, state = model(ids, state)
        nll = t.token_nll(logits, targets)
        return (nll + t.token_nll(t.tilted(logits, tilt, ids, before), targets)) / 2, state
    monkeypatch.setattr(t, "score_rows", unnormalised)
    assert adapted(ttt_config("tilt alone", ttt_tilt=5.0), np.tile(text(48), 9), probing=True)[0].normalized > 1e-3


def test_a_tilt_that_looks_ahead_is_noticed(monkeypatch):
    real = t.contexts
    monkeypatch.setattr(t, "contexts", lambda ids, before, order: real(torch.roll(ids, -1, 1), before, order))
    assert adapted(ttt_config("tilt alone", ttt_tilt=5.0), np.tile(text(48), 9), probing=True)[0].causal > 1e-3


# ---- tilt and hash embedding ---------------------------------------------------------------------


def hints_by_hand(scored, ids, before, order):
    """The hint at each position by dictionaries of counts."""
    counts, hints = {}, []
    for j in range(1, len(scored)):
        for n in range(1, min(order - 1, j) + 1):
            followers = counts.setdefault(tuple(scored[j - n:j]), {})
            followers[scored[j]] = followers.get(scored[j], 0) + 1
    seen = list(before) + list(ids)
    for j in range(len(before), len(seen)):
        hint = -1
        for n in range(1, order):
            followers = counts.get(tuple(seen[j - n + 1:j + 1]), {})
            best = [token for token, count in followers.items() if count == max(followers.values())]
            hint = best[0] if len(best) == 1 else hint
        hints.append(hint)
    return hints


@pytest.mark.parametrize("order", [2, 3, 5])
def test_hints_are_those_of_plain_counting(order):
    """Taught in two parts; ties and unseen contexts give none, longer contexts come first."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 30, 400).astype(np.uint16)
    tilt = t.new_tilt(ttt_config(ttt_tilt=3.0, ttt_tilt_order=order), 10**6, torch.device("cpu"))
    t.learn(tilt, tokens, 0, 130)
    t.learn(tilt, tokens, 130, 250)
    rows = t.make_rows(tokens, [260], [260], [390], 130, torch.device("cpu"))
    raised = t.tilted(torch.zeros(1, 130, 64), tilt, rows.ids, rows.before)
    expected = hints_by_hand(tokens[:251].tolist(), rows.ids[0].tolist(), rows.before[0].tolist(), order)
    top = torch.where(raised[0].amax(-1) > 0, raised[0].argmax(-1), -1)
    assert top.tolist() == expected and -1 in expected and set(raised.unique().tolist()) == {0.0, 3.0}


def test_tilted_probabilities_are_the_formula():
    """p' = p exp(beta [token = hint]) / sum."""
    tokens = text()
    tilt = t.new_tilt(ttt_config("tilt alone"), 449, torch.device("cpu"))
    t.learn(tilt, tokens, 0, 50)
    rows = t.make_rows(tokens, [300], [300], [364], 64, torch.device("cpu"))
    logits = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    hint = t.tilted(torch.zeros_like(logits), tilt, rows.ids, rows.before) > 0
    p = logits.softmax(-1) * torch.where(hint, np.exp(0.7), 1.0)
    torch.testing.assert_close(t.tilted(logits, tilt, rows.ids, rows.before).softmax(-1), p / p.sum(-1, keepdim=True))
    assert 0 < hint.sum() < 64


# ---- resumed evaluations -------------------------------------------------------------------------


class Stop(Exception):
    """The evaluation is killed here."""


def stopped_and_resumed(cfg, method, adapting, folder, tokens, stop_after):
    """Numbers of an unbroken evaluation and of one that was stopped after some units and resumed; targets rescored."""
    scored, real = [], t.Scorer.__call__

    def run_once(resume, limit):
        model, units = tiny_model(cfg), []
        adapter = t.Adapter(model, len(tokens) - 1, t.Run()) if adapting else None

        def counted(scorer, parts):
            if len(units) == limit:
                raise Stop
            units.append(parts)
            return real(scorer, parts)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(t.Scorer, "__call__", counted)
            patch.setattr(t, "UNIT_TARGETS", 128)
            progress = t.Progress(folder / "evaluation.npz", "key", t.Run(), 1e-9, resume)
            try:
                return t.evaluate(model, tokens, TABLE, method, adapter, t.Run(), progress).numbers()
            finally:
                scored.append(len(units))
    whole = run_once(False, None)
    with pytest.raises(Stop):
        run_once(False, stop_after)
    resumed = run_once(True, None)
    return whole, resumed, scored


@pytest.mark.parametrize("option", ["sliding", "exact", "adamw", "ema", "phase", "reset", "lora", "all at once"])
def test_resumed_test_time_training_ends_at_the_same_ledger(option, tmp_path):
    cfg = ttt_config(option, ttt_chunk_tokens=64)
    whole, resumed, (units, before, after) = stopped_and_resumed(cfg, cfg.ttt_scoring, True, tmp_path, text(), 3)
    assert resumed == whole and (before, after) == (3, units - 3 + (cfg.ttt_phase_chunks == 2))


@pytest.mark.parametrize("method, stop_after", [("roundtrip", 2), ("sliding", 2), ("exact", 2)])
def test_resumed_plain_evaluation_ends_at_the_same_ledger(method, stop_after, tmp_path):
    whole, resumed, (units, before, after) = stopped_and_resumed(
        ttt_config(eval_spans=10, eval_batch_tokens=128), method, False, tmp_path, text(), stop_after)
    assert resumed == whole and (before, after) == (stop_after, units - stop_after)


def resume_windows(run, folder):
    """Go on from what one rank has saved."""
    t.UNIT_TARGETS = 64
    progress = t.Progress(f"{folder}/evaluation.npz", "key", run, 0.0, resume=True)
    ledger = t.evaluate(tiny_model(ttt_config(eval_batch_tokens=64)), text(), TABLE, "roundtrip", None, run, progress)
    torch.save((ledger.nats, ledger.tokens), f"{folder}/{run.rank}.pt")


def test_evaluation_goes_on_under_another_number_of_ranks(tmp_path):
    """Saved by one rank after 64 targets, while two ranks score 128 at a time."""
    cfg = ttt_config(eval_batch_tokens=64)
    whole = t.evaluate(tiny_model(cfg), text(), TABLE, "roundtrip")
    first = t.evaluate(tiny_model(cfg), text(65), TABLE, "roundtrip")
    t.Progress(tmp_path / "evaluation.npz", "key", t.Run(), 1e-9).save(
        first, t.Scorer(tiny_model(cfg), text(), TABLE, t.Run(), None, False, False))
    assert first.next_target == 64
    with two_ranks(resume_windows, tmp_path):
        pass
    for rank in range(2):
        nats, tokens = torch.load(tmp_path / f"{rank}.pt")
        assert tokens == 319 and nats == pytest.approx(whole.nats, rel=1e-6)


def test_cosine_schedule_ends_near_zero_also_when_chunks_are_shorter_than_windows():
    cfg = ttt_config(ttt_schedule="cosine", ttt_chunk_tokens=8)
    _, adapter, _ = adapted(cfg, text())
    assert adapter.rate < 0.1


@pytest.mark.parametrize("fault", ["another key", "damaged", "not asked for", "missing"])
def test_a_file_that_does_not_fit_is_not_used(fault, tmp_path):
    path, cfg = tmp_path / "evaluation.npz", ttt_config()
    t.Progress(path, "key", t.Run(), 1e-9).save(t.Ledger(0, 64, 1.0, 64), t.Scorer(
        tiny_model(cfg), text(), TABLE, t.Run(), None, False, False))
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:-30])
    if fault == "missing":
        path.unlink()
    progress = t.Progress(path, "other" if fault == "another key" else "key", t.Run(), 0.0, fault != "not asked for")
    assert t.evaluate(tiny_model(cfg), text(), TABLE, "roundtrip", progress=progress).tokens == 319


def test_a_full_disk_does_not_end_an_evaluation(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    progress = t.Progress(tmp_path / "file" / "evaluation.npz", "key", t.Run(), 1e-9)
    assert t.evaluate(tiny_model(ttt_config()), text(), TABLE, "roundtrip", progress=progress).tokens == 319
    assert "evaluation_not_saved reason:" in capsys.readouterr().out


def test_seconds_before_a_resumption_count(tmp_path):
    cfg, data = ttt_config(), t.Data([], text(), None, TABLE)
    scorer = t.Scorer(tiny_model(cfg), text(), TABLE, t.Run(), None, False, False)
    progress = t.Progress(tmp_path / "evaluation.npz", "key", t.Run(), 1e-9)
    progress.began -= 1000.0
    progress.save(t.Ledger(), scorer)
    resumed = t.Progress(tmp_path / "evaluation.npz", "key", t.Run(), 0.0, resume=True)
    _, seconds = t.timed_evaluation("final_int6_roundtrip", tiny_model(cfg), data, "roundtrip", t.Run(), None, resumed)
    assert 1000 < seconds < 1100


def test_key_knows_artifact_text_method_and_settings():
    cfg, tokens = ttt_config(), text()
    counts = np.ones(len(tokens), np.uint16)
    keys = {t.evaluation_key(*arguments) for arguments in (
        (b"a", tokens, None, "ttt", cfg), (b"b", tokens, None, "ttt", cfg), (b"a", tokens[:-1], None, "ttt", cfg),
        (b"a", tokens, counts, "ttt", cfg), (b"a", tokens, counts + 1, "ttt", cfg), (b"a", tokens, None, "exact", cfg),
        (b"a", tokens, None, "ttt", replace(cfg, ttt_lr=0.03)))}
    same = t.evaluation_key(b"a", tokens, None, "ttt", replace(cfg, run_id="x", eval_save_seconds=9.0, resume="x"))
    assert len(keys) == 7 and same in keys


def test_artifact_evaluation_resumes_and_removes_its_file(tmp_path, monkeypatch):
    cfg = ttt_config(out_dir=str(tmp_path), run_id="r", eval_save_seconds=1e-9, final_score="ttt")
    size = t.save_artifact(tmp_path / "a", tiny_model(cfg), cfg)
    blob, path = (tmp_path / "a").read_bytes(), tmp_path / "r.ckpt" / "evaluation.npz"
    data = t.Data([], text(), None, TABLE)
    _, whole, _, in_order = t.evaluate_artifact(blob, data, cfg, t.Run())
    assert in_order and len(blob) == size and not path.exists()
    real = t.Adapter.__call__

    def killed(adapter, scored):
        if len(scored) > 129 and adapter.cfg.ttt_epochs == 2:  # not in the rehearsal, which has one
            raise Stop
        return real(adapter, scored)
    with monkeypatch.context() as patch:
        patch.setattr(t.Adapter, "__call__", killed)
        with pytest.raises(Stop):
            t.evaluate_artifact(blob, data, cfg, t.Run())
    assert path.exists()
    _, resumed, _, in_order = t.evaluate_artifact(blob, data, cfg, t.Run(), resume=True)
    assert in_order and not path.exists()
    assert resumed.numbers()[:4] == whole.numbers()[:4] and (resumed.by_distance == whole.by_distance).all()


# ---- log and plan --------------------------------------------------------------------------------


def test_log_lines_are_few_and_as_documented(capsys):
    adapted(ttt_config(ttt_chunk_tokens=4, ttt_epochs=0), text())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ttt ")]
    form = re.compile(r"ttt chunk:(\d+)/80 scored_tokens:(\d+) running_bpb:\d\.\d{4} chunk_bpb:\d\.\d{4} "
                      r"lr:0\.\d{6} time:\d+ms")
    matches = [form.fullmatch(line) for line in lines]
    assert all(matches) and 1 < len(lines) <= t.LOG_LINES and matches[-1][2] == "319" and "lr:0.000000" in lines[-1]


def test_rehearsal_leaves_no_trace_and_reads_no_text():
    cfg = ttt_config("all at once")
    model = tiny_model(cfg)
    seconds, epoch_s = t.rehearse_adapting(model, 1000, t.Run())
    assert seconds > 0 and epoch_s > 0 and model.cfg == cfg
    for (name, p), q in zip(model.named_parameters(), tiny_model(cfg).parameters(), strict=True):
        assert torch.equal(p, q), name


def test_rehearsal_tells_what_an_epoch_costs_from_what_a_chunk_costs(monkeypatch):
    """Each chunk takes 3 seconds of hints, each epoch 5 more."""
    real, now = t.Adapter._train, [0.0]
    monkeypatch.setattr(t, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def learn(*arguments):
        now[0] += 3.0

    def train(adapter):
        now[0] += 5.0 * adapter.cfg.ttt_epochs
        real(adapter)
    monkeypatch.setattr(t, "learn", learn)
    monkeypatch.setattr(t.Adapter, "_train", train)
    for epochs, epoch_s in ((3, 50.0), (0, 0.0)):
        cfg = ttt_config(ttt_tilt=0.5, ttt_epochs=epochs, ttt_chunk_tokens=100)
        assert t.rehearse_adapting(tiny_model(cfg), 1000, t.Run()) == (30.0, epoch_s)


@pytest.mark.parametrize("scoring_s, overrun, expected", [
    (100.0, "error", "change TTT_EPOCHS"), (100.0, "trim", 2), (700.0, "trim", "change EVAL_STRIDE"),
    (590.0, "trim", 0), (50.0, "error", 3), (50.0, "trim", 2), (20.0, "trim", 3)])
def test_trimming_lowers_the_passes_and_nothing_else(scoring_s, overrun, expected, monkeypatch):
    monkeypatch.setattr(t, "rehearse_adapting", lambda *arguments: (scoring_s, 180.0))
    cfg = ttt_config(ttt_epochs=3, final_score="ttt", eval_overrun=overrun)
    model = tiny_model(cfg)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            t.plan_evaluation(model, cfg, t.Run(), 1000)
    else:
        t.plan_evaluation(model, cfg, t.Run(), 1000)
        assert model.cfg == replace(cfg, ttt_epochs=expected)


def test_plan_made_again_after_training_warns_and_loses_no_score(monkeypatch, capsys):
    monkeypatch.setattr(t, "rehearse_adapting", lambda *arguments: (700.0, 180.0))
    cfg = ttt_config(ttt_epochs=3, final_score="ttt")
    model = tiny_model(cfg)
    t.plan_evaluation(model, cfg, t.Run(), 1000, again=True)
    out = capsys.readouterr().out
    assert "warning reason:FINAL_SCORE=ttt" in out and "EVAL_BUDGET_SECONDS=600" in out and model.cfg == cfg


def test_final_score_by_ttt_needs_ttt():
    with pytest.raises(ValueError, match="FINAL_SCORE=ttt: needs TTT_ENABLED=1.* FINAL_SCORE=exact"):
        t.Config.from_env({"TTT_ENABLED": "0"})


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["fla", "flashqla"])
@pytest.mark.parametrize("options", [
    {}, dict(ttt_optimizer="muon", ttt_ema=0.5), dict(ttt_optimizer="adamw", ttt_lora=2),
    HASH | TILT | dict(ttt_optimizer="adamw"), dict(ttt_chunk_tokens=150), dict(ttt_phase_chunks=2, ttt_reset=True),
], ids=["sgd", "muon_ema", "lora", "hash_tilt", "odd_chunks", "phase_reset"])
def test_cuda_recorded_training_equals_training_launched_kernel_by_kernel(kernel, options):
    pytest.importorskip({"fla": "fla", "flashqla": "flash_qla"}[kernel])
    cfg = ttt_config(**dict(device="cuda", kernel=kernel, attn_kernel="varlen", compile="1", ttt_scoring="exact",
                            model_dim=64, gdn_heads=2, gdn_v_heads=4, gdn_head_dim=128, ttt_lr=0.003) | options)
    run, tokens, moved = t.Run(device="cuda"), text(1000), []
    for recorded in (True, False):
        model = tiny_model(cfg).to("cuda")
        adapter = t.Adapter(model, len(tokens) - 1, run)
        adapter.graphs = {} if recorded else None
        t.evaluate(model, tokens, TABLE, "exact", adapter, run)
        assert not recorded or adapter.graphs and any(adapter.graphs.values())
        moved.append(torch.cat([(p - base).flatten() for p, base in zip(adapter.weights, adapter.base, strict=True)]))
    assert t.relative_error(*moved) < 0.05
