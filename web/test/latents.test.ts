// Dictionaries are switched by set and site, and named as shortly as can be.
import { expect, test } from "vitest";
import { choose, chosenIds, groups, isChosen, siteName } from "../src/latents";
import { isView } from "../src/features";
import { byComponent } from "../src/remainder";
import { model } from "../src/state";

const dictionary = (setName: string, siteIn: string, siteOut = siteIn) => ({
  id: `${setName}-${siteOut.replace(".", "-")}`,
  setName,
  siteIn,
  siteOut,
});
const all = [
  dictionary("demo", "mlp_out.0"),
  dictionary("demo", "mlp_out.1"),
  dictionary("demo", "attn_out.0"),
  dictionary("demo", "attn_out.1"),
  dictionary("tc", "mlp_in.0", "mlp_out.0"),
  dictionary("res", "resid_post.1"),
];
const [mlp, attn, transcoders, view] = groups(all);

test("one group per set and site", () => {
  expect(groups(all).map(({ name, sublayer }) => [name, sublayer])).toEqual([
    ["demo", "mlp"],
    ["demo", "attn"],
    ["tc", "mlp"],
    ["res", "resid"],
  ]);
  expect(mlp?.dictionaries).toHaveLength(2);
  expect(siteName(all[4]!)).toBe("mlp_in.0 → mlp_out.0");
  expect(siteName(all[0]!)).toBe("mlp_out.0");
});

test("a whole set is named by its name, a part by ids", () => {
  const part = choose([], all, "mlp", mlp!);
  expect(part).toEqual(["demo-mlp_out-0", "demo-mlp_out-1"]);
  expect(choose(part, all, "attn", attn!)).toEqual(["demo"]);
  expect(choose(["demo"], all, "attn", null)).toEqual(part);
});

test("a sublayer has one dictionary at a time; others stay", () => {
  const both = choose(["demo"], all, "mlp", transcoders!);
  expect(both).toEqual(["demo-attn_out-0", "demo-attn_out-1", "tc"]);
  expect(choose(both, all, "resid", view!)).toContain("res");
  const ids = chosenIds(both, all);
  expect([mlp, attn, transcoders, view].map((group) => isChosen(group!, ids))).toEqual([
    false,
    true,
    true,
    false,
  ]);
});

test("a dictionary that came alone is its own set", () => {
  const alone = { id: "mine", siteIn: "mlp_out.2", siteOut: "mlp_out.2" };
  expect(groups([alone])[0]?.name).toBe("mine");
  expect(choose([], [alone], "mlp", groups([alone])[0]!)).toEqual(["mine"]);
});

test("remainder rows of one component are added up over tokens", () => {
  const parts = byComponent([
    { node: "error.demo-mlp_out-0~0", directEffect: 1 },
    { node: "error.demo-mlp_out-0~1", directEffect: 2, compareDirectEffect: 5 },
    { node: "rest", directEffect: 0 },
  ]);
  expect(parts).toMatchObject([
    { node: "error.demo-mlp_out-0", after: 3, before: 5 },
    { node: "rest", after: 0, before: undefined },
  ]);
  expect(parts[0]?.title).toMatch(/2 tokens/);
});

test("latents of the stream are views, which the sum of what filters hide leaves out", () => {
  model.value = { dictionaries: all };
  expect(isView("latent.res-resid_post-1.7~3")).toBe(true);
  expect(isView("latent.demo-mlp_out-0.7~3")).toBe(false);
  expect(isView("neuron.0.1~3")).toBe(false);
  model.value = null;
});
