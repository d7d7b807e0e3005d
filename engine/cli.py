"""``afina VERB``: reads the command line, calls the verb, and turns every failure into one line and an exit status.

Exit status: 0 done; 1 failed while running; 2 the request or the input was wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import traceback
from typing import Any, NoReturn

# Modules that need torch are imported by the verb that runs, so that the help stays quick.
from afina.engine import commands
from afina.engine.settings import FALSE_WORDS, TRUE_WORDS, fields, flag_help, kinds
from afina.errors import AfinaError, ConfigError, nearest

# A full or broken disk is no fault of the request, however the message is worded.
DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Parser(argparse.ArgumentParser):
    """argparse with underscores and dashes alike, booleans in every spelling, and errors as ConfigError."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.booleans: set[str] = set()

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def add_setting(self, owner: type, name: str, **kwargs: Any) -> None:
        """The flag of a setting and of its aliases. Booleans also as ``--name`` and ``--no-name``."""
        shown: dict[str, Any] = flag_help(owner, name)
        for flag in (name, *fields(owner)[name].metadata["aliases"]):
            if kinds(owner)[name] is bool:
                self.booleans.add(f"--{flag}")
            self.add_argument(f"--{flag}", **kwargs, **(shown if flag == name else {"help": argparse.SUPPRESS}))

    def normalised(self, argv: list[str]) -> list[str]:
        """Flags in the one spelling that argparse knows; unknown ones refused with the nearest name."""
        out: list[str] = []
        queue = list(argv)
        while queue:
            token = queue.pop(0)
            if token == "--":
                return [*out, token, *queue]
            if not token.startswith("--"):
                out.append(token)
                continue
            typed, equals, value = token.partition("=")
            flag = "--" + typed[2:].replace("-", "_")
            positive = "--" + flag.removeprefix("--no_")
            if flag not in self._option_string_actions and positive in self.booleans:
                if equals:
                    raise ConfigError(f"{typed} takes no value; found {token}")
                out.append(f"{positive}=false")
            elif flag not in self._option_string_actions:
                known = [name for name in self._option_string_actions if name.startswith("--")]
                raise ConfigError(f"{typed} is not an option of {self.prog}{nearest(flag, known)}")
            elif flag in self.booleans and not equals:
                given = bool(queue) and queue[0].lower() in TRUE_WORDS + FALSE_WORDS
                out.append(f"{flag}={queue.pop(0) if given else 'true'}")
            else:
                out.append(flag + equals + value)
        return out


def run(argv: list[str]) -> int:
    """Run ``afina`` with these arguments; returns the exit status."""
    debug = "--debug" in argv
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text that the terminal's encoding lacks is escaped, never an error
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _dispatch([a for a in argv if a != "--debug"])
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)
    except BaseException as error:  # the boundary: whatever happens, one line and a status
        if debug:
            traceback.print_exc()
        return _report(error)


def _dispatch(argv: list[str]) -> int:
    from afina import __version__

    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"afina {__version__}")
        return 0
    verb = argv[0]
    if verb not in commands.VERBS:
        kind = "an option" if verb.startswith("-") else "a verb"
        raise ConfigError(f"{verb!r} is not {kind} of afina{nearest(verb, commands.VERBS)}; see afina --help")
    summary, add_options, execute = commands.VERBS[verb]
    parser = Parser(prog=f"afina {verb}", description=summary)
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(parser.normalised(argv[1:]))
    result = execute(args)
    if args.json:
        print(commands.to_json(result))
    return 0 if result.get("ok", True) else 1


def _help() -> str:
    verbs = "\n".join(f"  {verb:9} {summary}" for verb, (summary, _, _) in commands.VERBS.items())
    return f"""usage: afina VERB [options]

Fine-tune a language model on your examples, on one machine.

verbs:
{verbs}

afina VERB --help lists a verb's options. On every verb, --json prints the result as one JSON object on the
last line and --debug shows the traceback of an error. afina --version prints the version."""


def _report(error: BaseException) -> int:
    """Say what went wrong in one line on standard error; returns the exit status."""
    if isinstance(error, BrokenPipeError):  # the reader of a pipe has left: nothing to say, nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    status, name = 1, type(error).__name__
    message = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        status, message = 130, message or "interrupted"
    elif isinstance(error, AfinaError):
        cause = error.__cause__
        status = 1 if isinstance(cause, OSError) and cause.errno in DISK_FAILURES else 2
    elif isinstance(error, MemoryError) or name == "OutOfMemoryError":
        message = f"out of memory; a smaller batch_size or max_length needs less: {message}"
    elif name == "PanicException":  # from tokenizers or safetensors (pyo3), outside Exception
        message = f"a library failed on this input: {message}"
    elif not isinstance(error, OSError) and not type(error).__module__.startswith("afina."):
        message = f"internal error, {name}: {message} (add --debug for the traceback, and please report it)"
    print(f"afina: error: {message}", file=sys.stderr)
    return status
