# Sourced by the other scripts: go to the project's root and make sure its environment is there.
# An active environment that has this checkout installed is used as it is; else .venv is made once from constraints.txt.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment_ready() {
    # The marker holds the hash of what was installed, so that a changed pin installs again.
    [ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$(cat pyproject.toml constraints.txt | cksum)" ]
}

if python -P -c 'import minimind, pathlib, pytest, sys
sys.exit(pathlib.Path(minimind.__file__).parents[1] != pathlib.Path.cwd())' 2>/dev/null; then
    :
else
    if ! environment_ready; then
        python=$(for p in python3.11 python3.12 python3 python; do
            "$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo "$p" && break
        done) || { echo "error: Python 3.11 or 3.12 was not found" >&2; exit 2; }
        echo "installing into .venv with $python (once, a few minutes)"
        "$python" -m venv .venv
        # torch first and exactly, so that no other package asks for a build with CUDA.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
        if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[deepspeed]"; then
            echo "notice: DeepSpeed cannot be installed here; the run_*.sh scripts will start plain python" >&2
        fi
        cat pyproject.toml constraints.txt | cksum > .venv/installed
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
export TOKENIZERS_PARALLELISM=true
# By default OpenMP's threads spin long while they wait, and a run on CPU gets several times slower as soon as anything
# else uses the cores. Spinning briefly costs nothing on idle ones.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
# By default glibc gives large buffers back to the system, which hands them out again zeroed page by page: a step on CPU
# frees and takes the same ones each time (benchmarks/model_step.py, with and without these two).
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"

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
