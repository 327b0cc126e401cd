/** The server's side of a fake connection: it speaks `bcast.v1`, unless a script speaks in its place. */
import type { Position } from '../types.js';
import type { Channel, FakeServer, Session, Stored } from './server.js';
import type { FakeSocket } from './socket.js';

/** A frame, of either side. */
export interface Frame {
  type: string;
  [field: string]: unknown;
}

type Request = Frame & {
  channel?: string;
  messageId?: string;
  since?: Position;
  last?: number;
  seq?: number;
};

export class FakeConnection {
  /** What the client has sent, oldest first. */
  readonly received: Frame[] = [];
  /** What was sent to the client, oldest first. */
  readonly sent: Frame[] = [];
  readonly socket: FakeSocket;
  /** The subprotocols that were offered. */
  readonly protocols: readonly string[];
  isOpen = true;
  session!: Session;
  readonly #server: FakeServer;
  #heartbeat: ReturnType<typeof setInterval> | undefined;

  /** @internal */
  constructor(server: FakeServer, socket: FakeSocket) {
    this.#server = server;
    this.socket = socket;
    this.protocols = socket.protocols;
  }

  /** What was offered as `bearer.<JWT>`. */
  get token(): string | undefined {
    return this.#offered('bearer.');
  }

  /** The frames of one type that the client has sent. */
  receivedOf(type: string): Frame[] {
    return this.received.filter((frame) => frame.type === type);
  }

