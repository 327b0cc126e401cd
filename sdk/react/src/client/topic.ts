/**
 * One channel: how far it was heard, and what the server is to be told of that.
 *
 * `place` is the position up to which messages were received. What listeners are told in order waits in `tasks`
 * while the promise of a callback holds it back.
 */
import type { Message, Position, SubscribeOptions, SubscriptionStatus } from '../types.js';
import type { Acks } from './acks.js';
import { BroadcastError } from './errors.js';
import { begin, call, isFresh, isWaiting, type Listener, miss, tell, tellStatus } from './listener.js';
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
  /** The epochs of the line of numbers that `place` is on. */
  const epochs = new Set<string>();
  let status: SubscriptionStatus = 'idle';
  /** A subscribe is under way. */
  let isPending = false;
  /** The next subscribe asks for what comes after `place`, whatever listeners wish. */
  let isOwn = false;
  /** What came could not be taken: it is fetched once it can. */
  let isStale = false;
  /** It was subscribed, and is not any more. */
  let isBroken = false;
  /** Messages were lost before this page had a place. */
  let isGone = false;
  /** The server waits for acks. */
  let isAcking: boolean | undefined;
  /** Counts subscribes: an ack of what came before would be taken for one of what comes after. */
  let run = 0;
  let timer: Timer;
  let releaseTimer: Timer;

  const setStatus = (next: SubscriptionStatus, error?: BroadcastError) => {
    if (status === 'subscribed') isBroken = true;
    status = next;
    for (const one of listeners) tellStatus(one, next, error);
  };

  const enqueue = (task: () => unknown) => {
    tasks.push(task);
    work();
  };

  const work = () => {
    while (!isBusy && tasks.length) {
      isBusy = true;
      const waits = tasks.shift()!() as Promise<unknown> | undefined;
      const next = () => {
        isBusy = false;
      };
      if (waits) waits.then(next).then(work);
      else next();
    }
    if (isStale && !isBusy && listeners.size) {
      isStale = false;
      if (place) renew();
      else lose();
    }
  };

  /** `mine` is the run in which it came. */
  const deliver = (message: Message, position?: Position, mine?: number) => {
    const fresh = [...listeners].filter((one) => isFresh(one, position));
    if (fresh[0]) heard(message);
    const waits = fresh.map((one) => call(one, 'onMessage', message)).filter(Boolean);
    const handled = () => position && mine === run && ack(position);
    return waits[0] ? Promise.all(waits).then(handled) : void handled();
  };

  const ack = (position: Position) => {
    if (isAcking) acks.add(channel, position);
  };

  /** Messages were or may have been missed: it goes on after `to`. */
  const lose = (to?: Position) => {
    const from = place;
    place = to;
    if (to) {
      epochs.clear();
      epochs.add(to.epoch);
    }
    enqueue(() => {
      // The server tells a loss again until it has this.
      if (to) ack(to);
      for (const one of listeners) miss(one, channel, from, to);
    });
  };

  /** This one hears what comes after this position. */
  const settle = (one: Listener, at: Position) => {
    one.isBegun = one.recovered = true;
    enqueue(() => begin(one, at));
  };

  /** Fetch what was missed after `place`. */
  const renew = () => {
    isOwn = true;
    subscribe();
  };

  const wantsAcks = () => [...listeners].some(({ options }) => options.ack !== false);

  /** Listeners wish something that the present subscription does not give. */
  const isUnsettled = () => [...listeners].some(isWaiting) || (place && !isAcking && wantsAcks());

  const subscribe = () => {
    clearTimeout(timer);
    if (!link.isOpen()) return;
    const asked = isOwn ? undefined : [...listeners].find(isWaiting)?.options;
    const { since, last } = asked ?? { since: place };
    isPending = true;
    isOwn = isStale = false;
    acks.flush();
    run++;
    isAcking = wantsAcks();
    if (status !== 'subscribing') setStatus('subscribing');
    link.request({ type: 'subscribe', channel, ack: isAcking || undefined, since, last }, (answer) => {
      if (!isPending) return;
      clearTimeout(timer);
      if (answer.type === 'ack') subscribed(answer, since, asked);
      else refused(answer);
    });
    timer = setTimeout(subscribe, ANSWER);
  };

  /** `since` is what was asked for; `asked` whose wish that was, if it was not the place of all. */
  const subscribed = (
    { epoch, seq = 0, replayed = 0, recovered }: SubscribeAck,
    since?: Position,
    asked?: SubscribeOptions,
  ) => {
    const start = epoch ? { epoch, seq: seq - replayed } : undefined;
    const isLost = since && !recovered;
    isPending = false;
    for (const one of listeners) {
      const isAsked = one.options === asked;
      if (one.isBegun) one.recovered = true;
      else if (isAsked || !start || !isWaiting(one)) {
        settle(one, { epoch: epoch ?? '', seq: start && (isAsked || !asked) ? start.seq : seq });
        if (isAsked && isLost) enqueue(() => miss(one, channel, since, start));
      }
    }

    // The others would miss what is between.
    const skips = asked && place && start && start.seq > place.seq;
    if (start ? place && !asked && (isLost || isGone) : isBroken) lose(start);
    // The first time, or back to where a listener wishes to begin; else it is where it was.
    else if (!skips) place = isLost ? start : (since ?? start);
    if (start) epochs.add(place!.epoch).add(start.epoch);
    isBroken = isGone = false;
    setStatus('subscribed');
    if (skips) renew();
    else if (isUnsettled()) subscribe();
  };

  const refused = ({ code, message, retryAfter }: ErrorFrame) => {
    if (code === 'rate_limited' || code === 'unavailable' || code === 'internal') {
      timer = setTimeout(subscribe, retryAfter ?? backoff(3));
      return;
    }
    const error = new BroadcastError(code, message, { channel });
    isPending = false;
    setStatus('failed', error);
    for (const one of listeners) tell(one, error);
  };

  const release = () => {
    clearTimeout(timer);
    link.request({ type: 'unsubscribe', channel }, () => {});
    released(channel);
  };

  return {
    add(options: SubscribeOptions) {
      const one: Listener = { options, failed, seen: new Map() };
      clearTimeout(releaseTimer);
      listeners.add(one);
      isStale &&= !!place;
      if (place ? !isWaiting(one) : status === 'subscribed') settle(one, place ?? { epoch: '', seq: 0 });
      if (status !== 'subscribed') status = 'subscribing';
      tellStatus(one, status);
      // After whatever else happens now: a component may come, go and come again at once.
      queueMicrotask(() => {
        if (!isPending && listeners.size && (status !== 'subscribed' || isUnsettled() || isStale))
          subscribe();
      });
      return () => {
        if (listeners.delete(one) && !listeners.size) releaseTimer = setTimeout(release, RELEASE);
      };
    },

    receive(message: Message) {
      const { seq, epoch } = message;
      const position = epoch && seq ? { epoch, seq } : undefined;
      if (isStale || !listeners.size || tasks.length >= MOST) isStale = true;
      else if (!position) enqueue(() => deliver(message));
      // What comes while it subscribes comes again after the answer.
      else if (place && !isPending) {
        const isNext = position.seq === place.seq + 1;
        if (isNext) {
          place = position;
          epochs.add(position.epoch);
        } else if (position.seq > place.seq || !epochs.has(position.epoch)) return renew();
        // What came before is acked again; but what still waits will be.
        const mine = run;
        if (isNext || !isBusy) enqueue(() => deliver(message, position, mine));
      }
    },

    /** The server says unasked that messages are lost (it may say so again), or has ended the subscription. */
    refused(frame: ErrorFrame) {
      const { code, epoch = '', seq = 0 } = frame;
      if (code !== 'history_lost') refused(frame);
      else if (place && seq <= place.seq && epochs.has(epoch)) ack({ epoch, seq });
      else lose({ epoch, seq });
    },

    /** Tell what is handled: the server may not have heard it before the connection was lost. */
    ackAgain() {
      if (place && !isBusy) ack(place);
    },

    /** There is a connection; `restored` where its session has this channel. */
    up(restored?: Restored) {
      isPending = false;
      isOwn = !!place;
      if (restored) {
        const { epoch, seq = 0, recovered } = restored;
        if (!place && epoch) {
          isOwn = true;
          place = { epoch, seq };
          epochs.add(epoch);
          isGone = !recovered;
          for (const one of listeners) if (!isWaiting(one)) settle(one, place);
        }
        if (!listeners.size) {
          isStale = true;
          status = 'subscribed';
          clearTimeout(releaseTimer);
          releaseTimer = setTimeout(release, UNASKED);
        } else if (!place) subscribed({});
        else if (recovered && wantsAcks() && seq <= place.seq) {
          isAcking = true;
          subscribed({ epoch: epoch!, seq: place.seq, recovered });
        } else subscribe();
      } else if (listeners.size) subscribe();
      else released(channel);
    },

    down() {
      isPending = false;
      clearTimeout(timer);
      if (status === 'subscribed') setStatus('subscribing');
    },

    /** The client is closed. */
    end(error?: BroadcastError) {
      setStatus(error ? 'failed' : 'idle', error);
    },
  };
};

export type Topic = ReturnType<typeof createTopic>;
