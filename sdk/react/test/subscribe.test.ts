import { describe, expect, test, vi } from 'vitest';
import { BroadcastClient, BroadcastError } from '../src/client/index.js';
import { connected, listen, pass, persistent, range, setUp } from './kit.js';

describe('channels', () => {
  test('subscribed before connect(), and only once for many', async () => {
    const { client, server } = setUp();
    const first = listen(client, 'news');
    const second = listen(client, 'news');
    client.connect();
    await pass();
    server.publish('news', 1);
    await pass();
    const third = listen(client, 'news');
    server.publish('news', 2);
    await pass();
    expect(server.connection.receivedOf('subscribe')).toHaveLength(1);
    expect([first.heard, second.heard, third.heard]).toEqual([[1, 2], [1, 2], [2]]);
    expect(first.states).toEqual(['subscribing', 'subscribed true']);
    expect(third.states).toEqual(['subscribed true']);
    expect(first.messages[0]).toEqual({
      channel: 'news',
      data: 1,
      messageId: 'm-2',
      timestamp: expect.any(Number),
    });
  });

  test('released a moment after the last user', async () => {
    const { client, server } = await connected();
    const [first, second] = [listen(client, 'news'), listen(client, 'news')];
    await pass();
    first.off();
    first.off();
    await pass(10_000);
    expect(server.connection.receivedOf('unsubscribe')).toEqual([]);
    second.off();
    await pass(499);
    expect(server.connection.receivedOf('unsubscribe')).toEqual([]);
    await pass(1);
    expect(server.connection.receivedOf('unsubscribe')).toHaveLength(1);
    server.publish('news', 1);
    await pass();
    expect(second.heard).toEqual([]);
  });

  test('who comes again in that moment costs nothing', async () => {
    const { client, server } = await connected();
    for (let index = 0; index < 5; index++) {
      const { off } = listen(client, 'p.news', { last: 3 });
      off();
    }
    const { heard } = listen(client, 'p.news', { last: 3 });
    await pass(5_000);
    server.publish('p.news', 1);
    await pass();
    expect(heard).toEqual([1]);
    expect(server.connection.received.map(({ type }) => type)).toEqual(['subscribe', 'ack']);
  });

  test('what comes while nobody listens is fetched by who comes again', async () => {
    const { client, server } = await connected();
    const first = listen(client, 'p.news');
    await pass();
    server.publish('p.news', 1);
    await pass();
    first.off();
    server.publish('p.news', 2);
    server.publish('p.news', 3);
    await pass(400);
    const second = listen(client, 'p.news');
    await pass();
    server.publish('p.news', 4);
    await pass();
    expect(first.heard).toEqual([1]);
    expect(second.heard).toEqual([2, 3, 4]);
  });

  test('subscribed again after the release', async () => {
    const { client, server } = await connected();
    listen(client, 'news').off();
    await pass(500);
    const { heard } = listen(client, 'news');
    await pass();
    server.publish('news', 1);
    await pass();
    expect(heard).toEqual([1]);
  });

  test('an undo within a callback', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'news', { onMessage: () => one.off() });
    await pass();
    for (const data of [1, 2]) server.publish('news', data);
    await pass();
    expect(one.heard).toEqual([1]);
  });

  test("client.on('message') hears each once", async () => {
    const { client, server } = await connected();
    const heard: unknown[] = [];
    client.on('message', ({ data }) => heard.push(data));
    listen(client, 'p.news');
    listen(client, 'p.news');
    await pass();
    server.publish('p.news', 1);
    server.connection.redeliver('p.news');
    await pass();
    expect(heard).toEqual([1]);
    expect(client.getSnapshot().lastMessage).toMatchObject({ channel: 'p.news', data: 1 });
  });
});

