"""GPTQ, Hessians, both grids and the search that fills the cap, against plain rounding and sums
written out by hand.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import fixed_data, tiny_config, tiny_model, weight_of

import train_gpt as t

SDCLIP = dict(grid="sdclip", matrix_clip_sigmas=12.85)


def correlated(seed, R=24, C=40, tokens=300):
    """A weight (R, C) and the Hessian (C, C) of inputs whose channels are mixed."""
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, C, generator=rng) @ torch.randn(C, C, generator=rng)
    return torch.randn(R, C, generator=rng), X.mT @ X


def nearest(W, step, qmax):
    return (W / step).round().clamp(-qmax, qmax).to(torch.int8)


@pytest.mark.parametrize("qmax", [1, 7, 31, 127])
def test_gptq_rounds_to_nearest_where_no_error_can_be_corrected(qmax):
    """With an identity as Hessian, and a column without inputs with any."""
    W, H = correlated(0)
    step = torch.full((24, 1), 3.0 / qmax)
    assert torch.equal(t.gptq(W, step, torch.eye(40), qmax), nearest(W, step, qmax))
    H[3] = 0
    H[:, 3] = 0
    assert torch.equal(t.gptq(W, step, H, qmax)[:, 3], nearest(W, step, qmax)[:, 3])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("qmax, clip", [(3, 3.0), (31, 12.85), (31, 5.0), (127, 20.0)])
def test_gptq_error_is_below_that_of_rounding_on_correlated_inputs(seed, qmax, clip):
    W, H = correlated(seed)
    step = clip * W.std(1, keepdim=True) / qmax
    wrong = [W - Q.float() * step for Q in (t.gptq(W, step, H, qmax), nearest(W, step, qmax))]
    ours, plain = [float(((dW @ H) * dW).sum()) for dW in wrong]  # of the layer's outputs
    assert ours < plain


def test_matrices_of_one_shape_are_rounded_as_each_alone_in_blocks_of_any_size():
    pairs = [correlated(seed) for seed in (2, 3)]
    U = torch.stack([t.error_factor(H)[0] for _, H in pairs])
    step = torch.full((2, 24, 1), 0.1)
    Q = t.gptq(torch.stack([W for W, _ in pairs]), step, None, torch.full((2, 24), 31), U)
    for both, (W, H) in zip(Q, pairs):
        for block in (1, 7, 16, 128):  # ties flip with the order of sums
            alone = t.gptq(W, step[0], H, 31, block=block)
            assert (both != alone).float().mean() < 0.005, block


def test_each_row_keeps_to_its_own_largest_integer():
    W, H = correlated(4)
    qmax = torch.tensor([3, 31]).repeat(12)
    Q = t.gptq(100 * W, torch.ones(24, 1), H, qmax)
    assert Q.dtype == torch.int8 and torch.equal(Q.abs().amax(1), qmax.to(torch.int8))


def test_damping_rises_until_the_hessian_is_positive_definite():
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    U, damp = t.error_factor(x.mT @ x - 0.02 * torch.eye(40), damp=1e-6)  # slightly indefinite
    assert 1e-6 < damp < 1 and U.isfinite().all()
    with pytest.raises(t.GolfError, match="not finite"):
        t.error_factor(torch.full((40, 40), float("nan")))


@pytest.fixture(scope="module")
def calibrated():
    """A tiny model, three batches, and its Calibration by them."""
    model = tiny_model(tiny_config())
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randint(64, (2, 49), generator=rng) for _ in range(3)]
    return model, batches, t.collect_hessians(model, batches, t.Run())


@pytest.mark.parametrize("settings, name, mixers", [
    ({}, "blocks.1.mixer.q_proj", [1]),
    (dict(stack="gdn*2", kv_share=2), "blocks.0.mixer.kv.k_proj", [0, 1])], ids=["tag", "KV_SHARE"])
def test_hessian_sums_x_xt_over_all_uses_of_a_shared_matrix(calibrated, settings, name, mixers):
    batches = calibrated[1]
    model = tiny_model(tiny_config(**settings))
    H = t.collect_hessians(model, batches, t.Run()).H[name]
    seen = []
    for i in mixers:
        model.blocks[i].mixer.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in batches:
            model(ids[:, :-1])
    x = torch.cat(seen)
    assert len(x) == 2 * 3 * 2 * 48  # two layers
    torch.testing.assert_close(H, x.mT @ x, rtol=1e-4, atol=1e-3)


def test_row_sensitivities_are_squared_gradients_of_the_summed_loss(calibrated):
    """Every stored matrix has them, and a Hessian unless nothing is multiplied with it."""
    model, batches, calibration = calibrated
    stored = {name for name, _ in model.named_parameters() if t.route(name).bits}
    assert set(calibration.rows) == stored and t.OBSERVERS == []
    assert set(calibration.H) == stored - {"embed.ngram_table"}  # a lookup multiplies nothing
    want = torch.zeros(128)
    for ids in batches:
        nats, _ = model.nll(ids[:, :-1], ids[:, 1:])
        grad, = torch.autograd.grad(nats.sum(), model.blocks[0].mlp.up_proj)
        want += grad.square().sum(1)
    torch.testing.assert_close(calibration.rows["blocks.0.mlp.up_proj"], want)


def test_token_weights_change_the_hessian_and_not_its_scale(calibrated):
    model, batches, calibration = calibrated
    weighted = tiny_model(replace(model.cfg, gptq_token_power=0.5))
    H, got = [c.H["blocks.0.mlp.up_proj"] for c in (
        calibration, t.collect_hessians(weighted, batches, t.Run()))]
    assert not torch.allclose(got, H, rtol=1e-3)
    assert float(got.trace()) == pytest.approx(float(H.trace()), rel=0.1)


def test_calibration_ends_inside_the_clock(calibrated):
    """Each batch takes 0.1 s of a clock with 1.2 s left, half of which is kept for the rest."""
    model, batches, _ = calibrated
    cfg = replace(model.cfg, max_wallclock_seconds=10.0, gptq_calibration_batches=20)
    seen = []
    clock = SimpleNamespace(elapsed=lambda: 8.8 + 0.1 * len(seen))

    def loader():
        while True:
            seen.append(batches[0].repeat(4, 1))
            yield seen[-1]
    calibration = t.calibrate(model, loader(), cfg, t.Run(), clock)
    assert 2 < len(seen) < 10
    assert int(calibration.counts.sum()) == 48 * 8 * (len(seen) - 1)


def matrices_of(model, calibration, run=None, **settings):
    """{name: Matrix} of this rank."""
    cfg = replace(model.cfg, **settings)
    return {m.name: m for m in t.prepare_matrices(model, cfg, calibration, run or t.Run())}


@pytest.mark.parametrize("name, bits, clip", [
    ("blocks.0.mlp.up_proj", 5, 9.0), ("blocks.0.mixer.q_proj", 6, 9.0), ("embed.weight", 8, 20.0),
    ("blocks.0.mixer.a_proj", 8, 20.0)])
def test_sdclip_step_is_the_clip_over_the_largest_integer(calibrated, name, bits, clip):
    model, _, calibration = calibrated
    matrix = matrices_of(model, calibration, mlp_bits=5, grid="sdclip")[name]
    step, columns = matrix.steps(9.0 / t.SDCLIP_QMAX)
    want = clip * model.get_parameter(name).detach().std(1, correction=0) / (2 ** (bits - 1) - 1)
    torch.testing.assert_close(step.float(), want, rtol=2**-10, atol=0)
    assert torch.equal(columns, torch.ones(len(columns))) and step.dtype == torch.float16
    odd = t.sdclip_step(torch.tensor([[0.0], [1e-30], [1e-4], [1e3]]) * torch.ones(4, 5), 6, 12.85)
    assert odd.isfinite().all() and (odd > 0).all()


def test_rate_step_is_inverse_to_a_rows_effect_on_the_loss(calibrated):
    """Rows that matter 100 times more get steps 100 ** (SENSITIVITY_POWER / 2) times finer."""
    model, _, calibration = calibrated
    name = "blocks.0.mlp.up_proj"
    even = torch.where(torch.arange(128) % 4 == 0, 100.0, 1.0)
    uneven = calibration._replace(rows=calibration.rows | {name: even})
    step, columns = matrices_of(model, uneven, grid="rate")[name].steps(0.3)
    ratio = float(step[1::4].float().median() / step[::4].float().median())
    assert ratio == pytest.approx(100 ** (t.SENSITIVITY_POWER / 2), rel=0.1)
    assert columns.shape == (64,)


@pytest.mark.parametrize("grid, strength, error", [
    ("rate", 0.01, 0.1), ("rate", 0.02, 0.1), ("rate", 0.3, 0.5), ("rate", 8.0, 3.0),
    ("sdclip", 0.25, 0.1)])
def test_quantized_matrix_stands_for_the_weight_in_its_own_order(calibrated, grid, strength, error):
    """Columns are rounded in another order, which must be undone."""
    model, _, calibration = calibrated
    matrices = list(matrices_of(model, calibration, grid=grid, matrix_bits=8).values())
    weights = sum(m.W.numel() for m in matrices)
    unit = math.exp(sum(m.log_step for m in matrices) / weights)
    for name, q in t.quantize(matrices, strength / unit).items():
        W = model.get_parameter(name).detach()
        assert (weight_of(q) - W).norm() < error * W.norm(), name
        assert int(q.Q.int().abs().max()) <= 127, name


def test_ranks_share_the_matrices_and_agree_with_one(calibrated):
    model, _, calibration = calibrated
    alone, *ranks = [t.quantize(list(matrices_of(model, calibration, run).values()), 0.3)
                     for run in (t.Run(), *[t.Run(rank, 3) for rank in range(3)])]
    assert all(ranks) and sorted(name for mine in ranks for name in mine) == sorted(alone)
    for mine in ranks:
        for name, q in mine.items():
            assert (q.Q != alone[name].Q).float().mean() < 0.005, name  # ties


def test_options_choose_bits_by_matrix_and_row(calibrated):
    model, _, calibration = calibrated
    options = matrices_of(model, calibration, matrix_bits=5, embed_bits=4, sandwich_bits=8,
                          frequent_rows=5, **SDCLIP)
    bits = {name: sorted(set(m.bits.tolist())) for name, m in options.items()}
    assert bits["blocks.2.mlp.up_proj"] == [5] and bits["blocks.3.mlp.up_proj"] == [8]
    assert bits["blocks.1.mixer.q_proj"] == [8]  # shared with the last block
    assert bits["embed.weight"] == [4, 8]
    top = options["embed.weight"].bits == 8
    assert set(top.nonzero().flatten().tolist()) == set(calibration.counts.topk(5).indices.tolist())


@pytest.fixture(scope="module")
def larger():
    """A model of some 200,000 weights, and its Calibration by two batches."""
    cfg = tiny_config(model_dim=96, stack="gdn*2 swa", gdn_heads=4, gdn_head_dim=24, mlp_mult=3.0)
    model = tiny_model(cfg)
    batch = torch.from_numpy(fixed_data(cfg).val[:780].astype("int64")).view(12, 65)
    return model, t.collect_hessians(model, [batch[:6], batch[6:]], t.Run())


def fill(larger, most, monkeypatch, **settings):
    """fill_cap with `most` bytes for the model and a slack of 1 % of them."""
    model, calibration = larger
    monkeypatch.setattr(t, "FILL_SLACK", most // 100)
    cfg = replace(model.cfg, cap_bytes=most + len(t.code_bytes()), **settings)
    return t.fill_cap(model, cfg, calibration, t.Run())


@pytest.mark.parametrize("grid", ["rate", "sdclip"])
@pytest.mark.parametrize("bits_per_weight", [3.0, 4.0])
def test_the_search_ends_just_under_the_cap(larger, monkeypatch, grid, bits_per_weight):
    weights = sum(p.numel() for name, p in larger[0].named_parameters() if t.route(name).bits)
    most = int(weights * bits_per_weight / 8) + 8000
    _, _, blob = fill(larger, most, monkeypatch, grid=grid)
    assert 0.99 * most <= len(blob) <= most


def test_a_model_far_from_the_cap_gets_the_finest_grid_or_the_smallest_size(larger, monkeypatch,
                                                                            capsys):
    strength, _, _ = fill(larger, 10**7, monkeypatch, grid="sdclip")
    assert strength == t.FINEST_STEP
    capsys.readouterr()
    _, _, blob = fill(larger, 1000, monkeypatch, grid="sdclip")
    sizes = [int(line.split("model_bytes:")[1].split()[0])
             for line in capsys.readouterr().out.splitlines() if "model_bytes:" in line]
    assert len(blob) == min(sizes) > 1000


def test_float_matrices_leaves_the_worst_ones_out(larger, monkeypatch):
    every, kept = [fill(larger, 10**7, monkeypatch, float_matrices=n, **SDCLIP)[1] for n in (0, 2)]
    error = {name: q.rel_error / q.Q.numel() for name, q in every.items()}
    assert set(every) - set(kept) == set(sorted(error, key=error.get)[-2:])
