"""The model's plain operations against formulas written out here in float64, and LM against itself:
later tokens changed, state carried, weights shared, initial values by their distributions.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, tiny_config, tiny_model

import train_gpt as t


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_ids(B, T, low=0, seed=0):
    """Tokens of a vocabulary of 64; with low=2 without BOS, which is 1."""
    return torch.randint(low, 64, (B, T), generator=torch.Generator().manual_seed(seed))


def results_and_gradients(call, inputs):
    """{name: float64} of what call(**inputs) returns, and of the inputs' gradients."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = call(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((y.double() * normal(*y.shape, seed=i).to(y.device)).sum()
               for i, y in enumerate(outputs))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True,
                                materialize_grads=True)
    found = {f"output {i}": y.detach().double() for i, y in enumerate(outputs)}
    return found | {"gradient of " + name: grad.double() for name, grad in zip(leaves, grads)}


def recurrence(q, k, v, g, beta, state):
    """Equation 10 of the Gated DeltaNet paper, one token after another."""
    K = q.shape[-1]
    S = state
    out = []
    for i in range(q.shape[1]):
        key = k[:, i, :, :, None]
        write = beta[:, i, :, None, None]
        keep = torch.eye(K, dtype=q.dtype) - write * key @ key.mT
        S = g[:, i, :, None, None].exp() * keep @ S + write * key @ v[:, i, :, None, :]
        out.append((q[:, i, :, None, :] @ S).squeeze(-2) / K**0.5)
    return torch.stack(out, 1), S


@pytest.mark.parametrize("T, strongest, top_beta", [  # g reaches down to -strongest
    (1, 2.0, 1.0), (63, 2.0, 1.0), (64, 2.0, 1.0), (65, 2.0, 1.0), (200, 2.0, 1.0),
    (130, 20.0, 1.0), (130, 2.0, 2.0)])
def test_delta_rule_equals_the_token_by_token_recurrence(T, strongest, top_beta):
    x = dict(q=F.normalize(normal(2, T, 2, 8, seed=1), dim=-1),
             k=F.normalize(normal(2, T, 2, 8, seed=2), dim=-1), v=normal(2, T, 2, 5, seed=3),
             g=-strongest * normal(2, T, 2, seed=4).sigmoid(),
             beta=top_beta * normal(2, T, 2, seed=5).sigmoid(), state=normal(2, 2, 8, 5, seed=6))
    assert_same(results_and_gradients(t.delta_rule, x), results_and_gradients(recurrence, x),
                rtol=1e-7, atol=1e-8)


def conv_by_torch(x, weight, tail, heads):
    text = torch.cat([tail, x], 1)
    y = F.silu(F.conv1d(text.mT, weight[:, None], groups=len(weight)).mT)
    q, k, v = [part.unflatten(-1, (heads, -1)) for part in y.chunk(3, -1)]
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


@pytest.mark.parametrize("T", [1, 2, 20])
def test_conv_heads_equals_conv1d_silu_and_l2_norm(T):
    x = dict(x=normal(2, T, 30), weight=normal(30, 4, seed=1), tail=normal(2, 3, 30, seed=2))
    got, want = [results_and_gradients(lambda f=f, **a: f(**a, heads=2), x)
                 for f in (t.conv_heads, conv_by_torch)]
    assert_same(got, want, rtol=1e-5, atol=1e-5)


