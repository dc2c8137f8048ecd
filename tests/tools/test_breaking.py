"""Protos against the newest tag, in a git repository of the test's own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.breaking import check, newest_tag

ROOT = Path(__file__).resolve().parents[2]
BUF = str(Path(sys.executable).parent / "buf")

PROTO = """\
syntax = "proto3";
package thing.v1;
message Thing {
  string name = 1;
  int32 count = 2;
}
"""
ADDITIVE = PROTO.replace("}", "  bool more = 3;\n}")
BREAKING = PROTO.replace("int32 count = 2", "string count = 2")
REMOVED = PROTO.replace("  int32 count = 2;\n", "")


class Repository:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.proto = root / "protos" / "thing" / "v1" / "thing.proto"
        self.proto.parent.mkdir(parents=True)
        (root / "buf.yaml").write_text((ROOT / "buf.yaml").read_text())
        self.git("init", "--quiet")

    def git(self, *arguments: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "tag.gpgsign=false")
        subprocess.run(["git", *who, "-C", str(self.root), *arguments], check=True)

    def commit(self, proto: str, *tags: str) -> None:
        self.proto.write_text(proto)
        self.git("add", "--all")
        self.git("-c", "commit.gpgsign=false", "commit", "--quiet", "-m", "change")
        for tag in tags:
            self.git("tag", tag)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


def test_without_a_tag_there_is_nothing_to_compare_with(repository: Repository) -> None:
    repository.commit(PROTO, "w1", "data-v1")
    repository.proto.write_text(BREAKING)
    good, text = check(repository.root, BUF)
    assert good
    assert text == "no tag v* yet: nothing to compare the protos with"


@pytest.mark.parametrize(
    ("proto", "good", "says"),
    [
        (PROTO, True, "break nothing that v0.1.0 has"),
        (ADDITIVE, True, "break nothing that v0.1.0 has"),
        (BREAKING, False, 'Field "2" with name "count" on message "Thing" changed type'),
        (REMOVED, False, 'field "2" with name "count" on message "Thing" was deleted'),
    ],
    ids=["the same", "additive", "another type", "removed"],
)
def test_against_a_tag(repository: Repository, proto: str, good: bool, says: str) -> None:
    repository.commit(PROTO, "v0.1.0")
    repository.proto.write_text(proto)
    found, text = check(repository.root, BUF)
    assert says in text
    assert found == good


def test_a_file_that_is_gone_breaks(repository: Repository) -> None:
    (repository.proto.parent / "other.proto").write_text('syntax = "proto3";\npackage thing.v1;\n')
    repository.commit(PROTO, "v0.1.0")
    (repository.proto.parent / "other.proto").unlink()
    good, text = check(repository.root, BUF)
    assert not good
    assert "other.proto" in text


def test_only_the_newest_tag_counts(repository: Repository) -> None:
    repository.commit(PROTO, "v0.9.0")
    repository.commit(BREAKING, "v0.10.0", "v0.10.0-rc1")
    assert newest_tag(repository.root) == "v0.10.0"
    assert check(repository.root, BUF)[0]
    repository.proto.write_text(PROTO)
    assert not check(repository.root, BUF)[0]


def test_a_worktree_and_a_shallow_clone_know_the_tag(
    repository: Repository, tmp_path: Path
) -> None:
    repository.commit(PROTO, "v0.1.0")
    repository.git("worktree", "add", "--quiet", "--detach", str(tmp_path / "worktree"))
    source = f"file://{repository.root}"
    repository.git("clone", "--quiet", "--depth=1", source, str(tmp_path / "clone"))
    for name in ("worktree", "clone"):
        root = tmp_path / name
        assert check(root, BUF)[0]
        (root / "protos" / "thing" / "v1" / "thing.proto").write_text(BREAKING)
        assert not check(root, BUF)[0]


def test_our_own_protos_can_be_compared(repository: Repository) -> None:
    """They are unchanged against themselves, and a change to one of them is seen."""
    for source in sorted((ROOT / "protos").rglob("*.proto")):
        copy = repository.root / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text())
    repository.commit(PROTO, "v1.0.0")
    assert check(repository.root, BUF) == (True, "the protos break nothing that v1.0.0 has")
    service = repository.root / "protos" / "tdb" / "inference" / "v1" / "service.proto"
    service.write_text(service.read_text().replace("rpc ListModels", "rpc ListEveryModel"))
    good, text = check(repository.root, BUF)
    assert not good
    assert "ListModels" in text
