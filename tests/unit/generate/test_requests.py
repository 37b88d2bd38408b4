"""Names of videos: one each, the same wherever the prompt stands."""

from pathlib import Path

import pytest

from megavideo.generate.requests import Request, read_prompts, requests_of


def test_names_are_legible_and_apart() -> None:
    names = [
        Request(prompt, number).name
        for prompt in (
            "A red Circle, moves up!",
            "A red Circle; moves up!",
            "一个红色的圆",
            "a/../b",
        )
        for number in (0, 1)
    ]
    assert len(set(names)) == len(names)
    assert names[0].startswith("a-red-circle-moves-up-") and names[0].endswith("-0")
    assert all("/" not in name and "." not in name for name in names)


def test_a_prompt_twice_is_one() -> None:
    assert requests_of(["a", "b", "a"], 2) == [
        Request("a", 0), Request("a", 1), Request("b", 0), Request("b", 1)
    ]  # fmt: skip


def test_prompts_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two \n")
    assert read_prompts(path) == ["one", "two"]
    path.write_bytes("\ufeffone\r\n  \r\ntwo".encode())  # as Windows' editor saves it
    assert read_prompts(path) == ["one", "two"]
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"prompts\.txt: .*save it as UTF-8"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="one on each line"):
        read_prompts(path)
