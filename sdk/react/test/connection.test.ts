import { describe, expect, test, vi } from 'vitest';
import { BroadcastClient } from '../src/client/index.js';
import { chance, connected, pass, setUp } from './kit.js';

describe('connecting', () => {
  test('nothing happens before connect()', async () => {
    const { server, client } = setUp();
    await pass(60_000);
    expect(server.sockets).toHaveLength(0);
    expect(client.getSnapshot()).toEqual({ status: 'idle' });
    expect(vi.getTimerCount()).toBe(0);
  });

  test('the states on the way', async () => {
    const seen: string[] = [];
    const { server, client, status } = setUp({ onStatus: (one) => seen.push(one) });
    client.connect();
    client.connect();
    await pass();
    expect(server.sockets).toHaveLength(1);
    expect(server.connection.protocols).toEqual(['bcast.v1']);
    expect(client.getSnapshot().clientId).toBe('client-1');
    server.connection.drop();
    await pass();
    expect(status()).toBe('reconnecting');
    await pass(500);
    client.close();
    expect(seen).toEqual(['connecting', 'open', 'reconnecting', 'open', 'closed']);
    await pass(60_000);
    expect(server.sockets).toHaveLength(2);
    expect(client.getSnapshot().error).toBeUndefined();
    expect(vi.getTimerCount()).toBe(0);
  });

  test('the session is resumed by subprotocol, and the URL stays as it is', async () => {
    const { server, client } = await connected();
    const id = client.getSnapshot().clientId;
    server.connection.drop();
    await pass(500);
    expect(server.connection.protocols).toEqual(['bcast.v1', 'session.session-1']);
    expect(server.connection.socket.url).toBe('ws://fake/ws');
    expect(client.getSnapshot().clientId).toBe(id);
  });

  test('after close() it can be connected again', async () => {
    const { server, client, status } = await connected();
    client.close();
    client.close();
    await pass();
    expect(server.connection.isOpen).toBe(false);
    client.connect();
    await pass();
    expect(status()).toBe('open');
    expect(server.sockets).toHaveLength(2);
  });

  test('reconnect() goes at once, whatever the state', async () => {
    const { server, client, status } = setUp();
    client.reconnect();
    await pass();
    expect(status()).toBe('open');
    client.reconnect();
    await pass();
    expect(server.sockets).toHaveLength(2);
    expect(server.connections.map(({ isOpen }) => isOpen)).toEqual([false, true]);
    server.connection.close(1012, { retryAfter: 60_000 });
    await pass();
    client.reconnect();
    await pass();
    expect(status()).toBe('open');
  });

  test('snapshots keep their identity until something changes', async () => {
    const { server, client } = await connected();
    const snapshot = client.getSnapshot();
    await pass(10_000);
    expect(client.getSnapshot()).toBe(snapshot);
    server.publish(null, 'hello');
    await pass();
    expect(client.getSnapshot()).not.toBe(snapshot);
    expect(client.getSnapshot().lastMessage?.data).toBe('hello');
    expect(snapshot.lastMessage).toBeUndefined();
  });

  test('events of an old socket are stale', async () => {
    const { server, client, status } = await connected();
    const [old] = server.sockets;
    client.reconnect();
    await pass();
    const before = client.getSnapshot();
    old!.onclose?.({ code: 4503, reason: '' } as never);
    old!.onmessage?.({ data: '{"type":"message","data":1,"messageId":"x","timestamp":1}' } as never);
    await pass();
    expect(status()).toBe('open');
    expect(client.getSnapshot()).toBe(before);
    expect(server.sockets).toHaveLength(2);
  });

  test('a connection that does not answer is given up after connectTimeout', async () => {
    const { server, client, status } = setUp({ connectTimeout: 3_000 });
    server.onConnect = () => false;
    client.connect();
    await pass(2_999);
    expect(server.sockets[0]!.readyState).toBe(1);
    await pass(1);
    expect(server.sockets[0]!.readyState).toBeGreaterThan(1);
    server.onConnect = undefined;
    await pass(500);
    expect(status()).toBe('open');
  });

  test('a URL that is none is told, and tried again', async () => {
    const { client, status, errors } = setUp({
      WebSocket: class {
        constructor() {
          throw new SyntaxError('not a URL');
        }
      } as never,
      reconnect: { attempts: 2 },
    });
    client.connect();
    await pass();
    expect(errors).toEqual(['connect_failed']);
    expect(client.getSnapshot().error?.message).toContain('not a URL');
    await pass(60_000);
    expect(status()).toBe('closed');
    await expect(client.publish('news', 1)).rejects.toMatchObject({ code: 'closed' });
  });

  test('frames that make no sense are ignored', async () => {
    const { server, status } = await connected();
    for (const text of ['', 'hello', 'null', '1', '[]', '{}', '{"type":"later"}', '{"type":"ack"}'])
      server.connection.socket.arrived(text);
    await pass();
    expect(status()).toBe('open');
  });
});