describe('refusals', () => {
  test('forbidden: failed, and tried again with the next connection', async () => {
    const { client, server } = await connected();
    server.onFrame = (frame, connection) => {
      if (frame.type !== 'subscribe') return;
      connection.refuse(frame, 'forbidden');
      return false;
    };
    const one = listen(client, 'news');
    await pass(60_000);
    expect(one.states).toEqual(['subscribing', 'failed']);
    expect(one.errors).toEqual(['forbidden']);
    expect(server.connection.receivedOf('subscribe')).toHaveLength(1);
    server.onFrame = undefined;
    server.connection.drop();
    await pass(500);
    expect(one.states.at(-1)).toBe('subscribed true');
  });

  test('forbidden without a request ends it', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'news');
    await pass();
    server.connection.session.subscriptions.delete('news');
    server.connection.refuse({ type: '', channel: 'news' }, 'forbidden');
    await pass();
    expect(one.states.at(-1)).toBe('failed true');
    expect(one.errors).toEqual(['forbidden']);
    client.reconnect();
    await pass();
    expect(one.states.at(-1)).toBe('subscribed false');
  });

  test.each(['rate_limited', 'unavailable', 'internal'])('%s is tried again', async (code) => {
    const { client, server } = await connected();
    let refusals = 2;
    server.onFrame = (frame, connection) => {
      if (frame.type !== 'subscribe' || refusals-- <= 0) return;
      connection.refuse(frame, code, { retryAfter: 1_500 });
      return false;
    };
    const one = listen(client, 'news');
    await pass(2_999);
    listen(client, 'news');
    expect(server.connection.receivedOf('subscribe')).toHaveLength(2);
    await pass(1);
    expect(one.states).toEqual(['subscribing', 'subscribed true']);
    expect(one.errors).toEqual([]);
  });

  test('no answer: it is sent again', async () => {
    const { client, server } = await connected();
    server.onFrame = () => false;
    const one = listen(client, 'news');
    await pass(9_999);
    server.onFrame = undefined;
    await pass(1);
    expect(one.states).toEqual(['subscribing', 'subscribed true']);
  });

  test('a closed client', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'news');
    await pass();
    server.connection.close(4503);
    await pass();
    expect(one.states.at(-1)).toBe('failed true');
    expect(listen(client, 'other').states.at(-1)).toBe('failed');
    client.connect();
    await pass();
    expect(one.states.at(-1)).toBe('subscribed false');
    client.close();
    expect(one.states.at(-1)).toBe('idle false');
  });
});

