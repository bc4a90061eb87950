import assert from "node:assert/strict";
import { test } from "node:test";
import { wrappedLines } from "../../web/text_lines.js";

test("lines break between words, and words that are too long anywhere", () => {
  assert.equal(wrappedLines("", 10), 1);
  assert.equal(wrappedLines("one two", 10), 1);
  assert.equal(wrappedLines("one two three", 10), 2);
  assert.equal(wrappedLines("one\ntwo\n", 10), 3);
  assert.equal(wrappedLines("x".repeat(10), 10), 1);
  assert.equal(wrappedLines("x".repeat(21), 10), 3);
  // The long word begins on a line of its own, and what follows it goes on in its last line.
  assert.equal(wrappedLines(`ab ${"x".repeat(12)} cd`, 10), 3);
  assert.equal(wrappedLines("one two", 0), 7 - 1);
});
