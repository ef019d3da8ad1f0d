"""Verify a run independently: its score, bytes, causality, code and clock, by other code than its own.

    python logs/tools/verify.py LOG --artifact FILE [--data FOLDER] [--tokenizer MODEL]
        [--text SOURCE...] [--script train_gpt.py] [--device cpu] [--fast] [--sample N]

It prints a table (claim, found, verdict) and exits with 1 if something differs. Without --artifact
it checks only what the log and the script say. --text: the files that the validation shards were
made of; bytes are then counted from them, else from the decoded tokens. --sample N: score only the
first N targets, for a CPU; such a part is compared with the log's `ttt` lines. --fast: the kernels
of the script instead of plain PyTorch, on a GPU.

Of the script it uses load_artifact, LM.forward (LM.nll only to be tested), Config, and for
test-time training the Adapter as a black box, which is handed scored tokens only. It does not use
its windows, Ledger, Scorer, byte table or probes. Reading order: verify(), then what it calls.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import report  # noqa: E402

CHUNK = 64  # of the delta-rule kernels
HEADER = 1024  # bytes of a shard before its tokens
MARKS = "\ue001\ue002\ue003\ue004"  # of CaseOps
CASE_SLACK = 1e-3
LOGITS = 2**24  # most logits of one forward


class Table(list):
    """Rows (claim, found, verdict) so far; the verdict is ok, DIFFERS, or - for a remark."""

    def check(self, claim, found, holds):
        """A claim that holds or not."""
        self.append((claim, str(found), "ok" if holds else "DIFFERS"))

    def close(self, claim, found, told, slack):
        """A number that must be the log's."""
        said = told is not None and not math.isnan(told)
        text = f"{found:.8f}, log {told:.8f}" if said else f"{found:.8f}, the log has none"
        self.append((claim, text, "-")) if not said else self.check(
            claim, text, abs(found - told) <= slack)

    def remark(self, claim, found):
        """Something that cannot be held against the log."""
        self.append((claim, str(found), "-"))

    @property
    def holds(self):
        """Whether nothing differs."""
        return all(verdict != "DIFFERS" for _, _, verdict in self)

    def text(self):
        """The rows as aligned columns."""
        rows = [("claim", "found", "verdict"), *self]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


# ---- what the log and the script say


def shipped_files(script):
    """The script, all that it imports from its folder, and the files there that it names."""
    folder = script.resolve().parent
    todo, found = [script.resolve()], set()
    while todo:
        path = todo.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())) if path.suffix == ".py" else ():
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            module = getattr(node, "module", None)
            names += [module, *(f"{module}.{name}" for name in names)] if module else []
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value] if 0 < len(node.value) < 100 and "\0" not in node.value else []
            for name in names:
                place = name.replace(".", "/")
                near = [folder / name, folder / f"{place}.py", folder / place / "__init__.py"]
                todo += {file.resolve() for file in near if file.is_file()} - found
    return sorted(found)


def audit(log, script, table):
    """Claims that need no artifact: one run, one score, its arithmetic, sizes, code, clock."""
    final, told = log.final, log.compliance
    counts = [log.order.count(event) for event in ("run", "final", "compliance")]
    table.check("one run, one score", f"run, final, compliance lines: {counts}",
                counts == [1, 1, 1])
    own = log.scores.get(final.method)
    table.check("the final score is its method's", f"{final.method} {final.bpb}",
                own and (own.bpb, own.val_loss) == (final.bpb, final.val_loss))
    bpb = final.val_loss * final.tokens / math.log(2) / final.num_bytes
    table.close("bpb = nats / ln 2 / bytes", bpb, final.bpb, 1e-7)
    files = shipped_files(script)
    code = sum(file.stat().st_size for file in files)
    table.check("code bytes of all that is shipped", f"{code:,} in {len(files)} file(s): "
                + ", ".join(file.name for file in files), code == log.code_bytes)
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    table.check("the script is the log's", digest[:16], digest == log.run.get("code_sha256"))
    total = code + (log.model_bytes or 0)
    table.check("total = code + artifact <= 16,000,000", f"{total:,}, log {log.total_bytes:,}",
                total == log.total_bytes <= report.CAP_BYTES)
    audit_clock(log, told, table)


