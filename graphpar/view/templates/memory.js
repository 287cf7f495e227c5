// Memory: the peak of each device by part against its capacity, and its course over the step.

const PARTS = [
  ["weights", "#0072b2", "weights"],
  ["state", "#56b4e9", "gradients, optimiser, framework"],
  ["saved", "#e69f00", "activations saved for backwards"],
  ["working", "#009e73", "being worked on"],
];
const MOST_BARS = 200;
const FAR_CAPACITY = 3;

// Weights cannot be told apart where a device holds a part of them only.
function memoryParts(device) {
  return { weights: device.weight_bytes, state: device.resident_bytes - device.weight_bytes,
    saved: device.saved_bytes, working: device.working_bytes };
}

function memoryPart(device, part, name) {
  const inUpdate = part === "working" && device.update_bytes > 0 && device.working_bytes === device.update_bytes;
  return inUpdate ? "the optimiser's update" : name;
}

function memorySection(plan, lanes) {
  const groups = alikeRanks(plan);
  const curve = make("div", { id: "curve" });
  const title = make("h3", { id: "curve-title" });
  const bars = make("div", { class: "memory", role: "group", "aria-label": "Devices" });
  let chosen = fullest(plan, groups);
  const draw = () => drawCurve(plan, lanes, chosen, curve);
  const choose = (rank) => {
    chosen = rank;
    title.textContent = `Over the step: ${brief(plan.devices[rank].name, 60)}`;
    bars.querySelectorAll(".row").forEach((row) => row.setAttribute("aria-pressed", String(Number(row.dataset.rank) === rank)));
    draw();
  };
  groups.slice(0, MOST_BARS).forEach((ranks) => bars.append(memoryBar(plan, ranks, choose)));
  const parts = plan.training ? PARTS : PARTS.map(([name, fill, told]) => [name, fill, name === "state" ? "framework" : told]).filter(([name]) => name !== "saved");
  const rough = plan.devices.slice(0, plan.num_ranks).some((device) => !device.weight_bytes);
  section("memory", "Memory",
    make("p", { class: "small dim" }, `Predicted peak by part; the full width is the device's capacity${plan.measured ? ", the dark mark the measured peak" : ""}. Choose a device to see it over time.${rough ? " Where weights are split over replicas they count among the gradients and optimiser." : ""}`),
    legend(parts.map(([, fill, name]) => [fill, name])), bars,
    groups.length > MOST_BARS ? make("p", {}, `and ${groups.length - MOST_BARS} more`) : null,
    title, curve);
  window.addEventListener("resize", draw);
  window.addEventListener("beforeprint", draw);
  choose(chosen);
}

function fullest(plan, groups) {
  const full = (ranks) => plan.devices[ranks[0]].peak_bytes / (plan.devices[ranks[0]].capacity_bytes || Infinity);
  return [...groups].sort((a, b) => full(b) - full(a))[0][0];
}

function memoryBar(plan, ranks, choose) {
  const device = plan.devices[ranks[0]];
  const scale = Math.max(device.capacity_bytes, device.peak_bytes, device.measured_peak_bytes ?? 0, 1);
  const amounts = memoryParts(device);
  const parts = PARTS.map(([part, fill, name]) => ({ share: amounts[part] / scale, fill, label: `${memoryPart(device, part, name)} ${bytes(amounts[part])}` }));
  const over = device.capacity_bytes > 0 && device.peak_bytes > device.capacity_bytes;
  const told = `${bytes(device.peak_bytes)}${device.capacity_bytes ? ` of ${bytes(device.capacity_bytes)}` : ""}${over ? ", too much" : ""}`;
  const measured = device.measured_peak_bytes === null ? "" : `; measured ${bytes(device.measured_peak_bytes)}`;
  const track = make("span", { class: "track" }, segments(parts));
  if (device.measured_peak_bytes !== null) {
    const mark = make("i", { title: `measured ${bytes(device.measured_peak_bytes)}` });
    mark.style.left = `calc(${(100 * device.measured_peak_bytes) / scale}% - 2px)`;
    track.append(mark);
  }
  const name = `${deviceText(plan, ranks, 1)}`;
  return make("button", { type: "button", class: "row", "data-rank": String(ranks[0]), onclick: () => choose(ranks[0]) },
    make("span", { class: "small" }, name), track, make("span", { class: over ? "small alert" : "small" }, told + measured));
}

// Bytes saved and worked on over time: a forward saves, its backward frees (nothing does where results are
// what it saves), and each works while it runs.
// After the first half of a backward some is kept for the second. A stage's gradients come with its first
// backward (or its first half): what is absent of them does not stay yet. The optimiser's update comes last.
function memoryCourse(plan, track, rank) {
  const device = plan.devices[rank];
  const sizes = new Map(device.memory_by_size.map(
    ([stage, size, held, working, deferred, gradients, spared]) => [`${stage} ${size}`, { held, working, deferred, gradients, spared }]));
  const missing = new Map(device.memory_by_size.map((row) => [row[0], row[5]]));
  const absent = () => [...missing.values()].reduce((sum, amount) => sum + amount, 0);
  const points = [{ time: 0, absent: absent(), saved: 0, working: 0 }];
  let saved = 0;
  for (const event of track) {
    if (event.kind === "O") points.push({ time: event.start, absent: absent(), saved, working: device.update_bytes }, { time: event.end, absent: absent(), saved, working: 0 });
    const amount = sizes.get(`${event.stage} ${microbatchSize(plan, event.microbatch)}`);
    if (!amount || !"FBIW".includes(event.kind)) continue;
    if (event.kind === "F" && plan.training) saved += amount.held;
    if ("BI".includes(event.kind) && missing.get(event.stage)) missing.set(event.stage, event.kind === "B" ? amount.spared : 0);
    const later = event.kind === "I" ? saved + amount.deferred - amount.held : saved;
    points.push({ time: event.start, absent: absent(), saved: Math.max(saved, later), working: amount.working });
    saved = later;
    if (event.kind === "F" && !plan.training) saved += amount.held;
    if (event.kind === "B") {
      saved -= amount.held;
      missing.set(event.stage, 0);
    }
    if (event.kind === "W") saved -= amount.deferred;
    points.push({ time: event.end, absent: absent(), saved, working: 0 });
  }
  points.push({ time: plan.step_s, absent: absent(), saved, working: 0 });
  return points;
}

