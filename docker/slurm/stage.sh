#!/usr/bin/env bash
# Copies a shard folder to a node's own disk, once, however many tasks call it.
#
#     docker/slurm/stage.sh /data/shards /local/shards
#     srun --ntasks-per-node=1 docker/slurm/stage.sh /data/shards /local/shards
#
# If several call it at once, one copies and the others wait. Each copy is compared with the manifest's sha256. The
# manifest is copied last, so that an incomplete folder is no dataset; the same command resumes it. A folder that holds
# the same dataset is left as it is; one that holds anything else is rejected. COPIES=8 copies eight files at once
# (default 4). Exit codes: 0 staged, 2 usage or another dataset, 65 bad data, 74 no room or I/O failed.
set -euo pipefail
EXPRESS_ROOT=${EXPRESS_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)}
# shellcheck source=docker/slurm/common.sh
source "$EXPRESS_ROOT/docker/slurm/common.sh"

# FOLDER → its fingerprint, then a line for each file that belongs to it: sha256 (or -), bytes, name.
list_files() {
  "${PYTHON[@]}" - "$EXPRESS_PROGRAMS" "$1" <<'PY'
import sys

sys.path[0] = sys.argv[1]
from pipeline import cuts, manifest
from pipeline.errors import ExpressError

try:
    dataset = manifest.open_dataset(sys.argv[2])
except ExpressError as err:
    print(f"error: {err}", file=sys.stderr)
    sys.exit(err.code)
print(dataset.fingerprint)


def tell(name, sha256="-"):
    path = dataset.root / name
    if sha256 != "-" or path.is_file():
        print(sha256, path.stat().st_size, name)


for split in dataset.splits.values():
    tell(split.index_name, split.index_sha256)
    for shard in split.shards:
        tell(shard.name, shard.sha256)
        tell(shard.name.removesuffix(".tar") + ".idx")
if "mean_image" in dataset.manifest["statistics"]:
    record = dataset.manifest["statistics"]["mean_image"]
    tell(record["file"], record["sha256"])
tell("_info.json")
try:
    for made in [cuts.open_cuts(dataset, split) for split in dataset.splits.values()]:
        for path, sha256 in made:
            tell(path.name, sha256)
    tell(cuts.NAME)
except ExpressError as err:
    print(f"note: {err}; staged without", file=sys.stderr)
PY
}

fingerprint_in() { sed -n 's/^ *"fingerprint": "\([0-9a-f]*\)".*/\1/p' "$1" | tail -n 1; }

size_of() { stat -L -c %s "$1" 2>/dev/null || echo -1; }

# Exits if the folder holds something else.
reject_other() {
  local there='' cure='remove it, or choose another folder'
  if [[ -f $TO/manifest.json ]]; then
    there=$(fingerprint_in "$TO/manifest.json")
    there=${there:-of another kind}
  elif [[ -f $TO/$BEGUN ]]; then
    there=$(<"$TO/$BEGUN")
  elif [[ -n $(find "$TO" -mindepth 1 ! -name "$LOCK" -print -quit) ]]; then
    fail "$USAGE" "$TO: holds files, but no dataset; $cure"
  fi
  [[ -z $there || $there == "$FINGERPRINT" ]] ||
    fail "$USAGE" "$TO: holds the dataset ${there:0:12}, where $FROM is ${FINGERPRINT:0:12}; $cure"
}

