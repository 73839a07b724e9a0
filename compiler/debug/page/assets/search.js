"use strict";
/* Search by name, op, module and weight: every word must occur in one of them. */

const SHOWN = 200;

/* Nodes that fit, in order; null for an empty search. */
function findNodes(tree, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return null;
  const found = [];
  for (const node of tree.nodes.values()) {
    node.text ||= `${node.name} ${node.op} ${node.home} ${node.weight}`.toLowerCase();
    if (words.every((word) => node.text.includes(word))) found.push(node);
  }
  return found;
}

class SearchBox {
  constructor(app) {
    this.app = app;
    this.input = byId("search");
    this.list = byId("results");
    this.active = -1;
    this.input.addEventListener("input", () => {
      this.active = -1;
      app.go({ q: this.input.value }, true);
      this.open(true);
    });
    this.input.addEventListener("focus", () => this.open(true));
    this.input.addEventListener("blur", () => this.open(false));
    this.input.addEventListener("keydown", (event) => this.key(event));
    // Before the input loses focus, so that the click still finds the list.
    this.list.addEventListener("pointerdown", (event) => {
      const option = event.target.closest("[data-name]");
      event.preventDefault();
      if (option) this.choose(option.dataset.name);
    });
  }

  open(wanted) {
    const shown = wanted && this.app.found !== null;
    this.list.hidden = !shown;
    this.input.setAttribute("aria-expanded", String(shown));
  }

  draw(found) {
    if (document.activeElement !== this.input) this.input.value = this.app.state.q;
    byId("found").textContent = found ? `${found.length.toLocaleString("en")} found` : "";
    const { axes } = this.app.program;
    const options = (found || []).slice(0, SHOWN).map((node, i) =>
      el("li", { role: "option", id: `result-${i}`, "data-name": node.name, "aria-selected": "false" },
        el("b", {}, node.name), ` ${shortOp(node.op)} `, kindElement(node.kinds.join(", "), axes),
        el("small", {}, node.weight || node.home)),
    );
    const more = (found || []).length - options.length;
    if (more > 0) options.push(el("li", { class: "empty" }, `and ${more.toLocaleString("en")} more`));
    if (found && !found.length) options.push(el("li", { class: "empty" }, "nothing found"));
    this.list.replaceChildren(...options);
    if (!found) this.open(false);
  }

  key(event) {
    const count = Math.min((this.app.found || []).length, SHOWN);
    if (event.key === "Escape") {
      if (this.list.hidden) this.input.blur();
      this.open(false);
    } else if (event.key === "Enter" && count) {
      this.choose(this.app.found[Math.max(this.active, 0)].name);
    } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && count) {
      const step = event.key === "ArrowDown" ? 1 : -1;
      this.active = (this.active + step + count) % count;
      this.open(true);
      this.list.querySelectorAll("[role=option]").forEach((option, i) => {
        option.setAttribute("aria-selected", String(i === this.active));
        if (i === this.active) option.scrollIntoView({ block: "nearest" });
      });
      this.input.setAttribute("aria-activedescendant", `result-${this.active}`);
    } else return;
    event.preventDefault();
  }

  choose(name) {
    this.open(false);
    this.app.reveal(name);
  }
}
