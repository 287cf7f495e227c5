// Why: what keeps the plan from being faster, what each choice costs against the next best, what more
// of a resource would be worth.

const MOST_CHOICES = 60;
const MOST_ALTERNATIVES = 12;

function whySection(plan) {
  const why = plan.explanation;
  if (!why) {
    section("why", "Why", make("p", {}, "Why each block runs where it runs was not worked out for this plan."));
    return;
  }
  const place = make("select", { id: "why-place", onchange: () => show() },
    make("option", { value: "all" }, "the whole plan"),
    ...plan.stages.map((stage) => make("option", { value: `s${stage.index}` }, `stage ${stage.index}: ${brief(blockSpan(plan, stage), 60)}`)));
  const name = make("input", { type: "search", id: "why-unit", placeholder: "or name a block", autocomplete: "off", spellcheck: "false",
    oninput: () => show() });
  const host = make("div", { id: "choices", "aria-live": "polite" });
  function show() {
    const found = asked(plan, place.value, name.value.trim().toLowerCase());
    host.replaceChildren(...found);
  }
  section("why", "Why",
    ...bindingList(why), ...priceTable(why),
    make("h3", {}, "Each choice against the next best"),
    make("div", { class: "tools" }, make("label", { for: "why-place" }, "Show"), place, name), host,
    ...runnerUps(why), ...listed("Not looked at", why.left_out));
  show();
}

function blockSpan(plan, stage) {
  const last = stage.blocks.length - 1;
  return last > 0 ? `${blockText(stage.blocks[0])} … ${blockText(stage.blocks[last])}` : blockText(stage.blocks[0]);
}

function whyLink(plan, stage) {
  if (!plan.explanation) return null;
  const button = make("button", { type: "button", class: "tag", onclick: () => {
    const place = document.getElementById("why-place");
    document.getElementById("why-unit").value = "";
    place.value = `s${stage.index}`;
    place.dispatchEvent(new Event("change"));
    document.getElementById("why").scrollIntoView();
    place.focus({ preventScroll: true });
  } }, "why?");
  button.style.cssText = "background: none; min-height: 0; margin-left: auto";
  return button;
}

function asked(plan, place, text) {
  const { choices } = plan.explanation;
  if (text) {
    const units = new Set(plan.units.flatMap((name, unit) => (name.toLowerCase().includes(text) ? [unit] : [])));
    if (!units.size) return [make("p", {}, "No block has a name like that.")];
    const stages = new Set(plan.stages.filter((s) => [...units].some((u) => s.first <= u && u < s.last)).map((s) => s.index));
    return choiceList(choices.filter((choice) => choice.units.some((unit) => units.has(unit)) || stages.has(choice.stage)));
  }
  if (place === "all") return choiceList(choices);
  return choiceList(choices.filter((choice) => `s${choice.stage}` === place));
}

function choiceList(choices) {
  if (!choices.length) return [make("p", {}, "Nothing was compared here.")];
  const shown = choices.slice(0, MOST_CHOICES).map(choiceBox);
  return choices.length > shown.length ? [...shown, make("p", {}, `and ${choices.length - shown.length} more`)] : shown;
}

function margin(choice) {
  const costs = choice.alternatives.map((a) => a.costs_s).filter((cost) => cost !== null);
  return costs.length ? Math.min(...costs) : null;
}

function choiceBox(choice) {
  const next = margin(choice);
  const told = next === null ? "no other way is possible" : `the next best costs ${signedSeconds(next)}`;
  const rows = choice.alternatives.slice(0, MOST_ALTERNATIVES).map((other) => [
    other.label, other.step_s === null ? "–" : seconds(other.step_s),
    other.costs_s === null ? make("span", {}, `not possible: ${other.impossible || "no reason given"}`) : signedSeconds(other.costs_s),
    other.method + (other.bound_s === null ? "" : `, at least ${seconds(other.bound_s)}`)]);
  const hidden = choice.alternatives.length - rows.length;
  return make("details", { class: "choice" },
    make("summary", {}, make("b", {}, `${choice.kind}: ${brief(choice.chosen, 90)}`), make("span", { class: "dim" }, brief(choice.subject, 90)),
      make("span", { class: "margin" }, told)),
    rows.length ? table([["instead", "name"], ["step", "number"], ["costs", "number"], ["how it was found", "name"]], rows) : null,
    hidden > 0 ? make("p", {}, `and ${hidden} more`) : null);
}

function signedSeconds(value) {
  return `${value < 0 ? "−" : "+"}${seconds(Math.abs(value))}`;
}

function bindingList(why) {
  if (!why.binding.length) return [];
  return [make("h3", {}, "What keeps it from being faster"), make("ol", {}, ...why.binding.map((text) => make("li", {}, text)))];
}

function priceTable(why) {
  if (!why.shadow_prices.length) return [];
  const amount = (price, value) => price.unit === "bytes" ? bytes(value) : price.unit === "bytes/s" ? rate(value, "B")
    : price.unit === "s" ? seconds(value) : three(value);
  const rows = why.shadow_prices.map((price) => [
    `${price.kind} of ${price.subject}`, amount(price, price.have), `${price.change < 0 ? "−" : "+"}${amount(price, Math.abs(price.change))}`,
    price.saves_s === null ? "no plan fits" : price.saves_s === 0 ? "nothing" : `${seconds(Math.abs(price.saves_s))} ${price.saves_s > 0 ? "faster" : "slower"}`,
    price.method + (price.bound_s === null ? "" : `, at least ${seconds(price.bound_s)}`)]);
  return [make("h3", {}, "What more or less of a resource would be worth, per step"),
    table([["resource", "name"], ["there is", "number"], ["change", "number"], ["worth", "number"], ["how it was found", "name"]], rows)];
}

function runnerUps(why) {
  if (!why.runners_up.length) return [];
  const rows = why.runners_up.map((other) => [other.differences.join("; "), seconds(other.step_s), signedSeconds(other.costs_s),
    other.num_stages, other.num_devices]);
  return [make("h3", {}, "Whole plans that lost"),
    table([["what differs", "name"], ["step", "number"], ["costs", "number"], ["stages", "number"], ["devices", "number"]], rows)];
}
