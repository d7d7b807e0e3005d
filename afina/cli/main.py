"""``afina VERB``: reads the command line, calls the verb, and turns every failure into one line and an exit status.

Exit status: 0 done; 1 failed while running; 2 the request or the input was wrong; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import traceback

from afina.cli import (
    advise,
    chat,
    check,
    demo,
    doctor,
    eval,
    export,
    fetch,
    generate,
    inspect,
    plan,
    report,
    serve,
    train,
)
from afina.cli.options import Parser, Verb, to_json
from afina.errors import AfinaError, ConfigError, nearest
from afina.printable import LONGEST, printable
from afina.signals import stopping
from afina.streams import open_missing, safe_streams

VERBS: dict[str, Verb] = {
    "check": check.VERB,
    "advise": advise.VERB,
    "plan": plan.VERB,
    "train": train.VERB,
    "eval": eval.VERB,
    "inspect": inspect.VERB,
    "report": report.VERB,
    "generate": generate.VERB,
    "chat": chat.VERB,
    "serve": serve.VERB,
    "export": export.VERB,
    "doctor": doctor.VERB,
    "fetch": fetch.VERB,
    "demo": demo.VERB,
}

# A full or broken disk is no fault of the request, however the message is worded.
DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run(argv: list[str]) -> int:
    """Run ``afina`` with these arguments; returns the exit status."""
    debug = "--debug" in argv
    open_missing()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text that the terminal's encoding lacks is escaped, never an error
            with contextlib.suppress(OSError, ValueError):  # a stream that is gone
                stream.reconfigure(errors="backslashreplace")
    with safe_streams():
        try:
            with stopping():
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
    if verb not in VERBS:
        kind = "an option" if verb.startswith("-") else "a verb"
        raise ConfigError(f"{verb!r} is not {kind} of afina{nearest(verb, VERBS)}; see afina --help")
    chosen = VERBS[verb]
    parser = Parser(prog=f"afina {verb}", description=chosen.summary)
    chosen.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(parser.normalised(argv[1:]))
    result = chosen.run(args)
    if args.json:
        print(to_json(result))
    return 0 if result.get("ok", True) else chosen.failed


def _help() -> str:
    verbs = "\n".join(f"  {verb:9} {chosen.summary}" for verb, chosen in VERBS.items())
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
    print(f"afina: error: {printable(message, limit=LONGEST)}", file=sys.stderr)
    return status
