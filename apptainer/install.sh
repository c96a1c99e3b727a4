#!/usr/bin/env bash
# Install a private Apptainer under FOLDER, on Debian; nothing outside FOLDER is touched, and no root is needed.
# usage: apptainer/install.sh FOLDER, as the user who will run it; then: FOLDER/bin/apptainer
# Debian's own release has no apptainer. The package is from unstable, its helper programs are from the host's release,
# and the few things in it that the host's libc lacks are rewritten below.
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
umask 022
mkdir -p "$1"
prefix=$(cd "$1" && pwd -P)
if "$prefix/bin/apptainer" --version 2> /dev/null; then exit 0; fi
command -v python3 > /dev/null || { echo "$0: python3 is needed: apt-get install python3" >&2; exit 1; }

work=$(mktemp -d "$prefix/.install.XXXXXX")
trap 'rm -rf "$work"' EXIT
# shellcheck source=apptainer/apt.sh
. "$(dirname "$0")/apt.sh"
# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-sid}")
case $arch in
  amd64) multiarch=x86_64-linux-gnu ;;
  arm64) multiarch=aarch64-linux-gnu ;;
  *) echo "$0: no apptainer for $arch" >&2; exit 1 ;;
esac

cd "$work"
mkdir debs package helpers
(
  cd debs
  apt_in sid /var/lib/dpkg/status download apptainer
  apt_in "$release" /var/lib/dpkg/status download patchelf fakeroot libfakeroot
)
# The helper programs and their libraries, except those that the host has: apptainer finds these on PATH.
apt_in "$release" /var/lib/dpkg/status install -y --download-only \
  squashfs-tools squashfuse fuse-overlayfs fuse2fs libseccomp2 libsqlite3-0 > /dev/null
dpkg-deb -x debs/apptainer_*.deb package
for deb in debs/*.deb apt-"$release"-status/cache/archives/*.deb; do
  case $deb in */apptainer_* | */libc6_* | *'*'*) ;; *) dpkg-deb -x "$deb" helpers ;; esac
done

# Laid out as apptainer's own relocation expects. Its `starter` takes dist/lib for the prefix, because Debian's libexec
# folder is two levels deep: hence the links.
dist=$work/dist
mkdir "$dist"
cp -a package/usr/bin package/usr/lib package/etc package/var "$dist/"
ln -s . "$dist/lib/lib"
ln -s ../etc "$dist/lib/etc"
ln -s ../var "$dist/lib/var"
private=$dist/lib/$multiarch/apptainer
patchelf=helpers/usr/bin/patchelf
for program in mksquashfs unsquashfs squashfuse squashfuse_ll fuse-overlayfs fuse2fs fakeroot-sysv faked-sysv; do
  [ -e "helpers/usr/bin/$program" ] || continue
  install -m755 "helpers/usr/bin/$program" "$private/bin/$program"
  # shellcheck disable=SC2016  # $ORIGIN is for the dynamic loader
  [ $program = fakeroot-sysv ] || $patchelf --set-rpath '$ORIGIN/../lib' "$private/bin/$program"
done
find helpers -path '*/lib/*' -name '*.so*' ! -type d ! -path '*/libfakeroot/*' -exec cp -a {} "$private/lib/" \;
cp -a "$(find helpers -name libfakeroot-sysv.so)" "$private/lib/"
# fakeroot is a shell script with absolute paths in it.
# shellcheck disable=SC2016
sed -i -e 's,^FAKEROOT_PREFIX=/.*,FAKEROOT_BINDIR=$(cd "${0%/*}" \&\& pwd),' \
  -e 's,^FAKEROOT_BINDIR=/.*,FAKEROOT_PREFIX=${FAKEROOT_BINDIR%/*},' \
  -e 's,^PATHS=.*,PATHS=$FAKEROOT_PREFIX/lib,' "$private/bin/fakeroot-sysv"

# What the package needs beyond an older libc is C23's __isoc23_strto*, which differ from strto* in 0b literals alone:
# those symbols are pointed at the plain ones. Anything else too new is an error.
python3 - "$dist/bin/apptainer" "$private/bin/starter" "$private/lib/offsetpreload.so" <<'PY'
import os
import struct
import sys

host = tuple(map(int, os.confstr("CS_GNU_LIBC_VERSION").split()[1].split(".")))


def too_new(version):
    return version.startswith("GLIBC_2") and tuple(map(int, version[6:].split("."))) > host


