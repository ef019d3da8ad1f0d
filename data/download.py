"""The challenge's published FineWeb shards and tokenizer, by the repository's manifest.

Run (needs `pip install huggingface_hub`; the README beside this file shows more):
    python data/download.py --variant sp1024 --train-shards 80
    MATCHED_FINEWEB_REPO_ID=user/repo python data/download.py --variant sp8192

Read in this order: main(), plan(), Fetcher.fetch().
Lands in data/datasets/fineweb10B_<variant>/ and data/tokenizers/, where train_gpt.py looks.
A file appears under its name only when it is whole: right size, right header, right SHA-256 where
the manifest or the repository publishes one. A second run fetches what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from shards import HEADER_BYTES, TOKEN_BYTES, log, sha256_file, shard_tokens

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
SHA256 = re.compile(r"[0-9a-f]{64}")
DATA_DIR = Path(__file__).resolve().parent


class DownloadError(RuntimeError):
    """A failure that trying again does not mend; its text is what the user sees."""


class Unreachable(DownloadError):
    """All tries failed: no network, or the other side is down."""


# -------------------------------------------------------------------------------------------------
# 2 Repository
# -------------------------------------------------------------------------------------------------
# The one place that talks to huggingface_hub. Anything with these two methods can stand in for it.


class HubRepository:
    """A dataset repository, at one revision.

    info(path) -> (bytes or None, sha256 or None); get(path, folder) -> Path of the fetched file.
    Both raise DownloadError where a retry is pointless (absent, not allowed) and any other
    exception where it may help.
    """

    def __init__(self, repo_id, revision):
        try:
            import huggingface_hub
        except ImportError as error:
            raise DownloadError(
                "huggingface_hub is not installed: run `pip install huggingface_hub`, then the "
                "same command"
            ) from error
        self.repo_id, self.revision, self._hub = repo_id, revision, huggingface_hub

    def _call(self, path, function):
        try:
            return function()
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
        url = self._hub.hf_hub_url
        address = {"repo_type": "dataset", "revision": self.revision}
        found = self._call(
            path, lambda: self._hub.get_hf_file_metadata(url(self.repo_id, path, **address))
        )
        # Large files carry their SHA-256 as ETag, small ones a git hash.
        etag = found.etag or ""
        return found.size, etag if SHA256.fullmatch(etag) else None

    def get(self, path, folder):
        """Fetch path into folder; returns where it lies there."""
        return Path(
            self._call(
                path,
                lambda: self._hub.hf_hub_download(
                    self.repo_id,
                    path,
                    repo_type="dataset",
                    revision=self.revision,
                    local_dir=folder,
                ),
            )
        )


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
    """Path in the repository; an empty prefix means its root."""
    return "/".join(part.strip("/") for part in (prefix, *parts) if part.strip("/"))


def variant_entries(manifest, variant, where):
    """(dataset entry, tokenizer entry) of a variant; DownloadError lists what there is instead."""
    name = f"fineweb10B_{variant}"
    datasets = {entry.get("name"): entry for entry in manifest.get("datasets", [])}
    if name not in datasets:
        raise DownloadError(
            f"{where} has no {name}; it has {', '.join(sorted(map(str, datasets))) or 'nothing'}. "
            "Choose another --variant, name a repository that publishes it with "
            "MATCHED_FINEWEB_REPO_ID, or build it: data/README.md"
        )
    tokenizers = {entry.get("name"): entry for entry in manifest.get("tokenizers", [])}
    tokenizer_name = datasets[name].get("tokenizer_name")
    if tokenizer_name not in tokenizers:
        raise DownloadError(f"{where} names tokenizer {tokenizer_name} for {name} but lists none")
    return datasets[name], tokenizers[tokenizer_name]


def checksums(entry):
    """{file name: (bytes, sha256)} of a manifest entry's optional `files` list."""
    listed = entry.get("files") or []
    return {each["name"]: (each.get("bytes"), each.get("sha256")) for each in listed}


