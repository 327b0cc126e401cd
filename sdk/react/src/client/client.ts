/** The client: its parts, its events and its state. */
import type {
  ClientEvents,
  ClientOptions,
  Published,
  PublishOptions,
  Snapshot,
  SubscribeOptions,
} from '../types.js';
import { createAcks } from './acks.js';
import { createConnection } from './connection.js';
import { BroadcastError } from './errors.js';
import { createPublisher } from './publisher.js';
import { createTopics } from './topics.js';
import type { ErrorFrame } from './wire.js';

/** 128 random bits, also where a page is no secure context. */
const randomId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, '0')).join(
    '',
  );

/**
 * A connection to a tornado-bcast server that mends itself. Nothing happens before `connect()`.
 *
 * ```ts
 * const client = new BroadcastClient('ws://localhost:8080');
 * const off = client.subscribe('news', { onMessage: (message) => console.log(message.data) });
 * client.connect();
 * await client.publish('news', { title: 'Hello' });
 * ```
 */
export class BroadcastClient {
  readonly url: string;

  /** Connect, unless that is done or under way. Also after `close()`. */
  readonly connect: () => void;

  /** End the connection; what waits to be published is rejected with `closed`. */
  readonly close: () => void;

  /** Connect anew and at once, with a new token. */
  readonly reconnect: () => void;

  /** Listen to a channel; may be called before `connect()`. Returns its undo. */
  readonly subscribe: <T = unknown>(channel: string, options?: SubscribeOptions<T>) => () => void;

  /** Publish to a channel (null: to all). Always settles; rejects with a {@link BroadcastError}. */
  readonly publish: (channel: string | null, data: unknown, options?: PublishOptions) => Promise<Published>;

  /** Publish, and hear no more of it. True: it left, or is queued. */
  readonly send: (channel: string | null, data: unknown) => boolean;

  /** The present state. */
  readonly getSnapshot: () => Snapshot;

  /** Listen to an event. Returns its undo. */
  readonly on: <E extends keyof ClientEvents>(
    event: E,
    listener: (...args: ClientEvents[E]) => void,
  ) => () => void;

  constructor(url: string, options: ClientOptions = {}) {
    let snapshot: Snapshot = {
      status: 'idle',
      clientId: undefined,
      lastMessage: undefined,
      error: undefined,
    };
    const listeners: { [E in keyof ClientEvents]: Set<(...args: ClientEvents[E]) => void> } = {
      status: new Set(),
      message: new Set(),
      error: new Set(),
    };
    const prefix = randomId();
    let count = 0;
    const nextId = () => `${prefix}-${++count}`;

    const emit = <E extends keyof ClientEvents>(event: E, ...args: ClientEvents[E]) => {
      for (const listener of [...listeners[event]])
        try {
          listener(...args);
        } catch (error) {
          console.error(error);
        }
    };

    const set = (change: Partial<Snapshot>) => {
      snapshot = { ...snapshot, ...change };
      emit('status', snapshot.status);
    };

    const heard = (lastMessage: Snapshot['lastMessage'] & {}) => {
      snapshot = { ...snapshot, lastMessage };
      emit('message', lastMessage);
    };

    const failed = (error: BroadcastError) => {
      if (listeners.error.size) emit('error', error);
      else console.error(error);
    };

    const on: typeof this.on = (event, listener) => {
      listeners[event].add(listener);
      return () => {
        listeners[event].delete(listener);
      };
    };

    const connection = createConnection(url, options, nextId, {
      status(status, error) {
        if (status === 'closed') {
          publisher.close();
          topics.close(error);
        } else {
          publisher.open();
          topics.open();
        }
        if (status !== snapshot.status || error) set({ status, error: error ?? snapshot.error });
        if (error) failed(error);
      },
      trouble(error) {
        set({ error });
        failed(error);
      },
      opened(ack) {
        topics.up(ack);
        publisher.up(ack.limits);
        set({ status: 'open', clientId: ack.clientId, error: undefined });
      },
      lost(code) {
        topics.down();
        publisher.down(code);
      },
      received(frame) {
        if (frame.type === 'message') {
          const { type: _, ...message } = frame;
          if (message.channel === undefined) heard(message);
          else topics.receive(message);
        } else if (frame.type === 'error') {
          const error = frame as ErrorFrame;
          const isNews = error.messageId === undefined && error.channel !== undefined;
          if (!(isNews && topics.refused(error)))
            failed(new BroadcastError(error.code, error.message, error));
        }
      },
      renewed: () => topics.retry(),
    });
    const { link } = connection;
    const acks = createAcks(link);
    const topics = createTopics({ link, acks, heard, failed });
    const publisher = createPublisher(link, nextId, options.queue);
    if (options.onStatus) on('status', options.onStatus);
    if (options.onError) on('error', options.onError);

    const isDown = () => snapshot.status === 'idle' || snapshot.status === 'closed';
    this.url = url;
    this.connect = () => {
      if (isDown()) connection.start();
    };
    this.reconnect = connection.start;
    this.close = () => {
      if (snapshot.status !== 'closed') connection.finish();
    };
    this.subscribe = (channel, given = {}) => topics.subscribe(channel, given as SubscribeOptions);
    this.publish = publisher.publish;
    this.send = publisher.send;
    this.getSnapshot = () => snapshot;
    this.on = on;
  }
}
