"""Tars that are damaged or mean harm."""

from __future__ import annotations

import os
import random
import tarfile
from pathlib import Path

import pytest
from tar_files import contents, make_tar, member

from mdistiller.fetch import archive
from mdistiller.fetch.archive import ArchiveError, BadArchiveError, unpack
from mdistiller.files import lock
from mdistiller.registry import InputError


def test_unpack(tmp_path: Path) -> None:
    tar = make_tar(
        tmp_path / "a.tar",
        {"t": member("t", type=tarfile.DIRTYPE), "./t/a": b"a" * 1000, "t/b": b"b", "t/" + "long" * 50: b"c"},
    )
    folder = tmp_path / "folder"
    assert unpack(tar, folder, ["t/a", "t/b"]) == {"t/a": "new", "t/b": "new"}
    assert contents(folder) == {"t/a": b"a" * 1000, "t/b": b"b"}
    old = os.umask(0o027)
    try:
        assert set(unpack(tar, tmp_path / "all").values()) == {"new"}
    finally:
        os.umask(old)
    assert len(contents(tmp_path / "all")) == 3
    assert (tmp_path / "all" / "t" / "b").stat().st_mode & 0o777 == 0o640


def test_files_that_are_there_are_kept_unless_asked(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", {"a": b"aa", "b": b"bb", "c": b"cc"})
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"aa")
    (folder / "b").write_bytes(b"mine")
    assert unpack(tar, folder) == {"a": "same", "b": "kept", "c": "new"}
    assert contents(folder) == {"a": b"aa", "b": b"mine", "c": b"cc"}
    assert unpack(tar, folder, overwrite=True)["b"] == "replaced"
    assert contents(folder) == {"a": b"aa", "b": b"bb", "c": b"cc"}


def test_a_folder_that_is_a_link_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "t").symlink_to(tmp_path / "disk")
    unpack(make_tar(tmp_path / "a.tar", {"t/a": b"a"}), tmp_path / "folder")
    assert contents(tmp_path / "disk") == {"a": b"a"}


HARMFUL = {
    "absolute path": {"a": member("/{tmp}/outside")},
    "dots": {"a": member("t/../../outside")},
    "only dots": {"a": member("..")},
    "no name": {"a": member(".")},
    "symlink": {"a": member("t", type=tarfile.SYMTYPE, linkname=".."), "b": member("t/outside")},
    "absolute symlink": {"a": member("t", type=tarfile.SYMTYPE, linkname="{tmp}"), "b": member("t/outside")},
    "hard link": {"a": member("a", type=tarfile.LNKTYPE, linkname="../secret")},
    "device": {"a": member("a", type=tarfile.CHRTYPE, devmajor=1, devminor=3)},
    "block device": {"a": member("a", type=tarfile.BLKTYPE)},
    "fifo": {"a": member("a", type=tarfile.FIFOTYPE)},
    "huge": {"a": member("a", size=1 << 40)},
    "larger than the tar": {"a": member("a", size=1 << 20)},
    "twice": {"a": member("a"), "b": member("./a")},
}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("kind", HARMFUL)
def test_harmful_tars_leave_nothing(tmp_path: Path, kind: str, format: int) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    members: dict[str, bytes | tarfile.TarInfo] = {"good": b"good"}
    for key, info in HARMFUL[kind].items():
        copy = tarfile.TarInfo.frombuf(info.tobuf(format=tarfile.GNU_FORMAT), "utf-8", "strict")
        copy.name = info.name.replace("{tmp}", str(tmp_path))
        copy.linkname = info.linkname.replace("{tmp}", str(tmp_path))
        members[key] = copy
    tar = make_tar(tmp_path / "bad.tar", members, format=format)
    before = contents(tmp_path)
    with pytest.raises(ArchiveError, match=r"refused, nothing was unpacked|damaged"):
        unpack(tar, tmp_path / "folder")
    assert contents(tmp_path) == before
    assert not (tmp_path / "folder").exists()


