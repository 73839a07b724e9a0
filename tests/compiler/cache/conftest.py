"""What the tests of the compile cache share."""

from __future__ import annotations

import pytest

from rolemesh.passes.rules.defaults import default_rules


@pytest.fixture(autouse=True)
def only_our_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests register rules, which stay for the process and keep it from being cached."""
    monkeypatch.setattr(default_rules(), "is_extended", False)
