"""Static files: our own few, and plotly's script out of its Python package. By name from a list, never by path."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import importlib.util
import mimetypes
import zlib
from functools import cache, cached_property
from pathlib import Path
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

PAGES: Final = Path(__file__).parent / "pages"
#: Everything that begins with this and holds its hash never changes.
PLOTLY: Final = "plotly-"
#: Where the shell's placeholder for it stands.
_PLOTLY_MARK: Final = "{plotly}"


class Encoded:
    """Bytes to be sent, compressed once for all who take them so."""

    #: Less does not get smaller.
    LEAST: Final = 1400

    def __init__(self, content: bytes, level: int = 6) -> None:
        self.plain, self._level = content, level

    @cached_property
    def zipped(self) -> bytes:
        return gzip.compress(self.plain, self._level, mtime=0)

    def response(self, request: Request, kind: str, **headers: str) -> Response:
        vary = {"vary": "accept-encoding"}
        if len(self.plain) < self.LEAST or "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self.plain, media_type=kind, headers={**headers, **vary})
        return Response(self.zipped, media_type=kind, headers={**headers, **vary, "content-encoding": "gzip"})


class Asset(NamedTuple):
    content: Encoded
    kind: str
    etag: str
    immutable: bool

    def response(self, request: Request) -> Response:
        age = "public, max-age=31536000, immutable" if self.immutable else "no-cache"
        headers = {"etag": self.etag, "cache-control": age}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return self.content.response(request, self.kind, **headers)


class Assets:
    def __init__(self) -> None:
        self._names = {path.name: path for path in PAGES.iterdir() if path.suffix in (".js", ".css", ".svg")}
        self._read: dict[str, Asset] = {}
        self._shell: bytes | None = None
        self._plotly = f"{PLOTLY}{_hash(plotly_script())[:16]}.min.js"

    @property
    def shell(self) -> bytes:
        """The one page that all others are drawn in."""
        if self._shell is None:
            text = (PAGES / "shell.html").read_text()
            self._shell = text.replace(_PLOTLY_MARK, f"/static/{self._plotly}").encode()
        return self._shell

    @property
    def sign_in(self) -> bytes:
        """For who comes without the token."""
        return (PAGES / "sign_in.html").read_bytes()

    async def get(self, name: str) -> Asset | None:
        if name == self._plotly:
            if name not in self._read:
                self._read[name] = await asyncio.to_thread(_plotly_asset)
            return self._read[name]
        path = self._names.get(name)
        if path is None:
            return None
        if name not in self._read:
            content = path.read_bytes()
            kind = mimetypes.guess_type(name)[0] or "text/plain"
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            self._read[name] = Asset(Encoded(content), f"{kind}; charset=utf-8", etag, False)
        return self._read[name]


def plotly_script() -> Path:
    """Found, and not imported: the package brings much along that only Python needs."""
    found = importlib.util.find_spec("plotly")
    assert found is not None and found.submodule_search_locations, "plotly is a dependency"
    return Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"


@cache
def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 16):
            digest.update(block)
    return digest.hexdigest()


def _plotly_asset() -> Asset:
    """Only the compressed form is kept: 1.4 MB instead of 4.8."""
    path = plotly_script()
    return Asset(_Zipped(path), "text/javascript; charset=utf-8", f'"{_hash(path)[:16]}"', True)


class _Zipped(Encoded):
    """A large file; who does not take it compressed gets it from the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        packer, packed = zlib.compressobj(6, zlib.DEFLATED, 31), bytearray()  # 31: with gzip's head and end
        with path.open("rb") as file:
            while block := file.read(1 << 16):
                packed += packer.compress(block)
        self._packed = bytes(packed + packer.flush())

    def response(self, request: Request, kind: str, **headers: str) -> Response:
        vary = {"vary": "accept-encoding"}
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self._path.read_bytes(), media_type=kind, headers={**headers, **vary})
        return Response(self._packed, media_type=kind, headers={**headers, **vary, "content-encoding": "gzip"})
