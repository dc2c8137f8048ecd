import { describe, expect, it } from "vitest";
import { standing } from "../src/queue";

describe("standing", () => {
  it("is silent where nothing waits", () => {
    expect(standing(undefined)).toBe("");
    expect(standing({ expectedWaitMs: 2000 })).toBe("");
  });

  it("says how many go first, and for how long once that is a second", () => {
    expect(standing({ position: 1, expectedWaitMs: 40 })).toBe("1 request goes first");
    expect(standing({ position: 3, expectedWaitMs: 2600 })).toBe("3 requests go first, about 3 s");
    expect(standing({ position: 2 })).toBe("2 requests go first");
  });
});
