"""`potluck`: the commands, put together; errors become one clear line and an exit code.

Heavy imports (torch, hivemind) happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from potluck import __version__
from potluck.cli import (
    audit,
    daemon,
    demo,
    doctor,
    export,
    fetch,
    generate,
    host,
    identity,
    join,
    leave,
    ledger,
    limits,
    monitor,
    page,
    run_new,
    service,
    simulate,
    status,
    top,
    validate,
    why,
)
from potluck.cli.session import INTERRUPTED
from potluck.errors import PotluckError

app = typer.Typer(
    name="potluck",
    help="Volunteer, peer-to-peer training of large models.\n\n"
    "Start a run:   potluck run new my-run.toml && potluck host my-run.toml\n\n"
    "Join one:      potluck doctor 'potluck:...' && potluck join 'potluck:...'\n\n"
    "See it work:   potluck demo\n\n"
    "Exit codes: 0 done, 1 a bug, 2 a wrong setting, 3 identity, 4 manifest or invite, 5 hardware, 6 network, "
    "7 a peer broke the protocol, 8 clock, 9 a checkpoint or state does not load, 10 a ledger does not hold, "
    "11 the disk is full, 130 interrupted before it had joined (or ended by force).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
runs = typer.Typer(help="Runs: `potluck run new` writes a manifest to start one from.", no_args_is_help=True)
app.add_typer(runs, name="run")
runs.command("new")(run_new.run_new)
identities = typer.Typer(
    help="This home's identity: show it, back it up, restore it, share it among machines, rotate it.",
    no_args_is_help=True,
)
app.add_typer(identities, name="identity")
for verb in (
    *(identity.show, identity.backup, identity.restore),
    *(identity.delegate, identity.accept, identity.revoke, identity.rotate),
):
    identities.command()(verb)
ledgers = typer.Typer(help="A validator's ledger: who earned what, why, and whether it holds.", no_args_is_help=True)
app.add_typer(ledgers, name="ledger")
ledgers.command("audit")(audit.audit)
ledgers.command("fetch")(fetch.fetch)
for view in (ledger.show, ledger.peer, ledger.explain, ledger.verify, ledger.prove, ledger.export):
    ledgers.command()(view)
bounds = typer.Typer(help="When, and how much of the machine, the daemon may use.", no_args_is_help=True)
app.add_typer(bounds, name="limits")
bounds.command("show")(limits.show)
bounds.command("set")(limits.set_)
services = typer.Typer(help="The daemon as a service that starts when you log in.", no_args_is_help=True)
app.add_typer(services, name="service")
for act in (service.install, service.remove, service.status):
    services.command()(act)
COMMANDS: tuple[Callable[..., None], ...] = (
    host.host,
    join.join,
    doctor.doctor,
    validate.validate,
    status.status,
    why.why,
    leave.leave,
    daemon.daemon,
    daemon.pause,
    daemon.resume,
    daemon.finish,
    page.page,
    monitor.monitor,
    top.top,
    export.export,
    generate.generate,
    simulate.simulate,
    demo.demo,
)
for command in COMMANDS:
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def main() -> None:
    """Console entry point. Our errors: one line on stderr (with --json also one object on stdout) and their code."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except PotluckError as error:
        if "--json" in sys.argv:
            fields = {"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}
            print(json.dumps(fields), flush=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "show"):  # click's usage errors show themselves
            raise
        if "--json" in sys.argv:
            # `message` alone lacks the name of the option or argument.
            text = getattr(error, "format_message", error.__str__)()
            print(json.dumps({"error": text, "kind": "UsageError", "exit_code": 2}), flush=True)
        error.show()
        sys.exit(2)
