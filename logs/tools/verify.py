"""Verify a run independently: score, bytes, causality, code and clock, by other code than its own.

    python logs/tools/verify.py LOG --artifact FILE [--data FOLDER] [--tokenizer MODEL]
        [--text SOURCE...] [--script train_gpt.py] [--cpu] [--fast] [--sample N]

prints a table (claim, found, verdict) and exits with 1 if something differs.  Without --artifact it
checks only what log and script say.  --text: the files that the validation shards were made of;
bytes are then counted from them, else from the decoded tokens.  --fast: the script's kernels on a
GPU instead of plain PyTorch.  --sample N: score the first N targets only, for a CPU; of these only
test-time training can be compared with the log, at its `ttt` lines.

Of the script it uses load_artifact, LM.forward (LM.nll only to test it), Config, init_weights, and
the Adapter as a black box that is handed scored tokens only: none of its windows, Ledger, Scorer,
byte table or probes.  Reading order: verify(), then what it calls.
"""

import argparse
import ast
import hashlib
import importlib.util
import itertools
import json
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import report  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 64  # tokens of the delta-rule kernels' chunk
MARKS = "\ue001\ue002\ue003\ue004"  # of CaseOps; their sidecars may differ by
CASE_SLACK = 1e-3
LOGITS = 2**24  # most logits of one forward
LIMIT_S = report.TIME_LIMIT_S
LOADED = itertools.count()


class Table(list):
    """Rows (claim, found, verdict): ok, DIFFERS, or - where the log says nothing to compare."""

    def check(self, claim, found, holds):
        """A claim that holds, does not (False), or cannot be compared (None)."""
        self.append((claim, str(found), {True: "ok", None: "-"}.get(holds, "DIFFERS")))

    def close(self, claim, found, told, slack):
        """A number that must be the log's, None if it has none."""
        text = f"{found:.8f}, log {'has none' if told is None else f'{told:.8f}'}"
        self.check(claim, text, None if told is None else abs(found - told) <= slack)

    def text(self):
        """The rows as aligned columns."""
        rows = [("claim", "found", "verdict"), *self]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def differing(table):
    """The claims that do not hold."""
    return [claim for claim, _, verdict in table if verdict == "DIFFERS"]


# ---- what log and script say


def shipped_files(script):
    """The script, all that it imports from its folder, and the files there that it names."""
    folder = script.resolve().parent
    todo, found = {script.resolve()}, set()
    while todo:
        path = todo.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())) if path.suffix == ".py" else ():
            names = []
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None)
                names = [alias.name for alias in node.names]
                names += [module, *(f"{module}.{name}" for name in names)] if module else []
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value] if 0 < len(node.value) < 100 and "\0" not in node.value else []
            for name in names:
                place = name.replace(".", "/")
                near = [folder / name, folder / f"{place}.py", folder / place / "__init__.py"]
                todo |= {file.resolve() for file in near if file.is_file()} - found
    return sorted(found)


