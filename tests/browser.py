"""A Chromium for tests of pages: found on this machine, or installed.

    python -m tests.browser      # prints where one is; installs one where there is none

Any Chromium or Chrome on PATH will do. Where there is none, the system's package is installed if
this user may do that; else Playwright's own build goes to its cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    "no Chromium was found: run `make browser`, or put chromium or google-chrome on PATH; "
    "the tests of the page need a browser"
)


def find_browser() -> str | None:
    """The path of a browser that starts; None if there is none."""
    found = (path for name in NAMES if (path := shutil.which(name)))
    path = next(filter(_starts, found), None)
    if path is None:
        with sync_playwright() as playwright:
            own = playwright.chromium.executable_path
        path = own if Path(own).is_file() and _starts(own) else None
    return path


def _starts(path: str) -> bool:
    """Whether it is a browser: some distributions have a script there that says how to get one."""
    command = [path, "--version"]
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless browser.

    Raises:
        RuntimeError: If there is none.
    """
    path = find_browser()
    if path is None:
        raise RuntimeError(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        try:
            yield browser
        finally:
            browser.close()


def install_browser() -> str | None:
    """Install a browser and say where it is; None if no way worked."""
    for commands in _ways():
        for command in commands:
            sys.stderr.write(f"installing Chromium: {' '.join(command)}\n")
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False)
        path = find_browser()
        if path is not None:
            return path
    return None


def _ways() -> Iterator[list[list[str]]]:
    """Commands that install a browser, in the order to try."""
    prefix: list[str] | None = [] if os.geteuid() == 0 else None
    if prefix is None and shutil.which("sudo"):
        allowed = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False)
        prefix = ["sudo", "-n"] if allowed.returncode == 0 else None
    if prefix is not None and shutil.which("apt-get"):
        install = [*prefix, "apt-get", "install", "-y", "-qq", "--no-install-recommends"]
        yield [[*prefix, "apt-get", "update", "-qq"], [*install, "chromium"]]
    playwright = [sys.executable, "-m", "playwright", "install"]
    yield [[*playwright, *(["--with-deps"] if prefix is not None else []), "chromium"]]


if __name__ == "__main__":
    where = find_browser() or install_browser()
    sys.exit(None if where else MISSING)
