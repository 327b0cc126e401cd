// @vitest-environment jsdom
/** The provider and the hooks of the connection: when sockets open and close, and what is told of them. */
import { act, render } from '@testing-library/react';
import { Activity, StrictMode, useEffect } from 'react';
import { describe, expect, it, vi } from 'vitest';
import {
  BroadcastClient,
  BroadcastProvider,
  type BroadcastSocket,
  type ClientOptions,
  useBroadcast,
  useBroadcastSocket,
  useSubscription,
} from '../../src/index.js';
import { FakeServer } from '../../src/testing/index.js';
import { complaints, frame, makeCounter, pass, show, told } from './kit.js';

describe('BroadcastProvider', () => {
  it.each([false, true])('opens one socket (StrictMode: %s)', async (isStrict) => {
    const server = new FakeServer();
    const { container, unmount } = await show(server, <Status />, {}, isStrict);
    expect(container.textContent).toBe('open');
    await pass(5000);
    expect(server.sockets).toHaveLength(1);
    expect(server.connection.isOpen).toBe(true);
    unmount();
    await pass(1000);
    expect(server.connection.isOpen).toBe(false);
    expect(server.sockets).toHaveLength(1);
  });

  it('opens none while rendering: what never came to be has never connected', async () => {
    const server = new FakeServer();
    function Broken(): null {
      useBroadcastSocket('ws://other', { WebSocket: server.WebSocket });
      useSubscription('news');
      throw new Error('broken');
    }
    await expect(show(server, <Broken />)).rejects.toThrow('broken');
    told();
    await pass(5000);
    expect(server.sockets).toEqual([]);
  });

  it('stays connected for who comes back at once, and connects again for who comes back later', async () => {
    const server = new FakeServer();
    const options = { WebSocket: server.WebSocket };
    const tree = (mode: 'visible' | 'hidden') => (
      <Activity mode={mode}>
        <BroadcastProvider url="ws://fake" options={options}>
          <Status />
        </BroadcastProvider>
      </Activity>
    );
    const { rerender, container } = render(tree('visible'));
    await pass();
    rerender(tree('hidden'));
    await pass();
    rerender(tree('visible'));
    await pass(1000);
    expect(server.sockets).toHaveLength(1);
    rerender(tree('hidden'));
    await pass(1000);
    expect(server.connection.isOpen).toBe(false);
    rerender(tree('visible'));
    await pass();
    expect(container.textContent).toBe('open');
    expect(server.sockets).toHaveLength(2);
  });

  it('does not mind new options, and calls the newest callbacks', async () => {
    const server = new FakeServer();
    const heard: string[] = [];
    const tree = (round: number) => (
      <BroadcastProvider
        url="ws://fake"
        options={{
          WebSocket: server.WebSocket,
          reconnect: { min: 1, max: 1 },
          onStatus: (status) => heard.push(`${round} ${status}`),
        }}
        getToken={() => `token-${round}`}
      >
        <Status />
      </BroadcastProvider>
    );
    const { rerender } = render(tree(0));
    await pass();
    for (let round = 1; round <= 5; round++) rerender(tree(round));
    await pass();
    expect(server.sockets).toHaveLength(1);
    expect(server.connection.token).toBe('token-0');
    expect(heard).toEqual(['0 connecting', '0 open']);
    server.connection.close(4501);
    await pass();
    expect(server.connection.token).toBe('token-5');
    expect(heard.slice(2)).toEqual(['5 reconnecting', '5 open']);
  });

  it('goes to another url', async () => {
    const server = new FakeServer();
    const tree = (url: string) => (
      <BroadcastProvider url={url} options={{ WebSocket: server.WebSocket }}>
        <Status />
      </BroadcastProvider>
    );
    const { rerender, container } = render(tree('ws://a'));
    await pass();
    rerender(tree('ws://b'));
    await pass(1000);
    expect(server.sockets.map((socket) => [socket.url, socket.readyState])).toEqual([
      ['ws://a', 3],
      ['ws://b', 1],
    ]);
    expect(container.textContent).toBe('open');
  });

  it('does not hand the connection of one user to the next', async () => {
    const server = new FakeServer();
    const getToken = () => user;
    let user = 'ada';
    const tree = () => (
      <BroadcastProvider
        key={user}
        url="ws://fake"
        options={{ WebSocket: server.WebSocket }}
        getToken={getToken}
      >
        <Status />
      </BroadcastProvider>
    );
    const { rerender } = render(tree());
    await pass();
    user = 'grace';
    rerender(tree());
    await pass(1000);
    expect(server.connections.map(({ token, isOpen }) => [token, isOpen])).toEqual([
      ['ada', false],
      ['grace', true],
    ]);
  });

  it('connects a client of yours, and leaves its end to you', async () => {
    const server = new FakeServer();
    const client = new BroadcastClient('ws://fake', { WebSocket: server.WebSocket });
    const { unmount } = render(
      <StrictMode>
        <BroadcastProvider client={client}>
          <Status />
        </BroadcastProvider>
      </StrictMode>,
    );
    await pass();
    expect(client.getSnapshot().status).toBe('open');
    unmount();
    await pass(5000);
    expect(client.getSnapshot().status).toBe('open');
    expect(server.sockets).toHaveLength(1);
    client.close();
  });

  it('says what it needs', () => {
    // @ts-expect-error: neither url nor client
    expect(() => render(<BroadcastProvider />)).toThrow(
      'BroadcastProvider needs url="wss://..." or client={...}.',
    );
    told();
  });
});

