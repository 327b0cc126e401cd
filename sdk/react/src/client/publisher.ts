/**
 * What is published: of each channel one message at a time is on its way, the later ones wait behind it.
 *
 * So their order holds whatever is refused, lost or sent again. An entry leaves its lane when it is settled.
 */
import type { ErrorCode, Published, PublishOptions, QueueOptions } from '../types.js';
import { BroadcastError } from './errors.js';
import { backoff, LONGEST_TIMER, now, type Timer } from './timing.js';
import type { Ack, ErrorFrame, Limits, Link } from './wire.js';

interface Entry {
  readonly id: string;
  readonly json: string;
  /** The caller waits until then; for its first try until `ttl` is over. */
  readonly until: number;
  readonly queuedUntil: number;
  /** When the first try left that may have arrived; and what that was before the present try. */
  first: number | undefined;
  before: number | undefined;
  tries: number;
  /** It has left over the present connection, and there is no answer yet. */
  isSent: boolean;
  timer: Timer;
  /** Absent for `send`: nobody waits for it. */
  settle?: (result: Published | BroadcastError) => void;
}

interface Lane {
  readonly channel: string | null;
  readonly entries: Entry[];
  notBefore: number;
  timer: Timer;
}

const MESSAGES: Partial<Record<ErrorCode, string>> = {
  timeout: 'No answer in time; if the message had left, it may have been taken.',
  aborted: 'Given up by its signal.',
  queue_full: 'Not connected, and the queue has no room.',
  closed: 'The client is closed.',
  unknown: 'The message may have been taken, and it is too late to send it again.',
  too_large: "The message is larger than the server's `max_message_bytes`.",
  bad_data: 'The data is no JSON value.',
  bad_message: 'An id has 1 to 128 printable ASCII characters.',
};

const failure = (code: ErrorCode, channel: string | null) =>
  new BroadcastError(code, MESSAGES[code]!, { channel: channel ?? undefined });

/** The frame of a message; undefined where the data is no JSON. */
const encode = (channel: string | null, data: unknown, messageId: string) => {
  try {
    const json = JSON.stringify(data);
    const head = JSON.stringify({ type: 'broadcast', channel: channel ?? undefined, messageId });
    return json && `${head.slice(0, -1)},"data":${json}}`;
  } catch {
    return undefined;
  }
};

