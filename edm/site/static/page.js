// The page: what is asked for goes to worker.js, pictures come back. Texts of site.json are shown as text only.

const element = (id) => document.getElementById(id);
const STRIP = 17; // pictures between two seeds, both ends included
const SEEDS = 2 ** 32;
const SMALL = 128; // up to this width, a picture's pixels stay sharp when it is enlarged
const EACH = "each", DRAWN = "drawn";
const worker = new Worker("worker.js", { type: "module" });
const jobs = { grid: 0, blend: 0 };
let site, threads = 1;
let choices = []; // numbers of the classes or prompts that there are to choose from
let nextChoice = "from";

start().catch((error) => showProblem(error.message));

async function start() {
  const response = await fetch("site.json");
  if (!response.ok) throw new Error(`site.json can't be loaded: the server answers ${response.status}`);
  site = await response.json();
  choices = site.prompts ? [...site.prompts.texts.keys()] : site.classes;
  document.title = site.title;
  element("title").textContent = site.title;
  element("facts").textContent = facts().join(" · ");
  const size = ((site.model_bytes + (site.prompts?.bytes ?? 0)) / 1e6).toLocaleString("en", { maximumSignificantDigits: 2 });
  showStatus(`Loading the network, ${size} MB, and what runs it …`);
  document.body.classList.toggle("small", site.resolution <= SMALL);
  document.body.classList.toggle("of-prompts", Boolean(site.prompts));
  fillChoices();
  worker.addEventListener("message", ({ data }) => receive(data));
  worker.addEventListener("error", () => showProblem("this browser can't run the network"));
  const absolute = (url) => new URL(url, location.href).href;
  for (const file of Object.values(site.runtime.files)) file.url = absolute(file.url);
  worker.postMessage({ site: { ...site, model: absolute("network.onnx"), encoded: absolute("prompts.bin") } });
}

function facts() {
  const size = site.resolution;
  const found = [`${size} × ${size} pixels`, site.steps === 1 ? "one network evaluation a picture" : `${site.steps} network evaluations a picture`];
  const count = site.parameters;
  found.push(`${count < 1e6 ? `${Math.round(count / 1e3)} thousand` : `${(count / 1e6).toPrecision(3)} million`} parameters`);
  if (site.label_dim) found.push(`${site.classes.length} classes`);
  if (site.prompts) found.push(`${choices.length} prompt${choices.length > 1 ? "s" : ""}`);
  if (site.licence) found.push(`licence ${site.licence}`);
  return found;
}

function nameOf(of) {
  return site.prompts?.texts[of] ?? site.class_names?.[of] ?? `class ${of}`;
}

function fillChoices() {
  for (const label of document.querySelectorAll(".of-classes")) label.hidden = !choices.length;
  if (site.prompts) for (const what of document.querySelectorAll(".what")) what.textContent = "Prompt";
  const fill = (id, first) => {
    const named = choices.map((of) => [String(of), nameOf(of)]);
    element(id).replaceChildren(...[...first, ...named].map(([value, text]) => new Option(text, value)));
  };
  fill("class", [[DRAWN, "by seed"], [EACH, "each in turn"]]);
  fill("from-class", [[DRAWN, "by seed"]]);
  fill("to-class", [[DRAWN, "by seed"]]);
}

function showStatus(text, isProblem = false) {
  const status = element("status");
  status.className = isProblem ? "problem" : "quiet";
  status.textContent = text;
}

function showProblem(reason) {
  showStatus(`It doesn't work: ${reason}.`, true);
}

function receive(message) {
  if (message.failure) {
    showProblem(message.failure);
  } else if (message.ready) {
    threads = message.ready.threads;
    showStatus("");
    for (const hidden of document.querySelectorAll("section, #about")) hidden.hidden = false;
    askGrid();
    askBlend();
  } else if (message.id === jobs[message.kind]) {
    if (message.done) finish(message.kind, message.done);
    else draw(message);
  }
}

// --- what is asked for

const chosen = (id) => (element(id).value === DRAWN || !choices.length ? null : Number(element(id).value));

function askGrid() {
  if (!element("grid-form").reportValidity()) return;
  const first = Number(element("seed").value);
  const turn = element("class").value === EACH;
  const items = Array.from({ length: Number(element("count").value) }, (_, i) => ({
    seed: (first + i) % SEEDS, of: turn ? choices[i % choices.length] : chosen("class"),
  }));
  element("grid").replaceChildren(...items.map(pictureButton));
  ask("grid", { items });
}

