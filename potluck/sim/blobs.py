"""A blob store that writes no files: thousands of simulated peers would write millions, of a kilobyte each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potluck.net.blobs import BlobId, BlobRef, BlobStore


class MemoryBlobStore(BlobStore):
    """Holds whole blobs in memory. What comes in several chunks still goes through files while it is fetched."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self._held: dict[str, bytes] = {}
        super().__init__(*arguments, **keywords)

    def hold(self, *data: Any, reveal_at: float | None = None) -> BlobRef:
        return self.put(*data, reveal_at=reveal_at)

    def _write(self, path: Path, data: Any, sync: bool) -> None:
        if path.suffix == ".blob":
            self._held[path.stem] = b"".join(data)
        elif path.stem not in self._held:
            super()._write(path, data, sync)

    def _map(self, blob_id: BlobId, size: int) -> memoryview:
        held = self._held.get(blob_id)
        return memoryview(held) if held is not None else super()._map(blob_id, size)

    def _unlink(self, blob_id: BlobId) -> None:
        if self._held.pop(blob_id, None) is None:
            super()._unlink(blob_id)
