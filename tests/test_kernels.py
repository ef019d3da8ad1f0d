"""Kernels: the delta rule against a token-by-token recurrence, attention against a dense masked softmax, both in
float64 and written here; the loss against log_softmax.  On a GPU: every kernel that can be imported against the
plain-torch reference (outputs, states, all gradients), compiled against eager, streamed against one pass.
"""

import importlib.util
import itertools
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt as t

NAMES = ("q", "k", "v", "g", "beta")


def gdn_gradients(kernel, inputs, state, cu_seqlens=None):
    """Outputs and gradients of one delta-rule call."""
    def call(**x):
        return dict(zip(("o", "final_state"), t.gated_delta_rule(**x, cu_seqlens=cu_seqlens, kernel=kernel)))
    return t.outputs_and_gradients(call, inputs if state is None else inputs | dict(state=state))


def delta_inputs(B, T, H, HV, K, V, strongest=2.0, seed=0):
    """Float64 leaves of the delta rule, by name, and an initial state; g reaches down to -strongest."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=rng)
    q, k = (F.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    x = dict(q=q, k=k, v=normal(B, T, HV, V),
             g=-strongest * torch.rand(B, T, HV, dtype=torch.float64, generator=rng), beta=normal(B, T, HV).sigmoid(),
             state=normal(B, HV, K, V))
    return {name: value.requires_grad_() for name, value in x.items()}


def recurrence(q, k, v, g, beta, state):
    """Equation 10 of the Gated DeltaNet paper, one token after another."""
    B, T, H, K = q.shape
    repeat = v.shape[2] // H
    q, k = q.repeat_interleave(repeat, 2), k.repeat_interleave(repeat, 2)
    eye, S, out = torch.eye(K, dtype=q.dtype), state, []
    for i in range(T):
        key, write = k[:, i, :, :, None], beta[:, i, :, None, None]
        S = g[:, i, :, None, None].exp() * (eye - write * key @ key.mT) @ S + write * key @ v[:, i, :, None, :]
        out.append((q[:, i, :, None, :] @ S).squeeze(-2) / K**0.5)
    return torch.stack(out, 1), S


def results_and_gradients(rule, x):
    """o, final state and the gradients of all inputs under fixed random weights, by name."""
    o, final = rule(**x)
    rng = torch.Generator().manual_seed(7)
    weights = [torch.randn(y.shape, dtype=y.dtype, generator=rng) for y in (o, final)]
    loss = (o * weights[0]).sum() + (final * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(x.values()))
    return {"o": o.detach(), "final_state": final.detach()} | {"d" + name: d for name, d in zip(x, grads, strict=True)}


# ---- the delta rule's reference ---------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200], ids="T{}".format)
@pytest.mark.parametrize("heads", [(2, 2), (1, 3), (2, 4)], ids="H{0[0]}-HV{0[1]}".format)
def test_reference_equals_recurrence(T, heads):
    x = delta_inputs(2, T, *heads, 8, 5)
    got, want = (results_and_gradients(rule, x) for rule in (t.gated_delta_rule_reference, recurrence))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_reference_without_state_starts_from_zeros():
    x = delta_inputs(2, 70, 2, 2, 8, 8)
    zeros = torch.zeros_like(x["state"])
    rest = {name: x[name] for name in NAMES}
    got, want = t.gated_delta_rule_reference(**rest), t.gated_delta_rule_reference(**rest, state=zeros)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_reference_survives_strong_decay():
    x = delta_inputs(1, 130, 2, 2, 8, 8, strongest=20.0)
    got, want = (results_and_gradients(rule, x) for rule in (t.gated_delta_rule_reference, recurrence))
    for name in want:
        assert got[name].isfinite().all(), name
        torch.testing.assert_close(got[name], want[name], rtol=1e-7, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_reference_takes_beta_up_to_two():
    x = delta_inputs(1, 100, 2, 2, 8, 8)
    x["beta"] = (2 * x["beta"]).detach().requires_grad_()
    got, want = (results_and_gradients(rule, x) for rule in (t.gated_delta_rule_reference, recurrence))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-7, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("at", [1, 63, 64, 100, 199], ids="cut{}".format)
def test_reference_in_two_parts_equals_one_pass(at):
    x = delta_inputs(2, 200, 1, 2, 8, 8)
    state = x.pop("state")
    whole, final = t.gated_delta_rule_reference(**x, state=state)
    first, carried = t.gated_delta_rule_reference(**{n: y[:, :at] for n, y in x.items()}, state=state)
    second, last = t.gated_delta_rule_reference(**{n: y[:, at:] for n, y in x.items()}, state=carried)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(last, final, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("with_states", [False, True], ids=["zero_states", "own_states"])
def test_reference_packed_equals_separate_sequences(with_states):
    cuts = [0, 1, 65, 128, 200]
    x = delta_inputs(1, 200, 2, 2, 8, 8)
    x.pop("state")
    states = None
    if with_states:
        states = torch.randn(4, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    packed, finals = t.gated_delta_rule_reference(**x, state=states, cu_seqlens=torch.tensor(cuts))
    for n, (a, b) in enumerate(itertools.pairwise(cuts)):
        start = states[n:n + 1] if with_states else torch.zeros(1, 2, 8, 8, dtype=torch.float64)
        o, final = recurrence(**{name: y[:, a:b] for name, y in x.items()}, state=start)
        torch.testing.assert_close(packed[:, a:b], o, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(finals[n:n + 1], final, rtol=1e-8, atol=1e-9)


def test_auto_kernel_on_cpu_keeps_output_dtype_and_float32_state():
    inputs, _ = t.gdn_inputs(1, 10, 2, 2, 8, "cpu", torch.bfloat16)
    o, final = t.gated_delta_rule(**inputs)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)


# ---- the custom operator around the CUDA kernels ----------------------------------------------------


def stand_ins():
    """Functions with the signatures of FLA's and FlashQLA's chunk kernels, computed by the reference."""
    def forward(q, k, v, g, beta, initial_state, cu_seqlens):
        with torch.no_grad():
            o, final = t.gated_delta_rule_reference(q, k, v, g, beta, initial_state, cu_seqlens)
        return g.clone(), o, torch.zeros(*v.shape[:3], t.GDN_CHUNK, dtype=k.dtype), final

    def backward(q, k, v, g, beta, initial_state, cu_seqlens, do, dht):
        def differentiate():
            leaves = {n: x.detach().requires_grad_() for n, x in
                      dict(q=q, k=k, v=v, g=g, beta=beta, state=initial_state).items() if x is not None}
            o, final = t.gated_delta_rule_reference(**leaves, cu_seqlens=cu_seqlens)
            dfinal = torch.zeros_like(final) if dht is None else dht
            return dict(zip(leaves, torch.autograd.grad([o, final], list(leaves.values()), [do, dfinal]), strict=True))
        with ThreadPoolExecutor(1) as pool:  # inside an operator autograd is off, in a new thread it is on
            grads = pool.submit(differentiate).result()
        return [grads.get(n) for n in ("q", "k", "v", "beta", "g", "state")]

    def fla_forward(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, chunk_indices):
        assert scale == q.shape[-1] ** -0.5 and output_final_state and (chunk_indices is None) == (cu_seqlens is None)
        G, o, A, final = forward(q, k, v, g, beta, initial_state, cu_seqlens)
        return G, o, A, final, None, None

    def fla_backward(q, k, v, g, beta, A, scale, initial_state, do, dht, cu_seqlens, chunk_indices):
        assert scale == q.shape[-1] ** -0.5
        return *backward(q, k, v, g, beta, initial_state, cu_seqlens, do, dht), None, None

    def qla_forward(q, k, v, g, beta, scale, initial_state, cu_seqlens, output_final_state, auto_cp):
        assert scale == q.shape[-1] ** -0.5 and output_final_state
        G, o, A, final = forward(q, k, v, g, beta, initial_state, cu_seqlens)
        return G, A, o, None, final, None

    def qla_backward(q, k, v, g, beta, A, do, dht, scale, initial_state, cu_seqlens, auto_cp):
        assert scale == q.shape[-1] ** -0.5
        return backward(q, k, v, g, beta, initial_state, cu_seqlens, do, dht)

    def chunk_index(cu_seqlens, chunk):
        return "index"

    return {"fla": (fla_forward, fla_backward, chunk_index), "flashqla": (qla_forward, qla_backward)}


@pytest.fixture
def kernels_by_reference(monkeypatch):
    """FLA and FlashQLA replaced by stand-ins, so that the operator's wiring runs on the CPU."""
    kernels = stand_ins()
    monkeypatch.setattr(t, "_fla", lambda: kernels["fla"])
    monkeypatch.setattr(t, "_flash_qla", lambda: kernels["flashqla"])