describe('callbacks', () => {
  test('a promise holds back the next message, and the order', async () => {
    const { client, server } = await connected();
    const finished: unknown[] = [];
    const one = listen(client, 'p.news', {
      onMessage: async ({ data }) => {
        await new Promise((resolve) => setTimeout(resolve, 100));
        finished.push(data);
      },
    });
    await pass();
    for (const data of [1, 2, 3]) server.publish('p.news', data);
    await pass(50);
    expect(one.heard).toEqual([1]);
    await pass(100);
    expect(one.heard).toEqual([1, 2]);
    expect(server.connection.receivedOf('ack')).toMatchObject([{ seq: 1 }]);
    await pass(400);
    expect(finished).toEqual([1, 2, 3]);
    expect(server.connection.receivedOf('ack').at(-1)).toMatchObject({ seq: 3 });
  });

  test('one that throws or rejects is told, and acked', async () => {
    const { client, server } = await connected();
    const causes: unknown[] = [];
    client.subscribe('p.news', {
      onMessage: ({ data }) => {
        if (data === 1) throw new Error('sync');
        if (data === 2) return Promise.reject(new Error('async'));
        if (data === 3) throw new BroadcastError('bad_data', 'parse');
        return undefined;
      },
      onError: (error) => causes.push([error.code, (error.cause as Error | undefined)?.message]),
    });
    const other = listen(client, 'p.news');
    await pass();
    for (const data of [1, 2, 3, 4]) server.publish('p.news', data);
    await pass(200);
    expect(causes).toEqual([
      ['unknown', 'sync'],
      ['unknown', 'async'],
      ['bad_data', undefined],
    ]);
    expect(other.heard).toEqual([1, 2, 3, 4]);
    expect(server.connection.receivedOf('ack').at(-1)).toMatchObject({ seq: 4 });
  });

  test('nobody wants to hear of it: the console does', async () => {
    vi.useFakeTimers();
    const shown = vi.spyOn(console, 'error').mockImplementation(() => {});
    const { server } = setUp();
    const client = new BroadcastClient('ws://fake', { WebSocket: server.WebSocket });
    client.subscribe('news', {
      onMessage: () => {
        throw new Error('oops');
      },
    });
    client.connect();
    await pass();
    server.publish('news', 1);
    await pass();
    client.close();
    expect(shown).toHaveBeenCalledOnce();
  });

  test('a listener of events that throws does not disturb the others', async () => {
    vi.spyOn(console, 'error').mockImplementation(() => {});
    const { client, server } = setUp();
    const heard: unknown[] = [];
    client.on('message', () => {
      throw new Error('oops');
    });
    client.on('message', ({ data }) => heard.push(data));
    client.connect();
    await pass();
    server.publish(null, 1);
    await pass();
    expect(heard).toEqual([1]);
  });

  test('a burst of 10,000: each once, in order', async () => {
    const { client, server } = await connected();
    const [plain, kept] = [listen(client, 'news'), listen(client, 'p.news')];
    const slow = listen(client, 'slow', { onMessage: async () => {} });
    await pass();
    for (const data of range(1, 10_000))
      for (const to of ['news', 'p.news', 'slow']) server.publish(to, data);
    await pass(200);
    expect(plain.heard).toEqual(range(1, 10_000));
    expect(kept.heard).toEqual(range(1, 10_000));
    expect(slow.heard).toEqual(range(1, 10_000));
    expect(server.connection.receivedOf('ack').at(-1)).toMatchObject({ seq: 10_000 });
  });

  test('what waits has a bound: the rest is fetched later, or told as a gap', async () => {
    const { client, server } = await connected();
    let go = () => {};
    const gate = new Promise<void>((resolve) => {
      go = resolve;
    });
    const kept = listen(client, 'p.news', { ack: false, onMessage: () => gate });
    const plain = listen(client, 'news', { onMessage: () => gate });
    await pass();
    for (const data of range(1, 10_500)) for (const to of ['news', 'p.news']) server.publish(to, data);
    await pass();
    go();
    await pass(100);
    expect(kept.heard).toEqual(range(1, 10_500));
    expect(plain.heard).toEqual([...range(1, 10_001), 'gap']);
  });
});

describe('acks', () => {
  test('the first at once, the others within 200 ms', async () => {
    const { client, server } = await connected();
    listen(client, 'p.news');
    await pass();
    const acks = () => server.connection.receivedOf('ack').map(({ seq }) => seq);
    for (const data of [1, 2, 3]) server.publish('p.news', data);
    await pass();
    expect(acks()).toEqual([1]);
    await pass(199);
    expect(acks()).toEqual([1]);
    await pass(1);
    expect(acks()).toEqual([1, 3]);
    expect(server.connection.receivedOf('ack')[0]).toEqual({
      type: 'ack',
      channel: 'p.news',
      epoch: 'e1',
      seq: 1,
    });
  });

  test('or after 32 messages', async () => {
    const { client, server } = await connected();
    listen(client, 'p.news');
    await pass();
    for (const data of range(1, 65)) server.publish('p.news', data);
    await pass();
    expect(server.connection.receivedOf('ack').map(({ seq }) => seq)).toEqual([1, 33, 65]);
  });

  test('a hidden page does not wait for a timer', async () => {
    const { client, server } = await connected();
    vi.stubGlobal('document', { hidden: true, removeEventListener() {} });
    listen(client, 'p.news');
    await pass();
    for (const data of range(1, 3)) server.publish('p.news', data);
    await pass();
    expect(server.connection.receivedOf('ack').map(({ seq }) => seq)).toEqual([1, 2, 3]);
  });

  test('ack: false asks for none and sends none', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'p.news', { ack: false });
    await pass();
    server.publish('p.news', 1);
    await pass(1_000);
    expect(server.connection.receivedOf('subscribe')[0]).not.toHaveProperty('ack');
    expect(server.connection.receivedOf('ack')).toEqual([]);
    // Another one wants them: from here on.
    listen(client, 'p.news');
    await pass();
    server.publish('p.news', 2);
    await pass();
    expect(server.connection.receivedOf('subscribe')[1]).toMatchObject({
      ack: true,
      since: { epoch: 'e1', seq: 1 },
    });
    expect(server.connection.receivedOf('ack').at(-1)).toMatchObject({ seq: 2 });
    expect(one.heard).toEqual([1, 2]);
  });

  test('of a channel that is not persistent there are none', async () => {
    const { client, server } = await connected();
    listen(client, 'news');
    await pass();
    server.publish('news', 1);
    await pass(1_000);
    expect(server.connection.receivedOf('ack')).toEqual([]);
  });

  test('what comes again is acked again, and not handed over', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'p.news');
    await pass();
    server.onFrame = (frame) => frame.type !== 'ack';
    for (const data of [1, 2, 3]) server.publish('p.news', data);
    await pass(1_000);
    server.onFrame = undefined;
    server.connection.redeliver('p.news');
    await pass(1_000);
    expect(one.heard).toEqual([1, 2, 3]);
    expect(server.connection.session.subscriptions.get('p.news')?.acked?.seq).toBe(3);
  });
});

