#!/bin/bash
# Submits the jobs of swallow-8b-exp1, each after those whose results it needs and checks. Rendered by cptain jobs runs/swallow-8b.toml --site pbs --out jobs (cptain 0.1.0, site pbs)
set -euo pipefail
dry_run='' stages='' state=''
for argument; do case $argument in
  --dry-run) dry_run=1 ;;
  --state) state=1 ;;
  preprocess | convert | train | export | doctor) stages+=" $argument" ;;
  *) echo "usage: submit.sh [--dry-run | --state] [preprocess] [convert] [train] [export] | doctor   (default: all four)" >&2; exit 2 ;;
esac; done
stages=" ${stages:-preprocess convert train export} "
doctor=''
[[ $stages != *" doctor "* ]] || { doctor=1 stages=' doctor '; }  # alone: it looks, and changes nothing of the jobs there are
fail() { echo "submit.sh: $*" >&2; exit 1; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
unset RUN IMAGE LAST  # of this shell's: the scripts have their own
submitted=$here/submitted
is_alive() { qstat "$1" > /dev/null 2>&1; }
if [ "$state" ]; then  # the scheduler's own words, which cptain makes a table of
  [ -s "$submitted" ] || fail "$here: nothing was submitted from here yet"
  mapfile -t jobs < <(cut -d " " -f 2 "$submitted")
  qstat > /dev/null || { echo "submit.sh: the scheduler does not answer: nothing is known of the jobs" >&2; exit 69; }
  for id in "${jobs[@]}"; do  # one by one: OpenPBS's master branch prints the first of several alone
    status=0 said=$(qstat -x -f -F json -t "$id" 2> /dev/null) || status=$?
    if [[ $status = 0 && $said != *'"Jobs"'* ]]; then  # where PBS keeps no history, -x says nothing of any job
      said=$(qstat -f -F json -t "$id" 2> /dev/null) || status=$?
    fi
    if [ $status = 153 ]; then printf '{"purged": "%s"}\n' "$id"; else printf '%s\n' "$said"; fi
  done |
    (cd "$here" && apptainer exec /gs/bs/tga-okazaki/ma/cptain.sif cptain status --jobs submitted)
  exit
fi
if [ -z "$dry_run$doctor" ]; then
  [ -e /gs/bs/tga-okazaki/ma/cptain.sif ] || fail '/gs/bs/tga-okazaki/ma/cptain.sif: no such image (make image builds it)'
  qstat > /dev/null || fail "the scheduler does not answer"
  while read -r name id _; do
    ! is_alive "$id" || fail "$name ($id) has not ended: qdel $id, or wait"
  done < <(cat "$submitted" 2> /dev/null)
  rm -f "$submitted"
  trap '[ $? = 0 ] || echo "submit.sh: not all was submitted; what was: $(cut -d " " -f 1,2 "$submitted" 2> /dev/null | xargs)" >&2' EXIT
fi
declare -A ids=() kept=()
last=''

keep() {  # FOLDER: the user's variables and tokens, for the jobs whose scripts are there; qstat -f shows those of -v to everyone
  local name
  [ -z "${kept[$1]-}$doctor" ] || return 0
  kept[$1]=1
  rm -f "$1/environment"
  (umask 077 && for name in $(compgen -e); do case $name in
    HF_TOKEN | WANDB_API_KEY | WANDB_* | HF_HUB_* | HF_ENDPOINT | NCCL_* | CPTAIN_ACCEPT | http_proxy | https_proxy | no_proxy | HTTP_PROXY | HTTPS_PROXY | NO_PROXY) printf 'export %s=%q\n' "$name" "${!name}" ;;
  esac; done > "$1/environment")
}

submit() {  # NAME LINK FOLDER SCRIPT [NAME...]: submit a script, to start once those have ended
  local name=$1 link=$2 folder=$3 script=$4 after='' variables command id
  [[ $stages = *" $(basename "$script" .sh) "* ]] || return 0
  shift 4
  for id; do after+=${ids[$id]:+:${ids[$id]}}; done
  variables=LINK=$link${last:+,LAST=1}$(sed -n 's/^#PBS -v /,/p' "$script" | xargs -r printf %s)  # whose place -v would take; qsub drops quotes
  command=(qsub -v "$variables" ${after:+-W "depend=afterany$after"} "$script")
  if [ "$dry_run" ]; then ids[$name]=ID-of-$name; printf '%q ' "${command[@]}"; echo; return; fi
  keep "$(dirname "$script")"
  id=$(cd "$folder" && "${command[@]}")
  ids[$name]=$id
  echo "$name ${ids[$name]}"
  [ "$doctor" ] || echo "$name ${ids[$name]} $(dirname "$script")" >> "$submitted"
}

finish() {  # SUFFIX CHAIN FOLDER SCRIPTS [NAME...]: a run's train jobs, one after the other, and its export
  local suffix=$1 chain=$2 folder=$3 scripts=$4 after=("${@:5}") link last=''
  for ((link = 1; link <= chain; link++)); do
    [[ $link != "$chain" || $stages = *" export "* ]] || last=1
    submit "train$suffix.$link" "$link" "$folder" "$scripts/train.sh" "${after[@]}"
    after=("train$suffix.$link")
  done
  last=1  # of the jobs that need the user's variables: it removes them
  submit "export$suffix" 1 "$folder" "$scripts/export.sh" "${after[@]}"
}

submit preprocess 1 . "$here"/preprocess.sh
submit convert 1 . "$here"/convert.sh
submit doctor 1 . "$here"/doctor.sh
finish '' 2 . "$here" preprocess convert
