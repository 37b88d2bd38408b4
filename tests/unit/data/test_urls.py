"""Addresses: folders and plain URLs pass; whatever could run a command does not."""

import os
from pathlib import Path

import pytest
import webdataset.utils
from webdataset.gopen import gopen

from megavideo.data.source import check_name
from megavideo.data.urls import lock_webdataset, open_url, resolve


@pytest.fixture(autouse=True)
def webdataset_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is meant to last as long as the process."""
    monkeypatch.setattr(webdataset.utils, "enforce_security", False)


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("data/train", Path("data/train")),
        ("./a:b", Path("a:b")),
        ("file:///data/my%20set", Path("/data/my set")),
        ("https://host/set/", "https://host/set"),
        ("gs://bucket/set", "gs://bucket/set"),
    ],
)
def test_folders_and_plain_urls_pass(address: str, place: Path | str) -> None:
    assert resolve(address) == place


@pytest.mark.parametrize(
    "address",
    [
        "pipe:cat x", "-", "", "s3://bucket/x", "ssh://host/x", "hf://x/y", "http://h/{0..9}",
        "http://h/a::b", "http://h/${HOME}", "gs://b/a b", "http://h/`id`", "gs://b/a\nb",
    ],
)  # fmt: skip
def test_everything_else_is_refused(address: str) -> None:
    with pytest.raises(ValueError):
        resolve(address)


def test_a_command_runs_only_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello")
    command = f"pipe:cat {tmp_path}"
    with pytest.raises(ValueError, match=r"set data\.allow_commands=true"):
        resolve(command)
    with pytest.raises(ValueError, match="cannot open pipe"):
        open_url(f"{command}/x", allow_commands=False)
    with open_url(f"{resolve(command, allow_commands=True)}/x", allow_commands=True) as stream:
        assert stream.read() == b"hello"


def test_webdataset_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", "http=pipe:echo ")
    lock_webdataset(allow_commands=False)
    assert webdataset.utils.enforce_security and "GOPEN_REWRITE" not in os.environ
    for url in ("scp://host/x", "hf://a/b", "pipe:true", "/etc/hostname"):
        with pytest.raises(ValueError):
            gopen(url)


@pytest.mark.parametrize("name", ["../x.tar", "a/b.tar", "$(id).tar", "-rf", "", ".hidden", "a b"])
def test_a_shard_name_from_elsewhere_stays_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="may only have letters"):
        check_name(name)
