"""tests/bench.py: what it counts, how it groups kernels, and that its steps and its plain composition are the model's.

FLA's kernels need a GPU; on the CPU functions of torch with the same signatures stand in for them.
"""

import ast
import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_config, tiny_model

import train_gpt as t

PEAKS = 790e12, 3.0e12


class Loss:
    def __init__(self, logit_softcapping):
        self.cap = logit_softcapping

    def __call__(self, x, target, weight):
        logits = self.cap * torch.tanh(x @ weight.mT / self.cap)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def conv(x, weight, activation):
    assert activation == "silu"
    y = F.conv1d(F.pad(x.mT, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), groups=len(weight))
    return F.silu(y).mT, None


def chunk(q, k, v, g, beta, A_log, dt_bias, use_gate_in_kernel, use_beta_sigmoid_in_kernel, use_qk_l2norm_in_kernel,
          allow_neg_eigval):
    assert use_gate_in_kernel and use_beta_sigmoid_in_kernel and use_qk_l2norm_in_kernel
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    g = -A_log.exp() * F.softplus(g + dt_bias)
    return t.gated_delta_rule_reference(q, k, v, g, beta.sigmoid() * (2 if allow_neg_eigval else 1))


def gated_norm(x, g, weight, bias, activation, eps):
    assert bias is None and activation == "swish"
    return F.rms_norm(x, x.shape[-1:], weight, eps) * F.silu(g)


def norm(x, weight, bias, eps):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


STAND_INS = SimpleNamespace(conv=conv, chunk=chunk, gated_norm=gated_norm, norm=norm, loss=Loss)


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(bench, "fla_parts", lambda: STAND_INS)


# ---- counts -----------------------------------------------------------------------------------------

# The published cost model of the default stack, MLP 3, without n-grams and smear: MFLOP and KB per token, by part.
COUNTED = {
    ("GDN in-proj",): (63.2, 154), ("GDN out-proj",): (15.7, 61), ("GDN conv, silu",): (0, 184),
    ("GDN chunk op", "GDN l2 norm"): (25.1, 732), ("GDN gated norm",): (0, 82), ("norm, residual",): (0, 197),
    ("attention proj",): (9.4, 31), ("attention", "attention norm, rotary"): (6.4, 42), ("MLP",): (113.2, 295),
    ("MLP activation",): (0, 184), ("head",): (3.1, 9), ("loss", "embedding"): (0, 14)}


def test_costs_of_the_default_stack_are_the_published_ones():
    ops = bench.model_cost(t.Config(ngram_buckets=0, smear=False, mlp_mult=3.0))
    for names, (mflop, kb) in COUNTED.items():
        mine = [op for op in ops if op.name in names]
        assert sum(op.flops for op in mine) / 1e6 == pytest.approx(mflop, abs=0.0501), names
        assert round(sum(op.bytes for op in mine) / 1e3) == kb, names
    assert {op.name for op in ops} == {name for names in COUNTED for name in names}
    assert round(sum(op.flops for op in ops) / 1e6) == 236
    assert round(sum(op.bytes for op in ops) / 1e3) == 1986
    assert round(sum(op.floor_ns(PEAKS) for op in ops)) == 738


def test_costs_follow_the_config():
    def total(**overrides):
        ops = bench.model_cost(t.Config(ngram_buckets=0, smear=False, **overrides))
        return sum(op.flops for op in ops), sum(op.bytes for op in ops)

    assert round(total(gdn_heads=8, gdn_head_dim=64, mlp_mult=3.0)[1] / 1e3) == 1940  # published too
    two, four, six = (total(stack=f"gdn*{n} swa*{n}") for n in (1, 2, 3))
    assert [b - a for a, b in zip(two, four)] == pytest.approx([b - a for a, b in zip(four, six)])
    assert total(stack="attn")[0] > total(stack="swa")[0] == total(stack="attn", train_seq_len=512)[0] + 7 * 2 * 512 * (
        512 - 512 * 511 / 2 / 2048 - 256.5)
    with_ngrams = bench.model_cost(t.Config(ngram_buckets=64))
    assert sum(op.flops for op in with_ngrams) - total()[0] == 6 * 112 * 512


