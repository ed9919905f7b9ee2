#!/usr/bin/env bash
# A workload on a GKE cluster created by xpk (`xpk cluster create`): the same command on every host.
#
#   CLUSTER=mine ZONE=us-central2-b PROJECT=p TYPE=v5litepod-256 IMAGE=REGION-docker.pkg.dev/p/r/aatjax \
#       tools/launch/xpk.sh folder --data.path /shared/sounds --out /shared/runs/one
#
# IMAGE is a container with aatjax[tpu]; /shared must be a volume that all hosts mount.
set -euo pipefail

: "${CLUSTER:?}" "${ZONE:?}" "${PROJECT:?}" "${TYPE:?}" "${IMAGE:?}"
[ "$#" -gt 0 ] || { echo "usage: xpk.sh CONFIG [flags of aatjax train]" >&2; exit 2; }

xpk workload create \
    --workload "${WORKLOAD:-aatjax}" \
    --cluster "$CLUSTER" --zone "$ZONE" --project "$PROJECT" \
    --tpu-type "$TYPE" --num-slices "${SLICES:-1}" \
    --docker-image "$IMAGE" \
    --max-restarts "${RESTARTS:-10}" \
    --command "aatjax train $(printf '%q ' "$@")"
