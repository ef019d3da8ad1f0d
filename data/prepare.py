"""Any text -> a SentencePiece tokenizer and token shards in the challenge's format.

Run (from anywhere; the README beside this file shows more):
    python data/prepare.py --sample
    python data/prepare.py --out DIR --train A.jsonl.zst B.txt --val C.txt --train-tokenizer 1024
    python data/prepare.py --out DIR --input docs.jsonl --val-fraction 0.005 --tokenizer X.model

Read in this order: main(), export(), write_shards(), encode_batch(), ShardWriter.
Written into --out: the shards, a copy of the tokenizer, manifest.json (last, so that its presence
says that the folder is complete). The bytes written depend on the texts in the order given, the
tokenizer, --case-ops and --shard-tokens alone, never on the number of processes or on time.
Memory: some batches per process, plus the longest document; the corpus never, but for the sample
that a new tokenizer is trained on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import heapq
import io
import itertools
import json
import lzma
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import caseops
import numpy as np
import sentencepiece as spm
from shards import HEADER_BYTES, MAGIC, VERSION, log, sha256_file, shard_header

# -------------------------------------------------------------------------------------------------
# 1 Constants
# -------------------------------------------------------------------------------------------------
# The shard format itself is in shards.py.

MAX_VOCAB = 2**16  # tokens are stored as uint16
MIN_VOCAB = 4 + 256 + 1  # special pieces, byte pieces, and at least one piece of text

SEPARATOR = "\x1e"  # alone on a line between two documents of a plain file
# SentencePiece encodes one document at a time with about 50 times its size in memory, and slower
# than linearly; longer documents are cut at a line end or space. FineWeb documents stay below.
MAX_DOCUMENT_CHARS = 2**22
BATCH_DOCUMENTS, BATCH_CHARS = 256, 2**20
TOKENIZER_SAMPLE_BYTES = 100_000_000  # text that a new tokenizer is trained on, at most
# Above this share, table bytes that differ from the decoded text are an error, not a note: a
# tokenizer without a leading-space convention may differ by one byte per document.
MAX_BYTE_ERROR = 1e-3
PROGRESS_SECONDS = 10.0

DATA_DIR = Path(__file__).resolve().parent
SAMPLE_DIR = DATA_DIR / "sample"
UNFINISHED_NAME = ".prepare.tmp"


# -------------------------------------------------------------------------------------------------
# 2 Documents
# -------------------------------------------------------------------------------------------------
# A file is a stream of documents. Damage (truncation, wrong encoding, a line that is not JSON) is
# an error that names the file and the line; it never shortens the corpus silently.


class ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file of any number of frames; EOFError if the last is cut short.

    The stream reader of the zstandard package ends without an error in the middle of a frame.
    """

    CHUNK_BYTES = 2**17

    def __init__(self, path):
        try:
            import zstandard
        except ImportError as error:
            raise RuntimeError(f"{path}: .zst needs `pip install zstandard`") from error
        self._new = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._error = zstandard.ZstdError
        self._file = open(path, "rb")
        self._frame, self._rest, self._ready = None, b"", memoryview(b"")

    def readable(self):
        """True: makes io.BufferedReader accept this object."""
        return True

    def readinto(self, buffer):
        """Fill buffer with decompressed bytes; returns how many, 0 at the end of the file."""
        while not self._ready:
            chunk = self._rest or self._file.read(self.CHUNK_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("ends inside a frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._error as error:
                raise OSError(str(error)) from error
            self._rest = b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self):
        """Close the file underneath."""
        self._file.close()
        super().close()


OPENERS = {
    ".gz": lambda path: gzip.open(path, "rb"),
    ".xz": lambda path: lzma.open(path, "rb"),
    ".zst": lambda path: io.BufferedReader(ZstdReader(path), 2**17),
}


def read_lines(path):
    """Yield the lines of a UTF-8 text file, decompressed by its last suffix, line ends kept.

    Lines end at a newline only (str.splitlines would also split at U+001E); no byte order mark.
    Raises ValueError naming the file if it is damaged or not UTF-8.
    """
    line_num = 0
    opener = OPENERS.get(path.suffix, lambda path: open(path, "rb"))
    with opener(path) as file:
        try:
            for line_num, line in enumerate(file, 1):
                text = line.decode("utf-8")
                yield text.removeprefix("\ufeff") if line_num == 1 else text
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: line {line_num} is not UTF-8 ({error.reason}); convert the file first, "
                "for example with iconv"
            ) from error
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            raise ValueError(
                f"{path}: truncated or damaged {path.suffix} file after line {line_num} ({error}); "
                "fetch or compress it again"
            ) from error