def audit_clock(log, told, table):
    """Time stamps against each other: training, Hessians, evaluation."""
    steps = [(p.step, p.seconds) for _, p in sorted(log.train.items())]
    rising = all(a[1] <= b[1] for a, b in zip(steps, steps[1:]))
    table.check("the training clock never goes back", f"{len(steps)} lines", rising)
    train_s = report.number(told.get("train_s")) or 0.0
    hessians = log.last("hessians")
    loop_s = report.number(hessians.get("loop_end_s")) or train_s
    end_s = report.number(hessians.get("hessian_end_s")) or loop_s
    last_s = steps[-1][1] if steps else 0.0
    table.check("last step <= Hessians <= training <= 600 s",
                f"{last_s:.1f} {loop_s:.1f} {end_s:.1f} {train_s:.1f}",
                last_s - 0.1 <= loop_s <= end_s <= train_s + 0.1 <= 600.2)
    wall_s = report.number(told.get("wall_s"))
    if wall_s is not None:  # from the first batch to the last, which the Hessians still work on
        table.check("never-paused clock <= training seconds", f"{wall_s:.1f} <= {train_s:.1f}",
                    wall_s <= 1.03 * train_s + 1)
    paces = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(steps, steps[1:]) if a[0] > 3]
    if len(paces) >= 5:
        product = log.steps * median(paces)
        slack = 0.25 if log.hardware == "CPU" else 0.03  # other work of a CPU disturbs a step
        table.check("training = steps x step time", f"{product:.1f} s, loop {loop_s:.1f} s",
                    abs(product - loop_s) <= slack * loop_s + 1)
    parts = (log.scores[log.final.method].seconds or 0.0) + (
        report.number(log.last("reload").get("load_time")) or 0.0)
    eval_s = report.number(told.get("eval_s")) or 0.0
    table.check("evaluation = load + score <= 600 s", f"{parts:.1f} s, log {eval_s:.1f} s",
                parts - 0.2 <= eval_s <= 600)
    times = [seconds for seconds, in log.series("ttt", "time")]
    table.check("time stamps of TTT rise", f"{len(times)} lines", times == sorted(times))


# ---- text and bytes


def read_shards(folder):
    """All validation tokens, by the shards' own headers: np.uint16 (n,)."""
    parts = []
    paths = sorted(Path(folder).glob("fineweb_val_[0-9]*.bin"))
    for path in paths:
        raw = path.read_bytes()
        magic, version, count = np.frombuffer(raw, "<i4", 3)
        if (magic, version) != (20240520, 1) or len(raw) != HEADER + 2 * count:
            raise report.ReportError(f"{path}: header {magic} {version} {count}, {len(raw)} bytes")
        parts.append(np.frombuffer(raw, "<u2", offset=HEADER))
    if not parts:
        raise report.ReportError(f"{folder}: no fineweb_val_*.bin; --data names the folder")
    return np.concatenate(parts)


