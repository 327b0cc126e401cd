/** Types that users rely on; `npm run types` checks them. */
import { WebSocket as NodeWebSocket } from 'ws';
import {
  BroadcastClient,
  BroadcastError,
  type ClientOptions,
  type ErrorCode,
  type Message,
  type Published,
  type Snapshot,
  type Status,
  type SubscriptionStatus,
} from '../src/client/index.js';
import { FakeServer } from '../src/testing/index.js';

type Equal<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false;
const same = <A, B>(_: Equal<A, B>): void => {};

interface Quote {
  symbol: string;
  price: number;
}

const client = new BroadcastClient('ws://localhost:8080');
same<ReturnType<typeof client.getSnapshot>, Snapshot>(true);
same<Snapshot['status'], Status>(true);
same<Status, 'idle' | 'connecting' | 'open' | 'reconnecting' | 'closed'>(true);
same<SubscriptionStatus, 'idle' | 'subscribing' | 'subscribed' | 'failed'>(true);

const off = client.subscribe<Quote>('quotes', {
  onMessage(message) {
    same<typeof message, Message<Quote>>(true);
    same<typeof message.data.price, number>(true);
  },
  onError: (error) => same<typeof error, BroadcastError>(true),
  onStatus: (status, { recovered }) => {
    same<typeof status, SubscriptionStatus>(true);
    same<typeof recovered, boolean | undefined>(true);
  },
  since: { epoch: 'e', seq: 1 },
  last: 5,
  ack: false,
});
same<typeof off, () => void>(true);
client.subscribe('news', { onMessage: ({ data }) => same<typeof data, unknown>(true) });
same<ReturnType<typeof client.publish>, Promise<Published>>(true);
same<ReturnType<typeof client.send>, boolean>(true);
client.publish(null, 1, { timeout: 1, signal: new AbortController().signal, id: 'x' });
client.on('status', (status) => same<typeof status, Status>(true));
client.on('message', (message) => same<typeof message, Message>(true));

// Constructors that can be given.
new BroadcastClient('ws://localhost', { WebSocket });
new BroadcastClient('ws://localhost', { WebSocket: new FakeServer().WebSocket });
new BroadcastClient('ws://localhost', { WebSocket: NodeWebSocket as unknown as typeof WebSocket });
const options: ClientOptions = {
  getToken: async ({ reason, attempt, signal }) => {
    same<typeof reason, 'connect' | 'renew' | 'rejected'>(true);
    same<typeof attempt, number>(true);
    return signal.aborted ? null : 'token';
  },
  queue: 'reject',
};
new BroadcastClient('ws://localhost', { ...options, queue: { max: 1, ttl: 1 } });
same<BroadcastError['code'], ErrorCode>(true);
new BroadcastError('forbidden', 'no', { channel: 'a', retryAfter: 1 }) satisfies Error;

// @ts-expect-error no such event
client.on('open', () => {});
// @ts-expect-error no such code
new BroadcastError('nothing', 'no');
// @ts-expect-error a position has an epoch
client.subscribe('news', { since: { seq: 1 } });
// @ts-expect-error snapshots are immutable
client.getSnapshot().status = 'open';
// @ts-expect-error no such option
new BroadcastClient('ws://localhost', { retries: 3 });
