/** A server without a network: its channels, its sessions, and what a script may change of it. */
import type { Message, Position, WebSocketConstructor } from '../types.js';
import { FakeConnection, type Frame } from './connection.js';
import { FakeSocket } from './socket.js';

export type Stored = Message & { seq?: number; epoch?: string };

export interface Session {
  readonly id: string;
  readonly clientId: string;
  /** `acked`: up to where all is processed, of a subscription with acks. */
  readonly subscriptions: Map<string, { acked: Position | undefined }>;
  connection?: FakeConnection;
}

export interface FakeServerOptions {
  /** The channels that keep their messages. @default none */
  persistent?: readonly string[] | ((channel: string) => boolean);
  /** ms between two pings; 0: none. @default 25_000 */
  heartbeat?: number;
  /** What a frame takes on its way, ms; 0: it arrives in a microtask. @default 0 */
  latency?: number;
  /** Tokens end after so many ms; 0: never. @default 0 */
  expiresIn?: number;
  /** What `connect` tells of limits (nothing of it is held up). */
  limits?: Partial<FakeServer['limits']>;
}

/** One channel and its history. */
export class Channel {
  readonly isPersistent: boolean;
  readonly messages: Stored[] = [];
  readonly ids = new Map<string, Stored>();
  seq = 0;
  epoch = 'e1';
  /** Where the epochs before ended. */
  readonly ended = new Map<string, number>();

  constructor(isPersistent: boolean) {
    this.isPersistent = isPersistent;
  }

  /** Whether what comes after this position is all there. */
  locate({ epoch, seq }: Position): boolean {
    const end = epoch === this.epoch ? this.seq : (this.ended.get(epoch) ?? -1);
    const oldest = this.messages[0]?.seq ?? this.seq + 1;
    return (seq === 0 || seq <= end) && seq >= oldest - 1;
  }
}

/**
 * A server for tests: give `WebSocket` to a client, and it speaks `bcast.v1` with it.
 *
 * ```ts
 * const server = new FakeServer({ persistent: ['orders'] });
 * const client = new BroadcastClient('ws://fake', { WebSocket: server.WebSocket });
 * client.connect();
 * server.publish('orders', { id: 1 });
 * server.connection.drop();
 * ```
 */
export class FakeServer {
  /** The constructor for the client's option `WebSocket`. */
  readonly WebSocket: WebSocketConstructor;
  /** Every connection that there was, oldest first. */
  readonly connections: FakeConnection[] = [];
  /** Every socket that a client has opened, also those that were refused. */
  readonly sockets: FakeSocket[] = [];
  /** What was taken, in order, each once. */
  readonly published: Stored[] = [];
  readonly sessions = new Map<string, Session>();
  readonly limits = {
    rate: 50,
    burst: 250,
    maxMessageBytes: 65_536,
    maxSubscriptions: 200,
    dedupTtl: 300_000,
  };
  heartbeat: number;
  latency: number;
  expiresIn: number;
  /** False: nothing can connect (1006). */
  isUp = true;
  /** Called before a connection is answered; false: it is left unanswered. It may close it. */
  onConnect: ((connection: FakeConnection) => unknown) | undefined;
  /** Called with each frame of a client; false: the script answers it, or nobody (the frame is lost). */
  onFrame: ((frame: Frame, connection: FakeConnection) => unknown) | undefined;
  /** Called with each frame to a client; false: it is lost on the way. */
  onSend: ((frame: Frame, connection: FakeConnection) => unknown) | undefined;
  readonly #channels = new Map<string, Channel>();
  readonly #isPersistent: (channel: string) => boolean;
  #count = 0;