def text_bytes(sp, tokens, sources):
    """Bytes of targets 1 .. n - 1 as UTF-8 text, where they come from, and a fault or ''.

    sources: files of the original text, or empty: then the tokens are decoded, run by run between
    control tokens; a run's first space belongs to the tokenizer.
    """
    unscored = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
                         for i in range(sp.vocab_size())] + [True] * 65536)[tokens]
    runs = np.split(tokens, np.flatnonzero(np.diff(unscored)) + 1)
    texts = [sp.decode(run.tolist()) for run, at in zip(runs, np.cumsum([0, *map(len, runs)]))
             if not unscored[at]]
    marked = sp.piece_to_id(MARKS[0]) != sp.unk_id()
    first = 0 if unscored[0] else len(sp.decode(tokens[:1].tolist()).lstrip(" ").encode())
    if not sources:
        for mark in MARKS if marked else "":
            texts = [text.replace(mark, "") for text in texts]
        found = sum(len(text.removeprefix(" ").encode()) for text in texts) - first
        return found, "decoded tokens", ""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
    import prepare  # reads the same kinds of files
    documents = [part for text in prepare.read_documents(sources, "text")
                 for part in prepare.cut(text, prepare.MAX_DOCUMENT_CHARS)]
    plain = [sp.normalize(text).replace("\u2581", " ").removeprefix(" ") for text in documents]
    same = marked or plain == [text.removeprefix(" ") for text in texts]
    fault = "" if same else f"the shards are not the tokens of {sources[0]}"
    return sum(len(text.encode()) for text in plain) - first, "source text", fault


def check_text(log, tokens, sp, args, table):
    """Shards whole and those of the log, every target counted once, bytes of the text."""
    final = log.final
    size = report.integer(log.last("model").get("val_tokens", str(final.tokens + 1)))
    table.check("validation shards are whole", f"{len(tokens):,} tokens, log {size:,}",
                len(tokens) == size)
    digest = hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
    told = log.last("reload").get("val_sha256", digest)
    table.check("validation tokens are the log's", digest[:16], digest == told)
    counts = {final.tokens, report.integer(log.compliance.get("tokens_scored"))}
    table.check("every target is counted once", f"{len(tokens) - 1:,}, log {counts}",
                counts == {len(tokens) - 1})
    manifest = Path(args.data) / "manifest.json"
    if manifest.is_file():
        wanted = json.loads(manifest.read_bytes()).get("tokenizer", {}).get("sha256")
        digest = hashlib.sha256(Path(args.tokenizer).read_bytes()).hexdigest()
        table.check("the tokenizer is the manifest's", digest[:16], digest == wanted)
    else:
        table.remark("the tokenizer is the manifest's", "no manifest.json beside the shards")
    found, source, fault = text_bytes(sp, tokens, args.text)
    marked = sp.piece_to_id(MARKS[0]) != sp.unk_id()
    slack = CASE_SLACK * found if marked else 0
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
        some = rows[i:i + at_once]
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
        out += [row[first - start:end - start] for row, (start, end, first) in zip(nats, some)]
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


def ttt_nats(t, model, tokens, text, limit, device):
    """Nats of test-time training up to target `limit`, in the order score, record, adapt."""
    cfg, total = model.cfg, len(text) - 1
    adapter = t.Adapter(model, total, t.Run(device=device))
    by_windows = windows(total, cfg.train_seq_len, cfg.eval_stride)
    record, recorded, state = [], 0, None
    with torch.inference_mode():
        while recorded < min(limit, total):
            end = min(recorded // cfg.ttt_chunk_tokens * cfg.ttt_chunk_tokens
                      + cfg.ttt_chunk_tokens, total)
            rows = [(recorded, end, recorded)]
            if cfg.ttt_scoring == "sliding":  # a window belongs to the chunk of its first target
                rows = [row for row in by_windows if recorded <= row[2] < end]
                end = rows[-1][1]
            nats, after = stream_nats(model, text, rows, min(2048, cfg.train_seq_len),
                                      state, adapter.bonus)
            state = after if cfg.ttt_scoring == "exact" else None
            record.append(nats)
            recorded = end
            if recorded < total:
                with torch.inference_mode(False), torch.enable_grad():
                    adapter(tokens[:recorded + 1].copy())
    adapter.close()
    return torch.cat(record)