@pytest.mark.parametrize("kernel", ["fla", "flashqla"])
@pytest.mark.parametrize("case", ["state", "no_state", "packed"])
def test_operator_hands_every_gradient_to_its_input(kernels_by_reference, kernel, case):
    inputs, state = t.gdn_inputs(1, 70, 1, 2, 8, "cpu", torch.float32)
    cu_seqlens = torch.tensor([0, 7, 70]) if case == "packed" else None
    state = {"state": state, "no_state": None, "packed": None}[case]
    got, want = (gdn_gradients(name, inputs, state, cu_seqlens) for name in (kernel, "reference"))
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("used", ["o", "final_state"])
def test_operator_backward_when_one_result_is_unused(kernels_by_reference, used):
    inputs, state = t.gdn_inputs(1, 70, 2, 2, 8, "cpu", torch.float32)
    grads = []
    for kernel in ("fla", "reference"):
        leaf = inputs["v"].clone().requires_grad_()
        o, final = t.gated_delta_rule(**(inputs | {"v": leaf}), state=state, kernel=kernel)
        grads += torch.autograd.grad((o if used == "o" else final).square().sum(), leaf)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_operator_fake_shapes_are_the_reference_shapes(packed, dtype):
    inputs, state = t.gdn_inputs(1 if packed else 2, 70, 1, 2, 8, "cpu", dtype)
    cu_seqlens = torch.tensor([0, 7, 30, 70]) if packed else None
    state = state.repeat(3, 1, 1, 1) if packed else state
    real = t.gated_delta_rule_reference(**inputs, state=state, cu_seqlens=cu_seqlens)
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(x) for n, x in inputs.items()}
        cuts = mode.from_tensor(cu_seqlens) if packed else None
        o, final, _, _ = torch.ops.gdn_swa.gdn_forward(**fake, state=mode.from_tensor(state), cu_seqlens=cuts,
                                                       kernel="fla")
    for got, want in ((o, real[0]), (final, real[1])):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


