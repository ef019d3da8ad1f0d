"""Any text -> a SentencePiece tokenizer and token shards in the challenge's format.

Run (data/README.md shows more):
    python data/prepare.py --sample
    python data/prepare.py --out DIR --train A.jsonl.zst B.txt --val C.txt --train-tokenizer 1024
    python data/prepare.py --out DIR --input book.txt --val-fraction 0.05 --train-tokenizer 1024

Read in this order: main(), export(), write_shards(), encode(), ShardWriter.
Written into --out: the shards, a copy of the tokenizer, and last manifest.json: a folder that has
it is complete. The bytes written depend only on the texts in the order given, the tokenizer,
--case-ops and --shard-tokens. Memory holds a batch, the longest document, a shard of each split
and the text that a new tokenizer is trained on; never the whole corpus.
"""

import argparse
import csv
import gzip
import hashlib
import heapq
import io
import itertools
import json
import lzma
import os
import shlex
import sys
import tempfile
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import sentencepiece as spm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m data.prepare`

import caseops  # noqa: E402
from shards import (  # noqa: E402
    HEADER_BYTES,
    MAGIC,
    VERSION,
    log,
    sha256_file,
    shard_header,
)

MAX_VOCAB = 2**16  # tokens are stored as uint16
SEPARATOR = "\x1e"  # alone on a line between two documents of a plain file
# SentencePiece needs about 50 times the size of a document in memory, and time that grows faster
# than its length, so longer documents are cut. FineWeb documents stay below.
MAX_DOCUMENT_CHARS = 2**22
PIECE_CHARS = 2**11  # a plain file without separators is split into documents of this length
BATCH_CHARS = 2**22
TOKENIZER_SAMPLE_BYTES = 100_000_000  # a new tokenizer is trained on at most this much text

PLAIN = ("", ".txt", ".md")
JSON_LINES = (".jsonl", ".ndjson", ".json")
FORMATS = (
    "plain text (.txt, .md or no suffix), JSON lines (.jsonl, .ndjson, .json) and .csv, all in "
    "UTF-8 and also as .gz, .xz or .zst, and .parquet (needs pyarrow)"
)

DATA_DIR = Path(__file__).resolve().parent
SAMPLE_DIR = DATA_DIR / "sample"


# --------------------------------------------------------------------------------------------------
# 1 Documents
# --------------------------------------------------------------------------------------------------
# A file is a stream of documents. Damage (truncation, wrong encoding, a line that is not JSON) is
# an error that names the file; it never shortens the corpus silently.


def open_zstd(path):
    """Content of a .zst file; EOFError if it is cut short, which zstandard itself does not see."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    data = b""
    with open(path, "rb") as file:
        while data := data or file.read(2**20):
            frame = frame or decompressor.decompressobj()
            frame.decompress(data)
            data = frame.unused_data
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("ends inside a frame")
    return decompressor.stream_reader(open(path, "rb"), read_across_frames=True)


OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".zst": open_zstd}


def read_lines(path):
    """Yield the lines of a UTF-8 text file, decompressed by its suffix, line ends kept.

    Lines end at a newline only (str.splitlines would also split at U+001E); no byte order mark.
    Raises ValueError naming the file if it is damaged or not UTF-8.
    """
    try:
        file = OPENERS.get(path.suffix, io.FileIO)(path)
        with io.TextIOWrapper(io.BufferedReader(file), "utf-8-sig", newline="\n") as lines:
            yield from lines
    except (UnicodeDecodeError, EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or not UTF-8 ({error}); readable: {FORMATS}") from error


def cut(text, max_chars):
    """Yield text in parts of at most max_chars, cut after a newline, else after a space."""
    start = 0
    while len(text) - start > max_chars:
        end = start + max_chars
        at = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end
        yield text[start:at]
        start = at
    yield text[start:]


def plain_documents(path, max_chars):
    """Yield the documents of a plain file: text between separator lines, but no blank ones.

    The newline before a separator and the last newline of the file belong to no document.
    Documents of more than max_chars are cut at line ends, else at spaces.
    """
    parts = []
    size = 0
    for line in itertools.chain(read_lines(path), [SEPARATOR]):
        is_separator = line.rstrip("\r\n") == SEPARATOR
        if is_separator or size + len(line) > max_chars:
            text = "".join(parts).removesuffix("\n")
            if text.strip():
                yield from cut(text, max_chars)
            parts = []
            size = 0
        if not is_separator:
            parts.append(line)
            size += len(line)


def parquet_records(path, text_key):
    """Yield a dict of each row, of the column text_key alone if there is one."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{path}: to read .parquet, `pip install pyarrow` ({error})") from error
    try:
        file = ParquetFile(path, page_checksum_verification=True)
        columns = [text_key] if text_key in file.schema_arrow.names else None
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged or not Parquet ({error})") from error


def file_format(path):
    """The suffix that says how a file is read, in lower case; ValueError if it is unknown."""
    stem = path.with_suffix("") if path.suffix in OPENERS else path
    suffix = stem.suffix.lower()
    if suffix not in (*PLAIN, *JSON_LINES, ".csv", ".parquet"):
        raise ValueError(f"{path}: unknown format; readable: {FORMATS}")
    return suffix


def record_documents(path, text_key):
    """Yield the string under text_key of each record of a JSON, CSV or Parquet file.

    A blank one is a document, too, as in the challenge's exporter.
    """
    csv.field_size_limit(2**31 - 1)
    if file_format(path) == ".parquet":
        records = parquet_records(path, text_key)
    elif file_format(path) == ".csv":
        records = csv.DictReader(read_lines(path), strict=True)
    else:
        records = (json.loads(line) for line in read_lines(path) if line.strip())
    num = 0
    try:
        for num, record in enumerate(records, 1):
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                found = list(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(
                    f"{path}: record {num} has no text under {text_key!r}, but {found}; "
                    "name the key with --text-key"
                )
            # JSON may hold halves of surrogate pairs, UTF-8 may not: joined, or replaced.
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except (json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: after record {num}: {error}") from error


def read_documents(paths, text_key, is_split=False):
    """Yield the documents of all files in order.

    is_split: cut a plain file that has no separator into documents of PIECE_CHARS.
    """
    for path in map(Path, paths):
        if file_format(path) not in PLAIN:
            yield from record_documents(path, text_key)
            continue
        is_one = is_split and all(line.rstrip("\r\n") != SEPARATOR for line in read_lines(path))
        yield from plain_documents(path, PIECE_CHARS if is_one else MAX_DOCUMENT_CHARS)


def text_hash(text):
    """64 bits of BLAKE2b of the text without outer white space: the same for any file or order."""
    digest = hashlib.blake2b(text.strip().encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def labelled_documents(args):
    """Yield (split, text) of every document; split is "train" or "val", val first if files decide.

    --train/--val: the files decide. --val-first N: the first N documents are val (the challenge's
    own rule). --val-fraction F: the hash of the text decides, so that a document keeps its split
    when others come or go, and copies of one text never stand in both.
    """
    for split in ("val", "train"):
        for text in read_documents(getattr(args, split), args.text_key):
            yield split, text
    documents = read_documents(args.input, args.text_key, is_split=True)
    for index, text in enumerate(documents):
        if args.val_first is not None:
            is_val = index < args.val_first
        else:
            is_val = text_hash(text) < args.val_fraction * 2**64
        yield ("val" if is_val else "train"), text


def check_splits(args):
    """Raise ValueError if a split gets no document; reads until both have one."""
    counts = {"train": 0, "val": 0}
    for split, _ in labelled_documents(args):
        counts[split] += 1
        if all(counts.values()):
            return
    empty = "val" if counts["train"] else "train"
    how = "give more text or change --val-fraction, --val-first, --train or --val"
    raise ValueError(f"{empty} gets none of {sum(counts.values())} documents; {how}")


def with_progress(labelled):
    """The same documents; on a terminal a bar counts them, if tqdm is installed."""
    with suppress(ImportError):
        from tqdm import tqdm

        return tqdm(labelled, unit=" documents", disable=None)
    return labelled


def batches(labelled):
    """Yield (split, texts) of bounded size; long documents are cut into several of their split."""
    texts = {"train": [], "val": []}
    sizes = Counter()
    for split, text in labelled:
        for part in cut(text, MAX_DOCUMENT_CHARS):
            texts[split].append(part)
            sizes[split] += len(part) + 100  # short documents have their price, too
            if sizes[split] >= BATCH_CHARS:
                yield split, texts[split]
                texts[split] = []
                sizes[split] = 0
    yield from ((split, rest) for split, rest in texts.items() if rest)


# --------------------------------------------------------------------------------------------------
# 2 Tokenizer
# --------------------------------------------------------------------------------------------------
# A tokenizer is passed around as the bytes of its .model file: the same bytes are hashed and used.


def load_tokenizer(model_proto, name, case_ops):
    """SentencePieceProcessor of the bytes of a .model file; ValueError if shards cannot use it."""
    try:
        sp = spm.SentencePieceProcessor(model_proto=model_proto)
    except RuntimeError as error:
        raise ValueError(f"{name}: not a SentencePiece model ({error})") from error
    if sp.vocab_size() > MAX_VOCAB:
        raise ValueError(f"{name}: {sp.vocab_size()} pieces; uint16 tokens hold {MAX_VOCAB}")
    if sp.bos_id() < 0:
        raise ValueError(f"{name}: has no BOS piece, which must start each document")
    has_marks = all(sp.encode(mark, out_type=str) == [mark] for mark in caseops.MARKS)
    if has_marks != case_ops:
        raise ValueError(f"{name}: --case-ops goes with a tokenizer that has its symbols as pieces")
    return sp


def tokenizer_sample(texts, max_bytes):
    """The documents of smallest hash, max_bytes of UTF-8 in all: whatever their order."""
    heap = []  # largest hash on top
    total = 0
    for text in texts:
        heapq.heappush(heap, (-text_hash(text), text))
        total += len(text.encode("utf-8"))
        while total > max_bytes and len(heap) > 1:
            total -= len(heapq.heappop(heap)[1].encode("utf-8"))
    return [text for _, text in sorted(heap, reverse=True)]


def train_tokenizer(texts, vocab_size, case_ops):
    """Train byte-fallback BPE with the challenge exporter's settings; returns .model bytes.

    texts: iterable of documents.   case_ops: train on transformed text, its symbols being pieces.
    Raises ValueError if the text does not give vocab_size pieces.
    """
    # The trainer would drop a text with a null character; the exporter replaces it, too.
    texts = (text.replace("\0", " ") for text in texts if text.strip())
    sample = tokenizer_sample(texts, TOKENIZER_SAMPLE_BYTES)
    if case_ops:
        sample = [caseops.encode(text) for text in sample]
    num_bytes = sum(len(text.encode("utf-8")) for text in sample)
    log("tokenizer_training", documents=len(sample), bytes=num_bytes)
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.999,
        required_chars="\u2581",  # without this piece, a rare space would count 3 bytes
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
        max_sentence_length=8 * MAX_DOCUMENT_CHARS,  # by default 4192 bytes: longer are dropped
        num_threads=4,  # stored in the file, so it must not depend on the machine
        minloglevel=2,
    )
    num_pieces = spm.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if num_pieces != vocab_size:
        raise ValueError(
            f"--train-tokenizer {vocab_size}: {num_bytes} bytes of text give only {num_pieces} "
            f"pieces; give more text, or --train-tokenizer {num_pieces}"
        )
    return model.getvalue()


# --------------------------------------------------------------------------------------------------
# 3 Shards
# --------------------------------------------------------------------------------------------------
# One pass over the documents: read, encode, count bytes, write. Documents are encoded one by one,
# so tokens do not depend on batches or on SentencePiece's threads.


def make_byte_counter(sp, case_ops):
    """Bytes of original text that each token of whole documents counts: (n,) uint16 -> (n,) int64.

    By the byte table of the training script, which scores are made of; with case_ops, an escaped
    symbol counts its own bytes (the table knows no context).
    """
    sys.path.append(str(DATA_DIR.parent))
    import torch
    import train_gpt

    table = train_gpt.byte_table(sp, sp.vocab_size())
    esc = sp.piece_to_id(caseops.ESC)

    def count(tokens):
        ids = torch.from_numpy(tokens.astype(np.int64))
        counts = np.zeros(len(tokens), np.int64)  # the first token is BOS
        counts[1:] = train_gpt.count_bytes(table, ids[:-1], ids[1:]).numpy()
        literal = -1
        for at in np.flatnonzero(tokens == esc) if case_ops else ():
            if at != literal:  # an ESC behind ESC is the literal
                literal = at + 1
                counts[literal] = len(caseops.ESC.encode())
        return counts

    return count


def encode(sp, texts, case_ops):
    """Encode documents (BOS, the text, no EOS): tokens (n,) uint16, and a Counter of sums.

    text_bytes: UTF-8 as read.   decoded_bytes: UTF-8 of the source text as the tokenizer
    normalizes it (white space, Unicode forms): what correct decoding gives. It is not taken from
    the tokens, or a tokenizer that has no piece for the space would go unseen.
    """
    coded = [caseops.encode(text) for text in texts] if case_ops else texts
    if case_ops and [caseops.decode(text) for text in coded] != texts:
        raise RuntimeError("CaseOps would lose something of a document")
    with_bos = ([sp.bos_id(), *ids] for ids in sp.encode(coded, out_type=int))
    tokens = np.fromiter(itertools.chain.from_iterable(with_bos), "<u2")
    normalized = (text.replace("\u2581", " ").removeprefix(" ") for text in sp.normalize(texts))
    return tokens, Counter(
        documents=len(texts),
        tokens=len(tokens),
        text_bytes=sum(len(text.encode("utf-8")) for text in texts),
        decoded_bytes=sum(len(text.encode("utf-8")) for text in normalized),
    )


class ShardWriter:
    """Write one split's tokens as fineweb_<split>_<index>.bin files of shard_tokens each.

    A document may go on in the next shard, as in the challenge's export. `files` lists the shards.
    """

    def __init__(self, folder, split, shard_tokens):
        self.folder = folder
        self.split = split
        self.shard_tokens = shard_tokens
        self.files = []
        self._held = np.empty(0, "<u2")

    def write(self, tokens):
        """Append tokens (n,), values below 2**16; write the shards that are full."""
        self._held = np.concatenate([self._held, tokens.astype("<u2")])
        while len(self._held) >= self.shard_tokens:
            self.flush()

    def flush(self):
        """Write the next shard from the tokens held, if there are any."""
        part = self._held[: self.shard_tokens]
        self._held = self._held[self.shard_tokens :]
        if len(part):
            path = self.folder / f"fineweb_{self.split}_{len(self.files):06d}.bin"
            with open(path, "wb") as file:
                file.write(shard_header(len(part)))
                part.tofile(file)
            facts = {"name": path.name, "split": self.split, "tokens": len(part)}
            self.files.append(facts | {"bytes": path.stat().st_size, "sha256": sha256_file(path)})
            log("shard", **self.files[-1])


def write_shards(args, sp, writers):
    """Encode all documents into writers {name: ShardWriter}; returns {split: Counter of sums}.

    The writer named val_bytes, if there is one, gets the counted bytes of the validation tokens.
    Raises ValueError if the counted bytes of a split are not those of its source text.
    """
    totals = {split: Counter() for split in ("train", "val")}
    count_bytes = make_byte_counter(sp, args.case_ops)
    for split, texts in batches(with_progress(labelled_documents(args))):
        tokens, sums = encode(sp, texts, args.case_ops)
        counts = count_bytes(tokens)
        totals[split].update(sums, counted_bytes=int(counts.sum()))
        writers[split].write(tokens)
        if f"{split}_bytes" in writers:
            writers[f"{split}_bytes"].write(counts)
    for split, sums in totals.items():
        difference = sums["counted_bytes"] - sums["decoded_bytes"]
        log("check", split=split, **sums, verdict="fail" if difference else "ok")
        if difference:  # a score in bits per byte would be as wrong
            raise ValueError(
                f"{split}: bytes counted from the tokens and bytes of the source text differ by "
                f"{difference}; scores with this tokenizer would be wrong, use another"
            )
    for writer in writers.values():
        writer.flush()
    return totals


# --------------------------------------------------------------------------------------------------
# 4 Export
# --------------------------------------------------------------------------------------------------
# Everything is written into a folder inside --out and moved when all of it is there.


def manifest_text(args, tokenizer, totals, writers):
    """The manifest as JSON text; it holds no time or path, so it is reproducible."""
    if args.train:
        source = {split: [Path(path).name for path in getattr(args, split)] for split in totals}
    else:
        source = {"input": [Path(path).name for path in args.input]}
        source |= {"val_first": args.val_first, "val_fraction": args.val_fraction}
    splits = {split: dict(sums) for split, sums in totals.items()}
    for sums in splits.values():
        sums["bytes_per_token"] = round(sums["decoded_bytes"] / sums["tokens"], 5)
    manifest = {
        "format": {"magic": MAGIC, "version": VERSION, "header_bytes": HEADER_BYTES},
        "source": source,
        "shard_tokens": args.shard_tokens,
        "tokenizer": tokenizer,
        "splits": splits,
        "files": [record for writer in writers.values() for record in writer.files],
    }
    return json.dumps(manifest, indent=1) + "\n"


def export(args):
    """Do all that the checked settings in args ask for; --out stays as it was if anything fails."""
    out = Path(args.out)
    model_name = f"fineweb_{args.train_tokenizer}_bpe{'_caseops' if args.case_ops else ''}.model"
    model_proto = None
    if args.tokenizer:
        model_name = Path(args.tokenizer).name
        model_proto = Path(args.tokenizer).read_bytes()
        load_tokenizer(model_proto, args.tokenizer, args.case_ops)  # refused before other work
    model_path = out / model_name
    old_files = [*out.glob("manifest.json"), *out.glob("fineweb_*_*.bin")]
    is_other_model = model_path.exists() and model_path.read_bytes() != model_proto
    if (old_files or is_other_model) and not args.force:
        raise ValueError(f"{[*old_files, model_path][0]} is there; add --force to replace it")
    check_splits(args)
    if args.dry_run:
        sums = {split: Counter() for split in ("train", "val")}
        for split, text in with_progress(labelled_documents(args)):
            sums[split].update(documents=1, text_bytes=len(text.encode()))
        for split, found in sums.items():
            log("would_write", out=out, split=split, **found)
        return
    if model_proto is None:
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
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".prepare-") as name:
        unfinished = Path(name)
        names = ("train", "val", "val_bytes") if args.case_ops else ("train", "val")
        writers = {name: ShardWriter(unfinished, name, args.shard_tokens) for name in names}
        totals = write_shards(args, sp, writers)
        (unfinished / model_name).write_bytes(model_proto)
        manifest = manifest_text(args, tokenizer, totals, writers)
        for path in old_files:
            path.unlink()
        for path in unfinished.iterdir():
            os.replace(path, out / path.name)
        (out / "manifest.json").write_text(manifest, encoding="utf-8")
    data, model = shlex.quote(str(out)), shlex.quote(str(model_path))
    print(f"DATA_PATH={data} TOKENIZER_PATH={model} VOCAB_SIZE={sp.vocab_size()}", flush=True)


def check_settings(args):
    """Raise ValueError, naming the settings, for a combination that does not say what to do."""
    if not args.out:
        raise ValueError("give --out DIR")
    if bool(args.train) != bool(args.val) or bool(args.train) == bool(args.input):
        raise ValueError("give --train and --val, or --input alone, or --sample")
    if both := {*map(os.path.realpath, args.train)} & {*map(os.path.realpath, args.val)}:
        raise ValueError(f"{min(both)} stands in both --train and --val")
    if (args.val_fraction is not None) + (args.val_first is not None) != bool(args.input):
        raise ValueError("--input needs one of --val-fraction and --val-first; --train, none")
    if (args.tokenizer is None) == (args.train_tokenizer is None):
        raise ValueError("give one of --tokenizer FILE and --train-tokenizer VOCAB")
    if not 2 <= args.shard_tokens < 2**31:
        raise ValueError(f"--shard-tokens {args.shard_tokens}: expected 2 to 2147483647 (int32)")
    for path in map(Path, [*args.train, *args.val, *args.input]):
        path.open("rb").close()
        file_format(path)


def main(argv=None):
    """Entry point; an error is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", metavar="DIR", help="folder for shards, tokenizer and manifest.json")
    add("--sample", action="store_true", help="rebuild data/sample (or build it into --out)")
    add("--train", nargs="+", default=[], metavar="FILE", help="training split, with --val")
    add("--val", nargs="+", default=[], metavar="FILE", help="validation split")
    add("--input", nargs="+", default=[], metavar="FILE", help="files to split by a rule")
    add("--val-fraction", type=float, metavar="F", help="share of --input by hash of the text")
    add("--val-first", type=int, metavar="N", help="first N documents of --input (the challenge)")
    add("--text-key", default="text", metavar="KEY", help="JSON key or column of the text [text]")
    add("--tokenizer", metavar="FILE", help="SentencePiece .model to use")
    add("--train-tokenizer", type=int, metavar="VOCAB", help="train BPE of VOCAB pieces")
    add("--case-ops", action="store_true", help="capitals as symbols, and the sidecar of bytes")
    add("--shard-tokens", type=int, default=100_000_000, metavar="N", help="per shard [100000000]")
    add("--force", action="store_true", help="replace the shards that --out holds")
    add("--dry-run", action="store_true", help="count documents and bytes, write nothing")
    args = parser.parse_args(argv)
    if args.sample:
        args.force = args.force or not args.out  # in place, its own files are replaced
        args.out = args.out or SAMPLE_DIR
        args.tokenizer = SAMPLE_DIR / "corpus_1024_bpe.model"
        args.train = [SAMPLE_DIR / "sample_train.txt.xz"]
        args.val = [SAMPLE_DIR / "sample_val.txt.xz"]
    try:
        check_settings(args)
        export(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise SystemExit(f"prepare.py: {error}") from error


if __name__ == "__main__":
    main()