def check_scores(log, t, model, tokens, num_bytes, args, table):
    """The scores again, from the artifact: windows, carried state, test-time training."""
    cfg, device = model.cfg, args.device
    text = torch.from_numpy(tokens.astype(np.int64)).to(device)
    total = len(text) - 1
    limit = min(args.sample or total, total)
    part = text[:limit + 1]
    slack = args.tolerance
    if slack is None:
        slack = 1e-7 if log.hardware == "CPU" and device == "cpu" else 1e-4
    width = cfg.train_seq_len
    rows = dict(roundtrip=windows(limit, width, width), exact=exact_spans(
        limit, cfg.eval_spans, cfg.eval_warmup_tokens))
    if "sliding" in log.scores:
        rows["sliding"] = windows(limit, width, cfg.eval_stride)
    for method, parts in rows.items():
        began = time.perf_counter()
        # a segment that is no multiple of the kernels' chunk: where it is cut must not matter
        segment = width if method != "exact" else max(1, min(width, 1000))
        with torch.inference_mode():
            nats, _ = stream_nats(model, part, parts, segment)
        compare(log, method, nats, num_bytes, limit == total, slack, began, table)
    if "ttt" in log.scores:
        began = time.perf_counter()
        nats = ttt_nats(t, model, tokens, text, limit, device)
        compare(log, "ttt", nats, num_bytes, limit == total, slack, began, table)
        lines = [(int(n), bpb) for n, bpb in log.series("ttt", "scored_tokens", "running_bpb")
                 if n <= len(nats)]
        if lines and limit < total:  # bytes so far are known up to the mean bytes of a token
            n, bpb = lines[-1]
            mine = bpb_of(nats[:n], t, args, tokens[:n + 1])
            table.close(f"ttt: running bpb of {n:,} targets", mine, bpb, 5e-5 + 5 * slack)


def bpb_of(nats, t, args, tokens):
    """Bits per byte of the first targets, by the decoded text."""
    found, _, _ = text_bytes(args.sp, tokens, [])
    return float(nats.sum()) / math.log(2) / found


def compare(log, method, nats, num_bytes, whole, slack, began, table):
    """One score against its line in the log."""
    seconds = time.perf_counter() - began
    mean = float(nats.sum()) / len(nats)
    if not bool(nats.isfinite().all()) or float(nats.min()) < -1e-9:
        table.check(f"{method}: every score is a probability", "no", False)
    told = log.scores.get(method)
    if whole:
        table.close(f"{method}: val_loss of {len(nats):,} targets, {seconds:.0f} s", mean,
                    told.val_loss if told else None, slack)
        if told:
            bpb = float(nats.sum()) / math.log(2) / num_bytes
            table.close(f"{method}: val_bpb", bpb, told.bpb, slack)
    else:
        table.remark(f"{method}: first {len(nats):,} targets, {seconds:.0f} s", f"{mean:.8f} nats")


# ---- the model