# FILES without those that exist in their full size: a file gets its name only after it was compared.
find_missing() {
  local line sha256 bytes name
  MISSING=() NEEDED=$(size_of "$FROM/manifest.json")
  for line in "${FILES[@]}"; do
    read -r sha256 bytes name <<<"$line"
    [[ /$name/ != */../* && $name != /* ]] ||
      fail "$USAGE" "$FROM: its shard $name lies outside of it; copy such tars by hand and index them there"
    if [[ $(size_of "$TO/$name") != "$bytes" ]]; then
      MISSING+=("$line")
      NEEDED=$((NEEDED + bytes))
    fi
  done
}

check_room() {
  local free
  free=$(df --output=avail -B1 "$TO" | tail -n 1)
  ((NEEDED <= free)) || fail "$IO_FAILED" \
    "$TO: $((NEEDED / 1000000)) MB are needed and $((free / 1000000)) MB are free; make room, or choose another folder"
}

# FROM TO: under a temporary name first; one line if it fails.
copy_file() {
  local said
  mkdir -p "$(dirname "$2")"
  said=$(LC_ALL=C cp "$1" "$2.partial" 2>&1) || fail "$IO_FAILED" "$2: ${said##*: }"
}

# SHA256 NAME
copy_one() {
  local sha256=$1 path=$TO/$2 try
  [[ $sha256 != - ]] || read -r sha256 _ < <(sha256sum "$FROM/$2") || true
  for try in 1 2; do # a second time, since networks flip bits
    copy_file "$FROM/$2" "$path"
    if sha256sum --status -c <<<"$sha256  $path.partial"; then
      mv "$path.partial" "$path" || fail "$IO_FAILED" "$path: cannot be written"
      return
    fi
    rm -f "$path.partial"
  done
  fail "$BAD_DATA" "$FROM/$2: is not what the manifest says (sha256, $try times); copy it again or shard the data again"
}

copy_missing() {
  local line sha256 bytes name running=0
  for line in "${MISSING[@]}"; do
    read -r sha256 bytes name <<<"$line"
    if ((running >= ${COPIES:-4})); then
      wait -n || return
      running=$((running - 1))
    fi
    copy_one "$sha256" "$name" &
    running=$((running + 1))
  done
  while ((running)); do
    wait -n || return
    running=$((running - 1))
  done
}

# Exits with the code of the first copy that failed; the others first finish their files.
give_up() {
  local code=$?
  wait
  exit "$code"
}

publish() {
  # A manifest that outlived a power cut would vouch for files that did not.
  sync -f "$TO" || fail "$IO_FAILED" "$TO: what was copied does not reach the disk"
  copy_file "$FROM/manifest.json" "$TO/manifest.json"
  mv "$TO/manifest.json.partial" "$TO/manifest.json" || fail "$IO_FAILED" "$TO/manifest.json: cannot be written"
  rm -f "$TO/$BEGUN"
}

stage() {
  reject_other
  find "$TO" -name '*.partial' -delete
  find_missing
  if ((${#MISSING[@]} == 0)) && [[ -f $TO/manifest.json ]]; then
    echo "$(hostname): $TO holds it already"
    return
  fi
  check_room
  echo "$FINGERPRINT" 2>/dev/null >"$TO/$BEGUN" || fail "$IO_FAILED" "$TO/$BEGUN: cannot be written"
  rm -f "$TO/manifest.json" # of a copy that has lost files
  copy_missing 2> >(sed -un 1p >&2) || give_up # reads on, so that no copy dies of a broken pipe
  publish
  echo "$(hostname): $TO: $((NEEDED / 1000000)) MB copied in $SECONDS s, ${#MISSING[@]} of ${#FILES[@]} files"
}

(($# == 2)) || fail "$USAGE" "say stage.sh FROM TO"
FROM=$1 TO=$2 LOCK=.staging.lock BEGUN=.staging
find_programs
listed=$(list_files "$FROM") || exit
mapfile -t FILES <<<"$listed"
FINGERPRINT=${FILES[0]}
FILES=("${FILES[@]:1}")
mkdir -p "$TO" 2>/dev/null || fail "$IO_FAILED" "$TO: cannot be made"
[[ ! $FROM -ef $TO ]] || fail "$USAGE" "$TO: is the folder to copy from"
{ exec 9>>"$TO/$LOCK"; } 2>/dev/null || fail "$IO_FAILED" "$TO: cannot be written to"
flock -n 9 || { echo "$(hostname): waiting for another one that copies to $TO" && flock 9; }
stage
