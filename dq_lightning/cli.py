"""The console script `dq-lightning`.

Every command is one call of the public API; the modules that a command needs are imported when the command runs.
"""

import difflib
import inspect
import os
import re
import select
import signal
import sys
from argparse import ArgumentError
from contextlib import suppress
from importlib.metadata import version
from itertools import zip_longest
from typing import Any, NoReturn

from jsonargparse import auto_cli, set_parsing_settings

from dq_lightning.commands import care, quantizing, stations, texts
from dq_lightning.core.errors import DQError
from dq_lightning.core.fields import JsonFields

COMMANDS: dict[str, Any] = {
    "quantize": quantizing.quantize_dataset,
    "bins": stations.bins,
    "suspects": stations.suspects,
    "duplicates": stations.duplicates,
    "sample": stations.sample,
    "reconstruct": stations.reconstruct,
    "embed": texts.embed,
    "sample-text": texts.sample_text,
    "info": care.info,
    "report": care.report,
    "verify": care.verify,
    "export": care.export,
    "prune": care.prune,
    "demo": care.demo,
}
# These options of the published scripts are switches, which are written without a value.
SWITCHES = ("--merge", "--random", "--dry_run", "--force_recompute", "--public")
TYPES = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text"}


def main(arguments: list[str] | None = None) -> None:
    """Run a command of the console script.

    An error of the package or of the disk is printed to stderr without a traceback and ends the process with status 1.
    An argument that the parser rejects ends it with status 2, and an interrupt (Ctrl-C) with status 130.

    Args:
        arguments: arguments of the command line; None takes those of the process.

    Raises:
        SystemExit: the command failed or was stopped, or its help was printed.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given == ["--version"]:
        print(f"dq-lightning {version('dq-lightning')}")
        return
    before: Any = signal.SIG_DFL
    with suppress(ValueError):  # Signal handlers can only be set in the main thread.
        # SIGTERM is handled like an interrupt, so that half-written files are removed and loader processes end.
        before = signal.signal(signal.SIGTERM, _end)
    # Nested settings are listed one by one in the help; otherwise jsonargparse would hide them behind a class path.
    set_parsing_settings(subclasses_disabled=[JsonFields])
    normal = _normal(given or ["--help"])
    # A parser of all commands takes half a second to make, and only a command that is missing or unknown needs one.
    commands = {normal[0]: COMMANDS[normal[0]]} if normal[0] in COMMANDS else COMMANDS
    try:
        auto_cli(commands, args=normal, prog="dq-lightning", as_positional=True, exit_on_error=False)
        sys.stdout.flush()
    except ArgumentError as error:
        print(f"dq-lightning: {_advised(str(error), given)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError as error:
        if _is_read():
            print(f"dq-lightning: {error}", file=sys.stderr)
            sys.exit(1)
        sys.exit(128 + signal.SIGPIPE)
    except DQError as error:
        print(f"dq-lightning: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        print(f"dq-lightning: {error.strerror or error}{place}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("dq-lightning: stopped; finished work stays in the cache, and the next run uses it", file=sys.stderr)
        sys.exit(130)
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _end(number: int, frame: object) -> NoReturn:
    print(
        "dq-lightning: ended by a signal; finished work stays in the cache, and the next run uses it", file=sys.stderr
    )
    sys.exit(128 + number)


def _normal(arguments: list[str]) -> list[str]:
    """Return the arguments as the parser expects them: underscores in options, a dash in the name of the command."""
    command = arguments[0].replace("_", "-")
    first = command if command in COMMANDS else arguments[0]
    return _with_values([_underscored(one) for one in (first, *arguments[1:])])


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _advised(message: str, arguments: list[str]) -> str:
    """Return an error message of the parser in plain words, with the most similar option and a hint at `--help`."""
    command = next((one for one in _normal(arguments or ["--help"]) if one in COMMANDS), None)
    message = _plain(message)
    if command is not None:
        message = message.replace(f" {command}.", " ")  # The parser calls a missing argument COMMAND.NAME.
        options = list(inspect.signature(COMMANDS[command]).parameters)
        if message.startswith("unrecognized"):
            unknown = [
                word[2:].partition("=")[0] for word in message.split() if word.startswith("--") and "." not in word
            ]
            near = [match for name in unknown for match in difflib.get_close_matches(name, options, 1)]
            if near:
                message += f"; did you mean --{near[0]}?"
            elif not unknown and "data_path" in options:
                message += "; a folder or file of data is named by --data_path"
    return f"{message.rstrip()} (see: dq-lightning {f'{command} ' if command else ''}--help)"


def _plain(message: str) -> str:
    """Return what the parser says of a value of the wrong type in one line, and any other message as it is."""
    key = re.match(r'Parser key "([^"]+)":', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    types = re.findall(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[([^]]*)\])", message)
    if key is None or value is None or len(types) != message.count("Expected a"):
        return message
    wanted = [TYPES.get(kind, kind) for kind, _ in types if kind not in ("", "NoneType")]
    wanted += [name.strip("' ") for _, names in types for name in names.split(",") if name]
    return f"{key[1]} takes {', '.join(wanted[:-1])}{' or ' if wanted[1:] else ''}{wanted[-1]}; got {value[1].strip()}"


def _is_read() -> bool:
    """Return whether stdout still has a reader; if not (as in `| head`), redirect it to the null device."""
    with suppress(OSError, ValueError, AttributeError):  # stdout may be no file, and some systems have no poll.
        place, poll = sys.stdout.fileno(), select.poll()
        poll.register(place, 0)
        if poll.poll(0):  # No event was asked for, so only errors are reported.
            os.dup2(os.open(os.devnull, os.O_WRONLY), place)
            return False
    return True


def _with_values(arguments: list[str]) -> list[str]:
    """Return the arguments with `--merge=true` in place of `--merge`, and so on, unless a value follows the switch."""
    return [
        f"{one}=true" if one in SWITCHES and after not in ("true", "false") else one
        for one, after in zip_longest(arguments, arguments[1:])
    ]


if __name__ == "__main__":
    main()
