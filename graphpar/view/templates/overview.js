// Overview: the numbers that matter, who runs what, the cluster with its links, the table of stages.

const MOST_CHIPS = 2048;
const DENSE_CHIPS = 160;
const MOST_RIBBONS = 6;
const MOST_ROWS = 400;

function overview(plan) {
  section("overview", "Overview", failureBanner(plan), ...differenceBanner(plan),
    make("div", { class: "tiles" }, ...tiles(plan).map(tile)),
    ...differences(plan),
    make("h3", {}, "Where the devices' time goes"), ...shareBar(plan),
    make("h3", {}, "Who runs what"), ...ribbons(plan),
    make("h3", {}, "Cluster"), ...cluster(plan),
    make("h3", {}, "Stages"), stageTable(plan));
}

function failureBanner(plan) {
  if (!plan.measured || !plan.measured.stopped.length) return null;
  return make("p", { class: "alert banner", id: "failed" }, `The measured step did not finish: ${plan.measured.note}.`);
}

// Where the measured step is off its prediction: by how much, and why, likely.
function differenceBanner(plan) {
  const found = plan.comparison;
  if (!found || !found.off) return [];
  const step = `The measured step took ${seconds(plan.measured.step_s)}, ${measuredNote(plan)}.`;
  const reasons = found.reasons.length ? found.reasons.map((reason) => `Likely: ${reason}.`) : ["Nothing in its parts tells why."];
  return [make("div", { class: "alert banner", id: "differs", role: "status" },
    ...[step, ...reasons].map((text) => make("p", {}, text)))];
}

function differences(plan) {
  const found = plan.comparison;
  if (!found) return [];
  const reduces = found.devices.some((d) => d.predicted_reduce_s > 0 || d.reduce_s > 0);
  const head = [["device", "name"], ["computes", "number"], ["waits for messages", "number"],
    ...(reduces ? [["sums of gradients", "number"]] : []), ["peak memory", "number"]];
  const rows = found.devices.slice(0, MOST_ROWS).map((d) => [d.device,
    beside(d.compute_s, d.predicted_compute_s, seconds, found.tolerance),
    beside(d.wait_s, d.predicted_wait_s, seconds, Infinity),
    ...(reduces ? [beside(d.reduce_s, d.predicted_reduce_s, seconds, Infinity)] : []),
    beside(d.peak_bytes, d.predicted_peak_bytes, bytes, found.tolerance)]);
  const shown = table(head, rows);
  shown.id = "differences";
  const more = found.devices.length - rows.length;
  if (more > 0) shown.append(make("p", {}, `and ${more} more`));
  return [make("h3", {}, "Measured against predicted"), shown];
}

// A measured value, what was predicted, and how far apart they are; marked beyond the tolerance.
function beside(measured, predicted, unit, tolerance) {
  const off = predicted > 0 ? measured / predicted - 1 : 0;
  const sign = off > 0 ? "+" : "";
  const told = predicted > 0 ? ` of ${unit(predicted)} (${sign}${(100 * off).toFixed(0)} %)` : ` of ${unit(predicted)}`;
  return make("span", { class: Math.abs(off) > tolerance ? "alert" : null }, unit(measured) + told);
}

function tiles(plan) {
  const device = plan.devices[plan.bottleneck];
  const certificate = plan.certificate;
  return [
    ["predicted step", seconds(plan.step_s), plan.step_s > 0 ? rate(plan.batch / plan.step_s, "sample") : ""],
    plan.measured && ["measured step", seconds(plan.measured.step_s), measuredNote(plan)],
    ["bottleneck", device.name, `${stageWords(device)}, busy ${percent(device.busy_share)}`],
    ["proven gap", percent(certificate.gap), certificate.status],
    ["devices with work", `${plan.num_ranks} of ${plan.devices.length}`, plural(plan.nodes.length, "node")],
    ["stages", String(plan.stages.length), plural(plan.pipelines.length, "pipeline")],
  ].filter(Boolean);
}

function tile([name, value, more]) {
  const look = value.length > 12 ? "long" : null;
  return make("div", { class: "tile" }, make("span", { class: "dim small" }, name),
    make("b", { class: look, title: value }, brief(value, 40)), make("span", { class: "dim small" }, more));
}

