"""Train, compress and score a GDN/SWA hybrid language model for OpenAI's Parameter Golf challenge.

Gated DeltaNet layers [1] (linear time, a recurrent state) with a few sliding-window attention
layers, Muon [2] + AdamW, quantized weights in a file that has, with this script, at most 16,000,000
bytes, scored in bits per byte on every token of the validation split, exactly once.
1.0911 +- 0.0021 on text other than FineWeb: 3 seeds, 150 s on an H200 (logs/record).

Run:  torchrun --standalone --nproc_per_node=8 train_gpt.py     8 GPUs, the record run
      python train_gpt.py                                       1 GPU
      PRESET=sample torchrun --standalone --nproc_per_node=2 train_gpt.py    2 cores, minutes
      python train_gpt.py --help                                every setting

Read sections 4 (the model in plain PyTorch), 5 (how it is scored) and 6 (test-time training), then
main() at the end.  Section 10 computes the three `Ops` of section 4 again, only faster.

Legality.  Causal: LM.features and Hints look left only (attention, conv_heads, delta_rule,
Embedding); Scorer.probe tests the kernels that score.  Normalized: token_nll is a cross entropy
over the whole vocabulary.  Score before update: evaluate() hands the Adapter scored tokens only.
One pass: evaluate() raises unless every target was scored exactly once, and Ledger.add refuses
gaps and repeats.

Shapes: B sequences, T tokens, D model width, H query heads, Hk key/value heads, K and V widths of a
key and of a value, S keys (carried + new), R x C rows (outputs) and columns (inputs) of a weight.

[1] Yang, Kautz, Hatamizadeh: Gated Delta Networks, arXiv:2412.06464.  [2] Jordan: Muon, 2024.
[3] Su et al.: RoFormer, arXiv:2104.09864.  [4] Yang et al.: Parallelizing Linear Transformers with
the Delta Rule over Sequence Length, arXiv:2406.06484.  [5] Frantar et al.: GPTQ, arXiv:2210.17323.
[6] Duda: Asymmetric numeral systems, arXiv:1311.2540.  [7] CaseOps, parameter-golf #1729.
[8] MuonEq-R, parameter-golf #1217.
"""

import difflib
import hashlib
import json
import lzma
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial, wraps
from itertools import accumulate, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module  # private, in 2.11 to 2.13

class GolfError(ValueError):
    """A fault that the user can mend: the message says what is wrong and what to change."""

# --------------------------------------------------------------------------------------------------
# 1. Settings
# --------------------------------------------------------------------------------------------------
# Every setting is one field of Config, set by the environment variable of its upper-case name.  The
# defaults are the record run; PRESET replaces some of them; what the user sets wins.  Limits are
# checked here, the rest before training.

def knob(default, help, low=1 - 2**31, high=2**31 - 1, group=""):
    """A field of Config: default, help text (units in brackets), its limits, title of its group.

    low, high: inclusive limits of a number; for text, low may list the allowed words.  The default
    is always allowed.
    """
    help += f" ({low})" if isinstance(low, str) else ""
    return field(default=default, metadata=dict(help=help, low=low, high=high, group=group))

@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Every setting of a run.  Build it with `Config.from_env`."""
    preset: str = knob("record", "comma list of presets below, later wins", group="run")
    run_id: str = knob("", "name of the run's files under OUT_DIR; empty = time, preset, seed")
    out_dir: str = knob("logs", "folder of logs, artifacts, checkpoints")
    resume: str = knob("", "auto: go on with run RUN_ID, or begin it; or a checkpoint's path")
    artifact: str = knob("", "score this artifact file instead of training")
    checkpoint_every_seconds: float = knob(0.0, "interval; 0 = only after training [s]", 0)
    val_loss_every: int = knob(1000, "steps between validations, clock stopped; 0 = none", 0)
    train_log_every: int = knob(50, "steps between log lines", 1)
    deterministic: bool = knob(False, "1: equal runs; needs MAX_WALLCLOCK_SECONDS=0")
    device: str = knob("auto", "auto = CUDA if there is one", "auto cuda cpu")

    data_path: str = knob("./data/datasets/fineweb10B_sp{}", "shards; {}: VOCAB_SIZE", group="data")
    tokenizer_path: str = knob("./data/tokenizers/fineweb_{}_bpe.model", "SentencePiece; {} too")
    vocab_size: int = knob(8192, "vocabulary of tokenizer and model", 2, 65536)
    holdout_tokens: int = knob(0, "score the last N training tokens, held out, instead of val", 2)

    stack: str = knob("gdn*5 swa:a gdn*5 swa:a", "gdn, swa (SWA_WINDOW) or attn (TRAIN_SEQ_LEN); "
                      "*n repeats a layer or a (group); kind:tag shares the mixer of that tag, "
                      "kind::tag mixer and MLP", group="model")
    model_dim: int = knob(512, "model width D", 8, 1 << 16)
    num_heads: int = knob(8, "attention query heads", 1)
    num_kv_heads: int = knob(4, "attention key/value heads", 1)
    swa_window: int = knob(512, "keys that a query sees, its own included [tokens]", 1)
    rope_base: float = knob(10000.0, "base of the rotary embedding", 2)
    qk_gain_init: float = knob(5.0, "initial gain of each query head after its norm")
    gdn_heads: int = knob(4, "GDN heads", 1, 1024)
    gdn_head_dim: int = knob(128, "width K = V of a GDN head", 8, 1024)
    kv_share: int = knob(1, "successive mixers of a kind that share keys and values; 1 = none", 1)
    mlp_mult: float = knob(4.0, "MLP width over D", 0.25, 64)
    mlp_act: str = knob("relu2", "the leaky one has slope 0.5 below zero", "relu2 leaky_relu2")
    unet: bool = knob(False, "1: U-Net skips from the first half of the layers to the second")
    xsa_layers: int = knob(0, "last attention layers, whose output loses its part along v", 0)
    ngram_buckets: int = knob(0, "rows of the hashed n-gram embedding; 0 = none", 0, 1 << 24)
    ngram_dim: int = knob(112, "columns of that table", 1, 1 << 16)
    ngram_order: int = knob(3, "2: bigrams; 3: trigrams too, in the same table", 2, 3)
    smear: bool = knob(True, "1: SmearGate, a learned mix of each embedding with the previous one")
    bos_id: int = knob(1, "begins a document, where n-grams and SmearGate stop; -1 = none", -1)
    logit_softcap: float = knob(30.0, "c of the logits c tanh(x / c)", 1)
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial embedding", 0)

    seed: int = knob(1337, "seed of the weights and of the data order", 0, group="training")
    train_seq_len: int = knob(2048, "length of a training row, of a scoring window [tokens]", 64)
    train_batch_tokens: int = knob(0, "tokens of a step; 0 = 65536 a rank", 0)
    iterations: int = knob(20000, "most training steps", 0)
    max_wallclock_seconds: float = knob(600.0, "training clock; 0 = no limit [s]", 0)
    warmdown_frac: float = knob(0.8, "last part of the run, in which the learning rate falls", 0, 1)
    min_lr: float = knob(0.02, "final learning rate as a fraction of the peak", 0, 1)
    matrix_lr: float = knob(0.018, "Muon learning rate", 0)
    tied_embed_lr: float = knob(0.035, "AdamW learning rate of embedding and n-gram tables", 0)
    scalar_lr: float = knob(0.025, "AdamW learning rate of vectors", 0)
    muon_momentum: float = knob(0.9, "Muon momentum", 0, 0.9999)
    muon_momentum_warmup_start: float = knob(0.9, "Muon momentum at step 0", 0, 0.9999)
    muon_momentum_warmup_steps: int = knob(1500, "steps to the full momentum", 0)
    muon_row_norm: bool = knob(True, "1: rows of equal norm before Newton-Schulz, in TTT too")
    muon_weight_decay: float = knob(0.1, "decoupled weight decay of matrices", 0)
    adam_weight_decay: float = knob(0.04, "decoupled weight decay of the tables", 0)
    beta1: float = knob(0.9, "AdamW first-moment decay", 0, 0.9999)
    beta2: float = knob(0.95, "AdamW second-moment decay", 0, 0.99999)
    grad_clip_norm: float = knob(0.3, "global gradient norm is clipped to this; 0 = off", 0)
    ema_decay: float = knob(0.995, "decay of the weights' EMA, less at first; 0 = off", 0, 0.99999)
    average_every: int = knob(0, "in the warm-down, average every Nth step instead; 0 = EMA", 0)
    qat_frac: float = knob(0.0, "last part of the run, with weights rounded (late QAT)", 0, 1)

    kernel: str = knob("auto", "auto: the fastest", "auto flashqla fla reference", group="speed")
    compile: str = knob("auto", "torch.compile; auto: on CUDA, evaluation if long", "auto 0 1")
    micro_batch_tokens: int = knob(0, "tokens of one forward on a rank; 0 = 131072 on a GPU", 0)
    warmup_steps: int = knob(3, "throw-away steps on synthetic tokens before the clock", 0)

    grid: str = knob("rate", "quantization steps: rate = by each weight's effect on the loss; "
                     "sdclip = by the row's standard deviation", "rate sdclip", group="export")
    matrix_bits: int = knob(6, "bits of a matrix weight (all bits: for GRID=sdclip)", 2, 8)
    mlp_bits: int = knob(0, "bits of an MLP weight; 0 = MATRIX_BITS", 2, 8)
    embed_bits: int = knob(8, "bits of embedding, n-gram table and gate projections", 2, 8)
    sandwich_bits: int = knob(0, "least bits of the last block's matrices; 0 = as others", 2, 8)
    frequent_rows: int = knob(0, "embedding rows of frequent tokens kept at 8 bits", 0)
    float_matrices: int = knob(0, "N matrices of most relative error a weight stay float16", 0)
    control_bits: int = knob(0, "8: other tensors of over 64 values as int8; 0: float16", 8, 8)
    matrix_clip_sigmas: float = knob(0.0, "row clip of matrices [std]; 0 = fit CAP_BYTES", 1)
    embed_clip_sigmas: float = knob(20.0, "row clip of the tensors of EMBED_BITS [std]", 1)
    gptq_enabled: bool = knob(True, "1: GPTQ by training text; 0: round to nearest, as GRID=sdclip")
    gptq_calibration_batches: int = knob(64, "batches of 8 rows for the Hessians", 1)
    gptq_reserve_seconds: float = knob(4.0, "training clock kept for the Hessians [s]", 0)
    gptq_token_power: float = knob(0.0, "weight each token by its frequency ** -power", 0, 1)
    compressor: str = knob("rans", "rans codes integers, brotli the rest", "rans brotli lzma zstd")
    cap_bytes: int = knob(16_000_000, "most bytes of script + artifact", 1)

    final_score: str = knob("ttt", "evaluation method that gives the reported score",
                            "roundtrip exact sliding ttt", group="evaluation")
    eval_diagnostics: bool = knob(False, "1: score by the other methods too, timed apart")
    eval_stride: int = knob(64, "targets that a sliding window scores [tokens]", 1)
    eval_spans: int = knob(64, "spans that the exact method cuts the text into", 1)
    eval_warmup_tokens: int = knob(8192, "unscored text before a span [tokens]", 0)
    eval_batch_tokens: int = knob(131072, "tokens of one evaluation pass on one rank", 64)
    eval_budget_seconds: float = knob(600.0, "of evaluation; TTT epochs are cut to fit [s]", 1)

    ttt_scoring: str = knob("exact", "how a chunk is scored before it is trained on",
                            "sliding exact", group="test-time training")
    ttt_optimizer: str = knob("muon", "muon: Muon for matrices, SGD for the rest", "sgd adamw muon")
    ttt_lr: float = knob(0.0002, "learning rate", 0)
    ttt_schedule: str = knob("constant", "learning rate over the chunks", "cosine constant")
    ttt_momentum: float = knob(0.9, "momentum of sgd and muon", 0, 0.9999)
    ttt_epochs: int = knob(8, "passes over a scored chunk, one step each", 0)
    ttt_chunk_tokens: int = knob(32768, "targets of a chunk [tokens]", 1)
    ttt_phase_chunks: int = knob(1, "chunks that are scored before a round of training", 1)
    ttt_freeze_blocks: int = knob(2, "first blocks that do not train", 0)
    ttt_grad_clip: float = knob(1.0, "global gradient norm of a step; 0 = off", 0)
    ttt_ema: float = knob(0.0, "EMA decay per step; the averaged weights score; 0 = off", 0, 0.9999)
    ttt_tilt: float = knob(0.0, "logit bonus of the token that last followed this context", 0)
    ttt_hash_buckets: int = knob(0, "rows of an n-gram table trained in TTT only", 0, 1 << 24)
    ttt_hash_lr: float = knob(0.003, "learning rate of that embedding", 0)

    def __post_init__(self):
        """Raise GolfError for the first value outside its limits or against another's."""
        def must(name, holds, rule):
            if not holds:
                raise GolfError(f"{name.upper()}={plain(getattr(self, name))[:80]}: must {rule}")

        for f in fields(self):
            value = getattr(self, f.name)
            if f.name.endswith("_path"):
                object.__setattr__(self, f.name, value.replace("{}", str(self.vocab_size)))
            low, high = f.metadata["low"], f.metadata["high"]
            if isinstance(low, str):
                must(f.name, value in low.split(), f"be one of {', '.join(low.split())}")
            elif not isinstance(value, str) and value != f.default:  # NaN is refused too
                apart = "" if low <= f.default <= high else f" or {f.default}"
                must(f.name, low <= value <= high, f"be between {low} and {high}{apart}")
        T = self.train_seq_len
        clock = self.max_wallclock_seconds
        attends = any(layer.kind != "gdn" for layer in parse_stack(self.stack))
        named = re.fullmatch(r"(\w[\w.-]*(/\w[\w.-]*)*)?", self.run_id) and len(self.run_id) <= 200
        must("run_id", named, "be up to 200 letters, digits, '_', and inside a name '.', '-', '/'")
        must("model_dim", self.model_dim % 8 == 0, "be a multiple of 8")
        must("gdn_head_dim", self.gdn_head_dim % 8 == 0, "be a multiple of 8")
        must("train_seq_len", T % 64 == 0, "be a multiple of 64")
        must("train_batch_tokens", self.train_batch_tokens % T == 0,
             f"be a multiple of TRAIN_SEQ_LEN={T}")
        must("eval_batch_tokens", self.eval_batch_tokens >= T, f"be at least TRAIN_SEQ_LEN={T}")
        must("eval_stride", self.eval_stride <= T, f"be at most TRAIN_SEQ_LEN={T}")
        must("num_heads", not attends or self.model_dim % (2 * self.num_heads) == 0,
             f"divide half of MODEL_DIM={self.model_dim}")
        must("num_kv_heads", not attends or self.num_heads % self.num_kv_heads == 0,
             f"divide NUM_HEADS={self.num_heads}")
        must("gptq_reserve_seconds", not self.gptq_enabled or clock == 0
             or self.gptq_reserve_seconds < clock, f"be below MAX_WALLCLOCK_SECONDS={clock:g}")
        must("max_wallclock_seconds", not (self.deterministic and clock),
             "be 0 with DETERMINISTIC=1; use ITERATIONS")
        must("resume", self.resume != "auto" or self.run_id, "come with RUN_ID, the run's name")
        must("resume", not (self.resume and self.artifact), "be empty: ARTIFACT is only scored")
        for name in "qat_frac", "mlp_bits", "sandwich_bits", "frequent_rows", "matrix_clip_sigmas":
            must(name, not getattr(self, name) or self.grid == "sdclip", "be 0 unless GRID=sdclip")
        must("frequent_rows", self.frequent_rows == 0 or self.gptq_enabled,
             "be 0 unless GPTQ_ENABLED=1, whose calibration counts the tokens")

    @classmethod
    def from_env(cls, env):
        """The Config of `env`, {variable: text}; GolfError also for names like ours."""
        known = {f.name.upper(): f for f in fields(cls)}
        for name in sorted(set(env) - set(known) - OTHERS):
            near = [ours for ours in known if "_" in name and f"_{name}_" in f"_{ours}_"]
            near += difflib.get_close_matches(name, known, n=1, cutoff=0.86)
            if near or any(f"_{word}_" in f"_{name}_" for word in OUR_WORDS):
                hint = f"; did you mean {near[0]}?" if near else ""
                raise GolfError(f"{name}: unknown setting{hint} (--help lists them all)")
        if env.get("EVAL_ONLY", "0") not in ("", "0") and not env.get("ARTIFACT"):
            raise GolfError("EVAL_ONLY: needs ARTIFACT, an artifact's path")
        values = {}
        presets = env.get("PRESET", "").replace(" ", "")
        for preset in presets.split(",") if presets else ():
            if preset not in PRESETS:
                raise GolfError(f"PRESET={preset}: must be a comma list of {', '.join(PRESETS)}")
            values |= PRESETS[preset]
        values |= WITH_SAMPLE.get(presets, {})
        for name in known.keys() & env.keys():
            text, kind = env[name], type(known[name].default)
            try:
                value = {"0": False, "1": True}[text] if kind is bool else kind(text)
            except (ValueError, KeyError):
                expected = {bool: "0 or 1", int: "a whole number", float: "a number"}[kind]
                raise GolfError(f"{name}={text[:80]!r}: must be {expected}") from None
            values[known[name].name] = value
        return cls(**values)

def plain(value):
    """A setting's value as the environment would spell it."""
    return f"{value:g}" if isinstance(value, (bool, float)) else str(value)

# An unknown name with one of these is refused: other scripts of the challenge have such settings.
OUR_WORDS = """TTT GDN SWA GPTQ MUON NGRAM BIGRAM LR LEARNING_RATE WARMDOWN ITERS MAX_STEPS
    NUM_STEPS BATCH_SIZE NUM_LAYERS UNIQUE_LAYERS SHARE_MLP ROPE ATTN_KERNEL""".split()
OTHERS = {"ARTIFACTS", "COMPILER", "DEVICES", "MODEL_DIR"}  # close to ours, but of other programs

class Layer(NamedTuple):
    """One layer: kind of its mixer, and the keys of mixer and MLP (equal keys share weights)."""
    kind: str
    mixer: str
    mlp: str

MAX_LAYERS = 256

def parse_stack(text):
    """The list of Layer that a STACK such as 'gdn*5 swa:a' or '(gdn::a swa::b)*3' names."""
    fault = f"STACK={text[:200]!r}"
    flat = re.sub(r"(\w[\w:]*)(?=\*)", r"(\1)", text.replace(",", " "))  # gdn*5 is (gdn)*5
    group = re.compile(r"\(([^()]*)\)(?:\*([1-9]\d{0,2}))?")
    while len(flat) < 10_000 and (m := group.search(flat)):  # longer text names too many layers
        flat = flat[:m.start()] + f" {m[1]} " * int(m[2] or 1) + flat[m.end():]
    parts = flat.split()
    if not 1 <= len(parts) <= MAX_LAYERS:
        raise GolfError(f"{fault}: names {len(parts)} layers, must be 1 to {MAX_LAYERS}")
    layers, kinds = [], {}
    for part in parts:
        m = re.fullmatch(r"(gdn|swa|attn)(?:(::?)(\w+))?", part)
        if not m:
            raise GolfError(f"{fault}: {part[:40]!r} must be gdn, swa or attn, then optionally "
                            ":tag or ::tag, then optionally *count")
        kind, colons, tag = m.groups()
        if tag and kinds.setdefault(tag, kind) != kind:
            raise GolfError(f"{fault}: tag {tag!r} names both {kinds[tag]} and {kind}")
        own = f"#{len(layers)}"
        layers.append(Layer(kind, tag or own, tag if colons == "::" else own))
    return layers

SAMPLE_FOLDER = Path(__file__).resolve().parent / "data" / "sample"
_ANCESTOR = dict(vocab_size=1024, mlp_mult=3.0, ngram_buckets=3072, muon_row_norm=False,
                 warmdown_frac=0.6, min_lr=0.1, matrix_lr=0.025, muon_momentum=0.97,
                 muon_momentum_warmup_start=0.92, muon_weight_decay=0.04, ema_decay=0.997,
                 grid="sdclip", ttt_scoring="sliding", ttt_optimizer="sgd", ttt_lr=0.005,
                 ttt_schedule="cosine", ttt_epochs=3)
_INT6 = _ANCESTOR | dict(average_every=50, qat_frac=0.15, gptq_enabled=False, compressor="zstd")
PRESETS = {
    "record": {},
    # GDN heads of 8 x 64 as described; the default's 4 x 128 have as many weights, twice the state.
    "pr1749": _ANCESTOR | dict(gdn_heads=8, gdn_head_dim=64, float_matrices=2, compressor="brotli",
                               eval_stride=32, ttt_ema=0.5, ttt_tilt=0.1, ttt_hash_buckets=16384),
    # Ten GDN layers, wider, keys and values shared by pairs; int6 after late QAT.
    "pr1698": _INT6 | dict(stack="gdn*10", model_dim=544, gdn_heads=8, gdn_head_dim=64, kv_share=2,
                           vocab_size=8192, train_seq_len=1024, muon_momentum=0.95),
    # Ten attention layers, U-Net skips, XSA in the last three, int5 MLPs.  Its depth recurrence is
    # STACK="(attn::a attn::b attn::c attn::d attn::e)*2".
    "pr456": _INT6 | dict(stack="attn*10", unet=True, xsa_layers=3, ngram_buckets=10240,
                          ngram_dim=128, ngram_order=2, mlp_bits=5, ttt_optimizer="adamw",
                          ttt_lr=0.0005, ttt_epochs=1, ttt_freeze_blocks=0),
    "sample": dict(
        data_path=str(SAMPLE_FOLDER), tokenizer_path=str(SAMPLE_FOLDER / "corpus_1024_bpe.model"),
        stack="gdn*2 swa:a gdn swa:a", model_dim=128, num_heads=4, num_kv_heads=2, swa_window=128,
        gdn_heads=4, gdn_head_dim=32, mlp_mult=3.0, ngram_buckets=1024, ngram_dim=32,
        vocab_size=1024, train_seq_len=256, train_batch_tokens=4096, iterations=250, warmup_steps=1,
        gptq_calibration_batches=16, muon_momentum_warmup_steps=100, warmdown_frac=0.6, min_lr=0.1,
        val_loss_every=0, train_log_every=20, checkpoint_every_seconds=30.0, eval_stride=128,
        eval_spans=8, eval_warmup_tokens=1024, eval_batch_tokens=16384, eval_diagnostics=True,
        ttt_chunk_tokens=4096, ttt_epochs=1)}

# PRESET=NAME,sample: fewer layers and steps than sample, one score.
_QUICK = dict(iterations=80, eval_diagnostics=False)
WITH_SAMPLE = {"pr1749,sample": _QUICK | dict(model_dim=64, gdn_head_dim=16),
               "pr1698,sample": _QUICK | dict(stack="gdn*4"),
               "pr456,sample": _QUICK | dict(stack="attn*6")}

def fields_of(*titles):
    """Names of Config fields in these groups of --help."""
    groups = accumulate((f.metadata["group"] for f in fields(Config)), lambda old, new: new or old)
    return [f.name for f, group in zip(fields(Config), groups) if group in titles]

# What an artifact stores of the Config: enough to evaluate it alone.
STORED_FIELDS = ["vocab_size", *fields_of("model"), "train_seq_len", "matrix_bits", "compressor"]

def help_text():
    """The text of --help: every setting, by group."""
    lines = ["Settings are environment variables: PRESET=sample SEED=42 python train_gpt.py"]
    for f in fields(Config):
        if f.metadata["group"]:
            lines += ["", f.metadata["group"] + ":"]
        lines.append(f"  {f.name.upper() + '=' + plain(f.default):<44} {f.metadata['help']}")
    for name, values in (PRESETS | WITH_SAMPLE).items():
        settings = " ".join(f"{k.upper()}={plain(v)}" for k, v in values.items())
        lines += ["", f"PRESET={name}: {settings or 'the defaults'}"]
    return "\n".join(lines)

