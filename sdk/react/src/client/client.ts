/** The client: its parts, its events and its state. */
import type {
  ClientEvents,
  ClientOptions,
  Message,
  Published,
  PublishOptions,
  Snapshot,
  SubscribeOptions,
} from '../types.js';
import { createAcks } from './acks.js';
import { createConnection } from './connection.js';
import { BroadcastError } from './errors.js';
import { createPublisher } from './publisher.js';
import { createTopic, type Topic } from './topic.js';
import type { ErrorFrame, MessageFrame } from './wire.js';

/** 128 random bits; `randomUUID` is not there where a page is no secure context. */
const randomId = () => crypto.getRandomValues(new Uint32Array(4)).join('-');

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
  declare readonly url: string;

  /** Connect, unless that is done or under way. Also after `close()`. */
  declare readonly connect: () => void;

  /** End the connection; what waits to be published is rejected with `closed`. */
  declare readonly close: () => void;

  /** Connect anew and at once, with a new token. */
  declare readonly reconnect: () => void;

  /** Listen to a channel; may be called before `connect()`. Returns its undo. */
  declare readonly subscribe: <T = unknown>(channel: string, options?: SubscribeOptions<T>) => () => void;

  /** Publish to a channel (null: to all). Always settles; rejects with a {@link BroadcastError}. */
  declare readonly publish: (
    channel: string | null,
    data: unknown,
    options?: PublishOptions,
  ) => Promise<Published>;

  /** Publish, and hear no more of it. True: it left, or is queued. */
  declare readonly send: (channel: string | null, data: unknown) => boolean;

  /** The present state. */
  declare readonly getSnapshot: () => Snapshot;

  /** Listen to an event. Returns its undo. */
  declare readonly on: <E extends keyof ClientEvents>(
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

    const heard = (lastMessage: Message) => {
      snapshot = { ...snapshot, lastMessage };
      emit('message', lastMessage);
    };

    const failed = (error: BroadcastError) => {
      if (listeners.error.size) emit('error', error);
      else console.error(error);
    };

    const isClosed = () => snapshot.status === 'closed';

    const on: typeof this.on = (event, listener) => {
      listeners[event].add(listener);
      return () => {
        listeners[event].delete(listener);
      };
    };

    const topics = new Map<string, Topic>();

    const openTopic = (channel: string) => {
      const released = () => topics.delete(channel);
      const topic = topics.get(channel) ?? createTopic(channel, { link, acks, heard, failed, released });
      topics.set(channel, topic);
      return topic;
    };

    const connection = createConnection(url, options, nextId, {
      status(status, error) {
        if (status !== snapshot.status || error) set({ status, ...(error && { error }) });
        if (error) failed(error);
        if (isClosed()) {
          publisher.close();
          for (const topic of topics.values()) topic.end(error);
        }
      },
      opened({ clientId, limits, subscriptions }) {
        const restored = new Map(subscriptions.map((one) => [one.channel, one]));
        // The first frames are acks of what it has.
        for (const channel of restored.keys()) topics.get(channel)?.ackAgain();
        acks.flush();
        for (const channel of new Set([...topics.keys(), ...restored.keys()]))
          openTopic(channel).up(restored.get(channel));
        publisher.up(limits);
        set({ status: 'open', clientId, error: undefined });
      },
      lost(code) {
        for (const topic of topics.values()) topic.down();
        publisher.down(code);
      },
      received(frame) {
        const { type, ...rest } = frame as ErrorFrame | MessageFrame;
        const topic = topics.get(rest.channel!);
        if (type === 'message') {
          const message = rest as Message;
          if (message.channel === undefined) heard(message);
          else topic?.receive(message);
        } else if (type === 'error') {
          const error = rest as ErrorFrame;
          if (topic && error.messageId === undefined) topic.refused(error);
          else failed(new BroadcastError(error.code, error.message, error));
        }
      },
    });
    const { link } = connection;
    const acks = createAcks(link);
    const publisher = createPublisher(link, nextId, options.queue, isClosed);
    if (options.onStatus) on('status', options.onStatus);
    if (options.onError) on('error', options.onError);

    Object.assign(this, {
      url,
      connect() {
        if (isClosed() || snapshot.status === 'idle') connection.start();
      },
      reconnect: connection.start,
      close() {
        if (!isClosed()) connection.finish();
      },
      subscribe(channel: string, given: SubscribeOptions = {}) {
        const topic = openTopic(channel);
        const undo = topic.add(given);
        if (isClosed()) topic.end(snapshot.error);
        return undo;
      },
      publish: publisher.publish,
      send: publisher.send,
      getSnapshot: () => snapshot,
      on,
    });
  }
}
