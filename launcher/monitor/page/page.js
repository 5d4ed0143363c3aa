"use strict";
/* The page of a run: asks its server again and again, or shows the runs that were put into the file. What it is told may
   hold anything, in names, errors and lines of logs: all of it becomes text, and nothing else. */

const ASK_SECONDS = 1, LONGEST_SECONDS = 15;
const TIME_STATES = ["productive", "startup", "recovery", "lost", "checkpoint", "evaluation", "stall"];
const PHASES = ["loading data", "computing", "reducing gradients", "updating", "agreeing"];
const COLORS = [0, 1, 2, 3, 4].map((number) => `var(--run-${number})`);

const byId = (id) => document.getElementById(id);
const clock = (time) => new Date(time * 1000).toLocaleString(undefined, { dateStyle: "short", timeStyle: "medium" });
const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);

const PLOTS = {
  loss: new Plot("Loss", "nats per token"),
  grad_norm: new Plot("Gradient norm", ""),
  tokens_per_second: new Plot("Throughput", "tokens/s"),
  mfu: new Plot("Model FLOPs utilisation", ""),
  seconds: new Plot("Step time", "s"),
  phases: new Plot("Phases of a step", "s"),
  tasks: new Plot("Tasks", "score"),
  lr: new Plot("Learning rate", ""),
};
const heat = new Heat(byId("heat"), byId("heat-text"));
let shown = [];

/* ------------------------------------------------------------------------------------------------------ the whole page */

function show(views) {
  shown = views;
  const [view] = views;
  document.title = `${view.name}: ${view.state}, step ${view.step}`;
  byId("name").textContent = views.map((each) => each.name).join(" | ");
  byId("state").textContent = view.state;
  byId("state").className = `badge ${view.state}`;
  showFacts(view);
  showProgress(view);
  showFigures(view);
  showTime(view);
  showCompared(views);
  showPlots(views);
  heat.show(view.ranks);
  showTables(view);
  showLogs(view.log ?? []);
  document.body.dataset.step = view.step;
}

function showFacts(view) {
  const { layout, precision, parameters, preset, device, ranks } = view.facts;
  const told = [preset, `${short(parameters)} parameters`, precision, layout, ranks && `${ranks} ranks`, device];
  byId("facts").textContent = told.filter(Boolean).join(" · ");
}

function showProgress(view) {
  const share = view.num_steps ? view.step / view.num_steps : 0, bar = byId("progress");
  bar.setAttribute("aria-valuemax", view.num_steps);
  bar.setAttribute("aria-valuenow", view.step);
  bar.firstElementChild.style.width = `${100 * Math.min(1, share)}%`;
  const isTraining = view.state === "training" && view.remaining_seconds > 0;
  const left = isTraining ? `, ${duration(view.remaining_seconds)} left` : "";
  byId("progress-text").textContent =
    `step ${view.step.toLocaleString()} of ${view.num_steps.toLocaleString()} (${percent(share)}), ` +
    `${short(view.tokens)} tokens${left}`;
}

function figuresOf(view) {
  const last = (name) => view.curves[name]?.value.at(-1) ?? null;
  const evaluation = view.evaluations.at(-1), checkpoint = view.checkpoints.at(-1);
  const restarts = Object.values(view.restarts).reduce((sum, count) => sum + count, 0);
  return {
    "goodput": percent(view.goodput),
    "loss": short(view.loss),
    "held-out loss": short(evaluation?.loss ?? null),
    "step time": last("seconds") === null ? "–" : `${short(last("seconds"))} s`,
    "tokens/s": short(last("tokens_per_second")),
    ...(view.curves.mfu ? { "MFU": percent(last("mfu")) } : {}),
    "newest checkpoint": checkpoint ? `step ${checkpoint.step.toLocaleString()}` : "none",
    "restarts": String(restarts),
    "skipped steps": String(Object.values(view.skipped).reduce((sum, count) => sum + count, 0)),
  };
}

function showFigures(view) {
  const rows = Object.entries(figuresOf(view)).map(([name, value]) => {
    const row = element("div");
    row.append(element("dt", {}, name), element("dd", {}, value));
    return row;
  });
  byId("figures").replaceChildren(...rows);
}

function showTime(view) {
  const total = TIME_STATES.reduce((sum, state) => sum + (view.times[state] ?? 0), 0);
  const spent = TIME_STATES.filter((state) => view.times[state] > 0);
  byId("time").parentElement.hidden = !total;
  byId("time").replaceChildren(...spent.map((state) => {
    const part = element("span", { title: `${state} ${duration(view.times[state])}` });
    part.style.cssText = `width: ${(100 * view.times[state]) / total}%; background: var(--${state})`;
    return part;
  }));
  byId("time-legend").replaceChildren(...spent.map((state) => {
    const swatch = element("span", { class: "swatch" }), item = element("li");
    swatch.style.background = `var(--${state})`;
    item.append(swatch, `${state} ${duration(view.times[state])} (${percent(view.times[state] / total)})`);
    return item;
  }));
  const told = spent.map((state) => `${state} ${percent(view.times[state] / total)}`);
  byId("time").setAttribute("aria-label", told.join(", "));
}

