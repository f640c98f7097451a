#!/bin/sh
# dracut's mount hook, where systemd is not in the initramfs: the agent mounts the root. dracut takes any mounted root for
# a good one, so this hook does not end before the agent has succeeded.
if [ -e /tmp/immucore/sysroot.mount ]; then
    _tries=0
    until /usr/lib/immucore/immucore boot; do
        _tries=$((_tries + 1))
        [ $_tries -lt 20 ] || die "immucore could not mount the root"
        emergency_shell -n immucore "immucore could not mount the root; leave the shell to try again"
    done
    unset _tries
fi
