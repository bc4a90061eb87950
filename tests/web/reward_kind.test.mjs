import assert from "node:assert/strict";
import test from "node:test";

import { describeChoice, widgetLabels } from "../../web/reward_kind.js";

const OFFER = { name: "HPS.pt", text: "HPS.pt: HPS v2.1; 1.97 GB; sha256 c57a", is_here: false };
const CATALOGUE = {
  kinds: {
    "hpsv2.1": { widgets: { file: "file", resize: "resize", download: "download" }, published: [OFFER], needs_file: true },
    face: { widgets: { file: "file", second_file: "face detector file", reference: "reference" }, published: [], needs_file: true },
    flicker: { widgets: {}, published: [], needs_file: false },
  },
  files: { "mine.pt": "3.1 MB" },
  no_file: "(none)",
};

test("a kind has the widgets that it reads, with their names for it", () => {
  const labels = widgetLabels(CATALOGUE, "face");
  assert.equal(labels.get("second_file"), "face detector file");
  assert.equal(labels.get("resize"), null);
  assert.deepEqual([...widgetLabels(CATALOGUE, "flicker").values()], [null, null, null, null, null]);
});

test("of a kind that is not known every widget may be read", () => {
  assert.ok([...widgetLabels(CATALOGUE, null).values()].every((label) => label !== null));
  assert.ok([...widgetLabels(CATALOGUE, "of a newer version").values()].every((label) => label !== null));
});

test("what is on disk and what can be fetched is told before anything runs", () => {
  const choice = { kind: "hpsv2.1", file: "mine.pt", download: false };
  assert.equal(describeChoice(CATALOGUE, choice), `On disk: mine.pt, 3.1 MB.\nCan be downloaded: ${OFFER.text}`);
  assert.equal(describeChoice(CATALOGUE, { ...choice, file: "(none)" }), `No file is chosen. Choose one, or switch download on.\nCan be downloaded: ${OFFER.text}`);
  assert.equal(describeChoice(CATALOGUE, { ...choice, file: "(none)", download: true }), `Will be fetched when the workflow runs: ${OFFER.text}`);
  assert.equal(describeChoice(CATALOGUE, { ...choice, file: "gone.pt" }), `gone.pt is not in models/reward_models.\nCan be downloaded: ${OFFER.text}`);
  assert.equal(describeChoice(CATALOGUE, { ...choice, kind: "flicker" }), "flicker needs no weights.");
  assert.equal(describeChoice(CATALOGUE, { ...choice, kind: "face", file: "(none)" }), "No file is chosen.");
});
