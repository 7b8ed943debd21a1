"""``vllm-xlayer verify FOLDER`` and ``vllm-xlayer tier ls|stat|purge FOLDER``: look at a disk tier, clean it.

All of it may be done while engines use the folder: an entry that goes away is a miss for them.
"""

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .files import SUFFIX, DiskFiles, open_entry
from .format import (
    HEADER_BYTES,
    OLD_FORMAT,
    EntryError,
    TierIdentity,
    check_header,
    check_payload,
    decode_header,
)
from .store import STALE_SECONDS

_NAMES = tuple(field.name for field in fields(TierIdentity))
_PIECE = 1 << 20
"""Bytes read at a time: a file may be larger than memory."""


@dataclass(frozen=True)
class File:
    """One file of a disk tier."""

    files: DiskFiles
    path: str
    """Below the tier's root folder."""
    size: int
    used: float
    """When it was last used, as time.time()."""

    @property
    def folder(self) -> str:
        """The identity's."""
        return self.path.split("/")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def is_entry(self) -> bool:
        return self.name.endswith(SUFFIX)

    def __str__(self) -> str:
        return f"{self.files.root}/{self.path}"

    def header(self) -> dict[str, Any]:
        """What its header says. EntryError or OSError if it cannot be read."""
        with self.files.opened(self.path) as (folder, name), open_entry(folder, name) as (handle, _):
            return decode_header(os.read(handle, HEADER_BYTES))


def add_parsers(commands: Any) -> None:
    """Adds ``verify`` and ``tier`` to the subparsers of the command line; `run` takes what they parse."""
    verify = commands.add_parser("verify", help="check every entry of a disk tier's folder")
    verify.add_argument("folder", type=Path, help="the connector's disk_path")
    verify.add_argument("--delete", action="store_true", help="delete what is damaged, or of an old format")
    tier = commands.add_parser("tier", help="look at a disk tier's folder, or empty it")
    actions = tier.add_subparsers(dest="action", required=True)
    for name, text in (
        ("ls", "list the entries, the most recently used first"),
        ("stat", "whose entries there are, how many, how large"),
        ("purge", "delete all entries"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("folder", type=Path, help="the connector's disk_path")


def run(args: argparse.Namespace) -> int:
    """The exit code: 0, 1 where damaged entries were found, 2 where there is no such folder."""
    files = DiskFiles(args.folder)
    for folder, fits in ((args.folder, args.folder.is_dir()), (files.root, not files.root.is_symlink())):
        if not fits:
            print(f"expected a folder, got {folder}", file=sys.stderr)
            return 2
    if args.command == "verify":
        return verify(files, args.delete)
    return {"ls": ls, "stat": stat, "purge": purge}[args.action](files)


def verify(files: DiskFiles, delete: bool = False) -> int:
    """Reads every entry, prints what is wrong with it, and deletes that if told to. 1 if any was damaged.

    Entries of an older format are no damage: an earlier version of this package left them, and no engine
    uses them. They are counted apart.
    """
    reasons: Counter[str] = Counter()
    checked = 0
    for found in _all(files):
        if not found.is_entry:
            continue
        try:
            check_file(found)
        except FileNotFoundError:  # evicted meanwhile
            continue
        except EntryError as error:
            reasons[error.reason] += 1
            if error.reason != OLD_FORMAT:
                print(f"{found}: {error}")
            if delete:
                files.unlink(found.path)
        except OSError as error:
            reasons["not readable"] += 1
            print(f"{found}: {error}")
        checked += 1
    old = reasons.pop(OLD_FORMAT, 0)
    bad = sum(reasons.values())
    what = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    print(f"{checked} entries checked, {bad} damaged{f' ({what})' if bad else ''}"
          f"{', deleted' if bad and delete else ''}")  # fmt: skip
    if old:
        fate = "deleted" if delete else "--delete removes them"
        print(f"{old} of an old format, which are never used: {fate}")
    return 1 if bad else 0


def check_file(found: File) -> None:
    """Checks that an entry is whole and lies where it belongs.

    Raises:
        EntryError: it is not, or does not.
        OSError: it cannot be read.
    """
    with found.files.opened(found.path) as (folder, name), open_entry(folder, name) as (handle, size):
        values = decode_header(os.read(handle, HEADER_BYTES))
        try:
            identity = TierIdentity(**{name: values[name] for name in _NAMES})
            key = bytes.fromhex(values["key"])
        except (KeyError, TypeError, ValueError) as error:
            raise EntryError("damaged header", repr(error)) from error
        if identity.digest != found.folder:
            raise EntryError("other identity", f"expected folder {identity.digest}, got {found.folder}")
        if f"{key.hex()}{SUFFIX}" != found.name:
            raise EntryError("other key", f"expected {key.hex()}")
        payload_bytes = size - HEADER_BYTES
        if payload_bytes != values.get("payload_bytes"):
            raise EntryError("short", f"expected {values.get('payload_bytes')} bytes, got {payload_bytes}")
        checksum = check_header(values, identity, key, payload_bytes)
        check_payload(iter(lambda: os.read(handle, _PIECE), b""), checksum)


def ls(files: DiskFiles) -> int:
    """One line an entry: bytes, seconds since it was used, identity, key."""
    now = time.time()
    for found in sorted(_all(files), key=lambda found: found.used, reverse=True):
        print(f"{found.size:>12} {now - found.used:>10.0f} s  {found.folder[:8]}  {Path(found.name).stem}")
    return 0


def stat(files: DiskFiles) -> int:
    """A paragraph an identity, from the header of one of its entries."""
    by_identity: dict[str, list[File]] = defaultdict(list)
    for found in _all(files):
        by_identity[found.folder].append(found)
    for name, group in sorted(by_identity.items()):
        size = sum(found.size for found in group)
        last = max(found.used for found in group)
        print(f"{name}: {len(group)} files, {size / 2**30:.3f} GiB, last used {time.time() - last:.0f} s ago")
        for field, value in _identity_of(group).items():
            print(f"    {field:<16} {value}")
    total = sum(found.size for group in by_identity.values() for found in group)
    print(f"{sum(map(len, by_identity.values()))} files, {total / 2**30:.3f} GiB in all")
    return 0


def _identity_of(group: list[File]) -> dict[str, Any]:
    """From the first header that can be read; else why none can."""
    problem = ""
    for found in group:
        try:
            values = found.header()
        except (OSError, EntryError) as error:
            problem = str(error)
            continue
        return {name: values[name] for name in _NAMES if values.get(name, "") != ""}
    return {"not readable": problem}


def purge(files: DiskFiles) -> int:
    """Deletes every entry, and temporary files that nobody writes any more."""
    count = size = 0
    for found in _all(files):
        old = found.is_entry or time.time() - found.used > STALE_SECONDS
        if old and files.unlink(found.path):
            count, size = count + 1, size + found.size
    print(f"{count} files deleted, {size / 2**30:.3f} GiB")
    return 0


def _all(files: DiskFiles) -> Iterator[File]:
    for folder in files.scan():
        for used, path, size in folder:
            yield File(files, path, size, used)
