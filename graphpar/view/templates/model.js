// The model: stages in order, repeated blocks folded, opened on demand; cut edges below each stage.

// Together these keep what is built at once below a thousand blocks.
const STAGES_AT_ONCE = 40;
const BLOCKS_AT_ONCE = 25;
const UNITS_AT_ONCE = 200;
const MOST_FOUND = 100;

function modelSection(plan) {
  const found = make("div", { id: "found", "aria-live": "polite" });
  const search = make("input", {
    type: "search", id: "search", placeholder: "name of a module", autocomplete: "off", spellcheck: "false",
    oninput: (event) => showFound(plan, event.target.value, found),
  });
  const stages = make("div", { id: "stages" });
  const shown = pager(stages, plan.stages.map((stage) => () => stageBox(plan, stage)), STAGES_AT_ONCE, "stages");
  section("model", "Model",
    make("p", { class: "small dim" }, `${plural(plan.units.length, "unit")} in ${plural(plan.stages.length, "stage")}; alike neighbours are one block with a count. Open a block to see its units.`),
    make("div", { class: "tools" }, make("label", { for: "search" }, "Search"), search),
    found, stages, shown);
}

// Adds makers' elements in portions, so that a page never builds more than it shows.
function pager(host, makers, portion, noun) {
  let next = 0;
  const button = make("button", { type: "button", onclick: () => grow() });
  function grow() {
    host.append(...makers.slice(next, next + portion).map((maker) => maker()));
    next = Math.min(makers.length, next + portion);
    button.textContent = `Show more ${noun} (${makers.length - next} left)`;
    button.hidden = next >= makers.length;
  }
  grow();
  return button;
}

function stageBox(plan, stage) {
  const look = stageLook(stage.index);
  const kinds = [...new Set(stage.ranks.map((rank) => plan.devices[rank].kind))].join(", ");
  const head = paint(make("div", { class: "head" },
    make("b", {}, stageTitle(plan, stage)), make("span", {}, `${deviceText(plan, stage.ranks)} (${kinds})`),
    make("span", {}, `${plural(stage.last - stage.first, "unit")}, ${bytes(stage.weight_bytes)}`)), look);
  const blocks = make("div", { class: "blocks" });
  const makers = stage.blocks.map((block) => () => blockBox(plan, block));
  const more = pager(blocks, makers, BLOCKS_AT_ONCE, "blocks");
  const edges = plan.edges.filter((edge) => edge.source === stage.index);
  return make("div", { class: "stage", id: `stage-${stage.index}` }, head,
    blocks, more,
    edges.length ? make("ul", { class: "edges" }, ...edges.map((edge) => make("li", {}, edgeText(edge)))) : null);
}

function stageTitle(plan, stage) {
  return `stage ${stage.index}${plan.pipelines.length > 1 ? `, pipeline ${stage.pipeline}` : ""}`;
}

function blockBox(plan, block) {
  const label = make("summary", {}, block.label);
  if (block.count > 1) label.append(" ", make("b", {}, `×${block.count}`));
  const box = make("details", { class: "block" }, label);
  box.addEventListener("toggle", () => {
    if (!box.open || box.childElementCount > 1) return;
    const list = make("ol", { start: block.first });
    const makers = plan.units.slice(block.first, block.last).map((name) => () => make("li", {}, name));
    const more = pager(list, makers, UNITS_AT_ONCE, "units");
    box.append(list, more);
  });
  return box;
}

function edgeText(edge) {
  const amount = (perSample, fixed) => `${bytes(perSample)} per sample${fixed ? ` + ${bytes(fixed)}` : ""}`;
  const back = edge.backward_bytes_per_sample || edge.backward_fixed_bytes
    ? `, ${amount(edge.backward_bytes_per_sample, edge.backward_fixed_bytes)} back` : "";
  const skip = edge.target > edge.source + 1 ? " (skips stages)" : "";
  return `to stage ${edge.target}${skip}: ${amount(edge.forward_bytes_per_sample, edge.forward_fixed_bytes)} forward${back}; `
    + `slowest link ${edge.source_device} – ${edge.target_device}, ${rate(edge.bytes_per_s, "B")}, ${seconds(edge.latency_s)}`;
}

function showFound(plan, text, host) {
  const wanted = text.trim().toLowerCase();
  host.replaceChildren();
  if (!wanted) return;
  const hits = [];
  plan.units.forEach((name, unit) => {
    if (name.toLowerCase().includes(wanted)) hits.push(unit);
  });
  const rows = hits.slice(0, MOST_FOUND).map((unit) => {
    const stages = plan.stages.filter((stage) => stage.first <= unit && unit < stage.last);
    return [unit, plan.units[unit], stages.map((stage) => stage.index).join(", "),
      stages.map((stage) => deviceText(plan, stage.ranks)).join("; ")];
  });
  host.append(make("p", {}, `${plural(hits.length, "unit")} found${hits.length > MOST_FOUND ? `, the first ${MOST_FOUND} shown` : ""}`));
  if (rows.length) host.append(table([["unit", "number"], ["name", "name"], ["stage", ""], ["devices", "name"]], rows));
}
