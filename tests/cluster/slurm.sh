#!/bin/bash
# A real Slurm (Debian's) on pretend hosts that share FOLDER, each with 8 pretend GPUs. Needs root, and Debian's apt where
# it is not installed.
#   slurm.sh up FOLDER HOST...    then FOLDER/as-user COMMAND... runs a command as the job user on the first host
#   slurm.sh down FOLDER
#   slurm.sh install .            only Debian's packages
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
verb=$1 folder=$2
shift 2
user=${JOB_USER:-jobuser}

if [ "$verb" = down ]; then
  [ ! -e "$folder/munge/pid" ] || kill "$(cat "$folder/munge/pid")" 2> /dev/null || true
  "$here/hosts.sh" down "$folder/hosts"
  rm -rf "$folder"
  exit 0
fi

install() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get -o DPkg::Lock::Timeout=300 install --quiet --yes --no-install-recommends \
    slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2
}

[ -x /usr/sbin/slurmctld ] || install > /dev/null
[ "$verb" != install ] || exit 0
id "$user" > /dev/null 2>&1 || useradd --create-home --shell /bin/bash "$user"
[ ! -e "$folder" ] || "${BASH_SOURCE[0]}" down "$folder"
mkdir -p "$folder"/{state,spool,log,munge,gpus}
folder=$(cd "$folder" && pwd)
chmod 755 "$folder" "$folder/munge"
head -c 1024 /dev/urandom > "$folder/munge/key"
chmod 400 "$folder/munge/key"
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
  --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
hosts=$(IFS=,; echo "$*") first=$1
cat > "$folder/slurm.conf" <<EOF
ClusterName=pretend
SlurmctldHost=$first
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd-%n
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
KillWait=5
MinJobAge=600
SlurmctldParameters=node_reg_mem_percent=1
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
GresTypes=gpu
NodeName=$hosts CPUs=16 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
EOF
for host; do  # any device file will do as a GPU
  for number in {0..7}; do mknod "$folder/gpus/$host-$number" c 1 3; done
  echo "NodeName=$host Name=gpu File=$folder/gpus/$host-[0-7]"
done > "$folder/gres.conf"
export SLURM_CONF=$folder/slurm.conf
"$here/hosts.sh" up "$folder/hosts" "$@"
"$here/hosts.sh" run "$folder/hosts" "$first" slurmctld
for host; do
  mkdir -p "$folder/spool/$host"
  "$here/hosts.sh" run "$folder/hosts" "$host" slurmd -N "$host"
done
cat > "$folder/as-user" <<EOF
#!/bin/bash
export SLURM_CONF=$folder/slurm.conf PATH=/usr/local/bin:/usr/bin:/bin
exec $here/hosts.sh run $folder/hosts $first /usr/sbin/runuser -u $user -- "\$@"
EOF
chmod 755 "$folder/as-user"
for _ in {1..100}; do
  [ "$("$folder/as-user" sinfo -h -t idle -o %D 2> /dev/null)" = $# ] && exit 0
  sleep 0.2
done
"$folder/as-user" sinfo -N
exit 1
