"""How fast is the training step, where does its time go, and how far from the hardware's limits is each part?

    python tests/bench.py [--steps 10] [--measure-peaks] [--no-plain] [--json PATH]       one GPU, minutes
    PRESET=sample DEVICE=cpu python tests/bench.py --steps 3                              any machine, to try the tool

Times training steps (data, forward, backward, optimizer, average) on synthetic shards, profiles one more, groups its
kernels by name, and sets each group beside its floor: the FLOPs and bytes that `model_cost` counts from the Config, at
given or measured peaks.  Then does the same to a plain composition of the same model, eager, from fla-core's parts,
under the same optimizer, data and batch.  Settings are train_gpt.py's environment variables.  The exit code is 1 if
the compiler broke a graph or compiled anew after warm-up, or if the plain composition failed.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as t  # noqa: E402

WARM_STEPS = 2
CHUNK, GEMM, ATTENTION, ELEMENTWISE = "GDN chunk op", "GEMMs", "attention", "elementwise"
LOSS, OPTIMIZER, COMMUNICATION, OTHER = "softmax, loss", "optimizer", "communication", "other"
# Kernels of forward and backward by name, the first match counts.  FlashQLA's are called tilelang_*, FLA's one TileLang
# kernel kernel_kernel; aten:: and *Backward0 occur on the CPU only.  The head's product is among the GEMMs.
KERNELS = (
    (COMMUNICATION, r"nccl|gloo"),
    (ATTENTION, r"pytorch_flash|flash_(fwd|bwd)|fmha|FlashAttn|flex_attention|scaled_dot_product"),
    (LOSS, r"softmax|nll_loss|cross_entropy|logsumexp"),
    (GEMM, r"triton_tem|mlp_product|nvjet|cutlass|gemm|cublas|splitK|aten::(add|b)?mm$"),
    (ELEMENTWISE, r"^triton_|conv_heads|gated_norm|l2norm|causal_conv1d|layer_norm"),
    (CHUNK, r"tilelang|^kernel_kernel|gated_delta|chunk_|recompute_w_u|wy_repr|gdn_gate|beta_sigmoid|solve_triangular"),
    (ELEMENTWISE, r"at::native|elementwise|reduce_kernel|CatArray|Memcpy|Memset|aten::|Backward\d"),
)


# ---- what a step must at least do -------------------------------------------------------------------


class Op(NamedTuple):
    """One operation, forward and backward: FLOPs and bytes to and from memory, per token."""
    name: str
    group: str
    flops: float
    bytes: float

    def floor_ns(self, peaks):
        """Nanoseconds per token at peaks (FLOP/s, bytes/s): the larger of its two limits."""
        return 1e9 * max(self.flops / peaks[0], self.bytes / peaks[1])


def chunk_cost(H, HV, K, V):
    """FLOPs and bytes per token of one layer's chunked gated delta rule, forward and backward, in FLA's eleven kernels.

    FLOPs of a value head with chunks of C tokens: forward, three products with the state (2KV each: w S, q S, k^T u),
    five inside the chunk (k k^T, w, q k^T over K; u, A v over V) and a triangular inverse (C^2); backward, twice those
    products, the states anew (4KV), the inverse's gradient (4C^2).   Bytes: every kernel reads its inputs and writes
    its outputs once, bf16.  A kernel that fuses several, as FlashQLA's do, may move fewer.
    """
    C = t.GDN_CHUNK
    flops = HV * (22 * K * V + 18 * C * K + 12 * C * V + 5 * C * C)
    # Reads and writes: of q and k; of v, u, o and their gradients; of w, dw, dq, dk (HV heads of width K).
    values = (4 + 11) * H * K + 22 * HV * V + 11 * HV * K
    return flops, 2 * (values + 6 * HV * K * V / C + 3 * HV * C)  # and of states with gradients; of the inverse A


def model_cost(cfg):
    """Operations of one token's forward and backward, a list of Op: bf16 activations, each operation fused in itself.

    A GEMM reads its input and writes its output three times over (output, input gradient, weight gradient); its weights
    stay in cache.  A `move` counts values read and written.  Left out: U-Net skips, XSA, the residual mix's x0.
    """
    D, T, ops = cfg.model_dim, cfg.train_seq_len, []

    def gemm(name, columns, rows):
        ops.append(Op(name, GEMM, 6 * columns * rows, 6 * (columns + rows)))

    def move(name, values, group=ELEMENTWISE, flops=0):
        ops.append(Op(name, group, flops, 2 * values))

    for layer in t.parse_stack(cfg.stack):
        if layer.kind == "gdn":
            H, HV, K = cfg.gdn_heads, cfg.gdn_v_heads or cfg.gdn_heads, cfg.gdn_head_dim
            gemm("GDN in-proj", D, 2 * (H + HV) * K + 2 * HV)
            move("GDN conv, silu", 6 * (2 * H + HV) * K)  # x y; x dy dx, and dy again for the weight
            move("GDN l2 norm", 5 * 2 * H * K)
            ops.append(Op("GDN chunk op", CHUNK, *chunk_cost(H, HV, K, K)))
            move("GDN gated norm", 8 * HV * K)  # o gate y; o gate dy do dgate
            gemm("GDN out-proj", HV * K, D)
        else:
            window = min(T, cfg.swa_window if layer.kind == "swa" else T)
            keys = window - window * (window - 1) / 2 / T  # that a query sees, on average over a row
            kv = D // cfg.num_heads * cfg.num_kv_heads
            gemm("attention proj", D, D + 2 * kv)
            gemm("attention proj", D, D)
            move("attention norm, rotary", 5 * (D + kv))
            # Two products forward, five backward; q k v o; q k v o do dq dk dv, dq being summed in float32.
            move("attention", 10 * D + 6 * kv, ATTENTION, 7 * 2 * D * keys)
        width = int(cfg.mlp_mult * D)
        gemm("MLP", D, width)
        gemm("MLP", width, D)
        move("MLP activation", 5 * width)
        move("norm, residual", 2 * 8 * D)  # x y x' n and their gradients, before the mixer and before the MLP
    gemm("head", D, cfg.vocab_size)
    move("loss", 3 * cfg.vocab_size, LOSS)
    move("embedding", 8 * D)  # a float32 row and its gradient's sum (read, written), the bf16 value and its gradient
    if cfg.ngram_buckets:
        move("n-grams", 8 * cfg.ngram_dim * (cfg.ngram_order - 1))
        gemm("n-grams", cfg.ngram_dim, D)
    if cfg.smear:
        move("smear", 5 * D)
    return ops


def optimizer_cost(cfg):
    """Operations of the update, per token of the step, a list of Op.

    Bytes of a float32 parameter: gradient read and zeroed, weight and moments read and written, average updated; and in
    each Newton-Schulz iteration, bf16, X read twice and written once.
    """
    with torch.device("meta"):
        parameters = [(t.route(name).optimizer, p.shape) for name, p in t.LM(cfg).named_parameters()]
    ops, steps = [], cfg.muon_backend_steps
    for kind, shape in parameters:
        flops, moved = 0, (4 * 8 + 12) * shape.numel()
        if kind == "muon":
            m, n = sorted(shape)
            flops, moved = steps * (4 * m * m * n + 2 * m**3), (4 * 6 + 12 + 6 * steps) * shape.numel()
        ops.append(Op(OPTIMIZER, OPTIMIZER, flops / cfg.train_batch_tokens, moved / cfg.train_batch_tokens))
    return ops


def measure_peaks(run):
    """(FLOP/s, bytes/s) that a large bf16 product and a large copy reach here: the best of ten each."""
    n, size = (8192, 2**29) if run.device.type == "cuda" else (256, 2**20)
    a, b = torch.randn(2, n, n, device=run.device, dtype=torch.bfloat16).unbind()
    x, y = torch.zeros(2, size, device=run.device, dtype=torch.bfloat16).unbind()

    def best_s(work):
        marks = [(work(), mark(run))[1] for _ in range(13)]
        run.synchronize()
        return min(between_ms(*pair) for pair in zip(marks[2:], marks[3:])) / 1e3

    return 2 * n**3 / best_s(lambda: torch.mm(a, b)), 2 * 2 * size / best_s(lambda: y.copy_(x))


# ---- the plain composition --------------------------------------------------------------------------


@cache
def fla_parts():
    """What fla-core's ShortConvolution, FusedRMSNormGated and RMSNorm call, its chunk op and its fused loss.

    Raises ImportError where FLA or Triton is missing.  `_fla` mends the gated backward on Hopper first.
    """
    t._fla()
    from fla.modules import FusedLinearCrossEntropyLoss
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    from fla.modules.norm.layernorm import rms_norm
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    return SimpleNamespace(conv=causal_conv1d, gated_norm=rms_norm_gated, norm=rms_norm, chunk=chunk_gated_delta_rule,
                           loss=FusedLinearCrossEntropyLoss)


class PlainGDN(t.GatedDeltaNet):
    """The mixer as FLA's own layer composes it: a product and a convolution per role; gate and l2 norm in the op."""

    def forward(self, x, scale, gain, state, packing, xsa=False):
        """x (B, T, D), scale (D,) of the output -> (B, T, D); takes and returns no state."""
        fla, kv, K = fla_parts(), self.kv, self.K
        q, k, v, gate, a, b = (t.linear(x, w) for w in (self.q_proj, kv.k_proj, kv.v_proj, self.g_proj, self.a_proj,
                                                        self.b_proj))
        q, k, v = (fla.conv(x=y, weight=w.to(x.dtype), activation="silu")[0].unflatten(-1, (-1, K))
                   for y, w in ((q, self.q_conv), (k, kv.k_conv), (v, kv.v_conv)))
        o, _ = fla.chunk(q=q, k=k, v=v, g=a, beta=b, A_log=self.A_log, dt_bias=self.dt_bias, use_gate_in_kernel=True,
                         use_beta_sigmoid_in_kernel=True, use_qk_l2norm_in_kernel=True,
                         allow_neg_eigval=self.cfg.gdn_neg_eigval)
        o = fla.gated_norm(o, gate.unflatten(-1, (-1, K)), self.o_norm.to(x.dtype), None, activation="swish", eps=1e-6)
        return t.linear(o.flatten(2), self.o_proj) * scale.to(x.dtype), None


