import { describe, expect, test, vi } from 'vitest';
import type { BroadcastError } from '../src/client/index.js';
import type { FakeServer } from '../src/testing/index.js';
import { connected, pass, range, setUp } from './kit.js';

/** What a promise became, without waiting for it. */
function watch(promise: Promise<unknown>) {
  const fate: { is: string } = { is: 'waits' };
  promise.then(
    () => {
      fate.is = 'taken';
    },
    (error: BroadcastError) => {
      fate.is = error.code;
    },
  );
  return fate;
}

const taken = (server: FakeServer) => server.published.map(({ data }) => data);

describe('publish', () => {
  test('resolves when it is taken, and says where', async () => {
    const { client, server } = await connected();
    await expect(client.publish('p.orders', { id: 1 }, { id: 'mine' })).resolves.toEqual({
      messageId: 'mine',
      seq: 1,
      epoch: 'e1',
    });
    const { messageId } = await client.publish('news', 1);
    expect(messageId).toMatch(/^\d+(-\d+){4}$/);
    await expect(client.publish('p.orders', 2, { id: 'mine' })).resolves.toMatchObject({
      seq: 1,
      duplicate: true,
    });
    expect(taken(server)).toEqual([{ id: 1 }, 1]);
  });

  test('to all', async () => {
    const { client, server } = await connected();
    const heard: unknown[] = [];
    client.on('message', (message) => heard.push(message));
    await client.publish(null, 'closing');
    await pass();
    expect('channel' in server.connection.receivedOf('broadcast')[0]!).toBe(false);
    expect(heard).toMatchObject([{ data: 'closing' }]);
    expect(heard[0]).not.toHaveProperty('type');
  });

  test.each([null, false, 0, '', [], {}, '\u2028 "\\'])('data may be any JSON value: %j', async (data) => {
    const { client, server } = await connected();
    await client.publish('news', data);
    expect(taken(server)).toEqual([data]);
  });

  test('data that is no JSON, and bad ids', async () => {
    const { client, server } = await connected();
    const circle: { self?: unknown } = {};
    circle.self = circle;
    for (const data of [undefined, circle, 1n, () => {}])
      await expect(client.publish('news', data)).rejects.toMatchObject({ code: 'bad_data', channel: 'news' });
    for (const id of ['', 'ü', 'x'.repeat(129)])
      await expect(client.publish('news', 1, { id })).rejects.toMatchObject({ code: 'bad_message' });
    expect(server.connection.received).toEqual([]);
  });

  test.each(['forbidden', 'bad_channel', 'unauthorized', 'internal'])('%s is final', async (code) => {
    const { client, server } = await connected();
    server.onFrame = (frame, connection) => {
      connection.refuse(frame, code);
      return false;
    };
    await expect(client.publish('news', 1)).rejects.toMatchObject({ code, channel: 'news' });
    await pass(60_000);
    expect(server.connection.receivedOf('broadcast')).toHaveLength(1);
  });

  test('what is too large never leaves', async () => {
    const { client, server } = await connected({}, { limits: { maxMessageBytes: 1000 } });
    await expect(client.publish('news', 'ü'.repeat(500))).rejects.toMatchObject({ code: 'too_large' });
    expect(client.send('news', 'ü'.repeat(500))).toBe(false);
    expect(server.connection.received).toEqual([]);
    await client.publish('news', 'x'.repeat(800));
  });

  test('after 1009 what was on its way is not sent again', async () => {
    const { client, server } = await connected();
    server.onFrame = () => false;
    const large = watch(client.publish('news', 1));
    const waiting = watch(client.publish('news', 2));
    await pass();
    server.connection.close(1009);
    server.onFrame = undefined;
    await pass(500);
    expect([large.is, waiting.is]).toEqual(['too_large', 'taken']);
    expect(taken(server)).toEqual([2]);
  });
});

