#!/usr/bin/env bash
# Shards a dataset by a job array, one slice per task, and merges when all slices are complete.
#
#     docker/slurm/shard.sh -n 16 -- imagenet2012 --src /data/archives --out /data/shards
#     docker/slurm/shard.sh -n 64 --cpus-per-task 8 --time 4:00:00 -- \
#         imagefolder --train /raw/train --val /raw/val --out /data/shards
#
# Arguments before -- go to sbatch, those after it to tools/make_shards.py. A slice that was killed resumes, requeued by
# Slurm or by the same command. Prints the numbers of both jobs. Exit codes: 0 submitted, 2 usage, otherwise sbatch's.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=docker/slurm/common.sh
source "$HERE/common.sh"

read_arguments() {
  SLICES='' SBATCH=() MAKE=()
  while (($#)) && [[ $1 != -- ]]; do
    if [[ $1 == -n ]]; then
      SLICES=${2:-} && shift
    else
      SBATCH+=("$1")
    fi
    shift || true
  done
  (($#)) && shift
  MAKE=("$@")
}

reject_nonsense() {
  local usage='say shard.sh -n SLICES [sbatch options] -- SOURCE --out DIR [options of make_shards.py]'
  [[ $SLICES =~ ^[1-9][0-9]{0,4}$ ]] || fail "$USAGE" "-n '$SLICES': how many slices, 1 to 99999; $usage"
  [[ ${#MAKE[@]} -gt 0 && ${MAKE[0]} != -* ]] || fail "$USAGE" "no source after --; $usage"
  [[ ${MAKE[0]} != index ]] || fail "$USAGE" "index reads tars that exist already, and has no slices; run it as one job"
  [[ " ${MAKE[*]} " == *" --out"[\ =]* ]] || fail "$USAGE" "--out is missing; $usage"
  local word
  for word in "${SBATCH[@]}"; do
    case ${word%%=*} in
      -a* | --array) fail "$USAGE" "$word: shard.sh makes the array itself, by -n; leave it out" ;;
    esac
  done
  for word in "${MAKE[@]}"; do
    case ${word%%=*} in
      --shards | --merge | --dry-run) fail "$USAGE" "$word: shard.sh makes slices and merge itself; leave it out" ;;
    esac
  done
  command -v sbatch >/dev/null || fail "$USAGE" "no sbatch here; run this where Slurm's commands are"
}

submit() {
  export EXPRESS_ROOT=${EXPRESS_ROOT:-$(dirname "$(dirname "$HERE")")}
  local slices merge
  # sbatch takes the last of each option: the user cannot change those after the user's.
  slices=$(sbatch --parsable --job-name=shard --output=shard-%A_%a.out "${SBATCH[@]}" --array="0-$((SLICES - 1))" \
    "$HERE/shard.sbatch" "$SLICES" "${MAKE[@]}")
  slices=${slices%%;*} # a federation's cluster follows the number
  # If a slice fails, the merge is cancelled: otherwise it would wait in the queue for ever.
  merge=$(sbatch --parsable --job-name=shard --output=shard-%j-merge.out "${SBATCH[@]}" \
    --dependency="afterok:$slices" --kill-on-invalid-dep=yes "$HERE/shard.sbatch" merge "${MAKE[@]}")
  echo "slices $slices (0 to $((SLICES - 1))), merge ${merge%%;*}"
}

read_arguments "$@"
reject_nonsense
submit
