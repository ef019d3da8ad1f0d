"""The model: causality bit for bit, document boundaries, packing against separate documents, streaming against one
pass, rotary positions, weight sharing, initial values against the table of `init_weights`, and the model settings.
"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import train_gpt as t

KINDS = ("gdn", "swa", "attn")


def random_ids(B, T, seed=0, low=2, vocab=64):
    """Tokens without BOS (id 1), so that n-grams and SmearGate reach as far as they can."""
    return torch.randint(low, vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def random_x(B, T, D=64, seed=0):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed))


def embed(model, ids, state=None):
    """The embeddings of ids and the state behind them."""
    state = state or model.embed.fresh_state(len(ids), "cpu", torch.float32)
    return model.embed(ids, state, None, torch.float32)


# ---- shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 15, 16, 63, 100], ids="T{}".format)
def test_block_keeps_its_shape(tiny_config, tiny_model, kind, T):
    block = tiny_model(tiny_config(stack=kind)).blocks[0]
    x = random_x(3, T)
    y, _ = block(x, x, None, None)
    assert y.shape == (3, T, 64) and not torch.equal(x, y)


@pytest.mark.parametrize("stack", [*KINDS, "gdn swa", "gdn*2 attn:x swa:y gdn attn:x", "swa:a*3", "gdn:b*2 gdn"])
@pytest.mark.parametrize("T", [1, 33], ids="T{}".format)
def test_every_stack_gives_logits_and_gradients(tiny_config, tiny_model, stack, T):
    model = tiny_model(tiny_config(stack=stack))
    ids = random_ids(2, T)
    logits, state = model(ids)
    assert logits.shape == (2, T, 64) and logits.dtype == torch.float32
    assert len(state.layers) == len(t.parse_stack(stack))
    t.token_nll(logits, ids).mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_every_parameter_moves_the_loss(tiny_config, tiny_model):
    model = tiny_model(tiny_config(stack="gdn swa:a attn gdn swa:a"))
    ids = random_ids(2, 65)
    t.mean_nll(model, ids[:, :-1], ids[:, 1:]).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("cap", [2.0, 30.0], ids="cap{}".format)
def test_logits_are_capped_products_with_the_embedding(tiny_config, tiny_model, cap):
    model = tiny_model(tiny_config(logit_softcap=cap))
    x = 20 * random_x(1, 5)
    model.embed.weight.data.mul_(20)
    want = torch.tanh(F.rms_norm(x, (64,), eps=1e-6) @ model.embed.weight.T / cap) * cap
    torch.testing.assert_close(model.embed.logits(x), want)
    assert (want.abs() > 0.9 * cap).any()


# ---- mixers and block written out -------------------------------------------------------------------


def test_gdn_mixer_equals_its_formula(tiny_config, tiny_model):
    mixer, x = tiny_model(tiny_config(stack="gdn", gdn_v_heads=4)).blocks[0].mixer, random_x(2, 70)
    q, k, v = (F.silu(F.conv1d(F.pad((x @ w.T).mT, (3, 0)), c[:, None], groups=len(w)).mT).unflatten(-1, (-1, 16))
               for w, c in ((mixer.q_proj, mixer.q_conv), (mixer.kv.k_proj, mixer.kv.k_conv),
                            (mixer.kv.v_proj, mixer.kv.v_conv)))
    o, S = t.gated_delta_rule_reference(
        q=q / q.norm(dim=-1, keepdim=True), k=k / k.norm(dim=-1, keepdim=True), v=v,
        g=-mixer.A_log.exp() * F.softplus(x @ mixer.a_proj.T + mixer.dt_bias), beta=(x @ mixer.b_proj.T).sigmoid())
    gate = F.silu(x @ mixer.g_proj.T).unflatten(-1, (4, 16))
    want = (F.rms_norm(o, (16,), mixer.o_norm, 1e-6) * gate).flatten(2) @ mixer.o_proj.T
    got, state = mixer(x, None, None, None, None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.S, S.detach(), rtol=1e-4, atol=1e-5)


def turned(x, first, base, dims):
    """x (B, T, H, d) rotated from position `first` on; dims 0: all channels."""
    return t.rotary(x, t.rotary_table(first + x.shape[1], base, dims or x.shape[-1], x.dtype, x.device)[:, first:])


def test_attention_mixer_equals_its_formula(tiny_config, tiny_model):
    block, x = tiny_model(tiny_config(stack="swa")).blocks[0], random_x(2, 40)
    mixer, at = block.mixer, torch.arange(40)
    q, k, v = ((x @ w.T).unflatten(-1, (-1, 16)) for w in (mixer.q_proj, mixer.kv.k_proj, mixer.kv.v_proj))
    q, k = (turned(F.rms_norm(y, (16,), eps=1e-6), 100, 10000.0, 0) for y in (q, k))  # only distances matter
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("bthd,bshd->bhts", q * block.qk_gain[:, None], k) / 4
    hidden = (at > at[:, None]) | (at <= at[:, None] - 16)
    o = torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    got, _ = mixer(x, None, block.qk_gain, None, None)
    torch.testing.assert_close(got, o.flatten(2) @ mixer.o_proj.T, rtol=1e-4, atol=1e-4)


def test_block_equals_its_formula(tiny_config, tiny_model):
    block = tiny_model(tiny_config(stack="swa")).blocks[0]
    x, x0 = random_x(2, 20), random_x(2, 20, seed=1)
    h = block.resid_mix[0] * x + block.resid_mix[1] * x0
    h = h + block.mixer_scale * block.mixer(F.rms_norm(h, (64,), eps=1e-6), None, block.qk_gain, None, None)[0]
    want = h + block.mlp_scale * block.mlp(F.rms_norm(h, (64,), eps=1e-6), None)
    torch.testing.assert_close(block(x, x0, None, None)[0], want, rtol=1e-4, atol=1e-4)


# ---- causality and document boundaries --------------------------------------------------------------


@pytest.mark.parametrize("stack", [*KINDS, "gdn swa:a gdn swa:a"])
@pytest.mark.parametrize("at", [1, 16, 63, 64, 129], ids="token{}".format)
def test_a_token_leaves_earlier_logits_bit_equal(tiny_config, tiny_model, stack, at):
    model = tiny_model(tiny_config(stack=stack, train_seq_len=256))
    ids = random_ids(2, 130)
    changed = ids.clone()
    changed[:, at:] = (ids[:, at:] + 5) % 64
    with torch.no_grad():
        before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at], after[:, at])


@pytest.mark.parametrize("stack", KINDS)
def test_a_token_reaches_later_logits(tiny_config, tiny_model, stack):
    model = tiny_model(tiny_config(stack=stack, ngram_buckets=0, smear=False))
    ids = random_ids(1, 16)
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 5) % 64
    with torch.no_grad():
        differs = (model(ids)[0] != model(changed)[0]).any(-1)[0]
    assert differs.tolist() == [False] * 3 + [True] * 13


REACH = {"ngram3_smear": (dict(), 4), "ngram3": (dict(smear=False), 3), "ngram2_smear": (dict(ngram_order=2), 3),
         "ngram2": (dict(ngram_order=2, smear=False), 2), "smear": (dict(ngram_buckets=0), 2),
         "token": (dict(ngram_buckets=0, smear=False), 1)}


@pytest.mark.parametrize("case", REACH)
def test_embedding_reaches_exactly_as_far_as_its_settings_say(tiny_config, tiny_model, case):
    overrides, reach = REACH[case]
    model = tiny_model(tiny_config(**({"ngram_buckets": 4096} | overrides)))
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[0, 5] = 2 + (ids[0, 5] + 3) % 62
    differs = (embed(model, ids)[0] != embed(model, changed)[0]).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(5, 5 + reach))


@pytest.mark.parametrize("before", [1, 2, 3], ids="{}_before_bos".format)
def test_nothing_before_bos_enters_an_embedding_behind_it(tiny_config, tiny_model, before):
    model = tiny_model(tiny_config(ngram_buckets=4096))
    ids, bos = random_ids(1, 12), 6
    ids[0, bos] = 1
    changed = ids.clone()
    changed[0, bos - before] = 2 + (ids[0, bos - before] + 3) % 62
    x, y = embed(model, ids)[0], embed(model, changed)[0]
    assert torch.equal(x[:, bos:], y[:, bos:])
    assert not torch.equal(x[:, :bos], y[:, :bos])


@pytest.mark.parametrize("cut", [5, 6, 7, 8], ids=["before_bos", "at_bos", "behind_bos", "two_behind_bos"])
def test_nothing_before_bos_enters_through_the_carried_state(tiny_config, tiny_model, cut):
    model = tiny_model(tiny_config(ngram_buckets=4096))
    ids, bos = random_ids(1, 12), 6
    ids[0, bos] = 1
    _, state = embed(model, ids[:, :cut])
    _, other = embed(model, torch.cat([(ids[:, :bos] + 3) % 60 + 2, ids[:, bos:]], 1)[:, :cut])
    rest = max(0, bos - cut)
    x, y = (embed(model, ids[:, cut:], s)[0][:, rest:] for s in (state, other))
    assert torch.equal(x, y)


@pytest.mark.parametrize("bos_id", [-1, 1], ids=["no_bos", "bos1"])
def test_first_token_of_a_text_has_no_predecessor(tiny_config, tiny_model, bos_id):
    model = tiny_model(tiny_config(bos_id=bos_id, ngram_order=2))
    absent = torch.tensor([[-1]])
    row = model.embed.ngrams(model.embed.ngram_table, torch.tensor([[7]]), absent, absent)[0, 0]
    x = model.embed.weight[7] + row @ model.embed.ngram_proj.T * model.embed.ngram_scale
    torch.testing.assert_close(embed(model, torch.tensor([[7]]))[0][0, 0], F.rms_norm(x, (64,), eps=1e-6))


def test_ngram_rows_fill_the_table_evenly(tiny_config):
    ids = random_ids(1, 20000, vocab=60000)
    for order in (2, 3):
        embedding = t.Embedding(tiny_config(ngram_order=order))
        counts = embedding.ngrams(torch.eye(97), ids[:, 2:], ids[:, 1:-1], ids[:, :-2]).sum((0, 1))
        assert counts.min() > (order - 1) * 120 and counts.max() < (order - 1) * 300  # 206 on average of each order


# ---- packing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [*KINDS, "gdn swa:a gdn swa:a"])
def test_packed_documents_equal_separate_ones(tiny_config, tiny_model, stack):
    model = tiny_model(tiny_config(stack=stack, train_seq_len=128))
    documents = [random_ids(1, n, seed=n) for n in (1, 37, 2, 64, 100)]
    cu_seqlens = torch.tensor([0, *(len(d[0]) for d in documents)]).cumsum(0)
    with torch.no_grad():
        packed, state = model(torch.cat(documents, 1), cu_seqlens=cu_seqlens)
        apart = torch.cat([model(d)[0] for d in documents], 1)
    assert state is None
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", ["two_rows", "state"])
def test_packing_refuses(tiny_config, tiny_model, fault):
    model = tiny_model(tiny_config())
    state = model(random_ids(1, 8))[1] if fault == "state" else None
    with pytest.raises(ValueError, match="cu_seqlens needs one row and no state"):
        model(random_ids(2 if fault == "two_rows" else 1, 8), state=state, cu_seqlens=torch.tensor([0, 8]))


# ---- streaming --------------------------------------------------------------------------------------

CUTS = {"awkward": (37, 1, 100, 1, 1, 60), "single_tokens": (1,) * 40, "blocks": (64, 64), "windows": (16, 15, 17, 1)}


@pytest.mark.parametrize("stack", [*KINDS, "gdn swa:a gdn swa:a"])
@pytest.mark.parametrize("cuts", CUTS)
def test_streaming_equals_one_pass(tiny_config, tiny_model, stack, cuts):
    model = tiny_model(tiny_config(stack=stack))
    ids = random_ids(2, sum(CUTS[cuts]))
    ids[:, 30] = 1  # a document begins
    state, parts = None, []
    with torch.no_grad():
        whole, _ = model(ids)
        for part in ids.split(CUTS[cuts], 1):
            logits, state = model(part, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("cut", range(1, 8), ids="cut{}".format)
def test_streamed_embedding_equals_one_pass(tiny_config, tiny_model, cut):
    model = tiny_model(tiny_config())
    ids = torch.tensor([[5, 6, 1, 7, 8, 9, 1, 1, 10]])
    first, state = embed(model, ids[:, :cut])
    second, _ = embed(model, ids[:, cut:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), embed(model, ids)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("taps", [1, 4, 7], ids="taps{}".format)
def test_short_convolution_equals_conv1d(taps):
    x, weight = random_x(2, 20, 6), random_x(1, taps, 6, seed=1)[0].T
    want = F.silu(F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight[:, None], groups=6).mT)
    got = t.short_convolution(x, weight, x.new_zeros(2, taps - 1, 6), None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 2, 3, 10, 19], ids="cut{}".format)
def test_convolution_tail_carries_over(cut):
    x, weight = random_x(2, 20, 6), random_x(1, 4, 6, seed=1)[0].T
    zeros = x.new_zeros(2, 3, 6)
    tail = t.last_tokens(zeros, x[:, :cut], 3)
    second = t.short_convolution(x[:, cut:], weight, tail, None)
    torch.testing.assert_close(second, t.short_convolution(x, weight, zeros, None)[:, cut:], rtol=1e-6, atol=1e-6)


def test_returned_state_is_detached(tiny_config, tiny_model):
    model = tiny_model(tiny_config(stack="gdn swa"))
    _, state = model(random_ids(1, 10))
    tensors = [*state.embed, *(x for layer in state.layers for x in layer)]
    assert [x.requires_grad for x in tensors] == [False] * len(tensors)


@pytest.mark.parametrize("T", [3, 15, 40], ids="T{}".format)
def test_attention_state_keeps_no_more_than_the_window(tiny_config, tiny_model, T):
    _, state = tiny_model(tiny_config(stack="swa"))(random_ids(1, T))
    assert state.layers[0].k.shape[1] == min(T, 15)


# ---- rotary positions -------------------------------------------------------------------------------


def test_rotary_turns_heads_alike_and_positions_differently():
    x = random_x(1, 1, 8).view(1, 1, 1, 8).expand(1, 5, 3, 8)  # one vector at five positions in three heads
    y = turned(x, 0, 100.0, 0)
    for head in range(1, 3):
        assert torch.equal(y[:, :, head], y[:, :, 0])
    for i in range(1, 5):
        assert not torch.allclose(y[:, i], y[:, i - 1], atol=1e-3)


def test_rotary_equals_complex_multiplication():
    x = random_x(2, 5, 3 * 8).view(2, 5, 3, 8)
    angle = torch.arange(4, 9).double()[:, None] * 100.0 ** (-torch.arange(4).double() / 4)
    z = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(turned(x, 4, 100.0, 0).double(), torch.cat([z.real, z.imag], -1), rtol=1e-5, atol=1e-5)


def test_rotary_products_depend_on_distance_alone():
    q, k = random_x(1, 1, 8).view(1, 1, 1, 8), random_x(1, 1, 8, seed=1).view(1, 1, 1, 8)
    products = [(turned(q, at + 3, 100.0, 0) * turned(k, at, 100.0, 0)).sum() for at in (0, 1, 50)]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), rtol=1e-4, atol=1e-4)


def test_rotary_leaves_channels_beyond_rope_dims():
    x = random_x(1, 5, 2 * 8).view(1, 5, 2, 8)
    y = turned(x, 3, 100.0, 4)
    assert torch.equal(y[..., 4:], x[..., 4:])
    assert torch.equal(y[..., :4], turned(x[..., :4], 3, 100.0, 0))


@pytest.mark.parametrize("changed", [dict(rope_dims=8), dict(rope_base=100.0)], ids=["rope_dims", "rope_base"])
def test_rotary_settings_change_the_model(tiny_config, tiny_model, changed):
    ids = random_ids(1, 16)
    with torch.no_grad():
        a, b = (tiny_model(tiny_config(stack="swa", **overrides))(ids)[0] for overrides in ({}, changed))
    assert not torch.allclose(a, b)


# ---- weight sharing ---------------------------------------------------------------------------------


def test_layers_of_one_tag_share_their_mixer_only(tiny_config):
    _, one, _, other = t.LM(tiny_config()).blocks
    assert one.mixer is other.mixer
    for name in ("mlp", "qk_gain", "mixer_scale", "mlp_scale", "resid_mix"):
        assert getattr(one, name) is not getattr(other, name), name


def test_layers_without_tag_share_nothing(tiny_config):
    blocks = t.LM(tiny_config(stack="gdn*2 swa*2")).blocks
    assert len({id(block.mixer) for block in blocks}) == 4 == len({id(block.mlp) for block in blocks})


def test_shared_weights_are_stored_once(tiny_config):
    names = [name for name, _ in t.LM(tiny_config()).named_parameters()]
    assert [name for name in names if name.startswith("blocks.3.mixer.")] == []
    assert len([name for name in names if name.endswith("mlp.up_proj")]) == 4


def test_share_mlp_shares_the_mlp_of_a_tag_only(tiny_config):
    blocks = t.LM(tiny_config(share_mlp=True)).blocks
    assert blocks[1].mlp is blocks[3].mlp
    assert blocks[0].mlp is not blocks[2].mlp


@pytest.mark.parametrize("preset, heads, mlp, published", [("record", 4, 4, 39_712_608), ("pr1749", 8, 3, 33_862_961)])
def test_parameter_count(preset, heads, mlp, published):
    with torch.device("meta"):
        model = t.LM(t.Config.from_env(dict(PRESET=preset)))
    gates = 10 * 2 * 512 * heads
    per_head = 10 * (2 * heads + 512 // heads)
    matrices = 10 * 5 * 512 * 512 + 3 * 512 * 512 + 12 * 2 * mlp * 512 * 512
    vectors = 10 * 3 * 512 * 4 + 12 * 4 * 512 + 2 * 8 + 512
    tables = 1024 * 512 + (3072 * 112 + 512 * 112 + 1 if preset == "pr1749" else 0)
    count = sum(p.numel() for p in model.parameters())
    assert count == matrices + gates + per_head + vectors + tables == published


# ---- initial values ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record_model():
    """A model at its initial values, with matrices wide enough to measure every distribution."""
    cfg = t.Config(stack="gdn*4 swa:a swa:a", gdn_heads=64, gdn_head_dim=8, ngram_buckets=3072)
    return t.init_weights(t.LM(cfg), 1)


def every(model, kind):
    """All values of the parameters whose name ends in `kind`."""
    found = [p.detach() for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == kind]
    assert found, kind
    return found


def test_embedding_starts_normal(record_model):
    weight, = every(record_model, "weight")
    assert float(weight.std()) == pytest.approx(0.005, rel=0.01)
    assert float(weight.abs().max()) > 3.5 * 0.005  # wider than a uniform of this deviation


@pytest.mark.parametrize("kind", ["o_proj", "down_proj", "ngram_table"])
def test_starts_at_zero(record_model, kind):
    assert not any(p.any() for p in every(record_model, kind))


@pytest.mark.parametrize("kind", ["q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj", "up_proj", "ngram_proj"])
def test_matrices_start_uniform(record_model, kind):
    for p in every(record_model, kind):
        assert float(p.std()) == pytest.approx((3 * p.shape[1]) ** -0.5, rel=0.02)
        assert float(p.abs().max()) <= p.shape[1] ** -0.5


@pytest.mark.parametrize("kind", ["q_conv", "k_conv", "v_conv"])
def test_convolution_starts_uniform(record_model, kind):
    for p in every(record_model, kind):
        assert float(p.std()) == pytest.approx(0.5 / 3**0.5, rel=0.03)
        assert 0.49 < float(p.abs().max()) <= 0.5


def test_decay_starts_uniform_up_to_sixteen(record_model):
    A = torch.cat(every(record_model, "A_log")).exp()
    assert float(A.mean()) == pytest.approx(8, rel=0.15) and float(A.std()) == pytest.approx(16 / 12**0.5, rel=0.15)
    assert 15 < float(A.max()) <= 16.001


def test_time_step_starts_log_uniform(record_model):
    dt = F.softplus(torch.cat(every(record_model, "dt_bias"))).log()
    assert float(dt.mean()) == pytest.approx(math.log(0.01), abs=0.25)
    assert math.log(0.000999) < float(dt.min()) and float(dt.max()) < math.log(0.1001)
    assert float(dt.std()) == pytest.approx(math.log(100) / 12**0.5, rel=0.15)


CONSTANTS = {"mixer_scale": 1, "mlp_scale": 1, "o_norm": 1, "qk_gain": 5, "smear_gate": -2, "ngram_scale": 0.05}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_vectors_start_constant(record_model, kind):
    assert all((p == CONSTANTS[kind]).all() for p in every(record_model, kind))


def test_residual_mix_starts_at_the_residual(record_model):
    assert all((p[0] == 1).all() and (p[1] == 0).all() for p in every(record_model, "resid_mix"))


def test_a_fresh_model_is_the_embedding_alone(tiny_config):
    model, ids = t.init_weights(t.LM(tiny_config()), 0), random_ids(1, 9)
    want = model.embed.logits(embed(model, ids)[0])
    torch.testing.assert_close(model(ids)[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("same", [True, False], ids=["same_seed", "other_seed"])
def test_initial_values_follow_the_seed(tiny_config, same):
    a, b = (t.init_weights(t.LM(tiny_config()), seed) for seed in (3, 3 if same else 4))
    assert torch.equal(a.blocks[0].mixer.q_proj, b.blocks[0].mixer.q_proj) == same


# ---- settings of the model --------------------------------------------------------------------------


@pytest.mark.parametrize("act, slope", [("relu2", 0.0), ("leaky_relu2", 0.5)])
def test_mlp_squares_its_activation(tiny_config, tiny_model, act, slope):
    mlp = tiny_model(tiny_config(mlp_act=act)).blocks[0].mlp
    x = random_x(2, 5)
    hidden = x @ mlp.up_proj.T
    want = torch.where(hidden > 0, hidden, slope * hidden) ** 2 @ mlp.down_proj.T
    torch.testing.assert_close(mlp(x, None), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mult, width", [(0.25, 16), (2.5, 160), (3.0, 192)], ids="x{}".format)
def test_mlp_mult_sets_the_width(tiny_config, mult, width):
    assert t.MLP(tiny_config(mlp_mult=mult)).up_proj.shape == (width, 64)


@pytest.mark.parametrize("negative, top", [(False, 1.0), (True, 2.0)], ids=["positive", "negative"])
def test_gdn_neg_eigval_doubles_the_range_of_beta(tiny_config, tiny_model, monkeypatch, negative, top):
    model, seen, rule = tiny_model(tiny_config(stack="gdn", gdn_neg_eigval=negative)), [], t.gated_delta_rule
    monkeypatch.setattr(t, "gated_delta_rule", lambda **x: seen.append(x["beta"]) or rule(**x))
    with torch.no_grad():
        model(random_ids(4, 64))
    assert 0.8 * top < float(seen[0].max()) < top and float(seen[0].min()) > 0


def test_gdn_hands_the_kernel_what_it_asks_for(tiny_config, tiny_model, monkeypatch):
    model, seen, rule = tiny_model(tiny_config(stack="gdn", gdn_v_heads=4)), {}, t.gated_delta_rule
    monkeypatch.setattr(t, "gated_delta_rule", lambda **x: seen.update(x) or rule(**x))
    model(random_ids(2, 20))
    assert {n: tuple(seen[n].shape) for n in ("q", "k", "v", "g", "beta")} == {
        "q": (2, 20, 2, 16), "k": (2, 20, 2, 16), "v": (2, 20, 4, 16), "g": (2, 20, 4), "beta": (2, 20, 4)}
    for name in ("q", "k"):
        torch.testing.assert_close(seen[name].norm(dim=-1), torch.ones(2, 20, 2), rtol=1e-4, atol=1e-4)
    assert (seen["g"] <= 0).all() and seen["g"].dtype == torch.float32


def test_gdn_v_heads_sets_the_state(tiny_config, tiny_model):
    _, state = tiny_model(tiny_config(stack="gdn", gdn_v_heads=4))(random_ids(2, 20))
    assert state.layers[0].S.shape == (2, 4, 16, 16)
    assert state.layers[0].conv.shape == (2, 3, (2 + 2 + 4) * 16)


@pytest.mark.parametrize("kind, window", [("swa", 16), ("attn", 64)])
def test_window_of_each_attention_kind(tiny_config, kind, window):
    assert t.LM(tiny_config(stack=kind)).blocks[0].mixer.window == window


@pytest.mark.parametrize("overrides, absent", [(dict(ngram_buckets=0), "ngram"), (dict(smear=False), "smear")],
                         ids=["no_ngrams", "no_smear"])
def test_a_feature_that_is_off_has_no_parameters(tiny_config, overrides, absent):
    assert [name for name, _ in t.LM(tiny_config(**overrides)).named_parameters() if absent in name] == []


@pytest.mark.parametrize("gain", [0.0, 8.0], ids=["flat", "sharp"])
def test_qk_gain_sharpens_attention(tiny_config, tiny_model, gain):
    mixer, x = tiny_model(tiny_config(stack="swa")).blocks[0].mixer, random_x(1, 8)
    y, _ = mixer(x, None, torch.full((4,), gain), None, None)
    mean = x.cumsum(1) / torch.arange(1, 9)[:, None]
    flat = (mean @ mixer.kv.v_proj.T).unflatten(-1, (2, 16)).repeat_interleave(2, 2).flatten(2) @ mixer.o_proj.T
    assert torch.allclose(y, flat, atol=1e-4) == (gain == 0.0)


def test_model_fields_rebuild_the_model(tiny_config, tiny_model):
    cfg = tiny_config(mlp_act="leaky_relu2", ngram_order=2, gdn_v_heads=4, rope_dims=8)
    model, ids = tiny_model(cfg), random_ids(1, 20)
    kept = {name: getattr(cfg, name) for name in t.MODEL_FIELDS}
    other = t.LM(dataclasses.replace(tiny_config(), **kept))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(ids)[0], other(ids)[0])


# ---- what the ancestors bring -----------------------------------------------------------------------


def test_kv_share_gives_neighbours_of_one_kind_one_key_value(tiny_config):
    model = t.LM(tiny_config(stack="gdn*2 swa gdn*2 swa gdn", kv_share=2))
    kv = [block.mixer.kv for block in model.blocks]
    gdn = [kv[i] for i in (0, 1, 3, 4, 6)]
    assert gdn[0] is gdn[1] and gdn[2] is gdn[3] and kv[2] is kv[5]
    assert len({id(x) for x in kv}) == 4  # three groups of GDN layers, one of attention
    assert sum("k_proj" in name for name, _ in model.named_parameters()) == 4  # stored once each


def test_kv_share_leaves_queries_and_gates_apart(tiny_config):
    a, b = (block.mixer for block in t.LM(tiny_config(stack="gdn*2", kv_share=2)).blocks)
    assert a is not b and a.q_proj is not b.q_proj and a.q_conv is not b.q_conv and a.g_proj is not b.g_proj


def test_unique_layers_loop_over_the_matrices_with_vectors_of_their_own(tiny_config):
    blocks = t.LM(tiny_config(stack="attn*6", unique_layers=3)).blocks
    for i in range(3):
        assert blocks[i].mixer is blocks[i + 3].mixer and blocks[i].mlp is blocks[i + 3].mlp
        assert blocks[i].mixer_scale is not blocks[i + 3].mixer_scale
    assert blocks[0].mixer is not blocks[1].mixer


def test_unet_adds_the_first_half_to_the_second_in_mirror_order(tiny_config, tiny_model):
    model = tiny_model(tiny_config(stack="gdn swa gdn", unet=True))  # one skip, from the first layer to the last
    ids = torch.arange(20)[None] % 64
    x, _ = model.embed(ids, model.embed.fresh_state(1, "cpu", torch.float32), None, torch.float32)
    first, _ = model.blocks[0](x, x, None, None)
    second, _ = model.blocks[1](first, x, None, None)
    third, _ = model.blocks[2](second + model.skip_scale[0] * first, x, None, None)
    torch.testing.assert_close(model(ids)[0], model.embed.logits(third), rtol=1e-5, atol=1e-5)


def test_unet_pairs_the_second_layer_with_the_last_but_one(tiny_config, tiny_model):
    model, ids = tiny_model(tiny_config(stack="gdn*4", unet=True)), torch.arange(20)[None] % 64
    assert model.skip_scale.shape[0] == 2
    given, out = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, result: given.append(args) or out.append(result[0]))
    with torch.no_grad():
        model(ids)
        for i, skip in ((2, out[1]), (3, out[0])):  # into 2 what left 1, into 3 what left 0
            x, x0, state, packing, *_ = given[i]
            assert torch.equal(x, out[i - 1])
            want, _ = model.blocks[i](x + model.skip_scale[i - 2] * skip, x0, state, packing)
            torch.testing.assert_close(out[i], want)
    assert len(given[0]) == len(given[1]) == 4


def test_xsa_output_is_orthogonal_to_the_tokens_own_value():
    rng = torch.Generator().manual_seed(0)
    o, v = torch.randn(2, 5, 4, 8, generator=rng), torch.randn(2, 5, 2, 8, generator=rng)
    own = v.repeat_interleave(2, 2)
    want = o - (o * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own
    got = t.without_own_value(o, v)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert float((got * own).sum(-1).abs().max()) < 1e-4


def test_xsa_is_on_in_the_last_attention_layers_only(tiny_config):
    blocks = t.LM(tiny_config(stack="swa gdn swa swa gdn", xsa_layers=2)).blocks
    assert [block.xsa for block in blocks] == [False, False, True, True, False]


@pytest.mark.parametrize("overrides", [dict(stack="gdn swa:a gdn swa:a"), dict(stack="attn*4", unique_layers=2)],
                         ids=["tag", "loop"])
def test_xsa_of_a_shared_mixer_is_its_layers_own(tiny_config, tiny_model, overrides):
    ids, logits = random_ids(1, 20), []
    for xsa_layers in (0, 1, 2):
        model = tiny_model(tiny_config(**overrides, xsa_layers=xsa_layers))
        assert sum(block.xsa for block in model.blocks) == xsa_layers
        with torch.no_grad():
            logits.append(model(ids)[0])
    assert not any(torch.allclose(*pair) for pair in zip(logits, logits[1:] + logits[:1]))


@pytest.mark.parametrize("overrides", [dict(kv_share=2), dict(unet=True), dict(xsa_layers=2), dict(unique_layers=2)],
                         ids=["kv_share", "unet", "xsa", "unique_layers"])
def test_a_feature_keeps_causality_and_carried_state(tiny_config, tiny_model, overrides):
    model = tiny_model(tiny_config(stack="gdn swa gdn swa", **overrides))
    ids = torch.randint(64, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, _ = model(ids)
        changed = ids.clone()
        changed[0, 30] = (ids[0, 30] + 1) % 64
        assert torch.equal(model(changed)[0][:, :30], whole[:, :30])
        head, state = model(ids[:, :23])
        tail, _ = model(ids[:, 23:], state)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-4, atol=1e-4)


# ---- regions -------------------------------------------------------------------------------------


@t.region
def doubled(x):
    return 2 * x, torch.compiler.is_compiling()


def test_regions_run_compiled_only_inside_a_compiled_function(monkeypatch):
    seen = []

    def fake_compile(function, **options):
        seen.append(options)
        return lambda x: ("fast", function(x)[0])
    monkeypatch.setattr(torch, "compile", fake_compile)
    both = [t.compiled(doubled, enabled) for enabled in (True, False)]
    assert doubled(3) == (6, False) and both[0](3) == ("fast", 6) and both[1](3) == (6, False)
    assert both[0](4) == ("fast", 8) and len(seen) == 1 and seen[0]["fullgraph"] and not seen[0]["dynamic"]

    def nested(x):
        return both[1](x), doubled(x)
    assert t.compiled(nested, True)(1) == ((2, False), ("fast", 2))

    def failing():
        raise KeyError
    with pytest.raises(KeyError):
        t.compiled(failing, True)()
    assert doubled(3) == (6, False)


@pytest.mark.parametrize("method, targets, adapting, compiles", [
    ("exact", 2_300_000, False, False), ("exact", 62_000_000, False, True), ("sliding", 2_300_000, False, True),
    ("exact", 2_300_000, True, False), ("exact", 62_000_000, True, True), ("roundtrip", 40_000_000, False, False)])
def test_evaluation_is_compiled_where_it_pays(tiny_config, method, targets, adapting, compiles):
    cfg = tiny_config(compile="auto", eval_stride=2, ttt_epochs=1)  # 32 passes over each target by windows
    assert t.compile_evaluation(cfg, t.Run(), method, targets, adapting) == compiles
    for enabled in "01":
        forced = tiny_config(compile=enabled)
        assert t.compile_evaluation(forced, t.Run(), method, targets, adapting) == (enabled == "1")
    shared = t.compile_evaluation(cfg, t.Run(world_size=8), method, targets, adapting)
    assert t.compile_evaluation(tiny_config(compile="auto", eval_stride=2, ttt_epochs=30), t.Run(), method, targets,
                                adapting) == (compiles or adapting)
    assert shared == (adapting and targets == 62_000_000 or method == "sliding" and targets * 32 / 8 > t.EAGER_TOKENS)


def test_training_in_evaluation_is_compiled_however_many_ranks_share_its_rows(tiny_config):
    """A rank's few rows are bound by the launches of their kernels, which only compiled training records as graphs."""
    cfg = tiny_config(compile="auto", ttt_epochs=8)
    assert all(t.compile_evaluation(cfg, t.Run(world_size=n), "exact", 2_300_000, True) for n in (1, 2, 8))


def test_more_exclusive_layers_than_attention_layers_are_all_of_them(tiny_config):
    def exclusive(count):
        return [block.xsa for block in t.LM(tiny_config(stack="swa gdn swa swa", xsa_layers=count)).blocks]
    assert exclusive(2) == [False, False, True, True] and exclusive(0) == [False] * 4
    assert exclusive(3) == exclusive(4) == [True, False, True, True]