describe('settling', () => {
  test('timeout, of one that waits and of one that left', async () => {
    const { client, server } = setUp();
    const waiting = watch(client.publish('news', 1));
    const short = watch(client.publish('news', 2, { timeout: 1_000 }));
    await pass(999);
    expect(short.is).toBe('waits');
    await pass(1);
    expect(short.is).toBe('timeout');
    await pass(9_000);
    expect(waiting.is).toBe('timeout');
    client.connect();
    await pass();
    server.onFrame = () => false;
    const left = watch(client.publish('news', 3));
    await pass(10_000);
    expect(left.is).toBe('timeout');
    server.onFrame = undefined;
    // Nothing of them comes after, and the lane is free.
    await client.publish('news', 4);
    expect(taken(server)).toEqual([4]);
    expect(vi.getTimerCount()).toBe(2);
  });

  test('an endless timeout is no short one', async () => {
    const { client } = setUp({ queue: { ttl: Number.POSITIVE_INFINITY } });
    const fate = watch(client.publish('news', 1, { timeout: Number.POSITIVE_INFINITY }));
    await pass(3_000_000);
    expect(fate.is).toBe('waits');
  });

  test('abort', async () => {
    const { client, server } = setUp();
    const [early, late] = [new AbortController(), new AbortController()];
    early.abort();
    await expect(client.publish('news', 1, { signal: early.signal })).rejects.toMatchObject({
      code: 'aborted',
    });
    const waiting = watch(client.publish('news', 2, { signal: late.signal }));
    const next = watch(client.publish('news', 3));
    late.abort();
    await pass();
    expect(waiting.is).toBe('aborted');
    client.connect();
    await pass();
    expect(next.is).toBe('taken');
    expect(taken(server)).toEqual([3]);
  });

  test('abort of one that left lets the next one go', async () => {
    const { client, server } = await connected();
    server.onFrame = (frame) => frame.data !== 1;
    const abort = new AbortController();
    const first = watch(client.publish('news', 1, { signal: abort.signal }));
    const second = watch(client.publish('news', 2));
    await pass(100);
    expect(second.is).toBe('waits');
    abort.abort();
    await pass();
    expect([first.is, second.is]).toEqual(['aborted', 'taken']);
  });

  test('close() settles everything', async () => {
    const { client, server } = await connected();
    server.onFrame = () => false;
    const fates = [1, 2, 3].map((data) => watch(client.publish(`c${data % 2}`, data)));
    client.close();
    await pass();
    expect(fates.map(({ is }) => is)).toEqual(['closed', 'closed', 'closed']);
    await expect(client.publish('news', 4)).rejects.toMatchObject({ code: 'closed' });
    expect(client.send('news', 5)).toBe(false);
    expect(vi.getTimerCount()).toBe(0);
  });
});

describe('sending again', () => {
  test('after a lost answer, under the same id: never twice', async () => {
    const { client, server } = await connected();
    server.onSend = (frame) => frame.op !== 'broadcast';
    const fate = watch(client.publish('p.orders', 1));
    await pass();
    expect(taken(server)).toEqual([1]);
    server.onSend = undefined;
    server.connection.drop();
    await pass(500);
    expect(fate.is).toBe('taken');
    expect(taken(server)).toEqual([1]);
    const [first, second] = server.connections.map((one) => one.receivedOf('broadcast')[0]?.messageId);
    expect(first).toBe(second);
  });

  test('for less than dedupTtl since the first try, then unknown', async () => {
    const { client, server } = await connected(
      { queue: { ttl: 1_000_000 } },
      { limits: { dedupTtl: 100_000 } },
    );
    server.onFrame = () => false;
    const fate = watch(client.publish('news', 1, { timeout: 1_000_000 }));
    const later = watch(client.publish('news', 2, { timeout: 1_000_000 }));
    for (let time = 0; time < 85_000; time += 5_000) {
      await pass(5_000);
      server.connection.drop();
    }
    await pass(500);
    expect(fate.is).toBe('waits');
    server.isUp = false;
    server.dropAll();
    await pass(15_000);
    expect(fate.is).toBe('unknown');
    expect(later.is).toBe('waits');
    server.onFrame = undefined;
    server.isUp = true;
    await pass(20_000);
    expect(later.is).toBe('taken');
    expect(taken(server)).toEqual([2]);
  });

  test('where there is no deduplication it is never sent twice', async () => {
    const { client, server } = await connected({}, { limits: { dedupTtl: 0 } });
    server.onFrame = () => false;
    const fate = watch(client.publish('news', 1));
    await pass(5_000);
    expect(fate.is).toBe('waits');
    server.connection.drop();
    await pass();
    expect(fate.is).toBe('unknown');
  });

  test('rate_limited: it was surely not taken, so it is sent again even there', async () => {
    const { client, server } = await connected({}, { limits: { dedupTtl: 0 } });
    let refusals = 1;
    server.onFrame = (frame, connection) => {
      if (refusals-- <= 0) return;
      connection.refuse(frame, 'rate_limited', { retryAfter: 300 });
      return false;
    };
    const fate = watch(client.publish('news', 1));
    await pass(299);
    expect(fate.is).toBe('waits');
    await pass(1);
    expect(fate.is).toBe('taken');
  });

  test.each(['rate_limited', 'unavailable'])('%s waits retryAfter, and keeps the order', async (code) => {
    const { client, server } = await connected();
    let refusals = 3;
    server.onFrame = (frame, connection) => {
      if (frame.type !== 'broadcast' || refusals-- <= 0) return;
      connection.refuse(frame, code, { retryAfter: 700 });
      return false;
    };
    for (const data of range(1, 5)) void client.publish('news', data);
    await pass(2_099);
    expect(taken(server)).toEqual([]);
    expect(server.connection.receivedOf('broadcast')).toHaveLength(3);
    await pass(1);
    expect(taken(server)).toEqual([1, 2, 3, 4, 5]);
  });

  test('without retryAfter it waits for a while all the same', async () => {
    vi.spyOn(Math, 'random').mockReturnValue(1);
    const { client, server } = await connected();
    server.onFrame = (frame, connection) => {
      connection.refuse(frame, 'unavailable');
      return false;
    };
    void client.publish('news', 1).catch(() => {});
    await pass(9_000);
    expect(server.connection.receivedOf('broadcast').length).toBeLessThanOrEqual(5);
  });

  test.each(['rate_limited', 'unavailable'])('%s holds back every channel', async (code) => {
    const { client, server } = await connected();
    server.onFrame = (frame, connection) => {
      connection.refuse(frame, code, { retryAfter: 500 });
      server.onFrame = undefined;
      return false;
    };
    void client.publish('a', 1);
    await pass();
    void client.publish('b', 2);
    expect(client.send('c', 3)).toBe(true);
    await pass(499);
    expect(taken(server)).toEqual([]);
    await pass(1);
    expect(taken(server)).toEqual([1, 2, 3]);
  });

  test('order is kept through refusals and reconnects in any mixture', async () => {
    const { client, server } = await connected({ queue: { max: 1000, ttl: 1_000_000 } });
    let count = 0;
    server.onFrame = (frame, connection) => {
      if (frame.type !== 'broadcast') return;
      count++;
      if (count % 5 === 0) {
        connection.drop();
        return false;
      }
      if (count % 3 === 0) {
        connection.refuse(frame, count % 2 ? 'rate_limited' : 'unavailable', { retryAfter: 10 });
        return false;
      }
      // Taken, but the answer is lost.
      if (count % 7 === 0) {
        connection.answer(frame);
        connection.drop();
        return false;
      }
      return;
    };
    const fates = range(1, 40).map((data) =>
      watch(client.publish(data % 2 ? 'odd' : 'even', data, { timeout: 1_000_000 })),
    );
    await pass(900_000);
    expect(new Set(fates.map(({ is }) => is))).toEqual(new Set(['taken']));
    const all = taken(server) as number[];
    expect(all.filter((data) => data % 2)).toEqual(range(1, 40).filter((data) => data % 2));
    expect(all.filter((data) => data % 2 === 0)).toEqual(range(1, 40).filter((data) => data % 2 === 0));
  });
});

