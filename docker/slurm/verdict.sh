# shellcheck shell=bash
# Decides whether a job is requeued when its run has ended. Sourced by train.sbatch.

# CODE REASON → "requeue" or "end". The code and the reason are exit.json's; without one, 1 and nothing.
#
# 75: saved, can resume. 77: a hang is usually the fault of a link or a node, and the next start may get others. 74:
# network storage may be available later. A lost rank: its node failed, or memory was short. Everything else would fail
# in the same way: 65, 76 and 2 need a person, 1 is a failed check, a bug, or a second signal.
verdict() {
  case $1 in
    74 | 75 | 77) echo requeue ;;
    1)
      case $2 in
        '' | 'another rank ended'* | *'lost the others before the start'* | *'did not start within'*) echo requeue ;;
        *) echo end ;;
      esac
      ;;
    *) echo end ;;
  esac
}

# FOLDER → the newest checkpoint's name, or nothing.
newest_checkpoint() {
  local newest=''
  for path in "$1"/checkpoints/step-????????; do
    [[ -d $path ]] && newest=${path##*/}
  done
  echo "$newest"
}

# FOLDER JOB CHECKPOINT → the number of starts of this job in a row, this one included, that saved nothing newer than
# CHECKPOINT. It is kept in the run folder, because a requeued job has no memory, and SLURM_RESTART_COUNT also counts
# successful starts. Fails if it cannot be written: nothing would limit the number of starts then.
count_stalled() {
  local file=$1/slurm-stalled job='' stalled=0
  [[ -f $file ]] && read -r job stalled <"$file"
  [[ $job == "$2" ]] || stalled=0
  if [[ $(newest_checkpoint "$1") == "$3" ]]; then stalled=$((stalled + 1)); else stalled=0; fi
  mkdir -p "$1" && echo "$2 $stalled" 2>/dev/null >"$file" || return 1
  echo "$stalled"
}