  /** Send any frame; `timestamp` is added. */
  send(frame: Frame): void {
    if (!this.isOpen) return;
    const whole = { timestamp: Date.now(), ...frame };
    this.sent.push(whole);
    if (this.#server.onSend?.(whole, this) === false) return;
    this.#server.later(() => this.socket.arrived(JSON.stringify(whole)));
  }

  /** Close it with a code, and a reason: text, or an object that is sent as JSON. */
  close(code: number, reason: string | object = ''): void {
    if (!this.isOpen) return;
    this.left();
    const text = typeof reason === 'string' ? reason : JSON.stringify(reason);
    this.#server.later(() => this.socket.ended(code, text));
  }

  /** The network breaks: the client sees 1006. */
  drop(): void {
    this.close(1006);
  }

  /** Say nothing any more, and hear nothing: a network that swallows everything. */
  mute(): void {
    this.left();
  }

  /** Send what is not acked of a channel once more, as after `ack_timeout`. */
  redeliver(channel: string): void {
    const subscription = this.session.subscriptions.get(channel);
    const acked = subscription?.acked;
    if (!acked) return;
    for (const one of this.#server.channel(channel).messages)
      if (one.seq! > acked.seq) this.send({ type: 'message', ...one, redelivered: 1 });
  }

  /** @internal Answer the handshake: the connect ack. */
  begin(): void {
    const server = this.#server;
    const asked = this.#offered('session.');
    const old = asked === undefined ? undefined : server.sessions.get(asked);
    const resumed = old !== undefined;
    this.session = old ?? server.makeSession();
    if (old?.connection?.isOpen) old.connection.close(4009);
    this.session.connection = this;
    const subscriptions = [...this.session.subscriptions].map(([channel, { acked }]) => {
      const { isPersistent, epoch, messages, seq } = server.channel(channel);
      if (!isPersistent) return { channel, recovered: false };
      const found = acked && server.channel(channel).locate(acked);
      const start = !acked
        ? { epoch, seq }
        : found
          ? acked
          : { epoch, seq: (messages[0]?.seq ?? seq + 1) - 1 };
      if (acked) this.session.subscriptions.set(channel, { acked: start });
      return { channel, ...start, recovered: !!found };
    });
    this.send({
      type: 'ack',
      op: 'connect',
      clientId: this.session.clientId,
      session: this.session.id,
      resumed,
      // Who is never pinged must not wait for it; a timer takes no more than 31 bits.
      heartbeat: server.heartbeat || 1e9,
      subscriptions,
      limits: server.limits,
      ...(server.expiresIn && this.token && { expiresAt: Date.now() + server.expiresIn }),
    });
    for (const { channel, seq } of subscriptions as { channel: string; seq?: number }[])
      if (seq !== undefined) this.#replay(server.channel(channel), seq);
    if (server.heartbeat) this.#heartbeat = setInterval(() => this.send({ type: 'ping' }), server.heartbeat);
  }

  /** @internal The client has gone. */
  left(): void {
    this.isOpen = false;
    clearInterval(this.#heartbeat);
  }

  /** @internal A frame of the client has arrived. */
  arrived(text: string): void {
    if (!this.isOpen) return;
    const frame = JSON.parse(text) as Request;
    this.received.push(frame);
    if (this.#server.onFrame?.(frame, this) !== false) this.answer(frame);
  }

  /** What the server does by default; for scripts that only wanted to wait or to look. */
  answer(frame: Frame): void {
    const request = frame as Request;
    const { channel = '', messageId } = request;
    const { subscriptions } = this.session;
    const ack = (op: string, fields: object) => this.send({ type: 'ack', op, messageId, ...fields });
    if (request.type === 'subscribe') {
      const { ack: wantsAcks, since, last } = request;
      const of = this.#server.channel(channel);
      if (!of.isPersistent) {
        subscriptions.set(channel, { acked: undefined });
        const wish = since || last !== undefined ? { recovered: false, replayed: 0 } : {};
        ack('subscribe', { channel, persistent: false, ...wish });
        return;
      }
      const { epoch, seq } = of;
      const oldest = (of.messages[0]?.seq ?? seq + 1) - 1;
      const kept = subscriptions.get(channel)?.acked;
      const recovered = !since || of.locate(since);
      const start = since
        ? recovered
          ? since.seq
          : oldest
        : last !== undefined
          ? Math.max(seq - last, oldest)
          : wantsAcks && kept
            ? kept.seq
            : seq;
      const place = since && recovered ? since : { epoch, seq: start };
      subscriptions.set(channel, { acked: wantsAcks ? place : undefined });
      ack('subscribe', { channel, persistent: true, epoch, seq, recovered, replayed: seq - start });
      this.#replay(of, start);
    } else if (request.type === 'unsubscribe') {
      if (subscriptions.delete(channel)) ack('unsubscribe', { channel });
      else this.refuse(frame, 'not_subscribed');
    } else if (request.type === 'broadcast') {
      const taken = this.#server.publish(request.channel ?? null, request.data, {
        ...(messageId !== undefined && { messageId }),
      });
      const { seq, epoch, duplicate } = taken;
      ack('broadcast', { messageId: taken.messageId, channel: request.channel, seq, epoch, duplicate });
    } else if (request.type === 'ack') {
      const acked = subscriptions.get(channel)?.acked;
      if (acked && request.seq! > acked.seq)
        subscriptions.set(channel, { acked: { epoch: `${request.epoch}`, seq: request.seq! } });
    } else if (request.type === 'auth') {
      const { expiresIn } = this.#server;
      ack('auth', expiresIn ? { expiresAt: Date.now() + expiresIn } : {});
    }
  }

  /** Answer a request with an error. */
  refuse(frame: Frame, code: string, fields: object = {}): void {
    const { messageId, channel } = frame;
    this.send({
      type: 'error',
      code,
      message: `The fake server says ${code}.`,
      messageId,
      channel,
      ...fields,
    });
  }

  /** @internal */
  deliver(message: Stored): void {
    if (message.channel === undefined || this.session?.subscriptions.has(message.channel))
      this.send({ type: 'message', ...message });
  }

  #replay(of: Channel, start: number): void {
    for (const one of of.messages) if (one.seq! > start) this.send({ type: 'message', ...one });
  }

  #offered(prefix: string): string | undefined {
    return this.protocols.find((one) => one.startsWith(prefix))?.slice(prefix.length);
  }
}
