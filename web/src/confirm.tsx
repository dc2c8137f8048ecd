/** One question before something that cannot be undone: what happens, and a way out that has the focus. */
import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";

interface ConfirmProps {
  title: string;
  yes: string;
  onYes: () => void;
  onNo: () => void;
  children: ComponentChildren;
}

export function Confirm({ title, yes, onYes, onNo, children }: ConfirmProps) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);
  return (
    <dialog
      ref={dialog}
      class="confirm"
      aria-label={title}
      onKeyDown={(event) => event.stopPropagation()}
      onClose={onNo}
      onClick={(event) => {
        if (event.target === dialog.current) dialog.current?.close();
      }}
    >
      <h2>{title}</h2>
      {children}
      <p class="buttons">
        <button type="button" autofocus onClick={() => dialog.current?.close()}>
          Not now
        </button>
        <button type="button" class="primary" onClick={onYes}>
          {yes}
        </button>
      </p>
    </dialog>
  );
}
