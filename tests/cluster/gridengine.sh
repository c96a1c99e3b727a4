#!/bin/bash
# A real Grid Engine (Debian's 8.1.9) on pretend hosts that share FOLDER, with TSUBAME 4.0's ways: qsub -g GROUP,
# -l node_f=N for N whole nodes, and no job without h_rt. Needs root, and Debian's apt where it is not installed.
#   gridengine.sh up FOLDER HOST...    then FOLDER/as-user COMMAND... runs a command as the job user on the first host
#   gridengine.sh down FOLDER
#   gridengine.sh install .            only Debian's packages
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
verb=$1 folder=$2
shift 2
sge=/usr/lib/gridengine slots=8 user=${JOB_USER:-jobuser}

if [ "$verb" = down ]; then
  "$here/hosts.sh" down "$folder/hosts"
  for _ in 1 2 3 4 5; do rm -rf "$folder" 2> /dev/null && break; sleep 0.5; done
  exit 0
fi

if [ "$verb" = configure ]; then  # on the first host
  # shellcheck source=/dev/null
  . "$folder/env.sh"
  cell=$SGE_ROOT/default/common spool=$folder/spool
  mkdir -p "$cell" "$spool"/{qmaster/job_scripts,db,execd}
  for part in util bin utilbin lib; do ln -s "/var/lib/gridengine/$part" "$SGE_ROOT/$part"; done
  sed -e "s#^spooling_params.*#spooling_params $spool/db#" -e "s#^qmaster_spool_dir.*#qmaster_spool_dir $spool/qmaster#" \
    /usr/share/gridengine/default-bootstrap > "$cell/bootstrap"
  hostname > "$cell/act_qmaster"
  chown -R sgeadmin:sgeadmin "$folder"
  SGE_ARCH=$("$SGE_ROOT/util/arch")
  export SGE_ARCH
  admin() { runuser -u sgeadmin -- "$@" > /dev/null; }
  admin $sge/spoolinit berkeleydb libspoolb "$spool/db" init
  sed -e "s#^execd_spool_dir.*#execd_spool_dir $spool/execd#" -e 's/^min_uid.*/min_uid 0/;s/^min_gid.*/min_gid 0/' \
    -e 's/^shell_start_mode.*/shell_start_mode unix_behavior/' -e 's#^mailer.*#mailer /bin/true#' \
    -e "s#^jsv_url.*#jsv_url script:$here/jsv.sh#" -e 's/^load_report_time.*/load_report_time 00:00:05/' \
    -e 's/flush_time=00:00:15/flush_time=00:00:01/' /usr/share/gridengine/default-configuration > "$folder/configuration"
  admin $sge/spooldefaults configuration "$folder/configuration"
  admin $sge/spooldefaults complexes /usr/share/gridengine/util/resources/centry
  admin $sge/spooldefaults usersets /usr/share/gridengine/util/resources/usersets
  admin $sge/spooldefaults managers sgeadmin root
  sge_qmaster
  for _ in {1..50}; do timeout 5 qconf -sh > /dev/null 2>&1 && break; sleep 0.2; done
  for host; do qconf -ah "$host" > /dev/null 2>&1 || true; qconf -as "$host" > /dev/null; done
  qconf -sc > "$folder/complexes"
  echo "node_f node_f INT <= YES YES 0 0" >> "$folder/complexes"
  qconf -Mc "$folder/complexes" > /dev/null
  printf '%s\n' "pe_name mpi_f" "slots 9999" "user_lists NONE" "xuser_lists NONE" "start_proc_args NONE" \
    "stop_proc_args NONE" "allocation_rule $slots" "control_slaves TRUE" "job_is_first_task FALSE" \
    "urgency_slots min" "accounting_summary TRUE" "qsort_args NONE" > "$folder/pe"
  qconf -Ap "$folder/pe" > /dev/null
  printf 'group_name @allhosts\nhostlist %s\n' "$*" > "$folder/hostgroup"
  qconf -Ahgrp "$folder/hostgroup" > /dev/null
  {
    printf '%s\n' "qname all.q" "hostlist @allhosts" "slots $slots" "pe_list mpi_f" "complex_values node_f=1" \
      "qtype BATCH INTERACTIVE" "seq_no 0" "nsuspend 1" "suspend_interval 00:05:00" "priority 0" \
      "min_cpu_interval 00:05:00" "processors UNDEFINED" "rerun FALSE" "tmpdir /tmp" "shell /bin/sh" \
      "shell_start_mode unix_behavior" "notify 00:00:05" "initial_state default"
    for key in {load,suspend}_thresholds ckpt_list prolog epilog {starter,suspend,resume,terminate}_method owner_list \
      {,x}user_lists subordinate_list {,x}projects calendar; do echo "$key NONE"; done
    for limit in {s,h}_{rt,cpu,fsize,data,stack,core,rss,vmem}; do echo "$limit INFINITY"; done
  } > "$folder/queue"
  qconf -Aq "$folder/queue" > /dev/null
  qconf -ssconf | sed -e 's/^schedule_interval.*/schedule_interval 0:0:1/' -e 's/^flush_submit_sec.*/flush_submit_sec 1/' \
    -e 's/^flush_finish_sec.*/flush_finish_sec 1/' > "$folder/scheduler"
  qconf -Msconf "$folder/scheduler" > /dev/null
  sge_execd
  exit 0
