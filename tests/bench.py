"""How fast is a training step, where does its time go, how far is each part from the hardware?

    python tests/bench.py [--steps 10]                  one GPU, minutes, no data needed
    python tests/bench.py --against REV [--steps 60]    this script beside another commit's
    PRESET=sample python tests/bench.py --steps 3       any machine, to try the tool

Settings are train_gpt.py's environment variables.  The first form times steps on synthetic tokens,
profiles one more, and prints each group of kernels beside three floors: its FLOPs alone; "today",
every kernel reading its inputs and writing its outputs once; "ideal", in which only products, the
delta rule and attention touch memory.  The second form runs both scripts from the command line
under one environment, which must name data (DATA_PATH=data/sample VOCAB_SIZE=1024
TOKENIZER_PATH=data/sample/corpus_1024_bpe.model), and compares the tok_s of their logs; REV is a
commit or a train_gpt.py.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as t  # noqa: E402

WARM_STEPS = 3
DELTA, GEMM, ATTENTION, ELEMENTWISE = "delta rule", "GEMMs", "attention", "elementwise"
LOSS, OPTIMIZER, OTHER = "loss", "optimizer", "other"
# Kernel names; the first match counts.  FlashQLA: tilelang_*, FLA: kernel_kernel, CPU: aten::.
KERNELS = (
    (ATTENTION, r"flash_(fwd|bwd)|fmha|FlashAttn|flex_attention|scaled_dot_product"),
    (LOSS, r"softmax|nll_loss|cross_entropy|logsumexp"),
    (GEMM, r"triton_tem|mlp_product|nvjet|cutlass|gemm|cublas|splitK|aten::(add|b)?mm$"),
    (ELEMENTWISE, r"^triton_|conv_heads|gated_norm"),
    (DELTA, r"tilelang|^kernel_kernel|gated_delta|chunk_|recompute_w_u|wy_repr|solve_triangular"),
    (ELEMENTWISE, r"at::native|elementwise|reduce_kernel|CatArray|Memcpy|Memset|aten::|Backward"),
)


# ---- floors


class Op(NamedTuple):
    """One token's forward and backward of a part: FLOPs, bytes today and if all were fused."""
    group: str
    flops: float
    today: float
    ideal: float


def product(columns, rows, fused=(0, 0, 0), today=0):
    """The three products of a matrix (rows, columns), bf16: output, input gradient, its own.

    fused: values more, per product, that the ideal epilogue moves.   today: values more that the
    input gradient's kernel moves already.
    """
    moved = columns + rows
    return [Op(GEMM, 2 * columns * rows, 2 * (moved + now), 2 * (moved + now + more))
            for now, more in zip((0, today, 0), fused)]


def model_cost(cfg):
    """A list of Op: one token's forward and backward, bf16 activations; weights stay in cache.

    Left out: U-Net skips, XSA, what KV_SHARE saves.
    """
    D = cfg.model_dim
    ops = []
    for layer in t.parse_stack(cfg.stack):
        if layer.kind == "gdn":
            H, K, C = cfg.gdn_heads, cfg.gdn_head_dim, t.GDN_CHUNK
            W = H * K
            # ideal: the input gradient's epilogue ends the block
            ops += product(D, 4 * W + 2 * H, (0, 4 * D, 0))
            # bytes as FlashQLA's kernels move them; ideal: convolution and gated norm inside
            flops = H * (22 * K * K + 30 * C * K + 5 * C * C)
            ops.append(Op(DELTA, flops, 2 * 18 * W, 2 * 18 * W))
            # convolution and gated norm; norms, residual and mix with their gradients
            ops.append(Op(ELEMENTWISE, 0, 2 * (23 * W + 31.6 * D), 0))
            ops += product(W, D, (D, 0, 0))
        else:
            window = min(cfg.train_seq_len, cfg.swa_window if layer.kind == "swa" else 1 << 31)
            keys = window - window * (window - 1) / 2 / cfg.train_seq_len  # seen by a query
            kv = D // cfg.num_heads * cfg.num_kv_heads
            ops += product(D, D + 2 * kv, (0, 4 * D, 0))
            ops.append(Op(ATTENTION, 14 * D * keys, 2 * 6.5 * (D + kv), 2 * 6 * (D + kv)))
            rotary = 2 * (D + kv) / 3
            ops.append(Op(ELEMENTWISE, 0, 31 * rotary + 2 * 29.54 * D, 10 * rotary))
            ops += product(D, D, (D, 0, 0))
        F = int(cfg.mlp_mult * D)
        ops += product(D, F, (0, 2 * D, 0))
        ops += product(F, D, (2 * D, 0, 0), today=F)  # the gradient reads the squared relu
    ops += product(D, cfg.vocab_size)
    ops.append(Op(LOSS, 0, 2 * (5 * D + 3 * cfg.vocab_size), 2 * (2 * D + cfg.vocab_size)))
    ops.append(Op(ELEMENTWISE, 0, 2 * 10 * D, 2 * 7 * D))  # embedding, smear
    if cfg.ngram_buckets:
        ops += product(cfg.ngram_dim, D)
    return [*ops, optimizer_cost(cfg)]


