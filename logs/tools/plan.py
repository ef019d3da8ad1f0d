"""What a run would need, without running it: parameters, bytes, memory, steps, seconds, dollars.

    GPUS=8 GPU=H100 PRICE=3 DATA_PATH=... MODEL_DIM=640 python logs/tools/plan.py
    GPUS=4 GPU=A100 SPEED=0.4 MEMORY_GB=40 python logs/tools/plan.py

takes the environment variables of train_gpt.py, and GPUS (1), GPU (H100, H200, or CPU for two
cores) and PRICE [dollars per GPU and hour]. Any other GPU needs SPEED, its speed over an H100's,
and MEMORY_GB. It runs anywhere and needs no GPU. Times follow from the measured table that it
prints, in proportion to the number of parameters and GPUS; that misleads for models much smaller
than the measured.
"""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt as t  # noqa: E402


class Machine(NamedTuple):
    """Speeds of one GPU, or of two CPU cores, for a model of `params` parameters."""

    memory_gb: float
    params: int
    train_tok_s: float
    score_tok_s: float  # one forward, as exact scoring runs it
    ttt_tok_s: float  # one epoch of test-time training
    ttt_step_s: float  # and of its every step, however few tokens it has
    start_s: float  # compiling and warm-up before the clock
    export_s: float
    model: str


MEASURED = {  # from logs/record, logs/ladder and logs/evaluation
    "H100": Machine(80, 39_712_608, 1.13e6, 1.4e6, 1.37e6, 0.019, 50, 13, "VOCAB_SIZE=1024"),
    "H200": Machine(141, 43_382_624, 1.24e6, 1.24e6, 5.0e5, 0.019, 48, 12, "default; TTT: eager"),
    "CPU": Machine(8, 964_865, 7.4e3, 1.6e4, 1.0e4, 0.0, 2, 0.4, "PRESET=sample")}
OWN = ("GPUS", "GPU", "PRICE", "SPEED", "MEMORY_GB")  # the variables that are not the script's
# of the challenge's split, by VOCAB_SIZE; of 4,096 by its 3.3197 bytes a token
VAL_TOKENS = {1024: 62_021_846, 4096: 45_510_000, 8192: 40_540_161}
FEWEST_BITS = 2.5  # a weight; 2.6 is the least that was run at full size


def expected_artifact(model):
    """Expected bytes of the artifact, and the bits that CAP_BYTES leaves for each searched weight.

    A quantized row costs the entropy of a Gaussian: at its own clip, or at what the search ends
    with, which is the cap or the finest step. The rest costs its raw size.
    """
    cfg = model.cfg
    fixed = 4096.0  # head and compressed header
    finest, searched = 0.0, 0  # bytes at the finest step, and number, of the searched weights
    bits = t.stored_bits(model, cfg)
    for name, p in model.named_parameters():
        if name not in bits:
            fixed += p.numel() * (1 if cfg.control_bits else 2)
            continue
        clip = getattr(cfg, t.route(name).clip) if cfg.grid == "sdclip" else 0.0
        step = 3 / t.MOST_STEPS
        if cfg.grid == "sdclip":
            step = (clip or 31 * t.FINEST_STEP) / (2 ** (bits[name] - 1) - 1)
        size = p.numel() / 8 * max(0.1, math.log2(math.sqrt(2 * math.pi * math.e) / step))
        fixed += 2 * len(p)  # scales of the rows
        if clip:
            fixed += size
        else:
            finest += size
            searched += p.numel()
    room = cfg.cap_bytes - len(t.code_bytes()) - t.FILL_SLACK / 2 - fixed
    return int(fixed + min(finest, max(0.0, room))), 8 * room / searched if searched else math.inf


def validation_tokens(cfg):
    """Tokens that would be scored: by the settings, by DATA_PATH, else of the challenge's split."""
    try:
        return cfg.holdout_tokens or sum(map(len, t.open_shards(cfg.data_path, "val")))
    except t.GolfError:
        return VAL_TOKENS.get(cfg.vocab_size, VAL_TOKENS[1024])


