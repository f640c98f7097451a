"""Cloud-init files as values: the schema, what is wrong and where, the form on the command line."""

from __future__ import annotations

import base64
import gzip
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore import cmdline, documents, stages
from immucore.documents import DocumentError, Node
from immucore.stage_keys import File, Override


def read(text: str) -> list[Node]:
    return documents.read(text, "f.yaml")


def steps(text: str, stage: str = "rootfs") -> list[stages.Step]:
    return stages.steps_of(read(text), stage)


def one(keys: str) -> stages.Step:
    """Read a step with these keys, which begin at column 1 of line 4."""
    lines = "".join(f"      {line}\n" for line in keys.splitlines())
    (step,) = steps(f"stages:\n  rootfs:\n    - name: x\n{lines}")
    return step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: x", "f.yaml:2:2: expected ',' or ']', but got ':'"),
        ("a:\n\tb: 1", "f.yaml:2:1: found character '\\t' that cannot start any token"),
        ("a: *b", "f.yaml:1:4: there is no anchor &b before it"),
        ("a: &b [*b]", "f.yaml:1:8: there is no anchor &b before it"),
        ("a\nb\0", "f.yaml:2:2: the character #x0000 is not allowed"),
        ("a: \udcff", "f.yaml:1:4: the character #xdcff is not allowed"),
        ('a:\n  "b\\0": x', "f.yaml:2:3: the character #x0000 is not allowed"),
        ('a:\n  "\\udcff": x', "f.yaml:2:3: the character #xdcff is not allowed"),
        ("[" * 1000, "f.yaml:1:42: it is deeper than 40 lists and mappings"),
        ("a: 1\na: 2", "f.yaml:2:1: 'a' is there twice"),
        ("? [a]\n: b", "f.yaml:1:3: a list cannot be a key"),
        (
            "a: !!python/object:os.system x",
            "f.yaml:1:4: the tag tag:yaml.org,2002:python/object:os.system me",
        ),
        ("a: !!binary x", "f.yaml:1:4: the tag tag:yaml.org,2002:binary means nothing here"),
        ('"\\UFFFFFFFF"', "f.yaml: it is no YAML (OverflowError)"),
        ("a:\n  <<: 1", "f.yaml:2:7: << takes mappings, and this is a text"),
    ],
)
def test_what_is_no_yaml_says_where(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read(text)
    assert caught.value.message.startswith(f"cannot read {message}")
    assert "f.yaml" in caught.value.hint


def test_a_billion_laughs() -> None:
    bomb = "- &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    bomb += "".join(f"- &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    before = time.monotonic()
    with pytest.raises(
        DocumentError, match=r"f\.yaml:5:\d+: it has more than 100000 parts, aliases counted"
    ):
        read(bomb)
    assert time.monotonic() - before < 5


@given(
    st.binary(max_size=400) | st.text("stages: rootfs-[]{}&*!|>'\"%@`#,?\n\t", max_size=400).map(str.encode)
)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        found = read(text)
    except DocumentError as error:
        assert error.message.startswith("cannot read f.yaml")  # noqa: PT017
        return
    for stage in ("rootfs", "initramfs"):
        try:
            stages.steps_of(found, stage)
        except DocumentError as error:
            assert error.message.startswith("f.yaml:")  # noqa: PT017


def test_anchors_merges_and_several_documents() -> None:
    found = steps(
        "x: &x {name: base, hostname: one}\nstages:\n  rootfs:\n    - <<: *x\n      name: own\n---\n"
        "stages: {rootfs: [{hostname: two}]}\n---\n# nothing\n"
    )
    assert [(step.name, step.keys) for step in found] == [
        ("own", {"hostname": "one"}),
        ("step 1", {"hostname": "two"}),
    ]


@pytest.mark.parametrize(
    "text", ["", "# x", "name: x", "stages:", "stages:\n  boot: []", "#cloud-config\nusers: []"]
)
def test_nothing_for_this_stage(text: str) -> None:
    assert steps(text) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "f.yaml:1:1: it has to be a mapping, and is a list"),
        ("stages: 1", "f.yaml:1:9: it has to be a mapping, and is a text"),
        ("stages:\n  rootfs: x", "f.yaml:2:11: it has to be a list, and is a text"),
    ],
)
def test_what_is_no_stage(text: str, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        steps(text)
    assert caught.value.message == message


def test_files() -> None:
    packed = base64.b64encode(gzip.compress(b"packed")).decode()
    step = one(
        "files:\n"
        "- path: /a\n  content: |\n    one\n    two\n  permissions: 0600\n  owner: 1\n  group: 2\n"
        f"- path: /b\n  encoding: gzip+base64\n  content: {packed}\n  permissions: 0o755\n"
        "- path: /c\n  encoding: b64\n  content: aGVsbG8=\n  owner_string: user:group\n  permissions: 384\n"
        "- {path: /d}\n"
        "directories:\n- path: /e\n- {path: /f, permissions: 01777}\n"
    )
    assert step.problems == ()
    assert step.keys["files"] == (
        File(path="/a", content=b"one\ntwo\n", mode=0o600, owner="1:2"),
        File(path="/b", content=b"packed", mode=0o755),
        File(path="/c", content=b"hello", mode=0o600, owner="user:group"),
        File(path="/d", content=b"", mode=0o644),
    )
    assert step.keys["directories"] == (
        File(path="/e", content=None, mode=0o755),
        File(path="/f", content=None, mode=0o1777),
    )


BOMB = base64.b64encode(gzip.compress(bytes(65 << 20))).decode()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("files: x", "f.yaml:4:14: it has to be a list, and is a text"),
        ("files:\n- content: x", "f.yaml:5:9: there is no path: in it"),
        ("files:\n- path: a", "f.yaml:5:15: 'a' is no absolute path"),
        ("files:\n- {path: /a, permissions: rw}", "f.yaml:5:33: 'rw' is no number"),
        ("files:\n- {path: /a, permissions: 0999}", "f.yaml:5:33: '0999' is no number"),
        (
            "files:\n- {path: /a, encoding: rot13}",
            "f.yaml:5:30: there is no encoding 'rot13': b64, gz or gz+b64",
        ),
        ("files:\n- {path: /a, encoding: b64, content: a}", "f.yaml:5:44: it cannot be unpacked (b64): "),
        (
            "files:\n- {path: /a, encoding: gz+b64, content: aGVsbG8=}",
            "f.yaml:5:47: it cannot be unpacked (gz+b64)",
        ),
        (
            f"files:\n- {{path: /a, encoding: gz+b64, content: {BOMB}}}",
            "f.yaml:5:47: it unpacks to more than 64 MiB",
        ),
        ("commands:\n- echo: x", "f.yaml:5:9: it has to be a text, and is a mapping"),
        ("systemctl:\n  start:\n  - --force", "f.yaml:6:9: '--force' is no unit"),
        ("users:\n  a b: {}", "f.yaml:5:14: 'a b' is no name of a user"),
        ("layout:\n  expand_partition: {size: 0}", "f.yaml:5:9: there is no device: in it"),
        ('hostname: "a\\0b"', "f.yaml:4:17: the character #x0000 is not allowed"),
        ('files:\n- {path: /a, content: "\\ud800"}', "f.yaml:5:29: the character #xd800 is not allowed"),
        ('environment: {A: "\\udcff"}', "f.yaml:4:24: the character #xdcff is not allowed"),
    ],
)
def test_a_key_that_cannot_be_read_costs_itself_alone(keys: str, message: str) -> None:
    step = one(f"{keys}\nmodules: [loop]")
    assert len(step.problems) == 1
    assert step.problems[0].startswith(message)
    assert not step.broken
    assert step.keys == {"modules": ("loop",)}


