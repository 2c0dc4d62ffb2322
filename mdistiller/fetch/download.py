"""Resumable downloads over http and https.

An interrupted download continues at its last byte if the server still holds the same file.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import shutil
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mdistiller.files import StrPath, file_sha256, lock, no_space, writing
from mdistiller.registry import InputError

MAX_BYTES = 4 << 30  # of a download
UNREACHABLE = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH)  # error numbers: no server, no route


class DownloadError(InputError):
    """A file that cannot be downloaded."""


def download(
    url: str,
    path: StrPath,
    sha256: str | None = None,
    *,
    timeout: float = 30.0,
    attempts: int = 6,
    pause: float = 2.0,
    max_bytes: int = MAX_BYTES,
) -> str:
    """Download ``url`` to ``path``. A download that an earlier attempt or call began is continued.

    ``PATH.part`` holds the received bytes. The download is continued only if the server confirms, by ETag or date,
    that its file has not changed; else it starts again. ``path`` exists only after the download is complete.

    Args:
        url: http or https; redirects are followed, but not from https to http.
        path: replaced when the download is complete.
        sha256: the expected SHA-256 of the file, in hexadecimal.
        timeout: seconds without a byte until a connection is given up.
        attempts: number of attempts; the received bytes are kept after the last one.
        pause: seconds before the second attempt; doubles with each attempt, up to 30.
        max_bytes: a larger file is refused.

    Returns:
        The SHA-256 of the file, in hexadecimal.

    Raises:
        DownloadError: the server refused or every attempt failed; or the file is not the expected file.
        InputError: the disk is full or not writable.
    """
    path = Path(path)
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"cannot download {url!r}: an address that begins with http:// or https:// is needed")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _Part.locked(path) as part:
        if part.version.get("url") != url:
            part.restart({})
        for attempt in range(1, attempts + 1):
            problem = _attempt(url, part, timeout, max_bytes)
            if problem is None:
                return part.finish(url, sha256)
            if attempt == attempts:
                break
            delay = min(pause * 2 ** (attempt - 1), 30.0)
            print(f"{url}: {problem}; trying again in {delay:g} s", file=sys.stderr, flush=True)
            time.sleep(delay)
        kept = f"; {part.size / 1e6:.1f} MB are kept, and the next call continues from there" if part.resumable else ""
        raise DownloadError(f"cannot download {url}: {problem}, {attempts} times in a row{kept}")


def begun(path: Path) -> tuple[Path, Path]:
    """The two files of an incomplete download of ``path``: the received bytes, and the version of the server's file."""
    return path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")


