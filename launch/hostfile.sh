#!/usr/bin/env bash
# The hosts of a hostfile (a line `NAME slots=GPUS` each), by DeepSpeed's runner: needs ssh without a
# password from here to each host, pdsh here, and the same paths everywhere.
# Usage: launch/hostfile.sh [--dry-run] [--exclude HOST]... [--master ADDRESS] HOSTFILE train FILE...
# What gets into the runner's shell line is checked by megavideo/launch/hostfile.py.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

options=()
while [[ ${1-} == --* ]]; do
    case $1 in
        --dry-run) options+=("$1") && shift ;;
        --exclude | --master) options+=("$1" "${2?error: $1 needs a value}") && shift 2 ;;
        *) printf 'error: no option %s; options of megavideo follow HOSTFILE\n' "$1" >&2 && exit 2 ;;
    esac
done
hostfile=${1?error: name a hostfile}
shift
[[ -f $hostfile ]] || { printf 'error: no hostfile %s\n' "$hostfile" >&2 && exit 2; }

# Processes of a node, for env.sh: threads are dealt out by it. Set OMP_NUM_THREADS where the nodes
# have another number of cores than this machine.
slots=$(sed -n 's/^[^#]*slots=\([0-9]\{1,2\}\)\b.*/\1/p' "$hostfile" | sort -n | tail -n 1)
export MEGAVIDEO_PROCESSES=${MEGAVIDEO_PROCESSES:-${slots:-1}}
# shellcheck source=launch/env.sh
source "$here/env.sh"
for name in "${EXPORTED[@]}"; do
    options+=(--export "$name")
done
exec "$MEGAVIDEO_PYTHON" -m megavideo.launch.hostfile "${options[@]}" "$hostfile" "$@"
