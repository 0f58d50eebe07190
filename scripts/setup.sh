#!/bin/sh
# Sets up what `make` needs, and says what it is doing. Usage: scripts/setup.sh venv | newest | tools | lock
#
#   venv    .venv with everything in requirements.lock and the project itself
#   newest  the same in .venv-newest, for the newest installed Python that .venv does not have; no folder if there is none
#   tools   the programs that the tests drive: a real redis-server and a real Chromium
#   lock    writes requirements.lock, with the newest versions that pyproject.toml allows
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

# fill_venv FOLDER
fill_venv() {
    say "Installing $(grep -c '==' requirements.lock) packages from requirements.lock (about a minute the first time) ..."
    pip "$1" install -r requirements.lock
    say "Installing agentcast itself ..."
    pip "$1" install --no-build-isolation --no-deps -e .
    say "Ready."
}

set_up_venv() {
    if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        say "Making a virtual environment in .venv ..."
        new_venv .venv
    fi
    fill_venv .venv
}

# The Pythons that may be there, as "MINOR PROGRAM", newest first: those in PATH, then those of pyenv, whose commands in
# PATH run only for the versions that are switched on.
list_pythons() {
    versions=$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")/versions
    for minor in 14 13 12 11; do
        command -v "python3.$minor" | sed "s/^/$minor /" || true
        find "$versions" -path "*/3.$minor.*/bin/python3.$minor" 2>/dev/null | sort -rV | sed "s/^/$minor /"
    done
}

# find_newest MINOR: the newest Python but 3.MINOR; only releases, with a GIL
find_newest() {
    list_pythons | while read -r minor program; do
        if [ "$minor" != "$1" ] && "$program" -c 'import sys, sysconfig
major, minor, _, level, _ = sys.version_info
sys.exit((major, minor, level) != (3, int(sys.argv[1]), "final") or bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
' "$minor" 2>/dev/null; then
            echo "$program"
            break
        fi
    done
}

set_up_newest() {
    version='import sys; print(*sys.version_info[:3], sep=".")'
    PYTHON=$(find_newest "$(.venv/bin/python -c 'import sys; print(sys.version_info[1])')")
    if [ -z "$PYTHON" ]; then
        rm -rf .venv-newest
        return
    fi
    wanted=$("$PYTHON" -c "$version")
    if [ "$(.venv-newest/bin/python -c "$version" 2>/dev/null)" != "$wanted" ]; then
        say "Making a virtual environment for Python $wanted in .venv-newest ..."
        new_venv .venv-newest
    fi
    if [ .venv-newest/ready -nt requirements.lock ] && [ .venv-newest/ready -nt pyproject.toml ]; then
        return
    fi
    fill_venv .venv-newest
    touch .venv-newest/ready
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
    newest) set_up_newest ;;
    tools) set_up_tools ;;
    lock) renew_lock ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