@pytest.mark.parametrize("key", ["only_os: '('", "only_arch: [x]", "if: {}", "if_files: {some: []}"])
def test_nobody_knows_whether_a_step_with_such_a_condition_is_meant(key: str) -> None:
    step = one(f"{key}\nhostname: x")
    assert step.broken
    assert len(step.problems) == 1


def test_a_step_that_is_none_and_its_sibling() -> None:
    found = steps("stages:\n  rootfs:\n    - x\n    - hostname: y\n")
    assert [(step.problems, step.keys) for step in found] == [
        (("f.yaml:3:7: it has to be a mapping, and is a text",), {}),
        ((), {"hostname": "y"}),
    ]


def test_keys_that_this_agent_does_nothing_with_are_named() -> None:
    step = one("datasource: {providers: [aws]}\nhostname: x\ngit: {}")
    assert step.unknown == ("f.yaml:4:19: datasource", "f.yaml:6:12: git")
    assert step.problems == ()


def test_an_unknown_key_within_a_key_is_named_and_costs_nothing() -> None:
    step = one(
        "files:\n- {path: /a, permsisions: 0600, content: x}\n"
        "users:\n  kairos: {passwd: x, sudo: 'ALL=(ALL) ALL'}\n"
        "directories:\n- {path: /b, recursive: true}\n"
        "systemctl:\n  enable: [a]\n  restart: [b]\n  overrides:\n  - {service: s, content: c, x: y}\n"
        "dns: {nameservers: [1.1.1.1], ttl: 3}\n"
        "layout:\n  device: {label: A}\n  expand_partition: {size: 0}\n  add_partitions: []\n"
        "ensure_entities:\n- {entity: x, mode: 3}\n"
    )
    assert step.problems == ()
    assert step.unknown == (
        "f.yaml:5:33: permsisions",
        "f.yaml:7:35: sudo",
        "f.yaml:9:31: recursive",
        "f.yaml:12:18: restart",
        "f.yaml:14:39: x",
        "f.yaml:15:42: ttl",
        "f.yaml:19:25: add_partitions",
        "f.yaml:21:27: mode",
    )
    assert step.keys["files"] == (File(path="/a", content=b"x", mode=0o644),)
    assert [(user.name, user.password) for user in step.keys["users"]] == [("kairos", "x")]
    assert step.keys["layout"] == ("label", "A", 0)


