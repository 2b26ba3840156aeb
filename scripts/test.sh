#!/usr/bin/env bash
# The checks on a fresh machine: sets up, then runs ruff, its formatter, pyright and pytest. Arguments go to pytest;
# --fast leaves out the slow tests.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
fetch_frontends
python -m ruff check .
python -m ruff format --check .
python -m pyright
exec python -m pytest "$@"
