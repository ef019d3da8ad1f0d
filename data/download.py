"""The challenge's published FineWeb shards and tokenizer, by the repository's manifest.

Run (needs `pip install huggingface_hub`; the README beside this file shows more):
    python data/download.py --variant sp1024 --train-shards 80
    MATCHED_FINEWEB_REPO_ID=user/repo python data/download.py --variant sp8192

Read in this order: main(), download(), plan(), Fetcher.fetch().
Lands in data/datasets/fineweb10B_<variant>/ and data/tokenizers/, where train_gpt.py looks.
A file appears under its name only when it is whole: right size, right header, right SHA-256 where
the manifest or the repository publishes one. A second run goes on where the first stopped, in the
middle of a file too.
"""

from __future__ import annotations

import argparse
import errno
import http
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from shards import log, sha256_file, shard_tokens

# -------------------------------------------------------------------------------------------------
# 1 Constants
# -------------------------------------------------------------------------------------------------
# Names and defaults are the challenge's own, so its instructions work here unchanged.

DEFAULT_REPO_ID = "willdepueoai/parameter-golf"
DEFAULT_PREFIX = "datasets"
MAX_WAIT_SECONDS = 30.0  # waits between tries are 1, 2, 4 ... up to this
SMALL_FILE_RETRIES = 2  # these come first; a machine without network should be told soon
SPARE_DISK_BYTES = 2**30  # left free besides what will be fetched
REFUSALS = (400, 401, 403, 404, 410)  # HTTP statuses that another try does not change
DISK_ERRORS = (  # nor these of the local disk
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
MAX_SHARDS = 10**6  # shard names have six digits
SHA256 = re.compile(r"[0-9a-f]{64}")
DATA_DIR = Path(__file__).resolve().parent


class DownloadError(RuntimeError):
    """A failure that trying again does not mend; its text is what the user sees."""


class Unreachable(DownloadError):
    """All tries failed: no network, or the other side is down."""


WITHOUT = (
    "If this machine is offline, connect it (proxy: HTTPS_PROXY, mirror: HF_ENDPOINT) or copy "
    "data/datasets and data/tokenizers from one that is not. What has arrived is kept; the same "
    "command goes on. Without any download: PRESET=sample"
)


# -------------------------------------------------------------------------------------------------
# 2 Repository
# -------------------------------------------------------------------------------------------------
# The one place that talks to huggingface_hub. Anything with these two methods can stand in for it.


class HubRepository:
    """A dataset repository, at one revision; endpoint: None for the hub, or another server's URL.

    info(path) -> (bytes or None, sha256 or None); get(path, part): fetch into the file part.
    Both raise DownloadError where a retry is pointless (absent, not allowed) and any other
    exception where it may help.
    """

    def __init__(self, repo_id, revision, endpoint=None):
        how = "run `pip install --upgrade huggingface_hub`, then the same command"
        try:
            import huggingface_hub.errors
            import huggingface_hub.utils
        except ImportError as error:
            raise DownloadError(f"huggingface_hub is not installed: {how}") from error
        if int(huggingface_hub.__version__.split(".")[0]) < 1:
            found = huggingface_hub.__version__
            raise DownloadError(f"huggingface_hub {found} is older than 1.0: {how}")
        self.repo_id, self.revision, self.endpoint = repo_id, revision, endpoint
        self._hub = huggingface_hub

    def _url(self, path):
        address = {"repo_type": "dataset", "revision": self.revision, "endpoint": self.endpoint}
        return self._hub.hf_hub_url(self.repo_id, path, **address)

    def _call(self, path, function):
        try:
            return function()
        except self._hub.errors.OfflineModeIsEnabled as error:
            raise Unreachable(f"HF_HUB_OFFLINE is set; unset it to download\n{WITHOUT}") from error
        except self._hub.errors.HFValidationError as error:
            raise DownloadError(f"MATCHED_FINEWEB_REPO_ID {self.repo_id!r}: {error}") from error
        except self._hub.errors.HfHubHTTPError as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status not in REFUSALS:
                raise
            raise DownloadError(
                f"{path} is not in repository {self.repo_id} at revision {self.revision}, or you "
                f"may not read it (HTTP status {status}); check MATCHED_FINEWEB_REPO_ID, "
                "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX, --revision and HF_TOKEN"
            ) from error

    def info(self, path):
        """Published size in bytes and SHA-256 of a file; None where the repository has none."""
        ask = self._hub.get_hf_file_metadata
        found = self._call(path, lambda: ask(self._url(path), endpoint=self.endpoint))
        # Large files carry their SHA-256 as ETag, small ones a git hash.
        etag = found.etag or ""
        return found.size, etag if SHA256.fullmatch(etag) else None

    def get(self, path, part):
        """Append to the file part what it lacks of path.

        By the hub's session and headers; its own hf_hub_download (2.4) drops what a cut transfer
        has brought, 200 MB of a shard at worst.
        """
        self._call(path, lambda: self._append(path, part))

    def _append(self, path, part):
        here = part.stat().st_size if part.exists() else 0
        headers = self._hub.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
        if here:
            headers["Range"] = f"bytes={here}-"
        get = self._hub.utils.get_session().stream
        with get("GET", self._url(path), headers=headers, follow_redirects=True) as answer:
            self._hub.utils.hf_raise_for_status(answer)
            is_rest = here and answer.status_code == http.HTTPStatus.PARTIAL_CONTENT
            with open(part, "ab" if is_rest else "wb") as file:
                for block in answer.iter_raw():
                    file.write(block)


# -------------------------------------------------------------------------------------------------
# 3 Plan
# -------------------------------------------------------------------------------------------------
# The manifest says how many shards a variant has and which tokenizer it belongs to; only the file
# names follow from the layout.


@dataclass(frozen=True)
class Item:
    """One file: where it is in the repository, where it goes, and what it must be."""

    remote: str
    destination: Path
    num_bytes: int | None = None
    sha256: str | None = None

    @property
    def is_shard(self):
        """Whether the file must start with a shard header."""
        return self.destination.suffix == ".bin"


def remote_path(prefix, *parts):
    """Path in the repository, an empty prefix being its root.

    Raises DownloadError for a path that would lead out of it, or out of the local folder.
    """
    path = "/".join(part.strip("/") for part in (prefix, *parts) if part.strip("/"))
    if not path or {"..", "."} & set(path.split("/")) or re.search(r"[\\:\x00-\x1f]", path):
        raise DownloadError(f"unsafe path {path!r} in the manifest or in the prefix: refused")
    return path


def listed(manifest, key, where):
    """The objects under key of a manifest, by their names; DownloadError if there is no list."""
    entries = manifest.get(key) if isinstance(manifest, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DownloadError(f"{where} has no list of {key}: it is not in the challenge's layout")
    return {str(entry.get("name")): entry for entry in entries}


def variant_entries(manifest, variant, where):
    """(dataset entry, tokenizer entry) of a variant; DownloadError lists what there is instead."""
    name = f"fineweb10B_{variant}"
    datasets, tokenizers = (listed(manifest, key, where) for key in ("datasets", "tokenizers"))
    if name not in datasets:
        raise DownloadError(
            f"{where} has no {name}; it has {', '.join(sorted(datasets)) or 'nothing'}. "
            "Choose another --variant, name a repository that publishes it with "
            "MATCHED_FINEWEB_REPO_ID, or build it: data/README.md"
        )
    tokenizer_name = str(datasets[name].get("tokenizer_name"))
    if tokenizer_name not in tokenizers:
        raise DownloadError(
            f"{where} names tokenizer {tokenizer_name} for {name}, but lists "
            f"{', '.join(sorted(tokenizers)) or 'none'}"
        )
    return datasets[name], tokenizers[tokenizer_name]


def shard_counts(dataset, where):
    """(validation shards, training shards) that a manifest's dataset entry promises."""
    stats = dataset.get("stats") or {}
    try:
        counts = int(stats["files_val"]), int(stats["files_train"])
    except (KeyError, TypeError, ValueError) as error:
        raise DownloadError(f"{where} gives no shard counts, but stats {stats}") from error
    if not (1 <= counts[0] < MAX_SHARDS and 0 <= counts[1] < MAX_SHARDS):
        raise DownloadError(f"{where} promises impossible shard counts: {stats}")
    return counts


def plan(manifest, variant, num_train, prefix, root):
    """The files of a variant, in the order they are wanted: tokenizer, validation, training.

    Raises DownloadError if the manifest lacks the variant or has fewer than num_train shards.
    """
    where = f"the manifest under {prefix!r}"
    dataset, tokenizer = variant_entries(manifest, variant, where)
    num_val, max_train = shard_counts(dataset, where)
    if num_train > max_train:
        raise DownloadError(
            f"{variant} has {max_train} training shards, --train-shards asks for {num_train}"
        )
    model = tokenizer.get("model_path")
    if not isinstance(model, str) or not model:
        raise DownloadError(f"{where} lists no SentencePiece model (model_path) for {variant}")
    # Only the name decides where it is written: nothing lands outside root.
    remote = remote_path(prefix, model)
    items = [Item(remote, root / "tokenizers" / PurePosixPath(remote).name)]
    sums, folder = checksums(dataset, where), f"fineweb10B_{variant}"
    # A text transform comes with the bytes of the original text, one count per validation token.
    transformed = tokenizer.get("text_transform", "identity") != "identity" or "caseops" in variant
    splits = [("val", num_val), *([("val_bytes", num_val)] if transformed else [])]
    for split, count in (*splits, ("train", num_train)):
        for index in range(count):
            name = f"fineweb_{split}_{index:06d}.bin"
            destination = root / "datasets" / folder / name
            remote = remote_path(prefix, "datasets", folder, name)
            items.append(Item(remote, destination, *sums.get(name, (None, None))))
    return items


def checksums(dataset, where):
    """{file name: (bytes, sha256)} of a manifest's dataset entry, which may list its files."""
    sums = {}
    for each in dataset.get("files") or []:
        if not isinstance(each, dict):
            raise DownloadError(f"{where} lists files as {each!r}, expected objects")
        num_bytes, sha256 = each.get("bytes"), str(each.get("sha256") or "").lower()
        if sha256 and not SHA256.fullmatch(sha256) or not isinstance(num_bytes, int | None):
            raise DownloadError(f"{where} has an impossible size or SHA-256: {each}")
        sums[each.get("name")] = num_bytes, sha256 or None
    return sums


# -------------------------------------------------------------------------------------------------
# 4 Fetching
# -------------------------------------------------------------------------------------------------
# Fetch into a staging folder on the same disk, check, rename. Threads share nothing but the log.


def check_file(path, item, has_hash_check=True):
    """Raise ValueError if a file is not what the item says: size, SHA-256, shard header, JSON."""
    name, found = item.destination.name, path.stat().st_size
    if item.num_bytes is not None and found != item.num_bytes:
        raise ValueError(f"{name}: {found} bytes, expected {item.num_bytes}")
    if item.is_shard:
        shard_tokens(path)
    if item.destination.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{name}: not whole JSON ({error})") from error
    if has_hash_check and item.sha256 and (digest := sha256_file(path)) != item.sha256:
        raise ValueError(f"{name}: SHA-256 {digest}, expected {item.sha256}")


@dataclass(frozen=True)
class Fetcher:
    """Fetches items of one repository, by way of the folder staging, with checks and retries.

    verify: hash files that are already there, too.   sleep: waits so many seconds.
    """

    repository: object
    staging: Path
    retries: int = 5
    verify: bool = False
    sleep: Callable = time.sleep

    def is_there(self, item):
        """Whether the destination already holds the item; a damaged file is logged, and is not.

        The size and header are looked at always, the hash (seconds per GB) with verify only:
        files were hashed before they got their name.
        """
        if not item.destination.is_file():
            return False
        try:
            expected = self.published(item) if self.verify else item
            check_file(item.destination, expected, has_hash_check=self.verify)
            return True
        except ValueError as error:
            log("replace", file=item.destination.name, reason=error)
            return False

    def published(self, item):
        """The item with size and SHA-256 filled in from the repository where it gives none."""
        if item.num_bytes is not None and item.sha256:
            return item
        num_bytes, sha256 = self.retry(item, lambda: self.repository.info(item.remote))
        return replace(
            item,
            num_bytes=num_bytes if item.num_bytes is None else item.num_bytes,
            sha256=item.sha256 or sha256,
        )

    def retry(self, item, function):
        """function(), tried again with growing waits; Unreachable when tries run out.

        DownloadError from within passes at once, and so does a fault of the disk; ValueError (a
        failed check) counts as a try, and when it is the last, what arrives is to blame.
        """
        for attempt in range(self.retries + 1):
            try:
                return function()
            except DownloadError:
                raise
            except Exception as error:  # any: each version of the hub has its own network errors
                if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                    raise DownloadError(
                        f"{item.destination}: cannot be written ({error.strerror}); mend that or "
                        "name another --root. What has arrived is kept"
                    ) from error
                last, cause = error, " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if attempt < self.retries:
                wait = min(2.0**attempt, MAX_WAIT_SECONDS)
                log("retry", file=item.destination.name, wait=f"{wait:g}s", cause=cause)
                self.sleep(wait)
        tries = f"{self.retries + 1} tries"
        if isinstance(last, ValueError):
            raise DownloadError(
                f"{item.remote}: what arrives is not what the manifest or the repository says, in "
                f"{tries}; the last: {cause}"
            ) from last
        raise Unreachable(
            f"could not fetch {item.remote} in {tries}; the last: {cause}\n{WITHOUT}"
        ) from last

    def fetch(self, item):
        """Bring one item, its size and hash known if published, to its destination.

        A file that is there is replaced when the new one is whole. Returns the bytes fetched.
        """
        # Another version of the file must not be continued: the name tells them apart.
        version = f"{(item.sha256 or '')[:16]}.{item.num_bytes or 0}"
        part = self.staging / f"{item.destination.name}.{version}.part"

        def attempt():
            here = part.stat().st_size if part.exists() else 0
            if item.num_bytes is None or here > item.num_bytes:
                part.unlink(missing_ok=True)  # nothing says that it can be continued
            if here == 0 or here != item.num_bytes:
                self.repository.get(item.remote, part)
            try:
                check_file(part, item)
            except ValueError:
                part.unlink()  # or the next try would go on with it
                raise

        self.retry(item, attempt)
        num_bytes = part.stat().st_size
        item.destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, item.destination)
        return num_bytes


def folder_bytes(folder):
    """Bytes of all files below folder; one that goes away meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


class ProgressBar:
    """A line on a terminal with share, bytes, speed and time left, drawn by a thread while open.

    total: bytes wanted.   landed: () -> bytes that are here.   Where stream is no terminal nothing
    is drawn: the log has a line per file.
    """

    SECONDS, WIDTH = 0.5, 24

    def __init__(self, total, landed, stream=None):
        self.total, self.landed, self.stream = total, landed, stream or sys.stderr
        self.started, self.first, self.most = time.monotonic(), landed(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def text(self):
        """The line as it should stand now."""
        self.most = here = max(self.most, min(self.landed(), self.total))  # never back
        speed = (here - self.first) / max(time.monotonic() - self.started, 1e-9)
        share = here / self.total if self.total else 1.0
        left = f"{(self.total - here) / speed:.0f} s left" if speed > 0 else "waiting"
        bar = ("#" * int(share * self.WIDTH)).ljust(self.WIDTH, ".")
        sizes = f"{here / 1e9:.2f}/{self.total / 1e9:.2f} GB"
        return f"[{bar}] {share:4.0%} {sizes} {speed / 1e6:.1f} MB/s {left}"

    def _draw(self):
        self.stream.write("\r\x1b[K" + self.text())
        self.stream.flush()

    def _run(self):
        while not self._stop.wait(self.SECONDS):
            self._draw()

    def __enter__(self):
        if self.stream.isatty():
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            self._draw()
            self.stream.write("\n")


def fetch_all(fetcher, items, workers):
    """Fetch items by worker threads, one log line per file; the first failure stops the rest."""
    moved, wanted = 0, sum(item.num_bytes or 0 for item in items)
    stop, started = threading.Event(), time.monotonic()

    def guarded(item):
        return 0 if stop.is_set() else fetcher.fetch(item)

    def landed():
        return moved + folder_bytes(fetcher.staging)

    pool, is_interrupted = ThreadPoolExecutor(workers), False
    try:
        with ProgressBar(wanted, landed):
            futures = {pool.submit(guarded, item): item for item in items}
            for num_done, future in enumerate(as_completed(futures), 1):
                moved += future.result()
                seconds = max(time.monotonic() - started, 1e-9)
                log(
                    "fetched",
                    file=futures[future].destination.name,
                    done=f"{num_done}/{len(items)}",
                    mb_s=f"{moved / seconds / 1e6:.1f}",
                    eta=f"{seconds / max(moved, 1) * max(wanted - moved, 0):.0f}s",
                )
    except KeyboardInterrupt:
        is_interrupted = True  # then the process ends at once, with its threads
        raise
    finally:
        stop.set()
        pool.shutdown(wait=not is_interrupted, cancel_futures=True)
    return moved


# -------------------------------------------------------------------------------------------------
# 5 Command line
# -------------------------------------------------------------------------------------------------


def fetch_anew(fetcher, item):
    """Fetch a small file even if it is there; returns its path.

    A copy from before is not trusted: another repository's has the same name, and its owner may
    change it. It is used, with a log line, only when the repository cannot be reached.
    """
    try:
        fetcher.fetch(fetcher.published(item))
    except Unreachable as error:
        if not item.destination.exists():
            raise
        log("kept", file=item.destination.name, unreachable=error.__cause__)
    return item.destination


def load_json(fetcher, prefix, name, root):
    """A JSON file of the repository, kept in root."""
    path = fetch_anew(fetcher, Item(remote_path(prefix, name), root / name))
    return json.loads(path.read_text(encoding="utf-8"))


def check_source(folder, source):
    """Note in folder where its shards come from; DownloadError if it holds another source's.

    source: dict of repo_id, prefix, revision. Shards of two repositories have the same names;
    mixing them would go unseen.
    """
    note = folder / "source.json"
    try:
        found = json.loads(note.read_bytes()) if note.exists() else source
    except ValueError as error:
        raise DownloadError(f"{note} is damaged ({error}); remove the folder") from error
    if found != source:
        raise DownloadError(
            f"{folder} holds shards of {found}; now asked for {source}. Move the folder away or "
            "name another --root"
        )
    folder.mkdir(parents=True, exist_ok=True)
    fresh = note.with_suffix(".part")
    fresh.write_text(json.dumps(source) + "\n", encoding="utf-8")
    os.replace(fresh, note)


def missing_items(fetcher, items, workers):
    """The items that are not there yet, with size and hash as published; logs how many are."""
    missing = [item for item in items if not fetcher.is_there(item)]
    log("kept", files=len(items) - len(missing))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(fetcher.published, missing))


def check_disk(root, missing, num_staged):
    """DownloadError if what is missing, less num_staged bytes of it, does not fit on root's disk."""
    needed = sum(item.num_bytes or 0 for item in missing) - num_staged
    free = shutil.disk_usage(root).free
    if missing and needed + SPARE_DISK_BYTES > free:
        raise DownloadError(
            f"{len(missing)} files need {needed / 1e9:.1f} GB, {root} has {free / 1e9:.1f} GB "
            "free; lower --train-shards or name another --root"
        )


def docs_item(fetcher, prefix, root):
    """Item of the published documents, with the SHA-256 that their sidecar gives (fetched here)."""
    facts = load_json(fetcher, prefix, "docs_selected.source_manifest.json", root)
    sha256 = facts.get("docs_sha256") if isinstance(facts, dict) else None
    docs = "docs_selected.jsonl"
    return Item(remote_path(prefix, docs), root / docs, sha256=sha256)


def report_tokens(shards, manifest, variant):
    """Log the tokens of each split; DownloadError if the validation split is not whole."""
    dataset, _ = variant_entries(manifest, variant, "the manifest")
    folder, tokens = shards[0].destination.parent, {}
    for split in ("val", "val_bytes", "train"):
        name = re.compile(rf"fineweb_{split}_[0-9]+\.bin")
        paths = [each.destination for each in shards if name.fullmatch(each.destination.name)]
        if paths:
            tokens[split] = sum(map(shard_tokens, paths))
            log("data", split=split, shards=len(paths), tokens=tokens[split])
    expected = {"the manifest": dataset["stats"].get("tokens_val")}
    expected["fineweb_val_bytes_*.bin"] = tokens.get("val_bytes")
    for source, count in expected.items():
        if count is not None and str(tokens["val"]) != str(count):
            raise DownloadError(
                f"the validation split has {tokens['val']} tokens, {source} {count}; remove "
                f"{folder} and run again"
            )


def download(args, fetcher, repo_id, prefix):
    """Do what args ask for; prints the settings that train_gpt.py then needs."""
    root, started = Path(args.root).resolve(), time.monotonic()
    small = replace(fetcher, retries=min(fetcher.retries, SMALL_FILE_RETRIES))
    manifest = load_json(small, prefix, "manifest.json", root)
    tokenizer, *shards = plan(manifest, args.variant, args.train_shards, prefix, root)
    folder = shards[0].destination.parent
    check_source(folder, {"repo_id": repo_id, "prefix": prefix, "revision": args.revision})
    fetch_anew(small, tokenizer)
    docs = [docs_item(small, prefix, root)] if args.with_docs else []
    missing = missing_items(fetcher, shards + docs, args.workers)
    check_disk(root, missing, folder_bytes(fetcher.staging))
    num_bytes = fetch_all(fetcher, missing, args.workers)
    report_tokens(shards, manifest, args.variant)
    log("done", bytes=num_bytes, time=f"{time.monotonic() - started:.1f}s")
    vocab_size = re.match("sp([0-9]+)", args.variant)[1]
    print(f"DATA_PATH={folder} TOKENIZER_PATH={tokenizer.destination} VOCAB_SIZE={vocab_size}")


def build_parser():
    """The argparse parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--variant", default="sp1024", help="sp1024, sp4096, sp8192 or as published [sp1024]")
    add("--train-shards", type=int, default=80, metavar="N", help="of 100 M tokens, 200 MB [80]")
    add("--with-docs", action="store_true", help="also the documents (JSONL, tens of GB)")
    add("--root", default=DATA_DIR, metavar="DIR", help="folder that gets datasets/ [data]")
    add("--revision", default="main", help="branch, tag or commit of the repository [main]")
    add("--workers", type=int, default=4, metavar="N", help="files fetched at a time [4]")
    add("--retries", type=int, default=5, metavar="N", help="further tries per file [5]")
    add("--verify", action="store_true", help="hash files that are already there, too")
    return parser


def main(argv=None, repository=None, sleep=time.sleep):
    """Entry point. repository and sleep replace the hub and the clock in tests.

    One line on stderr and exit code 1 on an error.
    """
    args = build_parser().parse_args(argv)
    repo_id = os.environ.get("MATCHED_FINEWEB_REPO_ID", DEFAULT_REPO_ID)
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX)
    try:
        if not re.fullmatch(r"sp[0-9]+(_[0-9A-Za-z_]+)?", args.variant):
            raise DownloadError(f"--variant {args.variant}: expected sp<vocabulary>, as sp1024")
        for name in ("train_shards", "retries", "workers"):
            if getattr(args, name) < (name == "workers"):
                raise DownloadError(f"--{name.replace('_', '-')} {getattr(args, name)}: too small")
        repository = repository or HubRepository(repo_id, args.revision)
        staging = Path(args.root).resolve() / f".download-{args.variant}"
        staging.mkdir(parents=True, exist_ok=True)
        fetcher = Fetcher(repository, staging, args.retries, args.verify, sleep)
        download(args, fetcher, repo_id, prefix)
        shutil.rmtree(staging, ignore_errors=True)
    except (DownloadError, OSError) as error:
        raise SystemExit(f"download.py: {error}") from error


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ndownload.py: stopped; the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)  # at once: a normal exit waits for the threads' files
