"""Arguments that choose nodes of a stage: --module, --op, --name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rolemesh.compiler.debug.show.select import Filters

__all__ = ["add_filters", "filters_of"]


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    for option, help_text in (
        ("module", "only nodes of modules that fit, and of what is in them"),
        ("op", "only nodes whose op fits, such as 'mesh.*' or mm"),
        ("name", "only nodes whose name, or whose parameter's name, fits"),
    ):
        parser.add_argument(
            f"--{option}",
            dest=f"{option}s",
            action="append",
            default=[],
            metavar="GLOB",
            help=f"{help_text}; may be repeated",
        )


def filters_of(parsed: argparse.Namespace) -> Filters:
    """The filters that were given."""
    from rolemesh.compiler.debug.show.select import Filters

    return Filters(tuple(parsed.modules), tuple(parsed.ops), tuple(parsed.names))
