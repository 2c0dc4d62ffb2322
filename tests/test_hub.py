"""Public teachers: downloads that break off, tars and files that mean harm, and the command as a whole."""

from __future__ import annotations

import argparse
import collections
import email.utils
import errno
import http.server
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mdistiller import hub
from mdistiller.engine.build import build_teacher, teacher_checkpoint
from mdistiller.engine.cfg import load_config
from mdistiller.engine.cli import command
from mdistiller.engine.folder.checkpoint import CheckpointError, load_checkpoint, load_weights
from mdistiller.hub import ArchiveError, DownloadError, download, fetch_teachers, unpack
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError

ROOT = Path(__file__).resolve().parents[1]
RESNET56 = "cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth"
WRN = "cifar_teachers/wrn_40_2_vanilla/ckpt_epoch_240.pth"
QUICK = {"timeout": 5.0, "pause": 0.01, "attempts": 4}


# What the server does with a request: it is given the request and the content of the file.
Behaviour = Callable[["Request", bytes], None]


class Request(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``; ``server.script`` holds what happens to the next requests instead."""

    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        self.server.paths.append(self.path)
        behaviour = self.server.script.pop(0) if self.server.script else serve
        behaviour(self, self.server.files.get(self.path, b""))

    def begin(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.files: dict[str, bytes] = {}
        self.script: list[Behaviour] = []
        self.ranges: list[str | None] = []
        self.paths: list[str] = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients hang up here on purpose."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(hub.MIRROR_VARIABLE, raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def etag(content: bytes) -> str:
    return f'"{hash(content)}"'


def serve(request: Request, content: bytes, *, upto: int | None = None, validator: bool = True) -> None:
    """What a good server does; with ``upto``, the connection ends after so many bytes of the answer."""
    start, status = 0, 200
    headers = {"ETag": etag(content)} if validator else {}
    asked = request.headers.get("Range")
    if asked and request.headers.get("If-Range") == etag(content):
        start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
        headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    request.begin(status, len(content) - start, **headers)
    request.wfile.write(content[start:][:upto])


def truncate(upto: int) -> Behaviour:
    return lambda request, content: serve(request, content, upto=upto)


def stall(upto: int) -> Behaviour:
    def behaviour(request: Request, content: bytes) -> None:
        serve(request, content, upto=upto)
        request.wfile.flush()
        request.server.over.wait(10)

    return behaviour


def status(code: int) -> Behaviour:
    return lambda request, content: request.begin(code, 0)


def redirect(to: str) -> Behaviour:
    return lambda request, content: request.begin(302, 0, Location=to)


CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "file.bin"


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def test_download(server: Server, target: Path) -> None:
    server.files["/file"] = CONTENT
    digest = download(f"{server.url}/file", target)
    assert target.read_bytes() == CONTENT
    assert digest == hub.file_sha256(target)
    assert leftovers(target) == []
    download(f"{server.url}/file", target, digest.upper())  # replaces, and compares


@pytest.mark.parametrize("breaking", [truncate(100_000), stall(100_000)], ids=["truncated", "stalled"])
def test_only_the_rest_is_transferred_again(server: Server, target: Path, breaking: Behaviour) -> None:
    server.files["/file"] = CONTENT
    server.script = [breaking, status(503), truncate(50_000)]
    download(f"{server.url}/file", target, **{**QUICK, "timeout": 0.3})
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]


def test_a_later_call_goes_on_where_an_earlier_one_stopped(server: Server, target: Path) -> None:
    server.files["/file"] = CONTENT
    server.script = [truncate(200_000)]
    with pytest.raises(DownloadError, match=r"ended after 200000 of 300000 bytes, 1 times .* 0\.2 MB are kept"):
        download(f"{server.url}/file", target, attempts=1)
    assert leftovers(target) == ["file.bin.part", "file.bin.part.json"]
    download(f"{server.url}/file", target, **QUICK)
    assert server.ranges[-1] == "bytes=200000-"
    assert target.read_bytes() == CONTENT
    assert leftovers(target) == []


def test_complete_but_not_yet_renamed(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/file"] = CONTENT
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            download(f"{server.url}/file", target)
    download(f"{server.url}/file", target)
    assert target.read_bytes() == CONTENT
    assert len(server.ranges) == 1


def changed_but_glued(request: Request, content: bytes) -> None:
    """A server that knows Range but not If-Range."""
    start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    span = f"bytes {start}-{len(content) - 1}/{len(content)}"
    request.begin(206, len(content) - start, ETag=etag(content), Content_Range=span)
    request.wfile.write(content[start:])


@pytest.mark.parametrize("answer", [serve, changed_but_glued], ids=["If-Range", "no If-Range"])
def test_a_changed_file_is_fetched_anew(server: Server, target: Path, answer: Behaviour) -> None:
    server.files["/file"] = CONTENT
    server.script = [truncate(100_000)]
    with pytest.raises(DownloadError):
        download(f"{server.url}/file", target, attempts=1)
    server.files["/file"] = changed = CONTENT[::-1]
    server.script = [answer]
    download(f"{server.url}/file", target, **QUICK)
    assert target.read_bytes() == changed


def test_another_address_is_another_file(server: Server, target: Path) -> None:
    server.files = {"/file": CONTENT, "/other": CONTENT}
    server.script = [truncate(100_000)]
    with pytest.raises(DownloadError):
        download(f"{server.url}/file", target, attempts=1)
    download(f"{server.url}/other", target)
    assert server.ranges == [None, None]


def test_a_server_that_ignores_range(server: Server, target: Path) -> None:
    def whole(request: Request, content: bytes) -> None:
        request.begin(200, len(content), ETag=etag(content))
        request.wfile.write(content)

    server.files["/file"] = CONTENT
    server.script = [truncate(100_000), whole]
    download(f"{server.url}/file", target, **QUICK)
    assert server.ranges == [None, "bytes=100000-"]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("tag", [None, 'W/"weak"'])
def test_without_a_validator_nothing_is_glued(server: Server, target: Path, tag: str | None) -> None:
    def unsure(request: Request, content: bytes) -> None:
        request.begin(200, len(content), **({"ETag": tag} if tag else {}))
        request.wfile.write(content[:1000])

    server.files["/file"] = CONTENT
    server.script = [unsure]
    download(f"{server.url}/file", target, **QUICK)
    assert server.ranges == [None, None]
    assert target.read_bytes() == CONTENT


def test_a_date_is_a_validator(server: Server, target: Path) -> None:
    date = email.utils.formatdate(0, usegmt=True)
    seen = []

    def dated(request: Request, content: bytes) -> None:
        seen.append(request.headers.get("If-Range"))
        start = 1000 if seen[-1] else 0
        headers = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        request.begin(206 if start else 200, len(content) - start, Last_Modified=date, **headers)
        request.wfile.write(content[start:] if start else content[:1000])

    server.files["/file"] = CONTENT
    server.script = [dated, dated]
    download(f"{server.url}/file", target, **QUICK)
    assert seen == [None, date]
    assert target.read_bytes() == CONTENT


def test_chunked_transfer_without_length(server: Server, target: Path) -> None:
    def chunked(request: Request, content: bytes) -> None:
        request.protocol_version = "HTTP/1.1"
        request.begin(200, None, Transfer_Encoding="chunked")
        request.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content))

    def broken(request: Request, content: bytes) -> None:
        request.protocol_version = "HTTP/1.1"
        request.begin(200, None, Transfer_Encoding="chunked", Connection="close")
        request.wfile.write(b"%x\r\n%s" % (len(content), content[:1000]))
        request.close_connection = True

    server.files["/file"] = CONTENT
    server.script = [broken, chunked]
    download(f"{server.url}/file", target, **QUICK)
    assert target.read_bytes() == CONTENT


def test_redirects_keep_the_range(server: Server, target: Path) -> None:
    server.files["/far"] = CONTENT
    server.script = [redirect(f"{server.url}/far"), truncate(100_000), redirect(f"{server.url}/far")]
    download(f"{server.url}/file", target, **QUICK)
    assert server.paths == ["/file", "/far", "/file", "/far"]
    assert server.ranges[-1] == "bytes=100000-"
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("to", "message"),
    [("/file", "infinite loop"), ("file:///etc/passwd", "refused|not allowed"), ("ftp://127.0.0.1/x", "refused")],
)
def test_redirects_that_are_not_followed(server: Server, target: Path, to: str, message: str) -> None:
    server.script = [redirect(to)] * 20
    with pytest.raises(DownloadError, match=message):
        download(f"{server.url}/file", target, **QUICK)
    assert leftovers(target) == []


def test_no_redirect_from_https_to_http() -> None:
    handler = hub._Redirects()
    request = hub.urllib.request.Request("https://example.org/file")
    with pytest.raises(hub.urllib.error.HTTPError, match="refused"):
        handler.redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://example.org/file")


@pytest.mark.parametrize("code", [403, 404, 410])
def test_refusals_are_final(server: Server, target: Path, code: int) -> None:
    server.script = [status(code)] * 2
    with pytest.raises(DownloadError, match=f"HTTP status {code}"):
        download(f"{server.url}/file", target, **QUICK)
    assert len(server.paths) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_passing_failures_are_tried_again(server: Server, target: Path, code: int) -> None:
    server.files["/file"] = CONTENT
    server.script = [status(code)] * 2
    download(f"{server.url}/file", target, **QUICK)
    server.script = [status(code)] * 9
    with pytest.raises(DownloadError, match=f"HTTP status {code} .*, 4 times in a row$"):
        download(f"{server.url}/file", target, **QUICK)


def test_a_range_that_the_server_does_not_have(server: Server, target: Path) -> None:
    server.files["/file"] = CONTENT
    server.script = [truncate(100_000), status(416)]
    download(f"{server.url}/file", target, **QUICK)
    assert server.ranges == [None, "bytes=100000-", None]
    assert target.read_bytes() == CONTENT


def test_a_web_page_instead_of_the_file(server: Server, target: Path) -> None:
    def page(request: Request, content: bytes) -> None:
        request.begin(200, 5, Content_Type="text/html; charset=utf-8")
        request.wfile.write(b"<html")

    server.script = [page]
    with pytest.raises(DownloadError, match="web page instead of the file"):
        download(f"{server.url}/file", target, **QUICK)
    assert leftovers(target) == []


def test_wrong_bytes(server: Server, target: Path) -> None:
    server.files["/file"] = CONTENT
    with pytest.raises(DownloadError, match="not the file expected: its SHA-256 is"):
        download(f"{server.url}/file", target, "0" * 64)
    assert not target.exists()
    assert leftovers(target) == []


@pytest.mark.parametrize("announced", [True, False])
def test_too_large(server: Server, target: Path, announced: bool) -> None:
    def large(request: Request, content: bytes) -> None:
        request.begin(200, len(content) if announced else None)
        request.wfile.write(content)

    server.files["/file"] = CONTENT
    server.script = [large]
    with pytest.raises(DownloadError, match=r"MB that are accepted|at most 0 MB are accepted"):
        download(f"{server.url}/file", target, max_bytes=200_000)


def test_nobody_there_is_said_at_once(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as closed:
        url = closed.url
    with pytest.raises(DownloadError, match="cannot reach http://127"):
        download(f"{url}/file", target)
    assert leftovers(target) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "nonsense", "http://127.0.0.1/a b"])
def test_addresses_that_are_none(target: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="cannot download"):
        download(url, target, **QUICK)


def test_full_disk_is_seen_before_the_transfer(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/file"] = CONTENT
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=100_000))
    with pytest.raises(InputError, match=r"no space left to write .*file.bin: 0 MB more are needed"):
        download(f"{server.url}/file", target)
    assert leftovers(target) == []


def test_full_disk_during_the_transfer_keeps_what_came(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/file"] = CONTENT
    server.script = [truncate(100_000)]
    with pytest.raises(DownloadError):
        download(f"{server.url}/file", target, attempts=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub._Part, "append", lambda part, chunk: _raise_through(part, full))
        with pytest.raises(InputError, match="no space left to write"):
            download(f"{server.url}/file", target)
    download(f"{server.url}/file", target)
    assert server.ranges[-1] == "bytes=100000-"
    assert target.read_bytes() == CONTENT


def _raise_through(part: hub._Part, fail: Callable[[], None]) -> None:
    with hub._writing(part.path):
        fail()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        download("http://127.0.0.1/x", tmp_path / "file" / "x")


def test_two_downloads_of_one_file(server: Server, target: Path) -> None:
    server.files["/file"] = CONTENT
    server.script = [stall(1000)]
    first = threading.Thread(target=download, args=(f"{server.url}/file", target), kwargs={**QUICK, "timeout": 0.5})
    first.start()
    while not server.paths:
        pass
    with pytest.raises(DownloadError, match="already, by another process"):
        download(f"{server.url}/file", target)
    first.join()
    assert target.read_bytes() == CONTENT


def make_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo], *, format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, **attributes: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if not p.is_dir()}


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
    monkeypatch.setattr(hub, "MAX_MEMBERS", 19)
    with pytest.raises(ArchiveError, match="19 members"):
        unpack(tar, tmp_path / "folder")
    monkeypatch.setattr(hub, "MAX_MEMBERS", 20)
    monkeypatch.setattr(hub, "MAX_BYTES", 199)
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
            raise CheckpointError(f"checkpoint {path} is damaged")

    tar = make_tar(tmp_path / "a.tar", {"t/a": b"bad", "u/t/b": b"bad", "t/c": b"good"})
    folder = tmp_path / "folder"
    (folder / "t").mkdir(parents=True)
    (folder / "t" / "a").write_bytes(b"old")
    with pytest.raises(ArchiveError) as error:
        unpack(tar, folder, overwrite=True, check=check)
    assert f"t/a in {tar} is refused and not unpacked: checkpoint {folder / 't' / 'a'} is damaged" in str(error.value)
    assert contents(folder) == {"t/a": b"old", "t/c": b"good"}
    assert not (folder / "u").exists()


def teacher_file(name: str, num_classes: int = 100, **more: object) -> bytes:
    """A teacher as RepDistiller wrote it: old format, more than the weights."""
    torch.manual_seed(0)
    model = cifar_model_dict[name][0](num_classes=num_classes)
    buffer = io.BytesIO()
    content = {"epoch": 240, "model": model.state_dict(), "accuracy": np.float64(72.5), **more}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def resnet56() -> bytes:
    return teacher_file("resnet56", opt=argparse.Namespace(lr=0.05, lr_decay_epochs=[150, 180, 210], trial="0"))


@pytest.fixture
def mirror(server: Server, tmp_path: Path, resnet56: bytes, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server of a ``cifar_teachers.tar`` with one teacher and something else; ``MDISTILLER_CKPT_URL`` names it."""
    tar = make_tar(tmp_path / "served.tar", {RESNET56: resnet56, "cifar_teachers/README": b"hello"})
    server.files["/mirror/cifar_teachers.tar"] = tar.read_bytes()
    monkeypatch.setenv(hub.MIRROR_VARIABLE, f"{server.url}/mirror/")
    return server


def test_fetched_teacher_is_usable(
    mirror: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "download_ckpts"
    monkeypatch.setitem(cifar_model_dict, "resnet56", (cifar_model_dict["resnet56"][0], str(root / RESNET56)))
    cfg = load_config(options=["DATASET.TYPE", "cifar100", "DISTILLER.TEACHER", "resnet56"])
    with pytest.raises(CheckpointError, match=r"sh download_ckpts\.sh cifar_teachers .*releases/tag/checkpoints"):
        teacher_checkpoint(cfg)
    mirror.script = [truncate(1_000_000)]
    assert fetch_teachers("cifar_teachers", root, **QUICK) == [root / RESNET56]
    assert mirror.ranges == [None, "bytes=1000000-"]
    out = capsys.readouterr().out
    assert "good     resnet56: " in out
    assert "100 classes, sha256" in out
    assert "no known checksum" in out
    assert f"missing  wrn_40_2: {WRN} is not in the tar" in out
    assert list(contents(root)) == [RESNET56]  # neither the tar nor what is no teacher

    teacher = build_teacher(cfg, 100)
    assert torch.equal(teacher.fc.weight, load_weights(root / RESNET56)["fc.weight"])


def test_the_command(mirror: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    assert hub.main(["--root", str(root)]) == 0
    assert hub.main(["cifar_teachers", "--root", str(root), "--verify"]) == 0
    assert "good     resnet56: " in capsys.readouterr().out
    assert hub.main(["--root", str(root), "--list"]) == 0
    out = capsys.readouterr().out
    assert f"resnet56    there    {root / RESNET56}" in out
    assert "tiny_imagenet_teachers: by hand only" in out
    with pytest.raises(InputError, match="none of cifar_teachers lies in"):
        hub.main(["--root", str(tmp_path / "other"), "--verify"])
    with pytest.raises(InputError, match="no collection of teachers named 'cifar'; closest"):
        hub.main(["cifar"])


def test_failures_end_the_command_with_2(mirror: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirror.script = [status(404)]
    with pytest.raises(SystemExit) as stop:
        command(lambda: hub.main(["--root", str(tmp_path)]))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: cannot download {mirror.url}/mirror/cifar_teachers.tar: HTTP")


def test_verify_finds_a_truncated_file(mirror: Server, tmp_path: Path, resnet56: bytes) -> None:
    (tmp_path / RESNET56).parent.mkdir(parents=True)
    (tmp_path / RESNET56).write_bytes(resnet56[:-1000])
    with pytest.raises(CheckpointError, match=r"resnet56_vanilla/ckpt_epoch_240.pth is damaged(.|\n)*--overwrite"):
        hub.main(["--root", str(tmp_path), "--verify"])
    with pytest.raises(CheckpointError, match="--overwrite"):
        fetch_teachers(root=tmp_path)
    assert not mirror.paths
    fetch_teachers(root=tmp_path, overwrite=True)
    assert (tmp_path / RESNET56).read_bytes() == resnet56


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda good: good[:-1000], "damaged"),
        (lambda good: b"<html>not found</html>", "damaged or no checkpoint"),
        (lambda good: teacher_file("resnet20"), "does not fit"),
        (lambda good: teacher_file("resnet56", 10), "has 10 classes, resnet56 of cifar_teachers has 100"),
        (lambda good: teacher_file("resnet56", opt=Bomb()), "may execute code, so it is not loaded"),
    ],
    ids=["truncated", "text", "other model", "other classes", "code"],
)
def test_a_corrupt_teacher_is_refused(
    mirror: Server, tmp_path: Path, resnet56: bytes, content: Callable[[bytes], bytes], message: str
) -> None:
    tar = make_tar(tmp_path / "bad.tar", {RESNET56: content(resnet56), WRN: teacher_file("wrn_40_2")})
    mirror.files["/mirror/cifar_teachers.tar"] = tar.read_bytes()
    root = tmp_path / "root"
    with pytest.raises(ArchiveError, match=f"(?s){RESNET56} in .* is refused .*{message}.*run the command again"):
        fetch_teachers(root=root)
    assert list(contents(root)) == [WRN]


def test_weights_that_are_not_finite(mirror: Server, tmp_path: Path) -> None:
    state = cifar_model_dict["resnet56"][0](num_classes=100).state_dict()
    state["layer1.0.bn1.weight"][3] = float("nan")
    path = tmp_path / RESNET56
    path.parent.mkdir(parents=True)
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError, match=r"not finite, in layer1\.0\.bn1\.weight"):
        hub.verify_teachers("cifar_teachers", tmp_path)


