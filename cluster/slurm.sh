#!/usr/bin/env bash
# A Ray cluster inside a Slurm job, and one dngd command on it. The head is the first node; it trains too.
#
#   sbatch --nodes 4 cluster/slurm.sh train --dataset /shared/stores/products --use-gpu --num-workers 4 \
#       --run-dir /shared/runs/products --resume
#
# Everything ends with the job, and its exit code is dngd's. /shared stands for a folder that all nodes see.
# DNGD_ENVIRONMENT (optional): a file to source on every node, e.g. a virtual environment's bin/activate.
#SBATCH --job-name=dngd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=04:00:00
# Two minutes before the time is up: enough for a last checkpoint.
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "slurm.sh: give a dngd command, e.g. sbatch --nodes 4 cluster/slurm.sh train --dataset ..." >&2
    exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "slurm.sh: not inside a Slurm job; start it with sbatch" >&2
    exit 2
fi
if [ -n "${DNGD_ENVIRONMENT:-}" ]; then
    set +u
    # shellcheck disable=SC1090
    source "$DNGD_ENVIRONMENT"
    set -u
fi

# The token is in a file that its owner alone reads, in a folder that all nodes see; never in an argument or a log.
secrets="${DNGD_SECRETS_DIR:-$HOME/.ray}/slurm-$SLURM_JOB_ID"
port=$((20000 + SLURM_JOB_ID % 10000))
umask 077
mkdir -p "$secrets"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$secrets/token"
chmod 600 "$secrets/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$secrets/token"
unset RAY_AUTH_TOKEN RAY_ADDRESS

# Stores are staged on the node's own disk, where Slurm gives a job one.
export DNGD_CACHE_DIR="${DNGD_CACHE_DIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/dngd-$USER}"

pids=()
cleanup() {
    # --block: `ray start` ends with its step, and takes the node's Ray processes along.
    [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2> /dev/null || true
    wait 2> /dev/null || true
    rm -rf "$secrets"
}
trap cleanup EXIT

# From Slurm 22.05 on srun does not take it over from sbatch, and a task would be bound to one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
# The head's first address that other nodes can reach: where its name stands for 127.0.1.1 in /etc/hosts, one of its own.
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" bash -c 'hostname --ip-address; hostname --all-ip-addresses' |
    tr ' ' '\n' | awk '/^[0-9.]+$/ && !/^127\./ && !found {print; found = 1}')
if [ -z "$head_ip" ] && [ ${#nodes[@]} -gt 1 ]; then
    echo "slurm.sh: node $head has no IPv4 address but loopback ones (hostname --all-ip-addresses); the others need one" >&2
    exit 1
fi
head_ip="${head_ip:-127.0.0.1}"
common=(--block --disable-usage-stats "--num-cpus=${SLURM_CPUS_PER_TASK:-1}" "--num-gpus=${SLURM_GPUS_ON_NODE:-0}")

# The dashboard, and with it the job server, listens on the head's loopback address only.
srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
    ray start --head "--node-ip-address=$head_ip" "--port=$port" --dashboard-host=127.0.0.1 "${common[@]}" &
pids+=($!)
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" ray start "--address=$head_ip:$port" "${common[@]}" &
    pids+=($!)
done

# A limit for the cluster to come up, said before it is waited for.
limit="${DNGD_START_SECONDS:-180}"
export RAY_ADDRESS="$head_ip:$port"
echo "slurm.sh: waiting up to $limit s for ${#nodes[@]} nodes at $RAY_ADDRESS" >&2
python - "${#nodes[@]}" "$limit" << 'PYTHON' || exit 1
import sys, time, ray

wanted, limit = int(sys.argv[1]), float(sys.argv[2])
deadline, here = time.monotonic() + limit, 0
while here < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"slurm.sh: {here} of {wanted} nodes joined within {limit:.0f} s; see the lines above, or set DNGD_START_SECONDS")
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        here = sum(node["Alive"] for node in ray.nodes())
    except (ConnectionError, RuntimeError, ray.exceptions.RayError):
        pass  # the head is not up yet
    time.sleep(1)
PYTHON

# In the background, so that Slurm's signal is handled at once: dngd gets it as Ctrl-C. Job control (-m) for this one
# command, since bash has what it starts in the background ignore Ctrl-C otherwise.
set -m
dngd "$@" &
command_pid=$!
set +m
trap 'kill -INT $command_pid 2> /dev/null || true' TERM INT
while kill -0 $command_pid 2> /dev/null; do
    wait $command_pid || true
done
code=0
wait $command_pid || code=$?
exit $code
