/**
 * What users of the package see of the client: messages, errors, states and options.
 *
 * The wire behind it is `bcast.v1`, see docs/PROTOCOL.md of the server.
 */

import type { BroadcastError } from './client/errors.js';

/** The codes of the server's `error` frames. */
export type ServerCode =
  | 'bad_message'
  | 'unknown_type'
  | 'bad_channel'
  | 'unauthorized'
  | 'forbidden'
  | 'rate_limited'
  | 'too_large'
  | 'too_many_subscriptions'
  | 'not_subscribed'
  | 'unavailable'
  | 'history_lost'
  | 'internal';

/**
 * Why something failed: a code of the server, or one of the client.
 *
 * - `timeout`: no answer in time. A message that had left may have been taken.
 * - `aborted`: by the `signal` of a publish.
 * - `queue_full`: not connected, and the queue has no room.
 * - `closed`: the client is closed.
 * - `connect_failed`: no connection opened; the message names the usual causes.
 * - `bad_data`: data that is no JSON, or that `parse` did not like.
 * - `unknown`: it is not known whether the server took a message; or a callback threw (see `cause`).
 */
export type ErrorCode =
  | ServerCode
  | 'timeout'
  | 'aborted'
  | 'queue_full'
  | 'closed'
  | 'connect_failed'
  | 'bad_data'
  | 'unknown';

/** `closed` is final until `connect()` or `reconnect()` is called; the snapshot's `error` says why. */
export type Status = 'idle' | 'connecting' | 'open' | 'reconnecting' | 'closed';

/** `failed`: the error says why, for example `forbidden`. It is tried again with the next connection. */
export type SubscriptionStatus = 'idle' | 'subscribing' | 'subscribed' | 'failed';

/** A message as it is handed to callbacks. */
export interface Message<T = unknown> {
  /** Absent on a broadcast to all. */
  channel?: string;
  data: T;
  messageId: string;
  /** When it was published, Unix time in ms. */
  timestamp: number;
  /** On persistent channels: its number, from 1 on and without holes. */
  seq?: number;
  /** On persistent channels: the history that `seq` belongs to. */
  epoch?: string;
  /** It comes for the n-th time again (still handed over only once). */
  redelivered?: number;
  /** Who published it, on channels with `sender = yes`. */
  from?: { clientId: string; sub?: string };
}

/** A place in a persistent channel: everything up to it. */
export interface Position {
  epoch: string;
  seq: number;
}

/** Messages of a channel that were or may have been missed: reload your state. */
export interface Gap {
  channel: string;
  /** The last position that was seen. Absent on channels that are not persistent. */
  from?: Position | undefined;
  /** It goes on after this position. Absent on channels that are not persistent. */
  to?: Position | undefined;
}

/** What a message became. */
export interface Published {
  messageId: string;
  /** On persistent channels. */
  seq?: number | undefined;
  epoch?: string | undefined;
  /** It was taken before: an earlier try had arrived. */
  duplicate?: boolean | undefined;
}

/** The state of a client. Immutable: a new object whenever something changed, the same one otherwise. */
export interface Snapshot {
  readonly status: Status;
  /** The public name of this client, known from the first connection on. */
  readonly clientId: string | undefined;
  /** The last message that came, of whatever channel. */
  readonly lastMessage: Message | undefined;
  /** What is wrong with the connection at present; undefined once it is open again. */
  readonly error: BroadcastError | undefined;
}

/** What `getToken` is told. */
export interface TokenRequest {
  /**
   * - `connect`: for a connection
   * - `renew`: the present one expires soon
   * - `rejected`: the server did not take the last one, or it has expired
   */
  reason: 'connect' | 'renew' | 'rejected';
  /** Counts the tries since the last success, from 0 on. */
  attempt: number;
  /** Aborted when the token is not needed any more, or `connectTimeout` is over. */
  signal: AbortSignal;
}

export interface ReconnectOptions {
  /** The first pause is a random part of this, ms; it doubles with each try. @default 500 */
  min?: number;
  /** No pause is longer, ms (but for the server's `retryAfter`). @default 20_000 */
  max?: number;
  /** Tries in a row that may fail before the client is `closed` with `connect_failed`. @default Infinity */
  attempts?: number;
}

export interface QueueOptions {
  /** How many messages wait while there is no connection. @default 100 */
  max?: number;
  /** How long a message waits for its first try, ms. @default 60_000 */
  ttl?: number;
}

/** Anything with the constructor of the browser's WebSocket: `ws` in Node 20, the fake of `./testing`. */
export type WebSocketConstructor = new (url: string, protocols: string[]) => WebSocket;

/** Options of the connection. */
export interface ClientOptions {
  /** Gives a JWT, or null for a connection without one. Called for the first connection and before a token expires. */
  getToken?: (request: TokenRequest) => string | null | Promise<string | null>;
  /** @default globalThis.WebSocket */
  WebSocket?: WebSocketConstructor;
  /** Pauses between tries: exponential with full jitter. */
  reconnect?: ReconnectOptions;
  /** How long a try may take until the server has answered, ms. @default 10_000 */
  connectTimeout?: number;
  /** What is published while there is no connection waits here, or is rejected with `queue_full` at once. */
  queue?: QueueOptions | 'reject';
  /** Where the session id is kept: `sessionStorage` resumes it after a reload of the page. @default 'memory' */
  storage?: 'memory' | 'sessionStorage';
  /** The same as `on('status', ...)`. */
  onStatus?: (status: Status) => void;
  /** The same as `on('error', ...)`. */
  onError?: (error: BroadcastError) => void;
}

/** What `onStatus` of a subscription is told beside the status. */
export interface SubscriptionInfo {
  /** After `subscribed`: whether nothing was missed since the last message. Undefined before. */
  recovered: boolean | undefined;
  /** Why it is `failed`. */
  error: BroadcastError | undefined;
}

/** Options of one subscription. */
export interface SubscribeOptions<T = unknown> {
  /** Each message once, in order. A promise holds back the next message (and the ack) until it has settled. */
  onMessage?: (message: Message<T>) => unknown;
  /** Messages were missed. Called in order with the messages. */
  onGap?: (gap: Gap) => void;
  /** The subscription failed, or a callback threw. */
  onError?: (error: BroadcastError) => void;
  /** Called at each change, and with the present status right after `subscribe`. */
  onStatus?: (status: SubscriptionStatus, info: SubscriptionInfo) => void;
  /** Begin after this position (persistent channels). */
  since?: Position;
  /** Begin with the last n messages (persistent channels). */
  last?: number;
  /** Ack what was handled, so that the server keeps the place: false where only the latest counts. @default true */
  ack?: boolean;
}

export interface PublishOptions {
  /** How long to try, ms; then `timeout`. @default 10_000 */
  timeout?: number;
  /** Gives up with `aborted`. */
  signal?: AbortSignal;
  /** The message's id, unique on its channel. @default a random one */
  id?: string;
}

/** The events of a client, with what a listener is given. */
export interface ClientEvents {
  /** `status`, `clientId` or `error` of the snapshot changed. */
  status: [status: Status];
  /** Every message of any channel, and those to all. */
  message: [message: Message];
  error: [error: BroadcastError];
}
