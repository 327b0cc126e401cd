#!/bin/sh
# The daemon as a service of this machine: what `make install` and `make uninstall` do.
#
#   PREFIX    where the program goes: /usr/local, or /usr, the other place in which systemd looks for units
#   DESTDIR   only lay out the files below this directory: no user, no key, nothing is told to systemd
#   PYTHON    the interpreter, which the service's user must be able to run
#
# It may be run again at any time: that is an upgrade. Configuration and keys are never overwritten.
set -eu

prefix=${PREFIX:-/usr/local}
dest=${DESTDIR:-}
python=${PYTHON:-python3}
venv=$prefix/lib/tornado-bcast
etc=/etc/tornado-bcast
source=$(cd "$(dirname "$0")/.." && pwd)
umask 022

fail() {
    echo "$1" >&2
    exit 1
}

pip_install() {
    "$dest$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

install_program() {
    # From a copy, so that nothing is built inside the clone and nothing old in it gets in.
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    for name in pyproject.toml setup.py README.md LICENSE tornado_bcast; do
        cp -R "$source/$name" "$copy"
    done
    mkdir -p "$dest$venv" "$dest$prefix/bin"
    "$python" -m venv "$dest$venv"
    pip_install --require-hashes -r "$source/requirements.lock"
    pip_install --no-deps "$copy"
    if [ -n "$dest" ]; then
        # Scripts name their interpreter by its full path.
        grep -rlI --exclude-dir=lib "$dest" "$dest$venv" | xargs sed -i "s|$dest||g"
    fi
    ln -sfn "../lib/tornado-bcast/bin/tornado-bcast" "$dest$prefix/bin/tornado-bcast"
}

install_file() { # from, to
    mkdir -p "$(dirname "$dest$2")"
    sed "s|/usr/local/|$prefix/|g" "$source/$1" >"$dest$2"
}

install_configuration() {
    mkdir -p "$dest$etc"
    [ -e "$dest$etc/tornado-bcast.ini" ] && return
    sed -e "s|^#env = development|env = production|" -e "s|^#api_keys =|api_keys = file:$etc/api-keys|" \
        "$source/conf/tornado-bcast.ini" >"$dest$etc/tornado-bcast.ini"
}

# Where the configuration names the file of hashes and there is none.
make_first_key() {
    if [ -e $etc/api-keys ] || ! grep -q "^[^#]*file:$etc/api-keys" $etc/tornado-bcast.ini; then
        return
    fi
    (
        umask 077
        both=$("$venv/bin/tornado-bcast" key --name first 2>/dev/null)
        echo "$both" | sed -n 1p >$etc/first-key
        echo "$both" | sed -n 2p >$etc/api-keys
    )
}

do_install() {
    if [ -z "$dest" ]; then
        [ "$(id -u)" = 0 ] || fail "make install must be run by root (or with DESTDIR)"
        case $("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))') in
        /home/* | /root*) fail "$python lies in a home directory, which the service cannot see: make install PYTHON=/usr/bin/python3" ;;
        esac
    fi
    install_program
    for unit in tornado-bcast.service tornado-bcast.socket; do
        install_file systemd/$unit "$prefix/lib/systemd/system/$unit"
    done
    for kind in sysusers tmpfiles; do
        install_file systemd/tornado-bcast.$kind "$prefix/lib/$kind.d/tornado-bcast.conf"
    done
    install_file conf/tornado-bcast.ini "$prefix/share/doc/tornado-bcast/tornado-bcast.ini"
    install_configuration
    [ -z "$dest" ] || return 0

    systemd-sysusers "$prefix/lib/sysusers.d/tornado-bcast.conf"
    make_first_key
    systemd-tmpfiles --create "$prefix/lib/tmpfiles.d/tornado-bcast.conf"
    [ ! -d /run/systemd/system ] || systemctl daemon-reload
    cat <<END
$("$venv/bin/tornado-bcast" version) is installed in $venv
configuration   $etc/tornado-bcast.ini (what is new in it: $prefix/share/doc/tornado-bcast/tornado-bcast.ini)
first API key   $etc/first-key (for root and the group tornado-bcast)
to start it     systemctl enable --now tornado-bcast
after an upgrade    systemctl restart tornado-bcast
END
}

do_uninstall() {
    if [ -z "$dest" ] && [ -d /run/systemd/system ]; then
        systemctl disable --now tornado-bcast.service tornado-bcast.socket || true
    fi
    rm -rf "$dest$venv"
    rm -f "$dest$prefix/bin/tornado-bcast"
    rm -f "$dest$prefix/lib/systemd/system/tornado-bcast.service" "$dest$prefix/lib/systemd/system/tornado-bcast.socket"
    rm -f "$dest$prefix/lib/sysusers.d/tornado-bcast.conf" "$dest$prefix/lib/tmpfiles.d/tornado-bcast.conf"
    rm -rf "$dest$prefix/share/doc/tornado-bcast"
    [ -n "$dest" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
    echo "removed; configuration and keys in $etc, the data in /var/lib/tornado-bcast and the user stay"
}

case ${1:-} in
install) do_install ;;
uninstall) do_uninstall ;;
*) fail "usage: install.sh install|uninstall" ;;
esac
