/** What TypeScript knows of the hooks. */
import { expectTypeOf, it } from 'vitest';
import {
  type BroadcastClient,
  type BroadcastError,
  BroadcastProvider,
  type Message,
  type Published,
  type Status,
  type SubscriptionStatus,
  useBroadcast,
  useBroadcastSocket,
  useSubscription,
} from '../../src/index.js';

declare const client: BroadcastClient;

it('useSubscription knows what its data are', () => {
  const plain = useSubscription('news');
  expectTypeOf(plain.lastMessage).toEqualTypeOf<Message<unknown> | undefined>();
  expectTypeOf(plain.status).toEqualTypeOf<SubscriptionStatus>();
  expectTypeOf(plain.error).toEqualTypeOf<BroadcastError | undefined>();
  expectTypeOf(plain.recovered).toEqualTypeOf<boolean | undefined>();
  expectTypeOf(plain.publish(1)).toEqualTypeOf<Promise<Published>>();

  const typed = useSubscription<{ price: number }>('quotes', {
    onMessage: (message) => expectTypeOf(message).toEqualTypeOf<Message<{ price: number }>>(),
  });
  expectTypeOf(typed.messages).toEqualTypeOf<readonly Message<{ price: number }>[]>();

  const parsed = useSubscription('quotes', { parse: (data) => ({ price: Number(data) }) });
  expectTypeOf(parsed.lastMessage).toEqualTypeOf<Message<{ price: number }> | undefined>();

  const selected = useSubscription('quotes', {
    parse: (data) => ({ price: Number(data) }),
    select: ({ price }) => price > 10,
    isEqual: (a, b) => {
      expectTypeOf(a).toEqualTypeOf<boolean>();
      return a === b;
    },
    onMessage: ({ data }) => expectTypeOf(data).toEqualTypeOf<{ price: number }>(),
  });
  expectTypeOf(selected.lastMessage).toEqualTypeOf<Message<boolean> | undefined>();
});

it('refuses what there is not', () => {
  // @ts-expect-error: a channel, or null
  useSubscription();
  useSubscription(null);
  // @ts-expect-error: no such way
  useSubscription('news', { coalesce: 'second' });
  // @ts-expect-error: `publish` of a subscription has the channel already
  useSubscription('news').publish('news', 1, {});
  // @ts-expect-error: read-only
  useSubscription('news').messages.push({});
  // @ts-expect-error: no such option
  useBroadcastSocket('ws://x', { retries: 3 });
});

it('the connection', () => {
  const socket = useBroadcastSocket();
  expectTypeOf(socket.status).toEqualTypeOf<Status>();
  expectTypeOf(socket.client).toEqualTypeOf<BroadcastClient>();
  expectTypeOf(socket.lastMessage).toEqualTypeOf<Message | undefined>();
  expectTypeOf(useBroadcast().send('news', 1)).toEqualTypeOf<boolean>();
  expectTypeOf(useBroadcast().publish(null, 1)).toEqualTypeOf<Promise<Published>>();
});

it('a provider has a url or a client', () => {
  void (<BroadcastProvider url="ws://x" getToken={async () => null} options={{ queue: 'reject' }} />);
  void (<BroadcastProvider client={client} />);
  // @ts-expect-error: neither
  void (<BroadcastProvider />);
  // @ts-expect-error: both
  void (<BroadcastProvider url="ws://x" client={client} />);
  // @ts-expect-error: a client has its options
  void (<BroadcastProvider client={client} options={{}} />);
});
