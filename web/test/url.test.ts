// A link shows a colleague exactly the same thing, or says in a sentence why it cannot.
import { expect, test } from "vitest";
import {
  ablation,
  decode,
  decodeOpened,
  encode,
  encodeOpened,
  USUAL,
  type Question,
} from "../src/url";

const question: Question = {
  model: "demo-gpt2",
  prompt: "A & B = C?\n+ # “é” 100%",
  targets: [" Mary", ","],
  distractors: [" John"],
  ...USUAL,
  interventions: [ablation("head.2.3~13-1"), { target: "neuron.1.2~3", scale: { factor: 0.5 } }],
  rankBy: "direct",
  rows: 200,
};

test("a question survives the address bar", () => {
  const hash = encode(question);
  expect(decode(`#${hash}`)).toEqual(question);
  expect(decode(new URL(`http://box/prefix/#${hash}`).hash)).toEqual(question);
});

test("what is usual is left out", () => {
  const plain = { ...question, ...USUAL, model: "" };
  const hash = encode(plain);
  expect(hash).not.toMatch(/model|edit|rank_by|rows|compare|against|trace|dictionary/);
  expect(decode(hash)).toEqual(plain);
});

test("an ablation is readable in the link", () => {
  expect(decodeURIComponent(encode(question))).toContain("edit=zero:head.2.3~13-1");
});

test("an ablation of some positions keeps them", () => {
  const some = { target: "head.2.3", positions: { start: 4 }, zero: {} };
  expect(decode(encode({ ...question, interventions: [some] }))?.interventions).toEqual([some]);
});

test("an empty address asks nothing", () => {
  expect(decode("")).toBeNull();
  expect(decode("#")).toBeNull();
});

test.each([
  ["edit=nonsense", /intervention/],
  ["edit={}", /intervention/],
  ["edit={", /intervention/],
  ["rank_by=beauty", /beauty.*total/],
  ["rows=-3", /-3/],
  ["rows=many", /many/],
])("%s is refused with a sentence", (part, sentence) => {
  expect(() => decode(`#prompt=x&${part}`)).toThrow(sentence);
});

test("an open component stands beside the question", () => {
  const opened = { component: "latent.demo-mlp_out-3.17", dataset: "a b" };
  const hash = `#${encode(question)}${encodeOpened(opened)}`;
  expect(decodeOpened(hash)).toEqual(opened);
  expect(decode(hash)).toEqual(question);
  expect(decodeOpened(`#${encode(question)}`)).toBeNull();
  expect(decodeOpened("#component=head.1.2")).toEqual({ component: "head.1.2", dataset: null });
  for (const bad of ["embed~3", "neuron.1", "head.1.2~3-1", "latent.x"])
    expect(() => decodeOpened(`#component=${bad}`)).toThrow(bad);
});