function above(point) {
  return point.saved + point.working - point.absent;
}

// Of many points those are kept that can be told apart: the highest of each pixel column.
function thinned(points, step, columns) {
  if (points.length <= 4 * columns) return points;
  const best = new Array(columns).fill(null);
  for (const point of points) {
    const column = Math.min(columns - 1, Math.floor((columns * point.time) / (step || 1)));
    if (!best[column] || above(point) > above(best[column])) best[column] = point;
  }
  return best.filter(Boolean);
}

function drawCurve(plan, lanes, rank, host) {
  const width = Math.max(280, host.clientWidth);
  const frame = { width, height: 280, left: 78, right: 12, top: 12, bottom: 28 };
  const device = plan.devices[rank];
  const points = thinned(memoryCourse(plan, lanes.predicted[rank][0], rank), plan.step_s, Math.floor(width));
  const peak = device.resident_bytes + device.later_bytes + Math.max(...points.map(above));
  const near = device.capacity_bytes > 0 && device.capacity_bytes < FAR_CAPACITY * peak;
  const top = Math.max(near ? device.capacity_bytes : 0, peak) * 1.06 || 1;
  const x = (time) => frame.left + ((width - frame.left - frame.right) * time) / (plan.step_s || 1);
  const y = (amount) => frame.height - frame.bottom - (frame.height - frame.bottom - frame.top) * (amount / top);
  const picture = shape("svg", { class: "curve", viewBox: `0 0 ${width} ${frame.height}`, role: "img",
    "aria-label": `Memory of ${device.name} over the step: peak ${bytes(device.peak_bytes)}, capacity ${bytes(device.capacity_bytes)}` });
  picture.append(...memoryAxes(plan, frame, x, y, top), ...memoryAreas(plan, device, points, x, y));
  if (near) picture.append(...capacityLine(device, frame, y));
  const far = near || !device.capacity_bytes ? "" : ` The capacity of ${bytes(device.capacity_bytes)} is far above.`;
  host.replaceChildren(picture, make("p", { class: "small dim" }, `Predicted: peak ${bytes(device.peak_bytes)}.${far}`));
}

// A step function as a closed area between two heights.
function stepArea(points, low, high, x, y) {
  const steps = (height) => points.map((point, i) => `${i ? `H${x(point.time).toFixed(1)}V` : `${x(point.time).toFixed(1)} `}${y(height(point)).toFixed(1)}`).join("");
  const back = [...points].reverse().map((point) => `V${y(low(point)).toFixed(1)}H${x(point.time).toFixed(1)}`).join("");
  return `M${steps(high)}${back}Z`;
}

function memoryAreas(plan, device, points, x, y) {
  const stays = (point) => device.resident_bytes + device.later_bytes - point.absent;
  const layers = [
    ["weights", () => 0, () => device.weight_bytes],
    ["state", () => device.weight_bytes, stays],
    ["saved", stays, (point) => stays(point) + point.saved],
    ["working", (point) => stays(point) + point.saved, (point) => stays(point) + point.saved + point.working],
  ];
  return layers.map(([part, low, high]) => shape("path", {
    d: stepArea(points, low, high, x, y), fill: PARTS.find(([name]) => name === part)[1] }));
}

function capacityLine(device, frame, y) {
  const at = y(device.capacity_bytes);
  return [
    shape("line", { x1: frame.left, x2: frame.width - frame.right, y1: at, y2: at, stroke: "#d55e00", "stroke-width": 2, "stroke-dasharray": "7 5" }),
    shape("text", { x: frame.left + 8, y: at + 15 }, `capacity ${bytes(device.capacity_bytes)}`)];
}

function memoryAxes(plan, frame, x, y, top) {
  const unit = 2 ** Math.floor(Math.log2(top / 3));
  const step = top / unit > 5 ? 2 * unit : unit;
  const parts = [];
  for (let amount = 0; amount <= top; amount += step) {
    parts.push(shape("line", { class: "grid", x1: frame.left, x2: frame.width - frame.right, y1: y(amount), y2: y(amount) }),
      shape("text", { x: frame.left - 8, y: y(amount) + 4, "text-anchor": "end" }, bytes(amount)));
  }
  const ticks = frame.width < 520 ? [[0, "start"], [0.5, "middle"], [1, "end"]]
    : [[0, "start"], [0.25, "middle"], [0.5, "middle"], [0.75, "middle"], [1, "end"]];
  for (const [share, anchor] of ticks) {
    parts.push(shape("text", { x: x(plan.step_s * share), y: frame.height - 8, "text-anchor": anchor }, seconds(plan.step_s * share)));
  }
  return parts;
}