# ---- windowed attention -----------------------------------------------------------------------------


def dense_attention(q, k, v, window, cu_seqlens=None):
    """Softmax over a full score matrix in float64, masked key by key."""
    T, H, d = q.shape[1:]
    S = k.shape[1]
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    visible = torch.zeros(T, S, dtype=torch.bool)
    bounds = [0, S] if cu_seqlens is None else cu_seqlens.tolist()
    for i in range(T):
        at = S - T + i
        begin = max(b for b in bounds if b <= at)
        visible[i, max(begin, at - window + 1):at + 1] = True
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) / d**0.5
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v.double())


def attention_inputs(T, S, H=4, Hk=2, d=8, B=2, dtype=torch.float64, device="cpu"):
    rng = torch.Generator().manual_seed(T * 1000 + S)
    return [torch.randn(B, n, h, d, dtype=torch.float64, generator=rng).to(device, dtype).requires_grad_()
            for n, h in ((T, H), (S, Hk), (S, Hk))]


SHAPES = [(1, 1, 1), (1, 16, 16), (5, 5, 16), (5, 20, 16), (16, 16, 16), (17, 17, 16), (33, 33, 1), (40, 40, 16),
          (64, 64, 16), (40, 55, 16), (50, 57, 16), (16, 31, 16), (17, 32, 16), (40, 70, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}-S{0[1]}-window{0[2]}".format)
def test_sdpa_equals_dense_softmax(shape):
    T, S, window = shape
    x = attention_inputs(T, S)
    got, want = t.windowed_attention(*x, window), dense_attention(*x, window)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    weight = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = (torch.autograd.grad((o * weight).sum(), x) for o in (got, want))
    for name, a, b in zip("qkv", *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (3, 3)], ids="H{0[0]}-Hk{0[1]}".format)
@pytest.mark.parametrize("T", [10, 40], ids=["one_block", "three_blocks"])
def test_sdpa_groups_neighbouring_heads(heads, T):
    x = attention_inputs(T, T, *heads)
    torch.testing.assert_close(t.windowed_attention(*x, 16), dense_attention(*x, 16), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", [4, 16, 100], ids="window{}".format)
def test_sdpa_packed_sees_one_sequence_only(window):
    cu_seqlens = torch.tensor([0, 1, 20, 36, 50])
    x = attention_inputs(50, 50, B=1)
    got, want = t.windowed_attention(*x, window, cu_seqlens), dense_attention(*x, window, cu_seqlens)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(10, 10), (64, 64), (50, 65), (70, 72)], ids="T{0[0]}-S{0[1]}".format)
