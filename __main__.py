"""`python -m steadyvsr`: the command line of cli.py."""

import os
import sys

from .cli import EXIT_INTERRUPTED, main


def run() -> None:
    """Runs the command line and ends the process."""
    code = main()
    if code == EXIT_INTERRUPTED:
        # Everything is in order by now, and taking torch down takes seconds on a busy machine: Ctrl-C does not wait.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
