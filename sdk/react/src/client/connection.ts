/**
 * One socket after another to the same server: tries and pauses, the heartbeat, session and token.
 *
 * Knows nothing of channels and messages: it hands over frames, and says when a connection begins and ends.
 */
import type { ClientOptions, Status } from '../types.js';
import { BroadcastError } from './errors.js';
import { createSession } from './storage.js';
import { backoff, isHidden, now, type Timer } from './timing.js';
import { createToken } from './token.js';
import type { Ack, ClientFrame, ConnectAck, ErrorFrame, Link, ServerFrame } from './wire.js';

/** A connection that lived so long was a good one: pauses begin anew, ms. */
const STABLE = 10_000;
/** How long a probed connection may be silent, ms. */
const PROBE = 5_000;
/** More bytes than this in the socket's own queue are too many. */
const CROWDED = 1 << 20;

export interface Hooks {
  status(status: Status, error?: BroadcastError): void;
  /** Something is wrong, and it goes on. */
  trouble(error: BroadcastError): void;
  opened(ack: ConnectAck): void;
  /** The connection that was open is not any more. */
  lost(code: number): void;
  received(frame: ServerFrame): void;
  /** The server has taken a new token. */
  renewed(): void;
}

const connectFailed = (url: string) =>
  new BroadcastError(
    'connect_failed',
    `No connection to ${url} could be opened. Usual causes: the server is down; this page's Origin is not in ` +
      '`[cors] origins`; the path is wrong; a proxy between does not pass on the WebSocket upgrade.',
  );

