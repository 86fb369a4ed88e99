// Runs the network, apart from the page, which stays responsive meanwhile.
//
// In:  {site}, once: what site.json says, with absolute addresses; then any number of jobs
//      {kind: "grid", id, items: [{seed, of}]} or {kind: "blend", id, from: {seed, of}, to: {seed, of}, count},
//      where `of` is a class or prompt, or null for the one that the seed gives. A newer job of a kind ends the older one.
// Out: {ready: {threads}}; {kind, id, index, picture: {width, height, rgba}, of}; {kind, id, done: {pictures, ms}};
//      {failure}.
import { between, drawn, fromHalf } from "./noise.js";

const AT_ONCE = 4; // pictures in one call of the network
const MAX_THREADS = 8;
const newest = {}; // kind: id
let site, ort, session;
let encoded; // all prompts, one after the other
let before = Promise.resolve();

addEventListener("message", ({ data }) => {
  if (data.site) {
    before = load(data.site).catch(fail);
  } else {
    newest[data.kind] = data.id;
    before = before.then(() => session && make(data)).catch(fail);
  }
});

function fail(error) {
  postMessage({ failure: String(error?.message ?? error) });
}

async function load(description) {
  site = description;
  const { module, loader, wasm } = site.runtime.files;
  const [moduleCode, loaderCode, wasmBinary, model, prompts] = await Promise.all([
    fetched(module.url, module.integrity), fetched(loader.url, loader.integrity), fetched(wasm.url, wasm.integrity),
    fetched(site.model), site.prompts && fetched(site.encoded),
  ]);
  if (prompts) encoded = site.prompts.bits === 16 ? new Uint16Array(prompts) : new Float32Array(prompts);
  const address = (code) => URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  ort = await import(address(moduleCode));
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
  Object.assign(ort.env.wasm, { numThreads: threads, wasmBinary, wasmPaths: { mjs: address(loaderCode) } });
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  await run([inputs({ seed: 0, of: null })]); // memory is taken in the first call, which therefore takes longer
  postMessage({ ready: { threads: ort.env.wasm.numThreads } });
}

async function fetched(url, integrity = "") {
  const name = url.split("/").pop();
  let response;
  try {
    response = await fetch(url, { integrity });
  } catch {
    throw new Error(`${name} can't be loaded: there is no connection, or it isn't the file that this page was made for`);
  }
  if (!response.ok) throw new Error(`${name} can't be loaded: the server answers ${response.status}`);
  return response.arrayBuffer();
}

async function make(job) {
  const blend = job.kind === "blend" && [inputs(job.from), inputs(job.to)];
  const count = blend ? job.count : job.items.length;
  let ms = 0;
  for (let start = 0; start < count; start += AT_ONCE) {
    await new Promise((resolve) => setTimeout(resolve)); // lets newer jobs in
    if (newest[job.kind] !== job.id) return;
    const indices = Array.from({ length: Math.min(AT_ONCE, count - start) }, (_, i) => start + i);
    const all = indices.map((i) => (blend ? mixed(...blend, i / (count - 1)) : inputs(job.items[i])));
    const begun = performance.now();
    const pictures = await run(all);
    ms += performance.now() - begun;
    pictures.forEach((picture, i) => {
      postMessage({ kind: job.kind, id: job.id, index: indices[i], picture, of: all[i].of }, [picture.rgba.buffer]);
    });
  }
  postMessage({ kind: job.kind, id: job.id, done: { pictures: count, ms } });
}

// What the network takes for one picture: {z, noise, condition}, float32, and of: its class or prompt.
function inputs({ seed, of }) {
  const size = site.shape.reduce((product, n) => product * n);
  const { z, which, further } = drawn(seed, size, site.classes.length, site.noise_steps);
  if (site.prompts) {
    const number = of ?? seed % site.prompts.texts.length; // as edm.generate --prompts=FILE
    return { z, noise: further, condition: prompt(number), of: number };
  }
  const chosen = site.label_dim ? (of ?? site.classes[which]) : null;
  const condition = new Float32Array(site.label_dim);
  if (chosen !== null) condition[chosen] = 1;
  return { z, noise: further, condition, of: chosen };
}

function prompt(number) {
  const { dim, bits } = site.prompts;
  const row = encoded.subarray(number * dim, (number + 1) * dim);
  return bits === 16 ? Float32Array.from(row, fromHalf) : row;
}

function mixed(a, b, share) {
  const size = a.z.length;
  const noise = new Float32Array(a.noise.length);
  for (let i = 0; i < noise.length; i += size) {
    noise.set(between(a.noise.subarray(i, i + size), b.noise.subarray(i, i + size), share), i);
  }
  const condition = a.condition.map((value, i) => (1 - share) * value + share * b.condition[i]);
  return { z: between(a.z, b.z, share), noise, condition, of: null };
}

async function run(all) {
  const joined = (name, shape) => {
    const values = new Float32Array(all.length * all[0][name].length);
    all.forEach((input, i) => values.set(input[name], i * input[name].length));
    return new ort.Tensor("float32", values, [all.length, ...shape]);
  };
  const feeds = { z: joined("z", site.shape) };
  if (site.noise_steps) feeds.noise = joined("noise", [site.noise_steps, ...site.shape]);
  if (site.label_dim) feeds.class_labels = joined("condition", [site.label_dim]);
  if (site.prompts) feeds.prompts = joined("condition", [site.prompts.dim]);
  const { images } = await session.run(feeds);
  const [, channels, height, width] = images.dims;
  return all.map((_, i) => {
    const values = images.data.subarray(i * channels * height * width, (i + 1) * channels * height * width);
    return { width, height, rgba: interleaved(values, channels, height * width) };
  });
}

// Channels one after the other, as pixels of red, green, blue and opacity.
function interleaved(values, channels, pixels) {
  const rgba = new Uint8ClampedArray(4 * pixels).fill(255);
  for (let channel = 0; channel < 3; channel++) {
    const start = channels === 1 ? 0 : channel * pixels;
    for (let i = 0; i < pixels; i++) rgba[4 * i + channel] = values[start + i];
  }
  return rgba;
}