def test_the_other_keys() -> None:
    step = one(
        "if: '[ -e /x ]'\nonly_os: ubuntu|debian\n"
        "commands:\n- echo a\n-\n"
        "environment: {A: 1, B: ~}\nenvironment_file: /run/x\n"
        "sysctl: {kernel.panic: 10}\n"
        "authorized_keys:\n  root: [ssh-rsa x]\n"
        "groups: [a, {b: [c, d]}, e: f]\n"
        "dns: {nameservers: [1.1.1.1], search: [a], path: /etc/x}\n"
        "systemctl:\n  enable: [a, b]\n  mask: [c]\n  start: ~\n"
        "  overrides:\n  - {service: d, content: x}\n  - {service: e.timer, name: f, content: y}\n"
        "systemd_firstboot: {keymap: us}\n"
        "layout:\n  device: {label: COS_PERSISTENT}\n  expand_partition: {size: 0}\n"
        "ensure_entities:\n- path: /etc/shadow\n  entity: |\n    kind: shadow\n    username: x\n"
    )
    assert step.problems == ()
    assert step.conditions == {"if": "[ -e /x ]", "only_os": "ubuntu|debian"}
    assert step.keys["commands"] == (("f.yaml:7:9", "echo a"),)
    assert step.keys["environment"] == {"A": "1", "B": ""}
    assert step.keys["groups"] == {"a": (), "b": ("c", "d"), "e": ("f",)}
    assert step.keys["dns"] == {"nameservers": ("1.1.1.1",), "search": ("a",), "path": ("/etc/x",)}
    assert step.keys["systemctl"].verbs == (("enable", ("a", "b")), ("mask", ("c",)))
    assert step.keys["systemctl"].overrides == (
        Override(service="d.service", name="override-yip.conf", content="x"),
        Override(service="e.timer", name="f.conf", content="y"),
    )
    assert step.keys["layout"] == ("label", "COS_PERSISTENT", 0)
    assert step.keys["ensure_entities"] == (("/etc/shadow", "kind: shadow\nusername: x\n"),)


def test_keys_are_done_in_one_order_however_they_are_written() -> None:
    step = one("commands: [x]\nusers: {}\nfiles: []\ndirectories: []\nhostname: x\ngroups: []")
    assert [*step.keys] == ["groups", "directories", "files", "commands", "hostname", "users"]