describe('another connection', () => {
  test('restored by the session: first the acks, nothing twice, nothing lost', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'p.news');
    await pass();
    server.onFrame = (frame) => frame.type !== 'ack';
    for (const data of [1, 2, 3]) server.publish('p.news', data);
    await pass(300);
    server.onFrame = undefined;
    server.connection.drop();
    server.publish('p.news', 4);
    await pass(500);
    server.publish('p.news', 5);
    await pass(300);
    expect(one.heard).toEqual([1, 2, 3, 4, 5]);
    expect(server.connection.received[0]).toEqual({ type: 'ack', channel: 'p.news', epoch: 'e1', seq: 3 });
    expect(server.connection.receivedOf('subscribe')).toEqual([]);
    expect(one.states).toEqual(['subscribing', 'subscribed true', 'subscribing true', 'subscribed true']);
  });

  test('the session is gone: subscribed again with its own since', async () => {
    const { client, server } = await connected();
    const [one, plain] = [listen(client, 'p.news'), listen(client, 'news')];
    await pass();
    for (const data of [1, 2]) server.publish('p.news', data);
    await pass(300);
    server.forget();
    server.connection.drop();
    server.publish('p.news', 3);
    await pass(500);
    server.publish('news', 4);
    await pass();
    expect(server.connection.receivedOf('subscribe')).toMatchObject([
      { channel: 'p.news', since: { epoch: 'e1', seq: 2 }, ack: true },
      { channel: 'news' },
    ]);
    expect(one.heard).toEqual([1, 2, 3]);
    // Nobody knows what was published there meanwhile.
    expect(plain.heard).toEqual(['gap', 4]);
    expect(plain.states.at(-1)).toBe('subscribed false');
    expect(one.states.at(-1)).toBe('subscribed true');
  });

  test('4009: a new session, and its own since', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'p.news');
    await pass();
    server.publish('p.news', 1);
    await pass();
    server.connection.close(4009);
    server.publish('p.news', 2);
    await pass(500);
    expect(server.connection.receivedOf('subscribe')).toMatchObject([{ since: { epoch: 'e1', seq: 1 } }]);
    expect(one.heard).toEqual([1, 2]);
  });

  test('without acks the place is its own', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'p.news', { ack: false });
    await pass();
    server.publish('p.news', 1);
    await pass();
    server.connection.drop();
    server.publish('p.news', 2);
    await pass(500);
    expect(server.connection.receivedOf('subscribe')).toMatchObject([{ since: { epoch: 'e1', seq: 1 } }]);
    expect(one.heard).toEqual([1, 2]);
    expect(one.states.at(-1)).toBe('subscribed true');
  });

  test('messages still waiting for a callback are not fetched and not acked early', async () => {
    vi.spyOn(Math, 'random').mockReturnValue(0);
    const { client, server } = await connected();
    const one = listen(client, 'p.news', {
      onMessage: () => new Promise((resolve) => setTimeout(resolve, 1_000)),
    });
    await pass();
    for (const data of range(1, 4)) server.publish('p.news', data);
    await pass(1_500);
    server.connection.drop();
    await pass(500);
    expect(server.connection.receivedOf('ack').map(({ seq }) => seq)).toEqual([2]);
    await pass(5_000);
    expect(one.heard).toEqual([1, 2, 3, 4]);
    expect(server.connection.session.subscriptions.get('p.news')?.acked?.seq).toBe(4);
  });

  test('a subscribe whose answer was lost is sent again', async () => {
    const { client, server } = await connected();
    server.onFrame = (_, connection) => {
      connection.drop();
      return false;
    };
    const one = listen(client, 'news');
    await pass();
    server.onFrame = undefined;
    await pass(500);
    expect(one.states.at(-1)).toBe('subscribed true');
  });
});

