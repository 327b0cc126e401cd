import type {
  ClientEvents,
  ClientOptions,
  Published,
  PublishOptions,
  Snapshot,
  SubscribeOptions,
} from '../types.js';

/** A connection to a tornado-bcast server that mends itself. Nothing happens before `connect()`. */
export class BroadcastClient {
  readonly url: string;

  constructor(url: string, _options: ClientOptions = {}) {
    this.url = url;
  }

  /** Connect, unless that is done or under way. Also after `close()`. */
  connect(): void {}

  /** End the connection and settle everything with `closed`. */
  close(): void {}

  /** Connect anew now, whatever the state. */
  reconnect(): void {}

  /** Subscribe a listener to a channel; may be called before `connect`. Returns its undo. */
  subscribe<T = unknown>(_channel: string, _options: SubscribeOptions<T>): () => void {
    return () => {};
  }

  /** Publish to a channel (null: to all). Always settles. Rejects with a `BroadcastError`. */
  publish(_channel: string | null, _data: unknown, _options: PublishOptions = {}): Promise<Published> {
    return Promise.reject(new Error('not there yet'));
  }

  /** Publish without hearing of it again. True: it left, or is queued. */
  send(_channel: string | null, _data: unknown): boolean {
    return false;
  }

  /** The present state. */
  getSnapshot(): Snapshot {
    return { status: 'idle', clientId: undefined, lastMessage: undefined, error: undefined };
  }

  /** Listen to an event. Returns its undo. */
  on<E extends keyof ClientEvents>(_event: E, _listener: (...args: ClientEvents[E]) => void): () => void {
    return () => {};
  }
}
