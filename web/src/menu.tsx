/** The menu of a node: what can be done to it, and why not where something cannot. */
import { signal } from "@preact/signals";
import { useLayoutEffect, useRef } from "preact/hooks";
import { offers, traces, type Offer, type OfferGroup } from "./offers";

interface Open {
  node: string;
  groups: OfferGroup[];
  /** The element it opened from, which gets the focus back. */
  from: HTMLElement | null;
  box: DOMRect;
}

const open = signal<Open | null>(null);

export function openMenu(node: string, from: HTMLElement): void {
  show(node, offers(node), from);
}

/** Opens the menu of a node from the keyboard. */
export function openMenuOf(node: string): void {
  const from = buttonOf(node);
  if (from) openMenu(node, from);
}

function buttonOf(node: string): HTMLElement | null {
  return document.querySelector(`[data-node="${CSS.escape(node)}"] .menu-button`);
}

/** Traces the node at once where there is one way, and else asks which. */
export function openTraces(node: string): void {
  const ways = traces(node);
  const [only] = ways;
  const row = buttonOf(node);
  if (ways.length === 1 && only && only.why === undefined) only.act();
  else if (row) show(node, [{ name: "why is it what it is?", offers: ways }], row);
}

function show(node: string, groups: OfferGroup[], from: HTMLElement): void {
  open.value = { node, groups, from, box: from.getBoundingClientRect() };
}

function close(): void {
  open.value?.from?.focus();
  open.value = null;
}

/** The button that opens a node's menu. */
export function MenuButton({ node }: { node: string }) {
  return (
    <button
      type="button"
      class="small quiet menu-button"
      title={`All that can be done to ${node}`}
      aria-label={`Actions of ${node}`}
      aria-haspopup="menu"
      aria-expanded={open.value?.node === node}
      onClick={(event) => {
        event.stopPropagation();
        if (open.value?.node === node) close();
        else openMenu(node, event.currentTarget);
      }}
    >
      ⋯
    </button>
  );
}

/** Drawn once, above everything, beside the button that opened it. */
export function Menu() {
  const shown = open.value;
  const box = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const element = box.current;
    if (!shown || !element) return;
    const { width, height } = element.getBoundingClientRect();
    const below = shown.box.bottom + 2;
    element.style.left = `${Math.max(4, Math.min(shown.box.right - width, innerWidth - width - 4))}px`;
    element.style.top = `${Math.max(4, below + height > innerHeight ? shown.box.top - height - 2 : below)}px`;
    (items(element)[0] ?? element).focus();
    const away = (event: Event) => {
      if (!(event.target instanceof Node && element.contains(event.target))) open.value = null;
    };
    addEventListener("pointerdown", away, true);
    addEventListener("wheel", away, true);
    return () => {
      removeEventListener("pointerdown", away, true);
      removeEventListener("wheel", away, true);
    };
  }, [shown]);
  if (!shown) return null;
  const choose = ({ why, act }: Offer) => {
    if (why !== undefined) return;
    close();
    act();
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    const all = box.current ? items(box.current) : [];
    const now = all.indexOf(document.activeElement as HTMLButtonElement);
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const step = event.key === "ArrowDown" ? 1 : -1;
      all[(now + step + all.length) % all.length]?.focus();
    } else if (event.key === "Escape" || event.key === "Tab") {
      close();
    } else {
      const keyed = shown.groups.flatMap((group) => group.offers).find((o) => o.key === event.key);
      if (!keyed) return;
      choose(keyed);
    }
    event.preventDefault();
  };
  return (
    <div
      ref={box}
      class="menu"
      role="menu"
      tabIndex={-1}
      aria-label={`Actions of ${shown.node}`}
      onKeyDown={onKeyDown}
    >
      <p class="menu-title">
        <code>{shown.node}</code>
      </p>
      {shown.groups.map((group) => (
        <Group key={group.name} group={group} choose={choose} />
      ))}
    </div>
  );
}

type Choose = (offer: Offer) => void;

/** Offers under a heading; where all fail for one reason it is said once. */
function Group({ group: { name, offers }, choose }: { group: OfferGroup; choose: Choose }) {
  const [first] = offers;
  const shared =
    offers.length > 1 && offers.every(({ why }) => why !== undefined && why === first?.why);
  return (
    <div role="group" aria-label={name}>
      <p class="menu-group">{name}</p>
      {offers.map((offer) => (
        <Item key={offer.label} offer={offer} choose={choose} quiet={shared} />
      ))}
      {shared && <p class="menu-group">{first?.why}</p>}
    </div>
  );
}

function Item({ offer, choose, quiet }: { offer: Offer; choose: Choose; quiet: boolean }) {
  const { label, hint, key, why } = offer;
  return (
    <button
      type="button"
      role="menuitem"
      aria-disabled={why !== undefined}
      title={why}
      onClick={() => choose(offer)}
    >
      <span>{label}</span>
      {key && <kbd>{key}</kbd>}
      {!quiet && <small>{why ?? hint}</small>}
    </button>
  );
}

function items(element: HTMLElement): HTMLButtonElement[] {
  return [...element.querySelectorAll<HTMLButtonElement>("[role=menuitem]")];
}
