"""Copies of validators' ledgers beside a run's history, for whoever looks at its pages: made when somebody looks."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from potluck.errors import PotluckError, UserError
from potluck.net.host import PeerId
from potluck.peer.ledgers import fetch_from, validators_of
from potluck.peer.seat import Around

#: Validators answer few peers at a time: nobody's copy is brought up to date more often than this.
AGAIN_SECONDS: Final = 30.0
#: Of those that a run trusts, so many ledgers are kept here; they say about the same.
MAX_LEDGERS: Final = 3
#: And of one no more than this: it lies in a volunteer's home.
MAX_BYTES: Final = 256 * 2**20


class LedgerCopies:
    """`refresh` them; `close` when the run is left. Verified on the way, like those of `potluck ledger fetch`."""

    def __init__(self, around: Around, again_seconds: float = AGAIN_SECONDS) -> None:
        self._around, self._again_seconds = around, again_seconds
        self._began = -again_seconds
        self._fetching: asyncio.Task[None] | None = None
        self._errors: dict[str, str] = {}

    def refresh(self) -> dict[str, Any]:
        """Begins to bring them up to date, if that was not done just now. What went wrong the last time."""
        now = time.monotonic()
        fetching = self._fetching is not None and not self._fetching.done()
        if not fetching and now - self._began >= self._again_seconds:
            self._began, fetching = now, True
            self._fetching = asyncio.create_task(self._fetch())
        return {"fetching": fetching, "errors": self._errors}

    async def close(self) -> None:
        if self._fetching:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)

    async def _fetch(self) -> None:
        around, errors = self._around, dict[str, str]()
        try:
            validators = await validators_of(around, None)
        except PotluckError as error:  # none is there now, or the run trusts none
            self._errors = {"": str(error)}
            return
        others = [peer for peer in validators if peer != around.peer]
        for validator in others[:MAX_LEDGERS]:
            try:
                await self._fetch_one(validator)
            except PotluckError as error:
                errors[validator] = str(error)
                around.emit("peer.ledger.unfetched", validator=validator, error=str(error))
        self._errors = errors

    async def _fetch_one(self, validator: PeerId) -> None:
        folder = self._around.folder.ledgers
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}") from None
        await fetch_from(self._around, validator, folder / f"{validator}.ledger", lambda done, total: None)