/* ----------------------------------------------------------------------------------------------------------- the plots */

function showPlots(views) {
  const [view] = views, axis = byId("axis").value;
  const marks = byId("marked").checked ? marksOf(view, axis) : [];
  const drawn = { axis, marks, logarithmic: false };
  for (const name of ["grad_norm", "tokens_per_second", "mfu", "seconds", "lr"]) {
    PLOTS[name].show({ ...drawn, curves: views.flatMap((each, index) => curveOf(each, name, axis, index, views)) });
  }
  PLOTS.loss.show({ ...drawn, logarithmic: byId("logarithmic").checked, curves: views.flatMap((each, index) => lossesOf(each, axis, index, views)) });
  PLOTS.tasks.show({ ...drawn, curves: views.flatMap((each, index) => scoresOf(each, axis, index, views)) });
  const phases = PHASES.filter((phase) => view.curves[phase]?.value.some((value) => value > 0));
  PLOTS.phases.show({
    ...drawn,
    stacked: true,
    curves: phases.map((phase) => ({ name: phase, ...columns(view, view.curves[phase], axis), color: `var(--phase-${PHASES.indexOf(phase)})` })),
  });
}

function curveOf(view, name, axis, index, views) {
  if (!view.curves[name]) return [];
  const color = COLORS[index % COLORS.length];
  return [{ name: views.length > 1 ? view.name : name.replaceAll("_", " "), ...columns(view, view.curves[name], axis), color, dash: index % DASHES.length }];
}

function lossesOf(view, axis, index, views) {
  const name = (what) => (views.length > 1 ? `${view.name}, ${what}` : what);
  const heldout = view.evaluations, color = COLORS[index % COLORS.length];
  const training = curveOf(view, "loss", axis, index, views).map((curve) => ({ ...curve, name: name("training") }));
  const x = heldout.map((each) => (axis === "time" ? each.time - view.began : each.step));
  const dots = { name: name("held-out"), x, y: heldout.map((each) => each.loss), color: views.length > 1 ? color : COLORS[1], dash: 1, dots: true };
  return heldout.length ? [...training, dots] : training;
}

/* The first of many: more would not be told apart, and the table has them all. */
const MOST_SCORES = 10;
const scoreNames = (view) => [...new Set(view.judgements.flatMap((each) => Object.keys(each.scores)))];

function scoresOf(view, axis, index, views) {
  return scoreNames(view).slice(0, MOST_SCORES).map((name, number) => {
    const found = view.judgements.filter((each) => name in each.scores);
    return {
      name: views.length > 1 ? `${view.name}, ${name}` : name,
      x: found.map((each) => (axis === "time" ? each.time - view.began : each.step)),
      y: found.map((each) => each.scores[name]),
      color: COLORS[number % COLORS.length],
      dash: (views.length > 1 ? index : Math.floor(number / COLORS.length)) % DASHES.length,
      dots: true,
    };
  });
}

const columns = (view, curve, axis) => ({
  x: axis === "time" ? curve.time.map((time) => time - view.began) : curve.step,
  y: curve.value,
});

/* Events between two steps stand where the next one is. */
function marksOf(view, axis) {
  const { step, time } = view.curves.loss;
  return view.marks.filter((mark) => mark.kind !== "training_started" || mark.step > 0).map((mark) => {
    const at = mark.step ?? (time.length ? step[nearest(time, mark.time)] : 0);
    return { x: axis === "time" ? mark.time - view.began : at, text: `${clock(mark.time)} ${mark.kind}: ${mark.text}` };
  });
}

/* ---------------------------------------------------------------------------------------------------------- the tables */

function fill(id, rows) {
  const table = byId(id);
  table.closest("section").hidden = !rows.length;
  table.tBodies[0].replaceChildren(...rows.map((cells) => {
    const row = element("tr");
    for (const cell of cells) row.append(typeof cell === "string" ? element("td", {}, cell) : element("td", { class: "number" }, cell.number));
    return row;
  }));
}

const number = (value) => ({ number: typeof value === "number" ? value.toLocaleString() : value });

function showTables(view) {
  showPlan(view.plan);
  fill("events", [...view.marks].reverse().map((mark) => [clock(mark.time), mark.kind.replaceAll("_", " "), number(mark.step ?? ""), mark.text]));
  fill("checkpoints", [...view.checkpoints].reverse().map((each) => [number(each.step), clock(each.time), number(`${short(each.bytes)}B`), number(duration(each.seconds))]));
  byId("saves").textContent = view.saves;
  const newest = view.evaluations.at(-1), sources = Object.entries(view.heldout_sources);
  const scored = (step, task, loss, uniform) => [
    number(step), task, number(loss.toFixed(4)), number(short(Math.exp(loss))), number(uniform?.toFixed(4) ?? ""),
  ];
  fill("evaluations", [...view.evaluations].reverse().flatMap((each) => [
    scored(each.step, "held-out", each.loss, each.uniform_loss),
    ...(each === newest && sources.length > 1 ? sources.map(([name, loss]) => scored(each.step, `held-out: ${name}`, loss)) : []),
  ]));
  fill("tasks", scoreNames(view).map((name) => {
    const found = view.judgements.filter((each) => name in each.scores), newest = found.at(-1);
    const highest = found.reduce((best, each) => (each.scores[name] > best.scores[name] ? each : best));
    return [name, number(short(newest.scores[name])), number(newest.step), number(short(highest.scores[name])), number(highest.step)];
  }));
  fill("data", Object.entries(view.data).map(([name, source]) => [
    name,
    number(percent(source.share)),
    number(source.epochs === undefined ? "" : source.epochs.toFixed(2)),
    number(source.documents ?? ""),
    number(source.tokens ?? ""),
    Object.entries(source.dropped ?? {}).map(([reason, count]) => `${reason} ${count.toLocaleString()}`).join(", "),
  ]));
}

