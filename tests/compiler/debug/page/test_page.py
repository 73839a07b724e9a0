"""The page of a run in a real browser: every view, the address, the keyboard, and no network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect
from tests.browser import launched
from tests.compiler.debug.page.large_run import large_run
from tests.compiler.recorded import recorded_run

from rolemesh.compiler.debug.page.page import page_html, write_page
from rolemesh.compiler.dump.reader import Run, open_stage
from rolemesh.compiler.ir.errors import RolemeshError

# One worker has the browser.
pytestmark = pytest.mark.xdist_group("browser")

MAX_BYTES = 1_500_000
MAX_LINES = 400


@pytest.fixture(scope="module")
def run() -> Run:
    return recorded_run("hf:llama", "pd_mixed")


@pytest.fixture(scope="module")
def file(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "run.html"
    write_page(path, run)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


class Tab:
    """A tab that fails the test for an error, and for a request for anything but its file."""

    def __init__(self, page: Page, file: Path) -> None:
        self.page = page
        self.file = file
        self.problems: list[str] = []
        page.set_default_timeout(10_000)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self._request(request.url))
        page.route("**/*", self._route)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def _request(self, url: str) -> None:
        if not self._is_ours(url):
            self.problems.append(f"a request for {url}")

    def _is_ours(self, url: str) -> bool:
        return url.partition("#")[0] == self.file.as_uri() or url == "data:,"

    def _route(self, route: Route) -> None:
        if self._is_ours(route.request.url):
            route.continue_()
        else:
            route.abort()

    def open(self, state: str = "") -> Page:
        self.page.goto(self.file.as_uri() + state)
        self.page.wait_for_selector("#main[data-ready]")
        return self.page

    def check(self) -> None:
        assert self.problems == []
        assert self.page.evaluate("document.documentElement.scrollWidth") <= 1280


@pytest.fixture
def tab(browser: Browser, file: Path) -> Iterator[Tab]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    found = Tab(context.new_page(), file)
    yield found
    found.check()
    context.close()


def boxes(page: Page) -> set[str]:
    return set(page.eval_on_selector_all(".box", "all => all.map(each => each.dataset.box)"))


def box(page: Page, name: str) -> str:
    return f'.box[data-box="{name}"]'


def click(page: Page, name: str, part: str = ".body") -> None:
    """Click a box where it is on screen; a tall graph does not fit."""
    page.evaluate("(id) => app.graph.show(id, true)", name)
    page.click(f"{box(page, name)} {part}")


def number_of(run: Run, stage: str) -> int:
    return run.program("prefill").stage_names.index(stage)


def label(run: Run, stage: str) -> str:
    return f"{number_of(run, stage)} {stage}"


def first_collective(run: Run, phase: str = "prefill") -> str:
    nodes = run.program(phase).stage().nodes.values()
    return next(node.name for node in nodes if node.collective is not None)


def test_modules_open_and_close(tab: Tab) -> None:
    page = tab.open()
    assert {"@model", "@model.layers", "@model.layers.0"} <= boxes(page)
    assert "@model.layers.0.mlp" not in boxes(page)
    click(page, "@model.layers.0")
    assert "@model.layers.0.mlp" in boxes(page)
    expect(page.locator(box(page, "@model.layers.0"))).to_have_attribute("aria-expanded", "true")
    expect(page.locator("#panel h2")).to_have_text("model.layers.0")
    click(page, "@model.layers.0", ".head")
    assert "@model.layers.0.mlp" not in boxes(page)
    page.click("#more")
    assert {"@model.layers.0.mlp", "@model.layers.1.mlp"} <= boxes(page)
    page.click("#less")
    assert "@model" in boxes(page)
    assert "@model.layers" not in boxes(page)


def test_a_weight_is_shown_in_its_module(tab: Tab, run: Run) -> None:
    page = tab.open(
        "#open=model,model.layers,model.layers.0,model.layers.0.mlp,model.layers.0.mlp.up_proj"
    )
    assert "model_layers_0_mlp_up_proj_weight" in boxes(page)


def test_search_finds_names_ops_modules_and_weights(tab: Tab, run: Run) -> None:
    page = tab.open()
    nodes = run.program("prefill").stage().nodes
    weights = {
        entry["node"]: entry["name"] for entry in run.program("prefill").stage().head["inputs"]
    }
    for query in ("mm_3", "aten.mm", "mlp.down_proj", "q_proj.weight", "layers.1 mul"):
        page.fill("#search", query)
        listed = page.eval_on_selector_all(
            "#results [data-name]", "all => all.map(e => e.dataset.name)"
        )
        words = query.split()
        texts = {
            node.name: f"{node.name} {node.op} {node.module} {weights.get(node.name, '')}"
            for node in nodes.values()
        }
        certain = {name for name, text in texts.items() if all(word in text for word in words)}
        assert certain, query
        assert certain <= set(listed), query
    page.fill("#search", "no such thing")
    expect(page.locator("#results")).to_contain_text("nothing found")
    assert "q=no+such+thing" in page.url


def test_a_found_node_is_revealed_and_chosen(tab: Tab) -> None:
    page = tab.open()
    page.keyboard.press("/")
    page.keyboard.type("layers.1.mlp.down_proj mm")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    name = page.inner_text("#panel h2")
    assert name.startswith("mm")
    assert "selected" in (page.get_attribute(box(page, name), "class") or "")
    assert "@model.layers.1.mlp.down_proj" in boxes(page)
    assert f"node={name}" in page.url


def test_the_slider_walks_through_the_stages(tab: Tab, run: Run) -> None:
    page = tab.open()
    expect(page.locator("#stage-name")).to_have_text(label(run, "verify"))
    page.focus("#stage")
    for _ in range(number_of(run, "verify")):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#stage-name")).to_have_text("0 capture")
    assert page.locator("rect.shard").count() == 0
    page.keyboard.press("]")
    expect(page.locator("#stage-name")).to_have_text("1 canonicalise")
    for _ in range(number_of(run, "canonicalise"), number_of(run, "propagate")):
        page.keyboard.press("]")
    expect(page.locator("#stage-name")).to_have_text(label(run, "propagate"))
    assert page.locator("rect.shard").count() > 0
    ops = len(run.program("prefill").stage("propagate").nodes)
    assert f"{ops}" in str(page.evaluate("app.stage.order.length"))


def test_the_difference_of_two_stages(tab: Tab, run: Run) -> None:
    page = tab.open(f"#stage={number_of(run, 'partition')}")
    page.select_option("#diff", str(number_of(run, "canonicalise")))
    program = run.program("prefill")
    before, after = program.stage("canonicalise").nodes, program.stage("partition").nodes
    added, removed = after.keys() - before.keys(), before.keys() - after.keys()
    moved = {
        name
        for name in after.keys() & before.keys()
        if any(placement != "replicated" for layout in after[name].layouts for placement in layout)
    }
    shown = page.evaluate("Object.fromEntries(app.difference.status)")
    assert {name for name, kind in shown.items() if kind == "added"} == added
    assert {name for name, kind in shown.items() if kind == "removed"} == removed
    assert {name for name, kind in shown.items() if kind == "resharded"} == moved
    assert added
    assert moved
    page.keyboard.press("c")
    expect(page.locator("#view-changes .summary")).to_contain_text(f"added {len(added)}")
    page.click("#view-changes tbody tr:first-child button")
    chosen = page.inner_text("#panel h2 >> nth=0").split("\n")[0].split(" ")[0]
    kind = shown[re.sub("(added|removed|resharded|changed)$", "", chosen)]
    assert page.locator(f".box.selected.{kind}").count() == 1
    page.keyboard.press("n")
    assert page.locator(".box.selected").count() == 1


def test_removed_nodes_are_in_the_graph(tab: Tab, run: Run) -> None:
    program = run.program("prefill")
    before, after = program.stage("capture").nodes, program.stage("canonicalise").nodes
    name = next(name for name in before if name not in after)
    page = tab.open(f"#stage=1&diff=0&q={name}")
    page.focus("#search")
    page.click(f'#results [data-name="{name}"]')
    assert "removed" in (page.get_attribute(box(page, name), "class") or "")
    expect(page.locator("#panel h2 .badge")).to_have_text("removed")


def test_a_stage_against_an_equal_one_differs_in_nothing(tab: Tab, run: Run) -> None:
    verify, schedule = (number_of(run, stage) for stage in ("verify", "schedule"))
    page = tab.open(f"#stage={verify}&diff={schedule}&view=changes")
    expect(page.locator("#view-changes")).to_contain_text("Nothing differs.")


def test_programs_switch_at_the_same_pass(tab: Tab, run: Run) -> None:
    page = tab.open(f"#stage={number_of(run, 'partition')}")
    page.select_option("#program", "pd_mixed/decode")
    expect(page.locator("#stage-name")).to_have_text(label(run, "partition"))
    ids = set(page.evaluate("[...app.stage.nodes.keys()]"))
    assert ids == set(run.program("decode").stage("partition").nodes)
    assert "program=pd_mixed/decode" in page.url


def test_a_link_opens_the_same_view(tab: Tab, run: Run, browser: Browser) -> None:
    page = tab.open()
    page.select_option("#program", "pd_mixed/decode")
    click(page, "@model.layers.1")
    page.select_option("#diff", "2")
    page.keyboard.press("[")
    page.fill("#search", "mm")
    page.click("#tab-graph")
    click(page, "@lm_head")
    seen = """() => [
      app.state,
      [...app.open].sort(),
      app.graph.layout.boxes.size,
      document.querySelector('#panel h2').innerText,
    ]"""
    before = page.evaluate(seen)
    state, opened, *_ = before
    assert state["program"] == "pd_mixed/decode"
    stage = number_of(run, "verify") - 1
    assert (state["stage"], state["diff"], state["q"], state["node"]) == (
        stage, 2, "mm", "@lm_head"
    )  # fmt: skip
    assert "model.layers.1" in opened
    page.reload()
    page.wait_for_selector("#main[data-ready]")
    assert page.evaluate(seen) == before
    expect(page.locator("#search")).to_have_value("mm")
    page.go_back()
    page.wait_for_function("app.state.node !== '@lm_head'")
    assert "lm_head" not in page.evaluate("[...app.open]")


@pytest.mark.parametrize(
    "state", ["#stage=99&diff=x&program=none&view=none", "#node=nothing", "#open=nothing"]
)
def test_an_address_that_does_not_fit_opens_something(tab: Tab, run: Run, state: str) -> None:
    page = tab.open(state)
    expect(page.locator("#stage-name")).to_have_text(label(run, "verify"))


def test_the_ledger_has_every_collective_and_sorts(tab: Tab, run: Run) -> None:
    page = tab.open("#view=ledger")
    moved = [
        node.collective for node in run.program("prefill").stage().nodes.values() if node.collective
    ]
    rows = page.locator("#view-ledger tbody tr")
    assert rows.count() == len(moved) > 3
    ledger = "document.getElementById('view-ledger')"
    assert page.evaluate(f"{ledger}.scrollWidth <= {ledger}.clientWidth")
    page.click("th button[data-key=bytes]")
    page.click("th button[data-key=bytes]")
    column = "#view-ledger tbody tr td:nth-child(6)"
    shown = [int(text.replace(",", "")) for text in page.locator(column).all_inner_texts()]
    assert shown == sorted((entry["bytes"] for entry in moved), reverse=True)
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("bytes")
    assert "sort=-bytes" in page.url
    assert page.evaluate("document.activeElement.dataset.key") == "bytes"
    total = sum(entry["bytes"] for entry in moved)
    expect(page.locator("#view-ledger tfoot")).to_contain_text(f"{total:,}")
    page.click("th button[data-key=node]")
    names = page.locator("#view-ledger tbody tr td:nth-child(2)").all_inner_texts()
    assert names[0].startswith("all_gather")
    assert names == sorted(
        names, key=lambda text: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", text)]
    )


def test_the_panel_says_what_a_node_is_and_why(tab: Tab, run: Run) -> None:
    stage = run.program("prefill").stage()
    name = first_collective(run)
    node = stage.nodes[name]
    assert node.collective is not None
    page = tab.open(f"#node={name}")
    panel = page.locator("#panel")
    for text in (
        node.op,
        node.module,
        node.source,
        node.reason,
        node.collective["formula"],
        node.kinds[0],
    ):
        expect(panel).to_contain_text(text)
    page.click("#panel section:has(h3:text('Users')) button >> nth=0")
    assert page.inner_text("#panel h2") == stage.users[name][0]


def test_the_panel_shows_the_decision_with_its_alternatives(tab: Tab, run: Run) -> None:
    decided = run.program("prefill").stage("push_back")
    node = next(
        node
        for node in decided.nodes.values()
        if node.decision and len(node.decision.get("alternatives", [[]])[0]) > 1
    )
    assert node.decision is not None
    page = tab.open(f"#stage={number_of(run, 'push_back')}&node={node.name}")
    panel = page.locator("#panel")
    expect(panel).to_contain_text(node.decision["reasons"][0])
    expect(panel).to_contain_text(decided.rules[node.decision["rule"]])
    rows = page.locator("#panel section:has(h3:text('Decision')) tbody tr")
    assert rows.count() == len(node.decision["alternatives"][0])
    chosen = page.locator("#panel section:has(h3:text('Decision')) tr.chosen")
    expect(chosen).to_contain_text(node.decision["choices"][0])
    # Later stages carry no decision: the panel looks it up.
    page.keyboard.press("]")
    expect(page.locator("#panel")).to_contain_text(
        "Decision (of push_back)".upper(), ignore_case=True
    )


def test_the_timeline_has_every_rank_and_chooses_nodes(tab: Tab, run: Run) -> None:
    page = tab.open("#view=timeline&stage=0")
    expect(page.locator("#timeline")).to_contain_text("known from the stage partition on")
    page = tab.open("#view=timeline")
    lanes = page.evaluate("app.timeline.lanes.map(({ rank, stream }) => `${rank} ${stream}`)")
    assert lanes == [
        f"{rank} {stream}" for rank in range(4) for stream in ("compute", "communication")
    ]
    moved = [node.name for node in run.program("prefill").stage().nodes.values() if node.collective]
    assert page.evaluate("app.timeline.lanes[1].events.map((event) => event.node.name)") == moved
    x, y = page.evaluate(
        "(() => { const t = app.timeline, e = t.lanes[3].events[1];"
        " return [t.x(e.start + e.duration / 2), t.lanes[3].top + LANE / 2]; })()"
    )
    page.locator("canvas").click(position={"x": x, "y": y})
    assert page.inner_text("#panel h2") == moved[1]
    expect(page.locator(".readout")).to_contain_text("rank 1, communication")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#panel h2") != moved[1]
    page.keyboard.press("+")
    assert page.evaluate("app.timeline.span < app.timeline.end")


def test_the_keyboard_is_enough(tab: Tab) -> None:
    page = tab.open()
    page.focus("#graph")
    page.keyboard.press("ArrowDown")
    first = page.evaluate("app.state.node")
    page.keyboard.press("ArrowDown")
    assert first
    assert page.evaluate("app.state.node") != first
    page.evaluate("app.go({ node: '@model.layers.1' })")
    page.keyboard.press("Enter")
    assert "@model.layers.1.mlp" in boxes(page)
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("l")
    expect(page.locator("#view-ledger")).to_be_visible()
    page.keyboard.press("g")
    page.keyboard.press("Escape")
    assert page.evaluate("app.state.node") == ""


def test_axes_have_colours_of_their_own(tab: Tab) -> None:
    page = tab.open()
    kind = "f32[13@tp, (2 x T@ep/2), 12] owner(0)@tp +sum(ep)"
    parts = page.evaluate("(kind) => kindParts(kind, ['tp', 'ep'])", kind)
    assert "".join(part["text"] for part in parts) == kind
    assert [(part["text"], part["axis"]) for part in parts if part["axis"] >= 0] == [
        ("13@tp", 0),
        ("T@ep/2", 1),
        ("owner(0)@tp", 0),
        ("+sum(ep)", 1),
    ]
    colours = "[0, 1].map((i) => getComputedStyle(document.body).getPropertyValue(`--axis-${i}`))"
    light = page.evaluate(colours)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(colours)
    assert len({*light, *dark}) == 4


def test_five_thousand_nodes_work(run: Run, browser: Browser, tmp_path: Path) -> None:
    large = large_run(
        run.program("prefill"), tmp_path / "run", 5000, ("capture", "push_back", "verify")
    )
    path = tmp_path / "large.html"
    write_page(path, large)
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    tab = Tab(context.new_page(), path)
    page = tab.open()
    assert page.evaluate("app.stage.order.length") >= 5000
    assert 0 < len(boxes(page)) < 400
    page.fill("#search", "layers.40.mlp.down_proj mm")
    page.keyboard.press("Enter")
    assert "@model.layers.40.mlp.down_proj" in boxes(page)
    page.select_option("#diff", "0")
    page.click("#tab-timeline")
    assert page.evaluate("app.timeline.lanes.length") == 8
    page.click("#tab-graph")
    for _ in range(6):
        page.click("#more")
    expect(page.locator("#message")).to_contain_text("too many")
    assert len(boxes(page)) <= 700
    tab.check()
    context.close()


def test_no_group_is_laid_out_with_thousands_of_boxes(tab: Tab) -> None:
    page = tab.open()
    found = page.evaluate(
        """() => {
          const reads = (i) => (i ? [`n${i - 1}`] : []);
          const node = (i) => ({ name: `n${i}`, home: "", operands: reads(i), kinds: [] });
          const order = Array.from({ length: 5000 }, (_, i) => node(i));
          const tree = buildTree({ order }, []);
          return [...tree.groups.values()].map((group) => group.items.length);
        }"""
    )
    assert max(found) <= 150
    assert sum(found) >= 5000


def test_the_page_is_small_whole_and_the_same_each_time(run: Run, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text == page_html(run)
    assert "data-from" not in text
    data = re.search(r'id="data">([^<]*)<', text)
    assert data is not None
    assert len(text) - len(data[1]) <= MAX_BYTES
    assert "Copyright (c) 2012-2014 Chris Pettitt" in text
    assert not re.search(r"""(src|href)=["'](?!data:,)""", text)


