"""Training: routes, Newton-Schulz, Muon and AdamW against torch's, averaging, schedule, accumulation, the loader, two
ranks against one, and ten steps against tests/golden_loss.txt.

After an intended change of the model or the optimizer, write that file anew: python tests/test_training.py
"""

import contextlib
import multiprocessing
import os
import queue
import re
import socket
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import quantize_model
from conftest import tiny_config as build_config
from conftest import tiny_model as build_model
from torch.optim.swa_utils import get_ema_multi_avg_fn

import train_gpt as t

GOLDEN = Path(__file__).with_name("golden_loss.txt")
STACKS = ("gdn swa:a gdn swa:a", "gdn", "attn swa", "swa:x*3 gdn:y*2 attn")


def random_gradients(model, seed=0, scale=1.0):
    """Fill the gradients of a model that has an Optimizer; returns them by name."""
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad.copy_(scale * torch.randn(p.shape, generator=rng))
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_weights(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# ---- routes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", STACKS)
def test_optimizer_holds_every_parameter_once(tiny_config, stack):
    model = t.LM(tiny_config(stack=stack))
    optimizer = t.Optimizer(model, model.cfg, t.Run())
    held = [p for ps in optimizer.matrices.values() for p in ps]
    held += [p for group in optimizer.adamw.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


ROLES = {"embed.weight": "embed", "embed.ngram_table": "embed", "embed.ngram_proj": "mixer",
         "embed.smear_gate": "control", "embed.ngram_scale": "control",
         "blocks.0.mixer.q_proj": "mixer", "blocks.0.mixer.g_proj": "mixer", "blocks.0.mixer.a_proj": "gate",
         "blocks.0.mixer.b_proj": "gate", "blocks.0.mixer.o_proj": "mixer", "blocks.0.mixer.o_norm": "control",
         "blocks.0.mixer.q_conv": "control", "blocks.0.mlp.up_proj": "mlp", "blocks.0.mlp.down_proj": "mlp",
         "blocks.0.mixer.A_log": "control", "blocks.0.mixer.dt_bias": "control", "blocks.1.qk_gain": "control",
         "blocks.0.resid_mix": "control", "blocks.0.mixer_scale": "control", "blocks.0.mlp_scale": "control"}


@pytest.mark.parametrize("name", ROLES)
def test_route_gives_the_role(name):
    entry = t.route(name)
    assert entry.role == ROLES[name]
    assert entry.optimizer == ("muon" if entry.role in ("mlp", "mixer", "gate") else "adamw")


def test_every_row_of_routes_is_used():
    assert {t.route(name) for name in ROLES} == set(t.ROUTES)


def test_muon_takes_matrices_only(tiny_config):
    model = t.LM(tiny_config(gdn_v_heads=4))
    optimizer = t.Optimizer(model, model.cfg, t.Run())
    assert {len(shape) for _, shape in optimizer.matrices} == {2}
    assert all(min(shape) >= 4 for _, shape in optimizer.matrices)  # the smallest: gates, one row per value head


# ---- optimizers -------------------------------------------------------------------------------------


def matrices_with_known_singular_values(rows, columns, low):
    """Three matrices (3, rows, columns) with singular values from low to 1, and their orthogonal factors' product."""
    rng, rank = torch.Generator().manual_seed(0), min(rows, columns)
    U = torch.linalg.qr(torch.randn(3, rows, rank, generator=rng))[0]
    V = torch.linalg.qr(torch.randn(3, columns, rank, generator=rng))[0]
    return U * torch.linspace(low, 1, rank) @ V.mT, U @ V.mT


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (64, 64), (7, 5)], ids="{0[0]}x{0[1]}".format)
def test_newton_schulz_brings_singular_values_near_one(shape):
    G, _ = matrices_with_known_singular_values(*shape, low=0.1)
    values = torch.linalg.svdvals(t.newton_schulz(1e-3 * G, 5))
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (64, 64)], ids="{0[0]}x{0[1]}".format)
def test_newton_schulz_keeps_singular_vectors(shape):
    G, orthogonal = matrices_with_known_singular_values(*shape, low=0.1)
    cosine = torch.cosine_similarity(t.newton_schulz(G, 5).flatten(1), orthogonal.flatten(1))
    assert float(cosine.min()) > 0.97


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (64, 64)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("steps", [1, 3], ids=["first_step", "third_step"])
def test_muon_equals_torch_muon(shape, steps):
    """Momentum, Nesterov and scale have torch's conventions; torch's Newton-Schulz is bfloat16, so 2 % may differ."""
    rng = torch.Generator().manual_seed(0)
    start, buffer = torch.randn(shape, generator=rng), torch.zeros(1, *shape)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.9, nesterov=True, ns_steps=5)
    for _ in range(steps):
        grad, before = torch.randn(shape, generator=rng), theirs.detach().clone()
        theirs.grad = grad.clone()
        optimizer.step()
        update = t.muon_update(grad[None], buffer, 0.9, 5)[0]
    assert t.relative_error(update, (before - theirs.detach()) / 0.1) < 0.02
    torch.testing.assert_close(buffer[0], optimizer.state[theirs]["momentum_buffer"])


