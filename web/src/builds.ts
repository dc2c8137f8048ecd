/** How far the building of a dataset is, in words. */
import type { BuildJson } from "./gen/tdb/dataset/v1/dataset_pb";
import { count, num, plain } from "./numbers";
import { sentence } from "./problems";

/** Whether the build goes on by itself, so that it is worth asking again. */
export function isUnderWay({ state }: BuildJson): boolean {
  return (
    state === "BUILD_STATE_QUEUED" ||
    state === "BUILD_STATE_WAITING" ||
    state === "BUILD_STATE_RUNNING"
  );
}

/** Within [0, 1]; undefined while the size is not known. */
export function share({ done, total }: BuildJson): number | undefined {
  const all = Number(total ?? 0);
  return all > 0 ? Math.min(1, Number(done ?? 0) / all) : undefined;
}

export function words(build: BuildJson): string {
  const { state, phase = "", message = "", unit = "tokens" } = build;
  switch (state) {
    case "BUILD_STATE_QUEUED":
      return "It waits for another build to end.";
    case "BUILD_STATE_WAITING":
      return `It waits: ${sentence(message)}`;
    case "BUILD_STATE_CANCELLED":
      return "The build was cancelled; the same command goes on with it.";
    case "BUILD_STATE_FAILED":
      return `The build failed: ${sentence(message)} The same command goes on with it.`;
    default: {
      const known = share(build);
      const far = known === undefined ? "" : ` ${Math.floor(100 * known)} %`;
      const [rate, left] = [num(build.rate), num(build.secondsLeft)];
      const fast = rate === undefined ? "" : `, ${plain(rate)} ${unit}/s`;
      return `${phase}${far}${fast}${left === undefined ? "" : `, ${duration(left)} left`}`.trim();
    }
  }
}

/** `40 seconds`, `3 minutes`, `2.5 hours`. */
export function duration(seconds: number): string {
  if (seconds < 90) return count(Math.max(1, Math.round(seconds)), "second");
  if (seconds < 5400) return count(Math.round(seconds / 60), "minute");
  return `${(seconds / 3600).toFixed(1)} hours`;
}
