/** Dictionaries of the residual stream close on their own: latents + bias + error = the whole stream there. */
import type { ViewTotalsJson } from "./gen/tdb/inference/v1/attribute_pb";
import { full, num, signed } from "./numbers";
import { answer } from "./state";

const PARTS = ["latents", "bias", "error", "site"] as const;

export function Views() {
  const views = (answer.value?.response.views ?? []).filter(({ compare }) => !compare);
  if (views.length === 0) return null;
  return (
    <table class="views" aria-label="Views of the residual stream">
      <caption>views of the residual stream: total effects, outside the sum above</caption>
      <thead>
        <tr>
          <th scope="col">dictionary</th>
          <th scope="col">latents</th>
          <th scope="col">bias</th>
          <th scope="col">error</th>
          <th scope="col" title="The stream times its gradient: the sum of the three">
            stream
          </th>
        </tr>
      </thead>
      <tbody>
        {views.map((view) => (
          <View key={view.dictionary} view={view} />
        ))}
      </tbody>
    </table>
  );
}

function View({ view }: { view: ViewTotalsJson }) {
  return (
    <tr>
      <th scope="row">
        <code>{view.dictionary}</code>
      </th>
      {PARTS.map((part) => {
        const x = num(view[part]) ?? 0;
        return (
          <td key={part} class="figure" title={full(x)}>
            {signed(x)}
          </td>
        );
      })}
    </tr>
  );
}
