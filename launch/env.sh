# shellcheck shell=bash
# The environment of every process that computes; sourced by the other launchers, never run.
# Each value can be set beforehand, and is checked: some launchers pass it through other shells.

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# setting NAME DEFAULT PATTERN: export NAME; a value set beforehand must match PATTERN as a whole.
EXPORTED=()
setting() {
    local name=$1 value=${!1-$2} pattern=$3
    [[ $value =~ ^($pattern)$ ]] || fail "$name=$value: use a value that matches $pattern"
    export "$name=$value"
    EXPORTED+=("$name")
}

# local_gpus: how many processes can have a GPU each here.
local_gpus() {
    local list
    if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then   # empty hides all
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        list=$(nvidia-smi --list-gpus) || fail "nvidia-smi --list-gpus: $list; repair the driver, or set MEGAVIDEO_PROCESSES"
        grep -c '^GPU ' <<<"$list" || true   # parts of a GPU (MIG) have lines of their own
    else
        echo 0
    fi
}

# The interpreter that MegaVideo is installed in; the same path on every node.
venv=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python
[[ -x $venv ]] || venv=python3
setting MEGAVIDEO_PYTHON "$venv" '[A-Za-z0-9_./+-]+'

# Processes on each node: one for each GPU, one where there is none.
if [[ ! ${MEGAVIDEO_PROCESSES+set} ]]; then
    gpus=$(local_gpus)
    MEGAVIDEO_PROCESSES=$((gpus > 0 ? gpus : 1))
fi
setting MEGAVIDEO_PROCESSES '' '[1-9][0-9]{0,2}'

# How often torchrun starts all workers again after one has failed. Worth it with --nnodes MIN:MAX,
# where the others go on without a lost node; else a job scheduler that starts anew does better.
setting MEGAVIDEO_MAX_RESTARTS 0 '[0-9]{1,3}'

# CPU threads of a process. Unset, torchrun says 1, which starves decoding and CPU training; and a
# thread for every core in every process is worse.
cores=$(getconf _NPROCESSORS_ONLN)
setting OMP_NUM_THREADS "$(((cores + MEGAVIDEO_PROCESSES - 1) / MEGAVIDEO_PROCESSES))" '[1-9][0-9]{0,3}'

# Threads that wait must not spin: on a busy machine that made convolutions three times slower.
setting OMP_WAIT_POLICY PASSIVE 'PASSIVE|ACTIVE'

# After a restart torchrun would hand out its store with the addresses of processes that are gone,
# and gloo would wait for those until its timeout.
setting TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1 '0|1'

# A process that dies of a signal inside a library says in which Python line.
setting PYTHONFAULTHANDLER 1 '0|1'

# NCCL's reason for an error goes to stderr; by default it keeps it to itself.
setting NCCL_DEBUG WARN 'WARN|INFO|VERSION|TRACE'

# The network interface between nodes. Libraries guess when it is not named, and guess wrong where a
# management network or a container bridge comes first.
if [[ -n ${MEGAVIDEO_INTERFACE-} ]]; then
    setting MEGAVIDEO_INTERFACE '' '[A-Za-z0-9_.-]{1,15}'
    setting GLOO_SOCKET_IFNAME "$MEGAVIDEO_INTERFACE" '[A-Za-z0-9_.,=^:-]+'
    setting NCCL_SOCKET_IFNAME "$MEGAVIDEO_INTERFACE" '[A-Za-z0-9_.,=^:-]+'
fi

# show_environment: the exports above, as lines for a shell.
show_environment() {
    local name
    for name in "${EXPORTED[@]}"; do
        printf 'export %s=%q\n' "$name" "${!name}"
    done
}

# show COMMAND...: one line for a shell.
show() {
    printf '%q ' "$@"
    printf '\n'
}