fi

install() {
  export DEBIAN_FRONTEND=noninteractive
  for package in gridengine-common gridengine-master gridengine-exec gridengine-client; do
    printf "$package shared/%s\n" "gridengineconfig boolean true" "gridenginecell string default" \
      "gridenginemaster string $(hostname)"
  done | debconf-set-selections
  # The mailers are what its packages ask for; no mail is sent.
  apt-get -o DPkg::Lock::Timeout=300 install --quiet --yes --no-install-recommends \
    msmtp-mta bsd-mailx gridengine-master gridengine-exec gridengine-client iproute2
}

[ -x $sge/sge_qmaster ] || install > /dev/null
[ "$verb" != install ] || exit 0
id "$user" > /dev/null 2>&1 || useradd --create-home --shell /bin/bash "$user"
[ ! -e "$folder" ] || "${BASH_SOURCE[0]}" down "$folder"
mkdir -p "$folder/bin" "$folder/root"
folder=$(cd "$folder" && pwd)
chmod 755 "$folder"
echo "export SGE_ROOT=$folder/root SGE_CELL=default SGE_QMASTER_PORT=6444 SGE_EXECD_PORT=6445" > "$folder/env.sh"
first=$1
"$here/hosts.sh" up "$folder/hosts" "$@"
"$here/hosts.sh" run "$folder/hosts" "$first" "${BASH_SOURCE[0]}" configure "$folder" "$@"
for host in "${@:2}"; do
  # shellcheck disable=SC2016  # $1 and $2 are the inner shell's
  "$here/hosts.sh" run "$folder/hosts" "$host" bash -c '. "$1"; SGE_EXECD_PIDFILE=$2 sge_execd' execd \
    "$folder/env.sh" "$folder/execd-$host.pid"
done
cat > "$folder/bin/qsub" <<'EOF'
#!/bin/bash
# Grid Engine's own qsub knows no -g GROUP.
arguments=()
while [ $# -gt 0 ]; do case $1 in -g) shift 2 ;; *) arguments+=("$1"); shift ;; esac; done
exec /usr/bin/qsub "${arguments[@]}"
EOF
cat > "$folder/as-user" <<EOF
#!/bin/bash
. $folder/env.sh
export PATH=$folder/bin:/usr/local/bin:/usr/bin:/bin
exec $here/hosts.sh run $folder/hosts $first /usr/sbin/runuser -u $user -- "\$@"
EOF
chmod 755 "$folder/as-user" "$folder/bin/qsub"
for _ in {1..100}; do
  [ "$("$folder/as-user" qstat -f 2> /dev/null | grep -c '^all.q@.*lx-amd64 *$')" = $# ] && exit 0
  sleep 0.2
done
"$folder/as-user" qstat -f
exit 1
