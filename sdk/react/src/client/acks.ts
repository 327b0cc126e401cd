/** Acks of what was handled, in batches. */
import type { Position } from '../types.js';
import { isHidden, now, type Timer } from './timing.js';
import type { Link } from './wire.js';

/** An ack waits no longer, ms. */
const LONGEST = 200;
/** Nor for more messages than this. */
const MOST = 32;

export const createAcks = (link: Link) => {
  /** The highest of each channel and epoch, for an ack speaks for its own epoch alone. */
  const due = new Map<string, Position & { channel: string }>();
  let count = 0;
  let flushedAt = -LONGEST;
  let timer: Timer;

  const flush = () => {
    clearTimeout(timer);
    timer = undefined;
    count = 0;
    if (due.size) flushedAt = now();
    for (const position of due.values()) link.send({ type: 'ack', ...position });
    due.clear();
  };

  return {
    flush,

    /**
     * Everything up to here is handled. The first one of a while leaves at once, so it does not need a timer,
     * which a hidden page gets late; there nothing waits at all.
     */
    add(channel: string, { epoch, seq }: Position) {
      const key = `${channel} ${epoch}`;
      due.set(key, { channel, epoch, seq: Math.max(seq, due.get(key)?.seq ?? 0) });
      const wait = flushedAt + LONGEST - now();
      if (++count >= MOST || wait <= 0 || isHidden()) flush();
      else timer ??= setTimeout(flush, wait);
    },
  };
};

export type Acks = ReturnType<typeof createAcks>;
