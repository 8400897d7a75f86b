"""What an agent was sent, as files named by their SHA-256."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from autocompress.errors import UsageError

LEAST_FREE = 2**24
"""Bytes that are left on the disk, which may be the memory of a small device."""
DIGEST = re.compile(r"[0-9a-f]{64}")


class Missing(Exception):
    """Blobs that a request names, and nobody has sent."""


class Blobs:
    """What was sent, as files named by their SHA-256; the least recently used are dropped where they are too many, or the disk is full."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most = folder, most_bytes
        self._lock = threading.Lock()

    def path(self, digest: str) -> Path:
        """Where a blob lies, used just now."""
        if not DIGEST.fullmatch(digest):
            raise UsageError(f"a blob is named by a SHA-256, not {digest!r}", hint="use autocompress")
        path = self._folder / digest
        try:
            os.utime(path)
        except FileNotFoundError:
            raise Missing(digest) from None
        return path

    def paths(self, digests: Sequence[str]) -> list[Path]:
        """Of all of them. Raises Missing with those that are not here."""
        found, missing = [], []
        for digest in digests:
            try:
                found.append(self.path(digest))
            except Missing:
                missing.append(digest)
        if missing:
            raise Missing(*missing)
        return found

    def keep(self, digest: str, pieces: Iterator[bytes], n: int) -> bool:
        """Whether the pieces, `n` bytes in all, are what the digest says; only then they are kept."""
        made = hashlib.sha256()
        with self._lock:
            self._make_room(n)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="part-", delete=False) as file:
            try:
                for piece in pieces:
                    made.update(piece)
                    file.write(piece)
                file.close()
                if made.hexdigest() != digest:
                    return False
                Path(file.name).replace(self._folder / digest)
                return True
            finally:
                Path(file.name).unlink(missing_ok=True)

    def _make_room(self, n: int) -> None:
        kept = sorted((p for p in self._folder.iterdir() if DIGEST.fullmatch(p.name)), key=lambda p: p.stat().st_mtime)
        total = sum(path.stat().st_size for path in kept)
        for path in kept:
            if total + n <= self._most and n <= shutil.disk_usage(self._folder).free - LEAST_FREE:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
