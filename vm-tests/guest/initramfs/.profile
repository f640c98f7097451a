# Read after /etc/profile, which is the product's, by the `sh -i -l` that dracut starts where there is no systemd: a person would
# get a prompt now, a test gets its report.
sh /vm-test/report.sh initramfs
