// Memory: the peak of each device by part against its capacity, and its course over the step.

const PARTS = [
  ["resident_bytes", "#0072b2", "stays: weights, gradients, optimiser, framework"],
  ["saved_bytes", "#e69f00", "activations saved for backwards"],
  ["working_bytes", "#009e73", "being worked on"],
];
const MOST_BARS = 200;
const FAR_CAPACITY = 3;

function memorySection(plan, lanes) {
  const groups = alikeRanks(plan);
  const curve = make("div", { id: "curve" });
  const select = make("select", { id: "curve-rank", onchange: () => draw() });
  groups.forEach((ranks) => {
    const name = `${deviceText(plan, ranks.slice(0, 1))}${ranks.length > 1 ? ` +${ranks.length - 1}` : ""}`;
    select.append(make("option", { value: ranks[0] }, name.length > 60 ? `…${name.slice(-60)}` : name));
  });
  const bars = make("div", { class: "memory" });
  groups.slice(0, MOST_BARS).forEach((ranks) => bars.append(...memoryBar(plan, ranks)));
  section("memory", "Memory",
    make("p", { class: "small dim" }, "Predicted peak of each device; the full width is its capacity."),
    legend(PARTS.map(([, fill, name]) => [fill, name])), bars,
    groups.length > MOST_BARS ? make("p", {}, `and ${groups.length - MOST_BARS} more`) : null,
    make("h3", {}, "Over the step"),
    make("div", { class: "tools" }, make("label", { for: "curve-rank" }, "Device"), select), curve);
  const draw = () => drawCurve(plan, lanes, Number(select.value), curve);
  window.addEventListener("resize", draw);
  draw();
}

function memoryBar(plan, ranks) {
  const device = plan.devices[ranks[0]];
  const scale = Math.max(device.capacity_bytes, device.peak_bytes, 1);
  const parts = PARTS.map(([field, fill, name]) => ({ share: device[field] / scale, fill, label: `${name} ${bytes(device[field])}` }));
  const over = device.capacity_bytes > 0 && device.peak_bytes > device.capacity_bytes;
  const told = `${bytes(device.peak_bytes)}${device.capacity_bytes ? ` of ${bytes(device.capacity_bytes)}` : ""}${over ? ", too much" : ""}`;
  const measured = device.measured_peak_bytes === null ? "" : `; measured ${bytes(device.measured_peak_bytes)}`;
  return [make("span", { class: "small" }, deviceText(plan, ranks, 1)), segments(parts),
    make("span", { class: over ? "small alert" : "small" }, told + measured)];
}

// Bytes in use over time: a forward saves, its backward frees, and each works while it runs.
function memoryCourse(plan, track, rank) {
  const device = plan.devices[rank];
  const sizes = new Map(device.memory_by_size.map(([size, saved, working]) => [size, { saved, working }]));
  const points = [[0, device.resident_bytes]];
  let held = device.resident_bytes;
  for (const event of track) {
    const amount = sizes.get(microbatchSize(plan, event.microbatch));
    if (!amount || (event.kind !== "F" && event.kind !== "B")) continue;
    if (event.kind === "F" && plan.training) held += amount.saved;
    points.push([event.start, held + amount.working]);
    if (event.kind === "B") held -= amount.saved;
    points.push([event.end, held]);
  }
  points.push([plan.step_s, held]);
  return points;
}

function drawCurve(plan, lanes, rank, host) {
  const [height, left, bottom] = [220, 76, 24];
  const width = Math.max(280, host.clientWidth);
  const device = plan.devices[rank];
  const points = memoryCourse(plan, lanes.predicted[rank][0], rank);
  const peak = Math.max(...points.map((point) => point[1]));
  const near = device.capacity_bytes > 0 && device.capacity_bytes < FAR_CAPACITY * peak;
  const top = Math.max(near ? device.capacity_bytes : 0, peak) * 1.05 || 1;
  const x = (time) => left + ((width - left - 10) * time) / (plan.step_s || 1);
  const y = (amount) => (height - bottom) * (1 - amount / top) + 4;
  const path = points.map(([time, amount], i) => `${i ? `H${x(time).toFixed(1)}V` : `M${x(time).toFixed(1)} `}${y(amount).toFixed(1)}`).join("");
  const picture = shape("svg", { class: "curve", viewBox: `0 0 ${width} ${height + 6}`, role: "img",
    "aria-label": `Memory over the step: peak ${bytes(device.peak_bytes)}, capacity ${bytes(device.capacity_bytes)}` });
  picture.append(shape("path", { d: path, fill: "none", stroke: "#e69f00", "stroke-width": 1.6 }));
  if (near) {
    const at = y(device.capacity_bytes);
    picture.append(shape("line", { x1: left, x2: width, y1: at, y2: at, stroke: "#d55e00", "stroke-dasharray": "6 4" }));
    picture.append(shape("text", { x: left + 6, y: at + 14 }, `capacity ${bytes(device.capacity_bytes)}`));
  }
  const stays = y(device.resident_bytes);
  picture.append(shape("line", { x1: left, x2: width, y1: stays, y2: stays, stroke: "#0072b2", "stroke-dasharray": "2 4" }));
  for (const [time, anchor] of [[0, "start"], [plan.step_s / 2, "middle"], [plan.step_s, "end"]]) {
    picture.append(shape("text", { x: x(time), y: height, "text-anchor": anchor }, seconds(time)));
  }
  for (const amount of [0, top / 2, top / 1.05]) {
    picture.append(shape("text", { x: left - 6, y: y(amount) + 4, "text-anchor": "end" }, bytes(amount)));
  }
  host.replaceChildren(picture, make("p", { class: "small dim" },
    `Orange is memory in use, blue dots what stays, ${near ? "the red dashes the capacity" : `the capacity of ${bytes(device.capacity_bytes)} is far above`}. Predicted.`));
}
