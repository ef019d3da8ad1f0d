"""Train, compress and score a GDN/SWA hybrid language model for OpenAI's Parameter Golf challenge.

Gated DeltaNet layers [1] (linear time, a recurrent state) with a few sliding-window attention layers,
Muon [2] + AdamW, quantized weights in one file of at most 16,000,000 bytes (this script included), scored in
bits per byte on every token of the validation split, exactly once. README.md has results and their logs.

Run:  torchrun --standalone --nproc_per_node=8 train_gpt.py          8 GPUs, the record run
      python train_gpt.py                                            1 GPU
      PRESET=sample python train_gpt.py                              any machine, minutes on 2 CPU cores
      python train_gpt.py --help                                     every setting (environment variables)

Read in this order: Config, main(), LM.forward(), evaluate().

Legality.  Causal: LM.forward looks left only (windowed_attention, short_convolution, gated_delta_rule).
Normalised: token_nll is a cross entropy over the whole vocabulary.  Score before update: evaluate() hands
`adapt` only tokens that its Ledger holds.  Once, left to right: Ledger.add refuses gaps and repeats.

Shapes: B sequences, T tokens, D model width, H heads, Hk key/value heads, HV GDN value heads, K and V widths
of a key and of a value, S keys (carried + new), N states, R x C rows (outputs) and columns of a weight.

[1] Yang, Kautz, Hatamizadeh: Gated Delta Networks, arXiv:2412.06464.   [2] Jordan et al.: Muon, 2024.
[3] Su et al.: RoFormer, arXiv:2104.09864.   [4] Yang et al.: Parallelizing Linear Transformers with the
Delta Rule over Sequence Length, arXiv:2406.06484.   [5] SentencePiece: Kudo, Richardson, arXiv:1808.06226.
[6] CaseOps, parameter-golf #1729: capitals as symbols, bytes per token of the original text in a sidecar.
"""

import difflib
import hashlib
import importlib.util
import json
import lzma
import math
import os
import re
import shutil
import signal
import struct
import sys
import time
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from functools import cache, partial, reduce, wraps
from itertools import accumulate, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class GolfError(Exception):
    """A fault that the user can mend: its message says what was found, what was expected, what to change."""


class SettingError(GolfError, ValueError):
    """A setting has a bad value, an unknown name, or contradicts another."""


class DataError(GolfError, ValueError):
    """A shard or the tokenizer is missing, damaged, or does not fit the settings."""


class ArtifactError(GolfError, ValueError):
    """An artifact file is truncated, altered, foreign, or of a newer version."""


class FileError(GolfError, RuntimeError):
    """A file of the run cannot be written, or what it holds is not what this script wrote."""


class ScoreError(GolfError, RuntimeError):
    """Targets would be scored twice, out of order or not at all, or a score is no number."""


class RankError(GolfError, RuntimeError):
    """Another rank died or stays away."""


class KernelError(GolfError, RuntimeError):
    """A kernel is missing, or its results differ from the reference."""


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C or SIGTERM; no `except Exception` on its way may swallow it."""


# ----------------------------------------------------------------------------------------------------
# 1. Config
# ----------------------------------------------------------------------------------------------------
# Every setting is one field, set by the environment variable of its upper-case name.  The defaults are
# the record; PRESET replaces some of them; what the user sets wins.  Values are checked here, once.


class Rule(NamedTuple):
    """A check on one value: `text` is what the error message says must hold."""
    text: str
    holds: object


def at_least(low):
    """Rule: the value is low or more."""
    return Rule(f"at least {low}", lambda v: v >= low)


def between(low, high):
    """Rule: low <= value <= high."""
    return Rule(f"between {low} and {high}", lambda v: low <= v <= high)


def one_of(*names):
    """Rule: the value is one of the names."""
    return Rule("one of " + ", ".join(names), lambda v: v in names)


def multiple_of(n):
    """Rule: the value is a positive multiple of n."""
    return Rule(f"a positive multiple of {n}", lambda v: v > 0 and v % n == 0)


OPTIONAL_BITS = Rule("0 or between 2 and 8", lambda v: v == 0 or 2 <= v <= 8)


def knob(default, help, rule=None, **group):
    """A Config field with its help text (units in brackets) and its rule."""
    return field(default=default, metadata={"help": help, "rule": rule} | group)


def group(title, default, help, rule=None):
    """Like `knob`, and the first of a new group in --help and in the log."""
    return knob(default, help, rule, group=title)


MOST_NUMBER, MOST_WIDTH = 1e38, 1 << 20  # of any setting, of a matrix: beyond, numbers and sizes overflow
ROLES = ("embed", "gate", "mlp", "mixer", "control")  # of the parameters, in ROUTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Every setting of a run.  Build it with `Config.from_env`; fields marked in MODEL_FIELDS go into the artifact."""
    preset: str = group("run", "record", "comma list of presets, later wins: record, pr1749, pr1698, pr456, sample")
    run_id: str = knob("", "name of the run's files; empty = UTC time, preset and seed",
                       Rule("letters, digits, '.', '_' and '-' alone", lambda v: re.fullmatch(r"[\w.-]*", v)))
    seed: int = knob(1337, "seed of the weights and of the data order", at_least(0))
    out_dir: str = knob("logs", "folder of the run's log, artifact and checkpoints")
    resume: str = knob("", "auto: go on with run RUN_ID, or begin it if it has no checkpoint; or a checkpoint's path")
    checkpoint_every_seconds: float = knob(0.0, "seconds between checkpoints, on the training clock; 0 = none but the "
                                           "trained weights [s]", at_least(0))
    max_bad_steps: int = knob(10, "steps with a gradient that is not finite that are skipped before the run stops",
                              at_least(0))
    deterministic: bool = knob(False, "1: two runs give the same numbers; needs MAX_WALLCLOCK_SECONDS=0")
    rank_timeout_seconds: float = knob(900.0, "how long ranks wait for one that says nothing [s]", between(1, 1000000))
    device: str = knob("auto", "auto takes CUDA if there is one", one_of("auto", "cuda", "cpu"))
    plan: bool = knob(False, "1: print parameters, bytes, memory and steps, then exit")
    eval_only: bool = knob(False, "1: evaluate ARTIFACT in this process instead of training")
    artifact: str = knob("", "artifact file that EVAL_ONLY or PROMPT reads")
    prompt: str = knob("", "with ARTIFACT: print a continuation of this text instead of scoring")
    prompt_tokens: int = knob(100, "length of that continuation [tokens]", at_least(1))
    prompt_temperature: float = knob(0.7, "sampling temperature of that continuation; 0 = greedy",
                                    Rule("0 or at least 0.01", lambda v: v == 0 or v >= 0.01))

    data_path: str = group("data", "./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin")
    tokenizer_path: str = knob("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model file")
    vocab_size: int = knob(1024, "vocabulary of the tokenizer and the model", between(2, 65536))
    holdout_tokens: int = knob(0, "score the last N training tokens, left out of training, instead of the "
                               "validation split: for choosing settings [tokens]", at_least(0))

    stack: str = group("model", "gdn*5 swa:a gdn*5 swa:a", "layers in order: gdn, swa (window SWA_WINDOW) or attn "
                       "(window TRAIN_SEQ_LEN); *n repeats; layers with one :tag share one mixer")
    model_dim: int = knob(512, "residual width D", multiple_of(8))
    num_heads: int = knob(8, "attention query heads", at_least(1))
    num_kv_heads: int = knob(4, "attention key/value heads", at_least(1))
    swa_window: int = knob(512, "keys that a query sees, itself included [tokens]", at_least(1))
    rope_base: float = knob(10000.0, "rotary base", at_least(2))
    rope_dims: int = knob(0, "rotated channels of each head; 0 = all", at_least(0))
    qk_gain_init: float = knob(5.0, "initial gain of each query head after its norm")
    gdn_heads: int = knob(4, "GDN query/key heads", at_least(1))
    gdn_v_heads: int = knob(0, "GDN value heads, a multiple of GDN_HEADS; 0 = GDN_HEADS", at_least(0))
    gdn_head_dim: int = knob(128, "width K = V of a GDN head", multiple_of(8))
    gdn_conv: int = knob(4, "taps of the short convolution on q, k, v [tokens]", between(1, 16))
    kv_share: int = knob(1, "neighbours of one kind that share key and value projections and convolutions; 1 = none",
                         at_least(1))
    gdn_neg_eigval: bool = knob(False, "1: beta in (0, 2), so that the state may also reflect")
    mlp_mult: float = knob(4.0, "MLP width over D", at_least(0.25))
    mlp_act: str = knob("relu2", "MLP activation; leaky_relu2 has slope 0.5 below zero", one_of("relu2", "leaky_relu2"))
    share_mlp: bool = knob(False, "1: layers of one tag share their MLP too")
    unique_layers: int = knob(0, "depth recurrence: layer i runs the matrices of layer i mod N; 0 = each its own",
                              at_least(0))
    unet: bool = knob(False, "1: U-Net skips, the first half of the layers added to the second with learned weights")
    xsa_layers: int = knob(0, "last attention layers whose output loses its component along the token's own value",
                           at_least(0))
    ngram_buckets: int = knob(0, "rows of the hashed bigram/trigram table; 0 = none", between(0, 1 << 24))
    ngram_dim: int = knob(112, "columns of that table", at_least(1))
    ngram_order: int = knob(3, "3: trigrams too, in the same table", between(2, 3))
    smear: bool = knob(True, "1: SmearGate, a learned mix of each embedding with the one before it")
    bos_id: int = knob(1, "token that begins a document; n-grams and SmearGate stop there; -1 = none", at_least(-1))
    logit_softcap: float = knob(30.0, "logits are c tanh(x / c)", at_least(1))
    tied_embed_init_std: float = knob(0.005, "standard deviation of the initial token embedding", at_least(0))

    train_seq_len: int = group("training", 2048, "length of a training row and of a window [tokens]", multiple_of(64))
    train_batch_tokens: int = knob(0, "tokens of one step, over all ranks; 0 = 131072 a rank, together 786432 or so",
                                   Rule("0 or at least 64", lambda v: v == 0 or v >= 64))
    micro_batch_tokens: int = knob(0, "most tokens of one forward pass on one rank; 0 = by memory", at_least(0))
    iterations: int = knob(20000, "most training steps", at_least(0))
    max_wallclock_seconds: float = knob(600.0, "training clock; 0 = no limit [s]", at_least(0))
    warmup_steps: int = knob(3, "throw-away steps on synthetic tokens before the clock starts", at_least(0))
    warmdown_frac: float = knob(0.6, "last part of the run in which the learning rate falls", between(0, 1))
    min_lr: float = knob(0.1, "learning rate at the end, as a part of the full one", between(0, 1))
    matrix_lr: float = knob(0.025, "Muon learning rate", at_least(0))
    tied_embed_lr: float = knob(0.035, "AdamW learning rate of embedding and n-gram tables", at_least(0))
    scalar_lr: float = knob(0.025, "AdamW learning rate of vectors", at_least(0))
    muon_momentum: float = knob(0.97, "Muon momentum", between(0, 0.9999))
    muon_momentum_warmup_start: float = knob(0.92, "Muon momentum at step 0", between(0, 0.9999))
    muon_momentum_warmup_steps: int = knob(1500, "steps to the full momentum", at_least(0))
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", between(1, 20))
    muon_weight_decay: float = knob(0.1, "decoupled weight decay of matrices", at_least(0))
    adam_weight_decay: float = knob(0.04, "decoupled weight decay of embedding and n-gram tables", at_least(0))
    beta1: float = knob(0.9, "AdamW first-moment decay", between(0, 0.9999))
    beta2: float = knob(0.95, "AdamW second-moment decay", between(0, 0.99999))
    grad_clip_norm: float = knob(0.3, "global gradient norm, clipped after the reduction; 0 = off", at_least(0))
    ema_decay: float = knob(0.997, "decay of the averaged weights, warmed up as (1+t)/(10+t); 0 = off",
                            between(0, 0.99999))
    average_every: int = knob(0, "in the warm-down, average the weights of every Nth step instead of EMA; 0 = EMA",
                              at_least(0))
    qat_frac: float = knob(0.0, "last part of the run that sees weights rounded as in the export (straight-through)",
                           between(0, 1))
    val_loss_every: int = knob(1000, "steps between validations, clock stopped; 0 = none", at_least(0))
    train_log_every: int = knob(50, "steps between progress lines (one at least every 10 s)", at_least(1))

    kernel: str = group("kernels", "auto", "gated delta rule", one_of("auto", "flashqla", "fla", "reference"))
    attn_kernel: str = knob("auto", "windowed attention", one_of("auto", "flash_attn", "varlen", "flex", "sdpa"))
    compile: str = knob("auto", "torch.compile; auto = on CUDA, evaluation if it is long", one_of("auto", "0", "1"))

    grid: str = group("export", "rate", "steps of the integers: rate = by their effect on the loss, for equal gain per "
                      "byte (needs GPTQ_ENABLED); sdclip = by the row's standard deviation", one_of("rate", "sdclip"))
    matrix_bits: int = knob(6, "bits of a matrix weight; this and the other bits and clips are for GRID=sdclip",
                            between(2, 8))
    mlp_bits: int = knob(0, "bits of an MLP weight; 0 = MATRIX_BITS", OPTIONAL_BITS)
    embed_bits: int = knob(8, "bits of a token embedding, n-gram table or gate projection weight", between(2, 8))
    sandwich_bits: int = knob(0, "least bits of the matrices of the last block; 0 = as the others", OPTIONAL_BITS)
    frequent_rows: int = knob(0, "embedding rows of the most frequent tokens stored at 8 bits", at_least(0))
    float_matrices: int = knob(0, "matrices of the largest Hessian-weighted error per weight kept as float16",
                               at_least(0))
    control_bits: int = knob(0, "8: control tensors of more than 64 values as int8; 0: float16",
                             Rule("0 or 8", lambda v: v in (0, 8)))
    matrix_clip_sigmas: float = knob(0.0, "row clip of matrices [standard deviations of the row]; 0 = the least that "
                                     "fits CAP_BYTES", Rule("0 or at least 1", lambda v: v == 0 or v >= 1))
    embed_clip_sigmas: float = knob(20.0, "row clip of embedding tables and gate projections [likewise]", at_least(1))
    gptq_enabled: bool = knob(True, "1: round by GPTQ, with Hessians from training text; 0: round to nearest")
    gptq_calibration: str = knob("train", "text of the Hessians: training rows, or drawn from the model itself",
                                 one_of("train", "self"))
    gptq_calibration_batches: int = knob(64, "batches of 8 rows of TRAIN_SEQ_LEN for the Hessians", at_least(1))
    gptq_reserve_seconds: float = knob(4.0, "part of the training clock kept for the Hessians [s]", at_least(0))
    gptq_token_power: float = knob(0.0, "tokens count in the Hessians by their frequency to minus this power",
                                   between(0, 1))
    gptq_order: bool = knob(True, "1: round the columns of the largest inputs first")
    compressor: str = knob("rans", "coder of the integers: rans (our own, the rest by brotli), brotli (11), lzma or "
                           "zstd (22)", one_of("rans", "brotli", "lzma", "zstd"))
    cap_bytes: int = knob(16_000_000, "most bytes of script + artifact", at_least(1))

    final_score: str = group("evaluation", "ttt", "the method whose score is the run's",
                             one_of("roundtrip", "exact", "sliding", "ttt"))
    eval_diagnostics: bool = knob(False, "1: score by the other methods too, timed apart")
    eval_stride: int = knob(64, "targets that a sliding window scores anew [tokens]", at_least(1))
    eval_spans: int = knob(64, "spans that the exact method cuts the stream into", at_least(1))
    eval_warmup_tokens: int = knob(8192, "text before a span that is run but not scored [tokens]", at_least(0))
    eval_batch_tokens: int = knob(131072, "tokens of one evaluation pass on one rank", at_least(64))
    eval_budget_seconds: float = knob(600.0, "most seconds of evaluation", at_least(1))
    eval_overrun: str = knob("trim", "what to do if evaluation is projected to take longer: trim TTT_EPOCHS (no target "
                             "is left out), or stop before it starts", one_of("error", "trim"))
    eval_save_seconds: float = knob(0.0, "time between savings of an evaluation that can be resumed; 0 = never [s]",
                                    at_least(0))
    ttt_enabled: bool = group("test-time training", True, "0: no score of the run trains weights")
    ttt_scoring: str = knob("exact", "how a chunk is scored before it is trained on: sliding windows by EVAL_STRIDE, "
                            "or exact, by carried state", one_of("sliding", "exact"))
    ttt_carry: bool = knob(True, "exact: 1: the state goes on from one chunk to the next; 0: every chunk begins "
                           "without one")
    ttt_optimizer: str = knob("muon", "sgd with momentum, adamw, or muon for matrices and sgd for the rest",
                              one_of("sgd", "adamw", "muon"))
    ttt_lr: float = knob(0.0002, "learning rate of the first chunk", at_least(0))
    ttt_schedule: str = knob("constant", "of that rate over the chunks: cosine to 0, or constant",
                             one_of("cosine", "constant"))
    ttt_momentum: float = knob(0.9, "momentum of sgd and muon", between(0, 0.9999))
    ttt_epochs: int = knob(8, "passes over a chunk after it was scored, one step each", at_least(0))
    ttt_chunk_tokens: int = knob(32768, "targets scored before each round of training [tokens]", at_least(1))
    ttt_phase_chunks: int = knob(1, "chunks that are scored, one by one, before they are trained on together",
                                 at_least(1))
    ttt_freeze_blocks: int = knob(2, "first blocks whose weights stay as they are", at_least(0))
    ttt_roles: str = knob(",".join(ROLES), "comma list of the weights that train; empty = none",
                          Rule("a comma list of " + ", ".join(ROLES), lambda v: set(v.split(",")) <= {*ROLES, ""}))
    ttt_grad_clip: float = knob(1.0, "global gradient norm of a step; 0 = off", at_least(0))
    ttt_lora: int = knob(0, "rank of adapters trained in place of all weights, one for each matrix; 0 = no adapters",
                              at_least(0))
    ttt_ema: float = knob(0.0, "decay, per step, of the averaged weights that score; 0 = the newest weights score",
                          between(0, 0.9999))
    ttt_reset: bool = knob(False, "1: where a document began in a chunk, put back the artifact's weights (hints stay)")
    ttt_tilt: float = knob(0.0, "added to the logit of the token that followed the last ones most often in the text "
                           "scored so far; 0 = off", at_least(0))
    ttt_tilt_order: int = knob(4, "longest n-gram that such a hint comes from [tokens]", between(2, 9))
    ttt_hash_buckets: int = knob(0, "rows of an embedding of hashed n-grams that starts at zero and is trained, by "
                                 "AdamW, in evaluation only; 0 = none", between(0, 1 << 24))
    ttt_hash_lr: float = knob(0.003, "its learning rate, on the same schedule", at_least(0))

    def __post_init__(self):
        """Raise SettingError for the first value that breaks its rule or contradicts another."""
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata["rule"]
            if type(f.default) is float and type(value) is int:
                object.__setattr__(self, f.name, float(value))
            if isinstance(value, float) and not abs(value) <= MOST_NUMBER:  # not a number is no less either
                raise SettingError(f"{f.name.upper()}={value}: must be a finite number, at most {MOST_NUMBER:g}")
            if type(value) is int and abs(value) >= 2**31:
                raise SettingError(f"{f.name.upper()}={str(value)[:40]}: must be below 2147483648")
            if rule and not rule.holds(value):
                raise SettingError(f"{f.name.upper()}={value}: must be {rule.text}")
        layers, gdn_heads = parse_stack(self.stack), max(self.gdn_heads, self.gdn_v_heads)
        width = max(self.model_dim, self.ngram_dim, gdn_heads * self.gdn_head_dim, self.mlp_mult * self.model_dim)
        has = {layer.kind for layer in layers}
        looped = {(i % max(1, self.unique_layers), layer.kind) for i, layer in enumerate(layers) if not layer.tag}
        T, attends, clock = self.train_seq_len, has & {"swa", "attn"}, self.max_wallclock_seconds
        for name, holds, rule in (
            ("train_batch_tokens", self.train_batch_tokens % T == 0, f"must be a multiple of TRAIN_SEQ_LEN={T}"),
            ("micro_batch_tokens", self.micro_batch_tokens == 0 or self.micro_batch_tokens >= T,
             f"must be 0 or at least TRAIN_SEQ_LEN={T}"),
            ("eval_batch_tokens", self.eval_batch_tokens >= T, f"must be at least TRAIN_SEQ_LEN={T}"),
            ("eval_stride", self.eval_stride <= T, f"must be at most TRAIN_SEQ_LEN={T}"),
            ("gdn_v_heads", self.gdn_v_heads % self.gdn_heads == 0,
             f"must be a multiple of GDN_HEADS={self.gdn_heads}"),
            ("num_heads", not attends or self.model_dim % (2 * self.num_heads) == 0,
             f"MODEL_DIM={self.model_dim} must be a multiple of twice that"),
            ("num_kv_heads", not attends or self.num_heads % self.num_kv_heads == 0,
             f"must divide NUM_HEADS={self.num_heads}"),
            ("gptq_reserve_seconds", not (self.gptq_enabled and 0 < clock <= self.gptq_reserve_seconds),
             f"must be below MAX_WALLCLOCK_SECONDS={clock:g}"),
            ("max_wallclock_seconds", not (self.deterministic and clock), "with DETERMINISTIC=1 nothing may follow the "
             "clock; set it to 0 and ITERATIONS to the steps you want"),
            ("resume", self.resume != "auto" or self.run_id, "needs RUN_ID, the run to go on with"),
            ("resume", not (self.resume and (self.eval_only or self.prompt)),
             "EVAL_ONLY and PROMPT read an artifact, not a checkpoint; unset one of them"),
            ("eval_save_seconds", not (self.eval_save_seconds and self.eval_only),
             "only the evaluation of a run that trains can be resumed; set it to 0 with EVAL_ONLY=1"),
            ("qat_frac", self.qat_frac == 0 or self.grid == "sdclip",
             "needs GRID=sdclip, whose steps are known before the export"),
            ("frequent_rows", self.frequent_rows == 0 or self.gptq_enabled,
             "needs GPTQ_ENABLED=1, whose calibration counts the tokens"),
            ("unique_layers", not self.unique_layers or len(looped) == len({i for i, _ in looped}),
             f"STACK={self.stack} has layers of two kinds that would share weights"),
            ("average_every", not self.average_every or self.min_lr < 1 and self.warmdown_frac > 0,
             f"averages the warm-down, and MIN_LR={self.min_lr:g} WARMDOWN_FRAC={self.warmdown_frac:g} have none"),
            ("final_score", self.final_score != "ttt" or self.ttt_enabled,
             "needs TTT_ENABLED=1; without test-time training set FINAL_SCORE=exact"),
            ("bos_id", self.bos_id < self.vocab_size, f"must be below VOCAB_SIZE={self.vocab_size}"),
            ("model_dim", width <= MOST_WIDTH, f"NGRAM_DIM={self.ngram_dim}, GDN_HEADS x GDN_HEAD_DIM="
             f"{gdn_heads * self.gdn_head_dim}, MLP_MULT x MODEL_DIM={self.mlp_mult * self.model_dim:g}: must be at "
             f"most {MOST_WIDTH}"),
            ("rope_dims", self.rope_dims % 2 == 0 and self.rope_dims * self.num_heads <= self.model_dim,
             "must be even and at most MODEL_DIM / NUM_HEADS"),
            ("artifact", self.artifact or not (self.eval_only or self.prompt),
             "EVAL_ONLY and PROMPT need the path of an artifact file"),
            ("artifact", not self.artifact or self.eval_only or self.prompt,
             "only EVAL_ONLY=1 or PROMPT=text reads it; unset it to train"),
        ):
            if not holds:
                raise SettingError(f"{name.upper()}={plain(getattr(self, name))}: {rule}")

    @classmethod
    def from_env(cls, env):
        """Build the Config that `env`, a mapping of variable names to text, describes.

        Raises SettingError (a ValueError) naming variable, value and rule; likewise for a name that is not a
        setting but looks like one of ours, since a misspelt variable would otherwise do nothing in silence.
        """
        known = {f.name.upper(): f for f in fields(cls)}
        reject_strays(env, known)
        for name in known.keys() & env.keys():
            if re.search("[\ud800-\udfff]", env[name]):  # bytes that are no UTF-8 reach Python as these
                raise SettingError(f"{name}={env[name]!r}: must be UTF-8")
        values, presets = {}, [name for name in env.get("PRESET", "record").replace(" ", "").split(",") if name]
        for preset in presets:
            if preset not in PRESETS:
                raise SettingError(f"PRESET={preset}: must be a comma list of {', '.join(PRESETS)}")
            values |= PRESETS[preset]
        for name in presets if "sample" in presets else ():
            values |= WITH_SAMPLE.get(name, {})
        for name, f in known.items():
            if name in env:
                values[f.name] = parse_value(name, env[name], type(f.default))
        return cls(**values)


def parse_value(name, text, kind):
    """The value of type `kind` (bool, int, float or str) that `text` spells; raises SettingError."""
    if kind is bool:
        if text not in ("0", "1"):
            raise SettingError(f"{name}={text!r}: must be 0 or 1")
        return text == "1"
    try:
        return kind(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise SettingError(f"{name}={text!r}: must be {expected}") from None


def plain(value):
    """A setting's value as the environment would spell it."""
    return str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


# Names that other scripts of the challenge use for what is set otherwise here.
ELSEWHERE = {"NUM_LAYERS": "STACK", "WARMDOWN_ITERS": "WARMDOWN_FRAC", "EMBED_LR": "TIED_EMBED_LR",
             "HEAD_LR": "TIED_EMBED_LR", "GRAD_CLIP": "GRAD_CLIP_NORM", "VAL_BATCH_SIZE": "EVAL_BATCH_TOKENS",
             "BIGRAM_VOCAB_SIZE": "NGRAM_BUCKETS", "BIGRAM_DIM": "NGRAM_DIM", "ROPE_THETA": "ROPE_BASE"}


def reject_strays(env, known):
    """Raise SettingError for a variable that is no setting but resembles one or carries one of our words."""
    ours = {"TTT", "GDN", "SWA", "GPTQ", "MUON", "NGRAM"}
    for name in sorted(set(env) - set(known)):
        if name in ELSEWHERE:
            raise SettingError(f"{name}: not a setting of this script; {ELSEWHERE[name]} takes its place")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.86 if "_" in name else 0.94)  # COMPILER is not ours
        if near or ours & set(name.split("_")):
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SettingError(f"{name}: unknown setting{hint} (python train_gpt.py --help lists them all)")


class Layer(NamedTuple):
    """One entry of STACK: mixer kind and weight-sharing tag ('' = its own weights)."""
    kind: str
    tag: str


MAX_LAYERS = 256


def parse_stack(text):
    """The list of Layer that a STACK such as 'gdn*5 swa:a' names; raises SettingError."""
    layers = []
    for part in text.replace(",", " ").split():
        m = re.fullmatch(r"(gdn|swa|attn)(?::(\w+))?(?:\*([1-9]\d?))?", part)
        if not m:
            raise SettingError(f"STACK={text!r}: {part!r} must be gdn, swa or attn, then optionally :tag, then *count")
        layers += [Layer(m[1], m[2] or "")] * int(m[3] or 1)
    kinds = {}
    for layer in layers:
        if layer.tag and kinds.setdefault(layer.tag, layer.kind) != layer.kind:
            raise SettingError(f"STACK={text!r}: tag {layer.tag!r} names both {kinds[layer.tag]} and {layer.kind}")
    if len(layers) > MAX_LAYERS:
        raise SettingError(f"STACK names {len(layers)} layers, at most {MAX_LAYERS}")
    if not layers:
        raise SettingError("STACK is empty: it must name at least one layer, such as 'gdn*5 swa:a'")
    return layers


_SAMPLE = Path(__file__).resolve().parent / "data" / "sample"
_ANCESTOR = dict(mlp_mult=3.0, ngram_buckets=3072, muon_weight_decay=0.04, ttt_scoring="sliding", ttt_optimizer="sgd",
                 ttt_lr=0.005, ttt_schedule="cosine", ttt_epochs=3)
_INT6 = _ANCESTOR | dict(average_every=50, qat_frac=0.15, grid="sdclip", gptq_enabled=False,
                         compressor="zstd")  # weight averaging, late QAT, rounding to nearest
PRESETS = {
    "record": {},
    # The entry describes GDN heads of 8 x 64; the default's 4 x 128 hold the same weights and twice the state.
    "pr1749": _ANCESTOR | dict(gdn_heads=8, gdn_head_dim=64, grid="sdclip", float_matrices=2, compressor="brotli",
                               eval_stride=32, ttt_ema=0.5, ttt_tilt=0.1, ttt_hash_buckets=16384),
    # Ten GDN layers, wider, keys and values shared by pairs; plain int6 after late QAT.  Its 8 x 64 heads as described.
    "pr1698": _INT6 | dict(stack="gdn*10", model_dim=544, gdn_heads=8, gdn_head_dim=64, kv_share=2, train_seq_len=1024,
                           muon_momentum=0.95),
    # Ten attention layers with U-Net skips, XSA in the last three, int5 MLPs; UNIQUE_LAYERS=5 loops them.
    "pr456": _INT6 | dict(stack="attn*10", unet=True, xsa_layers=3, ngram_buckets=10240, ngram_dim=128, ngram_order=2,
                          mlp_bits=5, ttt_optimizer="adamw", ttt_lr=0.0005, ttt_epochs=1, ttt_freeze_blocks=0),
    "sample": dict(
        data_path=str(_SAMPLE), tokenizer_path=str(_SAMPLE / "corpus_1024_bpe.model"),
        stack="gdn*2 swa:a gdn swa:a", model_dim=128, num_heads=4, num_kv_heads=2, swa_window=128,
        gdn_heads=4, gdn_head_dim=32, mlp_mult=3.0, ngram_buckets=1024, ngram_dim=32,
        train_seq_len=256, train_batch_tokens=4096, max_wallclock_seconds=160.0, warmup_steps=1,
        gptq_calibration_batches=16, gptq_reserve_seconds=10.0,
        muon_momentum_warmup_steps=100, val_loss_every=0, train_log_every=20, checkpoint_every_seconds=30.0,
        eval_stride=128, eval_spans=8, eval_warmup_tokens=1024, eval_batch_tokens=16384, eval_diagnostics=True,
        ttt_chunk_tokens=4096, ttt_epochs=1),
}

# What PRESET=NAME,sample has otherwise than sample alone: the same kinds of layers, fewer of them, a clock that leaves
# test-time training its time in 3 minutes, and no other scores.
_QUICK = dict(max_wallclock_seconds=40.0, eval_diagnostics=False)
WITH_SAMPLE = {"pr1749": _QUICK | dict(model_dim=64, gdn_head_dim=16),
               "pr1698": _QUICK | dict(stack="gdn*4"),
               "pr456": _QUICK | dict(stack="attn*6")}

# {field: title of its group in --help}
GROUP_OF = dict(zip((f.name for f in fields(Config)), accumulate(
    (f.metadata.get("group", "") for f in fields(Config)), lambda title, new: new or title)))
# What the artifact stores of the Config, so that it can be evaluated from its file alone.
MODEL_FIELDS = ["vocab_size", *(name for name, title in GROUP_OF.items() if title == "model"), "train_seq_len"]


def help_text():
    """The text of --help: every setting by group, with default and meaning."""
    lines = ["Settings are environment variables: PRESET=sample SEED=42 python train_gpt.py", ""]
    for f in fields(Config):
        if "group" in f.metadata:
            lines += ["", f.metadata["group"] + ":"]
        lines.append(f"  {f.name.upper() + '=' + plain(f.default):<44} {f.metadata['help']}")
    for name, values in (PRESETS | {f"{name},sample": values for name, values in WITH_SAMPLE.items()}).items():
        settings = " ".join(f"{k.upper()}={plain(v)}" for k, v in values.items())
        lines += ["", f"PRESET={name}: {settings or 'the defaults'}"]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# 2. Run
# ----------------------------------------------------------------------------------------------------
# Rank, device, log and clock.  torch.distributed occurs here and nowhere else: the rest of the script
# calls all_sum, broadcast and gather, which do nothing on one rank.  Decisions that depend on time are
# taken on rank 0's clock and broadcast, so that ranks never disagree.


