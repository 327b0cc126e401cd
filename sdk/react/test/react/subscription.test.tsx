// @vitest-environment jsdom
/** useSubscription: what it asks for, what it hands over, and when it renders. */
import { act } from '@testing-library/react';
import { useState } from 'react';
import { describe, expect, it, vi } from 'vitest';
import {
  BroadcastError,
  type Gap,
  type Message,
  type Subscription,
  type UseSubscriptionOptions,
  useSubscription,
} from '../../src/index.js';
import { FakeServer } from '../../src/testing/index.js';
import { frame, makeCounter, pass, show, told } from './kit.js';

/** A component that subscribes and gives away what it has; it reads the messages only when it is told to. */
function makeProbe<T = unknown, S = T>() {
  const counter = makeCounter();
  const probe = {
    now: undefined as unknown as Subscription<S>,
    get renders() {
      return counter.renders;
    },
    last: undefined as S | undefined,
    messages: [] as readonly Message<S>[],
    of: (channel: string | null, options?: UseSubscriptionOptions<T, S>, reads = true) => (
      <counter.Counted>
        <Probe channel={channel} options={options} reads={reads} />
      </counter.Counted>
    ),
  };
  function Probe(props: {
    channel: string | null;
    options: UseSubscriptionOptions<T, S> | undefined;
    reads: boolean;
  }) {
    probe.now = useSubscription<T, S>(props.channel, props.options);
    if (props.reads) {
      probe.last = probe.now.lastMessage?.data;
      probe.messages = probe.now.messages;
    }
    return null;
  }
  return probe;
}

const subscribes = (server: FakeServer) =>
  server.connections.flatMap((connection) => connection.receivedOf('subscribe'));