# --------------------------------------------------------------------------------------------------
# 2. Run
# --------------------------------------------------------------------------------------------------
# Rank, device, log, clock and files.  All collectives are here; on one rank they do nothing.  Rank
# 0's clock decides, so that ranks never disagree.  Files appear whole or not at all.

class Run:
    """Where this process runs: `rank` of `world_size` on `device`; rank 0 writes the log."""

    def __init__(self, rank=0, world_size=1, device="cpu"):
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self.on_cuda = self.device.type == "cuda"
        self.began = time.perf_counter()
        # Times of the first and the newest training batch, less scoring_s: report() checks that
        # the training clock counted what lies between.
        self.fetched = []
        self.scoring_s = self.before_s = 0.0  # of evaluate(); of training in earlier processes
        self.log_path = None  # the console only
        self.quiet = False

    @classmethod
    def from_env(cls, env, cfg):
        """The Run of torchrun's variables and DEVICE; starts torch.distributed for many ranks."""
        rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        has_cuda = torch.cuda.is_available()
        cpu_will_do = cfg.artifact or "sample" in cfg.preset
        if not has_cuda and (cfg.device == "cuda" or cfg.device == "auto" and not cpu_will_do):
            raise GolfError(f"PRESET={cfg.preset} DEVICE={cfg.device}: torch finds no CUDA GPU; "
                            "PRESET=sample runs on any machine in minutes, DEVICE=cpu insists")
        if cfg.deterministic:
            env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for this
            torch.use_deterministic_algorithms(True)
        device = "cpu"
        if has_cuda and cfg.device != "cpu":
            ranks, gpus = int(env.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            if ranks > gpus:
                raise GolfError(f"{ranks} ranks on {gpus} GPUs: lower --nproc_per_node")
            device = f"cuda:{env.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        if world_size > 1 and not dist.is_initialized():
            # NCCL for gradients, gloo for small decisions that must not wait for the GPU.
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, rank=rank, world_size=world_size)
        if device == "cpu" and "OMP_NUM_THREADS" not in env:
            # One rank per core is as fast, and does not stall beside other work.
            torch.set_num_threads(1)
        return cls(rank, world_size, device)

    def log(self, event, **values):
        """One line '[event ]key:value ...' from rank 0; floats get 4 decimals."""
        parts = [event] if event else []
        for key, value in values.items():
            value = f"{value:.4f}" if isinstance(value, float) else str(value)
            parts.append(f"{key}:{','.join(value.split()) or '-'}")
        self.write(" ".join(parts))

    def write(self, line, to_log=True):
        """Free text from rank 0, to the console and to the log file."""
        if self.rank or self.quiet:
            return
        # A closed console or a full disk must not end a run.
        with suppress(OSError, ValueError, AttributeError):
            print(line, flush=True)
        if self.log_path and to_log:
            with suppress(OSError), open(self.log_path, "ab") as f:
                f.write(f"{line}\n".encode(errors="replace"))  # a path may be no UTF-8

    def all_sum(self, tensor):
        """Sum `tensor` over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value):
        """Rank 0's Python value, on every rank; does not wait for the GPU."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def from_rank_0(self, make):
        """make() of rank 0, on every rank; a GolfError or OSError there is raised on all."""
        try:
            box = make() if self.rank == 0 else None
        except (GolfError, OSError) as error:
            box = error
        box = self.broadcast(box)
        if isinstance(box, Exception):
            raise box
        return box

    def gather(self, value):
        """Every rank's Python value, in rank order; does not wait for the GPU."""
        out = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(out, value)
        return out

    def all_gather_rows(self, tensor):
        """Every one of many ranks' `tensor` (n, ...), concatenated to (world_size * n, ...)."""
        out = tensor.new_empty(self.world_size * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather_into_tensor(out, tensor)
        return out

    def share(self, n):
        """This rank's contiguous part of n items, a slice."""
        return slice(n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size)

    def synchronize(self):
        """Wait for the device."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def to_host(self, tensor):
        """Begin to copy `tensor` to the host; the function returned waits for it and returns it."""
        copy = tensor.to("cpu", non_blocking=True)
        if not self.on_cuda:
            return lambda: copy
        done = torch.cuda.Event()
        done.record()
        return lambda: done.synchronize() or copy

    def peak_memory_mib(self, anew=True):
        """Peak memory [MiB]: on CUDA torch's since it began anew, on the CPU the process's."""
        if not self.on_cuda:
            with suppress(ImportError):
                import resource  # POSIX
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                return peak // (2**20 if sys.platform == "darwin" else 1024)  # macOS: bytes
            return 0
        peak = torch.cuda.max_memory_allocated(self.device) // 2**20
        if anew:
            torch.cuda.reset_peak_memory_stats(self.device)
        return peak

class Clock:
    """A stopwatch that stands until `resume` and after `pause`; both wait for the device."""

    def __init__(self, run, total=0.0):
        self.run, self.total = run, total
        self.started = math.inf

    def resume(self):
        """Start or go on."""
        self.run.synchronize()
        self.started = time.perf_counter()

    def pause(self):
        """Stop; returns the seconds so far."""
        self.run.synchronize()
        self.total, self.started = self.elapsed(), math.inf
        return self.total

    def elapsed(self):
        """Seconds so far, without waiting for the device."""
        return self.total + max(0.0, time.perf_counter() - self.started)

def write_whole(path, write):
    """Call write(file) on a neighbour of `path`, then rename it: no reader ever sees a part."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as error:  # which names no file if the disk is full
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)

def save_tensors(path, tensors, facts):
    """Write {name: Tensor} and JSON-able `facts` to one npz file; raises OSError."""
    arrays = {name: x.detach().float().cpu().numpy() for name, x in tensors.items()}
    facts = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    write_whole(path, lambda f: np.savez(f, **arrays, facts=facts))

def load_tensors(path):
    """The ({name: Tensor}, facts) of `save_tensors`; executes nothing.  Raises GolfError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        facts = dict(json.loads(tensors.pop("facts").numpy().tobytes()))
        if facts.keys() != BEGINNING.keys():
            raise ValueError(f"its facts are {facts}")
        return tensors, facts
    except Exception as error:  # on foreign bytes numpy and zipfile raise a dozen kinds
        raise GolfError(f"{path}: not a whole checkpoint of this script ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:200]})") from None

@torch.no_grad()
def copy_all(targets, values):
    """Copy values into targets, one for one."""
    torch._foreach_copy_(targets, values)

# --------------------------------------------------------------------------------------------------
# 3. Data
# --------------------------------------------------------------------------------------------------
# Shards are the challenge's: an int32[256] header (magic, version, number of tokens), then uint16
# tokens.  The bytes of a token are counted by the challenge's rule, or read from the sidecar
# fineweb_val_bytes_*.bin (one uint16 a token) where CaseOps [7] changed the text.

SHARD_HEAD = [20240520, 1]  # magic, version
HEADER_BYTES = 1024
CASE_SLACK = 1e-3  # published sidecars count a no-break space before normalization: 2 bytes, not 1
CASE_MARKS = "\ue001\ue002\ue003\ue004"  # title, all capitals, next letter capital, escape

@dataclass(frozen=True)
class Shard:
    """One shard file: `shard[i:j]` opens it to read np.uint16 (j - i,)."""
    path: Path
    tokens: int

    def __len__(self):
        return self.tokens

    def __getitem__(self, part):
        start, stop, _ = part.indices(self.tokens)
        return np.fromfile(self.path, "<u2", stop - start, offset=HEADER_BYTES + 2 * start)

def open_shards(data_path, split):
    """All shards of a split, by name, their headers and sizes checked; GolfError names a fault."""
    shards = []
    for path in sorted(Path(data_path).glob(f"fineweb_{split}_[0-9]*.bin")):
        header = np.fromfile(path, "<i4", 3).tolist()
        size = path.stat().st_size
        tokens = (size - HEADER_BYTES) // 2
        if header != [*SHARD_HEAD, tokens] or tokens <= 0 or size % 2:
            raise GolfError(f"{path}: has {size} bytes and begins with {header}; expected "
                            f"{SHARD_HEAD}, the number of tokens, and 2 bytes a token after "
                            f"{HEADER_BYTES}: no shard of this challenge, or not all of it")
        shards.append(Shard(path, tokens))
    if not shards and split != "val_bytes":  # the sidecar, which few texts have
        raise GolfError(f"DATA_PATH={data_path}: holds no fineweb_{split}_*.bin; data/download.py "
                        "fetches the shards; PRESET=sample uses the embedded ones")
    return shards

def check_vocabulary(path, tokens, vocab_size):
    """Raise GolfError naming the file if a token is not below vocab_size."""
    top = int(tokens.max())
    if top >= vocab_size:
        raise GolfError(f"{path}: token {top} is outside VOCAB_SIZE={vocab_size}; set VOCAB_SIZE "
                        "and TOKENIZER_PATH to those that the shards were made with")

class Data(NamedTuple):
    """What a run reads: training shards, validation tokens np.uint16 (n,), bytes of tokens."""
    train: list
    val: np.ndarray
    table: "ByteTable"

def open_data(cfg):
    """Open and check everything before any time is spent; raises GolfError."""
    sp = open_tokenizer(cfg)
    table = byte_table(sp, cfg.vocab_size)
    train = [] if cfg.artifact and not cfg.holdout_tokens else open_shards(cfg.data_path, "train")
    if cfg.holdout_tokens:
        last = train[-1]
        kept = len(last) - cfg.holdout_tokens
        if kept <= cfg.train_seq_len:
            raise GolfError(f"HOLDOUT_TOKENS={cfg.holdout_tokens}: the last training shard "
                            f"{last.path} has only {len(last)} tokens")
        shards, val = [last], last[kept:]
        train[-1] = replace(last, tokens=kept)
    else:
        shards = open_shards(cfg.data_path, "val")
        val = np.concatenate([shard[:] for shard in shards])
    if len(val) < 2:
        raise GolfError(f"{shards[0].path}: one token, nothing to score")
    check_vocabulary(shards[0].path, val, cfg.vocab_size)
    for shard in (shards[0], *train[:1]):
        check_encoding(sp, table, shard, cfg)
    counted, by_text = decoded_bytes(sp, table, val[:1_000_000])
    if abs(counted - by_text) > (CASE_SLACK * by_text if case_marks(sp) else 0):
        raise GolfError(f"TOKENIZER_PATH={cfg.tokenizer_path}: counts {counted} bytes for "
                        f"{by_text} bytes of text, so that scores would be wrong; use another")
    if not cfg.holdout_tokens:
        table = table._replace(sidecar=open_sidecar(cfg, val, sp, table))
        separates = cfg.bos_id in val and table.boundary[cfg.bos_id]
        if cfg.bos_id >= 0 and not separates:
            raise GolfError(f"BOS_ID={cfg.bos_id}: separates no documents in {shards[0].path}; set "
                            f"it to {sp.bos_id()} or {sp.eos_id()}, the tokenizer's, or to -1")
        for shard in train:
            if any(np.array_equal(shard[:1024], part[:1024]) for part in shards):
                raise GolfError(f"{shard.path}: is validation text; take it out of DATA_PATH")
    return Data(train, val, table)

def open_tokenizer(cfg):
    """The SentencePiece processor of TOKENIZER_PATH; raises GolfError."""
    import sentencepiece  # here, so that the script can be imported without it
    path = cfg.tokenizer_path
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=path)
        sp.id_to_piece(list(range(sp.vocab_size())))  # all UTF-8?
    except (RuntimeError, OSError, ValueError) as error:
        raise GolfError(f"TOKENIZER_PATH={path}: not a SentencePiece model; data/download.py "
                        f"fetches it, or set VOCAB_SIZE ({str(error).splitlines()[0]})") from None
    if sp.vocab_size() != cfg.vocab_size:
        raise GolfError(f"TOKENIZER_PATH={path}: has {sp.vocab_size()} pieces, but VOCAB_SIZE="
                        f"{cfg.vocab_size}; both must be those of DATA_PATH")
    return sp

def tokenizer_hash(cfg):
    """SHA-256 of the tokenizer's file, by which artifacts name it; None without."""
    with suppress(OSError):
        return hashlib.sha256(Path(cfg.tokenizer_path).read_bytes()).hexdigest()

def check_encoding(sp, table, shard, cfg):
    """Raise GolfError unless most of the shard's first texts encode to the tokens that it holds."""
    tokens = shard[:50_000]
    check_vocabulary(shard.path, tokens, cfg.vocab_size)
    runs = [run[:256] for run in text_runs(table, tokens)]
    # A word that is cut at an end may be encoded otherwise.
    same = [str(run[8:-8] or run)[1:-1] in str(again)
            for run, again in zip(runs, sp.encode(sp.decode(runs)))]
    if 2 * sum(same) < len(same):
        raise GolfError(f"{shard.path}: its texts, decoded by TOKENIZER_PATH={cfg.tokenizer_path}, "
                        "encode to other tokens: set it to the tokenizer that made DATA_PATH")

def text_runs(table, tokens):
    """The texts in tokens np.uint16 (n,): a list of ids for each stretch between boundaries."""
    is_boundary = table.boundary.tolist()
    stretches = groupby(tokens.tolist(), key=is_boundary.__getitem__)
    return [list(ids) for boundary, ids in stretches if not boundary]

def open_sidecar(cfg, val, sp, table):
    """Bytes of original text of each validation token, np.uint16 (n,), or None; GolfError."""
    name = f"DATA_PATH={cfg.data_path}: fineweb_val_bytes_*.bin"
    sidecars = open_shards(cfg.data_path, "val_bytes")
    marks = case_marks(sp)
    if not sidecars:
        if marks:
            raise GolfError(f"{name} is missing, but the tokenizer has CaseOps marks: the score is "
                            "by the bytes of the original text; data/download.py fetches it")
        return None
    counts = np.concatenate([part[:] for part in sidecars])
    total = int(counts[1:].sum(dtype=np.int64))
    by_table = int(target_bytes(table, val).sum())
    # The table counts 0 bytes of an escaped mark, the sidecar 3.
    slack = CASE_SLACK * by_table + 3 * int((val == marks[3]).sum()) if marks else 0
    if len(counts) != len(val) or abs(total - by_table) > slack:
        raise GolfError(f"{name} counts {total} bytes of {len(counts)} tokens, but the pieces of "
                        f"the {len(val)} validation tokens have {by_table}")
    return counts

class ByteTable(NamedTuple):
    """Per token id: `base` bytes (int64), `spaced` begins with the space mark, `boundary` is a
    control or absent piece.  `sidecar`: np.uint16 (n,) bytes of each token of the text, or None.
    """
    base: Tensor
    spaced: Tensor
    boundary: Tensor
    sidecar: np.ndarray | None = None

def case_marks(sp):
    """Ids of the CaseOps marks, or [] if the tokenizer does not have all four as pieces."""
    ids = [sp.piece_to_id(mark) for mark in CASE_MARKS]
    return [] if sp.unk_id() in ids else ids

