"""GPTQ, Hessians and the search that fills the cap, against plain rounding and sums written out by hand."""

import pickle

import pytest
import torch

import train_gpt as t
from conftest import quantize_model, tiny_config, tiny_model


def correlated(seed, R=24, C=40, tokens=300):
    """A weight (R, C) and the Hessian (C, C) of inputs whose channels are mixed."""
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, C, generator=rng) @ torch.randn(C, C, generator=rng)
    return torch.randn(R, C, generator=rng), X.mT @ X


def output_error(W, Q, scale, H):
    """Squared error of the layer's outputs over the calibration tokens."""
    dW = W - t.dequantize(Q, scale)
    return float(((dW @ H) * dW).sum())


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_gptq_with_identity_hessian_is_rounding_to_nearest(bits):
    W, _ = correlated(0)
    Q, scale, _ = t.gptq(W, torch.eye(W.shape[1]), bits, 6.0)
    nearest, nearest_scale = t.quantize(W, bits, 6.0)
    assert torch.equal(Q, nearest) and torch.equal(scale, nearest_scale)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("bits, clip", [(3, 3.0), (4, 4.0), (6, 12.85), (6, 5.0), (8, 20.0)])
def test_gptq_error_is_below_that_of_rounding_on_correlated_inputs(seed, bits, clip):
    W, H = correlated(seed)
    Q, scale, _ = t.gptq(W, H, bits, clip)
    assert output_error(W, Q, scale, H) < output_error(W, *t.quantize(W, bits, clip), H)


@pytest.mark.parametrize("block", [1, 7, 40, 128])
def test_block_size_does_not_change_the_result(block):
    W, H = correlated(1)
    Q, _, _ = t.gptq(W, H, 5, 6.0, block=block)
    assert (Q != t.gptq(W, H, 5, 6.0, block=16)[0]).float().mean() < 0.005  # ties flip with the order of sums


def test_a_stack_of_matrices_gives_what_each_gives_alone():
    (W0, H0), (W1, H1) = correlated(2), correlated(3)
    Q, scale, _ = t.gptq(torch.stack([W0, W1]), torch.stack([H0, H1]), 6, 8.0)
    for i, (W, H) in enumerate([(W0, H0), (W1, H1)]):
        alone, alone_scale, _ = t.gptq(W, H, 6, 8.0)
        assert torch.equal(scale[i], alone_scale) and (Q[i] != alone).float().mean() < 0.005


def test_symbols_stay_in_range_and_scales_are_half_precision():
    W, H = correlated(4)
    Q, scale, _ = t.gptq(W * 100, H, 4, 1.0)
    assert Q.dtype == torch.int8 and int(Q.abs().max()) == 7 and scale.dtype == torch.float16


def test_a_column_without_inputs_is_rounded_to_nearest():
    W, H = correlated(5)
    H[3], H[:, 3] = 0, 0
    Q, scale, _ = t.gptq(W, H, 6, 8.0)
    assert torch.equal(Q[:, 3], t.quantize(W, 6, 8.0)[0][:, 3])
    assert torch.isfinite(t.dequantize(Q, scale)).all()


def test_damping_rises_until_the_hessian_is_positive_definite():
    W, _ = correlated(6)
    x = torch.randn(1, W.shape[1])
    H = x.mT @ x - 0.02 * torch.eye(W.shape[1])  # rank one, and slightly indefinite
    Q, scale, damp = t.gptq(W, H, 6, 8.0, damp=1e-6)
    assert damp > 1e-6 and torch.isfinite(t.dequantize(Q, scale)).all()


def test_a_hessian_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="expected 40 x 40"):
        t.gptq(torch.zeros(4, 40), torch.eye(39), 6, 8.0)


@pytest.fixture(scope="module")
def calibrated():
    """A tiny model, its configuration, and its Hessians from three batches."""
    cfg = tiny_config(stack="gdn swa:a gdn swa:a")
    model = tiny_model(cfg)
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randint(cfg.vocab_size, (2, 49), generator=rng) for _ in range(3)]
    return cfg, model, batches, t.Hessians(model).collect(model, batches, t.Run())


def test_every_multiplied_matrix_gets_a_hessian(calibrated):
    _, model, _, hessians = calibrated
    stored = {name for name, _ in model.named_parameters() if t.route(name).bits}
    assert set(hessians.H) == stored - {"embed.ngram_table"}  # a lookup table multiplies nothing
    for name in stored:
        rows, columns = model.get_parameter(name).shape
        assert hessians.rows[name].shape == (rows,)
        assert name not in hessians.H or hessians.H[name].shape == (columns, columns)


