// What stands in the fields of the search, as a request.
import { expect, test } from "vitest";
import { grouped, kinds, size } from "../src/datasetlist";
import { searchRequest, type Wanted } from "../src/datasetsearch";

const wanted: Wanted = {
  dataset: "d",
  group: "",
  statistic: "STATISTIC_FRACTION_ACTIVE",
  atLeast: "",
  atMost: "",
  orderBy: "",
  ascending: false,
  token: "",
  text: "",
};

test("empty fields ask for nothing", () => {
  expect(searchRequest(wanted)).toEqual({ dataset: "d", limit: 50 });
});

test("each field is a condition", () => {
  const full: Wanted = {
    ...wanted,
    group: "neuron.3",
    atMost: "0.01",
    orderBy: "STATISTIC_MAX",
    token: "␣Mary",
    text: "went to",
  };
  expect(searchRequest(full)).toEqual({
    dataset: "d",
    limit: 50,
    groups: ["neuron.3"],
    ranges: [{ statistic: "STATISTIC_FRACTION_ACTIVE", atMost: 0.01 }],
    peakToken: { text: " Mary" },
    text: "went to",
    orderBy: "STATISTIC_MAX",
    ascending: false,
  });
});

test("zero is a number, and words are none", () => {
  expect(searchRequest({ ...wanted, atLeast: "0" }).ranges?.[0]).toMatchObject({ atLeast: 0 });
  expect(() => searchRequest({ ...wanted, atLeast: "much" })).toThrow("“much” is no number");
});

test("sizes and groups as a reader says them", () => {
  expect([12, 2_500, 99_960_000, 3e9].map(size)).toEqual(["12 B", "2.5 kB", "100 MB", "3.0 GB"]);
  expect(grouped(1234567)).toBe("1\u202f234\u202f567");
  expect(kinds([{ name: "neuron.0" }, { name: "neuron.1" }, { name: "latent.a-0" }])).toBe(
    "neurons of 2 layers, latents of 1 dictionary",
  );
});
