"""What is asked for: prompts, and the name under which each video of one is kept."""

import re
from dataclasses import dataclass
from pathlib import Path

import xxhash

# Letters of the prompt in a folder's name; the digest after them keeps names apart.
NAME_LETTERS = 40


@dataclass(frozen=True)
class Request:
    """Video `number` of a prompt; its random numbers depend on both, and on the seed."""

    prompt: str
    number: int = 0

    @property
    def key(self) -> str:
        """What sets this video's random numbers apart."""
        return f"{self.prompt}/{self.number}"

    @property
    def name(self) -> str:
        """Folder for the video: the same wherever the prompt stands in a list."""
        words = re.sub(r"\W+", "-", self.prompt.lower()).strip("-")[:NAME_LETTERS].strip("-")
        digest = xxhash.xxh3_64_hexdigest(self.prompt.encode())[:8]
        return f"{words}-{digest}-{self.number}"


def requests_of(prompts: list[str], samples: int) -> list[Request]:
    """`samples` videos of each prompt; a prompt that is there twice counts once."""
    return [Request(prompt, n) for prompt in dict.fromkeys(prompts) for n in range(samples)]


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no prompt, or is no UTF-8.
    """
    try:
        text = path.read_text("utf-8-sig")  # some editors begin with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}; save it as UTF-8") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one on each line")
    return prompts
