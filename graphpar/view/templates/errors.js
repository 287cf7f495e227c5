// Number formats under an error budget: what they cost in exactness and gain in time, and what other
// budgets would buy.

const MOST_RUNS = 40;

function errorsSection(plan) {
  const report = plan.errors;
  if (!report) return;
  section("errors", "Error budget",
    make("p", {}, `Number formats were chosen so that the result and the gradient are off by at most ${three(report.budget)}, relative to float32 on one device.`),
    errorTable(report),
    report.first_step_kept === false ? make("p", { class: "alert" }, "The first step was further off than the budget allows.") : null,
    make("p", { class: "small dim" }, report.note),
    make("h3", {}, "Other budgets"), ...otherBudgets(report),
    ...lowerRuns(plan, report));
}

function errorTable(report) {
  const told = (value) => (value === null ? "–" : two(value));
  const rows = report.rows.map((row) => {
    const most = Math.max(row.estimated, row.measured ?? 0, row.first_step ?? 0);
    return [row.what, told(row.estimated), told(row.measured), told(row.first_step), three(report.budget),
      report.budget > 0 ? meter(most / report.budget) : ""];
  });
  return table([["relative error of", "name"], ["estimated", "number"], ["measured", "number"], ["first step", "number"], ["budget", "number"], ["used", ""]], rows);
}

// Errors are known to two digits at best.
function two(value) {
  return String(Number(value.toPrecision(2)));
}

function otherBudgets(report) {
  const rows = [];
  const row = (name, budget, step_s) => [name, two(budget), seconds(step_s), step_s === report.step_s ? "" : signedSeconds(step_s - report.step_s)];
  if (report.tighter) rows.push(row("the next tighter", report.tighter.budget, report.tighter.step_s));
  rows.push(row("this one", report.budget, report.step_s));
  if (report.looser) rows.push(row("the next looser", report.looser.budget, report.looser.step_s));
  return [table([["budget", "name"], ["error", "number"], ["step", "number"], ["change", "number"]], rows),
    report.looser ? null : make("p", {}, "No looser budget makes the step shorter."),
    report.tighter ? null : make("p", {}, "Nothing is rounded, so no tighter budget changes anything.")];
}

function lowerRuns(plan, report) {
  if (!report.runs.length) return [make("p", {}, "All units compute in float32.")];
  const signedBytes = (value) => `${value < 0 ? "−" : ""}${bytes(Math.abs(value))}`;
  const rows = report.runs.slice(0, MOST_RUNS).map((run) => [
    run.first === run.last ? plan.units[run.first] : `${brief(plan.units[run.first], 60)} … ${brief(plan.units[run.last], 60)}`,
    run.format, two(run.output_error), two(run.gradient_error), run.sources.join(", "),
    seconds(run.saved_s), signedBytes(run.saved_bytes)]);
  const hidden = report.runs.length - rows.length;
  return [make("h3", {}, "Units in a lower format"),
    table([["units", "name"], ["format", "name"], ["error of result", "number"], ["of gradient", "number"], ["known from", "name"], ["device time saved", "number"], ["memory saved", "number"]], rows),
    hidden > 0 ? make("p", {}, `and ${hidden} more`) : null];
}
