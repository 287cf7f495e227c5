// Two plans side by side: what differs, what moved, and both timelines on one scale.

const MOST_MOVES = 200;

function compareSection(plans, diff, lanes) {
  const [one, two] = plans;
  const box = section("compare", "Compare",
    make("p", {}, `This plan against ${two.headline}.`),
    make("h3", {}, "What differs"),
    diff.changes.length
      ? table([["fact", "name"], ["this plan", "name"], ["the other", "name"]], diff.changes.map((c) => [c.what, c.before, c.after]))
      : make("p", {}, "Nothing."),
    make("h3", {}, "Moved"), moves(diff));
  const halves = [0, 1].map((i) => make("div", {}, make("h3", {}, i ? "The other" : "This plan"),
    make("p", {}, `${seconds(plans[i].step_s)} per step`)));
  box.append(make("div", { class: "two" }, ...halves));
  const endS = Math.max(one.step_s, two.step_s);
  plans.forEach((plan, i) => timeline(halves[i], plan, { predicted: lanes[i].predicted, measured: null }, { id: `compare-${i}`, endS }));
}

function moves(diff) {
  if (!diff.comparable) return make("p", { class: "alert" }, "The two models are cut into unlike units, so moves cannot be told.");
  if (!diff.moves.length) return make("p", {}, "Nothing.");
  const names = (devices) => devices.slice(0, 3).join(", ") + (devices.length > 3 ? ` and ${devices.length - 3} more` : "");
  const rows = diff.moves.slice(0, MOST_MOVES).map((move) => [
    move.last - move.first === 1 ? `${move.first}` : `${move.first}–${move.last - 1}`, move.names, names(move.before), names(move.after)]);
  return table([["units", "number"], ["names", "name"], ["this plan", "name"], ["the other", "name"]], rows);
}
