import assert from "node:assert/strict";
import { test } from "node:test";
import { RunStore, apply, formatDuration, logLines, remaining_s } from "../../web/run_store.js";

const step = (number, extra = {}) => ({ event: "step", step: number, steps: 10, reward: number / 10, loss: 1 - number / 10, seconds: 2, ...extra });

/** A server with one run whose events a test adds by hand, or replaces: the route's answer is that of RunStore.new_events. */
function fakeServer(events, run = { id: "r1", name: "mine", state: "running", step: 0, steps: 10 }) {
  const written = { file: "1", events };
  const listeners = new Map();
  const asked = [];
  return {
    asked,
    run,
    written,
    emit: (name, detail) => listeners.get(name)?.forEach((listener) => listener(detail)),
    listenerCount: () => [...listeners.values()].reduce((sum, set) => sum + set.size, 0),
    async getJson(path) {
      asked.push(path);
      if (path === "/reward_lab/runs") return [run];
      const [, number, file] = /events\?start=(\d+)&file=(.*)/.exec(path) ?? [];
      const start = !number || (file && file !== written.file) || Number(number) > written.events.length ? 0 : Number(number);
      if (number) return { file: written.file, start, events: written.events.slice(start) };
      if (path.endsWith("/log")) return "one\ntwo\n";
      throw new Error(`unexpected ${path}`);
    },
    async postJson(path) {
      asked.push(path);
      return { ...run, state: "stopping" };
    },
    onServerEvent(name, listener) {
      if (!listeners.has(name)) listeners.set(name, new Set());
      listeners.get(name).add(listener);
      return () => listeners.get(name).delete(listener);
    },
  };
}

const settle = async () => {
  for (let i = 0; i < 20; i += 1) await Promise.resolve();
};

/** A clock whose timers fire at once, after the current work. */
const quick = { setTimeout: (task) => queueMicrotask(task) };

test("the events of a run whose files cannot be read are not asked for", async () => {
  const server = fakeServer([], { id: "r1", name: "r1", state: "broken", step: 0, steps: 0, error: "config.json is not JSON" });
  const store = new RunStore(server, quick);
  await store.start();
  store.watch("r1");
  await settle();
  assert.deepEqual(server.asked, ["/reward_lab/runs"]);
  assert.equal(store.error, null);
});

test("runs and events are loaded, and news brings only what is new", async () => {
  const events = [step(1), step(2)];
  const server = fakeServer(events);
  const store = new RunStore(server, quick);
  await store.start();
  const detail = store.watch("r1");
  await settle();
  assert.deepEqual(
    detail.reward.points().map((point) => point.x),
    [1, 2],
  );
  events.push(step(3), step(4));
  server.emit("reward_lab.run", { ...server.run, step: 4, event: step(4) });
  await settle();
  assert.deepEqual(
    detail.reward.points().map((point) => point.x),
    [1, 2, 3, 4],
  );
  assert.equal(store.runs.get("r1").step, 4);
  assert.ok(server.asked.includes("/reward_lab/runs/r1/events?start=2&file=1"));
});

test("the curves of a run that goes on from a checkpoint hold nothing of what came after it before", async () => {
  const numbers = (from, to) => Array.from({ length: to - from + 1 }, (_, i) => from + i);
  const server = fakeServer([...numbers(1, 82).map((number) => step(number)), { event: "sample", step: 80, files: ["samples/80.webp"] }]);
  const store = new RunStore(server, quick);
  await store.start();
  const detail = store.watch("r1");
  await settle();
  assert.equal(detail.reward.last.x, 82);
  Object.assign(server.written, { file: "2", events: [...numbers(1, 50).map((number) => step(number)), step(51, { reward: -3 })] });
  server.emit("reward_lab.run", { ...server.run, step: 51 });
  await settle();
  assert.deepEqual([detail.reward.last, detail.reward.count, detail.next, detail.samples], [{ x: 51, y: -3 }, 51, 51, []]);
  // Nor where it has come further than the page had read.
  Object.assign(server.written, { file: "3", events: numbers(1, 90).map((number) => step(number, { reward: 7 })) });
  server.emit("reward_lab.run", { ...server.run, step: 90 });
  await settle();
  assert.deepEqual([detail.reward.last, detail.reward.points()[0].y, detail.next], [{ x: 90, y: 7 }, 7, 90]);
});

