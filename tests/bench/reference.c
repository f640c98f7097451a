// What the agent asks of the kernel in an ordinary boot of the native machine, in C and without a thought.
//
// The system calls are those of an strace of `immucore boot` (default layout, every device there): the command
// line and the udev record of each block device, mounts, loop ioctls, directories, overlays, the files of the
// record. What the interpreter does for itself is left out: that is what the comparison is about.
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/loop.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define STATE "/run/initramfs/cos-state"
static char device_of[4][64];  // by label: OEM, STATE, RECOVERY, PERSISTENT
static const char *labels[] = {"COS_OEM", "COS_STATE", "COS_RECOVERY", "COS_PERSISTENT"};

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static size_t read_file(const char *path, char *buffer, size_t size) {
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) {
        buffer[0] = 0;
        return 0;
    }
    size_t length = 0;
    ssize_t more;
    while (length < size - 1 && (more = read(descriptor, buffer + length, size - 1 - length)) > 0) length += more;
    close(descriptor);
    buffer[length] = 0;
    return length;
}

static void look_at_devices(void) {
    DIR *directory = opendir("/sys/class/block");
    if (!directory) fail("/sys/class/block");
    for (struct dirent *entry; (entry = readdir(directory));) {
        char path[PATH_MAX], number[32], record[8192], link[PATH_MAX], size[32];
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "/sys/class/block/%s/dev", entry->d_name);
        read_file(path, number, sizeof number);
        number[strcspn(number, "\n")] = 0;
        snprintf(path, sizeof path, "/run/udev/data/b%s", number);
        if (!read_file(path, record, sizeof record)) continue;
        snprintf(path, sizeof path, "/sys/class/block/%s", entry->d_name);
        if (readlink(path, link, sizeof link) < 0) fail(path);
        snprintf(path, sizeof path, "/sys/class/block/%s/partition", entry->d_name);
        access(path, F_OK);
        snprintf(path, sizeof path, "/sys/class/block/%s/size", entry->d_name);
        read_file(path, size, sizeof size);
        for (int i = 0; i < 4; i++) {
            char wanted[64];
            snprintf(wanted, sizeof wanted, "E:ID_FS_LABEL_ENC=%s\n", labels[i]);
            if (strstr(record, wanted)) snprintf(device_of[i], sizeof device_of[i], "/dev/%s", entry->d_name);
        }
    }
    closedir(directory);
}

static int open_in(const char *root, const char *path, int flags) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};
    int directory = open(root, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int descriptor = syscall(SYS_openat2, directory, path, &how, sizeof how);
    close(directory);
    return descriptor;
}

static void resolve(const char *root, const char *path) {
    char self[64], real[PATH_MAX];
    struct stat status;
    int descriptor = open_in(root, path, O_PATH);
    if (descriptor < 0) fail(path);
    snprintf(self, sizeof self, "/proc/self/fd/%d", descriptor);
    if (readlink(self, real, sizeof real) < 0) fail(self);
    close(descriptor);
    stat(real, &status);
}

static char table[65536];

static void mount_on(const char *source, const char *target, const char *type, unsigned long flags, const char *data) {
    if (mount(source, target, type, flags, data) < 0) fail(target);
}

static void loop_root(const char *image) {
    char name[32], magic[2];
    int file = open(image, O_RDONLY | O_CLOEXEC);
    if (file < 0 || pread(file, magic, 2, 1080) != 2) fail(image);
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    snprintf(name, sizeof name, "/dev/loop%d", ioctl(control, LOOP_CTL_GET_FREE));
    int device = open(name, O_RDONLY | O_CLOEXEC);
    struct loop_config config = {.fd = file, .info.lo_flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR};
    strncpy((char *)config.info.lo_file_name, image, LO_NAME_SIZE - 1);
    if (ioctl(device, LOOP_CONFIGURE, &config) < 0) fail(name);
    close(control);
    close(file);
    mount_on(name, "/sysroot", "ext4", MS_RDONLY, "");
    close(device);
}

