#!/bin/bash
# Runs a command in the image with every folder of this machine in sight but the system's own: make jobs and make submit.
#   inside.sh IMAGE COMMAND...
set -euo pipefail
image=$1
[ -e "$image" ] || { echo "$image: no such image; make image builds it, and IMAGE=FILE names another" >&2; exit 1; }
command -v "$APPTAINER" > /dev/null || { echo "no apptainer or singularity on PATH: module load one, perhaps" >&2; exit 1; }
binds=()
for folder in /*; do
  case $folder in
    /bin | /boot | /dev | /etc | /lib* | /opt | /proc | /root | /run | /sbin | /sys | /tmp | /usr | /var) ;;
    *) [ ! -r "$folder" ] || binds+=(--bind "$folder") ;;
  esac
done
CPTAIN_IMAGE=$(realpath "$image")
export CPTAIN_IMAGE  # Apptainer's own variable names a temporary folder where it unpacks the image first
exec "$APPTAINER" --silent exec "${binds[@]}" "$image" "${@:2}"
