#!/usr/bin/env bash
# The launcher of one node of a training job, with RANKS_PER_NODE ranks. Called by train.sbatch.
#
#     srun … node.sh demo --data.shards /data/shards
#
# Reads RANKS_PER_NODE, MAIN_ADDRESS, MAIN_PORT, ON_GPUS and Slurm's own variables.
set -euo pipefail
# shellcheck source=docker/slurm/common.sh
source "$EXPRESS_ROOT/docker/slurm/common.sh"
find_programs

# Signals to a step reach all its processes. The ranks set a handler for this one, torchrun's agent would die of it.
trap '' USR1
# Seconds from SIGTERM until the launcher kills its ranks; saving may take that long.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > RANKS_PER_NODE ? cpus / RANKS_PER_NODE : 1))}
precision=bf16 # as docker/accelerate
if [[ $ON_GPUS != yes ]]; then
  precision=no
  export ACCELERATE_USE_CPU=true # with it, --multi_gpu starts gloo ranks on CPUs
fi

ranks=$((RANKS_PER_NODE * SLURM_JOB_NUM_NODES))
launch=(--num_processes "$ranks" --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID"
  --mixed_precision "${ACCELERATE_MIXED_PRECISION:-$precision}" --dynamo_backend no --main_process_port "$MAIN_PORT")
((ranks == 1)) || launch+=(--multi_gpu)
if ((SLURM_JOB_NUM_NODES > 1)); then
  # Names the host to torchrun, since the node's own name and address need not agree with Slurm's.
  is_host=$((SLURM_NODEID == 0))
  # By this address the ranks find rank 0; by default torchrun takes the node's own name, often the loopback's.
  PET_LOCAL_ADDR=$(address_of "$SLURMD_NODENAME")
  export PET_LOCAL_ADDR
  launch+=(--main_process_ip "$MAIN_ADDRESS" --rdzv_backend c10d --rdzv_conf "is_host=$is_host,read_timeout=180")
fi
exec "${PYTHON[@]}" -m accelerate.commands.launch "${launch[@]}" "$EXPRESS_PROGRAMS/train/run.py" "$@"