describe('messages', () => {
  it('come to lastMessage, to messages as many as wanted, and each to onMessage', async () => {
    const server = new FakeServer();
    const probe = makeProbe<number>();
    const heard: number[] = [];
    const of = (buffer?: number) =>
      probe.of('news', {
        ...(buffer !== undefined && { buffer }),
        onMessage: ({ data }) => heard.push(data),
      });
    const { rerender } = await show(server, of());
    expect(probe.now).toMatchObject({ status: 'subscribed', recovered: true, error: undefined });
    expect([probe.last, probe.messages]).toEqual([undefined, []]);
    for (const n of [1, 2]) server.publish('news', n);
    await frame();
    expect([probe.last, probe.messages]).toEqual([2, []]);
    rerender(of(3));
    for (const n of [3, 4, 5, 6]) server.publish('news', n);
    await frame();
    server.publish('other', 'not ours');
    server.publish('news', 7);
    await frame();
    expect(probe.messages.map(({ data }) => data)).toEqual([5, 6, 7]);
    expect(probe.messages.at(-1)).toBe(probe.now.lastMessage);
    expect(heard).toEqual([1, 2, 3, 4, 5, 6, 7]);
  });

  it.each([false, true])(
    'come once each in a burst of 10,000, with a rendering a frame (StrictMode: %s)',
    async (isStrict) => {
      const server = new FakeServer({ persistent: ['log'] });
      const probe = makeProbe<number>();
      const heard: number[] = [];
      await show(
        server,
        probe.of('log', { buffer: 50, onMessage: ({ data }) => heard.push(data) }),
        {},
        isStrict,
      );
      const before = probe.renders;
      for (let n = 0; n < 10_000; n++) server.publish('log', n);
      await frame();
      const all = Array.from({ length: 10_000 }, (_, n) => n);
      expect(heard).toEqual(all);
      expect(probe.messages.map(({ data }) => data)).toEqual(all.slice(-50));
      expect(probe.renders - before).toBeLessThanOrEqual(2);
    },
  );

  it('make no rendering where nobody reads them, and are there once somebody does', async () => {
    const server = new FakeServer();
    const probe = makeProbe<number>();
    const onMessage = vi.fn();
    const options = { buffer: 3, onMessage };
    const { rerender } = await show(server, probe.of('news', options, false));
    const before = probe.renders;
    for (let n = 1; n <= 20; n++) {
      server.publish('news', n);
      await frame();
    }
    expect(onMessage).toHaveBeenCalledTimes(20);
    expect(probe.renders).toBe(before);
    rerender(probe.of('news', options, true));
    expect([probe.last, probe.messages.map(({ data }) => data)]).toEqual([20, [18, 19, 20]]);
    server.publish('news', 21);
    await frame();
    expect([probe.last, probe.messages.map(({ data }) => data)]).toEqual([21, [19, 20, 21]]);
  });

  it('are shown once a frame, or each at once', async () => {
    const server = new FakeServer();
    const slow = makeProbe<number>();
    const fast = makeProbe<number>();
    const seen: (number | undefined)[] = [];
    await show(
      server,
      <>
        {slow.of('news', { buffer: 9 })}
        {fast.of('news', { coalesce: 'none', onMessage: () => void seen.push(fast.last) })}
      </>,
    );
    const before = [slow.renders, fast.renders];
    for (let n = 1; n <= 5; n++) {
      server.publish('news', n);
      await pass(1);
    }
    expect(fast.renders - before[1]!).toBe(5);
    expect(seen).toEqual([undefined, 1, 2, 3, 4]);
    expect(slow.renders - before[0]!).toBeLessThanOrEqual(1);
    await frame();
    expect(slow.last).toBe(5);
    expect(slow.renders - before[0]!).toBeLessThanOrEqual(2);
  });

  it('are shown four times a second where no frames are drawn', async () => {
    const server = new FakeServer();
    const probe = makeProbe<number>();
    await show(server, probe.of('news'));
    vi.spyOn(globalThis, 'requestAnimationFrame').mockReturnValue(0);
    server.publish('news', 1);
    await pass(240);
    expect(probe.last).toBeUndefined();
    await pass(20);
    expect(probe.last).toBe(1);
  });

  it('of several components are shown by one rendering', async () => {
    const server = new FakeServer();
    const counter = makeCounter();
    function Row({ channel }: { channel: string }) {
      return useSubscription<number>(channel).lastMessage?.data;
    }
    const channels = Array.from({ length: 20 }, (_, n) => `row.${n}`);
    await show(
      server,
      <counter.Counted>
        {channels.map((channel) => (
          <Row key={channel} channel={channel} />
        ))}
      </counter.Counted>,
    );
    const before = counter.renders;
    for (const channel of channels) server.publish(channel, 1);
    await frame();
    expect(counter.renders - before).toBe(1);
  });

  it('keep order while a callback waits, and a throw of one is told and skips nothing', async () => {
    const server = new FakeServer({ persistent: ['jobs'] });
    const probe = makeProbe<number>();
    const done: string[] = [];
    const onError = vi.fn();
    await show(
      server,
      probe.of('jobs', {
        async onMessage({ data }) {
          done.push(`begin ${data}`);
          await new Promise((resolve) => setTimeout(resolve, 30));
          if (data === 2) throw new Error('two');
          done.push(`end ${data}`);
        },
        onError,
      }),
    );
    for (const n of [1, 2, 3]) server.publish('jobs', n);
    await pass(500);
    expect(done).toEqual(['begin 1', 'end 1', 'begin 2', 'begin 3', 'end 3']);
    expect(onError.mock.calls.map(([error]) => [error.code, error.cause.message])).toEqual([
      ['unknown', 'two'],
    ]);
    expect(server.connection.receivedOf('ack').at(-1)).toMatchObject({ channel: 'jobs', seq: 3 });
  });
});