def test_muon_step_applies_rate_and_decoupled_decay(tiny_config, tiny_model):
    model = tiny_model(tiny_config(grad_clip_norm=0.0, matrix_lr=0.1, muon_weight_decay=0.3))
    optimizer = t.Optimizer(model, model.cfg, t.Run())
    before, grads = weights_of(model), random_gradients(model)
    optimizer.step(0.5)
    for name in (n for n in before if t.route(n).optimizer == "muon"):
        update = t.muon_update(grads[name][None], torch.zeros(1, *grads[name].shape), 0.92, 5)[0]
        want = before[name] * (1 - 0.05 * 0.3) - 0.05 * update
        torch.testing.assert_close(model.get_parameter(name).detach(), want, rtol=1e-4, atol=1e-5)


def test_adamw_parameters_move_as_torchs_adamw(tiny_config, tiny_model):
    cfg = tiny_config(grad_clip_norm=0, tied_embed_lr=0.05, scalar_lr=0.02, adam_weight_decay=0.3, beta1=0.8, beta2=0.9)
    model = tiny_model(cfg)
    optimizer, before = t.Optimizer(model, cfg, t.Run()), weights_of(model)
    theirs = {name: torch.nn.Parameter(p) for name, p in before.items() if t.route(name).optimizer == "adamw"}
    torchs = torch.optim.AdamW(
        [dict(params=[p], lr=0.05 if t.route(n).role == "embed" else 0.02,
              weight_decay=0.3 if t.route(n).role == "embed" else 0.0) for n, p in theirs.items()],
        betas=(0.8, 0.9), eps=1e-10, foreach=False, fused=False)
    for step, lr_mul in enumerate((1.0, 0.25, 0.5)):
        grads = random_gradients(model, seed=step)
        for group in torchs.param_groups:
            group["lr"] = lr_mul * (0.05 if group["weight_decay"] else 0.02)
        for name, p in theirs.items():
            p.grad = grads[name]
        torchs.step()
        optimizer.step(lr_mul)
    after = weights_of(model)
    assert_same_weights({name: after[name] for name in theirs}, {name: p.detach() for name, p in theirs.items()},
                        rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step, momentum", [(0, 0.9), (5, 0.925), (10, 0.95), (1000, 0.95)], ids="step{}".format)
def test_muon_momentum_warms_up(tiny_config, step, momentum):
    cfg = tiny_config(muon_momentum_warmup_start=0.9, muon_momentum=0.95, muon_momentum_warmup_steps=10)
    optimizer = t.Optimizer(t.LM(cfg), cfg, t.Run())
    optimizer.steps_done = step
    assert optimizer.momentum() == pytest.approx(momentum)


@pytest.mark.parametrize("limit, share", [(0.0, 1.0), (1e9, 1.0), (2.0, None)], ids=["off", "not_reached", "reached"])
def test_gradients_are_clipped_to_a_global_norm(tiny_config, tiny_model, limit, share):
    model = tiny_model(tiny_config(grad_clip_norm=limit))
    optimizer = t.Optimizer(model, model.cfg, t.Run())
    grads = random_gradients(model)
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    torch.testing.assert_close(optimizer.step(1.0), norm)
    share = share or 2.0 / float(norm)
    (entry, shape), params = next(iter(optimizer.matrices.items()))
    name, = (n for n, p in model.named_parameters() if p is params[0])
    momentum = optimizer.buffers[entry, shape][0]
    torch.testing.assert_close(momentum, (1 - 0.92) * share * grads[name], rtol=1e-4, atol=1e-7)


def test_step_leaves_zero_gradients(tiny_config, tiny_model):
    model = tiny_model(tiny_config())
    optimizer = t.Optimizer(model, model.cfg, t.Run())
    random_gradients(model)
    optimizer.step(1.0)
    assert not any(p.grad.any() for p in model.parameters())


# ---- averaging --------------------------------------------------------------------------------------


def walk(model, average, steps):
    """Move the weights at random and average them; returns the weights after each step, the first included."""
    rng, path = torch.Generator().manual_seed(0), [weights_of(model)]
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=rng))
        average.update(len(path), 1.0)
        path.append(weights_of(model))
    return path


