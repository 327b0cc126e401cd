/**
 * One channel: how far it was heard and handled, and what the server is to be told of that.
 *
 * `place` is the position up to which messages were received, `done` the one up to which they were handled. What
 * listeners are told in order waits in `tasks` while the promise of a callback holds it back.
 */
import type { Message, Position, SubscribeOptions, SubscriptionStatus } from '../types.js';
import type { Acks } from './acks.js';
import { BroadcastError } from './errors.js';
import { createListener, type Listener } from './listener.js';
import { backoff, type Timer } from './timing.js';
import type { ErrorFrame, Link, Restored, SubscribeAck } from './wire.js';

/** How long the channel stays after its last listener, ms. */
const RELEASE = 500;
/** How long a restored channel waits for its first listener, ms. */
const UNASKED = 10_000;
/** A subscribe without an answer is sent again after this, ms. */
const ANSWER = 10_000;
/** So many tasks wait at most. What comes then is fetched later, or lost where the channel is not persistent. */
const MOST = 10_000;

export interface Surroundings {
  link: Link;
  acks: Acks;
  /** A message is new. */
  heard(message: Message): void;
  /** An error that no listener wants to hear. */
  failed(error: BroadcastError): void;
  /** The channel is not needed any more. */
  released(channel: string): void;
}

