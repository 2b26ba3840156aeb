#!/usr/bin/env bash
# The main job on a fresh machine: sets up, then upscales a short clip with the embedded network.
# Arguments go to `steadyvsr demo`.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""
exec python -m steadyvsr demo "$@"
