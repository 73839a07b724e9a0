"use strict";
/* The page: it reads the state from the address, derives what is shown, and draws what changed. */

const MOST_BOXES = 600;

class App {
  constructor(run) {
    this.run = run;
    this.found = null;
    this.graph = new GraphView(byId("graph"), this);
    this.timeline = new TimelineView(byId("timeline"), this);
    this.search = new SearchBox(this);
    this.controls = new Controls(this);
    window.addEventListener("hashchange", () => this.update(null));
    window.addEventListener("resize", () => this.drawView());
    this.update(null);
    byId("main").dataset.ready = "true";
  }

  /* Change the state. A small step replaces the entry of the history. */
  go(changes, small = false, anchor = null) {
    const hash = writeState({ ...this.state, ...changes });
    if (hash === location.hash) return;
    if (small) history.replaceState(null, "", hash);
    else history.pushState(null, "", hash);
    this.update(anchor);
  }

  update(anchor) {
    const before = this.state;
    const state = readState(location.hash, this.run);
    this.state = state;
    this.program = this.run.programs.find((program) => program.id === state.program);
    this.stage = this.program.stage(state.stage);
    const sameGraph = before && before.program === state.program && before.stage === state.stage && before.diff === state.diff;
    if (!sameGraph) this.derive();
    this.open = new Set(state.open || defaultOpen(this.tree));
    const boxes = [...this.open].sort().join();
    const sameBoxes = sameGraph && boxes === this.boxes;
    this.boxes = boxes;
    if (!sameGraph || before.q !== state.q) {
      this.found = findNodes(this.tree, state.q);
      this.search.draw(this.found);
    }
    if (!sameBoxes) {
      const layout = layoutGraph(this.tree, this.open, this.program.axes);
      this.graph.draw(layout, anchor || (before && before.node) || null);
    }
    this.controls.draw();
    drawPanel(byId("panel"), this);
    this.graph.mark(state.node, this.found && this.found.map((node) => node.name));
    this.drawView();
    if (!before || before.program !== state.program) {
      this.graph.fit();
      const node = this.tree.nodes.get(state.node);
      this.graph.show(node ? boxId(shownFor(this.tree, node.name, this.open)) : state.node, true);
    }
  }

  derive() {
    const { diff } = this.state;
    const compared = diff >= 0 && diff !== this.stage.number;
    this.difference = compared ? compareStages(this.program.stage(diff), this.stage) : null;
    this.tree = buildTree(this.stage, this.difference ? this.difference.removed : []);
  }

  drawView() {
    const { view } = this.state;
    for (const name of VIEWS) byId(`view-${name}`).hidden = name !== view;
    if (view === "ledger") drawLedger(byId("view-ledger"), this);
    else if (view === "changes") drawChanges(byId("view-changes"), this);
    else if (view === "timeline") this.timeline.show();
  }

  /* Open or close a group. */
  toggle(id) {
    const open = [...this.open];
    const at = open.indexOf(id);
    if (at < 0) open.push(id);
    else open.splice(at, 1);
    this.go({ open, node: `@${id}` }, false, `@${id}`);
  }

  /* Show a box in the graph: open what is around it, and choose it. */
  reveal(id) {
    const around = ancestors(this.tree, id).map((group) => group.id);
    const open = [...new Set([...this.open, ...around])];
    this.go({ node: id, open, view: "graph" });
    this.graph.show(id, true);
    this.graph.svg.focus({ preventScroll: true });
  }

  /* Open the next level of all groups on screen, as long as the graph stays small. */
  openMore() {
    const closed = [...this.graph.layout.boxes.values()].filter((box) => box.item instanceof Group && !box.isOpen);
    const more = closed.reduce((sum, box) => sum + box.item.items.length, this.graph.layout.boxes.size);
    if (more > MOST_BOXES) {
      this.controls.say(`${more} boxes are too many to read: open modules one by one, or search.`);
      return;
    }
    this.go({ open: [...this.open, ...closed.map((box) => box.item.id)] });
    this.graph.fit();
  }

  /* Choose the next or previous node that differs. */
  nextChange(step) {
    if (!this.difference) return;
    const names = changedNames(this.difference);
    const at = names.indexOf(this.state.node);
    const next = at < 0 ? (step > 0 ? 0 : names.length - 1) : (at + step + names.length) % names.length;
    if (names.length) this.reveal(names[next]);
  }

  link(text, act) {
    return el("button", { type: "button", class: "link", onclick: act }, text);
  }

  nodeLink(name, text) {
    return this.link(text || name, () => this.reveal(name));
  }

  groupLink(id) {
    return this.link(id, () => this.reveal(`@${id}`));
  }

  stageLink(number) {
    return this.link(this.program.passes[number], () => this.go({ stage: number }));
  }
}

async function start() {
  try {
    const run = await loadRun(byId("data").textContent);
    window.app = new App(run);
  } catch (error) {
    byId("message").textContent = `This page cannot be shown: ${error}`;
    throw error;
  }
}

start();
