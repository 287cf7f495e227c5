// The page, section by section.

async function unpackPlan(plan) {
  return { predicted: await unpack(plan.predicted, plan.devices), measured: plan.measured ? await unpack(plan.measured, plan.devices) : null };
}

async function main() {
  const plan = DATA.plans[0];
  const detail = DATA.detail ? JSON.parse(new TextDecoder().decode(await inflate(DATA.detail))) : null;
  document.getElementById("title").textContent = brief(plan.model, 120);
  document.getElementById("subtitle").textContent = [
    plan.training ? "training" : "inference", formatsOf(plan).join(" and "), `batch of ${plan.batch}`,
    `schedule ${plan.schedule}`, plural(plan.units.length, "unit"), `structure ${plan.model_hash.slice(0, 12)}`].join(" · ");
  overview(plan);
  modelSection(plan, detail);
  const lanes = [];
  for (const each of DATA.plans) lanes.push(await unpackPlan(each));
  timelineSection(plan, lanes[0]);
  memorySection(plan, lanes[0]);
  whySection(plan);
  errorsSection(plan);
  certificateSection(plan);
  if (DATA.diff) compareSection(DATA.plans, DATA.diff, lanes);
  markSections();
  document.documentElement.dataset.ready = "true";
}

// The navigation tells which section is being read.
function markSections() {
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) entry.target.dataset.seen = entry.isIntersecting ? "1" : "";
    const current = SECTIONS.find(({ box }) => box.dataset.seen);
    for (const { box, link } of SECTIONS) {
      if (current && box === current.box) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-70px 0px -40% 0px" });
  SECTIONS.forEach(({ box }) => watcher.observe(box));
}

main().catch((error) => {
  const text = `This page could not be drawn: ${error.message}. A browser of 2023 or later is needed.`;
  document.getElementById("main").prepend(make("p", { class: "alert" }, text));
});