describe('restored channels', () => {
  /** A page that was loaded again: another client with the session of the first. */
  async function again(options = {}) {
    const items = new Map<string, string>();
    vi.stubGlobal('sessionStorage', {
      getItem: (key: string) => items.get(key) ?? null,
      setItem: (key: string, value: string) => items.set(key, value),
    });
    const first = await connected({ storage: 'sessionStorage' }, { persistent, ...options });
    const one = listen(first.client, 'p.news');
    listen(first.client, 'news');
    await pass();
    first.server.publish('p.news', 1);
    await pass(200);
    first.server.connection.drop();
    first.client.close();
    for (const data of [2, 3]) first.server.publish('p.news', data);
    const client = new BroadcastClient('ws://fake/ws', {
      WebSocket: first.server.WebSocket,
      storage: 'sessionStorage',
    });
    client.connect();
    return { server: first.server, client, one };
  }

  test('that nobody has asked for yet are neither shown nor acked; the first subscribe fetches them', async () => {
    const { server, client } = await again();
    const shown: unknown[] = [];
    client.on('message', ({ data }) => shown.push(data));
    await pass(3_000);
    expect(server.connection.sent.filter(({ type }) => type === 'message')).toHaveLength(2);
    expect(shown).toEqual([]);
    expect(server.connection.received).toEqual([]);
    const one = listen(client, 'p.news');
    await pass();
    server.publish('p.news', 4);
    await pass(200);
    expect(one.heard).toEqual([2, 3, 4]);
    expect(server.connection.receivedOf('ack').at(-1)).toMatchObject({ seq: 4 });
    client.close();
  });

  test('a page that subscribes before it is connected goes on where it was', async () => {
    const { server, client } = await again();
    const one = listen(client, 'p.news');
    await pass(200);
    expect(one.heard).toEqual([2, 3]);
    expect(server.connection.receivedOf('subscribe')).toEqual([]);
    client.close();
  });

  test('after 10 s without a listener they are given up', async () => {
    const { server, client } = await again();
    await pass(9_999);
    expect(server.connection.receivedOf('unsubscribe')).toEqual([]);
    await pass(1);
    expect(server.connection.receivedOf('unsubscribe').map(({ channel }) => channel)).toEqual([
      'p.news',
      'news',
    ]);
    client.close();
  });

  test('what was lost before the page came is told', async () => {
    const { server, client } = await again();
    server.trim('p.news', 1);
    const one = listen(client, 'p.news');
    await pass(200);
    expect(one.heard).toEqual(['gap', 3]);
    expect(one.states.at(-1)).toBe('subscribed false');
    client.close();
  });
});