def test_window_holds_exactly_the_last_keys(shape):
    (T, S), window = shape, 16
    values = torch.eye(S, dtype=torch.float64).view(1, S, 1, S)  # the output is then the row of attention weights
    q, k = torch.zeros(1, T, 1, S, dtype=torch.float64), torch.zeros(1, S, 1, S, dtype=torch.float64)
    weights = t.windowed_attention(q, k, values, window)[0, :, 0]
    for i, row in enumerate(weights):
        at = S - T + i
        assert row.nonzero().flatten().tolist() == list(range(max(0, at - window + 1), at + 1))


@pytest.mark.parametrize("shape", [(5, 5, 16), (40, 40, 16), (40, 55, 16)], ids="T{0[0]}-S{0[1]}-window{0[2]}".format)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_forward_equals_dense_softmax(shape):
    T, S, window = shape
    x = [y.detach() for y in attention_inputs(T, S, d=16, dtype=torch.float32)]  # no backward on the CPU
    got = t.windowed_attention(*x, window, kernel="flex")
    torch.testing.assert_close(got.double(), dense_attention(*x, window), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_forward_packed_sees_one_sequence_only():
    cu_seqlens = torch.tensor([0, 1, 20, 36, 50])
    x = [y.detach() for y in attention_inputs(50, 50, d=16, B=1, dtype=torch.float32)]
    got = t.windowed_attention(*x, 16, cu_seqlens, kernel="flex")
    torch.testing.assert_close(got.double(), dense_attention(*x, 16, cu_seqlens), rtol=1e-4, atol=1e-5)


def flash_attn_package(returns_tuple):
    """A module that looks like flash-attn and refuses what this script must not ask of it."""
    def result(o):
        return (o, torch.zeros(())) if returns_tuple else o

    def flash_attn_func(q, k, v, causal, window_size):
        assert causal and window_size[1] == 0
        assert q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape == v.shape
        return result(dense_attention(q, k, v, window_size[0] + 1))

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size):
        assert causal and window_size[1] == 0
        assert q.dim() == k.dim() == v.dim() == 3
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
        return result(dense_attention(q[None], k[None], v[None], window_size[0] + 1, cu_seqlens_q)[0])
    return types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("returns_tuple", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 7, 40]], ids=["rows", "packed"])
def test_flash_attn_adapter_equals_sdpa(returns_tuple, cu_seqlens):
    x = attention_inputs(40, 40, B=1)
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    got = t._flash_attention(flash_attn_package(returns_tuple))(*x, 16, cu_seqlens)
    torch.testing.assert_close(got, t.windowed_attention(*x, 16, cu_seqlens), rtol=1e-9, atol=1e-10)


def test_flash_attn_adapter_takes_carried_keys():
    x = attention_inputs(10, 25)
    got = t._flash_attention(flash_attn_package(False))(*x, 16, None)
    torch.testing.assert_close(got, t.windowed_attention(*x, 16), rtol=1e-9, atol=1e-10)


# ---- the loss ---------------------------------------------------------------------------------------


def test_token_nll_sums_to_one_over_the_vocabulary():
    logits = 10 * torch.randn(3, 1, 50, generator=torch.Generator().manual_seed(0))
    nll = t.token_nll(logits.expand(3, 50, 50), torch.arange(50).expand(3, 50))
    torch.testing.assert_close(nll.double().neg().exp().sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_token_nll_is_each_targets_own(dtype):
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 7, 50, generator=rng), torch.randint(50, (2, 7), generator=rng)
    want = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    got = t.token_nll(logits, targets.to(dtype))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# ---- the choice of a kernel -------------------------------------------------------------------------


@pytest.mark.parametrize("heads, wanted, expected", [
    (4, "auto", "flashqla"), (5, "auto", "fla"), (4, "flashqla", "flashqla"), (5, "fla", "fla"),
    (5, "flashqla", "KERNEL=flashqla.*fails at 5 and 5 heads .no available layout")])
