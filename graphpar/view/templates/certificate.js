// How sure: the objective against its bounds, what the search covered, what is taken for granted.

function certificateSection(plan) {
  const certificate = plan.certificate;
  const rows = [
    ["simulated step", plan.step_s, "what the schedule of this plan takes, played through"],
    ["programme's objective", certificate.objective_s, "what the planner minimised"],
    ["its proven bound", certificate.bound_s, "no plan of the family has a lower objective"],
    ["bound for any plan", certificate.physical_bound_s, "work over total speed, memory, critical path"],
  ];
  const most = Math.max(...rows.map((row) => row[1]), 1e-30);
  const verdict = certificate.status === "optimal"
    ? "The search finished: no plan of the family is better by more than the gap asked for."
    : `${certificate.truncated_by.length ? "A limit cut the search short" : "The search stopped before it proved this plan the best"}; it is at most ${percent(certificate.gap)} from the best of its family.`;
  const parts = Object.entries(certificate.parts).filter(([, value]) => value !== 0);
  section("certificate", "How sure",
    make("p", {}, verdict),
    table([["", "name"], ["time", "number"], ["", ""], ["meaning", "name"]],
      rows.map(([name, value, meaning]) => [name, seconds(value), meter(value / most), meaning])),
    make("p", {}, `Gap ${percent(certificate.gap)}, found in ${seconds(certificate.seconds)}.`),
    certificate.truncated_by.length ? make("p", { class: "alert" }, `Cut short by: ${certificate.truncated_by.join(", ")}`) : null,
    make("h3", {}, "Parts of the objective"),
    table([["part", "name"], ["time", "number"], ["", ""]],
      parts.map(([name, value]) => [partName(name), seconds(value), meter(value / (certificate.objective_s || 1))])),
    make("h3", {}, "Certified among"), make("p", {}, certificate.family),
    ...listed("Taken for granted", plan.assumptions), ...listed("Notes", plan.notes),
    ...listed("Without work", leftOut(plan)),
    ...listed("Asked for", Object.entries(plan.options).map(([name, value]) => `${name}: ${value}`)),
    plan.batch_reason ? make("p", {}, `The batch is not split further: ${plan.batch_reason}`) : null);
}

function partName(name) {
  return name.replace(/_s$/, "").replaceAll("_", " ");
}

function leftOut(plan) {
  const kinds = new Map();
  plan.devices.slice(plan.num_ranks).forEach((device) => {
    if (!kinds.has(device.kind)) kinds.set(device.kind, []);
    kinds.get(device.kind).push(device.name);
  });
  return [...kinds].map(([kind, names]) => `${names.length} × ${kind}: ${names.slice(0, 8).join(", ")}${names.length > 8 ? ` and ${names.length - 8} more` : ""}`);
}

function listed(title, entries) {
  if (!entries.length) return [];
  return [make("h3", {}, title), make("ul", {}, ...entries.map((entry) => make("li", {}, entry)))];
}
