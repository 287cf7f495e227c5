// The page, section by section.

async function unpackPlan(plan) {
  return { predicted: await unpack(plan.predicted), measured: plan.measured ? await unpack(plan.measured) : null };
}

async function main() {
  const plan = DATA.plans[0];
  document.getElementById("title").textContent = brief(plan.headline, 160);
  document.getElementById("subtitle").textContent =
    `plan ${plan.model_hash.slice(0, 12)}, schedule ${plan.schedule}, ${plural(plan.units.length, "unit")}`;
  overview(plan);
  modelSection(plan);
  const lanes = [];
  for (const each of DATA.plans) lanes.push(await unpackPlan(each));
  timelineSection(plan, lanes[0]);
  memorySection(plan, lanes[0]);
  certificateSection(plan);
  if (DATA.diff) compareSection(DATA.plans, DATA.diff, lanes);
  document.documentElement.dataset.ready = "true";
}

main().catch((error) => {
  const text = `This page could not be drawn: ${error.message}. A browser of 2023 or later is needed.`;
  document.getElementById("main").prepend(make("p", { class: "alert" }, text));
});
