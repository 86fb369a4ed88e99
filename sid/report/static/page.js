"use strict";

const plots = new Plots();

// Pictures: one at a time, chosen by a slider -----------------------------------------------------------------------

function slide(box) {
  const frames = [...box.querySelectorAll(".frame")];
  if (frames.length < 2) return;
  const row = document.createElement("div");
  const input = document.createElement("input");
  const label = document.createElement("label");
  row.className = "slider";
  label.textContent = "Time";
  label.htmlFor = input.id = "slider";
  Object.assign(input, { type: "range", min: 0, max: frames.length - 1, value: frames.length - 1 });
  const show = () => {
    frames.forEach((frame, i) => { frame.hidden = i !== Number(input.value); });
    input.setAttribute("aria-valuetext", frames[input.value].dataset.label);
  };
  input.addEventListener("input", show);
  row.append(label, input);
  box.parentElement.before(row);
  show();
}

// A command breaks between its words only, not after the dashes of an option.
function keepWords(block) {
  const code = block.firstElementChild;
  if (code.textContent.includes("\n")) return;
  const words = code.textContent.split(" ").map((text) => {
    const word = document.createElement("span");
    word.textContent = text;
    return [word, " "];
  });
  code.replaceChildren(...words.flat().slice(0, -1));
  block.className = "command";
}

// Where the browser lets a page copy.
function offerCopy(block) {
  const button = document.createElement("button");
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const copied = navigator.clipboard.writeText(block.textContent);
    button.textContent = await copied.then(() => "Copied", () => "Failed");
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  const box = document.createElement("div");
  box.className = "copied";
  block.replaceWith(box);
  box.append(block, button);
}

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const frames = document.getElementById("frames");
  if (frames) slide(frames);
  document.querySelectorAll("pre").forEach(keepWords);
  if (navigator.clipboard) document.querySelectorAll("pre").forEach(offerCopy);
  for (const chart of data.charts) plots.show(document.getElementById(`chart-${chart.name}`), chart);
  for (const time of document.querySelectorAll("time")) {
    const date = new Date(time.dateTime);
    if (isNaN(date)) continue;
    const hours = (Date.now() - date) / 3.6e6;
    const isOld = document.querySelector(".badge.running") && hours > 1;
    time.textContent = date.toLocaleString() + (isOld ? `, ${figure(hours)} hours ago, so it may have ended,` : "");
  }
}

start();
