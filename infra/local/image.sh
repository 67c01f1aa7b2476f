#!/usr/bin/env bash
# The container image without a container engine: buildah with chroot isolation, on a Debian made by debootstrap. As root, on Debian or Ubuntu.
#
#   image.sh base    a local base image, localhost/tartan-base (once; a minute)
#   image.sh build   localhost/tartan from infra/Dockerfile; BASE=... for another base, PIP_CONF=... for a pip.conf, CA=... for a certificate bundle
#   image.sh lambda  localhost/tartan-encoder from infra/Dockerfile.lambda-encoder, after build
#   image.sh test    start its server as user 10001 on a read-only root without a shell, and ask it
#   image.sh lambda-test   start the encoder's function in AWS's runtime emulator, and let it encode; MODEL=... for a model's folder
#
# With docker or podman none of this is needed: see the head of infra/Dockerfile.
set -euo pipefail
cd "$(dirname "$0")/../.."
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER="${STORAGE_DRIVER:-vfs}"
IMAGE="${IMAGE:-localhost/tartan}"
LOCAL_BASE=localhost/tartan-base
SUITE="${SUITE:-bookworm}"

need() {
    command -v "$1" >/dev/null || { echo "$1 is needed: apt-get install $1" >&2; exit 2; }
}

base() {
    need buildah; need debootstrap
    if buildah images "$LOCAL_BASE" >/dev/null 2>&1; then return; fi
    local folder container
    folder="${BASE_FOLDER:-}"
    if [ -z "$folder" ]; then
        folder=$(mktemp -d)
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$SUITE" "$folder" >&2
    fi
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$folder" / >/dev/null
    buildah commit --quiet --rm "$container" "$LOCAL_BASE" >/dev/null
    [ -n "${BASE_FOLDER:-}" ] || rm -rf "$folder"
}

build() {  # DOCKERFILE TAG
    need buildah
    local more=()
    if [ -z "${BASE:-}" ]; then base; BASE=$LOCAL_BASE; fi
    if [ -n "${PIP_CONF:-}" ]; then more+=(--secret "id=pip,src=$PIP_CONF"); fi
    if [ -n "${CA:-}" ]; then more+=(--volume "$CA:/etc/ssl/certs/ca-certificates.crt:ro"); fi
    buildah bud --quiet --layers --format docker --build-arg "BASE=$BASE" --build-arg "SERVER=$IMAGE" --ignorefile infra/Dockerfile.dockerignore \
        "${more[@]}" -f "infra/$1" -t "$2" .
}

case "${1:-}" in
    base) base ;;
    build) build Dockerfile "$IMAGE" ;;
    lambda) build Dockerfile.lambda-encoder "$IMAGE-encoder" ;;
    test) exec "${PYTHON:-python3}" infra/local/image_test.py "$IMAGE" ;;
    lambda-test) exec "${PYTHON:-python3}" infra/local/image_lambda_test.py "$IMAGE-encoder" ;;
    *) sed -n '2,11p' "$0"; exit 2 ;;
esac
