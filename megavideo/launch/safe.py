"""Words that mean themselves in every shell, and errors for those that do not.

DeepSpeed's runner joins host names, exported values and arguments into one line for pdsh, and the
login shell of each node reads it: `$(...)` in any of them would run there.
"""

import re

# What no shell gives a meaning to in the middle of a word (also what shlex.quote leaves alone), but
# for %: pdsh makes %h, %n and %u the host, its number and the user.
PLAIN = re.compile(r"[\w@+=:,./-]*", re.ASCII)
# RFC 1123: labels of letters, digits and inner hyphens; an IPv4 address is of this form too.
HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*", re.ASCII)
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def plain(value: str, what: str) -> str:
    """`value`, if every shell takes it as it stands.

    Raises:
        ValueError: naming `what` and the first character that a shell would act on.
    """
    end = PLAIN.match(value).end()  # type: ignore[union-attr]  # it matches the empty string
    if end < len(value):
        raise ValueError(
            f"{what}={value!r}: {value[end]!r} has a meaning in a shell or to pdsh, and this value "
            "passes through them to every node; use letters, digits and @+=:,./_- only"
        )
    return value


def host_name(value: str, place: str) -> str:
    """`value`, if it is a host name or an IPv4 address; ValueError with `place` if not."""
    if len(value) > 253 or not HOST.fullmatch(value):
        raise ValueError(
            f"{place}: {value!r} is no host name; use letters, digits, dots and inner hyphens"
        )
    return value


def variable(name: str) -> str:
    """`name`, if it can be an environment variable's; ValueError if not."""
    if not VARIABLE.fullmatch(name):
        raise ValueError(f"{name!r} is no variable's name; use letters, digits and underscores")
    return name
