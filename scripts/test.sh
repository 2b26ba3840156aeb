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
# A worker for each core; the tests of a file stay together, as they share what is dear to start.
exec python -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
