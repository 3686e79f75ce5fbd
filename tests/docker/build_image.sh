#!/usr/bin/env bash
# Tests the Dockerfile on a machine without a Docker engine: builds the image, runs the demo inside it as its own user,
# and prints its size. With docker or podman if one works, else with Debian's buildah as root, over a base made by
# debootstrap if the base image cannot be pulled.
#
#   tests/docker/build_image.sh                               the locked torch with CUDA, DALI for CUDA 13
#   TORCH_INDEX=URL DALI=none tests/docker/build_image.sh     for CPUs, from an index that has torch for them
#
# Variables: IMAGE (name:tag), BASE, DALI, TORCH_INDEX, PILLOW_SIMD, COMPILER (docker/Dockerfile), ENGINE (docker, podman,
# buildah), SCRATCH (buildah's storage, 30 GB at most with CUDA; build/image).
#
# This host's own package indexes, proxies and certificates are lent to the build and are no part of the image, which is
# looked through for them at the end. Folders of packages are lent by podman and buildah alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE=${IMAGE:-imagenet-express:$VERSION}
BASE=${BASE:-$(sed -n 's/^ARG BASE=//p' docker/Dockerfile)}
SCRATCH=$(realpath -m "${SCRATCH:-build/image}")
# Copies each layer whole, and works on every file system; STORAGE_DRIVER=overlay is quicker if it works.
STORAGE=(--root "$SCRATCH/root" --runroot "$SCRATCH/run" --storage-driver "${STORAGE_DRIVER:-vfs}")
MADE_BASE=localhost/imagenet-express-base:bookworm # by debootstrap
lent=$(mktemp -d)
trap 'rm -rf "$lent"' EXIT

fail() {
  echo "error: $1" >&2
  exit 1
}

main() {
  local engine started=$SECONDS
  engine=${ENGINE:-$(find_engine)}
  python3 tests/docker/lend.py "$lent"
  echo "building $IMAGE with $engine"
  "prepare_$engine"
  build "$engine"
  echo "built in $((SECONDS - started)) s"
  look_for_lent "$engine"
  echo "running the demo in it, as user $(in_image "$engine" id -u)"
  in_image "$engine" smoke
  echo "$IMAGE: $("size_$engine")"
}

find_engine() {
  local engine
  for engine in docker podman; do
    if "$engine" info >/dev/null 2>&1; then
      echo "$engine"
      return
    fi
  done
  echo buildah
}

build() { # ENGINE
  local options=() variable line
  for variable in BASE DALI TORCH_INDEX PILLOW_SIMD COMPILER; do
    [[ -z ${!variable:-} ]] || options+=(--build-arg "$variable=${!variable}")
  done
  options+=(--build-arg "VERSION=$VERSION" --build-arg "COMMIT=$(commit)" --build-arg "SOURCE=$(source_url)")
  while read -r line; do options+=("$line"); done < <(lent_options "$1")
  # OCI's own format knows no HEALTHCHECK.
  [[ $1 == docker ]] || options+=(--format docker)
  engine "$1" build "${options[@]}" --file docker/Dockerfile --tag "$IMAGE" .
}

commit() {
  git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null || echo unknown
}

source_url() { # of the repository, without anybody's name or password
  git config --get remote.origin.url 2>/dev/null | sed -nE 's|^(https?://)([^/@]*@)?|\1|p' || true
}

lent_options() { # ENGINE
  local file number=0 folder
  for file in "$lent"/{pip_conf,apt_conf,apt_sources,ca}; do
    [[ ! -s $file ]] || echo "--secret=id=${file##*/},src=$file"
  done
  while read -r folder; do
    [[ $1 == docker ]] || echo "--volume=$folder:/run/lent/$number:ro"
    number=$((number + 1))
  done <"$lent/folders"
  if [[ $1 == docker && -s $lent/folders ]]; then
    echo "note: docker cannot be lent folders of packages: $(paste -sd ' ' "$lent/folders")" >&2
  fi
}

engine() { # ENGINE ARGUMENTS...
  case $1 in
    docker) DOCKER_BUILDKIT=1 docker "${@:2}" ;;
    podman) podman "${@:2}" ;;
    buildah) buildah "${STORAGE[@]}" "${@:2}" ;;
  esac
}

