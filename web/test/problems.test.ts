// Every refusal ends up beside the control that caused it, as a sentence.
import { expect, test } from "vitest";
import { ConnectError, failure } from "../src/connect";
import { problems, sentence } from "../src/problems";

/** An error as the gateway sends it. */
function refusal(field: string, description: string) {
  return failure(400, {
    code: "invalid_argument",
    message: `${field}: ${description}`,
    details: [
      {
        type: "google.rpc.BadRequest",
        value: "CgA",
        debug: { fieldViolations: [{ field, description }] },
      },
      { type: "google.rpc.ErrorInfo", value: "CgA", debug: { reason: "X" } },
    ],
  });
}

test.each([
  ["run.interventions[2].target", "edit", 2],
  ["run.interventions[0]", "edit", 0],
  ["objective.logit_diff.targets[1]", "target", 1],
  ["objective.logit_diff.targets[1].text", "target", 1],
  ["objective.logit_diff.targets", "target", undefined],
  ["objective.logit_diff.distractors[0]", "distractor", 0],
  ["run.prompt", "prompt", undefined],
  ["run.prompt.text", "prompt", undefined],
  ["compare.prompt.text", "compare", undefined],
  ["prompt.text", "prompt", undefined],
  ["top_k", "page", undefined],
  ["run.promptly", "page", undefined],
])("%s belongs to %s", (field, place, index) => {
  const [problem, ...more] = problems(refusal(field, "is wrong"));
  expect(more).toEqual([]);
  expect([problem?.place, problem?.index]).toEqual([place, index]);
  expect(problem?.text).toMatch(/\.$/);
  expect(problem?.retry).toBe(false);
});

test("what no field caused stands above the answer and may be tried again", () => {
  expect(problems(new ConnectError("unavailable", "the engine is starting"))).toEqual([
    { place: "page", text: "The engine is starting.", retry: true },
  ]);
});

test("a proxy's page is named by its status", () => {
  expect(failure(502, undefined)).toMatchObject({
    code: "unavailable",
    message: "The server answered 502 without saying why.",
  });
  expect(failure(401, "<html>").code).toBe("unauthenticated");
  expect(failure(500, { message: "no code" }).code).toBe("unknown");
});

test("a sentence begins with a capital unless it begins with an address", () => {
  expect(sentence("it is too long")).toBe("It is too long.");
  expect(sentence("head.9.1 names nothing here: layers are 0 to 3")).toBe(
    "head.9.1 names nothing here: layers are 0 to 3.",
  );
  expect(sentence("Why?")).toBe("Why?");
});

test.each([
  ["internal", "internal error 3f2; the gateway's log has more", " Request click-1."],
  ["unavailable", "the inference service cannot be reached", ""],
])("of %s the logs know by its id, and nobody else asks", (code, message, id) => {
  const details = [
    { type: "google.rpc.RequestInfo", value: "CgA", debug: { requestId: "click-1" } },
  ];
  const error = failure(500, { code, message, details });
  expect(error.requestId).toBe("click-1");
  expect(problems(error)[0]?.text).toBe(sentence(message) + id);
});