describe('options', () => {
  it('may be inline: they neither subscribe again nor connect again, and the newest callback is called', async () => {
    const server = new FakeServer({ persistent: ['log'] });
    const probe = makeProbe<number>();
    const heard: string[] = [];
    const of = (round: number) =>
      probe.of('log', {
        onMessage: ({ data }) => heard.push(`${round}: ${data}`),
        onGap: () => heard.push(`${round}: gap`),
        parse: (data) => Number(data),
        select: (data) => data,
        isEqual: (a, b) => a === b,
        since: { epoch: 'e1', seq: 0 },
        buffer: 5,
      });
    const { rerender } = await show(server, of(0));
    server.publish('log', 1);
    await pass();
    for (let round = 1; round <= 20; round++) rerender(of(round));
    server.publish('log', 2);
    await frame();
    server.lose('log', 'e2');
    await frame();
    expect(heard).toEqual(['0: 1', '20: 2', '20: gap']);
    expect(subscribes(server)).toHaveLength(1);
    expect(server.connections).toHaveLength(1);
    await pass(2000);
    expect(server.connection.receivedOf('unsubscribe')).toEqual([]);
  });

  it('parse gives data their type, and what it does not like is bad_data and skipped', async () => {
    const server = new FakeServer({ persistent: ['quotes'] });
    const probe = makeProbe<{ price: number }>();
    const heard: unknown[] = [];
    const onError = vi.fn();
    const parse = (data: unknown) => {
      if (typeof data !== 'number') throw new TypeError('not a number');
      return { price: data };
    };
    const { rerender } = await show(
      server,
      probe.of('quotes', { parse, onMessage: ({ data }) => heard.push(data), onError, buffer: 5 }),
    );
    for (const data of [1, 'two', 3]) server.publish('quotes', data);
    await pass(500);
    expect(heard).toEqual([{ price: 1 }, { price: 3 }]);
    expect(probe.messages.map(({ data }) => data.price)).toEqual([1, 3]);
    const [error] = onError.mock.lastCall as [BroadcastError];
    expect(error).toBeInstanceOf(BroadcastError);
    expect([error.code, error.channel, (error.cause as Error).message]).toEqual([
      'bad_data',
      'quotes',
      'not a number',
    ]);
    expect(probe.now).toMatchObject({ status: 'subscribed', error });
    // It does not hold up the ack.
    expect(server.connection.receivedOf('ack').at(-1)).toMatchObject({ seq: 3 });

    rerender(probe.of('quotes', { parse }));
    server.publish('quotes', 'four');
    await pass();
    expect(told()).toEqual([
      expect.stringContaining('on quotes is not as expected: TypeError: not a number'),
    ]);
  });

  it('select and isEqual: what shows the same is no reason to render', async () => {
    const server = new FakeServer();
    const counter = { calls: 0 };
    const status = makeProbe<{ on: boolean; at: number }, boolean>();
    const near = makeProbe<{ on: boolean; at: number }, number>();
    await show(
      server,
      <>
        {status.of('lamp', { select: ({ on }) => on, buffer: 9, onMessage: () => void counter.calls++ })}
        {near.of('lamp', { select: ({ at }) => at, isEqual: (a, b) => Math.abs(a - b) < 10 })}
      </>,
    );
    const before = [status.renders, near.renders];
    for (const [on, at] of [
      [true, 1],
      [true, 5],
      [true, 12],
      [false, 13],
      [false, 14],
    ] as const) {
      server.publish('lamp', { on, at });
      await frame();
    }
    expect(status.messages.map(({ data }) => data)).toEqual([true, false]);
    expect(near.last).toBe(12);
    expect([status.renders - before[0]!, near.renders - before[1]!]).toEqual([2, 2]);
    expect(counter.calls).toBe(5);
  });

  it.each([
    [{}, { ack: true }],
    [{ ack: false }, {}],
    [{ last: 2 }, { ack: true, last: 2 }],
    [{ since: { epoch: 'e1', seq: 1 } }, { ack: true, since: { epoch: 'e1', seq: 1 } }],
  ])('%o reach the server', async (options, wanted) => {
    const server = new FakeServer({ persistent: ['log'] });
    for (const n of [1, 2, 3]) server.publish('log', n);
    const probe = makeProbe<number>();
    await show(server, probe.of('log', { ...options, buffer: 9 }), {}, true);
    const [{ messageId, ...frame }, ...more] = subscribes(server) as unknown as [Record<string, unknown>];
    expect(frame).toEqual({ type: 'subscribe', channel: 'log', ...wanted });
    expect(messageId).toBeTypeOf('string');
    expect(more).toEqual([]);
    await pass();
    const expected = 'last' in options || 'since' in options ? [2, 3] : [];
    expect(probe.messages.map(({ data }) => data)).toEqual(expected);
  });

  it('enabled: false and null subscribe to nothing', async () => {
    const server = new FakeServer();
    const probe = makeProbe<number>();
    const { rerender } = await show(server, probe.of(null));
    expect(probe.now.status).toBe('idle');
    await expect(probe.now.publish(1)).rejects.toMatchObject({ code: 'bad_channel' });
    rerender(probe.of('news', { enabled: false }));
    await pass();
    expect(subscribes(server)).toEqual([]);
    rerender(probe.of('news', { enabled: true }));
    await pass();
    expect(probe.now.status).toBe('subscribed');
    rerender(probe.of('news', { enabled: false }));
    await pass(2000);
    expect(probe.now.status).toBe('idle');
    expect(server.connection.receivedOf('unsubscribe')).toHaveLength(1);
    expect(server.published).toEqual([]);
  });
});

