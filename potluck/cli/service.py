"""`potluck service`: the daemon as a service of this user, started with the machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from potluck.cli.daemon import ask_daemon
from potluck.cli.options import HomeOption, JsonOption

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only print what would be written and run.")]


def install(home: HomeOption = None, dry_run: DryRunOption = False) -> None:
    """Start the daemon now and whenever you log in (systemd user unit, or launchd on macOS). No root needed.

    Example:  potluck service install --dry-run
    """
    from potluck.peer.home import Home, default_home
    from potluck.peer.service import Service

    service = Service.of(Home(home or default_home()))
    if dry_run:
        print(f"# {service.path}\n{service.text}")
        print("\n".join(f"$ {' '.join(command)}" for command in service.start))
        return
    service.install()
    print(f"installed {service.path}; see `potluck service status` and `potluck status`")


def remove(home: HomeOption = None, dry_run: DryRunOption = False) -> None:
    """Stop the service and start it no more. The home stays.

    Example:  potluck service remove
    """
    from potluck.peer.home import Home, default_home
    from potluck.peer.service import Service

    service = Service.of(Home(home or default_home()))
    if dry_run:
        print("\n".join(f"$ {' '.join(command)}" for command in service.end))
        print(f"$ rm {service.path}")
        return
    print(f"removed {service.path}" if service.remove() else "no service is installed")


def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Whether the service is installed and its daemon runs.

    Example:  potluck service status
    """
    from potluck.peer.home import Home, default_home
    from potluck.peer.service import Service

    where = Home(home or default_home())
    service, daemon = Service.of(where), ask_daemon(where, "status")
    answer = {
        "installed": service.path.exists(),
        "file": str(service.path),
        "daemon": daemon["daemon"] if daemon else None,
    }
    if as_json:
        print(json.dumps(answer))
        return
    print(f"installed: {service.path}" if answer["installed"] else "not installed: `potluck service install`")
    print(f"the daemon runs, process {answer['daemon']}" if daemon else "the daemon does not run")
