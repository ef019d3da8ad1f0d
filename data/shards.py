"""What prepare.py and download.py share: the shard format, file hashes, log lines."""

import hashlib
import struct

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 1024  # int32[256]: magic, version, number of tokens, zeros
TOKEN_BYTES = 2  # uint16, little endian


def log(event, **values):
    """Print one `event key:value ...` line, the grammar of the training log."""
    pairs = (f"{key}:{'_'.join(str(value).split())}" for key, value in values.items())
    print(event, *pairs, flush=True)


def sha256_file(path):
    """Hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def shard_header(num_tokens):
    """The header of a shard of num_tokens tokens, HEADER_BYTES bytes."""
    return struct.pack("<3i", MAGIC, VERSION, num_tokens).ljust(HEADER_BYTES, b"\0")


def shard_tokens(path):
    """Token count of a shard; ValueError if magic, version, count and file size do not agree."""
    with open(path, "rb") as file:
        head = file.read(12)
    if len(head) < 12:
        raise ValueError(f"{path.name}: {len(head)} bytes, too short for a shard header")
    magic, version, count = struct.unpack("<3i", head)
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(
            f"{path.name}: header {magic}, {version}; expected {MAGIC}, {VERSION}: not a shard"
        )
    found = path.stat().st_size
    expected = HEADER_BYTES + TOKEN_BYTES * count
    if found != expected:
        raise ValueError(f"{path.name}: {found} bytes, expected {expected} for {count} tokens")
    return count
