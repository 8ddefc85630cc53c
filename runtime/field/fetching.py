"""How python-tuf gets the files of a channel: from a folder, or by HTTP, with what came before an interruption."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

import urllib3
from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError, SlowRetrievalError
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher

from duallora_edge.runtime.field.update import PART

# Smaller files are not worth going on with.
LARGE_BYTES = 2**20
BLOCK_BYTES = 2**14


class FolderFetcher(FetcherInterface):
    """Reads files of the channel's folder and of no other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = Path(unquote(urlsplit(url).path)).resolve()
        if self._folder not in path.parents or not path.is_file():
            raise DownloadHTTPError(f"{path} is not there", 404)
        return _blocks(path)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(2**20):
            yield block


class HttpFetcher(Urllib3Fetcher):
    """Goes on with a large file where the last try ended: its name holds its hash, and the whole file is checked."""

    def __init__(self, parts: Path) -> None:
        """``parts`` is a folder for what has come so far, of one file at a time."""
        super().__init__(app_user_agent="duallora-edge")
        self._parts = parts

    @contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """As the base class says."""
        if max_length < LARGE_BYTES:
            with super().download_file(url, max_length) as file:
                yield file
            return
        path = self._parts / (hashlib.sha256(url.encode()).hexdigest() + PART)
        for other in self._parts.glob(f"*{PART}"):
            if other != path:
                other.unlink()
        with path.open("a+b") as file:
            self._complete(url, file, max_length)
            file.seek(0)
            try:
                yield file
            except RepositoryError:  # it is not what was signed
                path.unlink(missing_ok=True)
                raise
        path.unlink(missing_ok=True)

    def _complete(self, url: str, file: IO[bytes], length: int) -> None:
        """Fetch what is missing of ``length`` bytes; more than that is never written."""
        start = file.seek(0, 2)
        if start >= length:
            return
        try:
            response = self._proxy_env.request(
                "GET",
                url,
                headers={"Range": f"bytes={start}-"} if start else {},
                preload_content=False,
                timeout=urllib3.Timeout(self.socket_timeout),
            )
        except urllib3.exceptions.HTTPError as error:
            raise DownloadError(f"Failed to download {url}: {error}") from error
        try:
            if response.status >= 400:
                raise DownloadHTTPError(f"HTTP error occurred with status {response.status}", response.status)
            if not (response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")):
                file.truncate(0)  # a server that sends the whole file
                start = 0
            for block in response.stream(BLOCK_BYTES):
                block = block[: length - start]
                file.write(block)
                start += len(block)
                if start >= length:
                    return
        except urllib3.exceptions.TimeoutError as error:
            raise SlowRetrievalError from error
        except urllib3.exceptions.HTTPError as error:
            raise DownloadError(f"Failed to download {url}: {error}") from error
        finally:
            response.close()