def audit(log, script, tokenizer):
    """The Table of claims that need no artifact: one run, one score, arithmetic, sizes, clock.

    tokenizer: path of the run's, which the challenge does not count as code; it need not exist.
    """
    table, final, told = Table(), log.final, log.compliance
    counts = [log.order.count(event) for event in ("run", "final", "compliance")]
    table.check("one run, one score", f"{counts} run, final, compliance lines", counts == [1] * 3)
    own = log.scores.get(final.method, final._replace(bpb=math.nan))
    table.check("the final score is its method's", f"{final.method} {final.bpb}",
                (own.bpb, own.val_loss) == (final.bpb, final.val_loss))
    bpb = final.val_loss * final.tokens / math.log(2) / final.num_bytes
    table.close("bpb = loss x tokens / ln 2 / bytes", bpb, final.bpb, 1e-7)
    model = Path(tokenizer).read_bytes() if Path(tokenizer).is_file() else None
    free = {file: file.read_bytes() == model for file in shipped_files(script)}
    code = sum(file.stat().st_size for file in free if not free[file])
    names = ", ".join(file.name + free[file] * " (not counted)" for file in free)
    table.check("code bytes of all that is shipped", f"{code:,}: {names}", code == log.code_bytes)
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    table.check("the script is the log's", digest[:16], digest == log.run.get("code_sha256"))
    total = code + log.model_bytes
    table.check("code + artifact <= 16,000,000", f"{total:,}, log {log.total_bytes:,}",
                total == log.total_bytes <= report.CAP_BYTES)
    steps = [(p.step, p.seconds) for _, p in sorted(log.train.items())]
    table.check("the training clock never goes back", f"{len(steps)} lines",
                all(a[1] <= b[1] for a, b in zip(steps, steps[1:])))
    train_s = report.number(told.get("train_s")) or 0.0
    hessians = log.last("hessians")
    loop_s = report.number(hessians.get("loop_end_s", train_s))
    stamps = [steps[-1][1] if steps else 0.0, loop_s,
              report.number(hessians.get("hessian_end_s", train_s)), train_s, LIMIT_S]
    table.check("last step, loop, Hessians, training, limit", f"{stamps} s",
                all(a <= b + 0.1 for a, b in zip(stamps, stamps[1:])))
    if "wall_s" in told:  # of a second clock in the run, from its first batch to its last
        wall_s = report.number(told["wall_s"])
        table.check("a clock that is never paused agrees", f"{wall_s} <= {train_s} s",
                    wall_s <= 1.03 * train_s + 1)
    points = [p for _, p in sorted(log.train.items()) if p.tok_s and p.step >= 3]
    spans = [(b.step - a.step, b.seconds - a.seconds, b.tok_s) for a, b in zip(points, points[1:])]
    if len(spans) >= 5:  # throughput is the median of each line's last steps: a clock of its own
        batch = median(seconds * tok_s / count for count, seconds, tok_s in spans)
        product = sum(count * batch / tok_s for count, _, tok_s in spans)
        spent = sum(seconds for _, seconds, _ in spans)
        slack = 0.25 if log.hardware == "CPU" else 0.03  # other work on a CPU delays single steps
        table.check("training = steps x step time", f"{product:.1f} s, log {spent:.1f} s",
                    spent >= (1 - slack) * product - 1)
    parts = (own.seconds or 0.0) + (report.number(log.last("reload").get("load_time")) or 0.0)
    eval_s = report.number(told.get("eval_s")) or 0.0
    table.check("load + score = evaluation <= 600 s", f"{parts:.1f}, log {eval_s} s",
                parts - 0.2 <= eval_s <= LIMIT_S)
    times = [seconds for (seconds,) in log.series("ttt", "time")]
    table.check("time stamps of TTT rise", f"{len(times)} lines", times == sorted(times))
    return table


# ---- text and bytes


def read_shards(folder, split="val"):
    """All tokens of a split, by the shards' own headers: np.uint16 (n,)."""
    parts = []
    for path in sorted(Path(folder).glob(f"fineweb_{split}_[0-9]*.bin")):
        raw = path.read_bytes()
        magic, version, count = np.frombuffer(raw[:12], "<i4")
        if (magic, version) != (20240520, 1) or len(raw) != 1024 + 2 * count:
            raise report.ReportError(f"{path}: header {magic} {version} {count}, {len(raw)} bytes")
        parts.append(np.frombuffer(raw, "<u2", offset=1024))
    if not parts:
        raise report.ReportError(f"{folder}: no fineweb_{split}_*.bin; --data names the folder")
    return np.concatenate(parts)


def text_bytes(sp, tokens, sources=()):
    """Bytes of targets 1 .. n - 1 as text, and a fault or ''.

    sources: files of the original text; if none, the tokens are decoded, run by run between control
    tokens.  A run's first space belongs to the tokenizer.
    """
    silent = np.ones(65536, bool)
    silent[: sp.vocab_size()] = [
        sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(sp.vocab_size())
    ]
    silent = silent[tokens]
    runs = np.split(tokens, np.flatnonzero(np.diff(silent)) + 1)
    begins = np.cumsum([0, *map(len, runs)])
    texts = [sp.decode(run.tolist()) for run, at in zip(runs, begins) if not silent[at]]
    texts = [text.removeprefix(" ") for text in texts]
    first = 0 if silent[0] else len(sp.decode(tokens[:1].tolist()).lstrip(" ").encode())
    fault = ""
    if sources:
        sys.path.insert(0, str(ROOT / "data"))
        import prepare  # for the kinds of files only

        documents = [
            part
            for text in prepare.read_documents(sources, "text")
            for part in prepare.cut(text, prepare.MAX_DOCUMENT_CHARS)
        ]
        plain = [sp.normalize(text).replace("\u2581", " ").removeprefix(" ") for text in documents]
        if plain != texts and not has_marks(sp):
            fault = f"the shards are not the tokens of {sources[0]}"
        texts = plain
    elif has_marks(sp):
        texts = [text.translate(dict.fromkeys(map(ord, MARKS))) for text in texts]
    return sum(len(text.encode()) for text in texts) - first, fault


