"""The fast versions of the three operations against the references, whose own tests are in
test_model.py.  On the CPU: how kernels are chosen and wired, with the references in their place.
On a GPU: every installed kernel, the compiled model, the check of the fast path, CUDA graphs.
"""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from inspect import signature
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, fixed_data, tiny_config, tiny_model
from test_model import dense_attention, normal, random_ids, results_and_gradients

import train_gpt as t

TOLERANCE = 0.02  # relative, of bfloat16 kernels; each product rounds to 0.4 %


def gdn_inputs(T, H, K, device="cpu", dtype=torch.float32, decay=0.0, spare=0):
    """Inputs of `gdn`: projections and tail in `dtype`, the others float32 as in the model."""
    W = H * K
    x = dict(proj=normal(2, T, 4 * W + 2 * H + spare).to(dtype), taps=normal(3 * W, 4, seed=1) / 2,
             A_log=normal(H, seed=2) + decay, dt_bias=normal(H, seed=3) - 2.0 + decay,
             norm=normal(K, seed=4), tail=normal(2, 3, 3 * W, seed=5).to(dtype),
             state=normal(2, H, K, K, seed=6))
    return {name: y.to(device, y.dtype if y.dtype == dtype else torch.float32)
            for name, y in x.items()}


def gdn_results(kernel, inputs, used=slice(2)):
    """The used results and the gradients of `gdn` by a kernel, or None: by the reference."""
    rule = t.gdn if kernel is None else partial(t.fast_gdn, kernel=kernel)
    x = dict(inputs)
    tail = x.pop("tail")  # it has no gradient: a state is detached
    return results_and_gradients(lambda **y: rule(**y, tail=tail)[used], x)


def in_double(inputs):
    return {name: x.double() for name, x in inputs.items()}


def relative_error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def assert_near(got, want, most=TOLERANCE):
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) < most, errors


