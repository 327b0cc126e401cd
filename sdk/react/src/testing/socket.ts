/** The client's side of a fake connection: as much of the browser's WebSocket as the client uses, and its events. */
import type { FakeConnection } from './connection.js';

type Handler = ((event: never) => void) | null;

/** What a socket finds at the other end. */
export interface Peer {
  accept(socket: FakeSocket): FakeConnection | undefined;
  /** Run this when what was sent has arrived. */
  later(task: () => void): void;
}

export class FakeSocket extends EventTarget {
  readonly url: string;
  readonly protocols: readonly string[];
  readyState = 0;
  bufferedAmount = 0;
  protocol = '';
  onopen: Handler = null;
  onmessage: Handler = null;
  onclose: Handler = null;
  onerror: Handler = null;
  readonly #peer: Peer;
  #connection: FakeConnection | undefined;

  constructor(peer: Peer, url: string, protocols: string | string[] = []) {
    super();
    this.url = `${url}`;
    this.protocols = [protocols].flat();
    this.#peer = peer;
    peer.later(() => {
      if (this.readyState !== 0) return;
      this.#connection = peer.accept(this);
    });
  }

  /** @internal The server has answered the handshake. */
  opened() {
    this.readyState = 1;
    this.protocol = 'bcast.v1';
    this.#emit('open', {});
  }

  /** @internal A frame has arrived. */
  arrived(data: string) {
    if (this.readyState === 1) this.#emit('message', { data });
  }

  /** @internal The connection has ended. */
  ended(code: number, reason: string) {
    if (this.readyState === 3) return;
    this.readyState = 3;
    this.#emit('close', { code, reason, wasClean: code !== 1006 });
  }

  send(data: string) {
    if (this.readyState === 0) throw new Error('InvalidStateError: still connecting');
    if (this.readyState === 1) this.#peer.later(() => this.#connection?.arrived(data));
  }

  close(code = 1005, reason = '') {
    if (this.readyState > 1) return;
    this.readyState = 2;
    this.#peer.later(() => {
      this.#connection?.left();
      this.ended(code, reason);
    });
  }

  #emit(type: 'open' | 'message' | 'close' | 'error', fields: object) {
    const event = Object.assign(new Event(type), fields);
    this[`on${type}`]?.(event as never);
    this.dispatchEvent(event);
  }
}