describe('a hook without a provider', () => {
  it.each([
    ['useBroadcast', () => useBroadcast()],
    ['useSubscription', () => useSubscription('news')],
    ['useBroadcastSocket', () => useBroadcastSocket()],
  ])('%s says what to do', (name, use) => {
    function Alone() {
      use();
      return null;
    }
    expect(() => render(<Alone />)).toThrow(new RegExp(`^${name}\\(\\) needs .*<BroadcastProvider url=`));
    told();
  });
});

describe('useBroadcastSocket', () => {
  it('has the state of the connection and what can be done with it', async () => {
    const server = new FakeServer();
    let socket!: BroadcastSocket;
    const seen: string[] = [];
    function Inside() {
      socket = useBroadcastSocket();
      seen.push(socket.status);
      return null;
    }
    await show(server, <Inside />, { reconnect: { min: 50, max: 50 } });
    expect(socket.clientId).toBe(server.connection.session.clientId);
    expect(socket.client).toBeInstanceOf(BroadcastClient);

    const published = socket.publish('news', 1, { id: 'm1' });
    await pass();
    expect(await published).toMatchObject({ messageId: 'm1' });
    expect(socket.send('news', 2)).toBe(true);
    await pass();
    expect(server.published.map(({ data }) => data)).toEqual([1, 2]);

    act(() => server.connection.drop());
    await pass(10);
    expect(socket.status).toBe('reconnecting');
    await pass(200);
    act(() => socket.reconnect());
    await pass();
    expect(server.connections).toHaveLength(3);
    act(() => socket.close());
    await pass();
    expect(seen.filter((status, index) => status !== seen[index - 1])).toEqual([
      'idle',
      'connecting',
      'open',
      'reconnecting',
      'open',
      'reconnecting',
      'open',
      'closed',
    ]);
  });

  it('tells why there is no connection, in its state and once on the console', async () => {
    const server = new FakeServer();
    server.isUp = false;
    let socket!: BroadcastSocket;
    function Inside() {
      socket = useBroadcastSocket();
      return null;
    }
    await show(server, <Inside />, { reconnect: { min: 10, max: 10 } });
    await pass(200);
    expect(socket.error?.code).toBe('connect_failed');
    expect(socket.status).toBe('connecting');
    expect(told()).toEqual([expect.stringContaining('connect to ws://fake')]);
    server.isUp = true;
    await pass(200);
    expect([socket.status, socket.error]).toEqual(['open', undefined]);
  });

  it('tells onError instead of the console', async () => {
    const server = new FakeServer();
    server.isUp = false;
    const onError = vi.fn();
    await show(server, <Status />, { reconnect: { min: 10, max: 10 }, onError });
    await pass(200);
    expect(onError.mock.calls.map(([error]) => error.code)).toEqual(['connect_failed']);
    expect(complaints).toEqual([]);
  });

  it('opens a connection of its own for a url, and shares it with who names the same', async () => {
    const server = new FakeServer();
    const options = { WebSocket: server.WebSocket };
    const clients = new Set<BroadcastClient>();
    function One({ url, getToken }: { url: string; getToken?: NonNullable<ClientOptions['getToken']> }) {
      const { client, status } = useBroadcastSocket(url, { ...options, ...(getToken && { getToken }) });
      useEffect(() => {
        if (status === 'open') clients.add(client);
      }, [client, status]);
      return `${status} `;
    }
    const tree = (count: number) => (
      <StrictMode>
        {Array.from({ length: count }, (_, index) => (
          // biome-ignore lint/suspicious/noArrayIndexKey: they are all alike
          <One key={index} url="ws://a" />
        ))}
      </StrictMode>
    );
    const { rerender, container, unmount } = render(tree(2));
    await pass();
    rerender(tree(3));
    await pass();
    expect(container.textContent).toBe('open open open ');
    expect([clients.size, server.sockets.length]).toEqual([1, 1]);
    rerender(tree(1));
    await pass(1000);
    expect(server.connection.isOpen).toBe(true);
    unmount();
    await pass(1000);
    expect(server.connection.isOpen).toBe(false);

    // Who has another way to a token is somebody else.
    const shared = () => 'shared';
    render(
      <>
        <One url="ws://a" getToken={() => 'own'} />
        <One url="ws://a" getToken={shared} />
        <One url="ws://a" getToken={shared} />
        <One url="ws://b" />
      </>,
    );
    await pass();
    const others = server.connections.slice(1).map(({ token, socket }) => `${socket.url} ${token}`);
    expect(others.sort()).toEqual(['ws://a own', 'ws://a shared', 'ws://b undefined']);
  });

  it('has the last message of whatever channel, and renders for it once a frame', async () => {
    const server = new FakeServer();
    const counter = makeCounter();
    let last: unknown;
    function Inside() {
      last = useBroadcastSocket().lastMessage?.data;
      return null;
    }
    await show(
      server,
      <counter.Counted>
        <Inside />
      </counter.Counted>,
    );
    const before = counter.renders;
    for (let n = 1; n <= 100; n++) server.publish(null, n);
    await frame();
    expect(last).toBe(100);
    expect(counter.renders).toBe(before + 1);
  });
});

