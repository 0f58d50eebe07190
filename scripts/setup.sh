#!/bin/sh
# Sets up what `make` needs, and says what it is doing. Usage: scripts/setup.sh venv | tools | lock
#
#   venv    .venv with everything in requirements.lock and the project itself
#   tools   the programs that the tests drive: a real redis-server and a real Chromium
#   lock    requirements.lock anew, with the newest versions that pyproject.toml allows
#
# PYTHON names the interpreter to build on (default: python3). A missing Debian package is installed when that can be
# done without asking for a password; otherwise the command to run is printed.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

say() { printf '==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# install_packages REASON PACKAGE...
install_packages() {
    reason=$1
    shift
    have apt-get || die "$reason. Install, by your system's own means: $*"
    by_hand="sudo apt-get update && sudo apt-get install $*"
    if [ "$(id -u)" -eq 0 ]; then
        as_root=
    elif have sudo && sudo -n true 2>/dev/null; then
        as_root="sudo -n"
    else
        die "$reason. Run this, then make again:
    $by_hand"
    fi
    say "$reason: installing $* with apt-get (can take a minute) ..."
    $as_root apt-get update -qq &&
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null ||
        die "apt-get could not install it. Once this works, run make again:
    $by_hand"
}

check_python() {
    have "$PYTHON" || die "no '$PYTHON' found: agentcast needs Python 3.11 or newer. Name one: make PYTHON=python3.12 ..."
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "agentcast needs Python 3.11 or newer, but '$PYTHON' is $("$PYTHON" -V 2>&1). Name another: make PYTHON=python3.12 ..."
}

# new_venv FOLDER
new_venv() {
    check_python
    # Debian's python3 comes without ensurepip; a package of its own has it.
    if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
        package=$("$PYTHON" -c 'import sys; print("python{}.{}-venv".format(*sys.version_info))')
        install_packages "'$PYTHON' cannot make virtual environments" "$package"
    fi
    "$PYTHON" -m venv --clear "$1"
}

# pip FOLDER ARGUMENT...: quiet but for errors
pip() {
    venv=$1
    shift
    "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"
}

set_up_venv() {
    if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        say "Making a virtual environment in .venv ..."
        new_venv .venv
    fi
    say "Installing $(grep -c '==' requirements.lock) packages from requirements.lock (about a minute the first time) ..."
    pip .venv install -r requirements.lock
    say "Installing agentcast itself ..."
    pip .venv install --no-build-isolation --no-deps -e .
    say "Ready."
}

find_chromium() { have chromium || have chromium-browser || have google-chrome || have google-chrome-stable; }

find_tools() {
    missing=
    have redis-server || missing="redis-server"
    find_chromium || missing="${missing:+$missing }chromium"
    [ -z "$missing" ]
}

set_up_tools() {
    find_tools && return
    # shellcheck disable=SC2086 # one word for each package
    install_packages "The tests drive a real Redis and a real Chromium, and not all is there" $missing
    find_tools || die "apt-get has run, but these are still not in PATH: $missing"
}

renew_lock() {
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    say "Resolving the newest versions in a fresh virtual environment (a minute or two) ..."
    new_venv "$scratch/venv"
    pip "$scratch/venv" install ".[dev]"
    {
        echo "# All that agentcast runs, is tested and is built with, at exact versions. Made by 'make lock'; don't edit."
        "$scratch/venv/bin/python" -m pip freeze --exclude agentcast
    } >"$scratch/lock"
    if grep -v -e '^#' -e '^[A-Za-z0-9._-]*==[A-Za-z0-9.]*$' "$scratch/lock" >&2; then
        die "these are no plain pins; requirements.lock is left as it was"
    fi
    cat "$scratch/lock" >requirements.lock
    say "requirements.lock now pins $(grep -c '==' requirements.lock) packages."
}

case ${1-} in
    venv) set_up_venv ;;
    tools) set_up_tools ;;
    lock) renew_lock ;;
    *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