def test_hessian_is_the_sum_of_x_xt_over_all_uses_of_a_shared_matrix(calibrated):
    _, model, batches, hessians = calibrated
    shared, seen = model.blocks[1].mixer, []
    handle = shared.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in batches:
            model(ids[:, :-1])
    handle.remove()
    x = torch.cat(seen)
    assert len(seen) == 2 * len(batches) and shared is model.blocks[3].mixer
    torch.testing.assert_close(hessians.H["blocks.1.mixer.q_proj"], x.mT @ x, rtol=1e-4, atol=1e-3)


def test_observing_leaves_no_trace(calibrated):
    _, model, batches, _ = calibrated
    before = model(batches[0])[0]
    t.Hessians(model).collect(model, batches, t.Run())
    assert t.OBSERVERS == [] and all(p.grad is None for p in model.parameters())
    assert torch.equal(model(batches[0])[0], before)


def test_quantized_errors_fall_with_gptq(calibrated):
    cfg, model, _, hessians = calibrated
    fine = quantize_model(model, hessians, t.replace(cfg, grid="sdclip"), 12.85)
    for name, nearest in quantize_model(model, t.UNCALIBRATED, cfg, 12.85).items():
        if name in hessians.H:
            W, H = model.get_parameter(name).detach(), hessians.H[name]
            assert output_error(W, fine[name].Q, fine[name].scale, H) <= \
                output_error(W, nearest.Q, nearest.scale, H) * 1.001, name


@pytest.fixture(scope="module")
def larger():
    """A model of about 1 M Gaussian weights, whose artifact sizes depend smoothly on the clip."""
    cfg = tiny_config(model_dim=192, stack="gdn*2 swa", gdn_heads=4, gdn_head_dim=48, num_heads=4, num_kv_heads=2)
    return cfg, tiny_model(cfg)


@pytest.mark.parametrize("bits_per_weight", [3.0, 4.0])
def test_the_search_ends_just_under_the_cap(larger, bits_per_weight):
    cfg, model = larger
    weights = sum(p.numel() for n, p in model.named_parameters() if t.route(n).bits)
    most = int(weights * bits_per_weight / 8) + 20_000
    cfg = t.replace(cfg, cap_bytes=most + len(t.code_bytes()))
    clip, _, blob = t.fill_cap(model, cfg, t.UNCALIBRATED, t.Run(), lambda *event, **values: None)
    assert most - t.FILL_SLACK <= len(blob) <= most
    assert clip > 31 * t.FINEST_STEP


def test_a_model_far_below_the_cap_gets_the_finest_grid(larger):
    cfg, model = larger
    clip, _, blob = t.fill_cap(model, cfg, t.UNCALIBRATED, t.Run(), lambda *event, **values: None)
    assert clip == pytest.approx(31 * t.FINEST_STEP) and len(blob) + len(t.code_bytes()) < cfg.cap_bytes


def test_a_model_that_cannot_fit_is_returned_at_the_coarsest_grid(larger):
    cfg, model = larger
    cfg = t.replace(cfg, cap_bytes=len(t.code_bytes()) + 1000)
    clip, _, blob = t.fill_cap(model, cfg, t.UNCALIBRATED, t.Run(), lambda *event, **values: None)
    assert len(blob) > 1000 and clip > 31 * t.COARSEST_STEP / 2


def test_a_clip_set_by_the_user_is_kept(larger):
    cfg, model = larger
    clip, quantized, _ = t.fill_cap(model, t.replace(cfg, matrix_clip_sigmas=9.0), t.UNCALIBRATED, t.Run(),
                                     lambda *event, **values: None)
    name = "blocks.0.mlp.up_proj"
    assert clip == 9.0
    assert torch.equal(quantized[name].Q, t.quantize(model.get_parameter(name).detach(), 6, 9.0)[0])


# ---- GRID=rate ----------------------------------------------------------------------------------


def test_row_sensitivities_are_squared_gradients_of_the_summed_loss(calibrated):
    _, model, batches, hessians = calibrated
    want = 0.0
    for ids in batches:
        loss = t.token_nll(model(ids[:, :-1])[0], ids[:, 1:]).sum()
        want = want + torch.autograd.grad(loss, model.blocks[0].mlp.up_proj)[0].square().sum(1)
    torch.testing.assert_close(hessians.rows["blocks.0.mlp.up_proj"], want)
    assert hessians.counts.sum() == sum(ids[:, 1:].numel() for ids in batches)


def expected_nats(quantized):
    return sum(q.nats for q in quantized.values())


@pytest.fixture(scope="module")
def uneven(calibrated):
    """The calibrated model and Hessians, some rows of which matter a hundred times more."""
    cfg, model, _, hessians = calibrated
    rows = {name: x * torch.where(torch.arange(len(x)) % 4 == 0, 100.0, 1.0) for name, x in hessians.rows.items()}
    return cfg, model, hessians._replace(rows=rows)


