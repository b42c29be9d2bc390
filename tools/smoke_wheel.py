"""Builds the wheel and runs `potluck --version` and `run new` from it, outside the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wheel = next(where.glob("potluck-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(where / "installed")
        # The wheel's own files come first; its dependencies from this environment.
        environment = {**os.environ, "PYTHONPATH": str(where / "installed")}
        for arguments in (["--version"], ["run", "new", str(where / "run.toml")]):
            subprocess.run(
                [sys.executable, "-m", "potluck", *arguments], check=True, cwd=folder, env=environment,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
        print(f"{wheel.name}: installs and runs")


if __name__ == "__main__":
    main()
