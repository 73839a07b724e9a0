"use strict";
/* The simulated timeline: a lane per rank and stream on one canvas, with zoom, and a line of text
   about the event that is pointed at or chosen. Times are what compiler/debug/timeline/timeline.py computed. */

const LANE = 20;
const LEFT = 130;
const TOP = 26;
const GAP = 6;

class TimelineView {
  constructor(target, app) {
    this.app = app;
    this.canvas = el("canvas", { tabindex: "0", role: "img", "aria-label": "timeline; arrow keys walk through events, plus and minus zoom" });
    this.readout = el("p", { class: "readout", "aria-live": "polite" });
    this.note = el("p", { class: "summary" });
    this.scroller = el("div", { class: "scroller" }, this.canvas);
    this.table = el("div", { class: "longest" });
    this.body = el("div", {}, this.note, this.readout, this.scroller, this.table);
    this.empty = el("p", { class: "empty" }, "What a rank runs is known from the stage partition on.");
    target.append(this.empty, this.body);
    this.listen();
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons) this.pan(-event.movementX);
      else this.tell(this.hit(event.offsetX, event.offsetY));
    });
    canvas.addEventListener("click", (event) => {
      const event_ = this.hit(event.offsetX, event.offsetY);
      if (event_) this.app.go({ node: event_.node.name });
    });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.shiftKey) return;
      event.preventDefault();
      if (event.ctrlKey) this.zoom(Math.exp(-event.deltaY / 300), event.offsetX);
      else this.pan(event.deltaY || event.deltaX);
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (steps[event.key]) this.walk(steps[event.key], 0);
    else if (event.key === "ArrowUp") this.walk(0, -1);
    else if (event.key === "ArrowDown") this.walk(0, 1);
    else if (event.key === "+" || event.key === "=") this.zoom(1.5, LEFT + this.width / 2);
    else if (event.key === "-") this.zoom(1 / 1.5, LEFT + this.width / 2);
    else if (event.key === "0") this.reset();
    else return;
    event.preventDefault();
  }

  /* Choose the next event of the lane, or the lane above or below. */
  walk(step, across) {
    if (!this.lanes) return;
    this.lane = Math.min(this.lanes.length - 1, Math.max(0, (this.lane || 0) + across));
    const { events } = this.lanes[this.lane];
    if (!events.length) return;
    const at = events.findIndex((event) => event.node.name === this.app.state.node);
    const next = at < 0 ? 0 : Math.min(events.length - 1, Math.max(0, at + step));
    this.app.go({ node: events[next].node.name }, true);
    this.tell({ ...events[next], lane: this.lanes[this.lane] });
  }

  show() {
    const { stage } = this.app;
    this.empty.hidden = Boolean(stage.timeline);
    this.body.hidden = !stage.timeline;
    if (!stage.timeline) return;
    if (this.stage !== stage) {
      this.stage = stage;
      this.lanes = stage.timeline.streams
        .map(([rank, stream, number]) => ({ rank, stream, events: stage.events(number) }))
        .sort((a, b) => a.rank - b.rank || (a.stream < b.stream) - (a.stream > b.stream));
      this.lanes.forEach((lane, i) => {
        const gaps = this.lanes.slice(0, i).filter((each, j) => each.rank !== this.lanes[j + 1].rank).length;
        lane.top = TOP + i * LANE + gaps * GAP;
      });
      this.end = Math.max(1, ...this.lanes.map(({ events }) => endOf(events.at(-1))));
      [this.from, this.span] = [0, this.end];
      this.tell(null);
      this.note.replaceChildren(...this.summary());
      this.table.replaceChildren(...this.longest());
    }
    this.draw();
  }

  summary() {
    const [compute, moving] = ["compute", "communication"].map((stream) => {
      const lane = this.lanes.find((each) => each.stream === stream);
      const events = (lane ? lane.events : []).filter((event) => event.kind !== "wait");
      return events.reduce((sum, event) => sum + event.duration, 0);
    });
    const share = (part) => `${timeText(part)} (${Math.round((100 * part) / this.end)} %)`;
    return [
      el("span", { class: "badge" }, `simulated: ${timeText(this.end)}`),
      el("span", { class: "badge" }, `rank 0 computes ${share(compute)}`),
      el("span", { class: "badge" }, `communicates ${share(moving)}`),
      el("span", { class: "swatch compute" }), " compute ",
      el("span", { class: "swatch axis-0" }), " collective, by axis",
    ];
  }

  /* What rank 0 spends its time on, by op. */
  longest() {
    const sums = new Map();
    for (const event of this.lanes.filter(({ rank }) => rank === 0).flatMap(({ events }) => events)) {
      const what = event.kind === "compute" ? shortOp(event.node.op) : event.kind;
      const sum = sums.get(what) || { what, count: 0, time: 0, longest: event };
      sum.count += 1;
      sum.time += event.duration;
      if (event.duration > sum.longest.duration) sum.longest = event;
      sums.set(what, sum);
    }
    const rows = [...sums.values()].sort((a, b) => b.time - a.time).slice(0, 12).map(({ what, count, time, longest }) =>
      el("tr", {}, el("td", {}, what), el("td", { class: "number" }, count.toLocaleString("en")),
        el("td", { class: "number" }, timeText(time)), el("td", { class: "number" }, `${((100 * time) / this.end).toFixed(1)} %`),
        el("td", {}, this.app.nodeLink(longest.node.name))),
    );
    const head = ["rank 0 spends", "events", "time", "of all", "longest"].map((text) => el("th", { scope: "col" }, text));
    return [el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows))];
  }

  get width() {
    return Math.max(200, this.scroller.clientWidth - LEFT - 12);
  }

  reset() {
    [this.from, this.span] = [0, this.end];
    this.draw();
  }

  zoom(factor, x) {
    const time = this.from + ((x - LEFT) / this.width) * this.span;
    const span = Math.min(this.end, Math.max(this.end / 1e4, this.span / factor));
    this.from = time - ((time - this.from) * span) / this.span;
    this.span = span;
    this.pan(0);
  }

  pan(pixels) {
    const from = this.from + (pixels / this.width) * this.span;
    this.from = Math.min(this.end - this.span, Math.max(0, from));
    this.draw();
  }

  x(time) {
    return LEFT + ((time - this.from) / this.span) * this.width;
  }

  hit(x, y) {
    const lane = this.lanes && this.lanes.find(({ top }) => top <= y && y < top + LANE);
    if (!lane || x < LEFT) return null;
    const slack = (2 / this.width) * this.span;
    const time = this.from + ((x - LEFT) / this.width) * this.span;
    const event = lane.events.find((each) => each.start - slack <= time && time <= endOf(each) + slack && (each.duration || each.kind === "wait"));
    return event ? { ...event, lane } : null;
  }

  tell(event) {
    const where = event && `rank ${event.lane.rank}, ${event.lane.stream}`;
    const received = event && event.received ? `, receives ${bytesText(event.received)}` : "";
    this.readout.textContent = event
      ? `${where}: ${event.node.name} (${event.kind}) from ${timeText(event.start)} for ${timeText(event.duration)}${received}, ${event.node.home}`
      : "Point at an event, or walk with the arrow keys. Ctrl and the wheel zoom, dragging pans.";
  }

  draw() {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [LEFT + this.width + 10, this.lanes.at(-1).top + LANE + 4];
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const style = getComputedStyle(this.canvas);
    const color = (name) => style.getPropertyValue(name).trim();
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = "11px system-ui, sans-serif";
    this.drawScale(context, color, height);
    for (const lane of this.lanes) {
      const y = lane.top;
      context.fillStyle = color("--text");
      context.fillText(`rank ${lane.rank} ${lane.stream === "compute" ? "compute" : "communicate"}`, 4, y + 14);
      context.save();
      context.beginPath();
      context.rect(LEFT, y, this.width, LANE);
      context.clip();
      this.drawn = -1;
      for (const event of lane.events) this.drawEvent(context, color, event, y);
      context.restore();
    }
  }

  drawScale(context, color, height) {
    const step = 10 ** Math.floor(Math.log10(this.span / 4));
    const nice = [1, 2, 5, 10].map((n) => n * step).find((n) => this.span / n <= 8) || step;
    for (let time = Math.ceil(this.from / nice) * nice; time <= this.from + this.span; time += nice) {
      context.fillStyle = color("--line");
      context.fillRect(this.x(time), TOP - 6, 1, height);
      context.fillStyle = color("--soft");
      if (this.x(time) < LEFT + this.width - 50) context.fillText(timeText(time), this.x(time) + 3, 13);
    }
  }

  drawEvent(context, color, event, y) {
    const x = this.x(event.start);
    const width = Math.max(0.8, this.x(endOf(event)) - x);
    if (x > LEFT + this.width || x + width < LEFT) return;
    const { collective } = event.node;
    const axis = collective ? this.app.program.axes.indexOf(collective.axes[0]) % 6 : -1;
    const chosen = event.node.name === this.app.state.node;
    // Of the short ops within one pixel, one is enough.
    if (axis < 0 && !chosen && width < 1 && Math.round(x) === this.drawn) return;
    this.drawn = Math.round(x);
    context.fillStyle = color(axis >= 0 ? `--axis-${axis}` : event.kind === "wait" ? "--line" : "--compute");
    context.fillRect(x, y + 3, width > 3 ? width - 1 : width, LANE - 6);
    if (chosen) {
      context.fillStyle = color("--focus");
      context.fillRect(x - 1, y, Math.max(3, width + 2), 3);
      context.fillRect(x - 1, y + LANE - 3, Math.max(3, width + 2), 3);
    }
    if (width > 40) {
      context.fillStyle = axis >= 0 ? color("--paper") : color("--text");
      context.fillText(clip(event.kind === "compute" ? shortOp(event.node.op) : event.kind, Math.floor(width / 7)), x + 4, y + 14);
    }
  }
}

function endOf(event) {
  return event ? event.start + event.duration : 0;
}