def optimizer_cost(cfg):
    """The update per token of the step: Newton-Schulz, and passes over float32 parameters."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in t.LM(cfg).named_parameters()}
    flops = 0
    for name, shape in shapes.items():
        if t.route(name).optimizer == "muon":
            m, n = sorted(shape)
            flops += t.NS_STEPS * (4 * m * m * n + 2 * m**3)
    share = sum(shape.numel() for shape in shapes.values()) / cfg.train_batch_tokens
    # bytes a parameter: 114 in separate passes, 42 in two fused ones
    return Op(OPTIMIZER, flops / cfg.train_batch_tokens, 113.6 * share, 42 * share)


def floors(ops, flop_s, byte_s):
    """(FLOPs alone, ideal fusion, today's boundaries) of some operations [ns a token]."""
    def ns(op, moved):
        both = op.flops / flop_s, moved / byte_s
        return 1e9 * (sum(both) if op.group == OPTIMIZER else max(both))  # its parts do not overlap
    return (1e9 * sum(op.flops for op in ops) / flop_s, sum(ns(op, op.ideal) for op in ops),
            sum(ns(op, op.today) for op in ops))


# ---- measuring


class Subject:
    """A model with optimizer, average and a batch of synthetic tokens."""

    def __init__(self, cfg, run):
        model = t.LM(cfg, t.fast_ops(cfg, run))
        self.run = run
        self.model = t.init_weights(model, cfg.seed).to(run.device)
        self.micro_rows = t.micro_batch_rows(cfg, run, self.model.ops)
        self.optimizer = t.training_optimizer(self.model, cfg, run)
        self.mean = self.optimizer.weights.clone()
        shape = cfg.train_batch_tokens // cfg.train_seq_len, cfg.train_seq_len + 1
        self.batch = torch.randint(cfg.vocab_size, shape, dtype=torch.int32, device=run.device)

    def gradients(self):
        """A training step without the update."""
        with mock.patch.object(self.optimizer, "step", lambda rate: None):
            t.train_step(self.model, self.optimizer, self.batch, self.micro_rows, 1.0, 1)

    def update(self):
        """Apply the gradients, take the weights into the average."""
        self.optimizer.step(1.0)
        self.mean.lerp_(self.optimizer.weights, 0.003)


def step_times(subject, steps):
    """Milliseconds of each of `steps` steps in a row, without waiting for the device between."""
    on_cuda = subject.run.on_cuda
    marks = []
    for i in range(steps + 1):
        if i:
            subject.gradients()
            subject.update()
        marks.append(torch.cuda.Event(enable_timing=True) if on_cuda else time.perf_counter())
        if on_cuda:
            marks[-1].record()
    subject.run.synchronize()
    return [a.elapsed_time(b) if on_cuda else 1e3 * (b - a) for a, b in zip(marks, marks[1:])]


def kernel_times(work, run):
    """{name: ms} of the kernels that work() launches; on the CPU of its operators, own time."""
    activity = torch.profiler.ProfilerActivity
    times = Counter()
    with torch.profiler.profile(activities=[activity.CUDA if run.on_cuda else activity.CPU]) as p:
        work()
        run.synchronize()
    for event in p.events():
        if not run.on_cuda:
            times[event.name] += event.self_cpu_time_total / 1e3
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name] += event.time_range.elapsed_us() / 1e3
    return times


def kernel_group(name):
    """The component that a kernel of forward or backward belongs to."""
    return next((group for group, pattern in KERNELS if re.search(pattern, name)), OTHER)


def measure(cfg, run, steps):
    """Throughput and the time of every kernel: a dict."""
    subject = Subject(cfg, run)
    times = step_times(subject, WARM_STEPS + steps)[WARM_STEPS:]
    groups = {}
    for name, ms in kernel_times(subject.gradients, run).items():
        groups.setdefault(kernel_group(name), Counter())[name] += ms
    groups[OPTIMIZER] = kernel_times(subject.update, run)
    median = statistics.median(times)
    return dict(tokens_per_s=1e3 * cfg.train_batch_tokens / median, median_ms=median, step_ms=times,
                kernels_ms=groups, peak_memory_mib=run.peak_memory_mib(),
                names=" ".join(f"{k}:{v}" for k, v in subject.model.ops.names.items()))