def test_gemms_are_those_of_a_forward(tiny_config):
    """6 FLOPs per weight that enters a product, counted by watching a forward."""
    cfg, seen = tiny_config(gdn_v_heads=4), []
    t.OBSERVERS.append(lambda x, weights: seen.extend(w.numel() for w in weights))
    try:
        t.LM(cfg)(torch.zeros(1, 64, dtype=torch.long))
    finally:
        t.OBSERVERS.pop()
    assert sum(op.flops for op in bench.model_cost(cfg) if op.group == bench.GEMM) == 6 * sum(seen)


def test_optimizer_cost_counts_every_parameter(tiny_config):
    cfg = tiny_config(muon_backend_steps=3)
    count = Counter()
    for name, p in t.LM(cfg).named_parameters():
        count[t.route(name).optimizer] += p.numel()
    ops = bench.optimizer_cost(cfg)
    assert sum(op.bytes for op in ops) * cfg.train_batch_tokens == pytest.approx(
        (36 + 3 * 6) * count["muon"] + 44 * count["adamw"])
    R, C = t.LM(cfg).blocks[0].mlp.up_proj.shape  # X^T X, its square, and their product with X
    assert max(op.flops for op in ops) * cfg.train_batch_tokens == 3 * 2 * (C * C * R + C**3 + C * C * R)


@pytest.mark.parametrize("name, group", [
    ("tilelang_fused_chunk_gdr_bwd_kernel_kernel", bench.CHUNK),
    ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", bench.CHUNK), ("chunk_bwd_kernel_dqkwg", bench.CHUNK),
    ("kernel_kernel", bench.CHUNK), ("prepare_wy_repr_bwd_kernel", bench.CHUNK),
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", bench.GEMM), ("mlp_product", bench.GEMM),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x1_tn_align8>", bench.GEMM),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<pytorch_flash::Flash_bwd_kernel_traits<64, 128, "
     "128, 8, 4, 4, 4, false, false, cutlass::bfloat16_t>>", bench.ATTENTION),
    ("triton_red_fused__log_softmax__to_copy_div_mul_tanh_41", bench.LOSS),
    ("cross_entropy_fwd_kernel", bench.LOSS), ("triton_poi_fused_add_mul_silu_3", bench.ELEMENTWISE),
    ("layer_norm_gated_fwd_kernel", bench.ELEMENTWISE), ("causal_conv1d_bwd_kernel", bench.ELEMENTWISE),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", bench.ELEMENTWISE),
    ("Memcpy DtoD (Device -> Device)", bench.ELEMENTWISE),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", bench.COMMUNICATION), ("never_seen_kernel", bench.OTHER)])
def test_kernels_are_grouped_by_name(name, group):
    assert bench.kernel_group(name) == group


def test_compiles_counts_graphs_and_breaks():
    def double(x):
        return 2 * x

    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    graphs, breaks = bench.compiles()
    f = torch.compile(double, backend="eager", dynamic=False)
    f(torch.ones(2)), f(torch.ones(2))
    assert bench.compiles() == (graphs + 1, breaks)
    f(torch.ones(3))
    assert bench.compiles() == (graphs + 2, breaks)
    torch.compile(broken, backend="eager")(torch.ones(2))
    assert bench.compiles()[1] == breaks + 1


# ---- the steps and the plain composition ------------------------------------------------------------


