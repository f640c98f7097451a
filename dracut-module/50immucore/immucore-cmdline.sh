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
    # An emptied script waits for nothing.
    _root=$(str_replace "$(label_uuid_to_dev "$root")" / '\x2f')
    for _script in "$hookdir/initqueue/finished/devexists-$_root.sh" "$hookdir/emergency/80-$_root.sh"; do
        [ ! -e "$_script" ] || : > "$_script"
    done
    # udev says of a loop device without a file that it is not ready. Said late, of the image that was tried before or of
    # none, that has systemd unmount what is mounted from it by now: sysroot.mount has a unit file, and stops with its
    # device (systemd.mount(5), StopPropagatedFrom=). Here, and not in the booted system, such a device is always ready.
    # The other rule loads what the agent will need: udev has libkmod at hand, and a modprobe costs a third of the agent.
    printf '%s\n' 'SUBSYSTEM=="block", KERNEL=="loop[0-9]*", ENV{SYSTEMD_READY}="1"' \
        'SUBSYSTEM=="mem", KERNEL=="null", ACTION=="add", RUN{builtin}+="kmod load loop overlay"' \
        > /etc/udev/rules.d/99-zz-immucore.rules
    # One device is enough for now; udev would look at each of the usual eight. A max_loop= of the derivative's own is read
    # later, and counts.
    echo 'options loop max_loop=1' > /etc/modprobe.d/00-immucore.conf
    unset _root _script
    root=immucore rootok=1 root_unset=
fi
unset _immucore
