#!/bin/sh
# dracut's pre-pivot hook, where systemd is not in the initramfs: see immucore-guard.
if [ -e /tmp/immucore/sysroot.mount ]; then
    /usr/lib/immucore/immucore-guard || die "immucore-guard stopped the boot"
fi
