#!/bin/sh
# Build the image of the Dockerfile and try what came out, as root on a Debian that has buildah and debootstrap and neither
# Docker nor a registry of images. A Debian made by debootstrap takes the place of the base image, under its name.
#
#   tests/deploy/image.sh base MIRROR           make the base image from a Debian mirror
#   tests/deploy/image.sh build NAME [OPTION..] build it; options are buildah's (--build-arg DEMO=true, --secret, --volume)
#   tests/deploy/image.sh try NAME [TARGET]     start it on a read-only root as user 10001, fetch its page and ask it a question;
#                                               TARGET train: train with it, too
set -eu
cd "$(dirname "$0")/../.."
base=$(sed -n 's/^ARG BASE=//p' Dockerfile)

make_base() {
    root=$(mktemp -d)
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip bookworm "$root" "$1"
    ln -s /usr/bin/python3 "$root/usr/local/bin/python3" # where the base image has it
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/" # of this machine: an own mirror may have an own authority
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    container=$(buildah from scratch)
    buildah copy --quiet "$container" "$root" /
    buildah commit --quiet --format docker "$container" "$base"
    buildah rm "$container"
    rm -rf "$root"
}

build() {
    name=$1
    shift
    # The format of Docker: OCI's has no health check. Layers are not kept for the next build: Debian 12's buildah cannot mount
    # a stage that it has from an earlier one (its issue 4375). What pip and npm fetched is kept.
    buildah build --isolation chroot --format docker --layers=false --pull-never --tag "$name" "$@" .
    buildah images "$name"
}

try() {
    target=${2:-serve}
    container=$(buildah from --pull-never "$1")
    mounted=$(buildah mount "$container")
    data=$(mktemp -d)
    chown 10001:10001 "$data"
    trap 'buildah umount "$container"; buildah rm "$container"; rm -rf "$data"' EXIT
    printf 'size, unpacked: %s\n' "$(du -s --apparent-size --block-size=MB "$mounted" | cut -f1)"
    # The container's own namespaces of mounts and processes: root read-only, /data and /tmp to write, no rights, no network
    # but its own loopback.
    unshare --mount --pid --net --fork --kill-child sh -euc '
        root=$1 data=$2
        ip link set lo up
        mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
        mount --bind "$data" "$root/data"
        mount -t tmpfs none "$root/tmp" -o mode=1777
        mount -t proc none "$root/proc"
        mount --rbind /dev "$root/dev"
        exec chroot "$root" env --ignore-environment PATH=/opt/manylora/bin:/usr/local/bin:/usr/bin:/bin HOME=/data \
            MANYLORA_DATA_DIR=/data MANYLORA_API_KEYS=a-key-for-this-trial \
            setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all \
            python -c "$3" "$4"
    ' sh "$mounted" "$data" "$(cat tests/deploy/inside_image.py)" "$target"
}

case $1 in
    base) make_base "$2" ;;
    build) shift && build "$@" ;;
    try) shift && try "$@" ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