def components(cfg, found, flop_s, byte_s):
    """The table: {component: (measured, FLOPs alone, ideal fusion, today)} [ns a token]."""
    per_token = 1e6 / cfg.train_batch_tokens
    busy = {group: sum(times.values()) * per_token for group, times in found["kernels_ms"].items()}
    step = found["median_ms"] * per_token
    busy |= {"no kernel": step - sum(busy.values()), "step": step}
    ops = model_cost(cfg)
    table = {}
    for group in (DELTA, GEMM, ATTENTION, ELEMENTWISE, LOSS, OPTIMIZER, OTHER, "no kernel", "step"):
        mine = [op for op in ops if group in (op.group, "step")]
        table[group] = busy.get(group, 0.0), *floors(mine, flop_s, byte_s)
    return table


def print_report(found, table):
    """Kernels by group, throughput, then the table."""
    for group, times in found["kernels_ms"].items():
        top = "; ".join(f"{ms:.2f} ms {name[:70]}" for name, ms in times.most_common(3))
        print(f"{group}: {len(times)} kernels; {top}")
    print(f"{found['tokens_per_s']:.0f} tokens/s, step {found['median_ms']:.2f} ms "
          f"({min(found['step_ms']):.2f} to {max(found['step_ms']):.2f}), {found['names']}, "
          f"peak {found['peak_memory_mib']} MiB")
    titles = ("measured", "FLOPs", "ideal", "today", "x today")
    print(f"{'ns a token':<14}" + "".join(f"{title:>10}" for title in titles))
    for component, row in table.items():
        ratio = f"{row[0] / row[3]:.2f}" if row[3] else "-"
        print(f"{component:<14}" + "".join(f"{ns:10.1f}" for ns in row) + f"{ratio:>10}")


# ---- beside another commit


def logged_throughput(script, steps, env):
    """Median tok_s of the second half of `steps` steps of a run of `script`, then stopped."""
    with tempfile.TemporaryDirectory() as folder:
        # Where the script looks for its sample; a run of another commit needs nothing else.
        (Path(folder) / "data").symlink_to(ROOT / "data")
        copy = Path(folder) / "train_gpt.py"
        copy.write_bytes(script)
        wanted = dict(OUT_DIR=folder, RUN_ID="bench", MAX_WALLCLOCK_SECONDS="0", RESUME="",
                      VAL_LOSS_EVERY="0", TRAIN_LOG_EVERY=str(max(1, steps // 20)))
        process = subprocess.Popen([sys.executable, str(copy)], env=dict(env) | wanted, cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found = {}
        tail = ""
        try:
            for line in process.stdout:
                tail = tail[-2000:] + line
                step = re.match(r"step:(\d+)/.* tok_s:(\d+)", line)
                if step:
                    found[int(step[1])] = int(step[2])
                if max(found, default=0) >= steps:
                    break
        finally:
            process.kill()
            process.wait()
    late = [tok_s for step, tok_s in found.items() if step > steps / 2]
    if not late:
        raise SystemExit(f"the run ended before step {steps}:\n{tail}")
    return statistics.median(late)


def compare(rev, steps, env):
    """Print tokens/s of this script and of another one, and the ratio."""
    other = Path(rev).read_bytes() if Path(rev).is_file() else subprocess.run(
        ["git", "-C", str(ROOT), "show", f"{rev}:train_gpt.py"], capture_output=True,
        check=True).stdout
    ours, theirs = [logged_throughput(script, steps, env) for script in (t.code_bytes(), other)]
    print(f"this script {ours:.0f} tokens/s, {rev} {theirs:.0f}, ratio {ours / theirs:.3f}")


def main(arguments, env):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--against", metavar="REV", help="commit or file to compare with")
    parser.add_argument("--tflops", type=float, default=790.0, help="peak of bf16 products")
    parser.add_argument("--terabytes", type=float, default=3.0, help="peak of memory [TB/s]")
    options = parser.parse_args(arguments)
    if options.against:
        compare(options.against, options.steps, env)
        return
    cfg = t.Config.from_env(env)
    run = t.Run.from_env({}, cfg)  # one process
    cfg = t.settle_batch(cfg, run)
    found = measure(cfg, run, options.steps)
    print_report(found, components(cfg, found, 1e12 * options.tflops, 1e12 * options.terabytes))


if __name__ == "__main__":
    main(sys.argv[1:], os.environ)
