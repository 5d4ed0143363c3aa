"use strict";
/* A plot of curves as SVG: axes, gaps, vertical marks, a cursor for pointer and keyboard. Text only as text nodes. */

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 54, right: 18, top: 6, bottom: 22 };
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "1 4"];

function element(name, attributes = {}, text = null, namespace = null) {
  const made = namespace ? document.createElementNS(namespace, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

const svg = (name, attributes, text = null) => element(name, attributes, text, SVG);

/* 1234567 -> 1.23M; 0.00031 -> 3.1e-4: as short as a tick has room for. */
function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace(/\.?0+e/, "e");
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return `${trimmed(value / (unit === 1e4 ? 1e3 : unit))}${letter}`;
  }
  return trimmed(value);
}

const trimmed = (value) => String(Number(value.toPrecision(4)));

/* About `count` round numbers between two values. */
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= raw) ?? 10 * power;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

function duration(seconds) {
  const units = [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]];
  const whole = Math.round(seconds);
  for (const [size, unit, part, smaller] of units) {
    if (whole >= size) {
      const rest = Math.floor((whole % size) / part);
      return `${Math.floor(whole / size)} ${unit}` + (rest ? ` ${rest} ${smaller}` : "");
    }
  }
  return `${seconds < 10 ? Number(seconds.toPrecision(2)) : whole} s`;
}