def check_causality(model, places, device, table):
    """Single later tokens changed: no logits before them, and none of another row, may change."""
    cfg = model.cfg
    rng = np.random.default_rng(0)
    T = max(cfg.train_seq_len, 2 * cfg.swa_window) + CHUNK + 5  # no multiple of anything
    B = 4
    edges = [1, T - 1, *range(CHUNK, T, CHUNK), *range(cfg.swa_window, T, cfg.swa_window)]
    leak, still, tried = 0.0, 0, 0
    known = {}  # by carried tokens: ids, state, logits
    with torch.inference_mode():
        for number in range(-(-places // B)):
            # carried state behind 0, 1, 37, 64, 100 tokens; other documents begin within the rows
            before = (0, 1, 37, CHUNK, 100)[number % 5]
            key = number % 5
            if key not in known:
                ids = torch.from_numpy(rng.integers(2, cfg.vocab_size, (B, before + T))).to(device)
                ids[:, ::331] = max(cfg.bos_id, 0)
                state = model.forward(ids[:, :before])[1] if before else None
                known[key] = ids[:, before:], state, model.forward(ids[:, before:], state)[0]
            ids, state, plain = known[key]
            residues = CHUNK * rng.integers(0, T // CHUNK, B) + (number * B + np.arange(B)) % CHUNK
            at = residues if number % 2 else rng.choice(edges, B)
            at = torch.from_numpy(np.clip(at, 1, T - 1)).to(device)
            rows = torch.arange(B, device=device)
            if number % 3 == 2:  # one row alone: its neighbours may not notice
                rows = rows[number % B:][:1]
            changed = ids.clone()
            moved = torch.randint(1, cfg.vocab_size, (len(rows),), device=device)
            changed[rows, at[rows]] = (changed[rows, at[rows]] + moved) % cfg.vocab_size
            gap = (model.forward(changed, state)[0] - plain).abs().amax(-1)
            may = torch.zeros_like(gap, dtype=torch.bool)
            may[rows] = torch.arange(T, device=device) >= at[rows, None]
            leak = max(leak, float(gap.masked_fill(may, 0.0).nan_to_num(nan=math.inf).max()))
            still += int((gap[rows, at[rows]] == 0).sum())
            tried += len(rows)
    table.check("later tokens change no earlier logit", f"{leak:.1e} at {tried} places", leak <= 1e-5)
    table.check("(and the changes are seen)", f"{tried - still} of {tried}", still <= tried // 2)


def check_carried_state(model, device, table):
    """A text in pieces of odd lengths against one pass; the state handed in stays as it was."""
    cfg = model.cfg
    T = 2 * max(cfg.train_seq_len, cfg.swa_window) + 77
    ids = torch.randint(2, cfg.vocab_size, (2, T + 1), device=device)
    with torch.inference_mode():
        whole, _ = forward_nats(model, ids[:, :-1], ids[:, 1:].long(), None)
        state, parts, at, kept = None, [], 0, True
        for size in (1, 63, 64, 65, 3, T // 2, T):
            if at == T:
                break
            piece = slice(at, min(at + size, T))
            before = [x.clone() for x in leaves(state)]
            handed = state
            nats, state = forward_nats(model, ids[:, piece], ids[:, 1:][:, piece].long(), state)
            kept &= all(torch.equal(x, y) for x, y in zip(before, leaves(handed)))
            parts.append(nats)
            at = piece.stop
    gap = float((torch.cat(parts, 1) - whole).abs().mean())
    table.check("carried state = one pass", f"{gap:.1e} nats on average",
                gap <= (2e-2 if model.ops.dtype else 1e-4))
    table.check("a state is not changed by its use", "kept" if kept else "changed", kept)


def leaves(state):
    """The tensors of a state."""
    if isinstance(state, torch.Tensor):
        return [state]
    return [x for part in state or () for x in leaves(part)]


def check_normalization(model, positions, device, table):
    """Sum of the probabilities of the whole vocabulary, by the call that scores, LM.nll."""
    cfg, T, worst, tried = model.cfg, 2 * CHUNK + 7, 0.0, 0
    vocab = torch.arange(cfg.vocab_size, device=device)
    with torch.inference_mode():
        while tried < positions:
            row = torch.randint(2, cfg.vocab_size, (1, T), device=device)
            sums = torch.zeros(T, dtype=torch.float64, device=device)
            for some in vocab.split(max(1, LOGITS // cfg.vocab_size // T)):
                ids, targets = row.expand(len(some), T), some.unsqueeze(1).expand(-1, T)
                nats, _ = model.nll(ids.contiguous(), targets.contiguous())
                sums += nats.double().neg().exp().sum(0)
            worst = max(worst, float((sums - 1).abs().nan_to_num(nan=math.inf).max()))
            tried += T
    table.check("probabilities sum to 1", f"1 +- {worst:.1e} at {tried} positions",
                worst <= (2e-2 if model.ops.dtype else 1e-4))


def check_start(log, t, table):
    """The weights at the start of the clock are those of the seed."""
    told = log.last("kernel").get("initial_weights")
    if told is None:
        return
    cfg = log_config(log, t)
    with torch.no_grad():
        model = t.init_weights(t.LM(cfg), log.seed)
        found = sum(int(p.view(torch.int32).sum()) for p in model.parameters())
    table.check("the clock began at the weights of the seed", found, str(found) == told)


# ---- the whole


def load_script(path):
    """The module of a train_gpt.py."""
    spec = importlib.util.spec_from_file_location("verified_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def log_config(log, t):
    """The Config of the log's settings; epochs of TTT are those wanted, not those of a clock."""
    dropped = {"preset", "data_path", "tokenizer_path", "resume", "artifact", "all", "out_dir"}
    env = {k.upper(): v for k, v in log.config.items() if k not in dropped and v != "-"}
    cfg = t.Config.from_env(env | dict(DEVICE="cpu"))
    return replace(cfg, deterministic=True, max_wallclock_seconds=0.0, compile="0")


def verify(log, args):
    """The Table of all claims that can be tested with what `args` names."""
    table = Table()
    script = Path(args.script)
    if not log.finished:
        raise report.ReportError(f"{log.path}: no final, size or compliance line")
    audit(log, script, table)
    if not args.artifact:
        table.remark("score, bytes, causality", "not tested: no --artifact")
        return table
    t = load_script(script)
    artifact = Path(args.artifact)
    size = artifact.stat().st_size
    table.check("artifact on disk", f"{size:,}, log {log.model_bytes:,}", size == log.model_bytes)
    import sentencepiece
    args.sp = sentencepiece.SentencePieceProcessor(model_file=str(args.tokenizer))
    tokens = read_shards(args.data)
    num_bytes = check_text(log, tokens, args.sp, args, table)
    torch.manual_seed(0)
    ops = (lambda cfg: t.fast_ops(cfg, t.Run(device=args.device))) if args.fast else t.REFERENCE
    model = t.load_artifact(artifact, ops, args.device, log_config(log, t)).requires_grad_(False)
    check_start(log, t, table)
    check_causality(model, args.places, args.device, table)
    check_carried_state(model, args.device, table)
    check_normalization(model, args.places, args.device, table)
    check_scores(log, t, model, tokens, num_bytes, args, table)
    return table


def options():
    """The parser of the command line."""
    p = argparse.ArgumentParser(prog="verify.py", description="Verifies a run independently.")
    p.add_argument("log", help="log of train_gpt.py")
    p.add_argument("--artifact", help="its artifact; without it only log and script are checked")
    p.add_argument("--script", default=str(Path(__file__).resolve().parents[2] / "train_gpt.py"))
    p.add_argument("--data", help="folder of the validation shards (default: the log's)")
    p.add_argument("--tokenizer", help="SentencePiece model (default: the log's)")
    p.add_argument("--text", nargs="*", default=[], help="files of the original validation text")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--cpu", dest="device", action="store_const", const="cpu")
    p.add_argument("--fast", action="store_true", help="the script's kernels, on a GPU")
    p.add_argument("--sample", type=int, default=0, help="score the first N targets only")
    p.add_argument("--places", type=int, default=320, help="places of the causality test")
    p.add_argument("--tolerance", type=float, help="of a score (1e-7 CPU, 1e-4 bfloat16)")
    return p


def parse(argv):
    """(RunLog, options); paths that are not given are those of the log."""
    args = options().parse_args(argv)
    log = report.parse_log(args.log)
    args.data = args.data or log.config.get("data_path", "data/datasets/fineweb10B_sp1024")
    args.tokenizer = args.tokenizer or log.config.get(
        "tokenizer_path", "data/tokenizers/fineweb_1024_bpe.model")
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
    print(table.text())
    part = f"the first {args.sample:,} targets" if args.sample else "whole"
    print(f"{args.log}: {'holds' if table.holds else 'DIFFERS'} ({part}, {args.device}, "
          f"{time.perf_counter() - began:.0f} s)")
    return int(not table.holds)


if __name__ == "__main__":
    sys.exit(main())
