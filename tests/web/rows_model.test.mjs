import assert from "node:assert/strict";
import { test } from "node:test";
import {
  changeRow,
  expertOf,
  matchReports,
  moveRow,
  newRow,
  parseRows,
  reportFacts,
  rowStatus,
  searchFiles,
  tailStart,
  tidyStrength,
  totals,
  writeRows,
} from "../../web/rows_model.js";

const HIGH = "Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors";
const LOW = "Wan2.2-Fun-A14B-InP-low-noise-MPS.safetensors";

test("rows survive writing and reading, with members this page does not know", () => {
  const rows = [
    { on: true, file: HIGH, high: 0.5, low: 0, note: "mine" },
    { on: false, file: LOW, high: 0, low: -1.25 },
  ];
  assert.deepEqual(parseRows(writeRows(rows)), { rows, error: null });
  assert.equal(writeRows([]), "[]");
  assert.deepEqual(parseRows("  "), { rows: [], error: null });
});

test("missing members are what the server takes them for: on, and strengths of 0", () => {
  assert.deepEqual(parseRows('[{"file": "a.safetensors"}]').rows, [{ on: true, file: "a.safetensors", high: 0, low: 0 }]);
  assert.deepEqual(parseRows(`[{"file": "${HIGH}", "high": 0.7}]`).rows[0], { on: true, file: HIGH, high: 0.7, low: 0 });
  assert.deepEqual(parseRows('[{"file": "a", "high": "0.3", "low": null}]').rows[0], { on: true, file: "a", high: 0.3, low: 0 });
});

test("text that is not rows is told, never thrown", () => {
  for (const text of ["{", '{"file": 1}', "[1]", "[null]", '"text"']) assert.ok(parseRows(text).error, text);
  assert.match(parseRows('[{"file":"a"}, 3]').error ?? "", /Row 2/);
});

test("the expert is read from the name, or is unknown", () => {
  assert.equal(expertOf(HIGH), "high");
  assert.equal(expertOf(LOW), "low");
  assert.equal(expertOf("wan22_HIGH.safetensors"), "high");
  assert.equal(expertOf("highlander.safetensors"), null);
  assert.equal(expertOf("low-to-high.safetensors"), null);
});

test("the end of a name that stays readable begins at the expert, or at a separator", () => {
  const tail = (name) => name.slice(tailStart(name));
  assert.equal(tail("Wan2.2-Fun-A14B-InP-high-noise-HPS2.1"), "-high-noise-HPS2.1");
  assert.equal(tail("Wan2.2-Fun-A14B-InP-low-noise-MPS"), "-low-noise-MPS");
  assert.equal(tail("a_very_long_name_of_a_lora_v2_final"), "_a_lora_v2_final");
  assert.equal(tail("x".repeat(40)), "x".repeat(18));
  assert.equal(tail("short"), "short");
  assert.equal(tail(""), "");
  assert.equal(tail("high"), "high");
});

test("a new row works on the expert that its name speaks of", () => {
  assert.deepEqual(newRow(HIGH), { on: true, file: HIGH, high: 0.5, low: 0 });
  assert.deepEqual(newRow(LOW), { on: true, file: LOW, high: 0, low: 0.5 });
  assert.deepEqual(newRow("x.safetensors"), { on: true, file: "x.safetensors", high: 0.5, low: 0.5 });
});

test("changing and moving rows leaves the input alone", () => {
  const rows = [newRow("a"), newRow("b"), newRow("c")];
  const before = structuredClone(rows);
  assert.equal(changeRow(rows, 1, { high: 0.9 })[1].high, 0.9);
  assert.deepEqual(
    moveRow(rows, 0, 2).map((row) => row.file),
    ["b", "c", "a"],
  );
  assert.deepEqual(
    moveRow(rows, 2, 0).map((row) => row.file),
    ["c", "a", "b"],
  );
  assert.deepEqual(
    moveRow(rows, 1, 99).map((row) => row.file),
    ["a", "c", "b"],
  );
  assert.deepEqual(rows, before);
});

test("an empty row takes the strengths of the file it gets; a set one keeps its own", () => {
  assert.equal(changeRow([{ on: true, file: "", high: 0.5, low: 0.5 }], 0, { file: HIGH })[0].low, 0);
  assert.equal(changeRow([{ on: true, file: LOW, high: 0.2, low: 0.4 }], 0, { file: HIGH })[0].low, 0.4);
});