class Plot {
  /* `shown`: {title, unit, curves: [{name, x, y, color, dash, dots}], stacked, logarithmic}. */
  constructor(title, unit) {
    this.section = element("section", { "aria-label": title });
    this.section.append(element("h2", {}, unit ? `${title} (${unit})` : title));
    this.readout = element("p", { class: "readout", "aria-live": "off" });
    this.drawing = svg("svg", { class: "plot", role: "img", tabindex: "0", "aria-label": title });
    this.legend = element("ul", { class: "legend" });
    this.section.append(this.readout, this.drawing, this.legend);
    this.title = title;
    this.cursor = null;
    this.shown = { curves: [], marks: [], axis: "step", stacked: false, logarithmic: false };
    this.drawing.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.drawing.addEventListener("pointerleave", () => this.moveTo(null));
    this.drawing.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.drawing);
  }

  show(shown) {
    this.shown = { ...this.shown, ...shown };
    this.section.hidden = !this.shown.curves.some((curve) => curve.y.length);
    this.draw();
  }

  draw() {
    const { width, height } = this.drawing.getBoundingClientRect();
    if (!width || this.section.hidden) return;
    this.size = { width, height };
    this.levels = this.shown.stacked ? stacked(this.shown.curves) : this.shown.curves.map((curve) => curve.y);
    this.setScales();
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.drawing.replaceChildren(...this.axes(), ...this.curves(), ...this.marks());
    this.cursorLine = svg("line", { class: "cursor", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
    this.drawing.append(this.cursorLine);
    this.drawLegend();
    this.moveTo(this.cursor);
  }

  setScales() {
    const { logarithmic, stacked: isStacked, curves } = this.shown;
    const isShown = (value) => value !== null && (!logarithmic || value > 0);
    const xs = extent(curves.map((curve) => curve.x), () => true);
    const ys = extent(this.levels, isShown);
    let [low, high] = ys ?? [0, 1];
    if (isStacked) low = 0;
    if (logarithmic) [low, high] = [Math.log10(low), Math.log10(high)];
    const pad = (high - low || Math.abs(high) || 1) * 0.06;
    this.y = { low: isStacked ? 0 : low - pad, high: high + pad };
    this.x = xs ? { low: xs[0], high: xs[1] === xs[0] ? xs[0] + 1 : xs[1] } : { low: 0, high: 1 };
  }

  left(x) {
    return MARGIN.left + ((x - this.x.low) / (this.x.high - this.x.low)) * (this.size.width - MARGIN.left - MARGIN.right);
  }

  top(y) {
    const value = this.shown.logarithmic ? Math.log10(y) : y;
    const room = this.size.height - MARGIN.top - MARGIN.bottom;
    return MARGIN.top + (1 - (value - this.y.low) / (this.y.high - this.y.low)) * room;
  }

  axes() {
    const { width, height } = this.size, drawn = [];
    for (const at of ticks(this.y.low, this.y.high, 5)) {
      const value = this.shown.logarithmic ? 10 ** at : at, place = this.top(value);
      drawn.push(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: place, y2: place }));
      drawn.push(svg("text", { x: MARGIN.left - 6, y: place + 4, "text-anchor": "end" }, short(value)));
    }
    for (const at of ticks(this.x.low, this.x.high, Math.max(2, Math.floor(width / 130)))) {
      const place = this.left(at);
      drawn.push(svg("text", { x: place, y: height - 6, "text-anchor": "middle" }, this.named(at)));
    }
    return drawn;
  }

  named(x) {
    return this.shown.axis === "time" ? duration(x) : short(x);
  }

  curves() {
    return this.shown.curves.flatMap((curve, index) => {
      if (this.shown.stacked) return [this.area(curve, index)];
      const path = svg("path", {
        d: this.line(curve.x, this.levels[index]), stroke: curve.color, "stroke-dasharray": DASHES[curve.dash ?? 0], "data-name": curve.name,
      });
      return curve.dots ? [path, ...this.dots(curve)] : [path];
    });
  }

  line(xs, ys) {
    let path = "", isOpen = false;
    for (let place = 0; place < xs.length; place++) {
      const y = ys[place];
      const isThere = y !== null && (!this.shown.logarithmic || y > 0);
      if (isThere) path += `${isOpen ? "L" : "M"}${this.left(xs[place]).toFixed(1)} ${this.top(y).toFixed(1)}`;
      isOpen = isThere;
    }
    return path;
  }

  area(curve, index) {
    const below = index ? this.levels[index - 1] : curve.y.map(() => 0);
    const reversed = [...curve.x.keys()].reverse().map((place) => `L${this.left(curve.x[place]).toFixed(1)} ${this.top(below[place]).toFixed(1)}`);
    const d = curve.x.length ? `${this.line(curve.x, this.levels[index])}${reversed.join("")}Z` : "";
    const path = svg("path", { class: "area", d, "data-name": curve.name });
    path.style.fill = curve.color;
    return path;
  }

  dots(curve) {
    return curve.x.map((x, place) => {
      const dot = svg("circle", { cx: this.left(x), cy: this.top(curve.y[place]), r: 3 });
      dot.style.fill = curve.color;
      return dot;
    });
  }

  marks() {
    const drawn = [];
    for (const mark of this.shown.marks) {
      if (mark.x < this.x.low || mark.x > this.x.high) continue;
      const place = this.left(mark.x), ends = { x1: place, x2: place, y1: MARGIN.top, y2: this.size.height - MARGIN.bottom };
      const reach = svg("line", { class: "reach", ...ends });
      reach.append(svg("title", {}, mark.text));
      drawn.push(svg("line", { class: "mark", ...ends }), reach);
    }
    return drawn;
  }

  drawLegend() {
    const curves = this.shown.curves.filter((curve) => curve.y.length);
    this.legend.hidden = curves.length < 2;
    this.legend.replaceChildren(...curves.map((curve) => {
      const swatch = element("span", { class: "swatch" });
      swatch.style.background = curve.color;
      const item = element("li");
      item.append(swatch, curve.name);
      return item;
    }));
  }

  point(offset) {
    if (!this.size) return;
    const share = (offset - MARGIN.left) / (this.size.width - MARGIN.left - MARGIN.right);
    this.moveTo(this.x.low + share * (this.x.high - this.x.low));
  }

  key(event) {
    const longest = this.shown.curves.reduce((best, curve) => (curve.x.length > best.length ? curve.x : best), []);
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 };
    if (event.key === "Escape") this.moveTo(null);
    if (!(event.key in moves) || !longest.length) return;
    event.preventDefault();
    const from = this.cursor === null ? longest.length - 1 : nearest(longest, this.cursor);
    this.moveTo(longest[Math.min(longest.length - 1, Math.max(0, from + moves[event.key]))]);
  }

  /* Says the values there; those of the end where nobody points. */
  moveTo(x) {
    this.cursor = x;
    if (!this.size) return;
    const ends = this.shown.curves.flatMap((curve) => curve.x.slice(-1));
    const at = x ?? (ends.length ? Math.max(...ends) : null);
    this.cursorLine.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (at === null) return this.readout.replaceChildren();
    const told = this.shown.curves.filter((curve) => curve.x.length).map((curve) => {
      const value = curve.y[nearest(curve.x, at)];
      return this.shown.curves.length > 1 ? `${curve.name} ${short(value)}` : short(value);
    });
    const placed = Math.min(this.x.high, Math.max(this.x.low, at));
    this.cursorLine.setAttribute("x1", this.left(placed));
    this.cursorLine.setAttribute("x2", this.left(placed));
    this.readout.textContent = `${this.shown.axis === "time" ? "after" : "step"} ${this.named(at)}: ${told.join(", ")}`;
  }
}

function extent(columns, isShown) {
  let low = Infinity, high = -Infinity;
  for (const column of columns) {
    for (const value of column) {
      if (!isShown(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return low <= high ? [low, high] : null;
}

/* Of curves with the same x: each on top of those before. */
function stacked(curves) {
  const sums = (curves[0]?.y ?? []).map(() => 0);
  return curves.map((curve) => curve.y.map((value, place) => (sums[place] += value ?? 0)));
}

/* Place of the nearest value in ascending order. */
function nearest(values, wanted) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= wanted) low = middle; else high = middle;
  }
  return Math.abs(values[high] - wanted) < Math.abs(values[low] - wanted) ? high : low;
}
