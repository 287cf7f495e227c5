// Helpers: elements, numbers for people, unpacking. Text only ever enters the page as text.

const DATA = JSON.parse(document.getElementById("data").textContent);
const PALETTE = DATA.palette;
const KINDS = "FBRSGDAOIW";
const SECTIONS = [];
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick" || name === "oninput" || name === "onchange") {
      element.addEventListener(name.slice(2), value);
    } else if (value !== null && value !== undefined) {
      element.setAttribute(name, value);
    }
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function shape(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function section(id, title, ...children) {
  const heading = make("h2", { id: `${id}-title` }, title);
  const box = make("section", { id, "aria-labelledby": `${id}-title` }, heading, ...children);
  document.getElementById("main").append(box);
  const link = make("a", { href: `#${id}` }, title);
  document.getElementById("sections").append(make("li", {}, link));
  SECTIONS.push({ box, link });
  return box;
}

function table(head, rows) {
  const cell = (tag, value, column) => {
    const [title, look] = head[column];
    if (tag === "th") return make(tag, { class: look || null, scope: "col" }, title);
    if (value instanceof Node) return make(tag, { class: look || null }, value);
    const text = String(value);
    return make(tag, { class: look || null, title: brief(text) === text ? null : text }, brief(text, 300));
  };
  const header = make("thead", {}, make("tr", {}, ...head.map((_, i) => cell("th", "", i))));
  const body = rows.map((row) => make("tr", {}, ...row.map((value, i) => cell("td", value, i))));
  return make("div", { class: "scroll-x" }, make("table", { class: head.length > 5 ? "wide" : null }, header, make("tbody", {}, ...body)));
}

// A long text keeps both ends; whoever needs all of it finds it under the pointer.
function brief(text, most = 110) {
  const letters = [...text];
  if (letters.length <= most) return text;
  return `${letters.slice(0, most / 2).join("")}…${letters.slice(-most / 2).join("")}`;
}

function three(value) {
  return String(Number(value.toPrecision(3)));
}

function bytes(value) {
  if (!value) return "0 B";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let power = 0;
  while (Math.abs(value) >= 999.5 && power < units.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${three(value)} ${units[power]}`;
}

function seconds(value) {
  for (const [scale, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "us"], [1e-9, "ns"]]) {
    if (Math.abs(value) >= scale * 0.9995) {
      const scaled = value / scale;
      return `${Math.abs(scaled) >= 1000 ? scaled.toFixed(0) : three(scaled)} ${unit}`;
    }
  }
  return value ? `${three(value * 1e9)} ns` : "0 s";
}

function rate(value, unit) {
  for (const [scale, prefix] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= scale) return `${three(value / scale)} ${prefix}${unit}/s`;
  }
  return `${three(value)} ${unit}/s`;
}

function percent(share) {
  return `${three(100 * share)} %`;
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

// Eight colours, then the same ones lighter, then darker; the number always stands beside them.
function stageLook(index) {
  const look = PALETTE.stages[index % PALETTE.stages.length];
  const round = Math.floor(index / PALETTE.stages.length) % 3;
  if (!round) return look;
  const channels = [1, 3, 5].map((at) => parseInt(look.fill.slice(at, at + 2), 16));
  const mixed = channels.map((value) => Math.round(round === 1 ? value + (255 - value) * 0.5 : value * 0.62));
  const fill = `#${mixed.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
  return { fill, text: textOn(mixed) };
}

// Of dark and light the one with the larger contrast (WCAG 2.2, relative luminance).
function textOn(channels) {
  const [red, green, blue] = channels.map((value) => (value <= 10 ? value / 3294 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return (luminance + 0.05) / 0.06 > 1.05 / (luminance + 0.05) ? PALETTE.dark : PALETTE.light;
}

// Hatching tells the number format; float32 is plain.
const HATCHES = { float32: "", bfloat16: "hatch1", float16: "hatch2", float8_e4m3fn: "hatch3", float8_e5m2: "hatch3" };

function hatchOf(precision) {
  return HATCHES[precision] ?? "hatch4";
}

function paint(element, look, precision = "float32") {
  element.style.backgroundColor = look.fill;
  element.style.color = look.text;
  const hatch = hatchOf(precision);
  if (hatch) element.classList.add(hatch);
  return element;
}

function segments(parts) {
  const box = make("div", { class: "bar", role: "img", "aria-label": parts.map((p) => p.label).join(", ") });
  for (const part of parts) {
    const piece = make("span", { title: part.label });
    piece.style.width = `${Math.max(0, 100 * part.share)}%`;
    piece.style.backgroundColor = part.fill;
    box.append(piece);
  }
  return box;
}

function legend(entries) {
  return make("div", { class: "legend" }, ...entries.map(([fill, name]) => {
    const key = make("i", {});
    key.style.backgroundColor = fill;
    return make("span", {}, key, name);
  }));
}

function meter(share) {
  const fill = make("span");
  fill.style.width = `${Math.min(100, 100 * share)}%`;
  return make("span", { class: "meter" }, fill);
}

function deviceText(plan, ranks, most = 2) {
  const names = ranks.slice(0, most).map((rank) => brief(plan.devices[rank].name, 60));
  return names.join(", ") + (ranks.length > most ? ` +${ranks.length - most}` : "");
}

// Replicas take turns, members of a tensor group work together: "a/0 & a/1 (60 : 40), b/0".
function staffText(plan, stage, most = 2) {
  const told = stage.groups.slice(0, most).map((group) => {
    if (group.length === 1) return deviceText(plan, group);
    const shares = group.slice(0, 4).map((rank) => Math.round(100 * plan.devices[rank].share));
    const names = group.slice(0, 4).map((rank) => brief(plan.devices[rank].name, 40)).join(" & ");
    return `${names}${group.length > 4 ? ` & ${group.length - 4} more` : ""} (${shares.join(" : ")} %)`;
  });
  return told.join(", ") + (stage.groups.length > most ? ` +${stage.groups.length - most}` : "");
}

// The format of units of a stage; where they differ, all of them.
function formatOf(stage, first, last) {
  if (!stage.unit_formats.length) return stage.precision;
  return [...new Set(stage.unit_formats.slice(first - stage.first, last - stage.first))].join(" + ");
}

// How a stage computes, where that is not the plain way.
function stageOptions(stage) {
  return [formatOf(stage, stage.first, stage.last), stage.recompute ? "recompute" : null, stage.zero ? `ZeRO ${stage.zero}` : null,
    ...stage.sharing].filter(Boolean);
}

function stageWords(device) {
  return `stage${device.stages.length > 1 ? "s" : ""} ${device.stages.join(", ")}`;
}

function tags(texts) {
  return texts.map((text) => make("span", { class: "tag" }, text));
}

// Ranks that differ in the name only: one row for all of them.
function alikeRanks(plan) {
  const groups = new Map();
  for (let rank = 0; rank < plan.num_ranks; rank += 1) {
    const device = plan.devices[rank];
    const key = JSON.stringify([device.stages, device.kind, device.microbatches, device.share,
      device.measured_peak_bytes, device.peak_bytes.toPrecision(3)]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(rank);
  }
  return [...groups.values()];
}

async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function reader(data, at) {
  return () => {
    let value = 0;
    let scale = 1;
    for (;;) {
      const byte = data[at];
      at += 1;
      value += (byte & 0x7f) * scale;
      if (byte < 0x80) return value;
      scale *= 128;
    }
  };
}

function signed(value) {
  return value % 2 ? -(value + 1) / 2 : value / 2;
}

// For each rank two tracks of events, in order: what it does, and what it sends.
async function unpack(packed, devices) {
  const raw = await inflate(packed.data);
  const code = reader(raw, 0);
  const startStep = reader(raw, packed.sizes[0]);
  const duration = reader(raw, packed.sizes[0] + packed.sizes[1]);
  return packed.counts.map((count, rank) => {
    const stages = devices[rank].stages;
    const lastMicrobatch = new Array(KINDS.length).fill(-1);
    const tracks = [[], []];
    const lastStart = [0, 0];
    for (let i = 0; i < count; i += 1) {
      const value = code();
      const number = value % 16;
      const kind = KINDS[number];
      const track = kind === "S" || kind === "D" ? 1 : 0;
      const which = Math.floor(value / 16);
      const stage = stages[which % stages.length];
      lastMicrobatch[number] += signed(Math.floor(which / stages.length));
      lastStart[track] += signed(startStep());
      const start = lastStart[track] * packed.tick_s;
      const end = start + duration() * packed.tick_s;
      tracks[track].push({ kind, stage, microbatch: lastMicrobatch[number], start, end });
    }
    return tracks;
  });
}
