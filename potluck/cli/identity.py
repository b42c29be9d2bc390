"""`potluck identity`: who this home is."""

from __future__ import annotations

import json

from potluck.cli.options import HomeOption, JsonOption


def show(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Print this home's peer id, which is also its account in the ledger. The key is made if there is none.

    Example:  potluck identity show --home ~/validator
    """
    from potluck.peer.home import Home, default_home

    peer = Home(home or default_home()).open().identity().peer_id
    print(json.dumps({"peer": peer}) if as_json else peer)
