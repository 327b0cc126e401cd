/** The client as it is shipped, in Node, against the real daemon whose workers are killed. */
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it, onTestFinished } from 'vitest';
import { WebSocket } from 'ws';
import type { BroadcastClient, ClientOptions, Message } from '../src/client/index.js';
import { Daemon, until } from './daemon.js';

const BUILT = new URL('../dist/client.js', import.meta.url).href;
const shipped = (await import(BUILT)) as typeof import('../src/client/index.js');

const INI = '[limits]\nrate = 0\n[channel p.*]\npersistent = yes\n';
const COUNT = 300;

describe('the client', () => {
  let daemon: Daemon;

  beforeAll(async () => {
    daemon = await Daemon.start(INI);
  });
  afterAll(() => daemon?.stop());

  async function connect(options: ClientOptions = {}): Promise<BroadcastClient> {
    const client = new shipped.BroadcastClient(daemon.wsUrl, { WebSocket: WebSocket as never, ...options });
    client.connect();
    onTestFinished(() => client.close());
    await until('a client is connected', () => client.getSnapshot().status === 'open');
    return client;
  }

  /** The messages of a channel, and how often the listener was told of a gap. */
  async function listen(client: BroadcastClient, channel: string) {
    const heard: Message[] = [];
    const told = { gaps: 0, status: '' };
    client.subscribe(channel, {
      onMessage: (message) => {
        heard.push(message);
      },
      onGap: () => {
        told.gaps++;
      },
      onStatus: (status) => {
        told.status = status;
      },
    });
    await until(`${channel} is subscribed`, () => told.status === 'subscribed');
    return { heard, told };
  }

  it('loses nothing and shows nothing twice while both workers are killed', async () => {
    const [subscriber, publisher] = [await connect(), await connect()];
    const { heard, told } = await listen(subscriber, 'p.stream');
    const sent = Array.from({ length: COUNT }, (_, index) => index + 1);
    const connections: string[] = [];
    subscriber.on('status', (status) => connections.push(status));

    const publishing = (async () => {
      // Ten at a time, so that some are always on their way.
      for (let first = 0; first < COUNT; first += 10) {
        const ten = sent.slice(first, first + 10);
        await Promise.all(ten.map((data) => publisher.publish('p.stream', data, { timeout: 60_000 })));
        await sleep(40);
      }
    })();
    for (let kill = 0; kill < 4; kill++) {
      await sleep(300);
      const busy = (await daemon.workers()).filter(({ connections }) => connections > 0);
      for (const { pid } of busy) process.kill(pid, 'SIGKILL');
      await until('both are connected again', () =>
        [subscriber, publisher].every((client) => client.getSnapshot().status === 'open'),
      );
    }
    await publishing;
    await until('the last one is heard', () => heard.length >= COUNT);
    await sleep(500);

    expect(heard.map(({ data }) => data)).toEqual(sent);
    expect(heard.map(({ seq }) => seq)).toEqual(sent);
    expect(told.gaps).toBe(0);
    expect(connections.filter((status) => status === 'reconnecting').length).toBeGreaterThanOrEqual(1);
  });

  it('fills a late listener from the history, and only that one', async () => {
    const client = await connect();
    const early = await listen(client, 'p.history');
    for (const data of [1, 2, 3]) await client.publish('p.history', data);
    const late: unknown[] = [];
    client.subscribe('p.history', { last: 2, onMessage: ({ data }) => late.push(data) });
    await until('the history is there', () => late.length === 2);
    await client.publish('p.history', 4);
    await until('the next one is there', () => late.length === 3 && early.heard.length === 4);
    expect(late).toEqual([2, 3, 4]);
    expect(early.heard.map(({ data }) => data)).toEqual([1, 2, 3, 4]);
  });

  it('is told what the server refuses', async () => {
    const client = await connect();
    await expect(client.publish('no spaces', 1)).rejects.toMatchObject({ code: 'bad_channel' });
    await expect(client.publish(null, 1)).rejects.toMatchObject({ code: 'forbidden' });
    await expect(client.publish('p.large', 'x'.repeat(70_000))).rejects.toMatchObject({ code: 'too_large' });
    expect(client.getSnapshot().status).toBe('open');
    await client.publish('p.large', 'x'.repeat(60_000));
  });
});