describe('pauses', () => {
  /** The pauses between the tries of a client whose server is down, with Math.random as given. */
  async function pauses(random: () => number, count: number, reconnect = {}) {
    const { server, client } = setUp({ reconnect });
    vi.spyOn(Math, 'random').mockImplementation(random);
    server.isUp = false;
    const times: number[] = [];
    const start = Date.now();
    const push = server.sockets.push;
    server.sockets.push = (...sockets) => {
      times.push(Date.now() - start);
      return push.apply(server.sockets, sockets);
    };
    client.connect();
    while (times.length <= count) await pass(100);
    client.close();
    return times.slice(1).map((time, index) => time - times[index]!);
  }

  test('double up to the greatest, when chance is at its end', async () => {
    expect(await pauses(() => 1, 8)).toEqual([500, 1000, 2000, 4000, 8000, 16_000, 20_000, 20_000]);
    expect(await pauses(() => 1, 4, { min: 100, max: 300 })).toEqual([100, 200, 300, 300]);
  });

  test('have full jitter: even over the whole range', async () => {
    const third: number[] = [];
    for (let index = 0; index < 200; index++) {
      third.push((await pauses(chance, 3))[2]!);
    }
    const inside = (from: number, to: number) => third.filter((one) => one >= from && one < to).length;
    expect(Math.max(...third)).toBeLessThanOrEqual(2000);
    // 50 are expected in each quarter; less than 25 or more than 80 happens once in 10,000 runs.
    for (const quarter of [0, 500, 1000, 1500]) {
      expect(inside(quarter, quarter + 500)).toBeGreaterThan(25);
      expect(inside(quarter, quarter + 500)).toBeLessThan(80);
    }
  });

  test('begin anew only after a connection that lasted', async () => {
    const { server, status } = await connected();
    vi.spyOn(Math, 'random').mockReturnValue(1);
    for (const [lifetime, pause] of [
      [9_000, 500],
      [0, 1000],
      [9_999, 2000],
      [10_000, 500],
      [0, 1000],
    ] as const) {
      await pass(lifetime);
      server.connection.drop();
      await pass(pause - 1);
      expect(status()).toBe('reconnecting');
      await pass(1);
      expect(status()).toBe('open');
    }
  });

  test.each([1012, 1013, 4008, 4029])('%i: not before retryAfter', async (code) => {
    const { server, status } = await connected();
    server.connection.close(code, { retryAfter: 7_000 });
    await pass(6_999);
    expect(status()).toBe('reconnecting');
    await pass(1);
    expect(status()).toBe('open');
  });

  test('a reason that is no JSON, or none', async () => {
    const { server, status } = await connected();
    for (const reason of ['', 'null', 'going away', '{"retryAfter":"soon"}']) {
      server.connection.close(1012, reason);
      await pass(20_000);
      expect(status()).toBe('open');
    }
  });

  test('attempts: after so many it is closed', async () => {
    const { server, client, status } = await connected({ reconnect: { attempts: 2 } });
    server.isUp = false;
    server.dropAll();
    await pass(60_000);
    expect(server.sockets).toHaveLength(3);
    expect(status()).toBe('closed');
    expect(client.getSnapshot().error?.code).toBe('connect_failed');
  });
});

