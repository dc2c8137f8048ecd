/** For each sublayer that has dictionaries: whether its own parts or latents stand in the table. */
import { change } from "./editing";
import { whyNot } from "./features";
import {
  choose,
  chosenIds,
  groups,
  isChosen,
  PLAIN_NAMES,
  type Group,
  type Sublayer,
} from "./latents";
import { asked, model } from "./state";

export function LatentSwitches() {
  const all = groups(model.value?.dictionaries ?? []);
  const sublayers = (Object.keys(PLAIN_NAMES) as Sublayer[]).filter((sublayer) =>
    all.some((group) => group.sublayer === sublayer),
  );
  return (
    <>
      {sublayers.map((sublayer) => (
        <Switch
          key={sublayer}
          sublayer={sublayer}
          choices={all.filter((group) => group.sublayer === sublayer)}
        />
      ))}
    </>
  );
}

function Switch({ sublayer, choices }: { sublayer: Sublayer; choices: Group[] }) {
  const dictionaries = model.value?.dictionaries ?? [];
  const ids = chosenIds(asked.value?.dictionaries ?? [], dictionaries);
  const { of, plain } = PLAIN_NAMES[sublayer];
  const why = whyNot("attribute.dictionaries");
  const now = choices.find((group) => isChosen(group, ids)) ?? null;
  const option = (group: Group | null, text: string, title: string) => (
    <button
      key={text}
      type="button"
      class="small"
      aria-pressed={now === group}
      disabled={why !== undefined}
      title={why ?? title}
      onClick={() => {
        if (now !== group)
          change((question) => ({
            dictionaries: choose(question.dictionaries, dictionaries, sublayer, group),
          }));
      }}
    >
      {text}
    </button>
  );
  return (
    <span class="switch" role="group" aria-label={`What stands for the ${of}`}>
      <span>{of}</span>
      <span class="joined">
        {option(null, plain, `List ${plain} of every layer. Choosing asks again`)}
        {choices.map((group) => {
          const layers = group.dictionaries.length;
          const only = choices.length === 1;
          return option(
            group,
            only ? "latents" : `${group.name} latents`,
            `List the latents of ${group.name} in ${layers} ${layers === 1 ? "layer" : "layers"}. Choosing asks again`,
          );
        })}
      </span>
    </span>
  );
}
