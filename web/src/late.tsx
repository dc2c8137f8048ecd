/** What takes a moment says so only after one. */
import { useEffect, useState } from "preact/hooks";

const SLOW_MS = 300;

export function Late({ children }: { children: preact.ComponentChildren }) {
  const [late, setLate] = useState(false);
  useEffect(() => {
    const timer = setTimeout(() => setLate(true), SLOW_MS);
    return () => clearTimeout(timer);
  }, []);
  return <span class="quiet-text">{late ? children : " "}</span>;
}