def byte_table(sp, vocab_size):
    """The ByteTable of a tokenizer: the UTF-8 bytes of each token by the challenge's rule.

    Control, unknown, unused and absent pieces: 0, and a text ends there.  A byte piece: 1.  Any
    other: the UTF-8 length of the piece without one leading space mark (U+2581).  CaseOps marks: 0.
    """
    base = torch.zeros(vocab_size, dtype=torch.int64)
    spaced = torch.zeros(vocab_size, dtype=torch.bool)
    boundary = torch.ones(vocab_size, dtype=torch.bool)
    marks = case_marks(sp)
    for i in range(min(vocab_size, sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        boundary[i] = False
        piece = sp.id_to_piece(i)
        if sp.is_byte(i):
            base[i] = 1
        elif i not in marks:
            spaced[i] = piece.startswith("\u2581")
            base[i] = len(piece.removeprefix("\u2581").encode())
    return ByteTable(base, spaced, boundary)

def count_bytes(table, prev_ids, target_ids):
    """Bytes of each target, int64; its leading space counts 1, except after a boundary."""
    return table.base[target_ids] + (table.spaced[target_ids] & ~table.boundary[prev_ids]).long()

def target_bytes(table, tokens):
    """Bytes of targets 0 .. n - 2 (tokens 1 .. n - 1) of np.uint16 (n,): int64 (n - 1,)."""
    if table.sidecar is not None:
        return torch.from_numpy(table.sidecar[1:].astype(np.int64))
    ids = torch.from_numpy(tokens.astype(np.int64))
    return count_bytes(table, ids[:-1], ids[1:])

def decoded_bytes(sp, table, tokens):
    """Bytes of the texts in tokens np.uint16 (n,) in two ways that must agree: (counted, decoded).

    By the byte table, and as the UTF-8 length of what SentencePiece decodes, less a first space and
    CaseOps marks: a small letter has as many bytes as the capital that it stands for.
    """
    is_byte = np.array(sp.is_byte(list(range(sp.vocab_size()))))
    whole = np.flatnonzero(~is_byte[tokens])  # an end may split a character of several byte pieces
    tokens = tokens[whole[0]:whole[-1] + 1] if len(whole) else tokens[:0]
    counted = table.base[tokens[:1].astype(np.int64)].sum() + target_bytes(table, tokens).sum()
    runs = text_runs(table, tokens)
    texts = [text.replace("\u2581", " ") for text in sp.decode(runs)]  # a space in byte pieces
    firsts = sp.decode([run[:1] for run in runs])  # some tokenizers drop a text's first space
    if case_marks(sp):
        texts = [re.sub(f"[{CASE_MARKS}]", "", text) for text in texts]
    spaces = sum(first.startswith(" ") for first in firsts)
    return int(counted), sum(len(text.encode()) for text in texts) - spaces

class Loader:
    """Training batches in random order, prefetched by a thread, the same for any number of ranks.

    next() gives int32 (rows / world_size, TRAIN_SEQ_LEN + 1) on `run.device`: this rank's part of
    the next global batch.  An epoch cuts every shard into rows at a random phase and shuffles all
    of them.  `place`: (epoch, row) after the last batch; a Loader begun there goes on.
    """

    def __init__(self, shards, cfg, run, place=(0, 0)):
        self.shards, self.cfg = shards, cfg
        self.run = run
        self.place = tuple(place)
        if max(map(len, shards)) <= cfg.train_seq_len:
            raise GolfError(f"{shards[0].path}: {len(shards[0])} tokens, fewer than one row of "
                            f"TRAIN_SEQ_LEN={cfg.train_seq_len} + 1")
        self.pool = ThreadPoolExecutor(1)
        self.batches = self._batches(*self.place)
        self.ahead = deque(self.pool.submit(next, self.batches) for _ in range(2))

    def _batches(self, epoch, row):
        """In the thread: this rank's part of each global batch, and the place after it."""
        if self.run.on_cuda:  # else the thread would pin its memory through GPU 0
            torch.cuda.set_device(self.run.device)
        seq_len = self.cfg.train_seq_len
        count = self.cfg.train_batch_tokens // seq_len
        part = self.run.share(count)
        lengths = np.array([len(shard) for shard in self.shards])
        rows = []  # (shard, first token) of the global batch
        while True:
            rng = np.random.default_rng([self.cfg.seed, epoch])
            phase = rng.integers(0, np.clip(lengths - seq_len, 1, seq_len))
            counts = np.maximum(0, (lengths - 1 - phase) // seq_len)
            offsets = np.concatenate([[0], np.cumsum(counts)])
            order = rng.permutation(offsets[-1])
            while row < len(order):
                take = order[row:row + count - len(rows)]
                row += len(take)
                shard = np.searchsorted(offsets, take, side="right") - 1
                start = phase[shard] + (take - offsets[shard]) * seq_len
                rows += zip(shard.tolist(), start.tolist())
                if len(rows) == count:
                    own = rows[part]
                    batch = np.stack([self.shards[s][i:i + seq_len + 1] for s, i in own])
                    for (s, _), tokens in zip(own, batch):
                        check_vocabulary(self.shards[s].path, tokens, self.cfg.vocab_size)
                    batch = torch.from_numpy(batch.astype(np.int32))
                    yield batch.pin_memory() if self.run.on_cuda else batch, (epoch, row)
                    rows = []
            epoch += 1
            row = 0

    def __next__(self):
        batch, self.place = self.ahead.popleft().result()
        self.run.fetched[1:] = [time.perf_counter() - self.run.scoring_s]  # [first, newest]
        self.ahead.append(self.pool.submit(next, self.batches))
        return batch.to(self.run.device, non_blocking=True)

# --------------------------------------------------------------------------------------------------
# 4. Model
# --------------------------------------------------------------------------------------------------
# First the operations that take the time, in plain PyTorch: they define what the model
# computes, run on the CPU, and are what the fast versions of section 10 are checked against.  Then
# the modules and one LM, whose `features` training, evaluation and calibration share.
#
# A forward from the state that an earlier one returned computes what one pass over both texts
# would.  Weights are float32; activations bfloat16 with fast kernels.

GDN_CHUNK = 64  # tokens that the delta rule solves at once

def rms_norm(x):
    """x over its root mean square along the last axis, computed in float32, in x's dtype."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

OBSERVERS = []  # functions (x, weights) that see every matrix product of a forward, for Hessians

def linear(x, *weights, scale=None, multiple=1):
    """x (..., C) times the transpose of the stacked weights (R_i, C): (..., sum of R_i).

    scale: (sum of R_i,) factors of the outputs, or None.  They multiply the small weight instead of
    the large result, so that their gradient costs no pass over the tokens.
    multiple: zeros are appended to the outputs, up to a multiple of this.
    """
    for observe in OBSERVERS:
        observe(x, weights)
    w = weights[0] if len(weights) == 1 else torch.cat(weights)
    w = F.pad(w, (0, 0, 0, -len(w) % multiple)) if multiple > 1 else w
    w = w if scale is None else w * scale.unsqueeze(-1)
    return F.linear(x, w.to(x.dtype))

def delta_rule(q, k, v, g, beta, state=None):
    """Gated delta rule [1], eq. 10, chunk by chunk in the WY form of [4]; float32 inside.

    S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T;  o_t = S_t q_t / sqrt(K).
    q, k: (B, T, H, K), l2-normalized.   v: (B, T, H, V).   beta: (B, T, H), after its sigmoid.
    g: (B, T, H) float32 log-decay, <= 0.   state: S^T (B, H, K, V) float32, None: zeros.
    Returns o (B, T, H, V) in v's dtype and the final state (B, H, K, V).

    Within a chunk, with G the running sum of g: (I + tril(beta k k^T exp(G_i - G_j), -1)) [u, w] =
    [beta v, beta exp(G) k] is one triangular solve; across chunks the state is carried.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    pad = -T % GDN_CHUNK  # padding has beta = 0 and g = 0: outputs and state do not change

    def chunked(x):
        x = F.pad(x.to(dtype), [0, 0] * (x.dim() - 2) + [0, pad])
        return x.unflatten(1, (-1, GDN_CHUNK)).movedim(3, 1)  # (B, H, chunks, GDN_CHUNK, ...)

    out_dtype = v.dtype
    q = chunked(q * K**-0.5)
    k, v = chunked(k), chunked(v)
    beta = chunked(beta).unsqueeze(-1)
    G = chunked(g).cumsum(-1)
    lower = torch.ones(GDN_CHUNK, GDN_CHUNK, dtype=torch.bool, device=q.device).tril()
    # decay (..., i, j): what is left at token i of what token j wrote
    decay = (G.unsqueeze(-1) - G.unsqueeze(-2)).masked_fill(~lower, -math.inf).exp()
    system = (beta * k @ k.mT * decay).tril(-1)
    right = torch.cat([beta * v, beta * k * G.exp().unsqueeze(-1)], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solved.split([V, K], -1)
    attn = q @ k.mT * decay
    q_in = q * G.exp().unsqueeze(-1)
    k_out = k * (G[..., -1:] - G).exp().unsqueeze(-1)
    S = state.to(dtype) if state is not None else q.new_zeros(B, H, K, V)
    out = []
    for c in range(q.shape[2]):
        new = u[:, :, c] - w[:, :, c] @ S
        out.append(q_in[:, :, c] @ S + attn[:, :, c] @ new)
        S = S * G[:, :, c, -1, None, None].exp() + k_out[:, :, c].mT @ new
    o = torch.cat(out, 2)[:, :, :T].transpose(1, 2)  # (B, T, H, V)
    return o.to(out_dtype), S

def conv_heads(x, weight, tail, heads):
    """q, k, v of the delta rule: causal depthwise convolution, SiLU, and l2 norm of q and k.

    x: (B, T, 3 H K), the stacked projections.   weight: (3 H K, taps).
    tail: (B, taps - 1, 3 H K), the rows of x before.   Returns three (B, T, H, K) in x's dtype.
    """
    taps = weight.shape[1]
    w = weight.to(x.dtype)
    text = torch.cat([tail, x], 1)
    y = x * w[:, taps - 1]
    for back in range(1, taps):
        y = y + text[:, taps - 1 - back:text.shape[1] - back] * w[:, taps - 1 - back]
    q, k, v = [part.unflatten(-1, (heads, -1)) for part in F.silu(y).chunk(3, -1)]
    q, k = [F.normalize(part.float(), dim=-1, eps=1e-6).to(x.dtype) for part in (q, k)]
    return q, k, v

def gated_norm(o, gate, weight):
    """rms_norm(o) weight silu(gate) by heads: o (B, T, H, V), gate (B, T, H V), weight (V,)."""
    return rms_norm(o) * weight.to(o.dtype) * F.silu(gate.unflatten(-1, o.shape[2:]))

def gdn(proj, taps, A_log, dt_bias, norm, tail, state):
    """What a Gated DeltaNet layer [1] computes between its projections.

    proj: (B, T, 4 H K + 2 H or more), each token's q, k, v and output gate, then by head the logits
    a of the decay and b of beta.   taps: (3 H K, 4).   A_log, dt_bias: (H,).   norm: (K,).
    tail (B, 3, 3 H K), state (B, H, K, K) or None for zeros: from the text before.
    Returns (B, T, H K) and the new state.
    """
    H = len(A_log)
    W = H * len(norm)
    qkv, gate, a, b, _ = proj.split([3 * W, W, H, H, proj.shape[-1] - 4 * W - 2 * H], -1)
    q, k, v = conv_heads(qkv, taps, tail, H)
    g = -A_log.exp() * F.softplus(a.float() + dt_bias)  # log-decay, (B, T, H)
    beta = torch.sigmoid(b.float())
    o, state = delta_rule(q, k, v, g, beta, state)
    return gated_norm(o, gate, norm).flatten(2), state

def mlp(x, up, down, scale, slope):
    """Two matrices around a squared (leaky) relu: x (..., D), up (width, D), down (D, width).

    scale: (D,) factors of the outputs.   slope: of the leaky relu below zero.
    """
    return linear(F.leaky_relu(linear(x, up), slope).square(), down, scale=scale)

def attention(q, k, v, window):
    """Causal softmax attention in which a query sees the last `window` keys, its own included.

    q: (B, T, H, d).   k, v: (B, S, Hk, d), S >= T; the last T belong to the queries, those before
    were carried over.   Returns (B, T, H, d).   Blocks of `window` queries skip unseen keys.
    """
    S = k.shape[1]
    place = torch.arange(S, device=q.device)
    q, k, v = [x.transpose(1, 2) for x in (q, k, v)]
    out = []
    for start, block in zip(range(S - q.shape[2], S, window), q.split(window, 2)):
        seen = slice(max(0, start - window + 1), start + window)
        back = place[start:start + window, None] - place[seen]
        out.append(F.scaled_dot_product_attention(block, k[:, :, seen], v[:, :, seen],
                                                  (back >= 0) & (back < window), enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2)

class Ops(NamedTuple):
    """The three operations of a model, and the dtype of its activations (None: the weights')."""
    gdn: Callable
    mlp: Callable
    attention: Callable
    dtype: torch.dtype | None = None
    names: dict = {}  # of the kernels, for the log

REFERENCE = Ops(gdn, mlp, attention, names=dict.fromkeys(("gdn", "attention", "mlp"), "reference"))

COMPILING = [False]  # whether regions run compiled

@contextmanager
def compiling(enabled):
    """Inside, regions run under torch.compile if enabled."""
    before = COMPILING[0]
    COMPILING[0] = enabled
    try:
        yield
    finally:
        COMPILING[0] = before

def region(function):
    """A part of the forward that is compiled as one graph, inside `compiling`.

    Layers of one form share their graph, so that a deep model compiles as fast as a shallow one.
    """
    @cache
    def fast():
        torch._dynamo.config.cache_size_limit = 256  # kinds of layers, shapes, states, gradients
        # torch 2.13's in-place reuse overwrites a tensor inside a concatenation that is still read
        # (SmearGate), so it is off.
        return torch.compile(function, fullgraph=True, dynamic=False,
                             options={"inplace_buffers": False})

    @wraps(function)
    def run(*args):
        if not COMPILING[0]:
            return function(*args)
        with compiling(False):  # regions inside this one are part of its graph
            return fast()(*args)
    return run

EAGER_TOKENS = 50_000_000  # below this, compiling costs more time than it saves

def compiles(model, tokens=math.inf):
    """Whether work on so many tokens runs compiled: by default if long, with the fast kernels."""
    if model.cfg.compile != "auto":
        return model.cfg.compile == "1"
    return model.ops is not REFERENCE and tokens > EAGER_TOKENS

def token_nll(logits, targets):
    """Nats of targets (B, T) by float32 logits (B, T, vocab): cross entropy over the vocabulary."""
    nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), reduction="none")
    return nats.view(targets.shape)

def ngram_rows(table, ids, prev1, prev2=None):
    """Sum of the rows of the bigram (prev1, id) and, given prev2, the trigram; absent ids: -1."""
    h = (ids * 0x2545F491 + (prev1 + 1) * 0x1B873593) & 0x7FFFFFFF
    x = F.embedding((h ^ (h >> 15)) % len(table), table)
    if prev2 is not None:
        h = (h * 5 + (prev2 + 1) * 0x19D699A5 + 0x3C6EF372) & 0x7FFFFFFF
        x = x + F.embedding((h ^ (h >> 15)) % len(table), table)
    return x

def declare(module, **shapes):
    """Give `module` a parameter of each name and shape, in this order; init_weights fills them."""
    for name, shape in shapes.items():
        setattr(module, name, nn.Parameter(torch.empty(shape)))

class Embedding(nn.Module):
    """Token embedding plus hashed n-grams, normalized, then SmearGate; also the tied head.

    No n-gram and no smear crosses the token BOS_ID.  State: the last two ids (B, 2), -1 before any
    text, and the last embedding (B, 1, D).
    `hash_table` (buckets, D): None, or made and trained by the Adapter (TTT_HASH_BUCKETS).
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D = cfg.model_dim
        declare(self, weight=(cfg.vocab_size, D))
        if cfg.ngram_buckets:
            declare(self, ngram_table=(cfg.ngram_buckets, cfg.ngram_dim),
                    ngram_proj=(D, cfg.ngram_dim), ngram_scale=1)
        if cfg.smear:
            declare(self, smear_gate=D)
        self.register_parameter("hash_table", None)

    @region
    def forward(self, ids, state, dtype):
        """ids (B, T) -> x (B, T, D) in `dtype`, and the state after them."""
        cfg = self.cfg
        ids = ids.long()
        text = torch.cat([state[0], ids], 1)
        begins = text == cfg.bos_id  # a document: it sees nothing before it
        prev1 = torch.where(begins[:, 2:], -1, text[:, 1:-1])
        prev2 = None
        if cfg.ngram_order == 3:
            prev2 = torch.where(begins[:, 2:] | begins[:, 1:-1], -1, text[:, :-2])
        x = F.embedding(ids, self.weight).to(dtype)
        if cfg.ngram_buckets:
            rows = ngram_rows(self.ngram_table, ids, prev1, prev2).to(dtype)
            x = x + linear(rows, self.ngram_proj) * self.ngram_scale.to(dtype)
        if self.hash_table is not None:
            x = x + ngram_rows(self.hash_table, ids, prev1, prev2).to(dtype)
        x = rms_norm(x)
        after = text[:, -2:], x[:, -1:].detach()
        if cfg.smear:
            before = torch.cat([state[1], x], 1)[:, :-1]
            gate = torch.sigmoid(self.smear_gate).to(dtype) * (prev1 >= 0).to(dtype).unsqueeze(-1)
            x = x + gate * (before - x)
        return x, after

    @region
    def logits(self, x):
        """x (B, T, D), the last block's output -> softcapped float32 logits (B, T, vocab)."""
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(linear(rms_norm(x), self.weight).float() / cap)

    @region
    def nll(self, x, targets, hint, beta):
        """`token_nll` of the logits, compiled as one graph with the head.

        hint: None, or (B, T) ids whose logits are raised by beta first, -1 for none.  The softmax
        is then p' ~ p exp(beta [token = hint]): normalized, whatever the target is.
        """
        logits = self.logits(x)
        if hint is not None:
            raised = beta * (hint >= 0).to(logits.dtype)
            logits = logits.scatter_add(-1, hint.clamp_min(0).unsqueeze(-1), raised.unsqueeze(-1))
        return token_nll(logits, targets)

class GatedDeltaNet(nn.Module):
    """Gated DeltaNet mixer [1].  State: inputs of the convolution (B, 3, 3 H K), S (B, H, K, V).

    Weights are separate per role, so that Muon orthogonalizes each as a whole.
    """
    TAPS = 4  # of the short convolutions
    num_gains = 0

    def __init__(self, cfg, ops, window):
        super().__init__()
        self.cfg, self.ops = cfg, ops
        D = cfg.model_dim
        H = cfg.gdn_heads
        width = H * cfg.gdn_head_dim
        conv = width, self.TAPS
        self.kv = nn.Module()  # what KV_SHARE shares
        declare(self.kv, k_proj=(width, D), v_proj=(width, D), k_conv=conv, v_conv=conv)
        declare(self, q_proj=(width, D), g_proj=(width, D), a_proj=(H, D), b_proj=(H, D),
                o_proj=(D, width), q_conv=conv, A_log=H, dt_bias=H, o_norm=cfg.gdn_head_dim)

    def forward(self, x, scale, gain, state, xsa):
        """x (B, T, D), scale (D,) of the output -> (B, T, D), state; gain and xsa: Attention's."""
        kv = self.kv
        # For a GPU rows of proj begin at multiples of 128 bytes, as its memory is read.
        proj = linear(x, self.q_proj, kv.k_proj, kv.v_proj, self.g_proj, self.a_proj, self.b_proj,
                      multiple=64 if x.is_cuda else 1)
        taps = torch.cat([self.q_conv, kv.k_conv, kv.v_conv])
        past = self.TAPS - 1
        tail, S = state or (x.new_zeros(x.shape[0], past, len(taps)), None)
        y, S = self.ops.gdn(proj, taps, self.A_log, self.dt_bias, self.o_norm, tail, S)
        y = linear(y, self.o_proj, scale=scale)
        # a small copy: a view of proj would keep all of it in memory
        tail = torch.cat([tail, proj[:, -past:, :len(taps)]], 1)[:, -past:]
        return y, (tail.detach(), S.detach())

@torch.library.custom_op("gdn_swa::rotary_table", mutates_args=())
def rotary_table(length: int, base: float, dims: int, dtype: torch.dtype,
                 device: torch.device) -> Tensor:
    """Cosine and sine of the angles [3] of positions 0, 1, ...: (2, length, 1, dims / 2).

    An operator, so that torch.compile keeps the table instead of computing it at every element.
    """
    position = torch.arange(length, device=device, dtype=torch.float32)
    channel = torch.arange(0, dims, 2, device=device, dtype=torch.float32)
    angle = position[:, None] * base ** (-channel / dims)
    return torch.stack([angle.cos(), angle.sin()]).unsqueeze(2).to(dtype)

rotary_table.register_fake(lambda length, base, dims, dtype, device: torch.empty(
    2, length, 1, dims // 2, dtype=dtype, device=device))

def rotary(x, table):
    """Rotate the channels of each head of x (B, T, H, d) by a `rotary_table` of T positions."""
    cos, sin = table
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], -1)

class Attention(nn.Module):
    """Windowed attention: grouped key/value heads, normalized q and k, rotary, a gain per head.

    State: normalized, unrotated keys and values (B, up to window - 1, Hk, d) of the tokens before.
    """

    def __init__(self, cfg, ops, window):
        super().__init__()
        self.cfg, self.ops = cfg, ops
        self.window = window
        D = cfg.model_dim
        kv_rows = D // cfg.num_heads * cfg.num_kv_heads
        self.kv = nn.Module()  # what KV_SHARE shares
        declare(self.kv, k_proj=(kv_rows, D), v_proj=(kv_rows, D))
        declare(self, q_proj=(D, D), o_proj=(D, D))
        self.num_gains = cfg.num_heads

    def forward(self, x, scale, gain, state, xsa):
        """x (B, T, D), scale (D,) of the output, gain (H,) -> (B, T, D) and the state after it.

        Positions count from the oldest carried key: only differences matter, and small numbers
        stay exact.
        """
        T = x.shape[1]
        H, Hk = self.cfg.num_heads, self.cfg.num_kv_heads
        qkv = linear(x, self.q_proj, self.kv.k_proj, self.kv.v_proj)
        q, k, v = qkv.unflatten(-1, (H + 2 * Hk, -1)).split([H, Hk, Hk], 2)
        q, k = rms_norm(q), rms_norm(k)
        if state is not None:
            k, v = [torch.cat([old, new], 1) for old, new in zip(state, (k, v))]
        S = k.shape[1]
        table = rotary_table(S, self.cfg.rope_base, q.shape[-1], x.dtype, x.device)
        q = rotary(q, table[:, S - T:]) * gain.to(x.dtype)[:, None]
        o = self.ops.attention(q, rotary(k, table), v, self.window)
        if xsa:
            o = without_own_value(o, v[:, S - T:])
        keep = S - min(self.window - 1, S)
        y = linear(o.flatten(2), self.o_proj, scale=scale)
        # clone(): a view would keep all of k and v in memory as long as the state lives
        return y, (k[:, keep:].detach().clone(), v[:, keep:].detach().clone())

def without_own_value(o, v):
    """Exclusive self attention: o (B, T, H, d) less its component along v (B, T, Hk, d)."""
    unit = F.normalize(v.float(), dim=-1, eps=1e-6).to(o.dtype).unsqueeze(3)  # (B, T, Hk, 1, d)
    grouped = o.unflatten(2, (v.shape[2], -1))
    return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(2, 3)

class MLP(nn.Module):
    """Two matrices around a squared activation."""

    def __init__(self, cfg, ops):
        super().__init__()
        self.ops = ops
        self.slope = 0.5 if cfg.mlp_act == "leaky_relu2" else 0.0
        D = cfg.model_dim
        width = int(cfg.mlp_mult * D)
        declare(self, up_proj=(width, D), down_proj=(D, width))

    def forward(self, x, scale):
        """x (B, T, D), scale (D,) of the output -> (B, T, D)."""
        return self.ops.mlp(x, self.up_proj, self.down_proj, scale, self.slope)

class Block(nn.Module):
    """Residual mix with the embedding, then mixer and MLP, each normalized before, scaled after.

    Layers of one tag share `mixer`, and `mlp` too with a double colon; vectors are each layer's.
    """

    def __init__(self, cfg, mixer, mlp, xsa):
        super().__init__()
        self.mixer, self.mlp = mixer, mlp
        self.xsa = xsa
        D = cfg.model_dim
        declare(self, resid_mix=(2, D), mixer_scale=D, mlp_scale=D)
        self.qk_gain = nn.Parameter(torch.empty(mixer.num_gains)) if mixer.num_gains else None

    @region
    def forward(self, x, x0, state, skip=None, skip_scale=None):
        """x, x0 (B, T, D), x0 the embedding -> x and the mixer's state; skip is added first."""
        if skip is not None:
            x = x + skip_scale.to(x.dtype) * skip
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        y, state = self.mixer(rms_norm(x), self.mixer_scale, self.qk_gain, state, self.xsa)
        x = x + y
        return x + self.mlp(rms_norm(x), self.mlp_scale), state

MIXERS = {"gdn": GatedDeltaNet, "swa": Attention, "attn": Attention}

class LM(nn.Module):
    """The language model that `cfg` describes, computed by `ops`."""

    def __init__(self, cfg, ops=REFERENCE):
        super().__init__()
        self.cfg, self.ops = cfg, ops
        self.embed = Embedding(cfg)
        layers = parse_stack(cfg.stack)
        attends = [i for i, layer in enumerate(layers) if layer.kind != "gdn"]
        exclusive = attends[::-1][:cfg.xsa_layers]
        mixers, mlps = {}, {}  # by Layer.mixer and Layer.mlp
        made = {kind: [] for kind in MIXERS}
        blocks = []
        for i, layer in enumerate(layers):
            if layer.mixer not in mixers:
                alike = made[layer.kind]
                window = cfg.swa_window if layer.kind == "swa" else cfg.train_seq_len
                mixer = mixers[layer.mixer] = MIXERS[layer.kind](cfg, ops, window)
                if len(alike) % cfg.kv_share:
                    mixer.kv = alike[-1].kv
                alike.append(mixer)
            if layer.mlp not in mlps:
                mlps[layer.mlp] = MLP(cfg, ops)
            blocks.append(Block(cfg, mixers[layer.mixer], mlps[layer.mlp], i in exclusive))
        self.blocks = nn.ModuleList(blocks)
        half = len(blocks) // 2
        self.skip_scale = nn.Parameter(torch.empty(half, cfg.model_dim)) if cfg.unet else None

    def forward(self, ids, state=None):
        """Logits of the token after each position, and the state after the last.

        ids: (B, T) integer.   state: what an earlier forward returned for the text before, or None.
        Returns logits (B, T, vocab) float32, and the state: a pair of tensors for the embedding and
        one for each layer.
        """
        x, after = self.features(ids, state)
        return self.embed.logits(x), after

    def nll(self, ids, targets, state=None, bonus=None):
        """Nats of targets (B, T), and the state; bonus: None, or (hint, beta) of Embedding.nll."""
        x, after = self.features(ids, state)
        return self.embed.nll(x, targets, *(bonus or (None, 0.0))), after

    def features(self, ids, state):
        """The last block's output (B, T, D), and the state after it."""
        B = len(ids)
        dtype = self.ops.dtype or self.embed.weight.dtype
        if state is None:
            empty = torch.full((B, 2), -1, dtype=torch.int64, device=ids.device)
            zeros = torch.zeros(B, 1, self.cfg.model_dim, dtype=dtype, device=ids.device)
            state = ((empty, zeros), *[None] * len(self.blocks))
        x, embed_state = self.embed(ids, state[0], dtype)
        # clone(): if x and x0 were one tensor, torch.compile would build a second graph for that
        x0 = x.clone()
        after = [embed_state]
        skips = []
        half = len(self.blocks) // 2
        for i, block in enumerate(self.blocks):
            skip = ()
            if self.cfg.unet and i >= len(self.blocks) - half:  # the last block meets the first
                skip = skips.pop(), self.skip_scale[i - len(self.blocks)]
            x, layer_state = block(x, x0, state[1 + i], *skip)
            after.append(layer_state)
            if self.cfg.unet and i < half:
                skips.append(x)
        return x, tuple(after)

@region
def summed_nll(model, ids, targets, wanted):
    """Training loss: the nats of targets (B, T) where `wanted` is 1, summed; one graph."""
    nats, _ = model.nll(ids, targets)
    return (nats * wanted).sum()

def init_weights(model, seed):
    """Set the initial values, drawn on the CPU so that every device and rank starts equal."""
    cfg = model.cfg
    constants = {"qk_gain": cfg.qk_gain_init, "smear_gate": -2.0, "ngram_scale": 0.05}
    constants |= dict.fromkeys(("mixer_scale", "mlp_scale", "skip_scale", "o_norm"), 1.0)
    # Every block starts as the identity.
    constants |= dict.fromkeys(("o_proj", "down_proj", "ngram_table"), 0.0)
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind in constants:
            value = torch.full(p.shape, constants[kind])
        elif kind == "weight":
            value = torch.randn(p.shape, generator=rng) * cfg.tied_embed_init_std
        elif kind == "resid_mix":
            value = torch.tensor([1.0, 0.0])[:, None].expand(p.shape)
        elif kind == "A_log":
            value = (torch.rand(p.shape, generator=rng) * 16).clamp_min(1e-3).log()
        elif kind == "dt_bias":  # softplus^-1 of a step that is log-uniform in [0.001, 0.1]
            spread = math.log(0.1 / 0.001)
            dt = torch.exp(torch.rand(p.shape, generator=rng) * spread + math.log(0.001))
            value = dt + torch.log(-torch.expm1(-dt))
        else:  # uniform in +-1 / sqrt(C); a convolution's C is its taps
            value = (torch.rand(p.shape, generator=rng) * 2 - 1) * p.shape[1] ** -0.5
        with torch.no_grad():
            p.copy_(value)
    return model

# --------------------------------------------------------------------------------------------------
# 5. Evaluation
# --------------------------------------------------------------------------------------------------
# Targets are tokens 1 .. n-1 of the text, numbered 0 .. n-2: target j is token j + 1, predicted
# from tokens up to j.  Ledger.add wants each exactly once and in order.  All scores come from
# Scorer.nats; only Ledger.bpb turns nats into bits.  An Adapter is handed scored text only.

class Ledger:
    """Sums of nats and bytes over targets, each entered exactly once and in order.

    The order is checked on the host, the sums stay on the device.  `tokens`: targets entered, so
    the number of the next.  `causal`, `normalized`: the largest errors that the Scorer found in
    `probes` tests.
    """

    def __init__(self, device="cpu"):
        self.tokens = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, bytes, negatives
        self.causal, self.normalized = math.inf, math.inf
        self.probes = 0

    def add(self, first, nats, num_bytes):
        """Enter targets first, first + 1, ...: nats, num_bytes (n,); GolfError on gap or repeat."""
        if first != self.tokens:
            raise GolfError(f"ledger: {self.tokens} is next, not {first}: a gap or a repeat")
        if nats.shape != num_bytes.shape or nats.dim() != 1:
            raise GolfError(f"ledger: {len(nats)} scores for {len(num_bytes)} byte counts")
        self.sums += torch.stack([nats.double().sum(), num_bytes.double().sum(),
                                  (nats < -1e-4).double().sum()])  # below zero, not by rounding
        self.tokens += len(nats)

    @property
    def bytes(self):
        """Bytes of the targets entered."""
        return int(self.sums[1])

    @property
    def val_loss(self):
        """Mean nats per token."""
        return float(self.sums[0]) / max(1, self.tokens)

    @property
    def bpb(self):
        """Bits per byte; NaN without bytes."""
        return float(self.sums[0]) / math.log(2) / self.bytes if self.bytes else math.nan

    def as_log(self, digits=8):
        """The key-value pairs of a log line."""
        return dict(val_loss=f"{self.val_loss:.{digits}f}", val_bpb=f"{self.bpb:.{digits}f}",
                    tokens=self.tokens, bytes=self.bytes)

def windows(num_targets, seq_len, stride):
    """Yield (start, end, score_from) of the windows over num_targets targets.

    A window reads tokens start .. end - 1 and scores targets score_from .. end - 1: the first
    window all of its targets, every later one its last `stride` or what is left of them.
    """
    start = 0
    while start == 0 or start + seq_len - stride < num_targets:
        yield start, min(start + seq_len, num_targets), start + seq_len - stride if start else 0
        start += stride

def spans(num_targets, count, warmup):
    """As `windows`: `count` parts of nearly equal size, each read from `warmup` tokens before."""
    count = min(count, num_targets)
    edges = [num_targets * i // count for i in range(count + 1)]
    return [(max(0, a - warmup), b, a) for a, b in zip(edges, edges[1:])]

def rows_of(text, starts, T):
    """Rows of T tokens of text (n,) from starts (B,), and the next tokens; the last repeats."""
    index = starts[:, None] + torch.arange(T + 1, device=text.device)
    rows = text[index.clamp(max=len(text) - 1)]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

PROBE_PLACES = 8  # least places of a causality probe, all ranks
PROBE_POSITIONS = 4096  # of a segment that a normalization probe compares
PROBE_ROUNDING = 0.5  # nats, more than rounding to bfloat16 can be off

class Scorer:
    """Scores windows or spans of one text on this rank, and probes some of its own batches.

    scores: (n - 1, 2) float32, each target's nats and how often this rank scored it.
    """

    def __init__(self, model, tokens, table, run, adapter, probing):
        self.model, self.run = model, run
        self.probing, self.adapting = probing, adapter is not None
        self.bonus = getattr(adapter, "bonus", lambda ids: None)  # hints for LM.nll
        self.text = torch.from_numpy(tokens.astype(np.int32)).to(run.device)
        self.bytes = target_bytes(table, tokens).to(run.device)
        self.scores = torch.zeros(len(self.bytes), 2, device=run.device)
        self.state, self.batches = None, 0  # state: after the last chunk
        self.rng = torch.Generator().manual_seed(run.rank)  # of the probes
        self.probes, self.last_line = 0, time.perf_counter()
        self.faults = torch.zeros(2, dtype=torch.float64, device=run.device)

    def nats(self, ids, targets, T, state, keep=0):
        """Nats of rows (B, L) by segments of T tokens, the states before token `keep` and after."""
        out, kept = [], None
        for i in range(0, ids.shape[1], T):
            kept = state if i == keep else kept
            part, part_targets = [x[:, i:i + T].contiguous() for x in (ids, targets)]
            nats, state = self.model.nll(part, part_targets, state, self.bonus(part))
            out.append(nats)
        return torch.cat(out, 1), kept, state

    def probe(self, ids, targets, nats, T, state):
        """Test two segments, just scored, again; `faults` keeps the largest errors.

        Leaks: new tokens from a random place on (half of the time the edge of a kernel's chunk)
        must not change earlier scores.   Normalization: at random positions of the first segment a
        score must be that of a softmax made without the targets: on average, and up to rounding
        everywhere.
        """
        B, L = ids.shape
        vocab, rng = self.model.cfg.vocab_size, self.rng
        leaks = []
        for _ in range(-(-PROBE_PLACES // (B * self.run.world_size))):
            unit = GDN_CHUNK ** torch.randint(2, (B, 1), generator=rng)
            places = torch.randint(1, max(2, L), (B, 1), generator=rng) // unit * unit
            noise = torch.randint(1, vocab, (B, L), generator=rng, dtype=torch.int32)
            noise = (noise * (torch.arange(L) >= places.clamp_min(1))).to(ids.device)
            other, _, _ = self.nats((ids + noise) % vocab, (targets + noise) % vocab, T, state)
            leaks.append((nats - other).abs().masked_fill(noise > 0, 0.0).max().double())
            self.probes += B
        part = ids[:, :T].contiguous()
        x, _ = self.model.features(part, state)
        at = torch.randint(part.numel(), (PROBE_POSITIONS,), generator=rng).to(ids.device)
        with compiling(False):
            logits = self.model.embed.logits(x.flatten(0, 1)[None, at])[0].double()
        if bonus := self.bonus(part):
            hint = bonus[0].flatten()[at, None]
            logits.scatter_add_(1, hint.clamp_min(0), bonus[1] * (hint >= 0).double())
        target, scored = [y[:, :T].flatten()[at, None] for y in (targets, nats)]
        off = scored + logits.log_softmax(-1).gather(1, target.long())
        off = torch.maximum(off.mean().abs(), off.abs().max() - PROBE_ROUNDING)
        found = torch.stack([torch.stack(leaks).max(), off]).nan_to_num(nan=math.inf)
        self.faults = torch.maximum(self.faults, found)

    def score(self, parts, carry):
        """Score consecutive parts (start, end, score_from) side by side, into `scores`.

        carry: a part is run in segments, each from the state of the one before; when adapting,
        there is one part, the chunk, from the last chunk's state.   Else a part is one forward.
        Batches 1, 4, 16, ... are probed.
        """
        cfg, total = self.model.cfg, len(self.text) - 1
        size = cfg.eval_batch_tokens // cfg.train_seq_len
        one_stream = carry and self.adapting
        for i in range(0, len(parts), size):
            if time.perf_counter() - self.last_line > 8.0 and not self.adapting:
                self.run.log("scoring", done=f"{i / len(parts):.0%}")
                self.last_line = time.perf_counter()
            batch = parts[i:i + size]
            starts = [start for start, _, _ in batch]
            length = max(end - start for start, end, _ in batch)
            T = cfg.train_seq_len
            if carry:  # equal segments, multiples of the kernels' chunk
                longest = min(cfg.ttt_chunk_tokens, total) if one_stream else length
                most = max(1, cfg.eval_batch_tokens // len(batch) // GDN_CHUNK) * GDN_CHUNK
                segments = -(-longest // most)
                T = -(-longest // (segments * GDN_CHUNK)) * GDN_CHUNK
            else:
                starts += [0] * (size - len(batch))  # batches of one shape
            # Pad the last chunk to the compiled shape; its end state is unused.
            filled = not one_stream or batch[-1][1] == total
            ids, targets = rows_of(self.text, self.text.new_tensor(starts),
                                   -(-length // T) * T if filled else length)
            last = (ids.shape[1] - 1) // T
            keep = T * min(last, int(torch.randint(1, max(2, last), (), generator=self.rng)))
            nats, kept, after = self.nats(ids, targets, T, self.state, keep)
            self.batches += 1
            if self.probing and self.batches in (4 ** n for n in range(16)):
                for at, state in {keep: kept, 0: self.state}.items():
                    self.probe(*[x[:, at:at + 2 * T] for x in (ids, targets, nats)], T, state)
            self.state = after if one_stream else None
            for row, (start, end, score_from) in zip(nats, batch):
                self.scores[score_from:end, 0] += row[score_from - start:end - start]
                self.scores[score_from:end, 1] += 1

@torch.inference_mode()
def evaluate(model, tokens, table, method="exact", adapter=None, run=None, probing=False):
    """Score every target of `tokens`, np.uint16 (n,), exactly once; the only scorer of this script.

    method: roundtrip (windows of TRAIN_SEQ_LEN side by side), sliding (by EVAL_STRIDE) or exact
    (state carried through EVAL_SPANS spans; with an adapter through the whole text).
    adapter: None, or a function called after each chunk of TTT_CHUNK_TOKENS but the last with the
    tokens up to the last scored target; it cannot train on what is yet to be scored.  Its hints
    (TTT_TILT) for a position come, like the model's state, from the tokens up to that position.
    probing: test some batches (Scorer.probe).
    Returns the Ledger of all n - 1 targets on all ranks; GolfError if one is missing or not finite.
    """
    began = time.perf_counter()
    cfg = model.cfg
    run = run or Run(device=next(model.parameters()).device)
    total = len(tokens) - 1
    scorer = Scorer(model, tokens, table, run, adapter, probing)
    ledger = Ledger(run.device)
    one_stream = method == "exact" and adapter is not None  # the same on every rank
    if one_stream:
        parts = windows(total, cfg.ttt_chunk_tokens, cfg.ttt_chunk_tokens)
    elif method == "exact":
        parts = spans(total, cfg.eval_spans, cfg.eval_warmup_tokens)
    else:
        stride = {"sliding": cfg.eval_stride, "roundtrip": cfg.train_seq_len}[method]
        parts = windows(total, cfg.train_seq_len, stride)
    ranks = Run(device=run.device) if one_stream else run  # that share the text
    # A window belongs to the chunk of its first scored target.
    size = cfg.ttt_chunk_tokens if adapter else total
    chunks = -(-total // size)
    for number, chunk in groupby(parts, lambda part: part[2] // size):
        chunk = list(chunk)
        scorer.score(chunk[ranks.share(len(chunk))], carry=method == "exact")
        first, last = chunk[0][2], chunk[-1][1]
        nats, times = ranks.all_sum(scorer.scores[first:last]).unbind(1)
        if (times != 1).any():
            raise GolfError(f"a target of {first} .. {last - 1} was not scored exactly once")
        ledger.add(first, nats, scorer.bytes[first:last])
        if adapter and last < total:
            with torch.inference_mode(False), torch.enable_grad():
                adapter(tokens[:ledger.tokens + 1])
        if adapter and chunks > 1 and (number + 1) % -(-chunks // 64) == 0:  # at most 64 lines
            run.log("ttt", chunk=f"{number + 1}/{chunks}", scored_tokens=ledger.tokens,
                    running_bpb=ledger.bpb, epochs=getattr(adapter, "epochs", 0),
                    time=f"{1000 * (time.perf_counter() - began):.0f}ms")
    finish(ledger, total, scorer, run)
    run.scoring_s += time.perf_counter() - began
    return ledger

def finish(ledger, total, scorer, run):
    """Enter the probes' results; raises GolfError if the Ledger is not whole and finite."""
    if ledger.tokens != total:
        raise GolfError(f"evaluation scored {ledger.tokens} targets, expected {total}")
    nats, _, negative = ledger.sums.tolist()
    if not math.isfinite(nats) or negative:
        raise GolfError(f"scores sum to {nats} nats, {negative:.0f} are below zero; has the model "
                        "diverged?  Lower MATRIX_LR, TIED_EMBED_LR, SCALAR_LR or TTT_LR")
    counts, leaks, deviations = zip(*run.gather((scorer.probes, *scorer.faults.tolist())))
    ledger.probes = sum(counts)
    if ledger.probes:
        ledger.causal, ledger.normalized = max(leaks), max(deviations)

# --------------------------------------------------------------------------------------------------
# 6. Test-time training
# --------------------------------------------------------------------------------------------------
# evaluate() calls an Adapter with the text scored so far; it trains on the newest chunk, and the
# next chunk is scored by the new weights.  It never sees a token before that token was scored.
# Each pass over a chunk is one optimizer step on the mean of its targets, in rows of TRAIN_SEQ_LEN
# split over ranks, so that any number of ranks takes the same steps.

class Hints:
    """For TTT_TILT: the token that followed the last occurrence of the longest known context.

    Contexts are 3, 2 or 1 tokens, whose followers have been scored.  `last[n]` (2^22,) int32: for
    each hash of a context of n tokens, the place where it ended last.
    """
    ORDERS = (3, 2, 1)
    BUCKETS = 1 << 22

    def __init__(self, num_tokens, device):
        self.text = torch.full((num_tokens + 1,), -1, dtype=torch.int32, device=device)
        self.seen = 0  # tokens of `text` that are known
        self.last = {n: torch.zeros(self.BUCKETS, dtype=torch.int32, device=device)
                     for n in self.ORDERS}

    def bucket(self, ids, n):
        """Hash (..., T) of the n tokens that end at each place of ids (..., T)."""
        h = torch.zeros_like(ids, dtype=torch.int64)
        for back in range(n):
            h = (h * 0x2545F491 + F.pad(ids, (back, 0))[..., :ids.shape[-1]] + 1) & 0x7FFFFFFF
        return (h ^ (h >> 15)) % self.BUCKETS

    def learn(self, scored):
        """Take in the tokens of np.uint16 scored that are new: all of them have been scored."""
        new = torch.from_numpy(scored[self.seen:].astype(np.int32)).to(self.text.device)
        self.text[self.seen:len(scored)] = new
        first = max(self.ORDERS[0], self.seen - 1)  # the last known token has a follower now
        self.seen = len(scored)
        end = max(first, len(scored) - 1)
        places = torch.arange(first, end, device=new.device, dtype=torch.int32)
        for n, last in self.last.items():
            buckets = self.bucket(self.text[first - n + 1:end], n)[n - 1:]
            last.scatter_reduce_(0, buckets, places, "amax")

    def __call__(self, ids):
        """The hinted token at each place of ids (B, T), -1 for none: int64."""
        hint = torch.full_like(ids, -1, dtype=torch.int64)
        for n, last in self.last.items():
            place = last[self.bucket(ids, n)].long()
            known = place > 0
            for back in range(n):  # another context may have had the same hash
                before = F.pad(ids, (back, 0), value=-2)[:, :ids.shape[1]]
                known &= self.text[(place - back).clamp_min(0)] == before
            hint = torch.where((hint < 0) & known, self.text[place + 1].long(), hint)
        return hint

class Adapter:
    """Score-first test-time training.

    `in_order` turns False if a weight or hint changed between two calls, or if a chunk is handed
    over twice.  `epochs`: passes over the newest chunk, TTT_EPOCHS or as many as the clock allows.
    """

    def __init__(self, model, num_targets, run):
        self.began = self.last_end = time.perf_counter()
        cfg = model.cfg
        self.model, self.cfg = model, cfg
        self.run = run
        self.chunks = -(-num_targets // cfg.ttt_chunk_tokens)
        self.hints = Hints(num_targets + 1, run.device) if cfg.ttt_tilt else None
        model.requires_grad_()
        model.blocks[:cfg.ttt_freeze_blocks].requires_grad_(False)
        treatment = {}  # name: (rule, learning rate, decay)
        for name, p in model.named_parameters():
            if p.requires_grad:
                rule = cfg.ttt_optimizer
                if rule == "muon" and route(name).optimizer != "muon":
                    rule = "sgd"
                treatment[name] = rule, cfg.ttt_lr, 0.0
        if cfg.ttt_hash_buckets:
            table = torch.zeros(cfg.ttt_hash_buckets, cfg.model_dim, device=run.device)
            model.embed.hash_table = nn.Parameter(table)
            treatment["embed.hash_table"] = "adamw", cfg.ttt_hash_lr, 0.0
        # A chunk's gradient is already summed over ranks when it steps: one rank is enough.
        self.optimizer = Optimizer(model, treatment, Run(device=run.device), cfg.ttt_grad_clip,
                                   cfg.ttt_momentum, COMPILING[0])
        self.weights = self.optimizer.weights  # flat, used for scoring
        self.base = self.weights.clone()
        self.raw = self.weights.clone() if cfg.ttt_ema else None  # where training goes on
        self.pending = []  # scored chunks of a phase, not trained on yet
        self.seen = self.calls = 0  # targets handed over, by how many calls
        self.epochs, self.epochs_done = cfg.ttt_epochs, 0
        self.in_order = True
        self.score_s, self.epoch_s = [], []  # seconds of each chunk, and of each pass over one
        self.mark = self.fingerprint()

    def fingerprint(self):
        """The sum of the weights' bits, and the number of tokens in the hints."""
        return fingerprint(self.model), self.hints.seen if self.hints else 0

    def bonus(self, ids):
        """The hints for ids (B, T), as LM.nll takes them."""
        return (self.hints(ids), self.cfg.ttt_tilt) if self.hints else None

    def __call__(self, scored):
        """scored: np.uint16, the text up to and including the last scored target."""
        began = time.perf_counter()
        self.score_s.append(began - self.last_end)
        first = self.seen
        self.seen = len(scored) - 1
        self.in_order &= self.seen > first and self.fingerprint() == self.mark
        self.calls += 1
        if self.hints:
            self.hints.learn(scored)
        self.pending.append((self.batches(scored, first, self.seen), self.seen - first))
        if self.calls % self.cfg.ttt_phase_chunks == 0:
            self.epochs = self.affordable_epochs()
            self.train(first // self.cfg.ttt_chunk_tokens)
        self.mark = self.fingerprint()  # waits for the device
        self.last_end = time.perf_counter()
        if not self.pending and self.epochs:
            trained = self.epochs * self.cfg.ttt_phase_chunks
            self.epoch_s.append((self.last_end - began) / trained)

    def affordable_epochs(self):
        """Epochs with which the rest fits 95 % of EVAL_BUDGET_SECONDS, by rank 0's clock alone."""
        if not self.epoch_s or self.cfg.deterministic:
            return self.cfg.ttt_epochs
        left = self.chunks - self.calls
        spent = time.perf_counter() - self.began
        room = 0.95 * self.cfg.eval_budget_seconds - spent - left * np.median(self.score_s)
        affordable = int(room / np.median(self.epoch_s) / (left + len(self.pending)))
        epochs = self.run.broadcast(max(0, min(self.cfg.ttt_epochs, affordable)))
        if epochs < self.epochs:
            self.run.log("warning", ttt_epochs=epochs, reason="EVAL_BUDGET_SECONDS")
        return epochs

    def batches(self, tokens, first, last):
        """This rank's batches of targets first .. last - 1: (ids, targets, wanted), one shape."""
        T = self.cfg.train_seq_len
        starts = np.arange(first, last, T)
        mine = starts[self.run.share(len(starts))]
        # A backward pass keeps its activations, so it gets a quarter of EVAL_BATCH_TOKENS.
        most = self.cfg.eval_batch_tokens // 4 // T
        size = max(1, min(most, -(-len(starts) // self.run.world_size)))
        mine = np.pad(mine, (0, -len(mine) % size), constant_values=last)  # empty rows
        mine = torch.from_numpy(mine).to(self.run.device)
        text = torch.from_numpy(tokens[first:].astype(np.int32)).to(self.run.device)
        out = []
        for rows in mine.split(size) if len(mine) else ():
            ids, targets = rows_of(text, rows - first, T)
            place = rows[:, None] + torch.arange(T, device=rows.device)
            out.append((ids, targets, place < last))
        return out

    def train(self, chunk):
        """`epochs` passes over the chunks of a phase, a step each; TTT_EMA averages their steps."""
        cfg = self.cfg
        rate = 1.0
        if cfg.ttt_schedule == "cosine":
            rate = 0.5 * (1 + math.cos(math.pi * chunk / self.chunks))
        if cfg.ttt_ema:
            average = self.weights.clone()
            self.weights.copy_(self.raw)
        for batches, num_targets in self.pending * self.epochs:
            for ids, targets, wanted in batches:
                self.optimizer.add_gradient(ids, targets, wanted, 1 / num_targets)
            self.run.all_sum(self.optimizer.grad)
            self.optimizer.step(rate)
            self.epochs_done += 1
            if cfg.ttt_ema:
                average.lerp_(self.weights, 1 - cfg.ttt_ema)
        if cfg.ttt_ema:
            self.raw.copy_(self.weights)
            self.weights.copy_(average)
        self.pending = []

    def close(self):
        """Check the last chunk, and leave the model as it was."""
        self.in_order &= self.fingerprint() == self.mark
        self.weights.copy_(self.base)
        self.model.embed.hash_table = None
        self.model.requires_grad_()

@torch.no_grad()
def fingerprint(model):
    """The sum of the weights' bits as integers: it changes when a weight does."""
    return int(torch.stack([p.view(torch.int32).sum() for p in model.parameters()]).sum())

# --------------------------------------------------------------------------------------------------
# 7. Optimizer
# --------------------------------------------------------------------------------------------------
# One table says how every parameter is trained and stored.  One Optimizer serves training and
# test-time training: groups over one flat gradient buffer, so one reduction and one norm.  Muon's
# matrices are shared out over ranks.  One rank and N agree up to the order of sums.

class Route(NamedTuple):
    """How parameters whose name matches `pattern` are trained and stored.

    lr, decay, bits, clip name Config fields; empty decay: none, empty bits: stored as float.
    """
    pattern: str
    role: str
    optimizer: str
    lr: str
    decay: str
    bits: str
    clip: str

MUON = "muon", "matrix_lr", "muon_weight_decay"
# The first match counts.
ROUTES = (
    Route(r"embed\.(weight|ngram_table)$", "embed", "adamw", "tied_embed_lr", "adam_weight_decay",
          "embed_bits", "embed_clip_sigmas"),
    Route(r"\.[ab]_proj$", "gate", *MUON, "embed_bits", "embed_clip_sigmas"),
    Route(r"\.mlp\.\w+_proj$", "mlp", *MUON, "mlp_bits", "matrix_clip_sigmas"),
    Route(r"_proj$", "mixer", *MUON, "matrix_bits", "matrix_clip_sigmas"),
    Route(r"(^|\.)(resid_mix|\w+_scale|qk_gain|o_norm|A_log|dt_bias|[qkv]_conv|smear_gate)$",
          "control", "adamw", "scalar_lr", "", "", ""))

@cache
def route(name):
    """The Route of a parameter."""
    return next(entry for entry in ROUTES if re.search(entry.pattern, name))

NS_STEPS = 5  # Newton-Schulz iterations

def newton_schulz(X):
    """Approximately orthogonalize each matrix of X (n, R, C): singular values go to about 1 [2].

    X must have singular values of at most 1.  A step maps each of them, s, to
    3.4445 s - 4.775 s^3 + 2.0315 s^5.
    """
    tall = X.shape[-2] > X.shape[-1]
    for _ in range(NS_STEPS):
        A = X.mT @ X if tall else X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        left, right = (X, B) if tall else (B, X)
        X = torch.baddbmm(X, left, right, beta=3.4445)
    return X

@region
def nesterov(grad, m, scale, momentum, taken):
    """Nesterov momentum of `grad` * `scale` (numel,), in the dtype of Newton-Schulz; updates m.

    Everything but grad and m is a tensor of one number; with `taken` 0 nothing changes.
    """
    grad = torch.where(taken > 0, grad * scale, 0.0)
    m.lerp_(grad, (1 - momentum) * taken)
    return grad.lerp(m, momentum).to(torch.bfloat16 if grad.is_cuda else torch.float32)

@region
def apply_update(weights, update, lr, decay):
    """weights (numel,) less decoupled weight decay and `lr` * update; lr, decay: tensors."""
    weights.copy_(weights * (1 - lr * decay) - update.float() * lr)

def replayed(graphs, function, *args):
    """function(*args), which works on tensors in place, as one CUDA graph a shape of arguments.

    A step on few rows is bound by the host's launches; a graph launches hundreds of kernels at
    once.  A graph reads and writes fixed memory, so changing values must be passed as tensors,
    which are copied in, or written in place into tensors that the function already uses.
    graphs: {} that keeps the recordings, or None to call as it is.   The first call of a shape runs
    as it is, and compiles; the second is recorded.
    """
    shape = function.__name__, *((x.shape, x.dtype) for x in args)
    if graphs is None or shape not in graphs:
        if graphs is not None:
            graphs[shape] = None
        return function(*args)
    if graphs[shape] is None:
        graph = torch.cuda.CUDAGraph()
        held = [x.clone() for x in args]
        # Other threads, which copy batches or watch NCCL, may call CUDA in the meantime.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function(*held)
        graphs[shape] = graph, held
    graph, held = graphs[shape]
    copy_all(held, args)
    graph.replay()

class Group(NamedTuple):
    """Parameters under one rule; `part` of the flat vectors is theirs.

    shapes: [(n, *shape)] of n parameters of equal shape, which follow each other.
    """
    rule: str
    lr: float
    decay: float
    part: slice
    shapes: list

class Optimizer:
    """Muon, AdamW and SGD with momentum over flat vectors, for one rank or many.

    treatment: {name: (rule, learning rate, decoupled weight decay)} of the parameters to train,
    which become views of `weights`.   clip: global gradient norm, 0 = off.   momentum: of muon and
    sgd.   compiled: use torch.compile, and on CUDA record CUDA graphs.
    weights, grad, m, v: (numel,), parameters by groups.   bad_steps: number of steps skipped
    because the gradient was not finite.   loss: sum of the losses added since it was last zeroed.
    """

    def __init__(self, model, treatment, run, clip, momentum, compiled):
        self.model, self.cfg = model, model.cfg
        self.run, self.clip = run, clip
        self.momentum, self.compiled = momentum, compiled
        self.graphs = {} if compiled and run.on_cuda else None
        self.number = partial(torch.full, (), dtype=torch.float32, device=run.device)
        named = dict(model.named_parameters())
        # Groups, and in them equal shapes, follow each other.
        self.names = sorted(treatment, key=lambda n: (treatment[n], tuple(named[n].shape)))
        self.params = [named[name] for name in self.names]
        # padded to 16 bytes: compiled code takes aligned parameters for granted
        sizes = {name: -(-named[name].numel() // 4) * 4 for name in self.names}
        self.sizes = list(sizes.values())
        self.weights = self.params[0].new_zeros(sum(self.sizes))
        self.grad, self.m = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.v = torch.zeros_like(self.weights)
        self.grads = self.views(self.grad)
        for p, view in zip(self.params, self.views(self.weights)):
            p.data = view.copy_(p.detach())
        self.groups = []
        start = 0
        for how, members in groupby(self.names, treatment.get):
            members = list(members)
            shapes = [(len(list(equal)), *shape)
                      for shape, equal in groupby(members, lambda name: named[name].shape)]
            stop = start + sum(sizes[name] for name in members)
            self.groups.append(Group(*how, slice(start, stop), shapes))
            start = stop
        self.count = torch.zeros((), device=run.device)  # steps taken
        self.bad_steps = torch.zeros((), device=run.device)
        self.loss = torch.zeros((), device=run.device)

    def views(self, flat):
        """flat (numel,) cut into tensors of the parameters' shapes."""
        parts = zip(flat.split(self.sizes), self.params)
        return [part[:p.numel()].view(p.shape) for part, p in parts]

    def add_gradient(self, ids, targets, wanted, share):
        """Add `share` times the nats of wanted targets (B, T) to `loss`, its gradient to `grad`."""
        replayed(self.graphs, self._add_gradient, ids, targets, wanted, self.number(share))

    def _add_gradient(self, ids, targets, wanted, share):
        # Each call has its own leaves over the weights' memory: autograd ties a leaf to the CUDA
        # stream of its first use, and a graph is recorded on a stream of its own.
        leaves = {name: nn.Parameter(p.detach()) for name, p in zip(self.names, self.params)}
        with compiling(self.compiled), _reparametrize_module(self.model, leaves):
            loss = summed_nll(self.model, ids, targets, wanted) * share
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True,
                                    materialize_grads=True)
        torch._foreach_add_(self.grads, found)
        self.loss += loss.detach()

    def step(self, rate):
        """Reduce, clip and apply the gradient at `rate` times the learning rates; then zero it."""
        self.run.all_sum(self.grad)
        # collectives are not recorded
        graphs = self.graphs if self.run.world_size == 1 else None
        replayed(graphs, self._step, self.number(rate), self.number(self.momentum))

    @torch.no_grad()
    def _step(self, rate, momentum):
        ranks = self.run.world_size
        norm = self.grad.norm() / ranks  # not finite on every rank if any gradient is not
        taken = norm.isfinite().float()
        self.bad_steps += 1 - taken
        self.count += taken
        scale = ((self.clip or math.inf) / (norm + 1e-6)).clamp(max=1.0) / ranks
        with compiling(self.compiled):
            for group in self.groups:
                update = self.muon if group.rule == "muon" else self.elementwise
                lr = taken * (group.lr * rate)
                apply_update(self.weights[group.part], update(group, scale, momentum, taken), lr,
                             torch.full_like(lr, group.decay))
        self.grad.zero_()

    def muon(self, group, scale, momentum, taken):
        """Muon's update [2] (numel,): Nesterov momentum, equal rows [8], then `newton_schulz`.

        Each rank orthogonalizes its share of whole matrices.  A learning rate is the spectral norm
        of a step; a tall matrix's is sqrt(R / C) times larger.
        """
        direction = nesterov(self.grad[group.part], self.m[group.part], scale, momentum, taken)
        updates = []
        parts = direction.split([math.prod(shape) for shape in group.shapes])
        for X, (n, R, C) in zip(parts, group.shapes):
            X = X.view(n, R, C)
            share = -(-n // self.run.world_size)
            X = X[self.run.rank * share:(self.run.rank + 1) * share]
            if self.cfg.muon_row_norm:
                norm = R ** 0.5 * X.norm(dim=-1, keepdim=True)  # of R such rows
            else:
                norm = X.norm(dim=(-2, -1), keepdim=True)
            X = newton_schulz(X / norm.clamp_min(1e-7)) * max(1.0, R / C) ** 0.5
            if self.run.world_size > 1:
                X = F.pad(X, (0, 0, 0, 0, 0, share - len(X))).contiguous()
                X = self.run.all_gather_rows(X)[:n]
            updates.append(X.flatten())
        return torch.cat(updates)

    def elementwise(self, group, scale, momentum, taken):
        """The update (numel,) of AdamW, or of SGD with momentum."""
        grad = torch.where(taken > 0, self.grad[group.part] * scale, 0.0)
        m, v = self.m[group.part], self.v[group.part]
        if group.rule == "sgd":
            return m.mul_(1 - (1 - momentum) * taken).add_(grad).clone()
        beta1, beta2 = self.cfg.beta1, self.cfg.beta2
        m.lerp_(grad, (1 - beta1) * taken)
        v.lerp_(grad.square(), (1 - beta2) * taken)
        count = self.count.clamp_min(1.0)
        spread = (v / (1 - beta2 ** count)).sqrt_().add_(1e-10)
        return (m / (1 - beta1 ** count)).div_(spread)

# --------------------------------------------------------------------------------------------------
# 8. Training
# --------------------------------------------------------------------------------------------------
# The clock runs from the first step through calibration and stands still only in validations;
# compiling and throw-away steps on synthetic tokens come before it and leave no trace.  A run can
# be stopped at any step and goes on from its checkpoint, replaced whole; a resumed run
# repeats all that follows training.

def settle_batch(cfg, run):
    """cfg with TRAIN_BATCH_TOKENS=0 replaced by whole rows for the run's ranks."""
    if cfg.train_batch_tokens:
        return cfg
    rows = max(1, 65536 // cfg.train_seq_len)
    rows -= rows % 8 if rows > 8 else 0  # so that micro-batches divide them
    return replace(cfg, train_batch_tokens=rows * cfg.train_seq_len * run.world_size)

def micro_batch_rows(cfg, run, ops=REFERENCE):
    """Rows of one forward pass, a divisor of this rank's rows; GolfError if ranks cannot share."""
    rows = cfg.train_batch_tokens // cfg.train_seq_len
    if rows % run.world_size:
        near = max(1, round(rows / run.world_size)) * run.world_size * cfg.train_seq_len
        raise GolfError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: {run.world_size} ranks "
                        f"cannot share {rows} rows of TRAIN_SEQ_LEN; set it to {near}")
    # 131,072 tokens of the default model take 35 GiB; 2,048 of the reference fit a CPU's caches.
    most = cfg.micro_batch_tokens or (2048 if ops is REFERENCE else 131072)
    rows //= run.world_size
    fitting = min(rows, max(1, most // cfg.train_seq_len))
    return next(d for d in range(fitting, 0, -1) if rows % d == 0)

def learning_rate(progress, cfg):
    """The multiple of the learning rates at `progress` in [0, 1]: flat, then linear to MIN_LR."""
    left = (1.0 - min(progress, 1.0)) / max(cfg.warmdown_frac, 1e-9)
    return min(1.0, cfg.min_lr + (1.0 - cfg.min_lr) * left)

@contextmanager
def on_export_grid(model):
    """Inside, every stored matrix is rounded to the export's grid; afterwards it is as before.

    A gradient taken inside and applied afterwards is the straight-through estimate (late QAT).
    """
    bits = stored_bits(model, model.cfg)
    params = [model.get_parameter(name).detach() for name in bits]
    saved = [p.clone() for p in params]
    usual = strengths(model, model.cfg)[1]
    for name, p in zip(bits, params):
        clip = getattr(model.cfg, route(name).clip) or usual * SDCLIP_QMAX
        step = sdclip_step(p, bits[name], clip).float().unsqueeze(-1)
        qmax = 2 ** (bits[name] - 1) - 1
        p.copy_((p / step).round().clamp(-qmax, qmax) * step)
    try:
        yield
    finally:
        copy_all(params, saved)

def training_optimizer(model, cfg, run):
    """The Optimizer of training: every parameter by its Route."""
    treatment = {}
    for name, _ in model.named_parameters():
        r = route(name)
        treatment[name] = r.optimizer, getattr(cfg, r.lr), getattr(cfg, r.decay, 0.0)
    return Optimizer(model, treatment, run, cfg.grad_clip_norm, cfg.muon_momentum, compiles(model))

def train_step(model, optimizer, batch, micro_rows, rate, step, qat=False):
    """Optimizer step number `step` on batch (rows, T + 1); this rank's mean loss, a tensor.

    rate: multiple of the learning rates.   qat: the forward sees rounded weights.
    """
    cfg = model.cfg
    optimizer.loss.zero_()
    wanted = torch.ones(1, 1, device=batch.device)  # every target
    with on_export_grid(model) if qat else nullcontext():
        for part in batch.split(micro_rows):
            ids, targets = part[:, :-1].contiguous(), part[:, 1:].contiguous()
            optimizer.add_gradient(ids, targets, wanted, 1 / batch[:, 1:].numel())
    warm = min(1.0, step / max(1, cfg.muon_momentum_warmup_steps))
    optimizer.momentum = (1 - warm) * cfg.muon_momentum_warmup_start + warm * cfg.muon_momentum
    optimizer.step(rate)
    return optimizer.loss

# Relative to float32; bfloat16 alone had up to 0.17 in vectors, sums over all tokens.
TOLERANCE = dict(loss=0.005, matrix=0.15, vector=0.4)

def check_fast_path(model, run, batch):
    """Compare the model as it will train with the plain one: loss and every gradient.

    batch: (rows, T + 1), a micro-batch.   Both get its first two rows (one of an odd number), the
    fast model repeated to the whole shape.   Raises GolfError.
    """
    cfg = model.cfg
    rng = torch.Generator().manual_seed(cfg.seed)
    with torch.no_grad():  # a block whose last matrix is zero has no gradient to compare
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=rng).to(p.device))
    reference = LM(replace(cfg, compile="0"), REFERENCE).to(run.device)
    copy_all(list(reference.parameters()), list(model.parameters()))
    rows = batch[:2 - len(batch) % 2]
    found = []
    for lm, part in ((model, rows.repeat(len(batch) // len(rows), 1)), (reference, rows)):
        optimizer = training_optimizer(lm, cfg, run)
        ids, targets = part[:, :-1].contiguous(), part[:, 1:].contiguous()
        wanted = torch.ones(1, 1, device=run.device)
        optimizer.add_gradient(ids, targets, wanted, 1 / ids.numel())
        found.append([optimizer.loss, *optimizer.grads])
    errors = [(x - y).norm() / y.norm().clamp_min(1e-12) for x, y in zip(*found)]
    loss_error, *errors = torch.stack(errors).nan_to_num(nan=math.inf).tolist()
    most = [TOLERANCE["matrix" if p.dim() > 1 else "vector"] for p in optimizer.params]
    excess, worst, error = max(zip(np.divide(errors, most), optimizer.names, errors))
    run.log("fast_path", loss_error=f"{loss_error:.6f}", worst_gradient=f"{error:.4f}",
            parameter=worst)
    if loss_error > TOLERANCE["loss"] or excess > 1:
        raise GolfError(f"KERNEL={cfg.kernel} COMPILE={cfg.compile}: the fast path's loss differs "
                        f"by {loss_error:.4f} and the gradient of {worst} by {error:.4f} "
                        f"from the reference (at most {TOLERANCE}); pytest -m gpu finds the "
                        "wrong kernel; set KERNEL, COMPILE=0 or another torch")

def warm_up(model, cfg, run, micro_rows):
    """Compile and tune all that training runs, on synthetic tokens; the weights are put back."""
    saved = [p.detach().clone() for p in model.parameters()]
    rng = torch.Generator().manual_seed(cfg.seed)
    rows = cfg.train_batch_tokens // cfg.train_seq_len // run.world_size
    batch = torch.randint(cfg.vocab_size, (rows, cfg.train_seq_len + 1), generator=rng,
                          dtype=torch.int32).to(run.device)
    run.log("warm_up", compile=int(compiles(model)), steps=cfg.warmup_steps)
    if compiles(model) or model.ops is not REFERENCE:
        check_fast_path(model, run, batch[:micro_rows])
    optimizer = training_optimizer(model, cfg, run)
    for step in range(cfg.warmup_steps):
        train_step(model, optimizer, batch, micro_rows, 1.0, step)
    if cfg.gptq_enabled:
        collect_hessians(model, [batch[:CALIBRATION_ROWS]], run)
    copy_all(list(model.parameters()), saved)
    run.synchronize()
    run.peak_memory_mib()  # the log shows the peak of training

class StopRequest:
    """A signal to stop; while `deferred`, `signal` keeps it, so that a checkpoint comes first.

    A repeat within a second is torchrun passing the same signal on; a later one ends the run.
    """
    signal, deferred = "", False  # the signal's name
    came = -math.inf

    def handle(self, number, frame):
        """The signal handler."""
        since = time.monotonic() - self.came
        self.came = time.monotonic()
        name = signal.Signals(number).name
        if self.deferred and math.isinf(since):
            self.signal = name
        elif since > 1.0:
            raise KeyboardInterrupt(f"stopped by {name}; the log is kept")

STOP = StopRequest()

# A checkpoint's facts before any step.
BEGINNING = dict(step=0, elapsed_s=0.0, epoch=0, row=0, averaged=0, trained=False, config={})

class Training:
    """What a run has reached: weights, optimizer, average, place in the data, steps and seconds.

    Equal for any number of ranks.   saved: the (tensors, facts) of a checkpoint, or None.
    """

    def __init__(self, model, data, cfg, run, saved):
        self.model, self.cfg = model, cfg
        self.run, self.identity = run, identity(cfg, data)
        tensors, facts = saved or ({}, BEGINNING)
        self.step, self.trained = facts["step"], facts["trained"]
        self.optimizer = training_optimizer(model, cfg, run)
        self.mean = self.optimizer.weights.clone()
        self.averaged = facts["averaged"]  # weights in the mean
        for name, x in self.tensors().items() if saved else ():
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            if found != x.shape:
                raise GolfError(f"checkpoint: tensor {name} is {found}, expected {tuple(x.shape)}")
            x.copy_(tensors[name])
        self.clock = Clock(run, facts["elapsed_s"])
        self.loader = Loader(data.train, cfg, run, (facts["epoch"], facts["row"]))

    def average(self, rate):
        """Take the weights into their mean: exponential, or of the warm-down (AVERAGE_EVERY)."""
        # The decay is warmed up, to forget the start.
        weight = 1 - min(self.cfg.ema_decay, (2 + self.averaged) / (11 + self.averaged))
        if self.cfg.average_every:
            if rate >= 1.0 or self.step % self.cfg.average_every:
                return
            weight = 1 / (1 + self.averaged)
        self.averaged += 1
        self.mean.lerp_(self.optimizer.weights, weight)

    def tensors(self):
        """{name: Tensor} that a checkpoint holds, by parameter; once trained, the weights alone."""
        optimizer = self.optimizer
        out = {}
        vectors = dict(model=optimizer.weights)
        if not self.trained:
            out = dict(bad_steps=optimizer.bad_steps, count=optimizer.count)
            vectors |= dict(m=optimizer.m, v=optimizer.v, average=self.mean)
        for kind, flat in vectors.items():
            out |= {f"{kind}.{name}": x for name, x in zip(optimizer.names, optimizer.views(flat))}
        return out

    def facts(self):
        """What a checkpoint says beside its tensors."""
        epoch, row = self.loader.place
        return dict(step=self.step, elapsed_s=self.clock.elapsed(), epoch=epoch, row=row,
                    averaged=self.averaged, trained=self.trained, config=self.identity)

    def save(self, facts=None):
        """Write the checkpoint with `facts` of now or of an earlier time.

        A fault is logged and the run goes on.   Returns how to go on from here, for a message.
        """
        if self.run.rank == 0:
            try:
                tensors = self.tensors()
                if not all(x.isfinite().all() for x in tensors.values()):
                    raise OSError("weights or moments are not finite")
                save_tensors(checkpoint_path(self.cfg), tensors, facts or self.facts())
            except OSError as error:
                self.run.log("checkpoint_failed", reason=str(error))
                return f"its checkpoint could not be written ({error})"
        return f"RUN_ID={self.cfg.run_id} RESUME=auto goes on"

def checkpoint_path(cfg):
    """The file that holds the run's checkpoint."""
    return Path(cfg.out_dir) / f"{cfg.run_id}.ckpt"

def identity(cfg, data):
    """What a checkpoint fixes: the settings of data, model and training, not where files lie."""
    fixed = {name: plain(getattr(cfg, name)) for name in fields_of("data", "model", "training")}
    shards = f"{len(data.train)} shards of {sum(map(len, data.train))} tokens"
    return fixed | dict(data_path=shards, tokenizer_path=Path(cfg.tokenizer_path).name)

def find_checkpoint(cfg, data):
    """The (tensors, facts) of the checkpoint that RESUME names, None to begin; GolfError."""
    own = checkpoint_path(cfg)
    path = own if cfg.resume == "auto" else Path(cfg.resume)
    if cfg.resume == "auto" and not own.exists():
        return None
    if own.exists() and own.resolve() != path.resolve():
        raise GolfError(f"RESUME={path}: RUN_ID={cfg.run_id} has a checkpoint of its own; "
                        "RESUME=auto goes on with that, another RUN_ID begins from this one")
    tensors, facts = load_tensors(path)
    now = identity(cfg, data)
    then = dict.fromkeys(now, "none") | facts["config"]
    differing = [f"{name.upper()} was {then[name]}, is {now.get(name, 'none')}"
                 for name in then if then[name] != now.get(name)]
    if differing:
        raise GolfError(f"RESUME: {path} is of another run: {ascii(differing)[1:-1][:999]}")
    return tensors, facts

def train(model, data, cfg, run, saved):
    """Train from `saved` on until ITERATIONS or the clock ends it; (seconds, Calibration).

    Leaves the averaged weights in the model and in the checkpoint.
    """
    micro_rows = micro_batch_rows(cfg, run, model.ops)
    if not (saved and saved[1]["trained"]):
        warm_up(model, cfg, run, micro_rows)
    initial = fingerprint(model)  # as of the seed: verify.py compares
    job = Training(model, data, cfg, run, saved)  # last: its Optimizer must own the weights
    run.log("kernel", **model.ops.names, compiled=int(compiles(model)),
            threads=torch.get_num_threads(),
            micro_batch_tokens=micro_rows * cfg.train_seq_len, initial_weights=initial,
            start_up=f"{time.perf_counter() - run.began:.0f}s")
    facts = None
    run.gather(None)  # do not measure the wait for slower ranks
    job.clock.resume()
    STOP.deferred = True
    try:
        if not job.trained:
            train_loop(job, data, micro_rows)
        facts = job.facts()  # the place before calibration: it can be done again
        if job.trained:
            calibration = calibrate(model, job.loader, cfg, run, job.clock)
            train_s = run.broadcast(job.clock.pause())
    except (GolfError, OSError):  # as of a shard that became unreadable: between two steps
        facts = facts or job.facts()
        raise
    finally:
        how_to_go_on = job.save(facts) if facts else ""  # also if the calibration failed
        STOP.deferred = False
    stop = max(run.gather(STOP.signal))
    if stop:
        raise KeyboardInterrupt(f"stopped by {stop} at step {job.step}; {how_to_go_on}")
    return train_s, calibration

MAX_BAD_STEPS = 10  # a run survives so many steps skipped for a gradient that is not finite

def train_loop(job, data, micro_rows):
    """Steps until the clock or ITERATIONS end them: the job is trained; or until a signal does."""
    model, cfg = job.model, job.cfg
    run, clock = job.run, job.clock
    budget = cfg.max_wallclock_seconds or math.inf
    budget -= cfg.gptq_reserve_seconds if cfg.gptq_enabled else 0.0
    durations = deque(maxlen=20)
    saved_s = last_tick = clock.elapsed()
    bad_steps = int(job.optimizer.bad_steps)
    wait = run.to_host(job.optimizer.bad_steps)
    while True:
        # Rank 0's clock decides, so that ranks never disagree.
        step_s = 1.05 * max(durations, default=0.0)
        fault = str(job.loader.ahead[0].exception() or "")  # of reading the next batch
        told = run.gather((clock.elapsed(), step_s, STOP.signal, fault))
        elapsed, step_s, *_ = told[0]
        if any(name for _, _, name, _ in told):
            return
        in_flight = 2 if run.on_cuda else 1  # the next step ends that many steps from now
        out_of_time = job.step > 0 and elapsed + in_flight * step_s > budget
        last = job.step >= cfg.iterations or out_of_time
        if cfg.val_loss_every and (job.step % cfg.val_loss_every == 0 or last):
            ms = 1000 * clock.pause()
            ledger = evaluate(model, data.val, data.table, "roundtrip", run=run)
            run.log("", step=f"{job.step}/{cfg.iterations}", **ledger.as_log(4),
                    train_time=f"{ms:.0f}ms", step_avg=f"{ms / max(1, job.step):.2f}ms")
            clock.resume()
        if last:
            break
        if fault := max(text for *_, text in told):  # on all ranks: a lost one ends rank 0 unsaved
            raise GolfError(f"{fault}; stopped at step {job.step}, RESUME=auto goes on")
        progress = max(elapsed / budget, job.step / max(1, cfg.iterations))
        rate = learning_rate(progress, cfg)
        loss = train_step(model, job.optimizer, next(job.loader), micro_rows, rate, job.step,
                          qat=progress > 1 - cfg.qat_frac)
        job.step += 1
        job.average(rate)
        # Wait for the step before: the host stays one step ahead, the clock true.
        newest = int(wait())
        wait = run.to_host(job.optimizer.bad_steps)
        if newest > bad_steps:
            run.log("bad_step", step=job.step, count=newest, most=MAX_BAD_STEPS)
        if newest > MAX_BAD_STEPS:
            raise GolfError(f"step {job.step}: {newest} steps had gradients that are not finite, "
                            f"more than {MAX_BAD_STEPS}; lower MATRIX_LR, TIED_EMBED_LR or "
                            "SCALAR_LR")
        bad_steps = newest
        durations.append(clock.elapsed() - last_tick)  # log_step's wait for the device included
        last_tick += durations[-1]
        if job.step <= 3 or job.step % cfg.train_log_every == 0:
            log_step(job, loss, rate, float(np.median(durations)))
        if 0 < cfg.checkpoint_every_seconds <= clock.elapsed() - saved_s:  # by rank 0's clock
            job.save()
            saved_s = last_tick = clock.elapsed()
    if out_of_time:
        run.log("stopping_early: wallclock_cap", train_time=f"{1000 * clock.elapsed():.0f}ms",
                step=f"{job.step}/{cfg.iterations}")
    if job.averaged:
        job.optimizer.weights.copy_(job.mean)
    job.trained = True

def log_step(job, loss, rate, step_s):
    """One progress line; waits for the device."""
    cfg = job.cfg
    mean_loss = float(np.mean(job.run.gather(float(loss))))
    now = job.clock.elapsed()
    left = min((cfg.max_wallclock_seconds or math.inf) - now, (cfg.iterations - job.step) * step_s)
    job.run.log("", step=f"{job.step}/{cfg.iterations}", train_loss=mean_loss,
                lr_mul=f"{rate:.3f}", train_time=f"{1000 * now:.0f}ms",
                step_avg=f"{1000 * now / job.step:.2f}ms",
                tok_s=f"{cfg.train_batch_tokens / max(step_s, 1e-9):.0f}",
                eta=f"{max(0.0, left):.0f}s", peak_mem_mib=job.run.peak_memory_mib(False))

CALIBRATION_ROWS = 8  # rows of one calibration batch

def calibrate(model, loader, cfg, run, clock):
    """The Calibration by the next training rows, inside the training clock.

    Each rank takes its part of every batch: which rows are used depends on the ranks.
    """
    if not cfg.gptq_enabled:
        return UNCALIBRATED
    run.synchronize()
    loop_end_s = clock.elapsed()
    rows = -(-cfg.gptq_calibration_batches * CALIBRATION_ROWS // run.world_size)

    def batches():
        done = 0
        while done < rows:
            for part in next(loader)[:rows - done].split(CALIBRATION_ROWS):
                run.synchronize()
                now = clock.elapsed()
                # One more batch, half again as long as the mean, and the sums of ranks must fit.
                end = now + 1.5 * (now - loop_end_s) / max(1, done // CALIBRATION_ROWS) + 0.5
                late = 0 < cfg.max_wallclock_seconds < end or STOP.signal
                if run.broadcast(done > 0 and late):
                    return
                yield part
                done += len(part)

    calibration = collect_hessians(model, batches(), run)
    run.synchronize()
    run.log("hessians", matrices=len(calibration.H), tokens=int(calibration.counts.sum()),
            wanted_tokens=rows * run.world_size * cfg.train_seq_len, loop_end_s=f"{loop_end_s:.1f}",
            hessian_end_s=f"{clock.elapsed():.1f}", peak_mem_mib=run.peak_memory_mib())
    return calibration

# --------------------------------------------------------------------------------------------------
# 9. Export
# --------------------------------------------------------------------------------------------------
# Matrices become integers times float16 scales of row and column (of the column 1 unless
# GRID=rate); small tensors stay float16 or float32; a shared tensor is stored once.  One search
# finds the finest steps whose file fits the cap.
#
# The file:  head (ARTIFACT_HEAD): magic, version, bytes of the header, SHA-256 of what follows.
# Header: zlib'd JSON with "config" (STORED_FIELDS), "tokenizer" (SHA-256 of its file, or null),
# "tensors" in named_parameters() order [name, shape, coding] and "streams" [name, codec, raw bytes,
# packed bytes].  Then the streams.  Coding "int8": Q (R, C) in stream "integers", R scales of rows
# in "f16", C of columns in "column"; the weight is Q * row * column.  "f16", "f32": floats in that
# stream.  Each holds its tensors in table order, in byte planes: all low bytes first.  With
# COMPRESSOR=rans "class", "table" and "words" stand for "integers": see rans_encode.  Nothing is
# executed, and every length is checked before anything is allocated.

ARTIFACT_MAGIC = b"GDNSWA\r\n"
ARTIFACT_VERSION = 4
ARTIFACT_HEAD = struct.Struct("<8sII32s")
MAX_HEADER_BYTES = 1 << 22
SPARE_WEIGHTS = 1 << 23  # n bytes hold at most 8 n weights and these; 16 MB then load in 2 GB
PIECE = 1 << 22  # bytes; longer streams are cut in pieces, compressed on all cores
# What the streams hold, besides the bytes of "words".
ITEMS = {"integers": np.dtype("i1"), "f16": np.dtype("<f2"), "column": np.dtype("<f2"),
         "f32": np.dtype("<f4"), "table": np.dtype("<u2"), "class": np.dtype("i1")}

def sdclip_step(W, bits, clip_sigmas):
    """SDClip's step of each row of W (R, C): clip_sigmas * std(row) / qmax; float16, 1 for zeros.

    bits: 2..8, a number or a tensor (R,).
    """
    spread = clip_sigmas * W.float().std(-1, correction=0)
    spread = torch.where(spread > 0, spread, W.float().abs().amax(-1))  # a constant row
    step = (spread / (2 ** (bits - 1) - 1)).to(torch.float16)
    return step.masked_fill(~(step > 0), 1.0)

def error_factor(H, damp=0.01):
    """Upper Cholesky factor U of the damped H^-1 (C, C): row i holds the corrections to columns i
    and later for an error in column i.

    damp: part of its mean that is added to the diagonal, raised tenfold until H is positive
    definite.   Returns U and the damping; GolfError if H is not finite.
    """
    diagonal = H.diagonal()
    mean = diagonal.mean().clamp_min(1e-12)
    for _ in range(12):
        padded = H + torch.diag(torch.where(diagonal <= 0, mean, damp * mean))
        L, fault = torch.linalg.cholesky_ex(padded)
        U, fault_inverse = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not bool(fault + fault_inverse) and bool(U.isfinite().all()):
            return U, damp
        damp *= 10
    raise GolfError("GPTQ: a Hessian is not finite; has the model diverged?  Lower MATRIX_LR")

def gptq(W, step, H, qmax, U=None, block=128):
    """Round each weight so that the layer's output error is least, column by column.

    W: (..., R, C) float, rows are outputs.   step: broadcasts to it.   H: (C, C), sum or mean of
    x x^T over calibration tokens.   qmax: a number, or a tensor (..., R).   U: (..., C, C)
    `error_factor` of H, if known.   Returns Q int8 (..., R, C) in [-qmax, qmax], W ~ Q * step [5].
    """
    C = W.shape[-1]
    if U is None:
        U, _ = error_factor(H)
    # Transposed, so that one column of W lies together.
    steps = step.expand(W.shape).mT.contiguous()
    W = W.float().mT.clone(memory_format=torch.contiguous_format)
    Q = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    for start in range(0, C, block):
        end = min(start + block, C)
        errors = torch.empty_like(W[..., start:end, :])
        for i in range(start, end):
            column, size = W[..., i, :], steps[..., i, :]
            q = (column / size).round().clamp(-qmax, qmax)
            Q[..., i, :] = q
            error = (column - q * size) / U[..., i, i, None]
            errors[..., i - start, :] = error
            # later columns of the block make up for it
            W[..., i:end, :] -= U[..., i, i:end, None] * error.unsqueeze(-2)
        W[..., end:, :] -= U[..., start:end, end:].mT @ errors
    return Q.mT.contiguous()

class Calibration(NamedTuple):
    """Sums over calibration tokens, float32, by parameter name; empty without calibration.

    H: x x^T (C, C) of the matrix's inputs.   rows: with GRID=rate the squared gradients (R,) of its
    rows.   counts: of each token, (vocab,).
    """
    H: dict
    rows: dict
    counts: Tensor | None

UNCALIBRATED = Calibration({}, {}, None)

def collect_hessians(model, batches, run):
    """The Calibration by `batches`, an iterable of ids (B, T + 1), summed over all ranks."""
    cfg = model.cfg
    names = {id(p): name for name, p in model.named_parameters()}
    stored = [(name, p) for name, p in model.named_parameters() if route(name).bits]
    H = {}
    rows = {name: p.new_zeros(len(p)) for name, p in stored if cfg.grid == "rate"}
    counts = torch.zeros(cfg.vocab_size, device=run.device)
    weight = None

    def observe(x, weights):
        x = x.detach().reshape(-1, x.shape[-1]).float()
        product = (x if weight is None else x * weight).mT @ x
        for w in weights:
            name = names[id(w)]
            H[name] = H.get(name, 0) + product

    precision = torch.get_float32_matmul_precision()
    # TF32 has more bits than the bfloat16 activations, so their products stay exact.
    torch.set_float32_matmul_precision("high" if run.on_cuda else precision)
    OBSERVERS.append(observe)
    try:
        for batch in batches:
            ids = batch[:, :-1].flatten().long()
            counts += torch.bincount(ids, minlength=cfg.vocab_size)
            if cfg.gptq_token_power:  # FreqGPTQ, by the counts so far, scaled to a mean of 1
                weight = counts[ids].unsqueeze(-1) ** -cfg.gptq_token_power
                weight /= weight.mean()
            with torch.set_grad_enabled(cfg.grid == "rate"):
                nats, _ = model.nll(batch[:, :-1], batch[:, 1:])
            if cfg.grid == "rate":
                found = torch.autograd.grad(nats.sum(), [p for _, p in stored])
                for total, grad in zip(rows.values(), found):
                    total += grad.float().square().sum(-1)
    finally:
        OBSERVERS.remove(observe)
        torch.set_float32_matmul_precision(precision)
    for total in (*H.values(), *rows.values(), counts):
        run.all_sum(total)
    return Calibration(H, rows, counts)

class Quantized(NamedTuple):
    """One stored matrix: Q int8 (R, C), float16 scales of its rows (R,) and columns (C,), bits.

    For the log: rel_error ||dW H dW^T|| / ||W H W^T||, and the damping (0: no Hessian).
    """
    Q: Tensor
    rows: Tensor
    columns: Tensor
    bits: int
    rel_error: float = 0.0
    damp: float = 0.0

def full_step(rows, columns):
    """The step of each weight (R, C) of row and column scales, float32."""
    return rows.float().unsqueeze(-1) * columns.float()

def octave_grid(x):
    """x rounded to eighths of an octave, float16: few different values, which compress well."""
    octaves = (8 * x.float().clamp_min(2.0 ** -20).log2()).round() / 8
    return octaves.clamp(-20, 15).exp2().to(torch.float16)

SENSITIVITY_POWER = 0.7  # below 1: sensitivities are estimates from few batches
LEAST_SENSITIVITY = 0.02  # of the matrix's mean, for rows that calibration hardly reached
MOST_STEPS = 108  # largest |weight| / step; GPTQ's corrections may use the rest of int8

class Matrix:
    """One weight to be stored, and all that its quantization needs at any strength.

    strength: the factor of all steps that the search varies (GRID=sdclip: of those whose Route has
    no clip of its own).  With GRID=rate the step of weight (r, c) is proportional to
    1 / sqrt(sensitivity of row r * conditional variance of input c): a byte then lowers the loss by
    as much wherever it is spent (reverse water-filling).
    W (R, C), H and U have their columns in the order of rounding: largest inputs first.
    log_step: sum over weights of log(step / std(row)) at strength 1 (GRID=rate).
    """

    def __init__(self, name, W, bits, cfg, calibration):
        self.name, self.cfg = name, cfg
        W = W.detach().float()
        R, C = W.shape
        self.bits = torch.full((R,), bits, device=W.device)
        if name == "embed.weight" and cfg.frequent_rows:
            self.bits[calibration.counts.topk(min(cfg.frequent_rows, R)).indices] = 8
        self.order = torch.arange(C, device=W.device)
        self.H = torch.eye(C, device=W.device)
        self.U, self.damp = self.H, 0.0  # with these GPTQ rounds to nearest
        if name in calibration.H:
            H = calibration.H[name]
            self.order = H.diagonal().argsort(descending=True)
            self.H = H[self.order][:, self.order]
            self.U, self.damp = error_factor(self.H)
        self.W = W[:, self.order]
        self.log_step = 0.0
        if cfg.grid == "rate":
            # times H this is the expected second derivative of the loss
            sensitivity = calibration.rows[name] / self.H.diagonal().sum().clamp_min(1e-30)
            mean = sensitivity.mean().clamp_min(1e-30)
            g = (sensitivity / mean).clamp_min(LEAST_SENSITIVITY) ** SENSITIVITY_POWER
            u = self.U.diagonal()
            middle = u.log().mean().exp()
            self.row_step = (mean * g / g.mean()).rsqrt() * middle
            self.column_step = u / middle
            spread = self.W.std(-1, correction=0).clamp_min(1e-12)
            self.log_step = C * float((self.row_step / spread).log().sum())

    def steps(self, strength):
        """Scales of rows (R,) and columns (C,), float16: a weight's step is their product."""
        r = route(self.name)
        if self.cfg.grid == "sdclip":
            clip = getattr(self.cfg, r.clip) or strength * SDCLIP_QMAX
            rows = sdclip_step(self.W, self.bits, clip)
            return rows, rows.new_ones(self.W.shape[1])
        spread = (self.W / self.column_step).square().mean(-1).sqrt()
        scale = strength * self.row_step
        if r.role == "gate":  # a saturated gate has no gradient, and opening it does much harm
            scale = torch.minimum(scale, self.cfg.embed_clip_sigmas / 127 * spread)
        # Rows, then columns, whose weights would leave the integers' range get a larger step.
        scale = octave_grid(torch.maximum(scale, 3 * spread / MOST_STEPS))
        largest = (self.W / scale.float().unsqueeze(-1)).abs().amax(0)
        return scale, octave_grid(torch.maximum(self.column_step, largest / MOST_STEPS))

def stored_bits(model, cfg):
    """{name: bits} of the matrices that become integers, by their Routes and SANDWICH_BITS."""
    last = {id(p) for p in model.blocks[-1].parameters()}
    bits = {}
    for name, p in model.named_parameters():
        if route(name).bits:
            own = getattr(cfg, route(name).bits) or cfg.matrix_bits
            bits[name] = max(own, cfg.sandwich_bits) if id(p) in last else own
    return dict.fromkeys(bits, 8) if cfg.grid == "rate" else bits

@torch.no_grad()
def quantize(matrices, strength):
    """{name: Quantized} of a list of Matrix at a strength; equal shapes are rounded at once."""
    groups, out = {}, {}
    for m in matrices:
        groups.setdefault(m.W.shape, []).append(m)
    for members in groups.values():
        scales = [m.steps(strength) for m in members]
        W = torch.stack([m.W for m in members])
        U = torch.stack([m.U for m in members])
        step = torch.stack([full_step(*pair) for pair in scales])
        qmax = torch.stack([2 ** (m.bits - 1) - 1 for m in members])
        for m, Q, (rows, columns) in zip(members, gptq(W, step, None, qmax, U), scales):
            dW = m.W - Q.float() * full_step(rows, columns)
            whole = ((m.W @ m.H) * m.W).sum().clamp_min(1e-30)
            rel_error = float(((dW @ m.H) * dW).sum() / whole)
            back = m.order.argsort()
            out[m.name] = Quantized(Q[:, back].cpu(), rows.cpu(), columns[back].cpu(),
                                    int(m.bits.min()), rel_error, float(m.damp))
    return out

def prepare_matrices(model, cfg, calibration, run):
    """This rank's share of the model's matrices: list of Matrix."""
    bits = stored_bits(model, cfg)
    params = {name: model.get_parameter(name) for name in bits}
    by_work = sorted(params, key=lambda n: -params[n].numel() * params[n].shape[1])
    return [Matrix(name, params[name], bits[name], cfg, calibration)
            for name in by_work[run.rank::run.world_size]]

# ---- lossless coding

def compress(data, codec):
    """bytes -> bytes by brotli (quality 11, window 24), lzma, zstd (22) or none."""
    if codec == "brotli":
        import brotli
        return brotli.compress(data, quality=11, lgwin=24)
    if codec == "zstd":
        import zstandard
        return zstandard.ZstdCompressor(level=22).compress(data)
    if codec == "lzma":
        return lzma.compress(data, format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    return data

def decompress(data, codec, size):
    """The inverse of `compress`; the codec's error, or GolfError unless it makes `size` bytes."""
    if codec == "brotli":
        import brotli
        data = brotli.Decompressor().process(data, output_buffer_limit=size + 1)
    elif codec == "zstd":
        import zstandard
        data = zstandard.ZstdDecompressor().stream_reader(data).read(size + 1)
    elif codec == "lzma":
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=1 << 27)
        data = decoder.decompress(data, max_length=size + 1)
    if len(data) != size:
        raise GolfError(f"a stream decompresses to {len(data)} bytes or more, expected {size}")
    return data

# Integers are coded by rANS [6]: many states side by side, so that numpy codes one symbol of each
# at a time, and one stream of 16-bit words for all.  A symbol's probabilities come from the table
# of its class, the size of number to expect in its row and column: one byte each in the file.

RANS_BITS = 14  # a table's frequencies sum to 2^14
RANS_LOW = 1 << 16  # states stay in [2^16, 2^32)
RANS_LANES = 4096  # most states side by side; few for few symbols, as each takes 4 bytes
RANS_CLASSES = 96  # quarters of an octave of the symbols' root mean square; class 24 is 1

def symbol_classes(Q):
    """int8 parts of rows (R,) and columns (C,) of Q: a symbol's class is the sum of its two."""
    power = np.square(Q, dtype=np.float32)
    rows = np.rint(2 * np.log2(power.mean(1) + 0.02))
    columns = np.rint(2 * np.log2((power / np.exp2(rows / 2)[:, None]).mean(0) + 0.02))
    return (rows + 24).astype(np.int8), columns.astype(np.int8)

def class_map(rows, columns):
    """The class of each symbol of a tensor, uint8 (R * C,)."""
    sums = rows[:, None].astype(np.int16) + columns
    return np.clip(sums, 0, RANS_CLASSES - 1).astype(np.uint8).ravel()

def rans_frequencies(counts):
    """Frequencies (K, 256) uint16 of `counts`: rows sum to 2^RANS_BITS or 0; at least 1 each."""
    whole = 1 << RANS_BITS
    freq = counts * whole // np.maximum(1, counts.sum(1, keepdims=True))
    freq = np.where(counts > 0, np.maximum(1, freq), 0)
    freq[np.arange(len(freq)), freq.argmax(1)] += np.where(counts.any(1), whole - freq.sum(1), 0)
    return freq.astype(np.uint16)

def rans_encode(keys, freq):
    """Code symbols by freq (K, 256); keys: 256 * class + symbol (n,).  The states, then words."""
    lanes = max(1, min(RANS_LANES, len(keys) >> 12))
    start = (np.cumsum(freq, 1, dtype=np.uint32) - freq).ravel().astype(np.uint64)
    freq = freq.ravel().astype(np.uint64)
    states = np.full(lanes, RANS_LOW, np.uint64)
    words = []
    for i in reversed(range(0, len(keys), lanes)):
        key = keys[i:i + lanes]
        x = states[:len(key)]
        f = freq[key]
        full = x >= f << np.uint64(32 - RANS_BITS)
        words.append(x[full].astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        high = x // f
        states[:len(key)] = (high << np.uint64(RANS_BITS)) + (x - high * f) + start[key]
    return states.astype("<u4").tobytes() + b"".join(part.tobytes() for part in reversed(words))

def rans_decode(data, classes, freq):
    """The inverse of `rans_encode`: symbols uint8 (n,).  Raises GolfError."""
    count = len(classes)
    lanes = max(1, min(RANS_LANES, count >> 12))
    total = freq.sum(1, dtype=np.int64)
    if not np.isin(total, (0, 1 << RANS_BITS)).all() or not total[classes].all():
        raise GolfError("its table of frequencies is not one that this script writes")
    start = (np.cumsum(freq, 1, dtype=np.uint32) - freq).ravel()
    # the symbol at each slot of each class, and where the class of each symbol begins
    symbol_of = np.repeat(np.tile(np.arange(256, dtype=np.uint8), len(freq)), freq.ravel())
    slots = (np.cumsum(total) - total).astype(np.int32)[classes]
    keys = classes.astype(np.int32) << 8
    freq = freq.ravel().astype(np.uint32)
    states = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
    words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint32)
    mask = np.uint32((1 << RANS_BITS) - 1)
    out = np.empty(count, np.uint8)
    at = 0
    for i in range(0, count, lanes):
        x = states[:min(lanes, count - i)]
        slot = x & mask
        symbols = symbol_of[slots[i:i + lanes] + slot.view(np.int32)]
        out[i:i + lanes] = symbols
        key = keys[i:i + lanes] + symbols
        x = freq[key] * (x >> np.uint32(RANS_BITS)) + (slot - start[key])
        low = np.flatnonzero(x < RANS_LOW)
        x[low] = x[low] << np.uint32(16) | words[at:at + len(low)]
        at += len(low)
        states[:len(x)] = x
    return out

def byte_planes(data, width):
    """Items of `width` bytes with all first bytes first, then the second: easier to compress."""
    return np.frombuffer(data, np.uint8).reshape(-1, width).T.tobytes()

# ---- the file

def pack_artifact(model, cfg, quantized):
    """The artifact's bytes."""
    table, integers = [], []
    raw = {"f16": b"", "f32": b"", "column": b""}
    for name, p in model.named_parameters():
        p = p.detach().float().cpu()
        small = p.numel() <= 64  # decay rates and gains keep every bit
        coding = "f32" if small else "f16"
        q = quantized.get(name)
        if q is None and cfg.control_bits and not small and route(name).role == "control":
            W = p.reshape(-1, p.shape[-1])
            rows = (W.abs().amax(-1) / 127).clamp_min(2.0 ** -24).to(torch.float16)
            Q = (W / rows.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
            q = Quantized(Q, rows, rows.new_ones(W.shape[1]), 8)
        if q is None:
            raw[coding] += p.numpy().astype("<f4" if small else "<f2").tobytes()
        else:
            coding = "int8"
            integers.append(q.Q.numpy())
            raw["f16"] += q.rows.numpy().tobytes()
            raw["column"] += q.columns.numpy().tobytes()
        table.append([name, list(p.shape), coding])
    if cfg.compressor == "rans" and integers:
        raw["class"], raw["table"], raw["words"] = rans_pack(integers)
    else:
        raw["integers"] = b"".join(Q.tobytes() for Q in integers)
    pieces = []
    for name, data in raw.items():
        codec = "none" if name == "words" else cfg.compressor.replace("rans", "brotli")
        data = byte_planes(data, ITEMS[name].itemsize) if name in ITEMS else data
        pieces += [(name, data[i:i + PIECE], codec) for i in range(0, len(data), PIECE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        packed = list(pool.map(lambda piece: compress(*piece[1:]), pieces))
    streams = [[name, codec, len(x), len(y)] for (name, x, codec), y in zip(pieces, packed)]
    config = {name: getattr(cfg, name) for name in STORED_FIELDS}
    header = dict(config=config, tokenizer=tokenizer_hash(cfg), tensors=table, streams=streams)
    head = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    payload = b"".join(packed)
    digest = hashlib.sha256(head + payload).digest()
    return ARTIFACT_HEAD.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(head), digest) + head + payload

def rans_pack(integers):
    """Code a list of Q (R, C) int8: bytes of the classes, the table of frequencies, the words."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(symbol_classes, integers))
    symbols = np.concatenate([(Q.view(np.uint8) ^ 128).ravel() for Q in integers])
    classes = np.concatenate([class_map(rows, columns) for rows, columns in parts])
    keys = classes.astype(np.int32) << 8 | symbols
    counts = np.bincount(keys, minlength=RANS_CLASSES << 8).reshape(RANS_CLASSES, 256)
    freq = rans_frequencies(counts)
    sides = b"".join(rows.tobytes() + columns.tobytes() for rows, columns in parts)
    return sides, freq.astype("<u2").tobytes(), rans_encode(keys, freq)

def read_artifact(source, cfg=None):
    """Bytes, header (dict) and payload of an artifact, a file name or its bytes; or GolfError.

    Checks its head, checksum and, given cfg, that it was made with cfg's tokenizer.
    """
    blob = source
    try:
        if not isinstance(source, bytes):
            if not Path(source).is_file() or Path(source).stat().st_size > 1 << 28:
                raise GolfError("No such file, or more than 256 MiB")
            blob = Path(source).read_bytes()
        if blob[:8] != ARTIFACT_MAGIC or len(blob) < ARTIFACT_HEAD.size:
            raise GolfError(f"begins with {blob[:8]!r}: not an artifact of this script")
        _, version, packed, digest = ARTIFACT_HEAD.unpack_from(blob)
        body = memoryview(blob)[ARTIFACT_HEAD.size:]
        if version != ARTIFACT_VERSION:
            raise GolfError(f"format version {version}, this script reads {ARTIFACT_VERSION}")
        if hashlib.sha256(body).digest() != digest:
            raise GolfError("the checksum differs: truncated or altered")
        text = zlib.decompressobj().decompress(body[:packed], MAX_HEADER_BYTES)
        header = dict(json.loads(text))
        if cfg and header.get("tokenizer") not in (None, tokenizer_hash(cfg)):
            raise GolfError(f"made with another tokenizer than TOKENIZER_PATH="
                            f"{cfg.tokenizer_path}: set it to the artifact's own")
    except (OSError, ValueError, TypeError, RecursionError, zlib.error) as error:
        name = "its bytes" if isinstance(source, bytes) else source
        raise GolfError(f"ARTIFACT={name}: {error}") from None
    return blob, header, body[packed:]

def unpack_weights(header, payload, most):
    """The float32 weights of an artifact; GolfError before its streams make over `most` bytes."""
    names, codecs, raw, packed = zip(*header["streams"])
    ends = list(accumulate(packed))
    if min(packed) < 0 or ends[-1] != len(payload) or min(raw) < 1 or sum(raw) > most:
        raise GolfError(f"its streams do not fill it, or claim more than {most} bytes")
    parts = [bytes(payload[end - size:end]) for end, size in zip(ends, packed)]
    streams = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, data in zip(names, pool.map(decompress, parts, codecs, raw)):
            streams.setdefault(name, bytearray()).extend(data)
    for name in streams.keys() & ITEMS.keys():
        count = len(streams[name]) // ITEMS[name].itemsize
        streams[name] = np.frombuffer(byte_planes(streams[name], count), ITEMS[name])
    if "words" in streams:
        freq = streams.pop("table").reshape(RANS_CLASSES, 256)
        shapes = [(math.prod(shape[:-1]), shape[-1])
                  for _, shape, coding in header["tensors"] if coding == "int8"]
        sides = np.split(streams.pop("class"), np.cumsum(shapes))  # of rows, columns, rows, ...
        classes = np.concatenate([class_map(*pair) for pair in zip(sides[::2], sides[1::2])])
        symbols = rans_decode(streams.pop("words"), classes, freq)
        streams["integers"] = (symbols ^ 128).view(np.int8)

    def take(name, n):
        taken, streams[name] = np.split(streams[name], [n])
        return torch.from_numpy(taken.copy())

    weights = []
    for _, shape, coding in header["tensors"]:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        if coding == "int8":
            Q = take("integers", rows * columns).view(rows, columns)
            weights.append((Q * full_step(take("f16", rows), take("column", columns))).view(shape))
        else:
            weights.append(take(coding, rows * columns).float().view(shape))
    return weights

def load_artifact(path, ops=lambda cfg: REFERENCE, device="cpu", base=None):
    """Build the model that an artifact file holds, from that file alone.

    path: file name, or the file's bytes.   ops: function that picks the Ops for the model's Config.
    base: Config of what the file does not fix (evaluation).   Raises GolfError.
    """
    # a run's own bytes are of its tokenizer, whatever became of that file since
    blob, header, payload = read_artifact(path, None if isinstance(path, bytes) else base)
    base = base or Config()
    try:
        stored = {f.name: type(f.default)(header["config"][f.name]) for f in fields(Config)
                  if f.name in STORED_FIELDS}
        cfg = replace(base, **stored, train_batch_tokens=0)
        with torch.device("meta"):
            model = LM(cfg)
        count = sum(p.numel() for p in model.parameters())
        listed = [(name, tuple(shape)) for name, shape, _ in header["tensors"]]
        if listed != [(n, tuple(p.shape)) for n, p in model.named_parameters()]:
            raise GolfError("its tensors are not those of the model that it describes")
        if count > 8 * len(blob) + SPARE_WEIGHTS:
            raise GolfError(f"claims {count} weights in {len(blob)} bytes")
        weights = unpack_weights(header, payload, 5 * count + 512 * RANS_CLASSES)
    except Exception as error:  # forged headers make numpy and torch raise a dozen kinds
        fault = ascii(f"{type(error).__name__}: {error}")[1:-1][:300]
        raise GolfError(f"the artifact is damaged or unfit for a setting ({fault})") from None
    ops = ops(cfg)
    with torch.device("meta"):
        model = LM(cfg, ops).to_empty(device=device)
    copy_all(list(model.parameters()), weights)
    return model

# ---- the search that fills the cap

SDCLIP_QMAX = 31  # strength is SDClip's step over std(row) at 6 bits
FINEST_STEP = 4 / SDCLIP_QMAX  # of SDClip: a finer one clips more than it refines
COARSEST_STEP = 64 / SDCLIP_QMAX
FILL_SLACK = 16_000  # bytes under the cap that end the search
FILL_ROUNDS = 7

def strengths(model, cfg):
    """The finest strength, the one at which Gaussian weights would fill the cap, the coarsest."""
    weights = sum(p.numel() for name, p in model.named_parameters() if route(name).bits)
    bits = 8 * (cfg.cap_bytes - len(code_bytes())) / weights
    step = math.sqrt(2 * math.pi * math.e) * 2 ** min(0.0, -bits)  # over std; has that entropy
    low, high = FINEST_STEP, COARSEST_STEP
    if cfg.grid == "rate":
        low, high = low / 16, 2 * high
    elif cfg.matrix_clip_sigmas:
        low = high = cfg.matrix_clip_sigmas / SDCLIP_QMAX
    return low, min(max(step, low), high), high

def fill_cap(model, cfg, calibration, run):
    """Find the finest steps whose total fits CAP_BYTES: (strength, {name: Quantized}, artifact).

    The size falls almost linearly with the logarithm of the strength: a round follows the line of
    the last two.  If none fits, the smallest is returned.  Only rank 0 has the artifact.
    """
    if cfg.grid == "rate":
        cfg = replace(cfg, matrix_bits=8) if calibration.rows else replace(cfg, grid="sdclip")
    matrices = prepare_matrices(model, cfg, calibration, run)
    mine = sum(m.log_step for m in matrices), sum(m.W.numel() for m in matrices)
    log_steps, counts = zip(*run.gather(mine))
    weights = sum(counts)
    # With GRID=rate the strength is the geometric mean of step / std(row) over the model.
    unit = math.exp(sum(log_steps) / weights)
    most = cfg.cap_bytes - len(code_bytes())
    low, strength, high = strengths(model, cfg)
    slope = -weights / 8  # bytes for an octave of strength
    sizes = {}
    best = None  # ((fits, minus the strength if it fits, else minus the size), ...)
    for _ in range(FILL_ROUNDS):
        mine = quantize(matrices, strength / unit)
        quantized = {name: q for part in run.gather(mine) for name, q in part.items()}
        if not sizes:
            error = {name: q.rel_error / q.Q.numel() for name, q in quantized.items()}
            floats = sorted(error, key=error.get, reverse=True)[:cfg.float_matrices]
        for name in floats:
            del quantized[name]
        blob = pack_artifact(model, cfg, quantized) if run.rank == 0 else None
        size = run.broadcast(len(blob) if blob else 0)
        run.log("fill_cap", grid=cfg.grid, strength=strength, model_bytes=size, most_bytes=most)
        fits = size <= most
        merit = fits, -strength if fits else -size
        if best is None or merit > best[0]:
            best = merit, strength, quantized, blob
        for other, other_size in sizes.items():
            if size != other_size:
                slope = min((size - other_size) / math.log2(strength / other), -1.0)
        sizes[strength] = size
        filled = fits and (most - size <= FILL_SLACK or strength <= low)
        octaves = (most - FILL_SLACK / 2 - size) / slope
        strength = min(max(strength * 2 ** min(max(octaves, -8.0), 8.0), low), high)
        if filled or strength in sizes:
            break
    return best[1:]

def export(model, cfg, calibration, run):
    """Quantize and pack the model, log what became of it; the artifact's bytes, on every rank."""
    strength, quantized, blob = fill_cap(model, cfg, calibration, run)
    for name, q in quantized.items():
        share = q.Q.view(torch.uint8).flatten().bincount().double() / q.Q.numel()
        entropy = float(torch.special.entr(share).sum()) * math.log2(math.e)
        run.log("gptq", name=name, bits=q.bits, rows=len(q.Q), columns=q.Q.shape[1],
                rel_err=f"{q.rel_error:.6f}", damp=f"{q.damp:g}", bits_per_weight=entropy)
    blob = run.broadcast(blob)
    stored = max(1, sum(q.Q.numel() for q in quantized.values()))
    run.log("quantized", matrices=len(quantized), bits_per_weight=f"{8 * len(blob) / stored:.4f}",
            strength=strength)
    return blob

def save_artifact(path, model, cfg, calibration=UNCALIBRATED):
    """Export the model to a file, whole or not at all; returns the bytes written."""
    blob = export(model, cfg, calibration, Run(device=next(model.parameters()).device))
    write_whole(path, lambda f: f.write(blob))
    return len(blob)

# --------------------------------------------------------------------------------------------------
# 10. Kernels
# --------------------------------------------------------------------------------------------------
# Faster versions of the operations of section 4 on CUDA; nothing here changes what the model
# computes.  fast_ops() picks them once; check_fast_path() compares the whole with the reference on
# the GPU in use before the clock starts.  Kernels are imported here only: the script must import on
# a machine without them.  Each is a torch.library operator, so that no graph breaks at it.

def fast_ops(cfg, run):
    """The Ops for this device by KERNEL; REFERENCE on the CPU.  Raises GolfError."""
    if not run.on_cuda or cfg.kernel == "reference":
        if cfg.kernel not in ("auto", "reference"):
            raise GolfError(f"KERNEL={cfg.kernel}: needs a CUDA GPU; use auto on the CPU")
        return REFERENCE
    # FlashQLA needs Hopper or later, and 1, 2, 4, ... heads of 128.
    heads = cfg.gdn_heads
    hopper_or_later = torch.cuda.get_device_capability(run.device)[0] >= 9
    fits_flashqla = cfg.gdn_head_dim == 128 and hopper_or_later and heads & (heads - 1) == 0
    unused = all(layer.kind != "gdn" for layer in parse_stack(cfg.stack))
    missing = []
    for name, load, fits in (("none", tuple, unused), ("flashqla", _flash_qla, fits_flashqla),
                             ("fla", _fla, True)):
        try:
            if cfg.kernel in ("auto", name) and fits:
                load()
                break
        except ImportError as error:
            missing.append(f"{name}: {error}")
    else:
        if "sample" in cfg.preset and cfg.kernel == "auto":
            return REFERENCE  # minutes at sample size; the log's kernel line says so
        raise GolfError(f"KERNEL={cfg.kernel}: no delta-rule kernel for GDN_HEADS={heads} "
                        f"GDN_HEAD_DIM={cfg.gdn_head_dim} "
                        f"({'; '.join(missing) or 'FlashQLA: Hopper, 1, 2, 4, ... heads of 128'}); "
                        "install fla-core (requirements.txt), or KERNEL=reference trains slowly")
    attention_name, attend = pick_attention()
    fused_mlp = fuses_mlp(cfg)
    return Ops(partial(fast_gdn, kernel=name), fast_mlp if fused_mlp else mlp, attend,
               torch.bfloat16,
               dict(gdn=name, attention=attention_name, mlp="own" if fused_mlp else "cublas"))

def operator(name, fake):
    """Decorator: a torch.library operator.   fake: the same call with the shapes of the results."""
    def wrap(function):
        made = torch.library.custom_op("gdn_swa::" + name, mutates_args=())(function)
        made.register_fake(fake)
        return made
    return wrap

tl = SimpleNamespace(constexpr="constexpr")  # for annotations; Triton's own once it is imported

@cache
def triton_kernel(function, **options):
    """`function` as a Triton kernel; Triton looks up its names, `tl` too, in this module."""
    global tl
    import triton
    import triton.language as tl
    return triton.jit(function, **options)

# ---- the delta rule: FlashQLA or flash-linear-attention

class _WideKeyTile:
    """FLA's gated backward kernel with a key tile of at least 128.

    Triton 3.4 to 3.7.0 compiles its 64-wide tile wrongly on Hopper (FLA issue 640); 128 is right,
    also for narrower heads, whose channels beyond K are masked.
    """

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        launch = self.kernel[grid]
        return lambda **arguments: launch(**{**arguments, "BK": max(arguments["BK"], 128)})

@cache
def _fla():
    """FLA's chunk forward and backward (private functions, so fla-core is pinned)."""
    from fla.ops.common import chunk_o
    from fla.ops.gated_delta_rule import chunk
    if not chunk_o.TRITON_ABOVE_3_7_1:
        chunk_o.chunk_bwd_kernel_dqkwg = _WideKeyTile(chunk_o.chunk_bwd_kernel_dqkwg)
        chunk_o.TRITON_ABOVE_3_7_1 = True  # lifts the guard that the wide tile makes needless
    return chunk.chunk_gated_delta_rule_fwd, chunk.chunk_gated_delta_rule_bwd

@cache
def _flash_qla():
    """FlashQLA's chunk forward, and a backward like FLA's that takes the forward's chunk states."""
    from flash_qla.ops.gated_delta_rule import chunk

    def backward(q, k, v, g, beta, A, scale, do, dht, h):
        dq, dk, dv, dg, dbeta, dstate = chunk.fused_gdr_bwd(
            q=q, k=k, v=v, a=A, g=g, b=beta, do=do, dht=dht, h=h, scale=scale)
        dg = chunk.chunk_local_cumsum(dg, chunk_size=GDN_CHUNK, reverse=True, zero_last_chunk=True)
        return dq, dk, dv, dbeta, dg, dstate
    return chunk.chunk_gated_delta_rule_fwd, backward

# ---- convolution, SiLU and l2 norm in one pass

CONV_ROWS = 128  # tokens that one program takes
# 1 / (1 + exp(-x)) in four instructions; Triton's exp and division take three times as many
SIGMOID = ("{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; "  # -log2(e)
           "add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }")

def conv_heads_kernel(x, weight, tail, q, k, v, dx, dw, T, STRIDE: tl.constexpr,
                      HEADS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
                      ROWS: tl.constexpr, BACKWARD: tl.constexpr, SIGMOID: tl.constexpr):
    """Triton's `conv_heads`, and its gradient (BACKWARD): a program takes rows of one head.

    It goes down the rows with the last four in registers, so that each is read once, and loads two
    rows ahead.  It begins three rows early, since four taps reach that far back.  The backward pass
    computes the forward again and ends three rows late, since a row's gradient comes from its own
    output and the three after it.  One launch for q, k and v: its programs hide each other's waits.
    """
    C: tl.constexpr = 3 * HEADS * K
    b = tl.program_id(1).to(tl.int64)
    role = tl.program_id(2) // HEADS  # q, k or v
    h = tl.program_id(2) % HEADS
    first = tl.program_id(0) * ROWS
    left = T - first  # rows from here to the end of the text
    rows = left.to(tl.uint32)  # as unsigned numbers, i < rows is 0 <= i < left
    c = tl.arange(0, BLOCK)
    real = c < K
    at = tl.program_id(2) * K
    taps = weight + 4 * (at + c)
    w0, w1 = tl.load(taps, real, 0.0), tl.load(taps + 1, real, 0.0)
    w2, w3 = tl.load(taps + 2, real, 0.0), tl.load(taps + 3, real, 0.0)
    x += (b * T + first) * STRIDE + at
    tail += (b * 3 + 3) * C + at  # row i < 0 of the text is 3 + i of the tail
    y = q  # the result, or with BACKWARD its gradient
    if role == 1:
        y = k
    if role == 2:
        y = v
    y += ((b * T + first) * HEADS + h) * K
    # Zeros of their own: names that begin as one value stay one value in Triton's loops.
    x1, x2 = tl.zeros_like(w0), tl.zeros_like(w0)
    x3 = tl.zeros_like(w0)
    ahead = tl.zeros([BLOCK], x.dtype.element_ty)
    beyond = tl.zeros([BLOCK], x.dtype.element_ty)
    if BACKWARD:
        dx += (b * T + first) * STRIDE + at
        dw += (b * tl.num_programs(0) + tl.program_id(0)) * 4 * C + at
        # d: gradients before the SiLU, of the rows before; s: sums, gradients of the weight
        d1, d2 = tl.zeros_like(w0), tl.zeros_like(w0)
        d3, s0 = tl.zeros_like(w0), tl.zeros_like(w0)
        s1, s2 = tl.zeros_like(w0), tl.zeros_like(w0)
        s3 = tl.zeros_like(w0)
        dy1 = tl.zeros([BLOCK], y.dtype.element_ty)
        dy2 = tl.zeros([BLOCK], y.dtype.element_ty)
    # The first two iterations only read ahead.
    for i in tl.range(-5, ROWS + 3 * BACKWARD, loop_unroll_factor=5):
        x0, ahead = ahead.to(tl.float32), beyond
        n = i + 2
        row = x + tl.minimum(n, left - 1) * STRIDE  # beyond the end: read, never used
        if (n < 0) & (first == 0):
            row = tail + n * C
        beyond = tl.load(row + c, real, 0.0)
        u = w0 * x3 + w1 * x2 + w2 * x1 + w3 * x0
        gate = tl.inline_asm_elementwise(SIGMOID, "=f,f", [u], tl.float32, True, 1)
        z = u * gate
        square = tl.sum(z * z, 0)
        unit = tl.where(role == 2, 1.0, tl.rsqrt(tl.maximum(square, 1e-12)))
        z *= unit
        if BACKWARD:
            d, dy1 = dy1.to(tl.float32), dy2
            dy2 = tl.load(y + n * HEADS * K + c, real & (n.to(tl.uint32) < rows), 0.0)
            along = tl.where((role < 2) & (square > 1e-12), tl.sum(d * z, 0), 0.0)
            d = (d - along * z) * unit
            d *= gate * (1.0 + u * (1.0 - gate))
            dx_row = w0 * d + w1 * d1 + w2 * d2 + w3 * d3
            tl.store(dx + (i - 3) * STRIDE + c, dx_row.to(dx.dtype.element_ty),
                     real & ((i - 3).to(tl.uint32) < rows))
            own = tl.where(i < ROWS, d, 0.0)
            s0, s1 = s0 + own * x3, s1 + own * x2
            s2, s3 = s2 + own * x1, s3 + own * x0
            d3, d2 = d2, d1
            d1 = d
        else:
            tl.store(y + i * HEADS * K + c, z.to(y.dtype.element_ty),
                     real & (i.to(tl.uint32) < rows))
        x3, x2 = x2, x1
        x1 = x0
    if BACKWARD:
        tl.store(dw + c, s0, real)
        tl.store(dw + C + c, s1, real)
        tl.store(dw + 2 * C + c, s2, real)
        tl.store(dw + 3 * C + c, s3, real)

def _launch_conv(proj, taps, tail, heads, dproj=None, dtaps=None):
    """q, k and v into `heads`; or, from their gradients there, those of proj and of the taps.

    The gradient of the taps is one (4, 3 H K) for each program.
    """
    B, T, stride = proj.shape
    H, K = heads[0].shape[2:]
    triton_kernel(conv_heads_kernel)[-(-T // CONV_ROWS), B, 3 * H](
        proj, taps, tail, *heads, dproj, dtaps, T, STRIDE=stride, HEADS=H, K=K,
        BLOCK=1 << (K - 1).bit_length(), ROWS=CONV_ROWS, BACKWARD=dproj is not None,
        SIGMOID=SIGMOID, num_warps=1)

# ---- gated norm in one pass

NORM_ROWS = 8  # heads of tokens that one program takes at once
NORM_TILES = 8  # how often: each program adds one row to the weight's gradient

def gated_norm_kernel(o, gate, weight, y, do, dgate, dweight, M, STRIDE: tl.constexpr,
                      HEADS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
                      ROWS: tl.constexpr, TILES: tl.constexpr, BACKWARD: tl.constexpr):
    """Triton's `gated_norm`, or with BACKWARD its gradients, the weight's as a row a program."""
    c = tl.arange(0, BLOCK)
    w = tl.load(weight + c, c < V, 0.0)
    dw = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        first = (tl.program_id(0) * TILES + tile) * ROWS
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        real = (row < M) & (c < V)
        at = row * V + c
        x = tl.load(o + at, real, 0.0).to(tl.float32)
        gate_at = row // HEADS * STRIDE + row % HEADS * V + c
        g = tl.load(gate + gate_at, real, 0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / V + 1e-6)[:, None]
        x *= r
        sigma = tl.sigmoid(g)
        if BACKWARD:
            d = tl.load(y + at, real, 0.0).to(tl.float32)
            dg = d * x * w * sigma * (1.0 + g * (1.0 - sigma))
            tl.store(dgate + gate_at, dg.to(dgate.dtype.element_ty), real)
            d *= g * sigma
            dw += tl.sum(d * x, 0)
            d *= w
            d = r * (d - x * (tl.sum(d * x, 1) / V)[:, None])
            tl.store(do + at, d.to(do.dtype.element_ty), real)
        else:
            tl.store(y + at, (x * w * g * sigma).to(y.dtype.element_ty), real)
    if BACKWARD:
        tl.store(dweight + tl.program_id(0) * V + c, dw, c < V)

def _launch_norm(o, proj, norm, y, do=None, dproj=None, dnorm=None):
    """The result into y; or, from its gradient there, those of o, of proj's gate and of the norm.

    The gradient of the norm is one row for each program.
    """
    H, V = o.shape[2:]
    M = o.shape[:3].numel()
    gate, dgate = [x if x is None else x[..., 3 * H * V:] for x in (proj, dproj)]
    triton_kernel(gated_norm_kernel)[-(-M // (NORM_ROWS * NORM_TILES)),](
        o, gate, norm, y, do, dgate, dnorm, M, STRIDE=proj.shape[-1], HEADS=H, V=V,
        BLOCK=1 << (V - 1).bit_length(), ROWS=NORM_ROWS, TILES=NORM_TILES,
        BACKWARD=do is not None, num_warps=1)

# ---- gates: log-decay and beta from their logits

GATE_ROWS = 64  # tokens that one program takes

def gates_kernel(logits, A_log, dt_bias, g, beta, dlogits, sums, M, STRIDE: tl.constexpr,
                 H: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                 ROWS: tl.constexpr, BACKWARD: tl.constexpr):
    """Triton's g and beta of `gdn`, or with BACKWARD the gradients of what they come from.

    Columns are those of proj from the logits on: a, b, and zeros up to WIDTH.
    """
    c = tl.arange(0, BLOCK)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    real = (row < M) & (c < WIDTH)
    is_a = c < H
    is_b = (c >= H) & (c < 2 * H)
    x = tl.load(logits + row * STRIDE + c, real, 0.0).to(tl.float32)
    a = x + tl.load(dt_bias + c, is_a, 0.0)
    rate = -tl.exp(tl.load(A_log + c, is_a, 0.0))
    soft = tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))  # softplus
    b = tl.sigmoid(x)
    g += row * H + c
    beta += row * H + c - H
    if BACKWARD:
        dg = rate * tl.load(g, real & is_a, 0.0)
        da = dg * tl.sigmoid(a)
        db = tl.load(beta, real & is_b, 0.0) * b * (1.0 - b)
        tl.store(dlogits + row * STRIDE + c, (da + db).to(dlogits.dtype.element_ty), real)
        sums += tl.program_id(0) * 2 * H + c
        tl.store(sums, tl.sum(dg * soft, 0), is_a)
        tl.store(sums + H, tl.sum(da, 0), is_a)
    else:
        tl.store(g, rate * soft, real & is_a)
        tl.store(beta, b, real & is_b)

def _launch_gates(proj, first, A_log, dt_bias, g, beta, dproj=None, sums=None):
    """g and beta; or, from their gradients, those of proj from column `first` and of the vectors.

    sums: the gradients of A_log and dt_bias, (2, H) for each program.
    """
    B, T, H = g.shape
    logits, dlogits = [x if x is None else x[..., first:] for x in (proj, dproj)]
    triton_kernel(gates_kernel)[-(-B * T // GATE_ROWS),](
        logits, A_log, dt_bias, g, beta, dlogits, sums, B * T, STRIDE=proj.shape[-1], H=H,
        WIDTH=logits.shape[-1], BLOCK=1 << (logits.shape[-1] - 1).bit_length(), ROWS=GATE_ROWS,
        BACKWARD=sums is not None)

# ---- Gated DeltaNet between its projections: one operator of these kernels

def fast_gdn(proj, taps, A_log, dt_bias, norm, tail, state, kernel="fla"):
    """`gdn` on CUDA."""
    if proj[0].numel() >= 2**31:  # the convolution's offsets inside one row are int32
        return gdn(proj, taps, A_log, dt_bias, norm, tail, state)
    if state is None:  # zeros: with one form of call there is one kernel to compile and tune
        K = len(norm)
        state = torch.zeros(len(proj), len(A_log), K, K, device=proj.device)
    return _gdn_forward(proj, taps, A_log, dt_bias, norm, tail, state, kernel,
                        torch.is_grad_enabled())[:2]

def _gdn_results(proj, taps, A_log, dt_bias, norm, tail, state, kernel, training):
    """Empty results of the operator: y, the new state, and what the backward pass takes.

    Those are q, k, v, o (B, T, H, K), running log-decay and beta (B, T, H), A (B, T, H, chunk) of
    the WY form, and with FlashQLA in training the state before each chunk (B, chunks, H, K, K).
    """
    B, T, _ = proj.shape
    H, K = state.shape[1:3]
    q, k, v, o = [proj.new_empty(B, T, H, K) for _ in range(4)]
    G, beta = [state.new_empty(B, T, H) for _ in range(2)]
    chunks = -(-T // GDN_CHUNK) if training and kernel == "flashqla" else 0
    return (proj.new_empty(B, T, H * K), torch.empty_like(state), q, k, v, o, G, beta,
            proj.new_empty(B, T, H, GDN_CHUNK), proj.new_empty(B, chunks, H, K, K))

@operator("gdn_forward", _gdn_results)
def _gdn_forward(proj: Tensor, taps: Tensor, A_log: Tensor, dt_bias: Tensor, norm: Tensor,
                 tail: Tensor, state: Tensor, kernel: str, training: bool
                 ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                            Tensor, Tensor]:
    """`_gdn_results`, computed."""
    proj, taps, tail, state = [x.contiguous() for x in (proj, taps, tail, state)]
    y, _, q, k, v, _, g, beta, _, h = _gdn_results(
        proj, taps, A_log, dt_bias, norm, tail, state, kernel, False)
    _launch_conv(proj, taps, tail, (q, k, v))
    _launch_gates(proj, 4 * y.shape[-1], A_log, dt_bias, g, beta)
    same = dict(q=q, k=k, v=v, g=g, beta=beta, scale=q.shape[-1] ** -0.5, initial_state=state,
                output_final_state=True)
    if kernel == "flashqla":
        G, A, o, kept, state, _ = _flash_qla()[0](**same, output_h=training, auto_cp=False)
        h = kept if training else h
    else:
        G, o, A, state, _, _ = _fla()[0](**same)
    o = o.contiguous()
    _launch_norm(o, proj, norm, y)
    return y, state, q, k, v, o, G, beta, A, h

def _gdn_gradients(proj, taps, A_log, dt_bias, norm, tail, state, *_):
    """Empty gradients of proj, taps, (A_log, dt_bias), norm and state.

    Those of parameters have a row for each program that adds to them, to be summed.
    """
    B, T, _ = proj.shape
    H = len(A_log)
    return (proj.new_empty(proj.shape), taps.new_empty(B * -(-T // CONV_ROWS), 4, len(taps)),
            A_log.new_empty(-(-B * T // GATE_ROWS), 2, H),
            norm.new_empty(-(-B * T * H // (NORM_ROWS * NORM_TILES)), len(norm)),
            state.new_empty(state.shape))

@operator("gdn_backward", _gdn_gradients)
def _gdn_backward(proj: Tensor, taps: Tensor, A_log: Tensor, dt_bias: Tensor, norm: Tensor,
                  tail: Tensor, state: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
                  G: Tensor, beta: Tensor, A: Tensor, h: Tensor, dy: Tensor, dstate: Tensor | None,
                  kernel: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_gdn_gradients`, computed."""
    proj, taps, tail, state, dy = [x.contiguous() for x in (proj, taps, tail, state, dy)]
    dproj, dtaps, sums, dnorm, _ = _gdn_gradients(proj, taps, A_log, dt_bias, norm, tail, state)
    do = torch.empty_like(o)
    _launch_norm(o, proj, norm, dy, do, dproj, dnorm)
    dstate = torch.zeros_like(state) if dstate is None else dstate.contiguous()
    same = dict(q=q, k=k, v=v, g=G, beta=beta, A=A, scale=q.shape[-1] ** -0.5, do=do, dht=dstate)
    if kernel == "flashqla":
        out = _flash_qla()[1](**same, h=h)
    else:
        out = _fla()[1](**same, initial_state=state)
    dq, dk, dv, dbeta, dg, dstate = [x.contiguous() for x in out[:6]]
    _launch_conv(proj, taps, tail, (dq, dk, dv), dproj, dtaps)
    _launch_gates(proj, 4 * dy.shape[-1], A_log, dt_bias, dg, dbeta, dproj, sums)
    return dproj, dtaps, sums, dnorm, dstate

def _gdn_save(ctx, inputs, output):
    *tensors, ctx.kernel, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)  # an unused final state then costs nothing

def _gdn_grad(ctx, dy, dstate, *_):
    if dy is None:
        dy = torch.zeros_like(ctx.saved_tensors[10]).flatten(2)
    dproj, dtaps, sums, dnorm, dstate = _gdn_backward(*ctx.saved_tensors, dy, dstate, ctx.kernel)
    dA_log, ddt_bias = sums.sum(0)  # here, not in the operator: compiled
    return dproj, dtaps.sum(0).mT, dA_log, ddt_bias, dnorm.sum(0), None, dstate, None, None

_gdn_forward.register_autograd(_gdn_grad, setup_context=_gdn_save)

# ---- MLP: products with the squared relu inside

# rows, columns and depth of a tile, warps, stages, tiles of a column that follow each other,
# whether a program takes many tiles
MLP_UP = (128, 256, 64, 8, 4, 1, True)
MLP_DOWN = (128, 128, 64, 4, 3, 8, False)

def fuses_mlp(cfg):
    """Whether the kernel below takes this MLP.

    It is written for Hopper: its tiles need Hopper's shared memory, its TMA loads rows of a
    multiple of 16 bytes (8 channels), its pipeline two steps of the depth or more.
    """
    width = int(cfg.mlp_mult * cfg.model_dim)
    return (cfg.mlp_act == "relu2" and torch.cuda.get_device_capability()[0] == 9
            and cfg.model_dim > MLP_UP[2] and width % 8 == 0)

def mlp_product(x, w, r2, out, M, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UP: tl.constexpr,
                GROUP: tl.constexpr, MANY: tl.constexpr):
    """Triton's matrix product with the squared relu (UP) or its gradient before the result.

    Tiles that run at one time lie in few rows of tiles: x is read from memory once, and the weight
    stays in the L2 cache.  The result is stored in two halves, which need fewer registers.
    """
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    half: tl.constexpr = COLUMNS // 2
    tiles = tl.cdiv(M, ROWS * GROUP) * GROUP * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=MANY):
        m = (tile // (GROUP * across) * GROUP + tile % GROUP) * ROWS
        n = tile // GROUP % across * COLUMNS
        y = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, K, DEPTH):  # beyond the edges descriptors read zeros, write nothing
            y = tl.dot(x.load([m, k]), w.load([n, k]).T if UP else w.load([k, n]), y)
        a, b = tl.split(tl.permute(tl.reshape(y, [ROWS, 2, half]), [0, 2, 1]))
        if UP:
            a = tl.maximum(a, 0.0)
            out.store([m, n], (a * a).to(out.dtype))
            b = tl.maximum(b, 0.0)
            out.store([m, n + half], (b * b).to(out.dtype))
        else:
            a *= 2.0 * tl.sqrt(r2.load([m, n]).to(tl.float32))
            out.store([m, n], a.to(out.dtype))
            b *= 2.0 * tl.sqrt(r2.load([m, n + half]).to(tl.float32))
            out.store([m, n + half], b.to(out.dtype))

@operator("mlp_product", lambda x, w, r2: x.new_empty(len(x), w.shape[0 if r2 is None else 1]))
def _mlp_product(x: Tensor, w: Tensor, r2: Tensor | None) -> Tensor:
    """relu(x w^T)^2 (M, N) of x (M, K), w (N, K); given r2, x w 2 sqrt(r2) with w (K, N)."""
    from triton.tools.tensor_descriptor import TensorDescriptor
    tiled = TensorDescriptor.from_tensor
    up = r2 is None
    rows, columns, depth, warps, stages, group, many = MLP_UP if up else MLP_DOWN
    x, w = x.contiguous(), w.contiguous()
    M, K = x.shape
    N = w.shape[0 if up else 1]
    out = x.new_empty(M, N)
    programs = -(-M // (rows * group)) * group * -(-N // columns)
    if many:
        programs = min(programs, torch.cuda.get_device_properties(x.device).multi_processor_count)
    half = [rows, columns // 2]
    # one kernel for every number of tokens
    triton_kernel(mlp_product, do_not_specialize=("M",))[programs,](
        tiled(x, [rows, depth]), tiled(w, [columns, depth] if up else [depth, columns]),
        tiled(out if up else r2.contiguous(), half), tiled(out, half), M, N, K, rows, columns,
        depth, up, group, many, num_warps=warps, num_stages=stages)
    return out

@operator("mlp_forward", lambda x, up, down: (
    x.new_empty(x.shape), x.new_empty(len(x), len(up))))
def _mlp_forward(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """r2 down^T (M, D), and r2 = relu(x up^T)^2: all that is kept, since its root is the relu."""
    r2 = _mlp_product(x, up, None)
    return F.linear(r2, down), r2

def _mlp_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)

def _mlp_grad(ctx, dy, _):
    x, up, down, r2 = ctx.saved_tensors
    dh = _mlp_product(dy, down, r2)
    return dh @ up, dh.mT @ x, dy.mT @ r2

_mlp_forward.register_autograd(_mlp_grad, setup_context=_mlp_save)

def fast_mlp(x, up, down, scale, slope):
    """`mlp` on Hopper, for slope 0."""
    if OBSERVERS:  # they see the products of `linear` only
        return mlp(x, up, down, scale, slope)
    down = down * scale.unsqueeze(-1)
    y, _ = _mlp_forward(x.flatten(0, -2), up.to(x.dtype), down.to(x.dtype))
    return y.view_as(x)

# ---- attention: flash-attn if installed, else torch's FlexAttention and FlashAttention

def pick_attention():
    """(name, function) of the attention kernel."""
    for name in ("flash_attn_interface", "flash_attn"):  # FlashAttention 3, 2
        with suppress(ImportError):
            flash = getattr(__import__(name), "flash_attn_func", None)
            if flash:  # flash-attn-4 leaves an empty package of the second name
                return name, partial(flash_attention, flash)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.attention.varlen import varlen_attn
    return "flex", partial(torch_attention, varlen_attn, flex_attention, create_block_mask)

def flash_attention(flash, q, k, v, window):
    """`attention` by the flash-attn package."""
    o = flash(q, k, v, causal=True, window_size=(window - 1, 0))
    return o[0] if isinstance(o, tuple) else o  # some releases return the log-sum-exp too

def torch_attention(varlen, flex, block_mask, q, k, v, window):
    """`attention` by FlexAttention inside a compiled graph, else by variable-length attention."""
    B, T = q.shape[:2]
    S = k.shape[1]
    if T == S and torch.compiler.is_compiling():
        mask = block_mask(lambda b, h, i, j: (j <= i) & (j > i - window), None, None, T, T,
                          device=q.device)
        q, k, v = [x.transpose(1, 2) for x in (q, k, v)]
        return flex(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)
    # torch 2.12 and later want grouped heads announced; 2.11 takes them without
    options = {"enable_gqa": True} if "enable_gqa" in (varlen.__kwdefaults__ or {}) else {}
    cu_q = torch.arange(0, (B + 1) * T, T, device=q.device, dtype=torch.int32)
    cu_k = torch.arange(0, (B + 1) * S, S, device=q.device, dtype=torch.int32)
    o = varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_q, cu_k, T, S,
               window_size=(window - 1, 0), **options)
    return o.unflatten(0, (B, T))

# --------------------------------------------------------------------------------------------------
# 11. main
# --------------------------------------------------------------------------------------------------
# Data, train, export, reload from the file alone, evaluate, report.  Every final number comes from
# the reloaded model; FINAL_SCORE, set beforehand, names the one that counts.  The seconds of an
# evaluation begin with the reload; compiling, on synthetic text, comes before them.

FINAL_EVENTS = {"roundtrip": "final_int6_roundtrip", "exact": "final_int6_exact",
                "sliding": "final_int6_sliding_window", "ttt": "final_int6_ttt"}
CAP_BYTES, LIMIT_S = 16_000_000, 600.0  # the challenge's, whatever the settings say

@cache
def code_bytes():
    """This script as it was at the start: its bytes count toward the cap."""
    return Path(__file__).read_bytes()

def commit():
    """The git commit of this script, -dirty if the file differs from it; unknown without git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], stderr=subprocess.DEVNULL)
        changed = subprocess.call([*git, "diff", "--quiet", "HEAD", "--", "train_gpt.py"])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head[:12].decode() + ("-dirty" if changed else "")

def start_log(cfg, run):
    """Begin the run's log, or go on with it; another run's files are never overwritten."""
    path = Path(cfg.out_dir) / f"{cfg.run_id}.txt"
    changed = {f.name: plain(getattr(cfg, f.name)) for f in fields(cfg)
               if getattr(cfg, f.name) != f.default}

    def begin():
        if cfg.resume and path.exists():
            text = path.read_text("utf-8", "replace")
            if "\ncompliance " in text:
                raise GolfError(f"RUN_ID={cfg.run_id}: this run has ended, its score is in "
                                f"{path}; set another RUN_ID")
            then = dict(re.findall(r"(\w+):(\S+)", "".join(re.findall("\nsettings.*", text)[-1:])))
            differing = [name.upper() for name in fields_of("export", "evaluation",
                         "test-time training") if then.get(name) != changed.get(name)]
            if differing and re.search("^(final_|ttt )", text, re.M):
                raise GolfError(f"{', '.join(differing)}: must stay as they were, because "
                                f"{path} holds a score by them")
            return
        others = () if cfg.resume == "auto" else (checkpoint_path(cfg),)
        for file in (path, path.with_suffix(".artifact"), *others):
            if file.exists() and not (cfg.artifact and file != path):
                raise GolfError(f"RUN_ID={cfg.run_id}: {file} exists; set another RUN_ID, move "
                                "that run away, or go on with it by RESUME=auto")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    run.from_rank_0(begin)
    run.log_path = path
    code = code_bytes()
    gpu = torch.cuda.get_device_name(run.device).replace(" ", "_") if run.on_cuda else "none"
    run.log("run", preset=cfg.preset, seed=cfg.seed, world_size=run.world_size, gpu=gpu,
            torch=torch.__version__, commit=commit(), code_bytes=len(code),
            code_sha256=hashlib.sha256(code).hexdigest(),
            max_wallclock_seconds=f"{cfg.max_wallclock_seconds:g}",
            date=time.strftime("%Y-%m-%d", time.gmtime()))
    run.log("settings", **changed)

def make_artifact(data, cfg, run):
    """Train, calibrate and export, or what a resumed run still lacks: (train_s, artifact)."""
    cfg = settle_batch(cfg, run)
    saved = run.from_rank_0(lambda: find_checkpoint(cfg, data)) if cfg.resume else None
    ops = fast_ops(cfg, run)
    micro_batch_rows(cfg, run, ops)  # raises before anything is written
    try:  # would fail after training only
        codec = cfg.compressor.replace("rans", "brotli")
        decompress(compress(b"works", codec), codec, 5)
    except Exception as error:  # a package is missing, damaged or too old
        raise GolfError(f"COMPRESSOR={cfg.compressor}: {error}; see requirements.txt") from None
    model = init_weights(LM(cfg, ops), cfg.seed).to(run.device)
    weights = sum(p.numel() for p in model.parameters())
    room = cfg.cap_bytes - len(code_bytes())
    if room <= 0 or weights > 8 * room + SPARE_WEIGHTS:
        raise GolfError(f"CAP_BYTES={cfg.cap_bytes}: less the script's {len(code_bytes())} "
                        f"bytes, too few for {weights} weights")
    start_log(cfg, run)
    if saved:
        run.before_s = saved[1]["elapsed_s"]
        run.log("resume", checkpoint=cfg.resume, step=saved[1]["step"],
                trained=int(saved[1]["trained"]), train_time=f"{1000 * run.before_s:.0f}ms")
    run.log("model", parameters=weights, train_tokens=sum(map(len, data.train)),
            val_tokens=len(data.val))
    train_s, calibration = train(model, data, cfg, run, saved)
    timed_evaluation("pre_quantization_post_ema", model, data, "roundtrip", run)
    began = time.perf_counter()
    blob = export(model, cfg, calibration, run)
    run.log("artifact", model_bytes=len(blob), code_bytes=len(code_bytes()),
            cap_bytes=cfg.cap_bytes, export_time=f"{1000 * (time.perf_counter() - began):.0f}ms",
            peak_mem_mib=run.peak_memory_mib())
    return train_s, blob

def timed_evaluation(event, model, data, method, run, adapter=None, **facts):
    """Evaluate by `method`, print the event's line: the Ledger and the seconds it took."""
    run.synchronize()
    run.peak_memory_mib()  # begin anew
    began = adapter.began if adapter else time.perf_counter()
    ledger = evaluate(model, data.val, data.table, method, adapter, run, probing=True)
    seconds = run.broadcast(time.perf_counter() - began)
    if adapter:
        facts["epochs"] = f"{adapter.epochs_done / max(1, adapter.calls):g}"
    run.log(event, **ledger.as_log(), eval_time=f"{1000 * seconds:.0f}ms", **facts,
            peak_mem_mib=run.peak_memory_mib())
    return ledger, seconds

def warm_up_evaluation(model, method, num_targets, table, run):
    """Compile and tune what `method` will run, on synthetic text in the shapes to come."""
    cfg = model.cfg
    # TTT trains twice, to record a graph; windows come in batches of one shape.
    sizes = {"ttt": (1 + 2 * cfg.ttt_phase_chunks) * cfg.ttt_chunk_tokens, "exact": num_targets}
    size = min(num_targets, sizes.get(method, cfg.eval_batch_tokens * run.world_size))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, size + 1).astype(np.uint16)
    table = table._replace(sidecar=None)
    adapter = Adapter(model, num_targets, run) if method == "ttt" else None
    run.log("warm_up", compile=int(COMPILING[0]), evaluation=method)
    run.quiet = True
    evaluate(model, tokens, table, cfg.ttt_scoring if adapter else method, adapter, run, True)
    run.quiet = False
    if adapter:
        adapter.close()

def evaluate_artifact(blob, data, cfg, run):
    """Reload the artifact from its bytes and score it: (model, Ledger, seconds, in_order)."""
    began = time.perf_counter()
    model = load_artifact(blob, partial(fast_ops, run=run), run.device, cfg)
    before = fingerprint(model)
    reload_s = time.perf_counter() - began
    run.log("reload", artifact_bytes=len(blob), load_time=f"{1000 * reload_s:.0f}ms",
            val_sha256=hashlib.sha256(data.val.tobytes()).hexdigest())
    cfg = model.cfg
    methods = [m for m in FINAL_EVENTS if m == cfg.final_score or cfg.eval_diagnostics]
    total = len(data.val) - 1
    results = {}
    in_order = True
    # Forward passes over the text on one rank; for ttt at most, since ranks share its training.
    passes = dict.fromkeys(methods, 1 / run.world_size)
    passes |= {"sliding": cfg.train_seq_len / cfg.eval_stride / run.world_size,
               "ttt": 1 + 3 * cfg.ttt_epochs}
    for method in methods:
        with compiling(compiles(model, total * passes[method])):
            if run.on_cuda:
                warm_up_evaluation(model, method, total, data.table, run)
            adapter = Adapter(model, total, run) if method == "ttt" else None
            results[method] = timed_evaluation(
                FINAL_EVENTS[method], model, data, cfg.ttt_scoring if adapter else method, run,
                adapter, bits=cfg.matrix_bits)
        if adapter:
            adapter.close()
            in_order &= adapter.in_order
    in_order &= fingerprint(model) == before
    ledger, seconds = results[cfg.final_score]
    run.log("final", method=cfg.final_score, **ledger.as_log())
    return model, ledger, seconds + reload_s, in_order

def report(outcome, artifact_bytes, train_s, file, data, run):
    """Print sizes, the compliance line and a summary; whether all checks of this run hold.

    outcome: of evaluate_artifact.   train_s: None without training.   file: the artifact's.
    """
    model, ledger, eval_s, in_order = outcome
    cfg = model.cfg
    beside = [path for path in Path(__file__).parent.glob("*.py") if path.stem in sys.modules]
    helpers = sum(path.stat().st_size for path in beside if path.name != Path(__file__).name)
    total = len(code_bytes()) + helpers + artifact_bytes
    coder = f"int{cfg.matrix_bits}+{cfg.compressor}"
    run.write(f"Serialized model {coder}: {artifact_bytes} bytes")
    run.write(f"Total submission size {coder}: {total} bytes")
    wall_s = run.before_s + run.fetched[-1] - run.fetched[0] if run.fetched else 0.0
    checks = dict(
        causal=ledger.causal <= 1e-5,
        normalized=ledger.normalized <= (3e-3 if model.ops.dtype else 1e-5),  # bfloat16 rounds
        score_first=in_order, coverage=ledger.tokens == len(data.val) - 1,
        bytes=ledger.bytes == int(target_bytes(data.table, data.val).sum()),  # see open_data
        clock=wall_s <= 1.01 * (train_s or 0.0) + 1.0,
        train=not (train_s and 0 < cfg.max_wallclock_seconds < train_s),
        eval=eval_s <= cfg.eval_budget_seconds, size=total <= cfg.cap_bytes)
    holds = all(run.gather(all(checks.values())))
    clock_s = (cfg.max_wallclock_seconds or train_s) if train_s else 0.0
    looser = cfg.cap_bytes > CAP_BYTES or max(clock_s, cfg.eval_budget_seconds) > LIMIT_S
    passed = "other_limits" if looser else "ok"
    passed = "holdout" if cfg.holdout_tokens else passed
    verdict = passed if holds else "fail"
    trained = f"{train_s:.1f}" if train_s else "-"
    run.log("compliance", train_s=trained, eval_s=f"{eval_s:.1f}", total_bytes=total,
            cap_bytes=cfg.cap_bytes, bytes_per_token=f"{ledger.bytes / ledger.tokens:.5f}",
            tokens_scored=ledger.tokens, probes=ledger.probes, wall_s=f"{wall_s:.1f}",
            **{name: ("fail", "ok")[held] for name, held in checks.items()}, verdict=verdict)
    run.write(f"\nscore    {ledger.bpb:.4f} bits per byte, verdict {verdict}\n"
              f"bytes    {total:,} of {cfg.cap_bytes:,}\n"
              f"seconds  {trained} training, {eval_s:.1f} evaluation\n"
              f"files    {run.log_path} {file}\n"
              f"next     python logs/tools/report.py {run.log_path} --html page.html", to_log=False)
    return holds

def main(env):
    """The whole run that the environment variables in `env` describe; returns the exit code."""
    cfg = Config.from_env(env)
    run = Run.from_env(env, cfg)
    data = open_data(cfg)
    if not cfg.run_id:
        now = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        presets = cfg.preset.replace(" ", "").replace(",", "-")
        cfg = replace(cfg, run_id=run.broadcast(f"{now}_{presets}_seed{cfg.seed}"))
    train_s, file = None, cfg.artifact
    if file:
        blob, _, _ = read_artifact(file, cfg)
        start_log(cfg, run)
    else:
        train_s, blob = make_artifact(data, cfg, run)
        file = run.log_path.with_suffix(".artifact")
        run.from_rank_0(lambda: write_whole(file, lambda f: f.write(blob)))
    outcome = evaluate_artifact(blob, data, cfg, run)
    return 0 if report(outcome, len(blob), train_s, file, data, run) else 1

def entry():
    """Run `main` on the process's environment; a fault that the user can mend ends in one line."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP, nohup ignores it
        if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, STOP.handle)
    try:
        if sys.argv[1:] in (["--help"], ["-h"]):
            print(help_text(), flush=True)
            return 0
        if sys.argv[1:]:
            raise GolfError(f"{' '.join(sys.argv[1:])}: no argument but --help; settings are "
                            "environment variables")
        from torch.distributed.elastic.multiprocessing.errors import record
        return record(main)(os.environ)  # torchrun's summary shows its errors
    except (GolfError, OSError, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = f"{str(error).split('. ')[0]}; lower MICRO_BATCH_TOKENS or EVAL_BATCH_TOKENS"
        told_once = isinstance(error, (GolfError, KeyboardInterrupt))
        if os.environ.get("LOCAL_RANK", "0") == "0" or not told_once:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 130 if isinstance(error, KeyboardInterrupt) else 2

if __name__ == "__main__":
    code = entry()
    # Leave without shutting Python down: there a C++ thread of torch.distributed can abort.
    os._exit(code)
