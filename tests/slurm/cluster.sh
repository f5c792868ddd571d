#!/bin/bash
# A SLURM cluster of three nodes on this machine, on loopback only: cluster.sh start FOLDER, cluster.sh stop FOLDER.
# All its files are in FOLDER; use it with SLURM_CONF=FOLDER/slurm.conf. Needs root and Debian's slurmctld, slurmd,
# slurm-client and munge. Jobs in partition `urgent` preempt those in `normal`, with 60 seconds of grace.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
folder=$(readlink -f "$2")
export SLURM_CONF=$folder/slurm.conf

stop() {
    scancel --quiet --user "$(id -un)" 2>/dev/null || true
    for _ in $(seq 100); do  # the daemons are the ones that end jobs
        [ -z "$(squeue --noheader --states=all --format=%T 2>/dev/null | grep -E 'RUNNING|COMPLETING')" ] && break
        sleep 0.25
    done
    for daemon in slurmctld slurmd.n1 slurmd.n2 slurmd.n3 munged; do
        [ -s "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true
    done
}

start() {
    mkdir -p "$folder"/{state,spool}
    dd if=/dev/urandom of="$folder/munge.key" bs=64 count=1 status=none
    chmod 600 "$folder/munge.key"
    # --force: the folder may lie below /tmp, which others can write to.
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" 2>/dev/null
    port=$((20000 + $$ % 20000))
    cat > "$SLURM_CONF" <<END
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
$(for n in 1 2 3; do
    echo "NodeName=n$n NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + n)) CPUs=2 RealMemory=1000"
done)
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
END
    slurmctld -c
    for node in n1 n2 n3; do slurmd -c -N "$node"; done
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --Node --format=%T --partition=normal 2>/dev/null | sort -u)" = idle ] && return
        sleep 0.25
    done
    tail -n 5 "$folder"/*.log >&2
    stop
    return 1
}

"$1"
