"""``python -m afina`` and the ``afina`` command."""

from __future__ import annotations

import sys

from afina.signals import stopping
from afina.streams import open_missing, say


def main() -> int:
    open_missing()
    try:
        with stopping():  # from here on, and not only once the work has begun: imports take their time
            from afina.cli.main import run

            return run(sys.argv[1:])
    except KeyboardInterrupt as stop:
        say(f"afina: error: {stop or 'interrupted'}")
        return 130


if __name__ == "__main__":
    sys.exit(main())