def plan(manifest, variant, num_train, prefix, root):
    """The files of a variant, in the order they are wanted: tokenizer, validation, training.

    Raises DownloadError if the manifest lacks the variant or has fewer than num_train shards.
    """
    where = f"the manifest under {prefix!r}"
    dataset, tokenizer = variant_entries(manifest, variant, where)
    stats = dataset.get("stats") or {}
    try:
        num_val, max_train = int(stats["files_val"]), int(stats["files_train"])
    except (KeyError, TypeError, ValueError) as error:
        raise DownloadError(f"{where} has no shard counts for {variant}: {stats}") from error
    if num_train > max_train:
        raise DownloadError(
            f"{variant} has {max_train} training shards, --train-shards asks for {num_train}"
        )
    model = tokenizer.get("model_path")
    if not model:
        raise DownloadError(f"{where} lists no SentencePiece model (model_path) for {variant}")
    # Only the name decides where it is written: nothing lands outside root.
    items = [Item(remote_path(prefix, model), root / "tokenizers" / Path(model).name)]
    known, folder = checksums(dataset), f"fineweb10B_{variant}"
    for split, count in (("val", num_val), ("train", num_train)):
        for index in range(count):
            name = f"fineweb_{split}_{index:06d}.bin"
            remote = remote_path(prefix, "datasets", folder, name)
            destination = root / "datasets" / folder / name
            items.append(Item(remote, destination, *known.get(name, (None, None))))
    return items


# -------------------------------------------------------------------------------------------------
# 4 Fetching
# -------------------------------------------------------------------------------------------------
# Fetch into a staging folder on the same disk, check, rename. Threads share nothing but the log.


def check_file(path, item, has_hash_check=True):
    """Raise ValueError if a file is not what the item says: size, SHA-256, shard header."""
    found = path.stat().st_size
    if item.num_bytes is not None and found != item.num_bytes:
        raise ValueError(f"{path.name}: {found} bytes, expected {item.num_bytes}")
    if item.is_shard:
        shard_tokens(path)
    if has_hash_check and item.sha256 and (digest := sha256_file(path)) != item.sha256:
        raise ValueError(f"{path.name}: SHA-256 {digest}, expected {item.sha256}")


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

        DownloadError from within passes at once; ValueError (a failed check) counts as a try.
        """
        for attempt in range(self.retries + 1):
            try:
                return function()
            except DownloadError:
                raise
            except Exception as error:  # any: each version of the hub has its own network errors
                last, cause = error, " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if attempt < self.retries:
                wait = min(2.0**attempt, MAX_WAIT_SECONDS)
                log("retry", file=item.destination.name, wait=f"{wait:g}s", cause=cause)
                self.sleep(wait)
        raise Unreachable(
            f"could not fetch {item.remote} in {self.retries + 1} tries; the last: {cause}\n"
            "If this machine is offline, connect it (proxy: HTTPS_PROXY, mirror: HF_ENDPOINT) or "
            "copy data/datasets and data/tokenizers from one that is not. What is complete is "
            "kept; the same command goes on. Without any download: PRESET=sample"
        ) from last

    def fetch(self, item, renew=False):
        """Bring one item to its destination; returns bytes fetched, 0 if it was there.

        renew: fetch it even if it is there; the old file stays until the new one is whole.
        """
        if not renew and self.is_there(item):
            return 0
        item = self.published(item)

        def attempt():
            path = self.repository.get(item.remote, self.staging)
            try:
                check_file(path, item)
            except ValueError:
                path.unlink()  # or the next try would find it and take it for fetched
                raise
            return path

        path = self.retry(item, attempt)
        num_bytes = path.stat().st_size
        item.destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, item.destination)
        return num_bytes


def fetch_all(fetcher, items, workers):
    """Fetch items by worker threads, one log line per file; the first failure stops the rest."""
    started, num_bytes, num_done = time.monotonic(), 0, 0
    stop = threading.Event()

    def guarded(item):
        return None if stop.is_set() else fetcher.fetch(item)

    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(guarded, item): item for item in items}
        try:
            for future in as_completed(futures):
                got = future.result()
                num_done, num_bytes = num_done + 1, num_bytes + got
                seconds = max(time.monotonic() - started, 1e-9)
                log(
                    "fetched" if got else "kept",
                    file=futures[future].destination.name,
                    done=f"{num_done}/{len(items)}",
                    mb_s=f"{num_bytes / seconds / 1e6:.1f}",
                    eta=f"{seconds / num_done * (len(items) - num_done):.0f}s",
                )
        finally:
            stop.set()
    return num_bytes


# -------------------------------------------------------------------------------------------------
# 5 Command line
# -------------------------------------------------------------------------------------------------


def fetch_anew(fetcher, item):
    """Fetch a small file even if it is there; returns its path.

    A copy from before is not trusted: another repository's has the same name, and its owner may
    change it. It is used, with a log line, only when the repository cannot be reached.
    """
    try:
        fetcher.fetch(item, renew=True)
    except Unreachable as error:
        if not item.destination.exists():
            raise
        log("kept", file=item.destination.name, unreachable=error.__cause__)
    return item.destination


def load_manifest(fetcher, prefix, root):
    """The repository's manifest, kept as manifest.json in root."""
    item = Item(remote_path(prefix, "manifest.json"), root / "manifest.json")
    path = fetch_anew(fetcher, item)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DownloadError(f"{item.remote} of the repository is not JSON") from error


