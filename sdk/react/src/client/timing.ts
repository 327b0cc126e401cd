/** Clocks and pauses. */

export type Timer = ReturnType<typeof setTimeout> | undefined;

/** A timer cannot wait longer, ms. */
export const LONGEST_TIMER = 2 ** 31 - 1;

/** ms of a clock that only runs forward. */
export const now = () => performance.now();

/** The pause before try `n` (from 0 on), ms: exponential, with full jitter. */
export const backoff = (n: number, min = 500, max = 20_000) => Math.random() * Math.min(max, min * 2 ** n);

/** Whether nobody can see this page, so that its timers are slow. */
export const isHidden = () => globalThis.document?.hidden;
