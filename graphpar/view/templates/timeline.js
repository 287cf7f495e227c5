// The timeline of one plan: rank by time, predicted above measured; zoom, pan, hover, keys.

const LANE_PX = 28;
const GAP_PX = 6;
const ZOOM = 1.6;
const MANY_RANKS = 48;
const MOST_PRINTED = 60;

function timeline(host, plan, lanes, { id, endS }) {
  const measured = lanes.measured;
  const rowPx = LANE_PX * (measured ? 2 : 1) + GAP_PX;
  const all = { from: 0, to: endS || 1 };
  const state = { ...all, rows: [], row: 0, event: -1, rowTop: 0 };
  const canvas = make("canvas", { id: `${id}-canvas`, tabindex: "0", role: "application",
    "aria-label": "Timeline. Arrow keys left and right pan, up and down choose a rank, plus and minus zoom, zero shows all, n and p step through events.",
    "aria-describedby": `${id}-live` });
  const spacer = make("div", {});
  const view = make("div", { class: "view" }, canvas, spacer);
  const tip = make("div", { class: "tip", hidden: "" });
  const live = make("p", { class: "live", id: `${id}-live`, "aria-live": "polite" });
  const folded = make("input", { type: "checkbox", id: `${id}-folded`, onchange: () => chooseRows() });
  folded.checked = plan.num_ranks > MANY_RANKS;
  const button = (text, name, act) => make("button", { type: "button", "aria-label": name, title: name, onclick: act }, text);
  host.append(
    make("div", { class: "tools" },
      button("+", "Zoom in", () => zoom(1 / ZOOM)), button("−", "Zoom out", () => zoom(ZOOM)),
      button("◀", "Earlier", () => pan(-0.25)), button("▶", "Later", () => pan(0.25)),
      button("All", "Show the whole step", () => show(all.from, all.to)),
      make("label", {}, folded, " one rank for all that are alike")),
    make("div", { class: "lanes" }, view, tip), live);

  function chooseRows() {
    const groups = folded.checked ? alikeRanks(plan) : Array.from({ length: plan.num_ranks }, (_, rank) => [rank]);
    state.rows = groups;
    state.row = Math.min(state.row, groups.length - 1);
    layout();
  }

  function gutter() {
    return Math.min(170, Math.max(84, view.clientWidth * 0.16));
  }

  function layout(printing = false) {
    const full = AXIS_PX + state.rows.length * rowPx;
    const room = printing ? AXIS_PX + MOST_PRINTED * rowPx : Math.max(200, window.innerHeight * 0.6);
    const height = Math.min(full, room);
    const ratio = window.devicePixelRatio || 1;
    canvas.style.width = `${view.clientWidth}px`;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(view.clientWidth * ratio);
    canvas.height = Math.round(height * ratio);
    spacer.style.height = `${full - height}px`;
    draw(printing ? PRINTED : theme());
  }

  function draw(look = theme()) {
    const pen = canvas.getContext("2d");
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.width / ratio, canvas.height / ratio];
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.fillStyle = look.paper;
    pen.fillRect(0, 0, width, height);
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    const box = { left: gutter(), width: width - gutter() - 6, height: LANE_PX - 2 };
    const first = Math.max(0, Math.floor((view.scrollTop) / rowPx));
    for (let row = first; row < state.rows.length; row += 1) {
      const top = AXIS_PX + row * rowPx - view.scrollTop;
      if (top > height) break;
      drawRow(pen, row, { ...box, top }, look);
    }
    drawAxis(pen, box, state, look);
    canvas.dataset.from = String(state.from);
    canvas.dataset.to = String(state.to);
    canvas.dataset.rows = String(state.rows.length);
  }

  function drawRow(pen, row, box, look) {
    const [rank, ...others] = state.rows[row];
    const device = plan.devices[rank];
    drawLane(pen, lanes.predicted[rank], box, state, look);
    if (measured) {
      const below = { ...box, top: box.top + LANE_PX };
      drawLane(pen, measured[rank], below, state, look);
      if (plan.measured.stopped.includes(rank)) drawStop(pen, measured[rank], below, state, look);
    }
    pen.textAlign = "left";
    pen.fillStyle = stageLook(device.stages[0]).fill;
    pen.fillRect(0, box.top, 4, rowPx - GAP_PX - 2);
    pen.fillStyle = look.ink;
    const more = others.length ? ` +${others.length}` : "";
    const room = box.left - 14 - pen.measureText(more).width;
    pen.fillText(fitted(pen, device.name, room) + more, 8, box.top + (measured ? 12 : 7));
    pen.fillStyle = look.dim;
    const told = `${stageWords(device)}, ${device.kind}`;
    const fits = pen.measureText(told).width <= box.left - 14;
    pen.fillText(fits ? told : stageWords(device), 8, box.top + (measured ? 29 : 20));
    if (row === state.row && document.activeElement === canvas) {
      pen.strokeStyle = look.accent;
      pen.strokeRect(1, box.top - 1, box.left + box.width, rowPx - GAP_PX);
    }
    const event = row === state.row ? lanes.predicted[rank][0][state.event] : null;
    if (event) mark(pen, event, box, look);
  }

  function mark(pen, event, box, look) {
    const perS = box.width / (state.to - state.from);
    const left = box.left + Math.max(0, (event.start - state.from) * perS);
    const right = box.left + Math.min(box.width, (event.end - state.from) * perS);
    pen.strokeStyle = look.ink;
    pen.lineWidth = 2;
    pen.strokeRect(left, box.top, Math.max(2, right - left), box.height);
    pen.lineWidth = 1;
  }

  function show(from, to) {
    const span = Math.min(all.to - all.from, Math.max(to - from, all.to / 1e5));
    state.from = Math.min(Math.max(all.from, from), all.to - span);
    state.to = state.from + span;
    tip.hidden = true;
    draw();
  }

  function zoom(factor, at = 0.5) {
    const span = state.to - state.from;
    const centre = state.from + span * at;
    show(centre - span * factor * at, centre + span * factor * (1 - at));
  }

  function pan(share) {
    const span = state.to - state.from;
    show(state.from + share * span, state.to + share * span);
  }

  function place(pointer) {
    const bounds = canvas.getBoundingClientRect();
    const share = (pointer.clientX - bounds.left - gutter()) / (bounds.width - gutter() - 6);
    const y = pointer.clientY - bounds.top - AXIS_PX + view.scrollTop;
    return { share, time: state.from + share * (state.to - state.from), row: Math.floor(y / rowPx), y: y % rowPx };
  }

  function under({ time, row, y, share }) {
    const ranks = state.rows[row];
    if (!ranks || share < 0 || share > 1) return null;
    const below = measured && y > LANE_PX;
    const tracks = (below ? measured : lanes.predicted)[ranks[0]];
    const inLane = below ? y - LANE_PX : y;
    const track = tracks[inLane > LANE_PX - 2 - STRIP_PX ? 1 : 0];
    const event = track[firstAfter(track, time)];
    if (!event || event.start > time) return null;
    return { event, rank: ranks[0], below };
  }

  function hover(pointer) {
    const found = under(place(pointer));
    tip.hidden = !found;
    if (!found) return;
    const side = measured ? (found.below ? "measured" : "predicted") : "";
    const planned = !found.below || plan.measured.planned_batch;
    tip.textContent = describe(plan, found.rank, found.event, side, planned);
    const bounds = host.querySelector(".lanes").getBoundingClientRect();
    const left = Math.min(pointer.clientX - bounds.left + 14, bounds.width - tip.offsetWidth - 4);
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${pointer.clientY - bounds.top + 16}px`;
  }

  function step(by) {
    const rank = state.rows[state.row][0];
    const track = lanes.predicted[rank][0];
    if (!track.length) return;
    if (state.event < 0) state.event = firstAfter(track, state.from) - (by > 0 ? 1 : 0);
    state.event = Math.max(0, Math.min(track.length - 1, state.event + by));
    const event = track[state.event];
    if (event.start < state.from || event.end > state.to) {
      const half = (state.to - state.from) / 2;
      show((event.start + event.end) / 2 - half, (event.start + event.end) / 2 + half);
    }
    live.textContent = describe(plan, rank, event, "").replaceAll("\n", "; ");
    draw();
  }

  function choose(by) {
    state.row = Math.max(0, Math.min(state.rows.length - 1, state.row + by));
    state.event = -1;
    const top = state.row * rowPx;
    const room = canvas.clientHeight - AXIS_PX - rowPx;
    if (top < view.scrollTop) view.scrollTop = top;
    if (top > view.scrollTop + room) view.scrollTop = top - room;
    const rank = state.rows[state.row][0];
    live.textContent = `rank ${rank}, ${plan.devices[rank].name}, ${stageWords(plan.devices[rank])}`;
    draw();
  }

  const keys = {
    ArrowLeft: () => pan(-0.15), ArrowRight: () => pan(0.15), ArrowUp: () => choose(-1), ArrowDown: () => choose(1),
    "+": () => zoom(1 / ZOOM), "=": () => zoom(1 / ZOOM), "-": () => zoom(ZOOM),
    0: () => show(all.from, all.to), Home: () => show(all.from, all.to), n: () => step(1), p: () => step(-1),
  };
  canvas.addEventListener("keydown", (key) => {
    if (key.ctrlKey || key.metaKey || key.altKey || !keys[key.key]) return;
    key.preventDefault();
    keys[key.key]();
  });
  let drag = null;
  const fingers = new Map();
  const spread = () => {
    const [a, b] = [...fingers.values()];
    return { apart: Math.max(12, Math.abs(a.x - b.x)), middle: place({ clientX: (a.x + b.x) / 2, clientY: a.y }).share };
  };
  let pinch = null;
  canvas.addEventListener("pointerdown", (pointer) => {
    fingers.set(pointer.pointerId, { x: pointer.clientX, y: pointer.clientY });
    pinch = fingers.size === 2 ? { ...spread(), from: state.from, to: state.to } : null;
    drag = { x: pointer.clientX, from: state.from };
    canvas.setPointerCapture(pointer.pointerId);
  });
  const release = (pointer) => {
    fingers.delete(pointer.pointerId);
    drag = pinch = null;
  };
  canvas.addEventListener("pointerup", (pointer) => {
    release(pointer);
    hover(pointer);
  });
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointermove", (pointer) => {
    if (fingers.has(pointer.pointerId)) fingers.set(pointer.pointerId, { x: pointer.clientX, y: pointer.clientY });
    if (pinch && fingers.size === 2) {
      const now = spread();
      const wide = (pinch.to - pinch.from) * (pinch.apart / now.apart);
      const held = pinch.from + pinch.middle * (pinch.to - pinch.from);
      return show(held - now.middle * wide, held + (1 - now.middle) * wide);
    }
    if (!drag) return hover(pointer);
    const span = state.to - state.from;
    const moved = (span * (drag.x - pointer.clientX)) / (view.clientWidth - gutter() - 6);
    return show(drag.from + moved, drag.from + moved + span);
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("dblclick", (pointer) => zoom(1 / (ZOOM * ZOOM), Math.max(0, Math.min(1, place(pointer).share))));
  canvas.addEventListener("wheel", (wheel) => {
    if (!wheel.ctrlKey && !wheel.metaKey && !wheel.shiftKey) return;
    wheel.preventDefault();
    if (wheel.shiftKey) pan(Math.sign(wheel.deltaY || wheel.deltaX) * 0.1);
    else zoom(wheel.deltaY > 0 ? 1.2 : 1 / 1.2, Math.max(0, Math.min(1, place(wheel).share)));
  }, { passive: false });
  canvas.addEventListener("focus", () => draw());
  canvas.addEventListener("blur", () => draw());
  view.addEventListener("scroll", () => draw());
  window.addEventListener("resize", () => layout());
  window.addEventListener("beforeprint", () => layout(true));
  window.addEventListener("afterprint", () => layout());
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  chooseRows();
}

// What an event is, in words: stage, microbatch, times, bytes.
function describe(plan, rank, event, side, planned = true) {
  const device = plan.devices[rank];
  const lines = [`${side ? `${side}: ` : ""}${PALETTE.actions[event.kind].name}, stage ${event.stage} on ${brief(device.name, 60)}`];
  if (event.microbatch >= 0) {
    const size = planned ? microbatchSize(plan, event.microbatch) : undefined;
    lines.push(`microbatch ${event.microbatch}${size ? ` (${plural(size, "sample")})` : ""}`);
    const amount = size ? messageBytes(plan, event.kind, event.stage, size) : 0;
    if (amount) lines.push(bytes(amount));
    const [needs, makes] = event.kind === "F" ? ["R", "S"] : ["G", "D"];
    if (size && "FBI".includes(event.kind)) {
      lines.push(`takes in ${bytes(messageBytes(plan, needs, event.stage, size))}, `
        + `hands on ${bytes(messageBytes(plan, makes, event.stage, size))}`);
    }
  }
  lines.push(`${seconds(event.end - event.start)}, from ${seconds(event.start)} to ${seconds(event.end)}`);
  return lines.join("\n");
}

function microbatchSize(plan, microbatch) {
  const pipeline = plan.pipelines.findLast((p) => p.first_microbatch <= microbatch);
  return pipeline ? pipeline.sizes[microbatch - pipeline.first_microbatch] : undefined;
}

// What a send or receive moves; what a forward or backward needs and hands on.
function messageBytes(plan, kind, stage, size) {
  const sum = (edges, way) => edges.reduce(
    (total, edge) => total + edge[`${way}_bytes_per_sample`] * size + edge[`${way}_fixed_bytes`], 0);
  const to = plan.edges.filter((edge) => edge.target === stage);
  const from = plan.edges.filter((edge) => edge.source === stage);
  if (kind === "S") return sum(from, "forward");
  if (kind === "R") return sum(to, "forward");
  if (kind === "G") return sum(from, "backward");
  return kind === "D" ? sum(to, "backward") : 0;
}

function timelineSection(plan, lanes) {
  const halves = plan.splits_backward ? ["W"] : [];
  const kinds = plan.training ? ["F", "B", ...halves, "A", "O", "S", "D"] : ["F", "S"];
  const entries = kinds.map((kind) => [PALETTE.actions[kind].fill, PALETTE.actions[kind].name]);
  const host = make("div", {});
  section("timeline", "Timeline",
    plan.measured && plan.measured.note ? make("p", { class: "alert" }, plan.measured.note) : null,
    legend([...entries, ["#a0a0a0", "waits (thin line)"]]),
    make("p", { class: "small dim" }, `${plan.measured ? "Predicted above, measured below. " : ""}Numbers are microbatches; the strip below a lane is what the rank sends meanwhile; a gradient sum includes waiting for the other ranks. Drag to pan, Ctrl + wheel or + and − to zoom, arrow keys and n, p to walk.`),
    host);
  const endS = Math.max(plan.step_s, plan.measured ? plan.measured.step_s : 0);
  timeline(host, plan, lanes, { id: "timeline", endS });
}