def test_a_user() -> None:
    step = one(
        "users:\n  kairos:\n    passwd: $6$x\n    groups: [admin, wheel]\n    shell: /bin/bash\n"
        "    uid: 1000\n    no_create_home: true\n    system: false\n    lock_passwd: yes\n"
        "    ssh_authorized_keys: [ssh-rsa x]\n"
    )
    (user,) = step.keys["users"]
    assert (user.name, user.password, user.groups, user.keys) == (
        "kairos",
        "$6$x",
        ("admin", "wheel"),
        ("ssh-rsa x",),
    )
    assert user.options == ("--shell=/bin/bash", "--uid=1000", "--no-create-home")
    assert user.lock


def dotted(line: bytes) -> tuple[list[Node], list[str]]:
    return stages.from_words(cmdline.parse(line).stages)


def test_the_form_on_the_command_line() -> None:
    found, problems = dotted(
        b'quiet stages.rootfs[0].commands[0]="echo a b" stages.rootfs[0].commands[1]=x '
        b"stages.rootfs[0].name=n stages.rootfs.before[3].files[0].path=/a "
        b"stages.rootfs.before[3].files[0].permissions=0600 "
        b'stages.rootfs[1].sysctl."kernel.panic"=5 -- stages.rootfs[7].hostname=x'
    )
    assert problems == []
    where = "'stages.rootfs[0].commands[{}]' on the kernel command line"
    first, second = stages.steps_of(found, "rootfs")
    assert first.name == "n"
    assert first.keys == {"commands": ((where.format(0), "echo a b"), (where.format(1), "x"))}
    assert second.keys == {"sysctl": {"kernel.panic": "5"}}
    (before,) = stages.steps_of(found, "rootfs.before")
    assert before.keys == {"files": (File(path="/a", content=b"", mode=0o600),)}


@pytest.mark.parametrize(
    "word",
    [
        b"stages.rootfs=x",
        b"stages.rootfs[x].hostname=x",
        b"stages.rootfs[0].=x",
        b"stages.rootfs[0]..x=x",
        b"stages.rootfs[0].hostname[0=x",
        b"stages.rootfs[0].hostname.x=x",  # is a text already
        b"stages.[0].x=x",
        b"stages.",
        b"stages.rootfs[0].hostname[0]=x",
        b"stages.rootfs[0][0]=x",  # a list and a mapping
        b"stages.rootfs[0]" + 1000 * b".a" + b"=x",
        b'stages.rootfs[0].sysctl."a\xff"=x',
    ],
)
def test_a_word_that_is_none_is_left_out_alone(word: bytes) -> None:
    found, problems = dotted(b"stages.rootfs[0].hostname=good " + word)
    assert len(problems) == 1
    name = word.decode("utf-8", "surrogateescape").partition("=")[0]
    assert problems[0].startswith(f"cannot read '{name}' on the kernel command line")
    assert [step.keys for step in stages.steps_of(found, "rootfs")] == [{"hostname": "good"}]


def test_a_list_that_is_a_mapping_too_on_the_command_line() -> None:
    found, problems = dotted(
        b"stages.rootfs[0].groups[0]=a stages.rootfs[0].groups.b.c=d stages.rootfs[1].hostname=x"
    )
    assert problems == [
        "cannot read 'stages.rootfs[0].groups.b.c' on the kernel command line: "
        "write stages.<stage>[0].<key>=<value>, each once"
    ]
    first, second = stages.steps_of(found, "rootfs")
    assert (first.keys, second.keys) == ({"groups": {"a": ()}}, {"hostname": "x"})


@given(
    st.lists(
        st.text('stages.rootfs[]0123"=x ', max_size=40).map(lambda end: f"stages.rootfs[0]{end}"), max_size=5
    )
)
def test_any_words_are_read_or_named(words: list[str]) -> None:
    found, problems = dotted(" ".join(words).encode())
    assert all("command line" in problem for problem in problems)
    for document in found:
        try:
            stages.steps_of([document], "rootfs")
        except DocumentError as error:
            assert "command line" in error.message  # noqa: PT017


def test_what_stages_say_is_not_shown() -> None:
    """A command may hold a secret, and the log is for everybody."""
    assert cmdline.redacted(b"stages.rootfs[0].commands[0]=secret") == "stages.rootfs[0].commands[0]=…"
