"""From a registry into a system: a machine with a network, skopeo and umoci, and a registry on the host."""

from __future__ import annotations

import shutil
from pathlib import Path

import derivative
import installed
from derivative import cached, digest, run
from installed import JUDGED, STATUS
from machine import Extra
from registry import Registry
from test_never_brick import LIMIT_S, NOTICE, came_up, states

HOST = "10.0.2.2"  # what QEMU's user network has for the host's loopback
PROGRAMS = ("skopeo", "umoci")
DRIVERS = ("net/core/failover", "drivers/net/net_failover", "drivers/net/virtio_net")
NETWORK = ("-nic", "user,model=virtio-net-pci")
ONLINE = """\
mkdir -p /run/extensions/tools /run/systemd/network /etc/immucore
mount -o ro /dev/disk/by-id/virtio-tools /run/extensions/tools
systemd-sysext merge
for driver in failover net_failover virtio_net; do insmod "/usr/lib/vm-test/$driver.ko" || exit; done
printf '[Match]\\nType=ether\\n[Network]\\nAddress=10.0.2.15/24\\n' >/run/systemd/network/10-guest.network
systemctl start systemd-networkd
/usr/lib/systemd/systemd-networkd-wait-online --timeout=60
printf 'source: oci:%s/system:stable\\ntls-verify: false\\n' '{address}' >/etc/immucore/upgrade.yaml
"""


def tools() -> Extra:
    """Return a disk with a system extension, systemd-sysext(8): what an upgrade from a registry takes.

    The programs are the host's, and so are those of their libraries that the images lack.
    """
    image = derivative.image_tree(installed.SUITE)
    modules = next((derivative.base(installed.SUITE) / "usr/lib/modules").iterdir())
    programs = [Path(str(shutil.which(name))) for name in PROGRAMS]
    words = [word for program in programs for word in run("ldd", program).split() if word.startswith("/")]
    libraries = {
        Path("usr") / word.removeprefix("/usr").lstrip("/"): Path(word) for word in sorted({*words})
    }

    def make(target: Path) -> None:
        work = target.with_name(f"{target.name}.tree")
        derivative.remove(work)
        files = {Path("usr/bin") / program.name: program for program in programs}
        files |= {place: path for place, path in libraries.items() if not (image / place).exists()}
        files |= {
            Path(f"usr/lib/vm-test/{Path(name).name}.ko"): modules / f"kernel/{name}.ko" for name in DRIVERS
        }
        for place, path in files.items():
            (work / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, work / place)
        release = work / "usr/lib/extension-release.d/extension-release.tools"
        release.parent.mkdir()
        release.write_text("ID=immucore-test\n")
        run("mke2fs", "-q", *derivative.EXT4, "-d", work, target, "128M")
        derivative.remove(work)

    key = digest(image.name, *programs, *libraries.values(), Path(__file__))
    return Extra(cached("tools", key, make), "tools")


def test_up_by_a_tag_and_down_by_a_digest(work: Path) -> None:
    """The machine takes what its settings name, and goes back to an older one, as good as any other."""
    first, change = installed.tree(), work / "change"
    (change / "etc").mkdir(parents=True)
    (change / derivative.SLOT_FILE).write_text("second")
    machine = installed.machine(work, efi=True, sources=(tools(),), hardware=NETWORK)
    with Registry(work / "registry") as registry:
        older = registry.push("system:1", first)
        registry.push("system:stable", first, change)
        address = registry.address.replace("127.0.0.1", HOST)
        online = ONLINE.format(address=address)
        up, down = "immucore upgrade", f"immucore upgrade oci:{address}/system@{older}"

        before = machine.boot(limit_s=2 * LIMIT_S, commands=(JUDGED, STATUS, online, up))
        upgraded = machine.boot(limit_s=2 * LIMIT_S, commands=(JUDGED, STATUS, NOTICE, online, down))
        after = machine.boot(limit_s=LIMIT_S, commands=(JUDGED, STATUS, NOTICE))

    came_up(before, "active", "first")
    assert f"oci:{address}/system:stable" in before.output(up)
    came_up(upgraded, "active", "second")
    assert states(upgraded)["passive"] == "good"
    upgraded.output(down)
    came_up(after, "active", "first")
    assert states(after) == {"active": "good", "passive": "good"}