def has_marks(sp):
    """Whether the tokenizer has the marks of CaseOps."""
    return sp.piece_to_id(MARKS[0]) != sp.unk_id()


def check_text(log, tokens, args, table):
    """Shards whole and those of the log, each target counted once; returns the text's bytes."""
    final, said = log.final, log.last("model")
    size = report.integer(said.get("val_tokens", final.tokens + 1))
    table.check(
        "validation shards are whole", f"{len(tokens):,}, log {size:,} tokens", len(tokens) == size
    )
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    table.check("validation tokens are the log's", digest[:16],
                {None: None, digest: True}.get(log.last("reload").get("val_sha256"), False))
    counts = {final.tokens, report.integer(log.compliance.get("tokens_scored"))}
    table.check("every target is counted once", f"{len(tokens) - 1:,}, log {counts}",
                counts == {len(tokens) - 1})
    if "train_tokens" in said and list(Path(args.data).glob("fineweb_train_*.bin")):
        count = sum(
            (path.stat().st_size - 1024) // 2
            for path in Path(args.data).glob("fineweb_train_[0-9]*.bin")
        )
        table.check("training tokens are the training shards'",
                    f"{count:,}, log {said['train_tokens']}",
                    count == report.integer(said["train_tokens"]))
    manifest = Path(args.data) / "manifest.json"
    wanted = json.loads(manifest.read_bytes()) if manifest.is_file() else {}
    digest = hashlib.sha256(Path(args.tokenizer).read_bytes()).hexdigest()
    table.check("the tokenizer is the manifest's", digest[:16] if wanted else "no manifest.json",
                digest == wanted.get("tokenizer", {}).get("sha256") if wanted else None)
    found, fault = text_bytes(args.sp, tokens, args.text)
    slack = CASE_SLACK * found if has_marks(args.sp) else 0
    source = "source text" if args.text else "decoded tokens"
    table.check(f"bytes of the {source}", fault or f"{found:,}, log {final.num_bytes:,}",
                not fault and abs(found - final.num_bytes) <= slack)
    return found


# ---- scores


def forward_nats(model, ids, targets, state, hint=None):
    """Float64 nats of targets (B, T), from the logits that LM.forward gave without them."""
    logits, state = model.forward(ids, state)
    logits = logits.double()
    if hint is not None:  # TTT_TILT: (hinted token or -1, bonus of its logit)
        raised = hint[1] * (hint[0] >= 0).double().unsqueeze(-1)
        logits = logits.scatter_add(-1, hint[0].clamp_min(0).unsqueeze(-1), raised)
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1), state