def test_average_equals_torchs_where_its_warm_up_is_over(tiny_config, tiny_model):
    model = tiny_model(tiny_config(stack="gdn"))
    average = t.Average(model, tiny_config(ema_decay=0.15))  # below the warm-up's first decay, 2 / 11
    first, *path = walk(model, average, 5)
    ema = get_ema_multi_avg_fn(0.15)
    for weights in path:
        ema(list(first.values()), list(weights.values()), None)
    average.copy_to()
    assert_same_weights(weights_of(model), first, rtol=1e-5, atol=1e-6)


def test_average_warms_up(tiny_config, tiny_model):
    model = tiny_model(tiny_config(stack="gdn"))
    average = t.Average(model, tiny_config(ema_decay=0.3))
    mean, *path = walk(model, average, 4)
    for weights, decay in zip(path, (2 / 11, 3 / 12, 0.3, 0.3), strict=True):
        mean = {name: decay * mean[name] + (1 - decay) * weights[name] for name in mean}
    average.copy_to()
    assert_same_weights(weights_of(model), mean, rtol=1e-5, atol=1e-6)


def test_average_off_leaves_the_weights(tiny_config, tiny_model):
    model = tiny_model(tiny_config(stack="gdn"))
    average = t.Average(model, tiny_config(ema_decay=0.0))
    last = walk(model, average, 2)[-1]
    average.copy_to()
    assert_same_weights(weights_of(model), last, rtol=0, atol=0)


def test_average_of_the_warm_down_is_the_mean_of_every_nth_step(tiny_config, tiny_model):
    model = tiny_model(tiny_config(stack="gdn"))
    average, kept = t.Average(model, tiny_config(average_every=3)), []
    for step in range(1, 13):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(step)
        lr_mul = 1.0 if step <= 5 else 0.5
        average.update(step, lr_mul)
        if step in (6, 9, 12):
            kept.append(weights_of(model))
    average.copy_to()
    mean = {name: sum(w[name] for w in kept) / 3 for name in kept[0]}
    assert_same_weights(weights_of(model), mean, rtol=1e-5, atol=1e-4)


# ---- late QAT ---------------------------------------------------------------------------------------


def test_qat_sees_the_exports_grid_and_leaves_the_weights(tiny_config, tiny_model):
    cfg = tiny_config(matrix_clip_sigmas=9.0, mlp_bits=5)
    model = tiny_model(cfg)
    before = weights_of(model)
    with t.on_export_grid(model, True):
        inside = weights_of(model)
    assert_same_weights(weights_of(model), before, rtol=0, atol=0)
    for name, q in quantize_model(model, t.UNCALIBRATED, cfg, 9.0).items():
        assert torch.equal(inside[name], t.dequantize(q.Q, q.scale)), name
        assert q.bits == (5 if ".mlp." in name else 8 if t.route(name).role in ("embed", "gate") else 6)
    assert all(torch.equal(inside[n], before[n]) for n in before if not t.route(n).bits)


