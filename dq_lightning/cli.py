"""The console script: every command is one call of the public API, imported when it is asked for."""

import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import auto_cli

from dq_lightning.errors import DQError


def demo(progress: bool = True) -> None:
    """Quantize bundled images, train on the result and on random samples, and print what came out (no network needed).

    Args:
        progress: show progress bars.
    """
    from dq_lightning.demo import run_demo

    run_demo(progress=progress)


def info(path: str) -> None:
    """Print what a compact set holds and what it costs.

    Args:
        path: folder of the set.
    """
    import json
    from pathlib import Path

    from dq_lightning.compact import open_compact

    print(json.dumps(open_compact(Path(path)).info.to_dict(), indent=2))


COMMANDS: list[Callable[..., Any] | type] = [demo, info]


def main() -> None:
    """Run a command; an error of the package is printed without a traceback and exits with status 1."""
    try:
        auto_cli(COMMANDS, prog="dq-lightning", as_positional=True)
    except DQError as error:
        print(f"dq-lightning: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
