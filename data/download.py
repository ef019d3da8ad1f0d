"""Fetch the challenge's published FineWeb shards and tokenizer from the Hugging Face hub.

Run (needs `pip install --upgrade huggingface_hub`; data/README.md shows more):
    python data/download.py --variant sp8192 --train-shards 80
    MATCHED_FINEWEB_REPO_ID=user/repo python data/download.py --variant sp512 --dry-run

Read in this order: main(), download(), plan(), fetch().
Shards land in data/datasets/fineweb10B_<variant>/, the tokenizer in data/tokenizers/: where
train_gpt.py looks. huggingface_hub fetches into data/datasets/.download/; a file moves to its place
once its shard header, and its SHA-256 where the manifest has one, are right. A second run fetches
only what is missing.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `python -m data.download`

from shards import log, sha256_file, shard_tokens  # noqa: E402

# The variables' names are the challenge's own, so its instructions work here unchanged.  Its
# repository has the small vocabularies; participants published the others.
DEFAULT_REPO_ID = "willdepueoai/parameter-golf"
REPO_IDS = {
    "sp8192": "kevclark/parameter-golf",
    "sp8192_lossless_caps_caseops_v1_reserved": "romeerp/parameter-golf-caseops-v1",
}
DEFAULT_PREFIX = "datasets"
DATA_DIR = Path(__file__).resolve().parent
OFFLINE = (
    "if this machine is offline, connect it (HTTPS_PROXY, or a mirror by HF_ENDPOINT) or copy "
    "data/datasets and data/tokenizers from another one; PRESET=sample needs no download"
)


def one_line(error):
    """An exception as one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def remote_name(*parts):
    """Name of a file in the repository; ValueError if it could lead out of a folder."""
    name = "/".join(part for part in parts if part)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or {".", ".."} & set(name.split("/")):
        raise ValueError(f"unsafe file name {name!r} in the manifest or the prefix: refused")
    return name


