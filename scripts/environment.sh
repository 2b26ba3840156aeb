# Sourced by demo.sh and test.sh: makes or reuses the project's virtual environment and puts it first on PATH.
# Runs on bash 3.2, which is what macOS has. Leaves the shell in the project root, where `python` is the environment's.
#
#   PYTHON                 the interpreter that starts the set-up (python3)
#   STEADYVSR_TORCH_INDEX  the package index PyTorch is installed from (whatever pip is configured for)

# Threads that wait do not spin: on busy cores that is many times faster (see cli.py).
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

TORCH="torch==2.13.0"
FRONTENDS="1.27.10 1.58.1"
SITE_PACKAGES='import sysconfig; print(sysconfig.get_path("platlib"))'

fail() {
    echo "steadyvsr: $1" >&2
    exit 1
}

# enter: what .venv/bin/activate does, and unlike it also right after the folder has been moved.
enter() {
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
    unset PYTHONHOME
}

# prepare_environment EXTRA: an environment that has the project (editable) with the extra "test", or "" for none.
prepare_environment() {
    local extra="$1" python="${PYTHON:-python3}" project="." site="" stamp key
    [ -z "$extra" ] || project=".[$extra]"
    stamp=".venv/steadyvsr-stamp${extra:+-$extra}"
    # What the environment depends on: the two requirement files, and the folder (an editable install names it).
    key="$(cat pyproject.toml requirements.txt | cksum) $PWD"
    if [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
        enter
        return
    fi

    command -v "$python" >/dev/null 2>&1 ||
        fail "expected a Python interpreter called '$python'; found none. Install Python 3.10 or newer, or set PYTHON."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "expected Python 3.10 or newer; got $("$python" --version 2>&1) from '$python'. Set PYTHON to a newer one."
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "expected '$python' to have the venv module; it has not. Install it (Debian and Ubuntu: python3-venv)."
        # A PyTorch that is already there may be the one build that fits this machine's GPU: keep it.
        if "$python" -c 'import torch' 2>/dev/null; then site="--system-site-packages"; fi
        echo "steadyvsr: making .venv${site:+ around the PyTorch of '$python'}" >&2
        "$python" -m venv --clear $site .venv || fail "the virtual environment .venv could not be made."
        # "System" means the base installation: of an interpreter that is itself in an environment, the packages are added.
        if [ -n "$site" ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
            "$python" -c "$SITE_PACKAGES" > "$(.venv/bin/python -c "$SITE_PACKAGES")/packages-of-the-starter.pth"
        fi
    fi
    enter
    if ! python -c 'import torch' 2>/dev/null; then
        echo "steadyvsr: installing $TORCH" >&2
        python -m pip install ${STEADYVSR_TORCH_INDEX:+--index-url "$STEADYVSR_TORCH_INDEX"} "$TORCH" >&2 ||
            fail "$TORCH could not be installed. See 'Choosing PyTorch' in docs/install.md."
    fi
    echo "steadyvsr: installing the project and what it needs" >&2
    python -m pip install --quiet --editable "$project" || fail "the project could not be installed into .venv."
    printf '%s\n' "$key" > "$stamp"
}

# fetch_frontends: the packaged front ends that the panel is tested in, each in a folder of its own. Without them those
# tests are skipped, and say so.
fetch_frontends() {
    local version folder
    for version in $FRONTENDS; do
        folder=".venv/frontends/$version"
        [ ! -f "$folder/comfyui_frontend_package/static/index.html" ] || continue
        echo "steadyvsr: fetching the front end $version" >&2
        rm -rf "$folder" && mkdir -p "$folder"
        { python -m pip download --quiet --no-deps --dest "$folder" "comfyui-frontend-package==$version" &&
            python -m zipfile -e "$folder"/*.whl "$folder" && rm "$folder"/*.whl; } >&2 ||
            echo "steadyvsr: the front end $version could not be fetched; its tests will be skipped." >&2
    done
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || fail "the project folder cannot be entered."
