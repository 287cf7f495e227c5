// The model: stages in order with what flows between them; modules open on demand, down to ops.

// Never more blocks and ops than this at once: what was opened first is closed again.
const MOST_AT_ONCE = 1000;
const STAGES_AT_ONCE = 40;
const BLOCKS_AT_ONCE = 25;
const OPS_AT_ONCE = 100;
const MOST_FOUND = 100;

function modelSection(plan, detail) {
  const found = make("div", { id: "found", "aria-live": "polite" });
  const list = make("div", { id: "stages" });
  const flow = make("div", { class: "flow" }, list);
  const model = { plan, detail, open: [], wrapped: new Map(), flow };
  model.stages = pager(list, plan.stages.map((stage) => () => stageBox(model, stage)), STAGES_AT_ONCE, "stages");
  const search = make("input", {
    type: "search", id: "search", placeholder: "part of a name", autocomplete: "off", spellcheck: "false",
    oninput: (event) => showFound(model, event.target.value, found),
  });
  const close = make("button", { type: "button", onclick: () => [...model.open].forEach((box) => closeBlock(model, box)) }, "Close all");
  section("model", "Model",
    make("p", { class: "small dim" }, `${plural(plan.units.length, "unit")} in ${plural(plan.stages.length, "stage")}. Neighbours that are alike but for a number are one block with a count; a block opens into its modules${detail ? " and their operations" : ""}. Between stages stands what crosses.`),
    make("div", { class: "tools" }, make("label", { for: "search" }, "Search modules"), search, close),
    DATA.left_out_ops ? make("p", { class: "small" }, `${DATA.left_out_ops} operations are not in this page, which would be too large with them.`) : null,
    found, flow, model.stages.button);
  skipArcs(model);
}

// Adds makers' elements in portions, so that a page never builds more than it shows.
function pager(host, makers, portion, noun) {
  let next = 0;
  const button = make("button", { type: "button", onclick: () => grow(next + portion) });
  function grow(until) {
    host.append(...makers.slice(next, until).map((maker) => maker()));
    next = Math.max(next, Math.min(makers.length, until));
    button.textContent = `Show more ${noun} (${makers.length - next} left)`;
    button.hidden = next >= makers.length;
  }
  grow(portion);
  return { button, upTo: (index) => index >= next && grow(index + 1) };
}

function stageBox(model, stage) {
  const { plan } = model;
  const kinds = [...new Set(stage.ranks.map((rank) => plan.devices[rank].kind))].join(", ");
  const head = paint(make("div", { class: "head" },
    make("b", {}, stageTitle(plan, stage)), make("span", {}, `${staffText(plan, stage)} (${kinds})`),
    make("span", {}, `${plural(stage.last - stage.first, "unit")}, ${bytes(stage.weight_bytes)}`),
    ...tags(unusual(plan, stage)), whyLink(plan, stage)), stageLook(stage.index), stage.precision);
  const blocks = blocksOf(model, stage.modules, null, stage);
  const box = make("div", { class: "stage", id: `stage-${stage.index}` }, head, blocks.host, blocks.more.button);
  model.wrapped.set(stage.index, { stage, ...blocks });
  return make("div", { class: "step" }, box, wireList(plan, stage));
}

// What needs saying: float32 only where other stages compute in something else.
function unusual(plan, stage) {
  return stageOptions(stage).filter((text) => text !== "float32" || formatsOf(plan).length > 1);
}

function stageTitle(plan, stage) {
  return `stage ${stage.index}${plan.pipelines.length > 1 ? `, pipeline ${stage.pipeline}` : ""}`;
}

function blocksOf(model, modules, parent, stage) {
  const host = make("div", { class: "blocks" });
  const boxes = new Map();
  const makers = modules.map((module, index) => () => {
    const box = blockBox(model, module, parent, stage);
    boxes.set(index, box);
    return box;
  });
  const more = pager(host, makers, BLOCKS_AT_ONCE, "blocks");
  return { host, more, modules, boxes };
}