describe('gaps', () => {
  test('trimmed while away', async () => {
    const { client, server } = await connected();
    const gaps: unknown[] = [];
    const one = listen(client, 'p.news', { onGap: (gap) => gaps.push(gap) });
    await pass();
    server.publish('p.news', 1);
    await pass();
    server.connection.drop();
    for (const data of range(2, 9)) server.publish('p.news', data);
    server.trim('p.news', 2);
    await pass(500);
    expect(one.heard).toEqual([1, 'gap', 8, 9]);
    expect(gaps).toEqual([{ channel: 'p.news', from: { epoch: 'e1', seq: 1 }, to: { epoch: 'e1', seq: 7 } }]);
    expect(one.states.at(-1)).toBe('subscribed false');
    server.connection.drop();
    await pass(1_000);
    expect(one.states.at(-1)).toBe('subscribed true');
    expect(one.heard).toEqual([1, 'gap', 8, 9]);
  });

  test('history_lost: a new line of numbers, acked', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'p.news');
    await pass();
    for (const data of [1, 2, 3]) server.publish('p.news', data);
    await pass(300);
    server.lose('p.news', 'e2');
    await pass(200);
    expect(server.connection.receivedOf('ack').at(-1)).toMatchObject({ epoch: 'e2', seq: 0 });
    for (const data of [4, 5]) server.publish('p.news', data);
    await pass(200);
    expect(one.heard).toEqual([1, 2, 3, 'gap', 4, 5]);
    expect(server.connection.receivedOf('ack').at(-1)).toMatchObject({ epoch: 'e2', seq: 2 });
  });

  test('the same loss told again is none', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'p.news');
    await pass();
    server.publish('p.news', 1);
    server.lose('p.news', 'e2');
    server.publish('p.news', 2);
    await pass(200);
    server.connection.send({
      type: 'error',
      code: 'history_lost',
      message: '',
      channel: 'p.news',
      epoch: 'e2',
      seq: 0,
    });
    server.connection.redeliver('p.news');
    await pass(200);
    expect(one.heard).toEqual([1, 'gap', 2]);
  });

  test('the loss is in order with what still waits', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'p.news', {
      onMessage: () => new Promise((resolve) => setTimeout(resolve, 100)),
    });
    await pass();
    for (const data of [1, 2, 3]) server.publish('p.news', data);
    server.lose('p.news', 'e2');
    server.publish('p.news', 4);
    await pass(1_000);
    expect(one.heard).toEqual([1, 2, 3, 'gap', 4]);
  });

  test('numbers go on in a new epoch; what comes again of either is acked as its own', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'p.news');
    await pass();
    for (const data of [1, 2]) server.publish('p.news', data);
    server.beginEpoch('p.news', 'e2');
    for (const data of [3, 4]) server.publish('p.news', data);
    await pass(300);
    expect(one.heard).toEqual([1, 2, 3, 4]);
    const count = server.connection.received.length;
    for (const message of server.channel('p.news').messages)
      server.connection.send({ type: 'message', ...message, redelivered: 1 });
    await pass(300);
    expect(one.heard).toEqual([1, 2, 3, 4]);
    const acks = server.connection.received.slice(count).map(({ epoch, seq }) => [epoch, seq]);
    expect(acks).toContainEqual(['e1', 2]);
    expect(acks.at(-1)).toEqual(['e2', 4]);
  });

  test('a message out of line: it asks for what comes after its place, and believes the answer', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'p.news');
    await pass();
    server.publish('p.news', 1);
    await pass();
    // Lost on the way: 2 and 3.
    server.onSend = (frame) => frame.type !== 'message' || (frame.data as number) > 3;
    for (const data of range(2, 6)) server.publish('p.news', data);
    server.onSend = undefined;
    await pass(200);
    expect(server.connection.receivedOf('subscribe')[1]).toMatchObject({ since: { epoch: 'e1', seq: 1 } });
    expect(server.connection.receivedOf('subscribe')).toHaveLength(2);
    expect(one.heard).toEqual(range(1, 6));
  });

  test('an older file: what was seen is not seen again, what is new in its place is', async () => {
    const { client, server } = await connected();
    const one = listen(client, 'p.news');
    await pass();
    for (const data of range(1, 5)) server.publish('p.news', data);
    await pass(300);
    server.connection.drop();
    // Redis comes back with the first three, and goes on in a new epoch: 4 and 5 are other messages now.
    const of = server.channel('p.news');
    of.messages.length = of.seq = 3;
    server.beginEpoch('p.news', 'e2');
    for (const data of ['4b', '5b', '6b']) server.publish('p.news', data);
    await pass(500);
    expect(one.heard).toEqual([1, 2, 3, 4, 5, 'gap', '4b', '5b', '6b']);
  });
});

