"""`potluck`, and `python -m potluck`, which is the same."""

from __future__ import annotations

import signal


def main() -> None:
    """Console entry point. While the commands are imported nothing is open yet: Ctrl-C just ends the process."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not with nohup, say
    if usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from potluck.cli.main import main as run

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