function measuredNote(plan) {
  if (plan.measured.stopped.length) return "until the run failed";
  if (!plan.measured.planned_batch) return "of another batch than planned";
  const off = plan.measured.step_s / plan.step_s - 1;
  return `${percent(Math.abs(off))} ${off >= 0 ? "longer" : "shorter"} than predicted`;
}

function shareBar(plan) {
  const shares = [
    ["compute", plan.shares.compute, PALETTE.actions.F.fill],
    ["communication", plan.shares.communication, PALETTE.actions.S.fill],
    ["gradient sums", plan.shares.gradients, PALETTE.actions.A.fill],
    ["bubbles", plan.shares.bubble, "#b0b7bf"],
  ].map(([name, share, fill]) => ({ share, fill, label: `${name} ${percent(share)}` }));
  return [segments(shares), legend(shares.map((s) => [s.fill, s.label]))];
}

function formatsOf(plan) {
  return [...new Set(plan.stages.flatMap((stage) => (stage.unit_formats.length ? stage.unit_formats : [stage.precision])))];
}

// One ribbon per pipeline: stages in order, as wide as they have units.
function ribbons(plan) {
  const byPipeline = plan.pipelines.map((_, number) => plan.stages.filter((stage) => stage.pipeline === number));
  const drawn = byPipeline.slice(0, MOST_RIBBONS).map((stages, number) => {
    const thin = stages.length > 12 ? "ribbon thin" : "ribbon";
    const row = make("div", { class: thin }, ...stages.map((stage) => ribbonStage(plan, stage)));
    const share = plan.pipelines.length > 1
      ? make("p", { class: "tiny dim" }, `pipeline ${number}: ${plural(plan.pipelines[number].samples, "sample")} in ${plural(plan.pipelines[number].sizes.length, "microbatch").replace("batchs", "batches")}`) : null;
    return make("div", {}, share, row);
  });
  const hidden = byPipeline.length - drawn.length;
  return [
    make("p", { class: "small dim" }, `A box is a stage, as wide as it has units; its colour is used for its devices everywhere.`),
    hatchLegend(plan),
    ...drawn, hidden > 0 ? make("p", { class: "small" }, `and ${plural(hidden, "more pipeline")}`) : null].filter(Boolean);
}

// Number formats by their hatching; nothing where all is float32.
function hatchLegend(plan) {
  const formats = formatsOf(plan);
  if (!formats.some(hatchOf)) return null;
  return make("div", { class: "legend", id: "formats" }, ...formats.map((name) =>
    make("span", {}, paint(make("i", {}), PALETTE.stages[4], name), name)));
}

function ribbonStage(plan, stage) {
  const kinds = [...new Set(stage.ranks.map((rank) => plan.devices[rank].kind))].join(", ");
  const options = stageOptions(stage).filter((text) => text !== "float32").join(", ");
  const told = `stage ${stage.index}: ${staffText(plan, stage, 4)} (${kinds}), ${plural(stage.last - stage.first, "unit")}${options ? `, ${options}` : ""}`;
  const box = make("a", { href: `#stage-${stage.index}`, title: told, "aria-label": told },
    make("b", {}, String(stage.index)), make("span", {}, staffText(plan, stage, 1)), make("span", {}, options || kinds));
  box.style.flex = `${stage.last - stage.first} 1 0`;
  return paint(box, stageLook(stage.index), stage.precision);
}

function cluster(plan) {
  const byNode = new Map(plan.nodes.map((node) => [node.name, []]));
  plan.devices.forEach((device) => byNode.get(device.node)?.push(device));
  let room = MOST_CHIPS;
  const boxes = [];
  for (const node of plan.nodes) {
    const members = byNode.get(node.name);
    room -= members.length;
    if (room < 0) break;
    boxes.push(nodeBox(plan, node, members));
  }
  const more = plan.nodes.length - boxes.length;
  const look = plan.devices.length > DENSE_CHIPS ? "nodes dense" : plan.nodes.length < 2 ? "nodes alone" : "nodes";
  return [
    make("p", { class: "small dim" }, `A square is a device with the number of its stage${plan.devices.length > plan.num_ranks ? "; a dashed one has no work" : ""}.`),
    make("div", { class: look }, ...boxes),
    more ? make("p", {}, `and ${plural(more, "more node")}`) : null,
    linkList(plan),
  ].filter(Boolean);
}

