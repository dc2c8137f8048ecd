// How far a build is, in words that say what to do where there is something to do.
import { expect, test } from "vitest";
import { duration, isUnderWay, share, words } from "../src/builds";

const running = {
  state: "BUILD_STATE_RUNNING",
  phase: "harvesting",
  done: "430",
  total: "1000",
  unit: "tokens",
} as const;

test("a running build says how far, how fast and how long", () => {
  expect(share(running)).toBe(0.43);
  expect(words(running)).toBe("harvesting 43 %");
  expect(words({ ...running, rate: 1234, secondsLeft: 40 })).toBe(
    "harvesting 43 %, 1234 tokens/s, 40 seconds left",
  );
});

test("one that waits says for what, one that failed why", () => {
  expect(words({ state: "BUILD_STATE_WAITING", message: "the model is loading" })).toBe(
    "It waits: The model is loading.",
  );
  expect(words({ state: "BUILD_STATE_FAILED", message: "the disk is full" })).toContain(
    "The disk is full. The same command",
  );
  expect(isUnderWay({ state: "BUILD_STATE_FAILED" })).toBe(false);
  expect(isUnderWay({ state: "BUILD_STATE_WAITING" })).toBe(true);
});

test("nothing is invented before the size is known", () => {
  expect(share({ done: "3" })).toBeUndefined();
  expect(words({ ...running, total: "0" })).toBe("harvesting");
});

test("times are rounded to what a reader needs", () => {
  expect([0.2, 89, 120, 9000].map(duration)).toEqual([
    "1 second",
    "89 seconds",
    "2 minutes",
    "2.5 hours",
  ]);
});