export const createPublisher = (link: Link, nextId: () => string, queue: QueueOptions | 'reject' = {}) => {
  const { max = 100, ttl = 60_000 } = queue === 'reject' ? { max: 0 } : queue;
  const lanes = new Map<string | null, Lane>();
  let limits: Limits | undefined;
  /** The server has asked for a pause of everything. */
  let notBefore = 0;
  let isClosed = false;

  const settle = (lane: Lane, entry: Entry, result: Published | BroadcastError) => {
    const index = lane.entries.indexOf(entry);
    if (index < 0) return;
    lane.entries.splice(index, 1);
    clearTimeout(entry.timer);
    entry.settle?.(result);
    advance(lane);
  };

  const fail = (lane: Lane, entry: Entry, code: ErrorCode) =>
    settle(lane, entry, failure(code, lane.channel));

  /** Until when the server surely knows the id of a try that left at `first`; a tenth is for the way there. */
  const known = (first: number) => first + (limits ? limits.dedupTtl * 0.9 : 0);

  /** Wait for what makes it too late: for the caller, for a first try or for another one. */
  const guard = (lane: Lane, entry: Entry) => {
    clearTimeout(entry.timer);
    const { isSent, first, tries, until, queuedUntil } = entry;
    const again = isSent || first === undefined ? Infinity : known(first);
    const left = Math.min(until, again, tries ? Infinity : queuedUntil) - now();
    if (left > 0) entry.timer = setTimeout(guard, Math.min(left, LONGEST_TIMER), lane, entry);
    else fail(lane, entry, again <= now() ? 'unknown' : 'timeout');
  };

  const isTooLarge = (json: string) => {
    const most = limits?.maxMessageBytes;
    return most && json.length * 3 > most && new TextEncoder().encode(json).length > most;
  };

  /** Send the first of a lane, if it may leave now. */
  const advance = (lane: Lane): void => {
    clearTimeout(lane.timer);
    const entry = lane.entries[0];
    if (!entry) lanes.delete(lane.channel);
    if (!entry || entry.isSent || !link.isOpen()) return;
    const wait = Math.max(lane.notBefore, notBefore) - now();
    if (wait > 0) lane.timer = setTimeout(advance, wait, lane);
    else if (isTooLarge(entry.json)) fail(lane, entry, 'too_large');
    else if (entry.settle) {
      entry.before = entry.first;
      entry.first ??= now();
      entry.tries++;
      entry.isSent = true;
      guard(lane, entry);
      link.request(entry.json, (frame) => answered(lane, entry, frame), entry.id);
    } else {
      link.send(entry.json);
      settle(lane, entry, { messageId: entry.id });
    }
  };

  const answered = (lane: Lane, entry: Entry, frame: Ack | ErrorFrame) => {
    if (!lane.entries.includes(entry)) return;
    if (frame.type === 'ack') {
      const { messageId = entry.id, seq, epoch, duplicate } = frame;
      return settle(lane, entry, {
        messageId,
        ...(epoch !== undefined && seq !== undefined && { seq, epoch }),
        ...(duplicate && { duplicate }),
      });
    }
    const { code, retryAfter } = frame;
    if (code !== 'rate_limited' && code !== 'unavailable')
      return settle(lane, entry, new BroadcastError(code, frame.message, frame));
    lane.notBefore = now() + (retryAfter ?? backoff(entry.tries));
    if (code === 'rate_limited') {
      notBefore = lane.notBefore;
      // This try was surely not taken.
      entry.first = entry.before;
    }
    entry.isSent = false;
    guard(lane, entry);
    advance(lane);
  };

  const waiting = () => [...lanes.values()].reduce((sum, { entries }) => sum + entries.length, 0);

  const add = (channel: string | null, entry: Entry) => {
    const lane = lanes.get(channel) ?? { channel, entries: [], notBefore: 0, timer: undefined };
    lanes.set(channel, lane);
    lane.entries.push(entry);
    guard(lane, entry);
    advance(lane);
    return lane;
  };

  const makeEntry = (id: string, json: string, timeout: number): Entry => {
    const [until, queuedUntil] = [now() + timeout, now() + ttl];
    const nothing = { first: undefined, before: undefined, timer: undefined };
    return { id, json, until, queuedUntil, tries: 0, isSent: false, ...nothing };
  };

  return {
    publish(
      channel: string | null,
      data: unknown,
      { timeout = 10_000, signal, id = nextId() }: PublishOptions = {},
    ) {
      return new Promise<Published>((resolve, reject) => {
        const json = encode(channel, data, id);
        const code = isClosed
          ? 'closed'
          : signal?.aborted
            ? 'aborted'
            : json === undefined
              ? 'bad_data'
              : !/^[ -~]{1,128}$/.test(id)
                ? 'bad_message'
                : !link.isOpen() && waiting() >= max && 'queue_full';
        if (code) return reject(failure(code, channel));
        const entry = makeEntry(id, json!, timeout);
        const abort = () => fail(lane, entry, 'aborted');
        entry.settle = (result) => {
          signal?.removeEventListener('abort', abort);
          if (result instanceof BroadcastError) reject(result);
          else resolve(result);
        };
        signal?.addEventListener('abort', abort);
        const lane = add(channel, entry);
      });
    },

    send(channel: string | null, data: unknown) {
      const id = nextId();
      const json = encode(channel, data, id);
      if (isClosed || !json || isTooLarge(json)) return false;
      if (link.isOpen() && !lanes.has(channel) && now() >= notBefore)
        return !link.isCrowded() && link.send(json);
      if (waiting() >= max) return false;
      add(channel, makeEntry(id, json, Infinity));
      return true;
    },

    /** There is a connection: what waits goes on, in order. */
    up(given: Limits) {
      limits = given;
      for (const lane of [...lanes.values()]) {
        for (const entry of [...lane.entries]) guard(lane, entry);
        advance(lane);
      }
    },

    /** What had no answer waits to be sent again, but for what was too big. */
    down(code: number) {
      notBefore = 0;
      let largest: [Lane, Entry] | undefined;
      for (const lane of [...lanes.values()]) {
        lane.notBefore = 0;
        const entry = lane.entries[0];
        if (!entry?.isSent) continue;
        entry.isSent = false;
        guard(lane, entry);
        if (!largest || entry.json.length > largest[1].json.length) largest = [lane, entry];
      }
      if (code === 1009 && largest) fail(...largest, 'too_large');
    },

    /** Settle everything; `open` takes messages again. */
    close() {
      isClosed = true;
      for (const lane of [...lanes.values()])
        for (const entry of [...lane.entries]) fail(lane, entry, 'closed');
    },

    open() {
      isClosed = false;
    },
  };
};
