// @ts-check
/** Bounded series of measured points, and the smoothing that the chart shows on top of them. No DOM. */

/**
 * @typedef {object} Point
 * @property {number} x
 * @property {number} y mean of the points that this one stands for
 * @property {number} lo smallest of them
 * @property {number} hi largest of them
 */

/**
 * A series that never holds more than `capacity` points. When full, neighbours are merged pairwise: the mean, the extremes and
 * the order survive, and the memory stays the same for a run of a hundred steps or a million.
 */
export class Series {
  /** @param {number} [capacity] largest number of points kept, at least 4 */
  constructor(capacity = 1024) {
    if (!Number.isInteger(capacity) || capacity < 4) throw new RangeError(`capacity is ${capacity}; it must be a whole number of at least 4.`);
    this.capacity = capacity;
    /** How many raw points one stored point stands for. */
    this.stride = 1;
    /** @type {Point[]} */
    this.merged = [];
    /** @type {number[][]} raw points that do not fill a stride yet */
    this.pending = [];
    /** @type {{ x: number, y: number } | null} */
    this.last = null;
    this.count = 0;
  }

  /**
   * @param {number} x must not be smaller than the one before; a smaller one (a resumed run) drops what it repeats
   * @param {number} y non-finite values are left out: a chart cannot show them
   */
  push(x, y) {
    if (!Number.isFinite(x) || !Number.isFinite(y)) return;
    if (this.last && x <= this.last.x) this.#rewind(x);
    this.pending.push([x, y]);
    this.last = { x, y };
    this.count += 1;
    if (this.pending.length >= this.stride) {
      this.merged.push(merge(this.pending));
      this.pending = [];
    }
    if (this.merged.length >= this.capacity) this.#halve();
  }

  /** @returns {Point[]} oldest first; includes points that do not fill a stride yet */
  points() {
    return this.pending.length ? [...this.merged, merge(this.pending)] : this.merged.slice();
  }

  /** @param {number} x */
  #rewind(x) {
    this.pending = this.pending.filter((point) => point[0] < x);
    while (this.merged.length && this.merged[this.merged.length - 1].x >= x) this.merged.pop();
  }

  #halve() {
    const half = [];
    for (let i = 0; i + 1 < this.merged.length; i += 2) {
      const [a, b] = [this.merged[i], this.merged[i + 1]];
      half.push({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, lo: Math.min(a.lo, b.lo), hi: Math.max(a.hi, b.hi) });
    }
    if (this.merged.length % 2) {
      // An odd one out stands for one stride only; it becomes the start of the next, doubled stride.
      const odd = this.merged[this.merged.length - 1];
      this.pending = [...Array.from({ length: this.stride }, () => [odd.x, odd.y]), ...this.pending];
    }
    this.merged = half;
    this.stride *= 2;
  }
}

/**
 * @param {number[][]} raw
 * @returns {Point}
 */
function merge(raw) {
  let sumX = 0;
  let sumY = 0;
  let lo = Infinity;
  let hi = -Infinity;
  for (const [x, y] of raw) {
    sumX += x;
    sumY += y;
    lo = Math.min(lo, y);
    hi = Math.max(hi, y);
  }
  return { x: sumX / raw.length, y: sumY / raw.length, lo, hi };
}

/**
 * Exponential moving average with bias correction, so that the first values are not pulled towards zero.
 *
 * @param {Point[]} points
 * @param {number} [window] points over which a value fades; by default a fifteenth of the series, at least 4
 * @returns {Point[]} same x as the input
 */
export function smooth(points, window = Math.max(4, points.length / 15)) {
  const keep = 1 - 1 / Math.max(1, window);
  let value = 0;
  let weight = 0;
  return points.map((point) => {
    value = keep * value + (1 - keep) * point.y;
    weight = keep * weight + (1 - keep);
    const y = value / weight;
    return { x: point.x, y, lo: y, hi: y };
  });
}

/**
 * The point nearest to x.
 *
 * @param {Point[]} points ascending in x
 * @param {number} x
 * @returns {Point | null}
 */
export function nearest(points, x) {
  if (!points.length) return null;
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle].x < x) low = middle + 1;
    else high = middle;
  }
  if (low > 0 && x - points[low - 1].x <= points[low].x - x) return points[low - 1];
  return points[low];
}
