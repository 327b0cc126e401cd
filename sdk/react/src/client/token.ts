/** The JWT of a connection: asked for when needed, kept while it is good, renewed in place before its end. */
import type { ClientOptions, TokenRequest } from '../types.js';
import { LONGEST_TIMER, now, type Timer } from './timing.js';
import type { Link } from './wire.js';

export const createToken = (getToken: ClientOptions['getToken'], link: Link, renewed: () => void) => {
  let token: string | null = null;
  let expires = Infinity;
  let rejected = false;
  let attempt = 0;
  let timer: Timer;

  const ask = async (reason: TokenRequest['reason'], signal: AbortSignal) => {
    const next = await getToken!({ reason, attempt: attempt++, signal });
    attempt = 0;
    return next;
  };

  const renew = async (signal: AbortSignal) => {
    const again = () => !signal.aborted && expires - now() > 1000 && plan(expires - now(), signal);
    try {
      const next = await ask('renew', signal);
      if (signal.aborted) return;
      if (next === null) again();
      else
        link.request({ type: 'auth', token: next }, (frame) => {
          if (frame.type === 'error') return again();
          token = next;
          plan(frame.expiresAt! - frame.timestamp, signal);
          renewed();
        });
    } catch {
      again();
    }
  };

  /** Renew when four fifths of the time that is left are over; NaN: there is no end. */
  const plan = (left: number, signal: AbortSignal) => {
    clearTimeout(timer);
    expires = left >= 0 ? now() + left : Infinity;
    if (getToken && left >= 0) timer = setTimeout(renew, Math.min(left * 0.8, LONGEST_TIMER), signal);
  };

  return {
    plan,

    /** The token to connect with. */
    async get(signal: AbortSignal) {
      if (getToken && (rejected || token === null || expires < now())) {
        const next = await ask(rejected ? 'rejected' : token === null ? 'connect' : 'renew', signal);
        if (signal.aborted) return null;
        token = next;
        expires = Infinity;
        rejected = false;
      }
      return token;
    },

    /** The server did not like it: the next one is a fresh one. */
    reject() {
      rejected = true;
    },

    /** Somebody else may be here now. */
    forget() {
      token = null;
    },

    stop: () => clearTimeout(timer),
  };
};