test('connect_failed after three that never opened, while it goes on', async () => {
  const { server, client, status, errors } = setUp();
  server.isUp = false;
  client.connect();
  while (server.sockets.length < 3) {
    expect(errors).toEqual([]);
    await pass(10);
  }
  await pass(10);
  expect(errors).toEqual(['connect_failed']);
  const { error } = client.getSnapshot();
  for (const cause of ['down', 'Origin', '[cors] origins', 'path', 'proxy', 'upgrade'])
    expect(error?.message).toContain(cause);
  expect(status()).toBe('connecting');
  server.isUp = true;
  await pass(20_000);
  expect(status()).toBe('open');
  expect(client.getSnapshot().error).toBeUndefined();
  expect(errors).toEqual(['connect_failed']);
});

describe('close codes', () => {
  test('4503 is final', async () => {
    const { server, client, status, errors } = await connected();
    const waiting = client.publish('news', 1);
    server.connection.close(4503, 'no');
    await expect(waiting).rejects.toMatchObject({ code: 'closed' });
    await pass(60_000);
    expect(status()).toBe('closed');
    expect(errors).toEqual(['forbidden']);
    expect(client.getSnapshot().error).toMatchObject({ code: 'forbidden', message: 'no' });
    expect(server.sockets).toHaveLength(1);
  });

  test('an unknown one is treated by its range', async () => {
    const { server, status } = await connected();
    server.connection.close(4499);
    await pass(500);
    expect(status()).toBe('open');
    server.connection.close(4999);
    await pass(60_000);
    expect(status()).toBe('closed');
  });

  test('4009: it goes on with a new session', async () => {
    const { server, status } = await connected();
    server.connection.close(4009);
    await pass(500);
    expect(status()).toBe('open');
    expect(server.connection.protocols).toEqual(['bcast.v1']);
  });
});

describe('heartbeat', () => {
  test('ping is answered by pong', async () => {
    const { server } = await connected();
    await pass(50_000);
    expect(server.connection.receivedOf('pong')).toHaveLength(2);
  });

  test('silence for two heartbeats: connect again', async () => {
    const { server, status } = await connected();
    await pass(25_000);
    server.connection.mute();
    await pass(49_999);
    expect(status()).toBe('open');
    await pass(1);
    expect(status()).toBe('reconnecting');
    await pass(500);
    expect(status()).toBe('open');
    expect(server.sockets).toHaveLength(2);
  });

  test('of a server without heartbeat nothing is expected', async () => {
    const { server, status } = await connected({}, { heartbeat: 0 });
    await pass(600_000);
    expect(status()).toBe('open');
    expect(server.sockets).toHaveLength(1);
  });

  test('any frame is a sign of life', async () => {
    const { server } = await connected({}, { heartbeat: 0 });
    server.heartbeat = 25_000;
    server.connection.drop();
    await pass(500);
    server.onSend = (frame) => frame.type !== 'ping';
    for (let index = 0; index < 10; index++) {
      await pass(40_000);
      server.publish(null, index);
    }
    expect(server.sockets).toHaveLength(2);
  });
});