test("strengths are tidy and limited", () => {
  assert.equal(tidyStrength(0.1 + 0.05), 0.15);
  assert.equal(tidyStrength(99), 10);
  assert.equal(Object.is(tidyStrength(-0.0001), 0), true);
  assert.equal(tidyStrength(Number.NaN), 0.5);
});

test("totals count only rows that act", () => {
  const rows = [
    { on: true, file: "a", high: 0.5, low: -0.25 },
    { on: false, file: "b", high: 9, low: 9 },
    { on: true, file: "", high: 9, low: 9 },
  ];
  assert.deepEqual(totals(rows), { high: 0.5, low: 0.25, active: 1 });
});

test("search wants every word", () => {
  assert.deepEqual(searchFiles([HIGH, LOW], "WAN mps"), [LOW]);
  assert.deepEqual(searchFiles([HIGH, LOW], " "), [HIGH, LOW]);
});

test("each row finds its own report, also when a file stands twice and rows are off, moved, changed or removed", () => {
  const reportOf = (row, applied_high) => ({ ...row, applied_high, applied_low: null, total: 3, warnings: [] });
  const found = (rows, reports) => matchReports(rows, reports).map((report) => report?.applied_high ?? null);
  const [first, second, other] = [newRow(HIGH), { ...newRow(HIGH), high: 0.7 }, newRow(LOW)];
  const reports = [reportOf(first, 1), reportOf(other, 2), reportOf(second, 3)];
  assert.deepEqual(found([first, other, second], reports), [1, 2, 3]);
  assert.deepEqual(found([second, first, other], reports), [3, 1, 2]);
  assert.deepEqual(found([{ ...first, on: false }, second], reports), [null, 3]);
  assert.deepEqual(found([{ ...first, low: 0.1 }, second], reports), [null, 3]);
  // The server reports a row that was off as well, and that is not the report of another row with the same file.
  const off = { ...first, on: false };
  assert.deepEqual(found([off, first], [reportOf(off, null), reportOf(first, 5)]), [null, 5]);
  assert.deepEqual(found([first, first], [reportOf(first, 6), reportOf(first, 7)]), [6, 7]);
});

test("the status is green, amber or red", () => {
  const row = { on: true, file: HIGH, high: 0.5, low: 0 };
  const report = { file: HIGH, applied_high: 326, applied_low: 0, total: 326, warnings: [] };
  assert.deepEqual(rowStatus(row, report), { tone: "good", text: "applied high 326 of 326", warnings: [] });
  assert.equal(rowStatus(row, { ...report, applied_high: 320 }).tone, "warn");
  assert.equal(rowStatus(row, { ...report, warnings: ["x"] }).tone, "warn");
  assert.equal(rowStatus(row, { ...report, applied_high: 0 }).tone, "bad");
  assert.equal(rowStatus({ ...row, low: 0.5 }, report).tone, "bad");
  assert.equal(rowStatus(row, { ...report, applied_low: null }).tone, "good");
  assert.equal(rowStatus({ ...row, high: 0 }, { ...report, applied_high: null, applied_low: null }).text, "both strengths were 0");
});

test("texts that say nothing are left out of the row", () => {
  const rows = [{ on: true, file: HIGH, high: 0.5, low: 0 }];
  const curved = changeRow(rows, 0, { curve: "ramp", blocks: "0:0.5" });
  assert.deepEqual(curved, [{ ...rows[0], curve: "ramp", blocks: "0:0.5" }]);
  assert.deepEqual(changeRow(curved, 0, { curve: "", blocks: "" }), rows);
});

test("the facts of a report name kinds, memory, layout, application and what was left out", () => {
  const report = { file: HIGH, applied_high: 3, applied_low: null, total: 7, warnings: [] };
  assert.deepEqual(reportFacts(report), []);
  const kinds = { kinds: { lora: 30 }, left_out: { image_branch: 4 }, shares: { high: { value: 0.0123, text: "≈ 1.23 % of the weights" } } };
  const full = { ...report, ...kinds, detail: "rank 8", memory_bytes: 2.5e6, layout: "videox-fun", unmerged: ["high"] };
  assert.deepEqual(reportFacts(full), [
    "rank 8",
    "30 lora · 2.5 MB · layout videox-fun · unmerged on high noise",
    "changes: high noise ≈ 1.23 % of the weights",
    "left out: 4 keys of Wan2.1's image branch (nothing is lost)",
  ]);
});
