import assert from "node:assert/strict";
import { test } from "node:test";
import { filledValues, hiddenWidgets } from "../../web/mix_rows.js";

test("numbers of rewards that are not connected are hidden", () => {
  const links = new Set(["reward_1", "reward_3", "scale_4"]);
  const hidden = hiddenWidgets((name) => links.has(name), false);
  assert.equal(hidden.size, 4 * 3 + 2);
  const shown = [...hidden].filter(([, isHidden]) => !isHidden).map(([name]) => name);
  assert.deepEqual(shown, ["weight_1", "centre_1", "scale_1", "weight_3", "centre_3", "scale_3", "scale_4"]);
});

test("the first reward is asked for before it is connected, and the baseline's widgets only while it is measured", () => {
  const hidden = hiddenWidgets(() => false, true);
  assert.equal(hidden.get("weight_1"), false);
  assert.equal(hidden.get("weight_2"), true);
  assert.equal(hidden.get("baseline_folder"), false);
  assert.equal(hiddenWidgets((name) => name === "baseline_folder", false).get("baseline_folder"), false);
});

test("what was measured goes into the widgets of its row", () => {
  assert.deepEqual([...filledValues([{ row: 2, centre: 0.5, scale: 0.01 }])], [["centre_2", 0.5], ["scale_2", 0.01]]);
  assert.equal(filledValues([]).size, 0);
});