def check_source(folder, repo_id, prefix):
    """Note in folder where its shards come from; DownloadError if it holds another source's.

    Shards of two repositories have the same names; mixing them would go unseen.
    """
    note, source = folder / "source.json", {"repo_id": repo_id, "prefix": prefix}
    found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else source
    if found != source:
        raise DownloadError(
            f"{folder} holds shards of {found}; now asked for {source}. Move the folder away or "
            "name another --root"
        )
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(source) + "\n", encoding="utf-8")


def check_disk(root, shards, tokens_per_shard):
    """DownloadError if the shards still missing do not fit on root's disk."""
    missing = sum(not shard.destination.exists() for shard in shards)
    needed = missing * (HEADER_BYTES + TOKEN_BYTES * tokens_per_shard)
    free = shutil.disk_usage(root).free
    if missing and needed + SPARE_DISK_BYTES > free:
        raise DownloadError(
            f"{missing} shards need {needed / 1e9:.1f} GB, {root} has {free / 1e9:.1f} GB free; "
            "lower --train-shards or name another --root"
        )


def docs_items(fetcher, prefix, root):
    """Item of the published documents, with the SHA-256 that their sidecar gives (fetched here)."""
    name = "docs_selected.source_manifest.json"
    sidecar = fetch_anew(fetcher, Item(remote_path(prefix, name), root / name))
    sha256 = json.loads(sidecar.read_text(encoding="utf-8")).get("docs_sha256")
    docs = "docs_selected.jsonl"
    return [Item(remote_path(prefix, docs), root / docs, sha256=sha256)]


def report_tokens(items, manifest, variant):
    """Log the tokens of each split; DownloadError if the validation split is not whole."""
    dataset, _ = variant_entries(manifest, variant, "the manifest")
    for split in ("val", "train"):
        shards = [each for each in items if each.destination.name.startswith(f"fineweb_{split}_")]
        tokens = sum(shard_tokens(each.destination) for each in shards)
        log("data", split=split, shards=len(shards), tokens=tokens)
        expected = dataset["stats"].get("tokens_val") if split == "val" else None
        if expected is not None and tokens != int(expected):
            raise DownloadError(
                f"the validation split has {tokens} tokens, the manifest says {expected}; remove "
                f"{shards[0].destination.parent if shards else 'the folder'} and run again"
            )


def download(args, fetcher, repo_id, prefix):
    """Do what args ask for; prints the settings that train_gpt.py then needs."""
    root = Path(args.root).resolve()
    small = replace(fetcher, retries=min(fetcher.retries, SMALL_FILE_RETRIES))
    manifest = load_manifest(small, prefix, root)
    tokenizer, *shards = plan(manifest, args.variant, args.train_shards, prefix, root)
    folder = root / "datasets" / f"fineweb10B_{args.variant}"
    check_disk(root, shards, int(manifest.get("shard_size") or 0))
    check_source(folder, repo_id, prefix)
    fetch_anew(small, tokenizer)
    docs = docs_items(small, prefix, root) if args.with_docs else []
    started = time.monotonic()
    num_bytes = fetch_all(fetcher, shards + docs, args.workers)
    report_tokens(shards, manifest, args.variant)
    log("done", bytes=num_bytes, time=f"{time.monotonic() - started:.1f}s")
    print(f"DATA_PATH={folder} TOKENIZER_PATH={tokenizer.destination}")


def build_parser():
    """The argparse parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--variant", default="sp1024", help="sp<vocabulary>: sp1024, sp4096, sp8192 [sp1024]")
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
        if not re.fullmatch(r"sp[0-9]+", args.variant):
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
    main()
