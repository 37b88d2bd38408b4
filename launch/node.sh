#!/usr/bin/env bash
# One node's part of a run: torchrun, and signals that reach its workers in time for a checkpoint.
# torchrun itself would kill what has not ended 30 s after a signal, and a Ctrl-C in a terminal would
# reach the workers twice, which ends them at once. Here SIGTERM, SIGINT, SIGHUP and SIGUSR1 become
# one SIGTERM to the workers: they finish their step, save and end; torchrun's status is then theirs.
# A scheduler may send several; only a second Ctrl-C is passed on, and ends the workers at once.
# Usage: launch/node.sh [--dry-run] TORCHRUN-OPTION... -m megavideo ARGUMENT...
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

dry_run=
if [[ ${1-} == --dry-run ]]; then
    dry_run=1
    shift
fi
command=("$MEGAVIDEO_PYTHON" -m torch.distributed.run "$@")
if [[ $dry_run ]]; then
    show_environment
    show "${command[@]}"
    exit
fi

# shellcheck disable=SC2317,SC2329  # a trap calls it
stop() {
    interrupted=1
    [[ $1 == again || ! $stopped ]] || return 0
    stopped=1
    local workers=()
    read -r -a workers <"/proc/$torchrun/task/$torchrun/children" || true
    kill -TERM "${workers[@]:-$torchrun}" 2>/dev/null || true
}

stopped=
trap 'stop once' TERM HUP USR1
trap 'stop again' INT
setsid "${command[@]}" &   # in a session of its own: a terminal's Ctrl-C arrives here alone
torchrun=$!
while :; do
    interrupted=
    wait "$torchrun" && status=0 || status=$?
    # A trapped signal ends `wait` with 128 and its number; torchrun's own status is yet to come.
    [[ $interrupted && $status -gt 128 ]] || break
done
exit "$status"
