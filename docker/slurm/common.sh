# shellcheck shell=bash
# Sourced by the scripts beside it: finds our programs, calls them, reports errors.
#
#     EXPRESS_ROOT      the checkout that holds this folder (default: the folder in which sbatch was called)
#     EXPRESS_PYTHON    the Python that has the project's packages (default: .venv there, or python3)
#     CONTAINER         a command that runs another one in a container, e.g. "apptainer exec --nv express.sif"
#     EXPRESS_PROGRAMS  the folder of train/ and tools/ for that Python, if another: /opt/imagenet-express in our image

export USAGE=2 BAD_DATA=65 IO_FAILED=74

fail() {
  echo "error: $2" >&2
  exit "$1"
}

find_programs() {
  if [[ -z ${EXPRESS_PYTHON:-} ]]; then
    EXPRESS_PYTHON=python3
    if [[ -z ${CONTAINER:-} && -x $EXPRESS_ROOT/.venv/bin/python ]]; then
      EXPRESS_PYTHON=$EXPRESS_ROOT/.venv/bin/python
    fi
  fi
  export EXPRESS_ROOT EXPRESS_PYTHON EXPRESS_PROGRAMS=${EXPRESS_PROGRAMS:-$EXPRESS_ROOT}
  read -ra PYTHON <<<"${CONTAINER:-}"
  PYTHON+=("$EXPRESS_PYTHON")
}

# NODE: its address. Slurm's names of nodes need not resolve everywhere; the address is what Slurm itself uses.
address_of() {
  scontrol show node -o "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

# [OPTIONS] COMMAND…: one task per node. If one fails, the others have time to save and to end by themselves.
on_each_node() {
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 "$@"
}
