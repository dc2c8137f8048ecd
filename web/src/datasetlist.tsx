/** The library of datasets: what there is, what is being built, and components found by what is known of them. */
import { useRef, useState } from "preact/hooks";
import { isUnderWay, share } from "./builds";
import { listed, listProblem, otherModel, refreshDatasets, useDatasets } from "./datasets";
import { DatasetSearch } from "./datasetsearch";
import type { DatasetJson } from "./gen/tdb/dataset/v1/dataset_pb";
import { HowToGetOne } from "./missing";
import { count } from "./numbers";
import { BuildProgress } from "./progress";
import { sentence } from "./problems";
import { model } from "./state";

export function DatasetsButton() {
  const dialog = useRef<HTMLDialogElement>(null);
  const [open, setOpen] = useState(false);
  useDatasets();
  const { datasets = [], builds = [] } = listed.value ?? {};
  const running = builds.find(isUnderWay);
  const far = running ? share(running) : undefined;
  const close = () => dialog.current?.close();
  return (
    <span>
      <button
        type="button"
        class="link"
        title={listProblem.value?.text ?? "Records of what makes components fire"}
        onClick={() => {
          void refreshDatasets();
          setOpen(true);
          dialog.current?.showModal();
        }}
      >
        {listed.value === null
          ? "datasets"
          : datasets.length === 0 && !running
            ? "no dataset"
            : count(datasets.length, "dataset")}
        {running && ` (building${far === undefined ? "" : ` ${Math.floor(100 * far)} %`})`}
      </button>
      <dialog
        ref={dialog}
        class="library datasets"
        aria-label="Datasets"
        onClick={(event) => {
          if (event.target === dialog.current) close();
        }}
        onKeyDown={(event) => event.stopPropagation()}
        onClose={() => setOpen(false)}
      >
        <header>
          <h2>Datasets</h2>
          <button type="button" class="small" onClick={close}>
            close
          </button>
        </header>
        {open && <Library onOpened={close} />}
      </dialog>
    </span>
  );
}

function Library({ onOpened }: { onOpened: () => void }) {
  const { datasets = [], builds = [], unreadable = [] } = listed.value ?? {};
  const problem = listProblem.value;
  return (
    <>
      {problem && (
        <p class="error" role="alert">
          {problem.text}
        </p>
      )}
      {datasets.length > 0 && (
        <table>
          <thead>
            <tr>
              <th scope="col">name</th>
              <th scope="col">model</th>
              <th scope="col">components</th>
              <th scope="col">corpus</th>
              <th scope="col">tokens</th>
              <th scope="col">records</th>
              <th scope="col">size</th>
            </tr>
          </thead>
          <tbody>
            {datasets.map((each) => (
              <Row key={each.name} dataset={each} />
            ))}
          </tbody>
        </table>
      )}
      <ul class="builds">
        {builds.map((build) => (
          <li key={build.dataset}>
            <code>{build.dataset}</code> <BuildProgress build={build} />
          </li>
        ))}
        {unreadable.map(({ name, reason = "" }) => (
          <li key={name} class="error">
            <code>{name}</code> cannot be read: {sentence(reason)}
          </li>
        ))}
      </ul>
      {datasets.length === 0 && builds.length === 0 && listed.value && <HowToGetOne />}
      {datasets.length > 0 && <DatasetSearch datasets={datasets} onOpened={onOpened} />}
    </>
  );
}

function Row({ dataset }: { dataset: DatasetJson }) {
  const { name, header, groups = [], records = 0, bytes, isRemote, manifestHash = "" } = dataset;
  const { corpus, model: of, notes = [] } = header ?? {};
  const other = model.value ? otherModel(dataset, model.value) : undefined;
  return (
    <tr title={[`manifest ${manifestHash}`, ...notes].join("\n")}>
      <th scope="row">
        <code>{name}</code>
      </th>
      <td class={other ? "quiet-text" : undefined} title={other && `It is about ${other}`}>
        {of?.id}
        {other && " (not the loaded one)"}
      </td>
      <td title={groups.map((group) => group.name).join(", ")}>{kinds(groups)}</td>
      <td>{corpus?.name}</td>
      <td>{corpus?.tokens === undefined ? "" : grouped(Number(corpus.tokens))}</td>
      <td>{grouped(records)}</td>
      <td>{isRemote ? "elsewhere" : size(Number(bytes ?? 0))}</td>
    </tr>
  );
}

/** `neurons and heads of 4 layers`, by the groups' names. */
export function kinds(groups: DatasetJson["groups"] = []): string {
  const counts = new Map<string, number>();
  for (const { name = "" } of groups) {
    const kind = name.split(".")[0] ?? "";
    counts.set(kind, (counts.get(kind) ?? 0) + 1);
  }
  return [...counts]
    .map(([kind, n]) => `${kind}s of ${count(n, kind === "latent" ? "dictionary" : "layer")}`)
    .join(", ")
    .replace("dictionarys", "dictionaries");
}

export function size(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  let x = bytes;
  while (x >= 999.5 && at < units.length - 1) {
    x /= 1000;
    at += 1;
  }
  return `${at > 0 && x < 10 ? x.toFixed(1) : Math.round(x)} ${units[at]}`;
}

/** With thin spaces between thousands. */
export function grouped(n: number): string {
  return n.toLocaleString("en").replaceAll(",", "\u202f");
}