static void overlay(const char *path, const char *name) {
    char base[PATH_MAX], upper[PATH_MAX], growing[PATH_MAX], work[PATH_MAX], data[4 * PATH_MAX], names[256];
    char lower[PATH_MAX], value[256];
    struct stat status;
    snprintf(lower, sizeof lower, "/sysroot/%s", path);
    snprintf(base, sizeof base, "/run/overlay/%s.overlay", name);
    snprintf(upper, sizeof upper, "/run/overlay/%s.overlay/upper", name);
    snprintf(growing, sizeof growing, "/run/overlay/%s.overlay/upper.new", name);
    snprintf(work, sizeof work, "/run/overlay/%s.overlay/work", name);
    resolve("/sysroot", path);
    read_file("/proc/self/mountinfo", table, sizeof table);
    if (mkdir(base, 0755) < 0 || mkdir(growing, 0700) < 0 || lstat(lower, &status) < 0) fail(base);
    if (lchown(growing, status.st_uid, status.st_gid) < 0) fail(growing);
    ssize_t length = llistxattr(lower, names, sizeof names);
    for (char *each = names; each < names + length; each += strlen(each) + 1) {
        ssize_t size = lgetxattr(lower, each, value, sizeof value);
        if (size >= 0) lsetxattr(growing, each, value, size, 0);
    }
    chmod(growing, status.st_mode & 07777);
    utimensat(AT_FDCWD, growing, (struct timespec[]){status.st_atim, status.st_mtim}, AT_SYMLINK_NOFOLLOW);
    if (rename(growing, upper) < 0 || mkdir(work, 0700) < 0) fail(upper);
    snprintf(data, sizeof data, "lowerdir=%s,upperdir=%s,workdir=%s,index=off,metacopy=off", lower, upper, work);
    mount_on("overlay", lower, "overlay", 0, data);
}

static void write_file(const char *path, size_t size) {
    char growing[PATH_MAX];
    static char content[8192];
    memset(content, 'x', sizeof content);
    snprintf(growing, sizeof growing, "%s.new", path);
    int descriptor = open(growing, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (descriptor < 0 || write(descriptor, content, size) < 0) fail(path);
    close(descriptor);
    if (rename(growing, path) < 0) fail(path);
}

int main(void) {
    char line[4096];
    read_file("/proc/cmdline", line, sizeof line);
    look_at_devices();
    for (int i = 0; i < 4; i++) {
        if (!device_of[i][0]) return 3;
    }
    mkdir("/run/initramfs", 0755);
    mkdir(STATE, 0755);
    mount_on(device_of[1], STATE, "ext4", MS_RDONLY, "");
    loop_root(STATE "/cOS/active.img");
    resolve("/sysroot", "oem");
    mount_on(device_of[0], "/sysroot/oem", "ext4", 0, "");
    const char *files[] = {"etc/cos/cos-layout.env", "oem/cos-layout.env", "etc/fstab"};
    for (int i = 0; i < 3; i++) {
        int descriptor = open_in("/sysroot", files[i], O_RDONLY);
        if (descriptor >= 0) {
            if (read(descriptor, line, sizeof line) < 0) fail(files[i]);
            close(descriptor);
        }
    }
    look_at_devices();
    mkdir("/run/overlay", 0755);
    mount_on("immucore-overlay", "/run/overlay", "tmpfs", 0, "mode=0755,size=20%");
    overlay("etc", "etc");
    overlay("home", "home");
    overlay("opt", "opt");
    overlay("root", "root");
    overlay("srv", "srv");
    resolve("/sysroot", "usr/local");
    mount_on(device_of[3], "/sysroot/usr/local", "ext4", 0, "");
    overlay("var", "var");
    resolve("/sysroot", "tmp");
    mount_on("tmpfs", "/sysroot/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    write_file("/sysroot/etc/fstab", 1500);
    mkdir("/run/cos", 0755);
    mkdir("/run/elemental", 0755);
    write_file("/run/cos/active_mode", 1);
    write_file("/run/elemental/active_mode", 1);
    if (write(2, "<6>active booted\n", 17) < 0) fail("stderr");
    mkdir("/run/immucore", 0755);
    write_file("/run/immucore/plan.json", 3600);
    write_file("/run/immucore/steps.json", 4900);
    write_file("/run/immucore/mounts", 180);
    write_file("/run/immucore/immucore.log", 3700);
    write_file("/run/immucore/result.json", 220);
    return 0;
}