class Run:
    """Where this process runs: `rank` of `world_size`, on `device`; the log of the run (rank 0 writes)."""

    def __init__(self, rank=0, world_size=1, device="cpu"):
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.began, self.log_path, self.lock = time.perf_counter(), None, None  # no log_path: the console alone
        self.live, self.dim, self.showing = False, "", False  # a terminal's progress line: wanted, its style, up now
        self.warned = False  # that the log cannot be written

    @classmethod
    def from_env(cls, env, cfg):
        """The Run that torchrun's variables and DEVICE describe; starts torch.distributed for several ranks."""
        try:
            rank, world_size, local_rank = (int(env.get(*pair)) for pair in (
                ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        except ValueError as error:
            raise SettingError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, as torchrun sets them ({error})"
                               ) from None
        has_cuda = torch.cuda.is_available()
        if cfg.device == "cuda" and not has_cuda:
            raise SettingError("DEVICE=cuda: torch finds no CUDA GPU; set DEVICE=cpu PRESET=sample for a small run")
        if not has_cuda and cfg.device == "auto" and "sample" not in cfg.preset and not (cfg.artifact or cfg.plan):
            raise SettingError(f"PRESET={cfg.preset}: torch finds no CUDA GPU; PRESET=sample runs on any machine in "
                               "minutes, DEVICE=cpu insists on this preset on the CPU (days)")
        if cfg.deterministic:
            env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; cuBLAS needs it for this
            torch.use_deterministic_algorithms(True)
        device = "cpu"
        if has_cuda and cfg.device != "cpu":
            device = f"cuda:{local_rank}"
            torch.cuda.set_device(device)
        if world_size > 1 and not dist.is_initialized():
            # Two back ends: NCCL for gradients, gloo for the small decisions that must not wait for the GPU.
            backend = "cpu:gloo,cuda:nccl" if device != "cpu" else "gloo"
            try:
                dist.init_process_group(backend, rank=rank, world_size=world_size,
                                        timeout=timedelta(seconds=cfg.rank_timeout_seconds))
            except ValueError as error:  # a variable of torchrun's is missing
                raise SettingError(f"WORLD_SIZE={world_size}: {error}; launch with torchrun, or unset it for one "
                                   "process") from None
        run = cls(rank, world_size, device)
        run.live = rank == 0 and sys.stdout.isatty() and env.get("TERM") != "dumb"
        run.dim = "" if env.get("NO_COLOR") else "\x1b[2m"
        return run

    def close(self):
        """Take the progress line away, release the log and leave the process group."""
        self.progress("")
        if self.lock:
            self.lock.close()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def log(self, event, **values):
        """One line '[event ]key:value ...' on rank 0, to the console and the log file; floats get 4 decimals."""
        if self.rank:
            return
        parts = [event] if event else []
        for key, value in values.items():
            value = f"{value:.4f}" if isinstance(value, float) else str(value)
            parts.append(f"{key}:{','.join(value.split()) or '-'}")
        self.write(" ".join(parts))

    def write(self, line):
        """One line of free text, as `log`; the console and the file get the same."""
        if self.rank:
            return
        self.progress("")
        try:
            print(line, flush=True)
        except OSError:  # nobody reads on, or the disk is full: the file has the line
            if not self.log_path:
                raise
        try:
            if self.log_path:
                with open(self.log_path, "a", encoding="utf-8") as f:
                    f.write(line + "\n")
        except OSError as error:  # a full disk must not end a run that can still be scored
            if not self.warned:
                self.warned = True
                with suppress(OSError):
                    print(f"warning: {self.log_path}: cannot be written ({error.strerror}); until it can, the log is "
                          "here alone", file=sys.stderr, flush=True)

    def progress(self, text):
        """Show `text` in place of the last such text, on a terminal only; '' takes it away."""
        if self.live and (text or self.showing):
            text = text[:shutil.get_terminal_size().columns - 1]
            try:
                print(f"\r\x1b[K{self.dim}{text}\x1b[m" if text and self.dim else f"\r\x1b[K{text}", end="", flush=True)
                self.showing = bool(text)
            except OSError:  # the terminal has gone
                self.live = False

    @contextmanager
    def _together(self):
        """Around a collective: a rank that died or stays away becomes one clear error on the others."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RankError(f"rank {self.rank}: lost another rank, or waited RANK_TIMEOUT_SECONDS for it "
                            f"({str(error).splitlines()[0][:200]}); RESUME goes on from the last checkpoint") from None

    def all_sum(self, tensor):
        """Sum `tensor` over ranks, in place."""
        if self.world_size > 1:
            with self._together():
                dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value):
        """Rank 0's Python `value`, on every rank; never waits for the GPU."""
        if self.world_size == 1:
            return value
        box = [value]
        with self._together():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def from_rank_0(self, make):
        """What make() returns on rank 0, on every rank; a GolfError that it raises there is raised on all."""
        box = None
        if self.rank == 0:
            try:
                box = make()
            except GolfError as error:
                box = error
        box = self.broadcast(box)
        if isinstance(box, GolfError):
            box.told = self.rank > 0  # rank 0 prints it
            raise box
        return box

    def gather(self, value):
        """The list of every rank's Python value, in rank order; never waits for the GPU."""
        out = [value] * self.world_size
        if self.world_size > 1:
            with self._together():
                dist.all_gather_object(out, value)
        return out

    def all_gather_rows(self, tensor):
        """Every rank's `tensor` (n, ...), concatenated to (world_size * n, ...)."""
        if self.world_size == 1:
            return tensor
        out = tensor.new_empty(self.world_size * tensor.shape[0], *tensor.shape[1:])
        with self._together():
            dist.all_gather_into_tensor(out, tensor)
        return out

    def share(self, n):
        """The contiguous part [first, last) of n items that is this rank's."""
        return n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size

    def to_host(self, *tensors):
        """Begin to copy tensors to the host; call what is returned to wait for these copies alone and get them."""
        copies, done = [x.to("cpu", non_blocking=True) for x in tensors], None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()

        def wait():
            if done:
                done.synchronize()
            return copies
        return wait

    def synchronize(self):
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory_mib(self, anew=False):
        """Peak memory so far [MiB]: the allocator's on CUDA, the process's on CPU.   anew: CUDA's starts again here."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) // 2**20
            if anew:
                torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        import resource  # POSIX only; imported here so that the script still loads elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Clock:
    """A stopwatch that excludes what runs between `pause` and `resume`; waits for the device at both ends."""

    def __init__(self, run, total=0.0):
        self.run, self.total, self.started = run, total, None

    def resume(self):
        """Start or go on."""
        self.run.synchronize()
        self.started = time.perf_counter()

    def pause(self):
        """Stop; returns the seconds so far."""
        self.run.synchronize()
        self.total, self.started = self.elapsed(), None
        return self.total

    def elapsed(self):
        """Seconds so far, without waiting for the device."""
        return self.total + (time.perf_counter() - self.started if self.started is not None else 0.0)


def write_whole(path, write):
    """Call write(file) on a neighbour of `path`, then rename it: a reader never sees a part.

    Raises FileError naming the file if the disk is full or the folder is read-only; what `path` held stays.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error}); set OUT_DIR to a folder with room; "
                        "files that were there are intact") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


FACTS = "facts.json"  # the member of a tensor file that holds its JSON