def test_assets_are_short_files_with_a_reason() -> None:
    folder = resources.files("rolemesh.compiler.debug.page") / "assets"
    scripts = [entry for entry in folder.iterdir() if entry.name.endswith((".js", ".css", ".html"))]
    page = (folder / "page.html").read_text(encoding="utf-8")
    for entry in scripts:
        text = entry.read_text(encoding="utf-8")
        assert text.count("\n") <= MAX_LINES, entry.name
        if entry.name.endswith(".js"):
            assert text.startswith('"use strict";\n/* '), entry.name
            assert "</script" not in text
        assert entry.name == "page.html" or f'data-from="{entry.name}"' in page


def test_one_stage_is_a_page_too(run: Run, browser: Browser, tmp_path: Path) -> None:
    program = run.program("decode")
    entry = program.entry["stages"][program.stage("partition").number]["json"]["file"]
    content = (run.folder / entry).read_text(encoding="utf-8")
    path = tmp_path / "stage.html"
    write_page(path, open_stage(content, "standard input"))
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    tab = Tab(context.new_page(), path)
    page = tab.open("#view=timeline")
    expect(page.locator("#stage-name")).to_have_text("0 partition")
    expect(page.locator("#timeline")).to_contain_text("simulated")
    tab.check()
    context.close()


def test_a_run_without_programs_is_refused(run: Run) -> None:
    with pytest.raises(RolemeshError) as caught:
        page_html(Run(run.folder, {**run.index, "programs": []}))
    assert str(caught.value).startswith("[RM018] there is nothing to show")


def test_a_file_that_cannot_be_written_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(RolemeshError) as caught:
        write_page(tmp_path / "folder", run)
    assert caught.value.code == "RM036"
    assert "cannot write the page" in str(caught.value)