def test_known_checksums(mirror: Server, tmp_path: Path, resnet56: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.KNOWN_SHA256, RESNET56, "0" * 64)
    with pytest.raises(ArchiveError, match="not the public teacher resnet56: its SHA-256 is"):
        fetch_teachers(root=tmp_path)
    monkeypatch.setitem(hub.KNOWN_SHA256, RESNET56, hub.hashlib.sha256(resnet56).hexdigest())
    monkeypatch.setitem(hub.KNOWN_SHA256, "cifar_teachers.tar", "1" * 64)
    with pytest.raises(DownloadError, match="not the file expected"):
        fetch_teachers(root=tmp_path)
    (tmp_path / "cifar_teachers.tar").write_bytes(mirror.files["/mirror/cifar_teachers.tar"])
    with pytest.raises(ArchiveError, match="not the public file"):
        fetch_teachers(root=tmp_path)
    monkeypatch.delitem(hub.KNOWN_SHA256, "cifar_teachers.tar")
    assert fetch_teachers(root=tmp_path) == [tmp_path / RESNET56]


def test_known_files_are_teachers() -> None:
    known = {name for collection in hub.COLLECTIONS for name in hub.teacher_files(collection)}
    assert set(hub.KNOWN_SHA256) <= known
    assert len(hub.teacher_files("cifar_teachers")) == 6
    assert hub.teacher_files("tiny_imagenet_teachers") == {
        "tiny_imagenet_teachers/ResNet18_vanilla/ti_res18": "ResNet18"
    }


