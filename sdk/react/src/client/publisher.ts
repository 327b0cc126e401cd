/**
 * What is published: of each channel one message at a time is on its way, the later ones wait behind it.
 *
 * So their order holds whatever is refused, lost or sent again. An entry is here until it is settled.
 */
import type { ErrorCode, Published, PublishOptions, QueueOptions } from '../types.js';
import { BroadcastError } from './errors.js';
import { after, backoff, now, type Timer } from './timing.js';
import type { Ack, ErrorFrame, Limits, Link } from './wire.js';

interface Entry {
  readonly channel: string | null;
  readonly id: string;
  readonly json: string;
  /** How long the caller waits. */
  readonly until: number;
  /** When the first try left that may have arrived; and what that was before the present try. */
  first?: number | undefined;
  before?: number | undefined;
  /** It has left over the present connection, and there is no answer yet. */
  isSent?: boolean;
  timer?: Timer;
  /** Absent for `send`: nobody waits for it. */
  settle?: (result: Published | BroadcastError) => void;
}

const failure = (code: ErrorCode, channel: string | null) =>
  new BroadcastError(code, `Not published: ${code}`, { channel });

/** The frame of a message; undefined where the data is no JSON. */
const encode = (channel: string | null, data: unknown, messageId: string) => {
  try {
    const frame = { type: 'broadcast', channel: channel ?? undefined, messageId, data };
    return JSON.stringify(data) && JSON.stringify(frame);
  } catch {
    return undefined;
  }
};

export const createPublisher = (
  link: Link,
  nextId: () => string,
  queue: QueueOptions | 'reject' = {},
  isClosed: () => boolean,
) => {
  const { max = 100, ttl = 60_000 } = queue === 'reject' ? { max: 0 } : queue;
  /** In the order in which they came. */
  const entries = new Set<Entry>();
  let limits: Limits | undefined;
  /** The server has asked for a pause. */
  let notBefore = 0;
  let timer: Timer;

  const settle = (entry: Entry, result: Published | BroadcastError) => {
    if (!entries.delete(entry)) return;
    clearTimeout(entry.timer);
    entry.settle?.(result);
    advance();
  };

  const fail = (entry: Entry, code: ErrorCode) => settle(entry, failure(code, entry.channel));

  /** It fails then, unless something else happens. */
  const failAt = (entry: Entry, time: number, code: ErrorCode) => {
    clearTimeout(entry.timer);
    entry.timer = after(time - now(), fail, entry, code);
  };

  /** It waits to be sent again, while the server surely knows its id; a tenth of that is for the way there. */
  const takeBack = (entry: Entry) => {
    entry.isSent = false;
    const known = entry.first! + limits!.dedupTtl * 0.9;
    if (known < entry.until) failAt(entry, known, 'unknown');
  };

  const isTooLarge = (json: string) => {
    const most = limits?.maxMessageBytes;
    return most && new TextEncoder().encode(json).length > most;
  };

  /** Send the first of each channel, if it may leave now. */
  const advance = () => {
    clearTimeout(timer);
    if (!link.isOpen()) return;
    if (notBefore > now()) {
      timer = setTimeout(advance, notBefore - now());
      return;
    }
    const busy = new Set<string | null>();
    for (const entry of entries) {
      const { channel, json, id, isSent, until } = entry;
      if (busy.has(channel)) continue;
      if (!entry.settle) {
        link.sendText(json);
        clearTimeout(entry.timer);
        entries.delete(entry);
      } else if (isTooLarge(json)) {
        fail(entry, 'too_large');
        return;
      } else {
        busy.add(channel);
        if (isSent) continue;
        entry.before = entry.first;
        entry.first ??= now();
        entry.isSent = true;
        failAt(entry, until, 'timeout');
        link.sendText(json, id, (frame) => answered(entry, frame));
      }
    }
  };

  const answered = (entry: Entry, frame: Ack | ErrorFrame) => {
    if (!entries.has(entry)) return;
    if (frame.type === 'ack') {
      const { seq, epoch, duplicate } = frame;
      settle(entry, { messageId: entry.id, seq, epoch, duplicate });
      return;
    }
    const { code, message, retryAfter } = frame;
    if (code !== 'rate_limited' && code !== 'unavailable') {
      settle(entry, new BroadcastError(code, message, frame));
      return;
    }
    notBefore = now() + (retryAfter ?? backoff(3));
    // This try was surely not taken.
    if (code === 'rate_limited') entry.first = entry.before;
    takeBack(entry);
    advance();
  };

  const add = (entry: Entry) => {
    entries.add(entry);
    failAt(entry, Math.min(entry.until, now() + ttl), 'timeout');
    advance();
  };

  const isFull = () => entries.size >= max;

  return {
    publish(
      channel: string | null,
      data: unknown,
      { timeout = 10_000, signal, id = nextId() }: PublishOptions = {},
    ) {
      return new Promise<Published>((resolve, reject) => {
        const json = encode(channel, data, id);
        const code = isClosed()
          ? 'closed'
          : signal?.aborted
            ? 'aborted'
            : !json
              ? 'bad_data'
              : !/^[ -~]{1,128}$/.test(id)
                ? 'bad_message'
                : !link.isOpen() && isFull() && 'queue_full';
        if (code) {
          reject(failure(code, channel));
          return;
        }
        const abort = () => fail(entry, 'aborted');
        const entry: Entry = {
          channel,
          id,
          json: json!,
          until: now() + timeout,
          settle(result) {
            signal?.removeEventListener('abort', abort);
            if (result instanceof BroadcastError) reject(result);
            else resolve(result);
          },
        };
        signal?.addEventListener('abort', abort);
        add(entry);
      });
    },

    send(channel: string | null, data: unknown) {
      const id = nextId();
      const json = encode(channel, data, id);
      if (isClosed() || !json || isTooLarge(json) || isFull()) return false;
      add({ channel, id, json, until: Infinity });
      return true;
    },

    /** There is a connection: what waits goes on, in order. */
    up(given: Limits) {
      limits = given;
      notBefore = 0;
      advance();
    },

    /** What had no answer waits to be sent again, unless the server says that it was too big. */
    down(code: number) {
      for (const entry of entries)
        if (entry.isSent) {
          if (code === 1009) fail(entry, 'too_large');
          else takeBack(entry);
        }
    },

    /** Settle everything. */
    close() {
      for (const entry of entries) fail(entry, 'closed');
    },
  };
};
