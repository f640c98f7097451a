#!/bin/sh
# shellcheck disable=SC2034,SC2154 # root, rootok and hookdir belong to the script that sources this hook
# dracut's cmdline hook: when the agent mounts the root, nobody else interprets root=, nor waits for its device.
if [ -n "$DRACUT_SYSTEMD" ]; then
    _immucore=/run/systemd/generator.early
else
    _immucore=/tmp/immucore
    mkdir -p "$_immucore"
    /usr/lib/systemd/system-generators/immucore-generator "$_immucore" "$_immucore" "$_immucore"
fi

if [ -e "$_immucore/sysroot.mount" ]; then
    # dracut's generator, which knows only the command line, has the initqueue wait for the device before this hook runs.
    _root=$(getarg root=)
    _root=$(str_replace "$(label_uuid_to_dev "$_root")" / '\x2f')
    rm -f -- "$hookdir/initqueue/finished/devexists-$_root.sh" "$hookdir/emergency/80-$_root.sh"
    unset _root
    root=immucore rootok=1 root_unset=
fi
unset _immucore
