// Drawing lanes on a canvas: only rows in sight, only events in sight, narrow ones joined.

const STRIP_PX = 5;
const AXIS_PX = 22;
const JOIN_PX = 0.7;
const LABEL_PX = 16;

// Paper is light whatever the screen was.
const PRINTED = { paper: "#ffffff", ink: "#000000", dim: "#444444", line: "#bbbbbb", lane: "#eeeeee",
  wait: "#c4c4c4", alert: "#a33a00", accent: "#003a5c" };

function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  return { paper: colour("--paper"), ink: colour("--ink"), dim: colour("--dim"), line: colour("--line"),
    lane: colour("--lane"), wait: colour("--wait"), alert: colour("--alert"), accent: colour("--accent") };
}

// Index of the first event that ends after a time; events of a track are in order.
function firstAfter(track, time) {
  let low = 0;
  let high = track.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (track[middle].end < time) low = middle + 1;
    else high = middle;
  }
  return low;
}

function drawTrack(pen, track, box, view, look) {
  const perS = box.width / (view.to - view.from);
  let last = null;
  const flush = () => {
    if (!last) return;
    const waits = last.kind === "R" || last.kind === "G";
    pen.fillStyle = waits ? look.wait : PALETTE.actions[last.kind].fill;
    const width = Math.max(last.right - last.left, 0.5);
    if (waits) pen.fillRect(last.left, box.top + box.height / 2 - 1, width, 2);
    else pen.fillRect(last.left, box.top, width > 4 ? width - 0.75 : width, box.height);
    if (!waits && box.height > 10 && last.event && width > LABEL_PX && last.event.microbatch >= 0) {
      pen.fillStyle = PALETTE.actions[last.kind].text;
      pen.fillText(String(last.event.microbatch), last.left + width / 2, box.top + box.height / 2);
    }
  };
  pen.textAlign = "center";
  for (let i = firstAfter(track, view.from); i < track.length && track[i].start <= view.to; i += 1) {
    const event = track[i];
    const left = box.left + Math.max(0, (event.start - view.from) * perS);
    const right = box.left + Math.min(box.width, (event.end - view.from) * perS);
    if (last && last.kind === event.kind && right - left < JOIN_PX && left - last.right < JOIN_PX) {
      last = { ...last, right, event: null };
    } else {
      flush();
      last = { kind: event.kind, left, right, event };
    }
  }
  flush();
}

function drawLane(pen, tracks, box, view, look) {
  pen.fillStyle = look.lane;
  pen.fillRect(box.left, box.top, box.width, box.height);
  const tall = box.height - STRIP_PX;
  drawTrack(pen, tracks[0], { ...box, height: tall }, view, look);
  drawTrack(pen, tracks[1], { ...box, top: box.top + tall, height: STRIP_PX }, view, look);
}

function drawStop(pen, tracks, box, view, look) {
  const end = Math.max(0, ...tracks.map((track) => (track.length ? track[track.length - 1].end : 0)));
  const x = box.left + (box.width * (end - view.from)) / (view.to - view.from);
  if (x < box.left || x > box.left + box.width) return;
  pen.fillStyle = look.alert;
  pen.fillRect(x, box.top, 2, box.height);
  pen.textAlign = "left";
  pen.fillText("stopped", x + 5, box.top + box.height / 2);
}

function drawAxis(pen, box, view, look) {
  const parts = Math.max(2, Math.min(8, Math.floor(box.width / 110)));
  pen.fillStyle = look.paper;
  pen.fillRect(0, 0, box.left + box.width, AXIS_PX);
  for (let part = 0; part <= parts; part += 1) {
    const x = box.left + (box.width * part) / parts;
    pen.fillStyle = look.dim;
    pen.textAlign = part === 0 ? "left" : part === parts ? "right" : "center";
    pen.fillText(seconds(view.from + ((view.to - view.from) * part) / parts), x, AXIS_PX / 2);
    pen.fillStyle = look.line;
    pen.fillRect(x, AXIS_PX - 4, 1, 4);
  }
}

// A long name keeps its end, which is where device names differ.
function fitted(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  let kept = [...text].slice(-60);
  while (kept.length > 1 && pen.measureText(`…${kept.join("")}`).width > width) kept = kept.slice(1);
  return `…${kept.join("")}`;
}
