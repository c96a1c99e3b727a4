# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by install.sh and base.sh: apt-get on a state of its own, which needs no root and leaves the host's alone.
# Needs a Debian host, and $work, a scratch folder. Defines `arch`, `mirror` and `apt_in`.

if ! command -v apt-get > /dev/null || ! grep -qs '^ID=debian' /etc/os-release; then
  echo "$0: this needs Debian (apt-get); elsewhere install Apptainer 1.2 or later, and give make image-cpu another base:" \
    "make image-cpu BOOTSTRAP=docker BASE=python:3.11-slim" >&2
  exit 1
fi
arch=$(dpkg --print-architecture)

# The mirror that the host's own apt uses.
mirror=$(apt-get update --print-uris -o Debug::NoLocking=1 |
  sed -n "s,^'\(.*\)/dists/[a-z]*/InRelease'.*,\1,p" | grep -v security | head -n 1) || true
[ -n "$mirror" ] || { echo "$0: apt's sources name no Debian mirror" >&2; exit 1; }

# apt_in SUITE STATUS ARGUMENTS...: apt-get for a Debian release, where STATUS says which packages are there already.
apt_in() {
  local suite=$1 status=$2 state signed=
  shift 2
  state=$work/apt-$suite-${status##*/}
  if [ ! -d "$state" ]; then
    mkdir -p "$state"/lists/partial "$state"/cache/archives/partial
    [ ! -e /usr/share/keyrings/debian-archive-keyring.gpg ] ||
      signed="[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
    echo "deb $signed$mirror $suite main" > "$state/sources.list"
    apt_in "$suite" "$status" update
  fi
  apt-get -qq -o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
    -o Dir::State="$state" -o Dir::State::lists="$state/lists" -o Dir::State::status="$status" \
    -o Dir::Cache="$state/cache" -o Debug::NoLocking=1 -o APT::Sandbox::User=root -o Acquire::Retries=3 \
    -o Acquire::Languages=none -o APT::Install-Recommends=false -o APT::Keep-Downloaded-Packages=true "$@"
}
