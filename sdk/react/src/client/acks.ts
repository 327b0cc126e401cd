/** Acks of what was handled, in batches. */
import type { Position } from '../types.js';
import { isHidden, now, type Timer } from './timing.js';
import type { Link } from './wire.js';

/** An ack waits no longer, ms. */
const LONGEST = 200;
/** Nor for more messages than this. */
const MOST = 32;

export const createAcks = (link: Link) => {
  const due = new Map<string, Position>();
  let count = 0;
  let flushedAt = -LONGEST;
  let timer: Timer;

  const flush = () => {
    clearTimeout(timer);
    timer = undefined;
    count = 0;
    if (due.size) flushedAt = now();
    for (const [channel, position] of due) link.send({ type: 'ack', channel, ...position });
    due.clear();
  };

  return {
    flush,

    /**
     * Everything up to here is handled. The first one of a while leaves at once, so it does not need a timer,
     * which a hidden page gets late; there nothing waits at all.
     */
    add(channel: string, { epoch, seq }: Position) {
      const old = due.get(channel);
      // An ack speaks for its own epoch alone.
      if (old && old.epoch !== epoch) flush();
      if (!(old && old.epoch === epoch && old.seq > seq)) due.set(channel, { epoch, seq });
      const since = now() - flushedAt;
      if (++count >= MOST || since >= LONGEST || isHidden()) flush();
      else timer ??= setTimeout(flush, LONGEST - since);
    },

    /** The connection has gone, and with it what was to be told. */
    clear() {
      due.clear();
      flush();
    },
  };
};

export type Acks = ReturnType<typeof createAcks>;
