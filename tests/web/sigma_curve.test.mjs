import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { addPoint, factorAt, isConstant, movePoint, parseCurve, PRESETS, writeCurve } from "../../web/sigma_curve.js";

const CASES = JSON.parse(readFileSync(new URL("./curve_cases.json", import.meta.url), "utf-8"));

/** @param {number[]} actual @param {number[]} expected @param {string} message */
function close(actual, expected, message) {
  actual.forEach((value, i) => assert.ok(Math.abs(value - expected[i]) < 1e-9, `${message}: ${value} is not ${expected[i]}`));
}

test("curves have the factors that the server gives them", () => {
  for (const { text, factors } of CASES.curves) {
    const { points, error } = parseCurve(text);
    assert.equal(error, null, text);
    const found = CASES.sigmas.map((/** @type {number} */ sigma) => factorAt(points, sigma));
    close(found, factors, text);
    assert.equal(isConstant(points), new Set(factors).size === 1, text);
    assert.equal(parseCurve(writeCurve(points)).error, null);
  }
});

test("broken text is told, never thrown", () => {
  for (const text of CASES.broken) assert.ok(parseCurve(text).error, text);
});

test("presets can be read", () => {
  for (const { text } of PRESETS) assert.equal(parseCurve(text).error, null, text);
});

test("points stay between their neighbours", () => {
  const { points } = parseCurve("1:0, 0.5:1, 0:0");
  assert.deepEqual(movePoint(points, 1, [1.4, 99])[1], [1, 10]);
  assert.deepEqual(movePoint(points, 1, [-1, -0.5])[1], [0, -0.5]);
  assert.deepEqual(addPoint([], [0.4, 2]), [[1, 1], [0.4, 2], [0, 1]]); // prettier-ignore
  assert.deepEqual(addPoint(points, [0.7, 0.2]).map(([sigma]) => sigma), [1, 0.7, 0.5, 0]); // prettier-ignore
});