def evaluation_seconds(cfg, machine, slower, tokens, gpus):
    """Seconds of scoring and of test-time training, for a model `slower` than the measured one."""
    method = cfg.ttt_scoring if cfg.final_score == "ttt" else cfg.final_score
    forwards = tokens
    if method == "sliding":
        forwards *= cfg.train_seq_len / cfg.eval_stride
    elif cfg.final_score == "exact":
        forwards += cfg.eval_spans * cfg.eval_warmup_tokens
    if cfg.final_score == "ttt" and method == "exact":
        forwards *= gpus  # each scores the whole stream
    scoring = slower * forwards / machine.score_tok_s / gpus
    if cfg.final_score != "ttt":
        return scoring, 0.0
    steps = cfg.ttt_epochs * math.ceil(tokens / cfg.ttt_chunk_tokens)
    step_s = machine.ttt_step_s + slower * cfg.ttt_chunk_tokens / machine.ttt_tok_s / gpus
    return scoring, steps * step_s


def diagnostic_seconds(cfg, machine, slower, tokens, gpus):
    """Seconds of the scores that do not count: before the export, and by the other methods."""
    others = [method for method in t.FINAL_EVENTS if method != cfg.final_score]
    methods = ["roundtrip", *(others if cfg.eval_diagnostics else [])]
    return sum(sum(evaluation_seconds(replace(cfg, final_score=method), machine, slower, tokens,
                                      gpus)) for method in methods)


def variable(env, name, default, kind=float):
    """The positive number in a variable of this tool."""
    text = env.get(name, default)
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        what = "a whole number" if kind is int else "a number"
        raise t.GolfError(f"{name}={text}: must be {what} above 0")
    return value


def machine_of(env):
    """(name, Machine) of GPU: a measured one, or any other by SPEED and MEMORY_GB."""
    name = env.get("GPU", "H100").upper()
    if "SPEED" not in env and name not in MEASURED:
        raise t.GolfError(f"GPU={name}: measured are {', '.join(MEASURED)}; for another one add "
                          "SPEED, its speed over an H100's, and MEMORY_GB")
    machine = MEASURED.get(name, MEASURED["H100"])
    if "SPEED" in env:
        speed = variable(env, "SPEED", "1")
        machine = MEASURED["H100"]
        machine = machine._replace(
            train_tok_s=speed * machine.train_tok_s, score_tok_s=speed * machine.score_tok_s,
            ttt_tok_s=speed * machine.ttt_tok_s, ttt_step_s=machine.ttt_step_s / speed,
            export_s=machine.export_s / speed, model="the H100's times SPEED")
    return name, machine._replace(
        memory_gb=variable(env, "MEMORY_GB", str(machine.memory_gb)))


def activation_bytes(cfg, mlp_copies):
    """Memory that one token's forward keeps for the backward pass [bytes], in bfloat16.

    mlp_copies: of the MLP's width; the fused kernel keeps the squared relu only.
    """
    D = cfg.model_dim
    values = 0.0
    for layer in t.parse_stack(cfg.stack):
        # q, k, v, the gate before and q, k, v, o after the convolution, A; or q, k, v, o and norms
        values += 9 * cfg.gdn_heads * cfg.gdn_head_dim if layer.kind == "gdn" else 6 * D
        values += 4 * D + mlp_copies * cfg.mlp_mult * D  # the residual twice, each normalized; MLP
    return 2 * values + 12 * cfg.vocab_size  # logits and their gradient


