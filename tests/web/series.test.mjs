import assert from "node:assert/strict";
import { test } from "node:test";
import { formatTick, niceTicks, valueRange } from "../../web/chart.js";
import { Series, nearest, smooth } from "../../web/series.js";

test("a series stays bounded and keeps mean, extremes and order", () => {
  const series = new Series(64);
  let sum = 0;
  for (let step = 0; step < 10_000; step += 1) {
    const value = step === 4321 ? 50 : Math.sin(step / 100);
    sum += value;
    series.push(step, value);
  }
  const points = series.points();
  assert.ok(points.length <= 65, `${points.length} points`);
  assert.ok(points.length >= 30);
  assert.equal(Math.max(...points.map((point) => point.hi)), 50, "a single spike survives the merging");
  for (let i = 1; i < points.length; i += 1) assert.ok(points[i].x > points[i - 1].x);
  const mean = points.reduce((total, point) => total + point.y, 0) / points.length;
  assert.ok(Math.abs(mean - sum / 10_000) < 0.02);
  assert.deepEqual(series.last, { x: 9999, y: Math.sin(99.99) });
  assert.equal(series.count, 10_000);
});

test("an odd number of points is merged without loss", () => {
  const series = new Series(5);
  for (let step = 0; step < 37; step += 1) series.push(step, step);
  const points = series.points();
  assert.equal(points[0].lo, 0);
  assert.equal(points[points.length - 1].hi, 36);
});

test("values that a chart cannot show are left out", () => {
  const series = new Series();
  series.push(1, Number.NaN);
  series.push(2, Number.POSITIVE_INFINITY);
  series.push(3, 0.5);
  assert.deepEqual(
    series.points().map((point) => point.x),
    [3],
  );
});

test("a resumed run replaces the steps it repeats", () => {
  const series = new Series();
  for (const step of [1, 2, 3, 4]) series.push(step, 0);
  for (const step of [3, 4, 5]) series.push(step, 1);
  assert.deepEqual(
    series.points().map((point) => [point.x, point.y]),
    [
      [1, 0],
      [2, 0],
      [3, 1],
      [4, 1],
      [5, 1],
    ],
  );
});

test("the capacity is checked", () => {
  assert.throws(() => new Series(1), /at least 4/);
});

test("smoothing starts at the first value and follows a level", () => {
  const points = Array.from({ length: 200 }, (_, i) => ({ x: i, y: i < 100 ? 1 : 2, lo: 0, hi: 0 }));
  const smoothed = smooth(points, 10);
  assert.equal(smoothed[0].y, 1);
  assert.ok(Math.abs(smoothed[99].y - 1) < 1e-9);
  assert.ok(Math.abs(smoothed[199].y - 2) < 1e-3);
});

test("nearest finds the closest point", () => {
  const points = [1, 5, 9].map((x) => ({ x, y: x, lo: x, hi: x }));
  assert.equal(nearest(points, 2)?.x, 1);
  assert.equal(nearest(points, 3.1)?.x, 5);
  assert.equal(nearest(points, 100)?.x, 9);
  assert.equal(nearest([], 1), null);
});

test("ticks are round and inside the range", () => {
  assert.deepEqual(niceTicks(0, 100, 5), [0, 20, 40, 60, 80, 100]);
  assert.deepEqual(niceTicks(0.243, 0.302, 3), [0.26, 0.28, 0.3]);
  assert.deepEqual(niceTicks(5, 5, 4), [5]);
});

test("tick labels have the digits that tell them apart", () => {
  assert.equal(formatTick(0.3, 0.02), "0.30");
  assert.equal(formatTick(40, 20), "40");
  assert.equal(formatTick(0, 1), "0");
  assert.equal(formatTick(2_500_000, 500_000), "2.5e6");
});

test("a flat line gets a range with room around it", () => {
  const range = valueRange([{ label: "a", color: "", points: [{ x: 0, y: 2, lo: 2, hi: 2 }] }]);
  assert.ok(range && range[0] < 2 && range[1] > 2);
  assert.equal(valueRange([{ label: "a", color: "", points: [] }]), null);
});