def save_tensors(path, tensors, facts):
    """Write {name: Tensor} and a JSON-able `facts` to one file, whole or not at all; raises FileError.

    The file is numpy's npz: a zip of .npy arrays, each with a checksum, none pickled; bfloat16 is stored as float32.
    """
    arrays = {name: (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy() for name, x in
              tensors.items()} | {FACTS: np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    write_whole(path, lambda f: np.savez(f, **arrays))


def load_tensors(path):
    """The ({name: Tensor}, facts) that `save_tensors` wrote.  Executes nothing and allocates no more than the file has.

    Raises FileError naming the file if it is missing, truncated, altered, or not such a file.
    """
    try:
        with zipfile.ZipFile(path) as z:
            arrays = {info.filename.removesuffix(".npy"): _read_array(z, info) for info in z.infolist()}
        facts = json.loads(arrays.pop(FACTS).tobytes())
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, facts
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # on foreign bytes zipfile and numpy raise a dozen kinds, tokenize.TokenError among them
        raise FileError(f"{path}: not a whole tensor file of this script ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:200]})") from None


def copy_saved(target, tensors, name):
    """Copy tensors[name] into the tensor `target`; raises FileError if it is missing or of another shape."""
    found = tensors.get(name)
    if found is None or found.shape != target.shape:
        raise FileError(f"its tensor {name} is {'missing' if found is None else tuple(found.shape)}, expected shape "
                        f"{tuple(target.shape)}")
    with torch.no_grad():
        target.copy_(found)


def _read_array(z, info):
    """One array of a tensor file; its header must claim exactly the bytes that are stored."""
    with z.open(info) as member:
        if np.lib.format.read_magic(member) != (1, 0) or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is of another format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        left = info.file_size - member.tell()
        if fortran or dtype.kind not in "fiub" or math.prod(shape) * dtype.itemsize != left:
            raise ValueError(f"{info.filename} claims {shape} {dtype} in {left} bytes")
        data = bytearray(member.read(left + 1))  # one more than there should be: reading to the end checks the CRC
        if len(data) != left:
            raise ValueError(f"{info.filename} has {len(data)} bytes, expected {left}")
        return np.frombuffer(data, dtype).reshape(shape)


# ----------------------------------------------------------------------------------------------------
# 3. Data
# ----------------------------------------------------------------------------------------------------
# Shards are the challenge's: int32[256] header (magic, version, tokens), then uint16 tokens.  Training rows
# come in a random order that visits every shard before any row repeats, and that is the same for any number
# of ranks.  Bytes of a token are counted as the challenge counts them (README, "Bits per byte"), or read from the
# sidecar fineweb_val_bytes_*.bin (one uint16 per validation token) where the tokens are of transformed text.

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
CASE_SLACK = 1e-3  # published sidecars count the text before normalisation: a no-break space as 2 bytes, not 1
CASE_MARKS = "\ue001\ue002\ue003\ue004"  # CaseOps [6]: title, all capitals, capital next, escape; no text of their own


@dataclass(frozen=True)
class Shard:
    """Tokens of one shard file, read at each access: shard[i:j] is np.uint16 (j - i,).

    Not memory-mapped: a mapped file that is cut short under way kills the process, a read raises DataError.  One pread
    of an open file is one request to a disk; opening it for each row, or reading through a buffer, are several.
    """
    path: Path
    tokens: int
    stamp: tuple  # size and time of change when it was opened
    file: object = field(compare=False, repr=False)

    def __len__(self):
        return self.tokens

    def __getitem__(self, part):
        start, stop, _ = part.indices(self.tokens)
        try:
            read = os.pread(self.file.fileno(), 2 * (stop - start), 4 * HEADER_INTS + 2 * start)
            found = stamp(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: vanished while the run was reading it ({error.strerror}); put it back and "
                            "set RESUME to go on") from None
        if found != self.stamp or len(read) != 2 * (stop - start):  # the stamp of after reading: it is of what was read
            raise DataError(f"{self.path}: changed while the run was reading it; put it back as it was and set RESUME "
                            "to go on")
        return np.frombuffer(read, "<u2")


def stamp(path):
    """Size and time of change of a file."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def open_shard(path):
    """Open one shard.  Raises DataError naming the file and its fault."""
    try:
        found, file = stamp(path), open(path, "rb", buffering=0)
        header = file.read(12)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    size = found[0]
    if size < 4 * HEADER_INTS:
        raise DataError(f"{path}: {size} bytes, shorter than the {4 * HEADER_INTS}-byte header of a token shard")
    magic, version, tokens = np.frombuffer(header.ljust(12), "<i4").tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise DataError(f"{path}: magic {magic} version {version}, expected {SHARD_MAGIC} version {SHARD_VERSION}: "
                        "not a token shard of this challenge")
    if tokens <= 0:
        raise DataError(f"{path}: its header promises {tokens} tokens: an empty shard")
    if size != 4 * HEADER_INTS + 2 * tokens:
        raise DataError(f"{path}: {size} bytes, but {tokens} tokens need {4 * HEADER_INTS + 2 * tokens}: truncated or "
                        "altered")
    return Shard(path, tokens, found, file)


def open_shards(data_path, split):
    """All shards of a split, by name: list of (Path, Shard).  Raises DataError."""
    folder = Path(data_path)
    how = "data/download.py fetches the challenge's shards; PRESET=sample uses the embedded ones"
    if not folder.is_dir():
        raise DataError(f"DATA_PATH={data_path}: no such folder; {how}")
    paths = sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin"))
    if not paths:
        raise DataError(f"DATA_PATH={data_path}: holds no fineweb_{split}_*.bin; {how}")
    return [(path, open_shard(path)) for path in paths]


def check_vocabulary(path, tokens, vocab_size):
    """Raise DataError naming the file if a token is not below vocab_size."""
    top = int(tokens.max())
    if top >= vocab_size:
        raise DataError(f"{path}: token {top} is outside VOCAB_SIZE={vocab_size}; the shard was made with another "
                        "tokenizer: set VOCAB_SIZE and TOKENIZER_PATH to match DATA_PATH")


def open_sidecar(cfg, val, parts, sp):
    """Bytes of original text per validation token, np.uint16 (n,), from the sidecar; None if there is none.

    val: np.uint16 (n,), of which parts are the shards.   Raises DataError if the sidecar does not fit them or the
    manifest beside it, or is missing although the tokenizer has CaseOps marks.
    """
    folder = Path(cfg.data_path)
    paths = sorted(folder.glob("fineweb_val_bytes_*.bin"))
    what = f"DATA_PATH={folder}: fineweb_val_bytes_*.bin"
    if not paths:
        if case_marks(sp):
            raise DataError(f"{what} is missing, but the tokenizer has CaseOps marks: the score is by the original "
                            "text's bytes; data/download.py fetches the sidecar, data/prepare.py --case-ops writes it")
        return None
    counts = [open_shard(path)[:] for path in paths]
    if (found := [len(c) for c in counts]) != (expected := [len(tokens) for _, tokens in parts]):
        raise DataError(f"{what} holds {found} counts, the validation shards {expected} tokens")
    counts = np.concatenate(counts)
    if counts[val == cfg.bos_id].any():
        raise DataError(f"{what} counts bytes for BOS, so it belongs to other tokens")
    total = int(counts.sum(dtype=np.int64))
    try:
        stated = json.loads((folder / "manifest.json").read_bytes())["splits"]["val"]["counted_bytes"]
    except (OSError, ValueError, LookupError, TypeError):  # there is none, or another tool's
        stated = total
    if stated != total:
        raise DataError(f"{what} sums to {total} bytes, manifest.json says {stated}")
    return counts


class Data(NamedTuple):
    """What a run reads: training shards, validation tokens np.uint16 (n,), tokenizer, byte table."""
    train: list
    val: np.ndarray
    sp: object
    table: "ByteTable"


def open_data(cfg):
    """Open and check everything before any time is spent; raises DataError or SettingError."""
    sp, sidecar = open_tokenizer(cfg), None
    train = open_shards(cfg.data_path, "train") if not (cfg.eval_only and not cfg.holdout_tokens) else []
    if cfg.holdout_tokens:
        path, last = train[-1]
        if len(last) <= cfg.holdout_tokens + cfg.train_seq_len:
            raise SettingError(f"HOLDOUT_TOKENS={cfg.holdout_tokens}: the last training shard {path} has only "
                               f"{len(last)} tokens")
        val, train[-1] = last[-cfg.holdout_tokens:], (path, replace(last, tokens=len(last) - cfg.holdout_tokens))
        check_vocabulary(path, val, cfg.vocab_size)
    else:
        parts = [(path, shard[:]) for path, shard in open_shards(cfg.data_path, "val")]
        for path, tokens in parts:
            check_vocabulary(path, tokens, cfg.vocab_size)
        val = np.concatenate([tokens for _, tokens in parts])
        sidecar = open_sidecar(cfg, val, parts, sp)
    if len(val) < 2:
        raise DataError(f"DATA_PATH={cfg.data_path}: the validation split has {len(val)} token, nothing to score")
    table = byte_table(sp, cfg.vocab_size)._replace(sidecar=sidecar)
    has_bytes, some = (table.base + table.spaced).numpy() > 0, 1 << 20  # the first part nearly always settles it
    if not (sidecar[1:].any() if sidecar is not None else
            any(has_bytes[val[i:i + some]].any() for i in range(1, len(val), some))):
        raise DataError(f"DATA_PATH={cfg.data_path}: the text to score has 0 bytes, only control tokens")
    return Data(train, val, sp, table)


def open_tokenizer(cfg):
    """The SentencePiece processor of TOKENIZER_PATH; raises DataError if it is missing or does not fit."""
    import sentencepiece  # imported here: the script must import without it
    path = Path(cfg.tokenizer_path)
    if not path.is_file():
        raise DataError(f"TOKENIZER_PATH={path}: no such file; data/download.py fetches it with the shards")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        sp.id_to_piece(list(range(sp.vocab_size())))  # every piece must be UTF-8: ValueError if one is not
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"TOKENIZER_PATH={path}: not a SentencePiece model ({str(error).splitlines()[0]})") from None
    if sp.vocab_size() != cfg.vocab_size:
        raise DataError(f"TOKENIZER_PATH={path}: has {sp.vocab_size()} pieces, but VOCAB_SIZE={cfg.vocab_size}; set "
                        f"VOCAB_SIZE={sp.vocab_size()} if DATA_PATH was made with this tokenizer")
    return sp


class ByteTable(NamedTuple):
    """Per token id: `base` bytes (int64), `spaced` starts with the space mark, `boundary` a control or absent piece.

    `sidecar`, if any, is np.uint16 (n,): the bytes of each token of the text to score, in place of what ids tell.
    """
    base: Tensor
    spaced: Tensor
    boundary: Tensor
    sidecar: np.ndarray | None = None

    def to(self, device):
        """The table on another device."""
        return ByteTable(*(t.to(device) for t in self[:3]), self.sidecar)


def case_marks(sp):
    """Ids of the CaseOps marks, or [] if the tokenizer does not have all four as pieces."""
    ids = [sp.piece_to_id(mark) for mark in CASE_MARKS]
    return [] if sp.unk_id() in ids else ids


def byte_table(sp, vocab_size):
    """How many UTF-8 bytes each token stands for, by the challenge's rule.

    Control, unknown, unused and absent pieces: 0, and they end a text; a byte piece: 1; any other: the UTF-8 length of
    its piece without one leading space mark (U+2581); CaseOps marks: 0, since only the sidecar knows more.
    sp: SentencePieceProcessor [5].   Returns ByteTable of (vocab_size,) tensors.
    """
    base, spaced, boundary = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, bool), np.ones(vocab_size, bool)
    marks = case_marks(sp)
    for i in range(min(vocab_size, sp.vocab_size())):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        piece = sp.id_to_piece(i)
        boundary[i] = False
        spaced[i] = not sp.is_byte(i) and piece.startswith("\u2581")
        base[i] = 0 if i in marks else 1 if sp.is_byte(i) else len(piece.removeprefix("\u2581").encode())
    return ByteTable(*(torch.from_numpy(a) for a in (base, spaced, boundary)))


def count_bytes(table, prev_ids, target_ids):
    """Bytes that each target stands for after its predecessor: int64, the shape of target_ids.

    The space that a piece begins with counts 1 unless the token before it is a boundary (a text begins there).
    """
    return table.base[target_ids] + (table.spaced[target_ids] & ~table.boundary[prev_ids]).long()


def decoded_bytes(sp, tokens, bos_id, limit, sidecar=None):
    """Count bytes of the first documents of `tokens` (np.uint16) twice, up to about `limit` tokens.

    Returns (counted_bytes, text_bytes): by the byte table or sidecar, and as the UTF-8 length of the decoded documents
    less a first space and CaseOps marks.  The two must be equal; with CaseOps, up to CASE_SLACK.
    """
    begin, tokens = 0, tokens[:limit].astype(np.int64)
    starts = np.flatnonzero(tokens == bos_id)
    if len(starts) > 1:  # whole documents only: a cut could split a character that is spelt in byte pieces
        begin, tokens = starts[0], tokens[starts[0]:starts[-1]]
    else:
        while len(tokens) > 1 and sp.is_byte(int(tokens[-1])):
            tokens = tokens[:-1]
        while len(tokens) > 1 and sp.is_byte(int(tokens[0])):
            begin, tokens = begin + 1, tokens[1:]
    ids = torch.from_numpy(tokens)
    table = byte_table(sp, max(sp.vocab_size(), int(tokens.max()) + 1))
    counted = int(table.base[ids[0]] + count_bytes(table, ids[:-1], ids[1:]).sum())
    if sidecar is not None:
        counted = int(sidecar[begin:begin + len(tokens)].sum(dtype=np.int64))
    is_text = ~table.boundary.numpy()[tokens]
    runs = np.split(tokens, np.flatnonzero(np.diff(is_text)) + 1)
    runs = [run.tolist() for run in runs if not table.boundary[int(run[0])]]
    firsts, texts = sp.decode([run[:1] for run in runs]), sp.decode(runs)  # some tokenizers drop the first space
    if case_marks(sp):  # small letters have as many bytes as the capitals that they stand for
        texts = [re.sub("\ue004(.)|[\ue001-\ue003]", r"\1", text, flags=re.DOTALL) for text in texts]
    return counted, sum(len(text.encode()) - first.startswith(" ") for first, text in zip(firsts, texts))


class Loader:
    """Training batches in a random order, prefetched by a thread, the same rows for any number of ranks.

    next() gives int32 (rows / world_size, seq_len + 1) on `run.device`: this rank's part of the next global
    batch.  An epoch cuts every shard into rows at a random phase and shuffles all of them; `state()` is the
    position (epoch, row) behind the last batch taken, and `state=` goes on from there.
    """

    def __init__(self, shards, cfg, run, state=(0, 0)):
        self.shards, self.cfg, self.run = shards, cfg, run
        self.epoch, self.row = self.taken = tuple(state)
        self.lengths = np.array([len(tokens) for _, tokens in shards])
        if not (self.lengths > cfg.train_seq_len).any():
            raise DataError(f"{shards[0][0]}: {self.lengths[0]} tokens, fewer than one row of "
                            f"TRAIN_SEQ_LEN={cfg.train_seq_len} + 1")
        self._cut_rows()
        # The thread would begin on GPU 0, where pinning memory takes some.
        begin = partial(torch.cuda.set_device, run.device) if run.device.type == "cuda" else None
        self.pool = ThreadPoolExecutor(1, initializer=begin)
        self.ahead = deque(self.pool.submit(self._next_batch) for _ in range(2))

    def _cut_rows(self):
        """Draw the epoch's phases and order: `order` (rows,), `offsets` (shards + 1,), `phase` (shards,)."""
        rng = np.random.default_rng([self.cfg.seed, self.epoch])
        seq_len = self.cfg.train_seq_len
        self.phase = rng.integers(0, np.clip(self.lengths - seq_len, 1, seq_len))
        counts = np.maximum(0, (self.lengths - 1 - self.phase) // seq_len)
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.order = rng.permutation(self.offsets[-1])

    def _next_rows(self, count):
        """The next `count` row numbers of the global order as (shard, start) pairs."""
        picked = []
        while len(picked) < count:
            if self.row >= len(self.order):
                self.epoch, self.row = self.epoch + 1, 0
                self._cut_rows()
            take = self.order[self.row:self.row + count - len(picked)]
            self.row += len(take)
            shard = np.searchsorted(self.offsets, take, side="right") - 1
            start = self.phase[shard] + (take - self.offsets[shard]) * self.cfg.train_seq_len
            picked += list(zip(shard.tolist(), start.tolist()))
        return picked

    def _next_batch(self):
        """In the thread: this rank's part of the next global batch, and the position behind it."""
        rows = self.cfg.train_batch_tokens // self.cfg.train_seq_len
        first, last = self.run.share(rows)
        mine = self._next_rows(rows)[first:last]
        batch = np.stack([self.shards[s][1][i:i + self.cfg.train_seq_len + 1] for s, i in mine])
        for (s, _), row in zip(mine, batch):
            check_vocabulary(self.shards[s][0], row, self.cfg.vocab_size)
        batch = torch.from_numpy(batch.astype(np.int32))
        return batch.pin_memory() if self.run.device.type == "cuda" else batch, (self.epoch, self.row)

    def __next__(self):
        batch, self.taken = self.ahead[0].result()  # raises what the thread met; a second call does too
        self.ahead.popleft()
        self.ahead.append(self.pool.submit(self._next_batch))
        return batch.to(self.run.device, non_blocking=True)

    def fault(self):
        """Wait for the next batch; the message of the DataError that it met, if it did."""
        try:
            self.ahead[0].result()
        except DataError as error:
            return str(error)
        return ""

    def state(self):
        """Position behind the last batch taken: (epoch, row)."""
        return self.taken

    def close(self):
        """End the thread."""
        self.pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------
# 4. Kernels
# ----------------------------------------------------------------------------------------------------
# One dispatch for the gated delta rule, one for windowed attention, one loss.  Each has a plain-torch
# reference that is the CPU path and the oracle of the tests.  On CUDA the delta rule runs in FlashQLA or FLA
# behind one torch.library operator, so that no graph breaks there; `check_kernels` compares outputs,
# states and all gradients with the reference on the GPU in use, and refuses to train if they differ.

GDN_CHUNK = 64  # tokens per chunk: the kernels' own size; states are exact when cut at its multiples


def gated_delta_rule(q, k, v, g, beta, state=None, cu_seqlens=None, kernel="auto"):
    """Gated delta rule [1], eq. 10:
    S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T; o_t = S_t q_t / sqrt(K).

    q, k: (B, T, H, K), l2-normalised.   v: (B, T, HV, V), HV a multiple of H.   beta: (B, T, HV), after its sigmoid.
    g: (B, T, HV) float32 log-decay, <= 0.   state: (N, HV, K, V) float32 or None for zeros.
    cu_seqlens: (N + 1,) int; with B = 1, sequence n is the tokens cu_seqlens[n]..cu_seqlens[n + 1]; else N = B.
    kernel: flashqla, fla or reference; auto = the reference on CPU, the best one installed on CUDA.
    Returns o (B, T, HV, V) in v's dtype and the final state (N, HV, K, V), float32 (float64 for float64 inputs).
    """
    if kernel == "auto":
        kernel = "reference" if q.device.type == "cpu" else pick_gdn_kernel("auto", *q.shape[-2:], *v.shape[-2:])
    if kernel == "reference":
        return gated_delta_rule_reference(q, k, v, g, beta, state, cu_seqlens)
    if state is None:  # zeros: with one form of call there is one kernel to compile, tune and check
        N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = torch.zeros(N, v.shape[2], q.shape[3], v.shape[3], device=q.device)
    o, final_state, _, _ = _gdn_forward(q, k, v, g, beta, state, cu_seqlens, kernel)
    return o, final_state


def gated_delta_rule_reference(q, k, v, g, beta, state=None, cu_seqlens=None):
    """`gated_delta_rule` in plain torch, chunk by chunk in the WY form of [4]; at least float32 inside.

    Within a chunk, with G the running sum of g: (I + tril(beta k k^T * exp(G_i - G_j), -1)) [u, w] =
    [beta v, beta exp(G) k] is one triangular solve; across chunks the state is carried.
    """
    if cu_seqlens is not None:
        cuts = cu_seqlens.tolist()
        parts = [gated_delta_rule_reference(*(x[:, a:b] for x in (q, k, v, g, beta)),
                                            None if state is None else state[n:n + 1])
                 for n, (a, b) in enumerate(zip(cuts, cuts[1:]))]
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype, out_dtype = torch.promote_types(q.dtype, torch.float32), v.dtype
    pad = -T % GDN_CHUNK  # padding has beta = 0 and g = 0: it changes neither outputs nor state

    def chunked(x):  # (B, T, h, ...) -> (B, HV, chunks, GDN_CHUNK, ...)
        x = F.pad(x.to(dtype), [0, 0] * (x.dim() - 2) + [0, pad]).unflatten(1, (-1, GDN_CHUNK)).movedim(3, 1)
        return x.repeat_interleave(HV // x.shape[1], 1)

    q, k, v, g, beta = chunked(q * K**-0.5), chunked(k), chunked(v), chunked(g), chunked(beta).unsqueeze(-1)
    G = g.cumsum(-1)
    lower = torch.ones(GDN_CHUNK, GDN_CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (G.unsqueeze(-1) - G.unsqueeze(-2)).masked_fill(~lower, -math.inf).exp()  # (..., i, j): j's share at i
    system = (beta * k @ k.mT * decay).tril(-1)  # unit diagonal left out: unitriangular=True supplies it
    solved = torch.linalg.solve_triangular(system, torch.cat([beta * v, beta * k * G.exp().unsqueeze(-1)], -1),
                                           upper=False, unitriangular=True)
    u, w = solved.split([V, K], -1)
    attn = q @ k.mT * decay
    q_in, k_out = q * G.exp().unsqueeze(-1), k * (G[..., -1:] - G).exp().unsqueeze(-1)
    S = torch.zeros(B, HV, K, V, dtype=dtype, device=q.device) if state is None else state.to(dtype)
    out = []
    for c in range(q.shape[2]):
        new = u[:, :, c] - w[:, :, c] @ S
        out.append(q_in[:, :, c] @ S + attn[:, :, c] @ new)
        S = S * G[:, :, c, -1, None, None].exp() + k_out[:, :, c].mT @ new
    o = torch.cat([u[:, :, :0].flatten(2, 3), *out], 2)[:, :, :T].transpose(1, 2)  # (B, T, HV, V), T may be 0
    return o.to(out_dtype), S


class _WideKeyTile:
    """FLA's gated backward kernel with a key tile of at least 128.

    Triton 3.4 to 3.7.0 compiles its 64-wide tile wrongly on Hopper (FLA issue 640); 128 is right, also for
    narrower heads, whose channels beyond K are masked.  check_kernels verifies this on the GPU in use.
    """

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        launch = self.kernel[grid]
        return lambda **arguments: launch(**{**arguments, "BK": max(arguments["BK"], 128)})


@cache
def _fla():
    """FLA's chunk forward and backward (private, so fla-core is pinned) and its varlen index."""
    from fla.ops.common import chunk_o
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd
    from fla.ops.utils.index import prepare_chunk_indices
    if not chunk_o.TRITON_ABOVE_3_7_1:
        chunk_o.chunk_bwd_kernel_dqkwg = _WideKeyTile(chunk_o.chunk_bwd_kernel_dqkwg)
        chunk_o.TRITON_ABOVE_3_7_1 = True  # lifts the guard that the wide tile makes needless
    return chunk_gated_delta_rule_fwd, chunk_gated_delta_rule_bwd, prepare_chunk_indices


@cache
def _flash_qla():
    """FlashQLA's chunk forward and backward."""
    import flash_qla
    return flash_qla.chunk_gated_delta_rule_fwd, flash_qla.chunk_gated_delta_rule_bwd


@torch.library.custom_op("gdn_swa::gdn_forward", mutates_args=())
def _gdn_forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor,
                 cu_seqlens: Tensor | None, kernel: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The delta rule on CUDA: o, final state, and what the backward pass needs (G, the running log-decay; A)."""
    q, k, v, g, beta, state = (x.contiguous() for x in (q, k, v, g, beta, state))
    scale = q.shape[-1] ** -0.5
    if kernel == "flashqla":
        forward, _ = _flash_qla()
        G, A, o, _, final_state, _ = forward(q=q, k=k, v=v, g=g, beta=beta, scale=scale, initial_state=state,
                                             cu_seqlens=cu_seqlens, output_final_state=True, auto_cp=False)
    else:
        forward, _, chunk_index = _fla()
        index = None if cu_seqlens is None else chunk_index(cu_seqlens, GDN_CHUNK)
        G, o, A, final_state, _, _ = forward(q=q, k=k, v=v, g=g, beta=beta, scale=scale, initial_state=state,
                                             output_final_state=True, cu_seqlens=cu_seqlens, chunk_indices=index)
    return o, final_state, G, A


@_gdn_forward.register_fake
def _(q, k, v, g, beta, state, cu_seqlens, kernel):
    return (v.new_empty(v.shape), state.new_empty(state.shape), g.new_empty(g.shape),
            k.new_empty(*g.shape, GDN_CHUNK))


@torch.library.custom_op("gdn_swa::gdn_backward", mutates_args=())
def _gdn_backward(q: Tensor, k: Tensor, v: Tensor, G: Tensor, beta: Tensor, A: Tensor, state: Tensor,
                  cu_seqlens: Tensor | None, do: Tensor, dstate: Tensor | None,
                  kernel: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state."""
    q, k, v, beta, state, do = (x.contiguous() for x in (q, k, v, beta, state, do))
    dstate = torch.zeros_like(state) if dstate is None else dstate.contiguous()
    scale = q.shape[-1] ** -0.5
    if kernel == "flashqla":
        _, backward = _flash_qla()
        dq, dk, dv, db, dg, dh0 = backward(q=q, k=k, v=v, g=G, beta=beta, A=A, do=do, dht=dstate, scale=scale,
                                           initial_state=state, cu_seqlens=cu_seqlens, auto_cp=False)
    else:
        _, backward, chunk_index = _fla()
        index = None if cu_seqlens is None else chunk_index(cu_seqlens, GDN_CHUNK)
        dq, dk, dv, db, dg, dh0, _, _ = backward(q=q, k=k, v=v, g=G, beta=beta, A=A, scale=scale, initial_state=state,
                                                 do=do, dht=dstate, cu_seqlens=cu_seqlens, chunk_indices=index)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(G.dtype), db.to(beta.dtype), dh0


@_gdn_backward.register_fake
def _(q, k, v, G, beta, A, state, cu_seqlens, do, dstate, kernel):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, G, beta, state))


def _gdn_save(ctx, inputs, output):
    """Keep for the backward pass what `_gdn_backward` needs."""
    q, k, v, _, beta, state, cu_seqlens, kernel = inputs
    ctx.save_for_backward(q, k, v, output[2], beta, output[3], state, cu_seqlens)
    ctx.kernel = kernel
    ctx.set_materialize_grads(False)  # an unused final state then costs nothing in the backward pass


def _gdn_grad(ctx, do, dstate, _dG, _dA):
    """Gradients of `_gdn_forward`'s inputs."""
    q, k, v, G, beta, A, state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    return *_gdn_backward(q, k, v, G, beta, A, state, cu_seqlens, do, dstate, ctx.kernel), None, None


_gdn_forward.register_autograd(_gdn_grad, setup_context=_gdn_save)


def short_convolution(x, weight, tail, packing):
    """Causal depthwise convolution, then SiLU: x (B, T, C), weight (C, taps), tail (B, taps - 1, C) before it."""
    taps = weight.shape[1]
    w = weight.to(x.dtype)
    y = x * w[:, taps - 1]
    for by in range(1, taps):
        y = y + shifted(x, tail, by, packing) * w[:, taps - 1 - by]
    return F.silu(y)


def convolved_heads(x, weight, tail, H, HV, packing=None, kernel="auto"):
    """The delta rule's q, k and v: short convolution, SiLU, and for q and k the l2 norm of each head.

    x: (B, T, (2 H + HV) K), the stacked projections.   weight: (channels of x, taps).   tail: (B, taps - 1, channels),
    the rows of x before.   Returns q, k (B, T, H, K) and v (B, T, HV, K) in x's dtype.
    kernel: reference, or any other (auto: on CUDA) for one pass in Triton, if there are 4 taps and no packing.
    """
    K = x.shape[-1] // (2 * H + HV)
    fused = x.is_cuda if kernel == "auto" else kernel != "reference"
    if fused and weight.shape[1] == 4 and packing is None and x[0].numel() < 2**31:
        return _conv_forward(x, weight, tail, H, HV)
    q, k, v = (y.unflatten(-1, (-1, K)) for y in short_convolution(x, weight, tail, packing).split(
        [H * K, H * K, HV * K], -1))
    q, k = (F.normalize(y.float(), dim=-1, eps=1e-6).to(x.dtype) for y in (q, k))
    return q, k, v


CONV_ROWS = 64  # tokens that one program of the kernels below takes


@cache
def _conv_kernel():
    """Triton's `convolved_heads`, and its gradient (BACKWARD): a program takes CONV_ROWS tokens of one head.

    It goes down the rows with the last four in registers, so that each is read once, and loads two rows ahead.  It
    begins three rows early, since four taps reach that far back.  The backward pass computes the forward again and ends
    three rows late, since a row's gradient comes from its own output and the three after it.
    """
    global tl  # Triton looks for names among the module's
    import triton
    import triton.language as tl

    @triton.jit
    def conv_heads(x, weight, tail, y, dx, dw, T, FIRST, C: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr,
                   BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, BACKWARD: tl.constexpr):
        b, h, first = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.program_id(0) * ROWS
        last = tl.minimum(first + ROWS, T)
        c = tl.arange(0, BLOCK)
        real = c < K
        at = FIRST + h * K + c
        w0, w1 = tl.load(weight + 4 * at, real, 0.0), tl.load(weight + 4 * at + 1, real, 0.0)
        w2, w3 = tl.load(weight + 4 * at + 2, real, 0.0), tl.load(weight + 4 * at + 3, real, 0.0)
        x += b * T * C + at
        tail += (b * 3 + 3) * C + at  # row t < 0 is 3 + t of the tail
        y += (b * T * HEADS + h) * K + c  # the result, or with BACKWARD its gradient
        # Zeros of their own: Triton carries names that begin as one value through the loop as one.
        x1, x2, x3 = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
        ahead, beyond = tl.zeros([BLOCK], x.dtype.element_ty), tl.zeros([BLOCK], x.dtype.element_ty)
        if BACKWARD:
            dx += b * T * C + at
            dw += (b * tl.num_programs(0) + tl.program_id(0)) * 4 * C + at
            d1, d2, d3 = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)  # before the SiLU, of the rows before
            s0, s1, s2, s3 = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)  # the weight's
            dy1, dy2 = tl.zeros([BLOCK], y.dtype.element_ty), tl.zeros([BLOCK], y.dtype.element_ty)
        for t in tl.range(first - 5, last + 3 * BACKWARD, loop_unroll_factor=6):  # the first two only read ahead
            x0, ahead, n = ahead.to(tl.float32), beyond, t + 2
            beyond = tl.load(x + n * C, real & (n >= 0) & (n < T), 0.0) + tl.load(tail + n * C, real & (n < 0), 0.0)
            u = w0 * x3 + w1 * x2 + w2 * x1 + w3 * x0
            root = tl.rsqrt(1.0 + tl.exp(-u))  # its square is the sigmoid, without a division
            gate = root * root
            z = u * gate
            if NORM:
                square = tl.sum(z * z, 0)
                unit = tl.rsqrt(tl.maximum(square, 1e-12))
                z *= unit
            if BACKWARD:
                d, dy1 = dy1.to(tl.float32), dy2
                dy2 = tl.load(y + n * HEADS * K, real & (n >= first) & (n < T), 0.0)
                if NORM:
                    d = (d - tl.where(square > 1e-12, tl.sum(d * z, 0), 0.0) * z) * unit
                d *= gate * (1.0 + u * (1.0 - gate))
                dx_row = w0 * d + w1 * d1 + w2 * d2 + w3 * d3
                tl.store(dx + (t - 3) * C, dx_row.to(dx.dtype.element_ty), real & (t - 3 >= first))
                own = tl.where(t < last, d, 0.0)
                s0, s1, s2, s3 = s0 + own * x3, s1 + own * x2, s2 + own * x1, s3 + own * x0
                d3, d2, d1 = d2, d1, d
            else:
                tl.store(y + t * HEADS * K, z.to(y.dtype.element_ty), real & (t >= first))
            x3, x2, x1 = x2, x1, x0
        if BACKWARD:
            tl.store(dw, s0, real)
            tl.store(dw + C, s1, real)
            tl.store(dw + 2 * C, s2, real)
            tl.store(dw + 3 * C, s3, real)
    return conv_heads


def _launch_conv(x, weight, tail, heads_of, H, HV, *gradients):
    """Run the kernel for the heads of q, k and v, each with its tensor of heads_of; gradients: dx and dw, if any."""
    B, T, C = x.shape
    K = C // (2 * H + HV)
    for i, heads in enumerate((H, H, HV)):
        _conv_kernel()[-(-T // CONV_ROWS), B, heads](
            x, weight, tail, heads_of[i], *(gradients or (x, x)), T, i * H * K, C=C, HEADS=heads, K=K,
            BLOCK=1 << (K - 1).bit_length(), ROWS=CONV_ROWS, NORM=i < 2, BACKWARD=int(bool(gradients)), num_warps=1)


def _empty_heads(x, H, HV):
    """Three tensors of the shapes of q, k and v."""
    B, T, C = x.shape
    return tuple(x.new_empty(B, T, heads, C // (2 * H + HV)) for heads in (H, H, HV))


@torch.library.custom_op("gdn_swa::conv_forward", mutates_args=())
def _conv_forward(x: Tensor, weight: Tensor, tail: Tensor, H: int, HV: int) -> tuple[Tensor, Tensor, Tensor]:
    """`convolved_heads` in Triton."""
    x, weight, tail, out = x.contiguous(), weight.contiguous(), tail.contiguous(), _empty_heads(x, H, HV)
    _launch_conv(x, weight, tail, out, H, HV)
    return out


@_conv_forward.register_fake
def _(x, weight, tail, H, HV):
    return _empty_heads(x, H, HV)


@torch.library.custom_op("gdn_swa::conv_backward", mutates_args=())
def _conv_backward(x: Tensor, weight: Tensor, tail: Tensor, dq: Tensor, dk: Tensor,
                   dv: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, which is summed over programs afterwards, in a fixed order."""
    (B, T, C), H, HV = x.shape, dq.shape[2], dv.shape[2]
    x, weight, tail, *grads = (y.contiguous() for y in (x, weight, tail, dq, dk, dv))
    dx, dw = torch.empty_like(x), weight.new_empty(B * -(-T // CONV_ROWS), 4, C)
    _launch_conv(x, weight, tail, grads, H, HV, dx, dw)
    return dx, dw.sum(0).mT.contiguous()


@_conv_backward.register_fake
def _(x, weight, tail, dq, dk, dv):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_conv_forward.register_autograd(
    lambda ctx, dq, dk, dv: (*_conv_backward(*ctx.saved_tensors, dq, dk, dv), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]))


def gated_norm(o, gate, weight, kernel="auto"):
    """rms_norm(o) weight silu(gate), head by head: o (B, T, HV, V), weight (V,), gate (B, T, HV V), rows of any stride.

    kernel: reference, or any other (auto: on CUDA) for one pass over memory in Triton, backward too.
    """
    if (o.is_cuda if kernel == "auto" else kernel != "reference") and o.numel():
        return _norm_forward(o, gate, weight)
    return rms_norm(o) * weight.to(o.dtype) * F.silu(gate.unflatten(-1, o.shape[2:]))


NORM_ROWS = 32  # heads of tokens that one program of the kernel below takes


@cache
def _norm_kernel():
    """Triton's `gated_norm`, or with BACKWARD its gradients, the weight's as one row a program."""
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def gated_norm_kernel(o, gate, weight, dy, out, dgate, dweight, M, STRIDE: tl.constexpr, HEADS: tl.constexpr,
                          V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr):
        row, c = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None], tl.arange(0, BLOCK)
        real, at = (row < M) & (c < V), row * V + c
        x = tl.load(o + at, real, 0.0).to(tl.float32)
        g = tl.load(gate + row // HEADS * STRIDE + row % HEADS * V + c, real, 0.0).to(tl.float32)
        w = tl.load(weight + c, c < V, 0.0)
        r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / V + 1e-6)[:, None]
        x, sigma = x * r, tl.sigmoid(g)
        if BACKWARD:
            d = tl.load(dy + at, real, 0.0).to(tl.float32)
            tl.store(dgate + at, (d * x * w * sigma * (1.0 + g * (1.0 - sigma))).to(dgate.dtype.element_ty), real)
            d *= g * sigma
            tl.store(dweight + tl.program_id(0) * V + c, tl.sum(d * x, 0), c < V)
            d *= w
            y = r * (d - x * (tl.sum(d * x, 1) / V)[:, None])
        else:
            y = x * w * g * sigma
        tl.store(out + at, y.to(out.dtype.element_ty), real)
    return gated_norm_kernel


def _launch_norm(o, gate, weight, dy, out, dgate, dweight):
    """Run the kernel, backward if there is a dy."""
    HV, V = o.shape[2:]
    M = o.shape[:3].numel()
    _norm_kernel()[-(-M // NORM_ROWS),](o, gate, weight, dy, out, dgate, dweight, M, STRIDE=gate.stride(1), HEADS=HV,
                                        V=V, BLOCK=1 << (V - 1).bit_length(), ROWS=NORM_ROWS, BACKWARD=dy is not None)


def _even_rows(gate):
    """gate (B, T, C), its rows at one stride."""
    return gate if gate.stride(2) == 1 and gate.stride(0) == gate.shape[1] * gate.stride(1) else gate.contiguous()


@torch.library.custom_op("gdn_swa::norm_forward", mutates_args=())
def _norm_forward(o: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """`gated_norm` in Triton."""
    o, out = o.contiguous(), o.new_empty(o.shape)
    _launch_norm(o, _even_rows(gate), weight, None, out, None, None)
    return out


@_norm_forward.register_fake
def _(o, gate, weight):
    return o.new_empty(o.shape)


@torch.library.custom_op("gdn_swa::norm_backward", mutates_args=())
def _norm_backward(o: Tensor, gate: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, gate and weight, the last summed over programs in a fixed order."""
    o, dy, do, dgate = o.contiguous(), dy.contiguous(), o.new_empty(o.shape), gate.new_empty(gate.shape)
    dweight = weight.new_empty(-(-o.shape[:3].numel() // NORM_ROWS), len(weight))
    _launch_norm(o, _even_rows(gate), weight, dy, do, dgate, dweight)
    return do, dgate, dweight.sum(0)


@_norm_backward.register_fake
def _(o, gate, weight, dy):
    return o.new_empty(o.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


_norm_forward.register_autograd(lambda ctx, dy: _norm_backward(*ctx.saved_tensors, dy),
                                setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


MLP_TILE = 128, 256, 64  # rows, columns and depth of the tiles of the kernel below


def fuses_mlp(cfg):
    """Whether the MLP runs in the kernel below.  It is written for Hopper: its tiles need Hopper's shared memory, its
    TMA loads need rows of a multiple of 16 bytes (8 channels), its pipeline two steps of MLP_TILE's depth or more."""
    return (cfg.mlp_act == "relu2" and cfg.kernel != "reference" and torch.cuda.is_available()
            and torch.cuda.get_device_capability()[0] == 9 and cfg.model_dim > MLP_TILE[2]
            and cfg.model_dim % 8 == int(cfg.mlp_mult * cfg.model_dim) % 8 == 0)


@cache
def _mlp_kernel():
    """Triton's matrix product with the squared relu (UP), or with its gradient, applied before the result is stored.

    A program takes many tiles.  Tiles that run at one time lie in one row of tiles: x is read from memory once, and the
    weight stays in the L2 cache.  With UP the loops are flattened, so that the next tile's loads begin before this tile
    ends; without, r2's tile waits in registers for the end of the product.
    """
    global tl
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["M"])  # one kernel for every number of tokens
    def mlp_product(x, w, r2, out, M, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    DEPTH: tl.constexpr, UP: tl.constexpr):
        across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
        for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS) * across, tl.num_programs(0), flatten=UP):
            m, n = tile // across * ROWS, tile % across * COLUMNS
            if not UP:
                row, column = m + tl.arange(0, ROWS)[:, None], n + tl.arange(0, COLUMNS)
                squares = tl.load(r2 + row.to(tl.int64) * N + column, (row < M) & (column < N), 0.0)
            y = tl.zeros([ROWS, COLUMNS], tl.float32)
            for k in range(0, K, DEPTH):  # beyond the edges descriptors read zeros and write nothing
                y = tl.dot(x.load([m, k]), w.load([n, k]).T if UP else w.load([k, n]), y)
            if UP:
                y = tl.maximum(y, 0.0)
                y *= y
            else:
                y *= 2.0 * tl.sqrt(squares.to(tl.float32))
            out.store([m, n], y.to(out.dtype))
    return mlp_product


@torch.library.custom_op("gdn_swa::mlp_product", mutates_args=())
def _mlp_product(x: Tensor, w: Tensor, r2: Tensor | None) -> Tensor:
    """r2 = relu(x w^T)^2 (M, N) of x (M, K), w (N, K); or, given r2, x w 2 sqrt(r2) with w (K, N).  All bfloat16."""
    from triton.tools.tensor_descriptor import TensorDescriptor
    tiled, up, (rows, columns, depth) = TensorDescriptor.from_tensor, r2 is None, MLP_TILE
    x, w, r2 = (y if y is None else y.contiguous() for y in (x, w, r2))
    (M, K), N = x.shape, w.shape[0 if up else 1]
    out, tiles = x.new_empty(M, N), -(-M // rows) * -(-N // columns)
    _mlp_kernel()[min(torch.cuda.get_device_properties(x.device).multi_processor_count, tiles),](
        tiled(x, [rows, depth]), tiled(w, [columns, depth] if up else [depth, columns]), r2,
        tiled(out, [rows, columns]), M, N, K, rows, columns, depth, up, num_warps=8, num_stages=3)
    return out


@_mlp_product.register_fake
def _(x, w, r2):
    return x.new_empty(x.shape[0], w.shape[0 if r2 is None else 1])


@torch.library.custom_op("gdn_swa::mlp_forward", mutates_args=())
def _mlp_forward(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """r2 down^T (M, D), and r2 = relu(x up^T)^2: all that is kept, since its root is the relu, and rounds better."""
    r2 = _mlp_product(x, up, None)
    return F.linear(r2, down), r2


@_mlp_forward.register_fake
def _(x, up, down):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], up.shape[0])


def _mlp_save(ctx, inputs, output):
    """Keep for the backward pass what `_mlp_grad` needs; no zeros for r2's gradient."""
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _mlp_grad(ctx, dy, _):
    """Gradients of `_mlp_forward`'s inputs; torch.compile drops the products that nobody needs."""
    x, up, down, r2 = ctx.saved_tensors
    dh = _mlp_product(dy, down, r2)
    return dh @ up, dh.mT @ x, dy.mT @ r2


_mlp_forward.register_autograd(_mlp_grad, setup_context=_mlp_save)


def windowed_attention(q, k, v, window, cu_seqlens=None, kernel="auto"):
    """Causal softmax attention in which a query sees the last `window` keys, its own included.

    q: (B, T, H, d).   k, v: (B, S, Hk, d), S >= T: the last T belong to the queries, those before were carried over.
    cu_seqlens: (N + 1,) with B = 1 and S = T: no query sees another sequence.   Returns (B, T, H, d).
    kernel: sdpa (any device, the reference), varlen (torch), flex (torch, compiled), flash_attn (FA 3 or 2); auto =
    sdpa on CPU, the best one installed on CUDA.
    """
    if kernel == "auto":
        kernel = "sdpa" if q.device.type == "cpu" else pick_attention_kernel("auto")
    return ATTENTION[kernel](q, k, v, window, cu_seqlens)


def window_mask(q_pos, k_pos, window):
    """Which keys a query sees, from positions in one sequence: boolean, broadcast over the two."""
    return (k_pos <= q_pos) & (k_pos > q_pos - window)


def _sdpa_attention(q, k, v, window, cu_seqlens):
    """`windowed_attention` by torch's SDPA: blocks of `window` queries against two blocks of keys."""
    B, T, H, d = q.shape
    S = k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, d)
    if T <= window or cu_seqlens is not None:
        pos = torch.arange(S, device=q.device)
        mask = window_mask(pos[S - T:, None], pos, window)
        if cu_seqlens is not None:
            sequence = torch.searchsorted(cu_seqlens[1:], pos, right=True)
            mask = mask & (sequence[:, None] == sequence)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    past, pad = S - T, -T % window
    blocks = (T + pad) // window

    def two_blocks(x):  # keys of block b: the `window` before its first query, and its own
        x = F.pad(x, (0, 0, window - past, pad)).unfold(2, 2 * window, window)  # (B, Hk, blocks, d, 2 window)
        return x.permute(0, 2, 1, 4, 3).flatten(0, 1)

    k, v = two_blocks(k), two_blocks(v)
    q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
    k_pos = torch.arange(2 * window, device=q.device)
    mask = window_mask(k_pos[window:, None], k_pos, window)
    real = (k_pos >= window - past) | (torch.arange(blocks, device=q.device) > 0)[:, None]  # block 0's left pad
    mask = (mask & real[:, None]).unsqueeze(1).repeat(B, 1, 1, 1)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return o.unflatten(0, (B, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T].transpose(1, 2)


varlen_attn = varlen_groups = flex_attention = create_block_mask = None  # by load_torch_attention


def load_torch_attention():
    """Import torch's attention kernels: a second, for its compiler, that what runs on the CPU need not spend."""
    global varlen_attn, varlen_groups, flex_attention, create_block_mask
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.attention.varlen import varlen_attn
    # torch 2.12 and later want grouped heads announced; 2.11 has no such argument and takes them.
    varlen_groups = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}


def _varlen_attention(q, k, v, window, cu_seqlens):
    """`windowed_attention` by torch's variable-length FlashAttention; CUDA, 16-bit."""
    if varlen_attn is None:
        load_torch_attention()
    B, T, S = *q.shape[:2], k.shape[1]
    if cu_seqlens is None:
        cu_q = torch.arange(0, (B + 1) * T, T, device=q.device, dtype=torch.int32)
        cu_k = torch.arange(0, (B + 1) * S, S, device=q.device, dtype=torch.int32)
    else:
        cu_q = cu_k = cu_seqlens.to(torch.int32)
    o = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_q, cu_k, T, S,
                    window_size=(window - 1, 0), **varlen_groups)
    return o.unflatten(0, (B, T))


def _flex_attention(q, k, v, window, cu_seqlens):
    """`windowed_attention` by FlexAttention, which must run inside torch.compile."""
    if flex_attention is None:
        load_torch_attention()
    T, S = q.shape[1], k.shape[1]
    past = S - T
    if cu_seqlens is None:
        def visible(b, h, i, j):
            return window_mask(i + past, j, window)
    else:
        sequence = torch.searchsorted(cu_seqlens[1:], torch.arange(S, device=q.device), right=True)

        def visible(b, h, i, j):
            return window_mask(i, j, window) & (sequence[i] == sequence[j])
    mask = create_block_mask(visible, None, None, T, S, device=q.device)
    o = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, enable_gqa=True)
    return o.transpose(1, 2)


def _flash_attention(module):
    """`windowed_attention` by the flash-attn package's `module` (FA 3: flash_attn_interface, FA 2: flash_attn)."""
    def attention(q, k, v, window, cu_seqlens):
        if cu_seqlens is None:
            o = module.flash_attn_func(q, k, v, causal=True, window_size=(window - 1, 0))
        else:
            cu, T = cu_seqlens.to(torch.int32), q.shape[1]
            o = module.flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=T,
                                              max_seqlen_k=T, causal=True, window_size=(window - 1, 0))
        o = o[0] if isinstance(o, tuple) else o  # some FA 3 releases return the log-sum-exp too
        return o.unsqueeze(0) if cu_seqlens is not None else o
    return attention


# pick_attention_kernel adds flash_attn when that package can be imported.
ATTENTION = {"sdpa": _sdpa_attention, "varlen": _varlen_attention, "flex": _flex_attention}


@cache
def flash_qla_refusal(H, HV):
    """Why FlashQLA does not run H query and HV value heads on this GPU, '' if it does: it cannot compile for 5."""
    inputs, state = gdn_inputs(2, 200, H, HV, 128, "cuda", torch.bfloat16)
    try:
        gated_delta_rule(**inputs, state=state, kernel="flashqla")
    except (ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # its compiler has no error class of its own
        return f"fails at {H} and {HV} heads ({str(error).strip().splitlines()[-1]})"
    return ""


def pick_gdn_kernel(wanted, H, K, HV, V):
    """The delta-rule kernel on CUDA: `wanted`, or for auto the best that is installed and takes H heads of K, HV of V.

    Raises KernelError saying what is missing and how to install it.
    """
    reasons = []
    for name, load in (("flashqla", _flash_qla), ("fla", _fla)):
        try:
            if wanted not in ("auto", name):
                continue
            if name == "flashqla" and ((K, V) != (128, 128) or torch.cuda.get_device_capability()[0] < 9):
                raise ImportError(f"takes K = V = 128 on Hopper or later, not K = {K}, V = {V}")
            load()
            if name == "flashqla" and (refusal := flash_qla_refusal(H, HV)):
                raise ImportError(refusal)
            return name
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise KernelError(f"KERNEL={wanted}: no fast gated-delta-rule kernel ({'; '.join(reasons)}); install fla-core "
                      "(requirements.txt) or flash-qla (README), or set KERNEL=reference to train slowly without")


def pick_attention_kernel(wanted):
    """The attention kernel on CUDA: `wanted`, or for auto flash_attn if installed, else torch's varlen."""
    if wanted in ("auto", "flash_attn"):
        for name in ("flash_attn_interface", "flash_attn"):
            try:
                ATTENTION["flash_attn"] = _flash_attention(__import__(name))
                return "flash_attn"
            except ImportError:
                continue
        if wanted == "flash_attn":
            raise KernelError("ATTN_KERNEL=flash_attn: neither flash_attn_interface nor flash_attn can be imported; "
                              "set ATTN_KERNEL=auto to use torch's own kernel")
    load_torch_attention()  # before anything is compiled
    return "varlen" if wanted == "auto" else wanted


def resolve_kernels(cfg, run):
    """cfg with KERNEL and ATTN_KERNEL settled for this device, and COMPILE=0 if it is slow; raises KernelError."""
    on_cuda = run.device.type == "cuda"
    kernel, attn = cfg.kernel, cfg.attn_kernel
    if not on_cuda:
        if kernel not in ("auto", "reference") or attn not in ("auto", "sdpa"):
            raise KernelError(f"KERNEL={kernel} ATTN_KERNEL={attn}: need a CUDA GPU; leave both at auto on the CPU")
        kernel, attn = "reference", "sdpa"
    else:
        attn = pick_attention_kernel(attn)
        if attn == "flex" and (cfg.compile == "0" or cfg.compile == "auto" and kernel == "reference"):
            raise KernelError("ATTN_KERNEL=flex: FlexAttention is fast only when compiled; set COMPILE=1")
        if kernel != "reference":
            try:
                K = cfg.gdn_head_dim
                kernel = pick_gdn_kernel(kernel, cfg.gdn_heads, K, cfg.gdn_v_heads or cfg.gdn_heads, K)
            except KernelError:
                if "sample" not in cfg.preset or kernel != "auto":
                    raise
                kernel = "reference"  # minutes at sample size; the log's kernel line says so
    if len(picked := set(run.gather((kernel, attn)))) > 1:
        raise KernelError(f"KERNEL={cfg.kernel} ATTN_KERNEL={cfg.attn_kernel}: the ranks picked {sorted(picked)}; name "
                          "one kernel to see why some ranks cannot use it")
    slow = cfg.compile == "auto" and kernel == "reference"
    return replace(cfg, kernel=kernel, attn_kernel=attn, compile="0" if slow else cfg.compile)


KERNEL_TOLERANCE = 0.02  # relative error that bf16 inputs allow; right kernels measured 0.002 to 0.004 on an H100


def relative_error(x, reference):
    """Norm of the difference over norm of the reference, float."""
    x, reference = x.detach().double(), reference.detach().double()
    return float((x - reference).norm() / reference.norm().clamp_min(1e-30))


def outputs_and_gradients(function, leaves):
    """{name: Tensor} of function(**leaves), a dict, and of "d" + name, gradients under fixed random output weights."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    outputs = function(**leaves)
    rng = torch.Generator(next(iter(leaves.values())).device).manual_seed(1)
    sum((o.float() * torch.randn(o.shape, device=o.device, generator=rng)).sum() for o in outputs.values()).backward()
    return {name: o.detach() for name, o in outputs.items()} | {"d" + name: x.grad for name, x in leaves.items()}


def gdn_inputs(B, T, H, HV, K, device, dtype, seed=0):
    """Random, realistic inputs of `gated_delta_rule` (dict) and a state."""
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device=device, generator=rng)
    q, k = (F.normalize(normal(B, T, H, K), dim=-1).to(dtype) for _ in range(2))
    g = -F.softplus(normal(B, T, HV) - 2.0)
    return dict(q=q, k=k, v=normal(B, T, HV, K).to(dtype), g=g, beta=normal(B, T, HV).sigmoid()), normal(B, HV, K, K)


def check_kernels(cfg, run):
    """Compare the chosen CUDA kernels with the references, outputs and gradients; raises KernelError if they differ."""
    if run.device.type != "cuda":
        return
    worst, rng = {}, torch.Generator(run.device).manual_seed(0)

    def compare(setting, call, fast, exact, **leaves):
        """call(kernel, **leaves) of both kernels, the exact one in float32."""
        got = outputs_and_gradients(partial(call, fast), leaves)
        want = outputs_and_gradients(partial(call, exact), {name: x.float() for name, x in leaves.items()})
        worst.update({f"{setting} {name}": relative_error(got[name], want[name]) for name in want})

    def normal(*shape):
        return torch.randn(*shape, device=run.device, generator=rng).bfloat16()

    def delta_rule(kernel, **x):
        return dict(zip(("o", "final_state"), gated_delta_rule(**x, kernel=kernel)))

    def convolution(kernel, x, w):
        return dict(zip("qkv", convolved_heads(x, w, tail.to(x.dtype), H, HV, kernel=kernel)))

    def norm(kernel, o, gate, w):
        return dict(y=gated_norm(o, gate[..., :-2 * HV], w, kernel))

    def mlp(kernel, x, up, down):
        return dict(y=F.linear(F.linear(x, up).relu().square(), down) if kernel == "reference" else
                    _mlp_forward(x, up, down)[0])

    def attention(kernel, **x):
        call = torch.compile(windowed_attention, dynamic=False) if kernel == "flex" else windowed_attention
        return dict(o=call(**x, window=min(cfg.swa_window, 48), kernel=kernel))
    H, HV, K = cfg.gdn_heads, cfg.gdn_v_heads or cfg.gdn_heads, cfg.gdn_head_dim
    kinds = {layer.kind for layer in parse_stack(cfg.stack)}
    if cfg.kernel != "reference" and "gdn" in kinds:
        inputs, state = gdn_inputs(2, 200, H, HV, K, run.device, torch.bfloat16)
        C = (2 * H + HV) * K
        tail = normal(2, cfg.gdn_conv - 1, C)
        compare(f"KERNEL={cfg.kernel}", delta_rule, cfg.kernel, "reference", **inputs, state=state)
        compare(f"KERNEL={cfg.kernel} conv", convolution, cfg.kernel, "reference", x=normal(2, 200, C),
                w=normal(C, cfg.gdn_conv).float())
        compare(f"KERNEL={cfg.kernel} norm", norm, cfg.kernel, "reference", o=normal(2, 99, HV, K),
                gate=normal(2, 99, HV * K + 2 * HV), w=normal(K).float())
    if fuses_mlp(cfg):
        D, width = cfg.model_dim, int(cfg.mlp_mult * cfg.model_dim)
        compare(f"KERNEL={cfg.kernel} mlp", mlp, cfg.kernel, "reference", x=normal(6001, D),  # several tiles a program
                up=normal(width, D), down=normal(D, width))
    if cfg.attn_kernel != "sdpa" and kinds != {"gdn"}:
        head = cfg.model_dim // cfg.num_heads
        compare(f"ATTN_KERNEL={cfg.attn_kernel}", attention, cfg.attn_kernel, "sdpa",
                q=normal(2, 96, cfg.num_heads, head), k=normal(2, 120, cfg.num_kv_heads, head),
                v=normal(2, 120, cfg.num_kv_heads, head))
    wrong = [f"{name} differs by {error:.3f}" for name, error in worst.items() if not error < KERNEL_TOLERANCE]
    if wrong:
        raise KernelError(f"{'; '.join(wrong)} (relative, at most {KERNEL_TOLERANCE} allowed): this kernel computes "
                          "wrong results on this GPU; set KERNEL or ATTN_KERNEL to another, or update torch and triton")
    run.log("kernel_check", **{re.sub(r"\W", "_", name.split("=")[1]).lower(): error for name, error in worst.items()})


def token_nll(logits, targets):
    """Negative log-likelihood of each target in nats, float32, the shape of targets: a cross entropy over the whole
    vocabulary.

    logits: (B, T, vocab) float32.   targets: (B, T) integer, or (B, T, n): n candidates at every position.
    """
    if targets.dim() == 3:
        logits = logits.unsqueeze(2).expand(*targets.shape, -1)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), reduction="none").view(targets.shape)


# ----------------------------------------------------------------------------------------------------
# 5. Model
# ----------------------------------------------------------------------------------------------------
# One Block, one LM, one forward for training, evaluation, generation and calibration.  A forward may start
# from the state that an earlier one returned, and then computes what one pass over both texts would: GDN
# states, convolution tails, attention windows and the embedding's left context are all in the state.
# Weights are float32; activations are bfloat16 on CUDA and float32 on the CPU.


def rms_norm(x):
    """x over its root mean square along the last axis, computed in float32, in x's dtype."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


# Two global switches, on while a caller's block runs: who sees the products of a forward, and whether it is compiled.
OBSERVERS = []  # functions (x, weights) that see every matrix product of a forward; Hessians uses one


def linear(x, *weights, rows=None):
    """x (..., C) times the transpose of the stacked weights (R_i, C) in one product: (..., sum of R_i).

    rows: None or (sum of R_i,), factors of the outputs.  They multiply the small weight, not the large result: with
    their gradient they then cost no pass over the tokens.
    """
    for observe in OBSERVERS:
        observe(x, weights)
    w = weights[0] if len(weights) == 1 else torch.cat(weights)
    w = w if rows is None else w * rows.unsqueeze(-1)
    return F.linear(x, w.to(x.dtype))


COMPILING = [False]  # whether regions run compiled: so inside a `compiled` function


def region(function):
    """A part of the forward: one graph of its own, static in its shapes, when a `compiled` function runs it.

    Layers of one form share their graph, so that a deep model compiles as fast as a shallow one.
    """
    @cache
    def fast():
        torch._dynamo.config.cache_size_limit = 256  # kinds of layers, shapes, with and without state or gradient
        # torch 2.13's in-place reuse overwrites a tensor inside a concatenation that is still read (SmearGate): off.
        return torch.compile(function, fullgraph=True, dynamic=False, options={"inplace_buffers": False})

    @wraps(function)
    def run(*args):
        return (fast() if COMPILING[0] else function)(*args)
    return run


def compiled(function, enabled):
    """`function`, all its regions under torch.compile if enabled."""
    @wraps(function)
    def run(*args):
        before, COMPILING[0] = COMPILING[0], enabled
        try:
            return function(*args)
        finally:
            COMPILING[0] = before
    return run


class Packing(NamedTuple):
    """Several documents in one row: `cu_seqlens` (N + 1,) and each token's position in its document (T,)."""
    cu_seqlens: Tensor
    position: Tensor


def shifted(x, tail, by, packing):
    """x (B, T, ...) moved `by` tokens to the right; the first ones come from `tail` (B, L >= by, ...), the text before.

    With packing, positions that would look into another document get zeros.
    """
    T, L = x.shape[1], tail.shape[1]
    y = torch.cat([tail, x], 1)[:, L - by:L - by + T]
    if packing is not None:
        y = y * (packing.position >= by).to(y.dtype).view(1, T, *[1] * (x.dim() - 2))
    return y


def last_tokens(tail, x, count):
    """The last `count` entries along the token axis of tail (B, L, ...) followed by x (B, T, ...)."""
    if x.shape[1] >= count:
        return x[:, x.shape[1] - count:]
    return torch.cat([tail, x], 1)[:, -count:]


class Embedding(nn.Module):
    """Token embedding plus hashed bigrams and trigrams, normalised, then SmearGate; also the tied output head.

    `weight` (vocab, D).  The n-gram table (buckets, ngram_dim) is shared by both orders, projected to D and scaled.
    No n-gram and no smear crosses the token `bos_id`.  State: the two ids and the one embedding before.
    `hash_table` (buckets, D), indexed by the same n-grams: None, or made and trained by an Adapter (TTT_HASH_BUCKETS).
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.vocab_size, cfg.model_dim))
        if cfg.ngram_buckets:
            self.ngram_table = nn.Parameter(torch.empty(cfg.ngram_buckets, cfg.ngram_dim))
            self.ngram_proj = nn.Parameter(torch.empty(cfg.model_dim, cfg.ngram_dim))
            self.ngram_scale = nn.Parameter(torch.empty(1))
        if cfg.smear:
            self.smear_gate = nn.Parameter(torch.empty(cfg.model_dim))
        self.register_parameter("hash_table", None)

    def fresh_state(self, B, device, dtype):
        """The state before any text: ids -1 (no token), zero embedding."""
        return EmbedState(torch.full((B, 2), -1, dtype=torch.int64, device=device),
                          torch.zeros(B, 1, self.cfg.model_dim, dtype=dtype, device=device))

    def ngrams(self, table, ids, prev1, prev2):
        """Sum of the rows of the bigram (prev1, id) and trigram (prev2, prev1, id) in `table`; absent tokens: -1."""
        h = (ids * 0x2545F491 + (prev1 + 1) * 0x1B873593) & 0x7FFFFFFF
        x = F.embedding((h ^ (h >> 15)) % len(table), table)
        if self.cfg.ngram_order == 3:
            h = (h * 5 + (prev2 + 1) * 0x19D699A5 + 0x3C6EF372) & 0x7FFFFFFF
            x = x + F.embedding((h ^ (h >> 15)) % len(table), table)
        return x

    @region
    def forward(self, ids, state, packing, dtype):
        """ids (B, T) -> x (B, T, D) in `dtype`, and the state behind them."""
        ids = ids.long()
        first = ids == self.cfg.bos_id  # begins a document: sees nothing before it
        if packing is not None:
            first = first | (packing.position == 0)
        prev1 = torch.where(first, -1, shifted(ids, state.ids, 1, None))
        x = F.embedding(ids, self.weight).to(dtype)
        if self.cfg.ngram_buckets or self.hash_table is not None:
            # The token two back counts only if the one before was not itself the first of its document.
            starts = F.pad(first[:, :-1], (1, 0))
            starts[:, 0] = state.ids[:, 1] == self.cfg.bos_id
            prev2 = torch.where(first | starts, -1, shifted(ids, state.ids, 2, None))
        if self.cfg.ngram_buckets:
            rows = self.ngrams(self.ngram_table, ids, prev1, prev2).to(dtype)
            x = x + linear(rows, self.ngram_proj) * self.ngram_scale.to(dtype)
        if self.hash_table is not None:
            x = x + self.ngrams(self.hash_table, ids, prev1, prev2).to(dtype)
        x = rms_norm(x)
        after = EmbedState(last_tokens(state.ids, ids, 2), x[:, -1:].detach())
        if self.cfg.smear:
            before = shifted(x, state.x.to(dtype), 1, None)
            gate = torch.sigmoid(self.smear_gate).to(dtype) * (prev1 >= 0).to(dtype).unsqueeze(-1)
            x = x + gate * (before - x)
        return x, after

    def logits(self, x):
        """x (B, T, D), the last block's output -> softcapped float32 logits (B, T, vocab)."""
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(linear(rms_norm(x), self.weight).float() / cap)


class EmbedState(NamedTuple):
    """`ids` (B, 2) int64 and `x` (B, 1, D): what an Embedding needs of the text before."""
    ids: Tensor
    x: Tensor


class GDNState(NamedTuple):
    """`conv` (B, taps - 1, channels) inputs of the convolution and `S` (B, HV, K, V) float32."""
    conv: Tensor
    S: Tensor


class KVState(NamedTuple):
    """Normalised, unrotated keys and values (B, up to window - 1, Hk, d) of the tokens before."""
    k: Tensor
    v: Tensor


class KeyValue(nn.Module):
    """Key and value projections of one mixer, or with KV_SHARE of several, and for GDN their convolutions."""

    def __init__(self, D, k_rows, v_rows, taps=0):
        super().__init__()
        self.k_proj, self.v_proj = nn.Parameter(torch.empty(k_rows, D)), nn.Parameter(torch.empty(v_rows, D))
        if taps:
            self.k_conv, self.v_conv = nn.Parameter(torch.empty(k_rows, taps)), nn.Parameter(torch.empty(v_rows, taps))


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet mixer [1]: short convolutions on q, k, v, l2-normalised q and k, gated delta rule, gated norm.

    Weights are separate per role, so that Muon orthogonalises each as a whole; the forward stacks them for products.
    """

    def __init__(self, cfg, kv=None):
        super().__init__()
        self.cfg = cfg
        self.H, self.HV, self.K = cfg.gdn_heads, cfg.gdn_v_heads or cfg.gdn_heads, cfg.gdn_head_dim
        D, qk, v = cfg.model_dim, self.H * self.K, self.HV * self.K
        self.kv = kv or KeyValue(D, qk, v, cfg.gdn_conv)
        self.q_proj, self.g_proj = nn.Parameter(torch.empty(qk, D)), nn.Parameter(torch.empty(v, D))
        self.a_proj, self.b_proj = nn.Parameter(torch.empty(self.HV, D)), nn.Parameter(torch.empty(self.HV, D))
        self.o_proj = nn.Parameter(torch.empty(D, v))
        self.q_conv = nn.Parameter(torch.empty(qk, cfg.gdn_conv))
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(self.HV)), nn.Parameter(torch.empty(self.HV))
        self.o_norm = nn.Parameter(torch.empty(self.K))

    num_gains = 0

    def forward(self, x, scale, gain, state, packing, xsa=False):
        """x (B, T, D), scale (D,) of the output -> (B, T, D) and the GDNState behind it; gain and xsa are unused."""
        B, T, _ = x.shape
        H, HV, K = self.H, self.HV, self.K
        kv = self.kv
        # Two products, not one: the convolution returns the gradient of qkv whole, with nothing to concatenate it to.
        qkv = linear(x, self.q_proj, kv.k_proj, kv.v_proj)
        gate, a, b = linear(x, self.g_proj, self.a_proj, self.b_proj).split([HV * K, HV, HV], -1)
        taps = self.cfg.gdn_conv
        tail = x.new_zeros(B, taps - 1, qkv.shape[-1]) if state is None else state.conv.to(x.dtype)
        q, k, v = convolved_heads(qkv, torch.cat([self.q_conv, kv.k_conv, kv.v_conv]), tail, H, HV, packing,
                                  self.cfg.kernel)
        g = -self.A_log.exp() * F.softplus(a.float() + self.dt_bias)
        beta = torch.sigmoid(b.float()) * (2.0 if self.cfg.gdn_neg_eigval else 1.0)
        o, S = gated_delta_rule(q=q, k=k, v=v, g=g, beta=beta,
                                state=None if state is None else state.S,
                                cu_seqlens=None if packing is None else packing.cu_seqlens, kernel=self.cfg.kernel)
        o = gated_norm(o, gate, self.o_norm, self.cfg.kernel)
        return linear(o.flatten(2), self.o_proj, rows=scale), GDNState(last_tokens(tail, qkv, taps - 1).detach(),
                                                                       S.detach())


@torch.library.custom_op("gdn_swa::rotary_table", mutates_args=())
def rotary_table(length: int, base: float, dims: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosine and sine of the angles [3] that turn `dims` channels at positions 0, 1, ...: (2, length, 1, dims / 2).

    An operator, so that torch.compile keeps the table instead of computing it again at every element of q and k.
    """
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = position[:, None] * base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    return torch.stack([angle.cos(), angle.sin()]).unsqueeze(2).to(dtype)


@rotary_table.register_fake
def _(length, base, dims, dtype, device):
    return torch.empty(2, length, 1, dims // 2, dtype=dtype, device=device)


def rotary(x, table):
    """Rotate channels of each head of x (B, T, H, d) by a `rotary_table` of T positions; the rest stay as they are."""
    cos, sin = table
    half = cos.shape[-1]
    x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest], -1)


class Attention(nn.Module):
    """Windowed softmax attention: grouped key/value heads, normalised q and k, rotary positions, a gain per head."""

    def __init__(self, cfg, window, kv=None):
        super().__init__()
        self.cfg, self.window = cfg, window
        D, kv_rows = cfg.model_dim, cfg.model_dim // cfg.num_heads * cfg.num_kv_heads
        self.kv = kv or KeyValue(D, kv_rows, kv_rows)
        self.q_proj, self.o_proj = nn.Parameter(torch.empty(D, D)), nn.Parameter(torch.empty(D, D))
        self.num_gains = cfg.num_heads

    def forward(self, x, scale, gain, state, packing, xsa=False):
        """x (B, T, D), scale (D,) of the output, gain (H,) -> (B, T, D) and the KVState behind it; xsa: exclusive.

        Positions count from the oldest carried key: only differences matter, and small numbers stay exact.
        """
        cfg, d = self.cfg, self.cfg.model_dim // self.cfg.num_heads
        kv_rows = d * cfg.num_kv_heads
        q, k, v = linear(x, self.q_proj, self.kv.k_proj, self.kv.v_proj).split([cfg.model_dim, kv_rows, kv_rows], -1)
        q, k, v = (y.unflatten(-1, (-1, d)) for y in (q, k, v))
        q, k = rms_norm(q), rms_norm(k)
        if state is not None:
            k, v = torch.cat([state.k.to(x.dtype), k], 1), torch.cat([state.v.to(x.dtype), v], 1)
        S = k.shape[1]
        table = rotary_table(S, cfg.rope_base, cfg.rope_dims or d, x.dtype, x.device)
        q = rotary(q, table[:, S - x.shape[1]:]) * gain.to(x.dtype)[:, None]
        o = windowed_attention(q, rotary(k, table), v, self.window, None if packing is None else packing.cu_seqlens,
                               cfg.attn_kernel)
        if xsa:
            o = without_own_value(o, v[:, S - x.shape[1]:])
        keep = S - min(self.window - 1, S)
        return linear(o.flatten(2), self.o_proj, rows=scale), KVState(k[:, keep:].detach(), v[:, keep:].detach())


def without_own_value(o, v):
    """Exclusive self attention: o (B, T, H, d) less its component along the token's own value v (B, T, Hk, d)."""
    unit = F.normalize(v.float(), dim=-1, eps=1e-6).to(o.dtype).unsqueeze(3)  # (B, T, Hk, 1, d)
    grouped = o.unflatten(2, (v.shape[2], -1))
    return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(2, 3)


class MLP(nn.Module):
    """Two matrices around a squared activation."""

    def __init__(self, cfg):
        super().__init__()
        width = int(cfg.mlp_mult * cfg.model_dim)
        self.slope = 0.5 if cfg.mlp_act == "leaky_relu2" else 0.0
        self.fused = fuses_mlp(cfg)
        self.up_proj = nn.Parameter(torch.empty(width, cfg.model_dim))
        self.down_proj = nn.Parameter(torch.empty(cfg.model_dim, width))

    def forward(self, x, scale):
        """x (..., D), scale (D,) of the output -> (..., D)."""
        if self.fused and x.is_cuda and not OBSERVERS:  # they see the products of `linear` only
            down = self.down_proj if scale is None else self.down_proj * scale.unsqueeze(-1)
            y, _ = _mlp_forward(x.flatten(0, -2), self.up_proj.to(x.dtype), down.to(x.dtype))
            return y.view_as(x)
        return linear(F.leaky_relu(linear(x, self.up_proj), self.slope).square(), self.down_proj, rows=scale)


class Block(nn.Module):
    """Residual mix with the embedding, then mixer and MLP, each normalised before and scaled after.

    Layers of one tag share `mixer` (and `mlp` with SHARE_MLP); the vectors are each layer's own, and whether its
    attention is exclusive (xsa).
    """

    def __init__(self, cfg, mixer, mlp, xsa=False):
        super().__init__()
        self.mixer, self.mlp, self.xsa = mixer, mlp, xsa
        self.resid_mix = nn.Parameter(torch.empty(2, cfg.model_dim))
        self.mixer_scale = nn.Parameter(torch.empty(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.empty(cfg.model_dim))
        self.qk_gain = nn.Parameter(torch.empty(mixer.num_gains)) if mixer.num_gains else None

    @region
    def forward(self, x, x0, state, packing, skip=None, skip_scale=None):
        """x, x0 (B, T, D), x0 the embedding -> x and the mixer's state; skip (B, T, D) is added first, scaled (D,)."""
        if skip is not None:
            x = x + skip_scale.to(x.dtype) * skip
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        y, state = self.mixer(rms_norm(x), self.mixer_scale, self.qk_gain, state, packing, self.xsa)
        x = x + y
        return x + self.mlp(rms_norm(x), self.mlp_scale), state


class StreamState(NamedTuple):
    """Everything that a forward needs of the text before: EmbedState and one mixer state per layer."""
    embed: EmbedState
    layers: tuple


@region
def head(embed, x):
    """Logits from the last block's output."""
    return embed.logits(x)


@region
def head_nll(embed, x, targets):
    """`token_nll` of the logits, for training: in one graph, which never writes float32 logits to memory."""
    return token_nll(embed.logits(x), targets)


class LM(nn.Module):
    """The language model that `cfg` describes: Embedding, Blocks by STACK, tied softcapped head."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = Embedding(cfg)
        layers = parse_stack(cfg.stack)
        attention = [i for i, layer in enumerate(layers) if layer.kind != "gdn"]
        xsa = set(attention[::-1][:cfg.xsa_layers])
        mixers, mlps, key_values, made, blocks = {}, {}, {}, {}, []
        for i, layer in enumerate(layers):
            loop = i % cfg.unique_layers if cfg.unique_layers else i  # Config checks that the kinds agree
            tag = layer.tag or f"#{loop}"
            if tag not in mixers:
                turn = made[layer.kind] = made.get(layer.kind, -1) + 1  # the how-manieth mixer of its kind
                group = layer.kind, turn // cfg.kv_share
                window = cfg.swa_window if layer.kind == "swa" else cfg.train_seq_len
                kv = key_values.get(group)
                mixers[tag] = GatedDeltaNet(cfg, kv) if layer.kind == "gdn" else Attention(cfg, window, kv)
                key_values[group] = mixers[tag].kv
            mlp_tag = tag if cfg.share_mlp or cfg.unique_layers and not layer.tag else f"#{i}"
            if mlp_tag not in mlps:
                mlps[mlp_tag] = MLP(cfg)
            blocks.append(Block(cfg, mixers[tag], mlps[mlp_tag], i in xsa))
        self.blocks = nn.ModuleList(blocks)
        self.skip_scale = nn.Parameter(torch.empty(len(blocks) // 2, cfg.model_dim)) if cfg.unet else None

    def forward(self, ids, state=None, cu_seqlens=None):
        """Logits of the token after each position, and the state behind the last.

        ids: (B, T) integer.   state: StreamState that an earlier forward returned for the text before, or None.
        cu_seqlens: (N + 1,) with B = 1: the row holds N documents, none of which sees another; then no state goes in
        or comes out (None).   Returns logits (B, T, vocab) float32 after the softcap, and the StreamState, detached.
        Raises ValueError for cu_seqlens with a state or with B > 1.
        """
        x, after = self.features(ids, state, cu_seqlens)
        return head(self.embed, x), after

    def features(self, ids, state=None, cu_seqlens=None):
        """`forward` up to the head: the last block's output (B, T, D) and the StreamState."""
        packing = None
        if cu_seqlens is not None:
            if state is not None or ids.shape[0] != 1:
                raise ValueError(f"cu_seqlens needs one row and no state, got {ids.shape[0]} rows and a state of type "
                                 f"{type(state).__name__}")
            t = torch.arange(ids.shape[1], device=ids.device)
            packing = Packing(cu_seqlens, t - cu_seqlens[torch.searchsorted(cu_seqlens, t, right=True) - 1])
        dtype = torch.bfloat16 if ids.device.type == "cuda" else self.embed.weight.dtype
        fresh = self.embed.fresh_state(ids.shape[0], ids.device, dtype)
        before = state or StreamState(fresh, (None,) * len(self.blocks))
        x, embed_state = self.embed(ids, before.embed, packing, dtype)
        x0 = x.clone()  # not x itself: the first block would be compiled apart, for two inputs that are one
        layers, skips, half = [], [], len(self.blocks) // 2
        for i, (block, layer_state) in enumerate(zip(self.blocks, before.layers)):
            skip = ()
            if self.skip_scale is not None and i >= len(self.blocks) - half:  # the last layer meets the first
                skip = skips.pop(), self.skip_scale[i - len(self.blocks) + half]
            x, layer_state = block(x, x0, layer_state, packing, *skip)
            layers.append(layer_state)
            if self.skip_scale is not None and i < half:
                skips.append(x)
        after = StreamState(embed_state, tuple(layers))
        return x, (after if packing is None else None)


def init_weights(model, seed):
    """Initial values, drawn on the CPU from `seed`, so that every device and rank starts equal.

    | parameter                         | value                                                        |
    |-----------------------------------|--------------------------------------------------------------|
    | embed.weight                      | normal, std TIED_EMBED_INIT_STD                              |
    | *.o_proj, *.down_proj, ngram_table| 0: every block and n-gram starts as the identity             |
    | other matrices (R, C)             | uniform, std 1 / sqrt(3 C)                                   |
    | q_conv, k_conv, v_conv            | uniform in +-1 / sqrt(taps)                                  |
    | A_log, dt_bias                    | log U(0, 16); softplus^-1 of log-uniform in [0.001, 0.1] [1] |
    | resid_mix                         | (1, 0)                                                       |
    | *_scale, o_norm; ngram_scale      | 1; 0.05, as the entries have it                              |
    | qk_gain, smear_gate               | QK_GAIN_INIT; -2                                             |
    """
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind in ("o_proj", "down_proj", "ngram_table"):
            value = torch.zeros(p.shape)
        elif kind == "weight":
            value = torch.randn(p.shape, generator=rng) * model.cfg.tied_embed_init_std
        elif kind == "resid_mix":
            value = torch.tensor([1.0, 0.0])[:, None].expand(p.shape)
        elif kind == "A_log":
            value = (torch.rand(p.shape, generator=rng) * 16).clamp_min(1e-3).log()
        elif kind == "dt_bias":
            dt = torch.exp(torch.rand(p.shape, generator=rng) * math.log(0.1 / 0.001) + math.log(0.001))
            value = dt + torch.log(-torch.expm1(-dt))
        elif kind in ("qk_gain", "smear_gate", "ngram_scale", "mixer_scale", "mlp_scale", "skip_scale", "o_norm"):
            constants = {"qk_gain": model.cfg.qk_gain_init, "smear_gate": -2.0, "ngram_scale": 0.05}
            value = torch.full(p.shape, constants.get(kind, 1.0))
        else:  # uniform in +-1 / sqrt(C) has std 1 / sqrt(3 C); a convolution's C is its taps
            value = (torch.rand(p.shape, generator=rng) * 2 - 1) * p.shape[1] ** -0.5
        with torch.no_grad():
            p.copy_(value)
    return model


# ----------------------------------------------------------------------------------------------------
# 6. Optimizer
# ----------------------------------------------------------------------------------------------------
# One table says how every parameter is trained and stored.  Muon orthogonalises whole matrices, batched by
# shape and shared out over ranks; AdamW takes the rest.  Gradients live in one flat buffer: one reduction,
# one norm.  One rank and N ranks do the same up to the order of sums.


class Route(NamedTuple):
    """How parameters whose name matches `pattern` are trained and stored; lr, decay, bits, clip name Config fields."""
    pattern: str
    optimizer: str
    lr: str
    decay: str
    bits: str
    clip: str
    role: str


# The first match counts.  Empty bits: stored as float16 or float32; empty decay: none.
ROUTES = (
    Route(r"embed\.(weight|ngram_table)$", "adamw", "tied_embed_lr", "adam_weight_decay", "embed_bits",
          "embed_clip_sigmas", "embed"),
    Route(r"\.[ab]_proj$", "muon", "matrix_lr", "muon_weight_decay", "embed_bits", "embed_clip_sigmas", "gate"),
    Route(r"\.mlp\.\w+_proj$", "muon", "matrix_lr", "muon_weight_decay", "mlp_bits", "matrix_clip_sigmas", "mlp"),
    Route(r"_proj$", "muon", "matrix_lr", "muon_weight_decay", "matrix_bits", "matrix_clip_sigmas", "mixer"),
    Route(r"(^|\.)(resid_mix|\w+_scale|qk_gain|o_norm|A_log|dt_bias|[qkv]_conv|smear_gate)$",
          "adamw", "scalar_lr", "", "", "", "control"),
)


@cache
def route(name):
    """The Route of a parameter; every one has a row, or a test fails."""
    return next(entry for entry in ROUTES if re.search(entry.pattern, name))


def newton_schulz(G, steps):
    """Approximately orthogonalise each matrix of G (n, R, C): singular values go to about 1 (0.7 to 1.2) [2].

    Works in bfloat16 on CUDA and in float32 on the CPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # quintic of steepest slope at zero that keeps [0, 1] near 1 [2]
    X = G.to(torch.bfloat16 if G.is_cuda else torch.float32)
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def muon_update(grad, momentum_buffer, momentum, steps, taken=1.0):
    """Muon's direction for a stack of matrices (n, R, C): Nesterov momentum, then `newton_schulz`.

    Updates momentum_buffer in place, unless `taken` is 0, which skips the step.  The direction has singular values of
    about 1, so a learning rate is the spectral norm of a step; a tall matrix's is sqrt(R / C) times larger [2].
    """
    momentum_buffer.lerp_(grad, (1 - momentum) * taken)
    direction = newton_schulz(grad.lerp(momentum_buffer, momentum), steps)
    return direction * max(1.0, grad.shape[-2] / grad.shape[-1]) ** 0.5


class Optimizer:
    """Muon and AdamW over one flat gradient buffer, for one rank or many."""

    def __init__(self, model, cfg, run):
        self.cfg, self.run, self.steps_done = cfg, run, 0
        self.bad_steps = torch.zeros((), device=run.device)
        params = dict(model.named_parameters())
        self.names = {id(p): name for name, p in params.items()}
        self.flat_grad = torch.zeros(sum(p.numel() for p in params.values()), device=run.device)
        for p, part in zip(params.values(), self.flat_grad.split([p.numel() for p in params.values()])):
            p.grad = part.view_as(p)
        self.matrices, adamw = {}, {}
        for name, p in params.items():
            r = route(name)
            if r.optimizer == "muon":
                self.matrices.setdefault((r, tuple(p.shape)), []).append(p)
            else:
                adamw.setdefault(r, []).append(p)
        self.buffers = {key: torch.zeros(-(-len(ps) // run.world_size), *key[1], device=run.device)
                        for key, ps in self.matrices.items()}  # momenta of this rank's share of the matrices
        self.adamw = torch.optim.AdamW(
            [dict(params=ps, lr=getattr(cfg, r.lr), base_lr=getattr(cfg, r.lr),
                  weight_decay=getattr(cfg, r.decay) if r.decay else 0.0) for r, ps in adamw.items()],
            betas=(cfg.beta1, cfg.beta2), eps=1e-10, fused=True)

    def momentum(self):
        """Muon's momentum at this step: a linear warm-up."""
        cfg = self.cfg
        part = min(1.0, self.steps_done / max(1, cfg.muon_momentum_warmup_steps))
        return cfg.muon_momentum_warmup_start * (1 - part) + cfg.muon_momentum * part

    @torch.no_grad()
    def step(self, lr_mul):
        """Reduce, clip and apply the gradients at lr_mul times the full learning rates; zero them.

        If they are not finite, weights, momenta and moments stay as they are, and `bad_steps`, a tensor on the device,
        counts one more: the host need not wait to know.   Returns the gradient norm before clipping, a tensor.
        """
        self.run.all_sum(self.flat_grad)
        if self.run.world_size > 1:
            self.flat_grad.div_(self.run.world_size)
        norm = self.flat_grad.norm()  # one NaN or infinity anywhere makes it one, on every rank alike
        taken = norm.isfinite().float()
        self.bad_steps += 1 - taken
        if self.cfg.grad_clip_norm:
            self.flat_grad.mul_((self.cfg.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self.flat_grad.masked_fill_(taken == 0, 0.0)
        for (r, shape), params in self.matrices.items():
            self._muon_step(params, self.buffers[r, shape], r, lr_mul, taken)
        self.adamw.found_inf, self.adamw.grad_scale = 1 - taken, None  # torch's own way to skip a fused step
        for parameters in self.adamw.param_groups:
            parameters["lr"] = parameters["base_lr"] * lr_mul
        self.adamw.step()
        self.flat_grad.zero_()
        self.steps_done += 1
        return norm

    def _own(self, params, buffer):
        """The matrices of one shape whose momenta are this rank's `buffer`; the last ranks may have fewer, or none."""
        return params[self.run.rank * len(buffer):][:len(buffer)]

    def _muon_step(self, params, buffer, r, lr_mul, taken):
        """One shape: each rank orthogonalises its share of whole matrices, all apply all."""
        own = self._own(params, buffer)
        mine = torch.zeros_like(buffer, dtype=torch.bfloat16 if buffer.is_cuda else torch.float32)
        if own:
            mine[:len(own)] = muon_update(torch.stack([p.grad for p in own]), buffer[:len(own)], self.momentum(),
                                          self.cfg.muon_backend_steps, taken)
        updates = self.run.all_gather_rows(mine)[:len(params)]
        lr = getattr(self.cfg, r.lr) * lr_mul
        torch._foreach_mul_(params, 1 - lr * getattr(self.cfg, r.decay) * taken)
        torch._foreach_add_(params, list((updates.float() * taken).unbind()), alpha=-lr)

    def state(self):
        """{name: Tensor} of everything that is not in the weights, the same for any number of ranks; all must call."""
        out = {f"adamw.{key}.{self.names[id(p)]}": value for p, values in self.adamw.state.items()
               for key, value in values.items()}
        for key, params in self.matrices.items():
            rows = self.run.all_gather_rows(self.buffers[key])
            out |= {f"muon.{self.names[id(p)]}": row for p, row in zip(params, rows)}
        return out | {"bad_steps": self.bad_steps}

    def load(self, tensors, steps_done):
        """Take over what `state` returned, under any number of ranks; raises FileError if something is missing."""
        self.steps_done = steps_done
        copy_saved(self.bad_steps, tensors, "bad_steps")
        for key, params in self.matrices.items():
            for p, row in zip(self._own(params, self.buffers[key]), self.buffers[key]):
                copy_saved(row, tensors, f"muon.{self.names[id(p)]}")
        for p in (p for group in self.adamw.param_groups if steps_done for p in group["params"]):
            step = torch.zeros((), device=p.device)
            self.adamw.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            for key, value in self.adamw.state[p].items():
                copy_saved(value, tensors, f"adamw.{key}.{self.names[id(p)]}")


class Average:
    """Averaged weights, float32: exponential (EMA_DECAY), or with AVERAGE_EVERY the mean of steps in the warm-down."""

    def __init__(self, model, cfg):
        self.cfg, self.count = cfg, 0
        self.names, self.params = zip(*model.named_parameters())
        self.mean = [p.detach().clone() for p in self.params] if cfg.ema_decay or cfg.average_every else []

    @torch.no_grad()
    def update(self, step, lr_mul):
        """Take in the weights after `step`; an EMA's decay is warmed up so that a short run forgets its start."""
        if self.cfg.average_every:
            if lr_mul >= 1.0 or step % self.cfg.average_every:
                return
            weight = 1 / (1 + self.count)
        elif self.cfg.ema_decay:
            weight = 1 - min(self.cfg.ema_decay, (2 + self.count) / (11 + self.count))
        else:
            return
        self.count += 1
        torch._foreach_lerp_(self.mean, self.params, weight)

    def copy_to(self):
        """Replace the model's weights by their average, if there is one."""
        if self.count:
            copy_all(self.params, self.mean)

    def state(self):
        """{name: Tensor} of the averages."""
        return {f"average.{name}": mean for name, mean in zip(self.names, self.mean)}

    def load(self, tensors, count):
        """Take over what `state` returned, the mean of `count` updates; raises FileError if something is missing."""
        self.count = count
        for name, mean in zip(self.names, self.mean):
            copy_saved(mean, tensors, f"average.{name}")


# ----------------------------------------------------------------------------------------------------
# 7. Quantization and the artifact
# ----------------------------------------------------------------------------------------------------
# Matrices become integers times a float16 scale per row, and with GRID=rate one per column too; small tensors
# stay float16 or float32; a shared tensor is stored once.  The file is a fixed head (magic, version, lengths,
# SHA-256), a JSON header (model settings, tensor table) and streams.  Nothing in it is executed; every length
# is checked; integers are coded by our own rANS coder, whose tables are integers in the file.

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"GDNSWA\r\n", 2
ARTIFACT_HEAD = struct.Struct("<8sIIIQ32s")  # magic, version, header bytes packed, unpacked, payload bytes, SHA-256
MAX_HEADER_BYTES, MAX_RAW_BYTES = 1 << 22, 1 << 30
STREAM_BYTES = 1 << 22  # large roles are cut into streams of this size, compressed on all cores


def row_scale(W, bits, clip_sigmas):
    """The step of each row of W (..., R, C): clip_sigmas * std(row) / qmax (SDClip), 1 for zero rows; float16.

    bits: 2..8, a number or a tensor that broadcasts over the rows.
    """
    W = W.float()
    spread = clip_sigmas * W.std(-1, correction=0)
    spread = torch.where(spread > 0, spread, W.abs().amax(-1))  # a constant row: one step per qmax of its value
    scale = (spread / (2 ** (bits - 1) - 1)).to(torch.float16)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize(W, bits, clip_sigmas):
    """Round each row of W (..., R, C) to the nearest integers of `bits` bits (a number, or a tensor over the rows).

    Returns Q int8 (..., R, C) in [-qmax, qmax], qmax = 2^(bits-1) - 1, and scale float16 (..., R): W ~ Q * scale.
    Source: README, "Export".
    """
    scale = row_scale(W, bits, clip_sigmas)
    qmax = 2 ** (bits - 1) - 1  # a number stays one: as a tensor it would make the host wait, in every QAT step
    qmax = qmax[..., None] if isinstance(bits, Tensor) else qmax
    Q = (W.float() / scale.float().unsqueeze(-1)).round()
    return Q.clamp(-qmax, qmax).to(torch.int8), scale


def dequantize(Q, scale, columns=None):
    """The float32 weight that Q (..., R, C), its row scales (..., R) and column scales (..., C), if any, stand for."""
    W = Q.float() * scale.float().unsqueeze(-1)
    return W if columns is None else W * columns.float().unsqueeze(-2)


DAMP = 0.01  # added to a Hessian's diagonal, as a part of its mean


def error_factor(H, damp=DAMP):
    """Upper Cholesky factor U of each damped H^-1 (..., C, C): its row i says how columns i.. answer an error in i.

    damp: added to the diagonal as a part of its mean; raised tenfold for those matrices that are still not positive
    definite.  A column that no token reaches counts as independent.   Returns U and the damping of each, (...); where
    no damping helps (H is not finite), U is the identity, with which GPTQ rounds to nearest, and the damping infinite.
    """
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True).clamp_min(1e-12)
    damp = torch.full_like(mean, damp)
    for _ in range(12):
        padded = H.float() + torch.diag_embed(torch.where(diagonal <= 0, mean, damp * mean))
        L, fault = torch.linalg.cholesky_ex(padded)
        U, fault_inverse = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        bad = (fault + fault_inverse != 0) | ~U.isfinite().all(-1).all(-1)
        if not bool(bad.any()):
            break
        damp = torch.where(bad.unsqueeze(-1), 10 * damp, damp)
    damp = damp.squeeze(-1).masked_fill(bad, math.inf)
    return torch.where(bad[..., None, None], torch.eye(H.shape[-1], device=H.device), U), damp


def compensate(W, step, U, qmax, block=128):
    """GPTQ's loop: round column by column, later columns making up for the errors of earlier ones.

    W: (..., R, C).   step: broadcasts to it.   U: (..., C, C) of `error_factor`.   qmax: a number, or (R,).
    Returns Q int8 (..., R, C).   Source: Frantar et al., arXiv:2210.17323, Algorithm 1.
    """
    # Transposed, so that what is one column's lies together.
    W, step, C = W.float().mT.contiguous(), step.expand(W.shape).mT, W.shape[-1]  # (..., C, R)
    Q = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    for start in range(0, C, block):
        end = min(start + block, C)
        part, steps = W[..., start:end, :].clone(), step[..., start:end, :].contiguous()
        errors = torch.empty_like(part)
        for i in range(end - start):
            u = U[..., start + i, start + i:end].unsqueeze(-1)  # (..., end - start - i, 1)
            q = (part[..., i, :] / steps[..., i, :]).round().clamp(-qmax, qmax)
            Q[..., start + i, :] = q
            errors[..., i, :] = (part[..., i, :] - q * steps[..., i, :]) / u[..., 0, :]
            part[..., i:, :] -= u * errors[..., i:i + 1, :]
        W[..., end:, :] -= U[..., start:end, end:].mT @ errors
    return Q.mT.contiguous()


def gptq(W, H, bits, clip_sigmas, damp=DAMP, block=128):
    """Quantize on SDClip's grid so that the layer's output error is least.

    W: (..., R, C) float32, rows are outputs.   H: (..., C, C) float32, sum or mean of x x^T over calibration tokens.
    bits: 2..8.   clip_sigmas: row clip in standard deviations of that row.   damp: see `error_factor`.
    Returns Q int8 (..., R, C), scale float16 (..., R) as `quantize`, and the largest damping used (float).
    """
    if H.shape[-2:] != (W.shape[-1],) * 2:
        raise ValueError(f"H is {tuple(H.shape)}, expected {W.shape[-1]} x {W.shape[-1]} for W {tuple(W.shape)}")
    scale, (U, damp) = row_scale(W, bits, clip_sigmas), error_factor(H, damp)
    return compensate(W, scale.float().unsqueeze(-1), U, 2 ** (bits - 1) - 1, block), scale, float(damp.max())


class Calibration(NamedTuple):
    """Sums over calibration tokens, float32, by parameter name; all empty without calibration.

    H: x x^T (C, C) of the matrix's inputs.   rows: with GRID=rate the squared gradients (R,) of its rows.
    counts: of each token, (vocab,).
    """
    H: dict
    rows: dict
    counts: Tensor | None


UNCALIBRATED = Calibration({}, {}, None)


class Hessians:
    """Collects a Calibration from the products that forwards make."""

    def __init__(self, model):
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.sums, self.rows, self.weight, self.counts = {}, {}, None, None

    def observe(self, x, weights):
        """See one product: weights that share an input share one sum."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        key = tuple(self.names[id(w)] for w in weights)
        product = (x if self.weight is None else x * self.weight).mT @ x
        self.sums[key] = self.sums[key].add_(product) if key in self.sums else product

    def weigh(self, ids, vocab_size, power):
        """Weigh the tokens of the next forward by (their count so far) ** -power, scaled to a mean of 1 (FreqGPTQ)."""
        counts = torch.bincount(ids.flatten().long(), minlength=vocab_size).float()
        self.counts = counts if self.counts is None else self.counts + counts
        weight = self.counts[ids.flatten().long()] ** -power if power else None
        self.weight = None if weight is None else (weight / weight.mean()).unsqueeze(-1)

    def add_gradients(self, model, loss):
        """Add each row's squared gradient of one batch's summed loss: how much an error in that row matters."""
        names, params = zip(*((n, p) for n, p in model.named_parameters() if route(n).bits))
        for name, grad in zip(names, torch.autograd.grad(loss, params)):
            rows = grad.float().square().sum(-1)
            self.rows[name] = self.rows[name].add_(rows) if name in self.rows else rows

    def collect(self, model, batches, run):
        """The Calibration by `batches`, an iterable of ids (B, T + 1), summed over all ranks.

        TF32 is allowed meanwhile: it keeps more bits than the bfloat16 activations have, so products stay exact.
        """
        cfg, precision = model.cfg, torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if run.device.type == "cuda" else precision)
        OBSERVERS.append(self.observe)
        try:
            for ids in batches:
                self.weigh(ids[:, :-1], cfg.vocab_size, cfg.gptq_token_power)
                with torch.set_grad_enabled(cfg.grid == "rate"):
                    logits, _ = model(ids[:, :-1])
                    if cfg.grid == "rate":
                        self.add_gradients(model, token_nll(logits, ids[:, 1:]).sum())
        finally:
            OBSERVERS.remove(self.observe)
            torch.set_float32_matmul_precision(precision)
        for product in (*self.sums.values(), *self.rows.values()):
            run.all_sum(product)
        return Calibration({name: product for key, product in self.sums.items() for name in key}, self.rows,
                           run.all_sum(self.counts))


class Quantized(NamedTuple):
    """One stored matrix: Q int8 (R, C), scales float16 of rows (R,) and columns (C,) or None, bits, and for the log:
    error ||dW H dW^T|| / ||W H W^T||, expected rise of the loss [nats, summed over calibration], damping (0: no H)."""
    Q: Tensor
    scale: Tensor
    columns: Tensor
    bits: int
    rel_error: float
    nats: float
    damp: float


def octave_grid(x):
    """x rounded to eighths of an octave, float16: few different values, which compress well; 2^-20 to 2^15."""
    return ((8 * x.float().clamp_min(2.0 ** -20).log2()).round() / 8).clamp(-20, 15).exp2().to(torch.float16)


class MatrixGroup(NamedTuple):
    """Matrices of one shape and treatment, and what their quantization needs at any strength; n matrices (R, C).

    W, H: weights (n, R, C), Hessians (n, C, C) or identities, columns in the `order` (n, C) of rounding (None: as they
    are).   U: `error_factor` of H, None to round to nearest; damp (n,) its damping.   rows (n, R): this times H is the
    expected second derivative of the loss.   GRID=rate: relative steps (n, R) and (n, C), and log_step, the sum over
    weights of log(step / std(row)); else None.
    """
    names: list
    W: Tensor
    H: Tensor
    U: Tensor | None
    damp: Tensor
    order: Tensor | None
    rows: Tensor
    row_step: Tensor | None = None
    column_step: Tensor | None = None
    log_step: float = 0.0


class Quantizer:
    """All matrices of a model, ready to be quantized at any strength; ranks share the work and all get the results.

    GRID=sdclip: `strength` is the clip of the Routes that use MATRIX_CLIP_SIGMAS; larger = coarser.
    GRID=rate: `strength` is the geometric mean of step / std(row) over all weights.  A weight's step is inverse to the
    square root of its effect on the loss, sensitivity of its row times conditional variance of its input, so that a
    byte buys as much wherever it is spent (reverse water-filling; an entropy coder makes any step possible).
    Without row sensitivities in the Calibration the grid is SDClip's.
    """

    SENSITIVITY_POWER = 0.7  # below 1: rows are estimated from few batches, and coarse steps save less than theory says
    LEAST_SENSITIVITY = 0.02  # of the matrix's mean, for rows that calibration hardly reached
    MOST = 108  # largest weight in steps; the rest of the int8 range takes up what GPTQ adds to it

    def __init__(self, model, cfg, calibration, run):
        self.cfg, self.run, self.rate = cfg, run, cfg.grid == "rate" and bool(calibration.rows)
        params = {name: p.detach() for name, p in model.named_parameters() if route(name).bits}
        self.shapes = {name: tuple(p.shape) for name, p in params.items()}
        self.bits = dict.fromkeys(params, 8) if self.rate else stored_bits(model, cfg)
        self.frequent = None
        if cfg.frequent_rows and calibration.counts is not None:
            self.frequent = calibration.counts.topk(min(cfg.frequent_rows, cfg.vocab_size)).indices
        self.shares, work = [[] for _ in range(run.world_size)], [0] * run.world_size  # names by rank, about equal work
        for name in sorted(params, key=lambda n: -params[n].numel() * params[n].shape[1]):
            rank = work.index(min(work))
            work[rank] += params[name].numel() * params[name].shape[1]
            self.shares[rank].append(name)
        groups = {}
        for name in self.shares[run.rank]:
            key = self.shapes[name], self.bits[name], route(name).clip, name in calibration.H, name == "embed.weight"
            groups.setdefault(key, []).append(name)
        self.groups = [self.prepare(names, params, calibration) for names in groups.values()]
        mine = [sum(g.log_step for g in self.groups), float(sum(g.W.numel() for g in self.groups))]
        log_step, self.weights = map(sum, zip(*run.gather(mine)))
        self.unit = math.exp(log_step / self.weights)

    @torch.no_grad()
    def prepare(self, names, params, calibration):
        """The MatrixGroup of these matrices: all that does not depend on the strength."""
        W = torch.stack([params[n].float() for n in names])
        n, R, C = W.shape
        has_hessian, order = names[0] in calibration.H, None
        H = (torch.stack([calibration.H[n] for n in names]) if has_hessian else
             torch.eye(C, device=W.device).expand(n, C, C))
        if has_hessian and self.cfg.gptq_order:
            order = H.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
            H = H.take_along_dim(order.unsqueeze(2), 1).take_along_dim(order.unsqueeze(1), 2)
            W = W.take_along_dim(order.unsqueeze(1), 2)
        U, damp = error_factor(H) if has_hessian else (None, W.new_zeros(n))
        trace = H.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).clamp_min(1e-30)
        rows = torch.stack([calibration.rows.get(n, W.new_zeros(R)) for n in names]).to(W.device)
        group = MatrixGroup(names, W, H, U, damp, order, rows / trace)
        if not self.rate:
            return group
        mean = group.rows.mean(-1, keepdim=True).clamp_min(1e-30)
        g = (group.rows / mean).clamp_min(self.LEAST_SENSITIVITY) ** self.SENSITIVITY_POWER
        u = U.diagonal(dim1=-2, dim2=-1) if has_hessian else W.new_ones(n, C)
        middle = u.log().mean(-1, keepdim=True).exp()
        row_step, spread = (mean * g / g.mean(-1, keepdim=True)).rsqrt() * middle, W.std(-1, correction=0)
        return group._replace(row_step=row_step, column_step=u / middle,
                              log_step=C * float((row_step / spread.clamp_min(1e-12)).log().sum()))

    @torch.no_grad()
    def at(self, strength):
        """{name: Quantized} of the whole model, on the CPU of every rank."""
        mine = {}
        for group in self.groups:
            Q, scale, columns = self.quantize(group, strength)
            dW, order = group.W - dequantize(Q, scale, columns), group.order
            errors = ((dW @ group.H) * dW).sum(-1)  # (n, R)
            whole = ((group.W @ group.H) * group.W).sum((-2, -1)).clamp_min(1e-30)
            facts = torch.stack([errors.sum(-1) / whole, 0.5 * (errors * group.rows).sum(-1), group.damp], 1)
            if order is not None:
                back = order.argsort(-1)
                Q = Q.take_along_dim(back.unsqueeze(1), 2)
                columns = columns if columns is None else columns.gather(1, back)
            for i, name in enumerate(group.names):
                parts = (x if x is None else x[i].cpu().clone() for x in (Q, scale, columns))  # each its own memory
                mine[name] = Quantized(*parts, self.bits[name], *facts[i].tolist())
        return {name: q for part in self.run.gather(mine) for name, q in part.items()}

    def quantize(self, group, strength):
        """One group at one strength: Q (n, R, C), scale (n, R), columns (n, C) or None, in the group's column order."""
        W, U, name = group.W, group.U, group.names[0]
        if not self.rate:
            clip, bits = getattr(self.cfg, route(name).clip), torch.tensor(self.bits[name], device=W.device)
            clip = strength if route(name).clip == "matrix_clip_sigmas" else clip
            if self.frequent is not None and name == "embed.weight":
                bits = bits.repeat(W.shape[1]).index_fill(0, self.frequent, 8)
            if U is None:
                return *quantize(W, bits, clip), None
            scale = row_scale(W, bits, clip)
            return compensate(W, scale.float().unsqueeze(-1), U, 2 ** (bits - 1) - 1), scale, None
        # Rows, then columns, whose weights would leave the integers' range get a larger step.
        columns = group.column_step
        spread = (W / columns.unsqueeze(-2)).square().mean(-1).sqrt()
        scale = strength / self.unit * group.row_step
        if route(name).role == "gate":  # a saturated gate has no gradient, and an error that opens it does much harm
            scale = torch.minimum(scale, self.cfg.embed_clip_sigmas / 127 * spread)
        scale = octave_grid(torch.maximum(scale, 3 * spread / self.MOST))
        columns = octave_grid(torch.maximum(columns, (W / scale.float().unsqueeze(-1)).abs().amax(-2) / self.MOST))
        step = scale.float().unsqueeze(-1) * columns.float().unsqueeze(-2)
        Q = (W / step).round().clamp(-127, 127).to(torch.int8) if U is None else compensate(W, step, U, 127)
        return Q, scale, columns


def stored_bits(model, cfg):
    """{name: bits} of the matrices that become integers, by their Routes and SANDWICH_BITS."""
    last = {id(p) for p in model.blocks[-1].parameters()}
    return {name: max(getattr(cfg, route(name).bits) or cfg.matrix_bits, cfg.sandwich_bits * (id(p) in last))
            for name, p in model.named_parameters() if route(name).bits}


def entropy_bytes(quantized):
    """Order-0 entropy of all symbols, tensor by tensor [bytes]: what an ideal coder without context would need."""
    total = 0.0
    for q in quantized.values():
        counts = torch.bincount(q.Q.flatten().int() + 128, minlength=256).double()
        total -= float((counts * (counts / counts.sum()).clamp_min(1e-12).log2()).sum()) / 8
    return total


def side_codec(codec):
    """The codec of everything but integers beside `codec`: itself; for rans brotli; LZMA where Brotli is missing."""
    codec = "brotli" if codec == "rans" else codec
    return "lzma" if codec == "brotli" and importlib.util.find_spec("brotli") is None else codec


def compress(data, codec):
    """bytes -> bytes by brotli (quality 11, window 24), lzma or zstd (22)."""
    if codec == "brotli":
        import brotli
        return brotli.compress(data, quality=11, lgwin=24)
    if codec == "zstd":
        import zstandard
        return zstandard.ZstdCompressor(level=22).compress(data)
    return lzma.compress(data, format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)


def decompress(data, codec, size):
    """The inverse of `compress`, bounded: raises ArtifactError unless the data makes exactly `size` bytes."""
    try:
        if codec == "brotli":
            import brotli
            decoder, out, more = brotli.Decompressor(), b"", data
            while len(out) <= size and (part := decoder.process(more, output_buffer_limit=size + 1 - len(out))):
                out, more = out + part, b""
        elif codec == "zstd":
            import zstandard
            out = zstandard.ZstdDecompressor().stream_reader(data).read(size + 1)
        else:
            decoder = lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=1 << 27)
            out = decoder.decompress(data, max_length=size + 1)
    except Exception as error:  # brotli.error and ZstdError derive from Exception alone; a codec may not be installed
        raise ArtifactError(f"a stream cannot be decompressed ({codec}: {error})") from None
    if len(out) != size:
        found = f"more than {size}" if len(out) > size else len(out)
        raise ArtifactError(f"a stream decompresses to {found} bytes, expected {size}")
    return out


# Integers are coded by rANS (Duda, arXiv:1311.2540): many states side by side, so that numpy codes one symbol of each
# at a time, and one stream of 16-bit words for all.  A symbol's probabilities come from the table of its class, which
# is the size of the numbers to expect in its row and column: one byte each in the file.

RANS_BITS, RANS_LOW = 14, 1 << 16  # a table's frequencies sum to 2^14; states stay in [2^16, 2^32)
RANS_CLASSES = 96  # quarters of an octave of the symbols' root mean square; class 24 is 1


def rans_lanes(count):
    """How many states code `count` symbols side by side: few enough that their 4 bytes each do not matter."""
    return max(1, min(1024, count >> 12))


def symbol_classes(Q):
    """Rows' and columns' parts (R,), (C,) int8 of the classes of Q int8 (R, C): a symbol's class is their sum."""
    power = np.square(Q, dtype=np.float32)
    rows = np.rint(2 * np.log2(power.mean(1) + 0.02))
    columns = np.rint(2 * np.log2((power / np.exp2(rows / 2)[:, None]).mean(0) + 0.02))
    return (rows + 24).astype(np.int8), columns.astype(np.int8)


def class_map(rows, columns):
    """The class of each symbol of a tensor, uint8 (R * C,)."""
    return np.clip(rows[:, None].astype(np.int16) + columns, 0, RANS_CLASSES - 1).astype(np.uint8).ravel()


def rans_frequencies(counts):
    """Frequencies (K, 256) uint16 of `counts`: rows sum to 2^RANS_BITS or 0; where there is a count, at least 1."""
    whole = 1 << RANS_BITS
    freq = np.where(counts > 0, np.maximum(1, counts * whole // np.maximum(1, counts.sum(1, keepdims=True))), 0)
    freq[np.arange(len(freq)), freq.argmax(1)] += np.where(counts.any(1), whole - freq.sum(1), 0)
    return freq.astype(np.uint16)


def rans_encode(symbols, classes, freq):
    """Code symbols uint8 (n,) of classes uint8 (n,) by freq (K, 256): the states' bytes, then the words'."""
    lanes, words = rans_lanes(len(symbols)), []
    start = (np.cumsum(freq, 1, dtype=np.uint32) - freq).ravel().astype(np.uint64)
    freq, keys = freq.ravel().astype(np.uint64), classes.astype(np.int32) << 8 | symbols
    states = np.full(lanes, RANS_LOW, np.uint64)
    for i in reversed(range(0, len(symbols), lanes)):
        key = keys[i:i + lanes]
        x, f = states[:len(key)], freq[key]
        full = x >= f << np.uint64(32 - RANS_BITS)
        words.append(x[full].astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        high = x // f
        states[:len(key)] = (high << np.uint64(RANS_BITS)) + (x - high * f) + start[key]
    return states.astype("<u4").tobytes() + b"".join(part.tobytes() for part in reversed(words))


def rans_decode(data, classes, freq):
    """The inverse of `rans_encode`: symbols uint8 (n,).  Raises ArtifactError for a stream that it cannot have made."""
    count, lanes, used = len(classes), rans_lanes(len(classes)), freq.any(1)
    if (freq.sum(1, dtype=np.int64)[used] != 1 << RANS_BITS).any() or not used[classes].all():
        raise ArtifactError("its table of frequencies is not one that this script writes")
    if len(data) < 4 * lanes or len(data) % 2:
        raise ArtifactError(f"a stream of {len(data)} bytes cannot hold {count} integers")
    start = np.cumsum(freq, 1, dtype=np.uint32) - freq
    symbol_of = np.repeat(np.tile(np.arange(256, dtype=np.uint8), len(freq)), freq.ravel())  # by used class and slot
    slots, keys = (np.cumsum(used) - 1).astype(np.int32)[classes] << RANS_BITS, classes.astype(np.int32) << 8
    freq, start = freq.ravel().astype(np.uint32), start.ravel()
    states = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
    words, at = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint32), 0
    out, mask = np.empty(count, np.uint8), np.uint32((1 << RANS_BITS) - 1)
    for i in range(0, count, lanes):
        x = states[:min(lanes, count - i)]
        slot = x & mask
        symbols = symbol_of[slots[i:i + lanes] + slot.view(np.int32)]
        out[i:i + lanes] = symbols
        key = keys[i:i + lanes] + symbols
        x = freq[key] * (x >> np.uint32(RANS_BITS)) + (slot - start[key])
        low = np.flatnonzero(x < RANS_LOW)
        if at + len(low) > len(words):
            raise ArtifactError("a stream of integers ends too soon")
        x[low] = x[low] << np.uint32(16) | words[at:at + len(low)]
        at += len(low)
        states[:len(x)] = x
    if at != len(words) or (states != RANS_LOW).any():
        raise ArtifactError("a stream of integers does not end where it must")
    return out


def byte_planes(data, width):
    """Little-endian items of `width` bytes with first all low bytes, then the next: easier to compress."""
    return np.frombuffer(data, np.uint8).reshape(-1, width).T.tobytes()


PLANES = {"scale": 2, "table": 2, "f16": 2, "f32": 4}  # roles stored as byte planes, with their item widths


def pack_tensor(name, p, quantized, cfg):
    """One parameter as (table entry, integers (R, C) int8 or None, [(role, bytes)] of the rest), by its Route."""
    entry, role = dict(name=name, shape=list(p.shape)), route(name).role
    if name in quantized:
        q = quantized[name]
        scales = [q.scale] if q.columns is None else [q.scale, q.columns]
        entry |= dict(bits=q.bits, coding="rows" if q.columns is None else "grid", role=role)
        return entry, q.Q.numpy(), [("scale", x.numpy().tobytes()) for x in scales]
    coding = "f32" if p.numel() <= 64 else "f16"  # the smallest tensors (decay rates, gains) keep every bit
    p = p.detach().float().cpu()
    if cfg.control_bits and coding == "f16" and role == "control":
        W = p.view(-1, p.shape[-1])
        scale = (W.abs().amax(-1) / 127).clamp_min(2.0 ** -24).to(torch.float16)
        Q = (W / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        return entry | dict(bits=8, coding="rows", role=role), Q.numpy(), [("scale", scale.numpy().tobytes())]
    data = p.numpy().astype("<f4" if coding == "f32" else "<f2").tobytes()
    return entry | dict(bits=int(coding[1:]), coding=coding, role=coding), None, [(coding, data)]


def pack_artifact(model, cfg, quantized):
    """The artifact's bytes: tensors in named_parameters() order, shared ones once; each role's bytes in streams."""
    table, roles, integers, codec = [], {}, {}, side_codec(cfg.compressor)
    for name, p in model.named_parameters():
        entry, Q, parts = pack_tensor(name, p, quantized, cfg)
        if Q is not None:
            integers.setdefault(entry["role"], []).append(Q)
        for role, data in parts:
            roles.setdefault(role, bytearray()).extend(data)
        table.append(entry)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if cfg.compressor == "rans" and integers:
            coded = rans_roles(integers, roles, pool)
        else:
            coded = []
            roles |= {role: b"".join(Q.tobytes() for Q in tensors) for role, tensors in integers.items()}
        pieces = []
        for role, data in roles.items():
            data = byte_planes(bytes(data), PLANES[role]) if role in PLANES else bytes(data)
            pieces += [(role, data[i:i + STREAM_BYTES]) for i in range(0, len(data), STREAM_BYTES)]
        packed = list(pool.map(lambda piece: compress(piece[1], codec), pieces))
    streams = [[role, codec, len(raw), len(out)] for (role, raw), out in zip(pieces, packed)]
    streams += [[role, "rans", count, len(out)] for role, count, out in coded]
    header = dict(config={name: getattr(cfg, name) for name in MODEL_FIELDS}, compressor=cfg.compressor, tensors=table,
                  streams=streams)
    text = json.dumps(header, separators=(",", ":")).encode()
    head, payload = zlib.compress(text, 9), b"".join(packed + [out for _, _, out in coded])
    digest = hashlib.sha256(head + payload).digest()
    fixed = ARTIFACT_HEAD.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(head), len(text), len(payload), digest)
    return fixed + head + payload


def rans_roles(integers, roles, pool):
    """Code {role: [Q (R, C) int8]}: list of (role, symbols, bytes); adds the roles "class" and "table" to `roles`."""
    parts = {role: list(pool.map(symbol_classes, tensors)) for role, tensors in integers.items()}
    symbols = {role: np.concatenate([(Q.view(np.uint8) ^ 128).ravel() for Q in tensors])
               for role, tensors in integers.items()}
    classes = {role: np.concatenate([class_map(*part) for part in of_role]) for role, of_role in parts.items()}
    counts = sum(np.bincount(classes[role].astype(np.int32) << 8 | symbols[role], minlength=RANS_CLASSES << 8)
                 for role in integers)
    freq = rans_frequencies(counts.reshape(RANS_CLASSES, 256))
    roles["class"] = b"".join(x.tobytes() for of_role in parts.values() for pair in of_role for x in pair)
    roles["table"] = freq.astype("<u2").tobytes()
    coded = pool.map(lambda role: rans_encode(symbols[role], classes[role], freq), integers)
    return [(role, len(symbols[role]), out) for role, out in zip(integers, coded)]


def save_artifact(path, model, cfg, calibration=UNCALIBRATED, run=None):
    """Quantize, compress and write the model; returns the bytes written.  The file appears whole or not at all.

    Without a calibration, matrices are rounded to nearest on SDClip's grid.
    run: all its ranks must call, rank 0 writes; default: one rank, silent.
    A FileError that it raises has what could not be written as its `blob`, which can still be scored.
    """
    log = run.log if run else lambda *event, **values: None
    run = run or Run(device=next(model.parameters()).device)
    strength, quantized, blob = fill_cap(model, cfg, calibration, run, log)
    for name, q in quantized.items():
        spent = entropy_bytes({name: q}) * 8 / q.Q.numel()
        log("gptq", name=name, bits=q.bits, rows=q.Q.shape[0], strength=f"{strength:.3f}",
            rel_err=f"{q.rel_error:.6f}", bits_per_weight=f"{spent:.3f}", nats=f"{q.nats:.3e}", damp=f"{q.damp:g}")
    if run.rank == 0:
        log_roles(blob, quantized, log)

    def write():
        try:
            write_whole(path, lambda f: f.write(blob))
        except FileError as error:
            error.blob = blob
            raise

    run.from_rank_0(write)
    return run.broadcast(len(blob) if run.rank == 0 else 0)


def log_roles(blob, quantized, log):
    """One line for each role of an artifact, and one that counts what was not done as hoped."""
    header, _ = read_header(memoryview(blob))
    for role in dict.fromkeys(stream[0] for stream in header["streams"]):
        mine = [stream for stream in header["streams"] if stream[0] == role]
        raw, packed = (sum(stream[i] for stream in mine) for i in (2, 3))
        log("role", name=role, codec=mine[0][1], tensors=sum(t["role"] == role for t in header["tensors"]), symbols=raw,
            raw_bytes=raw, packed_bytes=packed, bits_per_symbol=f"{8 * packed / raw:.3f}")
    stored = sum(q.Q.numel() for q in quantized.values())
    log("quantized", matrices=len(quantized), bits_per_weight=f"{8 * len(blob) / max(1, stored):.4f}",
        order0_bits_per_weight=f"{8 * entropy_bytes(quantized) / max(1, stored):.4f}",
        no_hessian=sum(q.damp == 0 for q in quantized.values()),  # n-gram tables are looked up, never multiplied
        fell_back=sum(math.isinf(q.damp) for q in quantized.values()))


FINEST_STEP, COARSEST_STEP = 4 / 31, 64 / 31  # SDClip's range at 6 bits, below which it clips more than it refines
FILL_SLACK = 16_000  # bytes under the cap that end the search
FILL_ROUNDS = 7
FEWEST_BITS = 2.5  # per weight that the cap should leave; 2.6 is the least that was run at full size


def expected_step(target_bytes, weights):
    """step / std at which `weights` Gaussian numbers have an entropy of target_bytes."""
    return math.sqrt(2 * math.pi * math.e) * 2 ** min(0.0, -8 * target_bytes / max(1, weights))


def expected_clip(model, cfg):
    """The clip of MATRIX_CLIP_SIGMAS, or the one that the search is expected to end at."""
    sizes = [p.numel() for n, p in model.named_parameters() if route(n).bits]
    step = expected_step(cfg.cap_bytes - len(code_bytes()), sum(sizes))
    return cfg.matrix_clip_sigmas or 31 * min(max(step, FINEST_STEP), COARSEST_STEP)


def fill_cap(model, cfg, calibration, run, log):
    """Find the finest grid whose total fits CAP_BYTES; returns its strength, {name: Quantized}, artifact (rank 0).

    Sizes fall almost linearly with the logarithm of the strength: each round quantizes, packs and interpolates.  A
    model that does not fit in FILL_ROUNDS is returned at the smallest size found, and the log says how far it is over.
    """
    began, most, tried, best, floats = time.perf_counter(), cfg.cap_bytes - len(code_bytes()), {}, None, None
    quantizer = Quantizer(model, cfg, calibration, run)
    codec = side_codec(cfg.compressor)
    if codec == "lzma" != cfg.compressor:
        log("compressor", wanted="brotli", used=codec, reason="brotli_is_not_installed")
    if quantizer.rate:
        low, high = FINEST_STEP / 16, 2 * COARSEST_STEP
        strength = min(max(expected_step(most, quantizer.weights), low), high)
    else:
        low, high, strength = 31 * FINEST_STEP, 31 * COARSEST_STEP, expected_clip(model, cfg)
    for _ in range(FILL_ROUNDS):
        quantized = quantizer.at(strength)
        if floats is None:  # the matrices of most relative error per weight stay float16
            worst = sorted(quantized, key=lambda n: -quantized[n].rel_error / quantized[n].Q.numel())
            floats = set(worst[:cfg.float_matrices])
        quantized = {name: q for name, q in quantized.items() if name not in floats}
        blob = pack_artifact(model, cfg, quantized) if run.rank == 0 else None
        tried[strength] = size = run.broadcast(len(blob) if run.rank == 0 else 0)
        tokens = 0 if calibration.counts is None else int(calibration.counts.sum())
        nats = sum(q.nats for q in quantized.values()) / max(1, tokens)
        log("fill_cap", grid="rate" if quantizer.rate else "sdclip", strength=strength, model_bytes=size,
            most_bytes=most, expected_nats=f"{nats:.5f}", search_time=f"{1000 * (time.perf_counter() - began):.0f}ms")
        rank = (size <= most, -strength if size <= most else -size)
        if best is None or rank > best[0]:
            best = rank, strength, quantized, blob
        if cfg.matrix_clip_sigmas and not quantizer.rate or size <= most and (
                most - size <= FILL_SLACK or strength <= low):
            break
        strength = next_strength(tried, most - FILL_SLACK / 2, quantizer.weights, low, high)
        if strength in tried:
            break
    if not best[0][0]:
        log("over_cap", over_bytes=min(tried.values()) - most, cap_bytes=cfg.cap_bytes)
    return best[1:]


def next_strength(tried, target, weights, low, high):
    """The strength at which {strength: bytes} promises `target` bytes: between the two nearest, or on their line."""
    points = sorted((abs(size - target), math.log2(s), size) for s, size in tried.items())
    above, below = ([p for p in points if (p[2] > target) == side] for side in (True, False))
    pair = [above[0], below[0]] if above and below else points[:2]
    slope = -weights / 8
    if len(pair) == 2 and pair[0][2] != pair[1][2]:
        slope = min((pair[0][2] - pair[1][2]) / (pair[0][1] - pair[1][1]), -1.0)
    return min(max(2 ** min(64.0, pair[0][1] + (target - pair[0][2]) / slope), low), high)


def read_header(blob):
    """Check an artifact's head and checksum; returns its header (dict) and payload.  Raises ArtifactError."""
    if len(blob) < ARTIFACT_HEAD.size:
        raise ArtifactError(f"{len(blob)} bytes, shorter than the head of an artifact ({ARTIFACT_HEAD.size})")
    magic, version, packed, unpacked, payload, digest = ARTIFACT_HEAD.unpack_from(blob)
    if magic != ARTIFACT_MAGIC:
        raise ArtifactError(f"it begins with {magic!r}, not {ARTIFACT_MAGIC!r}: not an artifact of this script")
    if version != ARTIFACT_VERSION:
        raise ArtifactError(f"format version {version}, this script reads {ARTIFACT_VERSION}: use the writer's")
    body = blob[ARTIFACT_HEAD.size:]
    if len(body) != packed + payload:
        raise ArtifactError(f"{len(body)} bytes follow the head, which promises {packed + payload}: truncated")
    if hashlib.sha256(body).digest() != digest:
        raise ArtifactError("the checksum does not match: altered")
    if unpacked > MAX_HEADER_BYTES:
        raise ArtifactError(f"its header claims {unpacked} bytes, at most {MAX_HEADER_BYTES} are read")
    try:
        text = zlib.decompressobj().decompress(bytes(body[:packed]), MAX_HEADER_BYTES)
        if len(text) != unpacked:
            raise ArtifactError(f"its header has {len(text)} bytes, the head promises {unpacked}: altered")
        header = json.loads(text)
        header["config"], header["tensors"], header["streams"], header["compressor"]
    except (zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"its header cannot be read ({type(error).__name__})") from None
    return header, body[packed:]


def read_streams(header, payload, most=MAX_RAW_BYTES):
    """Decompress an artifact's streams: dict of role to bytes, integers as int8 bytes in table order.

    Raises ArtifactError before allocating too much.
    """
    sizes = [(str(role), codec, int(raw), int(packed)) for role, codec, raw, packed in header["streams"]]
    total = sum(raw for _, _, raw, _ in sizes)
    if min((min(size[2:]) for size in sizes), default=1) < 1 or total > min(most, MAX_RAW_BYTES):
        raise ArtifactError(f"its streams claim {total} bytes, at most {min(most, MAX_RAW_BYTES)} "
                            "and none that is empty are read")
    if sum(packed for *_, packed in sizes) != len(payload):
        raise ArtifactError(f"its streams claim {sum(p for *_, p in sizes)} bytes of {len(payload)}")
    cuts = np.cumsum([0] + [packed for *_, packed in sizes])
    parts = [(*size[:3], bytes(payload[a:b])) for size, a, b in zip(sizes, cuts, cuts[1:])]
    roles, plain = {}, [part for part in parts if part[1] != "rans"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (role, *_), raw in zip(plain, pool.map(lambda part: decompress(part[3], part[1], part[2]), plain)):
            roles.setdefault(role, bytearray()).extend(raw)
        for role in roles.keys() & PLANES.keys():
            width = PLANES[role]
            if len(roles[role]) % width:
                raise ArtifactError(f"its {role} stream has {len(roles[role])} bytes, not a multiple of {width}")
            roles[role] = byte_planes(bytes(roles[role]), len(roles[role]) // width) if roles[role] else b""
        coded = [part for part in parts if part[1] == "rans"]
        if coded:
            freq = np.frombuffer(bytes(roles.pop("table")), "<u2").reshape(RANS_CLASSES, 256)
            classes = read_classes(header["tensors"], roles.pop("class"), [role for role, *_ in coded])
            for role, _, count, _ in coded:
                if len(classes[role]) != count or role in roles:
                    raise ArtifactError(f"its stream {role} claims {count} integers, its tensors {len(classes[role])}")
            for (role, *_), symbols in zip(coded, pool.map(
                    lambda part: rans_decode(part[3], classes[part[0]], freq), coded)):
                roles[role] = (symbols ^ 128).tobytes()
    return roles


def read_classes(tensors, data, roles):
    """Classes of each role's integers, {role: uint8 (n,)}, from the "class" role's bytes, in the order of `roles`."""
    parts, at, data = {}, 0, np.frombuffer(bytes(data), np.int8)
    for role in roles:
        for entry in tensors:
            if entry["role"] == role:
                rows, columns = matrix_shape(entry["shape"])
                if at + rows + columns > len(data):
                    raise ArtifactError("its classes end too soon")
                parts.setdefault(role, []).append(class_map(data[at:at + rows], data[at + rows:at + rows + columns]))
                at += rows + columns
    if at != len(data):
        raise ArtifactError("its classes are too many")
    return {role: np.concatenate(of_role) for role, of_role in parts.items()}


def matrix_shape(shape):
    """(rows, columns) of a stored tensor: a vector is one row."""
    return math.prod(shape[:-1]), shape[-1]


def load_artifact(path, device="cpu", base=None):
    """Build the model that an artifact file holds, from that file alone.

    path: file name, or the file's bytes.   base: Config that supplies what the file does not fix (kernels,
    evaluation); default: the defaults.
    The model's cfg says the file's own bits and compressor.   Raises ArtifactError naming the file and the fault.
    """
    blob, name = (path, "the artifact") if isinstance(path, bytes) else (load_checked(path), path)
    try:
        header, payload = read_header(memoryview(blob))
        if not isinstance(header["config"], dict) or set(header["config"]) != set(MODEL_FIELDS):
            raise ArtifactError("its model settings are not those that this script knows")
        kinds = {f.name: type(f.default) for f in fields(Config)}
        for key, value in header["config"].items():
            if type(value) is not kinds[key]:
                raise ArtifactError(f"its setting {key} is {value!r}, expected {kinds[key].__name__}")
        bits = [t["bits"] for t in header["tensors"] if t["role"] in ("mixer", "mlp")] or [8]  # all kept as float16
        cfg = replace(base or Config(), **header["config"], train_batch_tokens=0, micro_batch_tokens=0,
                      compressor=header["compressor"], matrix_bits=max(bits, key=bits.count))
        with torch.device("meta"):
            model = LM(cfg)
        params = dict(model.named_parameters())
        listed = [(t["name"], tuple(t["shape"])) for t in header["tensors"]]
        if listed != [(n, tuple(p.shape)) for n, p in params.items()]:
            raise ArtifactError("its tensors are not those of the model that it describes")
        roles = read_streams(header, payload, 5 * sum(p.numel() for p in params.values()) + 512 * RANS_CLASSES)
        cursor = {}
        weights = [unpack_tensor(t, roles, cursor) for t in header["tensors"]]
        if cursor != {role: len(data) for role, data in roles.items()}:
            raise ArtifactError("its streams hold more than its tensors")
    except (ArtifactError, SettingError) as error:
        raise ArtifactError(f"{name}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise ArtifactError(f"{name}: its header is malformed ({type(error).__name__}: "
                            f"{' '.join(str(error).split())[:200]})") from None
    model = model.to_empty(device=device)
    copy_all(list(model.parameters()), weights)
    return model


def unpack_tensor(entry, roles, cursor):
    """One float32 weight from its table entry, the roles' bytes, and {role: bytes read so far}, which it advances."""
    (rows, columns), coding = matrix_shape(entry["shape"]), entry["coding"]

    def take(role, dtype, n):
        first = cursor.get(role, 0)
        cursor[role] = last = first + n * np.dtype(dtype).itemsize
        data = roles[role][first:last]
        if len(data) != last - first:
            raise ArtifactError(f"its tensor {entry['name']} lies outside its stream")
        return torch.from_numpy(np.frombuffer(bytes(data), dtype).copy())

    if coding in ("rows", "grid"):
        Q, scale = take(entry["role"], np.int8, rows * columns).view(rows, columns), take("scale", "<f2", rows)
        return dequantize(Q, scale, take("scale", "<f2", columns) if coding == "grid" else None).view(entry["shape"])
    if coding not in ("f16", "f32"):
        raise ArtifactError(f"its tensor {entry['name']} of shape {entry['shape']} has the coding {coding!r}")
    return take(coding, "<f2" if coding == "f16" else "<f4", rows * columns).float().view(entry["shape"])


def estimate_artifact_bytes(model, cfg):
    """Expected bytes of the artifact, and the bits that CAP_BYTES leaves for each weight whose step is searched.

    Gaussian entropy of the quantized rows, at their set clip, or at the finest step of the search or what fills the
    cap; raw size of the rest.
    """
    fixed, finest, searched, bits = 4096.0, 0.0, 0, stored_bits(model, cfg)  # head and compressed header, measured
    rate = cfg.grid == "rate"
    for name, p in model.named_parameters():
        if name not in bits:
            fixed += p.numel() * (4 if p.numel() <= 64 else 1 if cfg.control_bits else 2)
            continue
        clip = 0.0 if rate else getattr(cfg, route(name).clip)
        step = 3 / Quantizer.MOST if rate else (clip or 31 * FINEST_STEP) / (2 ** (bits[name] - 1) - 1)
        size = p.numel() / 8 * max(0.1, math.log2(math.sqrt(2 * math.pi * math.e) / step))
        fixed += 2 * p.shape[0] + (size if clip else 0.0)
        finest, searched = finest + (0.0 if clip else size), searched + (0 if clip else p.numel())
    room = cfg.cap_bytes - len(code_bytes()) - FILL_SLACK / 2 - fixed
    return int(fixed + min(finest, max(0.0, room))), 8 * room / searched if searched else math.inf


# ----------------------------------------------------------------------------------------------------
# 8. Evaluation
# ----------------------------------------------------------------------------------------------------
# Targets are tokens 1 .. n-1 of the concatenated split, numbered 0 .. n-2: target j is token j + 1, predicted
# from tokens up to j.  Every target is scored exactly once, in order: Ledger.add refuses anything else.
# score_rows() is the only place where a model meets targets, Ledger.bpb the only place where bits are made.
# A Scorer probes its own calls while it scores; an Adapter gets text only after the Ledger has it.

DISTANCES = 27  # buckets of the distance since a document began [tokens]: below 64, below 128, ... below 2^32


class Ledger:
    """Running sums over the targets first .. `next_target` - 1, each entered exactly once and in order.

    `causal`, `normalized`: the largest faults that the Scorer's probes found in these scores.   `by_distance`
    (DISTANCES, 3) float64: tokens, bytes and nats by the tokens since the document began (`place`).
    """

    def __init__(self, first=0, tokens=0, nats=0.0, num_bytes=0, causal=0.0, normalized=0.0, *by_distance):
        self.first, self.tokens, self.nats, self.bytes = int(first), int(tokens), float(nats), int(num_bytes)
        self.causal, self.normalized = causal, normalized
        self.by_distance = np.array(by_distance or [0.0] * 3 * DISTANCES).reshape(DISTANCES, 3)

    @property
    def next_target(self):
        """The only target that may be entered next."""
        return self.first + self.tokens

    def add(self, first, nll, num_bytes):
        """Enter targets first .. first + len - 1: nll (len,) nats and num_bytes (len,) int.

        Raises ScoreError on a gap, an overlap, a repeat, unequal lengths, or a score that is not finite.
        """
        if first != self.next_target:
            raise ScoreError(f"ledger: targets from {first} offered, {self.next_target} is next: a gap or a repeat")
        if nll.shape != num_bytes.shape or nll.dim() != 1:
            raise ScoreError(f"ledger: {tuple(nll.shape)} scores for {tuple(num_bytes.shape)} byte counts")
        nats = float(nll.double().sum())
        if not math.isfinite(nats) or bool((nll < 0).any()):
            raise ScoreError(f"ledger: scores from target {first} are negative or not finite: the model has diverged; "
                             "lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR, or TTT_LR if it trains meanwhile")
        self.nats += nats
        self.tokens += nll.numel()
        self.bytes += int(num_bytes.sum())

    def place(self, distance, nll, num_bytes):
        """Sum what was entered by np.int64 (len,) distance, the tokens between the document's start and the target."""
        bucket = np.frexp(distance >> 6)[1]  # 0 below 64, then one more for each doubling
        for column, weights in enumerate((None, num_bytes.numpy(), nll.double().numpy())):
            self.by_distance[:, column] += np.bincount(bucket, weights, DISTANCES)

    def join(self, other):
        """Append a ledger that begins where this one ends; raises ScoreError otherwise."""
        if other.first != self.next_target:
            raise ScoreError(f"ledger: a part from {other.first} offered, {self.next_target} is next: gap or repeat")
        return Ledger(self.first, self.tokens + other.tokens, self.nats + other.nats, self.bytes + other.bytes,
                      max(self.causal, other.causal), max(self.normalized, other.normalized),
                      *(self.by_distance + other.by_distance).flat)

    def numbers(self):
        """All of it as floats: Ledger(*ledger.numbers()) is an equal one."""
        return [float(v) for v in (self.first, self.tokens, self.nats, self.bytes, self.causal, self.normalized,
                                   *self.by_distance.flat)]

    @property
    def val_loss(self):
        """Mean nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self):
        """Bits per byte of text; not a number if there are no bytes, as in a chunk of control tokens alone."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def as_log(self, digits=8):
        """The key-value pairs of a final line."""
        return dict(val_loss=f"{self.val_loss:.{digits}f}", val_bpb=f"{self.bpb:.{digits}f}", tokens=self.tokens,
                    bytes=self.bytes)

    def log_distances(self, log):
        """One line per bucket of the distance since the document began; log: called as Run.log."""
        for i, (tokens, num_bytes, nats) in enumerate(self.by_distance):
            if num_bytes:
                log("position", **{"from": 32 << i if i else 0}, to=64 << i, tokens=int(tokens), bytes=int(num_bytes),
                    val_bpb=Ledger(0, tokens, nats, num_bytes).bpb)


def windows(num_targets, seq_len, stride):
    """Yield (start, end, score_from) of the windows over num_targets targets, all absolute target indexes.

    A window reads tokens start .. end - 1 and scores targets score_from .. end - 1.  The first scores all of its
    targets, every later one its last `stride` or what is left of them; so each target is scored exactly once.
    """
    start = 0
    while start == 0 or start + seq_len - stride < num_targets:
        yield start, min(start + seq_len, num_targets), start + seq_len - stride if start else 0
        start += stride


class Part(NamedTuple):
    """Targets first .. last - 1: of a window that begins at token `start`, or a span of the exact method (None)."""
    first: int
    last: int
    start: int | None = None


def cut(first, last, count):
    """Targets first .. last - 1 in `count` spans of nearly equal size, empty ones left out."""
    count = max(1, min(count, last - first))
    edges = [first + (last - first) * i // count for i in range(count + 1)]
    return [Part(a, b) for a, b in zip(edges, edges[1:]) if b > a]


UNIT_TARGETS = 1 << 20  # targets, at least, of which the windows are listed at one time: a resumable unit of scoring
EXACT_UNITS = 8  # resumable units of the exact method; one where nothing is saved, so that all spans run side by side


def scoring_units(total, method, cfg, adapting, saving, ranks=1):
    """Yield lists of Parts, left to right, of whole batches for every rank.

    When adapting, a list is one chunk of TTT_CHUNK_TOKENS; a window belongs to the chunk of its first scored target.
    """
    exact, T, chunk = method == "exact", cfg.train_seq_len, cfg.ttt_chunk_tokens
    if exact and not adapting:
        spans = cut(0, total, cfg.eval_spans)
        step = -(-len(spans) // (EXACT_UNITS if saving else 1))
        yield from (spans[i:i + step] for i in range(0, len(spans), step))
        return
    seq_len, stride = dict(roundtrip=(T, T), sliding=(T, cfg.eval_stride), exact=(chunk, chunk))[method]
    parts = (Part(first, last, None if exact else start) for start, last, first in windows(total, seq_len, stride))
    batch = stride * (cfg.eval_batch_tokens // T) * ranks  # targets that the ranks score at once
    size = chunk if adapting else -(-UNIT_TARGETS // batch) * batch
    yield from (list(unit) for _, unit in groupby(parts, lambda part: part.first // size))


def score_rows(model, ids, targets, state=None, tilt=None, before=None):
    """Nats of each target, float32, given the tokens up to it, and the state behind the row.

    ids: (B, T).   targets: (B, T), or (B, T, n) for n candidates at every position.   state: behind the text before.
    tilt: None or a Tilt, whose hints come from `ids` and from `before` (B, TILT_BEFORE), the tokens before the row.
    """
    logits, state = model(ids, state)
    if tilt is not None:
        logits = tilted(logits, tilt, ids, before)
    return token_nll(logits, targets), state


EAGER_TOKENS = 50_000_000  # tokens; a GPU runs fewer in less time than compiling for them takes


def compile_evaluation(cfg, run, method, num_targets, adapting=False):
    """Whether an evaluation runs compiled: with COMPILE=auto if a rank has more than EAGER_TOKENS to run."""
    passes = cfg.train_seq_len / cfg.eval_stride if method == "sliding" else 1.0
    share = min(run.world_size, 1 if adapting else cfg.eval_spans) if method == "exact" else run.world_size
    training = 3 * cfg.ttt_epochs if adapting else 0  # not shared: few rows of a rank take as long as their launches
    if cfg.compile != "auto":
        return cfg.compile == "1"
    return cfg.attn_kernel == "flex" or num_targets * (passes / share + training) > EAGER_TOKENS


class Rows(NamedTuple):
    """A batch on the device: ids, targets (B, T), `wanted` (B, T) marks the targets that count, `before`
    (B, TILT_BEFORE) the tokens left of each row (-1: none), `starts` (B,) absolute positions."""
    ids: Tensor
    targets: Tensor
    wanted: Tensor
    before: Tensor
    starts: Tensor


def make_rows(tokens, starts, score_from, score_to, T, device):
    """Rows of T tokens from absolute starts (B,), of which row i scores targets score_from[i] .. score_to[i] - 1.

    tokens: np.uint16 (n,).  Positions behind the text repeat its end and never count.
    """
    starts = np.asarray(starts, np.int64)
    index = starts[:, None] + np.arange(-TILT_BEFORE, T + 1)
    text = np.where(index < 0, -1, tokens[np.clip(index, 0, len(tokens) - 1)].astype(np.int32))
    inputs = index[:, TILT_BEFORE:-1]
    wanted = (inputs >= np.asarray(score_from)[:, None]) & (inputs < np.asarray(score_to)[:, None])
    parts = text[:, TILT_BEFORE:-1], text[:, TILT_BEFORE + 1:], wanted, text[:, :TILT_BEFORE], starts
    parts = [torch.from_numpy(np.ascontiguousarray(x)) for x in parts]
    if device.type == "cuda":  # a copy from other memory would wait for the device
        parts = [x.pin_memory() for x in parts]
    return Rows(*(x.to(device, non_blocking=True) for x in parts))


def one_late(items):
    """Yield each item only when the next has been made: the device works on that one while the host enters this."""
    held = []
    for item in items:
        yield from held
        held = [item]
    yield from held


PROBE_TOKENS = 16  # positions of a normalisation probe
PROBE_LOGITS = 2**25  # most logits of one call of a probe: positions x candidates x vocabulary


def probe_candidates(vocab):
    """Vocabulary entries that a normalisation probe scores at once."""
    return min(vocab, max(1, PROBE_LOGITS // PROBE_TOKENS // vocab))


class Scorer:
    """Scores parts of a text on this rank, and probes some of its own calls.

    Called with the parts of a unit, shares them over ranks and returns their Ledger, the same on every rank.
    `state`: behind the text so far, where an adapting evaluation goes on in one stream, the same on every rank.
    """

    def __init__(self, model, tokens, table, run, adapt, probing, fast):
        self.model, self.tokens, self.run, self.cfg, self.state = model, tokens, run, model.cfg, None
        self.table, self.score = table.to(run.device), compiled(score_rows, fast)
        self.adapter, self.adapting = adapt if isinstance(adapt, Adapter) else None, adapt is not None
        self.begins = np.concatenate([[0], np.flatnonzero(tokens == self.cfg.bos_id)])  # of documents
        self.calls, self.probing, self.faults = 0, probing, [0.0, 0.0]

    def __call__(self, parts):
        """Score the unit `parts`: windows or spans, each from where the one before it ends; ScoreError otherwise."""
        for one, after in zip(parts, parts[1:]):
            if one.last != after.first:
                raise ScoreError(f"targets up to {one.last - 1} are followed by {after.first}: a gap or a repeat")
        exact, mine = parts[0].start is None, None
        replicated = exact and self.adapting
        a, b = (0, 1) if replicated else self.run.share(len(parts))
        if b > a:
            mine = (self.streams if exact else self.windows)(parts[a:b])
            mine.causal, mine.normalized = self.faults
        found = [one for one in self.run.gather(mine) if one]
        if replicated:  # every rank scored the same; the largest fault counts
            mine.causal, mine.normalized = (max(getattr(one, key) for one in found) for key in ("causal", "normalized"))
            return mine
        return reduce(Ledger.join, found, Ledger(parts[0].first))

    def call(self, rows, state=None):
        """Nats (B, T) of one batch and the state behind it; the 1st, 4th, 16th, 64th, ... call is probed."""
        tilt = self.adapter.tilt if self.adapter else None
        more = (tilt, rows.before) if tilt else ()
        nll, after = self.score(self.model, rows.ids, rows.targets, state, *more)
        self.calls += 1
        if self.probing and self.calls.bit_length() % 2 and self.calls & (self.calls - 1) == 0:
            self.probe(rows, state, nll, more)
        return nll, after

    def probe(self, rows, state, nll, more):
        """Test a batch that was just scored for leaks and for normalisation; `faults` keeps the largest of each.

        Leaks: from some place on, other for each row, the tokens are replaced.  Scored again, by the function, weights,
        state, tilt and shape of the scores that count, nothing before that place may change.
        Normalisation: at the first PROBE_TOKENS of one row each entry of the vocabulary is scored as the target, by the
        same function uncompiled: their probabilities must sum to 1.
        """
        (B, T), vocab = rows.ids.shape, self.cfg.vocab_size
        later = (torch.arange(T) >= torch.linspace(1, T - 1, B + 2)[1:-1].long().clamp_min(1)[:, None]).to(nll.device)
        rng = torch.Generator().manual_seed(self.calls)
        noise = torch.randint(1, vocab, (B, T), generator=rng, dtype=torch.int32).to(nll.device)
        changed = torch.where(later, (rows.ids + noise) % vocab, rows.ids)
        other, _ = self.score(self.model, changed, rows.targets, state, *more)
        leak = (nll - other).abs().masked_fill(later, 0.0).max()
        row = int(rows.wanted.any(1).int().argmax())
        ids, state = rows.ids[row:row + 1, :PROBE_TOKENS], state and tree_map(lambda x: x[row:row + 1], state)
        more = (more[0], more[1][row:row + 1]) if more else ()
        total = torch.zeros(ids.shape, dtype=torch.float64, device=nll.device)
        for some in torch.arange(vocab, device=nll.device).split(probe_candidates(vocab)):
            scores, _ = score_rows(self.model, ids, some.expand(*ids.shape, -1), state, *more)
            total += scores.double().neg().exp().sum(-1)
        found = torch.stack([leak.double(), (total - 1).abs().max()]).tolist()
        self.faults = [max(old, new) if new == new else math.inf for old, new in zip(self.faults, found)]

    def enter(self, ledger, first, nll, num_bytes):
        """Enter targets first .. with the distances since their documents began."""
        target = np.arange(first, first + len(nll))
        if self.table.sidecar is not None:
            num_bytes = torch.from_numpy(self.table.sidecar[target + 1].astype(np.int64))
        ledger.add(first, nll, num_bytes)
        ledger.place(target - self.begins[np.searchsorted(self.begins, target, "right") - 1], nll, num_bytes)

    def windows(self, parts):
        """The Ledger of consecutive windows, scored in batches of fixed shape."""
        T, ledger = self.cfg.train_seq_len, Ledger(parts[0].first)
        batch = self.cfg.eval_batch_tokens // T

        def scored():
            for i in range(0, len(parts), batch):
                part = parts[i:i + batch]
                firsts, lasts, starts = zip(*(part + [(0, 0, 0)] * (batch - len(part))))  # empty rows keep the shape
                rows = make_rows(self.tokens, starts, firsts, lasts, T, self.run.device)
                nll, _ = self.call(rows)
                yield part, self.run.to_host(nll, count_bytes(self.table, rows.ids, rows.targets))

        for part, wait in one_late(scored()):
            nll, num_bytes = (torch.cat([row[one.first - one.start:one.last - one.start] for row, one in zip(x, part)])
                              for x in wait())
            self.enter(ledger, part[0].first, nll, num_bytes)
        return ledger

    def streams(self, spans):
        """The Ledger of consecutive spans, scored side by side with carried state.

        Each row begins EVAL_WARMUP_TOKENS before its span, unscored, and goes through it segment by segment, so that a
        token is predicted from all the text since its row's beginning.  When adapting, the one span, a chunk, goes on
        from `state`; only the text's last is filled up to the shape of the others.
        """
        ledgers, at_once = [Ledger(span.first) for span in spans], self.cfg.eval_batch_tokens // self.cfg.train_seq_len
        for i in range(0, len(spans), at_once):
            for starts, wait in one_late(self.segments(spans[i:i + at_once])):
                for span, ledger, start, nll, num_bytes in zip(spans[i:], ledgers[i:], starts.tolist(), *wait()):
                    scored = slice(max(span.first - start, 0), max(span.last - start, 0))
                    if len(nll[scored]):
                        self.enter(ledger, start + scored.start, nll[scored], num_bytes[scored])
        return reduce(Ledger.join, ledgers)

    def segments(self, spans):
        """Run spans side by side; yields each segment's starts (B,) and what waits for its nats and bytes (B, T)."""
        cfg, total = self.cfg, len(self.tokens) - 1
        firsts, lasts, _ = map(np.array, zip(*spans))
        starts = np.maximum(0, firsts - (0 if self.adapting else cfg.eval_warmup_tokens))
        longest = int((lasts - starts).max())
        T = segment_length(min(cfg.ttt_chunk_tokens, total) if self.adapting else longest, len(starts), cfg)
        state = self.state if cfg.ttt_carry else None
        filled = not self.adapting or lasts[-1] == total
        for done in range(0, longest, T):
            rows = make_rows(self.tokens, starts + done, firsts, lasts, T if filled else min(T, longest - done),
                             self.run.device)
            nll, state = self.call(rows, state)
            yield starts + done, self.run.to_host(nll, count_bytes(self.table, rows.ids, rows.targets))
        self.state = state if self.adapting else None


def segment_length(longest, rows, cfg):
    """Tokens of one segment: equal parts, a multiple of the kernels' chunk, EVAL_BATCH_TOKENS over the rows at most."""
    most = max(GDN_CHUNK, cfg.eval_batch_tokens // rows // GDN_CHUNK * GDN_CHUNK)
    parts = -(-longest // most)
    return -(-longest // parts // GDN_CHUNK) * GDN_CHUNK


@torch.inference_mode()
def evaluate(model, tokens, table, method="exact", adapt=None, run=None, progress=None, probing=False):
    """Score every target of `tokens` exactly once; the only scorer of this script.

    model: LM; its cfg holds the evaluation settings.   tokens: np.uint16 (n,).   table: ByteTable.
    method: roundtrip (windows of TRAIN_SEQ_LEN side by side), sliding (by EVAL_STRIDE) or exact (state carried through
    EVAL_SPANS spans; with `adapt` through the whole text, chunk by chunk).
    adapt: None, or a function called after each chunk of TTT_CHUNK_TOKENS but the last with the tokens scored so
    far, np.uint16 up to and including the last scored target: it cannot see what is yet to be scored.
    progress: None or the Progress that keeps this evaluation on disk.   probing: check some calls (Scorer.probe).
    Returns the Ledger over all n - 1 targets, equal on all ranks; raises ScoreError if any is missing.
    """
    run, cfg, total = run or Run(device=next(model.parameters()).device), model.cfg, len(tokens) - 1
    fast = adapt.fast if isinstance(adapt, Adapter) else compile_evaluation(cfg, run, method, total)
    scorer = Scorer(model, tokens, table, run, adapt, probing, fast)
    ledger = progress.restore(scorer) if progress else Ledger()
    ranks = 1 if progress else run.world_size  # what is saved can be resumed by any number
    for parts in scoring_units(total, method, cfg, scorer.adapting, progress is not None, ranks):
        if progress and parts[-1].last <= ledger.next_target:
            continue  # scored before this evaluation was resumed
        scored = scorer(parts)
        if scorer.adapter:
            scorer.adapter.verify(scored.first)
        ledger = ledger.join(scored)
        if adapt and ledger.next_target < total:
            with torch.inference_mode(False), torch.enable_grad():
                adapt(tokens[:ledger.next_target + 1])
        if scorer.adapter:
            scorer.adapter.report(ledger, scored)
        if progress:
            progress.save(ledger, scorer)
    if ledger.first != 0 or ledger.next_target != total:
        raise ScoreError(f"evaluation scored targets {ledger.first} .. {ledger.next_target - 1} of 0 .. {total - 1}")
    return ledger


class Tilt(NamedTuple):
    """Hints from the text scored so far: the token that most often followed a context, whose logit is raised by `beta`.

    Contexts are the last 1 .. order - 1 tokens, hashed into buckets.  A bucket belongs to the first context that falls
    into it: `owner` (buckets,) is its hash; others are ignored there.  `count` is how often its most frequent follower
    came, `low` and `high` are the smallest and largest token that came so often: if they differ, two followers tie and
    there is no hint.   `pairs` (4 buckets,) counts hashed (context, follower) pairs.
    """
    order: int
    beta: float
    owner: Tensor
    count: Tensor
    low: Tensor
    high: Tensor
    pairs: Tensor


TILT_BEFORE = 7  # tokens before a row that its first contexts reach back to: TTT_TILT_ORDER may be this + 2 at most
NO_HASH = 2**31 - 1  # the `owner` and `low` of an empty bucket: larger than every token id and, but for itself, hash


def new_tilt(cfg, num_targets, device):
    """An empty Tilt with a bucket for every context that num_targets can bring, or 2^24 (0.5 GiB in all)."""
    size = 1 << min(24, max(10, (num_targets * (cfg.ttt_tilt_order - 1)).bit_length()))
    parts = ((size, NO_HASH), (size, 0), (size, NO_HASH), (size, -1), (4 * size, 0))
    return Tilt(cfg.ttt_tilt_order, cfg.ttt_tilt,
                *(torch.full((n,), value, dtype=torch.int32, device=device) for n, value in parts))


def mixed(h, x):
    """A new 31-bit hash, int64, of a hash and one token id more (-1 .. 65535)."""
    return ((h ^ (h >> 15)) * 0x2545F491 + (x + 1) * 0x1B873593) & 0x7FFFFFFF


def contexts(ids, before, order):
    """Hashes (B, T) of the contexts of 1, 2, .. order - 1 tokens that end at each of ids (B, T), a list."""
    text, h, out = torch.cat([before, ids], 1).long(), torch.zeros_like(ids, dtype=torch.int64), []
    for back in range(order - 1):
        h = mixed(h, text[:, TILT_BEFORE - back:text.shape[1] - back])
        out.append(h)
    return out


def tilted(logits, tilt, ids, before):
    """logits (B, T, vocab) with beta added to each position's hinted token, that of the longest context which has one.

    A softmax of these is p' ~ p exp(beta [token = hint]): one normalised distribution, whatever the target is.
    """
    hint = torch.full_like(ids, -1)
    for h in reversed(contexts(ids, before, tilt.order)):
        bucket = h % len(tilt.low)
        known = (tilt.owner[bucket] == h) & (tilt.low[bucket] == tilt.high[bucket])
        hint = torch.where((hint < 0) & known, tilt.low[bucket], hint)
    raised = (hint >= 0).unsqueeze(-1) * tilt.beta
    return logits.scatter_add(-1, hint.clamp_min(0).long().unsqueeze(-1), raised.to(logits.dtype))


def learn(tilt, tokens, first, last):
    """Count targets first .. last - 1 of `tokens` (np.uint16), all scored, into `tilt`; the order does not matter."""
    rows = make_rows(tokens, [first], [first], [last], last - first, tilt.low.device)
    follower = rows.targets[0]
    for h in contexts(rows.ids, rows.before, tilt.order):
        pair, h = mixed(h, rows.targets)[0] % len(tilt.pairs), h[0]
        bucket = h % len(tilt.low)
        free = torch.where(tilt.owner[bucket] == NO_HASH, h.int(), NO_HASH)
        mine = tilt.owner.scatter_reduce_(0, bucket, free, "amin")[bucket] == h
        count, was = tilt.pairs.index_add_(0, pair, mine.int())[pair] * mine, tilt.count[bucket]
        now = tilt.count.scatter_reduce_(0, bucket, count, "amax")[bucket]
        top = mine & (count == now)
        # A context whose best count rose forgets the followers that had the best before.
        tilt.low.scatter_(0, bucket, torch.where(now > was, NO_HASH, tilt.low[bucket]))
        tilt.high.scatter_(0, bucket, torch.where(now > was, -1, tilt.high[bucket]))
        tilt.low.scatter_reduce_(0, bucket, torch.where(top, follower, NO_HASH), "amin")
        tilt.high.scatter_reduce_(0, bucket, torch.where(top, follower, -1), "amax")


def summed_nll(model, ids, targets, wanted):
    """Nats of the wanted targets, summed: the loss that an Adapter trains on."""
    x, _ = model.features(ids)
    return (head_nll(model.embed, x, targets) * wanted).sum()


class Leaf:
    """Weights of one shape under one rule: `params` (views), stacks (n, *shape) of their gradients and moments."""

    def __init__(self, rule, params, grad):
        self.rule, self.params, self.grad, self.m = rule, params, grad, torch.zeros_like(grad)
        self.v = torch.zeros_like(grad) if rule in ("adamw", "hash") else grad.new_zeros(0)

    def direction(self, steps, cfg):
        """What step number `steps`, a tensor, subtracts at rate 1, (n, *shape) float32; updates the moments."""
        if self.rule == "muon":
            return muon_update(self.grad, self.m, cfg.ttt_momentum, cfg.muon_backend_steps).float()
        if self.rule == "sgd":
            return self.m.mul_(cfg.ttt_momentum).add_(self.grad)
        self.m.lerp_(self.grad, 1 - cfg.beta1)
        self.v.lerp_(self.grad.square(), 1 - cfg.beta2)
        return self.m / (1 - cfg.beta1**steps) / ((self.v / (1 - cfg.beta2**steps)).sqrt() + 1e-8)


def replayed(graphs, function, *args):
    """function(*args), which works on tensors in place, as one CUDA graph for each shape of its arguments.

    The host then launches hundreds of kernels at once: a step on a rank's few rows is bound by their launches.  What
    differs from call to call must be in the arguments, tensors that are copied, or in what they and the function's own
    tensors hold.   graphs: {} that keeps the recordings and the memory they work in, or None to call as it is.
    The first call of a shape runs as it is, and compiles; the second is recorded.
    """
    shape = function.__name__, *((x.shape, x.dtype) for x in args)
    if graphs is None or shape not in graphs:
        if graphs is not None:
            graphs[shape] = None
        return function(*args)
    if graphs[shape] is None:
        graph, held = torch.cuda.CUDAGraph(), [x.clone() for x in args]
        # Other threads, which copy batches or watch NCCL, may call CUDA in the meantime.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function(*held)
        graphs[shape] = graph, held
    graph, held = graphs[shape]
    copy_all(held, args)
    graph.replay()


@contextmanager
def fresh_leaves(model):
    """Inside, each trained weight is a new leaf over the same memory, with the same gradient.

    Autograd accumulates a leaf's gradient on the CUDA stream where the leaf was first used.  A graph is recorded on a
    stream of its own, which must not wait for another: it needs leaves that no other stream has used.
    """
    trained = [(module, name, p) for module in model.modules() for name, p in module.named_parameters(recurse=False)
               if p.requires_grad]
    for module, name, p in trained:
        leaf = nn.Parameter(p.detach())
        leaf.grad = p.grad
        setattr(module, name, leaf)
    try:
        yield
    finally:
        for module, name, p in trained:
            setattr(module, name, p)


class LowRank(NamedTuple):
    """Weights (n, R, C) as `base` + B A: their `params` (views), `grad`, and A (n, r, C), B (n, R, r) as Leafs."""
    params: list
    grad: Tensor
    base: Tensor
    A: Leaf
    B: Leaf


class Adapter:
    """Score-first test-time training: called by `evaluate` with the text scored so far, trains on its newest chunk.

    Rows of TRAIN_SEQ_LEN, split over ranks, each from a fresh state as in training.  Each pass over a chunk is one step
    on the mean of its targets, so that any number of ranks does the same.  `in_order` turns False if a target was
    scored after it had been handed over, or if a weight or hint changed between two of these calls.

    pending: scored chunks of a phase, not yet trained on.   seen: targets handed over so far.   params: trained
    weights, `weights` those and the adapters' A and B; base: their values in the artifact; raw: with TTT_EMA the
    newest, while the average scores.   mark: fingerprint after the last change.   graphs: of `replayed`.
    """

    def __init__(self, model, num_targets, run):
        cfg = model.cfg
        self.model, self.cfg, self.run, self.began = model, cfg, run, time.perf_counter()
        self.fast = compile_evaluation(cfg, run, cfg.ttt_scoring, num_targets, adapting=True)
        self.chunks, self.calls, self.seen, self.in_order = -(-num_targets // cfg.ttt_chunk_tokens), 0, 0, True
        self.pending, self.steps, self.rate, self.train_s = [], 0, 0.0, 0.0
        self.tilt = new_tilt(cfg, num_targets, run.device) if cfg.ttt_tilt else None
        if cfg.ttt_hash_buckets:
            model.embed.hash_table = nn.Parameter(torch.zeros(cfg.ttt_hash_buckets, cfg.model_dim, device=run.device))
        self._lay_out()
        self.trains = bool(cfg.ttt_epochs and self.params)
        self.weights = self.params + [w for group in self.low_rank for w in group.A.params + group.B.params]
        self.base = [p.detach().clone() for p in self.weights]
        self.raw = [p.clone() for p in self.base[:len(self.params)]] if cfg.ttt_ema else []
        self.mark = self._fingerprint()
        self.graphs = {} if self.fast and run.device.type == "cuda" else None

    def _rule(self, name, frozen):
        """How the parameter `name` is updated: sgd, adamw, muon, hash (AdamW at TTT_HASH_LR), lora, or '' for not."""
        cfg = self.cfg
        if name == "embed.hash_table":
            return "hash"
        r = route(name)
        if frozen or r.role not in cfg.ttt_roles.split(",") or cfg.ttt_lora and r.optimizer != "muon":
            return ""
        if cfg.ttt_lora:
            return "lora"
        return "sgd" if cfg.ttt_optimizer == "muon" and r.optimizer != "muon" else cfg.ttt_optimizer

    def _lay_out(self):
        """One flat gradient for all trained weights, grouped by rule and shape: `params`, `leaves`, `low_rank`."""
        frozen = {id(p) for block in self.model.blocks[:self.cfg.ttt_freeze_blocks] for p in block.parameters()}
        groups, rng = {}, torch.Generator().manual_seed(self.cfg.seed)
        for name, p in self.model.named_parameters():
            rule = self._rule(name, id(p) in frozen)
            p.requires_grad_(bool(rule))
            if rule:
                groups.setdefault((rule, tuple(p.shape)), []).append(p)
        self.params = [p for group in groups.values() for p in group]
        self.flat_grad = torch.zeros(sum(p.numel() for p in self.params), device=self.run.device)
        self.leaves, self.low_rank = [], []
        parts = self.flat_grad.split([len(group) * math.prod(shape) for (_, shape), group in groups.items()])
        for ((rule, shape), group), part in zip(groups.items(), parts):
            grad = part.view(len(group), *shape)
            for p, p_grad in zip(group, grad):
                p.grad = p_grad
            if rule == "lora":
                (R, C), rank = shape, min(self.cfg.ttt_lora, *shape)
                A = torch.randn(len(group), rank, C, generator=rng).to(self.run.device) * C**-0.5
                sides = [Leaf(self.cfg.ttt_optimizer, list(x.unbind()), torch.zeros_like(x))
                         for x in (A, A.new_zeros(len(group), R, rank))]
                self.low_rank.append(LowRank(group, grad, torch.stack([p.detach() for p in group]), *sides))
                self.leaves += sides
            else:
                self.leaves.append(Leaf(rule, group, grad))

    def _fingerprint(self):
        """Numbers that change when any weight or any hint does."""
        return fingerprint(self.model), [int(x.sum()) for x in self.tilt[2:]] if self.tilt else []

    def verify(self, first):
        """After targets from `first` on were scored: none of them was trained on, no weight or hint changed since."""
        self.in_order &= self.seen <= first and self._fingerprint() == self.mark

    def _batches(self, tokens, first, last):
        """This rank's batches, Rows of one shape, of the chunk of targets first .. last - 1."""
        T = self.cfg.train_seq_len
        starts = np.arange(first, last, T)
        a, b = self.run.share(len(starts))
        # A backward pass keeps its activations, so it gets a quarter of EVAL_BATCH_TOKENS at most.
        size = max(1, min(self.cfg.eval_batch_tokens // 4 // T, -(-len(starts) // self.run.world_size)))
        mine = np.pad(starts[a:b], (0, (a - b) % size), constant_values=last)  # empty rows keep the shape
        return [make_rows(tokens, part, part, np.minimum(part + T, last), T, self.run.device)
                for part in mine.reshape(-1, size)]

    def __call__(self, scored):
        """scored: np.uint16, the text up to and including the last scored target."""
        began, first, self.seen = time.perf_counter(), self.seen, len(scored) - 1
        if self.tilt:
            learn(self.tilt, scored, first, self.seen)
        shape = 0.5 * (1 + math.cos(math.pi * (first // self.cfg.ttt_chunk_tokens) / max(1, self.chunks)))
        self.rate = shape if self.cfg.ttt_schedule == "cosine" else 1.0
        self.calls += 1
        if self.trains:
            batches = self._batches(scored, first, self.seen)
            begins = np.flatnonzero(scored[first + 1:] == self.cfg.bos_id) if self.cfg.ttt_reset else ()
            if len(begins):  # a document began: forget the others, train on what was seen of this one
                self.reset()
                first += 1 + int(begins[-1])
                batches = [rows._replace(wanted=rows.wanted & (rows.starts[:, None] + torch.arange(
                    rows.ids.shape[1], device=rows.starts.device) >= first)) for rows in batches]
            self.pending.append((batches, self.seen - first))
            if self.calls % self.cfg.ttt_phase_chunks == 0:
                self._train()
        self.mark = self._fingerprint()  # waits for the device
        self.train_s += time.perf_counter() - began

    def reset(self):
        """Put back the artifact's weights and forget all that training left."""
        copy_all(self.weights, self.base)
        copy_all(self.raw, self.base[:len(self.raw)])
        for one in self.leaves:
            one.m.zero_()
            one.v.zero_()
        self.pending, self.steps = [], 0

    def close(self):
        """Leave the model as it was."""
        self.reset()
        self.model.embed.hash_table = None
        self.model.requires_grad_().zero_grad()

    def _train(self):
        """TTT_EPOCHS passes over the chunks of a phase, a step each; with TTT_EMA their average is left to score."""
        chunks = [chunk for chunk in self.pending if chunk[1]]
        number = partial(torch.full, (), dtype=torch.float64, device=self.run.device)
        average = [p.detach().clone() for p in self.params] if self.raw else []
        copy_all(self.params, self.raw)
        for batches, num_targets in chunks * self.cfg.ttt_epochs:
            for rows in batches:
                replayed(self.graphs, self._gradient, rows.ids, rows.targets, rows.wanted, number(1 / num_targets))
            self.run.all_sum(self.flat_grad)
            self.steps += 1
            replayed(self.graphs, self._step, number(self.steps), number(self.rate))
            if average:
                torch._foreach_lerp_(average, [p.detach() for p in self.params], 1 - self.cfg.ttt_ema)
        copy_all(self.raw, self.params)
        copy_all(self.params, average)
        self.pending = []

    def _gradient(self, ids, targets, wanted, share):
        """Add the gradient of the batch's summed nats, times `share`, to `flat_grad`."""
        with fresh_leaves(self.model):
            (compiled(summed_nll, self.fast)(self.model, ids, targets, wanted) * share).backward()

    @torch.no_grad()
    def _step(self, steps, rate):
        """Step number `steps`, at `rate` times the learning rates, from the summed gradient, which is then zeroed.

        For adapters, by the chain rule: dA = B^T dW, dB = dW A^T.
        """
        cfg, grads = self.cfg, [one.grad for one in self.leaves]
        for group in self.low_rank:
            torch.matmul(torch.stack(group.B.params).mT, group.grad, out=group.A.grad)
            torch.matmul(group.grad, torch.stack(group.A.params).mT, out=group.B.grad)
        if cfg.ttt_grad_clip:
            norm = torch.stack(torch._foreach_norm(grads)).norm()
            torch._foreach_mul_(grads, (cfg.ttt_grad_clip / (norm + 1e-6)).clamp(max=1.0))
        for one in self.leaves:
            lr = rate * (cfg.ttt_hash_lr if one.rule == "hash" else cfg.ttt_lr)
            torch._foreach_sub_(one.params, list((one.direction(steps, cfg) * lr).unbind()))
        for group in self.low_rank:
            weights = group.base + torch.stack(group.B.params) @ torch.stack(group.A.params)
            torch._foreach_copy_(group.params, list(weights.unbind()))
        self.flat_grad.zero_()

    def report(self, ledger, scored):
        """One line for a chunk, `scored` its own Ledger; at most LOG_LINES of them in an evaluation."""
        chunk = -(-ledger.next_target // self.cfg.ttt_chunk_tokens)
        if chunk % -(-self.chunks // LOG_LINES) and chunk < self.chunks:
            return
        rate = self.rate if self.seen == ledger.next_target else 0.0  # nothing is trained on the last chunk
        self.run.log("ttt", chunk=f"{chunk}/{self.chunks}", scored_tokens=ledger.tokens, running_bpb=ledger.bpb,
                     chunk_bpb=scored.bpb, lr=f"{rate * self.cfg.ttt_lr:.6f}",
                     time=f"{1000 * (time.perf_counter() - self.began):.0f}ms")

    def tensors(self):
        """{name: Tensor} of all that a resumed evaluation needs, the live ones: copy into them to restore."""
        lists = dict(weight=self.weights, raw=self.raw, m=[one.m for one in self.leaves],
                     v=[one.v for one in self.leaves], tilt=self.tilt[2:] if self.tilt else [])
        return {f"{name}{i}": x for name, xs in lists.items() for i, x in enumerate(xs)}

    def counters(self):
        """What a resumed evaluation needs besides `tensors`, JSON-able."""
        return dict(calls=self.calls, seen=self.seen, steps=self.steps, in_order=self.in_order)

    @torch.no_grad()
    def restore(self, tensors, counters):
        """Go on from another Adapter's `tensors` and `counters`."""
        for name, x in self.tensors().items():
            x.copy_(tensors[name])
        self.calls, self.seen, self.steps, self.in_order = (counters[k] for k in ("calls", "seen", "steps", "in_order"))
        self.mark = self._fingerprint()


LOG_LINES = 64  # most `ttt` lines of an evaluation


@torch.no_grad()
def copy_all(tensors, values):
    """Copy values into tensors, one for one; nothing if either list is empty."""
    if tensors and values:
        torch._foreach_copy_(tensors, values)


def fingerprint(model):
    """A number that changes when any weight does."""
    return float(torch.stack(torch._foreach_norm([p.detach() for p in model.parameters()], 1, torch.float64)).sum())


class Progress:
    """Keeps an evaluation on disk, so that one that was stopped goes on where it was and scores nothing twice.

    key: names artifact, text, method and settings; a file of another key is not used.   every_s: seconds between
    savings, 0 = never.   resume: go on from `path` if it holds this evaluation.
    """

    def __init__(self, path, key, run, every_s, resume=False):
        self.path, self.key, self.run, self.every_s = Path(path), key, run, every_s
        self.saved = self.began = time.perf_counter()
        self.found = run.broadcast(self._find() if resume and run.rank == 0 else None)
        self.spent = 0.0  # seconds of the evaluation that this one goes on with

    def _find(self):
        """On rank 0: the (tensors, facts) of this evaluation as saved, or None."""
        if not self.path.exists():
            return None
        try:
            found = load_tensors(self.path)
        except FileError as error:
            return self.run.log("evaluation_resume", used="no", reason=str(error))
        if found[1].get("key") != self.key:
            return self.run.log("evaluation_resume", used="no", reason="another_script_artifact_text_or_setting")
        return found

    def restore(self, scorer):
        """The Ledger to go on from, an empty one if nothing was found; Scorer and Adapter put in place."""
        self.began = time.perf_counter()
        if not self.found:
            return Ledger()
        (tensors, facts), self.found = self.found, None
        self.spent = facts["spent"]
        state = [tensors[f"state{i}"] for i in range(facts["state"])]
        scorer.state = state_from(state, scorer.model, self.run.device) if state else None
        if scorer.adapter:
            scorer.adapter.restore(tensors, facts["adapter"])
        ledger = Ledger(*facts["ledger"])
        self.run.log("evaluation_resume", used="yes", next_target=ledger.next_target, ttt_epochs=scorer.cfg.ttt_epochs)
        return ledger

    def save(self, ledger, scorer):
        """Write what `restore` needs, if it is time."""
        adapter, due = scorer.adapter, self.every_s and time.perf_counter() - self.saved >= self.every_s
        if adapter and adapter.pending or not self.run.broadcast(bool(due)):
            return
        if self.run.rank == 0:
            state = tree_leaves(scorer.state) if scorer.state else []
            tensors = {f"state{i}": x for i, x in enumerate(state)} | (adapter.tensors() if adapter else {})
            facts = dict(key=self.key, ledger=ledger.numbers(), state=len(state),
                         spent=self.spent + time.perf_counter() - self.began, epochs=scorer.cfg.ttt_epochs,
                         adapter=adapter.counters() if adapter else None)
            try:
                save_tensors(self.path, tensors, facts)
            except FileError as error:  # the evaluation itself needs no disk
                self.run.log("evaluation_not_saved", reason=str(error))
        self.saved = time.perf_counter()

    def remove(self):
        """The evaluation is done: delete the file."""
        if self.run.rank == 0:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


def state_from(tensors, model, device):
    """The StreamState of these leaves; a forward casts them to the type it works in."""
    parts = (x.to(device) for x in tensors)
    kinds = (GDNState if isinstance(block.mixer, GatedDeltaNet) else KVState for block in model.blocks)
    return StreamState(EmbedState(next(parts), next(parts)), tuple(kind(next(parts), next(parts)) for kind in kinds))


def evaluation_key(blob, tokens, sidecar, method, cfg):
    """A text that two evaluations share only if script, artifact, text, method and all settings that matter agree."""
    names = [f.name for f in fields(cfg) if f.name.startswith("ttt_") or f.name in (
        "eval_stride", "eval_spans", "eval_warmup_tokens", "eval_batch_tokens", "muon_backend_steps", "beta1", "beta2",
        "seed")]
    read = code_bytes(), blob, np.ascontiguousarray(tokens), b"" if sidecar is None else np.ascontiguousarray(sidecar)
    digests = (hashlib.sha256(x).hexdigest() for x in read)
    parts = *digests, method, *(getattr(cfg, name) for name in names)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------
# 9. Training
# ----------------------------------------------------------------------------------------------------
# One step, the schedule, the loop.  The clock runs from the first step to the last and stands still only
# while validating; compiling and throw-away steps on synthetic tokens come before it and leave no trace in
# weights, optimizer or data order.  Schedule position and stop are rank 0's, broadcast.


def mean_nll(model, ids, targets):
    """Training loss: mean nats per token of (B, T) targets."""
    x, _ = model.features(ids)
    return head_nll(model.embed, x, targets).mean()


def activation_bytes_per_token(cfg):
    """Memory that one token's forward keeps for the backward pass [bytes], counted from the layers."""
    width = 2 if cfg.kernel != "reference" or cfg.device == "cuda" else 4
    D, total = cfg.model_dim, 0.0
    for layer in parse_stack(cfg.stack):
        qk, v = cfg.gdn_heads * cfg.gdn_head_dim, (cfg.gdn_v_heads or cfg.gdn_heads) * cfg.gdn_head_dim
        total += 4 * qk + 5 * v if layer.kind == "gdn" else 6 * D  # projections, q, k, v, outputs before and after norm
        total += 4 * D + (2 - fuses_mlp(cfg)) * cfg.mlp_mult * D  # residual twice, each normalised; MLP twice or once
    return total * width + 12 * cfg.vocab_size


def settle_batch(cfg, run, before=0):
    """cfg with TRAIN_BATCH_TOKENS=0 replaced: whole rows, as many on every rank.

    131072 tokens a step were better than 262144 on one GPU (README); over many ranks steps grow to the challenge's.
    before: the number of the checkpoint that the run goes on from, if any.
    """
    if cfg.train_batch_tokens or before:
        return replace(cfg, train_batch_tokens=cfg.train_batch_tokens or before)
    rows = max(1, min(131072, 786432 // run.world_size) // cfg.train_seq_len)
    rows -= rows % 8 if rows > 8 else 0  # so that micro-batches divide them
    return replace(cfg, train_batch_tokens=rows * cfg.train_seq_len * run.world_size)


def micro_batch_rows(cfg, run):
    """Rows of one forward pass on one rank: a divisor of the rank's rows of a step.

    Raises SettingError, naming the nearest batch, if the ranks cannot share the step's rows evenly.
    """
    rows = cfg.train_batch_tokens // cfg.train_seq_len
    if rows % run.world_size:
        near = max(1, round(rows / run.world_size)) * run.world_size
        raise SettingError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: {rows} rows of TRAIN_SEQ_LEN="
                           f"{cfg.train_seq_len} cannot be shared by {run.world_size} ranks; set TRAIN_BATCH_TOKENS="
                           f"{near * cfg.train_seq_len}")
    if cfg.micro_batch_tokens:
        most = cfg.micro_batch_tokens
    elif run.device.type == "cuda":
        most = 0.4 * torch.cuda.get_device_properties(run.device).total_memory / activation_bytes_per_token(cfg)
    else:
        most = 2048  # larger ones fall out of a CPU's caches
    rows //= run.world_size
    fitting = min(rows, max(1, int(most // cfg.train_seq_len)))
    return next(d for d in range(fitting, 0, -1) if rows % d == 0)


@contextmanager
def on_export_grid(model, enabled):
    """Inside, every stored matrix lies on the export's grid, rounded to nearest; afterwards it is as before.

    Gradients taken inside and applied afterwards are straight-through estimates (late QAT).
    """
    cfg, bits = model.cfg, stored_bits(model, model.cfg) if enabled else {}
    params, usual = [model.get_parameter(name) for name in bits], expected_clip(model, cfg) if bits else 0.0
    saved = [p.detach().clone() for p in params]
    copy_all(params, [dequantize(*quantize(p.detach(), b, getattr(cfg, route(name).clip) or usual))
                      for (name, b), p in zip(bits.items(), params)])
    try:
        yield
    finally:
        copy_all(params, saved)


def train_step(model, optimizer, batch, micro_rows, lr_mul, qat=False):
    """One optimizer step on batch (rows, T + 1), with qat at rounded weights; this rank's mean loss, a tensor."""
    loss_of = compiled(mean_nll, model.cfg.compile != "0")
    parts, total = batch.split(micro_rows), 0.0
    with on_export_grid(model, qat):
        for part in parts:
            loss = loss_of(model, part[:, :-1].contiguous(), part[:, 1:].contiguous()) / len(parts)
            loss.backward()
            total = total + loss.detach()
    optimizer.step(lr_mul)
    return total


def learning_rate(progress, cfg):
    """The multiple of the full learning rates at `progress` in [0, 1]: flat, then linear down to MIN_LR."""
    left = (1.0 - min(progress, 1.0)) / max(cfg.warmdown_frac, 1e-9)
    return min(1.0, cfg.min_lr + (1.0 - cfg.min_lr) * left)


GRAPH_TOLERANCE = {"cuda": 0.1, "cpu": 0.01}  # relative, of loss and gradient; bfloat16 rounds each graph its own way


def check_graph(model, batch, run):
    """Compare the compiled training loss and its gradient with eager ones; raises KernelError if they differ.

    batch: (rows, T + 1), the shape of training.  torch.compile has been seen to make wrong code in silence.  Where
    eager does not fit in memory, the log says so.
    """
    ids, targets, params = batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), list(model.parameters())

    def gradient(loss_of):
        loss = loss_of(model, ids, targets)
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in params])
        torch._foreach_zero_([p.grad for p in params])
        return loss.detach(), found
    try:
        (loss, fast), (eager_loss, exact) = gradient(compiled(mean_nll, True)), gradient(mean_nll)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        torch._foreach_zero_([p.grad for p in params])
        return run.log("graph_check", skipped="out_of_memory")
    errors = dict(loss=relative_error(loss, eager_loss), gradient=relative_error(fast, exact))
    run.log("graph_check", **{name: f"{error:.6f}" for name, error in errors.items()})
    most = GRAPH_TOLERANCE[run.device.type]
    if not all(error <= most for error in errors.values()):
        raise KernelError(f"COMPILE={model.cfg.compile}: the compiled loss and gradient differ from the eager ones by "
                          f"{errors} (relative, at most {most} allowed): torch.compile makes wrong code here; set "
                          "COMPILE=0, or use another torch")
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)  # the peak that the log shows is that of training


def warm_up(model, cfg, run, micro_rows):
    """Compile and autotune everything before the clock starts, on synthetic tokens; the weights are put back."""
    saved = [p.detach().clone() for p in model.parameters()]
    rows = cfg.train_batch_tokens // cfg.train_seq_len // run.world_size
    rng = torch.Generator().manual_seed(cfg.seed)
    optimizer, average = Optimizer(model, cfg, run), Average(model, cfg)
    batch = torch.zeros(CALIBRATION_ROWS, cfg.train_seq_len + 1, dtype=torch.int32)
    for _ in range(cfg.warmup_steps):
        batch = torch.randint(cfg.vocab_size, (rows, cfg.train_seq_len + 1), generator=rng, dtype=torch.int32)
        train_step(model, optimizer, batch.to(run.device), micro_rows, 1.0)
        average.update(0, 0.0)
    if cfg.compile != "0" and cfg.warmup_steps:
        check_graph(model, batch[:micro_rows].to(run.device), run)
    if cfg.gptq_enabled:
        Hessians(model).collect(model, [batch[:CALIBRATION_ROWS].to(run.device)], run)
    copy_all(list(model.parameters()), saved)
    model.zero_grad()


def rehearse(model, method, num_targets, run):
    """Seconds that scoring num_targets by `method` will take, from one call on synthetic tokens in the shape to come.

    Compiles what `evaluate` will call.
    """
    cfg, total = model.cfg, num_targets
    score = compiled(score_rows, compile_evaluation(cfg, run, method, total))
    rows = cfg.eval_batch_tokens // cfg.train_seq_len

    def call_s(B, T, carried):
        # Two tensors: one passed twice would compile a graph for aliased inputs, which no evaluation has.
        ids, targets = torch.zeros(2, B, T, dtype=torch.int32, device=run.device).unbind()
        state = None
        for _ in range(3):  # the first state that is carried and the later ones have other strides
            _, state = score(model, ids, targets, state if carried else None)
        every = targets[:1, :PROBE_TOKENS, None].expand(-1, -1, probe_candidates(cfg.vocab_size))
        score_rows(model, ids[:1, :PROBE_TOKENS], every)  # what a probe calls
        run.synchronize()
        began = time.perf_counter()
        score(model, ids, targets, state if carried else None)
        run.synchronize()
        return time.perf_counter() - began

    with torch.inference_mode():
        if method == "exact":
            spans, units = len(cut(0, total, cfg.eval_spans)), EXACT_UNITS if cfg.eval_save_seconds else 1
            mine = -(-spans // units // run.world_size)  # of a unit, on the rank with most
            B, longest = min(rows, mine), min(total, -(-total // spans) + cfg.eval_warmup_tokens)
            T = segment_length(longest, B, cfg)
            return min(units, spans) * -(-mine // rows) * -(-longest // T) * call_s(B, T, longest > T)
        stride = cfg.eval_stride if method == "sliding" else cfg.train_seq_len
        count = 1 + max(0, -(-(total - cfg.train_seq_len) // stride))
        return -(-count // run.world_size // rows) * call_s(rows, cfg.train_seq_len, False)


def rehearse_adapting(model, num_targets, run):
    """Seconds that an evaluation with test-time training will take without epochs, and for each of TTT_EPOCHS.

    Scores three chunks of synthetic tokens, trains on two of them and puts the weights back.
    """
    cfg = model.cfg
    chunks, total = -(-num_targets // cfg.ttt_chunk_tokens), min(num_targets, 3 * cfg.ttt_chunk_tokens)
    tokens = np.random.default_rng(cfg.seed).integers(0, cfg.vocab_size, total + 1).astype(np.uint16)
    nothing = torch.zeros(cfg.vocab_size, dtype=torch.int64)
    table = ByteTable(nothing + 1, nothing > 0, nothing > 0)
    some = min(1, cfg.ttt_epochs)

    def measured(epochs):
        """Seconds of scoring, and between two chunks."""
        adapter = Adapter(model, num_targets, run)
        adapter.cfg = replace(cfg, ttt_epochs=epochs, ttt_phase_chunks=1)
        adapter.report = lambda ledger, scored: None
        fresh = {name: x.clone() for name, x in adapter.tensors().items()}, adapter.counters()
        times = []
        for _ in range(3):  # the first compiles and records; the least of the others counts
            adapter.restore(*fresh)
            run.gather(None)  # no rank's time holds a wait for a later one
            adapter.train_s, began = 0.0, time.perf_counter()
            evaluate(model, tokens, table, cfg.ttt_scoring, adapter, run)
            times.append((time.perf_counter() - began - adapter.train_s, adapter.train_s / max(1, adapter.calls)))
        adapter.close()
        return tuple(min(column) for column in zip(*times[1:]))

    scoring_s, pause_s = measured(some)
    least_s = measured(0)[1] if some else pause_s
    return scoring_s * num_targets / total + chunks * least_s, chunks * max(0.0, pause_s - least_s)


def plan_evaluation(model, cfg, run, num_targets, again=False):
    """Warm up evaluation, log how long it will take, on synthetic tokens alone; model.cfg may get fewer TTT_EPOCHS.

    Raises SettingError, naming the setting, if the reported method would overrun EVAL_BUDGET_SECONDS and EVAL_OVERRUN
    does not allow to trim it.   again: the same plan was made before training, so that now it only warns.
    """
    method, seconds, epoch_s = cfg.final_score, 0.0, 0.0
    if cfg.compile != "0":  # what else will be called: validation, and diagnostics if wanted
        for other in ("roundtrip", *(("exact", "sliding") if cfg.eval_diagnostics else ())):
            rehearse(model, other, num_targets, run)
        if cfg.eval_diagnostics and cfg.ttt_enabled and method != "ttt":
            rehearse_adapting(model, num_targets, run)
    if method == "ttt":
        seconds, epoch_s = rehearse_adapting(model, num_targets, run)
    else:
        seconds = rehearse(model, method, num_targets, run)
    seconds, epoch_s = run.broadcast((seconds, epoch_s))
    epochs = cfg.ttt_epochs if method == "ttt" else 0
    needed, budget, trim = seconds + epochs * epoch_s, cfg.eval_budget_seconds, epochs and cfg.eval_overrun == "trim"
    if needed > budget and (seconds > budget or not trim):
        how = {"roundtrip": "EVAL_BATCH_TOKENS", "exact": "EVAL_SPANS and EVAL_WARMUP_TOKENS", "sliding": "EVAL_STRIDE",
               "ttt": "TTT_EPOCHS" if seconds <= budget else "EVAL_STRIDE, or TTT_CHUNK_TOKENS"}[method]
        fault = (f"FINAL_SCORE={method} would take about {needed:.0f} s for {num_targets} targets, more than "
                 f"EVAL_BUDGET_SECONDS={budget:g}; change {how}")
        if not again:
            raise SettingError(fault)
        run.log("warning", reason=fault)
    elif trim and needed > 0.95 * budget:  # a plan can miss a little
        epochs = max(0, math.floor((0.95 * budget - seconds) / epoch_s)) if epoch_s else 0
        model.cfg = replace(model.cfg, ttt_epochs=epochs)
        run.log("warning", ttt_epochs=epochs, instead_of=cfg.ttt_epochs, reason="EVAL_BUDGET_SECONDS")
    run.log("evaluation_plan", method=method, targets=num_targets, scoring_s=f"{seconds:.1f}",
            training_s=f"{epochs * epoch_s:.1f}", projected_s=f"{seconds + epochs * epoch_s:.1f}",
            budget_s=f"{budget:g}")


class StopRequest:
    """SIGINT or SIGTERM; inside `deferring` it is remembered in `signal`, so that a checkpoint can be written first."""

    signal, deferred, came = 0, False, 0.0

    def listen(self):
        """Begin to handle both signals; nothing has come yet."""
        self.signal, self.deferred, self.came = 0, False, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    @contextmanager
    def deferring(self):
        """The training loop runs inside."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False

    def handle(self, number, frame):
        """Signal handler.  A repeat within a second is torchrun passing the same signal on, and is ignored; a later one
        is a person who will not wait for the checkpoint."""
        first, now = not self.came, time.monotonic()
        self.came = self.came or now
        if self.deferred and (first or now - self.came < 1.0):
            self.signal = number
        elif first or now - self.came >= 1.0:
            raise Interrupted(f"stopped by {signal.Signals(number).name}; the log is kept")


STOP = StopRequest()


class Training:
    """What a training run has reached: weights, optimizer, average, place in the data, steps and seconds.

    `state` is all of it, the same for any number of ranks; `saved`, an earlier one, is where it goes on.  Nothing else
    is random: the loader's order follows from the seed and its place.
    """

    def __init__(self, model, data, cfg, run, saved=None):
        tensors, facts = saved or ({}, dict(step=0, elapsed_s=0.0, loader=(0, 0), averaged=0, trained=False))
        self.model, self.run, self.step, self.trained = model, run, facts["step"], facts["trained"]
        if saved:
            for name, p in model.named_parameters():
                copy_saved(p, tensors, f"model.{name}")
        self.optimizer, self.average = Optimizer(model, cfg, run), Average(model, cfg)
        if saved and not self.trained:
            self.optimizer.load(tensors, self.step)
            self.average.load(tensors, facts["averaged"])
        self.clock = Clock(run, facts["elapsed_s"])
        self.loader = Loader(data.train, cfg, run, facts["loader"])

    def state(self):
        """(tensors, facts) of a checkpoint; every rank must call it."""
        return self.weights() | self.optimizer.state() | self.average.state(), self.facts()

    def weights(self):
        """{name: Tensor} of the model."""
        return {f"model.{name}": p for name, p in self.model.named_parameters()}

    def facts(self, trained=False):
        """What a checkpoint says beside its tensors; trained: only weights and Hessians are still to be used."""
        return dict(step=self.step, elapsed_s=self.clock.elapsed(), loader=list(self.loader.state()),
                    averaged=self.average.count, trained=trained)


class Checkpoints:
    """A run's state on disk, OUT_DIR/RUN_ID.ckpt: the last two `step_N.npz` and `trained.npz`, the averaged weights.

    Files appear whole or not at all.  They can be loaded by any number of ranks, not under other settings.
    """

    def __init__(self, cfg, run, data):
        self.cfg, self.run, self.last_s, self.newest = cfg, run, 0.0, None
        self.folder = Path(cfg.out_dir) / f"{cfg.run_id}.ckpt"
        self.shards = [[path.name, len(tokens)] for path, tokens in data.train]

    def identity(self, trained):
        """The settings that a checkpoint fixes, as text; once trained, those of the export are free."""
        fixed = ("data", "model", "training") if trained else ("data", "model", "training", "export")
        return {name: plain(getattr(self.cfg, name)) for name, title in GROUP_OF.items()
                if name == "seed" or title in fixed and name not in FREE_FIELDS}

    def due(self, elapsed):
        """Whether CHECKPOINT_EVERY_SECONDS have passed since `last_s`; `elapsed` is rank 0's clock, so that ranks whose
        own clocks differ agree: if one alone saved, its collectives would meet the others' gradients."""
        return 0 < self.cfg.checkpoint_every_seconds <= elapsed - self.last_s

    def save(self, name, tensors, facts):
        """Rank 0 writes one, then `newest`; a fault is logged and the run goes on.  Weights that are not finite are
        never written."""
        self.newest = None
        if self.run.rank:
            return
        facts = facts | dict(config=self.identity(facts["trained"]), shards=self.shards)
        try:
            if not all(bool(x.isfinite().all()) for x in tensors.values()):
                raise FileError(f"{name}: weights or moments are not finite")
            path = self.folder / f"{name}.npz"
            save_tensors(path, tensors, facts)
        except FileError as error:
            return self.run.log("checkpoint_failed", reason=str(error))
        self.newest = path
        with suppress(OSError):  # by time, for a run that went back to an earlier step writes lower numbers
            for old in sorted(self.folder.glob("step_*.npz"), key=lambda old: old.stat().st_mtime_ns)[:-2]:
                old.unlink()

    def save_step(self, job):
        """Write where `job` stands; every rank must call it.  Returns how to go on from there, for a message."""
        self.save(f"step_{job.step:08d}", *job.state())
        return self.how_to_go_on()

    def how_to_go_on(self):
        """The end of a message to who stopped the run."""
        return f"RESUME={self.newest} goes on" if self.newest else "its checkpoint could not be written"

    def mark_export(self, blob, train_s):
        """Rank 0 remembers that `blob` is the artifact of `newest`, the trained weights, under these settings."""
        if self.newest:
            try:
                text = json.dumps(dict(made=self._mark(blob), train_s=train_s)).encode()
                write_whole(self.folder / "exported.json", lambda f: f.write(text))
            except (FileError, OSError) as error:  # a run that goes on will export again
                self.run.log("checkpoint_failed", reason=str(error))

    def exported(self, path):
        """On rank 0: the artifact at `path` and the seconds of training, if `newest` was exported to it under these
        settings; else None."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            blob, facts = path.read_bytes(), json.loads((self.folder / "exported.json").read_bytes())
            if facts["made"] == self._mark(blob):
                return blob, float(facts["train_s"])
        return None

    def _mark(self, blob):
        """What an export was made from and what it gave, JSON-able."""
        made, source = (hashlib.sha256(data).hexdigest() for data in (blob, self.newest.read_bytes()))
        return dict(artifact=made, trained=source, settings=self.identity(trained=False))

    def load(self):
        """The (tensors, facts) that RESUME names, or None to begin anew; equal on all ranks.

        Of a folder the furthest file that is whole counts.   Raises FileError or SettingError saying what does not fit.
        """
        return self.run.from_rank_0(self._load) if self.cfg.resume else None

    def _load(self):
        path = self.folder if self.cfg.resume == "auto" else Path(self.cfg.resume)
        own = [*self.folder.glob("step_*.npz"), *self.folder.glob("trained.npz")]
        if own and self.folder.resolve() not in (path.resolve(), path.resolve().parent):
            raise SettingError(f"RESUME={path}: not of RUN_ID={self.cfg.run_id}, which has checkpoints of its own in "
                               f"{self.folder}; RESUME=auto goes on with those, another RUN_ID begins from this one")
        steps = sorted(path.glob("step_*.npz"), reverse=True)
        files = [path] if path.is_file() else [*path.glob("trained.npz"), *steps]
        if not files and self.cfg.resume != "auto":
            raise FileError(f"RESUME={path}: no checkpoint there (step_N.npz or trained.npz)")
        faults = []
        for file in files:
            try:
                tensors, facts = load_tensors(file)
                self._check(file, facts)
                self.newest = file
                return tensors, facts
            except FileError as error:
                faults.append(str(error))
                self.run.log("checkpoint_skipped", reason=str(error))
        if faults:
            raise FileError(f"RESUME={self.cfg.resume}: no whole checkpoint: {'; '.join(faults)}")
        return None

    def _check(self, file, facts):
        """Raise FileError if the facts are malformed, SettingError if they are those of another run."""
        kinds = dict(step=int, elapsed_s=float, loader=list, averaged=int, trained=bool, config=dict, shards=list)
        if not isinstance(facts, dict) or any(type(facts.get(key)) is not kind for key, kind in kinds.items()) or not (
                str(facts["config"].get("train_batch_tokens")).isdigit()):
            raise FileError(f"{file}: not a checkpoint of this script")
        place = facts["loader"]
        if [type(n) for n in place] != [int, int] or min(*place, facts["step"], facts["averaged"]) < 0 or not (
                0 <= facts["elapsed_s"] < math.inf) or (facts["trained"] and type(facts.get("train_s")) is not float):
            raise FileError(f"{file}: its step, clock or place in the data are impossible")
        now, then = self.identity(facts["trained"]), facts["config"]
        if not self.cfg.train_batch_tokens:  # by default it goes on as it was, under any number of ranks
            now["train_batch_tokens"] = then["train_batch_tokens"]
        differing = [f"{name.upper()} was {then.get(name)}, is {now.get(name)}" for name in {**then, **now}
                     if then.get(name) != now.get(name)]
        if facts["shards"] != self.shards:
            differing.append("the training shards of DATA_PATH have other names or lengths")
        if differing:
            raise SettingError(f"RESUME={self.cfg.resume}: {file} is of another configuration: {'; '.join(differing)}")


# Settings of the fixed groups that may change between a checkpoint and the run that goes on from it.
FREE_FIELDS = ("data_path", "tokenizer_path", "micro_batch_tokens", "warmup_steps", "val_loss_every", "train_log_every")


class Trained(NamedTuple):
    """What training left beside the weights: steps done, seconds on the training clock, the Calibration."""
    steps: int
    train_s: float
    calibration: Calibration


def train(model, data, cfg, run, checkpoints, saved=None):
    """Train until ITERATIONS or the clock ends it, from `saved` on; leaves the averaged weights in the model.

    Then calibrates, writes trained.npz, and returns Trained.
    """
    micro_rows = micro_batch_rows(cfg, run)
    if not (saved and saved[1]["trained"]) or cfg.gptq_enabled:  # calibration runs forward and backward too
        warm_up(model, cfg, run, micro_rows)
    if cfg.compile != "0":  # stops here if evaluation would take too long
        plan_evaluation(model, cfg, run, len(data.val) - 1)
    run.log("kernel", gdn=cfg.kernel, swa=cfg.attn_kernel, loss="compiled" if cfg.compile != "0" else "eager",
            micro_batch_tokens=micro_rows * cfg.train_seq_len, start_up=f"{time.perf_counter() - run.began:.0f}s")
    job = Training(model, data, cfg, run, saved)
    checkpoints.last_s = job.clock.total
    run.gather(None)  # no rank's clock counts how much later another was ready
    job.clock.resume()
    facts, train_s = None, 0.0
    with STOP.deferring():
        try:
            if not job.trained:
                train_loop(job, data, cfg, run, micro_rows, checkpoints)
                job.average.copy_to()
            facts = job.facts(trained=True)  # the place in the data before calibration: it can be done again
            calibration = calibrate(model, job.loader, cfg, run, job.clock)
            train_s = run.broadcast(job.clock.pause())
        finally:
            job.loader.close()
            if facts and not job.trained:  # whatever befell the calibration
                checkpoints.save("trained", job.weights(), facts | dict(train_s=train_s or facts["elapsed_s"]))
    stop = int(max(run.gather(STOP.signal)))
    if stop:
        raise Interrupted(f"stopped by {signal.Signals(stop).name} after training; {checkpoints.how_to_go_on()}")
    return Trained(job.step, train_s, calibration)


def train_loop(job, data, cfg, run, micro_rows, checkpoints):
    """Steps until the clock or ITERATIONS end them; raises Interrupted, after a checkpoint, if a signal does."""
    model, clock, pace = job.model, job.clock, Pace(cfg, run, job)
    budget = cfg.max_wallclock_seconds or math.inf
    budget -= cfg.gptq_reserve_seconds if cfg.gptq_enabled else 0.0
    saved_step = job.step  # of the newest checkpoint
    while True:
        told = run.gather([clock.elapsed(), 1.05 * max(pace.durations, default=0.0), STOP.signal, job.loader.fault()])
        (elapsed, step_s, _, _), stop = told[0], int(max(signals for _, _, signals, _ in told))
        # On CUDA one step is still in flight, so the next one ends two steps from now.
        out_of_time = job.step > 0 and elapsed + step_s * (2 if run.device.type == "cuda" else 1) > budget
        last = job.step >= cfg.iterations or out_of_time
        fault = "" if last else max(fault for *_, fault in told)
        if stop or fault:
            kind, why = (Interrupted, f"stopped by {signal.Signals(stop).name}") if stop else (
                DataError, f"{fault}; stopped")
            error = kind(f"{why} at step {job.step}; {checkpoints.save_step(job)}")
            error.told = run.rank > 0
            raise error
        if pace.bad_steps > cfg.max_bad_steps:
            raise SettingError(f"step {job.step}: {pace.bad_steps} steps had gradients that are not finite, more than "
                               f"MAX_BAD_STEPS={cfg.max_bad_steps}; lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR; "
                               f"{checkpoints.save_step(job)}")
        if checkpoints.due(elapsed) and not last and job.step > saved_step:
            checkpoints.last_s, saved_step = elapsed, job.step
            checkpoints.save_step(job)
            pace.last_tick = clock.elapsed()
            continue  # saving took time: is there enough for another step?
        if cfg.val_loss_every and (job.step % cfg.val_loss_every == 0 or last):
            train_ms = 1000 * clock.pause()
            ledger = evaluate(model, data.val, data.table, "roundtrip", run=run)
            run.log("", step=f"{job.step}/{cfg.iterations}", **ledger.as_log(4), train_time=f"{train_ms:.0f}ms",
                    step_avg=f"{train_ms / max(1, job.step):.2f}ms")
            pace.last_bpb = f"  val_bpb {ledger.bpb:.4f}"
            clock.resume()
        if last:
            break
        progress = max(elapsed / budget, job.step / max(1, cfg.iterations))
        lr_mul = learning_rate(progress, cfg)
        loss = train_step(model, job.optimizer, next(job.loader), micro_rows, lr_mul,
                          qat=progress > 1 - cfg.qat_frac)
        job.step += 1
        job.average.update(job.step, lr_mul)
        pace.tick(loss, lr_mul)
    if out_of_time:
        run.log("stopping_early: wallclock_cap", train_time=f"{1000 * clock.elapsed():.0f}ms",
                step=f"{job.step}/{cfg.iterations}")


CALIBRATION_ROWS = 8  # rows of one calibration batch


def calibrate(model, loader, cfg, run, clock):
    """The Calibration by the next training rows, or by text of the model's own, inside the training clock.

    Ranks share the work, each by rows of its own part of the batches: another number of ranks sees other rows.
    """
    if not cfg.gptq_enabled:
        return UNCALIBRATED
    run.synchronize()
    run.peak_memory_mib(anew=True)
    loop_end_s = clock.elapsed()
    rows, done = -(-cfg.gptq_calibration_batches * CALIBRATION_ROWS // run.world_size), 0

    def batches():
        nonlocal done
        while done < rows:
            left = rows - done
            source = next(loader) if cfg.gptq_calibration == "train" else own_text(model, CALIBRATION_ROWS, left, run)
            for part in source[:left].split(CALIBRATION_ROWS):
                run.synchronize()
                now = clock.elapsed()  # one more batch, half again as long as the mean, and the sums of ranks must fit
                end = now + 1.5 * (now - loop_end_s) / max(1, done // CALIBRATION_ROWS) + 0.5
                late = done > 0 and (0 < cfg.max_wallclock_seconds < end or bool(STOP.signal))
                if run.broadcast(late):
                    return
                yield part
                done += len(part)
    calibration = Hessians(model).collect(model, batches(), run)
    run.synchronize()
    run.log("hessians", matrices=len(calibration.H), calibration=cfg.gptq_calibration,
            tokens=done * run.world_size * cfg.train_seq_len, wanted_tokens=rows * run.world_size * cfg.train_seq_len,
            loop_end_s=f"{loop_end_s:.1f}", hessian_end_s=f"{clock.elapsed():.1f}", peak_mem_mb=run.peak_memory_mib())
    return calibration


@torch.no_grad()
def generate(model, ids, count, temperature, rng):
    """Yield `count` times one token (B, 1) more after ids (B, T), from carried state; temperature 0: greedy."""
    state = None
    for _ in range(count):
        logits, state = model(ids, state)
        logits = logits[:, -1].double()
        ids = (torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng) if temperature else
               logits.argmax(-1, keepdim=True)).int()
        yield ids


def own_text(model, rows, turn, run):
    """Text drawn from the model at temperature 1: ids (rows, TRAIN_SEQ_LEN + 1)."""
    rng = torch.Generator(run.device).manual_seed(model.cfg.seed + 7919 * run.rank + turn)
    ids = torch.full((rows, 1), max(0, model.cfg.bos_id), dtype=torch.int32, device=run.device)
    return torch.cat([ids, *generate(model, ids, model.cfg.train_seq_len, 1.0, rng)], 1)


class Pace:
    """Keeps the host at most one step ahead of the device, estimates seconds per step, prints progress lines."""

    def __init__(self, cfg, run, job):
        self.cfg, self.run, self.job, self.durations = cfg, run, job, deque(maxlen=20)
        self.last_tick, self.last_line, self.bad_steps, self.last_bpb = job.clock.elapsed(), 0.0, 0, ""
        self.wait = run.to_host(job.optimizer.bad_steps)

    def tick(self, loss, lr_mul):
        """After a step was issued: wait for the one before it, so that the clock means something; log when due."""
        step, before = self.job.step, self.bad_steps
        wait, self.wait = self.wait, self.run.to_host(self.job.optimizer.bad_steps)
        self.bad_steps = int(*wait())  # on CUDA as it was after the step before
        if self.bad_steps > before:
            self.run.log("bad_step", step=step, count=self.bad_steps, most=self.cfg.max_bad_steps)
        now = self.job.clock.elapsed()
        self.durations.append(now - self.last_tick)
        step_s, self.last_tick = float(np.median(self.durations)), now
        left = min((self.cfg.max_wallclock_seconds or math.inf) - now, (self.cfg.iterations - step) * step_s)
        tok_s, eta = self.cfg.train_batch_tokens / max(step_s, 1e-9), max(0.0, left)
        self.run.progress(f"step {step}/{self.cfg.iterations}  {tok_s:,.0f} tokens/s  {eta:.0f} s left{self.last_bpb}")
        due = step <= 3 or step % self.cfg.train_log_every == 0 or (
            now - self.last_line > 8.0 and not self.cfg.deterministic)
        if not self.run.broadcast(due):
            return
        mean_loss = self.run.gather([float(loss)])
        self.last_line = now = self.job.clock.elapsed()
        self.run.log("", step=f"{step}/{self.cfg.iterations}", train_loss=float(np.mean(mean_loss)),
                     lr_mul=f"{lr_mul:.3f}", train_time=f"{1000 * now:.0f}ms", step_avg=f"{1000 * now / step:.2f}ms",
                     tok_s=f"{tok_s:.0f}", eta=f"{eta:.0f}s", peak_mem_mb=self.run.peak_memory_mib())


# ----------------------------------------------------------------------------------------------------
# 10. main
# ----------------------------------------------------------------------------------------------------
# Data, model, train, export, reload from the file alone, evaluate, report.  Every final number comes from the
# reloaded model; FINAL_SCORE, set beforehand, names the one that counts.


@cache
def code_bytes():
    """The bytes of this script as they were when first asked for, at the start: they count toward the cap."""
    return Path(__file__).read_bytes()


def timed_evaluation(event, model, data, method, run, adapt=None, progress=None, **facts):
    """Evaluate by `method`, print the event's line; returns the Ledger and the seconds it took, before a resumption
    too."""
    run.synchronize()
    run.peak_memory_mib(anew=True)
    began = time.perf_counter()
    ledger = evaluate(model, data.val, data.table, method, adapt, run, progress, probing=True)
    run.synchronize()
    seconds = run.broadcast(time.perf_counter() - began + (progress.spent if progress else 0.0))
    run.log(event, **ledger.as_log(), eval_time=f"{1000 * seconds:.0f}ms", **facts, peak_mem_mb=run.peak_memory_mib())
    return ledger, seconds


FINAL_EVENTS = {"roundtrip": "final_int6_roundtrip", "exact": "final_int6_exact",
                "sliding": "final_int6_sliding_window", "ttt": "final_int6_ttt"}


def load_on(run, artifact, cfg):
    """`load_artifact`, with the kernels that fit the artifact's own heads and this device."""
    model = load_artifact(artifact, run.device, cfg)
    settled = resolve_kernels(model.cfg, run)
    for module in model.modules():
        if hasattr(module, "cfg"):
            module.cfg = settled
    return model


def evaluate_artifact(blob, data, cfg, run, resume=False):
    """Reload the artifact from its bytes, score it, print the final lines.

    resume: go on from the run's evaluation.npz, if it holds this evaluation.
    Returns the model, the Ledger that counts, its seconds, and whether no weight changed while text was scored.
    """
    began = time.perf_counter()
    model = load_on(run, blob, cfg)
    if cfg.eval_only:
        check_kernels(model.cfg, run)
    if model.cfg.vocab_size != cfg.vocab_size:
        raise ArtifactError(f"ARTIFACT={cfg.artifact}: a model of {model.cfg.vocab_size} tokens, but the tokenizer "
                            f"has VOCAB_SIZE={cfg.vocab_size}")
    before, reload_s = fingerprint(model), time.perf_counter() - began
    run.log("reload", artifact_bytes=len(blob), load_time=f"{1000 * reload_s:.0f}ms")
    own = {name: getattr(model.cfg, name) for name in MODEL_FIELDS}
    differing = {name: plain(value) for name, value in own.items() if value != getattr(cfg, name)}
    if differing:  # what the model is, its file says, not the settings
        run.log("artifact_config", **differing)
    progress, results, in_order = None, {}, True
    if cfg.eval_save_seconds:  # without, there are other units, and nothing was saved
        key = evaluation_key(blob, data.val, data.table.sidecar, cfg.final_score, model.cfg)
        path = Path(cfg.out_dir) / f"{cfg.run_id}.ckpt" / "evaluation.npz"
        progress = Progress(path, key, run, cfg.eval_save_seconds, resume)
    plan_evaluation(model, model.cfg, run, len(data.val) - 1, again=not cfg.eval_only and model.cfg.compile != "0")
    if progress and progress.found:  # what was planned when it began holds to its end
        model.cfg = replace(model.cfg, ttt_epochs=progress.found[1]["epochs"])
    cfg = model.cfg
    facts = {"roundtrip": {}, "exact": dict(spans=cfg.eval_spans, warmup_tokens=cfg.eval_warmup_tokens),
             "sliding": dict(stride=cfg.eval_stride),
             "ttt": dict(scoring=cfg.ttt_scoring, optimizer=cfg.ttt_optimizer, epochs=cfg.ttt_epochs)}
    for method, event in FINAL_EVENTS.items():
        counts = method == cfg.final_score
        if counts or cfg.eval_diagnostics and (cfg.ttt_enabled or method != "ttt"):
            adapter = Adapter(model, len(data.val) - 1, run) if method == "ttt" else None
            results[method] = timed_evaluation(event, model, data, cfg.ttt_scoring if adapter else method, run, adapter,
                                               progress if counts else None, bits=cfg.matrix_bits, **facts[method])
            if adapter:
                adapter.close()
                in_order = adapter.in_order
    in_order &= fingerprint(model) == before
    if progress:
        progress.remove()
    ledger, seconds = results[cfg.final_score]
    run.log("final", method=cfg.final_score, **ledger.as_log())
    ledger.log_distances(run.log)
    return model, ledger, seconds + reload_s, in_order


def report(model, ledger, artifact_bytes, trained, eval_s, in_order, data, run, stored):
    """Print sizes and the compliance line, each verdict from a check made in this run; returns whether all hold.

    stored: what was scored is on disk.
    """
    cfg, code = model.cfg, code_bytes()
    total = len(code) + artifact_bytes
    coder = f"int{cfg.matrix_bits}+{cfg.compressor}"
    run.write(f"Serialized model {coder}: {artifact_bytes} bytes")
    run.write(f"Total submission size {coder}: {total} bytes")
    counted, by_text = decoded_bytes(data.sp, data.val, cfg.bos_id, 1_000_000, data.table.sidecar)
    checks = dict(
        causal=ledger.causal <= 1e-5, normalized=ledger.normalized <= 1e-5,  # Scorer.probe, of calls that counted
        score_first=in_order,  # no weight changed while text was scored
        coverage=ledger.first == 0 and ledger.tokens == len(data.val) - 1,
        bytes=abs(counted - by_text) <= (CASE_SLACK * by_text if data.table.sidecar is not None else 0))
    limits = dict(train=not (trained and 0 < cfg.max_wallclock_seconds < trained.train_s),
                  eval=eval_s <= cfg.eval_budget_seconds, size=total <= cfg.cap_bytes, file=stored)
    holds = all(run.gather(all(checks.values()) and all(limits.values())))
    verdict = "fail" if not holds else "holdout" if cfg.holdout_tokens else "ok"  # a holdout is for choosing settings
    spent = dict(train_s=f"{trained.train_s:.1f}" if trained else "-", eval_s=f"{eval_s:.1f}", total_bytes=total,
                 cap_bytes=cfg.cap_bytes)
    run.log("compliance", **spent, bytes_per_token=f"{ledger.bytes / ledger.tokens:.5f}", tokens_scored=ledger.tokens,
            **{name: "ok" if held else "fail" for name, held in checks.items()}, verdict=verdict)
    for name, held in limits.items():
        if not held:
            run.log("over_limit", limit=name, **spent)
    return holds


def print_plan(cfg, run):
    """PLAN=1: parameters, bytes, memory, steps and evaluation seconds as estimated, each on its line."""
    with torch.device("meta"):
        model = LM(cfg)
    params = sum(p.numel() for p in model.parameters())
    code, (artifact, _) = len(code_bytes()), estimate_artifact_bytes(model, cfg)
    # FLOP/s in training as README measured them, on one H100 with the default model and on 2 CPU cores with the sample.
    rate = (276e12 if run.device.type == "cuda" else 2.5e10 * torch.get_num_threads()) / (6 * params)
    run.log("plan", parameters=params, layers=len(parse_stack(cfg.stack)),
            matrices=sum(bool(route(n).bits) for n, _ in model.named_parameters()))
    run.log("plan_size", artifact_bytes=artifact, code_bytes=code, total_bytes=artifact + code, cap_bytes=cfg.cap_bytes)
    rows = micro_batch_rows(cfg, run)
    weights = params * 16  # weights, gradients, momentum and average, float32 each
    memory = weights + rows * cfg.train_seq_len * activation_bytes_per_token(cfg)
    run.log("plan_memory", micro_batch_tokens=rows * cfg.train_seq_len, peak_mem_mb=int(memory / 2**20))
    steps = cfg.iterations
    if cfg.max_wallclock_seconds:
        steps = min(steps, int(cfg.max_wallclock_seconds * rate * run.world_size / cfg.train_batch_tokens))
    run.log("plan_time", tok_s=int(rate * run.world_size), steps=steps, train_tokens=steps * cfg.train_batch_tokens,
            # A forward is a third of a training step, but scoring runs eager: together about the same, as measured.
            eval_s_per_million_targets=1e6 / rate / run.world_size, assumed_tok_s_per_device=int(rate))
    warn_of_size(model, cfg, run)


def warn_of_size(model, cfg, run):
    """Log a warning if the artifact is expected to exceed CAP_BYTES, or to fit only at few bits a weight."""
    artifact, bits = estimate_artifact_bytes(model, cfg)
    total = artifact + len(code_bytes())
    if total > cfg.cap_bytes or bits < FEWEST_BITS:
        run.log("warning", estimated_total_bytes=total, cap_bytes=cfg.cap_bytes, bits_per_weight=bits,
                reason="few_bits_are_left_for_each_weight:_lower_MODEL_DIM_or_MLP_MULT")


def continue_prompt(cfg, run):
    """PROMPT: print a continuation of the text by the model in ARTIFACT, one token at a time from carried state."""
    sp = open_tokenizer(cfg)
    model = load_on(run, cfg.artifact, cfg)
    if sp.vocab_size() != model.cfg.vocab_size:
        raise DataError(f"TOKENIZER_PATH={cfg.tokenizer_path}: {sp.vocab_size()} pieces, the artifact's model has "
                        f"{model.cfg.vocab_size}")
    rng = torch.Generator(run.device).manual_seed(cfg.seed)
    text = [model.cfg.bos_id][:model.cfg.bos_id >= 0] + sp.encode(cfg.prompt)
    if not text:
        raise SettingError(f"PROMPT={cfg.prompt!r}: encodes to no token, and the model has no BOS_ID to begin with")
    ids = torch.tensor([text], device=run.device)
    for token in map(int, generate(model, ids, cfg.prompt_tokens, cfg.prompt_temperature, rng)):
        if sp.is_control(token):
            break
        text.append(token)
    if run.rank == 0:
        print(sp.decode([i for i in text if not sp.is_control(i)]))


def name_run(cfg, run):
    """cfg with RUN_ID settled: the user's, that of the checkpoint in RESUME, or time, preset and seed."""
    path = Path(cfg.resume)
    if cfg.run_id:
        return cfg
    if cfg.resume:
        name = (path if path.is_dir() else path.parent).resolve().name.removesuffix(".ckpt")
        if not re.fullmatch(r"[\w.-]+", name):
            raise SettingError(f"RESUME={cfg.resume}: its folder does not tell the run's name; set RUN_ID")
        return replace(cfg, run_id=name)
    now = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"
    presets = "-".join(cfg.preset.replace(" ", "").split(","))
    return replace(cfg, run_id=run.broadcast(f"{now}_{presets}_seed{cfg.seed}"))


def verdict_of(path):
    """The verdict in a log that has reached its end, else ''."""
    with suppress(OSError):
        text = path.read_text("utf-8", "replace")
        found = [*re.finditer(r"^compliance .*verdict:(\w+)$", text, re.MULTILINE)]
        if found and "over_limit limit:file" not in text[found[-1].end():]:  # an artifact not on disk can be made again
            return found[-1][1]
    return ""


def begin_log(path, cfg):
    """The log of a new run, or of a resumed one made ready to go on, as an open file that no other process can begin
    too, and whether it had begun.  Raises SettingError.
    """
    if not (cfg.resume or cfg.eval_only or path.exists()):
        for file in (artifact_path(cfg), *path.with_name(f"{cfg.run_id}.ckpt").glob("*.npz")):
            if file.exists():
                raise SettingError(f"RUN_ID={cfg.run_id}: {file} of an earlier run exists; set another RUN_ID, or move "
                                   "that run away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        f = path.open("a+b" if cfg.resume else "x+b")
        try:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingError(f"RUN_ID={cfg.run_id}: another process is at this run; set another RUN_ID") from None
        except (ImportError, OSError):  # there are systems, and file systems, without locks
            pass
        f.seek(0)
        begun = f.read()
        if begun and not begun.endswith(b"\n"):  # a killed run may have left half a line
            f.write(b"\n")
            f.flush()
        return f, bool(begun)
    except FileExistsError:
        raise SettingError(f"RUN_ID={cfg.run_id}: {path} exists; set another RUN_ID, move that run away, or go on with "
                           "it by RESUME=auto") from None
    except OSError as error:
        raise SettingError(f"OUT_DIR={cfg.out_dir}: cannot be written ({error.strerror}); set OUT_DIR to a folder that "
                           "can") from None


def start_log(cfg, run):
    """Begin the run's log, or go on with it, with machine and settings; an earlier run's is never overwritten."""
    path = Path(cfg.out_dir) / f"{cfg.run_id}.txt"

    def begin():
        run.lock, begun = begin_log(path, cfg)
        return begun

    begun, code = run.from_rank_0(begin), code_bytes()
    run.log_path = path
    gpu = torch.cuda.get_device_name(run.device).replace(" ", "_") if run.device.type == "cuda" else "none"
    run.log("rerun" if begun else "run", preset=cfg.preset, seed=cfg.seed, world_size=run.world_size, gpu=gpu,
            torch=torch.__version__, code_bytes=len(code), code_sha256=hashlib.sha256(code).hexdigest(),
            max_wallclock_seconds=f"{cfg.max_wallclock_seconds:g}", date=f"{datetime.now(timezone.utc):%Y-%m-%d}")
    for f in fields(cfg):
        value, default = getattr(cfg, f.name), f.default
        if value == default:
            run.log("config", **{f.name: plain(value)})
        else:
            run.log("config_changed", **{f.name: plain(value)}, default=plain(default))


def main(env):
    """The whole run that the environment variables in `env` describe; returns the exit code."""
    cfg = Config.from_env(env)
    run = Run.from_env(env, cfg)
    try:
        if cfg.plan:
            return print_plan(settle_batch(cfg, run), run) or 0
        if cfg.prompt:
            return continue_prompt(cfg, run) or 0
        try:
            data = open_data(cfg)
        except DataError as error:  # every rank of a node meets it
            error.told = int(env.get("LOCAL_RANK", 0)) > 0
            raise
        cfg, trained = name_run(cfg, run), None
        ended = run.from_rank_0(lambda: verdict_of(Path(cfg.out_dir) / f"{cfg.run_id}.txt")) if cfg.resume else ""
        if ended:
            run.write(f"RUN_ID={cfg.run_id}: this run has ended, verdict:{ended}; for another one set another RUN_ID")
            return int(ended == "fail")
        if cfg.eval_only:
            blob = run.from_rank_0(lambda: load_checked(cfg.artifact))
            start_log(cfg, run)
        else:
            trained, blob = make_artifact(data, cfg, run)
        model, ledger, eval_s, in_order = evaluate_artifact(blob, data, cfg, run, resume=bool(cfg.resume))
        stored = cfg.eval_only or run.broadcast(is_stored(blob, cfg, run) if run.rank == 0 else None)
        return 0 if report(model, ledger, len(blob), trained, eval_s, in_order, data, run, stored) else 1
    finally:
        run.close()


def load_checked(path):
    """The bytes of an artifact file, or an ArtifactError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"ARTIFACT={path}: cannot be read ({error.strerror})") from None


def artifact_path(cfg):
    """Where the run writes its artifact."""
    return Path(cfg.out_dir) / f"{cfg.run_id}.artifact"


def is_stored(blob, cfg, run):
    """On rank 0: whether the run's artifact is on disk as it was scored; a disk that was full gets a second chance."""
    path = artifact_path(cfg)
    try:
        with suppress(OSError):
            if path.read_bytes() == blob:
                return True
        write_whole(path, lambda f: f.write(blob))
    except FileError as error:
        run.log("artifact_not_written", reason=str(error))
        return False
    return True


def make_artifact(data, cfg, run):
    """Train, calibrate and export, or what a resumed run still lacks of that; returns (Trained, artifact)."""
    checkpoints = Checkpoints(resolve_kernels(cfg, run), run, data)
    saved = checkpoints.load()
    cfg = checkpoints.cfg = settle_batch(checkpoints.cfg, run, int(saved[1]["config"]["train_batch_tokens"]) if saved
                                         else 0)
    start_log(cfg, run)
    path = artifact_path(cfg)
    if saved:
        facts = saved[1]
        exported = run.broadcast(checkpoints.exported(path) if facts["trained"] and run.rank == 0 else None)
        run.log("resume", checkpoint=cfg.resume, step=facts["step"], train_time=f"{1000 * facts['elapsed_s']:.0f}ms",
                trained=int(facts["trained"]), exported=int(bool(exported)))
        if exported:
            blob, train_s = exported
            return Trained(facts["step"], train_s, UNCALIBRATED), blob
    check_kernels(cfg, run)
    model = init_weights(LM(cfg), cfg.seed).to(run.device)
    run.log("model", parameters=sum(p.numel() for p in model.parameters()), val_tokens=len(data.val),
            train_tokens=sum(len(tokens) for _, tokens in data.train))
    warn_of_size(model, cfg, run)
    trained = train(model, data, cfg, run, checkpoints, saved)
    timed_evaluation("pre_quantization_post_ema", model, data, "roundtrip", run)
    began = time.perf_counter()
    run.peak_memory_mib(anew=True)
    try:
        save_artifact(path, model, cfg, trained.calibration, run)
        blob = run.from_rank_0(lambda: load_checked(path))
        checkpoints.mark_export(blob, trained.train_s)
    except FileError as error:
        blob = error.blob
        run.log("artifact_not_written", reason=str(error))
    run.log("artifact", model_bytes=len(blob), code_bytes=len(code_bytes()), cap_bytes=cfg.cap_bytes,
            export_time=f"{1000 * (time.perf_counter() - began):.0f}ms", peak_mem_mb=run.peak_memory_mib())
    return trained, blob


def entry():
    """Run `main` on the process's environment; a fault that the user can mend ends in one line, not a traceback."""
    STOP.listen()
    with suppress(AttributeError):  # of a stdout that is no text file
        sys.stdout.reconfigure(errors="backslashreplace")  # a console may know fewer characters than the log
    try:
        if sys.argv[1:] in (["--help"], ["-h"]):
            print(help_text(), flush=True)
            return 0
        if sys.argv[1:]:
            raise SettingError(f"{' '.join(sys.argv[1:])}: no argument but --help; settings are environment variables")
        return main(os.environ)
    except (GolfError, KeyboardInterrupt) as error:
        told = getattr(error, "told", False) or isinstance(error, (SettingError, KeyboardInterrupt))
        rank = os.environ.get("RANK", "0")
        if not told or not rank.isdecimal() or int(rank) == 0:  # what every rank knows, rank 0 says
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    except BrokenPipeError:  # whatever read our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except torch.cuda.OutOfMemoryError as error:
        print(f"error: out of GPU memory ({str(error).split('. ')[0]}); set MICRO_BATCH_TOKENS or EVAL_BATCH_TOKENS "
              "to less", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    code = entry()
    # All is written, so leave without shutting Python down: there a C++ thread of torch.distributed can end in
    # std::terminate, and a finished run of several ranks looks failed (8 of 112 on the CPU; left like this, 0 of 111).
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