def gradients(function, inputs, grads):
    """Gradients of function(*inputs), also inside an operator, where autograd is off."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with ThreadPoolExecutor(1) as pool:  # in a new thread it is on
        return pool.submit(
            lambda: torch.autograd.grad(function(*leaves), leaves, grads, allow_unused=True)
        ).result()


def conv_by_reference(proj, taps, tail, heads, dproj=None, dtaps=None):
    H, K = heads[0].shape[2:]
    W = 3 * H * K

    def forward(x, w):
        return t.conv_heads(x[..., :W], w, tail, H)
    if dproj is None:
        t.copy_all(heads, forward(proj, taps))
        return
    dx, dw = gradients(forward, (proj, taps), heads)
    dproj[..., :W] = dx[..., :W]
    dtaps.zero_()[0] = dw.mT


def norm_by_reference(o, proj, norm, y, do=None, dproj=None, dnorm=None):
    W = o.shape[2:].numel()

    def forward(o, x, w):
        return t.gated_norm(o, x[..., 3 * W:4 * W], w).flatten(2)
    if do is None:
        y.copy_(forward(o, proj, norm))
        return
    found, dx, dw = gradients(forward, (o, proj, norm), y)
    do.copy_(found)
    dproj[..., 3 * W:4 * W] = dx[..., 3 * W:4 * W]
    dnorm.zero_()[0] = dw


def gates_by_reference(proj, first, A_log, dt_bias, g, beta, dproj=None, sums=None):
    H = len(A_log)

    def forward(x, A_log, dt_bias):
        a, b = x[..., first:first + 2 * H].float().chunk(2, -1)
        return -A_log.exp() * F.softplus(a + dt_bias), b.sigmoid()
    if sums is None:
        t.copy_all([g, beta], forward(proj, A_log, dt_bias))
        return
    dx, dA, ddt = gradients(forward, (proj, A_log, dt_bias), (g, beta))
    dproj[..., first:] = dx[..., first:]
    sums.zero_()[0] = torch.stack([dA, ddt])


LAUNCHES = {"conv": conv_by_reference, "norm": norm_by_reference, "gates": gates_by_reference}


@pytest.fixture(params=["fla", "flashqla"])
def stand_in(request, monkeypatch):
    """The name of a delta-rule kernel; it and the others compute what the references do.

    FlashQLA's backward pass gets no initial state; it is left in `h`, where the states are kept.
    """
    def forward(q, k, v, g, beta, scale, initial_state, **_):
        assert scale == q.shape[-1] ** -0.5
        o, final = t.delta_rule(q, k, v, g, beta, initial_state)
        return g.clone(), q.new_zeros(*g.shape, t.GDN_CHUNK), o.contiguous(), final

    def fla(**x):
        G, A, o, final = forward(**x)
        return G, o, A, final, None, None

    def flashqla(output_h, auto_cp, **x):
        G, A, o, final = forward(**x)
        chunks = -(-o.shape[1] // t.GDN_CHUNK)
        h = x["initial_state"].unsqueeze(1).repeat(1, chunks, 1, 1, 1) if output_h else None
        return G, A, o, h, final, None

    def backward(q, k, v, g, beta, A, scale, do, dht, initial_state=None, h=None):
        first = initial_state if h is None else h[:, 0]
        dq, dk, dv, dg, dbeta, dstate = gradients(
            t.delta_rule, (q, k, v, g, beta, first), (do, dht))
        return dq, dk, dv, dbeta, dg, dstate
    monkeypatch.setattr(t, "_fla", lambda: (fla, backward))
    monkeypatch.setattr(t, "_flash_qla", lambda: (flashqla, backward))
    for name, function in LAUNCHES.items():
        monkeypatch.setattr(t, f"_launch_{name}", function)
    return request.param


@pytest.mark.parametrize("used, spare", [(slice(2), 3), (slice(1), 0), (slice(1, 2), 0)],
                         ids=["both results", "y alone", "state alone"])
def test_operator_hands_every_gradient_to_its_input(stand_in, used, spare):
    x = gdn_inputs(70, 2, 8, spare=spare)
    got, want = [gdn_results(kernel, x, used) for kernel in (stand_in, None)]
    assert_same(got, want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # outside of training no states are kept
        assert t._gdn_forward(*x.values(), stand_in, False)[-1].numel() == 0


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_flash_attention_is_asked_for_the_window(returns_tuple):
    def flash(q, k, v, causal, window_size):
        assert causal and window_size[1] == 0
        o = dense_attention(q, k, v, window_size[0] + 1)
        return (o, None) if returns_tuple else o
    x = [normal(2, 10, 4, 8), normal(2, 25, 2, 8), normal(2, 25, 2, 8, seed=1)]
    torch.testing.assert_close(t.flash_attention(flash, *x, 16), t.attention(*x, 16))


BOTH = ("flash_qla", "fla")


@pytest.fixture
def pick(monkeypatch):
    """pick(installed, capability, **settings): the names of fast_ops on a pretended GPU."""
    def call(installed, capability, **settings):
        for name in BOTH:
            missing = None if name in installed else ImportError(f"No module named {name}")
            monkeypatch.setattr(t, "_" + name, mock.Mock(side_effect=missing))
        monkeypatch.setattr(t, "pick_attention", lambda: ("varlen", None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        run = SimpleNamespace(on_cuda=True, device=torch.device("cuda"))
        return t.fast_ops(t.Config(**settings), run)
    return call


@pytest.mark.parametrize("installed, capability, settings, expected", [
    (BOTH, (9, 0), {}, "flashqla"), (BOTH, (9, 0), dict(kernel="fla"), "fla"),
    (BOTH, (9, 0), dict(gdn_heads=5), "fla"), (BOTH, (8, 0), {}, "fla"),
    (("fla",), (9, 0), {}, "fla"), (BOTH, (9, 0), dict(gdn_heads=8, gdn_head_dim=64), "fla"),
    ((), (9, 0), dict(preset="sample"), "reference"),
    (BOTH, (9, 0), dict(kernel="reference"), "reference"), ((), (9, 0), {}, None),
    (("fla",), (9, 0), dict(kernel="flashqla"), None), ((), (9, 0), dict(stack="attn*2"), "none"),
    (BOTH, (9, 0), dict(kernel="flashqla", gdn_heads=5), None)])
def test_gdn_kernel_is_the_fastest_that_fits(pick, installed, capability, settings, expected):
    with nullcontext() if expected else pytest.raises(t.GolfError, match="KERNEL="):
        assert pick(installed, capability, **settings).names["gdn"] == expected


@pytest.mark.parametrize("settings, capability, fused", [
    ({}, (9, 0), True), (dict(mlp_act="leaky_relu2"), (9, 0), False), ({}, (8, 0), False),
    (dict(mlp_mult=1.03), (9, 0), False), (dict(model_dim=64), (9, 0), False),
    ({}, (10, 0), False)])
def test_the_mlp_is_fused_where_its_kernel_runs(pick, settings, capability, fused):
    ops = pick(BOTH, capability, **(dict(model_dim=128, num_heads=4) | settings))
    assert (ops.mlp is t.fast_mlp) == fused


gpu = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
HOPPER = pytest.mark.skipif(not HAS_GPU or torch.cuda.get_device_capability()[0] != 9,
                            reason="the fused MLP is for GPUs of compute capability 9")
# Without a GPU all are listed, and skipped.
GDN_KERNELS = [k for k, package in {"fla": "fla", "flashqla": "flash_qla"}.items()
               if not HAS_GPU or importlib.util.find_spec(package)]
GDN_CASES = [(kernel, H, K) for kernel in GDN_KERNELS for H, K in ((4, 128), (8, 64), (3, 32))
             if kernel == "fla" or K == 128]


@gpu
@pytest.mark.parametrize("kernel, H, K", GDN_CASES)
@pytest.mark.parametrize("T", [1, 64, 200, 513])
def test_cuda_gdn_equals_the_reference(kernel, H, K, T):
    """Results, final state and all gradients, from a carried state.

    With triton 3.6, FLA's narrow heads are where its own backward kernel would be wrong.
    """
    x = gdn_inputs(T, H, K, "cuda", torch.bfloat16, spare=5)
    assert_near(gdn_results(kernel, x), gdn_results(None, in_double(x)))


@gpu
@pytest.mark.parametrize("kernel, H, K", GDN_CASES)
def test_cuda_gdn_repeats_bit_for_bit_and_survives_strong_decay(kernel, H, K):
    for decay in (0.0, 3.0):
        x = gdn_inputs(513, H, K, "cuda", torch.bfloat16, decay=decay)
        a, b = [gdn_results(kernel, x) for _ in range(2)]
        assert all(a[part].isfinite().all() and torch.equal(a[part], b[part]) for part in a)


def launch_results(function, name, T, H, K, device="cuda"):
    """What the launch of a kernel of `fast_gdn` writes, forward then backward, in float32."""
    x = gdn_inputs(T, H, K, device, spare=T % 3)
    heads = [normal(2, T, H, K, seed=seed).to(device) for seed in (7, 8, 9)]
    gates = [normal(2, T, H, seed=seed).to(device) for seed in (7, 8)]
    dproj = torch.zeros_like(x["proj"])
    M = 2 * T
    if name == "conv":
        same = x["proj"], x["taps"], x["tail"]
        outputs, grads = [torch.empty_like(h) for h in heads], heads
        sums = torch.empty(2 * -(-T // t.CONV_ROWS), 4, 3 * H * K, device=device)
        function(*same, outputs)
        function(*same, grads, dproj, sums)
    elif name == "norm":
        same = heads[0], x["proj"], x["norm"]
        outputs = [torch.empty(2, T, H * K, device=device), torch.empty_like(heads[0])]
        sums = torch.empty(-(-M * H // (t.NORM_ROWS * t.NORM_TILES)), K, device=device)
        function(*same, outputs[0])
        function(*same, heads[1].flatten(2), outputs[1], dproj, sums)
    else:
        same = x["proj"], 4 * H * K, x["A_log"], x["dt_bias"]
        outputs = [torch.empty_like(y) for y in gates]
        sums = torch.empty(-(-M // t.GATE_ROWS), 2, H, device=device)
        function(*same, *outputs)
        function(*same, *gates, dproj, sums)
    return dict(enumerate([*outputs, dproj, sums.sum(0)]))


@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_of_gdn_are_called_as_their_references_are(name):
    """The test below runs on a GPU alone; its calls are tried here with the references."""
    launch, reference = getattr(t, f"_launch_{name}"), LAUNCHES[name]
    assert list(signature(launch).parameters) == list(signature(reference).parameters)
    found = launch_results(reference, name, 65, 2, 8, "cpu")
    assert all(x.isfinite().all() for x in found.values())


@gpu
@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("T, H, K", [(1, 4, 128), (65, 4, 128), (64, 2, 64), (200, 3, 24),
                                     (513, 8, 64)])
def test_cuda_kernel_of_gdn_is_exact_in_float32(name, T, H, K):
    got, want = [launch_results(function, name, T, H, K)
                 for function in (getattr(t, f"_launch_{name}"), LAUNCHES[name])]
    assert_near(got, want, 1e-5)


@gpu
def test_fla_has_its_wide_tile_where_triton_is_older_than_it_accepts():
    t._fla()
    from fla.ops.common import chunk_o
    from fla.utils import TRITON_ABOVE_3_7_1
    assert chunk_o.TRITON_ABOVE_3_7_1  # its guard is lifted
    assert isinstance(chunk_o.chunk_bwd_kernel_dqkwg, t._WideKeyTile) != TRITON_ABOVE_3_7_1


SHAPES = [pytest.param("mlp", shape, marks=HOPPER) for shape in (
    (1, 72, 8), (127, 128, 192), (130, 72, 136), (257, 512, 2048), (20_001, 128, 264))]
SHAPES += [(name, shape) for name in ("attention", "compiled attention") for shape in (
    (2, 2, 64), (40, 40, 64), (200, 263, 64), (64, 70, 64), (1, 64, 64), (513, 513, 512))]


def operation_results(name, shape, fast=True):
    """Results and gradients of one operation on the GPU, the reference's in float64."""
    if name == "mlp":
        M, D, width = shape
        x = dict(x=normal(1, M, D), up=normal(width, D, seed=1), down=normal(D, width, seed=2),
                 scale=normal(D, seed=3))
        call = partial(t.fast_mlp if fast else t.mlp, slope=0.0)
    else:
        T, S, window = shape
        q, k, v = normal(2, T, 4, 64), normal(2, S, 2, 64, seed=1), normal(2, S, 2, 64, seed=2)
        x = dict(q=q, k=k, v=v)
        attention = t.pick_attention()[1] if fast else t.attention
        if fast and name == "compiled attention":
            attention = torch.compile(attention, dynamic=False)

        def call(q, k, v):
            return attention(q, k, v, window)
    # The scale is float32 in the model too.
    x = {key: (y.float() if key == "scale" else y.bfloat16()).cuda() for key, y in x.items()}
    return results_and_gradients(call, x if fast else in_double(x))