const QUANTITIES = {
  step_seconds: ["step time", (value) => `${short(value)} s`],
  tokens_per_second: ["tokens/s", short],
  mfu: ["MFU", percent],
  memory_bytes: ["memory of the fullest rank", (value) => `${short(value)}B`],
};

function showPlan(plan) {
  fill("plan", Object.entries(plan ?? {}).map(([name, { planned, measured }]) => {
    const [told, shown] = QUANTITIES[name], has = measured !== null;
    return [told, number(shown(planned)), number(has ? shown(measured) : "–"), number(has && planned > 0 ? percent(measured / planned - 1) : "–")];
  }));
}

function showCompared(views) {
  const section = byId("compared");
  section.hidden = views.length < 2;
  if (section.hidden) return;
  const told = views.map((view) => ({ ...factsOf(view), ...figuresOf(view) }));
  const header = element("tr");
  header.append(element("th"), ...views.map((view) => element("th", {}, view.name)));
  section.querySelector("thead").replaceChildren(header);
  section.querySelector("tbody").replaceChildren(...Object.keys({ ...told[0], ...told[1] }).map((name) => {
    const row = element("tr");
    row.append(element("th", { scope: "row" }, name), ...told.map((each) => element("td", {}, each[name] ?? "–")));
    return row;
  }));
}

const factsOf = (view) => ({
  "state": view.state,
  "steps": `${view.step.toLocaleString()} of ${view.num_steps.toLocaleString()}`,
  "tokens": short(view.tokens),
  "parameters": short(view.facts.parameters),
  "precision": view.facts.precision,
  "layout": view.facts.layout,
  "device": view.facts.device ?? "–",
});

function showLogs(lines) {
  const names = [...new Set(lines.map((each) => each.log))].sort(), select = byId("log-of"), wanted = select.value;
  select.closest("section").hidden = !lines.length;
  if (names.join("\n") !== [...select.options].slice(1).map((option) => option.value).join("\n")) {
    select.replaceChildren(element("option", { value: "" }, "all"), ...names.map((name) => element("option", { value: name }, name)));
    select.value = names.includes(wanted) ? wanted : "";
  }
  const chosen = lines.filter((each) => !select.value || each.log === select.value);
  const text = chosen.map((each) => (select.value ? each.line : `${each.log} | ${each.line}`)).join("\n");
  const log = byId("log"), isAtEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
  if (log.textContent === text) return;
  log.textContent = text;
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

/* ---------------------------------------------------------------------------------------------------------- the server */

function token() {
  if (location.hash.length > 1) {
    sessionStorage.setItem("token", decodeURIComponent(location.hash.slice(1)));
    history.replaceState(null, "", location.pathname + location.search);
  }
  return sessionStorage.getItem("token");
}

async function ask(headers) {
  const answer = await fetch("api/run", { headers, cache: "no-store" });
  if (answer.status === 401) return "A token is needed: open the address that the command has printed, with all that follows #.";
  if (!answer.ok) return `The server answers ${answer.status}.`;
  show([await answer.json()]);
  return "";
}

async function follow() {
  const given = token(), headers = given ? { Authorization: `Bearer ${given}` } : {};
  let wait = ASK_SECONDS, since = null;
  for (;;) {
    let problem;
    try {
      problem = await ask(headers);
    } catch (error) {
      if (!(error instanceof TypeError)) console.error(error);
      since ??= Date.now() / 1000;
      problem = `Nobody has answered since ${clock(since)}; the command may have ended.`;
    }
    if (!problem) since = null;
    byId("connection").textContent = problem;
    wait = problem ? Math.min(LONGEST_SECONDS, 2 * wait) : ASK_SECONDS;
    await new Promise((resolve) => setTimeout(resolve, 1000 * wait * (document.hidden ? 5 : 1)));
  }
}

byId("plots").append(...Object.values(PLOTS).map((plot) => plot.section));
for (const id of ["axis", "logarithmic", "marked"]) byId(id).addEventListener("change", () => shown.length && showPlots(shown));
byId("log-of").addEventListener("change", () => shown.length && showLogs(shown[0].log ?? []));

const embedded = byId("runs");
if (embedded) show(JSON.parse(embedded.textContent));
else follow();
