/** One who listens to a channel: its callbacks, and from where on it hears messages. */
import type { Position, SubscribeOptions, SubscriptionStatus } from '../types.js';
import { BroadcastError } from './errors.js';

type Callback = 'onMessage' | 'onGap' | 'onStatus';

/** `failed` hears the errors that this one has no `onError` for. */
export const createListener = (
  channel: string,
  options: SubscribeOptions,
  failed: (error: BroadcastError) => void,
) => {
  /** It hears what has a higher number, of an epoch of which it has not heard it yet. */
  let at: number | undefined;
  const seen = new Map<string, number>();

  const tell = (error: BroadcastError) => {
    try {
      if (options.onError) options.onError(error);
      else failed(error);
    } catch (cause) {
      failed(toError(cause));
    }
  };

  const toError = (cause: unknown) =>
    cause instanceof BroadcastError
      ? cause
      : new BroadcastError('unknown', `A callback threw: ${cause}`, { channel, cause });

  const thrown = (cause: unknown) => tell(toError(cause));

  /** A promise where the callback gave one; it never rejects. */
  const call = <K extends Callback>(
    name: K,
    ...args: Parameters<NonNullable<SubscribeOptions[K]>>
  ): PromiseLike<unknown> | undefined => {
    try {
      const callback = options[name] as ((...args: unknown[]) => unknown) | undefined;
      const result = callback?.(...args) as PromiseLike<unknown> | undefined;
      return typeof result?.then === 'function' ? result.then(undefined, thrown) : undefined;
    } catch (cause) {
      thrown(cause);
      return undefined;
    }
  };

  const one = {
    options,
    call,
    tell,
    /** Its beginning is settled, though messages before may still wait. */
    isBegun: false,
    recovered: undefined as boolean | undefined,

    /** It has a wish that was not asked for yet. */
    isWaiting: () => !one.isBegun && (options.since || options.last !== undefined),

    isLike: ({ since, last }: SubscribeOptions) =>
      since?.epoch === options.since?.epoch && since?.seq === options.since?.seq && last === options.last,

    begin({ epoch, seq }: Position) {
      at = seq;
      seen.set(epoch, seq);
    },

    /** Whether it has not heard this position yet; now it has. */
    isFresh(position?: Position) {
      if (at === undefined) return false;
      if (!position) return true;
      const { epoch, seq } = position;
      if (seq <= at || seq <= (seen.get(epoch) ?? -1)) return false;
      at = seq;
      seen.set(epoch, seq);
      return true;
    },

    miss(channel: string, from?: Position, to?: Position) {
      if (at === undefined) return;
      if (to) at = to.seq;
      one.recovered = false;
      call('onGap', { channel, ...(from && { from }), ...(to && { to }) });
    },

    tellStatus(status: SubscriptionStatus, error: BroadcastError | undefined) {
      const present = status === 'subscribed' && !one.isBegun ? 'subscribing' : status;
      call('onStatus', present, { recovered: one.recovered, error });
    },
  };
  return one;
};

export type Listener = ReturnType<typeof createListener>;
