#!/usr/bin/env bash
# A Cloud TPU slice: creates it if necessary, installs aatjax on every host, and starts the same
# command on all of them, with the hosts' numbers and addresses from the TPU's metadata.
#
#   NAME=ast ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=gs://mine \
#       tools/launch/tpu_vm.sh folder --data.path /mnt/bucket/sounds --out /mnt/bucket/runs/one
#
# BUCKET is mounted at /mnt/bucket on every host (gcsfuse) for data, weights and the run folder. After
# a preemption run it again: the run continues from its last checkpoint.
set -euo pipefail

: "${NAME:?name of the TPU}" "${ZONE:?zone}" "${TYPE:?accelerator type, such as v5litepod-16}"
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"
SOURCE="${SOURCE:-aatjax[tpu]}" # what pip installs: a wheel's URL, or a name in your registry
[ "$#" -gt 0 ] || { echo "usage: tpu_vm.sh CONFIG [flags of aatjax train]" >&2; exit 2; }

if ! gcloud compute tpus tpu-vm describe "$NAME" --zone "$ZONE" >/dev/null 2>&1; then
    gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" \
        --version "$VERSION" ${SPOT:+--spot}
fi

everywhere() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"
}

everywhere "python3 -m venv ~/aatjax && ~/aatjax/bin/pip install -q '$SOURCE'"
if [ -n "${BUCKET:-}" ]; then
    everywhere "sudo mkdir -p /mnt/bucket && sudo chmod 777 /mnt/bucket && \
        (mountpoint -q /mnt/bucket || gcsfuse --implicit-dirs '${BUCKET#gs://}' /mnt/bucket)"
fi
# On each host: `worker-network-endpoints` lists the hosts in order, as names or as name:id:address.
START=$(cat <<'REMOTE'
read_metadata() {
    curl -sf -H 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
hosts=$(read_metadata worker-network-endpoints)
first=${hosts%%,*}
commas=${hosts//[^,]/}
joined=()
if [ -n "$commas" ]; then
    joined=(--coordinator "${first##*:}:8482" --processes "$((${#commas} + 1))"
        --process "$(read_metadata agent-worker-number)")
fi
~/aatjax/bin/aatjax train "${joined[@]}"
REMOTE
)
everywhere "$START $(printf '%q ' "$@")"
