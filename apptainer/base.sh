#!/usr/bin/env bash
# Make the CPU image's base, a folder with Debian 12's Python 3.11, from a Debian mirror alone: no container registry,
# no root. usage: apptainer/base.sh FOLDER [PACKAGE...]
# The packages are unpacked and not configured: enough for Python and pip, though not for apt in %post. More packages can
# be named; to clone Megatron-LM instead of PyPI's, the base needs git, make, g++ and python3-dev.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 FOLDER [PACKAGE...]" >&2; exit 2; }
umask 022
mkdir -p "$(dirname "$1")"
folder=$(cd "$(dirname "$1")" && pwd -P)/$(basename "$1")
shift
work=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$work"' EXIT
# shellcheck source=apptainer/apt.sh
. "$(dirname "$0")/apt.sh"

packages=(base-files base-passwd bash ca-certificates coreutils dash findutils grep gzip hostname libc-bin libstdc++6 mawk
  procps python3 python3-pip sed tar util-linux)
: > "$work/nothing"
apt_in bookworm "$work/nothing" install -y --download-only "${packages[@]}" "$@" > /dev/null

root=$work/root
mkdir -p "$root"/{mnt,srv,opt,tmp,var/tmp,etc/ssl/certs,usr/{bin,sbin,lib,lib64,local/bin}}
for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done
for package in "$work"/apt-bookworm-nothing/cache/archives/*.deb; do
  dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink --no-same-owner -C "$root"
done

# What the packages' own scripts would have done.
cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
ln -s mawk "$root/usr/bin/awk"
find "$root/usr/share/ca-certificates" -name '*.crt' -exec cat {} + > "$root/etc/ssl/certs/ca-certificates.crt"
chmod 1777 "$root/tmp" "$root/var/tmp"

rm -rf "$root"/usr/share/{man,locale,info}
find "$root/usr/share/doc" -type f ! -name copyright -delete
rm -rf "$folder"
mv "$root" "$folder"
