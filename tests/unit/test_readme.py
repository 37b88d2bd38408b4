"""README.md: its commands run, or at least mean something; what any page names is there."""

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from megavideo.cli import group, run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "README.md").read_text()
CONTEXT = click.Context(group)
MADE = {"configs/hardware/here.yaml"}  # by `megavideo calibrate`


def commands() -> list[list[str]]:
    """Arguments of every whole `megavideo` command, in blocks and between backquotes."""
    text = PAGE.replace("\\\n", " ")
    lines = re.findall(r"^ *(?:\$ )?megavideo (.*)$", text, re.MULTILINE)
    lines += re.findall(r"`megavideo ([^`]*)`", text.replace("\n", " "))
    whole = [shlex.split(line, comments=True) for line in lines]
    return [words for words in whole if "..." not in words]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_is_one_that_megavideo_takes(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words are read as if it were run; prose may name a command without its arguments."""
    monkeypatch.chdir(ROOT)
    name, *arguments = words
    if name == "--help":
        return
    command = group.get_command(CONTEXT, name)
    assert command is not None
    while isinstance(command, click.Group) and arguments:
        command = command.get_command(CONTEXT, arguments.pop(0))
        assert command is not None
    if arguments:
        command.make_context(name, arguments)


def test_the_published_run_is_configured_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    named = "--set run.directory=runs/stage1"
    settled = [words for words in commands() if named in " ".join(words)]
    assert [words[0] for words in settled] == ["config", "train"]
    for words in settled:
        result = CliRunner().invoke(group, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert "1,818,820,608 trainable, 5,902,307,328 frozen" in result.output
    assert "batch        416 samples" in result.output and not Path("runs").exists()


def test_a_mistake_is_told_as_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    line, told = re.findall(r"\$ megavideo (config .*)\n *(error: .*)\n", PAGE)[0]
    with pytest.raises(SystemExit) as end:
        run(group, args=shlex.split(line))
    assert end.value.code == 2 and capsys.readouterr().err == f"{told}\n"


PAGES = ["README.md", "launch/README.md", "kernels/local_attention/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_and_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    ours = "megavideo|data_tools|kernels|configs|launch|tests|docs"
    for path in re.findall(rf"`((?:{ours})/[\w./-]+)`", text):
        assert (ROOT / path).exists() or path in MADE, path
    for module in re.findall(r"`python -m (tests[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_the_readme_leads_everywhere() -> None:
    tree = PAGE[PAGE.index("## Where things are") :]
    for package in (ROOT / "megavideo").glob("*/__init__.py"):
        assert re.search(rf"\b{package.parent.name}/", tree), package.parent.name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", PAGE, re.MULTILINE):
        assert f"\n{target}:" in makefile, target
    assert all(page in PAGE for page in PAGES if page.startswith("docs/"))
