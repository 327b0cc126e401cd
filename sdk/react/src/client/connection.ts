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
import type { Ack, Answer, ConnectAck, Link, ServerFrame } from './wire.js';

/** A connection that lived so long was a good one: pauses begin anew, ms. */
const STABLE = 10_000;
/** How long a probed connection may be silent, ms. */
const PROBE = 5_000;

export interface Hooks {
  /** `error`: what is wrong, if that is news. */
  status(status: Status, error?: BroadcastError): void;
  opened(ack: ConnectAck): void;
  /** The connection that was open is not any more. */
  lost(code: number): void;
  received(frame: ServerFrame): void;
}

export const createConnection = (url: string, options: ClientOptions, nextId: () => string, hooks: Hooks) => {
  const { getToken, connectTimeout = 10_000 } = options;
  const { min, max, attempts = Infinity } = options.reconnect ?? {};
  const session = createSession(url, options.storage === 'sessionStorage');

  /** The present try, until it has ended. Whatever belongs to an older one is stale. */
  let current: AbortController | undefined;
  let socket: WebSocket | undefined;
  let isOpen = false;
  let trying: Status = 'connecting';
  /** Makes the pauses grow. */
  let tries = 0;
  /** Tries in a row that never opened. */
  let unopened = 0;
  /** The present token was asked for because the one before was rejected. */
  let isFresh = false;
  let heartbeat = 0;
  let openedAt = 0;
  let seenAt = 0;
  /** The server does not want to see us before. */
  let notBefore = 0;
  /** For the next try, or the end of the present one. */
  let timer: Timer;
  let watchTimer: Timer;
  const answers = new Map<string, Answer>();

  const link: Link = {
    isOpen: () => isOpen,

    sendText(json, messageId, answer) {
      // What is sent while it closes is lost, and browsers complain of it.
      if (!isOpen || socket!.readyState !== 1) return;
      socket!.send(json);
      if (answer) answers.set(messageId!, answer);
    },

    send: (frame) => link.sendText(JSON.stringify(frame)),

    request(frame, answer) {
      const messageId = nextId();
      link.sendText(JSON.stringify({ ...frame, messageId }), messageId, answer);
    },
  };

  const token = createToken(getToken, link);

  /** Let go of the present try. Its socket's events are stale from here on. */
  const discard = (code = 0) => {
    const wasOpen = isOpen;
    isOpen = false;
    clearTimeout(timer);
    clearTimeout(watchTimer);
    token.stop();
    answers.clear();
    current?.abort();
    current = undefined;
    socket?.close();
    socket = undefined;
    if (wasOpen) hooks.lost(code);
    return wasOpen;
  };

  const finish = (error?: BroadcastError) => {
    discard();
    listen('remove');
    hooks.status('closed', error);
  };

  const open = async () => {
    clearTimeout(timer);
    timer = setTimeout(end, connectTimeout);
    const attempt = new AbortController();
    const { signal } = attempt;
    current = attempt;
    try {
      const given = await token.get(signal);
      if (signal.aborted) return;
      const protocols = ['bcast.v1'];
      if (given) protocols.push(`bearer.${given}`);
      if (session.id) protocols.push(`session.${session.id}`);
      socket = new (options.WebSocket ?? WebSocket)(url, protocols);
      socket.onmessage = ({ data }) => current === attempt && receive(data);
      socket.onclose = ({ code, reason }) => current === attempt && end(code, reason);
      // A close always follows; `ws` of Node wants to have somebody listening.
      socket.onerror = () => {};
    } catch (cause) {
      if (signal.aborted) return;
      hooks.status(trying, new BroadcastError('connect_failed', `${cause}`, { cause }));
      end();
    }
  };

  const receive = (text: string) => {
    seenAt = now();
    let frame: ServerFrame;
    try {
      frame = JSON.parse(text) ?? {};
    } catch {
      return;
    }
    const { type, messageId, op } = frame as Ack;
    const answer = answers.get(messageId!);
    if (frame.type === 'ping') link.send({ type: 'pong' });
    else if (op === 'connect') begin(frame as ConnectAck);
    else if (answer && (type as string) !== 'message') {
      answers.delete(messageId!);
      answer(frame as Ack);
    } else if (isOpen) hooks.received(frame);
  };

  const begin = (ack: ConnectAck) => {
    clearTimeout(timer);
    isOpen = true;
    trying = 'reconnecting';
    unopened = 0;
    openedAt = now();
    heartbeat = ack.heartbeat;
    session.set(ack.session);
    token.plan(ack.expiresAt! - ack.timestamp, current!.signal);
    watch();
    hooks.opened(ack);
  };

  /** The present try or connection has ended: what now? */
  const end = (code = 1006, reason = '') => {
    const wasOpen = discard(code);
    let error: BroadcastError | undefined;
    let wait = 0;
    if (code === 4009) session.set(null);
    if (wasOpen && now() - openedAt >= STABLE) {
      tries = 0;
      isFresh = false;
    }
    if (!wasOpen && (++unopened === 3 || unopened >= attempts))
      error = new BroadcastError(
        'connect_failed',
        `Cannot connect to ${url}: server down, Origin not in [cors] origins, wrong path, or a proxy without upgrade?`,
      );
    if ((code === 4500 || code === 4501) && getToken && !isFresh) {
      isFresh = true;
      token.need = 'rejected';
    } else if (code >= 4500 && code < 5000)
      return finish(
        new BroadcastError(code < 4502 ? 'unauthorized' : 'forbidden', reason || `Closed with ${code}`),
      );
    else {
      try {
        wait = +JSON.parse(reason).retryAfter || 0;
      } catch {}
      notBefore = now() + wait;
      wait = Math.max(wait, backoff(tries++, min, max));
    }
    if (unopened >= attempts) finish(error);
    else {
      timer = setTimeout(open, wait);
      hooks.status(trying, error);
    }
  };

  /** A server that says nothing for two heartbeats is not there. */
  const watch = () => {
    const left = seenAt + 2 * heartbeat - now();
    clearTimeout(watchTimer);
    if (left > 0) watchTimer = setTimeout(watch, left);
    else end();
  };

  /** The world has changed: is the connection still good, can there be one? */
  const probe = () => {
    if (isHidden()) return;
    if (isOpen) {
      // The cheapest request: it is always answered, and changes nothing.
      link.request({ type: 'unsubscribe', channel: nextId() }, () => {});
      seenAt = now() + PROBE - 2 * heartbeat;
      watch();
    } else if (!current && now() >= notBefore) {
      tries--;
      void open();
    }
  };

  const listen = (verb: 'add' | 'remove') => {
    for (const type of ['online', 'pageshow', 'visibilitychange'])
      (type < 'v' ? globalThis : globalThis.document)?.[`${verb}EventListener`]?.(type, probe);
  };

  return {
    link,

    /** Connect now, whatever there is. */
    start() {
      discard();
      listen('add');
      token.need = 'connect';
      tries = unopened = 0;
      isFresh = false;
      hooks.status(trying);
      void open();
    },

    /** End it for good. */
    finish,
  };
};
