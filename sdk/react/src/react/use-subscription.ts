import { useCallback, useEffect, useMemo } from 'react';
import { BroadcastError } from '../client/index.js';
import type { Message, Published, PublishOptions, SubscribeOptions, SubscriptionStatus } from '../types.js';
import { useClient } from './provider.js';
import { Recent } from './recent.js';
import { Store, useLatest, useStore } from './store.js';

/** Options of `useSubscription`. All may be written inline; what is new in them counts from the next message on. */
export interface UseSubscriptionOptions<T = unknown, S = T>
  extends Pick<SubscribeOptions<T>, 'onMessage' | 'onGap' | 'onError' | 'since' | 'last' | 'ack'> {
  /** Subscribed at all. @default true */
  enabled?: boolean;
  /** Checks the data of each message and gives it its type. A throw is `bad_data`: the message is skipped. */
  parse?: (data: unknown) => T;
  /** What of the data `lastMessage` and `messages` show. @default all of it */
  select?: (data: T) => S;
  /**
   * Whether a message shows the same as the one before it: then nothing is rendered for it.
   * @default Object.is with `select`, else never
   */
  isEqual?: (a: S, b: S) => boolean;
  /** How many `messages` are kept. @default 0 */
  buffer?: number;
  /** Render for messages at most once a frame, or for each of them. @default 'frame' */
  coalesce?: 'frame' | 'none';
}

export interface Subscription<S = unknown> {
  readonly status: SubscriptionStatus;
  /** The last message. Only a component that reads this, or `messages`, renders for messages. */
  readonly lastMessage: Message<S> | undefined;
  /** The last `buffer` messages, the newest at the end. */
  readonly messages: readonly Message<S>[];
  /** Why it is `failed`; or that data were bad, until it is subscribed anew. */
  readonly error: BroadcastError | undefined;
  /** False: messages were missed for good, see `onGap`. Undefined before it is subscribed. */
  readonly recovered: boolean | undefined;
  /** Publishes on this channel. */
  publish(data: unknown, options?: PublishOptions): Promise<Published>;
}

type State = Pick<Subscription, 'status' | 'error' | 'recovered'>;

const IDLE: State = { status: 'idle', error: undefined, recovered: undefined };

/**
 * Subscribes to a channel (null: to none) while the component is there. Another channel, or `enabled`, begins anew;
 * nothing else does.
 */
export function useSubscription<T = unknown, S = T>(
  channel: string | null,
  options: UseSubscriptionOptions<T, S> = {},
): Subscription<S> {
  const client = useClient('useSubscription');
  const latest = useLatest(options);
  // Made anew for another channel, so that nothing of the old one is shown for it.
  // biome-ignore lint/correctness/useExhaustiveDependencies: see above
  const state = useMemo(() => new Store(IDLE), [client, channel]);
  // biome-ignore lint/correctness/useExhaustiveDependencies: see above
  const recent = useMemo(() => new Recent<S>(), [client, channel]);
  const { status, error, recovered } = useStore(state);
  const shown = useStore(recent);
  const enabled = options.enabled ?? true;

  useEffect(() => {
    if (channel === null || !enabled) return;
    const begin: Pick<SubscribeOptions, 'since' | 'last' | 'ack'> = latest.current;
    const off = client.subscribe(channel, {
      ...begin,
      onMessage(raw) {
        const { parse, select, isEqual, onMessage, buffer, coalesce } = latest.current;
        let message: Message<T>;
        let selected: Message<S>;
        try {
          message = parse ? { ...raw, data: parse(raw.data) } : (raw as Message<T>);
          selected = select ? { ...message, data: select(message.data) } : (message as Message<never>);
        } catch (cause) {
          const sentence = `The data of message ${raw.messageId} on ${channel} is not as expected: ${cause}`;
          const error = new BroadcastError('bad_data', sentence, { channel, cause });
          state.set({ ...state.get(), error });
          throw error;
        }
        recent.add(selected, buffer, coalesce, isEqual ?? (select ? Object.is : undefined));
        return onMessage?.(message);
      },
      onGap(gap) {
        state.set({ ...state.get(), recovered: false });
        latest.current.onGap?.(gap);
      },
      // Without one the client's own is told.
      get onError() {
        return latest.current.onError as (error: BroadcastError) => void;
      },
      onStatus: (status, { error, recovered }) => state.set({ status, error, recovered }),
    });
    return () => {
      off();
      recent.end();
      state.set(IDLE);
    };
  }, [client, channel, enabled, state, recent, latest]);

  const publish = useCallback(
    (data: unknown, options?: PublishOptions) =>
      channel === null
        ? Promise.reject(new BroadcastError('bad_channel', 'There is no channel to publish on.'))
        : client.publish(channel, data, options),
    [client, channel],
  );

  // biome-ignore lint/correctness/useExhaustiveDependencies: what is shown is read from `recent`
  return useMemo(
    () => ({
      status,
      error,
      recovered,
      get lastMessage() {
        return recent.read().lastMessage;
      },
      get messages() {
        return recent.read().messages;
      },
      publish,
    }),
    [publish, status, error, recovered, recent, shown],
  );
}
