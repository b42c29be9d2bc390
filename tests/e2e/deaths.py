"""Processes that are killed at any instant: a server that has everything imported, and forks a child for each death.

So that hundreds of deaths are a matter of seconds. A killed process leaves the kernel's cache behind: this shows that
nothing acknowledged depends on what the process still had to do, not that a disk survives a power cut.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def serve(work: Callable[[str], None]) -> None:
    """For each line on stdin: do `work` with it in a child, which may write lines to file descriptor 1 itself."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                work(line.rstrip("\n"))
            finally:
                os._exit(1)
        os.write(1, f"pid {child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(1, f"dead {os.waitstatus_to_exitcode(status)}\n".encode())


class Deaths:
    """Runs `script`, which must `serve`. Use it in a `with`."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = [sys.executable, script, *arguments]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert self._server.stdout
        self._hear = iter(self._server.stdout.readline, "")  # it ends, and the test fails, if the server does
        self.children: list[int] = []

    def kill(self, task: str, after_seconds: float) -> list[str]:
        """What a child said until it was killed."""
        assert self._server.stdin
        self._server.stdin.write(f"{task}\n")
        said = [next(self._hear)]
        while not said[-1].startswith("pid "):  # its child may be quicker than itself
            said.append(next(self._hear))
        self.children.append(int(said.pop().split()[1]))
        time.sleep(after_seconds)
        os.kill(self.children[-1], signal.SIGKILL)
        while not (line := next(self._hear)).startswith("dead "):
            said.append(line)
        assert line == "dead -9\n", "it ended by itself"
        return said

    def __enter__(self) -> Deaths:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        code = self._server.wait(timeout=10)
        self._server.stdout.close()
        if exc[0] is None:
            assert code == 0
            assert sorted(child for child in self.children if Path(f"/proc/{child}").exists()) == []