def test_a_timed_step_is_a_training_step(tiny_config):
    cfg, run = tiny_config(micro_batch_tokens=128), t.Run()
    batches = torch.randint(64, (2, 8, 65), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    subject, model = bench.Subject(cfg, run), t.init_weights(t.LM(cfg), cfg.seed)
    optimizer, average = t.Optimizer(model, cfg, run), t.Average(model, cfg)
    loader = iter(batches)
    for number, batch in enumerate(batches):
        marks, waited_ms = subject.step(loader)
        t.train_step(model, optimizer, batch, subject.rows, 1.0)
        average.update(number + 1, 1.0)
        assert [phase for phase, _ in marks] == ["", "data", *["forward", "backward"] * 4, "optimizer"]
        assert [at for _, at in marks] == sorted(at for _, at in marks) and waited_ms >= 0
    for p, q in zip(model.parameters(), subject.model.parameters()):
        assert torch.equal(p, q)
    for p, q in zip(average.mean, subject.average.mean):
        assert torch.equal(p, q)


def gradients(model, loss_of, ids):
    loss = loss_of(model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("overrides", [{}, dict(gdn_v_heads=4), dict(gdn_neg_eigval=True), dict(kv_share=2)],
                         ids=["default", "grouped", "neg_eigval", "kv_share"])
def test_the_plain_composition_is_the_model(stand_ins, overrides):
    cfg = tiny_config(**overrides)
    ids = torch.randint(64, (2, 49), generator=torch.Generator().manual_seed(1))
    loss, grads = gradients(tiny_model(cfg), t.mean_nll, ids)
    plain, plain_grads = gradients(bench.make_plain(tiny_model(cfg)), bench.plain_loss, ids)
    assert plain == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        assert t.relative_error(plain_grads[name], grad) < 1e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_plain_composition_is_the_model_on_the_gpu(head_dim):
    cfg = tiny_config(device="cuda", kernel="fla", attn_kernel="varlen", model_dim=256, gdn_head_dim=head_dim)
    ids = torch.randint(64, (2, 257), generator=torch.Generator().manual_seed(1)).cuda()
    models = [t.init_weights(t.LM(cfg), 0) for _ in range(2)]
    for model in models:
        rng = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if name.endswith(("o_proj", "down_proj")):  # zero at first, which would hide the mixers
                torch.nn.init.normal_(p, std=0.5 * p.shape[1] ** -0.5, generator=rng)
    loss, grads = gradients(models[0].cuda(), t.mean_nll, ids)
    plain, plain_grads = gradients(bench.make_plain(models[1].cuda()), bench.plain_loss, ids)
    assert plain == pytest.approx(loss, rel=2e-3)
    whole, plain_whole = (torch.cat([g[name].flatten() for name in grads]) for g in (grads, plain_grads))
    assert t.relative_error(plain_whole, whole) < 0.1


def arguments_of(path, name):
    """Arguments of an FLA function or method ('Class.method'), read from its source; and whether it takes **kwargs."""
    root = Path(importlib.util.find_spec("fla").submodule_search_locations[0])
    body = ast.parse((root / path).read_text()).body
    for part in name.split("."):
        [node] = [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part]
        body = node.body
    return [a.arg for a in node.args.args], node.args.kwarg is not None


@pytest.mark.parametrize("path, name, positional, keywords", [
    ("modules/causal_conv1d/ops.py", "causal_conv1d", [], "x weight activation"),
    ("modules/norm/fused_norm_gate.py", "rms_norm_gated", ["x", "g", "weight", "bias"], "activation eps"),
    ("modules/norm/layernorm.py", "rms_norm", ["x", "weight", "bias"], "eps"),
    ("modules/fused_linear_cross_entropy/ops.py", "FusedLinearCrossEntropyLoss.__init__", ["self"],
     "logit_softcapping"),
    ("modules/fused_linear_cross_entropy/ops.py", "FusedLinearCrossEntropyLoss.forward",
     ["self", "x", "target", "weight"], ""),
    ("ops/gated_delta_rule/chunk.py", "chunk_gated_delta_rule", [],
     "q k v g beta use_qk_l2norm_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval")])
def test_the_installed_fla_takes_these_arguments(path, name, positional, keywords):
    """FLA cannot be imported without Triton: its source is read instead."""
    arguments, _ = arguments_of(path, name)
    assert arguments[:len(positional)] == positional
    assert set(keywords.split()) <= set(arguments)


def test_the_installed_fla_takes_the_gate_in_its_kernel():
    root = Path(importlib.util.find_spec("fla").submodule_search_locations[0])
    assert arguments_of("ops/gated_delta_rule/chunk.py", "chunk_gated_delta_rule")[1]
    source = (root / "ops/gated_delta_rule/chunk.py").read_text()
    for name in ("use_gate_in_kernel", "A_log", "dt_bias"):
        assert f"kwargs.get('{name}'" in source


# ---- whole runs -------------------------------------------------------------------------------------

ENV = TINY | dict(STACK="gdn swa", TRAIN_BATCH_TOKENS="256", MICRO_BATCH_TOKENS="128")


def test_a_run_prints_the_table_and_writes_what_it_found(stand_ins, tmp_path, capfd):
    path = tmp_path / "bench.json"
    assert bench.main(["--steps", "3", "--measure-peaks", "--json", str(path)], ENV) == 0
    out, result = capfd.readouterr().out, json.loads(path.read_text())
    for side in (result["model"], result["plain"]):
        assert len(side["step_ms"]) == 3 and min(side["step_ms"]) <= side["median_ms"] <= max(side["step_ms"])
        assert sum(side["phases_ms"].values()) == pytest.approx(sum(side["step_ms"]) / 3, rel=0.05)
        assert set(side["phases_ms"]) == {"data", "forward", "backward", "optimizer"}
        assert side["tokens_per_s"] == pytest.approx(256e3 / side["median_ms"])
        assert {bench.GEMM, bench.ELEMENTWISE, bench.LOSS, bench.OPTIMIZER} <= set(side["kernels_ms"])
    assert (result["model"]["micro_batch_tokens"], result["plain"]["micro_batch_tokens"]) == (128, 64)
    assert result["ratio"] == pytest.approx(result["model"]["tokens_per_s"] / result["plain"]["tokens_per_s"])
    rows = {row["component"]: row for row in result["components"]}
    for column in ("ns", "plain_ns", "floor_ns", "mflop", "kb"):
        parts = sum(row[column] for name, row in rows.items() if name != "step")
        assert parts == pytest.approx(rows["step"][column]), column
    table = out[out.index("component "):].splitlines()
    assert len(table) == 11 and table[-1].startswith("step ")


def test_options_change_the_settings(tmp_path):
    path = tmp_path / "bench.json"
    assert bench.main(["--steps", "1", "--no-plain", "--micro-batch-tokens", "256", "--kernel", "reference", "--tflops",
                       "1", "--terabytes", "2", "--json", str(path)], ENV) == 0
    result = json.loads(path.read_text())
    assert (result["model"]["micro_batch_tokens"], result["peaks"]) == (256, [1e12, 2e12])
    assert result["config"]["kernel"] == "reference" and "plain" not in result
    with pytest.raises(t.KernelError):
        bench.main(["--kernel", "fla"], ENV)


def test_without_fla_the_plain_composition_is_left_out(monkeypatch):
    def missing():
        raise ImportError("No module named 'triton'")
    monkeypatch.setattr(bench, "fla_parts", missing)
    lines, batch = [], torch.zeros(8, 65, dtype=torch.int32)
    assert bench.measure_plain(tiny_config(), t.Run(), iter([batch]), 1, lines.append) == {}
    assert lines == ["plain composition left out: No module named 'triton'"]


def test_compiling_after_warm_up_or_a_broken_plain_composition_fails_the_run_after_the_table(monkeypatch, capfd):
    counts = iter([(5, 0), (6, 0), (7, 0), (7, 0)])  # before warm-up, after it, at the end; before the plain one's
    monkeypatch.setattr(bench, "compiles", lambda: next(counts))
    monkeypatch.setattr(bench, "fla_parts", lambda: SimpleNamespace())
    assert bench.main(["--steps", "1"], ENV) == 1
    out, err = capfd.readouterr()
    assert "graphs 2, after warm-up 1" in out and "\nstep " in out
    assert "failed: plain composition: AttributeError; the compiler broke a graph or compiled anew after warm-up" in err


def test_tuning_runs_one_micro_batch(stand_ins):
    assert bench.main(["--tune-plain"], ENV) == 0