class PlainEmbedding(t.Embedding):
    """The embedding whose head is left to the fused loss."""

    def logits(self, x):
        """x, normalised: `plain_loss` multiplies it by the head."""
        return t.rms_norm(x)


def make_plain(model):
    """Turn an LM, in place, into the plain composition; the parameters and their names stay."""
    for block in model.blocks:
        block.mlp.fused = False
        if isinstance(block.mixer, t.GatedDeltaNet):
            block.mixer.__class__ = PlainGDN
    model.embed.__class__ = PlainEmbedding
    return model


def plain_loss(model, ids, targets):
    """`mean_nll` of the plain composition: FLA's norms; head, softcap and cross entropy in one."""
    fla = fla_parts()
    with mock.patch.object(t, "rms_norm", lambda x: fla.norm(x, None, None, eps=1e-6)):
        x, _ = model(ids)
    return fla.loss(logit_softcapping=model.cfg.logit_softcap)(x, targets.long(), model.embed.weight.to(x.dtype))


# ---- measuring --------------------------------------------------------------------------------------


def mark(run):
    """A point in the device's time."""
    if run.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_ms(a, b):
    """Milliseconds from mark a to mark b, which the device must have passed."""
    return 1e3 * (b - a) if isinstance(a, float) else a.elapsed_time(b)