def test_a_tar_put_there_by_hand(tmp_path: Path, resnet56: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hub.MIRROR_VARIABLE, "http://127.0.0.1:1")  # would fail
    tar = make_tar(tmp_path / "cifar_teachers.tar", {RESNET56: resnet56})
    fetch_teachers(root=tmp_path)
    assert tar.exists()
    (tmp_path / RESNET56).unlink()
    make_tar(tar, {RESNET56: resnet56[:1000]})
    with pytest.raises(ArchiveError, match=f"delete {tar} and run the command again"):
        fetch_teachers(root=tmp_path)
    make_tar(tar, {"something": b"else"})
    with pytest.raises(ArchiveError, match="holds none of"):
        fetch_teachers(root=tmp_path)


def test_no_network_says_how_to_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str, *_: object, **__: object) -> None:
        raise DownloadError(f"cannot reach {url}: no such name")

    monkeypatch.delenv(hub.MIRROR_VARIABLE, raising=False)
    monkeypatch.setattr(hub, "download", unreachable)
    with pytest.raises(DownloadError) as error:
        fetch_teachers(root=tmp_path)
    message = str(error.value)
    assert "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar" in message
    assert f"put cifar_teachers.tar at {tmp_path}" in message
    assert "MDISTILLER_CKPT_URL" in message
    with pytest.raises(DownloadError, match=r"not known to hold tiny_imagenet_teachers\.tar"):
        fetch_teachers("tiny_imagenet_teachers", tmp_path)


