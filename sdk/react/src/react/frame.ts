/** Milliseconds until it is done anyway where no frames are drawn: in a hidden tab, or without a screen. */
const LATEST = 250;

const due = new Set<() => void>();

/** Run this once at the next animation frame, together with all else that is due then: React renders once. */
export function atNextFrame(run: () => void): void {
  const isScheduled = due.size > 0;
  due.add(run);
  if (isScheduled) return;
  const timer = setTimeout(flush, LATEST);
  const frame = globalThis.requestAnimationFrame?.(flush);

  function flush(): void {
    clearTimeout(timer);
    if (frame !== undefined) cancelAnimationFrame(frame);
    const now = [...due];
    due.clear();
    for (const each of now) each();
  }
}

/** It is not to be run any more. */
export function forget(run: () => void): void {
  due.delete(run);
}