test("news during a read is not lost, and many news make few reads", async () => {
  const events = [step(1)];
  const server = fakeServer(events);
  const store = new RunStore(server, quick);
  await store.start();
  const detail = store.watch("r1");
  for (let number = 2; number <= 50; number += 1) {
    events.push(step(number));
    server.emit("reward_lab.run", { ...server.run, step: number });
  }
  await settle();
  assert.equal(detail.reward.count, 50);
  assert.ok(server.asked.filter((path) => path.includes("events")).length <= 3, server.asked.join(" "));
});

test("starting twice subscribes once; stopping unsubscribes", async () => {
  const server = fakeServer([]);
  const store = new RunStore(server, quick);
  await store.start();
  await store.start();
  assert.equal(server.listenerCount(), 2);
  store.stop();
  assert.equal(server.listenerCount(), 0);
});

test("a new run comes first", async () => {
  const server = fakeServer([]);
  const store = new RunStore(server, quick);
  await store.start();
  server.emit("reward_lab.run", { id: "r2", name: "new", state: "created", step: 0, steps: 5, event: { event: "started" } });
  assert.deepEqual([...store.runs.keys()], ["r2", "r1"]);
  assert.equal("event" in store.runs.get("r2"), false);
});

test("a failed run brings its log", async () => {
  const server = fakeServer([step(1)], { id: "r1", name: "mine", state: "failed", step: 1, steps: 10, error: "killed" });
  const store = new RunStore(server, quick);
  await store.start();
  const detail = store.watch("r1");
  await settle();
  assert.deepEqual(detail.log, ["one", "two"]);
});

test("an unreachable server is told and forgotten when it is back", async () => {
  const server = fakeServer([]);
  const store = new RunStore(server, quick);
  const getJson = server.getJson;
  server.getJson = async () => {
    throw new Error("no connection");
  };
  await store.start();
  assert.equal(store.error, "no connection");
  server.getJson = getJson;
  server.emit("reconnected");
  await settle();
  assert.equal(store.error, null);
  assert.equal(store.runs.size, 1);
});

test("stopping posts and shows the new state at once", async () => {
  const server = fakeServer([]);
  const store = new RunStore(server, quick);
  await store.start();
  await store.requestStop("r1");
  assert.ok(server.asked.includes("/reward_lab/runs/r1/stop"));
  assert.equal(store.runs.get("r1").state, "stopping");
});

test("events fold into curves; null values of a broken step leave a gap", () => {
  const store = new RunStore(fakeServer([]), quick);
  const detail = store.watch("r1");
  apply(detail, { event: "started", steps: 10, experts: ["low"], reward: "hpsv2.1" });
  apply(detail, step(1, { held_out: 0.25, held_out_base: 0.24 }));
  apply(detail, step(2, { reward: null, loss: null }));
  apply(detail, step(3, { held_out: 0.27 }));
  apply(detail, { event: "sample", step: 3, files: ["samples/3.webp"], prompts: ["a"] });
  apply(detail, { event: "checkpoint", step: 3, files: ["checkpoints/3"] });
  apply(detail, { event: "failed", error: "out of memory", log_tail: ["a", "b"] });
  apply(detail, { event: "something newer" });
  assert.deepEqual(
    detail.reward.points().map((point) => point.x),
    [1, 3],
  );
  assert.deepEqual(detail.heldOutSpan, { first: 0.25, last: 0.27, base: 0.24 });
  assert.equal(detail.samples[0].files[0], "samples/3.webp");
  assert.deepEqual(detail.checkpoints, [3]);
  assert.deepEqual(detail.log, ["a", "b"]);
  assert.equal(detail.secondsAStep, 2);
});

test("the rest of a run is told in words", () => {
  const detail = { secondsAStep: 3 };
  assert.equal(remaining_s({ id: "a", name: "", state: "running", step: 4, steps: 10 }, detail), 18);
  assert.equal(remaining_s({ id: "a", name: "", state: "finished", step: 10, steps: 10 }, detail), null);
  assert.equal(formatDuration(18), "18 s");
  assert.equal(formatDuration(600), "10 min");
  assert.equal(formatDuration(3 * 3600 + 20 * 60), "3 h 20 min");
});

test("log text and log lines read the same", () => {
  assert.deepEqual(logLines("a\nb\n"), ["a", "b"]);
  assert.deepEqual(logLines(["a", "b"]), ["a", "b"]);
  assert.deepEqual(logLines(null), []);
});
