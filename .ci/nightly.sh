# shellcheck shell=bash
# shellcheck disable=SC2154 # root and binary are launch/murmur's
# What takes too long for the gate, behind `launch/murmur nightly [DIR]`: storms of many seeds, and the benches whose numbers the READMEs give. Everything
# that is printed goes to DIR as well, one file a command. Sourced by launch/murmur, which has built the binary.

# nightly [DIR]: runs all of it, whatever fails, and returns 1 if anything did.
nightly() {
  local out=${1:-$root/target/nightly} failed=()
  mkdir -p "$out"
  # once NAME ARGS...: one command of the binary.
  once() {
    local name=$1
    shift
    printf '\n== murmur %s\n' "$*" >&2
    (cd "$root" && "$binary" "$@") 2>&1 | tee "$out/$name.txt" >&2 || failed+=("murmur $*")
  }
  once storm sim coordinatorless/scenarios/storm.toml --seeds 10000
  once storm-of-liars sim coordinatorless/scenarios/storm_of_liars.toml --seeds 10000
  once rounds bench rounds
  once trainer bench trainer
  once codec bench codec --params 16777216 --trained
  once exchange bench exchange
  # Last, for it is the longest; it goes on where an earlier night was stopped.
  once algorithms bench algorithms --preset short --dir "$out/algorithms"
  if ((${#failed[@]})); then
    printf 'murmur: failed: %s\n' "${failed[@]}" >&2
    return 1
  fi
  printf 'murmur: all of it ran; what it printed is in %s\n' "$out" >&2
}