def test_gated_norm_is_a_normalized_output_times_weight_and_silu_of_the_gate():
    o, gate, weight = normal(2, 7, 3, 4), normal(2, 7, 12, seed=1), normal(4, seed=2)
    want = F.rms_norm(o, (4,), weight, 1e-6) * F.silu(gate).view(2, 7, 3, 4)
    torch.testing.assert_close(t.gated_norm(o, gate, weight), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_mlp_squares_its_activation(slope):
    x, up, down, scale = normal(2, 5, 6), normal(9, 6, seed=1), normal(6, 9, seed=2), normal(6)
    hidden = x @ up.T
    want = torch.where(hidden > 0, hidden, slope * hidden) ** 2 @ down.T * scale
    torch.testing.assert_close(t.mlp(x, up, down, scale, slope), want)


def dense_attention(q, k, v, window):
    """Softmax over a full score matrix in float64, masked key by key."""
    T, H, d = q.shape[1:]
    S = k.shape[1]
    k, v = [x.repeat_interleave(H // x.shape[2], 2).double() for x in (k, v)]
    at = torch.arange(S - T, S, device=q.device)[:, None]
    key = torch.arange(S, device=q.device)
    visible = (key <= at) & (key > at - window)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k) / d**0.5
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


# T queries, S keys of which S - T were carried over, window
SHAPES = [(1, 1, 1), (1, 16, 16), (5, 20, 16), (16, 16, 16), (17, 17, 16), (33, 33, 1),
          (64, 64, 16), (40, 55, 16), (50, 57, 16), (16, 31, 16), (17, 32, 16), (40, 70, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_a_dense_masked_softmax(shape):
    T, S, window = shape
    x = dict(q=normal(2, T, 4, 8), k=normal(2, S, 2, 8, seed=1), v=normal(2, S, 2, 8, seed=2))
    got, want = [results_and_gradients(lambda f=f, **a: f(**a, window=window), x)
                 for f in (t.attention, dense_attention)]
    assert_same(got, want, rtol=1e-8, atol=1e-9)


def test_rotary_equals_complex_multiplication():
    x = normal(2, 9, 3, 8)
    angle = torch.arange(9)[:, None] * 100.0 ** (-torch.arange(4).double() / 4)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    z = torch.complex(*x.chunk(2, -1)) * turn
    table = t.rotary_table(9, 100.0, 8, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(t.rotary(x, table), torch.cat([z.real, z.imag], -1),
                               rtol=1e-5, atol=1e-5)


FEATURES = {
    "gdn": dict(stack="gdn*2"), "swa": dict(stack="swa*2"), "attn": dict(stack="attn*2"),
    "shared mixers": {}, "shared blocks": dict(stack="(gdn::a swa::b)*2"),
    "no n-grams, no smear": dict(ngram_buckets=0, smear=False), "bigrams": dict(ngram_order=2),
    "no BOS": dict(bos_id=-1),
    "kv share": dict(stack="gdn*2 swa*2", kv_share=2), "leaky": dict(mlp_act="leaky_relu2"),
    "unet": dict(stack="gdn swa attn gdn swa", unet=True),
    "xsa": dict(stack="swa attn*2", xsa_layers=2)}


@pytest.mark.parametrize("feature", [*FEATURES, "hash table"])
def test_logits_before_a_changed_token_stay_bit_equal(feature):
    model = tiny_model(tiny_config(**FEATURES.get(feature, {})))
    if feature == "hash table":
        model.embed.hash_table = torch.nn.Parameter(normal(32, 64, dtype=torch.float32))
    ids = random_ids(2, 100)
    with torch.no_grad():
        _, state = model(random_ids(2, 30, seed=1))
        before, _ = model(ids, state)
        for at in (1, 16, 64, 99):
            changed = torch.cat([ids[:, :at], (ids[:, at:] + 7) % 64], 1)
            after, _ = model(changed, state)
            assert torch.equal(after[:, :at], before[:, :at]), at
            assert not torch.allclose(after[:, at], before[:, at]), at


SMALL = dict(DEVICE="cpu", VOCAB_SIZE="64", MODEL_DIM="32", NUM_HEADS="4", NUM_KV_HEADS="2",
             SWA_WINDOW="16", GDN_HEADS="2", GDN_HEAD_DIM="8", NGRAM_BUCKETS="64", NGRAM_DIM="8",
             TRAIN_SEQ_LEN="64", TRAIN_BATCH_TOKENS="512", EVAL_STRIDE="16")
CUTS = [(preset, [1, 2, 63, 64, 20]) for preset in t.PRESETS]
CUTS += [("record", [cut, 70]) for cut in (1, 2, 3, 15, 16, 17, 65)]


@pytest.mark.parametrize("preset, cuts", CUTS)
def test_text_in_parts_with_carried_state_equals_one_pass(preset, cuts):
    model = tiny_model(t.Config.from_env(SMALL | dict(PRESET=preset)))
    ids = random_ids(2, sum(cuts))
    state = None
    parts = []
    with torch.no_grad():
        for part in ids.split(cuts, 1):
            logits, state = model(part, state)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), model(ids)[0], rtol=1e-4, atol=2e-4)


def test_returned_state_is_detached():
    _, state = tiny_model(tiny_config(stack="gdn swa"))(random_ids(1, 10))
    assert not any(x.requires_grad for pair in state for x in pair)


def embed(model, ids):
    start = torch.full((len(ids), 2), -1), torch.zeros(len(ids), 1, model.cfg.model_dim)
    return model.embed(ids, start, torch.float32)[0]


@pytest.mark.parametrize("order", [2, 3])
def test_a_document_start_hides_the_text_before_from_the_embedding(order):
    model = tiny_model(tiny_config(ngram_order=order))
    ids = random_ids(1, 12, low=2)
    ids[:, 5] = 1
    other = torch.cat([random_ids(1, 5, low=2, seed=1), ids[:, 5:]], 1)
    assert torch.equal(embed(model, ids)[:, 5:], embed(model, other)[:, 5:])


@pytest.mark.parametrize("feature, back", [(dict(smear=False), 2), (dict(ngram_buckets=0), 1)])
def test_trigrams_reach_two_tokens_back_and_smear_one(feature, back):
    model = tiny_model(tiny_config(**feature))
    ids = random_ids(1, 12, low=2)
    changed = torch.cat([ids[:, :5], ids[:, 5:6] ^ 4, ids[:, 6:]], 1)
    differs = (embed(model, ids) != embed(model, changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(5, 6 + back))


def test_logits_stay_within_the_softcap():
    model = tiny_model(tiny_config(logit_softcap=2.0))
    with torch.no_grad():
        model.embed.weight.mul_(100)
    assert 1.9 < float(model(random_ids(2, 9))[0].detach().abs().max()) <= 2.0


@pytest.mark.parametrize("bonus", [None, (torch.tensor([[7, -1, 0, 5]]), 1.5)],
                         ids=["plain", "hinted"])
def test_nll_is_the_cross_entropy_with_the_hinted_logit_raised(bonus):
    model, ids = tiny_model(tiny_config()), random_ids(1, 4)
    logits = model(ids)[0].detach().double()
    for place, token in enumerate(bonus[0][0].tolist() if bonus else ()):
        logits[0, place, token] += 1.5 if token >= 0 else 0.0
    targets = random_ids(1, 4, seed=1)
    nats, _ = model.nll(ids, targets.int(), bonus=bonus)
    torch.testing.assert_close(nats.double(), F.cross_entropy(logits.mT, targets, reduction="none"),
                               rtol=1e-5, atol=1e-5)


def test_a_single_colon_shares_the_mixer_a_double_one_the_mlp_too_and_none_a_vector():
    _, one, _, other = t.LM(tiny_config(stack="gdn swa:a gdn swa:a")).blocks
    assert one.mixer is other.mixer
    assert one.mlp is not other.mlp and one.qk_gain is not other.qk_gain
    one, _, other, _ = t.LM(tiny_config(stack="(attn::a gdn::b)*2")).blocks
    assert one.mixer is other.mixer and one.mlp is other.mlp
    assert one.mixer_scale is not other.mixer_scale


def test_kv_share_gives_neighbours_of_one_kind_one_key_and_value():
    model = t.LM(tiny_config(stack="gdn*2 swa gdn*2 swa gdn", kv_share=2))
    names = [name for name, _ in model.named_parameters() if name.endswith("k_proj")]
    assert names == [f"blocks.{i}.mixer.kv.k_proj" for i in (0, 2, 3, 6)]
    blocks = model.blocks
    assert blocks[0].mixer.kv is blocks[1].mixer.kv and blocks[2].mixer.kv is blocks[5].mixer.kv
    assert blocks[0].mixer.q_proj is not blocks[1].mixer.q_proj


def test_unet_adds_the_first_half_to_the_second_in_mirror_order():
    model = tiny_model(tiny_config(stack="gdn swa gdn swa attn", unet=True))
    ids = random_ids(1, 20)
    x0 = embed(model, ids)
    a, _ = model.blocks[0](x0, x0, None)
    b, _ = model.blocks[1](a, x0, None)
    x, _ = model.blocks[2](b, x0, None)
    x, _ = model.blocks[3](x + model.skip_scale[0] * b, x0, None)
    x, _ = model.blocks[4](x + model.skip_scale[1] * a, x0, None)
    torch.testing.assert_close(model(ids)[0], model.embed.logits(x), rtol=1e-5, atol=1e-5)


def test_xsa_takes_the_tokens_own_value_out_of_the_last_attention_layers():
    o, v = normal(2, 6, 4, 8), normal(2, 6, 2, 8, seed=1)
    left = t.without_own_value(o, v)
    own = v.repeat_interleave(2, 2)
    assert float((left * own).sum(-1).abs().max()) < 1e-5
    torch.testing.assert_close(left + (o * own).sum(-1, True) / own.square().sum(-1, True) * own,
                               o, rtol=1e-5, atol=1e-5)
    blocks = t.LM(tiny_config(stack="attn swa gdn attn gdn", xsa_layers=2)).blocks
    assert [block.xsa for block in blocks] == [False, True, False, True, False]


@pytest.mark.parametrize("preset, parameters", [
    ("record", 43_382_624), ("pr1749", 33_862_961), ("pr456", 25_517_137)])
def test_preset_has_its_published_number_of_weights(preset, parameters):
    with torch.device("meta"):
        model = t.LM(t.Config.from_env(dict(PRESET=preset)))
    assert sum(p.numel() for p in model.parameters()) == parameters


SPREAD = {"weight": (lambda x: x / 0.005, 0.0, 1.0),  # how to straighten it, mean, deviation
          "A_log": (torch.exp, 8.0, 16 / 12**0.5),
          "dt_bias": (lambda x: F.softplus(x).log(), math.log(0.01), math.log(100) / 12**0.5)}
CONSTANTS = dict(mixer_scale=1, mlp_scale=1, o_norm=1, qk_gain=5, smear_gate=-2, ngram_scale=0.05,
                 o_proj=0, down_proj=0, ngram_table=0)
UNIFORM = dict(q_proj=512, k_proj=512, g_proj=512, a_proj=512, up_proj=512, ngram_proj=112,
               q_conv=4)


def test_weights_start_at_their_values_or_in_their_distributions():
    """The model has enough of each kind to measure its distribution."""
    cfg = t.Config(stack="gdn*4 swa:a swa:a", gdn_heads=64, gdn_head_dim=8, ngram_buckets=3072)
    fresh = t.init_weights(t.LM(cfg), 1)

    def every(kind):
        """All values of the parameters whose name ends in `kind`, as one vector."""
        return torch.cat([p.detach().flatten() for name, p in fresh.named_parameters()
                          if name.rsplit(".", 1)[-1] == kind])
    for kind, value in CONSTANTS.items():
        assert torch.equal(every(kind).unique(), torch.tensor([float(value)])), kind
    assert torch.equal(fresh.blocks[3].resid_mix, torch.tensor([[1.0], [0.0]]).expand(2, 512))
    for kind, columns in UNIFORM.items():
        values = every(kind) * columns**0.5
        assert float(values.std()) == pytest.approx(3**-0.5, rel=0.03), kind
        assert 0.99 < float(values.abs().max()) <= 1.0001, kind
    for kind, (straighten, mean, deviation) in SPREAD.items():
        values = straighten(every(kind))
        assert float(values.mean()) == pytest.approx(mean, abs=0.15 * deviation), kind
        assert float(values.std()) == pytest.approx(deviation, rel=0.1), kind