@gpu
@pytest.mark.parametrize("name, shape", SHAPES)
def test_cuda_operation_equals_the_reference(name, shape):
    got, want = [operation_results(name, shape, fast) for fast in (True, False)]
    assert_near(got, want)
    if name == "mlp":  # bit for bit the same again
        assert_same(operation_results(name, shape), got)


@HOPPER
@gpu
def test_cuda_mlp_reaches_beyond_32_bits():
    rng = torch.Generator("cuda").manual_seed(0)
    x, up, down = [torch.randn(*shape, generator=rng, device="cuda", dtype=torch.bfloat16)
                   for shape in ((1_400_000, 72), (1536, 72), (72, 1536))]
    r2 = t._mlp_product(x, up, None)
    assert r2.numel() > 2**31
    root = F.linear(x[-99:].float(), up.float()).relu()
    assert relative_error(r2[-99:], root.square()) < TOLERANCE
    want = x[-99:].float() @ down.float() * 2 * root
    assert relative_error(t._mlp_product(x, down, r2)[-99:], want) < TOLERANCE


def gpu_model(kernel="auto", **settings):
    """A small model with heads that every kernel takes, perturbed, on the GPU."""
    cfg = tiny_config(**dict(device="cuda", kernel=kernel, model_dim=256, gdn_head_dim=128,
                             swa_window=48, train_seq_len=256, train_batch_tokens=2048) | settings)
    model = t.LM(cfg, t.fast_ops(cfg, t.Run(device="cuda:0")))
    model.load_state_dict(tiny_model(cfg).state_dict())
    return model.cuda()


