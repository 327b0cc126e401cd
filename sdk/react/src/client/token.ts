/** The JWT of a connection: asked for when needed, kept while it is good, renewed in place before its end. */
import type { ClientOptions, TokenRequest } from '../types.js';
import { after, now, type Timer } from './timing.js';
import type { Link } from './wire.js';

export const createToken = (getToken: ClientOptions['getToken'], link: Link) => {
  let token: string | null = null;
  let expires = NaN;
  let attempt = 0;
  let timer: Timer;

  const ask = async (reason: TokenRequest['reason'], signal: AbortSignal) => {
    const next = await getToken!({ reason, attempt: attempt++, signal });
    attempt = 0;
    return next;
  };

  const renew = async (signal: AbortSignal) => {
    const again = () => signal.aborted || plan(expires - now(), signal);
    try {
      const next = await ask('renew', signal);
      if (!next || signal.aborted) return again();
      link.request({ type: 'auth', token: next }, (frame) => {
        if (frame.type === 'error') return again();
        token = next;
        plan(frame.expiresAt! - frame.timestamp, signal);
      });
    } catch {
      again();
    }
  };

  /** Renew when four fifths of the time that is left are over; NaN: there is no end. */
  const plan = (left: number, signal: AbortSignal) => {
    expires = now() + left;
    if (getToken && left > 0) timer = after(Math.max(left * 0.8, 1000), renew, signal);
  };

  const self = {
    plan,
    stop: () => clearTimeout(timer),
    /** Why the next connection needs another token, if it does. */
    need: 'connect' as TokenRequest['reason'] | undefined,

    /** The token to connect with. */
    async get(signal: AbortSignal) {
      const reason = self.need ?? (expires < now() ? 'renew' : undefined);
      if (getToken && reason) {
        const next = await ask(reason, signal);
        if (signal.aborted) return null;
        token = next;
        expires = NaN;
        self.need = next ? undefined : 'connect';
      }
      return token;
    },
  };
  return self;
};
