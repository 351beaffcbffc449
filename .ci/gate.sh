# shellcheck shell=bash
# shellcheck disable=SC2154 # root, release and binary are launch/murmur's
# The gate, behind `launch/murmur test`: everything that must hold before a change is taken, in the release profile, so
# that tch and iroh are built once. Sourced by launch/murmur, which has found libtorch and lends its functions.
#
# It needs nothing a fresh toolchain lacks. What cannot run here is named and counted as skipped, never silently left out.
# The last line reads `murmur: N passed, N failed, N skipped`; each test counts as one, and so does each other step.

passed=0
failed=0
skipped=0
notes=()
failures=()

heading() { printf '\n== %s\n' "$*" >&2; }

skip() {
  skipped=$((skipped + 1))
  notes+=("skipped: $1")
}

fail() {
  failed=$((failed + 1))
  failures+=("$1")
}

# step NAME COMMAND...: one step, one count.
step() {
  local name=$1
  shift
  heading "$name"
  if "$@" >&2; then passed=$((passed + 1)); else fail "$name"; fi
}

# in_root COMMAND...
in_root() { (cd "$root" && CARGO_TARGET_DIR="${release%/release}" "$@"); }

has_cargo() { in_root cargo "$1" --version >/dev/null 2>&1; }

# count_tests LOG: adds up what the runners reported: nextest's summary, or each `test result:` line of cargo test.
# Prints: passed failed skipped.
count_tests() {
  awk '
    function before(word,   i) { for (i = 2; i <= NF; i++) if ($i ~ "^" word "[,;]?$") return $(i - 1) + 0; return 0 }
    { gsub(/\033\[[0-9;]*m/, "") }
    /^ *Summary \[/ { sub(/\([^)]*\)/, ""); p += before("passed"); f += before("failed") + before("timed"); s += before("skipped") }
    /^test result:/ { p += before("passed"); f += before("failed"); s += before("ignored") }
    END { print p + 0, f + 0, s + 0 }
  ' "$1"
}

# tests NAME COMMAND...: runs a test runner and counts its tests. A runner that fails without a failed test (it did not
# compile, say) counts as one failure.
tests() {
  local name=$1 log code=0 p f s
  shift
  heading "$name"
  log=$(mktemp)
  in_root "$@" 2>&1 | tee "$log" >&2 || code=$?
  read -r p f s < <(count_tests "$log")
  rm -f "$log"
  passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
  ran_ignored=$((p + f))
  if ((f > 0)); then failures+=("$name: $f failed"); elif ((code != 0)); then fail "$name (exit code $code, no test failed)"; fi
}

# Tests marked `#[ignore]` whose name holds WORD need something special of the machine.
# special_tests WORD WHAT POSSIBLE(0 yes) WHY
special_tests() {
  local word=$1 what=$2 possible=$3 why=$4
  if ((possible != 0)); then
    # Where such tests exist the runner has counted them as skipped already.
    if in_root grep -rqE --include='*.rs' "fn [a-z0-9_]*${word}[a-z0-9_]*\(" "${crates[@]}"; then
      notes+=("skipped: $what ($why)")
    else
      skip "$what ($why)"
    fi
    return
  fi
  if [[ "$runner" == nextest ]]; then
    tests "$what" cargo nextest run --release --locked --workspace --no-tests=pass --run-ignored only -E "test($word)"
  else
    tests "$what" cargo test --release --locked --workspace --no-fail-fast --lib --bins --tests "$word" -- --ignored
  fi
  # They were counted as skipped in the main run, and the filter skipped all others in this one.
  skipped=$((skipped_before > ran_ignored ? skipped_before - ran_ignored : 0))
  skipped_before=$skipped
}

can_unshare() { [[ "$(id -u)" == 0 ]] && unshare --net true 2>/dev/null; }

# Every `launch/murmur WORD` or `murmur WORD` that opens a line of a code block in README.md must be a command the
# binary has. A README that names none is wrong too.
readme_commands() {
  local commands used word bad=0
  # The commands are the indented words between `Commands:` and the next blank line.
  commands=$("$binary" --help | awk '/^Commands:/ { on = 1; next } on && /^ *$/ { exit } on && /^  [a-z]/ { print $1 }')
  used=$(awk '
    /^ *```/ { fenced = !fenced; next }
    fenced { sub(/^ *\$ /, ""); sub(/^ */, "") }
    fenced && ($1 == "launch/murmur" || $1 == "./launch/murmur" || $1 == "murmur") && $2 ~ /^[a-z]/ { print $2 }
  ' "$root/README.md" | sort -u)
  [[ -n "$used" ]] || {
    echo "README.md shows no command to run"
    return 1
  }
  for word in $used; do
    [[ "$word" == test ]] || grep -qx -- "$word" <<<"$commands" || {
      echo "README.md shows \`murmur $word\`, which \`murmur --help\` does not know"
      bad=1
    }
  done
  return "$bad"
}

gate() {
  local runner=cargo-test ran_ignored=0 skipped_before=0 possible line
  local crates=(datasets trainer coordinatorless gradient-verify launch)
  need_cargo
  need_compiler

  if has_cargo fmt; then step "formatting" in_root cargo fmt --all --check; else skip "formatting (no rustfmt; rustup component add rustfmt)"; fi
  step "release build" ensure_built
  if has_cargo clippy; then
    step "clippy" in_root cargo clippy --release --locked --workspace --all-targets -- -D warnings
  else
    skip "clippy (not installed; rustup component add clippy)"
  fi

  if has_cargo nextest; then
    runner=nextest
    tests "tests (nextest)" cargo nextest run --release --locked --workspace --no-fail-fast --status-level slow
  else
    notes+=("not used: cargo-nextest (not installed); cargo test ran the same tests")
    tests "tests (cargo test)" cargo test --release --locked --workspace --no-fail-fast --lib --bins --tests
  fi
  skipped_before=$skipped
  if can_unshare; then possible=0; else possible=1; fi
  special_tests netns "network-namespace tests" "$possible" "needs root and the right to make network namespaces"
  if has_gpu; then possible=0; else possible=1; fi
  special_tests cuda "CUDA tests" "$possible" "no NVIDIA GPU"

  tests "documentation tests" cargo test --release --locked --workspace --no-fail-fast --doc
  step "documentation builds without a warning" in_root env RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --workspace --no-deps --quiet
  if has_cargo deny; then
    step "licences, advisories, bans, sources (cargo-deny)" in_root cargo deny check
  else
    skip "licences, advisories, bans, sources (no cargo-deny; cargo install --locked cargo-deny)"
  fi
  if [[ ! -e "$root/README.md" ]]; then
    skip "README's commands (there is no README.md)"
  elif [[ ! -x "$binary" ]]; then
    skip "README's commands (the binary was not built)"
  else
    step "README's commands exist" readme_commands
  fi

  echo
  for line in "${notes[@]}"; do echo "  $line"; done
  for line in "${failures[@]}"; do echo "  FAILED: $line"; done
  echo "murmur: $passed passed, $failed failed, $skipped skipped"
  ((failed == 0))
}
