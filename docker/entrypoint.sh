#!/usr/bin/env bash
# The image's commands. They work from any working directory, in the image and in a checkout:
#
#   entrypoint.sh shard imagenet2012 --src /data/archives --out /data/shards
#   entrypoint.sh train paper --data.shards /data/shards --run.dir /data/runs/paper
#   entrypoint.sh evaluate /data/runs/paper --data.shards /data/shards
#   entrypoint.sh smoke          prints versions and devices, trains the demo; takes flags of train
#   entrypoint.sh COMMAND ...    any other command is run as it is
#
# train starts a process for each GPU that it sees, or one on the CPU. Other launches:
#   LAUNCH_CONFIG   cpu2, 1gpu, 8gpu, 2x8, or a file that accelerate launch --config_file takes
#   LAUNCH_ARGS     more options of accelerate launch, such as "--machine_rank 1 --main_process_ip 10.0.0.1"
#
# SIGTERM, SIGINT and SIGUSR1 go to the trainer, which saves and exits with code 75. train exits with the trainer's own
# code: exit.json in the run folder holds it, since launchers turn every failure into 1.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CONFIGS=$ROOT/docker/accelerate
STATE=${IMAGENET_EXPRESS_STATE:-${TMPDIR:-/tmp}/imagenet-express.run} # the run folder, for docker/healthcheck.py
NOT_DONE=75

fail() { # CODE MESSAGE
  echo "error: $2" >&2
  exit "$1"
}

run_tool() { # FILE ARGUMENTS...
  local file=$1
  shift
  exec python3 "$ROOT/$file" "$@"
}