function blockBox(model, module, parent, stage) {
  const kind = model.detail ? model.detail.kinds[model.detail.kind_of[module.first]] : null;
  const opens = module.children.length > 0 || (kind && kind.length > 0);
  const button = make("button", { type: "button", class: "name" }, make("span", {}, brief(module.label, 160)));
  if (module.count > 1) button.append(make("b", {}, `×${module.count}`));
  const box = make("div", { class: opens ? "block" : "block leaf" }, button);
  Object.assign(box, { parent, module, stage });
  const format = formatOf(stage, module.first, module.last);
  if (hatchOf(format)) button.classList.add(hatchOf(format));
  if (stage.unit_formats.length) button.append(make("span", { class: "tag" }, format));
  if (opens) {
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => (box.inner ? closeBlock(model, box) : openBlock(model, box)));
  }
  return box;
}

function openBlock(model, box) {
  if (box.inner) return;
  const { module } = box;
  const leaf = module.children.length === 0;
  const inner = leaf ? opsOf(model, module.first) : blocksOf(model, module.children, box, box.stage);
  box.inner = inner;
  box.append(inner.host, inner.more.button);
  box.classList.add("open");
  box.firstChild.setAttribute("aria-expanded", "true");
  model.open.push(box);
  keepSmall(model, box);
}

function closeBlock(model, box) {
  if (!box.inner) return;
  model.open.filter((other) => other !== box && box.contains(other)).forEach((other) => closeBlock(model, other));
  box.inner.host.remove();
  box.inner.more.button.remove();
  box.inner = null;
  box.classList.remove("open");
  box.firstChild.setAttribute("aria-expanded", "false");
  model.open = model.open.filter((other) => other !== box);
}

function keepSmall(model, newest) {
  const drawn = () => model.flow.querySelectorAll(".block, .ops tbody tr").length;
  while (drawn() > MOST_AT_ONCE) {
    const oldest = model.open.find((box) => !box.contains(newest));
    if (!oldest) return;
    closeBlock(model, oldest);
  }
}

// The operations of a unit; units that are alike but for their weights share one list.
function opsOf(model, unit) {
  const rows = model.detail.kinds[model.detail.kind_of[unit]];
  const body = make("tbody", {});
  const head = make("thead", {}, make("tr", {}, ...["operation", "result", "reads", "from"].map((name) => make("th", { scope: "col" }, name))));
  const makers = rows.map(([name, target, result, reads, from]) => () => make("tr", {},
    make("td", {}, make("code", {}, target), make("div", { class: "dim tiny" }, `%${brief(name, 60)}`)),
    make("td", {}, result), make("td", {}, brief(reads, 90)), make("td", {}, brief(from, 90))));
  const more = pager(body, makers, OPS_AT_ONCE, "operations");
  const first = model.detail.kind_of.indexOf(model.detail.kind_of[unit]);
  const note = first === unit ? null : make("p", { class: "tiny dim" }, `named as in ${brief(model.plan.units[first], 60)}, which is alike`);
  return { host: make("div", { class: "scroll-x blocks" }, note ?? "", make("table", { class: "ops" }, head, body)), more };
}

// Opens all that stands around a unit, and brings it into sight.
function reveal(model, stage, unit) {
  model.stages.upTo(stage.index);
  let level = model.wrapped.get(stage.index);
  let box = null;
  while (level && level.modules) {
    const index = level.modules.findIndex((module) => module.first <= unit && unit < module.last);
    if (index < 0) break;
    level.more.upTo(index);
    box = level.boxes.get(index);
    if (!box.module.children.length) break;
    openBlock(model, box);
    level = box.inner;
  }
  model.flow.querySelectorAll(".found").forEach((other) => other.classList.remove("found"));
  if (!box) return;
  box.classList.add("found");
  box.scrollIntoView({ block: "center" });
  box.firstChild.focus({ preventScroll: true });
}