class Subject:
    """A model with optimizer and average, and its training step, `train_step`'s, in parts that can be timed."""

    def __init__(self, cfg, run, plain=False):
        cfg = replace(cfg, compile="0") if plain else cfg
        model = t.init_weights(t.LM(cfg), cfg.seed).to(run.device)
        self.run, self.rows, self.steps = run, t.micro_batch_rows(cfg, run), 0
        self.model, self.loss_of = model, t.compiled(t.mean_nll, cfg.compile != "0")
        if plain:  # eager keeps about twice as much for the backward pass
            self.rows = next(r for r in range(max(1, self.rows // 2), 0, -1) if self.rows % r == 0)
            self.model, self.loss_of = make_plain(model), plain_loss
        self.optimizer, self.average = t.Optimizer(model, cfg, run), t.Average(model, cfg)

    def forward_backward(self, batch, passed=lambda phase: None):
        """Gradients of batch (rows, T + 1), one micro-batch after the other."""
        parts = batch.split(self.rows)
        for part in parts:
            loss = self.loss_of(self.model, part[:, :-1].contiguous(), part[:, 1:].contiguous()) / len(parts)
            passed("forward")
            loss.backward()
            passed("backward")

    def update(self):
        """Apply the gradients, take the weights into the average."""
        self.optimizer.step(1.0)
        self.steps += 1
        self.average.update(self.steps, 1.0)

    def step(self, loader):
        """One training step; returns [(phase, mark at its end)] and the milliseconds the host waited for data."""
        marks, began = [("", mark(self.run))], time.perf_counter()
        batch = next(loader)
        waited_ms = 1e3 * (time.perf_counter() - began)
        marks.append(("data", mark(self.run)))
        self.forward_backward(batch, lambda phase: marks.append((phase, mark(self.run))))
        self.update()
        return [*marks, ("optimizer", mark(self.run))], waited_ms


def compiles():
    """(graphs compiled, graph breaks) so far in this process."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def kernel_times(work, run):
    """{name: ms} of the kernels that work() launches; on the CPU of its operators, their own time."""
    cuda, times = run.device.type == "cuda", Counter()
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    run.synchronize()
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
        run.synchronize()
    for event in profile.events():
        if not cuda:
            times[event.name] += event.self_cpu_time_total / 1e3
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name] += event.time_range.elapsed_us() / 1e3
    return times


def kernel_group(name):
    """The component that a kernel of forward or backward belongs to."""
    return next((group for group, pattern in KERNELS if re.search(pattern, name)), OTHER)


def profile_step(subject, loader):
    """{group: {kernel: ms}} of one step; the update apart, since its products are named like the model's."""
    batch, groups = next(loader), defaultdict(Counter)
    for name, ms in kernel_times(lambda: subject.forward_backward(batch), subject.run).items():
        groups[kernel_group(name)][name] += ms
    for name, ms in kernel_times(subject.update, subject.run).items():
        groups[COMMUNICATION if kernel_group(name) == COMMUNICATION else OPTIMIZER][name] += ms
    return {group: dict(times.most_common()) for group, times in groups.items()}


def measure(subject, loader, steps, say):
    """Warm up, time `steps` steps in a row without waiting for the device, profile one more; a dict of the findings."""
    cfg, run, (graphs, breaks) = subject.model.cfg, subject.run, compiles()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    for i in range(WARM_STEPS):
        subject.step(loader)
        run.synchronize()
        say(f"warm-up step {i + 1} of {WARM_STEPS}")
    warm, _ = compiles()
    timed, waited_ms = zip(*(subject.step(loader) for _ in range(steps)))
    run.synchronize()
    say(f"{steps} timed steps")
    phases, edges = Counter(), [timed[0][0][1], *(marks[-1][1] for marks in timed)]
    for marks in timed:
        for (_, a), (phase, b) in zip(marks, marks[1:]):
            phases[phase] += between_ms(a, b) / steps
    step_ms = [between_ms(a, b) for a, b in zip(edges, edges[1:])]
    median_ms, kernels = statistics.median(step_ms), profile_step(subject, loader)
    say("one profiled step")
    graphs_now, breaks_now = compiles()
    return dict(tokens_per_s=1e3 * cfg.train_batch_tokens / median_ms, median_ms=median_ms, step_ms=step_ms,
                phases_ms=dict(phases), data_wait_ms=statistics.median(waited_ms), kernels_ms=kernels,
                micro_batch_tokens=subject.rows * cfg.train_seq_len, peak_memory_mib=int(run.peak_memory_mib()),
                graphs=graphs_now - graphs, graphs_after_warm_up=graphs_now - warm, graph_breaks=breaks_now - breaks)


# ---- the report -------------------------------------------------------------------------------------


def component_rows(cfg, found, plain, peaks):
    """One dict per component, then for the time in no kernel and for the step: times, counts and floor per token."""
    def ns(side, group):  # per token; None without that side
        if side is None:
            return None
        busy = {name: sum(times.values()) for name, times in side["kernels_ms"].items()}
        busy |= {"no kernel": side["median_ms"] - sum(busy.values()), "step": side["median_ms"]}
        return 1e6 * busy.get(group, 0.0) / cfg.train_batch_tokens

    ops, rows = model_cost(cfg) + optimizer_cost(cfg), []
    for group in (CHUNK, GEMM, ATTENTION, ELEMENTWISE, LOSS, OPTIMIZER, COMMUNICATION, OTHER, "no kernel", "step"):
        mine = [op for op in ops if group in (op.group, "step")]
        rows.append(dict(component=group, ns=ns(found, group), floor_ns=sum(op.floor_ns(peaks) for op in mine),
                         mflop=sum(op.flops for op in mine) / 1e6, kb=sum(op.bytes for op in mine) / 1e3,
                         plain_ns=ns(plain, group)))
    return rows


def print_report(cfg, result):
    """Everything that `main` found, the table of components last."""
    sides = {name: result[name] for name in ("model", "plain") if name in result}
    for name, side in sides.items():
        for group, times in side["kernels_ms"].items():
            shown = list(times.items())[:20 if group == OTHER else 3]
            print(f"{name} {group}: {len(times)} kernels; " + "; ".join(f"{ms:.2f} ms {k[:80]}" for k, ms in shown))
    print(f"{result['device']}, torch {result['torch']}; GDN {cfg.kernel}, attention {cfg.attn_kernel}; peaks "
          "{:.0f} TFLOP/s, {:.2f} TB/s".format(*(peak / 1e12 for peak in result["peaks"])))
    for name, side in sides.items():
        print(f"{name}: {side['tokens_per_s']:.0f} tokens/s, step {side['median_ms']:.2f} ms "
              f"({min(side['step_ms']):.2f} to {max(side['step_ms']):.2f}), "
              + ", ".join(f"{phase} {ms:.2f}" for phase, ms in side["phases_ms"].items())
              + f"; host waits {side['data_wait_ms']:.2f} ms for data; peak {side['peak_memory_mib']} MiB, micro-batch "
              f"{side['micro_batch_tokens']} tokens; graphs {side['graphs']}, after warm-up "
              f"{side['graphs_after_warm_up']}, breaks {side['graph_breaks']}")
    if "plain" in sides:
        print(f"model / plain: {result['ratio']:.2f}")
    print("component          ms/step  share  ns/token  floor ns  x floor  MFLOP/token  KB/token  plain ns/token")
    step_ns = result["components"][-1]["ns"]
    for r in result["components"]:
        times = f"{r['ns'] / r['floor_ns']:.2f}" if r["floor_ns"] else "-"
        plain = "-" if r["plain_ns"] is None else f"{r['plain_ns']:.1f}"
        print(f"{r['component']:<16}{r['ns'] * cfg.train_batch_tokens / 1e6:10.2f} {100 * r['ns'] / step_ns:5.1f}% "
              f"{r['ns']:9.1f} {r['floor_ns']:9.1f} {times:>8} {r['mflop']:12.2f} {r['kb']:9.1f} {plain:>15}")


def write_shard(folder, cfg, tokens):
    """One training shard of random tokens."""
    header = np.zeros(t.HEADER_INTS, np.int32)
    header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, tokens
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, tokens, dtype=np.uint16)
    (Path(folder) / "fineweb_train_000000.bin").write_bytes(header.tobytes() + ids.tobytes())


def measure_plain(cfg, run, loader, steps, say):
    """What `measure` finds of the plain composition; if it fails, why: the rest is still reported."""
    try:
        return dict(plain=measure(Subject(cfg, run, plain=True), loader, steps, say))
    except ImportError as error:
        say(f"plain composition left out: {error}")
        return {}
    except Exception as error:
        traceback.print_exc()
        return dict(failed=[f"plain composition: {type(error).__name__}"])


def prepare_kernels(cfg, run, arguments, say):
    """Check the model's kernels, which compiles them, while a second process tunes FLA's into their disk caches."""
    tuner = None
    if run.device.type == "cuda" and "--no-plain" not in arguments:
        tuner = subprocess.Popen([sys.executable, __file__, *arguments, "--tune-plain"])
    t.check_kernels(cfg, run)
    say("kernels checked")
    if tuner:
        say(f"plain kernels tuned, exit code {tuner.wait()}")


def tune_plain(cfg, run):
    """Forward and backward of one micro-batch of the plain composition."""
    subject = Subject(cfg, run, plain=True)
    subject.forward_backward(torch.zeros(subject.rows, cfg.train_seq_len + 1, dtype=torch.int32, device=run.device))
    run.synchronize()


def parse_options(arguments):
    """The command line's options; raises SystemExit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--kernel", help="KERNEL")
    parser.add_argument("--micro-batch-tokens", help="MICRO_BATCH_TOKENS")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain composition out")
    parser.add_argument("--tflops", type=float, default=790.0, help="peak of bf16 products [TFLOP/s]")
    parser.add_argument("--terabytes", type=float, default=3.0, help="peak of memory [TB/s]")
    parser.add_argument("--measure-peaks", action="store_true", help="measure these two first")
    parser.add_argument("--json", help="file for all that was found")
    parser.add_argument("--tune-plain", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments, env):
    """Measure, print, return the exit code."""
    options, began = parse_options(arguments), time.perf_counter()
    given = {"KERNEL": options.kernel, "MICRO_BATCH_TOKENS": options.micro_batch_tokens}
    cfg = t.Config.from_env(dict(env) | {name: value for name, value in given.items() if value})
    run = t.Run.from_env({}, cfg)  # one process, one GPU
    cfg = t.resolve_kernels(t.settle_batch(cfg, run), run)
    if options.tune_plain:
        return tune_plain(cfg, run) or 0

    def say(text):
        print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)

    prepare_kernels(cfg, run, arguments, say)
    peaks = measure_peaks(run) if options.measure_peaks else (1e12 * options.tflops, 1e12 * options.terabytes)
    result = dict(device=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU",
                  torch=torch.__version__, config=asdict(cfg), peaks=peaks, failed=[])
    with tempfile.TemporaryDirectory() as folder:
        write_shard(folder, cfg, 4 * cfg.train_batch_tokens + 1)
        loader = t.Loader(t.open_shards(folder, "train"), cfg, run)
        try:
            result["model"] = found = measure(Subject(cfg, run), loader, options.steps, say)
            result |= {} if options.no_plain else measure_plain(cfg, run, loader, options.steps, say)
        finally:
            loader.close()
    if found["graphs_after_warm_up"] or found["graph_breaks"]:
        result["failed"].append("the compiler broke a graph or compiled anew after warm-up")
    if "plain" in result:
        result["ratio"] = found["tokens_per_s"] / result["plain"]["tokens_per_s"]
    result["components"] = component_rows(cfg, found, result.get("plain"), peaks)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    print_report(cfg, result)
    if result["failed"]:
        print("failed: " + "; ".join(result["failed"]), file=sys.stderr)
    return int(bool(result["failed"]))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except t.GolfError as error:
        sys.exit(f"error: {error}")