describe('where a listener begins', () => {
  async function withHistory() {
    const all = setUp();
    for (const data of range(1, 10)) all.server.publish('p.news', data);
    all.client.connect();
    await pass();
    return all;
  }

  test('last', async () => {
    const { client } = await withHistory();
    const one = listen(client, 'p.news', { last: 3 });
    await pass();
    expect(one.heard).toEqual([8, 9, 10]);
  });

  test('since', async () => {
    const { client } = await withHistory();
    const one = listen(client, 'p.news', { since: { epoch: 'e1', seq: 7 } });
    await pass();
    expect(one.heard).toEqual([8, 9, 10]);
    expect(one.states.at(-1)).toBe('subscribed true');
  });

  test('since what is gone', async () => {
    const { client, server } = await withHistory();
    server.trim('p.news', 2);
    const gaps: unknown[] = [];
    const one = listen(client, 'p.news', {
      since: { epoch: 'e1', seq: 3 },
      onGap: (gap) => gaps.push(gap),
    });
    await pass();
    expect(one.heard).toEqual(['gap', 9, 10]);
    expect(gaps).toEqual([{ channel: 'p.news', from: { epoch: 'e1', seq: 3 }, to: { epoch: 'e1', seq: 8 } }]);
    expect(one.states.at(-1)).toBe('subscribed false');
  });

  test('each for itself, and nobody hears anything twice', async () => {
    const { client, server } = await withHistory();
    const now = listen(client, 'p.news');
    const three = listen(client, 'p.news', { last: 3 });
    const same = listen(client, 'p.news', { last: 3 });
    const since = listen(client, 'p.news', { since: { epoch: 'e1', seq: 5 } });
    await pass();
    server.publish('p.news', 11);
    await pass();
    const late = listen(client, 'p.news', { last: 20 });
    await pass();
    server.publish('p.news', 12);
    await pass(300);
    expect(now.heard).toEqual([11, 12]);
    expect(three.heard).toEqual([8, 9, 10, 11, 12]);
    expect(same.heard).toEqual(three.heard);
    expect(since.heard).toEqual(range(6, 12));
    expect(late.heard).toEqual(range(1, 12));
    expect(server.connection.receivedOf('ack').at(-1)).toMatchObject({ seq: 12 });
  });

  test('what was handled before a late one begins further back is not acked for it', async () => {
    const { client, server } = await connected();
    const onMessage = () => new Promise((resolve) => setTimeout(resolve, 1_000));
    const acked = () => server.connection.session.subscriptions.get('p.news')?.acked?.seq;
    listen(client, 'p.news', { onMessage });
    await pass();
    for (const data of range(1, 3)) server.publish('p.news', data);
    await pass();
    const late = listen(client, 'p.news', { last: 3, onMessage });
    await pass(3_500);
    expect(late.heard).toEqual([1]);
    expect(acked()).toBe(0);
    await pass(3_000);
    expect(late.heard).toEqual([1, 2, 3]);
    expect(acked()).toBe(3);
  });

  test('a late one that begins ahead of the others takes nothing from them', async () => {
    const { client, server } = await connected();
    const first = listen(client, 'p.news');
    await pass();
    server.publish('p.news', 1);
    await pass();
    // What is still on its way when the late one comes.
    server.onSend = ({ type }) => type !== 'message';
    for (const data of range(2, 5)) server.publish('p.news', data);
    server.onSend = undefined;
    const late = listen(client, 'p.news', { last: 1 });
    await pass();
    expect(late.heard).toEqual([5]);
    expect(first.heard).toEqual(range(1, 5));
  });

  test('a late one does not lose its history when acks of the others are under way', async () => {
    const { client, server } = setUp({}, { latency: 20 });
    for (const data of range(1, 10)) server.publish('p.news', data);
    client.connect();
    await pass(100);
    const first = listen(client, 'p.news');
    await pass(100);
    for (const data of range(11, 13)) server.publish('p.news', data);
    await pass(30);
    const late = listen(client, 'p.news', { last: 13 });
    await pass(1);
    server.publish('p.news', 14);
    await pass(1_000);
    server.connection.drop();
    await pass(1_000);
    expect(first.heard).toEqual(range(11, 14));
    expect(late.heard).toEqual(range(2, 14));
  });
});
