"use strict";
/* The graph on screen: boxes, edges, pan and zoom. What lies where comes from layout.js. */

const ZOOMS = { least: 0.04, most: 2.5 };

class GraphView {
  constructor(element, app) {
    this.app = app;
    this.svg = element;
    this.content = svg("g", {});
    this.svg.append(this.content);
    this.scale = 1;
    this.x = 0;
    this.y = 0;
    this.layout = null;
    this.listen();
  }

  listen() {
    let grabbed = null;
    this.svg.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (event.ctrlKey || event.metaKey) {
        this.zoom(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
      } else this.move(this.x - event.deltaX, this.y - event.deltaY);
    });
    this.svg.addEventListener("pointerdown", (event) => {
      grabbed = { x: event.clientX - this.x, y: event.clientY - this.y, moved: false };
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (!grabbed || !event.buttons) return;
      const [x, y] = [event.clientX - grabbed.x, event.clientY - grabbed.y];
      if (!grabbed.moved && Math.hypot(x - this.x, y - this.y) < 4) return;
      grabbed.moved = true;
      this.svg.setPointerCapture(event.pointerId);
      this.move(x, y);
    });
    this.svg.addEventListener("click", (event) => {
      const box = event.target.closest("[data-box]");
      if (box && !(grabbed && grabbed.moved)) this.click(box.dataset.box);
    });
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  click(id) {
    if (id.startsWith("@")) this.app.toggle(id.slice(1));
    else this.app.go({ node: id });
  }

  key(event) {
    const id = this.app.state.node;
    const steps = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (steps[event.key]) this.step(...steps[event.key]);
    else if ((event.key === "Enter" || event.key === " ") && this.layout.boxes.has(id)) this.click(id);
    else if (event.key === "+" || event.key === "=") this.zoom(1.25);
    else if (event.key === "-") this.zoom(0.8);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
  }

  /* Select the nearest box in a direction. An open group counts with its head. */
  step(dx, dy) {
    const from = this.layout.boxes.get(this.app.state.node);
    let best = null;
    for (const box of this.layout.boxes.values()) {
      const [x, y] = middle(box);
      if (!from) {
        if (!best || box.y < best.box.y) best = { box };
        continue;
      }
      const [ox, oy] = middle(from);
      const along = (x - ox) * dx + (y - oy) * dy;
      const across = Math.abs((x - ox) * dy) + Math.abs((y - oy) * dx);
      const cost = along + 2 * across;
      if (box !== from && along > 4 && (!best || cost < best.cost)) best = { box, cost };
    }
    if (!best) return;
    this.app.go({ node: best.box.id }, true);
    this.show(best.box.id);
  }

  move(x, y) {
    this.x = x;
    this.y = y;
    this.content.setAttribute("transform", `translate(${x} ${y}) scale(${this.scale})`);
  }

  zoom(factor, x = this.svg.clientWidth / 2, y = this.svg.clientHeight / 2) {
    const scale = Math.min(ZOOMS.most, Math.max(ZOOMS.least, this.scale * factor));
    const ratio = scale / this.scale;
    this.scale = scale;
    this.move(x - (x - this.x) * ratio, y - (y - this.y) * ratio);
  }

  /* All of it, as large as it fits; a tall graph from its top, still readable. */
  fit() {
    const [width, height] = [this.svg.clientWidth, this.svg.clientHeight];
    if (!this.layout || !width) return;
    const whole = Math.min(width / this.layout.width, height / this.layout.height);
    this.scale = Math.min(1, Math.max(whole, Math.min(0.55, width / this.layout.width), ZOOMS.least));
    const free = height - this.layout.height * this.scale;
    this.move((width - this.layout.width * this.scale) / 2, Math.max(free / 2, 4));
  }

  /* Bring a box in view: to the middle, or as little as needed. */
  show(id, toMiddle = false) {
    const box = this.layout.boxes.get(id);
    if (!box) return;
    if (toMiddle && this.scale < 0.5) this.scale = 0.8;
    const [width, height] = [this.svg.clientWidth, this.svg.clientHeight];
    const [x, y] = middle(box).map((value) => value * this.scale);
    const inside = this.x + x > 60 && this.x + x < width - 60 && this.y + y > 40 && this.y + y < height - 40;
    if (toMiddle || !inside) this.move(width / 2 - x, height / 2 - y);
  }

