#!/usr/bin/env bash
# Build the image: checked before it starts, and never half there. usage: apptainer/build.sh [--sandbox] IMAGE
# The Makefile runs it and sets what else it reads from the environment: APPTAINER (the program), BOOTSTRAP, BASE,
# MEGATRON, MEGATRON_REPO, MEGATRON_REF, IMAGE_GB and FORCE. APPTAINER_CACHEDIR and APPTAINER_TMPDIR may be set too.
# APPTAINER may be SingularityCE's program: it has other options, and reads the same variables as SINGULARITY_….
set -euo pipefail
umask 022
sandbox=()
if [ "${1-}" = --sandbox ]; then
  sandbox=(--sandbox)
  shift
fi
[ $# = 1 ] || { echo "usage: $0 [--sandbox] IMAGE" >&2; exit 2; }
die() { echo "image: $*" >&2; exit 1; }

mkdir -p "$(dirname "$1")"
folder=$(cd "$(dirname "$1")" && pwd -P)
image=$folder/$(basename "$1")
cd "$(dirname "$0")/.." # where the paths in Singularity.def begin

version=$("$APPTAINER" version 2> /dev/null) ||
  die "no apptainer or singularity on PATH: try module load apptainer, or on Debian apptainer/install.sh .apptainer"
kind=apptainer oldest=1.2 # the first with build arguments
case $("$APPTAINER" --version) in *[Ss]ingularity*) kind=singularity oldest=4.0 ;; esac
printf '%s\n' $oldest "$version" | sort --version-sort --check=quiet ||
  die "$APPTAINER is version $version, and Singularity.def needs $oldest or later"
[ ! -e "$image" ] || [ "${FORCE-}" = 1 ] || die "$image exists: FORCE=1 replaces it"

# Never in $HOME or /tmp, which on a cluster are small.
export APPTAINER_CACHEDIR=${APPTAINER_CACHEDIR:-$folder/.apptainer/cache}
export APPTAINER_TMPDIR=${APPTAINER_TMPDIR:-$folder/.apptainer/tmp}
mkdir -p "$APPTAINER_CACHEDIR" "$APPTAINER_TMPDIR"

# check_space FOLDER GB ADVICE
check_space() {
  local free
  free=$(df --output=avail --block-size=1G "$1" | tail -n 1)
  [ "$free" -ge "$2" ] || die "$1 has ${free// /} GB free, and building needs $2 GB there: $3"
}
move="name a larger disk with APPTAINER_TMPDIR=/folder"
if [ "$(stat -c %d "$folder")" = "$(stat -c %d "$APPTAINER_TMPDIR")" ]; then
  check_space "$folder" $((3 * IMAGE_GB)) "free some, or $move"
else
  check_space "$folder" "$IMAGE_GB" "free some, or name another place with IMAGE=/folder/cptain.sif"
  check_space "$APPTAINER_TMPDIR" $((2 * IMAGE_GB)) "free some, or $move"
fi

# %post sees none of the host's environment: how pip and git reach the network from here is told again.
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST PIP_DEFAULT_TIMEOUT PIP_PROXY \
  http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
  [ -z "${!name-}" ] || export "${kind^^}ENV_$name=${!name}"
done
bind=()
if [ -d "${PIP_FIND_LINKS-}" ]; then # a folder of wheels; every base has /mnt
  bind+=(--bind "$PIP_FIND_LINKS:/mnt:ro")
  export "${kind^^}ENV_PIP_FIND_LINKS=/mnt"
fi
if [ -r "${PIP_CERT-}" ]; then # a proxy's certificate, which belongs in no image
  bind+=(--bind "$PIP_CERT:/etc/ssl/certs/ca-certificates.crt:ro")
  export "${kind^^}ENV_PIP_CERT=/etc/ssl/certs/ca-certificates.crt"
fi

commit=unknown
if git rev-parse --quiet --verify HEAD > /dev/null 2>&1; then
  commit=$(git rev-parse HEAD)
  [ -z "$(git status --porcelain -- Singularity.def apps apptainer pyproject.toml)" ] || commit=$commit+changes
fi

flags=() elsewhere=
if [ $kind = apptainer ]; then
  flags+=(--mksquashfs-args "-comp zstd -Xcompression-level 3")
  # A user in /etc/subuid needs newuidmap; without it Apptainer fails, though it can do without both.
  [ "$(id -u)" = 0 ] || command -v newuidmap > /dev/null || flags+=(--ignore-subuid)
else
  [ "$(id -u)" = 0 ] || flags+=(--fakeroot)
  elsewhere="; an image that Apptainer built on another machine runs here too: copy it to $image"
fi

scratch=$(mktemp -d "$APPTAINER_TMPDIR/build.XXXXXX")
partial=$folder/.$(basename "$image").partial
build=
clean() {
  trap '' INT TERM HUP # make passes on the signal that a terminal or a scheduler gave us too, amid this
  # wait and trap: apptainer in the foreground would keep this shell from hearing a signal
  [ -z "$build" ] || { kill -TERM "$build" 2> /dev/null && wait "$build" || true; }
  chmod -R u+w "$scratch" "$partial" 2> /dev/null || true
  rm -rf "$scratch" "$partial"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
rm -rf "$partial"
export "${kind^^}_CACHEDIR=$APPTAINER_CACHEDIR"
env "${kind^^}_TMPDIR=$scratch" "$APPTAINER" build "${sandbox[@]}" "${flags[@]}" "${bind[@]}" \
  --build-arg "BOOTSTRAP=$BOOTSTRAP" --build-arg "BASE=$BASE" --build-arg "COMMIT=$commit" \
  --build-arg "MEGATRON=$MEGATRON" --build-arg "MEGATRON_REPO=$MEGATRON_REPO" --build-arg "MEGATRON_REF=$MEGATRON_REF" \
  "$partial" Singularity.def &
build=$!
wait "$build" || { status=$? build=; die "the build failed (status $status; its reason is above)$elsewhere$([ ! -e "$image" ] || echo "; $image is as it was")"; }
build=

if [ -d "$image" ]; then mv -T "$image" "$partial.old"; fi # a folder cannot be renamed over
mv -T "$partial" "$image"
rm -rf "$partial.old"
echo "image: $image"
