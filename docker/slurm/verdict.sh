# shellcheck shell=bash
# What becomes of a job whose run has ended. Sourced by train.sbatch.

# CODE REASON → "requeue" or "end". The code and the reason are exit.json's; without one, 1 and nothing.
#
# 75: saved, goes on. 77: a hang is mostly a link's or a node's, and another try may get others. 74: network storage
# comes back. A rank that was lost: its node is gone, or memory was short. All else would be the same again: 65, 76 and
# 2 need a person, 1 is a failed check, a bug, or somebody who asked twice.
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

# FOLDER JOB CHECKPOINT → how many starts of this job in a row, this one among them, have saved nothing newer than
# CHECKPOINT. A requeued job remembers nothing, and SLURM_RESTART_COUNT counts starts that went well, too, so it is kept
# in the run folder. Fails where it cannot be written: then nothing bounds the tries.
count_stalled() {
  local file=$1/slurm-stalled job='' stalled=0
  [[ -f $file ]] && read -r job stalled <"$file"
  [[ $job == "$2" ]] || stalled=0
  if [[ $(newest_checkpoint "$1") == "$3" ]]; then stalled=$((stalled + 1)); else stalled=0; fi
  mkdir -p "$1" && echo "$2 $stalled" 2>/dev/null >"$file" || return 1
  echo "$stalled"
}
