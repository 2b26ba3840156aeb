#!/usr/bin/env bash
# The checks on a fresh machine: sets up, then runs ruff, pyright and pytest. Arguments go to pytest.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment test
fetch_frontends
python -m ruff check .
python -m pyright
exec python -m pytest "$@"