def test_own_checks_do_without_tarfiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10.0 has no filters."""
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    for kind in HARMFUL:
        test_harmful_tars_leave_nothing(tmp_path, kind, tarfile.GNU_FORMAT)


def test_many_members_and_much_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = make_tar(tmp_path / "a.tar", {str(i): b"1234567890" for i in range(20)})
    monkeypatch.setattr(archive, "MAX_MEMBERS", 19)
    with pytest.raises(ArchiveError, match="19 members"):
        unpack(tar, tmp_path / "folder")
    monkeypatch.setattr(archive, "MAX_MEMBERS", 20)
    monkeypatch.setattr(archive, "MAX_BYTES", 199)
    with pytest.raises(ArchiveError, match="refused"):
        unpack(tar, tmp_path / "folder")


def test_damaged_tars(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "a.tar", {"a": bytes(5000), "b": bytes(5000)}).read_bytes()
    tar, folder = tmp_path / "b.tar", tmp_path / "folder"
    second_header = 512 + 5120
    flipped = bytearray(whole)
    flipped[second_header] ^= 4
    cases = [b"", b"<html>", whole[:100], whole[:3000], whole[:second_header], whole[: second_header + 100]]
    for content in [*cases, whole[: second_header + 3000], bytes(flipped), random.Random(1).randbytes(4096)]:
        tar.write_bytes(content)
        with pytest.raises(ArchiveError, match=r"damaged|cut short"):
            unpack(tar, folder)
        assert not folder.exists()
    with pytest.raises(ArchiveError, match="cannot read"):
        unpack(tmp_path / "none.tar", folder)


def test_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "a.tar", {"a": b"12", "n" * 150: b"34"}, format=tarfile.PAX_FORMAT).read_bytes()
    rng = random.Random(0)
    for number in range(150):
        content = bytearray(whole[:5120])
        for _ in range(3):
            content[rng.randrange(4096)] = rng.choice(b"\x00\x80\xff09 =" + rng.randbytes(1))
        (tmp_path / "b.tar").write_bytes(content)
        try:
            unpack(tmp_path / "b.tar", tmp_path / f"folder{number}")
        except ArchiveError:
            continue


def test_a_refused_member_keeps_its_place(tmp_path: Path) -> None:
    """The file that was there before stays; the other members are unpacked."""

    def check(path: Path, name: str) -> None:
        assert path.parent.name == "t"
        if path.read_bytes() == b"bad":
            raise InputError(f"checkpoint {path} is damaged")

    tar = make_tar(tmp_path / "a.tar", {"t/a": b"bad", "u/t/b": b"bad", "t/c": b"good"})
    folder = tmp_path / "folder"
    (folder / "t").mkdir(parents=True)
    (folder / "t" / "a").write_bytes(b"old")
    with pytest.raises(ArchiveError) as error:
        unpack(tar, folder, overwrite=True, check=check)
    assert f"t/a in {tar} is refused and not unpacked: checkpoint {folder / 't' / 'a'} is damaged" in str(error.value)
    assert contents(folder) == {"t/a": b"old", "t/c": b"good"}
    assert not (folder / "u").exists()


def test_one_process_unpacks_a_tar_at_a_time(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", {"a": b"a"})
    with tar.open("rb") as other:
        assert lock(other)
        with pytest.raises(ArchiveError, match=r"another process is unpacking .*a\.tar already"):
            unpack(tar, tmp_path / "folder")
    assert unpack(tar, tmp_path / "folder") == {"a": "new"}


def test_the_file_that_a_kill_left_is_removed(tmp_path: Path) -> None:
    folder, tar = tmp_path / "folder", make_tar(tmp_path / "a.tar", {"t/a": b"a" * 1000})
    temporary: list[Path] = []
    unpack(tar, folder, check=lambda path, name: temporary.append(path))
    (folder / "t" / "a").unlink()
    temporary[0].write_bytes(b"half of it")
    unpack(tar, folder)
    assert contents(folder) == {"t/a": b"a" * 1000}


def test_only_another_copy_helps_against_a_bad_tar(tmp_path: Path) -> None:
    """A tar that is damaged can be deleted; not so one that cannot be read, or of which files are refused."""

    def refuse(path: Path, name: str) -> None:
        raise InputError("this machine cannot read it")

    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(b"<html>")
    harmful = make_tar(tmp_path / "harmful.tar", {"a": member("../outside")})
    for tar in (damaged, harmful):
        with pytest.raises(BadArchiveError):
            unpack(tar, tmp_path / "folder")
    for tar in (tmp_path, make_tar(tmp_path / "good.tar", {"a": b"a"})):
        with pytest.raises(ArchiveError) as error:
            unpack(tar, tmp_path / "folder", check=refuse)
        assert not isinstance(error.value, BadArchiveError)