describe('what the page tells', () => {
  /** A page of which the events can be told. */
  function page() {
    const window = new EventTarget();
    const document = Object.assign(new EventTarget(), { hidden: false });
    vi.stubGlobal('document', document);
    vi.stubGlobal('addEventListener', window.addEventListener.bind(window));
    vi.stubGlobal('removeEventListener', window.removeEventListener.bind(window));
    const tell = (type: string) =>
      (type === 'visibilitychange' ? document : window).dispatchEvent(new Event(type));
    return { document, tell };
  }

  test.each(['online', 'pageshow', 'visibilitychange'])(
    '%s: tries at once, without penalty',
    async (type) => {
      const { tell } = page();
      const { server, status } = await connected();
      vi.spyOn(Math, 'random').mockReturnValue(1);
      server.isUp = false;
      server.connection.drop();
      await pass(500 + 1000 + 2000 + 100);
      for (let index = 1; index <= 5; index++) {
        tell(type);
        await pass();
        expect(server.sockets).toHaveLength(4 + index);
      }
      // The pause is as long as it was: the fourth.
      await pass(3_999);
      expect(server.sockets).toHaveLength(9);
      await pass(1);
      expect(server.sockets).toHaveLength(10);
      server.isUp = true;
      tell(type);
      await pass();
      expect(status()).toBe('open');
    },
  );

  test.each(['online', 'pageshow', 'visibilitychange'])(
    '%s: a dead connection is found in 5 s',
    async (type) => {
      const { tell } = page();
      const { server, status } = await connected();
      await pass(1_000);
      server.connection.mute();
      tell(type);
      await pass(4_999);
      expect(status()).toBe('open');
      await pass(1);
      expect(status()).toBe('reconnecting');
    },
  );

  test('a good connection stays', async () => {
    const { tell } = page();
    const { server, errors } = await connected();
    await pass(1_000);
    for (const type of ['online', 'pageshow', 'visibilitychange']) tell(type);
    await pass(60_000);
    expect(server.sockets).toHaveLength(1);
    expect(errors).toEqual([]);
  });

  test('a page that is hidden does nothing', async () => {
    const { tell, document } = page();
    const { server } = await connected();
    document.hidden = true;
    tell('visibilitychange');
    await pass();
    expect(server.connection.received).toEqual([]);
  });

  test('retryAfter holds all the same', async () => {
    const { tell } = page();
    const { server, status } = await connected();
    server.connection.close(1012, { retryAfter: 5_000 });
    await pass(100);
    tell('online');
    await pass(4_000);
    expect(status()).toBe('reconnecting');
    await pass(900);
    expect(status()).toBe('open');
  });

  test('after close() nothing listens', async () => {
    const { tell } = page();
    const { server, client } = await connected();
    client.close();
    tell('online');
    await pass(1_000);
    expect(server.sockets).toHaveLength(1);
  });
});

describe('storage', () => {
  function storage() {
    const items = new Map<string, string>();
    const made = {
      items,
      getItem: (key: string) => items.get(key) ?? null,
      setItem: (key: string, value: string) => void items.set(key, value),
      removeItem: (key: string) => void items.delete(key),
    };
    vi.stubGlobal('sessionStorage', made);
    return made;
  }

  test('memory: nothing is written', async () => {
    const { items } = storage();
    await connected();
    expect(items.size).toBe(0);
  });

  test('sessionStorage: a page that was loaded again resumes', async () => {
    const { items } = storage();
    const { server, client } = await connected({ storage: 'sessionStorage' });
    expect([...items.values()]).toEqual(['session-1']);
    client.close();
    const next = new BroadcastClient('ws://fake/ws', {
      WebSocket: server.WebSocket,
      storage: 'sessionStorage',
    });
    next.connect();
    await pass();
    expect(server.connection.protocols).toContain('session.session-1');
    next.close();
  });

  test('two tabs with one copy do not fight', async () => {
    const first = storage();
    const { server, client, status } = await connected({ storage: 'sessionStorage' });
    // The second tab begins with a copy of the first one's.
    const second = storage();
    for (const [key, value] of first.items) second.setItem(key, value);
    const tab = new BroadcastClient('ws://fake/ws', {
      WebSocket: server.WebSocket,
      storage: 'sessionStorage',
    });
    tab.connect();
    await pass();
    vi.stubGlobal('sessionStorage', first);
    await pass(600_000);
    expect(server.sockets).toHaveLength(3);
    expect(status()).toBe('open');
    expect(tab.getSnapshot().status).toBe('open');
    expect(client.getSnapshot().clientId).not.toBe(tab.getSnapshot().clientId);
    expect(first.items).not.toEqual(second.items);
    tab.close();
  });

  test('a browser that forbids it', async () => {
    vi.stubGlobal('sessionStorage', undefined);
    const { status } = await connected({ storage: 'sessionStorage' });
    expect(status()).toBe('open');
  });
});