function askBlend() {
  if (!element("blend-form").reportValidity()) return;
  const [from, to] = ["from", "to"].map((end) => ({
    seed: Number(element(`${end}-seed`).value), of: chosen(`${end}-class`),
  }));
  element("strip").replaceChildren(...Array.from({ length: STRIP }, canvas));
  ask("blend", { from, to, count: STRIP });
}

function ask(kind, job) {
  jobs[kind] += 1;
  element(`save-${kind}`).disabled = true;
  element(`${kind}-time`).textContent = "Making pictures …";
  worker.postMessage({ kind, id: jobs[kind], ...job });
}

function canvas() {
  const made = document.createElement("canvas");
  made.className = "picture";
  made.width = made.height = site.resolution;
  return made;
}

function pictureButton({ seed }) {
  const button = document.createElement("button");
  const name = document.createElement("span");
  name.className = "name";
  button.type = "button";
  button.dataset.seed = seed;
  button.setAttribute("aria-pressed", "false");
  button.append(canvas(), `seed ${seed}`, name);
  button.addEventListener("click", () => choose(button));
  return button;
}

// The first chosen picture is the one to blend from, the second the one to blend to, and so on.
function choose(button) {
  const same = document.querySelector(`#grid [data-end=${nextChoice}]`);
  for (const old of [same, button].filter(Boolean)) {
    delete old.dataset.end;
    old.setAttribute("aria-pressed", "false");
  }
  button.dataset.end = nextChoice;
  button.setAttribute("aria-pressed", "true");
  element(`${nextChoice}-seed`).value = button.dataset.seed;
  if (choices.length) element(`${nextChoice}-class`).value = button.dataset.of;
  nextChoice = nextChoice === "from" ? "to" : "from";
  askBlend();
}

// --- what comes back

function draw({ kind, index, picture, of }) {
  const place = element(kind === "grid" ? "grid" : "strip").children[index];
  const target = kind === "grid" ? place.querySelector("canvas") : place;
  Object.assign(target, { width: picture.width, height: picture.height });
  target.getContext("2d").putImageData(new ImageData(picture.rgba, picture.width, picture.height), 0, 0);
  if (kind === "blend") {
    if (index === Number(element("place").value)) showPlace();
  } else if (of !== null) {
    place.dataset.of = of;
    place.title = place.querySelector(".name").textContent = nameOf(of);
  }
}

function finish(kind, { pictures, ms }) {
  element(`save-${kind}`).disabled = false;
  const each = ms / pictures;
  const how = threads === 1 ? "one thread" : `${threads} threads`;
  element(`${kind}-time`).textContent = `${pictures} picture${pictures > 1 ? "s" : ""}, ${each.toPrecision(3)} ms each with ${how}`;
}

function showPlace() {
  const index = Number(element("place").value);
  const strip = [...element("strip").children];
  strip.forEach((picture, i) => picture.classList.toggle("here", i === index));
  if (!strip[index]) return;
  const shown = element("shown");
  Object.assign(shown, { width: strip[index].width, height: strip[index].height });
  shown.getContext("2d").drawImage(strip[index], 0, 0);
}

// All pictures in one, pixel by pixel.
function save(pictures, columns, name) {
  const { width, height } = pictures[0];
  const sheet = document.createElement("canvas");
  Object.assign(sheet, { width: columns * width, height: Math.ceil(pictures.length / columns) * height });
  const context = sheet.getContext("2d");
  pictures.forEach((picture, i) => context.drawImage(picture, (i % columns) * width, Math.floor(i / columns) * height));
  sheet.toBlob((blob) => {
    const link = document.createElement("a");
    Object.assign(link, { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  });
}

element("grid-form").addEventListener("change", askGrid);
element("blend-form").addEventListener("change", askBlend);
for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
element("place").addEventListener("input", showPlace);
element("other-seeds").addEventListener("click", () => {
  element("seed").value = Math.floor(Math.random() * 1e6);
  askGrid();
});
element("save-grid").addEventListener("click", () => {
  const pictures = [...document.querySelectorAll("#grid canvas")];
  save(pictures, Math.ceil(Math.sqrt(pictures.length)), `seeds-${element("seed").value}.png`);
});
element("save-blend").addEventListener("click", () => {
  const name = `seeds-${element("from-seed").value}-to-${element("to-seed").value}.png`;
  save([...element("strip").children], STRIP, name);
});
