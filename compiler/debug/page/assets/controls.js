"use strict";
/* The bar on top: program, stage, comparison, views, the buttons of the graph, and keys. */

class Controls {
  constructor(app) {
    this.app = app;
    this.program = byId("program");
    this.slider = byId("stage");
    this.diff = byId("diff");
    this.program.addEventListener("change", () => this.switchProgram());
    this.slider.addEventListener("input", () => app.go({ stage: Number(this.slider.value) }, true));
    this.diff.addEventListener("change", () => app.go({ diff: Number(this.diff.value) }));
    for (const view of VIEWS) byId(`tab-${view}`).addEventListener("click", () => app.go({ view }));
    byId("fit").addEventListener("click", () => app.graph.fit());
    byId("closer").addEventListener("click", () => app.graph.zoom(1.25));
    byId("wider").addEventListener("click", () => app.graph.zoom(0.8));
    byId("more").addEventListener("click", () => app.openMore());
    byId("less").addEventListener("click", () => {
      app.go({ open: [] });
      app.graph.fit();
    });
    byId("keys").addEventListener("click", () => byId("help").showModal());
    document.addEventListener("keydown", (event) => this.key(event));
    document.title = `${app.run.title} · rolemesh`;
    byId("run").textContent = app.run.title;
    const options = app.run.programs.map((program) => el("option", { value: program.id }, program.id));
    this.program.replaceChildren(...options);
  }

  /* The same pass of another program, if it has it; open modules and the node stay. */
  switchProgram() {
    const { app } = this;
    const next = app.run.programs.find((program) => program.id === this.program.value);
    const same = (number) => (number < 0 ? -1 : next.passes.indexOf(app.program.passes[number]));
    const stage = same(app.state.stage);
    app.go({ program: next.id, stage: stage < 0 ? next.last : stage, diff: same(app.state.diff) });
  }

  key(event) {
    const { app } = this;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input:not([type=range]), select, dialog")) return;
    const { stage } = app.state;
    if (event.key === "/") byId("search").focus();
    else if (event.key === "[" && stage > 0) app.go({ stage: stage - 1 }, true);
    else if (event.key === "]" && stage < app.program.last) app.go({ stage: stage + 1 }, true);
    else if (event.key === "n") app.nextChange(1);
    else if (event.key === "p") app.nextChange(-1);
    else if ("gclt".includes(event.key)) app.go({ view: VIEWS["gclt".indexOf(event.key)] });
    else if (event.key === "Escape") app.go({ node: "" });
    else if (event.key === "?") byId("help").showModal();
    else return;
    event.preventDefault();
  }

  say(text) {
    byId("message").textContent = text;
  }

  draw() {
    const { app } = this;
    const { program, stage, state, difference } = app;
    this.say("");
    this.program.value = program.id;
    this.slider.max = program.last;
    this.slider.value = stage.number;
    this.slider.setAttribute("aria-valuetext", stage.pass);
    byId("stage-name").textContent = `${stage.number} ${stage.pass}`;
    const passes = program.passes.map((pass, i) => el("option", { value: i }, `${i} ${pass}`));
    this.diff.replaceChildren(el("option", { value: -1 }, "nothing"), ...passes);
    this.diff.value = state.diff;
    for (const view of VIEWS) byId(`tab-${view}`).setAttribute("aria-selected", String(view === state.view));
    const differing = difference ? ` ${difference.status.size.toLocaleString("en")}` : "";
    byId("tab-changes").textContent = `Changes${differing}`;
    byId("tab-ledger").textContent = `Ledger ${stage.collectives.length.toLocaleString("en")}`;
    drawLegend(byId("legend"), program);
    byId("change-legend").hidden = !difference;
  }
}
