"""What the mounted image, OEM and /run say about the layout, as values."""

from __future__ import annotations

from immucore.values import Record


class Setting(Record):
    """One assignment of a cos-layout.env: `origin` is the file as the booted system names it."""

    name: str
    value: str
    origin: str
    adds: bool = (
        False  # from extra-layout.env or custom-layout.env: added to the lists instead of replacing them
    )

    @property
    def why(self) -> str:
        """The reason of an operation that this setting asked for."""
        return f"{self.name} in {self.origin}"


class Image(Record):
    """The settings in the order in which they override, the image's fstab, and whether it mounts /tmp."""

    settings: tuple[Setting, ...] = ()
    fstab: str = ""
    mounts_tmp: bool = False  # a tmp.mount that is enabled in the image
    warnings: tuple[str, ...] = ()  # files that could not be read and were left out
    links: tuple[
        tuple[str, str], ...
    ] = ()  # paths that lead elsewhere in the image: (path, without symlinks)
    selinux: bool = False  # the kernel has it switched on
    identity: str = ""  # of the file that holds it: another one may hold other files. Empty: not known

    def real(self, path: str) -> str:
        """Return the name of a path of the new root without symlinks."""
        return dict(self.links).get(path, path)

    def setting(self, name: str) -> Setting | None:
        """Return the assignment that counts: the last that replaces, or None."""
        return next((s for s in reversed(self.settings) if s.name == name and not s.adds), None)

    def lists(self, name: str) -> tuple[Setting, ...]:
        """Give the assignments that make up a list: one file's entries and what others add to them.

        An empty assignment takes away what was there before, as in systemd's unit files; so the last empty
        one comes first.
        """
        given = [s for s in self.settings if s.name == name and not s.adds]
        first = next((i for i in reversed(range(len(given))) if not given[i].value.strip()), 0)
        return (*given[first:], *self.additions(name))

    def additions(self, name: str) -> tuple[Setting, ...]:
        """List the assignments that add to whatever `name` is."""
        return tuple(s for s in self.settings if s.name == name and s.adds)


def manifest_head(identity: str) -> bytes:
    """Give the first line of the manifest of what an image gave, which says of which image it is."""
    return f'{{"image": "{identity}"}}\n'.encode()
