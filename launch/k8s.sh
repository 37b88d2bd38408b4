#!/usr/bin/env bash
# Kubernetes: a JobSet or a PyTorchJob, one pod a node; --dry-run prints what kubectl would get.
# Usage: launch/k8s.sh [--dry-run] [--kind jobset|pytorchjob] [--name NAME] [--nodes N] [--gpus N]
#                      [--image IMAGE] [--claim CLAIM] train FILE...
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/env.sh
source "$here/env.sh"   # for the interpreter that renders; each pod's node.sh reads it again

kind=jobset
send=(kubectl create -f -)
options=()
while [[ ${1-} == --* ]]; do
    case $1 in
        --dry-run) send=(cat) && shift ;;
        --kind) kind=${2?error: --kind needs a value} && shift 2 ;;
        *) options+=("$1" "${2?error: $1 needs a value}") && shift 2 ;;
    esac
done
[[ $kind == jobset || $kind == pytorchjob ]] || fail "--kind $kind: use jobset or pytorchjob"
[[ $# -gt 0 ]] || fail "say what to run, as: launch/k8s.sh --nodes 2 train FILE..."
yaml=$("$MEGAVIDEO_PYTHON" -m megavideo.launch.kubernetes "${options[@]}" "$here/k8s/$kind.yaml" "$@")
"${send[@]}" <<<"$yaml"
