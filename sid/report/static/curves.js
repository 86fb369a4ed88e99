"use strict";

// Draws charts of `Chart.plain` (sid/report/curves.py) with uPlot.

const HEIGHT = 220;
const NEARBY = "600px 0px"; // how far above and below the screen a chart counts as about to be seen
const COLOURS = 9; // --c0 to --c8 in page.css

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function figure(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function allSeries(chart) {
  const goal = chart.goal ? [{ label: chart.goal.label, dash: [6, 4], stroke: colour("--quiet") }] : [];
  const own = chart.labels.map((label, i) => ({ label, stroke: colour(`--c${(chart.colours?.[i] ?? i) % COLOURS}`) }));
  return [...own, ...goal].map((series) => ({
    ...series,
    width: 2,
    spanGaps: true,
    value: (plot, value, i) => figure(plot.cursor.idx == null ? plot.data[i].findLast((v) => v != null) : value),
    points: { show: chart.kimg.length < 40 && !series.dash, size: 5 },
  }));
}

function columns(chart) {
  const goal = chart.goal ? [chart.kimg.map(() => chart.goal.value)] : [];
  const positive = (value) => (chart.log && value <= 0 ? null : value);
  return [chart.kimg, ...chart.values.map((column) => column.map(positive)), ...goal];
}

// To one digit, so that the marks of the axis are round numbers.
function logarithmicRange(_, low, high) {
  if (!(low > 0)) return [0.1, 1];
  const digit = (value) => 10 ** Math.floor(Math.log10(value));
  return [Math.floor(low / digit(low)) * digit(low), Math.ceil(high / digit(high)) * digit(high)];
}

function rangeOf(chart) {
  if (chart.log) return { distr: 3, range: logarithmicRange };
  return chart.zero ? { range: (_, low, high) => uPlot.rangeNum(0, high, 0.1, true) } : {};
}

function draw(place, chart) {
  const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { show: false } };
  const values = (_, splits) => splits.map((split) => (split == null ? "" : figure(split)));
  const legendAtEnd = (plot) => plot.setLegend({ idx: plot.data[0].length - 1 }, false);
  const options = {
    width: Math.max(place.clientWidth, 200),
    height: HEIGHT,
    scales: { x: { time: false }, y: rangeOf(chart) },
    axes: [
      { ...axis, values, space: 40, size: 28 },
      { ...axis, values, size: 62 },
    ],
    series: [{ label: "kimg", value: (_, value) => figure(value) }, ...allSeries(chart)],
    cursor: { sync: { key: "kimg", setSeries: false }, focus: { prox: 24 } },
    hooks: {
      ready: [legendAtEnd],
      setData: [legendAtEnd],
      setCursor: [(plot) => { if (plot.cursor.idx == null) legendAtEnd(plot); }],
    },
  };
  place.replaceChildren();
  return new uPlot(options, columns(chart), place);
}

function moveCursor(plot, key) {
  const last = plot.data[0].length - 1;
  const here = plot.cursor.idx ?? last;
  const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: last }[key];
  if (to === undefined) return false;
  const idx = Math.min(Math.max(to, 0), last);
  const column = plot.data.slice(1).find((values) => values[idx] != null);
  const top = column ? plot.valToPos(column[idx], "y") : 0;
  plot.setCursor({ left: plot.valToPos(plot.data[0][idx], "x"), top });
  return true;
}

function sameCurves(one, other) {
  const fixed = ({ log, zero, labels, goal, colours }) => JSON.stringify([log, zero, labels, goal, colours]);
  return fixed(one) === fixed(other);
}

// Keeps a chart for each place drawn: when the width or the colour scheme changes, and when it has new data.
// A chart is drawn when its place is about to be seen, so that long pages open quickly.
class Plots {
  constructor() {
    this.plots = new Map();
    this.waiting = new Map(); // charts that aren't drawn yet, by their places
    this.nearby = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) if (isIntersecting) this.begin(target);
    }, { rootMargin: NEARBY });
    addEventListener("beforeprint", () => { for (const place of [...this.waiting.keys()]) this.begin(place); });
    this.observer = new ResizeObserver((entries) => {
      for (const { target, contentRect } of entries) {
        const plot = this.plots.get(target)?.plot;
        if (plot && Math.abs(plot.width - contentRect.width) >= 1) {
          plot.setSize({ width: Math.max(contentRect.width, 200), height: HEIGHT });
        }
      }
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      for (const [place, { chart }] of this.plots) this.show(place, chart);
    });
  }

  // Keeps the stretch that the reader has zoomed to when a chart gets more data.
  show(place, chart) {
    const known = this.plots.get(place);
    if (!known) {
      this.waiting.set(place, chart);
      this.nearby.observe(place);
      return;
    }
    if (known.chart !== chart && sameCurves(known.chart, chart)) {
      const { min, max } = known.plot.scales.x;
      const isWhole = min <= known.chart.kimg[0] && max >= known.chart.kimg.at(-1);
      this.plots.set(place, { chart, plot: known.plot });
      known.plot.setData(columns(chart), isWhole);
      return;
    }
    known.plot.destroy();
    this.plots.set(place, { chart, plot: draw(place, chart) });
  }

  begin(place) {
    this.nearby.unobserve(place);
    const chart = this.waiting.get(place);
    if (!this.waiting.delete(place)) return;
    this.plots.set(place, { chart, plot: draw(place, chart) });
    this.observer.observe(place);
    place.addEventListener("keydown", (event) => {
      if (moveCursor(this.plots.get(place).plot, event.key)) event.preventDefault();
    });
  }

  remove(place) {
    this.waiting.delete(place);
    this.nearby.unobserve(place);
    this.observer.unobserve(place);
    this.plots.get(place)?.plot.destroy();
    this.plots.delete(place);
  }
}
