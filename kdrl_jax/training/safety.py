"""What a config may not do: reach the network when offline, carry secrets, share a writable folder.

Configs are written to disk and printed, so a key or a password in one of them has been given away.
What lies in a run's folder and in `cache_dir` is loaded again, and compiled programs are executed:
who can write there runs code as the owner of the run.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from kdrl_jax.network import is_loopback
from kdrl_jax.objectives import Method
from kdrl_jax.types import UserError

WITHOUT = {"rollout.server.url": "KDRL_SERVER_KEY", "data.": "HF_TOKEN"}
"""Where keys belong, by how the config key begins that they were found in: the environment."""
SECRET_OPTIONS = ("token", "key", "password", "passwd", "secret", "auth", "credential", "sig")


def safety_problems(flat: dict[str, Any]) -> Iterator[str]:
    """Secrets in addresses, and addresses beyond this machine when offline.

    Args:
      flat: every key of a config with its value.
    """
    for key, value in flat.items():
        texts = [x for x in (value if isinstance(value, tuple) else (value,)) if type(x) is str]
        if any(holds_secret(text) for text in texts):
            variable = next((v for k, v in WITHOUT.items() if key.startswith(k)), "")
            where = f"the environment variable {variable}" if variable else "the environment"
            yield (
                f"{key}: holds a user name, password or token, and configs are written to disk; "
                f"leave it out and set {where}"
            )
    url = flat["rollout.server.url"]
    if flat["offline"] and url and not holds_secret(url) and not is_loopback(_host(url)):
        yield (
            f"rollout.server.url: {url!r} is another machine, and offline=True; use a server on "
            "127.0.0.1, or set offline=False"
        )


def holds_secret(text: str) -> bool:
    """Whether an address has a user, a password or an option that is named like a secret."""
    if "://" not in text:
        return False
    try:
        parts = urlsplit(text)
        options = [name.lower() for name, _ in parse_qsl(parts.query + "&" + parts.fragment)]
    except ValueError:
        return "@" in text
    return "@" in parts.netloc or any(
        name == secret or name.endswith((f"_{secret}", f"-{secret}", f"api{secret}"))
        for name in options
        for secret in SECRET_OPTIONS
    )


def without_secrets(problems: Sequence[str], flat: dict[str, Any]) -> list[str]:
    """Lines about a config, with addresses that hold a secret left out."""
    secrets = [value for value in flat.values() if type(value) is str and holds_secret(value)]
    found = []
    for line in problems:
        for secret in secrets:
            line = line.replace(secret, "(hidden)")
        found.append(line)
    return found


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "?"
    except ValueError:
        return "?"


def server_problems(flat: dict[str, Any], method: Method) -> Iterator[str]:
    """What is wrong with `rollout.server`, where there is one."""
    url = flat["rollout.server.url"]
    if not url.startswith(("http://", "https://")):
        yield f"rollout.server.url: {url!r} must begin with http:// or https://"
    if flat["rollout.server.kind"] == "vllm" and not flat["rollout.server.model"]:
        yield (
            "rollout.server.model: empty; give the name that vLLM serves the student by: what "
            "follows `vllm serve`, or its --served-model-name"
        )
    if flat["rollout.carry"]:
        yield (
            f"rollout.carry: {flat['rollout.carry']}, but a server cannot go on with partial "
            "rollouts; set it to 0, or rollout.server.url=''"
        )
    if method.sampler == "teacher":
        yield (
            f"rollout.server.url: {url!r}, but objective={flat['objective']!r} samples from the "
            "teacher, and a server is given the student's weights; leave it empty"
        )


def own_folder(folder: Path, what: str, *, make: bool = True) -> None:
    """Make a folder that others cannot write in; nor can they what is written from here on.

    Takes the right to write from "others" in this process's umask, for itself and its children.

    Args:
      what: the option or config key that names it, for the error.
      make: False leaves it to who first writes there.

    Raises:
      UserError: it is there and others may write in it.
    """
    os.umask(os.umask(0o022) | stat.S_IWOTH)
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    if folder.exists() and folder.stat().st_mode & stat.S_IWOTH:
        raise UserError(
            f"{what}: anybody may write in {folder}, and what is there is loaded and run; take "
            f"that right away: chmod o-w {folder}"
        )