def _attempt(url: str, part: _Part, timeout: float, max_bytes: int) -> str | None:
    """One request. ``None``: the file is complete; else the problem, if another attempt may help."""
    if part.complete:  # an earlier call was stopped between the last byte and the renaming
        return None
    headers = {"User-Agent": "mdistiller", "Accept-Encoding": "identity"}
    if part.resumable:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": part.version["validator"]}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.build_opener(_Redirects).open(request, timeout=timeout) as response:
            if problem := _begin(url, response, part, max_bytes):
                return problem
            _receive(url, response, part, max_bytes)
    except urllib.error.HTTPError as error:
        error.close()
        problem = f"HTTP status {error.code} {' '.join(str(error.msg).split())}"
        if error.code == 416:  # the received bytes are not the beginning of the server's file
            part.restart({})
        elif error.code < 500 and error.code not in (408, 425, 429):
            raise DownloadError(f"cannot download {url}: {problem}") from None
        return problem
    except http.client.InvalidURL as error:
        raise DownloadError(f"cannot download {url!r}: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)  # urllib wraps the connection's errors
        reason = str(cause) or type(cause).__name__
        unreachable = isinstance(cause, socket.gaierror) or getattr(cause, "errno", None) in UNREACHABLE
        if unreachable and not part.received:
            raise DownloadError(f"cannot reach {url}: {reason}") from None
        return f"no data for {timeout:g} s" if isinstance(cause, TimeoutError) else f"the connection broke ({reason})"
    if part.version.get("length") not in (None, part.size):
        return f"the connection ended after {part.size} of {part.version['length']} bytes"
    return None


def _begin(url: str, response: Any, part: _Part, max_bytes: int) -> str | None:
    """Compare the answer's header with the received bytes; empty ``part`` unless the download is continued."""
    if response.headers.get_content_type() == "text/html":
        raise DownloadError(f"{url} answers with a web page instead of the file (a proxy or a login?)")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(
            f"{url} is sent compressed ({response.headers['Content-Encoding']}), but the request excludes compression"
        )
    version = _version_of(url, response)
    if response.status == 206:
        start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        # the machines of one mirror may hold different files of the same name
        if start != str(part.size) or version != part.version:
            part.restart({})
            return "the file on the server has changed"
    else:
        part.restart(version)
    length = version["length"]
    if length is not None and length > max_bytes:
        raise DownloadError(f"{url} has {length / 1e6:.0f} MB; at most {max_bytes / 1e6:.0f} MB are accepted")
    part.need(length)
    return None


def _version_of(url: str, response: Any) -> dict[str, Any]:
    """The version of the server's file: address, validator, length in bytes."""
    etag = response.headers.get("ETag")
    if etag is None or etag.startswith("W/"):  # a weak ETag does not promise equal bytes
        etag = response.headers.get("Last-Modified")
    length = response.headers.get("Content-Length")
    if response.status == 206:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    return {"url": url, "validator": etag, "length": int(length) if length and length.isdigit() else None}


def _receive(url: str, response: Any, part: _Part, max_bytes: int) -> None:
    """Append the answer's bytes to ``part``, with a progress bar on a terminal."""
    from tqdm import tqdm

    length = part.version["length"]
    # disable=None: no bar if standard error is a file
    with tqdm(desc=part.path.name, total=length, initial=part.size, unit="B", unit_scale=True, disable=None) as bar:
        while part.size != length:
            chunk = response.read1(1 << 18)
            if not chunk:
                return
            if part.size + len(chunk) > max_bytes:
                raise DownloadError(f"{url} is larger than the {max_bytes / 1e6:.0f} MB that are accepted")
            part.append(chunk)
            bar.update(len(chunk))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows at most ten redirects to http and https, never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = (urllib.parse.urlsplit(url).scheme for url in (req.full_url, newurl))
        if new not in ("http", "https") or (old, new) == ("https", "http"):
            raise urllib.error.HTTPError(req.full_url, code, f"redirect to {newurl} refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Part:
    """An incomplete download: its bytes in ``PATH.part`` and the version of the server's file in ``PATH.part.json``.

    Attributes:
        path: the file after the download.
        size: number of bytes in ``PATH.part``.
        received: number of bytes from this call.
        version: see :func:`_version_of`; empty if there are no bytes.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file, self._name = file, Path(file.name)
        self._record = begun(path)[1]
        self.size = file.seek(0, os.SEEK_END)
        self.received = 0
        self.version: dict[str, Any] = {}
        with suppress(OSError, ValueError, TypeError):
            self.version = dict(json.loads(self._record.read_text()))

    @classmethod
    @contextmanager
    def locked(cls, path: Path) -> Iterator[_Part]:
        """Open the incomplete download of ``path``; a second download at the same time is refused."""
        name = begun(path)[0]
        with writing(path):
            # unbuffered, because closing a buffered file on a full disk would write again
            file = open(name, "a+b", buffering=0)  # noqa: SIM115  closed below
        with file:
            if not lock(file):
                raise DownloadError(f"another process is downloading {path} already")
            part = cls(path, file)
            try:
                yield part
            finally:
                if part.size == 0:
                    part._remove()

    @property
    def resumable(self) -> bool:
        return self.size > 0 and bool(self.version.get("validator"))

    @property
    def complete(self) -> bool:
        return self.resumable and self.size == self.version.get("length")

    def restart(self, version: dict[str, Any]) -> None:
        """Delete the received bytes; the next bytes belong to ``version``."""
        self.version, self.size = version, 0
        with writing(self.path):
            self._record.unlink(missing_ok=True)  # first: after a crash here the record must not describe other bytes
            self._file.truncate(0)
            if version.get("validator"):
                self._record.write_text(json.dumps(version))

    def need(self, length: int | None) -> None:
        """Refuse a file that does not fit on the disk."""
        missing = (length or 0) - self.size
        if missing > shutil.disk_usage(self.path.parent).free:
            raise InputError(f"{no_space(self.path, missing)}; make room and run the command again")

    def append(self, chunk: bytes) -> None:
        with writing(self.path):
            rest = memoryview(chunk)
            while rest:
                written = self._file.write(rest)
                rest = rest[written:]
                self.size += written
                self.received += written

    def finish(self, url: str, expected: str | None) -> str:
        """Rename the complete file to ``path``. Returns its SHA-256."""
        with writing(self.path):
            os.fsync(self._file.fileno())
            digest = file_sha256(self._name)
            if expected is not None and digest != expected.lower():
                self._remove()
                raise DownloadError(f"{url} is not the expected file: its SHA-256 is {digest}, not {expected}")
            self._close_on_windows()
            os.replace(self._name, self.path)
            self._record.unlink(missing_ok=True)
        return digest

    def _remove(self) -> None:
        self._close_on_windows()
        self._name.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def _close_on_windows(self) -> None:
        if sys.platform == "win32":  # Windows neither renames nor removes an open file
            self._file.close()