  /* Draw a layout. `anchor` is a box that stays where it is on screen. */
  draw(layout, anchor) {
    const before = this.layout && anchor && this.layout.boxes.get(anchor);
    const after = anchor && layout.boxes.get(anchor);
    this.layout = layout;
    const groups = [...layout.boxes.values()];
    this.overlay = svg("g", { class: "overlay" });
    this.elements = new Map(groups.map((box) => [box.id, this.box(box)]));
    this.content.replaceChildren(
      svg("g", {}, groups.filter((box) => box.isOpen).map((box) => this.elements.get(box.id))),
      svg("g", { class: "edges" }, layout.edges.map(edgeElement)),
      this.overlay,
      svg("g", {}, groups.filter((box) => !box.isOpen).map((box) => this.elements.get(box.id))),
    );
    if (before && after) {
      const x = this.x + (before.x + before.width / 2 - after.x - after.width / 2) * this.scale;
      this.move(x, this.y + (before.y - after.y) * this.scale);
    }
  }

  box(box) {
    const { item } = box;
    const { app } = this;
    const element = svg("g", {
      class: "box",
      id: `box-${box.id}`,
      role: "button",
      "data-box": box.id,
      transform: `translate(${box.x} ${box.y})`,
    });
    if (item instanceof Group) drawGroupBox(element, box, app);
    else drawNodeBox(element, box, app);
    return element;
  }

  /* Mark the selected box, what it reads and what reads it, and what the search found. */
  mark(selected, found) {
    const { tree, open } = this.app;
    const close = new Map();
    const node = tree.nodes.get(selected);
    if (node) {
      const represent = (name) => tree.nodes.has(name) && boxId(shownFor(tree, name, open));
      for (const name of node.operands) close.set(represent(name), "operand");
      for (const name of node.users) close.set(represent(name), "user");
    }
    if (selected.startsWith("@")) {
      for (const { from, to } of [...this.layout.edges, ...this.layout.far]) {
        if (to === selected) close.set(from, "operand");
        if (from === selected) close.set(to, "user");
      }
    }
    const holder = node ? boxId(shownFor(tree, selected, open)) : "";
    const holding = new Set();
    for (const name of found || []) holding.add(boxId(shownFor(tree, name, open)));
    for (const [id, element] of this.elements) {
      element.classList.toggle("selected", id === selected);
      element.classList.toggle("holder", id === holder && id !== selected);
      element.classList.toggle("operand", close.get(id) === "operand");
      element.classList.toggle("user", close.get(id) === "user");
      element.classList.toggle("found", holding.has(id));
      element.classList.toggle("dim", Boolean(found) && !holding.has(id) && !this.layout.boxes.get(id).isOpen);
    }
    const from = this.layout.boxes.get(selected);
    const lines = from && !from.isOpen
      ? [...close].map(([id, kind]) => overlayLine(from, this.layout.boxes.get(id), kind))
      : [];
    this.overlay.replaceChildren(...lines.filter(Boolean));
    const element = this.elements.get(selected);
    if (element) this.svg.setAttribute("aria-activedescendant", element.id);
    else this.svg.removeAttribute("aria-activedescendant");
  }
}

function middle(box) {
  return [box.x + box.width / 2, box.y + (box.isOpen ? HEAD / 2 : box.height / 2)];
}

function overlayLine(from, to, kind) {
  if (!to || to.isOpen) return null;
  const [upper, lower] = kind === "operand" ? [to, from] : [from, to];
  const [x1, y1] = [upper.x + upper.width / 2, upper.y + upper.height];
  const [x2, y2] = [lower.x + lower.width / 2, lower.y];
  const bend = Math.max(24, Math.abs(y2 - y1) / 3);
  return svg("path", { class: kind, d: `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}` });
}

function edgeElement(edge) {
  const [first, ...rest] = edge.points;
  let path = `M${first}`;
  for (let i = 0; i < rest.length - 1; i += 1) {
    const [x, y] = rest[i];
    path += `Q${x} ${y} ${(x + rest[i + 1][0]) / 2} ${(y + rest[i + 1][1]) / 2}`;
  }
  path += `L${rest.at(-1)}`;
  const width = Math.min(4, 1 + Math.log2(edge.count) / 2);
  return svg("path", { d: path, "stroke-width": width.toFixed(1), "marker-end": "url(#arrow)" });
}