function nodeBox(plan, node, members) {
  const kinds = node.kinds.map(([kind, count]) => `${count} × ${kind}`).join(", ");
  const inside = plan.links.find((link) => link.node && link.node === node.name && link.other === node.name);
  const wire = inside && members.length > 1 ? `inside ${rate(inside.bytes_per_s, "B")}, ${seconds(inside.latency_s)}` : null;
  return make("div", { class: "place" }, make("div", { class: node.used ? "node" : "node idle" },
    make("b", { title: node.name }, node.name || "(one node)"),
    make("div", { class: "chips" }, ...members.map((device) => chip(plan, device))),
    make("span", { class: "cut", title: kinds }, kinds), wire ? make("span", {}, wire) : null));
}

function chip(plan, device) {
  const idle = device.stages.length === 0;
  const text = idle ? "–" : device.stages.join(", ");
  const title = `${device.name}, ${device.kind}, ${idle ? "without work" : stageWords(device)}`;
  const box = make("span", { class: idle ? "chip idle" : "chip", title }, text);
  return idle ? box : paint(box, stageLook(device.stages[0]), plan.stages[device.stages[0]].precision);
}

function linkList(plan) {
  const groups = new Map();
  for (const link of plan.links) {
    if (!link.node && plan.nodes.length < 2) continue;
    const place = !link.node ? "network" : link.node === link.other ? "inside" : "between";
    const key = `${place} ${link.bytes_per_s} ${link.latency_s}`;
    if (!groups.has(key)) groups.set(key, { place, link, pairs: [] });
    groups.get(key).pairs.push(link.node === link.other ? link.node : `${link.node} – ${link.other}`);
  }
  const where = ({ place, pairs }) => place === "network" ? "between nodes"
    : `${place} ${pairs.slice(0, 3).join(", ")}${pairs.length > 3 ? ` and ${pairs.length - 3} more` : ""}`;
  const told = [...groups.values()].filter((group) => group.place !== "inside" || plan.devices.length > DENSE_CHIPS);
  return make("ul", { class: "small", id: "links" }, ...told.map((group) => make("li", {},
    `${where(group)}: ${rate(group.link.bytes_per_s, "B")}, ${seconds(group.link.latency_s)}`)));
}

function stageTable(plan) {
  const optional = plan.stages.some((stage) => stageOptions(stage).join() !== "float32");
  const head = [["stage", "number"], ["devices", "name"], ["kind", "kind"], ["units", "name"], ...(optional ? [["computes in", ""]] : []),
    ["weights", "number"], ["forward", "number"], ...(plan.training ? [["backward", "number"]] : []),
    ["messages", "number"], ["busy", "number"], ["peak memory", "number"]];
  const groups = alikeRanks(plan);
  const rows = groups.slice(0, MOST_ROWS).map((ranks) => {
    const device = plan.devices[ranks[0]];
    const stages = device.stages.map((number) => plan.stages[number]);
    const [stage] = stages;
    const blocks = stages.flatMap((each) => each.blocks);
    const key = paint(make("span", { class: "key" }), stageLook(stage.index), stage.precision);
    const full = device.capacity_bytes ? ` (${(100 * device.peak_bytes / device.capacity_bytes).toFixed(0)} %)` : "";
    const share = device.share < 1 ? ` (tensor group, ${percent(device.share)} each)` : "";
    return [make("span", {}, key, device.stages.join(", ")), `${deviceText(plan, ranks)}${share}`, device.kind,
      blocks.slice(0, 4).map((block) => brief(blockText(block), 70)).join(", ") + (blocks.length > 4 ? " …" : ""),
      ...(optional ? [stageOptions(stage).join(", ")] : []),
      bytes(stages.reduce((sum, each) => sum + each.weight_bytes, 0)), seconds(device.forward_s), ...(plan.training ? [seconds(device.backward_s)] : []),
      seconds(device.comm_s), make("span", {}, percent(device.busy_share), meter(device.busy_share)),
      bytes(device.peak_bytes) + full];
  });
  const shown = table(head, rows);
  if (groups.length > rows.length) shown.append(make("p", {}, `and ${groups.length - rows.length} more`));
  return shown;
}

function blockText(block) {
  return block.count > 1 ? `${block.label} ×${block.count}` : block.label;
}