describe('the queue', () => {
  test('before connect() and while disconnected, in order', async () => {
    const { client, server } = setUp();
    const fates = range(1, 3).map((data) => watch(client.publish('news', data)));
    expect(client.send('news', 4)).toBe(true);
    client.connect();
    await pass();
    expect(taken(server)).toEqual([1, 2, 3, 4]);
    expect(fates.map(({ is }) => is)).toEqual(['taken', 'taken', 'taken']);
  });

  test('has a bound', async () => {
    const { client, server } = setUp({ queue: { max: 2 } });
    void client.publish('a', 1);
    expect(client.send('b', 2)).toBe(true);
    await expect(client.publish('c', 3)).rejects.toMatchObject({ code: 'queue_full' });
    expect(client.send('b', 4)).toBe(false);
    client.connect();
    await pass();
    expect(taken(server)).toEqual([1, 2]);
  });

  test('does not bound what is published while connected', async () => {
    const { client, server } = await connected({ queue: { max: 2 } });
    await Promise.all(range(1, 500).map((data) => client.publish('news', data)));
    expect(taken(server)).toEqual(range(1, 500));
  });

  test('ttl: a first try comes not later', async () => {
    const { client, server } = setUp({ queue: { ttl: 5_000 } });
    const fate = watch(client.publish('news', 1, { timeout: 100_000 }));
    client.send('news', 2);
    await pass(5_000);
    expect(fate.is).toBe('timeout');
    client.connect();
    await pass();
    expect(taken(server)).toEqual([]);
  });

  test("'reject': nothing waits for a connection", async () => {
    const { client, server } = setUp({ queue: 'reject' });
    await expect(client.publish('news', 1)).rejects.toMatchObject({ code: 'queue_full' });
    expect(client.send('news', 2)).toBe(false);
    client.connect();
    await pass();
    await client.publish('news', 3);
    expect(taken(server)).toEqual([3]);
  });
});

describe('send', () => {
  test('leaves at once, and is not sent again', async () => {
    const { client, server } = await connected();
    server.onFrame = () => false;
    expect(client.send('news', 1)).toBe(true);
    expect(client.send('news', 2)).toBe(true);
    await pass();
    expect(server.connection.receivedOf('broadcast')).toHaveLength(2);
    server.connection.drop();
    await pass(20_000);
    expect(server.connection.received).toEqual([]);
  });

  test('does not overtake', async () => {
    const { client, server } = await connected();
    void client.publish('news', 1);
    void client.publish('news', 2);
    expect(client.send('news', 3)).toBe(true);
    await pass();
    expect(taken(server)).toEqual([1, 2, 3]);
  });

  test('a refusal is told by the error event', async () => {
    const { client, server, errors } = await connected();
    server.onFrame = (frame, connection) => {
      connection.refuse(frame, 'forbidden');
      return false;
    };
    client.send('news', 1);
    await pass();
    expect(errors).toEqual(['forbidden']);
  });
});
