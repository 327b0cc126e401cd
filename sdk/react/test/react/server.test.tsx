/** Rendering on a server, and what a browser makes of it. */
import { renderToString } from 'react-dom/server';
import { afterEach, expect, it, vi } from 'vitest';
import {
  BroadcastClient,
  BroadcastProvider,
  type ClientOptions,
  useBroadcast,
  useBroadcastSocket,
  useSubscription,
} from '../../src/index.js';
import { FakeServer } from '../../src/testing/index.js';

afterEach(() => vi.unstubAllGlobals());

function Everything({ options }: { options: ClientOptions }) {
  const { status, clientId, lastMessage, error } = useBroadcastSocket();
  const other = useBroadcastSocket('ws://other', options);
  const news = useSubscription<string>('news', { buffer: 3, last: 3 });
  useBroadcast();
  return (
    <p>
      {[status, clientId, lastMessage, error, other.status, news.status, news.recovered]
        .map(String)
        .join(' ')}
      {news.messages.map(({ data }) => data)}
    </p>
  );
}

const App = ({ options, client }: { options: ClientOptions; client?: BroadcastClient }) =>
  client ? (
    <BroadcastProvider client={client}>
      <Everything options={options} />
    </BroadcastProvider>
  ) : (
    <BroadcastProvider url="ws://fake" options={options}>
      <Everything options={options} />
    </BroadcastProvider>
  );

const NOTHING = '<p>idle undefined undefined undefined idle idle undefined</p>';

it('touches nothing of a browser, opens nothing and complains of nothing', async () => {
  // Node 22 has a WebSocket; here nothing may be there at all.
  for (const name of ['window', 'document', 'WebSocket', 'sessionStorage', 'requestAnimationFrame'])
    vi.stubGlobal(name, undefined);
  const server = new FakeServer();
  const complaints = vi.spyOn(console, 'error');
  const timers = vi.spyOn(globalThis, 'setTimeout');
  const options: ClientOptions = { WebSocket: server.WebSocket, storage: 'sessionStorage' };
  expect(renderToString(<App options={options} />)).toBe(NOTHING);
  expect(renderToString(<App options={options} client={new BroadcastClient('ws://fake', options)} />)).toBe(
    NOTHING,
  );
  expect(timers).not.toHaveBeenCalled();
  await new Promise((resolve) => setTimeout(resolve, 50));
  expect(server.sockets).toEqual([]);
  expect(complaints).not.toHaveBeenCalled();
});

it('answers a publish on the server by what became of it, never by silence', async () => {
  const server = new FakeServer();
  const client = new BroadcastClient('ws://fake', { WebSocket: server.WebSocket, queue: 'reject' });
  await expect(client.publish('news', 1)).rejects.toMatchObject({ code: 'queue_full' });
});
