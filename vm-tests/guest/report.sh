#!/bin/sh
# report.sh system|initramfs
#
# Tells the host what this machine is like, from the inside, and switches it off. The disk whose serial is "report"
# holds a tar with what the test asks for (commands/NNN, files, poweroff); a tar with the answers is written over it.

# shellcheck disable=SC2094 # files have the names of the commands that fill them

stage=$1
# A test initramfs has its own tar, findmnt and losetup, out of the way of what a production initramfs would have.
PATH=$PATH:/vm-test/bin
LD_LIBRARY_PATH=/vm-test/lib
export PATH
[ ! -d /vm-test/lib ] || export LD_LIBRARY_PATH

disk=
for sysfs in /sys/block/vd*; do
    serial=
    read -r serial < "$sysfs/serial" || :
    [ "$serial" != report ] || disk=/dev/${sysfs##*/}
done
[ -n "$disk" ] || exit 0

work=/run/vm-test
mkdir -p $work/answer/commands
cd $work/answer || exit 1
tar -xf "$disk" -C $work

echo "$stage" > stage
cat /dev/vcs1 > screen 2> screen.err # what a person sees on tty1, where the machine has a screen
[ "$stage" != system ] || timeout 30 systemctl is-system-running --wait > is-system-running 2>&1

for command in ../commands/*; do
    [ -e "$command" ] || continue
    sh "$command" > "commands/${command##*/}.output" 2>&1
    echo $? > "commands/${command##*/}.status"
done

cat /proc/self/mountinfo > mountinfo
cat /proc/cmdline > cmdline
cat /proc/meminfo > meminfo
findmnt --json --list --output TARGET,SOURCE,FSROOT,FSTYPE,OPTIONS,MAJ:MIN,PROPAGATION > findmnt.json 2> findmnt.err
losetup --list --json --output NAME,BACK-FILE,RO,AUTOCLEAR,OFFSET > losetup.json 2> losetup.err
for sysfs in /sys/block/loop*/loop/backing_file; do
    [ -e "$sysfs" ] && echo "$sysfs $(cat "$sysfs")"
done > backing_files
if [ "$stage" = system ]; then
    cat /etc/immucore-slot > slot 2> slot.err
    cat /etc/fstab > fstab
    findmnt --verify > findmnt-verify 2>&1
    echo $? > findmnt-verify.status
    systemd-analyze time > systemd-analyze 2>&1
else
    cat /sysroot/etc/fstab > fstab 2> /dev/null
    cat /sysroot/etc/immucore-slot > slot 2> /dev/null
fi
if [ -d /run/systemd/system ]; then
    systemctl show > manager 2> manager.err
    systemctl list-units --all --full --plain --no-legend > units 2> units.err
    journalctl --sync 2> /dev/null
    journalctl -b --output=json --all \
        --output-fields=MESSAGE,PRIORITY,SYSLOG_IDENTIFIER,_SYSTEMD_UNIT,UNIT,_PID,_TRANSPORT,_SOURCE_MONOTONIC_TIMESTAMP \
        > journal 2> journal.err
else
    dmesg > dmesg 2>&1
fi

cd / || exit 1
set -- run/cos run/elemental run/immucore
# shellcheck disable=SC2046 # patterns: split and expanded on purpose
[ ! -e $work/files ] || set -- "$@" $(cat $work/files)
for path in "$@"; do
    [ ! -e "$path" ] || set -- "$@" "$path"
    shift
done
tar --dereference -cf "$disk" -C $work/answer . -C / "$@" 2> /dev/null
sync

if [ "$stage" = system ] && [ "$(cat $work/poweroff)" = clean ]; then
    exec systemctl poweroff --no-block
fi
echo o > /proc/sysrq-trigger
sleep 60
