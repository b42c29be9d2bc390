"""Training data: where tokens come from, which are held out, and which samples a peer trains in a round.

Sources: `python-stdlib` (the standard library's own source, always there), `text:<file or folder>` and
`hf:<dataset or local path>`. Documents are cut into blocks; a hash of each block's name decides once and for all
whether it is held out, so no peer ever trains on what another evaluates with.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from potluck.errors import ManifestError, UserError
from potluck.net.host import PeerId

#: Documents are held out in blocks of this many bytes (characters for `hf:` sources).
BLOCK = 64 * 1024
#: Windows of the held-out split on which every peer measures the same loss.
HELD_OUT_WINDOWS = 32


class DataSpec(Protocol):
    """What this file reads of a manifest's `data` table."""

    @property
    def source(self) -> str: ...
    @property
    def tokenizer(self) -> str: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def held_out_fraction(self) -> float: ...
    @property
    def text_field(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def documents(self) -> int: ...
    @property
    def seed(self) -> int: ...


#: (done, in total): bytes of files, or documents of a data set; the total is 0 where nobody knows it.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Corpus:
    """All tokens of a run's data: two flat arrays (uint8 for bytes, int32 for a Hub tokenizer)."""

    train: np.ndarray
    held_out: np.ndarray
    sequence_length: int

    def batch(self, offsets: np.ndarray) -> torch.Tensor:
        """Windows of the training split, int64, shape (len(offsets), sequence_length + 1)."""
        return _windows(self.train, offsets, self.sequence_length)

    def held_out_batch(self, windows: int = HELD_OUT_WINDOWS) -> torch.Tensor:
        """The same evenly spaced windows of the held-out split for everyone."""
        last = self.held_out.size - self.sequence_length - 1
        return _windows(self.held_out, np.linspace(0, last, windows).astype(np.int64), self.sequence_length)


def _windows(tokens: np.ndarray, offsets: np.ndarray, length: int) -> torch.Tensor:
    rows = offsets[:, None] + np.arange(length + 1)
    return torch.from_numpy(tokens[rows].astype(np.int64))


def data_seed(run_seed: bytes, state: str) -> bytes:
    """What a round's assignment begins with: it follows from the state (hex digest) that the round begins with, so
    nobody knows it before, and who has not got that state does not know it at all."""
    return run_seed + bytes.fromhex(state)


def assigned_offsets(
    run_seed: bytes, module: str, peer: PeerId, round_: int, first: int, count: int, corpus: Corpus
) -> np.ndarray:
    """Offsets of samples `first .. first + count` that the run assigns to a peer in a round, shape (count,).

    A PRF of (run, module, peer, round): SHA-256 keys a Philox counter, whose raw 64-bit output is specified
    (Salmon et al., 2011) and does not change between NumPy versions. Anyone can recompute anyone's samples.
    """
    name = b"\0".join([b"potluck.samples.1", run_seed, module.encode(), peer.encode(), str(round_).encode()])
    key = np.frombuffer(hashlib.sha256(name).digest()[:16], dtype="<u8")
    stream = np.random.Philox(key=key)
    raw = stream.random_raw(first + count)[first:]
    return (raw % np.uint64(corpus.train.size - corpus.sequence_length)).astype(np.int64)


def load_corpus(
    spec: DataSpec,
    override: str | None = None,
    own_manifest: bool = False,
    on_progress: OnProgress | None = None,
) -> Corpus:
    """Read and tokenize a run's data (seconds for the embedded source).

    `override`: the source this volunteer chose instead (`--data`). A stranger's manifest may not name this machine's
    files: local paths need the volunteer's own word (`own_manifest` or `override`), else ManifestError.
    """
    source = override or spec.source
    check_may_read(spec, override, own_manifest)
    train: list[np.ndarray] = []
    held_out: list[np.ndarray] = []
    tokenize = _tokenizer(spec.tokenizer)
    for name, text in _blocks(source, spec, on_progress or (lambda done, total: None)):
        (held_out if _is_held_out(name, spec) else train).append(tokenize(text))
    if not train and not held_out:
        raise UserError(f"data.source {source!r} holds no text")
    corpus = Corpus(_join(train), _join(held_out), spec.sequence_length)
    need = spec.sequence_length + 2
    if corpus.train.size < need or corpus.held_out.size < need:
        corpus = _cut_tail(corpus, spec)
    if corpus.train.size < need or corpus.held_out.size < need:
        raise UserError(f"data.source {source!r} holds too little text for sequences of {spec.sequence_length} tokens")
    return corpus


def check_may_read(spec: DataSpec, override: str | None, own_manifest: bool) -> None:
    """Raises ManifestError if the manifest names this machine's files and nobody here said so. Reads nothing."""
    if not (override or own_manifest):
        _refuse_local_files(spec.source)
        _refuse_local_files(spec.tokenizer)


def _refuse_local_files(source: str) -> None:
    kind, _, where = source.partition(":")
    if kind == "text" or (kind == "hf" and (where.startswith((".", "/", "~")) or Path(where).exists())):
        raise ManifestError(
            f"data.source: this run's manifest asks to read {where!r} on your machine; "
            f"if you want that, say so with --data {source!r} (or name your own text)"
        )


def _blocks(source: str, spec: DataSpec, progress: OnProgress) -> Iterator[tuple[str, bytes]]:
    kind, _, where = source.partition(":")
    if source == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        sources = [p for p in root.rglob("*.py") if "site-packages" not in p.parts]
        yield from _file_blocks(root, sorted(sources), progress)
    elif kind == "text":
        root = Path(where).expanduser()
        if not where or not root.exists():
            raise UserError(f"data.source: {where!r} does not exist; name a file or folder of text")
        files = [root] if root.is_file() else [p for p in root.rglob("*") if p.is_file()]
        yield from _file_blocks(root if root.is_dir() else root.parent, sorted(files), progress)
    elif kind == "hf":
        yield from _dataset_blocks(where, spec, progress)
    else:
        raise UserError(f"data.source or --data: unknown source {source!r}; use python-stdlib, text:PATH or hf:NAME")


def _file_blocks(root: Path, files: Iterable[Path], progress: OnProgress) -> Iterator[tuple[str, bytes]]:
    files = list(files)
    done = 0
    try:
        total = sum(path.stat().st_size for path in files)
        for path in files:
            content = path.read_bytes()
            for i in range(0, len(content), BLOCK):
                yield f"{path.relative_to(root).as_posix()}#{i // BLOCK}", content[i : i + BLOCK]
            done += len(content)
            progress(done, total)
    except OSError as error:
        raise UserError(f"data.source: cannot read {error.filename}: {error.strerror}") from None


def _dataset_blocks(name: str, spec: DataSpec, progress: OnProgress) -> Iterator[tuple[str, bytes]]:
    """One block for each document. With `documents` the data set is streamed, and only its first ones are read."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("data.source hf: needs the package `datasets`: pip install 'potluck[data]'") from None
    try:
        where = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
        rows = load_dataset(where, split=spec.split, streaming=spec.documents > 0)
        columns = rows.column_names or list(next(iter(rows)))
    except Exception as error:  # datasets raises a family of its own exceptions; all mean: not loadable
        raise UserError(f"data.source hf:{name} does not load (split {spec.split!r}): {error}") from None
    if spec.text_field not in columns:
        raise UserError(f"data.text_field: {name} has no column {spec.text_field!r}, only {columns}")
    total = spec.documents or len(rows)
    try:
        for i, row in enumerate(islice(rows, total)):
            yield f"row#{i}", str(row[spec.text_field]).encode()
            if i % 256 == 255:
                progress(i + 1, total)
    except (OSError, ValueError, RuntimeError) as error:  # a stream breaks in as many ways as its libraries have
        raise UserError(f"data.source hf:{name} broke off: {error}; try again, or choose another source") from None


def _is_held_out(block: str, spec: DataSpec) -> bool:
    digest = hashlib.sha256(f"potluck.held-out.1\0{spec.seed}\0{block}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < spec.held_out_fraction * 2**64


def _cut_tail(corpus: Corpus, spec: DataSpec) -> Corpus:
    """Too few blocks for the hash to serve both splits: the end of the text is held out instead."""
    tokens = np.concatenate([corpus.train, corpus.held_out])
    cut = tokens.size - max(spec.sequence_length + 2, int(tokens.size * spec.held_out_fraction))
    return Corpus(tokens[: max(cut, 0)], tokens[max(cut, 0) :], spec.sequence_length)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)


def _tokenizer(name: str) -> Any:
    if name == "bytes":
        return lambda text: np.frombuffer(text, dtype=np.uint8)
    hub = hub_tokenizer(name)
    end = [] if hub.eos_token_id is None else [hub.eos_token_id]

    def tokenize(text: bytes) -> np.ndarray:
        ids = hub(text.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"]
        return np.array(ids + end, dtype=np.int32)

    return tokenize


def hub_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    where = name.removeprefix("hf:")
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"data.tokenizer: {where!r} does not load: {error}") from None
