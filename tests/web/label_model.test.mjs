import assert from "node:assert/strict";
import test from "node:test";

import { LABEL_KEYS, LabelSession, VOTE_KEYS, actionOf } from "../../web/label_model.js";

const items = (...labels) => labels.map((label, index) => ({ id: `v${index}`, url: "", caption: "", label }));

test("a session begins at the first video without a label and goes on to open ones", () => {
  const session = new LabelSession(items("good", null, "skip", null));
  assert.equal(session.current.id, "v1");
  assert.deepEqual(session.label("bad"), { id: "v1", label: "bad" });
  assert.equal(session.current.id, "v3");
  session.label("good");
  assert.equal(session.current, null);
  assert.deepEqual([session.done, session.count("good"), session.count("bad"), session.count("skip")], [4, 2, 1, 1]);
  assert.equal(session.label("good"), null);
});

test("undo gives the label before back and shows its video", () => {
  const session = new LabelSession(items("good", null));
  session.move(-1);
  assert.equal(session.current.id, "v0");
  session.label("bad");
  assert.equal(session.current.id, "v1");
  assert.deepEqual(session.undo(), { id: "v0", label: "good" });
  assert.equal(session.current.id, "v0");
  assert.equal(session.undo(), null);
  session.move(1);
  session.label("skip");
  assert.deepEqual(session.undo(), { id: "v1", label: null });
  assert.equal(session.done, 1);
});

test("moving stays inside, also from the end of a finished session", () => {
  const session = new LabelSession(items("good", "bad"));
  assert.equal(session.current, null);
  session.move(-1);
  assert.equal(session.current.id, "v1");
  session.move(1);
  assert.equal(session.current.id, "v1");
  assert.equal(new LabelSession([]).current, null);
});

test("keys", () => {
  assert.equal(actionOf(LABEL_KEYS, { key: "G" }), "good");
  assert.equal(actionOf(LABEL_KEYS, { key: "z", ctrlKey: true }), "undo");
  assert.equal(actionOf(LABEL_KEYS, { key: "g", ctrlKey: true }), null);
  assert.equal(actionOf(VOTE_KEYS, { key: "ArrowLeft" }), "left");
  assert.equal(actionOf(VOTE_KEYS, { key: "ArrowDown" }), "tie");
  assert.equal(actionOf(VOTE_KEYS, { key: "x" }), null);
});