def plan(env):
    """The lines of the plan for the environment variables in `env`."""
    cfg = t.Config.from_env({k: v for k, v in env.items() if k not in OWN})
    kind, machine = machine_of(env)
    gpus = variable(env, "GPUS", "1", int)
    run = t.Run(world_size=gpus)
    cfg = t.settle_batch(cfg, run)
    ops = t.REFERENCE if kind == "CPU" else t.REFERENCE._replace(mlp=None)  # a fused one
    token_bytes = activation_bytes(cfg, 2 if kind == "CPU" else 1)
    micro_tokens = t.micro_batch_rows(cfg, run, ops) * cfg.train_seq_len
    with torch.device("meta"):
        model = t.LM(cfg)
    params = sum(p.numel() for p in model.parameters())
    torch_gb = 1.0 if kind == "CPU" else 0.0  # the libraries themselves
    memory = (16 * params + micro_tokens * token_bytes) / 1e9 + torch_gb
    artifact, bits = expected_artifact(model)
    total = artifact + len(t.code_bytes())
    slower = params / machine.params
    tok_s = gpus * machine.train_tok_s / slower
    reserve_s = cfg.gptq_reserve_seconds if cfg.gptq_enabled else 0.0
    steps = cfg.iterations
    if loop_s := max(0.0, cfg.max_wallclock_seconds - reserve_s):
        steps = min(steps, int(loop_s * tok_s / cfg.train_batch_tokens))
    train_tokens = steps * cfg.train_batch_tokens
    tokens = validation_tokens(cfg)
    scoring_s, ttt_s = evaluation_seconds(cfg, machine, slower, tokens, gpus)
    phases = {"start-up": machine.start_s, "training": train_tokens / tok_s,
              "calibration": reserve_s, "export": slower * machine.export_s,
              "scoring": scoring_s, "test-time training": ttt_s,
              "scores that do not count": diagnostic_seconds(cfg, machine, slower, tokens, gpus)}
    total_s = sum(phases.values())
    hours = gpus * total_s / 3600
    cost = f"{hours:.2f} hours of {kind}"
    if "PRICE" in env:
        price = variable(env, "PRICE", "")
        cost += f", {hours * price:.2f} dollars at PRICE={price:g}"
    lines = [
        f"machine    {gpus} x {kind}, {machine.model}",
        f"model      {params:,} parameters, {len(t.parse_stack(cfg.stack))} layers, "
        f"{len(t.stored_bits(model, cfg))} matrices",
        f"bytes      {artifact:,} artifact, {total:,} with the script",
        f"bits       {bits:.2f} a weight at CAP_BYTES={cfg.cap_bytes:,}",
        f"memory     {memory:.1f} of {machine.memory_gb:g} GB; {micro_tokens:,} tokens a pass",
        f"steps      {steps:,} of {cfg.train_batch_tokens:,} tokens, together {train_tokens:,}",
        f"speed      {tok_s:,.0f} tokens/s",
        f"targets    {tokens - 1:,}",
        *(f"seconds    {seconds:,.1f} {phase}" for phase, seconds in phases.items()),
        f"seconds    {total_s:,.1f} together; {cost}"]
    if memory > machine.memory_gb:
        lines.append("warning    more memory than there is: lower MICRO_BATCH_TOKENS or MODEL_DIM")
    if total > cfg.cap_bytes or bits < FEWEST_BITS:
        lines.append("warning    few bits are left for each weight: lower MODEL_DIM or MLP_MULT")
    if scoring_s + ttt_s > cfg.eval_budget_seconds:
        lines.append(f"warning    evaluation over EVAL_BUDGET_SECONDS={cfg.eval_budget_seconds:g}")
    return lines


def main(env):
    """Print the plan and the table that it follows from; returns the exit code."""
    try:
        print("\n".join(plan(env)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\nMeasured on one GPU, or two CPU cores; train, score and TTT in tokens/s:\n"
          "kind      train     score       TTT  s/TTT step  start-up s  export s  parameters")
    for name, m in MEASURED.items():
        speeds = f"{m.train_tok_s:9,.0f} {m.score_tok_s:9,.0f} {m.ttt_tok_s:9,.0f}"
        times = f"{m.ttt_step_s:11.3f} {m.start_s:11g} {m.export_s:9g}"
        print(f"{name:<5} {speeds} {times} {m.params:11,} ({m.model})")
    print("Several GPUs count as so many times one: 2 x H200 measured 2.50 M tokens/s in training\n"
          "(logs/speed/h200x2_120s.txt); more than two were never measured.")
    return 0


if __name__ == "__main__":
    sys.exit(main(os.environ))