function showFound(model, text, host) {
  const { plan } = model;
  const wanted = text.trim().toLowerCase();
  host.replaceChildren();
  if (!wanted) return;
  const hits = [];
  plan.units.forEach((name, unit) => {
    if (name.toLowerCase().includes(wanted)) hits.push(unit);
  });
  const rows = hits.slice(0, MOST_FOUND).map((unit) => {
    const stages = plan.stages.filter((stage) => stage.first <= unit && unit < stage.last);
    const go = stages.length
      ? make("button", { type: "button", class: "go", onclick: () => reveal(model, stages[0], unit) }, brief(plan.units[unit])) : plan.units[unit];
    return [unit, go, stages.slice(0, 8).map((stage) => stage.index).join(", ") + (stages.length > 8 ? " …" : ""),
      stages.slice(0, 4).map((stage) => staffText(plan, stage)).join("; ")];
  });
  host.append(make("p", {}, `${plural(hits.length, "unit")} found${hits.length > MOST_FOUND ? `, the first ${MOST_FOUND} shown` : ""}`));
  if (rows.length) host.append(table([["unit", "number"], ["name", "name"], ["stage", ""], ["devices", "name"]], rows));
}

// --- what crosses between stages ---

function wireList(plan, stage) {
  const edges = plan.edges.filter((edge) => edge.source === stage.index);
  const next = plan.stages[stage.index + 1];
  const end = !next || next.pipeline !== stage.pipeline;
  return make("ul", { class: end ? "wire end" : "wire" }, ...edges.map((edge) => make("li", {}, ...edgeText(plan, edge))));
}

function edgeText(plan, edge) {
  const amount = (perSample, fixed) => [perSample || !fixed ? `${bytes(perSample)} a sample` : "",
    fixed ? `${bytes(fixed)} a microbatch` : ""].filter(Boolean).join(" + ");
  const ahead = amount(edge.forward_bytes_per_sample, edge.forward_fixed_bytes);
  const back = edge.backward_bytes_per_sample || edge.backward_fixed_bytes
    ? `, ${amount(edge.backward_bytes_per_sample, edge.backward_fixed_bytes)} back` : "";
  const skips = edge.target > edge.source + 1;
  return [skips ? `skips to stage ${edge.target}: ` : `to stage ${edge.target}: `, make("b", {}, ahead), `${back}; `
    + `${brief(edge.source_device, 40)} – ${brief(edge.target_device, 40)}, ${rate(edge.bytes_per_s, "B")}, ${seconds(edge.latency_s)}`];
}

// Edges that skip stages are arcs beside the stages; arcs that would lie on each other stand apart.
function skipArcs(model) {
  const skips = model.plan.edges.filter((edge) => edge.target > edge.source + 1);
  if (!skips.length) return;
  model.flow.classList.add("skips");
  const picture = shape("svg", { "aria-hidden": "true" });
  model.flow.append(picture);
  const draw = () => drawArcs(model, skips, picture);
  new ResizeObserver(draw).observe(model.flow);
  draw();
}

function drawArcs(model, skips, picture) {
  const base = model.flow.getBoundingClientRect();
  const width = picture.getBoundingClientRect().width;
  const place = (index) => {
    const box = document.getElementById(`stage-${index}`);
    return box ? box.getBoundingClientRect() : null;
  };
  const free = [];
  const shapes = [];
  for (const edge of [...skips].sort((a, b) => a.source - b.source || a.target - b.target)) {
    const [from, to] = [place(edge.source), place(edge.target)];
    if (!from || !to) continue;
    let lane = free.findIndex((until) => until <= edge.source);
    if (lane < 0) lane = free.length;
    free[lane] = edge.target;
    const [top, end] = [from.bottom - base.top - 16, to.top - base.top + 18];
    const reach = Math.min(width - 6, 18 + 15 * lane);
    const heavy = Math.max(1.5, Math.min(4, Math.log2(edge.forward_bytes_per_sample + 2) / 6));
    shapes.push(shape("path", { d: `M0 ${top}H${reach - 9}q9 0 9 9V${end - 9}q0 9 -9 9H7`, "stroke-width": heavy }),
      shape("path", { class: "head", d: `M0 ${end}l9 -5v10z` }),
      shape("text", { x: reach + 5, y: (top + end) / 2 }, bytes(edge.forward_bytes_per_sample || edge.forward_fixed_bytes)));
  }
  picture.setAttribute("height", String(model.flow.clientHeight));
  picture.replaceChildren(...shapes);
}