def test_qat_gradient_is_that_of_the_rounded_weights(tiny_config, tiny_model):
    cfg = tiny_config(matrix_bits=3)
    batch, model = fixed_batch(cfg, seed=0), tiny_model(cfg)
    with t.on_export_grid(model, True):
        t.mean_nll(model, batch[:, :-1], batch[:, 1:]).backward()
    rounded = tiny_model(cfg)
    with torch.no_grad():
        for name, q in quantize_model(rounded, t.UNCALIBRATED, cfg, t.expected_clip(rounded, cfg)).items():
            rounded.get_parameter(name).copy_(t.dequantize(q.Q, q.scale))
    t.mean_nll(rounded, batch[:, :-1], batch[:, 1:]).backward()
    for p, q in zip(model.parameters(), rounded.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_late_qat_really_starts(tiny_config, tiny_model, monkeypatch):
    cfg, seen, step = tiny_config(iterations=10, qat_frac=0.35, grid="sdclip"), [], t.train_step
    monkeypatch.setattr(t, "train_step", lambda *args, qat=False: seen.append(qat) or step(*args, qat=qat))
    train(tiny_model(cfg), cfg)
    assert seen == [False] * 7 + [True] * 3


# ---- schedule and batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("point", [(0.0, 1.0), (0.4, 1.0), (0.7, 0.6), (1.0, 0.2), (1.5, 0.2)], ids="at{0[0]}".format)
def test_learning_rate_is_flat_then_falls_to_min_lr(tiny_config, point):
    progress, want = point
    assert t.learning_rate(progress, tiny_config(warmdown_frac=0.6, min_lr=0.2)) == pytest.approx(want)


@pytest.mark.parametrize("frac, want", [(0.0, 1.0), (1.0, 0.55)], ids=["no_warmdown", "all_warmdown"])
def test_learning_rate_half_way(tiny_config, frac, want):
    assert t.learning_rate(0.5, tiny_config(warmdown_frac=frac, min_lr=0.1)) == pytest.approx(want)


MICRO_BATCHES = [(12, 1, 0, 12), (12, 2, 0, 6), (12, 1, 320, 4), (12, 1, 64, 1), (12, 3, 200, 2), (7, 1, 200, 1)]


@pytest.mark.parametrize("case", MICRO_BATCHES, ids="rows{0[0]}-ranks{0[1]}-most{0[2]}".format)
def test_micro_batch_divides_the_rows_of_a_rank(tiny_config, case):
    rows, ranks, most, want = case
    cfg = tiny_config(train_batch_tokens=64 * rows, micro_batch_tokens=most)
    assert t.micro_batch_rows(cfg, t.Run(world_size=ranks)) == want


@pytest.mark.parametrize("ranks, tokens", [(1, 131072), (2, 262144), (6, 786432), (7, 688128), (8, 786432),
                                           (384, 786432), (1000, 2048000)])
def test_batch_of_0_grows_with_the_ranks_to_the_challenges(ranks, tokens):
    cfg = build_config(train_batch_tokens=0, train_seq_len=2048, eval_batch_tokens=2048)
    run = t.Run(world_size=ranks)
    settled = t.settle_batch(cfg, run)
    assert settled.train_batch_tokens == tokens
    assert t.micro_batch_rows(settled, run) >= 1  # the ranks share the rows evenly
    given = build_config(train_batch_tokens=640)
    assert t.settle_batch(given, run, 1280) == given  # what is set counts; then the checkpoint's number
    assert t.settle_batch(cfg, run, 4096).train_batch_tokens == 4096


@pytest.mark.parametrize("case", [(8, 3, 9), (8, 5, 10), (2, 8, 8), (7, 2, 8)], ids="rows{0[0]}-ranks{0[1]}".format)
def test_micro_batch_error_names_the_nearest_batch(tiny_config, case):
    rows, ranks, near = case
    with pytest.raises(t.SettingError, match=f"set TRAIN_BATCH_TOKENS={64 * near}$"):
        t.micro_batch_rows(tiny_config(train_batch_tokens=64 * rows), t.Run(world_size=ranks))
    assert t.micro_batch_rows(tiny_config(train_batch_tokens=64 * near), t.Run(world_size=ranks)) >= 1


def fixed_batch(cfg, seed=0):
    """One global batch (rows, T + 1) of a repeating, learnable text."""
    rows = cfg.train_batch_tokens // cfg.train_seq_len
    start = torch.randint(61, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (2 + (start + 3 * torch.arange(cfg.train_seq_len + 1)) % 61).int()


@pytest.mark.parametrize("micro_rows", [1, 2, 4], ids="micro{}".format)
def test_micro_batches_give_the_update_of_the_whole_batch(tiny_config, tiny_model, micro_rows):
    results = []
    for rows in (8, micro_rows):
        model = tiny_model(tiny_config())
        optimizer = t.Optimizer(model, model.cfg, t.Run())
        loss = t.train_step(model, optimizer, fixed_batch(model.cfg), rows, 1.0)
        results.append((loss, weights_of(model)))
    (want_loss, want), (loss, got) = results
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=1e-6)
    assert_same_weights(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 2], ids="steps{}".format)
