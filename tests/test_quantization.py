"""GPTQ, Hessians and the search that fills the cap, against plain rounding and sums written out by hand."""

import pytest
import torch

import train_gpt as t
from conftest import tiny_config, tiny_model


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
    batches = [torch.randint(cfg.vocab_size, (2, 48), generator=rng) for _ in range(3)]
    return cfg, model, batches, t.Hessians(model).collect(model, batches, t.Run())


def test_every_multiplied_matrix_gets_a_hessian(calibrated):
    _, model, _, hessians = calibrated
    stored = {name for name, _ in model.named_parameters() if t.route(name).bits}
    assert set(hessians) == stored - {"embed.ngram_table"}  # a lookup table is multiplied by nothing
    for name, p in model.named_parameters():
        if name in hessians:
            assert hessians[name].shape == (p.shape[1],) * 2


def test_hessian_is_the_sum_of_x_xt_over_all_uses_of_a_shared_matrix(calibrated):
    _, model, batches, hessians = calibrated
    shared, seen = model.blocks[1].mixer, []
    handle = shared.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in batches:
            model(ids)
    handle.remove()
    x = torch.cat(seen)
    assert len(seen) == 2 * len(batches) and shared is model.blocks[3].mixer
    torch.testing.assert_close(hessians["blocks.1.mixer.q_proj"], x.mT @ x, rtol=1e-4, atol=1e-3)


def test_observing_leaves_no_trace(calibrated):
    _, model, batches, _ = calibrated
    before = model(batches[0])[0]
    t.Hessians(model).collect(model, batches, t.Run())
    assert t.OBSERVERS == [] and torch.equal(model(batches[0])[0], before)


def test_quantized_errors_fall_with_gptq(calibrated):
    cfg, model, _, hessians = calibrated
    fine = t.quantize_model(model, hessians, cfg, 12.85)
    for name, nearest in t.quantize_model(model, {}, cfg, 12.85).items():
        if name in hessians:
            W, H = model.get_parameter(name).detach(), hessians[name]
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
    clip, _, blob = t.fill_cap(model, cfg, {}, lambda *event, **values: None)
    assert most - t.FILL_SLACK <= len(blob) <= most
    assert clip > t.LEAST_CLIP


def test_a_model_far_below_the_cap_gets_the_finest_grid(larger):
    cfg, model = larger
    clip, _, blob = t.fill_cap(model, cfg, {}, lambda *event, **values: None)
    assert clip == t.LEAST_CLIP and len(blob) + len(t.code_bytes()) < cfg.cap_bytes


def test_a_model_that_cannot_fit_is_returned_at_the_coarsest_grid(larger):
    cfg, model = larger
    cfg = t.replace(cfg, cap_bytes=len(t.code_bytes()) + 1000)
    clip, _, blob = t.fill_cap(model, cfg, {}, lambda *event, **values: None)
    assert len(blob) > 1000 and clip > t.MOST_CLIP / 2


def test_a_clip_set_by_the_user_is_kept(larger):
    cfg, model = larger
    clip, quantized, _ = t.fill_cap(model, t.replace(cfg, matrix_clip_sigmas=9.0), {}, lambda *event, **values: None)
    name = "blocks.0.mlp.up_proj"
    assert clip == 9.0
    assert torch.equal(quantized[name].Q, t.quantize(model.get_parameter(name).detach(), 6, 9.0)[0])