def fetch(args, names, dry_run=False):
    """Bring files of the repository into args.staging; progress bars are huggingface_hub's.

    dry_run: fetch nothing; returns the hub's list of DryRunFileInfo.
    Raises OSError with one line of text if the hub is not reached or lacks a file.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise OSError("first run `pip install --upgrade huggingface_hub`") from error
    where = f"dataset {args.repo_id} at revision {args.revision}"
    try:
        found = snapshot_download(
            args.repo_id,
            repo_type="dataset",
            revision=args.revision,
            local_dir=args.staging,
            allow_patterns=names,
            max_workers=args.workers,
            dry_run=dry_run,
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise OSError(
            f"{where} does not exist or is closed to you; check MATCHED_FINEWEB_REPO_ID, "
            f"--revision and HF_TOKEN ({one_line(error)})"
        ) from error
    except (OSError, RuntimeError, errors.HTTPError, errors.XetDownloadError) as error:
        raise OSError(f"download failed: {OFFLINE} ({one_line(error)})") from error
    if dry_run:
        arrived = {info.filename for info in found}
    else:  # an unreachable hub is no error for huggingface_hub if the folder holds any file
        arrived = {name for name in names if (args.staging / name).is_file()}
    if absent := set(names) - arrived:
        raise OSError(
            f"{where} has no {min(absent)}, or the hub cannot be reached: check "
            f"MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX; {OFFLINE}"
        )
    return found


def plan(manifest, args):
    """(tokenizer's name, stats, {shard's name: SHA-256 or None}) of a variant, by the manifest.

    Raises ValueError if the manifest lacks the variant or has fewer shards than asked for.
    """
    folder = f"fineweb10B_{args.variant}"
    datasets = {entry["name"]: entry for entry in manifest["datasets"]}
    if folder not in datasets:
        raise ValueError(
            f"{args.repo_id} has no {folder}, but {', '.join(sorted(datasets))}; choose one with "
            "--variant, or another repository with MATCHED_FINEWEB_REPO_ID"
        )
    dataset = datasets[folder]
    tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
    tokenizer = tokenizers[dataset["tokenizer_name"]]
    stats = dataset["stats"]
    num_val = int(stats["files_val"])
    num_train = int(stats["files_train"])
    if num_val < 1 or num_train < args.train_shards:
        has = f"{num_val} validation and {num_train} training shards"
        raise ValueError(f"{args.variant} has {has}; --train-shards {args.train_shards}")
    counts = {"val": num_val, "train": args.train_shards}
    if tokenizer.get("text_transform", "identity") != "identity" or "caseops" in args.variant:
        counts["val_bytes"] = num_val  # bytes of the original text, one count a validation token
    sums = {entry["name"]: entry.get("sha256") for entry in dataset.get("files", [])}
    shards = {}
    for split, count in counts.items():
        for index in range(count):
            file = f"fineweb_{split}_{index:06d}.bin"
            shards[remote_name(args.prefix, "datasets", folder, file)] = sums.get(file)
    return remote_name(args.prefix, tokenizer["model_path"]), stats, shards


def check(path, sha256):
    """Raise ValueError if a file has a wrong shard header, or not the SHA-256 that is given."""
    if path.suffix == ".bin":
        shard_tokens(path)
    if sha256 and sha256_file(path) != sha256:
        raise ValueError(f"{path.name}: its SHA-256 is not the manifest's {sha256}; run again")


def is_whole(path, sha256):
    """Whether a file is there and right; a damaged one is logged and will be replaced."""
    if path.is_file():
        try:
            check(path, sha256)
            return True
        except ValueError as error:
            log("replace", file=path.name, reason=error)
    return False


def download(args):
    """Do what args ask for; prints the settings that train_gpt.py then needs."""
    manifest_name = remote_name(args.prefix, "manifest.json")
    fetch(args, [manifest_name])
    try:
        manifest = json.loads((args.staging / manifest_name).read_bytes())
        tokenizer, stats, shards = plan(manifest, args)
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"manifest.json has an unknown layout ({one_line(error)})") from error
    folder = args.root / "datasets" / f"fineweb10B_{args.variant}"
    places = {name: folder / PurePosixPath(name).name for name in shards}
    source = {"repo_id": args.repo_id, "prefix": args.prefix, "revision": args.revision}
    note = folder / "source.json"
    if note.is_file() and json.loads(note.read_bytes()) != source:  # shards have the same names
        raise ValueError(f"{note} names another source than {source}; move its folder away")
    if args.with_docs:
        docs = "docs_selected.jsonl"
        places[remote_name(args.prefix, docs)] = args.root / docs
    missing = [name for name, path in places.items() if not is_whole(path, shards.get(name))]
    log("kept", files=len(places) - len(missing))
    if args.dry_run:
        infos = fetch(args, [tokenizer, *missing], dry_run=True)
        for info in sorted(infos, key=lambda info: info.filename):
            log("would_fetch", file=info.filename, bytes=info.file_size)
        log("would_fetch_in_all", bytes=sum(info.file_size or 0 for info in infos))
        return
    fetch(args, [tokenizer])
    model = args.root / "tokenizers" / PurePosixPath(tokenizer).name
    if model.is_file() and model.read_bytes() != (args.staging / tokenizer).read_bytes():
        raise ValueError(f"{model} is another tokenizer than {args.repo_id} has; move it away")
    folder.mkdir(parents=True, exist_ok=True)
    model.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.staging / tokenizer, model)
    note.write_text(json.dumps(source) + "\n", encoding="utf-8")
    if missing:
        fetch(args, missing)
    for name in missing:
        try:
            check(args.staging / name, shards.get(name))
        except ValueError:
            (args.staging / name).unlink()  # the next run would take it for complete
            raise
        os.replace(args.staging / name, places[name])
    tokens = sum(map(shard_tokens, folder.glob("fineweb_val_[0-9]*.bin")))
    if tokens != stats.get("tokens_val", tokens):
        raise ValueError(f"{folder} has {tokens} validation tokens, the manifest says {stats}")
    vocab_size = re.match("sp([0-9]+)", args.variant)[1]
    folder, model = shlex.quote(str(folder)), shlex.quote(str(model))
    print(f"DATA_PATH={folder} TOKENIZER_PATH={model} VOCAB_SIZE={vocab_size}")


def main(argv=None):
    """Entry point; an error is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--variant", default="sp8192", help="sp1024, sp8192 or as published [sp8192]")
    add("--train-shards", type=int, default=80, metavar="N", help="of 100 M tokens, 200 MB [80]")
    add("--with-docs", action="store_true", help="also the documents (JSONL, tens of GB)")
    add("--root", type=Path, default=DATA_DIR, metavar="DIR", help="gets datasets/ [data]")
    add("--revision", default="main", help="branch, tag or commit of the repository [main]")
    add("--workers", type=int, default=8, metavar="N", help="files fetched at a time [8]")
    add("--dry-run", action="store_true", help="list what would be fetched, with sizes")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"sp[0-9]+(_[0-9A-Za-z_]+)?", args.variant):
        parser.error(f"--variant {args.variant}: expected sp<vocabulary>, such as sp8192")
    default = REPO_IDS.get(args.variant, DEFAULT_REPO_ID)
    args.repo_id = os.environ.get("MATCHED_FINEWEB_REPO_ID", default)
    args.prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX).strip("/")
    args.root = args.root.resolve()
    # A folder for each source: the manifest of one must not stand in for another's.
    source = re.sub(r"[^\w.-]+", "--", f"{args.repo_id}@{args.revision}")
    args.staging = args.root / "datasets" / ".download" / source
    try:
        download(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"download.py: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("download.py: stopped; the same command continues") from None


if __name__ == "__main__":
    main()
