/** The frames of `bcast.v1`, as far as this client reads and writes them (docs/PROTOCOL.md). */
import type { Message, Position, ServerCode } from '../types.js';

/** A subscription that the server has restored. It goes on after `epoch`, `seq`. */
export interface Restored extends Partial<Position> {
  channel: string;
  recovered: boolean;
}

export interface Limits {
  rate: number;
  burst: number;
  maxMessageBytes: number;
  maxSubscriptions: number;
  dedupTtl: number;
}

/** The first frame of a connection. */
export interface ConnectAck {
  type: 'ack';
  op: 'connect';
  clientId: string;
  session: string;
  resumed: boolean;
  expiresAt?: number;
  heartbeat: number;
  subscriptions: Restored[];
  limits: Limits;
  timestamp: number;
}

export interface SubscribeAck {
  epoch?: string;
  seq?: number;
  recovered?: boolean;
  replayed?: number;
}

/** The answer to a request, with the fields of all operations. */
export interface Ack extends SubscribeAck {
  type: 'ack';
  op: string;
  messageId?: string;
  channel?: string;
  duplicate?: boolean;
  expiresAt?: number;
  timestamp: number;
}

export interface ErrorFrame extends Partial<Position> {
  type: 'error';
  code: ServerCode;
  message: string;
  messageId?: string;
  channel?: string;
  retryAfter?: number;
}

export type MessageFrame = { type: 'message' } & Message;

export type ServerFrame = MessageFrame | ConnectAck | Ack | ErrorFrame | { type: 'ping' };

export type ClientFrame = { type: string; [field: string]: unknown };

/** How the parts of a client reach the connection. */
export interface Link {
  isOpen(): boolean;
  /** Nothing happens where there is no connection. */
  send(frame: ClientFrame): void;
  /** Send a request; `answer` hears its ack or error, and nothing when the connection is lost before. */
  request(frame: ClientFrame, answer: Answer): void;
  /** The same, of JSON that is ready and has this `messageId`. */
  sendText(json: string, messageId?: string, answer?: Answer): void;
}

export type Answer = (frame: Ack | ErrorFrame) => void;