def stream_nats(model, text, rows, segment, state=None, bonus=None):
    """Nats of rows [(start, end, score_from)], side by side with carried state, in their order.

    text: (n,) int64.   segment: most tokens of one forward of a row.   Returns float64 (scored,)
    and the state behind the rows.
    """
    at_once = max(1, LOGITS // model.cfg.vocab_size // segment)
    out = []
    for i in range(0, len(rows), at_once):
        some = rows[i : i + at_once]
        begin = torch.tensor([start for start, _, _ in some], device=text.device).unsqueeze(1)
        length = max(end - start for start, end, _ in some)
        now, nats = state, []
        for done in range(0, length, segment):
            step = torch.arange(done, min(done + segment, length), device=text.device)
            place = (begin + step).clamp_max(len(text) - 2)
            ids = text[place]
            part, now = forward_nats(model, ids, text[place + 1], now, bonus and bonus(ids))
            nats.append(part)
        nats = torch.cat(nats, 1)
        out += [row[first - start : end - start] for row, (start, end, first) in zip(nats, some)]
    return torch.cat(out), now


def windows(total, width, stride):
    """[(start, end, score_from)]: the first window scores all, a later one what is new in it."""
    rows = [(0, min(width, total), 0)]
    while rows[-1][1] < total:
        start = len(rows) * stride
        rows.append((start, min(start + width, total), rows[-1][1]))
    return rows


def exact_spans(total, count, warmup):
    """[(start, end, score_from)] of `count` equal parts, each read from `warmup` tokens before."""
    edges = [total * i // min(count, total) for i in range(min(count, total) + 1)]
    return [(max(0, a - warmup), b, a) for a, b in zip(edges, edges[1:])]


def ttt_nats(t, model, tokens, text, limit, segment):
    """Nats of test-time training up to target `limit`: score a chunk, record it, adapt."""
    cfg, total = model.cfg, len(text) - 1
    with t.compiling(t.compiles(model, 3 * cfg.ttt_epochs * total)):  # of its training
        adapter = t.Adapter(model, total, t.Run(device=text.device))
    by_windows = windows(limit, cfg.train_seq_len, cfg.eval_stride)
    record, recorded, state = [], 0, None
    with torch.inference_mode():
        while recorded < limit:
            end = min((recorded // cfg.ttt_chunk_tokens + 1) * cfg.ttt_chunk_tokens, limit)
            rows = [(recorded, end, recorded)]
            if cfg.ttt_scoring == "sliding":  # a window belongs to the chunk of its first target
                rows = [row for row in by_windows if recorded <= row[2] < end]
            nats, after = stream_nats(model, text, rows, segment, state, adapter.bonus)
            state = after if cfg.ttt_scoring == "exact" else None
            record.append(nats)
            recorded = rows[-1][1]
            if recorded < limit:
                with torch.inference_mode(False), torch.enable_grad():
                    adapter(tokens[: recorded + 1].copy())
    adapter.close()
    return torch.cat(record)


def check_scores(log, t, model, tokens, num_bytes, args, table):
    """The scores again: by windows, by carried state, by test-time training."""
    cfg, width = model.cfg, model.cfg.train_seq_len
    text = torch.from_numpy(tokens.astype(np.int64)).to(args.device)
    total = len(text) - 1
    limit = min(args.sample or total, total)
    both_cpu = log.hardware == "CPU" and args.device == "cpu"
    slack = args.tolerance or (1e-7 if both_cpu else 1e-4)
    # Where carried state is cut must not matter: not at the kernels' chunks, if that costs nothing.
    segment = width if model.ops.dtype else min(width, 1000)
    count = max(1, cfg.eval_spans * limit // total)
    ways = dict(roundtrip=(windows(limit, width, width), width),
                exact=(exact_spans(limit, count, cfg.eval_warmup_tokens), segment))
    if "sliding" in log.scores and limit == total:  # of a part there is nothing to compare with
        ways["sliding"] = (windows(limit, width, cfg.eval_stride), width)
    for method in [*ways, *(["ttt"] if "ttt" in log.scores else [])]:
        began = time.perf_counter()
        with torch.inference_mode(method != "ttt"):
            if method == "ttt":
                # one row alone: long segments, again no multiple of a chunk
                most = LOGITS // cfg.vocab_size - (model.ops.dtype is None)
                nats = ttt_nats(t, model, tokens, text, limit, most)
            else:
                nats, _ = stream_nats(model, text[: limit + 1], *ways[method])
        claim = f"{method}: val_loss of {len(nats):,} targets, {time.perf_counter() - began:.0f} s"
        told = log.scores.get(method) if len(nats) == total else None
        table.close(claim, float(nats.mean()), told and told.val_loss, slack)
        if told:
            bpb = float(nats.sum()) / math.log(2) / num_bytes
            table.close(f"{method}: val_bpb", bpb, told.bpb, slack)
    lines = [(int(n), bpb) for n, bpb in log.series("ttt", "scored_tokens", "running_bpb")]
    lines = [line for line in lines if line[0] <= limit < total]
    if "ttt" in log.scores and lines:
        n, bpb = lines[-1]
        so_far, _ = text_bytes(args.sp, tokens[: n + 1])
        table.close(f"ttt: running_bpb of {n:,} targets",
                    float(nats[:n].sum()) / math.log(2) / so_far, bpb,
                    5e-5 + max(slack, 4 * bpb / so_far))


# ---- the model


def check_causality(model, places, device, table):
    """Single later tokens changed: no logits before them, and none of another row, may change."""
    cfg, B = model.cfg, 4
    rng = np.random.default_rng(0)
    T = max(cfg.train_seq_len, 2 * cfg.swa_window) + CHUNK + 5  # a multiple of nothing
    edges = [1, T - 1, *range(CHUNK, T, CHUNK), *range(cfg.swa_window, T, cfg.swa_window)]
    known = {}  # by carried tokens: ids, state, logits
    leak, seen, tried = 0.0, 0, 0
    for number in range(-(-places // B)):
        carried = (0, 1, 37, CHUNK, 100)[number % 5]
        if carried not in known:
            ids = torch.from_numpy(rng.integers(2, cfg.vocab_size, (B, carried + T))).to(device)
            ids[:, 50::331] = max(cfg.bos_id, 0)  # documents begin within the rows
            state = model.forward(ids[:, :carried])[1] if carried else None
            known[carried] = ids[:, carried:], state, model.forward(ids[:, carried:], state)[0]
        ids, state, plain = known[carried]
        at = rng.choice(edges, B)
        if number % 2:  # every residue of the chunk, in turn
            residue = (number // 2 * B + np.arange(B)) % CHUNK
            at = (CHUNK * rng.integers(0, T // CHUNK, B) + residue).clip(1, T - 1)
        at = torch.from_numpy(at).to(device)
        rows = torch.arange(B, device=device)
        if number % 6 == 4:  # one row alone: its neighbours may not notice
            rows = rows[number % B :][:1]
        changed = ids.clone()
        moved = torch.from_numpy(rng.integers(1, cfg.vocab_size, len(rows))).to(device)
        changed[rows, at[rows]] = (changed[rows, at[rows]] + moved) % cfg.vocab_size
        gap = (model.forward(changed, state)[0] - plain).abs().amax(-1).nan_to_num(nan=math.inf)
        may = torch.zeros_like(gap, dtype=torch.bool)
        may[rows] = torch.arange(T, device=device) >= at[rows].unsqueeze(1)
        leak = max(leak, float(gap.masked_fill(may, 0.0).max()))
        seen += int((gap[rows, at[rows]] > 0).sum())
        tried += len(rows)
    table.check(
        "later tokens change no earlier logit", f"{leak:.1e} at {tried} places", leak <= 1e-5
    )
    table.check("(and each change is seen behind it)", f"{seen} of {tried}", seen > 0.9 * tried)


def check_carried_state(model, device, table):
    """A text in pieces of odd lengths against one pass."""
    cfg = model.cfg
    T = 2 * max(cfg.train_seq_len, cfg.swa_window) + 277
    ids = torch.randint(2, cfg.vocab_size, (2, T + 1), device=device)
    whole, _ = forward_nats(model, ids[:, :-1], ids[:, 1:], None)
    state, parts = None, []
    for piece in ids[:, :-1].split([1, 63, 64, 65, 3, 77, T - 273], 1):
        at = sum(part.shape[1] for part in parts) + 1
        nats, state = forward_nats(model, piece, ids[:, at : at + piece.shape[1]], state)
        parts.append(nats)
    gap = float((torch.cat(parts, 1) - whole).abs().mean())
    table.check("carried state = one pass", f"{gap:.1e} nats on average",
                gap <= (0.1 if model.ops.dtype else 1e-4))


def check_normalization(model, positions, device, table):
    """Sum of the probabilities of the whole vocabulary, by the call that scores, LM.nll."""
    vocab = torch.arange(model.cfg.vocab_size, device=device)
    T, worst, tried = 39, 0.0, 0
    while tried < positions:
        row = torch.randint(2, len(vocab), (1, T), device=device)
        sums = torch.zeros(T, dtype=torch.float64, device=device)
        for some in vocab.split(max(1, LOGITS // len(vocab) // T)):
            ids, targets = row.expand(len(some), T), some.unsqueeze(1).expand(-1, T)
            nats, _ = model.nll(ids.contiguous(), targets.contiguous())
            sums += nats.double().neg().exp().sum(0)
        worst = max(worst, float((sums - 1).abs().nan_to_num(nan=math.inf).max()))
        tried += T
    table.check("probabilities sum to 1", f"1 +- {worst:.1e} at {tried} positions",
                worst <= (2e-2 if model.ops.dtype else 1e-4))


def check_start(log, t, cfg, table):
    """The weights at the start of the clock are those of the seed."""
    told = log.last("kernel").get("initial_weights")
    model = t.init_weights(t.LM(cfg), log.seed)
    found = sum(int(p.detach().view(torch.int32).sum()) for p in model.parameters())
    table.check("the clock began at the seed's weights", found, told and str(found) == told)


# ---- the whole


def load_script(path):
    """The module of a train_gpt.py; its operators get a namespace of their own.

    A second registration would destroy those of a train_gpt that this process has loaded already.
    """
    name = f"verified_script_{next(LOADED)}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for dataclasses
    code = Path(path).read_text(encoding="utf-8").replace("gdn_swa::", f"{name}::")
    exec(compile(code, str(path), "exec"), module.__dict__)
    return module


def log_config(log, t):
    """The Config of the log's settings, without its paths, its clock and compiling."""
    dropped = {"preset", "data_path", "tokenizer_path", "resume", "artifact", "out_dir", "all"}
    env = {k.upper(): v for k, v in log.config.items() if k not in dropped and v != "-"}
    cfg = t.Config.from_env(env | dict(DEVICE="cpu", MAX_WALLCLOCK_SECONDS="0", COMPILE="0"))
    return replace(cfg, deterministic=True)  # so that no clock changes the epochs of TTT


def verify(log, args):
    """The Table of all claims that can be tested with what `args` names."""
    script = Path(args.script)
    if not log.finished:
        raise report.ReportError(f"{log.path}: no final, size or compliance line")
    table = audit(log, script, args.tokenizer)
    if not args.artifact:
        table.check("score, bytes, causality", "not tested without --artifact", None)
        return table
    t = load_script(script)
    args.sp = sentencepiece.SentencePieceProcessor(model_file=str(args.tokenizer))
    size = Path(args.artifact).stat().st_size
    table.check("artifact on disk", f"{size:,}, log {log.model_bytes:,}", size == log.model_bytes)
    tokens = read_shards(args.data)
    num_bytes = check_text(log, tokens, args, table)
    cfg = replace(log_config(log, t), tokenizer_path=str(args.tokenizer))
    if args.device == "cpu":  # a GPU's batch of test-time training would take 24 GB: one row a pass
        cfg = replace(cfg, eval_batch_tokens=4 * cfg.train_seq_len)
    run = t.Run(device=args.device)
    ops = partial(t.fast_ops, run=run) if args.fast else lambda cfg: t.REFERENCE
    model = t.load_artifact(args.artifact, ops, args.device, cfg).requires_grad_(False)
    check_start(log, t, cfg, table)
    places = args.places or (32 if args.sample and args.device == "cpu" else 320)
    with torch.inference_mode():
        torch.manual_seed(0)
        check_causality(model, places, args.device, table)
        check_carried_state(model, args.device, table)
        check_normalization(model, places // (4 if args.device == "cpu" else 1), args.device, table)
    if "epochs" in log.last("warning"):
        table.check("ttt epochs", "cut by the run's clock: cannot be repeated", None)
    check_scores(log, t, model, tokens, num_bytes, args, table)
    return table


def parse(argv):
    """(RunLog, options) of a command line; paths that are not given are those of the log."""
    p = argparse.ArgumentParser(prog="verify.py", description="Verifies a run independently.")
    p.add_argument("log", help="log of train_gpt.py")
    p.add_argument("--artifact", help="its artifact; without it only log and script are checked")
    p.add_argument("--script", default=str(ROOT / "train_gpt.py"))
    p.add_argument("--data", help="folder of the validation shards (default: the log's)")
    p.add_argument("--tokenizer", help="SentencePiece model (default: the log's)")
    p.add_argument("--text", nargs="*", default=[], help="files of the original validation text")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--cpu", dest="device", action="store_const", const="cpu")
    p.add_argument("--fast", action="store_true", help="the script's kernels, on a GPU")
    p.add_argument("--sample", type=int, default=0, help="score the first N targets only")
    p.add_argument("--places", type=int, default=0, help="of the causality test (320)")
    p.add_argument("--tolerance", type=float, help="of a score (1e-7 on a CPU, 1e-4 for bfloat16)")
    args = p.parse_args(argv)
    log = report.parse_log(args.log)
    args.data = args.data or log.config.get("data_path", "data/datasets/fineweb10B_sp1024")
    args.tokenizer = args.tokenizer or log.config.get(
        "tokenizer_path", "data/tokenizers/fineweb_1024_bpe.model"
    )
    return log, args


def main(argv=None):
    """The command line; returns the exit code: 0, 1 if something differs, 2 for bad input."""
    report.plain_output()
    began = time.perf_counter()
    try:
        log, args = parse(argv)
        table = verify(log, args)
    except (report.ReportError, ValueError, OSError) as error:
        print(f"verify.py: {error}", file=sys.stderr)
        return 2
    faults = differing(table)
    part = f"the first {args.sample:,} targets" if args.sample else "all targets"
    print(table.text())
    print(
        f"{args.log}: {f'{len(faults)} claim(s) DIFFER' if faults else 'holds'} ({part}, "
        f"{args.device}, {time.perf_counter() - began:.0f} s)"
    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