describe('a subscription', () => {
  it('goes to another channel, and shows nothing of the one before', async () => {
    const server = new FakeServer();
    const probe = makeProbe<string>();
    const { rerender } = await show(server, probe.of('a', { buffer: 5 }));
    server.publish('a', 'of a');
    await frame();
    expect(probe.last).toBe('of a');
    rerender(probe.of('b', { buffer: 5 }));
    expect([probe.last, probe.messages]).toEqual([undefined, []]);
    await pass(1000);
    server.publish('a', 'late');
    server.publish('b', 'of b');
    await frame();
    expect(probe.messages.map(({ data }) => data)).toEqual(['of b']);
    await probe.now.publish('mine');
    expect(server.published.at(-1)).toMatchObject({ channel: 'b', data: 'mine' });
  });

  it('that is forbidden says so', async () => {
    const server = new FakeServer();
    server.onFrame = (request, connection) => {
      if (request.type !== 'subscribe') return true;
      connection.refuse(request, 'forbidden');
      return false;
    };
    const probe = makeProbe();
    const onError = vi.fn();
    await show(server, probe.of('secret', { onError }));
    expect(probe.now.status).toBe('failed');
    expect(probe.now.error).toMatchObject({ code: 'forbidden', channel: 'secret' });
    expect(onError).toHaveBeenCalledTimes(1);
  });

  it('tells a gap, and is whole again after the next connection', async () => {
    const server = new FakeServer({ persistent: ['log'] });
    const probe = makeProbe<number>();
    const gaps: Gap[] = [];
    const story: string[] = [];
    await show(
      server,
      probe.of('log', {
        onMessage: ({ data }) => story.push(`${data}`),
        onGap: (gap) => {
          gaps.push(gap);
          story.push('gap');
        },
      }),
      { reconnect: { min: 10, max: 10 } },
    );
    server.publish('log', 1);
    await pass();
    expect(probe.now.recovered).toBe(true);
    server.isUp = false;
    server.dropAll();
    await pass();
    expect(probe.now.status).toBe('subscribing');
    for (const n of [2, 3, 4]) server.publish('log', n);
    server.trim('log', 1);
    server.isUp = true;
    await pass(500);
    told(); // That the server was away.
    expect(story).toEqual(['1', 'gap', '4']);
    expect(gaps).toEqual([{ channel: 'log', from: { epoch: 'e1', seq: 1 }, to: { epoch: 'e1', seq: 3 } }]);
    expect(probe.now).toMatchObject({ status: 'subscribed', recovered: false });
    server.dropAll();
    server.publish('log', 5);
    await pass(500);
    expect(story).toEqual(['1', 'gap', '4', '5']);
    expect(probe.now).toMatchObject({ status: 'subscribed', recovered: true });
  });

  it('of two components is one on the wire, and outlives a short absence', async () => {
    const server = new FakeServer({ persistent: ['log'] });
    const one = makeProbe<number>();
    const two = makeProbe<number>();
    let setCount!: (count: number) => void;
    function Two() {
      const [count, set] = useState(2);
      setCount = set;
      return (
        <>
          {count > 0 && one.of('log')}
          {count > 1 && two.of('log')}
        </>
      );
    }
    await show(server, <Two />, {}, true);
    server.publish('log', 1);
    await frame();
    expect([one.last, two.last]).toEqual([1, 1]);
    act(() => setCount(1));
    await pass(2000);
    act(() => setCount(0));
    await pass(50);
    act(() => setCount(1));
    await pass(2000);
    expect(subscribes(server)).toHaveLength(1);
    act(() => setCount(0));
    await pass(2000);
    expect(server.connection.receivedOf('unsubscribe')).toHaveLength(1);
  });
});
