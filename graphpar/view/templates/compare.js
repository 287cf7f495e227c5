// Two plans side by side: what differs, what moved, who holds how much, both timelines on one scale.

const MOST_MOVES = 200;
const MOST_PEAKS = 60;

function compareSection(plans, diff, lanes) {
  const [one, two] = plans;
  const box = section("compare", "Compare",
    make("p", { class: "small dim" }, `This plan beside ${brief(two.headline, 160)}.`),
    verdict(one, two), numbersTable(one, two),
    make("h3", {}, "Who runs what"), ...plans.map((plan, i) => sideRibbons(plan, i)), movedStrip(one, diff),
    make("h3", {}, "Moved"), moves(diff),
    ...memoryTable(one, two), ...otherChanges(diff));
  const halves = [0, 1].map((i) => make("div", {}, make("h3", {}, i ? "The other over time" : "This plan over time"),
    make("p", {}, `${seconds(plans[i].step_s)} per step`)));
  box.append(...halves);
  const endS = Math.max(one.step_s, two.step_s);
  plans.forEach((plan, i) => timeline(halves[i], plan, { predicted: lanes[i].predicted, measured: null }, { id: `compare-${i}`, endS }));
}

function verdict(one, two) {
  if (!(one.step_s > 0 && two.step_s > 0)) return null;
  const off = two.step_s - one.step_s;
  const told = off === 0 ? "Both take the same time." : `The other is ${seconds(Math.abs(off))} (${percent(Math.abs(off) / one.step_s)}) ${off > 0 ? "slower" : "faster"} per step.`;
  return make("p", { class: "tile" }, make("b", { class: "long" }, told));
}

function numbersTable(one, two) {
  const peak = (plan) => Math.max(...plan.devices.slice(0, plan.num_ranks).map((device) => device.peak_bytes));
  const total = (plan) => plan.devices.reduce((sum, device) => sum + device.peak_bytes, 0);
  const width = (plan) => Math.max(...plan.stages.flatMap((stage) => stage.groups.map((group) => group.length)));
  const facts = [
    ["predicted step", (p) => p.step_s, seconds], ["compute", (p) => p.shares.compute, percent],
    ["communication", (p) => p.shares.communication, percent], ["gradient sums", (p) => p.shares.gradients, percent],
    ["bubbles", (p) => p.shares.bubble, percent], ["largest peak memory", peak, bytes], ["memory of all devices", total, bytes],
    ["devices with work", (p) => p.num_ranks, String], ["pipelines", (p) => p.pipelines.length, String],
    ["stages", (p) => p.stages.length, String], ["widest tensor group", width, String],
    ["microbatches", (p) => p.pipelines.reduce((sum, pipeline) => sum + pipeline.sizes.length, 0), String],
    ["gap", (p) => p.certificate.gap, percent],
  ];
  const rows = facts.map(([name, of, told]) => {
    const [a, b] = [of(one), of(two)];
    const change = a === b ? "same" : `${b > a ? "+" : "−"}${told(Math.abs(b - a))}`;
    return [name, told(a), told(b), change];
  });
  return table([["", "name"], ["this plan", "number"], ["the other", "number"], ["change", "number"]], rows);
}

function sideRibbons(plan, side) {
  const byPipeline = plan.pipelines.map((_, number) => plan.stages.filter((stage) => stage.pipeline === number));
  const rows = byPipeline.slice(0, 3).map((stages) => {
    const row = make("div", { class: stages.length > 12 ? "ribbon thin" : "ribbon" }, ...stages.map((stage) => {
      const cell = ribbonStage(plan, stage);
      if (side) cell.removeAttribute("href");
      return cell;
    }));
    return row;
  });
  const hidden = byPipeline.length - rows.length;
  return make("div", {}, make("p", { class: "tiny dim" }, side ? "the other" : "this plan"), ...rows,
    hidden > 0 ? make("p", { class: "tiny dim" }, `and ${plural(hidden, "more pipeline")}`) : "");
}

// Below both ribbons: which units run on other devices.
function movedStrip(plan, diff) {
  if (!diff.comparable || !diff.moves.length) return "";
  const cells = [];
  let at = 0;
  const add = (until, moved) => {
    if (until <= at) return;
    const cell = make("span", { title: moved ? `units ${at} to ${until - 1} moved` : "not moved" });
    cell.style.flex = `${until - at} 1 0`;
    cell.style.backgroundColor = moved ? "#d55e00" : "transparent";
    cells.push(cell);
    at = until;
  };
  for (const move of diff.moves) {
    add(move.first, false);
    add(move.last, true);
  }
  add(plan.units.length, false);
  const count = diff.moves.reduce((sum, move) => sum + move.last - move.first, 0);
  const told = `${count} of ${plural(plan.units.length, "unit")} moved`;
  const bar = make("div", { class: "bar", role: "img", "aria-label": told }, ...cells);
  bar.style.height = "10px";
  return make("div", {}, make("p", { class: "tiny dim" }, `${told} (orange)`), bar);
}

function moves(diff) {
  if (!diff.comparable) return make("p", { class: "alert" }, "The two models are cut into unlike units, so moves cannot be told.");
  if (!diff.moves.length) return make("p", {}, "Nothing.");
  const names = (devices) => devices.slice(0, 3).join(", ") + (devices.length > 3 ? ` and ${devices.length - 3} more` : "");
  const rows = diff.moves.slice(0, MOST_MOVES).map((move) => [
    move.last - move.first === 1 ? `${move.first}` : `${move.first}–${move.last - 1}`, move.names, names(move.before), names(move.after),
    move.before.length === move.after.length ? String(move.after.length) : `${move.before.length} → ${move.after.length}`]);
  const shown = table([["units", "number"], ["names", "name"], ["this plan", "name"], ["the other", "name"], ["devices", "number"]], rows);
  if (diff.moves.length > MOST_MOVES) shown.append(make("p", {}, `and ${diff.moves.length - MOST_MOVES} more`));
  return shown;
}

function memoryTable(one, two) {
  const peaks = (plan) => new Map(plan.devices.map((device) => [device.name, device.peak_bytes]));
  const [a, b] = [peaks(one), peaks(two)];
  const rows = [...new Set([...a.keys(), ...b.keys()])].map((name) => [name, a.get(name) ?? 0, b.get(name) ?? 0])
    .filter(([, before, after]) => bytes(before) !== bytes(after))
    .sort((x, y) => Math.abs(y[2] - y[1]) - Math.abs(x[2] - x[1]));
  if (!rows.length) return [];
  const told = rows.slice(0, MOST_PEAKS).map(([name, before, after]) => [name, bytes(before), bytes(after),
    `${after > before ? "+" : "−"}${bytes(Math.abs(after - before))}`]);
  return [make("h3", {}, "Peak memory"),
    table([["device", "name"], ["this plan", "number"], ["the other", "number"], ["change", "number"]], told),
    rows.length > told.length ? make("p", {}, `and ${rows.length - told.length} more`) : ""];
}

function otherChanges(diff) {
  const rest = diff.changes.filter((change) => !change.what.startsWith("peak of "));
  if (!rest.length) return [];
  return [make("h3", {}, "All that differs"),
    table([["fact", "name"], ["this plan", "name"], ["the other", "name"]], rest.map((c) => [c.what, c.before, c.after]))];
}