@gpu
@pytest.mark.parametrize("kernel", GDN_KERNELS)
def test_cuda_model_is_causal_bit_for_bit_and_its_loss_the_same_if_compiled(kernel):
    model = gpu_model(kernel)
    ids = random_ids(2, 257, low=2).int().cuda()
    losses = []
    for enabled in (False, True):
        with t.compiling(enabled):
            nats, _ = model.nll(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        losses.append(float(nats.mean()))
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    ids = random_ids(2, 256, low=2).int().cuda()
    with torch.no_grad():
        before, _ = model(ids)
        for at in (1, 64, 100, 255):
            changed = torch.cat([ids[:, :at], (ids[:, at:] + 7) % 64], 1)
            assert torch.equal(model(changed)[0][:, :at], before[:, :at]), at


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, dict(PRESET="pr1749", KERNEL="fla")], ids=["record", "pr1749"])
def test_cuda_preset_passes_the_check_of_the_fast_path(env):
    cfg = t.Config.from_env(env)
    run = t.Run(device="cuda:0")
    model = t.init_weights(t.LM(cfg, t.fast_ops(cfg, run)), cfg.seed).cuda()
    ids = torch.randint(cfg.vocab_size, (2, cfg.train_seq_len + 1), dtype=torch.int32)
    t.check_fast_path(model, run, ids.cuda())


