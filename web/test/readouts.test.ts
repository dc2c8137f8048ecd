// Read-outs: what a write promotes and demotes, and whether the page may ask at all.
import { beforeEach, expect, test } from "vitest";
import { cannot, whyNot } from "../src/features";
import { hasReadOuts, ofSign } from "../src/readouts";
import { model } from "../src/state";

const score = (text: string, score: number) => ({ token: { text }, score });

beforeEach(() => {
  model.value = {
    supports: [
      { feature: "intervention.zero", supported: true },
      { feature: "intervention.set", supported: true },
      { feature: "intervention.scale", reason: "scaling is not built in this version" },
    ],
  };
});

test("tokens are promoted or demoted by sign, the largest first; a score of 0 does neither", () => {
  const scores = [score("a", -3), score("b", 2), score("c", 0), score("d", 2.5), score("e", -0.1)];
  const texts = (sign: 1 | -1) => ofSign(scores, sign).map(({ token }) => token?.text);
  expect(texts(1)).toEqual(["d", "b"]);
  expect(texts(-1)).toEqual(["a", "e"]);
  expect(ofSign(undefined, 1)).toEqual([]);
});

test("a row without scores has no read-outs", () => {
  expect(hasReadOuts({ node: "embed~1" })).toBe(false);
  expect(hasReadOuts({ node: "embed~1", outputTokens: [] })).toBe(false);
  expect(hasReadOuts({ node: "embed~1", outputTokens: [score("a", 1)] })).toBe(true);
});

test("what is not supported is said with the service's reason", () => {
  expect(whyNot("intervention.zero")).toBeUndefined();
  expect(whyNot("intervention.scale")).toBe("Scaling is not built in this version.");
  expect(whyNot("attribute.read_outs")).toMatch(/attribute.read_outs is not known/);
});

test("an embedding is edited only where residual targets are, and never set to a number", () => {
  expect(cannot("ablate", "head.2.3~13-1")).toBeUndefined();
  expect(cannot("set", "neuron.0.1~1")).toBeUndefined();
  expect(cannot("scale", "neuron.0.1~1")).toMatch(/not built/);
  expect(cannot("ablate", "embed~3")).toMatch(/^An embedding cannot be edited/);
  model.value!.supports!.push({ feature: "target.residual", supported: true });
  expect(cannot("ablate", "embed~3")).toBeUndefined();
  expect(cannot("set", "embed~3")).toMatch(/vector/);
});
