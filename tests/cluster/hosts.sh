#!/bin/bash
# Pretend hosts on one machine, for tests: each has a network, a host name, processes and a /tmp of its own, and shares
# all other files. Needs root.
#   hosts.sh up FOLDER NAME...       start hosts NAME... with addresses 10.99.0.1, .2, ...; their state is in FOLDER
#   hosts.sh run FOLDER NAME COMMAND...
#   hosts.sh down FOLDER             end them; the kernel ends every process inside
set -euo pipefail
verb=$1 folder=$2
shift 2

start() {  # NAME NUMBER: a host whose first process only waits
  local name=$1 address=10.99.0.$2/24
  # shellcheck disable=SC2016  # $1 and $2 are the inner shell's
  setsid unshare --fork --pid --mount --mount-proc --uts --net --kill-child bash -c '
    hostname "$1"
    mount --bind "$2/hosts" /etc/hosts
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    ip link set lo up
    touch "$2/$1.up"
    trap "exit 0" TERM
    while :; do sleep 3600 & wait $!; done' host "$name" "$folder" < /dev/null >> "$folder/log" 2>&1 &
  echo $! > "$folder/$name.unshare"
  for _ in {1..100}; do [ -e "$folder/$name.up" ] && break; sleep 0.05; done
  pgrep -P "$(cat "$folder/$name.unshare")" > "$folder/$name.pid"
  if [ "$2" = 1 ]; then  # the first holds the bridge that the others plug into
    inside "$name" ip link add br0 type bridge
    inside "$name" ip link set br0 up
    inside "$name" ip addr add "$address" dev br0
  else
    inside "$first" ip link add "v$2" type veth peer name e0 netns "$(cat "$folder/$name.pid")"
    inside "$first" ip link set "v$2" master br0 up
    inside "$name" ip link set e0 up
    inside "$name" ip addr add "$address" dev e0
  fi
}

inside() { nsenter --target "$(cat "$folder/$1.pid")" --net "${@:2}"; }

case $verb in
  up)
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd) first=$1
    echo "127.0.0.1 localhost" > "$folder/hosts"
    for name; do echo "10.99.0.$(($(wc -l < "$folder/hosts"))) $name" >> "$folder/hosts"; done
    number=0
    for name; do start "$name" $((++number)); done
    ;;
  run)
    name=$1
    shift
    exec nsenter --target "$(cat "$folder/$name.pid")" --mount --uts --net --pid --wdns="$PWD" -- "$@"
    ;;
  down)
    for file in "$folder"/*.unshare; do
      [ ! -e "$file" ] || kill -9 "$(cat "$file")" 2> /dev/null || true
    done
    rm -rf "$folder"
    ;;
esac
