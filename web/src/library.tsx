/** The dictionaries served with the model: where each sits, how large it is, and how well it does. */
import { useRef } from "preact/hooks";
import type { DictionaryJson, SelfTestJson } from "./gen/tdb/inference/v1/model_pb";
import { siteName } from "./latents";
import { count, full, num, percent, plain } from "./numbers";
import { model } from "./state";

export function LibraryButton() {
  const dialog = useRef<HTMLDialogElement>(null);
  const dictionaries = model.value?.dictionaries ?? [];
  if (dictionaries.length === 0) return null;
  const warned = dictionaries.filter(({ warning }) => warning).length;
  return (
    <span>
      <button type="button" class="link" onClick={() => dialog.current?.showModal()}>
        {dictionaries.length === 1 ? "1 dictionary" : `${dictionaries.length} dictionaries`}
        {warned > 0 && ` (${count(warned, "warning")})`}
      </button>
      <dialog
        ref={dialog}
        class="library"
        aria-label="Dictionaries"
        onClick={(event) => {
          if (event.target === dialog.current) dialog.current?.close();
        }}
        onKeyDown={(event) => event.stopPropagation()}
      >
        <header>
          <h2>Dictionaries of {model.value?.model?.id}</h2>
          <button type="button" class="small" onClick={() => dialog.current?.close()}>
            close
          </button>
        </header>
        <table>
          <thead>
            <tr>
              <th scope="col">id</th>
              <th scope="col">site</th>
              <th scope="col">latents</th>
              <th scope="col">activation</th>
              <th scope="col" title="Fraction of variance unexplained, on the sample; 0 is perfect">
                FVU
              </th>
              <th scope="col" title="Latents active per token, on the sample">
                L0
              </th>
              <th scope="col" title="Latents never active on the sample">
                dead
              </th>
            </tr>
          </thead>
          <tbody>
            {dictionaries.map((each) => (
              <Row key={each.id} dictionary={each} />
            ))}
          </tbody>
        </table>
      </dialog>
    </span>
  );
}

function Row({ dictionary }: { dictionary: DictionaryJson }) {
  const { id, uri, format, latents = 0, activation, selfTest, warning, weightsHash } = dictionary;
  return (
    <>
      <tr title={`${uri ?? ""}\nformat ${format ?? ""}, weights ${weightsHash ?? ""}`}>
        <th scope="row">
          <code>{id}</code>
        </th>
        <td>{siteName(dictionary)}</td>
        <td>{latents}</td>
        <td>{activation}</td>
        {selfTest ? <Measured test={selfTest} /> : <td colSpan={3}>not tested yet</td>}
      </tr>
      {warning && (
        <tr class="warned">
          <td colSpan={7}>{warning}</td>
        </tr>
      )}
    </>
  );
}

function Measured({ test }: { test: SelfTestJson }) {
  const { sample, tokens = 0, declaredFvu, declaredL0 } = test;
  const on = `on ${count(tokens, "token")} of ${sample ?? "a sample"}`;
  const declared = (x: number | string | undefined) => {
    const value = num(x);
    return value === undefined ? "" : `; declared ${full(value)}`;
  };
  const [fvu, l0, dead] = [test.fvu, test.l0, test.dead].map((x) => num(x) ?? 0);
  return (
    <>
      <td title={`${full(fvu ?? 0)} ${on}${declared(declaredFvu)}`}>{plain(fvu ?? 0)}</td>
      <td title={`${full(l0 ?? 0)} ${on}${declared(declaredL0)}`}>{plain(l0 ?? 0)}</td>
      <td title={on}>{percent(dead ?? 0)}</td>
    </>
  );
}
