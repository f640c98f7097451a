#!/bin/bash
# The dracut module of immucore. Made for dracut 059 (Debian 12) and 106 (Debian 13), with and without systemd.
# shellcheck disable=SC2034,SC2154 # dracut reads and sets what only it knows

_bundle=/usr/lib/immucore

# Called by dracut. Only when asked for: the agent must not enter the initramfs of a machine that merely has it installed.
check() {
    require_binaries "$_bundle/immucore" || return 1
    return 255
}

# Called by dracut.
depends() {
    echo base
}

# Called by dracut.
installkernel() {
    local module found=
    # The machine that builds the initramfs is seldom the one that boots it: its own modules are no guide.
    local hostonly=''
    # A file system that this kernel does not have is one that no image of this machine can be in.
    instmods ext4 squashfs erofs vfat xfs btrfs
    # By what the kernel asks for at run time: the character sets of vfat, the checksums of ext4, xfs and btrfs.
    instmods nls_cp437 nls_ascii nls_iso8859-1 nls_utf8 crc32c crc32c_generic crc32c-intel libcrc32c
    for module in loop overlay; do
        if ! instmods -c "$module"; then
            dfatal "immucore: this kernel has no '$module', neither as a module nor built in"
            return 1
        fi
    done
    for module in ext4 squashfs erofs; do
        instmods -c -s "$module" && found=1
    done
    ! _has_tpm2 || instmods '=drivers/char/tpm'
    if [[ ! $found ]]; then
        dfatal "immucore: this kernel has no file system for an image: ext4, squashfs or erofs"
        return 1
    fi
}

# Install the bundle, symlinks and modes preserved, and the libraries that its files name and that are outside of it. What else
# lies beside it is the booted system's. dracut alone looks at the launcher, which does not name what libpython needs.
_install_bundle() {
    local root=${dracutsysrootdir-} file magic needed library
    mkdir -p "$initdir$_bundle"
    cp -a "$root$_bundle/immucore" "$root$_bundle/_internal" "$initdir$_bundle" || return 1
    while IFS= read -r -d '' file; do
        LC_ALL=C IFS= read -r -N 4 magic 2> /dev/null < "$file"
        [[ $magic == $'\x7fELF' ]] || continue
        needed=$(LD_LIBRARY_PATH="$root$_bundle/_internal" "${DRACUT_LDD:-ldd}" "$file" 2>&1)
        if [[ $needed == *'not found'* ]]; then
            dfatal "immucore: $file needs a library that is not there:"
            dfatal "$(grep 'not found' <<< "$needed")"
            return 1
        fi
        while read -r library; do
            [[ $library == "$root$_bundle"/* ]] && continue
            inst "$library" || return 1
        done < <(sed -n 's,^\s*\(.* => \)\?\(/[^ ]*\) (0x[0-9a-f]*)$,\2,p' <<< "$needed")
    done < <(find "$root$_bundle/immucore" "$root$_bundle/_internal" -type f -print0)
}

# Whether the image has what systemd-cryptsetup opens at run time to ask a TPM. dracut itself puts that only into the
# initramfs of the very machine that builds it.
_has_tpm2() {
    local root=${dracutsysrootdir-}
    dracut_module_included crypt &&
        [[ $(compgen -G "$root/usr/lib*/libtss2-esys.so.*" || compgen -G "$root/usr/lib/*/libtss2-esys.so.*") ]]
}

_install_tpm2() {
    local library
    for library in esys mu rc sys tctildr tcti-device; do
        inst_libdir_file "libtss2-$library.so.*"
    done
    # systemd asks through this plug-in of libcryptsetup, where libcryptsetup has plug-ins, and then through nothing else.
    inst_libdir_file "cryptsetup/libcryptsetup-token-systemd-tpm2.so"
    inst_rules 60-tpm-udev.rules
}

# Called by dracut, which ignores the status of install(): only exit stops the build.
install() {
    local units=${systemdsystemunitdir:-/usr/lib/systemd/system}
    local guard=$_bundle/immucore-guard generator=/usr/lib/systemd/system-generators/immucore-generator dash

    # Without dracut-systemd, systemd mounts a root by itself and never runs dracut's hooks, ours among them.
    if dracut_module_included systemd && ! dracut_module_included dracut-systemd; then
        dfatal "immucore: systemd is in this initramfs, and dracut-systemd is not: do not omit it, or omit both"
        exit 1
    fi
    _install_bundle || exit 1
    # What the last words of a failed boot tell people to type.
    mkdir -p "$initdir/usr/bin"
    ln -sfn ../lib/immucore/immucore "$initdir/usr/bin/immucore"
    inst_script "$moddir/immucore-guard" "$guard" || exit 1
    inst_script "$moddir/immucore-generator" "$generator" || exit 1
    inst_script "$moddir/immucore-last-words" "$_bundle/immucore-last-words" || exit 1
    # Read before the prompt of an emergency shell, by dracut-emergency or by the login shell itself where there is no systemd.
    inst_dir /etc
    # shellcheck disable=SC2016 # to be expanded in the initramfs
    echo 'case $-:$DRACUT_SYSTEMD in *i*:1) ;; *)' "$_bundle/immucore-last-words ;; esac" >> "$initdir/etc/profile"
    # Every boot waits for these two, and dash takes half of bash's time, which dracut 059 makes /bin/sh even on Debian.
    if dash=$(find_binary dash) && inst "$dash"; then
        sed -i "1s,.*,#!$dash," "$initdir$guard" "$initdir$generator"
    fi
    inst_hook cmdline 15 "$moddir/immucore-cmdline.sh"
    # dracut's fs-lib installs them where it is in the initramfs; --modules may have left it out.
    inst_multiple -o e2fsck fsck.vfat
    inst_dir /etc/modprobe.d
    inst_dir /etc/udev/rules.d
    ! _has_tpm2 || _install_tpm2

    if dracut_module_included systemd; then
        inst_script "$moddir/immucore-unexplained" "$_bundle/immucore-unexplained" || exit 1
        inst_simple "$moddir/immucore.service" "$units/immucore.service" || exit 1
    else
        inst_hook pre-mount 50 "$moddir/immucore-pre-mount.sh"
        inst_hook mount 50 "$moddir/immucore-mount.sh"
        inst_hook pre-pivot 99 "$moddir/immucore-pre-pivot.sh"
    fi
}