in_image() { # ENGINE COMMAND... ; as the image's own user
  local container
  if [[ $1 != buildah ]]; then
    engine "$1" run --rm "$IMAGE" "${@:2}"
    return
  fi
  container=$(engine buildah from "$IMAGE")
  engine buildah run "$container" -- /usr/bin/tini -s -- /opt/imagenet-express/docker/entrypoint.sh "${@:2}" ||
    { engine buildah rm "$container" >/dev/null; return 1; }
  engine buildah rm "$container" >/dev/null
}

look_for_lent() { # ENGINE ; fails if something of this host is in the image
  local words=() word found
  while read -r word; do words+=(-e "$word"); done <"$lent/words"
  [[ ${#words[@]} -gt 0 ]] || return 0
  # The engine's own mounts are not the image's.
  # shellcheck disable=SC2016  # expanded inside
  # By what it says: its exit code is that of files which it may not read, too.
  found=$(in_image "$1" bash -c '
    grep -rIlsF "$@" --exclude={hosts,hostname,resolv.conf} /etc /home /opt /usr /var /workspace || true' \
    look "${words[@]}") || fail "the image cannot be looked through"
  [[ -z $found ]] || fail "these files of the image name something of this host: $found"
  echo "nothing of this host's package sources is in it"
}

size_docker() { engine docker image inspect --format '{{.Size}} bytes' "$IMAGE"; }
size_podman() { engine podman image inspect --format '{{.Size}} bytes' "$IMAGE"; }
size_buildah() { engine buildah images --format '{{.Size}}' "$IMAGE"; }

prepare_docker() { :; }
prepare_podman() { :; }

prepare_buildah() {
  [[ $EUID -eq 0 ]] || fail "neither docker nor podman works, and buildah needs root: start this script as root"
  export BUILDAH_ISOLATION=chroot TMPDIR=$SCRATCH/tmp
  mkdir -p "$TMPDIR"
  need buildah buildah
  drop_leftovers
  if ! have_image "$BASE" && ! pull_base; then
    echo "$BASE cannot be pulled: Debian bookworm with its own Python 3.11 takes its place"
    have_image "$MADE_BASE" || make_base
    BASE=$MADE_BASE
  fi
}

have_image() { # NAME
  engine buildah inspect --type image "$1" >/dev/null 2>&1
}

need() { # COMMAND PACKAGE
  command -v "$1" >/dev/null && return
  echo "installing Debian's $2"
  { apt-get update -qq && apt-get install -qq -y --no-install-recommends "$2"; } >/dev/null ||
    fail "$1 is missing and cannot be installed: apt-get install $2"
}

drop_leftovers() { # an earlier image, or a build that was broken off: each copy of it takes as much again
  engine buildah rm --all >/dev/null
  engine buildah rmi "$IMAGE" >/dev/null 2>&1 || true
  engine buildah rmi --prune >/dev/null
  rm -rf "${TMPDIR:?}"/*
}

pull_base() {
  echo "pulling $BASE"
  timeout 120 buildah "${STORAGE[@]}" pull --quiet "docker://$BASE" >/dev/null 2>&1
}

make_base() {
  local root=$SCRATCH/tmp/base container own=() mirror
  need debootstrap debootstrap
  mapfile -t own <"$lent/mirror"
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$root" \
    "${own[@]}" >"$SCRATCH/debootstrap.log" || fail "debootstrap failed: $SCRATCH/debootstrap.log"
  # Debian's own archive, which debootstrap knows, whatever mirror it was made from.
  mirror=$(sed -n 's/^DEF_MIRROR="\(.*\)"/\1/p' "$(command -v debootstrap)")
  printf 'deb %s main\n' "$mirror bookworm" "$mirror bookworm-updates" "$mirror-security bookworm-security" \
    >"$root/etc/apt/sources.list"
  rm -rf "$root"/etc/{hostname,resolv.conf,hosts} "$root"/var/{cache/apt,lib/apt/lists,log}/*
  container=$(engine buildah from scratch)
  engine buildah add --quiet "$container" "$root" / >/dev/null
  engine buildah commit --quiet --rm "$container" "$MADE_BASE" >/dev/null
  rm -rf "$root"
}
main
