/** A build of a dataset: how far it is, and when it will be there. */
import { share, words } from "./builds";
import type { BuildJson } from "./gen/tdb/dataset/v1/dataset_pb";

export function BuildProgress({ build }: { build: BuildJson }) {
  const done = share(build);
  const broken = build.state === "BUILD_STATE_FAILED";
  return (
    <span class={broken ? "build error" : "build"}>
      {build.state === "BUILD_STATE_RUNNING" && (
        <progress
          aria-label={`Building ${build.dataset ?? ""}`}
          max={1}
          {...(done === undefined ? {} : { value: done })}
        />
      )}
      <span>{words(build)}</span>
    </span>
  );
}