  constructor(options: FakeServerOptions = {}) {
    const { persistent = [], heartbeat = 25_000, latency = 0, expiresIn = 0, limits } = options;
    this.#isPersistent = typeof persistent === 'function' ? persistent : (name) => persistent.includes(name);
    this.heartbeat = heartbeat;
    this.latency = latency;
    this.expiresIn = expiresIn;
    Object.assign(this.limits, limits);
    const server = this;
    this.WebSocket = class extends FakeSocket {
      constructor(url: string, protocols: string[]) {
        super(server, url, protocols);
        server.sockets.push(this);
      }
    } as unknown as WebSocketConstructor;
  }

  /** The newest connection. */
  get connection(): FakeConnection {
    const newest = this.connections.at(-1);
    if (!newest) throw new Error('Nobody has connected yet.');
    return newest;
  }

  /** Publish as by HTTP; channel null: to all. */
  publish(channel: string | null, data: unknown, given: Partial<Stored> = {}): Stored & { duplicate?: true } {
    const { messageId = `m-${++this.#count}`, ...rest } = given;
    const of = channel === null ? undefined : this.channel(channel);
    const old = of?.ids.get(messageId);
    if (old) return { ...old, duplicate: true };
    const message: Stored = {
      ...(channel !== null && { channel }),
      data,
      messageId,
      timestamp: Date.now(),
      ...(of?.isPersistent && { seq: ++of.seq, epoch: of.epoch }),
      ...rest,
    };
    this.published.push(message);
    of?.ids.set(messageId, message);
    if (of?.isPersistent) of.messages.push(message);
    for (const connection of this.connections) if (connection.isOpen) connection.deliver(message);
    return message;
  }

  /** A channel and its history. */
  channel(name: string): Channel {
    const found = this.#channels.get(name) ?? new Channel(this.#isPersistent(name));
    this.#channels.set(name, found);
    return found;
  }

  /** Forget all but the last `keep` messages of a persistent channel. */
  trim(name: string, keep = 0): void {
    const { messages } = this.channel(name);
    messages.splice(0, messages.length - keep);
  }

  /** Another Redis goes on with the numbers, in a new epoch. */
  beginEpoch(name: string, epoch: string): void {
    const of = this.channel(name);
    of.ended.set(of.epoch, of.seq);
    of.epoch = epoch;
  }

  /** Redis has lost the channel: a new epoch at 1. Subscribers are told, as the server does. */
  lose(name: string, epoch: string): void {
    const of = this.channel(name);
    of.messages.length = of.seq = 0;
    of.epoch = epoch;
    of.ended.clear();
    for (const connection of this.connections) {
      const subscription = connection.isOpen && connection.session?.subscriptions.get(name);
      if (!subscription) continue;
      if (subscription.acked) connection.session.subscriptions.set(name, { acked: { epoch, seq: 0 } });
      connection.send({
        type: 'error',
        code: 'history_lost',
        message: 'Messages of this channel are lost.',
        channel: name,
        epoch,
        seq: 0,
      });
    }
  }

  /** All sessions have expired. */
  forget(): void {
    this.sessions.clear();
  }

  /** Close every connection; `isUp = false` keeps them from coming again. */
  dropAll(): void {
    for (const connection of this.connections) connection.drop();
  }

  /** @internal */
  makeSession(): Session {
    const id = `session-${++this.#count}`;
    const session: Session = { id, clientId: `client-${this.#count}`, subscriptions: new Map() };
    this.sessions.set(id, session);
    return session;
  }

  /** @internal */
  later(task: () => void): void {
    if (this.latency) setTimeout(task, this.latency);
    else queueMicrotask(task);
  }

  /** @internal */
  accept(socket: FakeSocket): FakeConnection | undefined {
    if (!this.isUp) {
      this.later(() => socket.ended(1006, ''));
      return undefined;
    }
    const connection = new FakeConnection(this, socket);
    this.connections.push(connection);
    this.later(() => {
      if (socket.readyState !== 0) return;
      socket.opened();
      if (this.onConnect?.(connection) !== false && connection.isOpen) connection.begin();
    });
    return connection;
  }
}
