"""Which addresses shards may come from: judged here, and webdataset is locked down to them.

webdataset opens more than a trainer should: a shell behind `pipe:`, standard input behind `-`,
rewriting rules from the environment. A path in a downloaded configuration must not become a command
on this machine.
"""

import os
import re
import urllib.request
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

import webdataset.utils
from webdataset.gopen import gopen, gopen_ais, gopen_error, gopen_gsutil, gopen_pipe, gopen_schemes

# http(s) is read by Python. gs and ais run `gsutil` and `ais` with a list of arguments, without a
# shell.
SCHEMES = ("http", "https", "gs", "ais")
COMMAND = "pipe:"
HTTP_TIMEOUT_S = 60.0
# What the expansions of webdataset, curl and shells react to, and what no address needs.
FORBIDDEN = re.compile(r"::|[{}\[\]$`\\\s\x00-\x1f]")
ENVIRONMENT = ("GOPEN_REWRITE", "USE_AIS_FOR", "WDS_CACHE", "WDS_CACHE_SIZE")


def resolve(address: str, allow_commands: bool = False) -> Path | str:
    """A folder of shards: a local `Path`, or a URL to which `/name` is appended.

    Raises: ValueError if the address is none of the allowed kinds.
    """
    if address.startswith(COMMAND):
        if not allow_commands:
            raise ValueError(
                f"{address!r} would run a command on this machine; set data.allow_commands=true if "
                "that is what you want"
            )
        return address
    parts = urlsplit(address)
    if parts.scheme in ("", "file") and address not in ("", "-"):
        return Path(url2pathname(parts.path) if parts.scheme else address)
    if parts.scheme not in SCHEMES or FORBIDDEN.search(address):
        raise ValueError(
            f"{address!r} is no folder and no plain URL of {', '.join(SCHEMES)}; write "
            "./NAME for a folder whose name has a colon"
        )
    return address.rstrip("/")


def open_url(url: str, allow_commands: bool) -> BinaryIO:
    """Open a URL made from one that `resolve` has returned; reading it raises OSError."""
    lock_webdataset(allow_commands)
    return gopen(url)


def lock_webdataset(allow_commands: bool) -> None:
    """Leave webdataset only the schemes of `resolve`, and no orders from the environment."""
    for name in ENVIRONMENT:
        os.environ.pop(name, None)
    webdataset.utils.enforce_security = not allow_commands
    gopen_schemes.clear()
    gopen_schemes.update(
        __default__=gopen_error,
        http=_open_http,
        https=_open_http,
        gs=gopen_gsutil,
        ais=gopen_ais,
        pipe=gopen_pipe,  # refuses under enforce_security
    )


def _open_http(url: str, mode: str, bufsize: int) -> BinaryIO:
    """Instead of webdataset's `curl --retry 30`, which hides what went wrong."""
    return urllib.request.urlopen(url, timeout=HTTP_TIMEOUT_S)