describe('a component that only publishes', () => {
  it.each([
    ['useBroadcast', () => useBroadcast().publish],
    ['useBroadcastSocket', () => useBroadcastSocket().publish],
    ['useSubscription', () => useSubscription('news', { onMessage() {} }).publish],
  ])('never renders on a message (%s)', async (_, use) => {
    const server = new FakeServer();
    const counter = makeCounter();
    const methods = new Set<unknown>();
    function Button() {
      methods.add(use());
      return <button type="button">Publish</button>;
    }
    function Listener() {
      return <p>{useSubscription<number>('news').lastMessage?.data}</p>;
    }
    const { container } = await show(
      server,
      <>
        <counter.Counted>
          <Button />
        </counter.Counted>
        <Listener />
      </>,
    );
    const before = counter.renders;
    for (let n = 0; n < 50; n++) {
      server.publish('news', n);
      await frame();
    }
    expect(container.querySelector('p')?.textContent).toBe('49');
    expect(counter.renders).toBe(before);
    expect(methods.size).toBe(1);
  });

  it('has the same object for ever', async () => {
    const server = new FakeServer();
    const seen = new Set<unknown>();
    function Button() {
      seen.add(useBroadcast());
      return null;
    }
    const { rerender } = await show(server, <Button />);
    server.connection.drop();
    await pass(2000);
    rerender(<Button />);
    expect(server.connections.length).toBeGreaterThan(1);
    expect(seen.size).toBe(1);
  });
});

function Status() {
  return useBroadcastSocket().status;
}