def test_rate_grid_spends_bytes_where_they_count(uneven):
    """At no more entropy than SDClip's grid the expected rise of the loss is less than half."""
    cfg, model, hessians = uneven
    usual = t.Quantizer(model, t.replace(cfg, grid="sdclip"), hessians, t.Run()).at(12.85)
    for strength in (0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0):
        rate = t.Quantizer(model, cfg, hessians, t.Run()).at(strength)
        if t.entropy_bytes(rate) <= t.entropy_bytes(usual):
            break
    assert t.entropy_bytes(rate) <= t.entropy_bytes(usual)
    assert expected_nats(rate) < 0.5 * expected_nats(usual)


@pytest.mark.parametrize("strength", [0.01, 0.3, 8.0])
def test_rate_grid_stays_in_range_and_halves_its_error_per_step(uneven, strength):
    cfg, model, hessians = uneven
    quantizer = t.Quantizer(model, cfg, hessians, t.Run())
    for name, q in quantizer.at(strength).items():
        W = model.get_parameter(name).detach()
        assert int(q.Q.abs().max()) <= 127 and torch.isfinite(t.dequantize(q.Q, q.scale, q.columns)).all()
        if strength == 0.01:
            assert (t.dequantize(q.Q, q.scale, q.columns) - W).norm() < 0.05 * W.norm(), name
    assert expected_nats(quantizer.at(strength)) < expected_nats(quantizer.at(4 * strength))


def test_order_of_columns_is_undone(calibrated):
    cfg, model, _, hessians = calibrated
    for grid, strength in (("rate", 0.05), ("sdclip", 8.0)):
        ordered = quantize_model(model, hessians, t.replace(cfg, grid=grid, gptq_order=True, matrix_bits=8), strength)
        for name, q in ordered.items():
            W = model.get_parameter(name).detach()
            assert (t.dequantize(q.Q, q.scale, q.columns) - W).norm() < 0.1 * W.norm(), name


def test_hessian_that_is_not_finite_falls_back_to_rounding_and_says_so(calibrated):
    cfg, model, _, hessians = calibrated
    name, cfg = "blocks.0.mlp.up_proj", t.replace(cfg, grid="sdclip")
    bad = hessians._replace(H=hessians.H | {name: torch.full_like(hessians.H[name], float("nan"))})
    quantized, lines = quantize_model(model, bad, cfg, 12.85), {}
    t.log_roles(t.pack_artifact(model, cfg, quantized), quantized, lambda event, **of: lines.update({event: of}))
    assert (lines["quantized"]["no_hessian"], lines["quantized"]["fell_back"]) == (1, 1)  # the n-gram table; this one
    q = quantized[name]
    nearest = t.quantize(model.get_parameter(name).detach(), 6, 12.85)[0]
    assert q.damp == float("inf") and torch.equal(q.Q, nearest)


@pytest.mark.parametrize("grid", ["rate", "sdclip"])
def test_ranks_share_the_matrices_and_agree_with_one(calibrated, grid, monkeypatch):
    """Three ranks in one process: each quantizes its share; what they exchange is what one rank makes alone."""
    cfg, model, _, hessians = calibrated
    cfg = t.replace(cfg, grid=grid)
    strength = 0.3 if grid == "rate" else 12.85
    alone, sums = t.Quantizer(model, cfg, hessians, t.Run()).at(strength), [0.0, 0.0]
    for rank in range(3):
        monkeypatch.setattr(t.Run, "gather", lambda self, values: sums.__setitem__(
            slice(None), [a + b for a, b in zip(sums, values)]) or [[values[0], max(1.0, values[1])]])
        t.Quantizer(model, cfg, hessians, t.Run(rank=rank, world_size=3))
    monkeypatch.setattr(t.Run, "gather", lambda self, values: [list(sums)])
    quantizers = [t.Quantizer(model, cfg, hessians, t.Run(rank=rank, world_size=3)) for rank in range(3)]
    parts = []
    monkeypatch.setattr(t.Run, "gather", lambda self, part: parts.append(pickle.dumps(part)) or [part])
    for quantizer in quantizers:
        quantizer.at(strength)
    monkeypatch.setattr(t.Run, "gather", lambda self, part: [pickle.loads(one) for one in parts[:3]])
    got = quantizers[1].at(strength)
    assert not set(quantizers[0].shares[0]) & set(quantizers[0].shares[1])
    for name, q in alone.items():
        assert (got[name].Q != q.Q).float().mean() < 0.005 and torch.equal(got[name].scale, q.scale), name


# ---- options of the entries -----------------------------------------------------------------------


