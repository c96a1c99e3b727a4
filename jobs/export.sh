#!/bin/bash
#PBS -N export-swallow-8b-exp1
#PBS -P tga-okazaki
#PBS -l select=1
#PBS -l walltime=12:00:00
#PBS -j oe
# export of swallow-8b-exp1. Rendered by cptain jobs runs/swallow-8b.toml --site pbs --out jobs (cptain 0.1.0, site pbs)
# To change it, change the run file or the site and render again. For another run file: qsub -v RUN=FILE,IMAGE=FILE export.sh
set -u
cd "${PBS_O_WORKDIR:-.}" || exit 1  # PBS starts jobs in $HOME
RUN=${RUN:-jobs/run.toml}
IMAGE=${IMAGE:-/gs/bs/tga-okazaki/ma/cptain.sif}
fail() { echo "export.sh on $HOSTNAME: $*" >&2; exit 1; }
[[ $RUN = /* ]] || RUN=$PWD/$RUN
[ -r "$RUN" ] || fail "$RUN: no such run file here; it must be on a disk that this node mounts"
[ -e "$IMAGE" ] || fail "$IMAGE: no such image here (make image builds it)"
environment=${RUN%/*}/environment  # submit.sh's: the user's variables and tokens, for this user alone
[ -z "${LAST-}" ] || { trap 'rm -f "$environment"' EXIT; [ -e "$environment" ] || echo "export.sh on $HOSTNAME: $environment is gone, as this job has run before: the variables of submit.sh's shell (tokens and others) are not set; submit.sh gives them again" >&2; }
apptainer=$(command -v apptainer) || fail 'apptainer: no such program'
binds=
for folder in /*; do
  case $folder in
    /bin | /boot | /dev | /etc | /lib* | /opt | /proc | /root | /run | /sbin | /sys | /tmp | /usr | /var) ;;
    *) [ ! -r "$folder" ] || binds+=,$folder ;;
  esac
done
run=("$apptainer" run ${binds:+--bind "${binds#,}"})  # an option, which SingularityCE takes too; it reads no APPTAINER_BIND
settings=("CPTAIN_IMAGE=$IMAGE" )
# shellcheck disable=SC2016
with=(bash -c '[ ! -O "$0" ] || . "$0"; exec "$@"' "$environment")
env "${settings[@]}" "${with[@]}" "${run[@]}" --app export "$IMAGE" "$RUN" --iteration final
status=$?
case $status in 0 | 2 | 75) exit $status ;; *) exit 1 ;; esac  # 75: work remains, and the next job continues