train() {
  asks_only_for_text "$@" && run_tool train/run.py "$@"
  trap 'exit "$NOT_DONE"' TERM INT USR1 # until there is a process to send them to
  local resolved run_dir shards launch=()
  resolved=$(python3 "$ROOT/train/run.py" "$@" --print) # a usage error ends here, with its line and its code
  resolved=$(fields "$resolved")
  { read -r shards; read -r run_dir; } <<<"$resolved"
  echo "$(date +%s) $run_dir" 2>/dev/null >"$STATE" || true # a read-only container is watched without it
  choose_launch
  # One process on the CPU needs no launcher. A run without shards is rejected by the trainer itself.
  [[ ${#launch[@]} -eq 0 || -z $shards ]] && run_tool train/run.py "$@"
  # Made before the ranks start, so that exit.json can hold the reason of a rejection.
  mkdir -p -- "$run_dir" 2>/dev/null && [[ -w $run_dir ]] ||
    fail 74 "$run_dir: cannot be written by user $(id -u); mount a folder that it owns, or start with --user"
  launch_and_wait "$run_dir" "${launch[@]}" "$ROOT/train/run.py" "$@"
}

asks_only_for_text() { # ARGUMENTS...
  local argument
  [[ $# -eq 0 ]] && return
  for argument in "$@"; do
    case $argument in -h | --help | --help-all | --list | --print) return 0 ;; esac
  done
  return 1
}

fields() { # CONFIGURATION -> the shards, which may be empty, and the run folder, absolute, a line each
  python3 -c '
import json, os, sys
config = json.loads(sys.argv[1])
print(config["data"]["shards"], os.path.abspath(config["run"]["dir"]), sep="\n")' "$1"
}

choose_launch() { # sets launch: the arguments of accelerate launch; empty if no launcher is needed
  local config=${LAUNCH_CONFIG:-} gpus more=()
  read -ra more <<<"${LAUNCH_ARGS:-}"
  if [[ -z $config ]]; then
    gpus=$(count_gpus)
    case $gpus in
      0)
        [[ ${#more[@]} -eq 0 ]] || fail 2 "LAUNCH_ARGS=$LAUNCH_ARGS: there is no GPU here; name a LAUNCH_CONFIG, too"
        return
        ;;
      1) config=1gpu ;;
      *) config=8gpu more=(--num_processes "$gpus" "${more[@]}") ;;
    esac
  fi
  [[ -f $config ]] || config=$CONFIGS/$config.yaml
  [[ -f $config ]] || fail 2 "LAUNCH_CONFIG=$LAUNCH_CONFIG: no such file, and not one of $(known_configs)"
  # Accelerate reads use_cpu only for a single process.
  if grep -q '^use_cpu: true' "$config"; then export ACCELERATE_USE_CPU=true; fi
  launch=(--config_file "$config" --quiet "${more[@]}")
}

count_gpus() {
  if compgen -G '/dev/nvidia*' >/dev/null || [[ -e /dev/kfd || -e /dev/dxg ]]; then
    python3 -c 'import torch; print(torch.cuda.device_count())' # counts those that CUDA_VISIBLE_DEVICES leaves
  else
    echo 0 # without the seconds that torch takes to load
  fi
}

known_configs() {
  local files=("$CONFIGS"/*.yaml)
  files=("${files[@]##*/}")
  echo "${files[*]%.yaml}"
}

launch_and_wait() { # RUN_DIR ARGUMENTS_OF_ACCELERATE_LAUNCH... ; exits with the trainer's code
  local run_dir=$1 before beat code
  shift
  before=$(identity "$run_dir/exit.json") beat=$(identity "$run_dir/heartbeat/rank-00000.json")
  start=$$.$(date +%s%N) launcher='' signalled=''
  for name in TERM INT USR1; do
    # shellcheck disable=SC2064  # the name is meant as it is now
    trap "forward $name" "$name"
  done
  IMAGENET_EXPRESS_START=$start python3 -m accelerate.commands.launch "$@" &
  launcher=$!
  wait_for_launcher
  [[ $code -eq 0 ]] && exit 0
  exit_as_reported "$run_dir" "$before" "$beat" "$code"
}

# Signals go to the ranks and not to the launcher: with one process accelerate does not forward them, and torchrun kills
# the ranks 30 seconds later, while a run may still be saving.
forward() { # SIGNAL
  signalled=$1
  [[ -n $launcher ]] || exit "$NOT_DONE"
  local processes
  processes=$(ranks)
  # shellcheck disable=SC2086  # one word for each process
  kill -s "$1" ${processes:-$launcher} 2>/dev/null || true
}

ranks() { # the processes of train/run.py that belong to this start, whatever their parent is by now
  local file pid
  grep -lsxz "IMAGENET_EXPRESS_START=$start" /proc/[0-9]*/environ | while read -r file; do
    pid=${file//[!0-9]/}
    if [[ $pid != "$launcher" ]] && grep -qsxz '.*train/run\.py' "/proc/$pid/cmdline"; then echo "$pid"; fi
  done || true
}

wait_for_launcher() { # sets code; returns when the launcher and all ranks have ended
  while kill -0 "$launcher" 2>/dev/null; do # wait returns early at each signal
    code=0
    wait "$launcher" || code=$?
  done
  while [[ -n $(ranks) ]]; do sleep 0.2; done # a launcher that was killed leaves them behind, and they are saving
}

exit_as_reported() { # RUN_DIR IDENTITIES_BEFORE_OF_EXIT_JSON_AND_HEARTBEAT LAUNCHER_CODE
  local end=$1/exit.json now tries
  for tries in {1..6}; do # on another machine it may be written a moment later
    now=$(identity "$end")
    [[ -n $now && $now != "$2" ]] && exit "$(code_in "$end")"
    [[ $tries -lt 6 ]] && sleep 0.5
  done
  now=$(identity "$1/heartbeat/rank-00000.json") # an earlier start's stays until this one's begins
  [[ -n $signalled && (-z $now || $now == "$3") ]] && exit "$NOT_DONE"
  exit "$4"
}

code_in() { # EXIT_JSON
  python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["code"])' "$1"
}

identity() { # FILE -> changes with every exit.json, which is a new file that is renamed; empty if there is none
  stat -c '%i %y' -- "$1" 2>/dev/null || true
}

smoke() {
  folder=$(mktemp -d) # not local: the trap runs after the function
  trap 'rm -rf "$folder"' EXIT
  (cd "$ROOT" && python3 -c 'import json; from train import environment as e; print(json.dumps(e.describe(), indent=1))')
  python3 "$ROOT/tools/make_shards.py" digits --out "$folder/shards"
  "${BASH_SOURCE[0]}" train demo --data.shards "$folder/shards" --run.dir "$folder/run" "$@"
}

usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

main() {
  local command=${1:---help}
  shift || true
  case $command in
    shard) run_tool tools/make_shards.py "$@" ;;
    train) train "$@" ;;
    evaluate) run_tool tools/evaluate.py "$@" ;;
    smoke) smoke "$@" ;;
    -h | --help) usage ;;
    *) exec "$command" "$@" ;;
  esac
}

main "$@"