@gpu
@pytest.mark.slow
def test_cuda_training_follows_the_reference():
    losses = {}
    for kernel, enabled in (("auto", "1"), ("reference", "0")):
        model = gpu_model(kernel, compile=enabled, muon_momentum_warmup_steps=50)
        run = t.Run(device="cuda:0")
        loader = t.Loader(fixed_data(model.cfg).train, model.cfg, run)
        optimizer = t.training_optimizer(model, model.cfg, run)
        losses[kernel] = [float(t.train_step(model, optimizer, next(loader), 8, 1.0, step))
                          for step in range(100)]
    fast, plain = [np.array(losses[kernel]) for kernel in ("auto", "reference")]
    assert plain[-10:].mean() < plain[0] - 1.0
    assert fast[-10:].mean() == pytest.approx(plain[-10:].mean(), abs=0.05)


TTT = {"sgd": {}, "muon and EMA": dict(ttt_optimizer="muon", ttt_ema=0.5),
       "adamw, hash, tilt": dict(ttt_optimizer="adamw", ttt_hash_buckets=32, ttt_tilt=0.5),
       "odd chunks, phases": dict(ttt_chunk_tokens=300, ttt_phase_chunks=2),
       "sliding": dict(ttt_scoring="sliding")}


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("option", TTT)
def test_cuda_graphs_train_as_plain_calls_do(option):
    model = gpu_model(**dict(compile="1", ttt_chunk_tokens=512, ttt_scoring="exact", ttt_lr=0.01,
                             eval_stride=64, eval_batch_tokens=2048,
                             eval_budget_seconds=1e6) | TTT[option])
    data = fixed_data(model.cfg)
    tokens = np.tile(data.val, 4)
    run = t.Run(device="cuda:0")
    bpb = {}
    with t.compiling(True):
        for how in ("graphs", "plain", "untrained"):
            model.cfg = replace(model.cfg, ttt_epochs=0 if how == "untrained" else 3)
            adapter = t.Adapter(model, len(tokens) - 1, run)
            optimizer = adapter.optimizer
            optimizer.graphs = optimizer.graphs if how == "graphs" else None
            ledger = t.evaluate(model, tokens, data.table, model.cfg.ttt_scoring, adapter, run)
            bpb[how] = ledger.bpb
            assert adapter.in_order and (how != "graphs" or any(optimizer.graphs.values()))
            adapter.close()
    assert bpb["graphs"] == pytest.approx(bpb["plain"], rel=1e-3)
    assert abs(bpb["plain"] - bpb["untrained"]) > 0.01
