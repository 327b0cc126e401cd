/** What the tests of the client share: a fake server, a client at it, a clock turned by hand. */
import { onTestFinished, vi } from 'vitest';
import {
  BroadcastClient,
  type ClientOptions,
  type Message,
  type SubscribeOptions,
} from '../src/client/index.js';
import { FakeServer, type FakeServerOptions } from '../src/testing/index.js';

/** Turn the clock by so many ms, and let everything happen that is due. */
export const pass = (ms = 0) => vi.advanceTimersByTimeAsync(ms);

/** Channels that begin with `p.` are persistent. */
export const persistent = (channel: string) => channel.startsWith('p.');

/** Chance as it is; in the tests it is always in the middle, unless one says otherwise. */
export const chance = Math.random.bind(Math);

export function setUp(options: ClientOptions = {}, given: FakeServerOptions = {}) {
  vi.useFakeTimers();
  if (!vi.isMockFunction(Math.random)) vi.spyOn(Math, 'random').mockReturnValue(0.5);
  const server = new FakeServer({ persistent, ...given });
  const client = new BroadcastClient('ws://fake/ws', { WebSocket: server.WebSocket, ...options });
  const errors: string[] = [];
  client.on('error', (error) => errors.push(error.code));
  onTestFinished(() => {
    client.close();
    vi.useRealTimers();
    vi.unstubAllGlobals();
  });
  return { server, client, errors, status: () => client.getSnapshot().status };
}

/** The same, connected. */
export async function connected(options: ClientOptions = {}, given: FakeServerOptions = {}) {
  const all = setUp(options, given);
  all.client.connect();
  await pass();
  return all;
}

/** A listener that writes down what it hears, in order: data, and `gap`. */
export function listen(client: BroadcastClient, channel: string, options: SubscribeOptions = {}) {
  const heard: unknown[] = [];
  const messages: Message[] = [];
  const states: string[] = [];
  const errors: string[] = [];
  const off = client.subscribe(channel, {
    ...options,
    onMessage(message) {
      messages.push(message);
      heard.push(message.data);
      return options.onMessage?.(message);
    },
    onGap(gap) {
      heard.push('gap');
      options.onGap?.(gap);
    },
    onStatus: (status, { recovered }) =>
      states.push(recovered === undefined ? status : `${status} ${recovered}`),
    onError: (error) => errors.push(error.code),
  });
  return { heard, messages, states, errors, off };
}

/** Numbers from `from` to `to`. */
export const range = (from: number, to: number) =>
  Array.from({ length: to - from + 1 }, (_, index) => from + index);
