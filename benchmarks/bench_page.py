"""How quickly the page of a program with 5,000 nodes opens and answers, in headless Chromium.

    python benchmarks/bench_page.py [--nodes N] [--rounds R]

The program is DeepSeek-V3.2 (small sizes) with its last layer repeated, all stages. Printed are
medians, with the limits that hold for 5,000 nodes:

* load: from navigation to the first drawn graph. At most 2,000 ms.
* page: bytes of the file without the run's data. At most 1.5 MB.
* what a click or key takes until it is drawn, and the time of a frame while the graph is moved,
  without a limit.

Exits 1 above a limit.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.append(str(Path(__file__).parent.parent))  # for the helpers of the tests

from playwright.sync_api import Browser, Page
from tests.browser import launched
from tests.compiler.debug.page.large_run import large_run

from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.debug.page.page import write_page
from rolemesh.compiler.dump.reader import Run, open_run
from rolemesh.compiler.dump.run import dump_case
from rolemesh.compiler.ir.mesh import Mesh

LOAD_MS = 2000
PAGE_BYTES = 1_500_000

ACTIONS = {
    "next stage": "app.go({ stage: app.state.stage === 7 ? 6 : 7 })",
    "compare two stages": "app.go({ diff: app.state.diff < 0 ? 4 : -1 })",
    "open or close a layer": "app.toggle('model.layers.3')",
    "search": "app.go({ q: app.state.q ? '' : 'mlp mm' })",
    "ledger": "app.go({ view: app.state.view === 'ledger' ? 'graph' : 'ledger' })",
    "timeline": "app.go({ view: app.state.view === 'timeline' ? 'graph' : 'timeline' })",
}
"""What a user does, each twice: there and back."""

DRAWN = """async () => {{
  {action};
  await new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn)));
}}"""
FRAMES = """async () => {
  const started = performance.now();
  for (let i = 0; i < 60; i += 1) {
    app.graph.move(app.graph.x + (i % 2 ? 3 : -3), app.graph.y - 1);
    await new Promise(requestAnimationFrame);
  }
  return (performance.now() - started) / 60;
}"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time of the page of a large program.")
    parser.add_argument("--nodes", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, launched() as browser:
        run = record(Path(folder), arguments.nodes)
        path = Path(folder) / "page.html"
        started = time.perf_counter()
        size = write_page(path, run)
        wrote = time.perf_counter() - started
        data = re.search(r'id="data">([^<]*)<', path.read_text(encoding="utf-8"))
        assert data is not None
        stages = [len(stage.nodes) for stage in run.programs[0].stages()]
        print(f"{len(stages)} stages, {stages[-1]:,} nodes in the last; written in {wrote:.1f} s")
        page_bytes = size - len(data[1])
        print(f"{'page':<24} {page_bytes:>9,} B    limit {PAGE_BYTES:,} B")
        print(f"{'data':<24} {len(data[1]):>9,} B")
        load = measure(browser, path, arguments.rounds)
    sys.exit(load > LOAD_MS or page_bytes > PAGE_BYTES)


def record(folder: Path, nodes: int) -> Run:
    """The run of a program with so many nodes."""
    options = CheckOptions("hf:deepseek_v32", "pd_mixed", Mesh.parse("tp=4"), layers=3)
    dump_case(options, str(folder / "small"), lambda _: None)
    return large_run(open_run(folder / "small").program("prefill"), folder / "large", nodes)


def measure(browser: Browser, path: Path, rounds: int) -> float:
    """Load the page and use it; returns the milliseconds of loading."""
    loads = []
    for _ in range(rounds):
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        started = time.perf_counter()
        page.goto(path.as_uri())
        page.wait_for_selector("#main[data-ready]")
        loads.append(1000 * (time.perf_counter() - started))
        if len(loads) < rounds:
            page.close()
    load = statistics.median(loads)
    print(f"{'load':<24} {load:>9,.0f} ms   limit {LOAD_MS:,} ms")
    for name, action in ACTIONS.items():
        took = statistics.median(milliseconds(page, action) for _ in range(2 * rounds))
        print(f"{name:<24} {took:>9,.0f} ms")
    page.evaluate("app.openMore()")
    boxes = page.evaluate("app.graph.layout.boxes.size")
    frame = page.evaluate(FRAMES)
    print(f"{'a frame while moving':<24} {frame:>9,.1f} ms   with {boxes} boxes on screen")
    return load


def milliseconds(page: Page, action: str) -> float:
    """From a user's action to its picture."""
    started = time.perf_counter()
    page.evaluate(DRAWN.format(action=action))
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