def test_sandwich_frequent_rows_and_float_matrices(calibrated):
    cfg, model, _, hessians = calibrated
    cfg = t.replace(cfg, grid="sdclip", matrix_bits=5, embed_bits=4, embed_clip_sigmas=6.0, sandwich_bits=8,
                    frequent_rows=5, float_matrices=2, matrix_clip_sigmas=9.0)
    quantized = quantize_model(model, hessians, cfg, 9.0)
    assert quantized["blocks.3.mlp.up_proj"].bits == 8 and quantized["blocks.2.mlp.up_proj"].bits == 5
    assert quantized["blocks.1.mixer.q_proj"].bits == 8  # shared with the last block
    top = hessians.counts.topk(5).indices
    rest = torch.ones(cfg.vocab_size, dtype=torch.bool).index_fill(0, top, False)
    Q = quantized["embed.weight"].Q
    assert (Q[top].abs().amax(1) > 7).all() and int(Q[rest].abs().max()) <= 7
    _, kept, blob = t.fill_cap(model, cfg, hessians, t.Run(), lambda *event, **values: None)
    assert len(quantized) - len(kept) == 2
    worst = max(quantized, key=lambda name: quantized[name].rel_error / quantized[name].Q.numel())
    assert torch.equal(t.load_artifact(blob).get_parameter(worst), model.get_parameter(worst).half().float())


@pytest.mark.parametrize("grid", ["rate", "sdclip"])
def test_a_model_of_float_matrices_alone_comes_back(calibrated, grid):
    cfg, model, _, hessians = calibrated
    _, kept, blob = t.fill_cap(model, t.replace(cfg, grid=grid, float_matrices=1000), hessians, t.Run(),
                               lambda *event, **values: None)
    assert kept == {}
    for (name, p), q in zip(model.named_parameters(), t.load_artifact(blob).parameters()):
        assert torch.equal(q, p if p.numel() <= 64 else p.half().float()), name


def test_tokens_weighted_by_frequency_change_the_hessian_not_its_scale(calibrated):
    cfg, _, batches, hessians = calibrated
    weighted = tiny_model(t.replace(cfg, gptq_token_power=0.5))
    got = t.Hessians(weighted).collect(weighted, batches, t.Run()).H["blocks.0.mlp.up_proj"]
    H = hessians.H["blocks.0.mlp.up_proj"]
    assert not torch.allclose(got, H) and got.trace() == pytest.approx(float(H.trace()), rel=0.1)


def test_own_text_begins_with_bos_and_is_drawn_from_the_model(calibrated):
    cfg, model, *_ = calibrated
    ids = t.own_text(model, 3, 0, t.Run())
    assert ids.shape == (3, cfg.train_seq_len + 1) and (ids[:, 0] == cfg.bos_id).all()
    assert 0 <= int(ids.min()) and int(ids.max()) < cfg.vocab_size
    assert torch.equal(ids, t.own_text(model, 3, 0, t.Run())) and not torch.equal(ids, t.own_text(model, 3, 1, t.Run()))


@pytest.mark.parametrize("bits_per_weight", [3.0, 4.0])
def test_the_rate_search_ends_just_under_the_cap(larger, bits_per_weight):
    cfg, model = larger
    rng = torch.Generator().manual_seed(0)
    hessians = t.Hessians(model).collect(model, [torch.randint(cfg.vocab_size, (4, 65), generator=rng)], t.Run())
    weights = sum(p.numel() for n, p in model.named_parameters() if t.route(n).bits)
    most = int(weights * bits_per_weight / 8) + 20_000
    cfg = t.replace(cfg, cap_bytes=most + len(t.code_bytes()))
    lines = []
    _, _, blob = t.fill_cap(model, cfg, hessians, t.Run(), lambda *event, **values: lines.append(event))
    assert most - t.FILL_SLACK <= len(blob) <= most and len(lines) <= t.FILL_ROUNDS


def test_calibration_ends_inside_the_clock(calibrated):
    """Each batch takes a tenth of a second on a clock that has twelve of them left: fewer batches than twenty.

    A run that ends 0.05 s after its clock is void, so half a second is left for what follows the last batch.
    """
    cfg, model, batches, _ = calibrated
    cfg = t.replace(cfg, max_wallclock_seconds=10.0, gptq_calibration_batches=20, gptq_reserve_seconds=1.0)
    seen, lines, run = [], {}, t.Run()

    class Ticking:
        def elapsed(self):
            return 8.8 + 0.1 * len(seen)

    def loader():
        while True:
            seen.append(batches[0].repeat(4, 1))
            yield seen[-1]
    run.log = lambda event, **values: lines.update(values)
    hessians = t.calibrate(model, loader(), cfg, run, Ticking())
    assert 2 < len(seen) < 10 and int(hessians.counts.sum()) == 48 * 8 * (len(seen) - 1)
    assert lines["tokens"] < lines["wanted_tokens"] and float(lines["hessian_end_s"]) <= 9.5