def plain_documents(lines):
    """Yield the documents of a plain file: text between lines holding only U+001E; no blank ones.

    The newline before a separator and the last newline of the file belong to no document.
    Text that goes on beyond MAX_DOCUMENT_CHARS is handed out in parts, cut at line ends.
    """
    parts, size = [], 0
    for line in itertools.chain(lines, [SEPARATOR]):
        is_separator = line.rstrip("\r\n") == SEPARATOR
        if is_separator or (parts and size + len(line) > MAX_DOCUMENT_CHARS):
            text = "".join(parts).removesuffix("\n")
            if text.strip():
                yield text
            parts, size = [], 0
        if not is_separator:
            parts.append(line)
            size += len(line)


def jsonl_documents(lines, path, text_key):
    """Yield text_key of every JSON object, one object per line; ValueError names a bad line."""
    for line_num, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {line_num}: not JSON ({error})") from error
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            found = f"keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{path}, line {line_num}: expected an object with a string under {text_key!r}, "
                f"found {found}; name the key with --text-key"
            )
        yield text


def repair(text):
    """Text that UTF-8 can hold: surrogate pairs joined, lone halves (JSON allows them) replaced."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut(text):
    """Yield text in parts of at most MAX_DOCUMENT_CHARS, cut after a newline, else a space."""
    while len(text) > MAX_DOCUMENT_CHARS:
        at = max(text.rfind("\n", 0, MAX_DOCUMENT_CHARS), 0)
        at = at or max(text.rfind(" ", 0, MAX_DOCUMENT_CHARS), 0)
        at = at + 1 if at else MAX_DOCUMENT_CHARS
        yield text[:at]
        text = text[at:]
    yield text


def read_documents(paths, text_key):
    """Yield the documents of all files in order.

    A file whose name, without a compression suffix, ends in .jsonl, .ndjson or .json holds one
    JSON object per line, each a document, as in the challenge's exporter: a blank text too. Any
    other file holds plain text.
    """
    for path in map(Path, paths):
        stem = path.with_suffix("") if path.suffix in OPENERS else path
        lines = read_lines(path)
        is_jsonl = stem.suffix in (".jsonl", ".ndjson", ".json")
        documents = jsonl_documents(lines, path, text_key) if is_jsonl else plain_documents(lines)
        yield from map(repair, documents)


def text_hash(text):
    """64 bits of BLAKE2b of the text without outer white space: the same for any file or order."""
    digest = hashlib.blake2b(text.strip().encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def labelled_documents(args):
    """Yield (split, text) for every document; split is "train" or "val", val first if files decide.

    --train/--val: the files decide. --val-first N: the first N documents are val (the challenge's
    own rule). --val-fraction F: the hash of the text decides, so that a document keeps its split
    when others come or go, and copies of one text never stand in both.
    """
    if not args.input:
        for split, paths in (("val", args.val), ("train", args.train)):
            yield from ((split, text) for text in read_documents(paths, args.text_key))
        return
    for index, text in enumerate(read_documents(args.input, args.text_key)):
        if args.val_first is not None:
            is_val = index < args.val_first
        else:
            is_val = text_hash(text) < args.val_fraction * 2**64
        yield ("val" if is_val else "train"), text


def batches(labelled):
    """Group (split, text) pairs into lists of bounded size, one list per task of a process.

    Here long documents are cut, each part a document of the same split.
    """
    batch, size = [], 0
    for split, text in labelled:
        for part in cut(text):
            batch.append((split, part))
            size += len(part)
            if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


# -------------------------------------------------------------------------------------------------
# 3 Tokenizer
# -------------------------------------------------------------------------------------------------
# A tokenizer is passed around as the bytes of its .model file: what is hashed, copied and used by
# every process is then the same thing.


def load_tokenizer(model_proto, name, case_ops):
    """SentencePieceProcessor of the bytes of a .model file; ValueError if shards cannot use it."""
    try:
        sp = spm.SentencePieceProcessor(model_proto=model_proto)
    except RuntimeError as error:
        raise ValueError(f"{name}: not a SentencePiece model ({error})") from error
    if sp.vocab_size() > MAX_VOCAB:
        raise ValueError(
            f"{name}: vocabulary {sp.vocab_size()} does not fit the shards' uint16 tokens "
            f"(at most {MAX_VOCAB}); use another --tokenizer"
        )
    if sp.bos_id() < 0:
        raise ValueError(f"{name}: has no BOS piece, which must start each document")
    has_marks = all(sp.encode(mark, out_type=str) == [mark] for mark in caseops.MARKS)
    if has_marks != case_ops:
        raise ValueError(
            f"{name}: has the CaseOps symbols as pieces; add --case-ops"
            if has_marks
            else f"{name}: has not the CaseOps symbols U+E001 to U+E004 as pieces, which --case-ops "
            "needs; use another --tokenizer, or --train-tokenizer"
        )
    return sp


def tokenizer_sample(texts, max_bytes):
    """A uniform sample of documents of at most max_bytes UTF-8 bytes (at least one document).

    Keeps the documents of smallest hash, so the sample depends on the texts alone, not on their
    order; memory stays at max_bytes. Returns a list in order of hash.
    """
    heap, total = [], 0  # largest hash on top
    for text in texts:
        heapq.heappush(heap, (-text_hash(text), text))
        total += len(text.encode("utf-8"))
        while total > max_bytes and len(heap) > 1:
            total -= len(heapq.heappop(heap)[1].encode("utf-8"))
    return [text for _, text in sorted(heap, reverse=True)]


def train_tokenizer(texts, vocab_size, case_ops):
    """Train byte-fallback BPE with the challenge exporter's settings; returns .model bytes.

    texts: iterable of documents.   vocab_size: pieces wanted, MIN_VOCAB..MAX_VOCAB; short text may
    give fewer.   case_ops: train on transformed text, its symbols being pieces of their own.
    Raises ValueError for another size or no text.
    """
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise ValueError(
            f"--train-tokenizer {vocab_size}: expected {MIN_VOCAB} (special and byte pieces) to "
            f"{MAX_VOCAB} (tokens are uint16)"
        )
    # The trainer drops a text with a null character whole; the exporter replaces it, too.
    texts = (text.replace("\0", " ") for text in texts if text.strip())
    sample = tokenizer_sample(texts, TOKENIZER_SAMPLE_BYTES)
    if not sample:
        raise ValueError("no training text: every document of --train or --input is blank")
    if case_ops:
        sample = [caseops.encode(text) for text in sample]
    started, model = time.monotonic(), io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            hard_vocab_limit=False,
            user_defined_symbols=list(caseops.MARKS) if case_ops else [],
            # By default the trainer drops whole documents above 4192 bytes.
            max_sentence_length=8 * MAX_DOCUMENT_CHARS,
            # Stored in the file, so it must not follow --procs; the pieces do not depend on it.
            num_threads=4,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"--train-tokenizer {vocab_size}: the trainer says {error}") from error
    log(
        "tokenizer_training",
        documents=len(sample),
        bytes=sum(len(text.encode("utf-8")) for text in sample),
        time=f"{time.monotonic() - started:.1f}s",
    )
    return model.getvalue()


def make_byte_counter(sp, case_ops):
    """Bytes of original text that each token of whole documents counts: (n,) uint16 -> (n,) int64.

    By the byte table of the training script itself, so that what is checked here is what scores are
    made of; with case_ops, an escaped symbol counts its own bytes (the table knows no context).
    Raises RuntimeError if the training script cannot be imported.
    """
    sys.path.insert(0, str(DATA_DIR.parent))
    try:
        import torch

        import train_gpt
    except ImportError as error:
        raise RuntimeError(
            f"the byte check needs train_gpt.py and what it imports ({error}): "
            "pip install -r requirements.txt"
        ) from error
    finally:
        sys.path.pop(0)
    table = train_gpt.byte_table(sp, sp.vocab_size())
    esc, literal_bytes = sp.piece_to_id(caseops.ESC), len(caseops.ESC.encode())

    def count(tokens):
        ids = torch.from_numpy(tokens.astype(np.int64))
        counts = np.zeros(len(tokens), np.int64)  # the first is BOS
        counts[1:] = train_gpt.count_bytes(table, ids[:-1], ids[1:]).numpy()
        literal = -1
        for at in np.flatnonzero(tokens == esc) if case_ops else ():
            if at != literal:  # an ESC behind ESC is the literal
                literal = at + 1
                counts[literal] = literal_bytes
        return counts

    return count


# -------------------------------------------------------------------------------------------------
# 4 Encoding
# -------------------------------------------------------------------------------------------------
# Documents are encoded one by one, so tokens do not depend on batches; results come back in the
# order of the batches, so files do not depend on the number of processes.


@dataclass
class Totals:
    """Sums over documents of one split. text_bytes: UTF-8 as read; decoded_bytes: UTF-8 of the text
    that the tokens decode to (white space runs are one space), without CaseOps symbols;
    counted_bytes: what a score counts, by the byte table or the sidecar: it must be the same."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    decoded_bytes: int = 0
    counted_bytes: int = 0

    def add(self, other):
        """Add the sums of more documents."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def bytes_per_token(self):
        """Decoded bytes per token, the BOS tokens counted; 5 decimals."""
        return round(self.decoded_bytes / self.tokens, 5)


_sp, _case_ops = None, False  # the tokenizer of this process, and whether texts are transformed


def start_process(model_proto, case_ops, is_worker=True):
    """Load the tokenizer once per process (ProcessPoolExecutor's initializer)."""
    global _sp, _case_ops
    _sp, _case_ops = spm.SentencePieceProcessor(model_proto=model_proto), case_ops
    if is_worker:  # Ctrl-C is the parent's business
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def transform(text):
    """The text as it is tokenized; RuntimeError if it could not be restored."""
    if not _case_ops:
        return text
    coded = caseops.encode(text)
    if caseops.decode(coded) != text:
        raise RuntimeError(f"CaseOps would lose something of the document {text[:80]!r}")
    return coded


def original_bytes(text):
    """UTF-8 bytes of what tokens decode to; a capital has as many as its small letter."""
    return len((caseops.bare(text) if _case_ops else text).encode("utf-8"))


def encode_batch(batch):
    """Encode a list of (split, text); returns {split: (tokens (n,) uint16, Totals)}.

    Tokens: BOS, then the document, no EOS. Raises ValueError if the tokenizer meets text that it
    cannot write down (no byte fallback): its bytes would count nothing.
    """
    result = {}
    for split in sorted({split for split, _ in batch}):
        texts = [text for label, text in batch if label == split]
        encoded = _sp.encode(list(map(transform, texts)), out_type=int, num_threads=1)
        decoded = _sp.decode(encoded, num_threads=1)
        tokens = np.fromiter(
            itertools.chain.from_iterable([_sp.bos_id(), *ids] for ids in encoded), dtype="<u2"
        )
        num_unknown = int((tokens == _sp.unk_id()).sum()) if _sp.unk_id() >= 0 else 0
        if num_unknown:
            raise ValueError(
                f"{num_unknown} of {len(tokens)} tokens are unknown: the tokenizer has no byte "
                "fallback; use another --tokenizer, or --train-tokenizer"
            )
        text_bytes = sum(len(text.encode("utf-8")) for text in texts)
        decoded_bytes = sum(map(original_bytes, decoded))
        result[split] = tokens, Totals(len(texts), len(tokens), text_bytes, decoded_bytes)
    return result


def encode_all(work, model_proto, case_ops, procs):
    """Yield encode_batch(batch) for each batch of work, in order, by procs processes.

    At most 4 batches per process wait, so a slow disk or a slow reader never fills the memory.
    """
    if procs == 1:
        start_process(model_proto, case_ops, is_worker=False)
        yield from map(encode_batch, work)
        return
    # Not fork: torch, which the byte check imports, has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(procs, context, start_process, (model_proto, case_ops)) as pool:
        waiting = deque()
        try:
            for batch in work:
                waiting.append(pool.submit(encode_batch, batch))
                if len(waiting) >= 4 * procs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"an encoding process was killed, likely for memory; lower --procs ({procs})"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


# -------------------------------------------------------------------------------------------------
# 5 Files
# -------------------------------------------------------------------------------------------------
# Everything is written into a folder inside --out and renamed when all of it is there.


class ShardWriter:
    """Write one split's tokens as fineweb_<split>_<index>.bin files of shard_tokens each.

    A document may go on in the next shard, as in the challenge's export. `files` lists what is
    complete: name, split, tokens, bytes, sha256.
    """

    def __init__(self, folder, split, shard_tokens):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.files, self._file, self._tokens = [], None, 0

    def write(self, tokens):
        """Append tokens (n,) uint16, starting new shards as needed."""
        while len(tokens):
            if self._file is None:
                name = f"fineweb_{self.split}_{len(self.files):06d}.bin"
                self._file, self._tokens = open(self.folder / name, "wb"), 0
                self._file.write(bytes(HEADER_BYTES))  # the count is known when it closes
            part = tokens[: self.shard_tokens - self._tokens]
            self._file.write(part.astype("<u2").tobytes())
            self._tokens += len(part)
            tokens = tokens[len(part) :]
            if self._tokens == self.shard_tokens:
                self.close()

    def close(self):
        """Write the header of the open shard and list it; does nothing if none is open."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(shard_header(self._tokens))
        self._file.close()
        path = Path(self._file.name)
        self.files.append(
            {
                "name": path.name,
                "split": self.split,
                "tokens": self._tokens,
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
        )
        self._file = None

    def abandon(self):
        """Close the open file without finishing it, so that its folder can be removed."""
        if self._file is not None:
            self._file.close()


def old_files(out):
    """The shards and manifest that stand in a folder."""
    return sorted(out.glob("fineweb_*_*.bin")) + sorted(out.glob("manifest.json"))


def claim_folder(out, model_name, model_source, force):
    """Create out and its folder for unfinished files; returns the latter.

    model_source: Path that the tokenizer is copied from, or None if it is yet to be trained.
    Raises FileExistsError if out holds shards, another tokenizer of that name, or the unfinished
    files of a run that goes on or was killed; force allows all three.
    """
    out.mkdir(parents=True, exist_ok=True)
    unfinished, model = out / UNFINISHED_NAME, out / model_name
    in_the_way = [path.name for path in old_files(out)]
    if model.exists() and not (model_source and model.read_bytes() == model_source.read_bytes()):
        in_the_way.append(model.name)
    if unfinished.exists():
        in_the_way.append(f"{UNFINISHED_NAME} (another run writes here, or was killed)")
    if in_the_way and not force:
        more = f" and {len(in_the_way) - 3} more" if len(in_the_way) > 3 else ""
        raise FileExistsError(
            f"{out} holds {', '.join(in_the_way[:3])}{more}; name another --out, or add --force to "
            "replace them"
        )
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    return unfinished


def publish(unfinished, out):
    """Move finished files into out, replacing old ones; the manifest goes first and comes last."""
    (out / "manifest.json").unlink(missing_ok=True)
    for path in old_files(out):
        path.unlink()
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "manifest.json"):
        os.replace(path, out / path.name)


# -------------------------------------------------------------------------------------------------
# 6 Export
# -------------------------------------------------------------------------------------------------
# One pass over the documents: read, encode, write, sum; then one manifest.


def check_bytes(split, totals):
    """Log the counted bytes against the decoded text's; ValueError if they differ by > 0.1 %.

    A score in bits per byte is as wrong as this difference.
    """
    difference = totals.counted_bytes - totals.decoded_bytes
    is_ok = abs(difference) <= MAX_BYTE_ERROR * totals.decoded_bytes
    log(
        "check",
        split=split,
        counted_bytes=totals.counted_bytes,
        decoded_bytes=totals.decoded_bytes,
        difference=difference,
        verdict="ok" if is_ok else "fail",
    )
    if not is_ok:
        raise ValueError(
            f"{split}: the byte table counts {totals.counted_bytes} bytes, the decoded text has "
            f"{totals.decoded_bytes}; scores with this --tokenizer would be wrong"
        )


def write_shards(args, model_proto, count_bytes, writers):
    """Encode all documents into writers {name: ShardWriter}; returns {split: Totals}.

    The writer named val_bytes, if there is one, gets the counted bytes of the validation tokens.
    Raises ValueError if a split gets no document or its bytes do not check (see check_bytes).
    """
    totals = {split: Totals() for split in ("train", "val")}
    started = reported = time.monotonic()
    work = batches(labelled_documents(args))
    for result in encode_all(work, model_proto, args.case_ops, args.procs):
        for split, (tokens, sums) in result.items():
            writers[split].write(tokens)
            counts = count_bytes(tokens)
            if f"{split}_bytes" in writers:
                writers[f"{split}_bytes"].write(counts)
            sums.counted_bytes = int(counts.sum())
            totals[split].add(sums)
        if time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            tokens = sum(each.tokens for each in totals.values())
            speed = f"{tokens / (reported - started):.0f}"
            log("progress", tokens=tokens, tok_s=speed, time=f"{reported - started:.0f}s")
    for split, sums in totals.items():
        if not sums.documents:
            setting = f"--{split}" if args.train else "--val-fraction or --val-first, and --input"
            raise ValueError(f"{split} got no document; change {setting}")
        check_bytes(split, sums)
    for writer in writers.values():
        writer.close()
    return totals


def manifest_text(args, tokenizer, totals, writers):
    """The manifest as JSON text; holds no time, path or process count, so it is reproducible."""
    if args.train:
        split_rule = {split: [Path(p).name for p in getattr(args, split)] for split in totals}
    else:
        split_rule = {"input": [Path(p).name for p in args.input]}
        split_rule |= {"val_first": args.val_first, "val_fraction": args.val_fraction}
    manifest = {
        "format": {"magic": MAGIC, "version": VERSION, "header_bytes": HEADER_BYTES},
        "source": split_rule,
        "shard_tokens": args.shard_tokens,
        "tokenizer": tokenizer,
        "splits": {
            split: asdict(sums) | {"bytes_per_token": sums.bytes_per_token}
            for split, sums in totals.items()
        },
        "files": [record for writer in writers.values() for record in writer.files],
    }
    return json.dumps(manifest, indent=1) + "\n"


def write_export(args, unfinished, model_name):
    """Write tokenizer, shards and manifest.json into the folder unfinished.

    Returns {split: Totals} and the vocabulary's size.
    """
    if args.tokenizer:
        model_proto = Path(args.tokenizer).read_bytes()
    else:
        train_texts = (text for split, text in labelled_documents(args) if split == "train")
        model_proto = train_tokenizer(train_texts, args.train_tokenizer, args.case_ops)
    sp = load_tokenizer(model_proto, model_name, args.case_ops)
    tokenizer = {
        "file": model_name,
        "vocab_size": sp.vocab_size(),
        "bos_id": sp.bos_id(),
        "sha256": hashlib.sha256(model_proto).hexdigest(),
    }
    if args.case_ops:
        tokenizer["text_transform"] = "lossless_caps_caseops_v1"
    log("tokenizer", **tokenizer)
    names = ["train", "val", *(["val_bytes"] if args.case_ops else [])]
    writers = {name: ShardWriter(unfinished, name, args.shard_tokens) for name in names}
    try:
        count_bytes = make_byte_counter(sp, args.case_ops)
        totals = write_shards(args, model_proto, count_bytes, writers)
    finally:
        for writer in writers.values():
            writer.abandon()
    (unfinished / model_name).write_bytes(model_proto)
    text = manifest_text(args, tokenizer, totals, writers)
    (unfinished / "manifest.json").write_text(text, encoding="utf-8")
    return totals, sp.vocab_size()


def export(args):
    """Do all that the checked settings in args ask for.

    Leaves the files in --out as they were if anything fails.
    """
    started, out = time.monotonic(), Path(args.out)
    source = Path(args.tokenizer) if args.tokenizer else None
    suffix = "_caseops" if args.case_ops else ""
    model_name = source.name if source else f"fineweb_{args.train_tokenizer}_bpe{suffix}.model"
    unfinished = claim_folder(out, model_name, source, args.force)
    try:
        totals, vocab_size = write_export(args, unfinished, model_name)
        publish(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for split, sums in totals.items():
        log("data", split=split, **asdict(sums), bytes_per_token=f"{sums.bytes_per_token:.5f}")
    log("done", out=out, time=f"{time.monotonic() - started:.1f}s")
    model = out / model_name
    print(f"DATA_PATH={out} TOKENIZER_PATH={model} VOCAB_SIZE={vocab_size}", flush=True)


# -------------------------------------------------------------------------------------------------
# 7 Command line
# -------------------------------------------------------------------------------------------------


def num_cores():
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_parser():
    """The argparse parser; check_settings() holds the rules between settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", metavar="DIR", help="folder for shards, tokenizer and manifest.json")
    add("--sample", action="store_true", help="rebuild data/sample (or build it into --out)")
    add("--train", nargs="+", metavar="FILE", help="files of the training split, with --val")
    add("--val", nargs="+", metavar="FILE", help="files of the validation split")
    add("--input", nargs="+", metavar="FILE", help="files to split, in place of --train and --val")
    add("--val-fraction", type=float, metavar="F", help="share of --input by hash of the text")
    add("--val-first", type=int, metavar="N", help="first N documents of --input (the challenge)")
    add("--text-key", default="text", metavar="KEY", help="JSONL key of the text [text]")
    add("--tokenizer", metavar="FILE", help="SentencePiece .model to use")
    add("--train-tokenizer", type=int, metavar="VOCAB", help="train BPE of VOCAB pieces")
    add("--case-ops", action="store_true", help="capitals as symbols, and the sidecar of bytes")
    add("--shard-tokens", type=int, default=100_000_000, metavar="N", help="per shard [100000000]")
    add("--procs", type=int, default=num_cores(), metavar="N", help="processes [all cores]")
    add("--force", action="store_true", help="replace the shards that --out holds")
    return parser


def check_files(args):
    """Raise FileNotFoundError, naming file and setting, for one that is not there."""
    for setting in ("train", "val", "input", "tokenizer"):
        given = getattr(args, setting) or []
        for path in given if isinstance(given, list) else [given]:
            if not Path(path).is_file():
                found = "a folder; name the files in it" if Path(path).is_dir() else "no such file"
                raise FileNotFoundError(f"{path}: {found} (--{setting})")


def check_settings(args):
    """Raise ValueError, naming the settings, for a combination that does not say what to do."""
    if args.train or args.val:
        if not (args.train and args.val) or args.input:
            raise ValueError("--train and --val go together, without --input")
        both = {Path(p).resolve() for p in args.train} & {Path(p).resolve() for p in args.val}
        if both:
            raise ValueError(f"{min(both).name} stands in both --train and --val")
    elif not args.input:
        raise ValueError("no text: give --train and --val, or --input, or --sample")
    check_files(args)
    given = [v for v in (args.val_fraction, args.val_first) if v is not None]
    if len(given) != (1 if args.input else 0):
        raise ValueError("--input needs one of --val-fraction and --val-first; --train, none")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise ValueError(f"--val-fraction {args.val_fraction}: expected between 0 and 1")
    if args.val_first is not None and args.val_first < 1:
        raise ValueError(f"--val-first {args.val_first}: expected at least 1")
    if (args.tokenizer is None) == (args.train_tokenizer is None):
        raise ValueError("give one of --tokenizer FILE and --train-tokenizer VOCAB")
    if not args.out:
        raise ValueError("give --out DIR")
    if not 2 <= args.shard_tokens < 2**31:
        raise ValueError(f"--shard-tokens {args.shard_tokens}: expected 2 to 2147483647 (int32)")
    if args.procs < 1:
        raise ValueError(f"--procs {args.procs}: expected at least 1")


def use_sample(args):
    """Set args to what built data/sample; in place, its own files may be replaced."""
    given = (args.train, args.val, args.input, args.tokenizer, args.train_tokenizer, args.case_ops)
    if any(given):
        raise ValueError("--sample chooses texts and tokenizer itself; drop the other settings")
    args.force = args.force or args.out is None
    args.out = args.out or SAMPLE_DIR
    args.train, args.val = [SAMPLE_DIR / "sample_train.txt.xz"], [SAMPLE_DIR / "sample_val.txt.xz"]
    args.tokenizer = SAMPLE_DIR / "corpus_1024_bpe.model"


def main(argv=None):
    """Entry point; argv defaults to the command line. One line on stderr and exit 1 on an error."""
    args = build_parser().parse_args(argv)
    try:
        if args.sample:
            use_sample(args)
        check_settings(args)
        export(args)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"prepare.py: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("prepare.py: stopped; --out is as it was before") from None


if __name__ == "__main__":
    main()