for path in sys.argv[1:]:
    elf = bytearray(open(path, "rb").read())
    assert elf[:6] == b"\x7fELF\x02\x01", path  # 64-bit, little-endian
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * size) for i in range(count)]
    symbols = next(section for section in sections if section[1] == 11)  # SHT_DYNSYM
    strings = sections[symbols[6]][4]
    versions = next(section for section in sections if section[1] == 0x6FFFFFFF)[4]  # SHT_GNU_versym
    needed = next(section for section in sections if section[1] == 0x6FFFFFFE)[4]  # SHT_GNU_verneed

    def name(offset):
        return elf[strings + offset : elf.index(0, strings + offset)].decode()

    missing, present = {}, None
    while True:
        _, entries, _, auxiliary, step = struct.unpack_from("<HHIII", elf, needed)
        entry = needed + auxiliary
        for _ in range(entries):
            digest, _, index, text, following = struct.unpack_from("<IHHII", elf, entry)
            if too_new(name(text)):
                missing[index] = entry
            elif name(text).startswith("GLIBC_2"):
                present = digest, text
            entry += following
        if not step:
            break
        needed += step
    for i in range(symbols[5] // 24):
        (version,) = struct.unpack_from("<H", elf, versions + 2 * i)
        if version & 0x7FFF in missing:
            at = symbols[4] + 24 * i
            (text,) = struct.unpack_from("<I", elf, at)
            if not name(text).startswith("__isoc23_"):
                sys.exit(f"{path}: needs {name(text)}, which this libc lacks")
            struct.pack_into("<I", elf, at, text + len("__isoc23_"))
            struct.pack_into("<H", elf, versions + 2 * i, 1)  # of no particular version
    for entry in missing.values():  # the loader checks this list too: name a version that the host has
        struct.pack_into("<I", elf, entry, present[0])
        struct.pack_into("<I", elf, entry + 8, present[1])
    open(path, "wb").write(elf)
PY
# Only a host without libseccomp2 or libsqlite3-0 needs these two.
if ldd "$dist/bin/apptainer" | grep -q 'not found'; then
  $patchelf --set-rpath "\$ORIGIN/../lib/$multiarch/apptainer/lib" "$dist/bin/apptainer"
fi
# shellcheck disable=SC2016
if ldd "$private/bin/starter" | grep -q 'not found'; then $patchelf --set-rpath '$ORIGIN/../lib' "$private/bin/starter"; fi
missing=$(for file in "$dist/bin/apptainer" "$private"/bin/*; do ldd "$file" 2> /dev/null || :; done | grep 'not found' || :)
[ -z "$missing" ] || { echo "$missing" >&2; exit 1; }

# A root that lacks capabilities, as in a container or a sandboxed machine, must not ask for them.
lacking=
if [ "$(id -u)" = 0 ]; then
  lacking=$(python3 - "$dist/etc/apptainer" <<'PY'
import json
import re
import sys
from pathlib import Path

names = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE""".split()
names = ["CAP_" + name for name in names][: int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1]
have = int(re.search(r"CapPrm:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)
lacking = [name for i, name in enumerate(names) if not have >> i & 1]
if lacking:
    folder = Path(sys.argv[1])
    allowed = [name for name in names if name not in lacking]
    (folder / "capability.json").write_text(json.dumps({"users": {"root": allowed}}))
    configuration = folder / "apptainer.conf"
    full = "root default capabilities = full"
    configuration.write_text(configuration.read_text().replace(full, full.replace("full", "file")))
print(",".join(lacking))
PY
  )
fi

rm -rf "$prefix/dist"
mv "$dist" "$prefix/dist"
mkdir -p "$prefix/bin"
cat > "$prefix/bin/apptainer" <<SH
#!/bin/sh
here=\$(dirname -- "\$(readlink -f -- "\$0")")
if [ "\$(id -u)" = 0 ]; then
  lacking='$lacking'   # build reads no apptainer.conf for %post and %test
  [ -z "\$lacking" ] || export APPTAINER_DROP_CAPS="\${APPTAINER_DROP_CAPS-\$lacking}"
elif [ ! -w /dev/fuse ]; then
  export APPTAINER_UNSQUASH="\${APPTAINER_UNSQUASH-1}"   # no FUSE: an image is unpacked to run it
fi
exec "\$here/../dist/bin/apptainer" "\$@"
SH
chmod 755 "$prefix/bin/apptainer"
ln -sfn apptainer "$prefix/bin/singularity" # the name that spython calls
"$prefix/bin/apptainer" --version
