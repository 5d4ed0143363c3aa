"use strict";
/* How long each rank works in a step, look after look: a cell's colour is its time beside the median of its column. */

const ROW = { least: 3, most: 18, height: 320 };

class Heat {
  constructor(canvas, text) {
    this.canvas = canvas;
    this.text = text;
    this.ranks = { times: [], steps: [], seconds: [], group: 1 };
    this.cell = null;
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.say(null));
    canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(ranks) {
    this.ranks = ranks;
    this.canvas.parentElement.hidden = !ranks.seconds.length;
    this.medians = ranks.seconds.map((column) => median(column));
    this.draw();
    this.say(this.cell);
  }

  draw() {
    const columns = this.ranks.seconds, rows = columns[0]?.length ?? 0;
    if (!rows) return;
    const height = rows * Math.min(ROW.most, Math.max(ROW.least, Math.floor(ROW.height / rows)));
    this.canvas.style.height = `${height}px`;
    const scale = devicePixelRatio || 1, width = this.canvas.clientWidth;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    const ink = this.canvas.getContext("2d");
    const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
    const wide = this.canvas.width / columns.length, high = this.canvas.height / rows;
    columns.forEach((column, x) => column.forEach((seconds, y) => {
      ink.fillStyle = heatOf(seconds / (this.medians[x] || 1), isDark);
      ink.fillRect(Math.floor(x * wide), Math.floor(y * high), Math.ceil(wide), Math.max(1, Math.ceil(high) - (high > 6 ? 1 : 0)));
    }));
  }

  point(event) {
    const columns = this.ranks.seconds, rows = columns[0]?.length ?? 0;
    if (!rows) return;
    const x = Math.floor((event.offsetX / this.canvas.clientWidth) * columns.length);
    const y = Math.floor((event.offsetY / this.canvas.clientHeight) * rows);
    this.say([clamp(x, columns.length), clamp(y, rows)]);
  }

  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const columns = this.ranks.seconds;
    if (!(event.key in moves) || !columns.length) return;
    event.preventDefault();
    const [x, y] = this.cell ?? this.slowest();
    this.say([clamp(x + moves[event.key][0], columns.length), clamp(y + moves[event.key][1], columns[0].length)]);
  }

  /* Of the last look. */
  slowest() {
    const x = this.ranks.seconds.length - 1, column = this.ranks.seconds[x];
    return [x, column.indexOf(Math.max(...column))];
  }

  say(cell) {
    this.cell = cell;
    if (!this.ranks.seconds.length) return;
    const [x, y] = cell ?? this.slowest();
    const { group, steps } = this.ranks, seconds = this.ranks.seconds[x]?.[y];
    if (seconds === undefined) return;
    const who = group === 1 ? `rank ${y}` : `ranks ${y * group} to ${y * group + group - 1}`;
    const ratio = seconds / (this.medians[x] || 1);
    this.text.textContent = `${cell ? "" : "slowest now: "}${who} at step ${steps[x]}: ${short(seconds)} s, ${ratio.toFixed(2)} times the median`;
    this.canvas.setAttribute("aria-label", this.text.textContent);
  }
}

const clamp = (place, count) => Math.min(count - 1, Math.max(0, place));

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

/* From calm at the median to glowing at twice of it. */
function heatOf(ratio, isDark) {
  const heat = Math.min(1, Math.max(0, ratio - 1)), cool = Math.min(1, Math.max(0, 1 - ratio));
  const light = isDark ? 26 + 34 * heat - 8 * cool : 88 - 42 * heat + 5 * cool;
  return heat > 0.08 ? `hsl(${36 - 26 * heat} ${45 + 45 * heat}% ${light}%)` : `hsl(205 ${30 - 100 * heat}% ${light}%)`;
}
