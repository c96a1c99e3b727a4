#!/usr/bin/env bash
# Unpack Debian's headless Chromium under FOLDER, with the libraries that the host lacks; no root is needed.
# usage: tests/chromium.sh FOLDER; then: FOLDER/chromium. 95 MB are downloaded, and 280 MB unpacked, in 15 s.
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
[ ! -x "$1/chromium" ] || exit 0
grep -qs '^ID=debian' /etc/os-release || { echo "$0: this needs Debian; elsewhere put chromium on PATH" >&2; exit 1; }
mkdir -p "$1"
prefix=$(cd "$1" && pwd -P)
work=$(mktemp -d "$prefix/.install.XXXXXX")
trap 'rm -rf "$work"' EXIT
# shellcheck source=apptainer/apt.sh
. "$(dirname "$0")/../apptainer/apt.sh"
# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-sid}")

mkdir "$work/debs"
(cd "$work/debs" && apt_in "$release" /var/lib/dpkg/status download chromium-headless-shell chromium-common)
shell=$(echo "$work"/debs/chromium-headless-shell_*.deb)
# What it depends on; of chromium-common, which is for a browser with windows, the tables of Unicode alone.
mapfile -t libraries < <(dpkg-deb -f "$shell" Depends | tr ',' '\n' | sed 's/^ *//; s/[ (:|].*//' | grep -v '^chromium')
apt_in "$release" /var/lib/dpkg/status install -y --download-only "${libraries[@]}" fonts-dejavu-core > /dev/null
for deb in "$shell" "$work"/apt-*/cache/archives/*.deb; do
  [[ $deb == *'*'* || $deb == */libc6_* ]] || dpkg-deb -x "$deb" "$prefix"
done
dpkg-deb --fsys-tarfile "$work"/debs/chromium-common_*.deb | tar -x -C "$prefix" --wildcards '*/icudtl.dat' '*.bin'
# Without a sandbox, which root has not and a test needs not; under the locale C its language is none that pages take.
cat > "$work/chromium" << END
#!/bin/sh
export LANG=en_US.UTF-8
export LD_LIBRARY_PATH="$(echo "$prefix"/usr/lib/*-linux-gnu):$(echo "$prefix"/usr/lib/*-linux-gnu/pulseaudio)"
exec "$prefix/usr/lib/chromium/chromium-headless-shell" --no-sandbox --disable-gpu --disable-dev-shm-usage "\$@"
END
chmod +x "$work/chromium"
mv "$work/chromium" "$prefix/chromium"
