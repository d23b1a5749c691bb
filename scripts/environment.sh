# Sourced by the other scripts: go to the project's root and make sure its environment is there.
# An active environment that has this checkout installed is used as it is; else .venv is made once from constraints.txt.
# PYTHON names another interpreter, for example PYTHON=python3.12: its environment is beside that one, as .venv-3.12.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Prints the version of the interpreter $1, as 3.11; fails where it cannot be started or is not a version served.
version_served() {
    "$1" -c 'import sys
print("%d.%d" % sys.version_info[:2])
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

# Is this checkout installed in the active environment?
active_environment_serves() {
    python -P -c 'import minimind, pathlib, pytest, sys
sys.exit(pathlib.Path(minimind.__file__).parents[1] != pathlib.Path.cwd())' 2>/dev/null
}

# Makes the environment $2 with the interpreter $1, unless it is there with the same pins.
make_environment() {
    local python=$1 venv=$2 pins
    pins=$(cat pyproject.toml constraints.txt | cksum)
    if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/installed" 2>/dev/null)" = "$pins" ]; then return; fi

    echo "installing into $venv with $python (once, a few minutes)"
    "$python" -m venv "$venv"
    local install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    # torch first and exactly, so that no other package asks for a build with CUDA.
    "${install[@]}" "$(grep '^torch==' constraints.txt)"
    "${install[@]}" -c constraints.txt -e ".[dev]"
    if ! "${install[@]}" -c constraints.txt -e ".[deepspeed]"; then
        echo "notice: DeepSpeed cannot be installed here; the run_*.sh scripts will start plain python" >&2
    fi
    echo "$pins" > "$venv/installed"
}

if [ -n "${PYTHON:-}" ]; then
    found=$(version_served "$PYTHON") || {
        echo "error: PYTHON=$PYTHON is ${found:+Python }${found:-not an interpreter that starts};" \
            "Python 3.11 or 3.12 is needed" >&2
        exit 2
    }
    make_environment "$PYTHON" ".venv-$found"
    # shellcheck disable=SC1090
    source ".venv-$found/bin/activate"
elif ! active_environment_serves; then
    for python in python3.11 python3.12 python3 python; do
        version_served "$python" >/dev/null && break
        python=""
    done
    [ -n "$python" ] || { echo "error: Python 3.11 or 3.12 was not found" >&2; exit 2; }
    make_environment "$python" .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
export TOKENIZERS_PARALLELISM=true

# launch SCRIPT ARGS...: under DeepSpeed with NPROC processes (default: the GPUs, else 1), or plain python without it.
launch() {
    if python -c "import deepspeed" 2>/dev/null; then
        local gpus
        gpus=$(python -c "import torch; print(torch.cuda.device_count())")
        deepspeed --num_accelerators "${NPROC:-$((gpus > 0 ? gpus : 1))}" "$@" --deepspeed ds_config_zero2.json
    else
        echo "notice: DeepSpeed is not installed, starting plain python" >&2
        python "$@"
    fi
}