def test_warm_up_leaves_no_trace(tiny_config, tiny_model, steps):
    model = tiny_model(tiny_config(warmup_steps=steps))
    before, random_state = weights_of(model), torch.get_rng_state()
    t.warm_up(model, model.cfg, t.Run(), 4)
    assert_same_weights(weights_of(model), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


# ---- the loader -------------------------------------------------------------------------------------

# The first is shorter than a row; the others are told apart by their tokens.
LENGTHS = (40, 65, 1000, 200, 385)
STARTS = np.cumsum((0, *LENGTHS))[:-1]


def numbered_shards():
    """Shards whose every token is different, so that a row tells where it was cut."""
    return [(Path(f"shard{start}"), np.arange(start, start + length).astype(np.uint16))
            for start, length in zip(STARTS, LENGTHS, strict=True)]


def loader_config(rows, **overrides):
    return build_config(vocab_size=65536, train_batch_tokens=64 * rows, **overrides)


def take(loader, batches):
    """The next batches as one tensor, and the loader's state behind them; closes the loader."""
    rows = torch.cat([next(loader) for _ in range(batches)])
    state = loader.state()
    loader.close()
    return rows, state


def next_soon(loader):
    """next(loader), or queue.Empty after some seconds, so that a lost exception fails a test and does not hang it."""
    box = queue.SimpleQueue()

    def get():
        try:
            box.put(next(loader))
        except Exception as error:
            box.put(error)
    threading.Thread(target=get, daemon=True).start()
    result = box.get(timeout=20)
    if isinstance(result, Exception):
        raise result
    return result


def one_epoch():
    """All rows of the first epoch."""
    loader, rows = t.Loader(numbered_shards(), loader_config(1), t.Run()), []
    while True:
        row = next(loader)
        if loader.state()[0] > 0:
            loader.close()
            return torch.cat(rows).long()
        rows.append(row)


def test_an_epoch_holds_every_row_of_every_shard_once():
    rows = one_epoch()
    assert (rows.diff(dim=1) == 1).all()  # each row is one stretch of one shard
    for start, length in zip(STARTS, LENGTHS, strict=True):
        mine = sorted(int(row[0]) - start for row in rows if start <= row[0] < start + length)
        assert np.diff(mine).tolist() == [64] * (len(mine) - 1), f"shard{start} repeats or leaves out a row"
        if length <= 64:
            assert mine == []
        else:  # less than a row is lost at either end
            assert mine[0] < 64 and length - 1 - (mine[-1] + 64) < 64, f"shard{start}"


def test_epochs_differ_in_order_and_cut():
    loader = t.Loader(numbered_shards(), loader_config(1), t.Run())
    rows, _ = take(loader, 2 * (sum(LENGTHS) // 64))
    first = set(one_epoch()[:, 0].tolist())
    assert set(rows[:, 0].tolist()) - first  # later epochs cut elsewhere


def test_rows_are_not_in_the_order_of_the_text():
    starts = one_epoch()[:, 0]
    assert 0.3 < float((starts.diff() > 0).float().mean()) < 0.7


@pytest.mark.parametrize("seed, same", [(1337, True), (7, False)], ids=["same_seed", "other_seed"])
def test_order_follows_the_seed(seed, same):
    a, b = (take(t.Loader(numbered_shards(), loader_config(4, seed=s), t.Run()), 3)[0] for s in (1337, seed))
    assert torch.equal(a, b) == same


@pytest.mark.parametrize("ranks", [2, 3], ids="ranks{}".format)
def test_ranks_share_the_rows_of_one_rank(ranks):
    one = t.Loader(numbered_shards(), loader_config(6), t.Run())
    many = [t.Loader(numbered_shards(), loader_config(6), t.Run(rank=r, world_size=ranks)) for r in range(ranks)]
    for _ in range(12):  # beyond the first epoch
        assert torch.equal(torch.cat([next(loader) for loader in many]), next(one))
    for loader in (one, *many):
        loader.close()


@pytest.mark.parametrize("batches", [1, 6, 12], ids="after{}".format)
def test_resumed_loader_goes_on_behind_the_last_batch_taken(batches):
    loader = t.Loader(numbered_shards(), loader_config(4), t.Run())
    for _ in range(batches):
        next(loader)
    resumed = t.Loader(numbered_shards(), loader_config(4), t.Run(), state=loader.state())
    assert torch.equal(take(loader, 8)[0], take(resumed, 8)[0])


def test_fault_while_reading_reaches_the_consumer():
    class Unreadable:
        def __len__(self):
            return 1000

        def __getitem__(self, _):
            raise OSError("the disk is gone")

    loader = t.Loader([(Path("bad.bin"), Unreadable())], loader_config(1), t.Run())
    with pytest.raises(OSError, match="the disk is gone"):
        next_soon(loader)
    loader.close()


def test_token_outside_the_vocabulary_names_its_file():
    shards = [(Path("good.bin"), np.full(200, 5, np.uint16)), (Path("bad.bin"), np.full(200, 64, np.uint16))]
    loader = t.Loader(shards, build_config(train_batch_tokens=64 * 4), t.Run())
    with pytest.raises(t.DataError, match=r"bad\.bin: token 64 is outside VOCAB_SIZE=64"):
        next_soon(loader)
    loader.close()


def test_shards_shorter_than_a_row_are_refused():
    with pytest.raises(t.DataError, match="fewer than one row"):
        t.Loader([(Path("short.bin"), np.zeros(64, np.uint16))], loader_config(1), t.Run())


# ---- the loop, on one rank and on two ---------------------------------------------------------------


def fixed_data(cfg):
    """Training and validation text of 64 tokens, and a byte table in which tokens differ."""
    rng = np.random.default_rng(0)
    text = (2 + (np.cumsum(rng.integers(1, 4, 5000)) % (cfg.vocab_size - 2))).astype(np.uint16)
    text[::97] = 1
    ids = torch.arange(cfg.vocab_size)
    table = t.ByteTable(ids % 5, ids % 3 == 0, ids < 2)
    return t.Data([(Path("a.bin"), text[:3000]), (Path("b.bin"), text[3000:4200])], text[4200:], None, table)


def train(model, cfg, run=None, data=None):
    """t.train on the fixed text, its checkpoints in a folder that goes away."""
    run, data = run or t.Run(), data or fixed_data(cfg)
    with tempfile.TemporaryDirectory() as folder:
        return t.train(model, data, cfg, run, t.Checkpoints(t.replace(cfg, out_dir=folder), run, data))


def run_whole(run, folder):
    """Train a few steps and evaluate by every method; saves what came of it and the log of this rank."""
    norms = []

    class Recorded(t.Optimizer):
        def step(self, lr_mul):
            norms.append(float(super().step(lr_mul)))

    cfg = build_config(stack="gdn swa:a gdn swa:a gdn", gdn_v_heads=4, warmup_steps=1, iterations=3, val_loss_every=2)
    data, model = fixed_data(cfg), build_model(cfg)
    run.log_path = f"{folder}/log{run.rank}"
    with mock.patch.object(t, "Optimizer", Recorded):
        stop = train(model, cfg, run)
    ledgers = {}
    for method in ("roundtrip", "sliding", "exact"):
        for adapt in (None, lambda tokens: None):
            book = t.evaluate(model, data.val, data.table, method, adapt=adapt, run=run)
            ledgers[method, bool(adapt)] = (book.first, book.tokens, book.nats, book.bytes)
    result = dict(weights=weights_of(model), norms=norms, ledgers=ledgers, steps=stop.steps)
    torch.save(result, f"{folder}/rank{run.rank}.pt")


def run_with_a_slow_rank(run, folder):
    """Train by the clock where rank 1 believes that a step takes an hour; saves the steps done."""
    class Slow(t.Pace):
        def tick(self, *step):
            super().tick(*step)
            self.durations.append(3600.0 * run.rank)

    cfg = build_config(iterations=100000, max_wallclock_seconds=1.5, gptq_enabled=False)
    with mock.patch.object(t, "Pace", Slow):
        stop = train(build_model(cfg), cfg, run)
    torch.save(stop.steps, f"{folder}/rank{run.rank}.pt")


def run_rank(work, rank, port, folder, settings):
    """One of two processes, set up by the variables that torchrun sets."""
    env = dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(env)
    run = t.Run.from_env(env, build_config(**settings))
    work(run, folder)
    run.close()


@contextlib.contextmanager
def two_ranks(work, folder, **settings):
    """Run work(run, folder) in two processes beside the body of the with statement; both must end well."""
    spawn, port = multiprocessing.get_context("spawn"), free_port()
    ranks = [spawn.Process(target=run_rank, args=(work, rank, port, str(folder), settings)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        yield
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def losses(path):
    """The training and validation losses of a log, in order."""
    return [float(x) for x in re.findall(r"(?:train|val)_loss:(\d+\.\d+)", path.read_text())]


@pytest.fixture(scope="module")
def one_and_two_ranks(tmp_path_factory):
    """The results of `run_whole` in this process and on the ranks of a group of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with two_ranks(run_whole, two):
        run_whole(t.Run(), str(one))
    return SimpleNamespace(one=torch.load(one / "rank0.pt"), first=torch.load(two / "rank0.pt"),
                           second=torch.load(two / "rank1.pt"), losses=(losses(one / "log0"), losses(two / "log0")),
                           second_log=two / "log1")


def test_two_ranks_end_with_the_weights_of_one(one_and_two_ranks):
    assert one_and_two_ranks.first["steps"] == one_and_two_ranks.one["steps"] == 3
    assert_same_weights(one_and_two_ranks.first["weights"], one_and_two_ranks.one["weights"], rtol=0, atol=1e-4)


def test_two_ranks_hold_bit_equal_weights(one_and_two_ranks):
    assert_same_weights(one_and_two_ranks.second["weights"], one_and_two_ranks.first["weights"], rtol=0, atol=0)


def test_two_ranks_clip_the_gradient_norms_of_one(one_and_two_ranks):
    one, first, second = (getattr(one_and_two_ranks, n)["norms"][1:] for n in ("one", "first", "second"))
    assert len(one) == 3  # the first norm was the warm-up's, whose tokens are thrown away
    assert first == second == pytest.approx(one, rel=1e-3)


def test_two_ranks_log_the_losses_of_one(one_and_two_ranks):
    one, two = one_and_two_ranks.losses
    assert len(one) == 3 + 3  # three steps; validations at 0, 2 and 3
    assert two == pytest.approx(one, abs=2e-4)


def test_only_rank_zero_writes_the_log(one_and_two_ranks):
    assert not one_and_two_ranks.second_log.exists()


@pytest.mark.parametrize("method", ["roundtrip", "sliding", "exact"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "in_chunks"])
def test_two_ranks_score_as_one(one_and_two_ranks, method, adapted):
    one, first, second = (getattr(one_and_two_ranks, n)["ledgers"][method, adapted] for n in ("one", "first", "second"))
    assert first == second
    assert (first[0], first[1], first[3]) == (one[0], one[1], one[3])
    assert first[2] == pytest.approx(one[2], rel=1e-4)


def test_ranks_whose_clocks_differ_stop_at_one_step(tmp_path):
    with two_ranks(run_with_a_slow_rank, tmp_path):
        pass
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first == second > 1


def test_training_leaves_the_averaged_weights(tiny_config, tiny_model):
    cfg = tiny_config(iterations=2, ema_decay=0.99)
    model, seen = tiny_model(cfg), []
    loader = t.Loader(fixed_data(cfg).train, cfg, t.Run())
    optimizer, mean = t.Optimizer(model, cfg, t.Run()), weights_of(model)
    for step, decay in enumerate((2 / 11, 3 / 12)):
        t.train_step(model, optimizer, next(loader), 8, t.learning_rate(step / 2, cfg))
        seen.append(weights_of(model))
        mean = {name: decay * mean[name] + (1 - decay) * seen[-1][name] for name in mean}
    loader.close()
    trained = tiny_model(cfg)
    train(trained, cfg)
    assert_same_weights(weights_of(trained), mean, rtol=0, atol=1e-5)


def test_training_stops_by_the_clock(tiny_config, tiny_model):
    cfg = tiny_config(iterations=100000, max_wallclock_seconds=0.5, gptq_enabled=False)
    stop = train(tiny_model(cfg), cfg)
    assert 0 < stop.steps < 1000 and stop.train_s < 5.0


def test_training_stops_after_too_many_bad_steps(tiny_config, tiny_model):
    cfg = tiny_config(iterations=30, tied_embed_lr=1e38, max_bad_steps=2)
    with pytest.raises(t.SettingError, match="3 steps had gradients that are not finite, more than MAX_BAD_STEPS=2"):
        train(tiny_model(cfg), cfg)


def test_compiled_graph_is_compared_with_eager_and_refused_if_it_differs(tiny_config, tiny_model, monkeypatch, capsys):
    model, cfg = tiny_model(tiny_config()), tiny_config()
    t.Optimizer(model, cfg, t.Run())  # lays out the gradients
    for factor in (1.0, 1.03):
        monkeypatch.setattr(t, "compiled", lambda loss_of, _, factor=factor: lambda *args: factor * loss_of(*args))
        if factor == 1.0:
            t.check_graph(model, fixed_batch(cfg), t.Run())
            assert capsys.readouterr().out == "graph_check loss:0.000000 gradient:0.000000\n"
        else:
            with pytest.raises(t.KernelError, match="COMPILE=.: the compiled loss and gradient differ"):
                t.check_graph(model, fixed_batch(cfg), t.Run())
    assert not any(bool(p.grad.any()) for p in model.parameters())


# ---- golden -----------------------------------------------------------------------------------------


def golden_losses():
    """The training losses of ten steps of a fresh tiny model on a fixed text.

    The learning rates are a third of the defaults: at those, rounding alone moves the last loss by 1e-3.
    """
    cfg = build_config(iterations=10, matrix_lr=0.008, tied_embed_lr=0.012, scalar_lr=0.008, muon_weight_decay=0.04)
    model = t.init_weights(t.LM(cfg), cfg.seed)
    optimizer = t.Optimizer(model, cfg, t.Run())
    return [float(t.train_step(model, optimizer, fixed_batch(cfg, seed=step % 2), 4, t.learning_rate(step / 10, cfg)))
            for step in range(10)]


def test_ten_steps_give_the_golden_losses():
    lines = [line.split() for line in GOLDEN.read_text().splitlines()]
    assert [int(step) for step, _ in lines] == list(range(1, 11))
    assert golden_losses() == pytest.approx([float(loss) for _, loss in lines], rel=1e-4)


def test_ranks_that_pick_different_kernels_are_told():
    run = t.Run(rank=5, world_size=8)
    run.gather = lambda mine: [mine] * 7 + [("fla", "varlen")]
    with pytest.raises(t.KernelError, match=r"the ranks picked \[\('fla', 'varlen'\), \('reference', 'sdpa'\)\]"):
        t.resolve_kernels(build_config(), run)


if __name__ == "__main__":
    GOLDEN.write_text("".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(golden_losses(), 1)))
    sys.stdout.write(GOLDEN.read_text())
