"use strict";

// All runs of a folder: a table and charts that compare the ticked ones, brought up to date every few seconds.

const EVERY_MS = 5000;
const TICKED_AT_FIRST = 8;
const ORDER = ["distance", "divergence", "generator", "fake-score", "loss", "speed"];
const HEADINGS = ["Compare", "Run", "what", "state", "kimg", "loss", "distance", "features", "FID", "img/s", "finding"];
const SORTED_BY = ["", "name", "what", "state", "kimg", "loss", "distance", "features", "fid", "rate", "finding"];
const FIRST_FIGURE = 5; // of HEADINGS: from here on, columns that are empty in all rows are hidden

const plots = new Plots();
const rows = new Map(); // of the table, by the run's name: { row, box, cells }
let runs = [];
let order = { by: "name", sign: 1 }; // of the rows

function element(tag, text = "", attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.textContent = text;
  return made;
}

function makeTable() {
  const head = document.createElement("tr");
  head.append(...HEADINGS.map((heading, i) => {
    const cell = element("th", SORTED_BY[i] ? "" : heading, { scope: "col" });
    if (SORTED_BY[i]) {
      cell.append(element("button", heading, { onclick: () => sortBy(SORTED_BY[i]) }));
    }
    return cell;
  }));
  const table = document.getElementById("table");
  table.append(document.createElement("thead"), document.createElement("tbody"));
  table.tHead.append(head);
  return table.tBodies[0];
}

function sortBy(by) {
  order = { by, sign: by === order.by ? -order.sign : 1 };
  showRows(document.getElementById("table").tBodies[0]);
}

// Runs without the value come last in either direction.
function sorted() {
  const { by, sign } = order;
  return [...runs].sort((one, other) => {
    const [a, b] = [one[by] ?? "", other[by] ?? ""];
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
  });
}

function makeRow(name) {
  const row = document.createElement("tr");
  const box = element("input", "", { type: "checkbox", checked: rows.size < TICKED_AT_FIRST });
  box.setAttribute("aria-label", `Compare ${name}`);
  box.addEventListener("change", drawCharts);
  const first = document.createElement("td");
  first.append(box);
  const heading = element("th", "", { scope: "row" });
  heading.append(element("a", name, { href: `/run/${encodeURIComponent(name)}` }));
  const cells = HEADINGS.slice(2).map(() => document.createElement("td"));
  row.append(first, heading, ...cells);
  return { row, box, cells };
}

function showRows(body) {
  for (const run of runs) {
    if (!rows.has(run.name)) rows.set(run.name, makeRow(run.name));
    const total = run.total == null ? "" : ` of ${figure(run.total)}`;
    const texts = [run.what, run.state, figure(run.kimg) + total];
    texts.push(...[run.loss, run.distance, run.features, run.fid, run.rate].map(figure), run.finding);
    rows.get(run.name).cells.forEach((cell, i) => {
      if (cell.textContent !== texts[i]) cell.textContent = texts[i];
    });
  }
  for (const name of [...rows.keys()]) {
    if (!runs.some((run) => run.name === name)) rows.delete(name);
  }
  HEADINGS.forEach((heading, i) => {
    const cells = [...rows.values()].map(({ row }) => row.children[i]);
    const isEmpty = i >= FIRST_FIGURE && cells.every((cell) => ["", "–"].includes(cell.textContent));
    for (const cell of [body.parentElement.tHead.rows[0].children[i], ...cells]) cell.hidden = isEmpty;
  });
  SORTED_BY.forEach((by, i) => {
    const cell = body.parentElement.tHead.rows[0].children[i];
    if (by === order.by) cell.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  });
  const wanted = sorted().map((run) => rows.get(run.name).row);
  if (wanted.length !== body.rows.length || wanted.some((row, i) => row !== body.rows[i])) body.replaceChildren(...wanted);
}

// One chart with the first curve of each run that has this chart.
function compared(name, chosen) {
  const having = chosen.filter((run) => run.charts[name]);
  if (!having.length) return null;
  const [kimg, ...values] = uPlot.join(having.map((run) => [run.charts[name].kimg, run.charts[name].values[0]]));
  const all = values.flat().filter((value) => value != null);
  const low = Math.min(...all);
  const log = low > 0 && Math.max(...all) > 10 * low;
  const goal = having.map((run) => run.charts[name].goal).find(Boolean) ?? null;
  const labels = having.map((run) => run.name);
  const colours = having.map((run) => runs.indexOf(run)); // the same in every chart
  const { title, zero } = having[0].charts[name];
  return { name, title, log: log && !zero, zero, kimg, labels, colours, values, goal };
}

function drawCharts() {
  const chosen = runs.filter((run) => rows.get(run.name).box.checked);
  const metrics = [...new Set(chosen.flatMap((run) => Object.keys(run.charts)))].filter((name) => !ORDER.includes(name));
  const shown = [...metrics, ...ORDER].map((name) => compared(name, chosen)).filter(Boolean);
  const box = document.getElementById("charts");
  for (const place of [...box.children]) {
    if (!shown.some((chart) => chart.name === place.dataset.name)) {
      plots.remove(place.lastChild);
      place.remove();
    }
  }
  shown.forEach((chart, i) => {
    let place = [...box.children].find((child) => child.dataset.name === chart.name);
    if (!place) {
      place = element("figure", "", { className: "chart" });
      place.dataset.name = chart.name;
      const caption = document.createElement("figcaption");
      caption.append(element("h3", chart.title));
      const plot = element("div", "", { className: "plot", tabIndex: 0, role: "group" });
      plot.setAttribute("aria-label", `${chart.title} of the ticked runs`);
      place.append(caption, plot);
    }
    if (box.children[i] !== place) box.insertBefore(place, box.children[i] ?? null);
    plots.show(place.lastChild, chart);
  });
}

async function update(body) {
  const status = document.getElementById("status");
  try {
    const answer = await fetch("/runs.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const text = await answer.text();
    if (text !== update.last) {
      update.last = text;
      runs = JSON.parse(text);
      showRows(body);
      drawCharts();
    }
    status.textContent = runs.length ? `${runs.length} run${runs.length === 1 ? "" : "s"}` : "No run with a finished tick yet";
  } catch (error) {
    status.textContent = `The server doesn't answer (${error.message}); start it again`;
  }
  setTimeout(update, EVERY_MS, body);
}

update(makeTable());
