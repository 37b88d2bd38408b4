"""Files appear whole or not at all, whoever writes them at the same time."""

from pathlib import Path

from megavideo.files import atomic_path, atomic_write


def test_writers_that_meet_do_not_write_into_one_file(tmp_path: Path) -> None:
    """Ranks in containers on several nodes share a folder, and have the same process ids."""
    target = tmp_path / "index.arrow"
    with atomic_path(target) as slow:
        slow.write_bytes(b"ha")
        with atomic_write(target) as quick:
            quick.write(b"whole")
        assert target.read_bytes() == b"whole"
        slow.write_bytes(b"whole too")
    assert target.read_bytes() == b"whole too"
    assert [path.name for path in tmp_path.iterdir()] == ["index.arrow"]