def test_kernel_that_cannot_be_compiled_for_these_heads_is_passed_over(heads, wanted, expected, monkeypatch):
    def compile_and_run(q, kernel, **inputs):
        assert kernel == "flashqla"
        if q.shape[2] % 2:
            raise RuntimeError("a long trace\nno available layout found")
    real = t.gdn_inputs
    monkeypatch.setattr(t, "gdn_inputs", lambda B, T, H, HV, K, device, dtype: real(B, T, H, HV, K, "cpu", dtype))
    monkeypatch.setattr(t, "gated_delta_rule", compile_and_run)
    monkeypatch.setattr(t, "_flash_qla", lambda: None)
    monkeypatch.setattr(t, "_fla", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    t.flash_qla_refusal.cache_clear()
    if expected in ("fla", "flashqla"):
        assert t.pick_gdn_kernel(wanted, heads, 128, heads, 128) == expected
    else:
        with pytest.raises(t.KernelError, match=expected):
            t.pick_gdn_kernel(wanted, heads, 128, heads, 128)
    t.flash_qla_refusal.cache_clear()


# ---- on a GPU ---------------------------------------------------------------------------------------


def installed(packages):
    """The kernels whose package is installed; all of them without a GPU, where these tests are skipped."""
    every = not torch.cuda.is_available()
    return [kernel for kernel, package in packages.items() if every or importlib.util.find_spec(package)]


GDN_KERNELS = installed({"fla": "fla", "flashqla": "flash_qla"})
GDN_HEADS = [(kernel, *heads) for kernel in GDN_KERNELS
             for heads in ((4, 4, 128), (2, 4, 128), (2, 2, 64), (1, 2, 64)) if kernel != "flashqla" or heads[2] == 128]
FLASH = installed({"flash_attn": "flash_attn", "flash_attn_interface": "flash_attn_interface"})
ATTENTION_KERNELS = ["varlen", "flex"] + (["flash_attn"] if FLASH else [])
PATHS = [(kernel, "varlen") for kernel in GDN_KERNELS]
PATHS += [("reference", kernel) for kernel in (*ATTENTION_KERNELS, "sdpa")]


def gpu_attention(kernel):
    """The attention call under test; flex compiled, flash_attn registered first."""
    t.load_torch_attention()
    if kernel == "flash_attn":
        t.pick_attention_kernel("flash_attn")
    return torch.compile(t.windowed_attention, dynamic=False) if kernel == "flex" else t.windowed_attention


def gpu_model(tiny_config, tiny_model, kernel, attn_kernel):
    """A small bfloat16-activation model on the GPU whose heads every kernel takes."""
    if attn_kernel == "flash_attn":
        t.pick_attention_kernel("flash_attn")
    return tiny_model(tiny_config(
        device="cuda", kernel=kernel, attn_kernel=attn_kernel, model_dim=256, num_heads=4, gdn_head_dim=128,
        swa_window=48, train_seq_len=256, train_batch_tokens=512)).cuda()


def gpu_ids(model, B, T):
    return torch.randint(2, model.cfg.vocab_size, (B, T), generator=torch.Generator().manual_seed(0)).cuda()


def assert_within_kernel_tolerance(got, want):
    errors = {name: t.relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) < t.KERNEL_TOLERANCE, errors


@pytest.mark.gpu
@pytest.mark.parametrize("heads", GDN_HEADS, ids="{0[0]}-H{0[1]}-HV{0[2]}-K{0[3]}".format)
@pytest.mark.parametrize("T", [64, 200, 513], ids="T{}".format)
@pytest.mark.parametrize("with_state", [False, True], ids=["no_state", "state"])
def test_cuda_delta_rule_equals_reference(heads, T, with_state):
    inputs, state = t.gdn_inputs(2, T, *heads[1:], "cuda", torch.bfloat16)
    state = state if with_state else None
    want = gdn_gradients("reference", {n: x.float() for n, x in inputs.items()}, state)
    assert_within_kernel_tolerance(gdn_gradients(heads[0], inputs, state), want)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", GDN_HEADS, ids="{0[0]}-H{0[1]}-HV{0[2]}-K{0[3]}".format)
@pytest.mark.parametrize("with_states", [False, True], ids=["zero_states", "own_states"])
def test_cuda_delta_rule_packed_equals_reference(heads, with_states):
    inputs, _ = t.gdn_inputs(1, 513, *heads[1:], "cuda", torch.bfloat16)
    cu_seqlens = torch.tensor([0, 1, 65, 200, 513], device="cuda")
    states = torch.randn(4, heads[2], heads[3], heads[3], device="cuda") if with_states else None
    want = gdn_gradients("reference", {n: x.float() for n, x in inputs.items()}, states, cu_seqlens)
    assert_within_kernel_tolerance(gdn_gradients(heads[0], inputs, states, cu_seqlens), want)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", GDN_HEADS, ids="{0[0]}-H{0[1]}-HV{0[2]}-K{0[3]}".format)
def test_cuda_delta_rule_survives_strong_decay(heads):
    inputs, state = t.gdn_inputs(2, 200, *heads[1:], "cuda", torch.bfloat16)
    inputs["g"] = inputs["g"] * 20
    for name, value in gdn_gradients(heads[0], inputs, state).items():
        assert value.isfinite().all(), name


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", GDN_KERNELS)
def test_cuda_operator_passes_opcheck(kernel):
    inputs, state = t.gdn_inputs(2, 128, 2, 2, 128, "cuda", torch.bfloat16)
    leaves = [x.requires_grad_() for x in (*(inputs[name] for name in NAMES), state)]
    # Compiling with symbolic shapes is left out: the script compiles with static ones.
    torch.library.opcheck(torch.ops.gdn_swa.gdn_forward.default, (*leaves, None, kernel),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


CONV_SHAPES = [(1, 4, 4, 128), (3, 4, 4, 128), (64, 1, 2, 64), (65, 2, 2, 128), (200, 2, 4, 24), (513, 8, 8, 64)]


def conv_results(kernel, shape, dtype):
    """q, k, v and gradients of `convolved_heads` behind a random tail."""
    T, H, HV, K = shape
    rng = torch.Generator("cuda").manual_seed(0)
    x, tail, w = (torch.randn(*s, device="cuda", generator=rng) for s in (
        (2, T, (2 * H + HV) * K), (2, 3, (2 * H + HV) * K), ((2 * H + HV) * K, 4)))
    x, tail = x.bfloat16().to(dtype), tail.bfloat16().to(dtype)
    return t.outputs_and_gradients(
        lambda x, w: dict(zip("qkv", t.convolved_heads(x, w, tail, H, HV, kernel=kernel))), dict(x=x, w=w))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", CONV_SHAPES, ids="T{0[0]}-H{0[1]}-HV{0[2]}-K{0[3]}".format)
def test_cuda_convolution_equals_reference(shape):
    want = conv_results("reference", shape, torch.float32)
    assert_within_kernel_tolerance(conv_results("fla", shape, torch.bfloat16), want)
    for name, value in conv_results("fla", shape, torch.float32).items():
        assert t.relative_error(value, want[name]) < 1e-5, name


@pytest.mark.gpu
def test_cuda_convolution_repeats_bit_for_bit():
    first, second = (conv_results("fla", (513, 4, 4, 128), torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_cuda_convolution_passes_opcheck():
    x, tail, w = (torch.randn(*s, device="cuda") for s in ((2, 70, 96), (2, 3, 96), (96, 4)))
    torch.library.opcheck(torch.ops.gdn_swa.conv_forward.default, (x.requires_grad_(), w.requires_grad_(), tail, 1, 2),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


NORM_SHAPES = [(1, 4, 128), (33, 4, 128), (70, 2, 24), (513, 8, 64)]


def norm_results(kernel, shape, dtype):
    """y and gradients of `gated_norm`, its gate a part of wider rows."""
    T, HV, V = shape
    rng = torch.Generator("cuda").manual_seed(0)
    o, gate, w = (torch.randn(*s, device="cuda", generator=rng) for s in ((2, T, HV, V), (2, T, HV * (V + 2)), (V,)))
    return t.outputs_and_gradients(lambda o, gate, w: dict(y=t.gated_norm(o, gate[..., :HV * V], w, kernel)),
                                   dict(o=o.bfloat16().to(dtype), gate=gate.bfloat16().to(dtype), w=w))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", NORM_SHAPES, ids="T{0[0]}-HV{0[1]}-V{0[2]}".format)
def test_cuda_gated_norm_equals_reference(shape):
    want = norm_results("reference", shape, torch.float32)
    assert_within_kernel_tolerance(norm_results("fla", shape, torch.bfloat16), want)
    for name, value in norm_results("fla", shape, torch.float32).items():
        assert t.relative_error(value, want[name]) < 1e-5, name


@pytest.mark.gpu
def test_cuda_gated_norm_repeats_bit_for_bit():
    first, second = (norm_results("fla", (513, 4, 128), torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_cuda_gated_norm_passes_opcheck():
    o, gate, w = (torch.randn(*s, device="cuda") for s in ((2, 70, 2, 24), (2, 70, 60), (24,)))
    torch.library.opcheck(torch.ops.gdn_swa.norm_forward.default, (o.requires_grad_(), gate[..., :48], w),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


HOPPER = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
                            reason="the fused MLP is for GPUs of compute capability 9")
MLP_SHAPES = [(1, 72, 8), (127, 128, 192), (130, 72, 136), (257, 512, 1536), (20_001, 128, 264)]  # the last: many tiles


def mlp_leaves(shape):
    """bfloat16 x (M, D) and weights (F, D), (D, F) of a fused MLP."""
    M, D, width = shape
    rng = torch.Generator("cuda").manual_seed(0)
    return {name: torch.randn(*size, device="cuda", generator=rng).bfloat16()
            for name, size in (("x", (M, D)), ("up", (width, D)), ("down", (D, width)))}


def fused_mlp(**leaves):
    return dict(y=torch.ops.gdn_swa.mlp_forward(**leaves)[0])


@pytest.mark.parametrize("overrides, capability, fused", [
    ({}, (9, 0), True), (dict(mlp_act="leaky_relu2"), (9, 0), False), (dict(kernel="reference"), (9, 0), False),
    (dict(mlp_mult=1.03), (9, 0), False), ({}, (8, 0), False),
    (dict(model_dim=64), (9, 0), False), ({}, (10, 0), False), ({}, None, False)],
    ids=["hopper", "leaky", "reference", "odd_width", "ampere", "narrow", "blackwell", "cpu"])
def test_the_mlp_is_fused_where_its_kernel_runs(tiny_config, monkeypatch, overrides, capability, fused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    cfg = tiny_config(**(dict(kernel="fla", model_dim=128) | overrides))
    assert t.fuses_mlp(cfg) is t.MLP(cfg).fused is fused
    x = torch.randn(2, 3, cfg.model_dim)  # on the CPU, as the model of a machine with a GPU may be
    assert t.MLP(cfg)(x, None).shape == x.shape


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("shape", MLP_SHAPES, ids="M{0[0]}-D{0[1]}-F{0[2]}".format)
def test_cuda_mlp_equals_reference(shape):
    leaves = mlp_leaves(shape)
    want = t.outputs_and_gradients(
        lambda x, up, down: dict(y=F.linear(F.linear(x, up).relu().square(), down)),
        {name: x.float() for name, x in leaves.items()})
    assert_within_kernel_tolerance(t.outputs_and_gradients(fused_mlp, leaves), want)


@HOPPER
@pytest.mark.gpu
def test_cuda_mlp_repeats_bit_for_bit():
    first, second = (t.outputs_and_gradients(fused_mlp, mlp_leaves((20_001, 128, 264))) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@HOPPER
@pytest.mark.gpu
def test_cuda_mlp_reaches_beyond_32_bits():
    x, up, down = mlp_leaves((1_400_000, 72, 1536)).values()
    r2 = t._mlp_product(x, up, None)
    assert r2.numel() > 2**31
    dh = t._mlp_product(x, down, r2)[-99:]
    root = F.linear(x[-99:].float(), up.float()).relu()
    assert t.relative_error(r2[-99:], root.square()) < t.KERNEL_TOLERANCE
    assert t.relative_error(dh, x[-99:].float() @ down.float() * 2 * root) < t.KERNEL_TOLERANCE


@HOPPER
@pytest.mark.gpu
def test_cuda_mlp_passes_opcheck():
    x, up, down = (y.requires_grad_() for y in mlp_leaves((70, 72, 136)).values())
    torch.library.opcheck(torch.ops.gdn_swa.mlp_forward.default, (x, up, down),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@HOPPER
@pytest.mark.gpu
@pytest.mark.parametrize("enabled", [False, True], ids=["eager", "compiled"])
def test_cuda_fused_mlp_of_a_model_equals_the_other_path(tiny_config, tiny_model, enabled):
    model = gpu_model(tiny_config, tiny_model, "fla", "varlen")
    mlp, ids, results = model.blocks[0].mlp, gpu_ids(model, 2, 257), []
    assert mlp.fused
    for fused in (True, False):
        for block in model.blocks:
            block.mlp.fused = fused
        model.zero_grad()
        t.compiled(t.mean_nll, enabled)(model, ids[:, :-1], ids[:, 1:]).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
        assert all(grad.dtype == torch.float32 for grad in results[-1].values())
    got, want = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in results)
    assert t.relative_error(got, want) < 0.05


@HOPPER
@pytest.mark.gpu
def test_cuda_mlp_shows_its_products_to_observers(tiny_config, tiny_model):
    mlp, seen = gpu_model(tiny_config, tiny_model, "fla", "varlen").blocks[0].mlp, []
    assert mlp.fused
    t.OBSERVERS.append(lambda x, weights: seen.extend(weights))
    try:
        mlp(torch.randn(3, 256, device="cuda", dtype=torch.bfloat16), None)
    finally:
        t.OBSERVERS.pop()
    assert [id(w) for w in seen] == [id(mlp.up_proj), id(mlp.down_proj)]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize("shape", [(40, 40, 64), (200, 200, 64), (200, 263, 64), (64, 70, 64)],
                         ids="T{0[0]}-S{0[1]}-window{0[2]}".format)
def test_cuda_attention_equals_sdpa(kernel, shape):
    T, S, window = shape
    x = attention_inputs(T, S, d=64, dtype=torch.bfloat16, device="cuda")
    x = [y.detach().requires_grad_() for y in x]
    results = []
    for call, leaves, name in ((gpu_attention(kernel), x, kernel),
                               (t.windowed_attention, [y.detach().float().requires_grad_() for y in x], "sdpa")):
        o = call(*leaves, window=window, kernel=name)
        weight = torch.randn(o.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        grads = torch.autograd.grad((o.float() * weight).sum(), leaves)
        results.append(dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *grads), strict=True)))
    assert_within_kernel_tolerance(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ATTENTION_KERNELS)
def test_cuda_attention_packed_equals_sdpa(kernel):
    x = [y.detach() for y in attention_inputs(200, 200, d=64, B=1, dtype=torch.bfloat16, device="cuda")]
    cu_seqlens = torch.tensor([0, 1, 65, 130, 200], device="cuda")
    got = gpu_attention(kernel)(*x, window=64, cu_seqlens=cu_seqlens, kernel=kernel)
    want = t.windowed_attention(*(y.float() for y in x), window=64, cu_seqlens=cu_seqlens, kernel="sdpa")
    assert t.relative_error(got, want) < t.KERNEL_TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("attn_kernel", ATTENTION_KERNELS)
@pytest.mark.parametrize("kernel", GDN_KERNELS)
def test_cuda_compiled_model_equals_eager(tiny_config, tiny_model, kernel, attn_kernel):
    model = gpu_model(tiny_config, tiny_model, kernel, attn_kernel)
    ids = gpu_ids(model, 2, 257)
    eager_model = gpu_model(tiny_config, tiny_model, kernel, "varlen" if attn_kernel == "flex" else attn_kernel)
    results = []
    for m, loss_of in ((model, t.compiled(t.mean_nll, True)), (eager_model, t.mean_nll)):
        loss = loss_of(m, ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in m.parameters()])))
    (loss, grad), (eager_loss, eager_grad) = results
    assert loss == pytest.approx(eager_loss, rel=1e-2)
    assert t.relative_error(grad, eager_grad) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", GDN_KERNELS)
def test_cuda_streaming_equals_one_pass(tiny_config, tiny_model, kernel):
    model = gpu_model(tiny_config, tiny_model, kernel, "varlen")
    ids, state, parts = gpu_ids(model, 2, 300), None, []
    with torch.no_grad():
        for part in ids.split([64, 37, 1, 128, 70], 1):
            logits, state = model(part, state)
            parts.append(logits)
        assert t.relative_error(torch.cat(parts, 1), model(ids)[0]) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS, ids="{0[0]}-{0[1]}".format)
def test_cuda_logits_never_see_later_tokens(tiny_config, tiny_model, path):
    model = gpu_model(tiny_config, tiny_model, *path)
    call = t.compiled(t.score_rows, True) if path[1] == "flex" else t.score_rows
    ids = gpu_ids(model, 2, 256)
    with torch.no_grad():
        before, _ = call(model, ids, ids)
        for at in (1, 64, 100, 255):
            changed = ids.clone()
            changed[:, at:] = (changed[:, at:] + 7) % model.cfg.vocab_size
            after, _ = call(model, changed, ids)
            assert torch.equal(before[:, :at], after[:, :at]), f"changing tokens from {at} on changed earlier scores"
