// Overview: the numbers that matter, the cluster with its links, the table of stages.

const MOST_CHIPS = 2048;
const DENSE_CHIPS = 256;

function overview(plan) {
  const device = plan.devices[plan.bottleneck];
  const certificate = plan.certificate;
  const tiles = [
    ["predicted step", seconds(plan.step_s), plan.step_s > 0 ? rate(plan.batch / plan.step_s, "sample") : ""],
    plan.measured && ["measured step", seconds(plan.measured.step_s), measuredNote(plan)],
    ["bottleneck", device.name, `stage ${device.stage}, busy ${percent(device.busy_share)}`],
    ["certificate", `gap ${percent(certificate.gap)}`, certificate.status],
    ["devices", `${plan.num_ranks} of ${plan.devices.length}`, "have work"],
    ["stages", String(plan.stages.length), plural(plan.pipelines.length, "pipeline")],
  ].filter(Boolean);
  const shares = [
    { share: plan.shares.compute, fill: PALETTE.actions.F.fill, label: `compute ${percent(plan.shares.compute)}` },
    { share: plan.shares.gradients, fill: PALETTE.actions.A.fill, label: `gradient sums ${percent(plan.shares.gradients)}` },
    { share: plan.shares.waiting, fill: "#b0b0b0", label: `waiting ${percent(plan.shares.waiting)}` },
  ];
  section("overview", "Overview",
    make("div", { class: "tiles" }, ...tiles.map(tile)),
    make("h3", {}, "Where the devices' time goes"),
    segments(shares),
    legend(shares.map((s) => [s.fill, s.label])),
    make("h3", {}, "Cluster"), ...cluster(plan),
    make("h3", {}, "Stages"), stageTable(plan));
}

function tile([name, value, more]) {
  const look = value.length > 14 ? "long" : null;
  return make("div", { class: "tile" }, make("span", { class: "dim" }, name),
    make("b", { class: look, title: value }, brief(value, 40)), make("span", { class: "dim small" }, more));
}

function measuredNote(plan) {
  if (plan.measured.stopped.length) return "the run failed before its end";
  if (!plan.measured.planned_batch) return "of another batch than planned";
  const off = plan.measured.step_s / plan.step_s - 1;
  return `${percent(Math.abs(off))} ${off >= 0 ? "longer" : "shorter"} than predicted`;
}

function cluster(plan) {
  const byNode = new Map(plan.nodes.map((node) => [node.name, []]));
  plan.devices.forEach((device, index) => byNode.get(device.node)?.push([device, index]));
  let room = MOST_CHIPS;
  const boxes = [];
  for (const node of plan.nodes) {
    const members = byNode.get(node.name);
    room -= members.length;
    if (room < 0) break;
    const kinds = node.kinds.map(([kind, count]) => `${count} ${kind}`).join(", ");
    boxes.push(make("div", { class: node.used ? "node" : "node idle" },
      make("span", { title: node.name }, node.name || "(one node)"),
      make("div", { class: "chips" }, ...members.map(([device]) => chip(device))),
      make("span", { title: kinds }, kinds)));
  }
  const more = plan.nodes.length - boxes.length;
  return [
    make("p", { class: "small dim" }, "Each square is a device; its colour, and the text under the pointer, tell its stage; a dashed one has no work."),
    make("div", { class: plan.devices.length > DENSE_CHIPS ? "nodes dense" : "nodes" }, ...boxes),
    more ? make("p", {}, `and ${plural(more, "more node")}`) : null,
    linkList(plan),
  ].filter(Boolean);
}

function chip(device) {
  const idle = device.stage === null;
  const text = idle ? "–" : String(device.stage);
  const title = `${device.name}, ${device.kind}, ${idle ? "without work" : `stage ${device.stage}`}`;
  const box = make("span", { class: idle ? "chip idle" : "chip", title }, text);
  return idle ? box : paint(box, stageLook(device.stage));
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
  const where = ({ place, pairs }) => place === "network" ? "between all other nodes"
    : `${place} ${pairs.slice(0, 3).join(", ")}${pairs.length > 3 ? ` and ${pairs.length - 3} more` : ""}`;
  return make("ul", { class: "small", id: "links" }, ...[...groups.values()].map((group) => make("li", {},
    `${where(group)}: ${rate(group.link.bytes_per_s, "B")}, ${seconds(group.link.latency_s)}`)));
}

function stageTable(plan) {
  const head = [["stage", "number"], ["devices", "name"], ["units", "name"], ["weights", "number"],
    ["forward", "number"], ["backward", "number"], ["messages", "number"], ["busy", "number"], ["peak memory", "number"]];
  const rows = alikeRanks(plan).map((ranks) => {
    const device = plan.devices[ranks[0]];
    const stage = plan.stages[device.stage];
    const key = paint(make("span", { class: "key" }), stageLook(stage.index));
    const full = device.capacity_bytes ? ` (${(100 * device.peak_bytes / device.capacity_bytes).toFixed(0)} %)` : "";
    return [make("span", {}, key, String(stage.index)), `${deviceText(plan, ranks)} (${device.kind})`,
      stage.blocks.map(blockText).slice(0, 4).join(", ") + (stage.blocks.length > 4 ? " …" : ""),
      bytes(stage.weight_bytes), seconds(device.forward_s), seconds(device.backward_s),
      seconds(device.comm_s), make("span", {}, percent(device.busy_share), meter(device.busy_share)),
      bytes(device.peak_bytes) + full];
  });
  return table(head, rows);
}

function blockText(block) {
  return block.count > 1 ? `${block.label} ×${block.count}` : block.label;
}
