#!/bin/bash
# A real Slurm cluster on this machine: of one node, or NODES, with two processors each. As root, without
# systemd.
#
#   slurm_cluster.sh start FOLDER [NODES]    configuration, state and logs go to FOLDER; prints where SLURM_CONF is
#   slurm_cluster.sh stop FOLDER
#
# Needs Debian's slurm-wlm and munge. Fails with a line that says what is missing.
set -euo pipefail
what=$1 folder=$2 nodes=${3:-1}

fail() { echo "$1" >&2; exit 1; }

if [ "$what" = stop ]; then
  export SLURM_CONF="$folder/slurm.conf"
  scancel --user=root || true
  for _ in $(seq 60); do  # what runs is ended by slurmd
    [ -n "$(squeue --noheader 2> /dev/null)" ] || break
    sleep 0.5
  done
  for daemon in "$folder"/slurmd.*.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
    [ ! -s "$daemon" ] || kill "$(cat "$daemon")" 2> /dev/null || true
  done
  exit 0
fi

[ "$(id -u)" = 0 ] || fail "Slurm's daemons are started by root"
for command in munged slurmctld slurmd sbatch; do
  command -v "$command" > /dev/null || fail "no $command here: apt-get install slurm-wlm munge"
done
mkdir -p "$folder" /run/munge /var/log/munge /etc/munge /var/lib/munge
[ -s /etc/munge/munge.key ] || { dd if=/dev/urandom bs=1 count=1024 of=/etc/munge/munge.key status=none; chmod 400 /etc/munge/munge.key; }
chown -R munge: /run/munge /var/log/munge /etc/munge /var/lib/munge
munge -n > /dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged --force
cp /run/munge/munged.pid "$folder/munged.pid" 2> /dev/null || true

port=$((30000 + $$ % 10000))
cat > "$folder/slurm.conf" << CONF
ClusterName=tests
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$((20000 + $$ % 10000))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=60
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2,requeue_delay=1
MpiDefault=none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
names=("$(hostname -s)")  # which others find; the other nodes need not be found
for number in $(seq 2 "$nodes"); do names+=("$(hostname -s)-$number"); done
for name in "${names[@]}"; do
  port=$((port + 1))
  echo "NodeName=$name NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$port CPUs=2 State=UNKNOWN"
done >> "$folder/slurm.conf"
mkdir -p "$folder/state"
export SLURM_CONF="$folder/slurm.conf"
slurmctld
for name in "${names[@]}"; do slurmd -N "$name"; done
for _ in $(seq 120); do
  [ "$(sinfo --noheader --format='%T %D' 2> /dev/null)" = "idle $nodes" ] && echo "$SLURM_CONF" && exit 0
  sleep 0.5
done
fail "Slurm's node did not become idle: $(tail -n 3 "$folder"/slurm*.log)"