export const createConnection = (url: string, options: ClientOptions, nextId: () => string, hooks: Hooks) => {
  const { getToken, connectTimeout = 10_000, debug } = options;
  const { min, max, attempts = Infinity } = options.reconnect ?? {};
  const session = createSession(url, options.storage === 'sessionStorage');

  /** The present try, until it has ended. Whatever belongs to an older one is stale. */
  let current: AbortController | undefined;
  let socket: WebSocket | undefined;
  let isOpen = false;
  let wasOpen = false;
  /** Makes the pauses grow. */
  let tries = 0;
  /** Tries since the last connection. */
  let retries = 0;
  /** Tries in a row that never opened. */
  let unopened = 0;
  /** The present token was asked for because the one before was rejected. */
  let isFresh = false;
  let heartbeat = 0;
  let openedAt = 0;
  let seenAt = 0;
  /** The server does not want to see us before. */
  let notBefore = 0;
  let retryTimer: Timer;
  let tryTimer: Timer;
  let watchTimer: Timer;
  let probeTimer: Timer;
  const answers = new Map<string, (frame: Ack | ErrorFrame) => void>();

  const log = (way: string, frame: unknown) =>
    console.debug(
      way,
      JSON.stringify(frame, (key, value) => (key === 'token' || key === 'session' ? '...' : value)),
    );

  const send = (frame: ClientFrame) => {
    if (!isOpen || socket!.readyState !== 1) return false;
    if (debug) log('>', typeof frame === 'string' ? JSON.parse(frame) : frame);
    socket!.send(typeof frame === 'string' ? frame : JSON.stringify(frame));
    return true;
  };

  const link: Link = {
    isOpen: () => isOpen,
    isCrowded: () => socket!.bufferedAmount > CROWDED,
    send,
    request(frame, answer, messageId = nextId()) {
      if (send(typeof frame === 'string' ? frame : { ...frame, messageId })) answers.set(messageId, answer);
    },
  };

  const token = createToken(getToken, link, () => hooks.renewed());

  /** Let go of the present try. Its socket's events are stale from here on. */
  const discard = (code = 0) => {
    const { was, old } = { was: isOpen, old: socket };
    for (const timer of [retryTimer, tryTimer, watchTimer, probeTimer]) clearTimeout(timer);
    retryTimer = socket = undefined;
    token.stop();
    current?.abort();
    current = undefined;
    isOpen = false;
    answers.clear();
    old?.close();
    if (was) hooks.lost(code);
    return was;
  };

  const finish = (error?: BroadcastError) => {
    discard();
    listen('remove');
    hooks.status('closed', error);
  };

  const open = async () => {
    clearTimeout(retryTimer);
    retryTimer = undefined;
    const attempt = new AbortController();
    const { signal } = attempt;
    current = attempt;
    tryTimer = setTimeout(end, connectTimeout);
    let given: string | null;
    try {
      given = await token.get(signal);
    } catch (cause) {
      if (signal.aborted) return;
      hooks.trouble(new BroadcastError('unauthorized', '`getToken` failed.', { cause }));
      return end();
    }
    if (signal.aborted) return;
    const protocols = ['bcast.v1'];
    if (given) protocols.push(`bearer.${given}`);
    if (session.get()) protocols.push(`session.${session.get()}`);
    try {
      const ws = new (options.WebSocket ?? WebSocket)(url, protocols);
      socket = ws;
      ws.onmessage = (event) => current === attempt && receive(event.data as string);
      ws.onclose = (event) => current === attempt && end(event.code, event.reason);
      // A close always follows; `ws` of Node wants to have somebody listening.
      ws.onerror = () => {};
    } catch (cause) {
      // The URL is none, or there is no WebSocket here: no try will ever be better.
      finish(new BroadcastError('connect_failed', `${cause}`, { cause }));
    }
  };

  const begun = (ack: ConnectAck) => {
    clearTimeout(tryTimer);
    isOpen = wasOpen = true;
    retries = unopened = 0;
    openedAt = now();
    heartbeat = ack.heartbeat;
    session.set(ack.session);
    token.plan(ack.expiresAt! - ack.timestamp, current!.signal);
    watch();
    hooks.opened(ack);
  };

  const receive = (text: string) => {
    seenAt = now();
    let frame: ServerFrame;
    try {
      frame = JSON.parse(text) ?? {};
    } catch {
      return;
    }
    if (debug) log('<', frame);
    if (frame.type === 'ping') return send({ type: 'pong' });
    if (!isOpen) return frame.type === 'ack' && frame.op === 'connect' && begun(frame as ConnectAck);
    if (frame.type === 'ack' || frame.type === 'error') {
      const { messageId } = frame as Ack;
      const answer = answers.get(messageId!);
      if (answer) {
        answers.delete(messageId!);
        return answer(frame as Ack | ErrorFrame);
      }
    }
    hooks.received(frame);
  };

  /** The present try or connection has ended: what now? */
  const end = (code = 1006, reason = ''): void => {
    const opened = discard(code);
    if (code === 4009) session.set(null);
    if (opened && now() - openedAt >= STABLE) {
      tries = 0;
      isFresh = false;
    }
    if (code === 4500 || code === 4501) {
      if (getToken && !isFresh) {
        isFresh = true;
        token.reject();
        hooks.status(wasOpen ? 'reconnecting' : 'connecting');
        void open();
        return;
      }
    }
    if (code >= 4500 && code < 5000) {
      const what = reason || `The server has closed the connection with ${code}.`;
      finish(new BroadcastError(code < 4502 ? 'unauthorized' : 'forbidden', what));
      return;
    }
    if (!opened && ++unopened === 3) hooks.trouble(connectFailed(url));
    if (retries++ >= attempts) {
      finish(connectFailed(url));
      return;
    }
    let wait = 0;
    try {
      wait = +JSON.parse(reason).retryAfter || 0;
    } catch {}
    notBefore = now() + wait;
    retryTimer = setTimeout(open, Math.max(wait, backoff(tries++, min, max)));
    hooks.status(wasOpen ? 'reconnecting' : 'connecting');
  };

  /** A server that says nothing for two heartbeats is not there. */
  const watch = () => {
    const left = seenAt + 2 * heartbeat - now();
    if (left > 0) watchTimer = setTimeout(watch, left);
    else end();
  };

  /** The world has changed: is the connection still good, can there be one? */
  const probe = () => {
    if (isHidden()) return;
    const asked = now();
    if (isOpen) {
      // The cheapest request: it is always answered, and changes nothing.
      link.request({ type: 'unsubscribe', channel: nextId() }, () => {});
      clearTimeout(probeTimer);
      probeTimer = setTimeout(() => seenAt < asked && end(), PROBE);
    } else if (retryTimer && asked >= notBefore) {
      tries--;
      void open();
    }
  };

  const listen = (verb: 'add' | 'remove') => {
    for (const [target, type] of [
      [globalThis, 'online'],
      [globalThis, 'pageshow'],
      [globalThis.document, 'visibilitychange'],
    ] as const)
      target?.[`${verb}EventListener`]?.(type, probe);
  };

  const start = () => {
    discard();
    listen('add');
    token.forget();
    tries = retries = unopened = 0;
    isFresh = false;
    hooks.status(wasOpen ? 'reconnecting' : 'connecting');
    void open();
  };

  return {
    link,
    /** Connect now, whatever there is. */
    start,
    /** End it for good. */
    finish,
  };
};
