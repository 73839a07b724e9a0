"""The one place that reads environment variables.

Values are read when asked for, never at import, so that a program may set them first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Ascend", "Config", "Torchrun"]


@dataclass(frozen=True)
class Config:
    """What a user can set from outside.

    Attributes:
        timeout: Seconds a collective may wait for other ranks (ROLEMESH_TIMEOUT).
        dump: Folder for the run directory of everything that is compiled (ROLEMESH_DUMP); None to
            write none.
        cache: Whether compiled models are kept for the next process (ROLEMESH_CACHE; 0 for not).
        cache_dir: Folder to keep them in (ROLEMESH_CACHE_DIR); None for one in torch's own.
    """

    timeout: float = 300.0
    dump: str | None = None
    cache: bool = True
    cache_dir: str | None = None

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Config:
        """The configuration from the environment, or from `environment`.

        Raises:
            RolemeshError: RM018 if a value cannot be read.
        """
        variables = os.environ if environment is None else environment
        rest = (
            variables.get("ROLEMESH_DUMP") or None,
            variables.get("ROLEMESH_CACHE") != "0",
            variables.get("ROLEMESH_CACHE_DIR") or None,
        )
        text = variables.get("ROLEMESH_TIMEOUT", "")
        if not text:
            return cls(cls.timeout, *rest)
        try:
            timeout = float(text)
        except ValueError:
            timeout = 0.0
        if not 0 < timeout < float("inf"):
            raise RolemeshError(
                "RM018",
                what=f"ROLEMESH_TIMEOUT is {text!r}",
                where="the environment",
                why="it is a number of seconds above zero",
                fix="set for example ROLEMESH_TIMEOUT=300, or unset it",
            )
        return cls(timeout, *rest)

    @property
    def delta(self) -> timedelta:
        """The timeout as torch.distributed takes it."""
        return timedelta(seconds=self.timeout)


@dataclass(frozen=True)
class Torchrun:
    """What torchrun tells each process that it starts.

    Attributes:
        rank: This process.
        world_size: Number of processes.
        agent_store: Whether the launcher, not rank 0, holds the store that ranks meet at.
    """

    rank: int
    world_size: int
    agent_store: bool

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Torchrun | None:
        """What torchrun set, or None if the process was started otherwise."""
        variables = os.environ if environment is None else environment
        rank, world_size = variables.get("RANK", ""), variables.get("WORLD_SIZE", "")
        if not rank.isdecimal() or not world_size.isdecimal():
            return None
        agent = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(int(rank), int(world_size), agent)


@dataclass(frozen=True)
class Ascend:
    """Where CANN, the software of Ascend NPUs, says that it is.

    Attributes:
        toolkit: Folder of the toolkit; None if the environment does not say.
    """

    toolkit: str | None

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Ascend:
        """What CANN's `set_env.sh` set."""
        variables = os.environ if environment is None else environment
        names = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
        return cls(next((variables[name] for name in names if variables.get(name)), None))