def test_the_script_from_anywhere(mirror: Server, tmp_path: Path) -> None:
    """In a folder with a package of the same name, as another checkout is."""
    (tmp_path / "mdistiller").mkdir()
    (tmp_path / "mdistiller" / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    environment = {**os.environ, "PYTHON": sys.executable}
    call = ["sh", str(ROOT / "download_ckpts.sh"), "cifar_teachers", "--root", "root"]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "good     resnet56" in done.stdout
    assert (tmp_path / "root" / RESNET56).is_file()


def test_the_script_says_what_is_not_installed(tmp_path: Path) -> None:
    bare = tmp_path / "python"  # without the packages of the environment
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(bare), "PYTHONPATH": ""}
    script = ["sh", str(ROOT / "download_ckpts.sh")]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "has no torch" in done.stderr
    assert "pip install -e" in done.stderr


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("pwned",))


class Call:
    """A pickled call of anything with anything."""

    def __init__(self, function: Callable, *arguments: object, state: object = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.call


FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["new format", "old format"])


@FORMATS
def test_harmless_contents_are_read(tmp_path: Path, zipped: bool) -> None:
    content = {
        "best_acc": np.float64(72.25),
        "accuracy": torch.tensor(72.5),
        "numbers": [np.float32(0.5), np.int64(-3), np.bool_(True), np.dtype(">i4").type(7)],
        "curve": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "empty": np.zeros((0, 3), np.float32),
        "big endian": np.arange(5, dtype=">f4"),
        "large": np.arange(5000),
        "opt": argparse.Namespace(lr=0.05, lr_decay_epochs=[150, 180], model="resnet56", acc=np.float32(1.5)),
        "model": collections.OrderedDict(w=torch.ones(2)),
    }
    torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    read = load_checkpoint(tmp_path / "file")
    assert read["best_acc"] == 72.25
    assert isinstance(read["best_acc"], np.float64)
    assert read["numbers"] == content["numbers"]
    for key in ("curve", "fortran", "empty", "big endian", "large"):
        assert read[key].dtype == content[key].dtype.newbyteorder("=")  # numpy swaps the bytes when it reads, too
        assert np.array_equal(read[key], content[key])
    assert read["opt"] == content["opt"]
    assert torch.equal(load_weights(tmp_path / "file")["w"], torch.ones(2))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_before_and_since_version_2(tmp_path: Path, module: bytes) -> None:
    buffer = io.BytesIO()
    torch.save({"acc": np.float64(1.5), "a": np.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    for written in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        content = content.replace(b"c" + written + b"\n", b"c" + module + b"\n")
    (tmp_path / "file").write_bytes(content)
    read = load_checkpoint(tmp_path / "file")
    assert read["acc"] == 1.5
    assert read["a"].sum() == 3


scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
# flags 0: "these are no pointers"
FORGED = Call(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0))
HARMFUL_CONTENT = {
    "call": Bomb(),
    "call inside a namespace": argparse.Namespace(a=Bomb()),
    "builtin": Call(eval, "1"),
    "memory": Call(bytes, 1 << 40),
    "file": Call(open, "pwned", "w"),
    "argparse file": argparse.FileType("w"),
    "pointers": Call(scalar, FORGED, b"A" * 8),
    "array of pointers": Call(reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), FORGED, False, b"A" * 8)),
    "array of objects": np.array([1, "a"], dtype=object),
    "record": np.zeros(2, dtype=[("a", "f4")]),
    "larger than its bytes": Call(
        reconstruct, np.ndarray, (0,), b"b", state=(1, (1 << 40,), np.dtype("f8"), False, b"A" * 8)
    ),
    "number beyond its bytes": Call(scalar, np.dtype("f8"), b"A"),
    "state of another kind": Call(reconstruct, np.ndarray, (0,), b"b", state=(1, 2)),
}


