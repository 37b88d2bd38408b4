"""The commands of docs/cluster.md: each is run, launchers as dry runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "cluster.md"
PRELUDE = """
set -euo pipefail
megavideo() { "$MEGAVIDEO_PYTHON" -m megavideo "$@"; }
sbatch() { while [[ $1 == --* ]]; do [[ $1 == --*=* ]] || shift; shift; done; "$@"; }
"""


def script() -> str:
    """The page's commands as one script that starts nothing."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    text = "\n".join(blocks)
    return PRELUDE + re.sub(r"launch/\w+\.(sh|sbatch)", r"\g<0> --dry-run", text)


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "MEGAVIDEO_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script()],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("-m megavideo train configs/model/cogvideo-9b.yaml") == 5
    assert done.stdout.count("-m megavideo doctor configs/model/cogvideo-9b.yaml") == 2
    assert done.stdout.count("--module megavideo train configs/model/cogvideo-9b.yaml") == 2
    assert done.stdout.count("- configs/model/cogvideo-9b.yaml\n") == 1 + 2  # Master and Worker
    assert re.search(r"^ok +clocks", done.stdout, re.MULTILINE)
    assert "# HOSTFILE: node2 slots=8" in done.stdout
    named = re.findall(r"configs/[\w/-]+\.yaml", PAGE.read_text())
    assert named and all((ROOT / name).is_file() for name in named)
