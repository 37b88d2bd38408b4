#!/usr/bin/env bash
# All GPUs of this machine, or as many processes as MEGAVIDEO_PROCESSES says.
# Usage: launch/local.sh [--dry-run] train FILE... [--set SECTION.KEY=VALUE]...
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/env.sh
source "$here/env.sh"

dry_run=()
if [[ ${1-} == --dry-run ]]; then
    dry_run=(--dry-run)
    shift
fi
# --standalone meets at a free port of this machine.
exec "$here/node.sh" "${dry_run[@]}" --standalone --nproc-per-node "$MEGAVIDEO_PROCESSES" \
    --max-restarts "$MEGAVIDEO_MAX_RESTARTS" -m megavideo "$@"
