/** One who listens to a channel: its callbacks, and from where on it hears messages. */
import type { Position, SubscribeOptions, SubscriptionStatus } from '../types.js';
import { BroadcastError } from './errors.js';

export interface Listener {
  readonly options: SubscribeOptions;
  /** Hears the errors that this one has no `onError` for. */
  readonly failed: (error: BroadcastError) => void;
  /** Its beginning is settled, though messages before may still wait. */
  isBegun?: boolean;
  recovered?: boolean;
  /** It hears what has a higher number; undefined: it has not begun. */
  at?: number;
  /** The last that it has heard of each epoch, for numbers may begin anew. */
  readonly seen: Map<string, number>;
}

/** It has a wish that was not asked for yet. */
export const isWaiting = ({ isBegun, options }: Listener) => !isBegun && (options.since ?? options.last);

export const tell = ({ options, failed }: Listener, cause: unknown) => {
  const error =
    cause instanceof BroadcastError ? cause : new BroadcastError('unknown', `${cause}`, { cause });
  // Not here: what it throws is nobody's in the middle of a message.
  queueMicrotask(() => (options.onError ?? failed)(error));
};

/** A promise where the callback gave one; it never rejects. */
export const call = <K extends 'onMessage' | 'onGap' | 'onStatus'>(
  one: Listener,
  name: K,
  ...args: Parameters<NonNullable<SubscribeOptions[K]>>
) => {
  const thrown = (cause: unknown) => tell(one, cause);
  try {
    const callback = one.options[name] as ((...args: unknown[]) => unknown) | undefined;
    return (callback?.(...args) as PromiseLike<unknown> | undefined)?.then?.(undefined, thrown);
  } catch (cause) {
    thrown(cause);
  }
  return undefined;
};

/** Hear what comes after this position. */
export const begin = (one: Listener, { epoch, seq }: Position) => {
  one.at = seq;
  one.seen.set(epoch, seq);
};

/** Whether it has not heard this position yet; now it has. */
export const isFresh = (one: Listener, position?: Position) => {
  if (one.at === undefined) return false;
  if (!position) return true;
  const { epoch, seq } = position;
  if (seq <= one.at || seq <= one.seen.get(epoch)!) return false;
  begin(one, position);
  return true;
};

/** Messages were missed. */
export const miss = (one: Listener, channel: string, from?: Position, to?: Position) => {
  if (one.at === undefined) return;
  if (to) one.at = to.seq;
  one.recovered = false;
  call(one, 'onGap', { channel, from, to });
};

export const tellStatus = (one: Listener, status: SubscriptionStatus, error?: BroadcastError) => {
  call(one, 'onStatus', status, { recovered: one.recovered, error });
};