export const createTopic = (channel: string, { link, acks, heard, failed, released }: Surroundings) => {
  const listeners = new Set<Listener>();
  const tasks: (() => unknown)[] = [];
  let isBusy = false;
  let place: Position | undefined;
  let done: Position | undefined;
  /** The epochs of the line of numbers that `place` is on. */
  const epochs = new Set<string>();
  let status: SubscriptionStatus = 'idle';
  let error: BroadcastError | undefined;
  /** A subscribe is under way, and this is the present one. */
  let pending: object | undefined;
  /** The next subscribe asks for what comes after `place`, whatever listeners wish. */
  let isOwn = false;
  /** What came could not be taken: it is fetched once it can. */
  let isStale = false;
  /** The connection was lost since it was subscribed. */
  let isBroken = false;
  /** Messages were lost before this page had a place. */
  let isGone = false;
  /** The server waits for acks. */
  let isAcking = false;
  /** Counts subscribes: an ack of what came before would be taken for one of what comes after. */
  let run = 0;
  let tries = 0;
  let timer: Timer;
  let releaseTimer: Timer;

  const setStatus = (next: SubscriptionStatus, why?: BroadcastError) => {
    status = next;
    error = why;
    for (const one of [...listeners]) one.tellStatus(status, error);
  };

  // In order

  const enqueue = (task: () => unknown) => {
    tasks.push(task);
    work();
  };

  const work = () => {
    while (!isBusy && tasks.length) {
      isBusy = true;
      const waits = tasks.shift()!() as Promise<unknown> | undefined;
      if (waits)
        waits.then(() => {
          isBusy = false;
          work();
        });
      else isBusy = false;
    }
    if (isStale && !isBusy && listeners.size) {
      isStale = false;
      if (place) renew();
      else lose();
    }
  };

  const deliver = (message: Message, position?: Position, isNew?: boolean) => {
    const mine = run;
    const fresh = [...listeners].filter((one) => one.isFresh(position));
    if (fresh.length) heard(message);
    const waits = fresh.map((one) => one.call('onMessage', message)).filter(Boolean);
    const handled = () => {
      if (!position || mine !== run) return;
      if (isNew) done = position;
      if (isAcking) acks.add(channel, position);
    };
    return waits.length ? Promise.all(waits).then(handled) : handled();
  };

  /** Messages were or may have been missed: it goes on after `to`. */
  const lose = (to?: Position) => {
    const mine = run;
    const from = place;
    place = to;
    if (to) {
      epochs.clear();
      epochs.add(to.epoch);
    }
    enqueue(() => {
      if (to && mine === run) {
        done = to;
        // The server tells a loss again until it has this.
        if (isAcking) acks.add(channel, to);
      }
      for (const one of [...listeners]) one.miss(channel, from, to);
    });
  };

  // To the server

  /** Fetch what was missed after `place`. */
  const renew = () => {
    if (pending) return;
    isOwn = true;
    subscribe();
  };

  const subscribe = () => {
    clearTimeout(timer);
    if (!link.isOpen()) return;
    const asked = isOwn ? undefined : [...listeners].find((one) => one.isWaiting())?.options;
    const since = asked ? asked.since : place;
    isOwn = isStale = false;
    acks.flush();
    run++;
    isAcking = wantsAcks();
    const request = {};
    pending = request;
    if (status !== 'subscribing') setStatus('subscribing');
    link.request(
      { type: 'subscribe', channel, ack: isAcking || undefined, since, last: asked?.last },
      (answer) => {
        if (pending !== request) return;
        clearTimeout(timer);
        if (answer.type === 'ack') subscribed(answer, since, asked);
        else refused(answer);
      },
    );
    timer = setTimeout(subscribe, ANSWER);
  };

  const wantsAcks = () => [...listeners].some(({ options }) => options.ack !== false);

  /** Listeners wish something that the present subscription does not give. */
  const isUnsettled = () =>
    [...listeners].some((one) => one.isWaiting()) || (place && !isAcking && wantsAcks());

  /** `since` is what was asked for; `asked` whose wish that was, if it was not the place of all. */
  const subscribed = (ack: SubscribeAck, since?: Position, asked?: SubscribeOptions) => {
    const { epoch, seq = 0, replayed = 0, recovered } = ack;
    pending = undefined;
    tries = 0;
    // Another line of numbers: first see what has become of the place.
    if (asked && place && epoch !== undefined && !epochs.has(epoch)) return renew();

    const start = epoch === undefined ? undefined : { epoch, seq: seq - replayed };
    const isLost = !!since && !recovered;
    // The others would miss what is between.
    const skips = !!asked && !!place && !!start && start.seq > place.seq;
    for (const one of [...listeners]) {
      const isAsked = asked && one.isLike(asked);
      if (one.isBegun) one.recovered = true;
      else if (isAsked || !start || !one.isWaiting()) {
        begin(one, { epoch: epoch ?? '', seq: asked && !isAsked ? seq : (start?.seq ?? 0) });
        if (isAsked && isLost) enqueue(() => one.miss(channel, since, start));
      }
    }

    if (start ? place && !asked && (isLost || isGone) : isBroken) lose(start);
    else if (!start) place = undefined;
    else if (!place || (asked && !skips)) {
      // The first time; or back to where a listener wishes to begin.
      const begin = since && recovered ? since : start;
      place = begin;
      epochs.add(begin.epoch).add(start.epoch);
      enqueue(() => {
        done = begin;
      });
    } else epochs.add(start.epoch);
    isBroken = isGone = false;
    setStatus('subscribed');
    if (skips) renew();
    else if (isUnsettled()) subscribe();
  };

  /** What comes after this position is for this one too. */
  const begin = (one: Listener, at: Position) => {
    one.isBegun = one.recovered = true;
    enqueue(() => one.begin(at));
  };

  const refused = (frame: ErrorFrame) => {
    const { code, retryAfter } = frame;
    if (code === 'rate_limited' || code === 'unavailable' || code === 'internal') {
      timer = setTimeout(subscribe, retryAfter ?? backoff(++tries));
      return;
    }
    pending = undefined;
    const why = new BroadcastError(code, frame.message, { ...frame, channel });
    setStatus('failed', why);
    for (const one of [...listeners]) one.tell(why);
  };

  const release = () => {
    releaseTimer = undefined;
    if (listeners.size) return;
    clearTimeout(timer);
    pending = {};
    link.request({ type: 'unsubscribe', channel }, () => {});
    released(channel);
  };

  return {
    add(options: SubscribeOptions) {
      const one = createListener(channel, options, failed);
      clearTimeout(releaseTimer);
      releaseTimer = undefined;
      listeners.add(one);
      if (!place) isStale = false;
      if (place ? !one.isWaiting() : status === 'subscribed') begin(one, place ?? { epoch: '', seq: 0 });
      if (status === 'idle') status = 'subscribing';
      one.tellStatus(status, error);
      // After whatever else happens now: a component may come, go and come again at once.
      queueMicrotask(() => {
        if (!pending && listeners.size && (status !== 'subscribed' || isUnsettled() || isStale)) subscribe();
      });
      return () => {
        listeners.delete(one);
        if (!listeners.size) releaseTimer ??= setTimeout(release, RELEASE);
      };
    },

    receive(message: Message) {
      const { seq, epoch } = message;
      if (isStale || !listeners.size || tasks.length >= MOST) isStale = true;
      else if (seq === undefined || epoch === undefined) enqueue(() => deliver(message));
      // What comes while it subscribes comes again after the answer.
      else if (place && !pending) {
        const position = { epoch, seq };
        if (seq === place.seq + 1) {
          place = position;
          epochs.add(epoch);
          enqueue(() => deliver(message, position, true));
        } else if (seq > place.seq || !epochs.has(epoch)) renew();
        // It came before, and is acked again; what still waits will be.
        else if (!isBusy) enqueue(() => deliver(message, position));
      }
    },

    /** The server says that messages are lost. It may say so again. */
    lost({ epoch = '', seq = 0 }: ErrorFrame) {
      if (pending) return;
      if (!place || seq > place.seq || !epochs.has(epoch)) lose({ epoch, seq });
      else if (isAcking) acks.add(channel, { epoch, seq });
    },

    /** The server has ended the subscription. */
    refused,

    /** What the server may not have heard before the connection was lost. */
    tellDone() {
      if (done && wantsAcks()) acks.add(channel, done);
    },

    /** There is a connection; `restored` where its session has this channel. */
    up(restored?: Restored) {
      pending = undefined;
      isOwn = !!place;
      if (!restored) {
        if (listeners.size) subscribe();
        else released(channel);
        return;
      }
      const { epoch, seq = 0, recovered } = restored;
      if (!place && epoch !== undefined) {
        place = done = { epoch, seq };
        epochs.add(epoch);
        isGone = !recovered;
        isOwn = true;
        for (const one of listeners) if (!one.isWaiting()) begin(one, place);
      }
      if (!listeners.size) {
        isStale = true;
        status = 'subscribed';
        releaseTimer ??= setTimeout(release, UNASKED);
      } else if (!place) subscribed({ persistent: false });
      else if (recovered && wantsAcks() && seq <= place.seq) {
        isAcking = true;
        subscribed({ persistent: true, epoch: epoch!, seq: place.seq, recovered });
      } else subscribe();
    },

    /** What was forbidden may be allowed now. */
    retry() {
      if (status === 'failed') subscribe();
    },

    down() {
      pending = undefined;
      clearTimeout(timer);
      if (status !== 'subscribed') return;
      isBroken = true;
      setStatus('subscribing');
    },

    /** The client is closed. */
    end(why?: BroadcastError) {
      pending = undefined;
      clearTimeout(timer);
      setStatus(why ? 'failed' : 'idle', why);
    },
  };
};

export type Topic = ReturnType<typeof createTopic>;
