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

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const frames = document.getElementById("frames");
  if (frames) slide(frames);
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
