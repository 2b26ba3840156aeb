#!/usr/bin/env bash
# The checks on a fresh machine: sets up, then runs ruff, its formatter, pyright and pytest. Arguments go to pytest;
# --fast leaves out the slow tests; -n 0 runs them in one process, which -s and --pdb need.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
fetch_frontends
python -m ruff check .
python -m ruff format --check .
python -m pyright
# One worker more than there are cores, as many tests wait for another process; the tests of a file stay together, as they
# share what is dear to start.
workers=$(python -c 'import os; print(min(4, os.cpu_count() or 1) + 1)')
exec python -m pytest -n "$workers" --dist loadfile "$@"
