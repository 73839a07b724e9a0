"use strict";
/* The run: its programs, stages and nodes, from the data of the page (see page_data.py).
   A stage is unpacked when it is first asked for, and kept. */

const INPUTS = "(inputs)";

async function loadRun(text) {
  const characters = atob(text.trim());
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < characters.length; i += 1) bytes[i] = characters.charCodeAt(i);
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = JSON.parse(await new Response(inflated).text());
  return {
    title: data.title,
    wrote: data.wrote,
    programs: data.programs
      .filter((entry) => entry.stages.length)
      .map((entry) => new Program(data, entry)),
  };
}

class Program {
  constructor(data, entry) {
    this.data = data;
    this.id = entry.id;
    this.mesh = entry.mesh;
    this.axes = Object.keys(entry.mesh);
    this.inputs = entry.inputs;
    this.entries = entry.stages;
    this.passes = entry.stages.map((stage) => stage.pass);
    this.built = [];
    this.modules = this.modulePaths();
  }

  get last() {
    return this.entries.length - 1;
  }

  /* All module paths of the program, and those above them. */
  modulePaths() {
    const column = this.data.fields.indexOf("module");
    const numbers = new Set();
    for (const { rows } of this.entries) {
      for (const row of rows) numbers.add(this.data.records[row][column] || 0);
    }
    const paths = new Set();
    for (const number of numbers) {
      let path = this.data.values[number];
      while (path && !paths.has(path)) {
        paths.add(path);
        path = parentPath(path);
      }
    }
    return paths;
  }

  stage(number) {
    if (!this.built[number]) this.built[number] = new Stage(this, number);
    return this.built[number];
  }

  /* Numbers of the stages that have a node of this name. */
  stagesWith(name) {
    return this.passes.map((_, i) => i).filter((i) => this.stage(i).nodes.has(name));
  }

  /* Where a node is shown: its module; a weight where it belongs. */
  home(node) {
    if (node.op !== "input") return node.module || "";
    let path = parentPath(node.weight);
    while (path && !this.modules.has(path)) path = parentPath(path);
    return path || INPUTS;
  }
}

function parentPath(path) {
  const dot = path.lastIndexOf(".");
  return dot < 0 ? "" : path.slice(0, dot);
}

class Stage {
  constructor(program, number) {
    const { fields, values, records } = program.data;
    const entry = program.entries[number];
    this.program = program;
    this.number = number;
    this.pass = entry.pass;
    this.timeline = entry.timeline;
    this.nodes = new Map();
    this.order = entry.rows.map((row, index) => {
      const node = { row, index, users: [] };
      const record = records[row];
      fields.forEach((field, column) => {
        node[field] = values[record[column] || 0];
      });
      node.kinds = node.kinds || [];
      node.operands = node.operands || [];
      node.weight = node.op === "input" ? program.inputs[node.name] || node.name : "";
      node.home = program.home(node);
      this.nodes.set(node.name, node);
      return node;
    });
    for (const node of this.order) {
      for (const name of node.operands) this.nodes.get(name).users.push(node.name);
    }
    this.outputs = new Set(entry.outputs);
    this.collectives = this.order.filter((node) => node.collective);
    this.bytes = this.collectives.reduce((sum, node) => sum + node.collective.bytes, 0);
  }

  /* One stream of one rank: its events as objects. */
  events(number) {
    const flat = this.program.data.values[number] || [];
    const found = [];
    for (let i = 0; i < flat.length; i += 5) {
      found.push({
        node: this.order[flat[i]],
        start: flat[i + 1],
        duration: flat[i + 2],
        kind: this.timeline.kinds[flat[i + 3]],
        received: flat[i + 4],
      });
    }
    return found;
  }
}