@FORMATS
@pytest.mark.parametrize("kind", HARMFUL_CONTENT)
def test_harmful_contents_are_not(tmp_path: Path, kind: str, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"model": {"w": torch.ones(1)}, "x": HARMFUL_CONTENT[kind]}, "file", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(CheckpointError) as error:
        load_checkpoint("file")
    assert "weights_only" not in str(error.value)  # torch advises to load without the check
    assert os.listdir() == ["file"]


@FORMATS
def test_an_array_of_any_size_is_empty_until_its_bytes_come(tmp_path: Path, zipped: bool) -> None:
    """numpy.ndarray(shape) takes memory, of any size, with whatever lay in it."""
    torch.save({"a": Call(np.ndarray, (1 << 50,))}, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    assert load_checkpoint(tmp_path / "file")["a"].size == 0


def test_what_a_program_allows_stays_as_it_was(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    torch.save({"a": np.float64(1)}, tmp_path / "good")
    torch.save({"a": Bomb()}, tmp_path / "bad")
    mine = {collections.deque, np.dtype, argparse.Namespace}
    torch.serialization.add_safe_globals(list(mine))
    try:
        load_checkpoint(tmp_path / "good")
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "bad")
        assert set(torch.serialization.get_safe_globals()) == {*before, *mine}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_a_tar_is_no_checkpoint(tmp_path: Path) -> None:
    """torch before 2.6 executes what a tar holds, in spite of weights_only=True."""
    tar = make_tar(tmp_path / "cifar_teachers.tar", {"storages": pickle.dumps(0), "pickle": pickle.dumps(Bomb())})
    with pytest.raises(CheckpointError, match="a tar archive, which must be unpacked first"):
        load_checkpoint(tar)


@FORMATS
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_damage_to_a_teacher_raises_nothing_else(tmp_path: Path, zipped: bool) -> None:
    buffer = io.BytesIO()
    content = {"model": {"w": torch.ones(3)}, "acc": np.float64(1), "a": np.ones(2), "opt": argparse.Namespace(a=1)}
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    whole, rng = buffer.getvalue(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "file").write_bytes(damaged[: rng.choice([None, rng.randrange(len(damaged))])])
        try:
            load_checkpoint(tmp_path / "file")
        except CheckpointError:
            continue


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path / "file")
