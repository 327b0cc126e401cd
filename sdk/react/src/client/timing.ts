/** Clocks and pauses. */

export type Timer = ReturnType<typeof setTimeout> | undefined;

/** A timer for any time: what is longer than 24 days is 24 days. */
export const after = <A extends unknown[]>(ms: number, task: (...args: A) => void, ...args: A) =>
  setTimeout(task, Math.min(ms, 2 ** 31 - 1), ...args);

/** ms of a clock that only runs forward. */
export const now = () => performance.now();

/** The pause before try `n` (from 0 on), ms: exponential, with full jitter. */
export const backoff = (n: number, min = 500, max = 20_000) => Math.random() * Math.min(max, min * 2 ** n);

/** Whether nobody can see this page, so that its timers are slow. */
export const isHidden = () => globalThis.document?.hidden;
