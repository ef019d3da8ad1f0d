"""tests/bench.py: its floors, how it groups kernels, that its step is the training step, and the
comparison with another script.
"""

import bench
import pytest
import torch
from conftest import SCRIPT, TINY, assert_same, tiny_config, weights_of

import train_gpt as t


@pytest.mark.parametrize("byte_s, published", [
    (3.0e12, (352, 409, 623)), (4.3e12, (352, 372, 527))], ids=["H100", "H200"])
def test_floors_of_the_model_with_1024_pieces_are_the_published_ones(byte_s, published):
    """FLOPs alone, ideal fusion, today's boundaries, as computed on paper."""
    cost = bench.model_cost(t.Config(vocab_size=1024, train_batch_tokens=131_072))
    assert tuple(map(round, bench.floors(cost, 790e12, byte_s))) == published


@pytest.mark.parametrize("overrides", [{}, dict(stack="attn swa gdn*2"), dict(ngram_buckets=0)])
def test_products_are_those_of_a_forward(overrides, monkeypatch):
    """6 FLOPs per weight that enters a product, counted by watching a forward."""
    cfg = tiny_config(**overrides)
    seen = []
    monkeypatch.setattr(t, "OBSERVERS", [lambda x, weights: seen.extend(
        w.numel() for w in weights)])
    t.LM(cfg)(torch.zeros(1, 64, dtype=torch.long))
    ops = bench.model_cost(cfg)
    assert sum(op.flops for op in ops if op.group == bench.GEMM) == 6 * sum(seen)


@pytest.mark.parametrize("name, group", [
    ("tilelang_fused_chunk_gdr_bwd_kernel_kernel", bench.DELTA),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_gemm>", bench.GEMM),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, "
     "cutlass::bfloat16_t>>", bench.ATTENTION),
    ("triton_red_fused__log_softmax__to_copy_div_mul_tanh_41", bench.LOSS),
    ("triton_poi_fused_add_mul_silu_3", bench.ELEMENTWISE), ("never_seen_kernel", bench.OTHER)])
def test_kernels_are_grouped_by_name(name, group):
    assert bench.kernel_group(name) == group


def test_gradients_and_update_are_a_training_step():
    cfg = tiny_config(micro_batch_tokens=128)
    subject = bench.Subject(cfg, t.Run())
    want = t.init_weights(t.LM(cfg), cfg.seed)
    optimizer = t.training_optimizer(want, cfg, t.Run())
    for _ in range(2):
        subject.gradients()
        subject.update()
        t.train_step(want, optimizer, subject.batch, subject.micro_rows, 1.0, 1)
    assert_same(weights_of(subject.model), weights_of(want))


def test_a_run_prints_components_that_add_up_to_the_step(capsys):
    bench.main(["--steps", "2"], TINY)
    lines = capsys.readouterr().out.splitlines()
    assert " tokens/s, step " in lines[-11]
    table = {line[:14].strip(): list(map(float, line[14:].split()[:4])) for line in lines[-9:]}
    step = table.pop("step")
    assert [sum(column) for column in zip(*table.values())] == pytest.approx(step, abs=0.5)
    assert all(table[group][0] > 0 for group in (bench.GEMM, bench.LOSS, bench.OPTIMIZER))


@pytest.mark.slow
def test_another_script_is_compared_by_the_tok_s_of_its_log(tiny, capfd):
    env = tiny | dict(ITERATIONS="100", OMP_NUM_THREADS="1")
    bench.main(["--against", str(SCRIPT), "--steps", "4"], env)
    words = capfd.readouterr().out.split()
    ours, theirs, ratio = int(words[2]), int(words[-3].strip(",")), float(words[-1])
    assert ratio == pytest.approx(ours / theirs, rel=0.01) and 0.2 < ratio < 5


def test_a_run_that_ends_too_soon_is_an_error_with_its_output(tiny):
    with pytest.raises(SystemExit, match="ended before step 4(.|\n)*needs a CUDA GPU"):
        bench.logged_throughput(t.code_bytes(), 4, tiny | dict(KERNEL="fla"))
