#!/bin/bash
#PBS -N train-swallow-8b-exp1
#PBS -P tga-okazaki
#PBS -l select=4:mpiprocs=8
#PBS -l place=scatter
#PBS -l walltime=24:00:00
#PBS -j oe
# train of swallow-8b-exp1. Rendered by cptain jobs runs/swallow-8b.toml --site pbs --out jobs (cptain 0.1.0, site pbs)
# To change it, change the run file or the site and render again. For another run file: qsub -v RUN=FILE,IMAGE=FILE train.sh
set -u
deadline=$(($(date +%s) + 85800))  # 24:00:00 less 00:10:00 to save
cd "${PBS_O_WORKDIR:-.}" || exit 1  # PBS starts jobs in $HOME
RUN=${RUN:-jobs/run.toml}
IMAGE=${IMAGE:-/gs/bs/tga-okazaki/ma/cptain.sif}
fail() { echo "train.sh on $HOSTNAME: $*" >&2; exit 1; }
[[ $RUN = /* ]] || RUN=$PWD/$RUN
[ -r "$RUN" ] || fail "$RUN: no such run file here; it must be on a disk that this node mounts"
[ -e "$IMAGE" ] || fail "$IMAGE: no such image here (make image builds it)"
environment=${RUN%/*}/environment  # submit.sh's: the user's variables and tokens, for this user alone
[ -z "${LAST-}" ] || { trap 'rm -f "$environment"' EXIT; [ -e "$environment" ] || echo "train.sh on $HOSTNAME: $environment is gone, as this job has run before: the variables of submit.sh's shell (tokens and others) are not set; submit.sh gives them again" >&2; }
apptainer=$(command -v apptainer) || fail 'apptainer: no such program'
binds=
for folder in /*; do
  case $folder in
    /bin | /boot | /dev | /etc | /lib* | /opt | /proc | /root | /run | /sbin | /sys | /tmp | /usr | /var) ;;
    *) [ ! -r "$folder" ] || binds+=,$folder ;;
  esac
done
run=("$apptainer" run ${binds:+--bind "${binds#,}"})  # an option, which SingularityCE takes too; it reads no APPTAINER_BIND
settings=("CPTAIN_IMAGE=$IMAGE" OMP_NUM_THREADS=1 )
# shellcheck disable=SC2016
with=(bash -c '[ ! -O "$0" ] || . "$0"; exec "$@"' "$environment")
settings+=("CPTAIN_LINK=${LINK:-1}" CPTAIN_NODES=4 CPTAIN_GPUS=8 "CPTAIN_DEADLINE=$deadline")
# shellcheck disable=SC2016
with+=(bash -c 'for file in "$0" "$1" "$2"; do
  [ -e "$file" ] || { echo "train.sh on $(uname -n): $file: the first node of the job has it, and this one does not" >&2; exit 1; }
done; exec "${@:3}"' "$apptainer" "$IMAGE" "$RUN")
node=("${with[@]}" "${run[@]}" --nv --app train "$IMAGE" "$RUN")
hosts=$PWD/hosts-$PBS_JOBID  # a copy that every node can read
trap 'rm -f "$hosts" "$hosts.mpi" ${LAST:+"$environment"}' EXIT
cp "$PBS_NODEFILE" "$hosts" || fail "$hosts: cannot be written"
settings+=("PBS_NODEFILE=$hosts" "PBS_JOBID=$PBS_JOBID")
mapfile -t names < <(awk '!seen[$1]++ { print $1 }' "$hosts")
launch() {  # RANK HOST: one container on that node
  local command=(env "${settings[@]}" "CPTAIN_NODE=$1" "${node[@]}")
  if [ "$1" = 0 ]; then "${command[@]}"; else
    pbs_tmrsh "$2" "${command[@]}"
  fi
}
for rank in "${!names[@]}"; do launch "$rank" "${names[rank]}" & done
wait -n  # for the first node to end; then the others have half a minute to say why
status=$?
for _ in {1..30}; do [ "$(jobs -rp)" ] || break; sleep 1; done
mapfile -t left < <(jobs -rp)
[ ${#left[@]} = 0 ] || kill "${left[@]}"  # and the scheduler ends what they started
case $status in 0 | 2 | 75) exit $status ;; *) exit 1 ;; esac  # 75: work remains, and the next job continues
