"""Shards behind a URL: fetched once, whole or not at all; transient failures are tried again."""

import http.server
import os
import resource
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import megavideo.data.source as source
from megavideo.data.batch import open_stream
from megavideo.data.source import FetchedShards, LocalShards, ShardReader, with_retries
from megavideo.data.text_tokenizer import TextTokenizer
from tests.unit.data.token_sets import data_config, flip, model_config, recipe_config, write_set


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder and counts what was asked for.

    failures, cuts: as often it answers 503, or breaks off in the middle; then it behaves.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.asked: Counter[str] = Counter()
        self.failures = 0
        self.cuts = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked[self.path] += 1
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
        elif self.server.cuts:
            self.server.cuts -= 1
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"half")
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "set").mkdir()
    with Server(tmp_path / "set") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FIRST_WAIT_S", 0.001)


def fetched(server: Server, folder: Path) -> FetchedShards:
    index = write_set(folder / "set", 3, 4)
    return FetchedShards(server.url, index.shards, folder / "cache", allow_commands=False)


def test_a_shard_is_fetched_once_by_many_readers(server: Server, tmp_path: Path) -> None:
    stores = [fetched(server, tmp_path) for _ in range(2)]
    threads = [threading.Thread(target=store.path, args=(1,)) for store in stores for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == {"/shard-000001.tar": 1}
    assert stores[0].path(1).read_bytes() == (tmp_path / "set/shard-000001.tar").read_bytes()


def test_what_arrives_wrong_never_reaches_the_cache(server: Server, tmp_path: Path) -> None:
    store = fetched(server, tmp_path)
    flip(tmp_path / "set" / "shard-000000.tar", 900)
    with pytest.raises(OSError, match="the index says"):
        ShardReader(store, retries=1).read(0, 512, 32)
    assert server.asked["/shard-000000.tar"] == 2
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_server_that_fails_for_a_moment_is_asked_again(server: Server, tmp_path: Path) -> None:
    store = fetched(server, tmp_path)
    server.failures = 2
    assert len(ShardReader(store, retries=2).read(2, 512, 100)) == 100
    server.failures = 99
    with pytest.raises(OSError, match="503"):
        ShardReader(store, retries=2).read(1, 512, 100)
    assert server.failures == 99 - 3


def test_an_error_names_the_url_or_the_file_that_it_is_about(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fetched(server, tmp_path)
    server.failures = 1
    with pytest.raises(OSError, match=f"{server.url}/shard-000001.tar.*503"):
        ShardReader(store, retries=0).read(1, 512, 100)
    monkeypatch.setattr(source, "COPY_BYTES", 512)
    with (
        resource_limit(resource.RLIMIT_FSIZE, 1000),
        pytest.raises(OSError, match="too large") as e,
    ):
        ShardReader(store, retries=0).read(1, 512, 100)
    assert str(e.value.filename).endswith("-shard-000001.tar")


@contextmanager
def resource_limit(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_cache_that_is_too_small_is_said_at_the_start(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fetched(server, tmp_path)
    assert not caplog.records
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    fetched(server, tmp_path)
    assert "data.cache" in caplog.text and "will stop when it is full" in caplog.text


def test_a_reply_that_breaks_off_is_asked_for_again(server: Server, tmp_path: Path) -> None:
    store = fetched(server, tmp_path)
    server.cuts = 2
    assert len(ShardReader(store, retries=2).read(2, 512, 100)) == 100
    assert server.asked["/shard-000002.tar"] == 3


def test_expected_shards_arrive_in_the_background(server: Server, tmp_path: Path) -> None:
    store = fetched(server, tmp_path)
    store.expect([0, 2])
    store.expect([2])
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "cache").glob("[!.]*.tar"))) < 2:
        assert time.monotonic() < deadline, "nothing was fetched"
        time.sleep(0.005)
    assert server.asked == {"/shard-000000.tar": 1, "/shard-000002.tar": 1}


def test_a_url_gives_the_batches_of_the_folder(
    server: Server, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    write_set(tmp_path / "set", 3, 4, tokenizer)
    streams = [
        open_stream(data_config(folder, tokenizer, cache=str(tmp_path / "cache")),
                    model_config(tokenizer), recipe_config(), folder)
        for folder in (str(tmp_path / "set"), server.url)
    ]  # fmt: skip
    local, remote = (stream.micro_batches(0, 0, 1) for stream in streams)
    for _ in range(10):
        assert next(local).image.equal(next(remote).image)
    local.close()
    remote.close()
    assert streams[0].fingerprint == streams[1].fingerprint
    assert max(server.asked.values()) == 1


def test_a_cached_shard_that_rots_is_fetched_anew(
    server: Server, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    write_set(tmp_path / "set", 1, 4, tokenizer)
    data = data_config(server.url, tokenizer, cache=str(tmp_path / "cache"))
    stream = open_stream(data, model_config(tokenizer), recipe_config(), server.url)
    before = [stream.samples.clip_at(position).frames.tolist() for position in range(4)]
    [cached] = (tmp_path / "cache").glob("*.tar")
    for offset in range(600, 3000, 200):
        flip(cached, offset)
    assert [stream.samples.clip_at(position).frames.tolist() for position in range(4)] == before
    assert server.asked["/shard-000000.tar"] == 2


def test_a_url_needs_a_cache(server: Server, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=r"set data\.cache"):
        open_stream(
            data_config(server.url, tokenizer), model_config(tokenizer), recipe_config(), server.url
        )


def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    entries = [replace(write_set(tmp_path, 1, 2).shards[0], file="../x.tar")]
    with pytest.raises(ValueError, match="may only have letters"):
        FetchedShards("http://localhost", entries, tmp_path, allow_commands=False)


def test_retries_end_with_the_error() -> None:
    tries = []

    def work() -> None:
        tries.append(1)
        raise OSError("the disk is on fire")

    with pytest.raises(OSError, match="on fire"):
        with_retries(work, 3)
    assert len(tries) == 4


def test_a_file_that_has_become_stale_is_opened_again(tmp_path: Path) -> None:
    index = write_set(tmp_path, 1, 2)
    reader = ShardReader(LocalShards(tmp_path, index.shards), 1)
    before = reader.read(0, 512, 50)
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, reader._open(0).descriptor)  # a folder cannot be read: every try would fail
    os.close(folder)
    assert reader.read(0, 512, 50) == before


def test_a_missing_or_cut_shard_is_named_before_it_is_used(tmp_path: Path) -> None:
    index = write_set(tmp_path, 3, 2)
    (tmp_path / "shard-000000.tar").unlink()
    (tmp_path / "shard-000002.tar").write_bytes(b"short")
    with pytest.raises(
        ValueError, match=r"2 shards differ .*000000\.tar \(0 bytes.*000002\.tar \(5"
    ):
        LocalShards(tmp_path, index.shards).check_sizes()


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    index = write_set(tmp_path, 3, 2)
    reader = ShardReader(LocalShards(tmp_path, index.shards), 0)
    for shard in (0, 1, 2, 0):
        assert len(reader.read(shard, 512, 50)) == 50
    assert len(open_files(tmp_path)) == 3
    del reader
    assert open_files(tmp_path) == []


def open_files(folder: Path) -> list[str]:
    """Files of `folder` that this process holds open."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [target for target in links if target.startswith(str(folder))]
